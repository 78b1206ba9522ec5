// Clocks and deadlines; how long a waiter sleeps, and that it is woken.
#include <atomic>
#include <cstdio>
#include <random>
#include <thread>

#include "check.h"
#include "failure.h"
#include "wait.h"

namespace blsrdma::test {
namespace {

constexpr std::uint64_t kMs = 1'000'000;

struct Bed {  // what of an arena a sleeper needs
  alignas(kLine) std::byte memory[2 * kLine]{};
  Sleeper sleeper{memory};
};

TEST(deadlines_saturate) {
  CHECK_EQUAL(deadline_after(kNever), kNever);
  CHECK_EQUAL(deadline_after(kNever - 1), kNever);
  const std::uint64_t now = now_ns();
  const std::uint64_t deadline = deadline_after(1000);
  CHECK(deadline >= now + 1000 && deadline < now + 1000 * kMs);
}

TEST(a_sleep_is_bounded) {
  Bed bed;
  const std::uint64_t began = now_ns();
  bed.sleeper.sleep(20 * kMs, [] { return false; });
  CHECK(now_ns() - began >= 20 * kMs);
  CHECK(now_ns() - began < 2000 * kMs);
  const std::uint64_t again = now_ns();
  bed.sleeper.sleep(60'000 * kMs, [] { return true; });  // it has come meanwhile
  CHECK(now_ns() - again < 2000 * kMs);
  bed.sleeper.wake();  // nobody sleeps
}

// A core that others take for long is not polled for: who may be woken sleeps.
TEST(a_waiter_that_gets_its_core_seldom_sleeps) {
  for (const bool woken : {false, true}) {
    Bed bed;
    const std::uint64_t until = now_ns() + 300 * kMs;
    Backoff backoff({0, 1000}, bed.sleeper, until);
    int polls = 0;
    while (now_ns() < until) {
      CHECK(!backoff.until([&] {
        const timespec slice{0, 2'000'000};  // as if somebody else had run
        nanosleep(&slice, nullptr);
        return ++polls == 0;
      }, woken));
    }
    if (woken) CHECK(polls < 30);  // two, and some for each sleep of up to 50 ms
  }
}

TEST(a_waiter_looks_round_in_time) {
  for (const WaitPolicy& policy : {WaitPolicy{0, 0}, WaitPolicy{0, 1000}, WaitPolicy{5000, 0}, WaitPolicy{5000, 1000}}) {
    for (const bool woken : {false, true}) {
      Bed bed;
      const std::uint64_t began = now_ns();
      Backoff backoff(policy, bed.sleeper, began + 300 * kMs);
      int looks = 0;
      std::uint64_t polls = 0;
      while (now_ns() < began + 300 * kMs) {
        CHECK(!backoff.until([&] { return ++polls == 0; }, woken));
        ++looks;
      }
      CHECK(now_ns() - began < 2000 * kMs);  // not much after its deadline
      CHECK(looks >= 1);
      CHECK(polls < 200'000);  // and it does not spin for long
      CHECK(Backoff(policy, bed.sleeper, kNever).until([] { return true; }, woken));
    }
  }
}

// Two threads take turns, each asleep until the other wakes it. A lost wake-up costs 50 ms, the bound of a sleep.
TEST(no_wake_up_is_lost) {
  Bed beds[2];
  std::atomic<std::uint64_t> turn{0};
  std::atomic<int> late{0};
  const std::uint64_t end = now_ns() + 2000 * kMs;
  const auto play = [&](std::uint64_t me) {
    std::mt19937 random(static_cast<unsigned>(me));
    for (std::uint64_t mine = me;; mine += 2) {
      const std::uint64_t began = now_ns();
      Backoff backoff({0, 0}, beds[me].sleeper, kNever);
      while (!backoff.until([&] { return turn.load(std::memory_order_acquire) >= mine; }, true)) continue;
      if (turn.load() == kNever) return;
      late += now_ns() - began > 45 * kMs;
      const bool last = now_ns() > end;
      for (unsigned i = random() % 2000; i > 0; --i) relax();  // the other is awake still, falling asleep, or asleep
      turn.store(last ? kNever : mine + 1, std::memory_order_release);
      std::atomic_thread_fence(std::memory_order_seq_cst);
      beds[1 - me].sleeper.wake();
      if (last) return;
    }
  };
  std::thread other([&] { play(1); });
  play(0);
  other.join();
  std::printf("%d late\n", late.load());
  CHECK(late < 5);  // of some ten thousand; a busy machine may be late by itself
}

TEST(the_first_failure_stays) {
  for (int round = 0; round < 200; ++round) {
    Failure failure;
    CHECK(!failure.failed());
    std::thread other([&] { failure.set(Outcome::peer_left, 1, "1"); });
    failure.set(Outcome::peer_died, 2, "2");
    CHECK(failure.failed());
    const std::string seen = failure.text();
    other.join();
    CHECK_EQUAL(failure.text(), seen);
    CHECK_EQUAL(std::to_string(failure.rank()), seen);
    CHECK_EQUAL(failure.outcome(), seen == "1" ? Outcome::peer_left : Outcome::peer_died);
  }
}

}  // namespace
}  // namespace blsrdma::test
