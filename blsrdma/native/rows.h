// Rows of remote tables that this rank has: some for ever (hot ones), and a bounded cache of others. Exact, for a version of
// the tables does not change, and with another version all of them are got anew.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace blsrdma {

// Row numbers to small numbers: a hash table with linear probing that is emptied at once.
class RowIndex {
 public:
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};

  // Empty it, with room for `count` rows.
  void clear(std::uint64_t count) {
    std::uint64_t size = 16;
    while (size < 2 * count) size *= 2;
    if (size > entries_.size()) {
      entries_.assign(size, Entry{});
      round_ = 0;
    }
    mask_ = entries_.size() - 1;
    if (++round_ == 0) {
      for (Entry& each : entries_) each.round = 0;
      round_ = 1;
    }
  }
  void prefetch(std::uint64_t row) const {
    if (!entries_.empty()) __builtin_prefetch(&entries_[hash(row)]);
  }
  std::uint32_t find(std::uint64_t row) const {
    if (entries_.empty()) return kNone;
    for (std::uint64_t at = hash(row);; at = (at + 1) & mask_) {
      const Entry& each = entries_[at];
      if (each.round != round_) return kNone;
      if (each.row == row) return each.value;
    }
  }
  // The value of `row`; `value`, from now on, if it has none.
  std::uint32_t find_or_add(std::uint64_t row, std::uint32_t value) {
    for (std::uint64_t at = hash(row);; at = (at + 1) & mask_) {
      Entry& each = entries_[at];
      if (each.round != round_) {
        each = {row, value, round_};
        return value;
      }
      if (each.row == row) return each.value;
    }
  }
  void remove(std::uint64_t row) {
    std::uint64_t at = hash(row);
    for (; entries_[at].row != row || entries_[at].round != round_; at = (at + 1) & mask_) {
      if (entries_[at].round != round_) return;
    }
    // Close the gap: an entry may move to it if its own place is not behind it.
    for (std::uint64_t next = (at + 1) & mask_; entries_[next].round == round_; next = (next + 1) & mask_) {
      if (((next - hash(entries_[next].row)) & mask_) >= ((next - at) & mask_)) {
        entries_[at] = entries_[next];
        at = next;
      }
    }
    entries_[at].round = round_ - 1;
  }

 private:
  struct Entry {
    std::uint64_t row = 0;
    std::uint32_t value = 0;
    std::uint32_t round = 0;
  };
  std::uint64_t hash(std::uint64_t row) const {
    const std::uint64_t mixed = row * 0x9e3779b97f4a7c15u;
    return (mixed ^ mixed >> 32) & mask_;
  }

  std::vector<Entry> entries_;
  std::uint64_t mask_ = 0;
  std::uint32_t round_ = 0;
};

// The rows of one table that are kept here.
class KeptRows {
 public:
  // The cache holds `capacity` rows at most; what has not been asked for lately makes room (second chance).
  void open(std::uint64_t row_bytes, std::uint64_t capacity) {
    row_bytes_ = row_bytes;
    empty_cache(capacity);
    bytes_.reset(capacity ? new std::byte[capacity * row_bytes] : nullptr);
  }
  // The tables have another version: nothing is here any more, and the next insert() of a row that was kept for ever brings
  // it back. What pinned() has said before stays where it is until let_go().
  void renew() {
    old_blocks_ = std::move(blocks_);
    blocks_.clear();
    blocks_.resize(old_blocks_.size());
    here_.assign(pins_, false);
    absent_ = pins_;
    empty_cache(slots_.size());
  }
  void let_go() { old_blocks_.clear(); }
  // Keep these for ever, beside those kept already.
  void pin(std::uint64_t row, const std::byte* data) {
    const std::uint32_t known = pins_ ? pinned_.find(row) : RowIndex::kNone;
    if (known != RowIndex::kNone) return fill(known, data);
    if (pins_ % kBlock == 0) blocks_.emplace_back();
    if (pins_ == room_) {  // index them anew, in a table twice as large
      room_ = room_ ? 2 * room_ : 1024;
      pinned_.clear(room_);
      for (std::uint32_t k = 0; k < pins_; ++k) pinned_.find_or_add(pin_rows_[k], k);
    }
    pinned_.find_or_add(row, static_cast<std::uint32_t>(pins_));
    pin_rows_.push_back(row);
    here_.push_back(false);
    ++absent_;
    fill(static_cast<std::uint32_t>(pins_++), data);
  }
  // It will be looked for soon.
  void prefetch(std::uint64_t row) const {
    pinned_.prefetch(row);
    cached_.prefetch(row);
  }
  // Where a row is that is kept for ever, and stays; else nullptr.
  const std::byte* pinned(std::uint64_t row) const {
    if (!pins_) return nullptr;
    const std::uint32_t k = pinned_.find(row);
    return k == RowIndex::kNone || !here_[k] ? nullptr : blocks_[k / kBlock].get() + k % kBlock * row_bytes_;
  }
  // Where a cached row is, until the next insert(); else nullptr.
  const std::byte* cached(std::uint64_t row) {
    if (slots_.empty()) return nullptr;
    const std::uint32_t k = cached_.find(row);
    if (k == RowIndex::kNone) return nullptr;
    slots_[k].used = true;
    return bytes_.get() + k * row_bytes_;
  }
  void insert(std::uint64_t row, const std::byte* data) {
    if (absent_) {
      const std::uint32_t k = pinned_.find(row);
      if (k != RowIndex::kNone) return fill(k, data);
    }
    if (slots_.empty() || cached_.find(row) != RowIndex::kNone) return;
    while (slots_[hand_].full && slots_[hand_].used) {
      slots_[hand_].used = false;
      hand_ = (hand_ + 1) % slots_.size();
    }
    Slot& slot = slots_[hand_];
    if (slot.full) cached_.remove(slot.row);
    slot = {row, true, false};
    cached_.find_or_add(row, static_cast<std::uint32_t>(hand_));
    std::memcpy(bytes_.get() + hand_ * row_bytes_, data, row_bytes_);
    hand_ = (hand_ + 1) % slots_.size();
  }

 private:
  void fill(std::uint32_t k, const std::byte* data) {
    if (here_[k]) return;
    auto& block = blocks_[k / kBlock];
    if (!block) block.reset(new std::byte[kBlock * row_bytes_]);
    std::memcpy(block.get() + k % kBlock * row_bytes_, data, row_bytes_);
    here_[k] = true;
    --absent_;
  }
  void empty_cache(std::uint64_t capacity) {
    cached_.clear(capacity);
    slots_.assign(capacity, Slot{});
    hand_ = 0;
  }

  static constexpr std::uint64_t kBlock = 1024;
  struct Slot {
    std::uint64_t row = 0;
    bool full = false;
    bool used = false;
  };

  std::uint64_t row_bytes_ = 0;
  RowIndex pinned_, cached_;
  std::vector<std::unique_ptr<std::byte[]>> blocks_, old_blocks_;  // of pinned rows: they never move
  std::vector<std::uint64_t> pin_rows_;
  std::vector<bool> here_;  // whether a pinned row is of this version
  std::uint64_t pins_ = 0, room_ = 0, absent_ = 0;
  std::vector<Slot> slots_;
  std::unique_ptr<std::byte[]> bytes_;
  std::uint64_t hand_ = 0;
};

}  // namespace blsrdma
