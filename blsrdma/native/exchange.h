// The bounded-lag exchange of one rank: its windows, its counters, its channels.
//
// Iteration i: post() writes one message to every peer; it is complete when every peer's counter says i + 1. The lag bound
// k: work on i begins when i - k - 1 is complete (begin), and i is posted when i - k - 1 is complete and released here.
// With both rules 2 (k + 1) windows per source need no acknowledgement; blsrdma/windows.py has the proof.
//
// A message larger than its window stays in the sender's buffer; its window gets a Descriptor. wait() then says so
// (Outcome::large), the caller names memory for it, and pull() gets it: on one host by reading the sender's memory, where
// the system permits that, else by a UCX get of the buffer, which the sender registers. The sender's buffer is in use until
// the receiver acknowledges, by a counter of its own, that it has pulled (or released) everything up to that iteration.
//
// One thread at a time calls an Exchange; a second one is told so. Nothing on the hot path throws or knows of Python: calls
// return an Outcome, and details() says what it was about.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arena.h"
#include "channel.h"
#include "doorbell.h"
#include "fabric.h"
#include "failure.h"
#include "inbox.h"
#include "layout.h"
#include "liveness.h"
#include "reader.h"
#include "turn.h"
#include "wait.h"

namespace blsrdma {

struct PeerStats {
  std::uint64_t messages = 0;
  std::uint64_t bytes = 0;
  std::uint64_t waits = 0;        // waits in which this peer was behind at the start
  std::uint64_t wait_ns = 0;      // from the start of each such wait until its counter came
  std::uint64_t wait_max_ns = 0;
  std::uint64_t last = 0;         // how often it was the last to come
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
    bool checksums = false;
    std::uint64_t device_bytes = 0;  // of the windows in device memory that go with those here; 0: there are none
    std::uint64_t keepalive_ns = kNever;
    WaitPolicy wait;
    std::function<bool()> interrupted;  // asked a few times a second during a wait: is it to end?
  };

  // No peer may write before connect() has been called by this rank: the rendezvous sees to that. `context` registers
  // the buffers of large messages.
  Exchange(std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> arena, const Config& config);
  ~Exchange();  // after close(); else everything that a peer may still write is leaked on purpose
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // Connect to every peer and complete a first put to each. pidfds[q]: a pidfd of rank q's process if it is on this
  // host, else -1; owned from here on.
  void connect(const std::vector<PeerAddress>& peers, std::vector<int> pidfds, std::uint64_t deadline_ns);

  std::uint32_t rank() const { return config_.rank; }
  std::uint32_t ranks() const { return config_.geometry.ranks; }
  const Geometry& geometry() const { return config_.geometry; }
  std::uint64_t window_bytes() const { return config_.geometry.window_bytes; }
  std::size_t records() const { return records_.size(); }  // iteration i uses record i % records()
  bool open() const { return !channels_.empty(); }
  std::uint64_t next() const { return next_; }
  const Details& details() const { return details_; }
  bool failed() const { return failure_.failed(); }
  Outcome why_failed() { return failure(next_); }  // once failed() holds

  // Whether begin(), or post() but for its copies, would return at once, be it with a failure.
  bool may_begin();
  bool may_post();
  // Whether `condition` holds now or, where cores are free, within a microsecond or two.
  template <typename Condition>
  bool soon(Condition&& condition) const {
    for (std::uint32_t spins = std::min(config_.wait.spins, 50u);; --spins) {
      if (condition()) return true;
      if (spins == 0) return false;
      relax();
    }
  }
  // Wait until work on the next iteration may begin, and note the lead.
  Outcome begin(std::uint64_t deadline_ns);
  // Post the next iteration. counts[q] items of item_bytes bytes each for rank q, in rank order; items in all. Nothing is
  // sent and nothing changes unless the outcome is ok. Throws UcxError where a large message cannot be registered.
  Outcome post(const std::byte* data, std::uint64_t items, std::uint64_t item_bytes, const std::int64_t* counts,
               std::uint64_t tag, std::uint64_t deadline_ns);
  // A post in two steps, for messages that a device writes later. announce() takes the next iteration: from here on its
  // windows at the peers may be written. publish() says that they have been: of announced iterations, in their order, from any
  // one thread; it cannot fail.
  struct Parcel {
    const std::byte* on_host = nullptr;  // the message, or its place() at the peer; none: it is in the peer's device window
    std::uint64_t bytes = 0;
  };
  Outcome announce(const std::uint64_t* bytes, std::uint64_t tag, std::uint64_t deadline_ns);
  void publish(std::uint64_t iteration, std::uint64_t tag, const std::vector<Parcel>& parcels);  // a parcel per rank
  std::uint64_t published() const { return published_.load(std::memory_order_acquire); }
  // Where a message for `peer` can be written before it is published; nullptr: it has to be put from elsewhere.
  std::byte* place(std::uint32_t peer, std::uint64_t iteration) const { return channels_[peer]->place(iteration); }
  // Wait until the iteration is complete and its headers have been checked.
  Outcome wait(std::uint64_t iteration, std::uint64_t deadline_ns);
  // After Outcome::large: get the large messages into memory that stays valid until this has returned ok, or the exchange
  // has been closed. A repeated call, after a timeout, goes on with the memory first named.
  Outcome pull(std::uint64_t iteration, const std::vector<std::pair<std::uint32_t, std::byte*>>& into,
               std::uint64_t deadline_ns);
  bool ready(std::uint64_t iteration);
  bool sent(std::uint64_t iteration);
  void release(std::uint64_t iteration);

  // After wait(). Where rank `source`'s message is: in its window, in the posted buffer (one's own), where pull() put it,
  // or nowhere (nullptr): large, and not yet pulled, or in device memory.
  const std::byte* message(std::uint64_t iteration, std::uint32_t source) const;
  std::uint64_t length(std::uint64_t iteration, std::uint32_t source) const;
  // After wait(): copy the messages that are in windows, and one's own, to where they belong in a concatenation of all.
  void copy_out(std::uint64_t iteration, std::byte* to) const;

  std::uint64_t counter(std::uint32_t source) const { return inbox_.seen(source); }
  std::uint64_t bytes_outstanding(std::uint32_t peer) const {
    return channels_[peer] ? channels_[peer]->bytes_outstanding() : 0;
  }
  std::uint64_t silence_ns(std::uint32_t peer) const { return liveness_ ? liveness_->silence_ns(peer) : 0; }
  std::uint64_t max_lead() const { return leads_.size() - 1; }
  const std::vector<std::uint64_t>& leads() const { return leads_; }  // [n]: iterations begun with a lead of n
  const PeerStats& stats(std::uint32_t peer) const { return stats_[peer]; }
  bool direct(std::uint32_t peer) const { return channels_[peer] && channels_[peer]->direct(); }
  std::string transport(std::uint32_t peer) const;
  bool reads(std::uint32_t peer) const { return bool(readers_[peer]); }  // its large messages; else they are got

  // The end. First tell the peers why and let what is queued leave; then wait until every peer has said farewell too or
  // is gone, because until then it may still write here. False: some peer had not left at the deadline, or died without a
  // farewell while its last puts were on their way, and the caller must keep this exchange, fabric, arena and all buffers
  // alive (quarantine). Returns a second after the deadline at the latest, if the machine lets it run.
  bool close(std::uint32_t code, std::uint32_t blamed, const std::string& text, std::uint64_t deadline_ns);

 private:
  struct Read {  // the rest of a large message
    std::uint32_t source;
    std::byte* to;
    std::uint64_t from;
    std::uint64_t bytes;
  };
  struct Record {  // of one iteration in flight
    std::uint64_t iteration = 0;
    std::uint64_t tag = 0;
    bool released = true;
    bool checked = false;   // every message's header has been read
    bool settled = true;    // nothing of it is wanted from any peer's memory any more
    const std::byte* own = nullptr;
    std::vector<std::uint64_t> lengths;    // bytes, per source
    std::vector<std::uint64_t> checksums;  // per source, as its header says
    std::vector<bool> on_device;           // per source
    std::vector<std::byte*> placed;        // per source: where a large message was, or is being, pulled to
    std::uint32_t large = 0;               // large messages that are neither pulled nor being pulled
    std::atomic<std::uint32_t> pulling{0};  // being pulled: by the progress thread, or in `reads`
    // Of this rank's own large messages: to whom, and the registration of the buffer they are in, if somebody needs it.
    std::vector<std::uint32_t> large_to;
    ucp_mem_h registered = nullptr;
    std::vector<Read> reads;  // what pull() itself has still to read
  };
  Record& record(std::uint64_t iteration) { return *records_[iteration % records_.size()]; }
  const Record& record(std::uint64_t iteration) const { return *records_[iteration % records_.size()]; }
  Outcome fail(Outcome outcome, std::uint32_t rank, std::uint64_t iteration, std::string text = "");
  Outcome failure(std::uint64_t iteration);
  void lost(std::uint32_t peer, Outcome outcome, std::string why);
  Outcome await(std::uint64_t iteration, std::uint64_t deadline_ns);
  Outcome give_up(std::uint64_t deadline_ns, std::uint64_t iteration, const char* what);
  Outcome find_failure(std::uint64_t iteration);
  Outcome find_foreign_write(std::uint64_t iteration);
  Outcome check_counts(std::uint64_t items, const std::int64_t* counts);
  Outcome admit(std::uint64_t deadline_ns);
  Record& take(std::uint64_t tag);
  void wake_all();
  Outcome make_room(std::uint64_t deadline_ns);
  Outcome check_headers(Record& record);
  Outcome read_some(Record& record);
  Outcome find_lost_pull(std::uint64_t iteration);
  void drop_reads(Record& record);
  void register_large(Record& record, const std::byte* data, std::uint64_t bytes);
  bool large_is_gone(Record& record);
  Outcome settle_released(Record& record, std::uint64_t deadline_ns);
  void settle(Record& record);
  void settle_unwanted();
  bool has_left(std::uint32_t peer) const;
  void drive() {
    if (remote_) fabric_->drive();
  }

  std::shared_ptr<Fabric> fabric_;
  std::shared_ptr<Arena> arena_;
  const Config config_;
  Inbox inbox_;
  Failure failure_;
  std::unique_ptr<Liveness> liveness_;
  std::unique_ptr<Doorbell> doorbell_;
  std::vector<std::unique_ptr<Channel>> channels_;  // by rank; none for oneself
  std::vector<Reader> readers_;                     // by rank
  std::vector<std::unique_ptr<Record>> records_;
  std::vector<PeerStats> stats_;
  std::vector<std::uint32_t> behind_;        // peers that a wait is still waiting for
  std::vector<std::string> suspicions_;      // at the last look, per peer
  std::vector<const std::byte*> starts_;     // of each message in the buffer being posted
  std::vector<std::uint64_t> to_acknowledge_;  // per source: iterations below this have large messages to acknowledge
  std::string rkey_;                         // of the buffer registered last
  std::uint64_t next_ = 0;
  std::atomic<std::uint64_t> published_{0};  // iterations below this have been sent, or queued
  std::uint64_t settled_ = 0;  // iterations below this are settled
  std::vector<std::uint64_t> leads_{0};
  bool remote_ = false;  // some peer is reached by puts
  std::atomic<bool> busy_{false};
  std::uint64_t asked_ns_ = 0;  // when interrupted() was asked last
  Details details_;
};

}  // namespace blsrdma
