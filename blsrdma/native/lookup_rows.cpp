// Lookup: rows that are pooled here, out of the cache, out of responses, or out of their owner's memory.
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "lookup.h"

namespace blsrdma {
namespace {

constexpr std::uint64_t kAhead = 12;  // rows between the one that is looked for and the one whose place in an index is fetched

}  // namespace

std::string Lookup::overwritten() const {
  return "it has put other tables where version " + std::to_string(version_) + " was read: it takes this rank for gone";
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

// The rows of a part, some of which are not here. If all are, it is pooled at once: nullptr.
Lookup::Gather* Lookup::gather_for(const Part& part, Job& job) {
  if (job.used == job.gathers.size()) job.gathers.emplace_back();
  Gather& it = job.gathers[job.used];
  collect(part, it);
  if (it.missing.empty()) {
    pool_gathered(it);
    return nullptr;
  }
  ++job.used;
  return &it;
}

// Ask for the rows of a part that are not here.
void Lookup::gather(const Part& part, Job& job) {
  const Gather* it = gather_for(part, job);
  if (!it) return;
  job.parts.push_back(&part);
  job.fetches.push_back({part.table, it->missing.data(), it->missing.size(), it->buffer.get()});
}

// Get the rows of a part that are not here, neighbours in one piece. After all of them the word that says whether they were
// of this version is got: an owner clears it before it writes, so that once, after, is enough.
void Lookup::get_apart(const Part& part, Job& job) {
  const Gather* it = gather_for(part, job);
  if (!it) return;
  const Table& table = tables()[part.table];
  const std::uint64_t there = peers_[table.owner].tables_there;
  if (!job.batch) job.batch = std::make_unique<Getter::Batch>();
  Getter::Batch& batch = *job.batch;
  if (job.getting.empty()) {
    batch.pieces.clear();
    batch.word_at = config_.second_place ? there + VersionWord::kOffset + sizeof batch.word * place_ : 0;
  }
  job.getting.push_back(&part);
  for (std::size_t k = 0; k < it->missing.size(); ++k) {
    if (k && it->missing[k] == it->missing[k - 1] + 1) {
      batch.pieces.back().bytes += table.row_bytes;
      continue;
    }
    batch.pieces.push_back({it->buffer.get() + k * table.row_bytes, table.row_bytes,
                            there + table.offset + it->missing[k] * table.row_bytes});
  }
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
  if (there != version_) return lose_read(table.owner, part, ask, overwritten());
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
  if (!config_.fetch || reads(table) || gets(table) || missing.empty()) return Outcome::ok;
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

}  // namespace blsrdma
