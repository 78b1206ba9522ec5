// One peer, seen from its sender: messages, counters and the farewell that this rank writes into the peer's windows.
//
// Two paths, chosen once, at connect:
//   direct  the peer's arena is mapped into this process: post() copies the message and stores the counter (release).
//   put     UCX puts by the progress thread, in the order that holds on every transport:
//           data and headers -> each put's own status and a flush -> counter. One flush is in flight at a time; messages
//           that are queued meanwhile go together in the next round and share one counter put.
#pragma once

#include <atomic>
#include <cstdint>
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
};

class Channel final : public Driven {
 public:
  // Creates the endpoint; on the progress thread. `local` is this rank's arena, where staged records lie.
  Channel(Fabric& fabric, Arena& local, const Geometry& geometry, std::uint32_t self, const PeerAddress& peer,
          std::uint64_t epoch, bool allow_direct);
  ~Channel() override;  // after disconnect()

  std::uint32_t peer() const { return peer_; }
  bool direct() const { return mapped_ != nullptr; }
  std::string transport() const;  // on the progress thread
  // UCS_OK, or why the endpoint is unusable.
  ucs_status_t broken() const { return broken_.load(std::memory_order_acquire); }

  // From the thread that owns the exchange. Iterations are consecutive from 0; room() must hold.
  void post(std::uint64_t iteration, const std::byte* data, std::uint64_t length, std::uint64_t tag);
  // Whether message `iteration` can be queued: the staged header it will use is free again.
  bool room(std::uint64_t iteration) const {
    return direct() || iteration < done_.load(std::memory_order_acquire) + geometry_.windows;
  }
  // Messages 0 .. sent() - 1 have left their source.
  std::uint64_t sent() const { return done_.load(std::memory_order_acquire); }
  // The last word; nothing is posted after it. The record's check is made here.
  void farewell(Farewell record);
  bool drained() const { return direct() || broken() != UCS_OK || !waiting(); }

  // On the progress thread.
  void warm_up();  // the first put: makes UCX connect now and not in iteration 0
  bool warm() const { return outstanding_ == 0; }
  void disconnect();
  bool disconnected();
  bool advance() override;
  bool waiting() const override;

 private:
  struct Message {
    const std::byte* data;
    std::uint64_t length;
  };
  enum class State { idle, moving, counting, parting };

  static void completed(void* request, ucs_status_t status, void* channel);
  static void failed(void* channel, ucp_ep_h endpoint, ucs_status_t status);
  void started(ucs_status_ptr_t request);
  void fail(ucs_status_t status);
  void put(const void* from, std::size_t bytes, std::uint64_t to_offset, ucp_mem_h handle);
  void flush();
  std::byte* staged(std::uint64_t offset) const { return local_.data() + offset; }

  Fabric& fabric_;
  Arena& local_;
  const Geometry geometry_;
  const std::uint32_t self_;
  const std::uint32_t peer_;
  const std::uint64_t epoch_;
  const std::uint64_t remote_;  // the peer's arena, its own address
  ucp_ep_h endpoint_ = nullptr;
  ucp_rkey_h rkey_ = nullptr;
  std::byte* mapped_ = nullptr;

  std::vector<Message> queue_;  // message i at i % windows; written before queued_ covers it
  std::atomic<std::uint64_t> queued_{0};
  std::atomic<std::uint64_t> done_{0};
  std::atomic<bool> parting_{false};
  std::atomic<ucs_status_t> broken_{UCS_OK};

  // The progress thread's own.
  State state_ = State::idle;
  std::uint64_t taken_ = 0;
  std::uint64_t outstanding_ = 0;
  std::atomic<bool> parted_{false};
  ucs_status_ptr_t closing_ = nullptr;
};

}  // namespace blsrdma
