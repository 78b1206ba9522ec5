// Exchange: the sending side, and the end.
#include <algorithm>
#include <cstring>

#include "exchange.h"

namespace blsrdma {

Outcome Exchange::check_counts(std::uint64_t items, const std::int64_t* counts) {
  std::uint64_t sum = 0;
  for (std::uint32_t q = 0; q < channels_.size(); ++q) {
    details_ = {q, next_, static_cast<std::uint64_t>(counts[q]), items, ""};
    if (counts[q] < 0) return Outcome::count_negative;
    if (__builtin_add_overflow(sum, static_cast<std::uint64_t>(counts[q]), &sum)) sum = ~std::uint64_t{0};
  }
  if (sum == items) return Outcome::ok;
  details_ = {config_.rank, next_, sum, items, ""};
  return Outcome::count_sum;
}

bool Exchange::may_post() {
  const Turn turn(busy_);
  if (!turn) return false;
  if (failure_.failed()) return true;
  const std::uint64_t bound = std::uint64_t{config_.lag} + 1;
  if (next_ >= bound) {
    const Record& due = record(next_ - bound);
    if (!due.released) return true;
    if (!inbox_.arrived(next_ - bound) || !due.settled) return false;
  }
  return record(next_).large_to.empty() && std::all_of(channels_.begin(), channels_.end(),
                                                  [&](const auto& each) { return !each || each->room(next_); });
}

// What the record and the staged headers of the next iteration were used for has left this rank.
Outcome Exchange::make_room(std::uint64_t deadline_ns) {
  Record& mine = record(next_);
  const auto free = [&] {
    return failure_.failed() || ((mine.large_to.empty() || large_is_gone(mine)) &&
                                 std::all_of(channels_.begin(), channels_.end(),
                                             [&](const auto& each) { return !each || each->room(next_); }));
  };
  if (!free()) {
    Backoff backoff(config_.wait, Sleeper(arena_->data()), deadline_ns);
    const auto driven = [&] { return drive(), free(); };
    while (!backoff.until(driven, false)) {
      const Outcome outcome = give_up(deadline_ns, next_, "earlier messages have not left");
      if (outcome != Outcome::ok) return outcome;
    }
  }
  return failure_.failed() ? failure(next_) : Outcome::ok;
}

// An iteration that was released before its large messages, if it has any, were pulled: they are not wanted.
Outcome Exchange::settle_released(Record& due, std::uint64_t deadline_ns) {
  if (!due.checked) {
    const Outcome outcome = check_headers(due);
    if (outcome != Outcome::ok) return outcome;
  }
  drop_reads(due);
  const auto idle = [&] {
    drive();
    return due.pulling.load(std::memory_order_acquire) == 0 || failure_.failed();
  };
  Backoff backoff(config_.wait, Sleeper(arena_->data()), deadline_ns);
  while (!backoff.until(idle, false)) {
    const Outcome outcome = give_up(deadline_ns, due.iteration, "it is still being pulled");
    if (outcome != Outcome::ok) return outcome;
  }
  if (failure_.failed()) return failure(due.iteration);
  due.large = 0;
  settle(due);
  return Outcome::ok;
}

// All of a post that can fail, before anything is sent: peers get all of an iteration's messages or none.
Outcome Exchange::admit(std::uint64_t deadline_ns) {
  const std::uint64_t bound = std::uint64_t{config_.lag} + 1;
  if (next_ >= bound) {
    Record& due = record(next_ - bound);
    if (!due.released) return fail(Outcome::window_held, config_.rank, next_ - bound);
    Outcome outcome = await(next_ - bound, deadline_ns);
    if (outcome != Outcome::ok) return outcome;
    if (!due.settled) outcome = settle_released(due, deadline_ns);
    if (outcome != Outcome::ok) return outcome;
  }
  return make_room(deadline_ns);
}

Exchange::Record& Exchange::take(std::uint64_t tag) {
  Record& mine = record(next_);
  mine.iteration = next_++;
  mine.released = mine.checked = mine.settled = false;
  mine.tag = tag;
  return mine;
}

void Exchange::wake_all() {
  // Pairs with the fence of a sleeper: it sees the counters stored above, or we see that it sleeps.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (const auto& each : channels_) {
    if (each) each->wake();
  }
}

Outcome Exchange::post(const std::byte* data, std::uint64_t items, std::uint64_t item_bytes, const std::int64_t* counts,
                       std::uint64_t tag, std::uint64_t deadline_ns) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  if (failure_.failed()) return failure(next_);
  const auto ranks = static_cast<std::uint32_t>(channels_.size());
  const std::uint32_t self = config_.rank;
  Outcome outcome = check_counts(items, counts);
  if (outcome == Outcome::ok) outcome = admit(deadline_ns);
  if (outcome != Outcome::ok) return outcome;

  std::vector<std::uint32_t>& large_to = record(next_).large_to;
  const std::byte* at = data;
  large_to.clear();
  for (std::uint32_t q = 0; q < ranks; ++q) {
    starts_[q] = at;
    const std::uint64_t bytes = static_cast<std::uint64_t>(counts[q]) * item_bytes;
    if (q != self && bytes > config_.geometry.window_bytes) large_to.push_back(q);
    at += bytes;
  }
  const bool keyed = std::any_of(large_to.begin(), large_to.end(), [&](auto q) { return !inbox_.reads(q); });
  if (keyed) register_large(record(next_), data, static_cast<std::uint64_t>(at - data));

  Record& mine = take(tag);
  bool queued = false;
  // Everyone begins with its successor, so that no rank is everybody's first.
  for (std::uint32_t step = 1; step < ranks; ++step) {
    const std::uint32_t q = (self + step) % ranks;
    const std::uint64_t bytes = static_cast<std::uint64_t>(counts[q]) * item_bytes;
    Header header{mine.iteration, bytes, tag, Header::kInline, config_.checksums ? checksum(starts_[q], bytes) : 0, 0};
    if (bytes > config_.geometry.window_bytes) {
      header.kind = Header::kLarge;
      header.seal(config_.epoch);
      Descriptor descriptor{};
      descriptor.address = reinterpret_cast<std::uint64_t>(starts_[q]);
      if (keyed) std::memcpy(descriptor.rkey, rkey_.data(), descriptor.rkey_bytes = rkey_.size());
      descriptor.seal(config_.epoch);
      channels_[q]->post(header, reinterpret_cast<const std::byte*>(&descriptor), sizeof descriptor);
    } else {
      header.seal(config_.epoch);
      channels_[q]->post(header, starts_[q], bytes);
    }
    queued |= !channels_[q]->direct();
    ++stats_[q].messages;
    stats_[q].bytes += bytes;
  }
  mine.own = starts_[self];
  mine.lengths[self] = static_cast<std::uint64_t>(counts[self]) * item_bytes;
  if (config_.copy_self && mine.lengths[self] <= config_.geometry.window_bytes) {
    std::byte* copy = arena_->data() + config_.geometry.window(self, self, mine.iteration) + kHeaderBytes;
    if (mine.lengths[self]) std::memcpy(copy, mine.own, mine.lengths[self]);
    mine.own = copy;
  }
  ++stats_[self].messages;
  stats_[self].bytes += mine.lengths[self];
  published_.store(next_, std::memory_order_release);
  if (queued) fabric_->start();
  wake_all();
  return Outcome::ok;
}

Outcome Exchange::announce(const std::uint64_t* bytes, std::uint64_t tag, std::uint64_t deadline_ns) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  if (failure_.failed()) return failure(next_);
  const Outcome outcome = admit(deadline_ns);
  if (outcome != Outcome::ok) return outcome;
  Record& mine = take(tag);
  mine.own = nullptr;
  mine.large_to.clear();
  mine.lengths[config_.rank] = bytes[config_.rank];
  for (std::uint32_t q = 0; q < channels_.size(); ++q) {
    ++stats_[q].messages;
    stats_[q].bytes += bytes[q];
  }
  return Outcome::ok;
}

void Exchange::publish(std::uint64_t iteration, std::uint64_t tag, const std::vector<Parcel>& parcels) {
  const auto ranks = static_cast<std::uint32_t>(channels_.size());
  for (std::uint32_t step = 1; step < ranks; ++step) {
    const std::uint32_t q = (config_.rank + step) % ranks;
    Header header{iteration, parcels[q].bytes, tag, parcels[q].on_host ? Header::kInline : Header::kDevice, 0, 0};
    header.seal(config_.epoch);
    channels_[q]->post(header, parcels[q].on_host, parcels[q].on_host ? parcels[q].bytes : 0);
  }
  published_.store(iteration + 1, std::memory_order_release);
  if (remote_) fabric_->kick();
  wake_all();
}

void Exchange::register_large(Record& mine, const std::byte* data, std::uint64_t bytes) {
  fabric_->call([&] { mine.registered = arena_->register_buffer(data, bytes, rkey_); });
  if (rkey_.size() <= Descriptor::kRkeyBytes) return;
  fabric_->call([&] { arena_->unregister_buffer(std::exchange(mine.registered, nullptr)); });
  throw UcxError("a remote key of " + std::to_string(rkey_.size()) + " bytes is too long for a window",
                 UCS_ERR_EXCEEDS_LIMIT);
}

// Whether every receiver has pulled this record's large messages, or is gone. Then the buffer is no longer registered.
bool Exchange::large_is_gone(Record& mine) {
  for (const std::uint32_t q : mine.large_to) {
    if (inbox_.pulled(q) <= mine.iteration && !has_left(q)) return false;
  }
  if (mine.registered) {
    fabric_->call([&] { arena_->unregister_buffer(std::exchange(mine.registered, nullptr)); });
  }
  mine.large_to.clear();
  return true;
}

bool Exchange::sent(std::uint64_t iteration) {
  settle_unwanted();  // two ranks that both ask this, and nothing else, must not wait for each other
  Record& mine = record(iteration);
  if (mine.iteration == iteration) {
    const bool own_view = mine.own && !(config_.copy_self && mine.lengths[config_.rank] <= config_.geometry.window_bytes);
    if (own_view && !mine.released && mine.lengths[config_.rank]) return false;
    if (!mine.large_to.empty() && !large_is_gone(mine)) return false;
    if (mine.pulling.load(std::memory_order_acquire)) return false;  // into memory that the caller must keep, too
  }
  return std::all_of(channels_.begin(), channels_.end(),
                     [&](const auto& each) { return !each || each->sent() > iteration; });
}

bool Exchange::close(std::uint32_t code, std::uint32_t blamed, const std::string& text, std::uint64_t deadline_ns) {
  Farewell word{};
  word.code = code;
  word.blamed = blamed;
  word.posted = published_.load(std::memory_order_acquire);
  word.text_bytes = static_cast<std::uint32_t>(std::min(text.size(), Farewell::kTextBytes));
  std::memcpy(word.text, text.data(), word.text_bytes);
  for (const auto& each : channels_) {
    if (each) each->farewell(word);
  }
  fabric_->kick();
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (const auto& each : channels_) {
    if (each) each->wake();
  }
  // A peer may write here, and read a large message, until it has said farewell itself, or cannot any more.
  const auto quiet = [this] {
    return std::all_of(channels_.begin(), channels_.end(),
                       [&](const auto& each) { return !each || (each->drained() && has_left(each->peer())); });
  };
  const bool all_quiet = fabric_->until(quiet, deadline_ns);
  // Every call from here on is bounded too: should the progress thread be stuck, everything is left to it as it is.
  const std::uint64_t last_ns = std::max(deadline_ns, deadline_after(1'000'000'000));
  const bool reached = fabric_->call([this] {
    if (liveness_) liveness_->stop(*fabric_);
    fabric_->detach(doorbell_.get());
    for (const auto& each : channels_) {
      if (each) each->disconnect();
    }
  }, last_ns);
  if (!reached) return false;
  const auto disconnected = [this] {
    bool all = true;
    for (const auto& each : channels_) all &= !each || each->disconnected();
    return all;
  };
  // What a peer has put into a socket or a queue before it died may arrive after its death; its farewell is the last of it.
  bool silent = all_quiet;
  for (const auto& each : channels_) silent &= !each || each->was_direct() || inbox_.farewell(each->peer());
  const bool all_closed = fabric_->until(disconnected, last_ns);
  const bool detached = fabric_->call([this, all_closed, silent] {
    for (auto& each : channels_) {
      if (!each) continue;
      fabric_->detach(each.get());
      if (!all_closed) each.release();  // leaked on purpose: UCX may still call back into it
    }
    for (const auto& each : records_) {
      if (each->registered && silent) arena_->unregister_buffer(std::exchange(each->registered, nullptr));
    }
  }, last_ns);
  if (!detached) return false;
  channels_.clear();
  return silent && all_closed;
}

}  // namespace blsrdma
