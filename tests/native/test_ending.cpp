// Ends of all kinds: whoever waits learns who left and why, and nothing that a peer may still write is freed.
#include <signal.h>
#include <unistd.h>

#include <optional>

#include "ranks.h"

namespace blsrdma::test {
namespace {

bool leaks_on_purpose = false;  // set by a test whose process leaves UCX's objects behind

std::string text_of(Rank& rank) { return rank->details().text; }

TEST_ON_PATHS(what_was_posted_before_leaving_arrives) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.path = path, .lag = 2});
    for (std::uint64_t i = 0; i < 2 + self; ++i) CHECK_OUTCOME(rank, rank.post_pattern(300), ok);
    if (self == 0) CHECK(rank.close());  // long before rank 1 reads
    if (self == 1) {
      usleep(50'000);
      for (std::uint64_t i = 0; i < 2; ++i) {
        CHECK_OUTCOME(rank, rank->wait(i, soon()), ok);
        check_message(rank, i, 0, 300);
      }
      const std::uint64_t began = now_ns();
      CHECK_OUTCOME(rank, rank->wait(2, soon()), peer_left);
      CHECK(now_ns() - began < 2000 * kMs);
      CHECK_EQUAL(rank->details().rank, 0u);
      CHECK_EQUAL(rank->details().iteration, 2u);
      CHECK_EQUAL(text_of(rank), "it closed the exchange");
      CHECK(rank.close());
    }
  });
}

// Rank 2 errs, rank 1 closes because of it, and says so; rank 0 hears of both, whatever comes first.
TEST_ON_PATHS(an_error_is_blamed_on_its_origin) {
  on_threads(3, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.path = path, .ranks = 3});
    if (self == 2) {
      CHECK(rank.close(Farewell::kErred, 0, "ValueError: enough"));
      return;
    }
    CHECK_OUTCOME(rank, rank.post_pattern(10), ok);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), peer_erred);
    CHECK_EQUAL(rank->details().rank, 2u);
    CHECK_EQUAL(rank->details().iteration, 0u);
    CHECK_EQUAL(text_of(rank), "ValueError: enough");
    CHECK_OUTCOME(rank, rank->begin(soon()), peer_erred);
    CHECK(rank.close(Farewell::kBereaved, 2, "rank 2 failed"));
  });
}

TEST_ON_PATHS(the_bereaved_pass_it_on) {
  on_threads(3, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.path = path, .ranks = 3});
    CHECK_OUTCOME(rank, rank.post_pattern(10), ok);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
    rank->release(0);
    if (self == 1) {
      CHECK(rank.close(Farewell::kBereaved, 2, "rank 2 died"));
      return;
    }
    CHECK_OUTCOME(rank, rank.post_pattern(10), ok);
    if (self == 0) {
      CHECK_OUTCOME(rank, rank->wait(1, soon()), peer_erred);
      CHECK_EQUAL(rank->details().rank, 2u);
      CHECK_EQUAL(text_of(rank), "as rank 1 says: rank 2 died");
    } else {  // rank 2 itself knows better
      CHECK_OUTCOME(rank, rank->wait(1, soon()), peer_left);
      CHECK_EQUAL(rank->details().rank, 1u);
    }
    CHECK(rank.close());
  });
}

TEST(a_blamed_rank_that_does_not_exist) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {});
    if (self == 1) {
      CHECK(rank.close(Farewell::kBereaved, 1000, "it was rank 1000"));
      return;
    }
    CHECK_OUTCOME(rank, rank->begin(soon()), ok);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), peer_left);
    CHECK_EQUAL(rank->details().rank, 1u);
    CHECK(rank.close());
  });
}

TEST(a_long_text_is_cut) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {});
    if (self == 1) {
      CHECK(rank.close(Farewell::kErred, 0, std::string(5000, 'x')));
      return;
    }
    CHECK_OUTCOME(rank, rank->wait(0, soon()), peer_erred);
    CHECK_EQUAL(text_of(rank), std::string(Farewell::kTextBytes, 'x'));
    CHECK(rank.close());
  });
}

// Rank 0 ends while rank 1 still posts: it is told so in time, and its windows stay until rank 1 has ended too.
TEST_ON_PATHS(close_does_not_wait_for_ever) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.path = path, .lag = 3});
    if (self == 0) {
      const std::uint64_t began = now_ns();
      CHECK(!rank.close(Farewell::kClosed, 0, "", in_ms(200)));
      const std::uint64_t took = now_ns() - began;
      CHECK(took >= 200 * kMs && took < 3000 * kMs);
    }
    meeting.meet();
    if (self == 1) {
      for (std::uint64_t i = 0; i < 4; ++i) CHECK_OUTCOME(rank, rank.post_pattern(4000), ok);
      CHECK_OUTCOME(rank, rank->wait(0, soon()), peer_left);
      CHECK(rank.close());
    }
    meeting.meet();
  });
}

// Rank 0 drops its exchange. What rank 1 still writes, and what the progress thread still does, finds memory that lives.
TEST_ON_PATHS(destroyed_without_close) {
  leaks_on_purpose = true;
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    std::weak_ptr<Fabric> left;
    {
      Rank rank(meeting, self, {.path = path, .lag = 3, .keepalive_ns = 500 * kMs});
      left = rank.node.fabric;
      CHECK_OUTCOME(rank, rank.post_pattern(20'000), ok);
      Memory memory;
      CHECK_EQUAL(receive(rank, 0, memory), Outcome::ok);
      for (const std::uint64_t deadline = soon(); !rank->sent(0); usleep(100)) {
        CHECK(now_ns() < deadline);
        rank->release(0);
      }
      meeting.meet();
      if (self == 0) rank.exchange.reset();
      meeting.meet();
      if (self == 1) {
        for (std::uint64_t i = 0; i < 3; ++i) CHECK_OUTCOME(rank, rank.post_pattern(2000), ok);
        CHECK_OUTCOME(rank, rank->wait(1, in_ms(50)), timeout);
        CHECK(!rank.close(Farewell::kClosed, 0, "", in_ms(50)));
        rank.quarantine();
        rank.node.fabric->stop();
      }
      meeting.meet();
    }
    usleep(2'200'000);  // rank 0's thread hears of it, by its connection or by the silence
    // The thread must not run while UCX's exit handlers do; blsrdma/fabric.py sees to that in the product.
    if (const auto fabric = left.lock()) fabric->stop();
    CHECK(!left.expired());
  });
}

TEST_ON_PATHS(silence_is_death) {
  leaks_on_purpose = true;
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.path = path, .keepalive_ns = 1500 * kMs});
    if (self == 0) {
      CHECK_OUTCOME(rank, rank.post_pattern(10), ok);
      // Rank 1 posts nothing for longer than that, but its thread shows signs of life.
      CHECK_OUTCOME(rank, rank->wait(0, in_ms(2700)), timeout);
      CHECK(rank->silence_ns(1) < 3000 * kMs);
    }
    meeting.meet();
    if (self == 1) rank.node.fabric->stop();
    if (self == 0) {
      const std::uint64_t began = now_ns();
      CHECK_OUTCOME(rank, rank->wait(0, soon()), peer_died);
      CHECK(now_ns() - began < 6000 * kMs);
      CHECK_EQUAL(rank->details().rank, 1u);
      CHECK_OUTCOME(rank, rank->begin(soon()), peer_died);
      CHECK_OUTCOME(rank, rank.post_pattern(10), peer_died);
      if (!rank.close(Farewell::kBereaved, 1, "rank 1 is silent", in_ms(200))) rank.quarantine();
      rank.node.fabric->stop();
    } else {
      rank.quarantine();
    }
    meeting.meet();
  });
}

// UCX may report the end of a connection long after it could not be used.
TEST(a_connection_that_cannot_be_used_is_refused) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    if (self == 1) {
      CHECK(Rank(meeting, self, {.path = kTcp, .epoch = 1}).close());
      meeting.meet();
      meeting.meet();
      return;
    }
    const Node node(kTcp);
    Rank rank(meeting, self, {.path = kTcp, .epoch = 1}, node);
    Exchange::Config config;
    config.geometry = rank.geometry;
    const auto arena = std::make_shared<Arena>(node.ucx->context, node.ucx, rank.geometry.arena_bytes);
    Exchange refused(node.fabric, arena, config);
    PeerAddress peer;
    peer.rank = 1;
    peer.worker_address.assign(meeting.blobs[1].address, meeting.blobs[1].address_bytes);
    const Node other(kPosixPuts);  // a key that this transport cannot use
    peer.rkey = Arena(other.ucx->context, other.ucx, 4096).packed_rkey();
    peer.token = std::string(kLine, 'x');
    CHECK_THROWS(UcxError, refused.connect({peer}, {-1, -1}, soon()));
    CHECK(refused.close(Farewell::kErred, 0, "it could not connect", in_ms(1000)));
    CHECK(rank.close());
    meeting.meet();
    usleep(200'000);  // the other end is gone by now
    meeting.meet();
  });
}

// Dead peers: their processes end by SIGKILL, so that nobody says farewell.

enum class Death { idle, posting };

void die_and_be_missed(const Path& path, Death death) {
  const Settings settings{.path = path, .ranks = 3, .lag = 1, .window_bytes = 200'000};
  const auto body = [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, settings);
    CHECK_OUTCOME(rank, rank.post_pattern(100), ok);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
    rank->release(0);
    while (rank.self == 1 && !rank->sent(0)) usleep(100);  // the others' counters do not depend on luck
    meeting.meet();
    if (self == 1) {
      if (death == Death::posting) CHECK_OUTCOME(rank, rank.post_pattern(200'000), ok);
      kill(getpid(), SIGKILL);
    }
    const std::uint64_t began = now_ns();
    Outcome outcome = Outcome::ok;
    std::uint64_t i = 1;
    for (; outcome == Outcome::ok; ++i) {
      outcome = rank.post_pattern(150'000);
      if (outcome == Outcome::ok) outcome = rank->wait(i, soon());
      if (outcome == Outcome::ok) rank->release(i);
    }
    CHECK(now_ns() - began < 5000 * kMs);
    CHECK_EQUAL(outcome, Outcome::peer_died);
    CHECK_EQUAL(rank->details().rank, 1u);
    meeting.words[self] = 1;
    while (!meeting.words[2 - self]) usleep(1000);  // else the other may hear of it from this rank's farewell
    // Without a farewell only a direct store is known to be over: what was put may lie in a socket or a queue.
    const bool clean = rank.close(Farewell::kBereaved, 1, "rank 1 died");
    CHECK_EQUAL(clean, path.direct());
    if (clean) return;
    leaks_on_purpose = true;
    rank.quarantine();
    rank.node.fabric->stop();
  };
  on_processes(settings.ranks, body, 1);
}

TEST(a_rank_that_dies_idle) {
  for (const Path& path : {kDirect, kPosixPuts, kCmaPuts, kTcp}) die_and_be_missed(path, Death::idle);
}

TEST(a_rank_that_dies_posting) {
  for (const Path& path : {kDirect, kPosixPuts, kCmaPuts, kTcp}) die_and_be_missed(path, Death::posting);
}

TEST(a_stopped_rank_is_not_dead) {
  for (const Path& path : {kDirect, kTcp}) {
    on_processes(2, [&](Meeting& meeting, std::uint32_t self) {
      Rank rank(meeting, self, {.path = path});
      if (self == 0) {
        const pid_t other = meeting.blobs[1].pid;
        CHECK_OUTCOME(rank, rank.post_pattern(1000), ok);
        kill(other, SIGSTOP);
        meeting.words[0] = 1;
        CHECK_OUTCOME(rank, rank->wait(0, in_ms(500)), timeout);
        kill(other, SIGCONT);
      } else {
        while (!meeting.words[0]) usleep(1000);
        CHECK_OUTCOME(rank, rank.post_pattern(1000), ok);
      }
      CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
      check_message(rank, 0, 1 - self, 1000);
      CHECK(rank.close());
    });
  }
}

}  // namespace
}  // namespace blsrdma::test

// Asked by LeakSanitizer, when the process ends.
extern "C" __attribute__((visibility("default"))) int __lsan_is_turned_off() { return blsrdma::test::leaks_on_purpose; }
