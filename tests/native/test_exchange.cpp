// What is posted arrives, whole and once; what cannot be posted is refused and changes nothing.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "ranks.h"

namespace blsrdma::test {
namespace {

std::uint64_t hash(std::uint64_t a, std::uint64_t b, std::uint64_t c, std::uint64_t d) {
  std::uint64_t x = a * 0x9e3779b97f4a7c15u ^ b * 0xc2b2ae3d27d4eb4fu ^ c * 0x165667b19e3779f9u ^ d * 0x27d4eb2f165667c5u;
  x ^= x >> 31;
  x *= 0xd6e8feb86659fd93u;
  return x ^ x >> 32;
}

// The size of a message, which its receiver knows too: often empty, full, or next to a threshold, and now and then larger
// than its window.
std::uint64_t size_of(std::uint64_t seed, std::uint32_t source, std::uint32_t destination, std::uint64_t iteration,
                      std::uint64_t window) {
  const std::uint64_t random = hash(seed, source, destination, iteration);
  if ((random >> 50) % 16 == 0) return window + 1 + random % (2 * window + 100'000);
  const std::uint64_t choices[] = {0, 1, 63, 64, 4097, window, random % (window + 1), random % 300};
  return std::min(window, choices[random >> 40 & 7]);
}

// `iterations` more of random sizes, with a pause now and then; every buffer is overwritten as soon as sent() allows it, and
// every message is checked, but for a few iterations that are released unseen.
void run_loop(Rank& rank, std::uint64_t seed, std::uint64_t iterations, unsigned pause_us) {
  const Settings& settings = rank.settings;
  std::mt19937_64 random(hash(seed, rank.self, 0, 0));
  std::deque<std::uint64_t> held;
  std::deque<std::pair<std::uint64_t, std::vector<std::byte>>> buffers;
  const auto size = [&](std::uint32_t p, std::uint32_t q, std::uint64_t i) {
    return size_of(seed, p, q, i, settings.window_bytes);
  };
  const auto finish = [&] {
    const std::uint64_t i = held.front();
    held.pop_front();
    if (random() % 16) {
      Memory memory;
      CHECK_OUTCOME(rank, receive(rank, i, memory), ok);
      CHECK(rank->ready(i));
      CHECK_OUTCOME(rank, rank->wait(i, 0), ok);
      for (std::uint32_t q = 0; q < settings.ranks; ++q) check_message(rank, i, q, size(q, rank.self, i));
    }
    rank->release(i);
  };
  const auto reuse = [&] {
    while (!buffers.empty() && rank->sent(buffers.front().first)) {
      std::fill(buffers.front().second.begin(), buffers.front().second.end(), std::byte{0xee});
      buffers.pop_front();
    }
  };
  for (const std::uint64_t end = rank->next() + iterations; rank->next() < end;) {
    const std::uint64_t i = rank->next();
    CHECK_OUTCOME(rank, rank->begin(soon()), ok);
    if (held.size() > settings.lag) finish();
    std::vector<std::int64_t> counts(settings.ranks);
    std::vector<std::byte> send;
    for (std::uint32_t q = 0; q < settings.ranks; ++q) {
      const std::uint64_t bytes = size(rank.self, q, i);
      counts[q] = static_cast<std::int64_t>(bytes);
      send.resize(send.size() + bytes);
      fill(send.data() + send.size() - bytes, bytes, rank.self, q, i);
    }
    buffers.emplace_back(i, std::move(send));
    const std::vector<std::byte>& data = buffers.back().second;
    CHECK_OUTCOME(rank, rank->post(data.data(), data.size(), 1, counts.data(), 1, soon()), ok);
    held.push_back(i);
    reuse();
    if (pause_us && random() % 4 == 0) usleep(random() % pause_us);
  }
  // The last ones are received: whoever waits for its large messages to be pulled waits no longer than for that.
  while (!held.empty()) {
    Memory memory;
    CHECK_OUTCOME(rank, receive(rank, held.front(), memory), ok);
    rank->release(held.front());
    held.pop_front();
  }
  for (const std::uint64_t deadline = soon(); !buffers.empty(); usleep(100)) {
    CHECK(now_ns() < deadline);
    reuse();
  }
  CHECK(rank->max_lead() <= settings.lag);
  for (std::uint32_t q = 0; q < settings.ranks; ++q) CHECK_EQUAL(rank->stats(q).messages, rank->next());
}

TEST_ON_PATHS(random_sizes_and_lags) {
  std::mt19937 random(7);
  for (int round = 0; round < 6; ++round) {
    const std::uint64_t seed = random();
    Settings settings{.path = path};
    settings.ranks = 2 + round % 3;
    settings.lag = round == 0 ? 0 : random() % 4;
    settings.window_bytes = round == 3 ? 70'000 : random() % 6000;
    settings.copy_self = random() % 2;
    settings.checksums = random() % 2;
    on_threads(settings.ranks, [&](Meeting& meeting, std::uint32_t self) {
      Rank rank(meeting, self, settings);
      for (std::uint32_t q = 0; q < settings.ranks; ++q) {
        if (q != self) CHECK_EQUAL(rank->direct(q), path.direct());
      }
      run_loop(rank, seed, 60, round % 2 ? 3000 : 0);
      CHECK(rank.close());
    });
  }
}

TEST_ON_PATHS(one_rank_is_slow) {
  const Settings settings{.path = path, .ranks = 3, .lag = 2, .window_bytes = 500};
  on_threads(settings.ranks, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, settings);
    run_loop(rank, 11, 40, self == 1 ? 10'000 : 0);
    CHECK(rank.close());
  });
}

// The progress thread falls asleep between the posts; a message that waits for it to wake by itself comes half a second late.
TEST_ON_PATHS(tiny_messages_with_pauses_between) {
  if (path.direct()) return;  // nothing to wake
  const Settings settings{.path = path, .lag = 1, .window_bytes = 64};
  on_threads(settings.ranks, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, settings);
    std::mt19937 random(self);
    int late = 0;
    for (std::uint64_t i = 0; i < 400; ++i) {
      usleep(random() % 3000);
      const std::uint64_t began = now_ns();
      CHECK_OUTCOME(rank, rank.post_pattern(8), ok);
      CHECK_OUTCOME(rank, rank->wait(i, soon()), ok);
      for (std::uint32_t q = 0; q < settings.ranks; ++q) check_message(rank, i, q, 8);
      rank->release(i);
      late += now_ns() - began > 400 * kMs;
    }
    CHECK(late < 3);
    CHECK(rank.close());
  });
}

TEST(processes) {
  for (const Path& path : kPaths) {
    if (path.in_place) continue;
    const Settings settings{.path = path, .ranks = 3, .lag = 1, .window_bytes = 9000};
    on_processes(settings.ranks, [&](Meeting& meeting, std::uint32_t self) {
      Rank rank(meeting, self, settings);
      run_loop(rank, 5, 40, 500);
      CHECK(rank.close());
    });
  }
}

TEST(alone) {
  for (const bool copy_self : {false, true}) {
    on_threads(1, [&](Meeting& meeting, std::uint32_t self) {
      Rank rank(meeting, self, {.ranks = 1, .lag = 1, .window_bytes = 100, .copy_self = copy_self});
      run_loop(rank, 3, 20, 0);
      CHECK(rank.close());
    });
  }
}

TEST(several_exchanges_share_a_fabric) {
  for (const Path& path : {kInPlace, kTcp}) {
    on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
      const Node node(path);
      Rank first(meeting, self, {.path = path, .lag = 2, .epoch = 1}, node);
      Rank second(meeting, self, {.path = path, .window_bytes = 300, .epoch = 2}, node);
      auto other = std::async(std::launch::async, [&] { run_loop(first, 1, 40, 100); });
      run_loop(second, 2, 40, 0);
      other.get();
      CHECK(first.close());
      run_loop(second, 2, 10, 0);
      CHECK(second.close());
    });
  }
}

TEST_ON_PATHS(exchanges_come_and_go) {
  on_threads(3, [&](Meeting& meeting, std::uint32_t self) {
    const Node node(path);
    for (std::uint64_t i = 0; i < 12; ++i) {
      Rank rank(meeting, self, {.path = path, .ranks = 3, .window_bytes = 200, .epoch = i}, node);
      CHECK_OUTCOME(rank, rank.post_pattern(i), ok);
      CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
      for (std::uint32_t q = 0; q < 3; ++q) check_message(rank, 0, q, i);
      rank->release(0);
      CHECK(rank.close());
    }
  });
}

TEST(items_have_a_size) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.window_bytes = 96});
    const std::vector<std::uint64_t> send(15, self);
    const std::int64_t counts[] = {2, 3};
    const std::uint64_t bytes[] = {48, 72};
    CHECK_EQUAL(rank->post(reinterpret_cast<const std::byte*>(send.data()), 5, 24, counts, 9, soon()), Outcome::ok);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
    CHECK_EQUAL(rank->length(0, 1 - self), bytes[self]);
    CHECK_EQUAL(rank->stats(1 - self).bytes, bytes[1 - self]);
    rank->release(0);
    CHECK(rank.close());
  });
}

TEST_ON_PATHS(refusals_change_nothing) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.path = path, .lag = 1, .window_bytes = 100});
    const std::vector<std::byte> send(300);
    const auto post = [&](std::uint64_t items, std::int64_t a, std::int64_t b, std::uint64_t item_bytes = 1) {
      const std::int64_t counts[] = {a, b};
      return rank->post(send.data(), items, item_bytes, counts, 1, soon());
    };
    CHECK_EQUAL(post(10, 11, -1), Outcome::count_negative);
    CHECK_EQUAL(rank->details().rank, 1u);
    CHECK_EQUAL(post(10, 4, 5), Outcome::count_sum);
    CHECK_EQUAL(rank->details().a, 9u);
    CHECK_EQUAL(rank->details().b, 10u);
    CHECK_EQUAL(post(10, std::int64_t{1} << 62, std::int64_t{1} << 62), Outcome::count_sum);
    const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
    CHECK_EQUAL(post(10, huge, huge), Outcome::count_sum);
    CHECK_EQUAL(rank->next(), 0u);

    CHECK_OUTCOME(rank, rank.post_pattern(100), ok);
    CHECK_OUTCOME(rank, rank.post_pattern(0), ok);
    CHECK_OUTCOME(rank, rank.post_pattern(7), window_held);
    CHECK_EQUAL(rank->details().iteration, 0u);
    CHECK_EQUAL(rank->next(), 2u);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
    check_message(rank, 0, 1 - self, 100);
    rank->release(1);  // not the one
    CHECK_OUTCOME(rank, rank.post_pattern(7), window_held);
    rank->release(0);
    CHECK_OUTCOME(rank, rank.post_pattern(7), ok);
    rank->release(0);  // of an iteration that is over
    CHECK_OUTCOME(rank, rank->wait(2, soon()), ok);
    check_message(rank, 2, 1 - self, 7);
    CHECK(rank.close());
  });
}

TEST_ON_PATHS(a_deadline_loses_nothing) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.path = path});
    if (self == 0) {
      CHECK_OUTCOME(rank, rank.post_pattern(30), ok);
      CHECK(!rank->ready(0));
      for (const std::uint64_t ms : {0, 1, 20, 200}) {
        const std::uint64_t began = now_ns();
        CHECK_OUTCOME(rank, rank->wait(0, deadline_after(ms * kMs)), timeout);
        const std::uint64_t took = now_ns() - began;
        CHECK(took >= ms * kMs && took < (ms + 2000) * kMs);
        CHECK_EQUAL(rank->details().iteration, 0u);
      }
      CHECK_OUTCOME(rank, rank->begin(in_ms(20)), timeout);  // iteration 1 may not begin either
      CHECK_EQUAL(rank->counter(1), 0u);
      meeting.meet();
    } else {
      meeting.meet();
      CHECK_OUTCOME(rank, rank.post_pattern(30), ok);
    }
    CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
    check_message(rank, 0, 1 - self, 30);
    CHECK(rank->stats(1 - self).wait_ns >= (self == 0 ? 200 * kMs : 0));
    CHECK(rank.close());
  });
}

TEST(the_bound_is_kept) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.lag = 3});
    if (self == 0) {
      for (std::uint64_t i = 0; i < 4; ++i) {
        CHECK_OUTCOME(rank, rank->begin(soon()), ok);
        CHECK_OUTCOME(rank, rank.post_pattern(10), ok);
      }
      rank->release(0);
      CHECK_OUTCOME(rank, rank->begin(in_ms(20)), timeout);
      CHECK_OUTCOME(rank, rank.post_pattern(10, in_ms(20)), timeout);
      CHECK_EQUAL(rank->next(), 4u);
      CHECK_EQUAL(rank->max_lead(), 3u);
    }
    meeting.meet();
    if (self == 1) CHECK_OUTCOME(rank, rank.post_pattern(10), ok);
    if (self == 0) CHECK_OUTCOME(rank, rank->begin(soon()), ok);
    CHECK(rank.close());
  });
}

TEST(different_types_are_told) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {});
    const std::byte send[2]{};
    const std::int64_t counts[] = {1, 1};
    CHECK_EQUAL(rank->post(send, 2, 1, counts, 100 + self, soon()), Outcome::ok);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), tag_mismatch);
    CHECK_EQUAL(rank->details().a, 100u + (1 - self));
    CHECK_EQUAL(rank->details().b, 100u + self);
    CHECK(rank.close());
  });
}

TEST_ON_PATHS(large_messages_both_ways_at_once) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.path = path, .lag = 1, .window_bytes = 64, .checksums = true});
    for (std::uint64_t i = 0; i < 6; ++i) {
      const std::uint64_t bytes = 1'000'000 >> i;
      if (i >= 2) rank->release(i - 2);
      CHECK_OUTCOME(rank, rank.post_pattern(bytes), ok);
      CHECK_OUTCOME(rank, rank->wait(i, soon()), large);
      CHECK_EQUAL(rank->length(i, 1 - self), bytes);
      CHECK(rank->message(i, 1 - self) == nullptr);
      check_message(rank, i, self, bytes);
      Memory memory;
      CHECK_OUTCOME(rank, receive(rank, i, memory), ok);
      check_message(rank, i, 1 - self, bytes);
      std::vector<std::byte> all(2 * bytes);
      rank->copy_out(i, all.data());
      for (std::uint64_t at = 0; at < 2 * bytes; ++at) {
        CHECK(all[at] == pattern(static_cast<std::uint32_t>(at / bytes), self, i, at % bytes));
      }
    }
    CHECK(rank.close());
  });
}

// Its sender's buffer is free again all the same.
TEST_ON_PATHS(large_messages_that_nobody_wants) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.path = path, .window_bytes = 64});
    for (std::uint64_t i = 0; i < 5; ++i) {
      CHECK_OUTCOME(rank, rank.post_pattern(50'000), ok);
      if (i % 2) CHECK_OUTCOME(rank, rank->wait(i, soon()), large);
      CHECK(!rank->sent(i));
      if (i < 4) rank->release(i);
    }
    CHECK_OUTCOME(rank, rank->wait(4, soon()), large);
    rank->release(4);
    for (const std::uint64_t deadline = soon(); !rank->sent(4); usleep(100)) CHECK(now_ns() < deadline);
    CHECK(rank.close());
  });
}

TEST(calls_of_two_threads_at_once_are_refused) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {});
    if (self == 0) {
      CHECK_OUTCOME(rank, rank.post_pattern(1), ok);
      std::jthread waiter([&] {
        Outcome outcome;
        while ((outcome = rank->wait(0, soon())) == Outcome::concurrent) continue;
        meeting.words[0] = outcome == Outcome::ok ? 1 : 2;
      });
      while (rank->begin(0) != Outcome::concurrent) CHECK_EQUAL(meeting.words[0].load(), 0u);
      const std::byte none{};
      const std::int64_t counts[] = {0, 0};
      CHECK_OUTCOME(rank, rank->wait(0, 0), concurrent);
      CHECK_EQUAL(rank->post(&none, 0, 1, counts, 1, 0), Outcome::concurrent);
      CHECK(!rank->ready(0));
      meeting.meet();
      waiter.join();
      CHECK_EQUAL(meeting.words[0].load(), 1u);
    } else {
      meeting.meet();
      CHECK_OUTCOME(rank, rank.post_pattern(1), ok);
    }
    CHECK(rank.close());
  });
}

TEST(a_wait_can_be_interrupted) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Settings settings;
    if (self == 0) settings.interrupted = [asked = 0]() mutable { return ++asked == 3; };
    Rank rank(meeting, self, settings);
    if (self == 0) {
      CHECK_OUTCOME(rank, rank.post_pattern(1), ok);
      const std::uint64_t began = now_ns();
      CHECK_OUTCOME(rank, rank->wait(0, soon()), interrupted);
      CHECK(now_ns() - began < 3000 * kMs);
    }
    meeting.meet();
    if (self == 1) CHECK_OUTCOME(rank, rank.post_pattern(1), ok);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
    CHECK(rank.close());
  });
}

// --- what a peer, or a stray write of an earlier incarnation, may leave in the windows

// Rank 1 writes over what it has sent to rank 0, which says what is wrong, and says so from then on.
void scribble(Settings settings, const std::function<void(Rank& victim, std::byte* header)>& write) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, settings);
    CHECK_OUTCOME(rank, rank.post_pattern(50), ok);
    while (!rank->ready(0)) usleep(100);
    if (self == 0) {
      write(rank, rank.arena->data() + rank.geometry.window(0, 1, 0));
      Memory memory;
      for (int again = 0; again < 2; ++again) {
        CHECK_EQUAL(receive(rank, 0, memory), Outcome::corrupt);
        CHECK_EQUAL(rank->details().rank, 1u);
        CHECK(!rank->details().text.empty());
      }
      CHECK(rank->failed());
      CHECK_OUTCOME(rank, rank->begin(soon()), corrupt);
      CHECK_OUTCOME(rank, rank.post_pattern(1), corrupt);
    }
    CHECK(rank.close());
  });
}

TEST(scribbled_headers_are_told) {
  const std::uint64_t epoch = Settings{}.epoch;
  const std::pair<Header, std::uint64_t> wrong[] = {
      {{0, 50, 1, Header::kInline, 0, 0}, epoch + 1},             // of another epoch
      {{2, 50, 1, Header::kInline, 0, 0}, epoch},                 // of another iteration
      {{0, 4097, 1, Header::kInline, 0, 0}, epoch},               // longer than its window
      {{0, ~std::uint64_t{0}, 1, Header::kInline, 0, 0}, epoch},  // longer than anything
      {{0, 50, 1, 2, 0, 0}, epoch},                               // of no known kind
      {{0, 50, 1, ~std::uint64_t{0}, 0, 0}, epoch},
  };
  for (const auto& [header, seal] : wrong) {
    scribble({}, [&](Rank&, std::byte* at) {
      Header sealed = header;
      sealed.seal(seal);
      std::memcpy(at, &sealed, sizeof sealed);
    });
  }
  scribble({}, [](Rank&, std::byte* at) { at[8] ^= std::byte{1}; });
}

TEST(a_scribbled_descriptor_is_told) {
  scribble({}, [&](Rank&, std::byte* at) {
    Header header{0, 50'000, 1, Header::kLarge, 0, 0};  // and a payload that describes nothing
    header.seal(Settings{}.epoch);
    std::memcpy(at, &header, sizeof header);
  });
}

TEST(a_scribbled_message_is_told_where_contents_are_checked) {
  for (const std::uint64_t byte : {0, 31, 49}) {
    scribble({.checksums = true}, [&](Rank&, std::byte* at) { at[kHeaderBytes + byte] ^= std::byte{4}; });
  }
}

TEST(scribbled_counters_are_told) {
  std::mt19937 random(2);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t junk = hash(random(), random(), 0, 0);
    on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
      Rank rank(meeting, self, {});
      meeting.meet();
      if (self == 0) {
        auto* counter = reinterpret_cast<Counter*>(rank.arena->data() + rank.geometry.control(1) + kCounterOffset);
        const Counter wrong[] = {{junk, ~junk}, Counter::of(1, rank.settings.epoch + (1u << 20)),
                                 Counter::of(1'000'000, rank.settings.epoch), {0, 1}};
        publish(counter, wrong[round % 4]);
        CHECK_OUTCOME(rank, rank.post_pattern(1), ok);
        const Outcome outcome = rank->wait(0, in_ms(5000));
        // A counter that runs ahead with a right check word is believed; its window's header is not.
        CHECK_EQUAL(outcome, Outcome::corrupt);
        CHECK_EQUAL(rank->details().rank, 1u);
      }
      meeting.meet();
      CHECK(rank.close());
    });
  }
}

TEST(scribbled_counters_of_headers_are_told) {
  // By puts the counter of the message that is expected next lies in its window's header.
  for (const bool torn : {false, true}) {
    on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
      Settings settings{.path = kPosixPuts};
      Rank rank(meeting, self, settings);
      CHECK_OUTCOME(rank, rank.post_pattern(1), ok);  // so that the way of counting is known
      CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
      rank->release(0);
      meeting.meet();
      if (self == 0) {
        const Counter before{0, 0}, after = Counter::of(2, rank.settings.epoch);
        Counter written = Counter::of(3, rank.settings.epoch);
        if (torn) {  // the sender has been stopped in the middle of the right one: not a foreign write
          written = before;
          std::memcpy(&written, &after, 11);
        }
        std::byte* line = rank.arena->data() + rank.geometry.window(0, 1, 1) + kArrivedOffset;
        publish(reinterpret_cast<Counter*>(line), written);
        CHECK_OUTCOME(rank, rank.post_pattern(1), ok);
        CHECK_EQUAL(rank->wait(1, in_ms(torn ? 300 : 5000)), torn ? Outcome::timeout : Outcome::corrupt);
        CHECK_EQUAL(rank->details().rank, torn ? 0u : 1u);
      }
      meeting.meet();
      CHECK(rank.close());
    });
  }
}

TEST(scribbled_farewells_and_heartbeats_are_ignored) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {});
    meeting.meet();
    if (self == 0) {
      std::byte* control = rank.arena->data() + rank.geometry.control(1);
      std::mt19937 random(2);
      CHECK_OUTCOME(rank, rank.post_pattern(10), ok);
      for (int round = 0; round < 30; ++round) {
        for (std::uint64_t i = kHeartbeatOffset; i < kControlBytes; i += 8) {
          std::atomic_ref(*reinterpret_cast<std::uint64_t*>(control + i)).store(hash(random(), i, 0, 0));
        }
        CHECK_OUTCOME(rank, rank->wait(0, in_ms(2)), timeout);
      }
    }
    meeting.meet();
    if (self == 1) CHECK_OUTCOME(rank, rank.post_pattern(10), ok);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
    CHECK(rank.close());
  });
}

TEST(an_arena_that_is_too_small_is_refused) {
  const Node node(kPosixPuts);
  Exchange::Config config;
  config.geometry = geometry_of({});
  const auto arena = std::make_shared<Arena>(node.ucx->context, node.ucx, config.geometry.arena_bytes - 1);
  // The allocator may round up; then there is room.
  config.geometry.arena_bytes = arena->bytes() + 1;
  CHECK_THROWS(std::invalid_argument, Exchange(node.fabric, arena, config));
}

}  // namespace
}  // namespace blsrdma::test
