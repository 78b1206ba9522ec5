#include "channel.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace blsrdma {

Channel::Channel(Fabric& fabric, Arena& local, const Geometry& geometry, std::uint32_t self, const PeerAddress& peer,
                 std::uint64_t epoch, bool allow_direct, Broken broken)
    : fabric_(fabric),
      local_(local),
      geometry_(geometry),
      self_(self),
      peer_(peer.rank),
      epoch_(epoch),
      remote_(peer.arena),
      on_broken_(std::move(broken)),
      queue_(geometry.windows) {
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(peer.worker_address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler = {failed, this};
  const std::string whom = "rank " + std::to_string(peer_);
  ucs_status_t status = ucp_ep_create(fabric_.worker(), &params, &endpoint_);
  if (status != UCS_OK) throw UcxError("cannot create an endpoint to " + whom, status);
  status = ucp_ep_rkey_unpack(endpoint_, peer.rkey.data(), &rkey_);
  if (status != UCS_OK) {
    disconnect();  // else UCX would report the endpoint's end to a channel that is no more
    if (UCS_PTR_IS_PTR(closing_)) ucp_request_free(closing_);
    throw UcxError("cannot reach the windows of " + whom, status);
  }
  if (!allow_direct) return;
  void* mapped = nullptr;
  if (ucp_rkey_ptr(rkey_, remote_, &mapped) != UCS_OK) return;
  // A segment of the same name on another host, or in another namespace, would map as well: only the token tells.
  if (std::memcmp(mapped, peer.token.data(), std::min<std::size_t>(peer.token.size(), kLine)) == 0) {
    mapped_ = static_cast<std::byte*>(mapped);
    was_direct_ = true;
  }
}

Channel::~Channel() = default;

std::vector<std::string> Channel::lanes() const {
  ucp_transport_entry_t entries[16];
  ucp_ep_attr_t attributes{};
  attributes.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS;
  attributes.transports.entries = entries;
  attributes.transports.num_entries = std::size(entries);
  attributes.transports.entry_size = sizeof(ucp_transport_entry_t);
  std::vector<std::string> lanes;
  if (broken() != UCS_OK || ucp_ep_query(endpoint_, &attributes) != UCS_OK) return lanes;
  for (unsigned i = 0; i < attributes.transports.num_entries; ++i) {
    lanes.push_back(std::string(entries[i].transport_name) + "/" + entries[i].device_name);
  }
  return lanes;
}

bool Channel::gets(bool cma) const {
  bool found = false;
  for (const std::string_view lane : lanes()) {
    if (lane.starts_with("cma/") && !cma) return false;
    for (const char* reading : {"rc_", "dc_", "xpmem/", "cma/"}) found |= lane.starts_with(reading);  // ud only puts
  }
  return found;
}

std::string Channel::transport() const {
  std::vector<std::string> names;
  for (auto& lane : lanes()) {
    if (std::find(names.begin(), names.end(), lane) == names.end()) names.push_back(std::move(lane));
  }
  std::string joined;
  for (const auto& name : names) joined += (joined.empty() ? "" : ",") + name;
  return joined.empty() ? "unknown" : joined;
}

void Channel::post(const Header& header, const std::byte* payload, std::uint64_t bytes) {
  const std::uint64_t iteration = header.iteration;
  if (mapped_) {
    std::byte* window = mapped_ + geometry_.window(peer_, self_, iteration);
    std::memcpy(window, &header, kArrivedOffset);  // not the counter there: the receiver may look at it, see Inbox::look
    if (bytes && payload != window + kHeaderBytes) std::memcpy(window + kHeaderBytes, payload, bytes);
    publish(mapped_counter(kCounterOffset), Counter::of(iteration + 1, epoch_));
    done_.store(iteration + 1, std::memory_order_relaxed);
    return;
  }
  std::byte* staging = staged(geometry_.staged_header(peer_, iteration));
  Header counted = header;
  counted.arrived = Counter::of(iteration + 1, epoch_);
  std::memcpy(staging, &counted, sizeof counted);
  if (header.kind == Header::kLarge) {
    std::memcpy(staging + kHeaderBytes, payload, bytes);
    payload = staging + kHeaderBytes;
  }
  queue_[iteration % geometry_.windows] = {payload, bytes};
  queued_.store(iteration + 1, std::memory_order_release);
}

std::uint64_t Channel::bytes_outstanding() const {
  std::uint64_t bytes = 0;
  const std::uint64_t queued = queued_.load(std::memory_order_acquire);
  for (std::uint64_t i = sent(); i < queued; ++i) bytes += queue_[i % geometry_.windows].bytes;
  return bytes;
}

void Channel::acknowledge(std::uint64_t n) {
  if (mapped_) {
    publish(mapped_counter(kPulledOffset), Counter::of(n, epoch_));
  } else {
    acknowledged_.store(n, std::memory_order_release);
    fabric_.kick();
  }
}

void Channel::farewell(Farewell record) {
  record.check = record.digest(epoch_);
  if (mapped_) {
    store_words(mapped_ + geometry_.control(self_) + kFarewellOffset, record);
    parted_.store(true);
    return;
  }
  std::memcpy(staged(geometry_.staging(peer_) + kStagedFarewell), &record, sizeof record);
  parting_.store(true, std::memory_order_release);
}

bool Channel::waiting() const {
  if (broken() != UCS_OK) return false;
  if (pulling_) return true;
  if (mapped_) return false;
  return outstanding_ || queued_.load(std::memory_order_acquire) != done_.load(std::memory_order_relaxed) ||
         acknowledged_.load(std::memory_order_acquire) != acknowledged_there_.load(std::memory_order_relaxed) ||
         parting_.load(std::memory_order_acquire) != parted_.load();
}

void Channel::fail(ucs_status_t status) {
  ucs_status_t fine = UCS_OK;
  if (broken_.compare_exchange_strong(fine, status, std::memory_order_acq_rel)) on_broken_(peer_, status);
}

void Channel::failed(void* channel, ucp_ep_h, ucs_status_t status) { static_cast<Channel*>(channel)->fail(status); }

void Channel::completed(void* request, ucs_status_t status, void* channel) {
  auto* self = static_cast<Channel*>(channel);
  --self->outstanding_;
  if (status != UCS_OK) self->fail(status);
  ucp_request_free(request);
}

void Channel::started(ucs_status_ptr_t request) {
  if (UCS_PTR_IS_ERR(request)) {
    fail(UCS_PTR_STATUS(request));
  } else if (request) {
    ++outstanding_;  // completed() takes it back, in a later progress, on this thread
  }
}

void Channel::put(const void* from, std::size_t bytes, std::uint64_t to_offset, ucp_mem_h handle) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = completed;
  param.user_data = this;
  if (handle) {
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
    param.memh = handle;
  }
  started(ucp_put_nbx(endpoint_, from, bytes, remote_ + to_offset, rkey_, &param));
}

void Channel::flush() {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = completed;
  param.user_data = this;
  started(ucp_ep_flush_nbx(endpoint_, &param));
}

void Channel::put_counter(std::uint64_t value, std::uint64_t staged_offset, std::uint64_t control_offset) {
  const Counter counter = Counter::of(value, epoch_);
  std::byte* source = staged(geometry_.staging(peer_) + staged_offset);
  std::memcpy(source, &counter, sizeof counter);
  put(source, sizeof counter, geometry_.control(self_) + control_offset, local_.handle());
}

void Channel::warm_up(bool reads) {
  if (mapped_) {
    if (reads) publish(mapped_counter(kReadsOffset), Counter::of(1, epoch_));
    return;
  }
  if (reads) put_counter(1, kStagedReads, kReadsOffset);
  put_counter(++beats_, kStagedHeartbeat, kHeartbeatOffset);
  flush();
}

void Channel::tick(std::uint64_t) {
  beat_due_ = beating_ && !mapped_;
  if (beating_ && mapped_ && !parted_.load()) publish(mapped_counter(kHeartbeatOffset), Counter::of(++beats_, epoch_));
}

// The first put has been acknowledged: the lanes are what they will be.
void Channel::note_order() {
  const auto all = lanes();
  ordered_ = !mapped_ && all.size() == 1 && all[0].starts_with("tcp/");
}

bool Channel::advance() {
  if (mapped_ || !endpoint_ || outstanding_ || broken() != UCS_OK) return false;
  switch (state_) {
    case State::idle: {
      // Once a second, and before the messages: these may never end. After the farewell the memory there may be gone.
      if (beat_due_ && !parting_.load()) {
        beat_due_ = false;
        put_counter(++beats_, kStagedHeartbeat, kHeartbeatOffset);
        state_ = State::minor;
        return true;
      }
      // Before the messages: a counter of this rank lets the peer reuse what its large messages occupied.
      const std::uint64_t acknowledged = acknowledged_.load(std::memory_order_acquire);
      if (acknowledged != acknowledged_there_.load(std::memory_order_relaxed)) {
        put_counter(acknowledged, kStagedPulled, kPulledOffset);
        flush();  // UCX orders nothing between two puts: an older acknowledgement must not land after a newer one
        acknowledged_there_.store(acknowledged, std::memory_order_relaxed);
        state_ = State::minor;
        return true;
      }
      const std::uint64_t queued = queued_.load(std::memory_order_acquire);
      if (taken_ < queued) {
        bool data = false;
        for (; taken_ < queued; ++taken_) {
          const Message& message = queue_[taken_ % geometry_.windows];
          if (!message.bytes) continue;
          put(message.payload, message.bytes, geometry_.window(peer_, self_, taken_) + kHeaderBytes, nullptr);
          data = true;
        }
        // Covers every put above; its success alone proves nothing, see completed().
        if (data && !ordered_) flush();
        state_ = State::moving;
        return true;
      }
      if (parting_.load(std::memory_order_acquire) && !parted_.load()) {
        put(staged(geometry_.staging(peer_) + kStagedFarewell), sizeof(Farewell),
            geometry_.control(self_) + kFarewellOffset, local_.handle());
        flush();
        state_ = State::parting;
        return true;
      }
      return false;
    }
    case State::moving:
      for (; counted_ < taken_; ++counted_) {
        put(staged(geometry_.staged_header(peer_, counted_)), kHeaderBytes, geometry_.window(peer_, self_, counted_),
            local_.handle());
      }
      state_ = State::counting;
      return true;
    case State::counting:
      done_.store(taken_, std::memory_order_release);
      state_ = State::idle;
      return true;
    case State::parting:
      parted_.store(true);
      state_ = State::idle;
      return true;
    case State::minor:
      state_ = State::idle;
      return true;
  }
  return false;
}

void Channel::pull(std::byte* to, std::uint64_t bytes, std::uint64_t from, const std::string& rkey,
                   std::atomic<std::uint32_t>* left) {
  if (broken() != UCS_OK) return pull_failed_.store(true, std::memory_order_release);
  auto* pull = new Pull{this, nullptr, left};
  const ucs_status_t unpacked = ucp_ep_rkey_unpack(endpoint_, rkey.data(), &pull->rkey);
  ++pulling_;
  if (unpacked != UCS_OK) return finish(pull, unpacked);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = pulled;
  param.user_data = pull;
  const ucs_status_ptr_t request = ucp_get_nbx(endpoint_, to, bytes, from, pull->rkey, &param);
  if (!UCS_PTR_IS_PTR(request)) finish(pull, UCS_PTR_STATUS(request));
}

void Channel::pulled(void* request, ucs_status_t status, void* pull) {
  auto* it = static_cast<Pull*>(pull);
  it->channel->finish(it, status);
  ucp_request_free(request);
}

void Channel::finish(Pull* pull, ucs_status_t status) {
  --pulling_;
  if (pull->rkey) ucp_rkey_destroy(pull->rkey);
  if (status == UCS_OK) {
    pull->left->fetch_sub(1, std::memory_order_acq_rel);
  } else {
    fail(status);
    pull_failed_.store(true, std::memory_order_release);
  }
  delete pull;
}

void Channel::disconnect() {
  mapped_ = nullptr;
  if (!endpoint_) return;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  closing_ = ucp_ep_close_nbx(endpoint_, &param);
  endpoint_ = nullptr;
}

bool Channel::disconnected() {
  if (UCS_PTR_IS_PTR(closing_)) {
    if (ucp_request_check_status(closing_) == UCS_INPROGRESS) return false;
    ucp_request_free(closing_);
  }
  closing_ = nullptr;
  if (outstanding_ || pulling_) return false;  // cancelled puts still refer to the rkey until they complete
  if (rkey_) ucp_rkey_destroy(rkey_);
  rkey_ = nullptr;
  return true;
}

}  // namespace blsrdma
