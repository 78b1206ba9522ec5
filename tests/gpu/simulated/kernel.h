// CUDA C++ for g++: force-included before a .cu file, so that its kernels run under the simulated driver. The builder
// (__init__.py) appends a SIMULATED_KERNEL line for each kernel and rewrites `extern __shared__`. What is missing here is
// added when a kernel needs it; nothing approximates (no __expf and the like: their bits are the GPU's own).
#pragma once

#include "launch.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static thread_local  // the threads of a block are fibers of one thread
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

extern "C" {
__attribute__((visibility("default"))) const simulated::Runtime* simulated_runtime = nullptr;  // set by the driver
int printf(const char*, ...) noexcept(false);
void* memcpy(void*, const void*, unsigned long) noexcept;
void* memset(void*, int, unsigned long) noexcept;
float expf(float) noexcept;
float logf(float) noexcept;
float log1pf(float) noexcept;
float tanhf(float) noexcept;
float powf(float, float) noexcept;
double exp(double) noexcept;
double log(double) noexcept;
double pow(double, double) noexcept;
}

namespace simulated {

static thread_local Here* here = nullptr;

template <bool B, class T, class F>
struct Choose {
  using Type = T;
};
template <class T, class F>
struct Choose<false, T, F> {
  using Type = F;
};
template <class T>
constexpr bool is_float = false;
template <>
inline constexpr bool is_float<float> = true;
template <>
inline constexpr bool is_float<double> = true;

template <unsigned... I>
struct Indices {};
template <unsigned N>
struct UpTo {
  using Type = Indices<__integer_pack(N)...>;
};

template <class... P, unsigned... I>
inline void call(void (*kernel)(P...), void** arguments, Indices<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}
template <class... P>
inline void call(void (*kernel)(P...), void** arguments) {
  call(kernel, arguments, typename UpTo<sizeof...(P)>::Type{});
}
template <class... P>
constexpr unsigned count(void (*)(P...)) {
  return sizeof...(P);
}
template <class... P>
struct Sizes {
  static constexpr unsigned all[] = {sizeof(P)..., 0};
};
template <class... P>
constexpr const unsigned* sizes(void (*)(P...)) {
  return Sizes<P...>::all;
}
// Called for every load and store of a kernel: g++ inserts it (-fsanitize=kernel-address).
__attribute__((no_sanitize_address)) inline void touched(const void* at, unsigned long bytes, bool write) {
  auto* byte = static_cast<const unsigned char*>(at);
  for (const Here::Known& known : here->known)
    if (byte >= known.from && byte + bytes <= known.to) return;
  simulated_runtime->touch(at, bytes, write);
}

constexpr unsigned bounds() { return 1024; }
constexpr unsigned bounds(unsigned most, unsigned = 0, unsigned = 0) { return most; }

}  // namespace simulated

#define SIMULATED_TOUCHED(SIZE)                                                                                       \
  extern "C" __attribute__((no_sanitize_address)) void __asan_load##SIZE(void* at) {                        \
    simulated::touched(at, SIZE, false);                                                                              \
  }                                                                                                                   \
  extern "C" __attribute__((no_sanitize_address)) void __asan_store##SIZE(void* at) {                       \
    simulated::touched(at, SIZE, true);                                                                               \
  }
SIMULATED_TOUCHED(1)
SIMULATED_TOUCHED(2)
SIMULATED_TOUCHED(4)
SIMULATED_TOUCHED(8)
SIMULATED_TOUCHED(16)
extern "C" __attribute__((no_sanitize_address)) void __asan_loadN(void* at, unsigned long bytes) {
  simulated::touched(at, bytes, false);
}
extern "C" __attribute__((no_sanitize_address)) void __asan_storeN(void* at, unsigned long bytes) {
  simulated::touched(at, bytes, true);
}
extern "C" void __asan_handle_no_return() {}
extern "C" void __asan_before_dynamic_init(const void*) {}
extern "C" void __asan_after_dynamic_init() {}

// `...`: the arguments of __launch_bounds__, if any.
#define SIMULATED_KERNEL(NAME, ...)                                                                     \
  extern "C" __attribute__((visibility("default"))) const simulated::Kernel simulated_kernel_##NAME{ \
    [](simulated::Here* here, void** arguments) __attribute__((no_sanitize_address)) {                                                   \
      simulated::here = here;                                                                     \
      simulated::call(&NAME, arguments);                                                          \
    },                                                                                              \
    simulated::count(&NAME), simulated::sizes(&NAME), simulated::bounds(__VA_ARGS__)};

#define threadIdx (simulated::here->thread)
#define blockIdx (simulated::here->block)
#define blockDim (simulated::here->block_size)
#define gridDim (simulated::here->grid_size)
constexpr int warpSize = simulated::kWarp;

#ifdef assert
#undef assert
#endif
#define assert(condition) \
  ((condition) ? void() : simulated_runtime->fail("assert(" #condition ")", __FILE__, __LINE__))
[[noreturn]] inline void __trap(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simulated_runtime->fail("__trap", file, line);
  __builtin_unreachable();
}

// Barriers, and what the lanes of a warp tell one another.

inline void __syncthreads(int line = __builtin_LINE()) { simulated_runtime->barrier(line); }

namespace simulated {

inline unsigned flat() { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }
inline unsigned lane() { return flat() % kWarp; }

template <class T>
__attribute__((no_sanitize_address)) inline T from(unsigned mask, T mine, unsigned source, int line) {
  static_assert(sizeof(T) <= kSlot && __is_trivially_copyable(T));
  const unsigned char* slots = simulated_runtime->gather(mask, &mine, sizeof(T), line);
  T theirs;
  __builtin_memcpy(&theirs, slots + source % kWarp * kSlot, sizeof(T));
  return theirs;
}

}  // namespace simulated

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  simulated_runtime->gather(mask, nullptr, 0, line);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  unsigned lane = simulated::lane();
  return simulated::from(mask, value, (lane & ~(width - 1u)) + (unsigned(source) & (width - 1u)), line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  unsigned lane = simulated::lane(), first = lane & ~(width - 1u);
  return simulated::from(mask, value, lane - first >= delta ? lane - delta : lane, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  unsigned lane = simulated::lane(), within = lane & (width - 1u);
  return simulated::from(mask, value, within + delta < unsigned(width) ? lane + delta : lane, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  // As on a GPU: a lane of a later group of `width` gets its own value.
  unsigned lane = simulated::lane(), source = lane ^ unsigned(lanes);
  return simulated::from(mask, value, source / unsigned(width) > lane / unsigned(width) ? lane : source, line);
}
__attribute__((no_sanitize_address)) inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  int mine = predicate != 0;
  const unsigned char* slots = simulated_runtime->gather(mask, &mine, sizeof(mine), line);
  unsigned ballot = 0;  // the slot of a lane that has returned is garbage
  for (unsigned lane = 0; lane < simulated::kWarp; ++lane)
    if (mask >> lane & 1) ballot |= unsigned(slots[lane * simulated::kSlot] == 1) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, !predicate, line) == 0;
}
inline unsigned __activemask() { return simulated_runtime->active(); }

inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Vectors.

#define SIMULATED_VECTORS(TYPE, NAME, A2, A4)                                                            \
  struct NAME##1 {                                                                                     \
    TYPE x;                                                                                          \
  };                                                                                                   \
  struct __align__(A2) NAME##2 {                                                                       \
    TYPE x, y;                                                                                       \
  };                                                                                                   \
  struct __align__(A4) NAME##4 {                                                                       \
    TYPE x, y, z, w;                                                                                 \
  };                                                                                                   \
  inline NAME##2 make_##NAME##2(TYPE x, TYPE y) { return {x, y}; }                                     \
  inline NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }
SIMULATED_VECTORS(float, float, 8, 16)
SIMULATED_VECTORS(double, double, 16, 16)
SIMULATED_VECTORS(int, int, 8, 16)
SIMULATED_VECTORS(unsigned, uint, 8, 16)
SIMULATED_VECTORS(short, short, 4, 8)
SIMULATED_VECTORS(unsigned short, ushort, 4, 8)
SIMULATED_VECTORS(signed char, char, 2, 4)
SIMULATED_VECTORS(unsigned char, uchar, 2, 4)
SIMULATED_VECTORS(long long, longlong, 16, 16)
SIMULATED_VECTORS(unsigned long long, ulonglong, 16, 16)
struct float3 {
  float x, y, z;
};
struct int3 {
  int x, y, z;
};
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// Loads and stores with a cache hint.

#define SIMULATED_LOAD(NAME)          \
  template <class T>                \
  inline T NAME(const T* pointer) { \
    return *pointer;              \
  }
SIMULATED_LOAD(__ldg)
SIMULATED_LOAD(__ldca)
SIMULATED_LOAD(__ldcg)
SIMULATED_LOAD(__ldcs)
SIMULATED_LOAD(__ldcv)
SIMULATED_LOAD(__ldlu)
#define SIMULATED_STORE(NAME)               \
  template <class T>                      \
  inline void NAME(T* pointer, T value) { \
    *pointer = value;                   \
  }
SIMULATED_STORE(__stwb)
SIMULATED_STORE(__stcg)
SIMULATED_STORE(__stcs)
SIMULATED_STORE(__stwt)

// Numbers. min and max of floats as CUDA's: the other one if one is not a number.

template <class A, class B>
inline auto min(A a, B b) {
  using T = decltype(true ? a : b);
  if constexpr (simulated::is_float<T>) return T(a) < T(b) || T(b) != T(b) ? T(a) : T(b);
  else return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
inline auto max(A a, B b) {
  using T = decltype(true ? a : b);
  if constexpr (simulated::is_float<T>) return T(a) > T(b) || T(b) != T(b) ? T(a) : T(b);
  else return T(a) < T(b) ? T(b) : T(a);
}
inline float fminf(float a, float b) { return min(a, b); }
inline float fmaxf(float a, float b) { return max(a, b); }
inline float fabsf(float x) { return __builtin_fabsf(x); }
inline float sqrtf(float x) { return __builtin_sqrtf(x); }
inline float floorf(float x) { return __builtin_floorf(x); }
inline float ceilf(float x) { return __builtin_ceilf(x); }
inline float rintf(float x) { return __builtin_rintf(x); }
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline double fabs(double x) { return __builtin_fabs(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }
inline int isnan(float x) { return __builtin_isnan(x); }
inline int isnan(double x) { return __builtin_isnan(x); }
inline int isinf(float x) { return __builtin_isinf(x); }
inline int isinf(double x) { return __builtin_isinf(x); }
inline int abs(int x) { return __builtin_abs(x); }

// Each rounded by itself (to nearest): never fused with its neighbours.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

#define SIMULATED_BITS(NAME, FROM, TO)               \
  inline TO NAME(FROM from) {                      \
    TO to;                                       \
    static_assert(sizeof(to) == sizeof(from));   \
    __builtin_memcpy(&to, &from, sizeof(to));    \
    return to;                                   \
  }
SIMULATED_BITS(__float_as_int, float, int)
SIMULATED_BITS(__float_as_uint, float, unsigned)
SIMULATED_BITS(__int_as_float, int, float)
SIMULATED_BITS(__uint_as_float, unsigned, float)
SIMULATED_BITS(__double_as_longlong, double, long long)
SIMULATED_BITS(__longlong_as_double, long long, double)
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(static_cast<unsigned long long>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// float16 as IEEE does it (g++'s own type rounds to nearest even, as __float2half does).
struct __align__(2) __half {
  _Float16 value;
};
using half = __half;
struct __align__(4) __half2 {
  __half x, y;
};
using half2 = __half2;
inline float __half2float(__half h) { return float(h.value); }
inline __half __float2half(float f) { return {_Float16(f)}; }
inline __half __float2half_rn(float f) { return {_Float16(f)}; }
SIMULATED_BITS(__half_as_ushort, __half, unsigned short)
SIMULATED_BITS(__ushort_as_half, unsigned short, __half)
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }

// Atomics: streams run kernels at the same time, and the host may look on.
template <class T, class F>
inline T simulated_update(T* address, F next) {
  T old, wanted;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    wanted = next(old);
  } while (!__atomic_compare_exchange(address, &old, &wanted, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
inline T atomicAdd(T* address, T value) {
  return simulated_update(address, [&](T old) { return T(old + value); });
}
template <class T>
inline T atomicMin(T* address, T value) {
  return simulated_update(address, [&](T old) { return old < value ? old : value; });
}
template <class T>
inline T atomicMax(T* address, T value) {
  return simulated_update(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
inline T atomicOr(T* address, T value) {
  return simulated_update(address, [&](T old) { return T(old | value); });
}
template <class T>
inline T atomicExch(T* address, T value) {
  return simulated_update(address, [&](T) { return value; });
}
template <class T>
inline T atomicCAS(T* address, T compare, T value) {
  return simulated_update(address, [&](T old) { return old == compare ? value : old; });
}
