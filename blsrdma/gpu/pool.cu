// Pooled lookup: sums of rows in index order, written where the messages to their readers lie.
//
// A bag is pooled by a group of lanes, each of which has `elements` neighbouring columns: whole warps for rows of 128 and
// more (a slice of 128 columns each), parts of a warp for shorter ones. A group takes `run` neighbouring bags of one table,
// whose rows are one stretch of the indices, and reads that stretch: while kAhead rows are on their way, it does not
// matter where bags end. Each lane finds one of the next `lanes` rows (its index, which was fetched before, whether it is
// hot, its address and scale), and tells the others by shuffles.
//
// Bits are those of native/pool.h: elements of a row never meet each other, the additions of one are in index order from
// +0, and nothing is fused that does not say so (compiled with --fmad=false). NaN may have other bits.
//
// Compiled for one POOL_FORMAT, POOL_WEIGHTED (false, true) and POOL_ELEMENTS (4, 1). POOL_AHEAD, POOL_BLOCKS and POOL_LOAD
// may be given, too: `python -m bench.gpu.tune` tries what they cost.

#include "elements.cuh"

namespace {

// As blsrdma/gpu/pooling.py has them, too.
struct Table {
  const unsigned char* hot;   // rows in this GPU's memory, or another's
  const unsigned char* cold;  // row r at cold + r * bytes of a row: host memory, device-mapped; read where it is not hot
  const int* slots;           // [rows]: where in `hot` a row is, or -1; null: rows below `hot_rows` are hot
  Position first, rows;       // which rows of the table these are: first to first + rows ...
  Position all;               // ... of so many. Indices outside are someone else's and add nothing
  Position hot_rows;          // rows in `hot`
  int position;               // of its vector among those of a sample
  int mean;
};

constexpr int kTables = 40;
struct Tables { Table table[kTables]; };  // of a launch: grid.y of them

struct Bags {
  const Position* indices;  // [count], of all tables
  const float* weights;     // [count]
  const Position* offsets;  // table t's begin at t * stride: [samples + 1]
  const Position* firsts;   // [tables] where a table's indices begin, to which its offsets are relative; null: 0
  Position count, stride;
  Position from, to;        // samples
  Position message_tables;  // vectors per sample in a message
  const unsigned char* spare;  // a row that is read where there is none to add
  Unsigned* errors;         // [2] least bad position in `indices`; least bad number in `offsets`. All ones: none
  volatile int* failed;     // in host memory; written where there is an error
  int dim, lanes, slices, run;
  int first_table;  // of this launch
};

constexpr int kDestinations = 64;
struct Destinations {
  float* to[kDestinations];            // message of destination q: [samples of it, message_tables, dim]
  Position start[kDestinations + 1];   // its samples: start[q] to start[q + 1]
  int count;
};

#ifndef POOL_AHEAD  // rows of a group on their way: what registers allow
#define POOL_AHEAD (format == kInt4 || (format == kFp32 && weighted) ? 4 : 8)
#endif
#ifndef POOL_LOAD  // of rows: __ldcg would leave the first-level cache alone
#define POOL_LOAD __ldg
#endif
constexpr int kMost = 0x7fffffff;  // rows of a group's bags
constexpr unsigned kAll = 0xffffffffu;

// --- rows

__device__ inline void report(const Bags& bags, int which, Position where) {
  atomicMin(bags.errors + which, Unsigned(where));
  *bags.failed = 1;
}

// Where a bag ends, counted from where the stretch of its group begins. Offsets are not trusted: it is never less than
// `least` nor more than `most`.
__device__ inline int bounded(const Bags& bags, const Position* offset, Position begin, int least, int most) {
  const Position given = __ldg(offset) - begin;
  const int value = given < least ? least : given > most ? most : int(given);
  if (value != given) report(bags, 1, offset - bags.offsets);
  return value;
}

__device__ inline int slot_of(const Table& table, Position index) {
  const Unsigned row = Unsigned(index) - Unsigned(table.first);
  return table.slots != nullptr && row < Unsigned(table.rows) ? __ldg(table.slots + row) : -1;
}

// Where the row of an index lies; null where it is none, or someone else's.
__device__ inline const unsigned char* row_of(const Bags& bags, const Table& table, const Position* at, Position index,
                                              int slot, Position bytes) {
  const Unsigned row = Unsigned(index) - Unsigned(table.first);
  if (row >= Unsigned(table.rows)) {
    if (Unsigned(index) >= Unsigned(table.all)) report(bags, 0, at - bags.indices);
    return nullptr;
  }
  if (table.slots == nullptr) return (row < Unsigned(table.hot_rows) ? table.hot : table.cold) + row * bytes;
  return Unsigned(Position(slot)) < Unsigned(table.hot_rows) ? table.hot + slot * bytes : table.cold + row * bytes;
}

// --- the kernel

// The same number, of which the compiler knows nothing.
__device__ inline unsigned afresh(unsigned number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Where the vectors of a table go, sample by sample.
struct Cursor {
  float* out;
  int until;  // samples until the next destination, or more than the group has
  int destination;

  __device__ inline void seek(const Destinations& d, Position sample, Position step, Position within) {
    int high = d.count;
    destination = 0;
    while (high - destination > 1) {
      const int middle = (destination + high) / 2;
      (d.start[middle] <= sample ? destination : high) = middle;
    }
    out = d.to[destination] + (sample - d.start[destination]) * step + within;
    until = int(min(d.start[destination + 1] - sample, Position(kMost)));
  }
  __device__ inline void next(const Destinations& d, Position step, Position within) {
    out += step;
    if (--until == 0 && destination + 1 < d.count) {
      const Position sample = d.start[++destination];
      while (destination + 1 < d.count && d.start[destination + 1] == sample) ++destination;
      out = d.to[destination] + within;
      until = int(min(d.start[destination + 1] - sample, Position(kMost)));
    }
  }
};

template <int format, bool weighted, int elements>
__device__ inline void pool_bags(const Bags& bags, const Tables& tables, const Destinations& destinations) {
  using Part = typename Raw<format, elements>::type;
  constexpr bool scaled = weighted || format == kInt8 || format == kInt4;
  constexpr bool shifted = format == kInt8 || format == kInt4;
  constexpr int kAhead = POOL_AHEAD;
  const int lanes = bags.lanes, lane = threadIdx.x & (lanes - 1);
  const unsigned unit = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
  const unsigned slice = unit % bags.slices, chunk = unit / bags.slices;
  const int column = (slice * lanes + lane) * elements;
  const bool mine = column < bags.dim;
  const Position bytes = row_bytes<format>(bags.dim), place = mine ? column_bytes<format>(column) : 0;

  // The stretch of this group: `left` bags, `last` rows. Positions are counted from its begin.
  const Position sample = bags.from + Position(chunk) * bags.run;
  int left = sample < bags.to ? int(min(bags.to - sample, Position(bags.run))) : 0;
  const Position* ends = bags.offsets + (bags.first_table + blockIdx.y) * bags.stride + sample;
  const auto base = [&] {
    return bags.firsts == nullptr ? 0 : __ldg(bags.firsts + bags.first_table + afresh(blockIdx.y));
  };
  const Position* indices = bags.indices;
  int end = 0, last = 0, begun = 0;
  if (left > 0) {
    Position begin = base() + __ldg(ends);
    if (Unsigned(begin) > Unsigned(bags.count)) {
      report(bags, 1, ends - bags.offsets);
      begin = bags.count;
    }
    indices += begin;
    last = bounded(bags, ends + left, begin - base(), 0, int(min(bags.count - begin, Position(kMost))));
    ++ends;
    end = left == 1 ? last : bounded(bags, ends, begin - base(), 0, last);
  }
  const float* weights = weighted ? bags.weights + (indices - bags.indices) : nullptr;
  // The table's description is read where it is used: kept in registers it would cost the loads that they hold.
  const auto table = [&]() -> const Table& { return tables.table[afresh(blockIdx.y)]; };
  Position index = lane < last ? __ldcs(indices + lane) : 0;
  float weight = weighted && lane < last ? __ldcs(weights + lane) : 1.0f;
  int slot = slot_of(table(), index);
  Cursor cursor;
  const auto step = [&] { return bags.message_tables * bags.dim; };
  const auto within = [&] { return Position(table().position) * bags.dim + column; };
  if (left > 0) cursor.seek(destinations, sample, step(), within());

  float sum[elements] = {};
  // Write the bag that ends, and begin the next.
  const auto finish = [&] {
    const int rows = end - begun;
#pragma unroll
    for (int e = 0; e < elements; ++e) {
      if constexpr (format == kFp16) sum[e] = rounded_to_half(sum[e]);
      if (rows > 1 && table().mean) sum[e] = sum[e] / float(rows);
    }
    if (mine) {
      if constexpr (elements == 4) {
        __stcs(reinterpret_cast<float4*>(cursor.out), make_float4(sum[0], sum[1], sum[2], sum[3]));
      } else {
        __stcs(cursor.out, sum[0]);
      }
    }
#pragma unroll
    for (int e = 0; e < elements; ++e) sum[e] = 0.0f;
    cursor.next(destinations, step(), within());
    begun = end;
    ++ends;
    end = --left <= 1 ? last : bounded(bags, ends, indices - bags.indices - base(), begun, last);
  };

  int longest = last;  // of the groups of this warp, which go on together
  for (int other = lanes; other < 32; other *= 2) longest = max(longest, __shfl_xor_sync(kAll, longest, other, 32));
  // (at may pass kMost: unsigned where it is compared)
  for (unsigned at = 0; at < unsigned(longest); at += lanes) {
    const int here = min(max(last - int(at), 0), lanes);  // rows of this round
    const unsigned char* row = lane < here ? row_of(bags, table(), indices + at + lane, index, slot, bytes) : nullptr;
    const unsigned held = __ballot_sync(kAll, row != nullptr) >> (threadIdx.x & 31 & -lanes);
    if (row == nullptr) row = bags.spare;
    const Scale scale = scale_of<format, weighted, elements>(row, weight, bags.dim);
    if (const unsigned after = at + lanes + lane; after < unsigned(last)) {  // is there when these rows are
      index = __ldcs(indices + after);
      if constexpr (weighted) weight = __ldcs(weights + after);
    }
#pragma unroll 1
    for (int k = 0; k < min(lanes, longest - int(at)); k += kAhead) {
      Part parts[kAhead];
      Scale scales[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const Unsigned from = __shfl_sync(kAll, reinterpret_cast<Unsigned>(row), k + u, lanes);
        parts[u] = POOL_LOAD(reinterpret_cast<const Part*>(from + place));
        if constexpr (scaled) scales[u].factor = __shfl_sync(kAll, scale.factor, k + u, lanes);
        if constexpr (shifted) scales[u].bias = __shfl_sync(kAll, scale.bias, k + u, lanes);
      }
      // Add the rows up to where the bag ends, finish it, add those of the next ...
      const int count = min(here - k, kAhead);
#pragma unroll 1
      for (int done = 0; done < count;) {
        const int stop = min(end - int(at) - k, count);
        const unsigned chosen = held >> k & ((1u << stop) - (1u << done));
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (chosen >> u & 1) add<format, weighted, elements>(sum, parts[u], scales[u], column);
        }
        done = stop;
        if (done < count) finish();
      }
    }
    slot = slot_of(table(), index);
  }
  while (left > 0) finish();
}

}  // namespace

#ifndef POOL_BLOCKS  // per multiprocessor: the most for which no register is spilled
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define POOL_BLOCKS (POOL_FORMAT == kFp32 ? 5 : 4)
#else
#define POOL_BLOCKS 6
#endif
#endif
constexpr int kBlocks = POOL_BLOCKS;

extern "C" __global__ void __launch_bounds__(128, kBlocks) pool(const Bags bags, const Tables tables,
                                                                const Destinations destinations) {
  pool_bags<POOL_FORMAT, POOL_WEIGHTED, POOL_ELEMENTS>(bags, tables, destinations);
}
