// What lies where in one rank's arena, and the three records that peers write into it.
//
// The numbers come from blsrdma/windows.py (WindowGeometry), which documents the layout; this file only applies them.
// Every record carries a check word that mixes in the epoch of the exchange, so that a torn write, a foreign write and a
// write of an earlier incarnation are all told from the real thing.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace blsrdma {

inline constexpr std::uint64_t kLine = 64;              // cache line, and alignment of every record and payload
inline constexpr std::uint64_t kSleeperOffset = 64;     // in the arena, after the token: "the owner sleeps"
inline constexpr std::uint64_t kControlBytes = 512;     // per source; the next four lie within it
inline constexpr std::uint64_t kCounterOffset = 0;
inline constexpr std::uint64_t kHeartbeatOffset = 64;   // a Counter: signs of life, and the target of the first put
inline constexpr std::uint64_t kPulledOffset = 80;      // a Counter: large messages of ours that the source has pulled
inline constexpr std::uint64_t kReadsOffset = 96;       // a Counter: 1 says that the source can read our memory by itself
inline constexpr std::uint64_t kFarewellOffset = 128;
inline constexpr std::uint64_t kHeaderBytes = 64;       // precedes each window's payload
inline constexpr std::uint64_t kLeastPayload = 512;     // room of every window: a large message's Descriptor fits
inline constexpr std::uint64_t kStagingBytes = 1024;    // per destination: sources of counter and farewell puts
inline constexpr std::uint64_t kStagedHeartbeat = 16;   // within staging, after the counter
inline constexpr std::uint64_t kStagedPulled = 32;
inline constexpr std::uint64_t kStagedReads = 48;
inline constexpr std::uint64_t kStagedFarewell = 64;

// Offsets in bytes from the start of the arena. It begins with the owner's token and the word by which it is woken.
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
  // Local sources of puts to one destination: counters, farewell, then per window a header and a descriptor.
  std::uint64_t staging(std::uint32_t destination) const {
    return staging_offset + destination * (kStagingBytes + windows * (kHeaderBytes + kLeastPayload));
  }
  std::uint64_t staged_header(std::uint32_t destination, std::uint64_t iteration) const {
    return staging(destination) + kStagingBytes + (iteration % windows) * (kHeaderBytes + kLeastPayload);
  }
};

// n says: every message up to iteration n - 1 is in its window. Single writer, monotone, never reset. Where it lies: of a
// sender that stores, in its control block; of one that puts, in the header of message n - 1, which it puts when the message
// is there: one put instead of two.
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

// A record that may be read while it is written goes word by word; its check word tells whether all of them belong
// together.
template <typename Record>
void store_words(void* at, const Record& record) {
  std::uint64_t words[sizeof(Record) / 8];
  std::memcpy(words, &record, sizeof record);
  auto* to = static_cast<std::uint64_t*>(at);
  for (const std::uint64_t word : words) std::atomic_ref(*to++).store(word, std::memory_order_release);
}

template <typename Record>
Record load_words(void* at) {
  std::uint64_t words[sizeof(Record) / 8];
  auto* from = static_cast<std::uint64_t*>(at);
  for (std::uint64_t& word : words) word = std::atomic_ref(*from++).load(std::memory_order_acquire);
  Record record;
  std::memcpy(&record, words, sizeof record);
  return record;
}

struct alignas(kLine) Header {
  std::uint64_t iteration;
  std::uint64_t length;    // bytes of the message
  std::uint64_t tag;       // element type, as the sender declared it
  std::uint64_t kind;      // kInline; kLarge: the payload is a Descriptor, the message is to be pulled; kDevice: the message
                           // is in the receiver's device memory, in the window that goes with this one
  std::uint64_t checksum;  // of the message, where the exchange checks contents; else 0
  std::uint64_t check;
  Counter arrived{};       // of a sender that puts: iteration + 1. Not part of the check: it has one of its own

  static constexpr std::uint64_t kInline = 0;
  static constexpr std::uint64_t kLarge = 1;
  static constexpr std::uint64_t kDevice = 2;

  std::uint64_t mix(std::uint64_t epoch) const {
    const auto rotate = [](std::uint64_t x, int by) { return x << by | x >> (64 - by); };
    return ~(iteration ^ rotate(length, 11) ^ rotate(tag, 22) ^ rotate(kind, 33) ^ rotate(checksum, 44) ^ epoch);
  }
  void seal(std::uint64_t epoch) { check = mix(epoch); }
  bool intact(std::uint64_t epoch) const { return check == mix(epoch); }
};
static_assert(sizeof(Header) == kHeaderBytes);
inline constexpr std::uint64_t kArrivedOffset = offsetof(Header, arrived);

// Where a message that is larger than its window can be got; without a key where the receiver reads it by itself.
struct Descriptor {
  static constexpr std::size_t kRkeyBytes = 480;

  std::uint64_t address;
  std::uint64_t rkey_bytes;
  char rkey[kRkeyBytes];
  std::uint64_t check;

  void seal(std::uint64_t epoch);
  bool intact(std::uint64_t epoch) const;
};
static_assert(sizeof(Descriptor) <= kLeastPayload);

// A 64-bit checksum of a message: four independent lanes, several GB/s without special instructions.
inline std::uint64_t checksum(const std::byte* data, std::uint64_t length) {
  constexpr std::uint64_t kPrime = 0x9e3779b97f4a7c15u;
  std::uint64_t lanes[4] = {1, 2, 3, 4};
  const auto fold = [&](std::uint64_t word, std::size_t lane) {
    lanes[lane] = (lanes[lane] ^ word) * kPrime;
    lanes[lane] ^= lanes[lane] >> 29;
  };
  std::uint64_t words[4];
  std::uint64_t at = 0;
  for (; at + sizeof words <= length; at += sizeof words) {
    std::memcpy(words, data + at, sizeof words);
    for (std::size_t lane = 0; lane < 4; ++lane) fold(words[lane], lane);
  }
  for (std::size_t lane = 0; at < length; at += 8, ++lane) {
    std::uint64_t word = 0;
    std::memcpy(&word, data + at, length - at < 8 ? length - at : 8);
    fold(word, lane % 4);
  }
  std::uint64_t sum = length;
  for (const std::uint64_t lane : lanes) sum = (sum ^ lane) * kPrime;
  return sum;
}

inline void Descriptor::seal(std::uint64_t epoch) {
  check = checksum(reinterpret_cast<const std::byte*>(this), offsetof(Descriptor, check)) ^ epoch;
}

inline bool Descriptor::intact(std::uint64_t epoch) const {
  return rkey_bytes <= kRkeyBytes &&
         check == (checksum(reinterpret_cast<const std::byte*>(this), offsetof(Descriptor, check)) ^ epoch);
}

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

  std::uint64_t digest(std::uint64_t epoch) const {
    return blsrdma::checksum(reinterpret_cast<const std::byte*>(this), offsetof(Farewell, check)) ^ epoch;
  }
  // What lies in a control block is untrusted until this says so. Works on the caller's copy, never in place.
  bool intact(std::uint64_t epoch) const {
    return code >= kClosed && code <= kBereaved && text_bytes <= kTextBytes && check == digest(epoch);
  }
};
static_assert(sizeof(Farewell) == 384 && kFarewellOffset + sizeof(Farewell) <= kControlBytes);
static_assert(kStagedFarewell + sizeof(Farewell) <= kStagingBytes);

// The word by which a rank that sleeps in a wait is woken: 1 while it sleeps. A hint only: every sleep is bounded.
class Sleeper {
 public:
  explicit Sleeper(std::byte* arena) : word_(reinterpret_cast<std::uint32_t*>(arena + kSleeperOffset)) {}

  // Called by whoever has just published something, after a sequentially consistent fence.
  void wake() const {
    const std::atomic_ref<std::uint32_t> word(*word_);
    if (word.load(std::memory_order_relaxed) == 0) return;
    if (word.exchange(0) != 0) syscall(SYS_futex, word_, FUTEX_WAKE, 1, nullptr, nullptr, 0);
  }
  // Announce the sleep, then look once more (`again`): either the look sees what was published, or the publisher sees
  // the announcement.
  template <typename Again>
  void sleep(std::uint64_t at_most_ns, Again&& again) const {
    const std::atomic_ref<std::uint32_t> word(*word_);
    word.store(1);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!again()) {
      const timespec limit{static_cast<time_t>(at_most_ns / 1'000'000'000u),
                           static_cast<long>(at_most_ns % 1'000'000'000u)};
      syscall(SYS_futex, word_, FUTEX_WAIT, 1, &limit, nullptr, 0);
    }
    word.store(0, std::memory_order_relaxed);
  }

 private:
  std::uint32_t* word_;
};

}  // namespace blsrdma
