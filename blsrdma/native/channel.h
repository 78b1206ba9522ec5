// One peer, seen from its sender: messages, counters and the farewell that this rank writes into the peer's arena, and the
// large messages that it pulls out of the peer's memory.
//
// Two paths for what is written, chosen once, at connect:
//   direct  the peer's arena is mapped into this process: post() copies the message and stores the counter (release).
//   put     UCX puts by whoever drives the fabric, in the order that holds on every transport:
//           data -> each put's own status and a flush -> headers, each with its counter. One flush is in flight at a time;
//           messages that are queued meanwhile share the next one. Where the peer is reached by one TCP connection, and by
//           nothing else, that is order enough: data whose put has completed here is in the connection before the header,
//           and the peer's UCX writes to memory what comes out of it in turn. There no flush, a round trip, is waited for.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "arena.h"
#include "fabric.h"
#include "layout.h"

namespace blsrdma {

// What a peer publishes about itself in the rendezvous.
struct PeerAddress {
  std::uint32_t rank = 0;
  std::string worker_address;
  std::string rkey;
  std::uint64_t arena = 0;  // base address there
  std::string token;        // the first line of its arena: proves that a mapping is the right one
  pid_t pid = 0;            // of a process on this host; else 0
};

class Channel final : public Driven {
 public:
  using Broken = std::function<void(std::uint32_t rank, ucs_status_t status)>;

  // Creates the endpoint; in the fabric's turn. `local` is this rank's arena, where staged records lie. `broken` is
  // called in a turn, once, when the endpoint becomes unusable.
  Channel(Fabric& fabric, Arena& local, const Geometry& geometry, std::uint32_t self, const PeerAddress& peer,
          std::uint64_t epoch, bool allow_direct, Broken broken);
  ~Channel() override;  // after disconnect()

  std::uint32_t peer() const { return peer_; }
  bool direct() const { return mapped_ != nullptr; }
  bool was_direct() const { return was_direct_; }  // also once it has been disconnected
  std::string transport() const;  // in a turn
  // Whether UCX reads the peer's memory without the peer, and does not emulate it (TCP), by cma or not; in a turn, once it
  // is warm.
  bool gets(bool cma) const;
  // UCS_OK, or why the endpoint is unusable.
  ucs_status_t broken() const { return broken_.load(std::memory_order_acquire); }

  // From the thread that owns the exchange. Iterations are consecutive from 0; room() must hold. The header is sealed;
  // `payload` is what goes into the window, the message or the Descriptor of a large one, which is copied.
  void post(const Header& header, const std::byte* payload, std::uint64_t bytes);
  // Where the payload of message `iteration` belongs, to be written in place before post() is given the same address; none
  // where it has to be put.
  std::byte* place(std::uint64_t iteration) const {
    return mapped_ ? mapped_ + geometry_.window(peer_, self_, iteration) + kHeaderBytes : nullptr;
  }
  // Wake the peer if it sleeps in a wait; after a sequentially consistent fence.
  void wake() const {
    if (mapped_) Sleeper(mapped_).wake();
  }
  // Whether message `iteration` can be queued: the staged header it will use is free again.
  bool room(std::uint64_t iteration) const {
    return direct() || iteration < done_.load(std::memory_order_acquire) + geometry_.windows;
  }
  // Messages 0 .. sent() - 1 have left their source (large ones: their descriptors have).
  std::uint64_t sent() const { return done_.load(std::memory_order_acquire); }
  std::uint64_t bytes_outstanding() const;  // queued or in flight
  // Tell the peer that its large messages of iterations below n have been pulled.
  void acknowledge(std::uint64_t n);
  // The last word; nothing is posted after it. The record's check is made here.
  void farewell(Farewell record);
  bool pull_failed() const { return pull_failed_.load(std::memory_order_acquire); }
  bool drained() const { return direct() || broken() != UCS_OK || !waiting(); }

  // In the fabric's turn.
  // The first put: makes UCX connect now and not in iteration 0. `reads`: tell the peer that this rank reads its memory.
  void warm_up(bool reads = false);
  bool warm() const { return outstanding_ == 0; }
  void note_order();  // once it is warm
  ucp_ep_h endpoint() const { return endpoint_; }
  void beat() { beating_ = true; }  // send heartbeats from now on
  void orphan() { on_broken_ = [](std::uint32_t, ucs_status_t) {}; }
  // Get `bytes` at `from`, in the peer's memory that `rkey` opens, into `to`; then *left is one less. Never, if the
  // channel breaks: then pull_failed() holds, for whoever waits.
  void pull(std::byte* to, std::uint64_t bytes, std::uint64_t from, const std::string& rkey,
            std::atomic<std::uint32_t>* left);
  void disconnect();
  bool disconnected();
  bool advance() override;
  bool waiting() const override;
  void tick(std::uint64_t now) override;

 private:
  struct Message {
    const std::byte* payload;
    std::uint64_t bytes;
  };
  struct Pull {
    Channel* channel;
    ucp_rkey_h rkey;
    std::atomic<std::uint32_t>* left;
  };
  enum class State { idle, moving, counting, parting, minor };

  static void completed(void* request, ucs_status_t status, void* channel);
  static void pulled(void* request, ucs_status_t status, void* pull);
  static void failed(void* channel, ucp_ep_h endpoint, ucs_status_t status);
  void started(ucs_status_ptr_t request);
  void fail(ucs_status_t status);
  void finish(Pull* pull, ucs_status_t status);
  void put(const void* from, std::size_t bytes, std::uint64_t to_offset, ucp_mem_h handle);
  void put_counter(std::uint64_t value, std::uint64_t staged_offset, std::uint64_t control_offset);
  void flush();
  std::vector<std::string> lanes() const;
  std::byte* staged(std::uint64_t offset) const { return local_.data() + offset; }
  Counter* mapped_counter(std::uint64_t offset) const {
    return reinterpret_cast<Counter*>(mapped_ + geometry_.control(self_) + offset);
  }

  Fabric& fabric_;
  Arena& local_;
  const Geometry geometry_;
  const std::uint32_t self_;
  const std::uint32_t peer_;
  const std::uint64_t epoch_;
  const std::uint64_t remote_;  // the peer's arena, its own address
  Broken on_broken_;
  ucp_ep_h endpoint_ = nullptr;
  ucp_rkey_h rkey_ = nullptr;
  std::byte* mapped_ = nullptr;
  bool was_direct_ = false;

  std::vector<Message> queue_;  // message i at i % windows; written before queued_ covers it
  std::atomic<std::uint64_t> queued_{0};
  std::atomic<std::uint64_t> done_{0};
  std::atomic<std::uint64_t> acknowledged_{0};
  std::atomic<bool> parting_{false};
  std::atomic<bool> pull_failed_{false};
  std::atomic<ucs_status_t> broken_{UCS_OK};

  // Of whoever has the fabric's turn.
  State state_ = State::idle;
  std::uint64_t taken_ = 0;    // messages whose data has been put
  std::uint64_t counted_ = 0;  // and whose header has
  std::uint64_t outstanding_ = 0;
  std::uint64_t pulling_ = 0;
  std::atomic<std::uint64_t> acknowledged_there_{0};
  std::uint64_t beats_ = 0;
  bool ordered_ = false;  // puts arrive in the order in which they complete here
  bool beating_ = false;
  bool beat_due_ = false;
  std::atomic<bool> parted_{false};
  ucs_status_ptr_t closing_ = nullptr;
};

}  // namespace blsrdma
