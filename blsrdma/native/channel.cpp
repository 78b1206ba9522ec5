#include "channel.h"

#include <algorithm>
#include <cstring>

namespace blsrdma {

Channel::Channel(Fabric& fabric, Arena& local, const Geometry& geometry, std::uint32_t self, const PeerAddress& peer,
                 std::uint64_t epoch, bool allow_direct)
    : fabric_(fabric),
      local_(local),
      geometry_(geometry),
      self_(self),
      peer_(peer.rank),
      epoch_(epoch),
      remote_(peer.arena),
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
  if (status != UCS_OK) throw UcxError("cannot reach the windows of " + whom, status);
  if (!allow_direct) return;
  void* mapped = nullptr;
  if (ucp_rkey_ptr(rkey_, remote_, &mapped) != UCS_OK) return;
  // A segment of the same name on another host, or in another namespace, would map as well: only the token tells.
  if (std::memcmp(mapped, peer.token.data(), std::min<std::size_t>(peer.token.size(), kLine)) == 0) {
    mapped_ = static_cast<std::byte*>(mapped);
  }
}

Channel::~Channel() = default;

std::string Channel::transport() const {
  ucp_transport_entry_t entries[8];
  ucp_ep_attr_t attributes{};
  attributes.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS;
  attributes.transports.entries = entries;
  attributes.transports.num_entries = std::size(entries);
  attributes.transports.entry_size = sizeof(ucp_transport_entry_t);
  if (broken() != UCS_OK || ucp_ep_query(endpoint_, &attributes) != UCS_OK) return "unknown";
  std::vector<std::string> names;
  for (unsigned i = 0; i < attributes.transports.num_entries; ++i) {
    std::string name = std::string(entries[i].transport_name) + "/" + entries[i].device_name;
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(std::move(name));
  }
  std::string joined;
  for (const auto& name : names) joined += (joined.empty() ? "" : ",") + name;
  return joined;
}

void Channel::post(std::uint64_t iteration, const std::byte* data, std::uint64_t length, std::uint64_t tag) {
  const Header header = Header::of(iteration, length, tag, epoch_);
  if (mapped_) {
    std::byte* window = mapped_ + geometry_.window(peer_, self_, iteration);
    std::memcpy(window, &header, sizeof header);
    if (length) std::memcpy(window + kHeaderBytes, data, length);
    publish(reinterpret_cast<Counter*>(mapped_ + geometry_.control(self_)), Counter::of(iteration + 1, epoch_));
    done_.store(iteration + 1, std::memory_order_relaxed);
    return;
  }
  std::memcpy(staged(geometry_.staged_header(peer_, iteration)), &header, sizeof header);
  queue_[iteration % geometry_.windows] = {data, length};
  queued_.store(iteration + 1, std::memory_order_release);
}

void Channel::farewell(Farewell record) {
  record.check = record.digest(epoch_);
  if (mapped_) {
    std::memcpy(mapped_ + geometry_.control(self_) + kFarewellOffset, &record, sizeof record);
    parted_.store(true);
    return;
  }
  std::memcpy(staged(geometry_.staging(peer_) + kLine), &record, sizeof record);
  parting_.store(true, std::memory_order_release);
}

bool Channel::waiting() const {
  if (mapped_ || broken() != UCS_OK) return false;
  return queued_.load(std::memory_order_acquire) != done_.load(std::memory_order_relaxed) ||
         parting_.load(std::memory_order_acquire) != parted_.load();
}

void Channel::fail(ucs_status_t status) {
  ucs_status_t fine = UCS_OK;
  broken_.compare_exchange_strong(fine, status, std::memory_order_acq_rel);
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

void Channel::warm_up() {
  if (mapped_) return;
  put(staged(geometry_.staging(peer_)), sizeof(Counter), geometry_.control(self_) + kWarmupOffset, local_.handle());
  flush();
}

bool Channel::advance() {
  if (mapped_ || outstanding_ || broken() != UCS_OK) return false;
  switch (state_) {
    case State::idle: {
      const std::uint64_t queued = queued_.load(std::memory_order_acquire);
      if (taken_ < queued) {
        for (; taken_ < queued; ++taken_) {
          const Message& message = queue_[taken_ % geometry_.windows];
          const std::uint64_t window = geometry_.window(peer_, self_, taken_);
          if (message.length) put(message.data, message.length, window + kHeaderBytes, nullptr);
          put(staged(geometry_.staged_header(peer_, taken_)), kHeaderBytes, window, local_.handle());
        }
        flush();  // covers every put above; its success alone proves nothing, see completed()
        state_ = State::moving;
        return true;
      }
      if (parting_.load(std::memory_order_acquire) && !parted_.load()) {
        put(staged(geometry_.staging(peer_) + kLine), sizeof(Farewell), geometry_.control(self_) + kFarewellOffset,
            local_.handle());
        flush();
        state_ = State::parting;
        return true;
      }
      return false;
    }
    case State::moving: {
      const Counter counter = Counter::of(taken_, epoch_);
      std::memcpy(staged(geometry_.staging(peer_)), &counter, sizeof counter);
      put(staged(geometry_.staging(peer_)), sizeof counter, geometry_.control(self_) + kCounterOffset,
          local_.handle());
      state_ = State::counting;
      return true;
    }
    case State::counting:
      done_.store(taken_, std::memory_order_release);
      state_ = State::idle;
      return true;
    case State::parting:
      parted_.store(true);
      state_ = State::idle;
      return true;
  }
  return false;
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
  if (outstanding_) return false;  // cancelled puts still refer to the rkey until they complete
  if (rkey_) ucp_rkey_destroy(rkey_);
  rkey_ = nullptr;
  return true;
}

}  // namespace blsrdma
