"""What this machine offers an exchange, what stands in its way, and the cure: `python -m blsrdma info`.

`Machine` is what is looked at; each check turns a part of it into lines with a verdict: ok, a note (it works, but
slower or not everywhere) or a problem (an exchange would fail).
"""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from blsrdma import __version__, hosts
from blsrdma.errors import SettingsError
from blsrdma.settings import OTHER_VARIABLES, Settings, default_memory_limit, format_size
from blsrdma.windows import WindowGeometry, windows_needed

Verdict: TypeAlias = Literal["ok", "note", "problem"]
_UCXX = ("ucxx-cu12", "ucxx-cu13", "ucxx")
_PREFIXES = ("UCX_", "BLSRDMA_", "RAPIDS_LIBUCX_")
# The kernel's own numbers of the namespaces that a host begins with (include/linux/proc_ns.h).
_OF_THE_HOST = {"ipc": "ipc:[4026531839]", "pid": "pid:[4026531836]"}


@dataclass(frozen=True)
class Line:
    """One thing, what it is, what to think of it, and what to do or why it matters; `data` is for machines."""

    section: str
    name: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""
    data: Any = None


def _line(
    section: str, name: str, value: str, fine: object = True, advice: str = "", bad: Verdict = "note", data: Any = None
) -> Line:
    return Line(section, name, value, "ok" if fine else bad, "" if fine else advice, data)


@dataclass(frozen=True)
class Machine:
    """What the checks look at; sizes in bytes."""

    ranks: int  # on this host, for whom sizes are judged
    environment: Mapping[str, str]
    read: Callable[[str], str]  # a file of /proc or /sys; "" where there is none
    version: Callable[[str], str]  # of an installed distribution; "" where it is not
    cores: int
    memlock: int  # -1: unlimited
    shm: tuple[int, int]  # total and free of /dev/shm; zeros: not usable
    ports: Mapping[str, str]  # RDMA ports that the kernel knows -> their state
    namespaces: Mapping[str, str]
    ucx: Mapping[str, Any] = field(default_factory=dict)  # what try_ucx() in blsrdma/__main__.py answers
    cma: str = ""  # why one process cannot write another's memory; "": it can
    gpu: Mapping[str, Any] = field(default_factory=dict)  # what try_gpu() there answers

    def settings(self) -> Settings:
        """Those of the environment; the defaults where it is wrong."""
        try:
            return Settings.resolve(self.environment)
        except SettingsError:
            return Settings()

    def arena_bytes(self) -> int:
        """Registered memory of one rank, if all ranks are on this host."""
        chosen = self.settings()
        windows = windows_needed(chosen.lag)
        return WindowGeometry(self.ranks, windows, chosen.window_bytes, chosen.copy_self).arena_bytes


def this_machine(
    ranks: int | None,
    ucx: Callable[[int], Mapping[str, Any]],
    cma: Callable[[], str],
    gpu: Callable[[], Mapping[str, Any]],
) -> Machine:
    """Look at this machine; `ucx`, called with a size for windows, `cma` and `gpu` try what has to be tried."""
    exempt = int(_search(r"CapEff:\s*(\w+)", _read("/proc/self/status")) or "0", 16) >> 14 & 1  # CAP_IPC_LOCK
    shm = os.statvfs("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    untried = Machine(
        ranks=ranks or int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or max(2, hosts.cores()),
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)},
        read=_read,
        version=_version,
        cores=hosts.cores(),
        memlock=-1 if exempt else resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        shm=(shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize) if shm else (0, 0),
        ports={f"{p.parts[-3]}:{p.name}": f"{_read(f'{p}/state')}, {_read(f'{p}/link_layer')}" for p in ports},
        namespaces={name: str(Path(f"/proc/self/ns/{name}").readlink()) for name in _OF_THE_HOST},
    )
    return replace(untried, ucx=ucx(min(untried.arena_bytes(), 64 << 20)), cma=cma(), gpu=gpu())


def examine(machine: Machine) -> list[Line]:
    """All checks, in the order in which they are shown."""
    return [line for check in (_versions, _transports, _gpus, _resources, _settings) for line in check(machine)]


# --- the checks


def _versions(machine: Machine) -> Iterator[Line]:
    yield Line("versions", "blsrdma", __version__)
    yield Line("versions", "Python", f"{platform.python_version()} ({sys.executable})")
    yield Line("versions", "kernel", f"{platform.system()} {platform.release()} {platform.machine()}")
    cures = {"torch": "pip install torch", "ucxx": "pip install 'blsrdma[cu12]' (or [cu13]; both run without CUDA too)"}
    for name, cure in cures.items():
        found = next(filter(None, map(machine.version, _UCXX if name == "ucxx" else [name])), "")
        yield _line("versions", name, found or "not installed", found, cure, "problem")
    if "libucp" in machine.ucx:
        yield Line("versions", "UCX", f"{machine.ucx['version']} from {machine.ucx['libucp']}")


def _transports(machine: Machine) -> Iterator[Line]:
    ucx, at = machine.ucx, "transports"
    if "error" in ucx:
        yield Line(at, "UCX", ucx["error"], "problem", ucx.get("advice", ""))
    for warning in ucx.get("said", []):
        yield Line(at, "UCX says", warning, "note")
    if "resources" not in ucx:
        return
    took = f"{ucx['seconds'] * 1e3:.1f} ms"
    yield Line(
        at, "windows", f"{format_size(ucx['allocated'])} allocated and registered in {took}", data=ucx["allocated"]
    )
    devices: dict[str, list[str]] = {}  # transport -> devices
    rdma: dict[str, list[str]] = {}  # device -> transports
    for transport, device in ucx["resources"]:
        devices.setdefault(transport, []).append(device)
        if re.match(r"(rc|dc|ud|gga)_", transport):
            rdma.setdefault(device, []).append(transport)
    mapped = [name for name in ("sysv", "posix", "xpmem") if name in devices]
    advice = "ranks on one host cannot store into each other's windows and use slower puts: let UCX_TLS contain sm"
    yield _line(at, "shared memory", ", ".join(mapped) or "none", mapped, advice, data=mapped)
    if "cma" in devices:
        advice = ("UCX offers it and would fail: set UCX_TLS=^cma, or permit it: sysctl kernel.yama.ptrace_scope=0; "
                  "in a container --cap-add=SYS_PTRACE")  # fmt: skip
        works = machine.cma or "works: one process wrote another's memory"
        yield _line(at, "cma", works, not machine.cma, advice, "problem", not machine.cma)
    else:
        why = f" ({machine.cma})" if machine.cma else ""
        advice = "large puts between ranks on one host are slower; direct stores (the default) do not need it"
        yield Line(at, "cma", "UCX does not offer it" + why, "note", advice, False)
    tcp = devices.get("tcp", [])
    advice = "other hosts cannot be reached: bring an interface up, or look at UCX_TLS and UCX_NET_DEVICES"
    yield _line(at, "tcp", ", ".join(tcp) or "none", rdma or set(tcp) - {"lo"}, advice, data=tcp)
    for device, names in rdma.items():
        yield Line(at, "RDMA", f"{device}: {', '.join(names)}", data=device)
    for port in machine.ports.keys() - rdma.keys():
        value = f"{port}: the kernel has it ({machine.ports[port]}), UCX does not use it"
        advice = ("it must be ACTIVE, allowed by UCX_TLS and UCX_NET_DEVICES, and UCX built with verbs, which the "
                  "wheel's is not: install such a one, and set RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true")  # fmt: skip
        yield Line(at, "RDMA", value, "note", advice, port)
    if not rdma and not machine.ports:
        yield Line(at, "RDMA", "no InfiniBand or RoCE device here")
    gpu = [name for name in devices if re.match(r"cuda|gdr|rocm|ze_", name)]
    yield Line(at, "GPU", ", ".join(gpu) or "none that UCX sees", data=gpu)


def _gpus(machine: Machine) -> Iterator[Line]:
    gpu, at = machine.gpu, "GPUs"
    if "driver" not in gpu:
        yield Line(at, "CUDA", gpu.get("error", "not looked for"))
        return
    devices = gpu["devices"]
    version = f"{gpu['driver'] // 1000}.{gpu['driver'] % 1000 // 10}"
    seen = f"{len(devices) or 'no'} GPU{'s' * (len(devices) != 1)}"
    yield Line(at, "CUDA", f"the driver is for CUDA {version}, and sees {seen}", data=gpu["driver"])
    for number, each in enumerate(devices):
        capability = ".".join(map(str, each["capability"]))
        memory = f"{format_size(each['total_bytes'])}, {format_size(each['free_bytes'])} of it free"
        yield Line(at, f"GPU {number}", f"{each['name']}, compute capability {capability}, {memory}", data=each)
    if not devices:
        return
    works = gpu["ipc"] or "works: one process mapped another's GPU memory"
    advice = ("messages between ranks on this host are staged through host memory; ranks in containers have to share "
              "them: docker run --ipc=host --pid=host")  # fmt: skip
    yield _line(at, "CUDA IPC", works, not gpu["ipc"], advice, data=not gpu["ipc"])
    advice = ("lookups on GPUs compile their kernels with it: pip install nvidia-cuda-nvrtc-cu12 (CUDA 12) or "
              "nvidia-cuda-nvrtc (CUDA 13), and cuda-bindings of the same CUDA")  # fmt: skip
    yield _line(at, "NVRTC", gpu["nvrtc"] or gpu["no_nvrtc"], gpu["nvrtc"], advice, data=gpu["nvrtc"])


def _resources(machine: Machine) -> Iterator[Line]:
    read, at, cores = machine.read, "machine", machine.cores
    quotas = [text.split() for text in _control_group(read, "cpu", "cpu.max", "cpu.cfs_quota_us")]
    quota = min((int(q[0]) / int(q[1] if q[1:] else 100_000) for q in quotas if q[0].isdigit()), default=float(cores))
    advice = "waits that spin are throttled: raise the time (docker --cpus), or take cores away (--cpuset-cpus)"
    time = "" if quota >= cores else f", but the control group grants the time of {quota:g}"
    yield _line(at, "cores", f"{cores} that this process may use{time}", quota >= cores, advice, data=cores)

    arena, meminfo = machine.arena_bytes(), read("/proc/meminfo")
    need = machine.ranks * arena
    everything, free = (1024 * int(_search(rf"{name}:\s*(\d+)", meminfo) or 0) for name in ("MemTotal", "MemAvailable"))
    texts = _control_group(read, "memory", "memory.max", "memory.limit_in_bytes")
    granted = min([int(text) for text in texts if text.isdigit()], default=everything)
    bound = f", the control group grants {format_size(granted)}" if granted < everything else ""
    value = f"{format_size(everything)}, {format_size(free)} of it available{bound}"
    less = "take a smaller BLSRDMA_WINDOW_BYTES or BLSRDMA_LAG, or fewer ranks"
    advice = f"windows take {format_size(need)}: {less}"
    yield _line(at, "memory", value, need <= min(free, granted), advice, "problem", free)
    limit = machine.settings().memory_limit
    limit = default_memory_limit(machine.ranks) if limit is None else limit
    value = f"{format_size(arena)} for each of {machine.ranks} ranks on this host, were there no others"
    advice = f"over the memory_limit of {format_size(limit)}: {less}"
    yield _line(at, "windows", value, arena <= limit, advice, "problem", arena)

    locked = "unlimited" if machine.memlock < 0 else format_size(machine.memlock)
    enough = machine.memlock < 0 or not machine.ports
    locked += "" if machine.ports else " (matters to RDMA devices alone)"
    advice = ("RDMA devices lock what they register: ulimit -l unlimited; for good, memlock in limits.conf or "
              "LimitMEMLOCK=infinity in the service (slurmd, sshd); docker run --ulimit memlock=-1")  # fmt: skip
    yield _line(at, "memlock", locked, enough, advice, "problem", machine.memlock)
    segment, pages = (int(read(f"/proc/sys/kernel/{name}") or 0) for name in ("shmmax", "shmall"))
    whole = pages * os.sysconf("SC_PAGE_SIZE")
    room = arena <= segment and need <= whole
    value = f"at most {format_size(segment)} per segment, {format_size(whole)} in all"
    advice = "windows are such segments where they fit: sysctl kernel.shmmax and kernel.shmall"
    yield _line(
        at,
        "SysV memory",
        "unlimited" if min(segment, whole) >= 1 << 60 else value,
        room,
        advice,
        data=min(segment, whole),
    )
    size, free = machine.shm
    value = f"{format_size(size)}, {format_size(free)} free" if size else "not writable"
    advice = "mount a larger one (docker run --shm-size=1g, or --ipc=host; Kubernetes: an emptyDir of medium Memory)"
    bad: Verdict = "note" if room else "problem"
    yield _line(at, "/dev/shm", value, free >= max(need, 64 << 20), advice, bad, free)
    scope = read("/proc/sys/kernel/yama/ptrace_scope")
    meaning = {"": "no Yama here", "0": "0 (any process of the user)", "1": "1 (UCX asks for an exception)"}
    advice = "cma, and reading large messages, need sysctl kernel.yama.ptrace_scope=0, or 1"
    yield _line(at, "ptrace scope", meaning.get(scope, scope), scope in meaning, advice)
    huge = _search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled")) or "none"
    yield Line(at, "huge pages", f"{read('/proc/sys/vm/nr_hugepages') or 0} reserved, transparent: {huge}")
    own = [name for name, inode in machine.namespaces.items() if inode != _OF_THE_HOST[name]]
    advice = "ranks in other containers of this host count as other hosts: docker run --ipc=host --pid=host joins them"
    yield _line(
        at, "namespaces", f"{' and '.join(own)} not the host's" if own else "the host's", not own, advice, data=own
    )


def _settings(machine: Machine) -> Iterator[Line]:
    theirs, known = machine.environment, [each.name for each in fields(Settings)]
    for variable in theirs:  # those that are no settings: refused by name
        if variable.startswith("BLSRDMA_") and variable not in OTHER_VARIABLES:
            known += {variable.removeprefix("BLSRDMA_").lower()} - set(known)
    for name in known:
        variable = "BLSRDMA_" + name.upper()
        given = {variable: theirs[variable]} if variable in theirs else {}
        try:
            value = getattr(Settings.resolve(given), name)
            shown = "not set" if value is None else format_size(value) if name.endswith("_bytes") else str(value)
            yield Line("settings", name, f"{shown} ({variable if given else 'default'})", data=value)
        except SettingsError as error:
            yield Line("settings", name, str(error), "problem", f"correct or unset {variable}")
    for variable in (name for name in theirs if not name.startswith("BLSRDMA_")):
        value, unused = theirs[variable], machine.ucx.get("unused", {})
        ours = machine.ucx.get("settings", {}).get(variable.removeprefix("UCX_"), value)
        advice = f"it overrides blsrdma's {ours}" if variable not in unused else f"UCX ignores it{unused[variable]}"
        yield _line("settings", variable, value, value == ours and variable not in unused, f"{advice}: unset it")


# --- looking


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def _control_group(read: Callable[[str], str], controller: str, *names: str) -> Iterator[str]:
    """What the files `names` of this process's control group and those above it say, in either version of them."""
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = f"/sys/fs/cgroup/{controller}" if controllers else "/sys/fs/cgroup"
            for folder in (Path(path), *Path(path).parents):
                yield from filter(None, (read(f"{root}{folder}/{name}".replace("//", "/")) for name in names))
