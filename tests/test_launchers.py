"""Every launcher's environment, as the launchers themselves set it, becomes the right place."""

from __future__ import annotations

import subprocess
import sys

import pytest

from blsrdma import launchers
from blsrdma.errors import SettingsError
from blsrdma.launchers import find, first_host, meeting, place

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
OPEN_MPI = {  # 5.0.11, one host
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-vm-24596@1", "PMIX_RANK": "1",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "11"}
SLURM = {  # 22.05, three hosts, 2 + 2 + 1 tasks
    "SLURM_PROCID": "3", "SLURM_NTASKS": "5", "SLURM_STEP_NUM_TASKS": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu-[007-008,011]", "SLURM_JOB_NODELIST": "gpu-[001-011]",
}  # fmt: skip


def facts(found):
    return (found.launcher, found.rank, found.world_size, found.local_rank, found.local_world_size, found.host)


def test_torchrun() -> None:
    found = place(TORCHRUN)
    assert facts(found) == ("torchrun", 5, 8, 1, 4, "node1")
    assert (found.port, found.job, found.hosted) == (29500, "attempt2", True)
    assert found.ranks_here() == 4


def test_variables_set_by_hand() -> None:
    found = place({"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "h", "MASTER_PORT": "1234"})
    assert facts(found) == ("environment", 0, 3, None, None, "h")
    assert (found.port, found.job, found.hosted, found.ranks_here()) == (1234, "attempt0", False, 3)


def test_open_mpi() -> None:
    found = place(OPEN_MPI)
    assert facts(found) == ("Open MPI", 1, 2, 1, 2, "127.0.0.1")
    assert found == place(OPEN_MPI | {"PMIX_SERVER_URI21": "x"})  # the same on every rank but for its number
    other = place(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-vm-24597@1"})
    assert other.job != found.job
    assert other.port != found.port
    older = {"OMPI_MCA_ess_base_jobid": "1815347201", **{k: v for k, v in OPEN_MPI.items() if "PMIX" not in k}}  # 4.1
    assert meeting(1, 2, older).job == "1815347201"


def test_mpich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_hydra_proxy", lambda: 4242)
    found = place(MPICH)
    assert facts(found) == ("MPICH", 1, 2, 1, 2, "127.0.0.1")
    assert found.job == "hydra-4242"
    assert found.port
    monkeypatch.setattr(launchers, "_hydra_proxy", lambda: 4243)
    assert place(MPICH).port != found.port


def test_slurm() -> None:
    found = place(SLURM)
    assert facts(found) == ("Slurm", 3, 5, 1, 2, "gpu-007")
    assert found.job == "4711.0."
    assert found.port == place(SLURM | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}).port
    assert place(SLURM | {"SLURM_NODEID": "2"}).local_world_size == 1
    assert place(SLURM | {"SLURM_STEP_RESV_PORTS": "12345-12348"}).port == 12345
    assert place(SLURM | {"SLURM_STEP_ID": "1"}).port != found.port


def test_in_a_slurm_job_but_no_rank() -> None:
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert find(batch) is None
    assert find(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None  # srun --pty bash


def test_who_wins() -> None:
    """What was started last, inside of the others, has set its variables too."""
    assert place(SLURM | TORCHRUN).launcher == "torchrun"
    assert place(SLURM | MPICH).launcher == "MPICH"
    assert place(SLURM | OPEN_MPI).launcher == "Open MPI"


@pytest.mark.parametrize("mpi", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_an_mpi_on_several_hosts(mpi: dict[str, str]) -> None:
    several = mpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MPI_LOCALNRANKS": "1"}
    with pytest.raises(SettingsError, match=r"does not tell where rank 0 is: set MASTER_ADDR.*MASTER_ADDR"):
        meeting(1, 2, several)
    by_hand = meeting(1, 2, several | {"MASTER_ADDR": "a", "MASTER_PORT": "77"})
    assert (by_hand.host, by_hand.port) == ("a", 77)
    allocated = meeting(1, 2, several | {"SLURM_JOB_NODELIST": "c[09-12]", "SLURM_JOB_ID": "12"})
    assert allocated.host == "c09"
    assert allocated.port


def test_explicit_ranks_need_the_rendezvous_alone() -> None:
    found = meeting(1, 2, {"MASTER_ADDR": "h", "MASTER_PORT": "5"})
    assert (found.host, found.port, found.job) == ("h", 5, "")
    with pytest.raises(SettingsError, match="none in the environment: MASTER_ADDR and MASTER_PORT not set"):
        meeting(1, 2, {})
    with pytest.raises(SettingsError, match="none in the environment: MASTER_PORT not set"):
        meeting(0, 2, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"})


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "RANK and WORLD_SIZE are not set"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        (TORCHRUN | {"RANK": "-1"}, r"RANK = '-1': must be an integer >= 0"),
        (TORCHRUN | {"RANK": "8"}, r"RANK = 8: the world has 8 ranks"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, r"MASTER_PORT = '70000': must be a port"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "many"}, r"SLURM_STEP_NUM_TASKS = 'many'"),
    ],
)
def test_what_makes_no_sense(environment: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        place(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("", ""), ("vm", "vm"), ("n1,n2", "n1"), ("n[3-5,9]", "n3"), ("gpu-[007,010-012],login1", "gpu-007"),
     ("r[1-2]c[03-04]-ib,x", "r1c03-ib"), ("a.b.example.org,c", "a.b.example.org")],
)  # fmt: skip
def test_first_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_proxy_is_found_through_shells(tmp_path) -> None:
    """A rank may be started by a script: its ancestor with the proxy's name counts."""
    proxy = tmp_path / "hydra_pmi_proxy"
    proxy.symlink_to("/bin/sh")
    code = "from blsrdma.launchers import _hydra_proxy; print(_hydra_proxy())"
    ask = f"sh -c '{sys.executable} -c \"{code}\"; true'"
    running = subprocess.run([proxy, "-c", f"echo $$; {ask}; true"], capture_output=True, text=True, timeout=60)
    own, found = running.stdout.split()
    assert own == found, running
    assert launchers._hydra_proxy() == 0  # pytest has none
