// How a caller waits for a counter: spin briefly where cores are free, then yield, then sleep, always bounded.
#pragma once

#include <sched.h>
#include <time.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace blsrdma {

inline constexpr std::uint64_t kNever = ~std::uint64_t{0};  // the deadline that never passes

inline std::uint64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return std::uint64_t(now.tv_sec) * 1'000'000'000u + std::uint64_t(now.tv_nsec);
}

// The time `ns` from now, saturating at kNever.
inline std::uint64_t deadline_after(std::uint64_t ns) {
  const std::uint64_t now = now_ns();
  return ns >= kNever - now ? kNever : now + ns;
}

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

struct WaitPolicy {
  std::uint32_t spins = 0;      // polls with a pause instruction between; 0 where ranks outnumber cores
  std::uint32_t yields = 1000;  // polls with sched_yield between
};

class Backoff {
 public:
  explicit Backoff(const WaitPolicy& policy) : policy_(policy) {}

  // Pass a moment that grows with the number of calls. True about once a millisecond: time for the slow checks (deadline,
  // is the peer alive), which cost system calls.
  bool pause() {
    ++rounds_;
    if (rounds_ <= policy_.spins) {
      relax();
      return rounds_ % 1024 == 0;
    }
    if (rounds_ <= policy_.spins + policy_.yields) {
      sched_yield();
      return rounds_ % 64 == 0;
    }
    // Waits of this length are seldom: 100 us (really 180) for the next ten milliseconds, 1 ms from then on.
    const std::uint32_t slept = rounds_ - policy_.spins - policy_.yields;
    const timespec span{0, slept < 64 ? 100'000 : 1'000'000};
    nanosleep(&span, nullptr);
    return slept >= 64 || slept % 8 == 0;
  }

 private:
  WaitPolicy policy_;
  std::uint32_t rounds_ = 0;
};

}  // namespace blsrdma
