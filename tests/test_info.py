"""`python -m blsrdma info`: what it prints here, and its verdicts on machines that are made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import blsrdma.__main__ as command
from blsrdma.info import Line, Machine, examine
from blsrdma.settings import Settings
from tests.gpu import simulated

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30

FILES = {
    "/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB",
    "/proc/sys/kernel/shmmax": "18446744073692774399",
    "/proc/sys/kernel/shmall": "18446744073692774399",
    "/proc/self/cgroup": "0::/a/b",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
}
UCX = {
    "version": "1.21.0", "libucp": "/usr/lib/libucp.so", "allocated": 4096, "seconds": 0.001, "said": [], "unused": {},
    "settings": {"RNDV_THRESH": "inf"},
    "resources": [["self", "memory"], ["tcp", "eth0"], ["tcp", "lo"], ["sysv", "memory"], ["posix", "memory"],
                  ["cma", "memory"]],
}  # fmt: skip
FINE = Machine(
    ranks=2, environment={}, read=lambda path: FILES.get(path, ""), version=lambda name: "1.0", cores=4,
    memlock=8 << 20, shm=(8 * GIB, 8 * GIB), ports={}, ucx=UCX,
    namespaces={"ipc": "ipc:[4026531839]", "pid": "pid:[4026531836]"},
)  # fmt: skip


def line(machine: Machine, name: str) -> Line:
    """The one line of that name that is not ok, else the first."""
    found = [each for each in examine(machine) if each.name == name]
    return ([each for each in found if each.verdict != "ok"] or found)[0]


def with_files(**files: str) -> Machine:
    """FINE with other files, by the last part of their paths' names, or new ones below /sys/fs/cgroup."""
    paths = {path.rpartition("/")[2]: path for path in FILES}
    own = {paths.get(name, "/" + name): text for name, text in files.items()}
    return replace(FINE, read=lambda path: {**FILES, **own}.get(path, ""))


def with_resources(*resources: str) -> Machine:
    return replace(FINE, ucx={**UCX, "resources": [each.split("/") for each in resources]})


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "BLSRDMA_"))}
    return subprocess.run(
        [sys.executable, "-m", "blsrdma", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**kept, **environment},
    )  # fmt: skip


# --- the command


def test_text_for_people() -> None:
    done = run("info")
    assert done.stderr == ""
    assert done.returncode == (0 if "no problems" in done.stdout else 1)
    for wanted in (
        "  ok      UCX             1.",
        "libucp",
        "shared memory",
        "tcp",
        "memlock",
        "/dev/shm",
        "ptrace scope",
    ):
        assert wanted in done.stdout
    assert "\x1b" not in done.stdout


def test_json_for_machines() -> None:
    done = run("info", "--json", "--ranks", "3", BLSRDMA_LAG="4", UCX_TLSS="tcp")
    found = json.loads(done.stdout)
    lines = {(each["section"], each["name"]): each for each in found["lines"]}
    assert found["problems"] == sum(each["verdict"] == "problem" for each in found["lines"])
    assert lines["settings", "lag"]["value"] == "4 (BLSRDMA_LAG)" and lines["settings", "lag"]["data"] == 4
    assert {name for section, name in lines if section == "settings"} == {
        *(f.name for f in fields(Settings)),
        "UCX_TLSS",
    }
    assert lines["settings", "UCX_TLSS"]["advice"] == "UCX ignores it (maybe: UCX_TLS?): unset it"
    assert "for each of 3 ranks" in lines["machine", "windows"]["value"]
    assert isinstance(lines["machine", "memlock"]["data"], int)


def test_exit_status_is_1_with_a_problem() -> None:
    done = run("info", BLSRDMA_LAGG="4", UCX_TLS="nonsense")
    assert done.returncode == 1
    assert "did you mean BLSRDMA_LAG?" in done.stdout
    assert "transport 'nonsense' is not available" in done.stdout  # UCX's own words
    assert "2 problems" in done.stdout


def test_without_ucxx(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.machinery, importlib.metadata\n"
        "spec, version = importlib.machinery.PathFinder.find_spec, importlib.metadata.version\n"
        "def find_spec(name, *rest):\n    return None if name.split('.')[0] == 'ucxx' else spec(name, *rest)\n"
        "def missing(name):\n    return version('no such thing' if name.startswith('ucxx') else name)\n"
        "importlib.machinery.PathFinder.find_spec, importlib.metadata.version = find_spec, missing\n"
    )
    done = run("info", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr == ""
    assert "problem ucxx            not installed" in done.stdout
    assert "-> pip install 'blsrdma[cu12]'" in done.stdout
    assert "memlock" in done.stdout and "window_bytes" in done.stdout  # the rest


def test_help_and_refusals() -> None:
    told = run("--help")
    assert told.returncode == 0
    assert "info" in told.stdout and "trace" in told.stdout and " try" not in told.stdout
    assert "--ranks" in run("info", "--help").stdout
    for wrong in ([], ["chekc"], ["info", "--ranks", "0"], ["info", "extra"], ["trace", ".", "--iterations", "5"]):
        refused = run(*wrong)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr and "error: " in refused.stderr


def test_table_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    command._table(examine(replace(FINE, memlock=65536, ports={"mlx5_0:1": "4: ACTIVE"})))
    said = capsys.readouterr().out
    assert "memlock" in said and "64.0 KiB" in said and "ulimit -l unlimited" in said


# --- the trials


def test_writing_another_process_memory_is_tried() -> None:
    told = command.try_cma()
    assert told == "" or "Operation not permitted" in told


def test_a_trial_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object, **__: object) -> Any:
        text = "[1.2] [vm:1:0]  x.c:1 UCX  ERROR out of luck\nrubbish\n"
        return subprocess.CompletedProcess([], -6, text)

    monkeypatch.setattr(subprocess, "run", ended)
    assert command.try_cma() == "the trial was killed by signal 6"
    machine = replace(FINE, ucx=command.try_ucx(4096))
    assert line(machine, "UCX").verdict == "problem" and "signal 6" in line(machine, "UCX").value
    assert line(machine, "UCX says").value == "ERROR out of luck"

    def hung(*_: object, timeout: float, **__: object) -> Any:
        raise subprocess.TimeoutExpired([], timeout)

    monkeypatch.setattr(subprocess, "run", hung)
    assert command.try_cma() == "the trial did not end within 60 s"


# --- the verdicts


def test_a_fine_machine() -> None:
    assert [each for each in examine(FINE) if each.verdict != "ok"] == []


@pytest.mark.parametrize(
    ("machine", "name", "verdict", "cure"),
    [
        (replace(FINE, version=lambda name: "" if "ucxx" in name else "1"), "ucxx", "problem", "blsrdma[cu12]"),
        (replace(FINE, version=lambda name: "" if name == "torch" else "1"), "torch", "problem", "pip install torch"),
        (replace(FINE, cma="process_vm_writev: Operation not permitted"), "cma", "problem", "UCX_TLS=^cma"),
        (with_resources("sysv/memory", "tcp/eth0"), "cma", "note", "slower"),
        (with_resources("tcp/eth0", "cma/memory"), "shared memory", "note", "UCX_TLS contain sm"),
        (with_resources("sysv/memory", "tcp/lo"), "tcp", "note", "bring an interface up"),
        (replace(FINE, ports={"mlx5_0:1": "4: ACTIVE, InfiniBand"}), "RDMA", "note", "PREFER_SYSTEM_LIBRARY"),
        (replace(FINE, ports={"mlx5_0:1": "4: ACTIVE, InfiniBand"}), "memlock", "problem", "LimitMEMLOCK=infinity"),
        (replace(FINE, shm=(64 << 20, 60 << 20)), "/dev/shm", "note", "--shm-size"),
        (replace(FINE, shm=(0, 0)), "/dev/shm", "note", "--shm-size"),
        (replace(with_files(shmmax="1024"), shm=(0, 0)), "/dev/shm", "problem", "--shm-size"),
        (with_files(shmmax="1024"), "SysV memory", "note", "sysctl kernel.shmmax"),
        (with_files(shmall="1"), "SysV memory", "note", "kernel.shmall"),
        (with_files(**{"proc/sys/kernel/yama/ptrace_scope": "3"}), "ptrace scope", "note", "ptrace_scope=0"),
        (with_files(**{"sys/fs/cgroup/a/cpu.max": "150000 100000"}), "cores", "note", "--cpus"),
        (with_files(cgroup="4:cpu:/", **{"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000"}), "cores", "note", "--cpus"),
        (with_files(**{"sys/fs/cgroup/memory.max": "1048576"}), "memory", "problem", "BLSRDMA_WINDOW_BYTES"),
        (replace(FINE, ranks=100_000), "memory", "problem", "fewer ranks"),
        (replace(FINE, environment={"BLSRDMA_MEMORY_LIMIT": "1K"}), "windows", "problem", "memory_limit of 1.0 KiB"),
        (replace(FINE, namespaces={"ipc": "ipc:[1]", "pid": "pid:[2]"}), "namespaces", "note", "--ipc=host"),
        (replace(FINE, environment={"BLSRDMA_LAG": "two"}), "lag", "problem", "unset BLSRDMA_LAG"),
        (replace(FINE, environment={"BLSRDMA_COLOUR": "red"}), "colour", "problem", "unset BLSRDMA_COLOUR"),
        (replace(FINE, environment={"UCX_RNDV_THRESH": "8192"}), "UCX_RNDV_THRESH", "note", "blsrdma's inf"),
        (replace(FINE, ucx={"error": "no", "advice": "do"}), "UCX", "problem", "do"),
    ],
)  # fmt: skip
def test_what_is_wrong_has_a_verdict_and_a_cure(machine: Machine, name: str, verdict: str, cure: str) -> None:
    found = line(machine, name)
    assert found.verdict == verdict
    assert cure in found.advice


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (replace(FINE, ports={"mlx5_0:1": "4: ACTIVE"}, memlock=-1), "memlock"),
        (with_resources("rc_mlx5/mlx5_0:1", "ud_verbs/mlx5_0:1"), "RDMA"),
        (with_resources("rc_mlx5/mlx5_0:1"), "tcp"),
        (with_files(**{"proc/sys/kernel/yama/ptrace_scope": "1"}), "ptrace scope"),
        (with_files(**{"sys/fs/cgroup/a/b/cpu.max": "max 100000"}), "cores"),
        (replace(FINE, environment={"BLSRDMA_DEBUG": "1", "UCX_RNDV_THRESH": "inf"}), "UCX_RNDV_THRESH"),
    ],
)
def test_what_is_not_wrong_is_not_blamed(machine: Machine, name: str) -> None:
    assert line(machine, name).verdict == "ok"


GPU = {
    "driver": 13000, "ipc": "", "nvrtc": "13.0", "no_nvrtc": "",
    "devices": [{"name": "H", "capability": [9, 0], "total_bytes": 80 * GIB, "free_bytes": 79 * GIB}],
}  # fmt: skip


def test_gpus() -> None:
    lines = {each.name: each for each in examine(replace(FINE, gpu=GPU)) if each.section == "GPUs"}
    assert lines["CUDA"].value == "the driver is for CUDA 13.0, and sees 1 GPU"
    assert lines["GPU 0"].value == "H, compute capability 9.0, 80.0 GiB, 79.0 GiB of it free"
    assert lines["CUDA IPC"].value.startswith("works") and lines["NVRTC"].value == "13.0"
    assert {each.verdict for each in lines.values()} == {"ok"}
    missing = {**GPU, "ipc": "cuIpcOpenMemHandle: no", "nvrtc": "", "no_nvrtc": "ImportError: libnvrtc"}
    lines = {each.name: each for each in examine(replace(FINE, gpu=missing))}
    assert lines["CUDA IPC"].verdict == "note" and "--ipc=host" in lines["CUDA IPC"].advice
    assert lines["NVRTC"].verdict == "note" and "nvidia-cuda-nvrtc" in lines["NVRTC"].advice
    for none in ({"driver": 13000, "devices": []}, {"error": "no driver"}):
        lines = {each.name: each for each in examine(replace(FINE, gpu=none)) if each.section == "GPUs"}
        assert list(lines) == ["CUDA"] and lines["CUDA"].verdict == "ok"


def test_gpus_are_tried_out(tmp_path: Path) -> None:
    """By the simulated driver, under the name of the real one."""
    (tmp_path / "libcuda.so.1").symlink_to(simulated.driver())
    found = json.loads(run("info", "--json", LD_LIBRARY_PATH=str(tmp_path), SIMULATED_CUDA_DEVICES="2").stdout)
    lines = {each["name"]: each for each in found["lines"] if each["section"] == "GPUs"}
    assert "sees 2 GPUs" in lines["CUDA"]["value"] and {"GPU 0", "GPU 1"} < set(lines)
    assert lines["GPU 1"]["data"]["total_bytes"] == 2 * GIB
    assert lines["CUDA IPC"]["value"] == "works: one process mapped another's GPU memory"


def test_devices_are_listed() -> None:
    machine = with_resources("rc_mlx5/mlx5_0:1", "ud_verbs/mlx5_0:1", "cuda_copy/cuda", "cuda_ipc/cuda", "tcp/ib0")
    values: Mapping[str, str] = {each.name: each.value for each in examine(machine)}
    assert values["RDMA"] == "mlx5_0:1: rc_mlx5, ud_verbs"
    assert values["GPU"] == "cuda_copy, cuda_ipc"
    assert values["tcp"] == "ib0"
