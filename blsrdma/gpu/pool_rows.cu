// Rows pooled by their addresses: what an owner's serving thread, and its own asks, have a GPU do (native/gpu_pooler.cpp).
//
// Requests are small beside a batch of pool.cu, and a bag may go on where another request has stopped. So a group of lanes
// takes one bag, and each lane `elements` neighbouring columns of it: 4, or 1 where rows do not allow that. kAhead rows are on
// their way at a time.

#include "elements.cuh"

namespace {

// As native/gpu_pooler.cpp has it, too; what is meant is in native/pool.h.
struct Job {
  const Unsigned* rows;    // addresses, all bags one after another
  const float* weights;    // as many, or null
  const Unsigned* starts;  // [bags + 1]: where in `rows` each bag begins
  float* out;              // [bags, dim]
  const float* sum;        // [dim], what the first bag begins with; or null
  Unsigned summed;         // rows that are in it
  Unsigned bags;
  int dim, elements, lanes, slices;  // slices: of a row, which `lanes` lanes read
  int mean, unfinished;              // unfinished: the last bag has more to come, and is left as it is
};

constexpr int kAhead = 8;

template <int format, bool weighted, int elements>
__device__ inline void pool_bag(const Job& job) {
  using Part = typename Raw<format, elements>::type;
  const Unsigned unit = Unsigned(blockIdx.x) * (blockDim.x / job.lanes) + threadIdx.x / job.lanes;
  const Unsigned bag = unit / job.slices;
  const int column = (int(unit % job.slices) * job.lanes + int(threadIdx.x & (job.lanes - 1))) * elements;
  if (bag >= job.bags || column >= job.dim) return;
  const Position place = column_bytes<format>(column);
  float sum[elements];
#pragma unroll
  for (int e = 0; e < elements; ++e) sum[e] = bag == 0 && job.sum != nullptr ? job.sum[column + e] : 0.0f;
  const Unsigned begin = __ldg(job.starts + bag), end = __ldg(job.starts + bag + 1);
#pragma unroll 1
  for (Unsigned at = begin; at < end; at += kAhead) {
    Part parts[kAhead];
    Scale scales[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {  // the last row again where there are no more: a branch would part the loads
      const Unsigned each = min(at + u, end - 1);
      const auto* row = reinterpret_cast<const unsigned char*>(__ldg(job.rows + each));
      parts[u] = __ldg(reinterpret_cast<const Part*>(row + place));
      scales[u] = scale_of<format, weighted, elements>(row, weighted ? __ldg(job.weights + each) : 1.0f, job.dim);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float next[elements];
      for (int e = 0; e < elements; ++e) next[e] = sum[e];
      add<format, weighted, elements>(next, parts[u], scales[u], column);
      for (int e = 0; e < elements; ++e) sum[e] = at + u < end ? next[e] : sum[e];
    }
  }
  const bool more = job.unfinished && bag == job.bags - 1;
  const Unsigned rows = end - begin + (bag == 0 ? job.summed : 0);
  float* out = job.out + bag * job.dim + column;
#pragma unroll
  for (int e = 0; e < elements; ++e) {
    if constexpr (format == kFp16) sum[e] = more ? sum[e] : rounded_to_half(sum[e]);
    if (job.mean && !more && rows > 1) sum[e] = sum[e] / float(rows);
    out[e] = sum[e];
  }
}

template <int format>
__device__ inline void pool_bags(const Job& job) {
  if (job.elements == 4) {
    job.weights != nullptr ? pool_bag<format, true, 4>(job) : pool_bag<format, false, 4>(job);
  } else {
    job.weights != nullptr ? pool_bag<format, true, 1>(job) : pool_bag<format, false, 1>(job);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128) pool_fp32(const Job job) { pool_bags<kFp32>(job); }
extern "C" __global__ void __launch_bounds__(128) pool_fp16(const Job job) { pool_bags<kFp16>(job); }
extern "C" __global__ void __launch_bounds__(128) pool_int8(const Job job) { pool_bags<kInt8>(job); }
extern "C" __global__ void __launch_bounds__(128) pool_int4(const Job job) { pool_bags<kInt4>(job); }

// Rows as they are stored, one after another: `count` of `bytes` each, in words where all addresses allow that.
extern "C" __global__ void __launch_bounds__(128)
    copy_rows(const Unsigned* rows, unsigned char* out, Unsigned count, Unsigned bytes, int word) {
  const Unsigned words = bytes / word, at = Unsigned(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count * words) return;
  const auto* from = reinterpret_cast<const unsigned char*>(__ldg(rows + at / words)) + at % words * word;
  if (word == 4) {
    *reinterpret_cast<unsigned*>(out + at * word) = __ldg(reinterpret_cast<const unsigned*>(from));
  } else {
    out[at] = __ldg(from);
  }
}
