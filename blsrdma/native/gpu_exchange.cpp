#include "gpu_exchange.h"

#include <sched.h>
#include <time.h>

#include <cstring>
#include <stdexcept>

namespace blsrdma {

using cuda::api;
using cuda::check;

namespace {

constexpr std::uint64_t kClearNs = 30'000'000'000;

bool done(cuda::Event event) {
  const cuda::Result result = api().event_query(event);
  if (result != cuda::kNotReady) check(result, "cuEventQuery");
  return result == cuda::kSuccess;
}

}  // namespace

GpuExchange::GpuExchange(std::shared_ptr<cuda::Device> device, std::uint32_t rank, std::uint32_t ranks, const Config& config)
    : device_(std::move(device)), rank_(rank), ranks_(ranks), config_(config), peers_(ranks),
      publisher_(std::make_unique<Publisher>()) {
  const cuda::Entered entered = device_->enter();
  const std::uint64_t bytes = config_.window_stride * config_.windows * ranks_;
  check(api().memory_allocate(&windows_, bytes), "cuMemAlloc");
  for (cuda::Stream* each : {&out_, &publishing_, &in_}) {
    check(api().stream_create(each, cuda::kNonBlocking, 0), "cuStreamCreateWithPriority");
  }
  check(api().event_create(&produced_, cuda::kNoTiming), "cuEventCreate");
  for (std::uint32_t i = 0; i < config_.windows; ++i) {
    auto made = std::make_unique<Slot>();
    made->publisher = publisher_.get();
    made->parcels.resize(ranks_);
    for (cuda::Event* each : {&made->sent, &made->arrived, &made->released}) {
      check(api().event_create(each, cuda::kNoTiming), "cuEventCreate");
    }
    slots_.push_back(std::move(made));
  }
  check(api().fill(windows_, 0, bytes, out_), "cuMemsetD8Async");
  for (const std::uint64_t until = deadline_after(kClearNs); !idle();) {  // before any peer is told of them
    if (now_ns() > until) throw cuda::Error("the device has not cleared its windows within 30 s: it is held up", -1);
    sched_yield();
  }
}

GpuExchange::~GpuExchange() {
  if (!windows_) return;
  // Not closed: the device may still be at work with all of this.
  {
    const std::lock_guard lock(publisher_->mutex);
    publisher_->over = true;
  }
  for (auto& each : slots_) each.release();
  publisher_.release();
  new std::pair(device_, arena_);
}

std::string GpuExchange::ipc_handle() const {
  const cuda::Entered entered = device_->enter();
  cuda::IpcHandle handle{};
  check(api().ipc_handle(&handle, windows_), "cuIpcGetMemHandle");
  return {handle.bytes, sizeof handle.bytes};
}

bool GpuExchange::map(std::uint32_t peer, const std::string& ipc_handle) {
  const cuda::Entered entered = device_->enter();
  cuda::IpcHandle handle{};
  std::memcpy(handle.bytes, ipc_handle.data(), std::min(ipc_handle.size(), sizeof handle.bytes));
  const cuda::Result result = api().ipc_open(&peers_[peer].windows, handle, cuda::kLazyPeerAccess);
  if (result == cuda::kSuccess) return true;
  peers_[peer] = {0, cuda::Error("cuIpcOpenMemHandle", result).what()};
  return false;
}

// Copies from and to page-locked memory do not make the host wait. Where the system does not allow it, they do.
void GpuExchange::pin(void* memory, std::uint64_t bytes) {
  if (bytes && api().host_register(memory, bytes, cuda::kPortable) == cuda::kSuccess) pins_.push_back(memory);
}

void GpuExchange::attach(std::shared_ptr<Exchange> core, std::shared_ptr<Arena> arena) {
  core_ = publisher_->core = std::move(core);
  arena_ = std::move(arena);
  const cuda::Entered entered = device_->enter();
  bool any_staged = false, any_put = false;
  for (std::uint32_t q = 0; q < ranks_; ++q) {
    if (q == rank_ || mapped(q)) continue;
    any_staged = true;
    const Geometry& geometry = core_->geometry();
    std::byte* there = core_->place(q, 0);
    if (there) pin(there - kHeaderBytes, geometry.windows * geometry.window_stride);
    any_put |= !there;
  }
  if (!any_staged) return;
  pin(arena_->data(), arena_->bytes());
  const std::uint64_t bytes = config_.window_stride * config_.windows * ranks_;
  check(api().memory_allocate(&staged_out_, bytes), "cuMemAlloc");
  if (any_put) check(api().host_allocate(reinterpret_cast<void**>(&pinned_), bytes), "cuMemAllocHost");
}

// Where a staged message leaves from, in host memory.
std::byte* GpuExchange::out(std::uint32_t peer, std::uint64_t iteration) const {
  std::byte* there = core_->place(peer, iteration);
  return there ? there : pinned_ + window(peer, iteration);
}

Outcome GpuExchange::announce(const std::uint64_t* bytes, std::uint64_t tag, std::uint64_t deadline_ns) {
  for (std::uint32_t q = 0; q < ranks_; ++q) {
    if (q != rank_ && bytes[q] > config_.window_bytes) throw std::length_error("a message is larger than its window");
  }
  const std::uint64_t iteration = core_->next();
  const Outcome outcome = core_->announce(bytes, tag, deadline_ns);
  if (outcome != Outcome::ok) return outcome;
  announced_ = iteration + 1;
  Slot& mine = slot(iteration);
  mine.iteration = iteration;
  mine.tag = tag;
  mine.from = 0;
  for (std::uint32_t q = 0; q < ranks_; ++q) {
    mine.parcels[q] = {q == rank_ || mapped(q) ? nullptr : out(q, iteration), bytes[q]};
  }
  return Outcome::ok;
}

cuda::Address GpuExchange::address(std::uint32_t peer) const {
  const std::uint64_t iteration = announced_ - 1;
  if (peer == rank_) return windows_ + window(rank_, iteration);
  if (mapped(peer)) return peers_[peer].windows + window(rank_, iteration);
  return staged_out_ + window(peer, iteration);
}

// A peer's window is free by the rule of reuse, and memory to be staged from by the same: what was sent from it has arrived.
// Of one's own window only this device knows: it held the message of the iteration that had this slot before.
void GpuExchange::order_for_writing(cuda::Stream stream) {
  if (announced_ <= config_.windows) return;
  const cuda::Entered entered = device_->enter();
  check(api().stream_wait(stream, slot(announced_ - 1).released, 0), "cuStreamWaitEvent");
}

void GpuExchange::send(cuda::Address from, cuda::Stream stream) {
  const std::uint64_t iteration = announced_ - 1;
  Slot& mine = slot(iteration);
  const cuda::Entered entered = device_->enter();
  check(api().event_record(produced_, stream), "cuEventRecord");
  check(api().stream_wait(out_, produced_, 0), "cuStreamWaitEvent");
  mine.from = from;
  mine.own_offset = 0;
  for (std::uint32_t q = 0; q < rank_; ++q) mine.own_offset += mine.parcels[q].bytes;
  // Everyone begins with its successor, so that no rank is everybody's first.
  cuda::Address at = from + mine.own_offset;
  for (std::uint32_t step = 0; step < ranks_; ++step) {
    const std::uint32_t q = (rank_ + step) % ranks_;
    if (q == 0) at = from;
    const auto& [on_host, bytes] = mine.parcels[q];
    const cuda::Address source = from ? at : address(q);
    const cuda::Address to = on_host ? reinterpret_cast<cuda::Address>(on_host) : address(q);
    if (q != rank_ && bytes && source != to) check(api().copy(to, source, bytes, out_), "cuMemcpyAsync");
    at += bytes;
  }
  check(api().event_record(mine.sent, out_), "cuEventRecord");
  // A stream of its own for the counters: the copies of later iterations need not wait for a host function.
  check(api().stream_wait(publishing_, mine.sent, 0), "cuStreamWaitEvent");
  const std::uint64_t bound = std::uint64_t{config_.lag} + 1;
  if (iteration >= bound) check(api().stream_wait(publishing_, slot(iteration - bound).released, 0), "cuStreamWaitEvent");
  handed_ = announced_;
  if (ranks_ == 1) return core_->publish(iteration, mine.tag, mine.parcels);  // nobody is told, nor holds this rank back
  // By the time this slot is used again it has run: the iteration that allows that took every peer's message, and theirs this
  // counter.
  check(api().host_function(publishing_, publish, &mine), "cuLaunchHostFunc");
}

// On a thread of the driver's, which may call nothing of CUDA.
void GpuExchange::publish(void* slot) {
  const Slot& mine = *static_cast<Slot*>(slot);
  const std::lock_guard lock(mine.publisher->mutex);
  if (!mine.publisher->over) mine.publisher->core->publish(mine.iteration, mine.tag, mine.parcels);
}

Outcome GpuExchange::wait(std::uint64_t iteration, cuda::Stream stream, std::uint64_t deadline_ns) {
  const Outcome outcome = core_->wait(iteration, deadline_ns);
  if (outcome != Outcome::ok) return outcome;
  Slot& mine = slot(iteration);
  const cuda::Entered entered = device_->enter();
  if (iteration < handed_) check(api().stream_wait(stream, mine.sent, 0), "cuStreamWaitEvent");  // one's own message
  if (!staged_out_) return outcome;
  if (mine.landed != iteration) {
    // Nobody uses these windows: that a peer has posted this iteration means that it has seen this rank's counter of
    // iteration - lag - 1, which was published behind the release of what was here before, iteration - windows.
    for (std::uint32_t q = 0; q < ranks_; ++q) {
      const std::byte* from = q == rank_ ? nullptr : core_->message(iteration, q);
      const std::uint64_t bytes = core_->length(iteration, q);
      if (!from || !bytes) continue;
      check(api().copy(windows_ + window(q, iteration), reinterpret_cast<cuda::Address>(from), bytes, in_), "cuMemcpyAsync");
    }
    check(api().event_record(mine.arrived, in_), "cuEventRecord");
    mine.landed = iteration;
  }
  check(api().stream_wait(stream, mine.arrived, 0), "cuStreamWaitEvent");
  return outcome;
}

cuda::Address GpuExchange::message(std::uint64_t iteration, std::uint32_t source) const {
  const Slot& mine = slot(iteration);
  if (source == rank_ && mine.from) return mine.from + mine.own_offset;
  return windows_ + window(source, iteration);
}

void GpuExchange::release(std::uint64_t iteration, cuda::Stream stream) {
  Slot& mine = slot(iteration);
  if (mine.iteration != iteration || mine.released_of == iteration) return;
  const cuda::Entered entered = device_->enter();
  check(api().event_record(mine.released, stream), "cuEventRecord");
  mine.released_of = iteration;
  core_->release(iteration);
}

bool GpuExchange::sent(std::uint64_t iteration) {
  Slot& mine = slot(iteration);
  if (mine.iteration != iteration) return true;
  if (iteration >= handed_) return false;
  const cuda::Entered entered = device_->enter();
  if (!done(mine.sent)) return false;
  if (!mine.from || !mine.parcels[rank_].bytes) return true;
  return mine.released_of == iteration && done(mine.released);  // its own message is a view
}

void GpuExchange::order_after_sent(std::uint64_t iteration, cuda::Stream stream) {
  const Slot& mine = slot(iteration);
  if (mine.iteration != iteration || iteration >= handed_) return;
  const cuda::Entered entered = device_->enter();
  check(api().stream_wait(stream, mine.sent, 0), "cuStreamWaitEvent");
  if (mine.released_of == iteration) check(api().stream_wait(stream, mine.released, 0), "cuStreamWaitEvent");
}

bool GpuExchange::idle() {
  bool all = true;
  for (const cuda::Stream each : {out_, publishing_, in_}) {
    const cuda::Result result = api().stream_query(each);
    if (result != cuda::kNotReady) check(result, "cuStreamQuery");
    all &= result == cuda::kSuccess;
  }
  return all;
}

bool GpuExchange::quiesce(std::uint64_t deadline_ns) {
  bool at_rest = false;
  try {
    const cuda::Entered entered = device_->enter();
    while (!(at_rest = idle()) && now_ns() < deadline_ns) {
      const timespec nap{0, 50'000};
      nanosleep(&nap, nullptr);
    }
  } catch (const cuda::Error&) {  // the device has failed: it writes nothing any more, but nothing of it can be freed
  }
  {
    const std::lock_guard lock(publisher_->mutex);
    publisher_->over = true;
  }
  // An iteration that was announced and not sent: a kernel of the caller's may be writing it.
  if (!at_rest || announced_ != handed_) return false;
  // What a peer's arena is mapped to goes with the Exchange's channels.
  for (void* each : pins_) api().host_unregister(each);
  pins_.clear();
  for (Peer& each : peers_) {
    if (each.windows) check(api().ipc_close(std::exchange(each.windows, 0)), "cuIpcCloseMemHandle");
  }
  return quiescent_ = true;
}

void GpuExchange::close(bool quiet) {
  if (!quiet || !quiescent_ || !windows_) return;
  const cuda::Entered entered = device_->enter();
  for (const auto& each : slots_) {
    for (const cuda::Event event : {each->sent, each->arrived, each->released}) api().event_destroy(event);
  }
  api().event_destroy(produced_);
  for (const cuda::Stream each : {out_, publishing_, in_}) api().stream_destroy(each);
  if (pinned_) api().host_free(pinned_);
  if (staged_out_) api().memory_free(staged_out_);
  check(api().memory_free(windows_), "cuMemFree");
  windows_ = 0;
}

}  // namespace blsrdma
