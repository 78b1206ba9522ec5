// The tables in up to two versions: the one that asks are answered from, and the one before it or after it.
//
// A new version is swapped in without stopping anybody, and every ask is answered wholly from one version:
//   load     an owner puts version v beside the one it has, and announces it (a counter of its responses' channel)
//   adopt    a rank asks for v from the ask on before which all owners have announced v; its requests name their version
//   move on  when all its asks of the version before are complete, it tells the owners (a counter of its requests' channel)
//   retire   when every rank that lives and still asks has moved on, the version before is let go, and its place is free
// So an owner has at most two, and is never asked for one that it does not have; it checks all the same. In get mode a
// version's place is read by others: its word (VersionWord) says what lies there, before and after.
// tests/model/versions.py explores these rules, and what happens without one of them.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "query.h"
#include "wait.h"

namespace blsrdma {

// In the first lines of an arena of tables, after its token: which version lies in each of its two places.
class VersionWord {
 public:
  static constexpr std::uint64_t kOffset = kLine;
  static constexpr std::uint64_t kNone = kNever;

  VersionWord(std::byte* arena, std::uint32_t place)
      : word_(reinterpret_cast<std::uint64_t*>(arena + kOffset) + place) {}
  // Before its rows are written, and after.
  void clear() const {
    std::atomic_ref<std::uint64_t>(*word_).store(kNone, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }
  void set(std::uint64_t version) const {
    std::atomic_ref<std::uint64_t>(*word_).store(version, std::memory_order_release);
  }
  // After rows have been read: whether they were of `version` all the time.
  bool still(std::uint64_t version) const {
    std::atomic_thread_fence(std::memory_order_acquire);
    return std::atomic_ref<std::uint64_t>(*word_).load(std::memory_order_relaxed) == version;
  }

 private:
  std::uint64_t* word_;
};

// The same list of tables in two places. The rank's own thread fills and clears them; its server only looks.
class TableSets {
 public:
  static constexpr std::uint32_t kPlaces = 2;
  static constexpr std::uint64_t kNone = VersionWord::kNone;

  // `tables` are those of `version`, in place 0. In an arena the second place of a rank's tables follows its first.
  TableSets(std::vector<Table> tables, std::uint64_t version) : sets_{tables, std::move(tables)} {
    std::map<std::uint32_t, std::pair<std::uint64_t, std::uint64_t>> spans;
    for (const Table& each : sets_[0]) {
      const std::uint64_t end = (each.offset + each.rows * each.row_bytes + kLine - 1) / kLine * kLine;
      auto [span, first] = spans.try_emplace(each.owner, each.offset, end);
      if (!first) span->second = {std::min(span->second.first, each.offset), std::max(span->second.second, end)};
    }
    for (Table& each : sets_[1]) {
      each.offset += spans[each.owner].second - spans[each.owner].first;
      each.data = nullptr;
    }
    held_[0].store(version);
    held_[1].store(kNone);
  }

  std::vector<Table>& at(std::uint32_t place) { return sets_[place]; }
  const std::vector<Table>& at(std::uint32_t place) const { return sets_[place]; }
  std::uint64_t version(std::uint32_t place) const { return held_[place].load(); }
  void set(std::uint32_t place, std::uint64_t version) { held_[place].store(version); }
  // Nobody looks rows up in there when this returns true: the server is waited for, no longer than it takes to answer once,
  // which is long where a GPU hangs.
  bool clear(std::uint32_t place, std::uint64_t deadline_ns = kNever) {
    held_[place].store(kNone);
    while (in_use_.load() == place) {
      if (deadline_ns != kNever && now_ns() >= deadline_ns) return false;
      std::this_thread::yield();
    }
    return true;
  }

  // By whoever serves: the tables of `version`, which stay until let_go(); nullptr where it is not here.
  const std::vector<Table>* hold(std::uint64_t version) {
    for (std::uint32_t place = 0; place < kPlaces; ++place) {
      in_use_.store(place);  // before the look: either clear() sees this, or the look finds that it is cleared
      if (version != kNone && held_[place].load() == version) return &sets_[place];
    }
    let_go();
    return nullptr;
  }
  void let_go() { in_use_.store(kPlaces, std::memory_order_release); }

 private:
  std::array<std::vector<Table>, kPlaces> sets_;
  std::array<std::atomic<std::uint64_t>, kPlaces> held_;
  std::atomic<std::uint32_t> in_use_{kPlaces};
};

}  // namespace blsrdma
