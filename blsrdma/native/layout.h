// What lies where in one rank's arena, and the three records that peers write into it.
//
// The numbers come from blsrdma/windows.py (WindowGeometry), which documents the layout; this file only applies them.
// Every record carries a check word that mixes in the epoch of the exchange, so that a torn write, a foreign write and a
// write of an earlier incarnation are all told from the real thing.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

namespace blsrdma {

inline constexpr std::uint64_t kLine = 64;              // cache line, and alignment of every record and payload
inline constexpr std::uint64_t kControlBytes = 512;     // per source: counter, warm-up scratch, farewell
inline constexpr std::uint64_t kCounterOffset = 0;      // within a control block
inline constexpr std::uint64_t kWarmupOffset = 64;      // within a control block: target of the first put
inline constexpr std::uint64_t kFarewellOffset = 128;   // within a control block
inline constexpr std::uint64_t kHeaderBytes = 64;       // precedes each window's payload
inline constexpr std::uint64_t kStagingBytes = 1024;    // per destination: sources of counter and farewell puts

// Offsets in bytes from the start of the arena. The arena begins with one line that holds the owner's token.
struct Geometry {
  std::uint32_t ranks = 0;
  std::uint32_t windows = 0;  // per source: iteration i uses window i % windows
  std::uint64_t window_bytes = 0;
  std::uint64_t window_stride = 0;
  std::uint64_t control_offset = 0;
  std::uint64_t windows_offset = 0;
  std::uint64_t staging_offset = 0;
  std::uint64_t arena_bytes = 0;

  std::uint64_t control(std::uint32_t source) const { return control_offset + source * kControlBytes; }
  // Where the header of (source, iteration) lies at receiver; its payload follows kHeaderBytes later.
  std::uint64_t window(std::uint32_t receiver, std::uint32_t source, std::uint64_t iteration) const {
    // A rank has no window for itself unless it copies its own message; that one is the last.
    const std::uint64_t index = source == receiver ? ranks - 1 : source < receiver ? source : source - 1;
    return windows_offset + (index * windows + iteration % windows) * window_stride;
  }
  // Local sources of puts to one destination: counter, farewell, then one header per window.
  std::uint64_t staging(std::uint32_t destination) const {
    return staging_offset + destination * (kStagingBytes + windows * kHeaderBytes);
  }
  std::uint64_t staged_header(std::uint32_t destination, std::uint64_t iteration) const {
    return staging(destination) + kStagingBytes + (iteration % windows) * kHeaderBytes;
  }
};

// n says: every message up to iteration n - 1 is in its window. Single writer, monotone, never reset.
struct Counter {
  std::uint64_t value;
  std::uint64_t check;  // ~value ^ epoch

  static Counter of(std::uint64_t n, std::uint64_t epoch) { return {n, ~n ^ epoch}; }
};
static_assert(sizeof(Counter) == 16);

// Store a counter so that a reader on this host sees it only after everything stored before it.
inline void publish(Counter* at, Counter counter) {
  std::atomic_ref<std::uint64_t>(at->check).store(counter.check, std::memory_order_relaxed);
  std::atomic_ref<std::uint64_t>(at->value).store(counter.value, std::memory_order_release);
}

// The newest counter value there, or `seen` where the pair does not match (being written, never written, or foreign).
inline std::uint64_t poll(Counter* at, std::uint64_t epoch, std::uint64_t seen) {
  const std::uint64_t value = std::atomic_ref<std::uint64_t>(at->value).load(std::memory_order_acquire);
  const std::uint64_t check = std::atomic_ref<std::uint64_t>(at->check).load(std::memory_order_acquire);
  return check == (~value ^ epoch) && value > seen ? value : seen;
}

struct alignas(kLine) Header {
  std::uint64_t iteration;
  std::uint64_t length;  // bytes of payload
  std::uint64_t tag;     // element type, as the sender declared it
  std::uint64_t check;

  static std::uint64_t mix(std::uint64_t iteration, std::uint64_t length, std::uint64_t tag, std::uint64_t epoch) {
    const auto rotate = [](std::uint64_t x, int by) { return x << by | x >> (64 - by); };
    return ~(iteration ^ rotate(length, 21) ^ rotate(tag, 42) ^ epoch);
  }
  static Header of(std::uint64_t iteration, std::uint64_t length, std::uint64_t tag, std::uint64_t epoch) {
    return {iteration, length, tag, mix(iteration, length, tag, epoch)};
  }
  bool intact(std::uint64_t epoch) const { return check == mix(iteration, length, tag, epoch); }
};
static_assert(sizeof(Header) == kHeaderBytes);

// A rank's last word to a peer: why it posts no more.
struct Farewell {
  static constexpr std::uint32_t kClosed = 1;    // close() without an error
  static constexpr std::uint32_t kErred = 2;     // an error of its own; `text` says which
  static constexpr std::uint32_t kBereaved = 3;  // it lost `blamed`
  static constexpr std::size_t kTextBytes = 352;

  std::uint32_t code;
  std::uint32_t blamed;
  std::uint64_t posted;  // messages it has posted: iterations 0 .. posted - 1 will still arrive
  std::uint32_t text_bytes;
  char text[kTextBytes];
  std::uint64_t check;

  std::uint64_t digest(std::uint64_t epoch) const {  // FNV-1a over all that precedes the check
    std::uint64_t hash = 0xcbf29ce484222325u ^ epoch;
    const auto* bytes = reinterpret_cast<const unsigned char*>(this);
    for (std::size_t i = 0; i < offsetof(Farewell, check); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
  }
  // What lies in a control block is untrusted until this says so. Works on the caller's copy, never in place.
  bool intact(std::uint64_t epoch) const {
    return code >= kClosed && code <= kBereaved && text_bytes <= kTextBytes && check == digest(epoch);
  }
};
static_assert(sizeof(Farewell) == 384 && kFarewellOffset + sizeof(Farewell) <= kControlBytes);
static_assert(kLine + sizeof(Farewell) <= kStagingBytes);

}  // namespace blsrdma
