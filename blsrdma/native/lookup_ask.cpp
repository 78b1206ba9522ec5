// Lookup: what a rank asks for, and how its bags are put together.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "lookup.h"

namespace blsrdma {

namespace {

constexpr std::uint64_t kAhead = 12;  // rows between the one that is looked for and the one whose place in an index is fetched

std::string overwritten(std::uint64_t version) {
  return "it has put other tables where version " + std::to_string(version) + " was read: it takes this rank for gone";
}

}  // namespace

// Whether bags of a table are pooled here. The tables of an owner that has failed are not read, though they could be.
bool Lookup::reads(const Table& table) const {
  if (table.owner == config_.rank) return true;
  return (table.data || peers_[table.owner].reader) && !peers_[table.owner].failure->failed();
}

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
    job.cursor = {};
    job.in_flight = 0;
    job.used = 0;
    job.failed = false;
    job.rows = config_.fetch;
  }
  return job;
}

// Find the rows of a part: kept here, in the cache, or missing.
void Lookup::collect(const Part& part, Gather& it) {
  const Table& table = tables()[part.table];
  KeptRows& kept = kept_[part.table];
  AskStats& stats = stats_[table.owner];
  const std::uint64_t first = part.first(), count = static_cast<std::uint64_t>(part.offsets[part.bags]) - first;
  it.part = &part;
  it.rows.resize(count);
  it.missing.clear();
  if (it.capacity < count * table.row_bytes) {
    it.capacity = count * table.row_bytes;
    it.buffer.reset(new std::byte[it.capacity]);
  }
  if (config_.dedupe) seen_.clear(count);
  std::uint64_t copied = 0;  // rows out of the cache take slots from the end: the cache may drop them meanwhile
  for (std::uint64_t i = 0; i < count; ++i) {
    const auto row = static_cast<std::uint64_t>(part.indices[first + i]);
    if (i + kAhead < count) kept.prefetch(static_cast<std::uint64_t>(part.indices[first + i + kAhead]));
    if (const std::byte* pinned = kept.pinned(row)) {
      it.rows[i] = pinned;
      ++stats.pinned;
      continue;
    }
    const std::byte* cached = kept.cached(row);
    const std::uint64_t fresh = cached ? count - 1 - copied : it.missing.size();
    std::uint64_t slot = fresh;
    if (config_.dedupe) slot = seen_.find_or_add(row, static_cast<std::uint32_t>(fresh));
    it.rows[i] = it.buffer.get() + slot * table.row_bytes;
    if (slot != fresh) {
      ++stats.repeated;
    } else if (cached) {
      std::memcpy(it.buffer.get() + slot * table.row_bytes, cached, table.row_bytes);
      ++copied;
      ++stats.cached;
    } else {
      it.missing.push_back(row);
      ++stats.fetched;
    }
  }
}

// Ask for the rows of a part that are not here. If all are here, it is pooled at once.
void Lookup::gather(const Part& part, Job& job) {
  if (job.used == job.gathers.size()) job.gathers.emplace_back();
  Gather& it = job.gathers[job.used];
  collect(part, it);
  if (it.missing.empty()) return pool_gathered(it);
  ++job.used;
  job.parts.push_back(&part);
  job.fetches.push_back({part.table, it.missing.data(), it.missing.size(), it.buffer.get()});
}

// Read the rows of a part in the memory of its owner's process, which is not mapped here, neighbours in one piece.
void Lookup::read_apart(const Part& part, Ask& ask) {
  const Table& table = tables()[part.table];
  PeerState& peer = peers_[table.owner];
  if (peer.failure->failed()) return give_up(table.owner, part, ask);
  collect(part, apart_);
  pieces_.clear();
  for (std::size_t k = 0; k < apart_.missing.size(); ++k) {
    if (k && apart_.missing[k] == apart_.missing[k - 1] + 1) {
      pieces_.back().iov_len += table.row_bytes;
      continue;
    }
    pieces_.push_back({reinterpret_cast<void*>(peer.tables_there + table.offset + apart_.missing[k] * table.row_bytes),
                       table.row_bytes});
  }
  std::uint64_t there = VersionWord::kNone;
  int error = peer.reader.read(apart_.buffer.get(), pieces_);
  if (!error) {
    error = peer.reader.read(reinterpret_cast<std::byte*>(&there), sizeof there,
                             peer.tables_there + VersionWord::kOffset + sizeof there * place_);
  }
  // Its pid was its own if it still lives now.
  if (error || liveness_->dead(table.owner)) {
    return lose_read(table.owner, part, ask,
                     error && error != ESRCH ? std::string("its memory cannot be read: ") + std::strerror(error)
                                             : "its process has ended");
  }
  if (there != version_) return lose_read(table.owner, part, ask, overwritten(version_));
  pool_gathered(apart_);
  for (std::size_t k = 0; k < apart_.missing.size(); ++k) {
    kept_[part.table].insert(apart_.missing[k], apart_.buffer.get() + k * table.row_bytes);
  }
}

void Lookup::lose_read(std::uint32_t owner, const Part& part, Ask& ask, const std::string& text) {
  lose(owner, Outcome::peer_died, text);
  give_up(owner, part, ask);
}

void Lookup::pool_gathered(const Gather& gather) {
  const Part& part = *gather.part;
  const Table& table = tables()[part.table];
  scratch_.lengths.clear();
  for (std::uint64_t b = 0; b < part.bags; ++b) scratch_.lengths.push_back(static_cast<std::uint32_t>(part.length(b)));
  Pool job;
  job.format = table.format;
  job.dim = table.dim;
  job.mean = part.mean;
  job.rows = gather.rows.data();
  job.weights = part.weights ? part.weights + part.first() : nullptr;
  job.lengths = scratch_.lengths.data();
  job.bags = part.bags;
  job.out = part.out;
  job.stride = part.stride;
  pool(job);
}

Outcome Lookup::keep(std::uint32_t number, const std::int64_t* rows, std::uint64_t count, std::uint64_t deadline_ns) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  adopt();
  const Table& table = tables()[number];
  std::vector<std::uint64_t> missing;
  for (std::uint64_t i = 0; i < count; ++i) {
    if (static_cast<std::uint64_t>(rows[i]) >= table.rows) {
      fault_ = {Fault::index, number, i, rows[i], table.rows};
      return fail(Outcome::bad_bags, config_.rank);
    }
    if (!kept_[number].pinned(static_cast<std::uint64_t>(rows[i]))) missing.push_back(static_cast<std::uint64_t>(rows[i]));
  }
  if (!config_.fetch || reads(table) || missing.empty()) return Outcome::ok;
  Ask* ask = nullptr;
  Outcome outcome = open_ask(deadline_ns, ask);
  if (outcome != Outcome::ok) return outcome;
  std::vector<std::byte> buffer(missing.size() * table.row_bytes);
  PeerState& peer = peers_[table.owner];
  Job& job = job_for(peer, *ask);
  job.fetches.push_back({number, missing.data(), missing.size(), buffer.data()});
  ++ask->left;
  ++peer.end;
  outcome = until([&] { return ask->left == 0; }, deadline_ns);
  if (outcome != Outcome::ok) {  // what it points to is about to go: nothing may arrive there any more
    details_.iteration = ask->number;
    const Details why = details_;
    lose(table.owner, Outcome::peer_died, "it did not send rows to be kept in time");
    details_ = why;
    return outcome;
  }
  outcome = result(*ask);
  const std::uint64_t done = ask->number;
  if (outcome == Outcome::ok) {
    for (std::size_t k = 0; k < missing.size(); ++k) kept_[number].pin(missing[k], buffer.data() + k * table.row_bytes);
  }
  spare_.push_back(std::move(asks_.at(done)));
  asks_.erase(done);
  return outcome;
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
    if (reads(table) && (table.owner == config_.rank || !costs_[part.table].ask(part))) {
      stats.read += table.owner == config_.rank ? 0 : part.bags;
      ask.here.push_back(&part);
      continue;
    }
    Job& job = job_for(peers_[table.owner], ask);
    if (config_.fetch) {
      gather(part, job);
    } else {
      job.parts.push_back(&part);
    }
  }
  for (std::uint32_t step = 1; step < peers_.size(); ++step) {  // everyone begins with its successor
    const auto q = static_cast<std::uint32_t>((config_.rank + step) % peers_.size());
    PeerState& peer = peers_[q];
    Job& job = peer.jobs[peer.end % peer.jobs.size()];
    if (job.number != number || (job.rows && job.fetches.empty())) continue;
    ++ask.left;
    ++peer.end;
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
  for (const Part* part : ask.here) {
    const std::uint32_t owner = tables()[part->table].owner;
    if (!peers_[owner].mapped || VersionWord(peers_[owner].mapped, place_).still(version_)) continue;
    lose_read(owner, *part, ask, overwritten(version_));
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
