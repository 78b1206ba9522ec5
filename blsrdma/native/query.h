// What a rank asks an owner for, as bytes in a request window, and the rows that come back.
//
//   request    Head, then per table: PartHead, lengths of the bags (u32), row numbers (u32, or u64 for tables that need it),
//              weights (f32, where there are any); each of these padded to 8 bytes
//   response   the pooled rows (f32) of all bags in the order asked, without gaps; or, where rows were asked for, these as they
//              are stored, each table's padded to 8 bytes; or a Fault
//
// Requests larger than a window are cut between bags; a bag that is larger than a window by itself is cut, too, and its sum
// goes on where it stopped (see pool.h), so that its bits stay those of one sum in index order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "gpu_pooler.h"
#include "pool.h"

namespace blsrdma {

// A table, whole, at one rank. All ranks have the same list of them; on the wire a table is its place in that list.
struct Table {
  std::uint32_t owner = 0;
  std::uint32_t dim = 0;
  RowFormat format = RowFormat::fp32;
  std::uint64_t rows = 0;
  std::uint64_t row_bytes = 0;
  std::uint64_t offset = 0;         // of its rows in its owner's arena of tables, if that may be read by others
  const std::byte* data = nullptr;  // where this process can read its rows: its own, or mapped; else none
  bool on_gpu = false;              // its own, in GPU memory: only a GpuPooler can read them
};

// Bags of one table that a caller wants pooled. Its memory stays valid until the request is complete.
struct Part {
  std::uint32_t table = 0;
  bool mean = false;
  const std::int64_t* indices = nullptr;
  std::uint64_t count = 0;
  const std::int64_t* offsets = nullptr;  // bags + 1 of them; bag b is indices[offsets[b]] up to indices[offsets[b + 1]]
  std::uint64_t bags = 0;
  const float* weights = nullptr;  // one per index, or none
  float* out = nullptr;            // bag b goes to out + b * stride
  std::uint64_t stride = 0;        // in floats

  std::uint64_t first() const { return static_cast<std::uint64_t>(offsets[0]); }
  std::uint64_t length(std::uint64_t bag) const { return static_cast<std::uint64_t>(offsets[bag + 1] - offsets[bag]); }
};

// What is wrong with a bag: the caller's own, or one that a peer asked for.
struct Fault {
  enum Kind : std::uint32_t {
    none = 0,
    offsets,    // they do not rise, or leave the indices
    index,      // no row of the table
    table,      // the owner has no such table
    malformed,  // the request's bytes are no request
    version,    // the owner has no such version of its tables
    device,     // its GPU has failed: value is the driver's code; -1: it was not done in `limit` ms
  };
  Kind kind = none;
  std::uint32_t table_number = 0;
  std::uint64_t position = 0;  // in the indices or offsets of the request
  std::int64_t value = 0;
  std::uint64_t limit = 0;  // rows of the table, or indices
};

// Whether the bags can be looked up in the table.
Fault check(const Part& part, const Table& table);

// Pool bags whose rows can all be read here. `scratch` is kept between calls. Of tables on a GPU the sums are there once
// gpu->run() has been called.
struct Scratch {
  std::vector<const std::byte*> rows;
  std::vector<std::uint32_t> lengths;
  GpuPooler* gpu = nullptr;  // where there are such tables
};
void pool_here(const Part& part, const Table& table, Scratch& scratch);

struct QueryHead {
  std::uint32_t parts;
  std::uint32_t reserved;
};

struct PartHead {
  static constexpr std::uint32_t kWeighted = 1;
  static constexpr std::uint32_t kWide = 2;        // row numbers of 64 bits
  static constexpr std::uint32_t kMean = 4;
  static constexpr std::uint32_t kContinued = 8;   // the first bag goes on where the request before stopped
  static constexpr std::uint32_t kUnfinished = 16; // the last bag goes on in the next request
  static constexpr std::uint32_t kStored = 32;     // no bags: the rows themselves, as they are stored
  static constexpr std::uint32_t kKnown = 63;

  std::uint32_t table;
  std::uint32_t flags;
  std::uint64_t bags;
  std::uint64_t indices;
};

inline std::uint64_t padded(std::uint64_t bytes) { return (bytes + 7) & ~std::uint64_t{7}; }

// A response's tag.
inline constexpr std::uint64_t kRows = 0;
inline constexpr std::uint64_t kRefused = 1;

// --- asking

// How far the parts for one owner have been written into requests.
struct Cursor {
  std::size_t part = 0;
  std::uint64_t bag = 0;
  std::uint64_t index = 0;  // rows of that bag that have been asked for
};

// Where rows of a response go.
struct Landing {
  float* out;
  std::uint64_t stride;
  std::uint64_t bags;
  std::uint32_t dim;
};

// Write as much of the parts as fits into a request of `room` bytes whose response fits into `reply_room` bytes, and move
// the cursor. Returns the request's bytes; `landings` says where the response's rows go.
std::uint64_t write_query(const std::vector<const Part*>& parts, const std::vector<Table>& tables, Cursor& cursor,
                          std::byte* to, std::uint64_t room, std::uint64_t reply_room, std::vector<Landing>& landings);

// Rows of one table that are wanted as they are stored.
struct Fetch {
  std::uint32_t table;
  const std::uint64_t* rows;
  std::uint64_t count;
  std::byte* to;
};
struct FetchLanding {
  std::byte* to;
  std::uint64_t bytes;
};

// The same for rows; cursor.bag counts them.
std::uint64_t write_fetch(const std::vector<Fetch>& fetches, const std::vector<Table>& tables, Cursor& cursor, std::byte* to,
                          std::uint64_t room, std::uint64_t reply_room, std::vector<FetchLanding>& landings);

// --- answering

// A bag that a client has not finished asking for.
struct Carry {
  bool active = false;
  std::uint32_t table = 0;
  std::uint64_t summed = 0;
  std::vector<float> sum;
};

struct Answer {
  Fault fault;
  std::uint64_t bytes = 0;  // of pooled rows
  std::uint64_t bags = 0;
  std::uint64_t rows = 0;
};

// Look up what a request asks of rank `self`, into `reply` of `room` bytes. The request comes from a peer, and may change
// while it is read: nothing in it is used before a copy of it has been checked.
Answer answer_query(const std::byte* request, std::uint64_t length, const std::vector<Table>& tables, std::uint32_t self,
                    Carry& carry, std::byte* reply, std::uint64_t room, Scratch& scratch);

}  // namespace blsrdma
