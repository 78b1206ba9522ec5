// The bounded-lag exchange of one rank: its windows, its counters, its channels.
//
// Iteration i: post() writes one message to every peer; it is complete when every peer's counter says i + 1. The lag bound
// k: work on i begins when i - k - 1 is complete (begin), and i is posted when i - k - 1 is complete and released here.
// With both rules 2 (k + 1) windows per source need no acknowledgement; blsrdma/windows.py has the proof.
//
// One thread at a time calls an Exchange. Nothing here throws on the hot path or knows of Python: calls return an Outcome,
// and details() says what it was about.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arena.h"
#include "channel.h"
#include "fabric.h"
#include "layout.h"
#include "wait.h"

namespace blsrdma {

enum class Outcome : int {
  ok = 0,
  timeout,        // the deadline passed; details().rank: one that is missing
  peer_died,      // its process is gone, or its connection
  peer_erred,     // it left with an error; text: what it said
  peer_left,      // it closed without an error and will not post this iteration
  window_held,    // i - k - 1 is not released here
  count_negative,  // counts[rank] < 0
  count_sum,      // the counts do not add up; a: sum, b: expected
  too_large,      // message to rank: a bytes, window of b bytes
  corrupt,        // a header does not fit; text: how
  tag_mismatch,   // rank declared another element type: a there, b here
};

struct Details {
  std::uint32_t rank = 0;
  std::uint64_t iteration = 0;
  std::uint64_t a = 0;
  std::uint64_t b = 0;
  std::string text;
};

struct PeerStats {
  std::uint64_t messages = 0;
  std::uint64_t bytes = 0;
  std::uint64_t wait_ns = 0;  // from the start of each wait until this peer's counter came
};

class Exchange {
 public:
  struct Config {
    Geometry geometry;
    std::uint32_t rank = 0;
    std::uint32_t lag = 0;
    std::uint64_t epoch = 0;
    bool copy_self = false;
    bool allow_direct = true;
    WaitPolicy wait;
  };

  // The arena and the fabric must outlive the exchange. No peer may write before connect() has been called by this rank:
  // the rendezvous sees to that.
  Exchange(std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> arena, const Config& config);
  ~Exchange();  // after close(); else everything that a peer may still write is leaked on purpose
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // Connect to every peer and complete a first put to each. pidfds[q]: a pidfd of rank q's process, or -1.
  void connect(const std::vector<PeerAddress>& peers, std::vector<int> pidfds, std::uint64_t deadline_ns);

  std::uint64_t next() const { return next_; }
  const Details& details() const { return details_; }

  // Wait until work on the next iteration may begin, and note the lead.
  Outcome begin(std::uint64_t deadline_ns);
  // Post the next iteration. counts[q] items of item_bytes bytes each for rank q, in rank order; items in all. Nothing is
  // sent and nothing changes unless the outcome is ok.
  Outcome post(const std::byte* data, std::uint64_t items, std::uint64_t item_bytes, const std::int64_t* counts,
               std::uint64_t tag, std::uint64_t deadline_ns);
  // Wait until the iteration is complete and its headers have been checked.
  Outcome wait(std::uint64_t iteration, std::uint64_t deadline_ns);
  bool ready(std::uint64_t iteration);
  bool sent(std::uint64_t iteration) const;
  void release(std::uint64_t iteration);

  // After wait(): where rank `source`'s message is. Own message not copied: from the buffer that was posted.
  const std::byte* message(std::uint64_t iteration, std::uint32_t source) const;
  std::uint64_t length(std::uint64_t iteration, std::uint32_t source) const;

  std::uint64_t counter(std::uint32_t source) const { return seen_[source]; }
  std::uint64_t max_lead() const { return max_lead_; }
  const PeerStats& stats(std::uint32_t peer) const { return stats_[peer]; }
  bool direct(std::uint32_t peer) const { return channels_[peer] && channels_[peer]->direct(); }
  std::string transport(std::uint32_t peer) const;

  // The end. First tell the peers why and let what is queued leave; then wait until every peer has said farewell too or
  // is gone, because until then it may still write here. False: the deadline passed, and the caller must keep fabric
  // and arena alive (quarantine).
  bool close(std::uint32_t code, std::uint32_t blamed, const std::string& text, std::uint64_t deadline_ns);

 private:
  struct Record {  // of one iteration in flight
    std::uint64_t iteration = 0;
    bool released = true;
    bool checked = false;
    const std::byte* own = nullptr;
    std::vector<std::uint64_t> lengths;  // bytes, per source
    std::uint64_t tag = 0;
  };

  Record& record(std::uint64_t iteration) { return records_[iteration % records_.size()]; }
  const Record& record(std::uint64_t iteration) const { return records_[iteration % records_.size()]; }
  Counter* counter_line(std::uint32_t source) const;
  bool arrived(std::uint64_t iteration);
  Outcome await(std::uint64_t iteration, std::uint64_t deadline_ns);
  Outcome check_headers(Record& record);
  std::optional<Farewell> farewell_of(std::uint32_t source) const;
  Outcome find_failure(std::uint64_t iteration);
  Outcome fail(Outcome outcome, std::uint32_t rank, std::uint64_t iteration, std::string text);
  bool dead(std::uint32_t peer) const;

  std::shared_ptr<Fabric> fabric_;
  std::shared_ptr<Arena> arena_;
  const Config config_;
  std::vector<std::unique_ptr<Channel>> channels_;  // by rank; none for oneself
  std::vector<int> pidfds_;
  std::vector<Record> records_;
  std::vector<std::uint64_t> seen_;  // newest counter per source
  std::vector<PeerStats> stats_;
  std::vector<std::uint32_t> behind_;        // peers that a wait is still waiting for
  std::vector<const std::byte*> starts_;  // of each message in the buffer being posted
  std::uint64_t next_ = 0;
  std::uint64_t complete_ = 0;  // iterations 0 .. complete_ - 1 are known to be complete
  std::uint64_t max_lead_ = 0;
  Details details_;
};

}  // namespace blsrdma
