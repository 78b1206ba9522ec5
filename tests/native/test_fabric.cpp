// The progress thread: what it runs, how it ends, that no kick is lost while it goes to sleep, and that callers may drive
// in its stead.
#include <dirent.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "fabric.h"
#include "ranks.h"

namespace blsrdma::test {
namespace {

std::size_t open_files() {
  std::size_t count = 0;
  DIR* folder = opendir("/proc/self/fd");
  while (readdir(folder)) ++count;
  closedir(folder);
  return count;
}

// Takes over as many items as have been asked for, one at a time.
class Counting final : public Driven {
 public:
  std::atomic<std::uint64_t> asked{0}, done{0};
  bool advance() override {
    const std::uint64_t sofar = done.load(std::memory_order_relaxed);
    if (sofar == asked.load(std::memory_order_acquire)) return false;
    done.store(sofar + 1, std::memory_order_release);
    return true;
  }
  bool waiting() const override {
    return asked.load(std::memory_order_acquire) != done.load(std::memory_order_relaxed);
  }
};

TEST(what_a_command_throws_comes_back) {
  const Node node(kPosixPuts);
  CHECK_THROWS(std::out_of_range, node.fabric->call([] { throw std::out_of_range("mine"); }));
  CHECK_THROWS(std::out_of_range, node.fabric->call([] { throw std::out_of_range("mine"); }, soon()));
  int elsewhere = 0;
  const auto here = std::this_thread::get_id();
  node.fabric->call([&] { elsewhere += std::this_thread::get_id() != here; });
  CHECK_EQUAL(elsewhere, 0);
  CHECK(node.fabric->call([&] { elsewhere += std::this_thread::get_id() != here; }, soon()));
  CHECK_EQUAL(elsewhere, 1);  // so that the caller can leave at its deadline
  CHECK_THROWS(std::out_of_range, node.fabric->until([]() -> bool { throw std::out_of_range("mine"); }, soon()));
}

TEST(until_keeps_its_deadline) {
  const Node node(kPosixPuts);
  const std::uint64_t began = now_ns();
  CHECK(!node.fabric->until([] { return false; }, in_ms(50)));
  const std::uint64_t took = now_ns() - began;
  CHECK(took >= 50 * kMs && took < 2000 * kMs);
  int polls = 0;
  CHECK(node.fabric->until([&] { return ++polls == 10; }, soon()));
}

TEST(a_stopped_fabric_refuses_calls) {
  const Node node(kPosixPuts);
  node.fabric->stop();
  node.fabric->stop();
  CHECK_THROWS(std::runtime_error, node.fabric->call([] {}));
  node.fabric->kick();
}

// Holds the thread up, as UCX might.
class Stuck final : public Driven {
 public:
  std::atomic<bool> held{true}, there{false};
  bool advance() override {
    for (there = true; held;) usleep(100);
    return false;
  }
};

TEST(a_thread_that_is_held_up_does_not_hold_up_the_end) {
  Stuck stuck;
  const Node node(kPosixPuts);
  node.fabric->call([&] { node.fabric->attach(&stuck); });
  while (!stuck.there) usleep(100);
  for (int i = 0; i < 2; ++i) {
    const std::uint64_t began = now_ns();
    CHECK(!node.fabric->stop(100 * kMs));
    const std::uint64_t took = now_ns() - began;
    CHECK(took >= 100 * kMs && took < 2000 * kMs);
  }
  CHECK_THROWS(std::runtime_error, node.fabric->call([] {}));
  stuck.held = false;
  CHECK(node.fabric->stop(10'000 * kMs));
  CHECK(node.fabric->stop(0));
}

TEST(every_call_returns_although_the_fabric_stops) {
  for (int round = 0; round < 20; ++round) {
    const Node node(kPosixPuts);
    std::atomic<int> running{3};
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) {
      callers.emplace_back([&] {
        try {
          for (;;) node.fabric->call([] {});
        } catch (const std::runtime_error&) {
          --running;
        }
      });
    }
    usleep(round * 100);
    node.fabric->stop();
    for (auto& each : callers) each.join();
    CHECK_EQUAL(running.load(), 0);
  }
}

TEST(calls_of_several_threads_all_run) {
  const Node node(kPosixPuts);
  int total = 0;  // touched by whoever has the turn only
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int n = 0; n < 500; ++n) node.fabric->call([&] { ++total; });
    });
  }
  for (auto& each : callers) each.join();
  CHECK_EQUAL(total, 2000);
}

// A lost kick costs half a second, the bound of an idle sleep. A machine that is busy enough may take as long by itself, but
// not again and again.
TEST(no_kick_is_lost) {
  const Node node(kPosixPuts);
  Counting work;
  node.fabric->call([&] { node.fabric->attach(&work); });
  std::mt19937 random(1);
  const std::uint64_t end = in_ms(3000);
  int lost = 0, rounds = 0;
  for (; now_ns() < end || rounds < 100; ++rounds) {
    // About as long as the thread takes to fall asleep, so that many a kick meets it on its way there.
    const std::uint64_t until = now_ns() + random() % 30'000;
    while (now_ns() < until) relax();
    const std::uint64_t began = now_ns();
    work.asked.fetch_add(1, std::memory_order_release);
    node.fabric->kick();
    while (work.waiting()) {
      sched_yield();
      CHECK(now_ns() < began + 20'000 * kMs);
    }
    lost += now_ns() - began > 400 * kMs;
  }
  node.fabric->call([&] { node.fabric->detach(&work); });
  std::printf("%d kicks, %d late\n", rounds, lost);
  CHECK(lost < 3);
}

// Says when two are at it at once.
class Guarded final : public Driven {
 public:
  std::atomic<bool> inside{false}, overlapped{false};
  std::atomic<std::uint64_t> steps{0};
  bool advance() override {
    if (inside.exchange(true)) overlapped = true;
    ++plain_;
    ++steps;
    inside.store(false);
    return steps % 3 == 0;
  }

 private:
  std::uint64_t plain_ = 0;  // for a thread sanitizer: no atomic
};

TEST(one_at_a_time_drives) {
  const Node node(kPosixPuts);
  Guarded work;
  node.fabric->call([&] { node.fabric->attach(&work); });
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&, i] {
      for (int n = 0; !stop; ++n) {
        if (i == 0) node.fabric->drive();
        if (i == 1) node.fabric->start();
        if (i == 2) node.fabric->call([] {});
        if (n % 50 == 0) usleep(200);
      }
    });
  }
  usleep(300'000);
  stop = true;
  for (auto& each : callers) each.join();
  node.fabric->call([&] { node.fabric->detach(&work); });
  CHECK(!work.overlapped);
  CHECK(work.steps > 100);
}

// A caller drives for a while, leaves work behind and goes away: it is the thread's then.
TEST(what_a_caller_leaves_is_taken_over) {
  const Node node(kPosixPuts);
  Counting work;
  node.fabric->call([&] { node.fabric->attach(&work); });
  int late = 0;
  for (int round = 0; round < 100; ++round) {
    for (int n = 0; n < round; ++n) node.fabric->drive();
    const std::uint64_t began = now_ns();
    work.asked.fetch_add(1000, std::memory_order_release);
    node.fabric->start();  // does some of it
    while (work.waiting()) {
      usleep(100);
      CHECK(now_ns() < began + 20'000 * kMs);
    }
    late += now_ns() - began > 400 * kMs;  // an idle sleep's bound: nobody had been told
  }
  node.fabric->call([&] { node.fabric->detach(&work); });
  CHECK(late < 3);
}

TEST(an_idle_fabric_sleeps) {
  const Node node(kPosixPuts);
  timespec before, after;
  const auto cpu = [](timespec* now) { clock_gettime(CLOCK_PROCESS_CPUTIME_ID, now); };
  usleep(100'000);
  cpu(&before);
  usleep(1'000'000);
  cpu(&after);
  const double used = double(after.tv_sec - before.tv_sec) + double(after.tv_nsec - before.tv_nsec) / 1e9;
  CHECK(used < 0.02);
}

TEST(fabrics_come_and_go) {
  { const Node first(kTcp); }  // what UCX opens once and keeps
  const std::size_t before = open_files();
  for (int i = 0; i < 20; ++i) {
    const Node node(i % 2 ? kTcp : kPosixPuts);
    const Arena arena(node.ucx->context, node.ucx, 10'000);
    CHECK(std::all_of(arena.data(), arena.data() + arena.bytes(), [](std::byte each) { return each == std::byte{0}; }));
    CHECK(!arena.packed_rkey().empty());
  }
  CHECK_EQUAL(open_files(), before);
}

}  // namespace
}  // namespace blsrdma::test
