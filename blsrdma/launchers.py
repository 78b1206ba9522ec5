"""Which rank this process is, and where all ranks meet: read from what its launcher left in the environment.

| launcher                  | rank and world size                        | the ranks of this host                         | where rank 0 is |
|---------------------------|--------------------------------------------|------------------------------------------------|-----------------|
| torchrun, or set by hand  | RANK, WORLD_SIZE                           | LOCAL_RANK, LOCAL_WORLD_SIZE                   | MASTER_ADDR, MASTER_PORT |
| Open MPI's mpirun         | OMPI_COMM_WORLD_RANK, _SIZE                | OMPI_COMM_WORLD_LOCAL_RANK, _SIZE              | this host, if all ranks are |
| MPICH's mpiexec (Hydra),  | PMI_RANK, PMI_SIZE                         | MPI_LOCALRANKID, MPI_LOCALNRANKS               | this host, if all ranks are |
| also Intel MPI's          |                                            |                                                | |
| Slurm's srun              | SLURM_PROCID, SLURM_STEP_NUM_TASKS         | SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE       | the step's first host |

The first that is there counts. MASTER_ADDR and MASTER_PORT, where set, win; without a port, one is derived from the job's
identity, which is also part of the keys in the store, so that two jobs which chance on the same port do not mix. Under an
MPI on several hosts the first host of a Slurm allocation is taken; outside of one MASTER_ADDR has to be set, for neither
MPI tells where rank 0 runs.
"""  # noqa: E501 (a table)

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blsrdma.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Where ports are derived: below those that Linux gives to connections (32768 and up).
_FIRST_PORT, _PORTS = 10_000, 20_000


@dataclass(frozen=True)
class Place:
    """One rank's place in a job."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None = None  # among the ranks of this host
    local_world_size: int | None = None
    host: str = ""  # of rank 0; "": the launcher does not say
    port: int = 0
    job: str = ""  # what tells this run of the ranks from others
    hosted: bool = False  # the launcher serves the store at host:port; else rank 0 has to

    def ranks_here(self) -> int:
        """How many ranks are on this host, as far as is known: all of them where nothing is said."""
        return self.local_world_size or self.world_size


def find(environment: Mapping[str, str] | None = None) -> Place | None:
    """This process's place; None where no launcher has started it. Raises SettingsError for values without sense."""
    environment = os.environ if environment is None else environment
    for name, read in _LAUNCHERS.items():
        if name in environment:
            place = read(environment)
            if place is not None:
                return _checked(place, name)
    return None


def place(environment: Mapping[str, str] | None = None) -> Place:
    """As find(), but raises SettingsError where no launcher has started this process."""
    found = find(environment)
    if found is None:
        raise SettingsError(
            "RANK and WORLD_SIZE are not set, nor any other launcher's variables: pass rank and world_size, or start "
            "under torchrun, srun or mpirun"
        )
    return found


def meeting(rank: int, world_size: int, environment: Mapping[str, str] | None = None) -> Place:
    """Where rank `rank` of `world_size` finds the store: host and port are set. Raises SettingsError where it is not
    known, with what to set."""
    environment = os.environ if environment is None else environment
    found = find(environment) or _checked(
        Place("", rank, world_size, host=environment.get("MASTER_ADDR", ""), port=_port(environment)), "rank"
    )
    if found.host and found.port:
        return found
    lacking = " and ".join(
        name for name, value in (("MASTER_ADDR", found.host), ("MASTER_PORT", found.port)) if not value
    )
    if found.launcher in ("Open MPI", "MPICH"):
        pass_on = "mpirun -x MASTER_ADDR=HOST" if found.launcher == "Open MPI" else "mpiexec -genv MASTER_ADDR HOST"
        raise SettingsError(
            f"{found.launcher} has started ranks on several hosts and does not tell where rank 0 is: set {lacking} "
            f"(such as {pass_on}, and MASTER_PORT likewise)"
        )
    raise SettingsError(f"no store given, and none in the environment: {lacking} not set")


# --- the launchers


def _by_variables(environment: Mapping[str, str]) -> Place:
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(
        "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment",
        _number(environment, "RANK"),
        _number(environment, "WORLD_SIZE"),
        _optional(environment, "LOCAL_RANK"),
        _optional(environment, "LOCAL_WORLD_SIZE"),
        environment.get("MASTER_ADDR", ""),
        _port(environment),
        f"attempt{attempt}",
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _open_mpi(environment: Mapping[str, str]) -> Place:
    # 5: prterun-HOST-PID@1; 4: a number that mpirun drew.
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid", "")
    world, local = (_number(environment, "OMPI_COMM_WORLD_" + each) for each in ("SIZE", "LOCAL_SIZE"))
    return Place(
        "Open MPI",
        _number(environment, "OMPI_COMM_WORLD_RANK"),
        world,
        _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local,
        _mpi_host(environment, world == local),
        _port(environment, job),
        job,
    )


def _hydra(environment: Mapping[str, str], proxy: Callable[[], int] | None = None) -> Place:
    world, local = _number(environment, "PMI_SIZE"), _optional(environment, "MPI_LOCALNRANKS")
    slurm = environment.get("SLURM_JOB_ID", "")
    # Hydra names its jobs nowhere: on one host its proxy's process tells them apart, on several a Slurm job may.
    job = f"hydra-{(proxy or _hydra_proxy)()}" if local == world else f"hydra-slurm-{slurm}" if slurm else ""
    return Place(
        "MPICH",
        _number(environment, "PMI_RANK"),
        world,
        _optional(environment, "MPI_LOCALRANKID"),
        local,
        _mpi_host(environment, world == local),
        _port(environment, job),
        job,
    )


def _slurm(environment: Mapping[str, str]) -> Place | None:
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return None  # a batch script itself: its PROCID is 0, but it is no rank
    world = _number(environment, "SLURM_STEP_NUM_TASKS")
    if world == 1:
        return None  # `srun --pty bash` or the like: a shell, in which other launchers may be used
    job = ".".join(environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    tasks = _expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _optional(environment, "SLURM_NODEID")
    reserved = re.match(r"\d+", environment.get("SLURM_STEP_RESV_PORTS", ""))
    return Place(
        "Slurm",
        _number(environment, "SLURM_PROCID"),
        world,
        _optional(environment, "SLURM_LOCALID"),
        tasks[node] if node is not None and node < len(tasks) else None,
        environment.get("MASTER_ADDR") or _first_host(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
        int(reserved[0]) if reserved and "MASTER_PORT" not in environment else _port(environment, job),
        job,
    )


_LAUNCHERS: dict[str, Callable[[Mapping[str, str]], Place | None]] = {
    "RANK": _by_variables,
    "OMPI_COMM_WORLD_RANK": _open_mpi,
    "PMI_RANK": _hydra,
    "SLURM_PROCID": _slurm,
}


# --- the parts


def first_host(nodes: str) -> str:
    """The first of a Slurm node list: 'gpu-[007-012,020],login1' gives 'gpu-007'; '' gives ''."""
    head = re.match(r"[^,\[\]]*(?:\[[^\]]*\][^,\[\]]*)*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", head[0]) if head else ""


def _first_host(environment: Mapping[str, str], *names: str) -> str:
    return first_host(next((environment[name] for name in names if environment.get(name)), ""))


def _expand_counts(text: str) -> list[int]:
    """Slurm's '2(x3),1' as [2, 2, 2, 1]; [] for what is not of this form."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _mpi_host(environment: Mapping[str, str], all_here: bool) -> str:
    given = environment.get("MASTER_ADDR")
    return given or ("127.0.0.1" if all_here else _first_host(environment, "SLURM_JOB_NODELIST"))


def _hydra_proxy() -> int:
    """The process that started all ranks of this host, perhaps through shells: 0 where there is none."""
    pid = os.getppid()
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return 0
        name, _, rest = stat.partition("(")[2].rpartition(")")
        if name.startswith("hydra_pmi_proxy"[:15]):  # the kernel keeps 15 characters
            return pid
        pid = int(rest.split()[1])
    return 0


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise SettingsError(f"{name} is not set: pass rank and world_size, or start under a launcher that sets it")
    if not (text.isascii() and text.isdigit()):
        raise SettingsError(f"{name} = {text!r}: must be an integer >= 0")
    return int(text)


def _optional(environment: Mapping[str, str], name: str) -> int | None:
    return _number(environment, name) if name in environment else None


def _port(environment: Mapping[str, str], job: str = "") -> int:
    text = environment.get("MASTER_PORT")
    if text is None:
        return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS if job else 0
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise SettingsError(f"MASTER_PORT = {text!r}: must be a port, 1 to 65535")
    return int(text)


def _checked(place: Place, name: str) -> Place:
    if place.world_size < 1 or place.rank >= place.world_size:
        raise SettingsError(f"{name} = {place.rank}: the world has {place.world_size} ranks ({place.launcher})")
    return place


__all__ = ["Place", "find", "first_host", "meeting", "place"]
