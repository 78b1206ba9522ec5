// The exchange on windows in device memory: messages never pass through the host where one GPU can write another's memory.
//
// Headers, counters and everything that can go wrong are those of an Exchange, in host memory; here is where the messages are
// and in which order the device works. Per peer one of two ways, chosen when it is connected:
//   ipc     its windows are mapped here (CUDA IPC): messages are written into them by copies, or by the caller's kernel.
//   staged  messages go through the Exchange's windows in host memory: copied there on the way out (into the peer's own, if
//           these are mapped; else into a pinned buffer from where UCX puts them), and from there into a device window, of
//           the same place, on the way in.
//
// The order, all of it by streams and events; the host waits for counters only, the device for the host never:
//   message i leaves          the copies of i wait for what the caller's stream held at send() (its producers);
//   counter i is published    by a host function behind those copies, and behind everything that uses this rank's windows of
//                             i - lag - 1: the caller's stream as it was at release(). (What has used a staged message was
//                             behind the copy out of its host window.) For that counter is what lets peers write these
//                             windows again (blsrdma/windows.py);
//   message i is used         by work that is launched after wait(), which has seen the counter on the host.
// A peer's copies are complete, on its device, before the host function that stores its counter runs; work that is launched here
// after that counter has been seen finds them.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda.h"
#include "exchange.h"

namespace blsrdma {

class GpuExchange {
 public:
  struct Config {
    std::uint64_t window_bytes = 0;   // the largest message
    std::uint64_t window_stride = 0;  // bytes from one device window to the next
    std::uint32_t windows = 0;        // per source
    std::uint32_t lag = 0;
  };

  // Allocates and clears this rank's windows: those of source q begin at (q * windows) strides.
  GpuExchange(std::shared_ptr<cuda::Device> device, std::uint32_t rank, std::uint32_t ranks, const Config& config);
  ~GpuExchange();  // after close(); else everything is leaked on purpose
  GpuExchange(const GpuExchange&) = delete;
  GpuExchange& operator=(const GpuExchange&) = delete;

  std::string ipc_handle() const;  // of this rank's windows; 64 bytes
  // Map a peer's windows: whether this device can write them. Not for oneself.
  bool map(std::uint32_t peer, const std::string& ipc_handle);
  const std::string& why_not(std::uint32_t peer) const { return peers_[peer].why_not; }
  bool mapped(std::uint32_t peer) const { return peers_[peer].windows != 0; }
  // Then, once all ranks are here: the exchange that has the headers.
  void attach(std::shared_ptr<Exchange> core, std::shared_ptr<Arena> arena);

  // Take the next iteration, with bytes[q] for rank q; then address(q) may be written.
  Outcome announce(const std::uint64_t* bytes, std::uint64_t tag, std::uint64_t deadline_ns);
  // Where the message for `peer` of the announced iteration belongs, in memory of this device or mapped; one's own too. For
  // work that is put on `stream` after order_for_writing(): what this device still does with the memory comes first.
  cuda::Address address(std::uint32_t peer) const;
  void order_for_writing(cuda::Stream stream);
  // Send what was announced: from `from`, where the messages lie one after the other in rank order, or, with 0, what is at the
  // addresses. After what is on `stream` now. `from` is read until sent(). Throws cuda::Error: then the device is of no use.
  void send(cuda::Address from, cuda::Stream stream);
  // Wait until the iteration is complete; work launched on `stream` afterwards finds it.
  Outcome wait(std::uint64_t iteration, cuda::Stream stream, std::uint64_t deadline_ns);
  // After wait(): where rank `source`'s message is.
  cuda::Address message(std::uint64_t iteration, std::uint32_t source) const;
  // Nothing but what is on `stream` now uses the messages.
  void release(std::uint64_t iteration, cuda::Stream stream);
  // Whether the messages of the iteration have left `from`, and, on a stream, behind which everything may overwrite it.
  bool sent(std::uint64_t iteration);
  void order_after_sent(std::uint64_t iteration, cuda::Stream stream);

  // Nothing of this rank writes a peer's device memory any more, and its mappings are closed; false: at the deadline the
  // device was still at work, or has failed, and this has to be kept. Before the Exchange's close(), which tells the peers.
  bool quiesce(std::uint64_t deadline_ns);
  // After the Exchange's close(): frees the windows if nobody can write them any more.
  void close(bool quiet);
  std::uint64_t device_bytes() const { return config_.window_stride * config_.windows * ranks_ + staging_bytes(); }

 private:
  // What a host function touches: it may run late, so this is leaked rather than freed under it.
  struct Publisher {
    std::mutex mutex;   // guards `over` against a publish() under way
    bool over = false;  // nothing is published any more
    std::shared_ptr<Exchange> core;
  };
  struct Slot {  // of an iteration in flight; iteration i has slot i % windows
    Publisher* publisher = nullptr;
    std::uint64_t iteration = kNever;
    std::uint64_t tag = 0;
    std::vector<Exchange::Parcel> parcels;
    cuda::Address from = 0;            // what was sent; 0: what was at the addresses
    std::uint64_t own_offset = 0;      // of one's own message behind `from`
    std::uint64_t landed = kNever;     // the iteration whose staged messages `arrived` is about
    std::uint64_t released_of = kNever;  // the iteration whose last use `released` is about
    cuda::Event sent = nullptr, arrived = nullptr, released = nullptr;
  };
  struct Peer {
    cuda::Address windows = 0;  // its windows, mapped here; 0: staged
    std::string why_not;
  };

  static void publish(void* slot);
  Slot& slot(std::uint64_t iteration) const { return *slots_[iteration % slots_.size()]; }
  std::uint64_t window(std::uint32_t source, std::uint64_t iteration) const {
    return (source * config_.windows + iteration % config_.windows) * config_.window_stride;
  }
  std::byte* out(std::uint32_t peer, std::uint64_t iteration) const;
  std::uint64_t staging_bytes() const { return staged_out_ ? config_.window_stride * config_.windows * ranks_ : 0; }
  bool idle();
  void pin(void* memory, std::uint64_t bytes);

  std::shared_ptr<cuda::Device> device_;
  const std::uint32_t rank_;
  const std::uint32_t ranks_;
  const Config config_;
  std::shared_ptr<Exchange> core_;
  std::shared_ptr<Arena> arena_;
  std::vector<void*> pins_;  // host memory that has been page-locked for copies
  cuda::Address windows_ = 0;
  cuda::Address staged_out_ = 0;  // device memory for messages that a kernel writes and that have to be staged
  std::byte* pinned_ = nullptr;   // sources of UCX's puts
  std::vector<Peer> peers_;
  std::unique_ptr<Publisher> publisher_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::uint64_t announced_ = 0;  // iterations below this have been announced,
  std::uint64_t handed_ = 0;     // and these have been given to the device to send
  cuda::Stream out_ = nullptr, publishing_ = nullptr, in_ = nullptr;
  cuda::Event produced_ = nullptr;
  bool quiescent_ = false;
};

}  // namespace blsrdma
