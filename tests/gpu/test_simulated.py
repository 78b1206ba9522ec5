"""The simulated CUDA driver does what a GPU would, and says what a program must not do."""

from __future__ import annotations

import ctypes
import hashlib
import re
import signal
import subprocess
import threading
from ctypes import byref, c_float, c_int, c_ulonglong, c_void_p
from pathlib import Path

import numpy as np
import pytest

from tests.gpu import calls as cu
from tests.gpu import simulated
from tests.gpu.processes import ROOT, child, output

NOT_READY = 600
SIZE = 1 << 20


pytestmark = pytest.mark.usefixtures("a_context")


def pattern(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 200, size, dtype=np.uint8).tobytes()  # never 0xCB, what is unset


# --- streams and events


def test_streams_are_asynchronous_and_in_order() -> None:
    stream, content = cu.stream(), pattern(SIZE)
    a, b, host, back = cu.device_memory(SIZE), cu.device_memory(SIZE), cu.Pinned(SIZE, content), cu.Pinned(SIZE)
    with simulated.hold():
        cu.copy(a, host.at, SIZE, stream)
        cu.copy(b, a, SIZE, stream)
        cu.copy(back.at, b, SIZE, stream)
        assert cu.result("cuStreamQuery", stream) == NOT_READY
        assert back.content == bytes(SIZE)
    cu.call("cuStreamSynchronize", stream)
    assert cu.result("cuStreamQuery", stream) == 0
    assert back.content == content


def test_events_order_streams_and_nothing_else_does() -> None:
    first, second, third = cu.stream(), cu.stream(), cu.stream()
    begun, go = threading.Event(), threading.Event()

    @cu.HostFunction
    def wait(_: int) -> None:
        begun.set()
        assert go.wait(60)

    content = pattern(4096)
    host, to, to_third = cu.Pinned(4096, content), cu.Pinned(4096), cu.Pinned(4096)
    memory, event = cu.device_memory(4096), cu.event()
    cu.call("cuLaunchHostFunc", first, wait, None)
    cu.copy(memory, host.at, 4096, first)
    cu.call("cuEventRecord", event, first)
    cu.call("cuStreamWaitEvent", second, event, 0)
    cu.copy(to.at, memory, 4096, second)
    cu.copy(to_third.at, memory, 4096, third)
    cu.call("cuStreamSynchronize", third)
    assert begun.wait(60)
    assert set(to_third.content) == {0xCB}, "it did not wait: what device memory holds before it is written"
    assert cu.result("cuStreamQuery", second) == NOT_READY
    assert cu.result("cuEventQuery", event) == NOT_READY
    go.set()
    cu.call("cuStreamSynchronize", second)
    assert to.content == content
    assert cu.result("cuEventQuery", event) == 0


def test_an_event_is_what_it_was_when_it_was_waited_for() -> None:
    first, second, event, go = cu.stream(), cu.stream(), cu.event(), threading.Event()
    cu.call("cuStreamWaitEvent", second, event, 0)  # never recorded: nothing to wait for
    cu.call("cuStreamSynchronize", second)
    assert cu.result("cuEventQuery", event) == 0
    cu.call("cuEventSynchronize", event)
    cu.call("cuEventRecord", event, first)
    cu.call("cuEventSynchronize", event)
    cu.call("cuStreamWaitEvent", second, event, 0)

    @cu.HostFunction
    def wait(_: int) -> None:
        assert go.wait(60)

    cu.call("cuLaunchHostFunc", first, wait, None)
    cu.call("cuEventRecord", event, first)
    cu.call("cuStreamSynchronize", second)  # waited for the first record, not for the second
    assert cu.result("cuEventQuery", event) == NOT_READY
    go.set()
    cu.call("cuEventSynchronize", event)


def test_elapsed_time() -> None:
    stream, start, end, untimed = cu.stream(), cu.event(0), cu.event(0), cu.event()
    for event in (start, untimed, end):
        cu.call("cuEventRecord", event, stream)
    cu.call("cuEventSynchronize", end)
    assert cu.elapsed(start, end) >= 0
    assert cu.result("cuEventElapsedTime", byref(c_float()), untimed, end) == 400


def test_who_looks_too_early_sees_torn_data() -> None:
    stream, old, new = cu.stream(), pattern(SIZE, 1), pattern(SIZE, 2)
    memory, host, back = cu.device_memory(SIZE), cu.Pinned(SIZE, new), cu.Pinned(SIZE, old)
    cu.write(memory, new)
    with simulated.hold():
        cu.copy(back.at, memory, SIZE, stream)
        assert simulated.step(3) == 3
        quarters = [back.content[at : at + SIZE // 4] for at in range(0, SIZE, SIZE // 4)]
        is_new = [
            quarter == new[at : at + SIZE // 4] for quarter, at in zip(quarters, range(0, SIZE, SIZE // 4), strict=True)
        ]
        assert sum(is_new) == 3
        assert b"".join(quarters) != old
        assert simulated.step(1) == 1
        assert back.content == new
        assert cu.result("cuStreamQuery", stream) == 0
        assert simulated.step(1, seconds=0.01) == 0, "there is nothing to do"
    assert host.content == new


def test_a_held_gpu_never_completes() -> None:
    stream, event, ran = cu.stream(), cu.event(), threading.Event()
    function = cu.HostFunction(lambda _: ran.set())
    waited = threading.Event()

    def wait() -> None:
        cu.call("cuEventSynchronize", event)
        waited.set()

    with simulated.hold():
        cu.call("cuLaunchHostFunc", stream, function, None)
        cu.call("cuEventRecord", event, stream)
        waiter = threading.Thread(target=lambda: (cu.enter(), wait(), cu.leave()))
        waiter.start()
        assert not waited.wait(0.05)
        assert not ran.is_set()
        assert cu.result("cuEventQuery", event) == NOT_READY
    waiter.join(60)
    assert ran.is_set() and waited.is_set()


def test_host_functions_run_on_another_thread() -> None:
    threads: list[int] = []
    function = cu.HostFunction(lambda _: threads.append(threading.get_ident()))
    for stream in (cu.stream(), cu.stream()):
        cu.call("cuLaunchHostFunc", stream, function, None)
        cu.call("cuStreamSynchronize", stream)
    assert threads[0] == threads[1] != threading.get_ident()


def test_a_host_function_must_not_call_cuda() -> None:
    process = child(
        """
enter()
function = HostFunction(lambda _: result("cuEventQuery", None))
call("cuLaunchHostFunc", None, function, None)
call("cuStreamSynchronize", None)
"""
    )
    _, err = output(process, -signal.SIGABRT)
    assert "cuEventQuery called from a host function" in err


# --- errors


def test_errors_of_the_device_stay() -> None:
    process = child(
        """
enter()
kernels = module('extern "C" __global__ void nothing() {}')
nothing = kernel(kernels, "nothing")
on, host, recorded, ran = stream(), Pinned(64), event(), []
memory = device_memory(64)
simulated.fail("kernel", 700, after_calls=1)
assert launch(nothing, 1, 1, on=on) == 0
call("cuStreamSynchronize", on)
function = HostFunction(lambda _: ran.append(1))
with simulated.hold():
    assert launch(nothing, 1, 1, on=on) == 0
    copy(memory, host.at, 64, on)
    call("cuLaunchHostFunc", on, function, None)
    call("cuEventRecord", recorded, on)
assert result("cuStreamSynchronize", on) == 700
for function, *arguments in (("cuEventQuery", recorded), ("cuEventSynchronize", recorded), ("cuCtxSynchronize",),
                             ("cuMemAlloc_v2", byref(c_ulonglong()), 64), ("cuMemFree_v2", memory)):
    assert result(function, *arguments) == 700, function
assert not ran
leave()
"""
    )
    output(process)


def test_a_call_fails_on_demand() -> None:
    simulated.fail("cuMemAlloc_v2", 2, after_calls=1)
    cu.device_memory(64)
    assert cu.result("cuMemAlloc_v2", byref(c_ulonglong()), 64) == 2
    cu.device_memory(64)
    before = simulated.calls("cuMemAlloc_v2")
    simulated.fail("cuMemAlloc_v2", 2)
    simulated.fail("cuMemAlloc_v2", 0)
    cu.device_memory(64)
    assert simulated.calls("cuMemAlloc_v2") == before + 1


def test_what_a_driver_refuses_is_refused() -> None:
    stream, memory, host, name = cu.stream(), cu.device_memory(1000), cu.Pinned(4096), c_void_p()
    copied = lambda to, source, size: cu.result("cuMemcpyAsync", to, source, size, stream)  # noqa: E731
    assert copied(memory, host.at, 1000) == 0
    assert copied(memory, host.at, 1001) == 1
    assert copied(memory + 500, host.at, 501) == 1
    assert copied(host.at + 4000, memory, 97) == 1
    assert copied(memory - 8, host.at, 8) == 1
    assert cu.result("cuMemsetD8Async", memory, 0, 1001, stream) == 1
    assert cu.result("cuMemcpyAsync", memory, host.at, 8, 0x1234560) == 400
    assert cu.result("cuEventRecord", memory, stream) == 400
    cu.call("cuMemFree_v2", memory)
    assert copied(memory, host.at, 8) == 1
    assert cu.result("cuMemFree_v2", memory) == 1
    cu.call("cuStreamDestroy_v2", stream)
    assert cu.result("cuStreamQuery", stream) == 400
    assert cu.result("cuMemAlloc_v2", byref(c_ulonglong()), 1 << 40) == 2
    assert cu.result("cuModuleLoadData", byref(name), b"//\n.version 9.0") == 200
    assert cu.result("cuGetErrorName", 712, byref(name)) == 0
    assert ctypes.string_at(name) == b"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"


def test_host_memory_is_registered_once() -> None:
    buffer = np.zeros(3 * 4096, np.uint8)
    at = buffer.ctypes.data
    cu.call("cuMemHostRegister_v2", at, 8192, 3)
    assert cu.result("cuMemHostRegister_v2", at, 8192, 3) == 712
    assert cu.result("cuMemHostRegister_v2", at + 8191, 2, 3) == 712
    cu.call("cuMemHostRegister_v2", at + 8192, 4096, 3)
    kind = c_int()
    assert cu.result("cuPointerGetAttribute", byref(kind), 2, at + 5) == 0
    assert kind.value == 1
    cu.call("cuMemHostUnregister", at)
    assert cu.result("cuMemHostUnregister", at) == 713
    assert cu.result("cuMemHostRegister_v2", 1 << 12, 8192, 3) == 1, "not mapped"
    cu.call("cuMemHostUnregister", at + 8192)


def test_a_context_ends_with_what_is_in_it() -> None:
    """In a process of its own: others of this one may have the primary context, too."""
    process = child(
        """
enter()
memory, on = device_memory(64), stream()
assert [simulated.live(what) for what in ("device", "streams")] == [1, 1]
leave()
assert [simulated.live(what) for what in ("device", "streams")] == [0, 0]
assert result("cuStreamQuery", on) == 201, "no current context"
enter()
assert result("cuMemFree_v2", memory) == 1
assert result("cuStreamQuery", on) == 400
"""
    )
    output(process)


# --- between processes


def test_ipc_shows_the_bytes_of_another_process() -> None:
    content, answer = pattern(70_000, 3), pattern(70_000, 4)
    memory = cu.device_memory(70_000)
    cu.write(memory, content)
    handle = cu.handle_of(memory + 256)  # of the allocation, wherever in it one points
    assert cu.open_handle(handle)[0] == 201, "one's own"
    process = child(
        """
import hashlib
enter()
handle = bytes.fromhex(input())
got, pointer = open_handle(handle)
assert got == 0
assert open_handle(handle) == (0, pointer)
print(hashlib.sha256(read(pointer, 70_000)).hexdigest())
assert result("cuMemFree_v2", pointer) == 1
assert result("cuMemcpyAsync", pointer, pointer + 69_000, 1_001, None) == 1
write(pointer, bytes.fromhex(input()))
leave()
enter(1)
assert open_handle(handle)[0] == 217, "device 1 does not reach device 0"
leave(1)
enter()
pointer = open_handle(handle)[1]
print("open", flush=True)
input()
call("cuIpcCloseMemHandle", pointer)
assert result("cuIpcCloseMemHandle", pointer) == 1
print("closed", flush=True)
input()
assert open_handle(handle)[0] == 1, "stale"
leave()
""",
        text=f"{handle.hex()}\n{answer.hex()}\n",
        SIMULATED_CUDA_DEVICES="2",
        SIMULATED_CUDA_PEERS="0",
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline().strip() == hashlib.sha256(content).hexdigest(), process.communicate()[1]
    assert process.stdout.readline().strip() == "open", process.communicate()[1]
    assert cu.read(memory, 70_000) == answer
    for said in ("closed", ""):
        if not said:
            cu.call("cuMemFree_v2", memory)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == said
    output(process)


def test_memory_is_not_freed_while_others_have_it_open() -> None:
    owner = child("""
enter()
memory = device_memory(64)
print(handle_of(memory).hex(), flush=True)
input()
call("cuMemFree_v2", memory)
print(simulated.complaints(), flush=True)
input()
""")
    assert owner.stdin is not None and owner.stdout is not None
    user = child(
        """
enter()
pointer = open_handle(bytes.fromhex(input()))[1]
read(pointer, 64)
print(simulated.complaints(), flush=True)
input()
read(pointer, 64)
print(simulated.complaints())
""",
        text=owner.stdout.readline(),
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "0\n"
    owner.stdin.write("\n")
    owner.stdin.flush()
    assert owner.stdout.readline() == "1\n"
    out, err = user.communicate("\n", timeout=60)
    assert out == "1\n", err
    assert "its owner, another process, has freed" in err
    _, err = owner.communicate("\n", timeout=60)
    assert f"process {user.pid} has open" in err


def test_the_host_cannot_touch_device_memory() -> None:
    _, err = output(child("enter()\nctypes.string_at(device_memory(64), 4)"), -signal.SIGSEGV)
    assert "the host touched device memory" in err


def test_devices_are_chosen_by_the_environment() -> None:
    process = child(
        """
call("cuInit", 0)
count = c_int()
call("cuDeviceGetCount", byref(count))
names = []
for device in range(count.value):
    name = ctypes.create_string_buffer(64)
    call("cuDeviceGetName", name, 64, device)
    names.append(name.value.decode())
print(names)
enter()
assert result("cuMemAlloc_v2", byref(c_ulonglong()), 1 << 20) == 2
""",
        SIMULATED_CUDA_DEVICES="4",
        CUDA_VISIBLE_DEVICES="3,1",
        SIMULATED_CUDA_MEMORY="1000000",
        SIMULATED_CUDA_DELAY_US="10",
    )
    assert output(process)[0].strip() == "['Simulated GPU 3', 'Simulated GPU 1']"


# --- declarations


def test_the_product_declares_the_driver_as_the_simulation_does(tmp_path: Path) -> None:
    header = ROOT / "blsrdma" / "native" / "cuda.h"
    functions = re.findall(r'ONE\((\w+), "(\w+)"', header.read_text())
    assert len(functions) > 30
    checks = "\n".join(
        f'static_assert(same(Functions{{}}.{name}, &{symbol}), "{symbol}");' for name, symbol in functions
    )
    source = tmp_path / "check.cpp"
    source.write_text(
        f"""
#include <type_traits>
#include "{header}"
#include "{simulated.HERE / "declarations.h"}"
using namespace blsrdma::cuda;
// Enumerations are ints; handles are pointers to whatever; structures are so many bytes.
template <class T, class = void> struct Plain {{ using type = T; }};
template <class T> struct Plain<T, std::enable_if_t<std::is_enum_v<T>>> {{ using type = int; }};
template <int n> struct Bytes;
template <class T> struct Plain<T, std::enable_if_t<std::is_class_v<T> && (sizeof(T) > 0)>> {{
    using type = Bytes<sizeof(T)>;
}};
struct Handle;
template <class T, bool> struct Pointer {{ using type = typename Plain<T>::type*; }};
template <class T> struct Pointer<T, true> {{ using type = Handle*; }};
template <class T, class... U> constexpr bool is_one_of = (std::is_same_v<T, U> || ...);
template <class T> constexpr bool is_handle =
    std::is_class_v<T> && !is_one_of<T, Uuid, IpcHandle, CUuuid, CUipcMemHandle>;
template <class T> struct Plain<T*, void> {{ using type = typename Pointer<T, is_handle<T>>::type; }};
template <class F> struct As;
template <class R, class... P> struct As<R (*)(P...)> {{
    using type = typename Plain<R>::type (*)(typename Plain<P>::type...);
}};
template <class A, class B> constexpr bool same(A, B) {{
    return std::is_same_v<typename As<A>::type, typename As<B>::type>;
}}
{checks}
"""
    )
    done = subprocess.run(
        [simulated.compiler(), "-std=c++20", "-fsyntax-only", str(source)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
