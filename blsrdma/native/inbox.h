// The receiving side: what peers have written into this rank's arena. All of it is untrusted until it has been checked.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "arena.h"
#include "layout.h"

namespace blsrdma {

class Inbox {
 public:
  Inbox(const Arena& arena, const Geometry& geometry, std::uint32_t rank, std::uint64_t epoch,
        std::uint64_t device_bytes = 0)
      : base_(arena.data()), geometry_(geometry), rank_(rank), epoch_(epoch), device_bytes_(device_bytes),
        seen_(geometry.ranks, 0), ways_(geometry.ranks, Way::unknown) {}

  // Whether every peer's message of `iteration` is here. Polls only the counters that are behind.
  bool arrived(std::uint64_t iteration);
  // Messages of `source` that are here, by the newest look at its counter.
  std::uint64_t seen(std::uint32_t source) const { return seen_[source]; }
  std::uint64_t look(std::uint32_t source) {
    std::uint64_t& seen = seen_[source];
    if (ways_[source] != Way::puts) {
      const std::uint64_t stored = poll(counter(source, kCounterOffset), epoch_, seen);
      if (stored > seen) ways_[source] = Way::stores;
      if (ways_[source] == Way::stores) return seen = stored;
    }
    while (poll(arrival(source, seen), epoch_, seen) == seen + 1) {
      ways_[source] = Way::puts;
      ++seen;
    }
    return seen;
  }
  // Large messages of this rank's iterations below this that `source` has pulled, or did not want.
  std::uint64_t pulled(std::uint32_t source) const { return poll(counter(source, kPulledOffset), epoch_, 0); }
  // Whether `source` has said that it reads large messages out of this rank's memory by itself.
  bool reads(std::uint32_t source) const { return poll(counter(source, kReadsOffset), epoch_, 0) != 0; }
  // Changes whenever `source` shows a sign of life. For the progress thread: touches nothing that look() writes.
  std::uint64_t signs_of_life(std::uint32_t source) const {
    return poll(counter(source, kHeartbeatOffset), epoch_, 0) + poll(counter(source, kCounterOffset), epoch_, 0);
  }
  std::optional<Farewell> farewell(std::uint32_t source) const;

  // What is wrong with the counter of `source`, if anything is: no counter that it can have written while this rank has
  // posted `posted` iterations. A pair that is being written looks wrong for a moment: ask twice.
  std::string suspicion(std::uint32_t source, std::uint64_t posted, std::uint32_t lag) const;

  // The header of a message that has arrived, checked; else what is wrong with it.
  std::string read(std::uint64_t iteration, std::uint32_t source, Header& header) const;
  std::string read(std::uint64_t iteration, std::uint32_t source, Descriptor& descriptor) const;
  const std::byte* payload(std::uint64_t iteration, std::uint32_t source) const {
    return base_ + geometry_.window(rank_, source, iteration) + kHeaderBytes;
  }

 private:
  // How a source counts: only its first message shows it. See Counter.
  enum class Way : std::uint8_t { unknown, stores, puts };

  Counter* arrival(std::uint32_t source, std::uint64_t iteration) const {
    return reinterpret_cast<Counter*>(base_ + geometry_.window(rank_, source, iteration) + kArrivedOffset);
  }
  Counter* counter(std::uint32_t source, std::uint64_t offset) const {
    return reinterpret_cast<Counter*>(base_ + geometry_.control(source) + offset);
  }

  std::byte* base_;
  Geometry geometry_;
  std::uint32_t rank_;
  std::uint64_t epoch_;
  std::uint64_t device_bytes_;
  std::vector<std::uint64_t> seen_;
  std::vector<Way> ways_;
  std::uint64_t complete_ = 0;  // iterations 0 .. complete_ - 1 are known to be complete
};

}  // namespace blsrdma
