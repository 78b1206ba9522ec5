#include "pool.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace blsrdma {
namespace {

constexpr std::uint64_t kAhead = 12;  // rows between the one that is added and the one that is fetched
constexpr std::uint64_t kLines = 8;   // cache lines of a row that are fetched; the hardware sees the rest coming

#define BLSRDMA_INLINE inline __attribute__((always_inline))

BLSRDMA_INLINE float from_half(std::uint16_t half) {
  const std::uint32_t magnitude = half & 0x7fffu;
  // Scaling does normal and subnormal numbers alike, exactly; infinities and NaN need their exponent back.
  std::uint32_t bits = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return __builtin_bit_cast(float, bits | std::uint32_t(half & 0x8000u) << 16);
}

// The fp16 value nearest to x, ties to even, as a float.
BLSRDMA_INLINE float rounded_to_half(float x) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t sign = bits & 0x80000000u, positive = bits ^ sign;
  const float magnitude = __builtin_bit_cast(float, positive);
  float rounded;
  if (!(magnitude < 65520.0f)) {
    rounded = magnitude != magnitude ? magnitude : __builtin_inff();
  } else if (magnitude < 0x1p-14f) {
    rounded = (magnitude + 0.5f) - 0.5f;  // subnormal in fp16: a multiple of 2^-24
  } else {
    rounded = __builtin_bit_cast(float, (positive + 0xfffu + (positive >> 13 & 1u)) & ~0x1fffu);
  }
  return __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, rounded) | sign);
}

// --- any processor: registers of four floats

namespace baseline {

constexpr int kLanes = 4;
using Vector = float __attribute__((vector_size(16)));

inline Vector broadcast(float x) { return Vector{x, x, x, x}; }
inline Vector fma(Vector a, Vector b, Vector c) {
  for (int k = 0; k < kLanes; ++k) c[k] = __builtin_fmaf(a[k], b[k], c[k]);
  return c;
}
template <bool whole>
inline Vector load_fp32(const std::byte* from, std::uint32_t count) {
  Vector values{};
  __builtin_memcpy(&values, from, whole ? sizeof values : count * sizeof(float));
  return values;
}
template <bool whole>
inline Vector load_fp16(const std::byte* from, std::uint32_t count) {
  std::uint16_t halves[kLanes] = {};
  __builtin_memcpy(halves, from, whole ? sizeof halves : count * sizeof halves[0]);
  return Vector{from_half(halves[0]), from_half(halves[1]), from_half(halves[2]), from_half(halves[3])};
}
template <bool whole>
inline Vector load_int8(const std::byte* from, std::uint32_t count) {
  std::uint8_t bytes[kLanes] = {};
  __builtin_memcpy(bytes, from, whole ? sizeof bytes : count);
  return Vector{float(bytes[0]), float(bytes[1]), float(bytes[2]), float(bytes[3])};
}
template <bool whole>
inline Vector load_int4(const std::byte* from, std::uint32_t count) {
  std::uint8_t pairs[kLanes / 2] = {};
  __builtin_memcpy(pairs, from, whole ? sizeof pairs : (count + 1) / 2);
  return Vector{float(pairs[0] & 15), float(pairs[0] >> 4), float(pairs[1] & 15), float(pairs[1] >> 4)};
}
template <bool whole>
inline void store(float* to, const Vector& values, std::uint32_t count) {
  __builtin_memcpy(to, &values, whole ? sizeof values : count * sizeof(float));
}
inline void round_halves(float* values, std::uint32_t count) {
  for (std::uint32_t d = 0; d < count; ++d) values[d] = rounded_to_half(values[d]);
}
#include "pool_kernel.inc"

}  // namespace baseline

#if defined(__x86_64__) && !defined(__clang__)
#define BLSRDMA_WIDER 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {

constexpr int kLanes = 8;
using Vector = __m256;

// The first `count` elements where a register is not whole: through memory of its own, for nothing may be read behind.
template <bool whole, int bytes>
inline __m128i load_bytes(const std::byte* from, std::uint32_t count) {
  __m128i raw = _mm_setzero_si128();
  __builtin_memcpy(&raw, from, whole ? bytes : count);
  return raw;
}
inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
template <bool whole>
inline Vector load_fp32(const std::byte* from, std::uint32_t count) {
  Vector values{};
  __builtin_memcpy(&values, from, whole ? sizeof values : count * sizeof(float));
  return values;
}
template <bool whole>
inline Vector load_fp16(const std::byte* from, std::uint32_t count) {
  return _mm256_cvtph_ps(load_bytes<whole, 16>(from, 2 * count));
}
template <bool whole>
inline Vector load_int8(const std::byte* from, std::uint32_t count) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_bytes<whole, 8>(from, count)));
}
template <bool whole>
inline Vector load_int4(const std::byte* from, std::uint32_t count) {
  const __m128i pairs = load_bytes<whole, 4>(from, (count + 1) / 2), low = _mm_set1_epi8(15);
  const __m128i each = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(each));
}
template <bool whole>
inline void store(float* to, const Vector& values, std::uint32_t count) {
  __builtin_memcpy(to, &values, whole ? sizeof values : count * sizeof(float));
}
inline void round_halves(float* values, std::uint32_t count) {
  std::uint32_t d = 0;
  for (; d + kLanes <= count; d += kLanes) {
    _mm256_storeu_ps(values + d, _mm256_cvtph_ps(_mm256_cvtps_ph(_mm256_loadu_ps(values + d), _MM_FROUND_TO_NEAREST_INT)));
  }
  for (; d < count; ++d) values[d] = rounded_to_half(values[d]);
}
#include "pool_kernel.inc"

}  // namespace avx2
#pragma GCC pop_options
#endif

struct Choice {
  void (*function)(const Pool&);
  const char* name;
};

Choice choose() {
#ifdef BLSRDMA_WIDER
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return {avx2::pool_any, "avx2"};
  }
#endif
  return {baseline::pool_any, "baseline"};
}

const Choice kChoice = choose();

}  // namespace

void pool(const Pool& bags) { kChoice.function(bags); }

const char* pool_instructions() { return kChoice.name; }

void pool_with(const char* instructions, const Pool& bags) {
#ifdef BLSRDMA_WIDER
  if (std::strcmp(instructions, "avx2") == 0) return avx2::pool_any(bags);
#endif
  if (std::strcmp(instructions, "baseline") == 0) return baseline::pool_any(bags);
  return pool(bags);
}

}  // namespace blsrdma
