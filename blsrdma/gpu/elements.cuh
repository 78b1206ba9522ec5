// Elements of rows as the kernels of lookups read them, and what one row adds to a sum: the arithmetic of native/pool.h, whose
// bits these are (compiled with --fmad=false: nothing is fused that does not say so; NaN may have other bits).

namespace {

using Position = long long;
using Unsigned = unsigned long long;

enum Format { kFp32, kFp16, kInt8, kInt4 };  // as in native/pool.h

#ifdef __CUDA_ARCH__
__device__ inline float from_half(unsigned short half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
__device__ inline float rounded_to_half(float value) {
  unsigned short half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return from_half(half);
}
#else  // for the simulated device
inline float from_half(unsigned short half) { return __half2float(__ushort_as_half(half)); }
inline float rounded_to_half(float value) { return __half2float(__float2half_rn(value)); }
#endif

__device__ inline unsigned word_at(const unsigned char* at) {  // of any alignment
  return __ldg(at) | __ldg(at + 1) << 8 | __ldg(at + 2) << 16 | unsigned(__ldg(at + 3)) << 24;
}

// What a lane reads of a row: 4 elements, or 1.
template <int format, int elements> struct Raw;
template <> struct Raw<kFp32, 4> { using type = float4; };
template <> struct Raw<kFp16, 4> { using type = uint2; };
template <> struct Raw<kInt8, 4> { using type = unsigned; };
template <> struct Raw<kInt4, 4> { using type = unsigned short; };
template <> struct Raw<kFp32, 1> { using type = float; };
template <> struct Raw<kFp16, 1> { using type = unsigned short; };
template <> struct Raw<kInt8, 1> { using type = unsigned char; };
template <> struct Raw<kInt4, 1> { using type = unsigned char; };

template <int format>
__device__ inline Position row_bytes(int dim) {
  return format == kFp32 ? Position(dim) * 4 : format == kFp16 ? Position(dim) * 2 : format == kInt8 ? Position(dim) + 8
                                                                                                : (Position(dim) + 1) / 2 + 4;
}

template <int format>
__device__ inline Position column_bytes(int column) {
  return format == kFp32 ? column * 4 : format == kFp16 ? column * 2 : format == kInt8 ? column : column / 2;
}

template <int format, int elements>
__device__ inline void widen(float (&values)[elements], const typename Raw<format, elements>::type& raw, int column) {
  if constexpr (format == kFp32 && elements == 4) {
    values[0] = raw.x, values[1] = raw.y, values[2] = raw.z, values[3] = raw.w;
  } else if constexpr (format == kFp32) {
    values[0] = raw;
  } else if constexpr (format == kFp16 && elements == 4) {
    values[0] = from_half(raw.x & 0xffffu), values[1] = from_half(raw.x >> 16);
    values[2] = from_half(raw.y & 0xffffu), values[3] = from_half(raw.y >> 16);
  } else if constexpr (format == kFp16) {
    values[0] = from_half(raw);
  } else if constexpr (format == kInt8) {
    for (int e = 0; e < elements; ++e) values[e] = float(raw >> 8 * e & 255);
  } else if constexpr (elements == 4) {
    for (int e = 0; e < 4; ++e) values[e] = float(raw >> 4 * e & 15);
  } else {
    values[0] = float(raw >> 4 * (column & 1) & 15);
  }
}

// What a row is multiplied by and shifted by.
struct Scale { float factor, bias; };

template <int format, bool weighted, int elements>
__device__ inline Scale scale_of(const unsigned char* row, float weight, int dim) {
  Scale scale{weight, 0.0f};
  if constexpr (format == kFp16) {
    scale.factor = weighted ? rounded_to_half(weight) : weight;
  } else if constexpr (format == kInt8) {
    if constexpr (elements == 4) {
      scale = {__ldg(reinterpret_cast<const float*>(row + dim)), __ldg(reinterpret_cast<const float*>(row + dim) + 1)};
    } else {
      scale = {__uint_as_float(word_at(row + dim)), __uint_as_float(word_at(row + dim + 4))};
    }
  } else if constexpr (format == kInt4) {
    const unsigned both = word_at(row + (dim + 1) / 2);
    scale = {from_half(both & 0xffffu), from_half(both >> 16)};
  }
  if constexpr (weighted && (format == kInt8 || format == kInt4)) scale = {scale.factor * weight, scale.bias * weight};
  return scale;
}

template <int format, bool weighted, int elements>
__device__ inline void add(float (&sum)[elements], const typename Raw<format, elements>::type& raw, Scale scale, int column) {
  float values[elements];
  widen<format, elements>(values, raw, column);
#pragma unroll
  for (int e = 0; e < elements; ++e) {
    if constexpr (format == kInt8 || format == kInt4) {
      sum[e] = fmaf(scale.factor, values[e], sum[e] + scale.bias);
    } else if constexpr (weighted) {
      sum[e] = fmaf(scale.factor, values[e], sum[e]);
    } else {
      sum[e] = sum[e] + values[e];
    }
  }
}

}  // namespace
