// How a caller waits: spin briefly where cores are free, then yield, then sleep until woken, always bounded.
#pragma once

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdint>

#include "layout.h"

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

// Whoever yields again and again where others want the core for long uses its own share up with polls, and is behind them in
// the queue when what it waits for is there. Whoever sleeps is woken at once. So a yield that takes this long is the last.
inline constexpr std::uint64_t kSlice = 1'000'000;

// Poll `done` until it holds (true) or until it is time for checks that cost system calls (false): is the deadline past, do
// the peers live. Call again after them; the object remembers how long the wait has lasted.
class Backoff {
 public:
  Backoff(const WaitPolicy& policy, Sleeper sleeper, std::uint64_t deadline_ns)
      : policy_(policy), sleeper_(sleeper), deadline_(deadline_ns) {}

  // `woken`: whoever makes `done` true wakes the sleeper. Else nobody may, and the sleeps stay short.
  template <typename Done>
  bool until(Done&& done, bool woken) {
    for (; rounds_ < policy_.spins; ++rounds_) {
      if (done()) return true;
      relax();
    }
    for (std::uint64_t before = woken ? now_ns() : 0; rounds_ < policy_.spins + policy_.yields; ++rounds_) {
      if (done()) return true;
      sched_yield();
      if (woken) {
        const std::uint64_t after = now_ns();
        if (after - before > kSlice) rounds_ = policy_.spins + policy_.yields;  // no more of that
        before = after;
      }
      if (rounds_ % 256 == 255 && check_due()) return ++rounds_, false;
    }
    const std::uint64_t now = now_ns();
    if (sleeping_since_ == 0) sleeping_since_ = now;
    // Unwoken, naps grow with the wait: about a hundredth of it, from 100 us (really 180) to 10 ms.
    std::uint64_t nap = woken ? 50'000'000 : std::clamp<std::uint64_t>((now - sleeping_since_) / 100, 100'000, 10'000'000);
    if (deadline_ > now) nap = std::min(nap, deadline_ - now);
    sleeper_.sleep(nap, done);
    return done();
  }

 private:
  bool check_due() {  // at most once in two milliseconds
    const std::uint64_t now = now_ns();
    if (now < next_check_) return false;
    next_check_ = now + 2'000'000;
    return true;
  }

  WaitPolicy policy_;
  Sleeper sleeper_;
  std::uint64_t deadline_;
  std::uint32_t rounds_ = 0;
  std::uint64_t sleeping_since_ = 0;
  std::uint64_t next_check_ = 0;
};

}  // namespace blsrdma
