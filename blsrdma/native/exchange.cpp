#include "exchange.h"

#include <algorithm>
#include <cstring>

namespace blsrdma {
namespace {

constexpr std::uint64_t kPiece = 16 << 20;  // bytes of a large message that are read without a look at anything else

}  // namespace

Exchange::Exchange(std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> arena, const Config& config)
    : fabric_(std::move(fabric)),
      arena_(std::move(arena)),
      config_(config),
      inbox_(*arena_, config.geometry, config.rank, config.epoch, config.device_bytes),
      doorbell_(std::make_unique<Doorbell>(Sleeper(arena_->data()))),
      channels_(config.geometry.ranks),
      readers_(config.geometry.ranks),
      stats_(config.geometry.ranks),
      suspicions_(config.geometry.ranks),
      starts_(config.geometry.ranks),
      to_acknowledge_(config.geometry.ranks, 0) {
  if (config.geometry.arena_bytes > arena_->bytes()) throw std::invalid_argument("the arena is smaller than its geometry");
  // As many records as windows: those of the lag + 1 iterations in flight, and released ones behind them.
  for (std::uint32_t i = 0; i < config.geometry.windows; ++i) {
    records_.push_back(std::make_unique<Record>());
    records_.back()->lengths.resize(config.geometry.ranks);
    records_.back()->checksums.resize(config.geometry.ranks);
    records_.back()->placed.resize(config.geometry.ranks);
    records_.back()->on_device.resize(config.geometry.ranks);
  }
}

Exchange::~Exchange() {
  if (channels_.empty()) return;
  // Not closed: the channels may still be driven, and peers may still write. All that these touch is
  // leaked; nothing calls back here any more.
  try {
    fabric_->call([&] {
      if (liveness_) liveness_->stop(*fabric_);
      fabric_->detach(doorbell_.get());
      for (const auto& each : channels_) {
        if (each) each->orphan();
      }
    });
  } catch (const std::runtime_error&) {  // the fabric is closed: its thread has ended
  }
  for (auto& each : channels_) each.release();
  for (auto& each : records_) each.release();  // pulls count down in them
  new std::pair(fabric_, arena_);
}

void Exchange::connect(const std::vector<PeerAddress>& peers, std::vector<int> pidfds, std::uint64_t deadline_ns) {
  liveness_ = std::make_unique<Liveness>(
      inbox_, config_.rank, std::move(pidfds), config_.keepalive_ns,
      [this](std::uint32_t peer, std::string why) { lost(peer, Outcome::peer_died, std::move(why)); });
  const auto broken = [this](std::uint32_t peer, ucs_status_t status) {
    lost(peer, Outcome::peer_died, std::string("its connection is lost: ") + ucs_status_string(status));
  };
  for (const PeerAddress& peer : peers) {
    if (config_.allow_direct) readers_[peer.rank].open(peer.pid, peer.arena, peer.token);
  }
  fabric_->call([&] {
    for (const PeerAddress& peer : peers) {
      auto channel = std::make_unique<Channel>(*fabric_, *arena_, config_.geometry, config_.rank, peer, config_.epoch,
                                               config_.allow_direct, broken);
      fabric_->attach(channel.get());
      channel->warm_up(bool(readers_[peer.rank]));
      if (!liveness_->here(peer.rank)) channel->beat();
      channels_[peer.rank] = std::move(channel);
    }
    liveness_->start(*fabric_);
    fabric_->attach(doorbell_.get());
  });
  // Shared: where the deadline passes first, `settled` may still be run once this call has ended.
  const auto missing = std::make_shared<Remark>();
  const auto settled = [this, missing] {
    std::string cold;
    if (failure_.failed()) {
      throw std::runtime_error("rank " + std::to_string(failure_.rank()) + " cannot be connected: " + failure_.text());
    }
    for (const auto& each : channels_) {
      if (!each) continue;
      if (each->broken() != UCS_OK) {
        throw UcxError("cannot connect to rank " + std::to_string(each->peer()), each->broken());
      }
      if (!each->warm()) cold += (cold.empty() ? "" : ", ") + std::to_string(each->peer());
    }
    missing->set(cold);
    return cold.empty();
  };
  if (!fabric_->until(settled, deadline_ns)) {
    throw std::runtime_error("the first put has not completed to ranks " + missing->get());
  }
  fabric_->call([&] {
    for (const auto& each : channels_) {
      if (each) each->note_order();
    }
  });
  remote_ = std::any_of(channels_.begin(), channels_.end(), [](const auto& each) { return each && !each->direct(); });
}

// --- failures

Outcome Exchange::fail(Outcome outcome, std::uint32_t rank, std::uint64_t iteration, std::string text) {
  details_ = {rank, iteration, 0, 0, std::move(text)};
  return outcome;
}

Outcome Exchange::failure(std::uint64_t iteration) {
  return fail(failure_.outcome(), failure_.rank(), iteration, failure_.text());
}

bool Exchange::has_left(std::uint32_t peer) const {
  return inbox_.farewell(peer) || liveness_->dead(peer) || channels_[peer]->broken() != UCS_OK;
}

// In a turn of the fabric: a peer cannot be reached any more. One that has said farewell may be: it has left.
void Exchange::lost(std::uint32_t peer, Outcome outcome, std::string why) {
  if (!inbox_.farewell(peer)) failure_.set(outcome, peer, std::move(why));
  doorbell_->stirred();
}

// Why `iteration` will not complete, if that is known: a peer that is behind has left.
Outcome Exchange::find_failure(std::uint64_t iteration) {
  if (failure_.failed()) return failure(iteration);
  // Farewells are read before the counters are read again: a peer may post and leave in between.
  std::vector<std::pair<std::uint32_t, Farewell>> words;
  for (const std::uint32_t q : behind_) {
    if (const auto word = inbox_.farewell(q)) words.emplace_back(q, *word);
  }
  if (words.empty() || inbox_.arrived(iteration)) return Outcome::ok;
  // The origin of a failure before those who only pass it on.
  const auto order = [](std::uint32_t code) {
    return code == Farewell::kErred ? 0 : code == Farewell::kBereaved ? 1 : 2;
  };
  std::stable_sort(words.begin(), words.end(),
                   [&](const auto& a, const auto& b) { return order(a.second.code) < order(b.second.code); });
  for (const auto& [q, word] : words) {
    if (iteration < word.posted || inbox_.seen(q) > iteration) continue;  // it posted this one before it left
    const std::string text(word.text, word.text_bytes);
    if (word.code == Farewell::kErred) {
      failure_.set(Outcome::peer_erred, q, text);
    } else if (word.code == Farewell::kBereaved && word.blamed < config_.geometry.ranks && word.blamed != config_.rank) {
      failure_.set(Outcome::peer_erred, word.blamed, "as rank " + std::to_string(q) + " says: " + text);
    } else {
      failure_.set(Outcome::peer_left, q, text);
    }
    return failure(iteration);
  }
  return Outcome::ok;
}

// A counter that has looked wrong twice, a slow check apart, is not one that is just being written.
Outcome Exchange::find_foreign_write(std::uint64_t iteration) {
  for (const std::uint32_t q : behind_) {
    std::string now = inbox_.suspicion(q, next_, config_.lag);
    if (!now.empty() && now == suspicions_[q]) {
      failure_.set(Outcome::corrupt, q, now);
      return failure(iteration);
    }
    suspicions_[q] = std::move(now);
  }
  return Outcome::ok;
}

// --- waiting

Outcome Exchange::await(std::uint64_t iteration, std::uint64_t deadline_ns) {
  if (failure_.failed()) return failure(iteration);
  if (inbox_.arrived(iteration)) return Outcome::ok;
  const std::uint64_t start = now_ns();
  bool all_direct = true;
  behind_.clear();
  for (std::uint32_t q = 0; q < channels_.size(); ++q) {
    if (q == config_.rank || inbox_.seen(q) > iteration) continue;
    behind_.push_back(q);
    all_direct &= channels_[q]->direct();
  }
  // Each peer that is behind is charged with the time until its counter comes.
  const auto charge = [&](std::uint32_t q) {
    PeerStats& stats = stats_[q];
    const std::uint64_t waited = now_ns() - start;
    ++stats.waits;
    stats.wait_ns += waited;
    stats.wait_max_ns = std::max(stats.wait_max_ns, waited);
  };
  Backoff backoff(config_.wait, Sleeper(arena_->data()), deadline_ns);
  const auto progressed = [&] {
    if (!all_direct) fabric_->drive();
    const bool all = inbox_.arrived(iteration);
    const std::size_t before = behind_.size();
    std::erase_if(behind_, [&](std::uint32_t q) {
      if (inbox_.seen(q) <= iteration) return false;
      charge(q);
      if (all) stats_[q].last += before == 1 || q == behind_.back();
      return true;
    });
    return all || failure_.failed();
  };
  for (;;) {
    const bool arrived = backoff.until(progressed, all_direct);
    if (failure_.failed()) return failure(iteration);
    if (arrived) return Outcome::ok;
    Outcome outcome = find_failure(iteration);
    if (outcome == Outcome::ok) outcome = find_foreign_write(iteration);
    if (outcome == Outcome::ok) outcome = give_up(deadline_ns, iteration, "");
    if (outcome == Outcome::ok) continue;
    std::for_each(behind_.begin(), behind_.end(), charge);
    return outcome;
  }
}

// Whether a wait is to end although what it waits for has not come.
Outcome Exchange::give_up(std::uint64_t deadline_ns, std::uint64_t iteration, const char* what) {
  const std::uint64_t now = now_ns();
  if (now >= deadline_ns) return fail(Outcome::timeout, config_.rank, iteration, what);
  if (!config_.interrupted || now - asked_ns_ < 50'000'000) return Outcome::ok;
  asked_ns_ = now;
  return config_.interrupted() ? Outcome::interrupted : Outcome::ok;
}

bool Exchange::may_begin() {
  const Turn turn(busy_);
  const std::uint64_t bound = std::uint64_t{config_.lag} + 1;
  return turn && (failure_.failed() || next_ < bound || inbox_.arrived(next_ - bound));
}

Outcome Exchange::begin(std::uint64_t deadline_ns) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  if (failure_.failed()) return failure(next_);
  const std::uint64_t bound = std::uint64_t{config_.lag} + 1;
  if (next_ >= bound) {
    const Outcome outcome = await(next_ - bound, deadline_ns);
    if (outcome != Outcome::ok) return outcome;
  }
  // A peer whose counter says n works on iteration n, or will; the slowest of them gives the lead.
  std::uint64_t lead = 0;
  for (std::uint32_t q = 0; q < channels_.size(); ++q) {
    if (q != config_.rank && next_ > inbox_.look(q)) lead = std::max(lead, next_ - inbox_.seen(q));
  }
  if (lead >= leads_.size()) leads_.resize(lead + 1);
  ++leads_[lead];
  return Outcome::ok;
}

Outcome Exchange::wait(std::uint64_t iteration, std::uint64_t deadline_ns) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  if (failure_.failed()) return failure(iteration);
  Record& mine = record(iteration);
  if (!mine.checked) {
    Outcome outcome = await(iteration, deadline_ns);
    if (outcome == Outcome::ok) outcome = check_headers(mine);
    if (outcome != Outcome::ok) return outcome;
  }
  return mine.settled ? Outcome::ok : Outcome::large;  // what is being pulled is here when pull() has said so
}

// Lengths and iterations come from a peer: nothing is done with them before they fit.
Outcome Exchange::check_headers(Record& mine) {
  mine.large = 0;
  for (std::uint32_t q = 0; q < channels_.size(); ++q) {
    if (q == config_.rank) continue;
    Header header;
    std::string wrong = inbox_.read(mine.iteration, q, header);
    if (wrong.empty() && config_.checksums && header.kind == Header::kInline &&
        header.checksum != checksum(inbox_.payload(mine.iteration, q), header.length)) {
      wrong = "its message does not match its checksum";
    }
    if (!wrong.empty()) {
      failure_.set(Outcome::corrupt, q, std::move(wrong));
      return failure(mine.iteration);
    }
    if (header.tag != mine.tag) {
      failure_.set(Outcome::tag_mismatch, q, "");
      details_ = {q, mine.iteration, header.tag, mine.tag, ""};
      return Outcome::tag_mismatch;
    }
    mine.lengths[q] = header.length;
    mine.checksums[q] = header.checksum;
    mine.placed[q] = nullptr;
    mine.on_device[q] = header.kind == Header::kDevice;
    if (header.kind == Header::kLarge) {
      ++mine.large;
      to_acknowledge_[q] = mine.iteration + 1;
    }
  }
  mine.checked = true;
  if (!mine.large) settle(mine);
  return Outcome::ok;
}

Outcome Exchange::pull(std::uint64_t iteration, const std::vector<std::pair<std::uint32_t, std::byte*>>& into,
                       std::uint64_t deadline_ns) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  Record& mine = record(iteration);
  if (mine.large) {
    std::vector<Descriptor> descriptors(into.size());
    for (std::size_t i = 0; i < into.size(); ++i) {
      std::string wrong = inbox_.read(iteration, into[i].first, descriptors[i]);
      if (wrong.empty() && !descriptors[i].rkey_bytes && !readers_[into[i].first]) wrong = "its large message has no key";
      if (!wrong.empty()) {
        failure_.set(Outcome::corrupt, into[i].first, std::move(wrong));
        return failure(iteration);
      }
    }
    mine.pulling.store(mine.large);
    mine.large = 0;
    bool all_read = true;
    for (std::size_t i = 0; i < into.size(); ++i) {
      const auto [source, to] = into[i];
      mine.placed[source] = to;
      all_read &= bool(readers_[source]);
      if (readers_[source]) mine.reads.push_back({source, to, descriptors[i].address, mine.lengths[source]});
    }
    if (!all_read) {
      fabric_->call([&] {
        for (std::size_t i = 0; i < into.size(); ++i) {
          const auto [source, to] = into[i];
          if (readers_[source]) continue;
          channels_[source]->pull(to, mine.lengths[source], descriptors[i].address,
                                  std::string(descriptors[i].rkey, descriptors[i].rkey_bytes), &mine.pulling);
        }
      });
    }
  }
  Backoff backoff(config_.wait, Sleeper(arena_->data()), deadline_ns);
  const auto done = [&] {
    if (mine.pulling.load(std::memory_order_acquire) == 0 || failure_.failed()) return true;
    fabric_->drive();
    return mine.pulling.load(std::memory_order_acquire) == 0;
  };
  for (;;) {
    Outcome outcome = read_some(mine);
    if (outcome != Outcome::ok) return outcome;
    if (mine.reads.empty() ? backoff.until(done, false) : done()) break;
    outcome = find_lost_pull(iteration);
    if (outcome == Outcome::ok) outcome = give_up(deadline_ns, iteration, "large messages are still being pulled");
    if (outcome != Outcome::ok) return outcome;
  }
  if (mine.pulling.load(std::memory_order_acquire)) return failure(iteration);
  for (std::uint32_t q = 0; config_.checksums && q < channels_.size(); ++q) {
    if (mine.placed[q] && q != config_.rank && mine.checksums[q] != checksum(mine.placed[q], mine.lengths[q])) {
      failure_.set(Outcome::corrupt, q, "its large message does not match its checksum");
      return failure(iteration);
    }
  }
  settle(mine);
  return Outcome::ok;
}

// One piece of what is to be read, so that deadlines and failures are looked at between two.
Outcome Exchange::read_some(Record& mine) {
  if (mine.reads.empty() || failure_.failed()) return Outcome::ok;
  Read& next = mine.reads.back();
  const std::uint64_t bytes = std::min(next.bytes, kPiece);
  const int error = readers_[next.source].read(next.to, bytes, next.from);
  // Its pid was its own if it still lives now.
  const bool dead = (error || bytes == next.bytes) && liveness_->dead(next.source);
  if (dead || error) {
    failure_.set(dead ? Outcome::peer_died : Outcome::corrupt, next.source,
                 dead ? "its process has ended" : std::string("its large message cannot be read: ") + std::strerror(error));
    return failure(mine.iteration);
  }
  next.to += bytes;
  next.from += bytes;
  next.bytes -= bytes;
  if (next.bytes) return Outcome::ok;
  mine.reads.pop_back();
  mine.pulling.fetch_sub(1, std::memory_order_acq_rel);
  return Outcome::ok;
}

// A peer that has closed and gone is no failure, but one whose large message has not been pulled before is.
Outcome Exchange::find_lost_pull(std::uint64_t iteration) {
  for (const auto& each : channels_) {
    if (!each || !each->pull_failed()) continue;
    failure_.set(Outcome::peer_died, each->peer(),
                 std::string("its connection is lost: ") + ucs_status_string(each->broken()));
    return failure(iteration);
  }
  return Outcome::ok;
}

// What pull() has not read yet is not wanted any more.
void Exchange::drop_reads(Record& mine) {
  mine.pulling.fetch_sub(static_cast<std::uint32_t>(mine.reads.size()), std::memory_order_acq_rel);
  mine.reads.clear();
}

// Nothing of this iteration is wanted from a peer's memory any more: acknowledge, in order, to those who wait for it.
void Exchange::settle(Record& mine) {
  mine.settled = true;
  const std::uint64_t before = settled_;
  while (settled_ < next_ && record(settled_).iteration == settled_ && record(settled_).settled) ++settled_;
  if (settled_ == before) return;
  for (std::uint32_t q = 0; q < channels_.size(); ++q) {
    if (q == config_.rank || to_acknowledge_[q] <= before) continue;
    channels_[q]->acknowledge(std::min(settled_, to_acknowledge_[q]));
    std::atomic_thread_fence(std::memory_order_seq_cst);
    channels_[q]->wake();
  }
}

// What has been released without a look at it, and is here by now, is acknowledged: its senders wait for that.
void Exchange::settle_unwanted() {
  for (std::uint64_t i = settled_; i < next_; ++i) {
    Record& each = record(i);
    if (each.iteration != i || each.settled || !each.released) continue;
    if (!inbox_.arrived(i) || each.pulling.load(std::memory_order_acquire)) return;
    if (!each.checked && check_headers(each) != Outcome::ok) return;
    each.large = 0;
    settle(each);
  }
}

bool Exchange::ready(std::uint64_t iteration) {
  const Turn turn(busy_);
  return turn && (record(iteration).checked || inbox_.arrived(iteration));
}

void Exchange::release(std::uint64_t iteration) {
  Record& mine = record(iteration);
  if (mine.iteration != iteration || mine.released) return;
  mine.released = true;
  if (!mine.settled) {
    const Turn turn(busy_);
    if (!turn) return;  // another thread is pulling it, against the rule; a later call settles it
    drop_reads(mine);
    mine.large = 0;
  }
  settle_unwanted();  // or, if it is not all here yet, in a later sent() or post()
}

const std::byte* Exchange::message(std::uint64_t iteration, std::uint32_t source) const {
  const Record& mine = record(iteration);
  if (source == config_.rank) return mine.own;
  if (mine.placed[source]) return mine.placed[source];
  if (mine.on_device[source]) return nullptr;
  return mine.lengths[source] > config_.geometry.window_bytes ? nullptr : inbox_.payload(iteration, source);
}

std::uint64_t Exchange::length(std::uint64_t iteration, std::uint32_t source) const {
  return record(iteration).lengths[source];
}

void Exchange::copy_out(std::uint64_t iteration, std::byte* to) const {
  const Record& mine = record(iteration);
  for (std::uint32_t q = 0; q < channels_.size(); to += mine.lengths[q], ++q) {
    const std::byte* from = message(iteration, q);
    if (from && from != to && mine.lengths[q]) std::memcpy(to, from, mine.lengths[q]);
  }
}

std::string Exchange::transport(std::uint32_t peer) const {
  std::string name;
  if (channels_[peer]) fabric_->call([&] { name = channels_[peer]->transport(); });
  return name;
}

}  // namespace blsrdma
