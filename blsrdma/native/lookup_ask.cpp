// Lookup: what a rank asks for, and how its bags are put together.
#include <utility>

#include "lookup.h"

namespace blsrdma {

// Whether bags of a table are pooled here. The tables of an owner that has failed are not read, though they could be.
bool Lookup::reads(const Table& table) const {
  if (table.owner == config_.rank) return true;
  return (table.data || peers_[table.owner].reader) && !peers_[table.owner].failure->failed();
}

bool Lookup::gets(const Table& table) const { return gets(table.owner) && !peers_[table.owner].failure->failed(); }

// Wait until another ask may be open, and open it.
Outcome Lookup::open_ask(std::uint64_t deadline_ns, Ask*& ask) {
  adopt();
  const std::uint64_t bound = std::uint64_t{config_.lag} + 1;
  if (next_ >= bound) {
    const auto before = asks_.find(next_ - bound);
    if (before != asks_.end()) {
      const Outcome outcome = until([&] { return before->second->left == 0; }, deadline_ns);
      if (outcome == Outcome::timeout) details_.iteration = next_ - bound;
      if (outcome != Outcome::ok) return outcome;
    }
  }
  std::unique_ptr<Ask> mine;
  if (spare_.empty()) {
    mine = std::make_unique<Ask>();
  } else {
    mine = std::move(spare_.back());
    spare_.pop_back();
  }
  ask = mine.get();
  ask->number = next_++;
  ask->version = version_;
  ask->parts.clear();
  ask->here.clear();
  ask->left = 0;
  ask->outcome = Outcome::ok;
  asks_[ask->number] = std::move(mine);
  return Outcome::ok;
}

// What `ask`, the newest, wants of a peer: a job that counts once peer.end covers it.
Lookup::Job& Lookup::job_for(PeerState& peer, Ask& ask) {
  Job& job = peer.jobs[peer.end % peer.jobs.size()];
  if (job.number != ask.number) {
    job.number = ask.number;
    job.ask = &ask;
    job.parts.clear();
    job.fetches.clear();
    job.getting.clear();
    job.cursor = {};
    job.in_flight = 0;
    job.used = 0;
    job.failed = false;
    job.rows = config_.fetch;
  }
  return job;
}

Outcome Lookup::ask(const std::vector<Part>& parts, std::uint64_t deadline_ns, std::uint64_t& number) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  for (const Part& part : parts) {
    fault_ = check(part, tables()[part.table]);
    if (fault_.kind != Fault::none) return fail(Outcome::bad_bags, config_.rank);
  }
  Ask* opened = nullptr;
  const Outcome outcome = open_ask(deadline_ns, opened);
  if (outcome != Outcome::ok) return outcome;
  Ask& ask = *opened;
  number = ask.number;
  ask.parts = parts;
  for (const Part& part : ask.parts) {
    const Table& table = tables()[part.table];
    AskStats& stats = stats_[table.owner];
    stats.bags += part.bags;
    stats.rows += static_cast<std::uint64_t>(part.offsets[part.bags] - part.offsets[0]);
    if (part.bags == 0) continue;
    const bool far = gets(table);
    const bool read = (far || reads(table)) && (table.owner == config_.rank || !costs_[part.table].ask(part));
    if (read) stats.read += table.owner == config_.rank ? 0 : part.bags;
    if (read && !far) {
      ask.here.push_back(&part);
      continue;
    }
    Job& job = job_for(peers_[table.owner], ask);
    if (read) {
      get_apart(part, job);
    } else if (config_.fetch) {
      gather(part, job);
    } else {
      job.parts.push_back(&part);
    }
  }
  for (std::uint32_t step = 1; step < peers_.size(); ++step) {  // everyone begins with its successor
    const auto q = static_cast<std::uint32_t>((config_.rank + step) % peers_.size());
    PeerState& peer = peers_[q];
    Job& job = peer.jobs[peer.end % peer.jobs.size()];
    if (job.number != number || (job.parts.empty() && job.getting.empty())) continue;
    ++ask.left;
    ++peer.end;
    if (!job.getting.empty()) fabric_->call([&] { peer.getter->post(*job.batch); });
    pump(q);
  }
  // One's own rows, while the others look theirs up.
  for (const Part* part : ask.here) {
    const Table& table = tables()[part->table];
    if (table.data || table.owner == config_.rank) {
      pool_here(*part, table, scratch_);
    } else {
      read_apart(*part, ask);
    }
  }
  if (own_gpu_ && own_gpu_->pending() && !own_gpu_->run() && ask.outcome == Outcome::ok) {
    ask.outcome = Outcome::gpu_failed;
    ask.details = {config_.rank, number, static_cast<std::uint64_t>(own_gpu_->result()), 0, own_gpu_->text()};
  }
  for (const Part* part : ask.here) {
    const std::uint32_t owner = tables()[part->table].owner;
    if (!peers_[owner].mapped || VersionWord(peers_[owner].mapped, place_).still(version_)) continue;
    lose_read(owner, *part, ask, overwritten());
  }
  pump();
  return Outcome::ok;
}

Outcome Lookup::result(Ask& ask) {
  if (ask.outcome != Outcome::ok) {
    details_ = ask.details;
    fault_ = ask.fault;
  }
  return ask.outcome;
}

Outcome Lookup::wait(std::uint64_t number, std::uint64_t deadline_ns) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  Ask& ask = *asks_.at(number);
  if (ask.left) {
    const Outcome outcome = until([&] { return ask.left == 0; }, deadline_ns);
    if (outcome == Outcome::timeout) details_.iteration = number;
    if (outcome != Outcome::ok) return outcome;
  }
  return result(ask);
}

bool Lookup::ready(std::uint64_t number) {
  const Turn turn(busy_);
  if (!turn) return false;
  const Ask& ask = *asks_.at(number);
  pump();
  if (ask.left && now_ns() - looked_ns_ > 1'000'000) find_failures();
  return ask.left == 0;
}

void Lookup::forget(std::uint64_t number) {
  const auto found = asks_.find(number);
  if (found == asks_.end() || found->second->left) return;
  spare_.push_back(std::move(found->second));
  asks_.erase(found);
}

std::vector<std::uint32_t> Lookup::missing(std::uint64_t number) const {
  std::vector<std::uint32_t> ranks;
  for (std::uint32_t q = 0; q < peers_.size(); ++q) {
    const PeerState& peer = peers_[q];
    for (std::uint64_t j = peer.oldest; j < peer.end; ++j) {
      if (peer.jobs[j % peer.jobs.size()].number <= number) {
        ranks.push_back(q);
        break;
      }
    }
  }
  return ranks;
}

}  // namespace blsrdma
