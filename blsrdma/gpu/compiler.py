"""CUDA C++ to cubins, by NVRTC, when a kernel is first needed: no compiler is asked for when blsrdma is installed.

NVRTC comes with the CUDA builds of torch, or in the wheel nvidia-cuda-nvrtc-cu12 (nvidia-cuda-nvrtc for CUDA 13), and
is called through cuda-bindings, which ucxx brings. Compiling needs no GPU and takes some tenths of a second; what has
been compiled is kept for the life of the process.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blsrdma.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Capability = tuple[int, int]  # of a device: (9, 0) is an H100's

# Nothing is fused that does not say so: sums have the bits of the CPU's kernels. -v: the log has the registers.
OPTIONS = ("--std=c++17", "--fmad=false", "--ptxas-options=-v", "--generate-line-info")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a multiprocessor, as the assembler says."""

    registers: int  # of each thread
    stack_bytes: int
    spilled_bytes: int  # stored and loaded again for want of registers
    shared_bytes: int  # beyond what a launch asks for


@dataclass(frozen=True)
class Compiled:
    """An image that a driver loads (a cubin; PTX for a device newer than the compiler), and the compiler's log."""

    image: bytes
    log: str

    @property
    def usage(self) -> dict[str, Usage]:
        """Of each kernel in it; empty for PTX, which the driver assembles."""
        found: dict[str, Usage] = {}
        for part in re.split(r"Compiling entry function ", self.log)[1:]:
            registers = _number(r"Used (\d+) registers", part)
            if registers is not None:
                found[part.split("'")[1]] = Usage(
                    registers,
                    _number(r"(\d+) bytes stack frame", part) or 0,
                    sum(map(int, re.findall(r"(\d+) bytes spill", part))),
                    _number(r"(\d+) bytes smem", part) or 0,
                )
        return found


def text_of(source: Path) -> str:
    """A .cu file's text, with those of the files beside it that it includes in place of their names."""

    def included(match: re.Match[str]) -> str:
        line = source.read_text()[: match.end()].count("\n") + 1
        return f'#line 1 "{match[1]}"\n{source.with_name(match[1]).read_text()}\n#line {line + 1} "{source.name}"'

    return re.sub(r'^#include "([\w.]+)"$', included, source.read_text(), flags=re.MULTILINE)


def nvrtc(source: Path, defines: Mapping[str, str | int], capability: Capability) -> Compiled:
    """Compile a .cu file with macros for a device. Raises CompileError, with the compiler's log."""
    try:
        from cuda.bindings import nvrtc as library

        known = [int(arch) for arch in _call(library, library.nvrtcGetSupportedArchs)]
    except (ImportError, RuntimeError) as error:  # cuda-bindings, or libnvrtc, is missing
        raise CompileError(
            f"{source.name}: no compiler for GPU kernels: install nvidia-cuda-nvrtc-cu12 (CUDA 12) or "
            f"nvidia-cuda-nvrtc (CUDA 13), and cuda-bindings of the same CUDA ({error})",
            "",
        ) from error
    wanted = 10 * capability[0] + capability[1]
    if wanted in known:
        target, get_size, get = f"sm_{wanted}", library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN
    elif wanted > max(known):
        target, get_size, get = f"compute_{max(known)}", library.nvrtcGetPTXSize, library.nvrtcGetPTX
    else:
        raise CompileError(f"{source.name}: this NVRTC does not compile for compute capability {capability}", "")
    options = [f"--gpu-architecture={target}", *OPTIONS, *(f"-D{name}={value}" for name, value in defines.items())]
    program = _call(library, library.nvrtcCreateProgram, text_of(source).encode(), source.name.encode(), 0, [], [])
    try:
        (status,) = library.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(library, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).rstrip(b"\0\n")
        readable = log.decode(errors="replace")
        if status != library.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{source.name} does not compile for {target}: {status.name}\n{readable}", readable)
        return Compiled(_text(library, get_size, get, program), readable)
    finally:
        library.nvrtcDestroyProgram(program)


build: Callable[[Path, Mapping[str, str | int], Capability], Compiled] = nvrtc  # the simulated device has another one

_lock = threading.Lock()
_compiled: dict[tuple[object, ...], Compiled] = {}


def compiled(source: Path, defines: Mapping[str, str | int], capability: Capability) -> Compiled:
    """`build`'s, once for each source, macros and capability. Raises CompileError."""
    key = (build, source, text_of(source), tuple(sorted(defines.items())), capability)
    with _lock:
        if key not in _compiled:
            _compiled[key] = build(source, defines, capability)
        return _compiled[key]


def _call(library: Any, function: Callable[..., Any], *arguments: object) -> Any:
    status, *values = function(*arguments)
    if status != library.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{function.__name__}: {status.name}")
    return values[0] if len(values) == 1 else values


def _text(library: Any, get_size: Callable[..., Any], get: Callable[..., Any], program: Any) -> bytes:
    room = bytes(_call(library, get_size, program))  # the binding writes into it
    _call(library, get, program, room)
    return room


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None
