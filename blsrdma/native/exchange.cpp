#include "exchange.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace blsrdma {

Exchange::Exchange(std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> arena, const Config& config)
    : fabric_(std::move(fabric)),
      arena_(std::move(arena)),
      config_(config),
      channels_(config.geometry.ranks),
      pidfds_(config.geometry.ranks, -1),
      // As many records as windows: those of the lag + 1 iterations in flight, and released ones behind them.
      records_(config.geometry.windows),
      seen_(config.geometry.ranks, 0),
      stats_(config.geometry.ranks),
      starts_(config.geometry.ranks) {
  if (config.geometry.arena_bytes > arena_->bytes()) throw std::invalid_argument("the arena is smaller than its geometry");
  for (auto& each : records_) each.lengths.resize(config.geometry.ranks);
}

Exchange::~Exchange() {
  for (int fd : pidfds_) {
    if (fd >= 0) ::close(fd);
  }
  if (channels_.empty()) return;
  for (auto& each : channels_) each.release();
  new std::pair(fabric_, arena_);
}

void Exchange::connect(const std::vector<PeerAddress>& peers, std::vector<int> pidfds, std::uint64_t deadline_ns) {
  pidfds_ = std::move(pidfds);
  fabric_->call([&] {
    for (const PeerAddress& peer : peers) {
      auto channel = std::make_unique<Channel>(*fabric_, *arena_, config_.geometry, config_.rank, peer, config_.epoch,
                                               config_.allow_direct);
      fabric_->attach(channel.get());
      channel->warm_up();
      channels_[peer.rank] = std::move(channel);
    }
  });
  std::string missing;
  const auto settled = [&] {
    missing.clear();
    for (const auto& each : channels_) {
      if (!each) continue;
      if (each->broken() != UCS_OK) throw UcxError("cannot connect to rank " + std::to_string(each->peer()), each->broken());
      if (!each->warm()) missing += (missing.empty() ? "" : ", ") + std::to_string(each->peer());
    }
    return missing.empty();
  };
  if (!fabric_->until(settled, deadline_ns)) {
    throw std::runtime_error("the first put has not completed to ranks " + missing);
  }
}

Counter* Exchange::counter_line(std::uint32_t source) const {
  return reinterpret_cast<Counter*>(arena_->data() + config_.geometry.control(source) + kCounterOffset);
}

// Whether every peer's message of `iteration` is here. Polls only the counters that are behind.
bool Exchange::arrived(std::uint64_t iteration) {
  if (iteration < complete_) return true;
  bool all = true;
  for (std::uint32_t q = 0; q < seen_.size(); ++q) {
    if (seen_[q] > iteration || q == config_.rank) continue;
    seen_[q] = poll(counter_line(q), config_.epoch, seen_[q]);
    all &= seen_[q] > iteration;
  }
  if (all) complete_ = iteration + 1;
  return all;
}

Outcome Exchange::await(std::uint64_t iteration, std::uint64_t deadline_ns) {
  if (arrived(iteration)) return Outcome::ok;
  // Each peer that is behind is charged with the time until its counter comes.
  const std::uint64_t start = now_ns();
  behind_.clear();
  for (std::uint32_t q = 0; q < seen_.size(); ++q) {
    if (q != config_.rank && seen_[q] <= iteration) behind_.push_back(q);
  }
  const auto charge = [&](std::uint32_t q) { stats_[q].wait_ns += now_ns() - start; };
  Backoff backoff(config_.wait);
  for (;;) {
    const bool slow_checks = backoff.pause();
    if (arrived(iteration)) {
      std::for_each(behind_.begin(), behind_.end(), charge);
      return Outcome::ok;
    }
    std::erase_if(behind_, [&](std::uint32_t q) {
      if (seen_[q] <= iteration) return false;
      charge(q);
      return true;
    });
    if (!slow_checks) continue;
    const Outcome failure = find_failure(iteration);
    if (failure != Outcome::ok || now_ns() >= deadline_ns) {
      std::for_each(behind_.begin(), behind_.end(), charge);
      return failure != Outcome::ok ? failure : fail(Outcome::timeout, behind_.front(), iteration, "");
    }
  }
}

Outcome Exchange::fail(Outcome outcome, std::uint32_t rank, std::uint64_t iteration, std::string text) {
  details_ = {rank, iteration, 0, 0, std::move(text)};
  return outcome;
}

bool Exchange::dead(std::uint32_t peer) const {
  if (pidfds_[peer] < 0) return false;
  pollfd fd{pidfds_[peer], POLLIN, 0};  // a pidfd is readable once its process has ended
  return ::poll(&fd, 1, 0) == 1 && (fd.revents & POLLIN);
}

std::optional<Farewell> Exchange::farewell_of(std::uint32_t source) const {
  Farewell copy;
  std::memcpy(&copy, arena_->data() + config_.geometry.control(source) + kFarewellOffset, sizeof copy);
  if (!copy.intact(config_.epoch)) return std::nullopt;
  std::atomic_thread_fence(std::memory_order_acquire);  // counters are read after it
  return copy;
}

// Why `iteration` will not complete, if that is known: a peer that is behind has died or has left.
Outcome Exchange::find_failure(std::uint64_t iteration) {
  const std::uint32_t ranks = config_.geometry.ranks;
  // Asked before the counters are read again: a peer may post and end in between.
  std::vector<bool> gone(ranks);
  std::vector<std::optional<Farewell>> words(ranks);
  for (std::uint32_t q = 0; q < ranks; ++q) {
    if (q == config_.rank || seen_[q] > iteration) continue;
    gone[q] = dead(q);
    words[q] = farewell_of(q);
  }
  if (arrived(iteration)) return Outcome::ok;
  // The origin of a failure before those who only pass it on: errors, then deaths, then plain departures.
  for (std::uint32_t q = 0; q < ranks; ++q) {
    if (seen_[q] <= iteration && words[q] && words[q]->code == Farewell::kErred && iteration >= words[q]->posted) {
      return fail(Outcome::peer_erred, q, iteration, std::string(words[q]->text, words[q]->text_bytes));
    }
  }
  for (std::uint32_t q = 0; q < ranks; ++q) {
    if (q == config_.rank || seen_[q] > iteration) continue;
    if (gone[q] && !words[q]) return fail(Outcome::peer_died, q, iteration, "its process has ended");
    const ucs_status_t broken = channels_[q]->broken();
    if (broken != UCS_OK && !words[q]) {
      return fail(Outcome::peer_died, q, iteration, std::string("connection lost: ") + ucs_status_string(broken));
    }
  }
  for (std::uint32_t q = 0; q < ranks; ++q) {
    if (seen_[q] > iteration || !words[q] || iteration < words[q]->posted) continue;
    const std::string text(words[q]->text, words[q]->text_bytes);
    if (words[q]->code == Farewell::kBereaved && words[q]->blamed < ranks) {
      return fail(Outcome::peer_erred, words[q]->blamed, iteration, "as rank " + std::to_string(q) + " says: " + text);
    }
    return fail(Outcome::peer_left, q, iteration, text);
  }
  return Outcome::ok;
}

Outcome Exchange::begin(std::uint64_t deadline_ns) {
  const std::uint64_t bound = std::uint64_t{config_.lag} + 1;
  if (next_ >= bound) {
    const Outcome outcome = await(next_ - bound, deadline_ns);
    if (outcome != Outcome::ok) return outcome;
  }
  // A peer whose counter says n works on iteration n, or will; the slowest of them gives the lead.
  for (std::uint32_t q = 0; q < seen_.size(); ++q) {
    if (q == config_.rank) continue;
    seen_[q] = poll(counter_line(q), config_.epoch, seen_[q]);
    if (next_ > seen_[q]) max_lead_ = std::max(max_lead_, next_ - seen_[q]);
  }
  return Outcome::ok;
}

Outcome Exchange::post(const std::byte* data, std::uint64_t items, std::uint64_t item_bytes, const std::int64_t* counts,
                       std::uint64_t tag, std::uint64_t deadline_ns) {
  const std::uint32_t ranks = config_.geometry.ranks;
  const std::uint64_t window = config_.geometry.window_bytes;
  const std::uint64_t bound = std::uint64_t{config_.lag} + 1;
  std::uint64_t sum = 0;
  for (std::uint32_t q = 0; q < ranks; ++q) {
    details_ = {q, next_, static_cast<std::uint64_t>(counts[q]), items, ""};
    if (counts[q] < 0) return Outcome::count_negative;
    if (__builtin_add_overflow(sum, static_cast<std::uint64_t>(counts[q]), &sum)) sum = ~std::uint64_t{0};
  }
  if (sum != items) {
    details_ = {config_.rank, next_, sum, items, ""};
    return Outcome::count_sum;
  }
  // From here on every count is at most `items`, so that no number of bytes exceeds the buffer's.
  for (std::uint32_t q = 0; q < ranks; ++q) {
    const std::uint64_t bytes = static_cast<std::uint64_t>(counts[q]) * item_bytes;
    const bool own_view = q == config_.rank && !config_.copy_self;
    if (bytes > window && !own_view) {
      details_ = {q, next_, bytes, window, ""};
      return Outcome::too_large;
    }
  }
  if (next_ >= bound && !record(next_ - bound).released) {
    details_ = {config_.rank, next_ - bound, 0, 0, ""};
    return Outcome::window_held;
  }
  if (next_ >= bound) {
    const Outcome outcome = await(next_ - bound, deadline_ns);
    if (outcome != Outcome::ok) return outcome;
  }
  // All that can fail has been asked before anything is sent: a peer gets all of an iteration's messages or none.
  for (const auto& each : channels_) {
    if (!each) continue;
    Backoff backoff(config_.wait);
    while (!each->room(next_)) {
      if (!backoff.pause()) continue;
      if (each->broken() != UCS_OK) {
        return fail(Outcome::peer_died, each->peer(), next_,
                    std::string("connection lost: ") + ucs_status_string(each->broken()));
      }
      if (now_ns() >= deadline_ns) return fail(Outcome::timeout, each->peer(), next_, "earlier puts have not left");
    }
  }

  Record& mine = record(next_);
  mine.iteration = next_;
  mine.released = false;
  mine.checked = false;
  mine.tag = tag;
  bool queued = false;
  const std::byte* at = data;
  for (std::uint32_t q = 0; q < ranks; ++q) {
    starts_[q] = at;
    at += static_cast<std::uint64_t>(counts[q]) * item_bytes;
  }
  // Everyone begins with its successor, so that no rank is everybody's first.
  for (std::uint32_t step = 1; step < ranks; ++step) {
    const std::uint32_t q = (config_.rank + step) % ranks;
    const std::uint64_t bytes = static_cast<std::uint64_t>(counts[q]) * item_bytes;
    channels_[q]->post(next_, starts_[q], bytes, tag);
    queued |= !channels_[q]->direct();
    ++stats_[q].messages;
    stats_[q].bytes += bytes;
  }
  const std::uint32_t self = config_.rank;
  mine.own = starts_[self];
  mine.lengths[self] = static_cast<std::uint64_t>(counts[self]) * item_bytes;
  if (config_.copy_self) {
    std::byte* copy = arena_->data() + config_.geometry.window(self, self, next_) + kHeaderBytes;
    if (mine.lengths[self]) std::memcpy(copy, mine.own, mine.lengths[self]);
    mine.own = copy;
  }
  ++stats_[self].messages;
  stats_[self].bytes += mine.lengths[self];
  ++next_;
  if (queued) fabric_->kick();
  return Outcome::ok;
}

Outcome Exchange::wait(std::uint64_t iteration, std::uint64_t deadline_ns) {
  Record& mine = record(iteration);
  if (mine.checked) return Outcome::ok;
  const Outcome outcome = await(iteration, deadline_ns);
  return outcome == Outcome::ok ? check_headers(mine) : outcome;
}

// Lengths and iterations come from a peer: nothing is done with them before they fit.
Outcome Exchange::check_headers(Record& mine) {
  for (std::uint32_t q = 0; q < config_.geometry.ranks; ++q) {
    if (q == config_.rank) continue;
    Header header;
    std::memcpy(&header, arena_->data() + config_.geometry.window(config_.rank, q, mine.iteration), sizeof header);
    if (!header.intact(config_.epoch)) {
      return fail(Outcome::corrupt, q, mine.iteration, "its header does not match its check word");
    }
    if (header.iteration != mine.iteration) {
      return fail(Outcome::corrupt, q, mine.iteration,
                  "its window holds the message of iteration " + std::to_string(header.iteration));
    }
    if (header.length > config_.geometry.window_bytes) {
      return fail(Outcome::corrupt, q, mine.iteration,
                  "its header claims " + std::to_string(header.length) + " bytes in a window of " +
                      std::to_string(config_.geometry.window_bytes));
    }
    if (header.tag != mine.tag) {
      details_ = {q, mine.iteration, header.tag, mine.tag, ""};
      return Outcome::tag_mismatch;
    }
    mine.lengths[q] = header.length;
  }
  mine.checked = true;
  return Outcome::ok;
}

bool Exchange::ready(std::uint64_t iteration) { return record(iteration).checked || arrived(iteration); }

bool Exchange::sent(std::uint64_t iteration) const {
  const Record& mine = record(iteration);
  if (mine.iteration == iteration && !config_.copy_self && !mine.released && mine.lengths[config_.rank]) return false;
  return std::all_of(channels_.begin(), channels_.end(),
                     [&](const auto& each) { return !each || each->sent() > iteration; });
}

void Exchange::release(std::uint64_t iteration) {
  Record& mine = record(iteration);
  if (mine.iteration == iteration) mine.released = true;
}

const std::byte* Exchange::message(std::uint64_t iteration, std::uint32_t source) const {
  if (source == config_.rank) return record(iteration).own;
  return arena_->data() + config_.geometry.window(config_.rank, source, iteration) + kHeaderBytes;
}

std::uint64_t Exchange::length(std::uint64_t iteration, std::uint32_t source) const {
  return record(iteration).lengths[source];
}

std::string Exchange::transport(std::uint32_t peer) const {
  std::string name;
  if (channels_[peer]) fabric_->call([&] { name = channels_[peer]->transport(); });
  return name;
}

bool Exchange::close(std::uint32_t code, std::uint32_t blamed, const std::string& text, std::uint64_t deadline_ns) {
  Farewell word{};
  word.code = code;
  word.blamed = blamed;
  word.posted = next_;
  word.text_bytes = static_cast<std::uint32_t>(std::min(text.size(), Farewell::kTextBytes));
  std::memcpy(word.text, text.data(), word.text_bytes);
  for (const auto& each : channels_) {
    if (each) each->farewell(word);
  }
  fabric_->kick();
  // A peer may write here until it has said farewell itself, or cannot any more.
  const auto quiet = [&] {
    return std::all_of(channels_.begin(), channels_.end(), [&](const auto& each) {
      return !each || (each->drained() && (farewell_of(each->peer()) || dead(each->peer()) || each->broken() != UCS_OK));
    });
  };
  const bool all_quiet = fabric_->until(quiet, deadline_ns);
  bool all_closed = false;
  fabric_->call([&] {
    for (const auto& each : channels_) {
      if (each) each->disconnect();
    }
  });
  const auto disconnected = [&] {
    bool all = true;
    for (const auto& each : channels_) all &= !each || each->disconnected();
    return all;
  };
  all_closed = fabric_->until(disconnected, std::max(deadline_ns, deadline_after(1'000'000'000)));
  fabric_->call([&] {
    for (auto& each : channels_) {
      if (!each) continue;
      fabric_->detach(each.get());
      if (!all_closed) each.release();  // leaked on purpose: UCX may still call back into it
    }
  });
  channels_.clear();
  return all_quiet && all_closed;
}

}  // namespace blsrdma
