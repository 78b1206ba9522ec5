#include "query.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace blsrdma {
namespace {

constexpr std::uint64_t kChunk = 2048;  // rows that pool_here collects at a time: their addresses stay in the first cache

bool wide(const Table& table) { return table.rows > std::numeric_limits<std::uint32_t>::max(); }

std::uint64_t part_bytes(std::uint64_t bags, std::uint64_t indices, bool is_wide, bool weighted) {
  return sizeof(PartHead) + padded(4 * bags) + padded((is_wide ? 8 : 4) * indices) + (weighted ? padded(4 * indices) : 0);
}

// The most rows of one more bag, after `bags` bags with `indices` rows, that fit into `room`.
std::uint64_t fitting(std::uint64_t bags, std::uint64_t indices, bool is_wide, bool weighted, std::uint64_t room) {
  const std::uint64_t head = sizeof(PartHead) + padded(4 * (bags + 1)) + 16;  // 16: the paddings
  const std::uint64_t each = (is_wide ? 8 : 4) + (weighted ? 4 : 0);
  if (head + each * indices >= room) return 0;
  return (room - head - each * indices) / each;
}

// The addresses of rows by their numbers, each of which is read once. Returns how many are rows of the table.
template <typename Number>
std::uint64_t locate(const std::byte* numbers, std::uint64_t count, const Table& table, const std::byte** rows) {
  for (std::uint64_t i = 0; i < count; ++i) {
    Number row;
    std::memcpy(&row, numbers + sizeof row * i, sizeof row);
    if (row >= table.rows) return i;
    rows[i] = table.data + row * table.row_bytes;
  }
  return count;
}

// As pool_here, by a GPU: as many bags at a time as fit, and what does not fit in parts.
void pool_there(const Part& part, const Table& table, Scratch& scratch) {
  GpuPooler& gpu = *scratch.gpu;
  Pool job;
  job.format = table.format;
  job.dim = table.dim;
  job.mean = part.mean;
  job.stride = part.stride;
  std::vector<float> sum, rest(table.dim);
  std::uint64_t bag = 0, done = 0;  // of the bag, so many rows are in `sum`
  while (bag < part.bags) {
    scratch.rows.clear();
    scratch.lengths.clear();
    const std::uint64_t first = bag;
    const auto add = [&](std::uint64_t from, std::uint64_t rows) {
      scratch.lengths.push_back(static_cast<std::uint32_t>(rows));
      const std::int64_t* at = part.indices + part.offsets[bag] + from;
      for (std::uint64_t i = 0; i < rows; ++i) {
        scratch.rows.push_back(table.data + static_cast<std::uint64_t>(at[i]) * table.row_bytes);
      }
    };
    for (; bag < part.bags; ++bag) {
      const std::uint64_t begin = bag == first ? done : 0, rows = part.length(bag) - begin;
      if (!gpu.fits(scratch.lengths.size() + 1, scratch.rows.size() + rows, table.dim)) break;
      add(begin, rows);
    }
    const bool cut = bag == first;
    if (cut) {
      std::uint64_t rows = part.length(bag) - done;
      while (!gpu.fits(1, rows, table.dim)) rows = (rows + 1) / 2;
      add(done, rows);
    }
    job.rows = scratch.rows.data();
    job.weights = part.weights ? part.weights + part.offsets[first] + done : nullptr;
    job.lengths = scratch.lengths.data();
    job.bags = scratch.lengths.size();
    job.out = part.out + first * part.stride;
    job.sum = done ? sum.data() : nullptr;
    job.summed = done;
    job.unfinished = cut ? rest.data() : nullptr;
    gpu.pool(job);
    done = cut ? done + scratch.rows.size() : 0;
    if (!cut) continue;
    if (!gpu.run()) return;
    sum.swap(rest);
    rest.resize(table.dim);
  }
}

}  // namespace

Fault check(const Part& part, const Table& table) {
  const std::int64_t* offsets = part.offsets;
  if (offsets[0] < 0) return {Fault::offsets, part.table, 0, offsets[0], part.count};
  for (std::uint64_t b = 0; b < part.bags; ++b) {
    if (offsets[b + 1] < offsets[b]) return {Fault::offsets, part.table, b + 1, offsets[b + 1], part.count};
    if (part.length(b) > std::numeric_limits<std::uint32_t>::max()) {
      return {Fault::offsets, part.table, b + 1, offsets[b + 1], std::numeric_limits<std::uint32_t>::max()};
    }
  }
  const std::int64_t last = offsets[part.bags];
  if (static_cast<std::uint64_t>(last) > part.count) return {Fault::offsets, part.table, part.bags, last, part.count};
  std::uint64_t largest = 0;
  for (std::int64_t i = offsets[0]; i < last; ++i) {
    largest = std::max(largest, static_cast<std::uint64_t>(part.indices[i]));  // negative ones are large
  }
  if (offsets[0] == last || largest < table.rows) return {};
  std::int64_t at = offsets[0];
  while (static_cast<std::uint64_t>(part.indices[at]) < table.rows) ++at;
  return {Fault::index, part.table, static_cast<std::uint64_t>(at), part.indices[at], table.rows};
}

void pool_here(const Part& part, const Table& table, Scratch& scratch) {
  if (table.on_gpu) return pool_there(part, table, scratch);
  Pool job;
  job.format = table.format;
  job.dim = table.dim;
  job.mean = part.mean;
  job.stride = part.stride;
  std::uint64_t bag = 0;
  while (bag < part.bags) {
    scratch.rows.clear();
    scratch.lengths.clear();
    const std::uint64_t first = bag;
    const auto begin = static_cast<std::uint64_t>(part.offsets[first]);
    for (; bag < part.bags && (bag == first || scratch.rows.size() + part.length(bag) <= kChunk); ++bag) {
      const std::int64_t* at = part.indices + part.offsets[bag];
      const std::uint64_t length = part.length(bag);
      scratch.lengths.push_back(static_cast<std::uint32_t>(length));
      for (std::uint64_t i = 0; i < length; ++i) {
        scratch.rows.push_back(table.data + static_cast<std::uint64_t>(at[i]) * table.row_bytes);
      }
      if (scratch.lengths.size() == kChunk) {
        ++bag;
        break;
      }
    }
    job.rows = scratch.rows.data();
    job.weights = part.weights ? part.weights + begin : nullptr;
    job.lengths = scratch.lengths.data();
    job.bags = bag - first;
    job.out = part.out + first * part.stride;
    pool(job);
  }
}

std::uint64_t write_query(const std::vector<const Part*>& parts, const std::vector<Table>& tables, Cursor& cursor,
                          std::byte* to, std::uint64_t room, std::uint64_t reply_room, std::vector<Landing>& landings) {
  QueryHead head{0, 0};
  std::uint64_t at = sizeof head, reply = 0;
  landings.clear();
  while (cursor.part < parts.size()) {
    const Part& part = *parts[cursor.part];
    if (cursor.bag == part.bags) {
      cursor = {cursor.part + 1, 0, 0};
      continue;
    }
    const Table& table = tables[part.table];
    const bool is_wide = wide(table), weighted = part.weights != nullptr;
    const std::uint64_t row = std::uint64_t{4} * table.dim;
    std::uint64_t bags = 0, indices = 0, bag = cursor.bag, rest = 0;
    const auto missing = [&](std::uint64_t b) { return part.length(b) - (b == cursor.bag ? cursor.index : 0); };
    for (; bag < part.bags; ++bag, ++bags) {
      const std::uint64_t more = missing(bag);
      if (at + part_bytes(bags + 1, indices + more, is_wide, weighted) > room || reply + (bags + 1) * row > reply_room) break;
      indices += more;
    }
    // Only a bag that would not fit into an empty request is cut.
    if (bag < part.bags && sizeof head + part_bytes(1, missing(bag), is_wide, weighted) > room && at < room) {
      rest = std::min(missing(bag) - 1, fitting(bags, indices, is_wide, weighted, room - at));
    }
    if (bags + (rest > 0) == 0) break;

    PartHead about{part.table, 0, bags + (rest > 0), indices + rest};
    about.flags = (weighted ? PartHead::kWeighted : 0) | (is_wide ? PartHead::kWide : 0) | (part.mean ? PartHead::kMean : 0) |
                  (cursor.index ? PartHead::kContinued : 0) | (rest ? PartHead::kUnfinished : 0);
    std::memcpy(to + at, &about, sizeof about);
    auto* lengths = reinterpret_cast<std::uint32_t*>(to + at + sizeof about);
    for (std::uint64_t b = 0; b < bags; ++b) lengths[b] = static_cast<std::uint32_t>(missing(cursor.bag + b));
    if (rest) lengths[bags] = static_cast<std::uint32_t>(rest);
    std::byte* numbers = to + at + sizeof about + padded(4 * about.bags);
    const std::uint64_t start = static_cast<std::uint64_t>(part.offsets[cursor.bag]) + cursor.index;
    if (is_wide) {
      std::memcpy(numbers, part.indices + start, 8 * about.indices);
    } else {
      auto* narrow = reinterpret_cast<std::uint32_t*>(numbers);
      for (std::uint64_t i = 0; i < about.indices; ++i) narrow[i] = static_cast<std::uint32_t>(part.indices[start + i]);
    }
    if (weighted) std::memcpy(numbers + padded((is_wide ? 8 : 4) * about.indices), part.weights + start, 4 * about.indices);
    at += part_bytes(about.bags, about.indices, is_wide, weighted);
    reply += bags * row;
    ++head.parts;
    if (bags) landings.push_back({part.out + cursor.bag * part.stride, part.stride, bags, table.dim});
    cursor.index = bag == cursor.bag ? cursor.index + rest : rest;
    cursor.bag = bag;
    if (bag < part.bags) break;
  }
  std::memcpy(to, &head, sizeof head);
  while (cursor.part < parts.size() && cursor.bag == parts[cursor.part]->bags) cursor = {cursor.part + 1, 0, 0};
  return at;
}

std::uint64_t write_fetch(const std::vector<Fetch>& fetches, const std::vector<Table>& tables, Cursor& cursor, std::byte* to,
                          std::uint64_t room, std::uint64_t reply_room, std::vector<FetchLanding>& landings) {
  QueryHead head{0, 0};
  std::uint64_t at = sizeof head, reply = 0;
  landings.clear();
  while (cursor.part < fetches.size()) {
    const Fetch& fetch = fetches[cursor.part];
    const Table& table = tables[fetch.table];
    const std::uint64_t number = wide(table) ? 8 : 4;
    if (at + sizeof(PartHead) + 8 > room || reply + padded(table.row_bytes) > reply_room) break;
    const std::uint64_t count = std::min({fetch.count - cursor.bag, (room - at - sizeof(PartHead)) / 8 * 8 / number,
                                          (reply_room - reply) / 8 * 8 / table.row_bytes});
    const PartHead about{fetch.table, PartHead::kStored | (number == 8 ? PartHead::kWide : 0), 0, count};
    std::memcpy(to + at, &about, sizeof about);
    std::byte* numbers = to + at + sizeof about;
    const std::uint64_t* rows = fetch.rows + cursor.bag;
    if (number == 8) {
      std::memcpy(numbers, rows, 8 * count);
    } else {
      auto* narrow = reinterpret_cast<std::uint32_t*>(numbers);
      for (std::uint64_t i = 0; i < count; ++i) narrow[i] = static_cast<std::uint32_t>(rows[i]);
    }
    at += sizeof about + padded(number * count);
    landings.push_back({fetch.to + cursor.bag * table.row_bytes, count * table.row_bytes});
    reply += padded(count * table.row_bytes);
    ++head.parts;
    cursor.bag += count;
    if (cursor.bag < fetch.count) break;
    cursor = {cursor.part + 1, 0, 0};
  }
  std::memcpy(to, &head, sizeof head);
  return at;
}

Answer answer_query(const std::byte* request, std::uint64_t length, const std::vector<Table>& tables, std::uint32_t self,
                    Carry& carry, std::byte* reply, std::uint64_t room, Scratch& scratch) {
  Answer answer;
  const auto refuse = [&](Fault::Kind kind, std::uint32_t table, std::uint64_t position, std::int64_t value,
                          std::uint64_t limit) {
    carry.active = false;
    if (scratch.gpu) scratch.gpu->drop();
    answer.fault = {kind, table, position, value, limit};
    return answer;
  };
  const auto refuse_for_gpu = [&] {
    const GpuPooler& gpu = *scratch.gpu;
    return refuse(Fault::device, 0, 0, gpu.result(), gpu.waited_ms());
  };
  QueryHead head;
  if (length < sizeof head) return refuse(Fault::malformed, 0, 0, 0, 0);
  std::memcpy(&head, request, sizeof head);
  std::uint64_t at = sizeof head;
  for (std::uint32_t p = 0; p < head.parts; ++p) {
    PartHead about;
    if (length - at < sizeof about) return refuse(Fault::malformed, 0, at, 0, length);
    std::memcpy(&about, request + at, sizeof about);
    if (about.table >= tables.size() || tables[about.table].owner != self) {
      return refuse(Fault::table, about.table, at, about.table, tables.size());
    }
    const Table& table = tables[about.table];
    const bool is_wide = about.flags & PartHead::kWide, weighted = about.flags & PartHead::kWeighted;
    const bool continued = about.flags & PartHead::kContinued, unfinished = about.flags & PartHead::kUnfinished;
    // Bounds first, so that no product below can overflow.
    const bool stored = about.flags & PartHead::kStored;
    if (about.flags > PartHead::kKnown || (about.bags == 0) != stored || (stored && (weighted || continued || unfinished)) || about.bags > length || about.indices > length ||
        part_bytes(about.bags, about.indices, is_wide, weighted) > length - at ||
        continued != carry.active || (continued && carry.table != about.table)) {
      return refuse(Fault::malformed, about.table, at, about.flags, length);
    }
    if (stored) {
      if (padded(about.indices * table.row_bytes) > room - answer.bytes || about.indices > room) {
        return refuse(Fault::malformed, about.table, at, 0, room);
      }
      scratch.rows.resize(about.indices);
      const std::byte* numbers = request + at + sizeof about;
      const std::uint64_t good = is_wide ? locate<std::uint64_t>(numbers, about.indices, table, scratch.rows.data())
                                         : locate<std::uint32_t>(numbers, about.indices, table, scratch.rows.data());
      if (good < about.indices) {
        std::uint64_t row = 0;
        std::memcpy(&row, numbers + (is_wide ? 8 : 4) * good, is_wide ? 8 : 4);
        return refuse(Fault::index, about.table, good, static_cast<std::int64_t>(row), table.rows);
      }
      std::byte* to = reply + answer.bytes;
      if (table.on_gpu) scratch.gpu->copy(scratch.rows.data(), about.indices, table.row_bytes, to);
      for (std::uint64_t i = 0; !table.on_gpu && i < about.indices; ++i) {
        if (i + 8 < about.indices) __builtin_prefetch(scratch.rows[i + 8]);
        std::memcpy(to + i * table.row_bytes, scratch.rows[i], table.row_bytes);
      }
      answer.bytes += padded(about.indices * table.row_bytes);
      answer.rows += about.indices;
      at += part_bytes(0, about.indices, is_wide, false);
      continue;
    }
    const std::uint64_t finished = about.bags - unfinished;
    if (finished * table.dim > (room - answer.bytes) / 4) return refuse(Fault::malformed, about.table, at, 0, room);
    scratch.lengths.resize(about.bags);
    std::memcpy(scratch.lengths.data(), request + at + sizeof about, 4 * about.bags);
    std::uint64_t sum = 0;
    for (const std::uint32_t each : scratch.lengths) sum += each;
    if (sum != about.indices) {
      return refuse(Fault::malformed, about.table, at, static_cast<std::int64_t>(sum), about.indices);
    }
    scratch.rows.resize(about.indices);
    const std::byte* numbers = request + at + sizeof about + padded(4 * about.bags);
    const std::uint64_t bad = is_wide ? locate<std::uint64_t>(numbers, about.indices, table, scratch.rows.data())
                                      : locate<std::uint32_t>(numbers, about.indices, table, scratch.rows.data());
    if (bad < about.indices) {
      std::uint64_t row = 0;
      std::memcpy(&row, numbers + (is_wide ? 8 : 4) * bad, is_wide ? 8 : 4);
      return refuse(Fault::index, about.table, bad, static_cast<std::int64_t>(row), table.rows);
    }
    Pool job;
    job.format = table.format;
    job.dim = table.dim;
    job.mean = about.flags & PartHead::kMean;
    job.rows = scratch.rows.data();
    job.weights = weighted ? reinterpret_cast<const float*>(numbers + padded((is_wide ? 8 : 4) * about.indices)) : nullptr;
    job.lengths = scratch.lengths.data();
    job.bags = about.bags;
    job.out = reinterpret_cast<float*>(reply + answer.bytes);
    job.stride = table.dim;
    if (continued) {
      // (A request may, though none of ours does, go on with what it has not finished itself.)
      if (scratch.gpu && scratch.gpu->pending() && !scratch.gpu->run()) return refuse_for_gpu();
      job.sum = carry.sum.data();
      job.summed = carry.summed;
    }
    const std::uint64_t summed = continued && about.bags == 1 ? carry.summed : 0;
    std::vector<float> rest;
    if (unfinished) {
      rest.resize(table.dim);
      job.unfinished = rest.data();
    }
    if (table.on_gpu) {
      scratch.gpu->pool(job);
    } else {
      pool(job);
    }
    carry.active = unfinished;
    if (unfinished) {
      carry.table = about.table;
      carry.summed = summed + scratch.lengths.back();
      carry.sum.swap(rest);
    }
    answer.bytes += 4 * finished * table.dim;
    answer.bags += finished;
    answer.rows += about.indices;
    at += part_bytes(about.bags, about.indices, is_wide, weighted);
  }
  if (scratch.gpu && scratch.gpu->pending() && !scratch.gpu->run()) return refuse_for_gpu();
  return answer;
}

}  // namespace blsrdma
