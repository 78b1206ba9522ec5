// The interaction of a sample's vectors, read where the messages with pooled vectors lie: no tensor of all of them is made.
//
// dot: a block has one sample. Its vectors (the bottom MLP's output, then a vector for each table) are copied to shared
// memory, or as many columns of them as fit; each thread then takes the products of two classes of vectors, a, a + C,
// a + 2 C ... and b, b + C ...: TILE x TILE sums in registers. Neighbouring classes lie in other banks. A product is one
// chain of fused multiply-adds in column order from +0: its bits depend on nothing else.
// cat: the vectors one after another.
//
// Where tables are cut by rows, what arrives is added in the order of the placement's runs, and means are taken then: the
// vectors have the CPU's bits.
//
// Compiled for one INTERACTION_ELEMENTS (4: columns are read four at a time; 1) and INTERACTION_TILE (4, 2, 1).

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kParts = 384;

// As dlrm/gpu/interaction.py has them, too.
struct Source { int part, position; };  // of a vector of table t: sources[firsts[t]] to sources[firsts[t + 1]] are added up
struct Parts {
  const float* at[kParts];  // message of part p: [samples, tables[p], dim]
};
struct Work {
  const float* bottom;   // [samples, dim]
  float* out;            // [samples, out_stride], of which the interaction has the first columns, and zeros the others
  const Source* sources;
  const int* firsts;     // [features]
  const int* tables;     // [parts]
  const int* means;      // [features - 1] which of `lengths` a table is divided by, or -1
  const float* lengths;  // [., samples], or null
  long long samples, bottom_stride, out_stride;
  int features, dim;
  int columns;  // that are in shared memory at a time, a multiple of 4 or all
  int stride;   // of a vector there, in floats
  int itself;   // products of vectors with themselves, too
  int staged;   // products are gathered in shared memory, too
};

// --- vectors

__device__ inline const float* source_row(const Work& work, const Parts& parts, int which, long long sample) {
  const int part = __ldg(&work.sources[which].part), position = __ldg(&work.sources[which].position);
  return parts.at[part] + (sample * __ldg(work.tables + part) + position) * work.dim;
}

// Where the first (mostly the only) part of vector f lies, and whether that is not all.
__device__ inline const float* first_row(const Work& work, const Parts& parts, int f, long long sample, bool& more) {
  more = false;
  if (f == 0) return work.bottom + sample * work.bottom_stride;
  const int first = __ldg(work.firsts + f - 1);
  more = __ldg(work.firsts + f) - first > 1 || (work.lengths != nullptr && __ldg(work.means + f - 1) >= 0);
  return source_row(work, parts, first, sample);
}

// The element in a column of a vector whose first part holds `value` there.
__device__ inline float completed(const Work& work, const Parts& parts, int f, long long sample, int column, float value) {
  for (int which = __ldg(work.firsts + f - 1) + 1; which < __ldg(work.firsts + f); ++which) {
    value = value + __ldg(source_row(work, parts, which, sample) + column);
  }
  const int mean = work.lengths == nullptr ? -1 : __ldg(work.means + f - 1);
  return mean < 0 ? value : value / __ldg(work.lengths + mean * work.samples + sample);
}

// 16 bytes into shared memory that are there after copied(); no register holds them on the way.
__device__ inline void copy(float* to, const float* from) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from) : "memory");
#else
  *reinterpret_cast<float4*>(to) = __ldg(reinterpret_cast<const float4*>(from));
#endif
}
__device__ inline void copied() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Columns begin to begin + count of all vectors into shared memory. Each warp takes every warps-th vector; each of its
// lanes finds one of them and tells the others, so that no load waits for another.
template <int elements>
__device__ inline void load(const Work& work, const Parts& parts, long long sample, float* vectors, int begin, int count) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int base = threadIdx.x / 32; base < work.features; base += 32 * warps) {
    const int mine = base + lane * warps;
    bool more = false;
    const float* row = mine < work.features ? first_row(work, parts, mine, sample, more) : nullptr;
    const int here = min(32, (work.features - base + warps - 1) / warps);
    for (int j = 0; j < here; ++j) {
      const auto from = reinterpret_cast<const float*>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(row), j)) + begin;
      float* to = vectors + (base + j * warps) * work.stride;
      if constexpr (elements == 4) {
        for (int c = 4 * lane; c < count; c += 128) copy(to + c, from + c);
      } else {
        for (int c = lane; c < (count + 3) / 4 * 4; c += 32) to[c] = c < count ? __ldg(from + c) : 0.0f;
      }
    }
    copied();
    unsigned rest = __ballot_sync(kAll, more);
    for (; rest != 0; rest &= rest - 1) {
      const int f = base + (__ffs(rest) - 1) * warps;
      float* to = vectors + f * work.stride;
      // The columns that this lane has copied itself.
      for (int c = elements * lane; c < count; c += elements * 32) {
        for (int e = 0; e < elements; ++e) to[c + e] = completed(work, parts, f, sample, begin + c + e, to[c + e]);
      }
    }
  }
}

// --- products

// Adds the products of the columns in shared memory to the sums of classes a and b.
template <int tile>
__device__ inline void multiply(float (&sums)[tile][tile], const float* vectors, const int (&left)[tile], const int (&right)[tile],
                                int count) {
#pragma unroll 2
  for (int k = 0; k < count; k += 4) {
    float4 x[tile], y[tile];
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      x[i] = *reinterpret_cast<const float4*>(vectors + left[i] + k);
      y[i] = *reinterpret_cast<const float4*>(vectors + right[i] + k);
    }
#pragma unroll
    for (int i = 0; i < tile; ++i) {
#pragma unroll
      for (int j = 0; j < tile; ++j) {
        float sum = fmaf(x[i].x, y[j].x, sums[i][j]);
        sum = fmaf(x[i].y, y[j].y, sum);
        sum = fmaf(x[i].z, y[j].z, sum);
        sums[i][j] = fmaf(x[i].w, y[j].w, sum);
      }
    }
  }
}

template <int elements, int tile>
__device__ inline void dot_products(const Work& work, const Parts& parts, float* vectors) {
  const long long sample = blockIdx.x;
  const int features = work.features, classes = (features + tile - 1) / tile, tiles = classes * (classes + 1) / 2;
  const int pairs = work.itself ? features * (features + 1) / 2 : features * (features - 1) / 2;
  float* out = work.out + sample * work.out_stride;
  float* products = work.staged ? vectors + features * work.stride : out + work.dim;
  for (int first = 0; first < tiles; first += blockDim.x) {
    const int number = first + threadIdx.x;
    int a = int((sqrtf(8.0f * float(number) + 1.0f) - 1.0f) * 0.5f);  // the number of a pair of classes is a (a + 1) / 2 + b
    while (a * (a + 1) / 2 > number) --a;
    while ((a + 1) * (a + 2) / 2 <= number) ++a;
    const int b = number - a * (a + 1) / 2;
    float sums[tile][tile] = {};
    int left[tile], right[tile];
#pragma unroll
    for (int i = 0; i < tile; ++i) {  // (where there is no such vector, the last one: not used)
      left[i] = min(a + i * classes, features - 1) * work.stride;
      right[i] = min(b + i * classes, features - 1) * work.stride;
    }
    for (int begin = 0; begin < work.dim; begin += work.columns) {
      const int count = min(work.columns, work.dim - begin);
      if (first == 0 || work.columns < work.dim) {
        __syncthreads();
        load<elements>(work, parts, sample, vectors, begin, count);
        __syncthreads();
      }
      if (first == 0) {
        for (int c = threadIdx.x; c < count; c += blockDim.x) out[begin + c] = vectors[c];
      }
      if (number < tiles) multiply<tile>(sums, vectors, left, right, (count + 3) / 4 * 4);
    }
    if (number < tiles) {
#pragma unroll
      for (int i = 0; i < tile; ++i) {
#pragma unroll
        for (int j = 0; j < tile; ++j) {
          const int p = a + i * classes, q = b + j * classes;
          const int high = max(p, q), low = min(p, q);
          if (high >= features || (a == b && p < q) || (p == q && !work.itself)) continue;
          products[(work.itself ? high * (high + 1) / 2 : high * (high - 1) / 2) + low] = sums[i][j];
        }
      }
    }
  }
  if (work.staged) {
    __syncthreads();
    for (int c = threadIdx.x; c < pairs; c += blockDim.x) out[work.dim + c] = products[c];
  }
  for (long long c = work.dim + pairs + threadIdx.x; c < work.out_stride; c += blockDim.x) out[c] = 0.0f;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256, 2) dot(const Work work, const Parts parts) {
  extern __shared__ float4 memory[];
  dot_products<INTERACTION_ELEMENTS, INTERACTION_TILE>(work, parts, reinterpret_cast<float*>(memory));
}

extern "C" __global__ void __launch_bounds__(256) cat(const Work work, const Parts parts) {
  const long long sample = blockIdx.x, used = static_cast<long long>(work.features) * work.dim;
  float* out = work.out + sample * work.out_stride;
  for (int f = threadIdx.x / 32; f < work.features; f += blockDim.x / 32) {
    bool more;
    const float* from = first_row(work, parts, f, sample, more);
    for (int c = threadIdx.x % 32; c < work.dim; c += 32) {
      const float value = __ldg(from + c);
      out[static_cast<long long>(f) * work.dim + c] = more ? completed(work, parts, f, sample, c, value) : value;
    }
  }
  for (long long c = used + threadIdx.x; c < work.out_stride; c += blockDim.x) out[c] = 0.0f;
}
