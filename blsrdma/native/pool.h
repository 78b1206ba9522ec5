// Pooling of bags: sums of rows in index order, one bag after another.
//
// One kernel for owners and requesters, so that bits do not depend on who pools. They are those of torch's CPU operators
// (tests/lookup/test_pooling.py compares): a sum starts from +0 and takes one row at a time,
//   fp32, fp16   sum + row, or fma(weight, row, sum) with weights; of an fp16 table the weights are rounded
//                to fp16, and so is the sum at its end
//   int8, int4   fma(weight * scale, element, sum + weight * bias), weight 1 where there is none
// and a mean is the sum divided by the number of rows (an empty bag: 0). No vector width changes any of this: elements of
// a row never meet each other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace blsrdma {

// Elements of a row of D values:
enum class RowFormat : std::uint32_t {
  fp32 = 0,  // 4 D bytes
  fp16 = 1,  // 2 D bytes
  int8 = 2,  // D bytes, then fp32 scale and bias
  int4 = 3,  // ceil(D / 2) bytes, the low nibble first, then fp16 scale and bias
};

inline std::uint64_t row_bytes(RowFormat format, std::uint32_t dim) {
  switch (format) {
    case RowFormat::fp32: return std::uint64_t{4} * dim;
    case RowFormat::fp16: return std::uint64_t{2} * dim;
    case RowFormat::int8: return std::uint64_t{dim} + 8;
    case RowFormat::int4: return (std::uint64_t{dim} + 1) / 2 + 4;
  }
  return 0;
}

struct Pool {
  RowFormat format = RowFormat::fp32;
  std::uint32_t dim = 0;
  bool mean = false;
  const std::byte* const* rows = nullptr;  // where each row of the bags is, all bags one after another
  const float* weights = nullptr;          // as many, or none
  const std::uint32_t* lengths = nullptr;  // rows of each bag
  std::uint64_t bags = 0;
  float* out = nullptr;      // bag b goes to out + b * stride
  std::uint64_t stride = 0;  // in floats
  // A bag may come in parts, if its indices do not fit in one request: the sum then goes on where it stopped, and has the
  // same bits. `sum` [dim] and `summed` (its rows) are what was left of the first bag, or nullptr.
  const float* sum = nullptr;
  std::uint64_t summed = 0;
  float* unfinished = nullptr;  // the last bag has more to come: its sum goes here, and not to out
};

void pool(const Pool& bags);

// Which instructions pool() uses: "avx2" or "baseline".
const char* pool_instructions();
// The same with others, for tests; this processor must have them.
void pool_with(const char* instructions, const Pool& bags);

}  // namespace blsrdma
