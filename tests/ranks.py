"""Runs a function on several ranks, each a process of its own, and never hangs.

    def hello(rank, world_size, store, greeting):  # at the top of a test module
        return f"{greeting} from {rank} of {world_size}"

    def test_hello():
        results = run_ranks(hello, 3, "hello")
        assert [result.value for result in results] == [...]

Ranks are forked from a server that has loaded torch and UCX's libraries (tests.preload), so that they start in tens of
milliseconds, and have the environment that torchrun would give them. Whatever happens to a rank (an exception, a
signal, a hang) is in its Result or in the AssertionError; a hang is always an error, with the stacks of every rank that
did not end.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

HOST = "127.0.0.1"
_ROOT = Path(__file__).resolve().parent.parent
_STACKS_TIMEOUT = 30.0  # for gdb, all ranks together
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RankError:
    """Why a rank returned nothing."""

    type: str  # of the exception; "Exit" where there was none, "Hang" at the deadline
    message: str
    traceback: str = ""
    exception: BaseException | None = None  # the exception itself, where it pickles


@dataclass(frozen=True)
class Result:
    """What became of a rank."""

    rank: int
    value: Any  # what the function returned
    error: RankError | None  # None: it returned
    exit_code: int  # negative: the signal that ended it
    output: str  # stdout and stderr

    def __str__(self) -> str:
        lines = [f"rank {self.rank} (exit code {self.exit_code}): "]
        lines[0] += f"{self.error.type}: {self.error.message}" if self.error else f"returned {self.value!r:.200}"
        if self.error and self.error.traceback:
            lines.append(self.error.traceback.rstrip())
        if self.output:
            lines += ["its output ends:", self.output[-4000:].rstrip()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Program:
    """How one of run_programs ended."""

    status: int
    out: str
    err: str


def run_ranks(
    target: Callable[..., Any],
    ranks: int,
    *args: Any,
    env: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
    timeout: float = 60.0,
    check: bool = True,
    expect_exit: Mapping[int, int] | None = None,
    store: TCPStore | None = None,
    **kwargs: Any,
) -> list[Result]:
    """Runs `target(rank, world_size, store, *args, **kwargs)` on every rank and returns their results, in rank order.

    `target` is a function at the top of a module. `env` (for all, or one for each rank) is in os.environ before the
    module of `target` is imported; the rest of the environment is the caller's. `store` is a server that the caller
    made (store_server), where several runs share one. A rank that does not return fails the run, unless `expect_exit`
    names its exit code (-signal.SIGKILL for a kill): then any other end fails it. With check=False only a hang does.
    """
    environments = list(env) if isinstance(env, Sequence) else [env or {}] * ranks
    if len(environments) != ranks:
        raise ValueError(f"{len(environments)} environments for {ranks} ranks")
    expect_exit = expect_exit or {}
    server = store or store_server()
    context = _context()
    work = pickle.dumps((target, args, kwargs))
    processes: list[ForkServerProcess] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        try:
            for rank, own in enumerate(environments):
                torchrun = {
                    "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks,
                    "MASTER_ADDR": HOST, "MASTER_PORT": server.port, "TORCHELASTIC_USE_AGENT_STORE": True,
                    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1),
                }  # fmt: skip
                environment = {**os.environ, **{name: str(value) for name, value in torchrun.items()}, **own}
                arguments = (rank, ranks, server.port, folder, environment, work, timeout)
                processes.append(context.Process(target=_rank_main, args=arguments, name=f"rank {rank}"))
                processes[-1].start()
            hung = _wait(processes, timeout)
            stacks = _stacks(hung, folder) if hung else {}
        finally:
            for process in processes:
                _kill(process)
        results = [_result(rank, process, folder, stacks.get(rank)) for rank, process in enumerate(processes)]

    if hung:
        failed = [result for result in results if result.error]
        title = f"ranks {hung and sorted(stacks)} did not end within {timeout} s"
    else:
        failed = [r for r in results if (r.exit_code != expect_exit[r.rank] if r.rank in expect_exit else r.error)]
        title = f"{len(failed)} of {ranks} ranks failed"
    if failed and (check or hung):
        exceptions = [result.error.exception for result in failed if result.error and result.error.exception]
        raise AssertionError("\n\n".join([title, *map(str, failed)])) from next(iter(exceptions), None)
    return results


def store_server(port: int = 0) -> TCPStore:
    """A store on this machine that outlives the ranks; `.port` is where (0: any free one)."""
    return TCPStore(HOST, port, is_master=True, wait_for_workers=False)


def run_programs(code: str, ranks: int, environment: Mapping[str, str], timeout: float = 60) -> list[Program]:
    """Run `code` on several ranks, in interpreters of their own and as torchrun starts them: for what happens when an
    interpreter ends. None outlives this call."""
    server = store_server()
    torchrun = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, **torchrun, **environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        said = [program.communicate(timeout=timeout) for program in running]
    finally:
        for program in running:
            program.kill()
    return [Program(program.returncode, *each) for program, each in zip(running, said, strict=True)]


@contextlib.contextmanager
def no_leftovers(grace: float = 2.0) -> Iterator[None]:
    """Asserts that the block leaves no shared memory behind: nothing new that no other living process has in use."""
    before = _shared_memory()
    yield
    deadline = time.monotonic() + grace
    while left := {item for item in _shared_memory() - before if not _in_use(item)}:
        if time.monotonic() > deadline:
            raise AssertionError(f"shared memory left behind: {', '.join(sorted(left))}")
        time.sleep(0.05)


# --- in the rank ------------------------------------------------------------------------------------------------------


def _rank_main(
    rank: int, ranks: int, port: int, folder: Path, environment: dict[str, str], work: bytes, timeout: float
) -> None:
    _end_with_parent()
    os.setpgid(0, 0)  # so that what a rank starts ends with it
    with (folder / f"{rank}.output").open("wb") as output:
        sys.stdout.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    stacks = (folder / f"{rank}.stacks").open("wb")
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True, chain=False)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        target, args, kwargs = pickle.loads(work)  # imports the module of the test, now that the environment is set
        store = TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=timeout))
        outcome = pickle.dumps((target(rank, ranks, store, *args, **kwargs), None))
    except Exception as error:
        about = (type(error).__name__, str(error), traceback.format_exc())
        try:
            outcome = pickle.dumps((None, RankError(*about, exception=error)))
            pickle.loads(outcome)
        except Exception:
            outcome = pickle.dumps((None, RankError(*about)))
        code = 1
    else:
        code = 0
    unfinished = folder / f"{rank}.unfinished"
    unfinished.write_bytes(outcome)
    unfinished.rename(folder / f"{rank}.outcome")
    sys.exit(code)


def _end_with_parent() -> None:
    """The rank is killed when the fork server ends, which is when pytest does: the rank must not hold it up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    server: Any = multiprocessing.forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None


# --- around the ranks -------------------------------------------------------------------------------------------------


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    # For the server alone: where tests.preload is, and one thread, for a fork keeps no other.
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    before = dict(os.environ)
    os.environ.update(own)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _wait(processes: list[ForkServerProcess], timeout: float) -> dict[int, ForkServerProcess]:
    """Waits until all have ended; returns those that have not at the deadline, by rank."""
    deadline = time.monotonic() + timeout
    alive = dict(enumerate(processes))
    while alive and (left := deadline - time.monotonic()) > 0:
        multiprocessing.connection.wait([process.sentinel for process in alive.values()], left)
        alive = {rank: process for rank, process in alive.items() if process.exitcode is None}
    return alive


def _stacks(hung: Mapping[int, ForkServerProcess], folder: Path) -> dict[int, str]:
    """The Python and (where there is gdb) C stacks of living ranks. Python's first: gdb stops the process."""
    files = {rank: folder / f"{rank}.stacks" for rank in hung}
    for rank, process in hung.items():
        if files[rank].exists() and process.pid:  # else it is not yet ready for the signal
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
                os.kill(process.pid, signal.SIGCONT)  # a stopped one shows nothing, not even to gdb
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline and not all(file.exists() and file.stat().st_size for file in files.values()):
        time.sleep(0.02)
    gdb, debuggers = shutil.which("gdb"), {}
    for rank, process in hung.items() if gdb else ():
        command = [str(gdb), "-nx", "-batch", "-p", str(process.pid), "-ex", "thread apply all backtrace 16"]
        out: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        debuggers[rank] = subprocess.Popen(command, text=True, errors="replace", **out)
    deadline = time.monotonic() + _STACKS_TIMEOUT
    stacks = {}
    for rank, file in files.items():
        native = "(no gdb here)"
        if debugger := debuggers.get(rank):
            try:
                native = debugger.communicate(timeout=max(0.1, deadline - time.monotonic()))[0]
            except subprocess.TimeoutExpired:
                debugger.kill()
                native = debugger.communicate()[0] + "(gdb took too long)"
        native = native[max(native.find("\nThread "), 0) :].strip()[:20_000]  # not what gdb says before the first stack
        stacks[rank] = f"Python:\n{file.read_text() if file.exists() else '(not yet started)'}\nC:\n{native}"
    return stacks


def _kill(process: ForkServerProcess) -> None:
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # with whatever the rank started
    process.kill()
    process.join(10)


def _result(rank: int, process: ForkServerProcess, folder: Path, stacks: str | None) -> Result:
    value, error = None, None
    code = process.exitcode if process.exitcode is not None else 255
    outcome, output = folder / f"{rank}.outcome", folder / f"{rank}.output"
    if stacks is not None:
        error = RankError("Hang", "the stacks at the deadline:", stacks)
    elif outcome.exists():
        value, error = pickle.loads(outcome.read_bytes())
    elif code < 0:
        error = RankError("Exit", f"killed by {signal.Signals(-code).name}")
    else:
        error = RankError("Exit", "ended without returning")
    return Result(rank, value, error, code, output.read_text(errors="replace") if output.exists() else "")


def _shared_memory() -> set[str]:
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {str(path) for path in Path("/dev/shm").iterdir()} | {f"sysv segment {line.split()[1]}" for line in segments}


def _in_use(item: str) -> bool:
    """Whether another living process has it mapped or open."""
    if item.startswith("sysv"):
        segments = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
        return all(fields[6] != "0" for fields in segments if fields[1] == item.split()[-1])
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(process.name) != os.getpid() and (
                item in (process / "maps").read_text() or item in map(os.readlink, (process / "fd").iterdir())
            ):
                return True
    return False
