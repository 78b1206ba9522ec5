"""`python -m blsrdma`: commands for people who run exchanges.

What `info` has to try out (UCX, GPUs, and writing another process's memory) it tries in a process of its own, by the
hidden command `try`: UCX may abort, and importing ucxx changes the environment, which is shown as the user left it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma import check, trace
from blsrdma.errors import BlsrdmaError
from blsrdma.gpu import look
from blsrdma.info import Line, examine, this_machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_ANSWER = "blsrdma answers: "  # UCX's own words may stand around it
_TRIAL_SECONDS = 60
_PR_SET_PTRACER = 0x59616D61


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 after an error or a problem found, 2 after a wrong argument."""
    given = _parser().parse_args(argv)
    given.command_line = list(sys.argv[1:] if argv is None else argv)
    run: Callable[[argparse.Namespace], int] = given.run
    try:
        return run(given)
    except BrokenPipeError:  # as with `| head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (BlsrdmaError, OSError) as error:
        print(f"blsrdma: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m blsrdma",
        description="Bounded lag synchronous collectives over UCX one-sided puts: tools.",
        epilog="'python -m blsrdma COMMAND --help' tells about each. The library's settings are documented in "
        "blsrdma/settings.py; 'python -m blsrdma info' shows those in force.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    text = "what this machine offers an exchange, what stands in its way, and the cure"
    more = (
        "A problem is something with which an exchange would fail; then the exit status is 1. A note is something that "
    )
    info = commands.add_parser(
        "info", help=text, description=f"Shows {text}. {more}works, but slower or not everywhere."
    )
    info.add_argument("--json", action="store_true", help="print JSON, for machines")
    info.add_argument("--ranks", type=_positive, help="ranks on this host, by which sizes are judged (default: "
                      "LOCAL_WORLD_SIZE, else one per core)")  # fmt: skip
    info.set_defaults(run=_info)

    check.add(commands)

    text = "merge the timelines that ranks wrote with BLSRDMA_TRACE=FOLDER"
    more = "into one that ui.perfetto.dev opens, and tell how far each rank ran ahead and whom it waited for."
    merge = commands.add_parser("trace", help=text, description=f"M{text[1:]} {more}")
    merge.add_argument("folder", type=Path, metavar="FOLDER")
    merge.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: FOLDER/trace.json")
    merge.add_argument("--iterations", type=_range, default=(0, 1 << 62), metavar="FIRST:LAST", help="these alone: a "
                       "browser can hold a few million events")  # fmt: skip
    merge.set_defaults(run=_trace)

    trial = commands.add_parser("try")  # without a help text it is not shown
    trial.add_argument("what", choices=_TRIALS)
    trial.add_argument("arguments", type=int, nargs="*")
    trial.set_defaults(run=_try)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d*):(\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST; either may be left out")
    return int(found[1] or 0), int(found[2] or 1 << 62)


# --- info


def _info(given: argparse.Namespace) -> int:
    lines = examine(this_machine(given.ranks, try_ucx, try_cma, try_gpu))
    problems = sum(line.verdict == "problem" for line in lines)
    if given.json:
        print(json.dumps({"problems": problems, "lines": [asdict(line) for line in lines]}, indent=2))
    elif sys.stdout.isatty():
        _table(lines)
    else:
        print("\n".join(_text(lines)))
    if not given.json:
        print(f"\n{problems or 'no'} problem{'s' * (problems != 1)}")
    return 1 if problems else 0


def _text(lines: Sequence[Line]) -> Iterator[str]:
    section = ""
    for line in lines:
        if line.section != section:
            section = line.section
            yield section
        yield f"  {line.verdict:8}{line.name:15} {line.value}"
        if line.advice:
            yield f"  {'':8}{'':15} -> {line.advice}"


def _table(lines: Sequence[Line]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", "", box=None, pad_edge=False, show_header=False)
    table.columns[2].overflow = "fold"  # a path is shown whole
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    section = ""
    for line in lines:
        if line.section != section:
            section = line.section
            table.add_row(Text(section, "bold"))
        value = Text(line.value)
        if line.advice:
            value.append(f"\n{line.advice}", styles[line.verdict])
        table.add_row(Text("  " + line.verdict, styles[line.verdict]), Text(line.name), value)
    Console().print(table)


# --- trials


def try_ucx(size: int) -> dict[str, Any]:
    """What UCX offers here, with windows of `size` bytes; `error` and `advice` where it fails; `said`: its warnings;
    `unused`: the variables that it does not know, and what they may be meant for."""
    answer, printed, ended = _apart("ucx", size, environment={"UCX_WARN_UNUSED_ENV_VARS": "y", "UCX_LOG_LEVEL": "warn"})
    said = [line.partition(" UCX  ")[2] for line in printed.splitlines() if " UCX  " in line]
    unused = [line for line in said if "unused environment variable" in line]
    named = re.findall(r"(?!UCX_IB_)(UCX_\w+)((?: \(maybe: [^)]*\))?)", " ".join(unused))
    said = [line for line in said if line not in unused and "UCX_WARN_UNUSED" not in line]
    failed = {"error": f"UCX could not be tried: its process {ended}", "advice": "what it says may tell why"}
    return {**(answer or failed), "said": said, "unused": dict(named)}


def try_cma() -> str:
    """Why a process cannot write the memory of another that is not its child, as ranks are not each other's; "": it
    can."""
    target = ctypes.create_string_buffer(8)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)  # as UCX does: Yama's exception, for any process
    answer, _, ended = _apart("cma", os.getpid(), ctypes.addressof(target))
    libc.prctl(_PR_SET_PTRACER, 0, 0, 0, 0)
    if answer is None:
        return f"the trial {ended}"
    return str(answer["error"]) or ("" if target.raw == b"blsrdma!" else "process_vm_writev wrote nothing")


def try_gpu() -> dict[str, Any]:
    """What GPUs there are, and what they can; see blsrdma.gpu.look. `error` where there is no driver, or it fails."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"error": f"no driver ({error}): no GPU is used"}
    answer, _, ended = _apart("gpu")
    return answer or {"error": f"its trial {ended}"}


def _apart(*what: object, environment: Mapping[str, str] | None = None) -> tuple[dict[str, Any] | None, str, str]:
    """Runs a trial in a process of its own: its answer, what was printed besides, how it ended."""
    package = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "blsrdma", "try", *map(str, what)]
    try:
        ended = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path, **(environment or {})}, timeout=_TRIAL_SECONDS,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, "", f"did not end within {_TRIAL_SECONDS} s"
    printed, _, answer = ended.stdout.partition(_ANSWER)
    status = f"was killed by signal {-ended.returncode}" if ended.returncode < 0 else f"ended with {ended.returncode}"
    return (json.loads(answer.splitlines()[0]) if answer else None), printed, status


def _try(given: argparse.Namespace) -> int:
    print(_ANSWER + json.dumps(_TRIALS[given.what](*given.arguments)), flush=True)
    return 0


def _ucx_here(size: int) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    try:
        from blsrdma.ucx import native, version

        answer = {"version": version, "libucp": native.loaded_ucp()[0]}
        from blsrdma.fabric import UCX_SETTINGS, Fabric

        fabric = Fabric.of_process()
        before = time.perf_counter()
        fabric.allocate(size)
        answer |= {"allocated": size, "seconds": time.perf_counter() - before, "settings": dict(UCX_SETTINGS)}
        found = re.findall(r"resource +\d+ *:.* (\w+)/(\S+)", fabric.context.info)
        return {**answer, "resources": found}
    except ImportError as error:
        return {**answer, "error": str(error), "advice": "no exchange is possible without it"}
    except Exception as error:
        advice = "look at what UCX says, and at the settings UCX_* below"
        return {**answer, "error": f"{type(error).__name__}: {error}", "advice": advice}


def _cma_here(pid: int, address: int) -> dict[str, str]:
    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    own = ctypes.create_string_buffer(b"blsrdma!", 8)
    libc = ctypes.CDLL(None, use_errno=True)
    mine, theirs = Vector(ctypes.addressof(own), 8), Vector(address, 8)
    for call in ("process_vm_writev", "process_vm_readv"):
        one = ctypes.c_ulong(1)
        if getattr(libc, call)(pid, ctypes.byref(mine), one, ctypes.byref(theirs), one, ctypes.c_ulong(0)) != 8:
            return {"error": f"{call}: {os.strerror(ctypes.get_errno())}"}
    return {"error": ""}


def _gpu_here() -> dict[str, Any]:
    def maps(handle: int) -> str:
        answer, _, ended = _apart("gpu-map", handle)
        return f"the trial {ended}" if answer is None else str(answer["error"])

    try:
        return look.here(maps)
    except ImportError as error:
        return {"error": str(error)}


_TRIALS: dict[str, Callable[..., dict[str, Any]]] = {
    "ucx": _ucx_here, "cma": _cma_here, "gpu": _gpu_here, "gpu-map": look.maps,
}  # fmt: skip


# --- trace


def _trace(given: argparse.Namespace) -> int:
    exchanges = trace.load(given.folder, *given.iterations)
    output = given.output or given.folder / "trace.json"
    with output.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for number, event in enumerate(trace.chrome(exchanges)):
            file.write((",\n" if number else "") + json.dumps(event))
        file.write("\n]}\n")
    for name, ranks in exchanges.items():
        world_size = ranks[0].about["world_size"]
        print(f"exchange {name!r}: {world_size} ranks, lag {ranks[0].about['lag']}")
        missing = set(range(world_size)) - {one.about["rank"] for one in ranks}
        if missing:
            print(f"  no trace of ranks {', '.join(map(str, sorted(missing)))}: they did not come to close()")
        for line in _summary(ranks):
            print("  " + line)
    print(f"{output}: open it with https://ui.perfetto.dev")
    return 0


def _summary(ranks: Sequence[trace.RankTrace]) -> Iterator[str]:
    """One line per rank of an exchange."""
    for one, (times, lead) in zip(ranks, trace.leads(ranks), strict=True):
        rank, rows = one.about["rank"], one.events
        if not len(rows):
            yield f"rank {rank}: recorded nothing"
            continue
        rows, last, _ = one.waits(ranks)
        spent, total = (rows[:, 3] - rows[:, 2]) / 1e9, (rows[:, 3].max() - rows[:, 2].min()) / 1e9
        by_rank = [float(spent[last == q].sum()) for q in range(len(ranks))]
        lasting = np.diff(times, append=max(int(rows[:, 3].max()), times[-1])) if len(times) else times
        mean = float((lead * lasting).sum() / max(1, lasting.sum()))
        most = f", most for rank {ranks[int(np.argmax(by_rank))].about['rank']} ({max(by_rank):.3f} s)"
        dropped = f"; {one.about['dropped']} older events were dropped" if one.about["dropped"] else ""
        yield (
            f"rank {rank}: {len(one.posts)} iterations, lead up to {int(lead.max(initial=0))}, {mean:.2f} on average; "
            f"waited {sum(by_rank):.3f} of {total:.3f} s{most if any(by_rank) else ''}{dropped}"
        )


if __name__ == "__main__":
    sys.exit(main())
