// Lookup: new versions of the tables; versions.h has the rules.
#include <algorithm>
#include <utility>

#include "lookup.h"

namespace blsrdma {

bool Lookup::gone(std::uint32_t peer) const { return peers_[peer].failure->failed() || has_left(peer); }

// The counters may be seen while they are written: what has been seen once holds.
void Lookup::look_at_versions(std::uint32_t peer) {
  PeerState& state = peers_[peer];
  state.announced = std::max(state.announced, responses_.pulled(peer));
  state.moved = std::max(state.moved, server_->inbox().pulled(peer) / 2);
}

// Go over to the version that all owners have announced, if there is one. Rows that are kept here are those of the version
// before: the hot ones are got anew when they are asked for, the others are forgotten.
void Lookup::adopt() {
  if (!moved_ || (owns_ && loaded_ == version_)) return;
  std::uint64_t next = owns_ ? loaded_ : version_;
  for (std::uint32_t q = 0; q < peers_.size(); ++q) {
    if (q == config_.rank || !peers_[q].owns) continue;
    look_at_versions(q);
    if (!owns_ && peers_[q].announced > next && !gone(q)) next = peers_[q].announced;
  }
  if (next == version_) return;
  for (std::uint32_t q = 0; q < peers_.size(); ++q) {
    if (q != config_.rank && peers_[q].owns && peers_[q].announced != next && !gone(q)) return;
  }
  place_ = 1 - place_;
  version_ = next;
  adopted_at_ = next_;
  moved_ = false;
  if (!owns_) {
    tables_.set(place_, version_);
    tables_.clear(1 - place_);
  }
  for (KeptRows& each : kept_) each.renew();
  move_on();
}

// Tell the owners that they need the version before no more, once that is so.
void Lookup::move_on() {
  if (moved_) return;
  const std::uint64_t bound = std::uint64_t{config_.lag} + 1;
  for (std::uint64_t n = adopted_at_ > bound ? adopted_at_ - bound : 0; n < adopted_at_; ++n) {
    const auto found = asks_.find(n);
    if (found != asks_.end() && found->second->left) return;
  }
  moved_ = true;
  for (KeptRows& each : kept_) each.let_go();
  tell_owners();
}

void Lookup::tell_owners() {
  for (const PeerState& peer : peers_) {
    if (peer.asking) peer.asking->acknowledge(2 * version_ + finished_);
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (const PeerState& peer : peers_) {
    if (peer.answering) peer.answering->wake();
  }
}

// Ranks that may still ask for the version before the newest of this rank's own.
std::vector<std::uint32_t> Lookup::behind() {
  std::vector<std::uint32_t> ranks;
  for (std::uint32_t q = 0; q < peers_.size(); ++q) {
    if (q == config_.rank) {
      if (version_ != loaded_ || !moved_) ranks.push_back(q);
      continue;
    }
    look_at_versions(q);
    if (peers_[q].moved < loaded_ && !(server_->inbox().pulled(q) & 1) && !gone(q)) ranks.push_back(q);
  }
  return ranks;
}

Outcome Lookup::make_room(std::uint64_t version, std::uint64_t deadline_ns, std::uint32_t& place) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  std::uint32_t other = config_.rank;
  const auto mismatch = [&] {
    const std::uint64_t wanted = loaded_ == version_ ? version : loaded_;
    for (std::uint32_t q = 0; q < peers_.size(); ++q) {
      if (q == config_.rank || !peers_[q].owns) continue;
      look_at_versions(q);
      if (peers_[q].announced == version_ || peers_[q].announced == wanted || gone(q)) continue;
      other = q;
      return true;
    }
    return false;
  };
  const Outcome outcome = until(
      [&] {
        adopt();
        move_on();
        return mismatch() || behind().empty();
      },
      deadline_ns);
  if (other != config_.rank) {
    details_ = {other, version, peers_[other].announced, loaded_, ""};
    return Outcome::version_mismatch;
  }
  if (outcome != Outcome::ok) return outcome;
  place = 1 - place_;
  if (!tables_.clear(place, deadline_ns)) return fail(Outcome::timeout, config_.rank);
  if (tables_arena_) VersionWord(tables_arena_->data(), place).clear();
  return Outcome::ok;
}

bool Lookup::load(std::uint64_t version, std::uint32_t place, const std::vector<const std::byte*>& rows) {
  const Turn turn(busy_);
  if (!turn) return false;
  std::vector<Table>& tables = tables_.at(place);
  for (std::size_t t = 0; t < tables.size(); ++t) {
    if (tables[t].owner == config_.rank) tables[t].data = rows.at(t);
  }
  if (tables_arena_) VersionWord(tables_arena_->data(), place).set(version);
  tables_.set(place, version);
  loaded_ = version;
  for (const PeerState& peer : peers_) {
    if (peer.answering) peer.answering->acknowledge(version);
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (const PeerState& peer : peers_) {
    if (peer.answering) peer.answering->wake();
  }
  return true;
}

bool Lookup::retire_version() {
  const Turn turn(busy_);
  if (!turn) return false;
  move_on();
  if (!behind().empty()) return false;
  for (const auto& each : {serving_gpu_, own_gpu_}) {
    if (each && each->failed()) return false;  // it may still be reading there, at any time
  }
  return tables_.clear(1 - place_, serving_gpu_ ? now_ns() : kNever);
}

}  // namespace blsrdma
