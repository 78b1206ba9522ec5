"""A CUDA driver without a GPU: the driver API's C functions over host memory, and kernels compiled by g++.

The product runs under it unchanged: it loads `driver()` in place of libcuda.so.1, and gets `image(source)` in place of
what NVRTC would compile. It is as asynchronous as a GPU, and stricter. Streams are threads; copies are done in pieces;
`fail`, `hold` and `step` make it fail, hang and go on at will; what a real driver need not notice is refused, ends the
process with a text (CUDA called from a host function, barriers that not all threads reach) or is a `complaint`.

Environment, read when a process calls CUDA first:

    SIMULATED_CUDA_DEVICES   how many devices there are (1); CUDA_VISIBLE_DEVICES chooses among them
    SIMULATED_CUDA_MEMORY    bytes of each, for every process by itself (2 GiB)
    SIMULATED_CUDA_PEERS     whether devices reach one another (1)
    SIMULATED_CUDA_DELAY_US  each operation is delayed by up to this many microseconds at random (0)
    SIMULATED_CUDA_SEED      of these delays and of the order of pieces and blocks (1)
    SIMULATED_CUDA_PROTECT   0: the host may touch device memory; else that ends in a SIGSEGV, unless the device uses it
                             at this very moment (1)
    SIMULATED_CUDA_VERBOSE   1: prints why a call was refused

A kernel's loads and stores are checked one by one: they are to device memory or to pinned or registered host memory,
and aligned, or the process ends with a text that names kernel, block, thread and address. Device memory that was not
written holds bytes 0xCB, and so does dynamic shared memory.

What takes memory away (cuMemFree, cuMemFreeHost, cuMemHostUnregister, cuIpcCloseMemHandle, cuModuleUnload) waits for
all streams of the context first, as a real driver does or may: while a GPU hangs, none of them returns.

Not modelled: speed; the legacy default stream's waiting for other streams (stream 0 is a stream like others); memory
that several processes share on one device (each has its own); graphs, memory pools, managed memory, events between
processes, GPUDirect, MPS.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blsrdma.gpu.compiler import text_of

HERE = Path(__file__).parent
CACHE = HERE.parents[2] / "build" / "simulated"  # kept between sessions: the names are hashes of what was compiled

COMMON = ["-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-U_FORTIFY_SOURCE", "-Wl,-Bsymbolic"]
DRIVER = ["-std=c++20", "-O1", *COMMON, "-pthread"]
# As NVRTC compiles with --fmad=false: no multiplication fuses with an addition. An address that is not aligned to what
# is read there is an error on a GPU, and so it is here.
KERNELS = ["-std=c++17", "-O2", *COMMON, "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique"]
KERNELS += ["-fno-exceptions", "-Wno-unknown-pragmas", "-fno-sanitize-recover=all"]
KERNELS += ["-fsanitize=alignment,bounds,shift,signed-integer-overflow"]
# Every load and store calls a function (in kernel.h), which asks whether there is such memory.
KERNELS += ["-fsanitize=kernel-address", *"--param asan-instrumentation-with-call-threshold=0".split()]
KERNELS += "--param asan-stack=0 --param asan-globals=0".split()

KERNEL = re.compile(
    r'extern\s+"C"\s+(?P<before>(?:__launch_bounds__\s*\((?P<bounds>(?:[^()]|\([^()]*\))*)\)|[^;{}()])*?)'
    r"\b(?!__launch_bounds__)(?P<name>[A-Za-z_]\w*)\s*\("
)
DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:__align__\s*\([^)]*\)\s*)?(?P<type>[\w\s:]+?)\s+(?:__align__\s*\([^)]*\)\s*)?(?P<name>\w+)\s*\[\s*\]\s*;"
)
CUDA_HEADER = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<cuda_\w+\.h>", re.MULTILINE)


def driver() -> Path:
    """The simulated driver's shared library, to be loaded in place of libcuda.so.1."""
    return _driver()


def image(source: Path | str, *options: str) -> bytes:
    """What cuModuleLoadData takes for this CUDA C++: a path to a .cu file, or its text.

    `options` are NVRTC's; those that define names count, others mean nothing here. Kernels are `extern "C" __global__`.
    """
    text = source if isinstance(source, str) else text_of(source)
    kept = [option for option in options if option.startswith("-D")]
    name = "kernel.cu" if isinstance(source, str) else str(source)
    headers = [HERE / "kernel.h", HERE / "launch.h"]

    def build(target: Path) -> None:
        compiled = target.with_suffix(".cpp")
        compiled.write_text(_for_gcc(text, name, kept))
        _run([*KERNELS, *kept, "-include", str(HERE / "kernel.h"), str(compiled), "-o", str(target)])

    library = _built("image", [text, name, *KERNELS, *kept, *(header.read_text() for header in headers)], build)
    return b"SIMULATED " + str(library).encode() + b"\0"


def fail(function: str, result: int, after_calls: int = 0) -> None:
    """One call of `function`, after this many others, returns `result`; 0 takes it back.

    "kernel" or "copy": one fails on the device, and all that comes after it. In this process, as everything below.
    """
    control().simulated_fail(function.encode(), result, after_calls)


@contextmanager
def hold() -> Iterator[None]:
    """Streams make no progress: a GPU that hangs."""
    control().simulated_hold(1)
    try:
        yield
    finally:
        control().simulated_hold(0)


def step(count: int = 1, seconds: float = 10.0) -> int:
    """While held: lets streams take `count` steps and waits for them; returns how many were taken in time.

    A step is an operation, a quarter of a copy (of up to 4 MiB), or a quarter of a kernel's blocks.
    """
    return int(control().simulated_step(count, int(seconds * 1000)))


def calls(function: str) -> int:
    """How often `function` was called."""
    return int(control().simulated_calls(function.encode()))


def complaints() -> int:
    """How many things were found, and printed, that a real driver need not notice."""
    return int(control().simulated_complaints())


def live(what: str) -> int:
    """How many of these are not freed yet: "device", "imported", "pinned", "registered" (all memory), "streams", ..."""
    return int(control().simulated_live(what.encode()))


@functools.cache
def control() -> ctypes.CDLL:
    """The library, as loaded in this process."""
    library = ctypes.CDLL(str(driver()))
    library.simulated_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    library.simulated_fail.restype = None
    library.simulated_hold.argtypes = [ctypes.c_int]
    library.simulated_hold.restype = None
    library.simulated_step.argtypes = [ctypes.c_long, ctypes.c_long]
    library.simulated_step.restype = ctypes.c_long
    library.simulated_complaints.argtypes = []
    library.simulated_complaints.restype = ctypes.c_long
    for name in ("simulated_calls", "simulated_live"):
        getattr(library, name).argtypes = [ctypes.c_char_p]
        getattr(library, name).restype = ctypes.c_long
    return library


@functools.cache
def _driver() -> Path:
    sources = sorted(path for path in HERE.iterdir() if path.suffix in {".cpp", ".h", ".inc"})
    return _built(
        "driver",
        [*DRIVER, *(path.read_text() for path in sources)],
        lambda target: _run([*DRIVER, str(HERE / "driver.cpp"), "-o", str(target)]),
    )


def _for_gcc(text: str, name: str, defines: list[str]) -> str:
    """The source with what g++ needs and NVRTC does not."""
    text = CUDA_HEADER.sub("", text)
    plain = subprocess.run(
        [compiler(), "-E", "-P", *defines, "-x", "c++", "-"], input=text, capture_output=True, text=True, check=True
    ).stdout
    found = [match for match in KERNEL.finditer(plain) if "__global__" in match["before"]]
    kernels = {match["name"]: match["bounds"] or "" for match in found}
    if len(found) != len(re.findall(r"\b__global__\b", plain)):
        raise ValueError(f'{name}: every kernel has to be declared `extern "C" __global__`; found {sorted(kernels)}')
    text = DYNAMIC_SHARED.sub(r"\g<type>* const \g<name> = reinterpret_cast<\g<type>*>(simulated::here->shared);", text)
    lines = [f"SIMULATED_KERNEL({kernel}, {bounds})" for kernel, bounds in kernels.items()]
    return f'#line 1 "{name}"\n{text}\n' + "\n".join(lines) + "\n"


def _built(kind: str, parts: list[str], build: Callable[[Path], None]) -> Path:
    """The library that `build` makes of these parts; made once, also where several processes ask for it at once."""
    key = hashlib.sha256("\0".join([compiler(), platform.machine(), *parts]).encode()).hexdigest()[:20]
    library = CACHE / f"{kind}-{key}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{library.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = CACHE / f"{library.stem}.partial.so"
            build(partial)
            partial.replace(library)
    return library


def _run(arguments: list[str]) -> None:
    done = subprocess.run([compiler(), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{compiler()} {' '.join(arguments)}:\n{done.stderr}")


@functools.cache
def compiler() -> str:
    """What compiles the driver and its kernels."""
    found = shutil.which("g++") or shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        raise RuntimeError("the simulated driver needs g++")
    return found
