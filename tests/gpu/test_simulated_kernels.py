"""Kernels on the simulated device: what they compute; and that what they must not do ends the process."""

from __future__ import annotations

import ctypes
import re
from ctypes import byref, c_float, c_int, c_ulonglong, c_void_p

import numpy as np
import pytest

from tests.gpu import calls as cu
from tests.gpu import simulated
from tests.gpu.processes import child

pytestmark = pytest.mark.usefixtures("a_context")

KERNELS = """
typedef long long int64_t;  // as NVRTC: there are no standard headers
template <typename T> __device__ __forceinline__ T twice(T x) { return x * 2; }

extern "C" __global__ void __launch_bounds__(2 * (64 + 64))
scale(const float* __restrict__ in, float* __restrict__ out, int64_t n, float by) {
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
        out[i] = twice(in[i]) * by;
}

// Sums of each warp by shuffles, of a block through shared memory; threads beyond `n` return at once.
extern "C" __global__ void sums(const int* in, int* out, int n) {
    extern __shared__ int partial[];
    __shared__ int total;
    int sum = in[blockIdx.x * blockDim.x + threadIdx.x];
    for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= n) return;
#ifdef MISSING_BARRIER
    if (threadIdx.x == 32) total = 0;
#else
    if (threadIdx.x == 32) {
        total = 0;
        for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) total += partial[warp];
    }
    __syncthreads();
#endif
    out[blockIdx.x * n + threadIdx.x] = total + __popc(__ballot_sync(0x3u << (threadIdx.x & 30), threadIdx.x % 2));
#ifdef MISSING_BARRIER
    if (threadIdx.x == 32) total = 1000;
#endif
}

extern "C" __global__ void lanes(int* out) {
    const int lane = threadIdx.x;
    int* mine = out + lane * 4;
    mine[0] = __shfl_sync(0xffffffffu, lane, 5, 8);
    mine[1] = __shfl_down_sync(0xffffffffu, lane, 3);
    mine[2] = __shfl_up_sync(0xffffffffu, lane, 3, 16);
    __shared__ int column[32 * 256];
    column[lane * 256] = lane;
    __syncwarp();
    mine[3] = column[(lane ^ 1) * 256];
}

extern "C" __global__ void diverging() {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
}

extern "C" __global__ void waiting(int* out) {
    out[0] = __shfl_sync(threadIdx.x < 2 ? 0xfu : 0x3u << 4, 1, 0);  // lanes 2 and 3 are missing
    __syncthreads();
}

extern "C" __global__ void missing() {
    if (threadIdx.x < 2) __syncwarp(0xfu);  // where are lanes 2 and 3?
    __syncthreads();
}

extern "C" __global__ void unaligned(float* in) { in[0] = reinterpret_cast<float4*>(in + 1)->x; }
extern "C" __global__ void one(const float* in) {
    if (in[0] == 1.0f) __trap();
}
extern "C" __global__ void two(float* in) { *reinterpret_cast<int64_t*>(in) = 0; }
"""


def arguments(*pointers: int) -> list[c_ulonglong]:
    return [c_ulonglong(pointer) for pointer in pointers]


def test_a_kernel_without_barriers() -> None:
    scale = cu.kernel(cu.module(KERNELS), "scale")
    values = np.random.default_rng(5).standard_normal(1_000_003, np.float32)
    a, b = cu.device_memory(values.nbytes), cu.device_memory(values.nbytes)
    cu.write(a, values.tobytes())
    by = c_float(0.7)
    count = ctypes.c_longlong(len(values))
    with simulated.hold():
        assert cu.launch(scale, 100, 256, *arguments(a, b), count, by) == 0
        by.value, count.value = 0.0, 0  # parameters are taken when it is launched
    got = np.frombuffer(cu.read(b, values.nbytes), np.float32)
    assert np.array_equal(got, values * 2 * np.float32(0.7))
    assert cu.launch(scale, 1, 257, *arguments(a, b), count, by) == 1, "__launch_bounds__"
    assert cu.launch(scale, 1, 32, *arguments(a, b), count, by, shared=49 << 10) == 1
    cu.call("cuFuncSetAttribute", scale, 8, 49 << 10)
    assert cu.launch(scale, 1, 32, *arguments(a, b), count, by, shared=49 << 10) == 0
    assert cu.result("cuModuleGetFunction", byref(c_void_p()), cu.module(KERNELS), b"none") == 500


def sums(*options: str) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computed, and what it should have."""
    kernel = cu.kernel(cu.module(KERNELS, *options), "sums")
    blocks, threads, n = 6, 256, 70
    values = np.random.default_rng(6).integers(0, 1000, (blocks, threads), dtype=np.int32)
    a, b = cu.device_memory(values.nbytes), cu.device_memory(blocks * n * 4)
    cu.write(a, values.tobytes())
    assert cu.launch(kernel, blocks, threads, *arguments(a, b), c_int(n), shared=threads // 32 * 4) == 0
    got = np.frombuffer(cu.read(b, blocks * n * 4), np.int32).reshape(blocks, n)
    return got, np.broadcast_to(values.sum(1, keepdims=True) + 1, (blocks, n))


def test_barriers_and_shuffles() -> None:
    assert np.array_equal(*sums())


def test_a_missing_barrier_shows() -> None:
    got, _ = sums("-DMISSING_BARRIER")
    assert len(np.unique(got)) > 1


def test_what_the_lanes_of_a_warp_tell_one_another() -> None:
    out = cu.device_memory(32 * 16)
    assert cu.launch(cu.kernel(cu.module(KERNELS), "lanes"), 1, 32, *arguments(out)) == 0
    got = np.frombuffer(cu.read(out, 32 * 16), np.int32).reshape(32, 4).T
    lane = np.arange(32)
    assert np.array_equal(got[0], lane // 8 * 8 + 5)
    assert np.array_equal(got[1], np.where(lane + 3 < 32, lane + 3, lane))
    assert np.array_equal(got[2], np.where(lane % 16 >= 3, lane - 3, lane))
    assert np.array_equal(got[3], lane ^ 1)


@pytest.mark.parametrize(
    ("name", "pointer", "says"),
    [
        ("diverging", "0", "threads wait at different __syncthreads"),
        ("waiting", "memory", "a lane that is not in its own mask"),
        ("missing", "0", "no thread can go on"),
        ("unaligned", "memory", "misaligned address"),
        ("one", "memory + 60", "reads 4 bytes"),
        ("two", "memory + 56", "writes 8 bytes .* beyond the end of an allocation"),
        ("one", "freed", "reads 4 bytes .* device memory that is not allocated"),
        ("one", "ctypes.addressof(pageable)", "reads 4 bytes .* neither device memory nor registered or pinned"),
        ("one", "ones", "__trap"),
    ],
)
def test_what_a_kernel_must_not_do_ends_the_process(name: str, pointer: str, says: str) -> None:
    process = child(
        f"""
enter()
memory, freed, pageable = device_memory(60), device_memory(60), (c_float * 15)()
ones = Pinned(4, b"\\0\\0\\x80\\x3f").at
call("cuMemFree_v2", freed)
launch(kernel(module(open(0).read()), {name!r}), 1, 64, c_ulonglong({pointer}))
call("cuCtxSynchronize")
""",
        text=KERNELS,
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(says, err), err


def test_a_kernel_has_to_be_found_by_its_name() -> None:
    with pytest.raises(ValueError, match="extern"):
        simulated.image("template <int n> __global__ void kernel(float* out) { *out = n; }")
    with pytest.raises(RuntimeError, match="no_such_function"):
        simulated.image('extern "C" __global__ void kernel(float* out) { *out = no_such_function(); }')
