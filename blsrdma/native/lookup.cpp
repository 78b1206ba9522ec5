#include "lookup.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

namespace blsrdma {
namespace {

// Both planes have their own check words, so that a record of one is none of the other.
constexpr std::uint64_t kResponsePlane = 0x9e3779b97f4a7c15u;

class Turn {
 public:
  explicit Turn(std::atomic<bool>& busy) : busy_(busy), mine_(!busy.exchange(true, std::memory_order_acquire)) {}
  ~Turn() {
    if (mine_) busy_.store(false, std::memory_order_release);
  }
  explicit operator bool() const { return mine_; }

 private:
  std::atomic<bool>& busy_;
  bool mine_;
};

}  // namespace

Lookup::Lookup(std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> requests, std::shared_ptr<Arena> responses,
               std::vector<Table> tables, const Config& config)
    : fabric_(std::move(fabric)),
      requests_arena_(std::move(requests)),
      responses_arena_(std::move(responses)),
      tables_(std::move(tables)),
      config_(config),
      responses_(*responses_arena_, config.responses, config.rank, config.epoch ^ kResponsePlane),
      request_bell_(std::make_unique<Doorbell>(Sleeper(requests_arena_->data()))),
      response_bell_(std::make_unique<Doorbell>(Sleeper(responses_arena_->data()))),
      asking_(config.requests.ranks),
      answering_(config.requests.ranks),
      peers_(config.requests.ranks),
      stats_(config.requests.ranks) {
  if (config.requests.arena_bytes > requests_arena_->bytes() || config.responses.arena_bytes > responses_arena_->bytes()) {
    throw std::invalid_argument("an arena is smaller than its geometry");
  }
  for (PeerState& each : peers_) {
    each.jobs.resize(config.lag + std::size_t{1});
    each.slots.resize(config.requests.windows);
    each.failure = std::make_unique<Failure>();
  }
  std::uint64_t remote = 0;
  for (const Table& each : tables_) remote += each.owner == config.rank ? 0 : each.rows * each.row_bytes;
  kept_.resize(tables_.size());
  for (std::size_t t = 0; t < tables_.size(); ++t) {
    const Table& table = tables_[t];
    if (table.owner == config.rank || !config.fetch) continue;
    // The cache is shared out by size.
    const double share = static_cast<double>(table.rows * table.row_bytes) / static_cast<double>(std::max<std::uint64_t>(1, remote));
    const auto rows = static_cast<std::uint64_t>(static_cast<double>(config.cache_bytes) * share) / table.row_bytes;
    kept_[t].open(table.row_bytes, std::min(rows, table.rows));
  }
  Server::Config serving;
  serving.requests = config.requests;
  serving.responses = config.responses;
  serving.rank = config.rank;
  serving.request_epoch = config.epoch;
  serving.response_epoch = config.epoch ^ kResponsePlane;
  serving.checksums = config.checksums;
  serving.wait = config.serving;
  serving.share = config.share;
  server_ = std::make_unique<Server>(
      fabric_, requests_arena_, tables_, serving, [this](std::uint32_t client) { return peers_[client].failure->failed(); },
      [this](std::uint32_t client, std::string what) {
        peers_[client].failure->set(Outcome::corrupt, client, std::move(what));
        response_bell_->stirred();
      });
}

Lookup::~Lookup() {
  if (server_) server_->stop();
  if (closed_) return;
  try {
    fabric_->call([&] {
      if (liveness_) liveness_->stop(*fabric_);
      fabric_->detach(request_bell_.get());
      fabric_->detach(response_bell_.get());
      for (auto* plane : {&asking_, &answering_}) {
        for (const auto& each : *plane) {
          if (each) each->orphan();
        }
      }
    });
  } catch (const std::runtime_error&) {  // the fabric is closed: its thread has ended
  }
  for (auto* plane : {&asking_, &answering_}) {
    for (auto& each : *plane) each.release();
  }
  new std::tuple(fabric_, requests_arena_, responses_arena_);
  // Requests and responses that are being put are read from these.
  new std::vector<PeerState>(std::move(peers_));
  server_.release();
}

void Lookup::connect(const std::vector<Peer>& peers, std::vector<int> pidfds, std::uint64_t deadline_ns) {
  liveness_ = std::make_unique<Liveness>(
      server_->inbox(), config_.rank, std::move(pidfds), config_.keepalive_ns,
      [this](std::uint32_t peer, std::string why) { broken(peer, std::move(why)); });
  const auto lost = [this](std::uint32_t peer, ucs_status_t status) {
    broken(peer, std::string("its connection is lost: ") + ucs_status_string(status));
  };
  fabric_->call([&] {
    for (const Peer& peer : peers) {
      const std::uint32_t q = peer.requests.rank;
      asking_[q] = std::make_unique<Channel>(*fabric_, *requests_arena_, config_.requests, config_.rank, peer.requests,
                                             config_.epoch, config_.allow_direct, lost);
      answering_[q] = std::make_unique<Channel>(*fabric_, *responses_arena_, config_.responses, config_.rank, peer.responses,
                                                config_.epoch ^ kResponsePlane, config_.allow_direct, lost);
      for (Channel* each : {asking_[q].get(), answering_[q].get()}) {
        fabric_->attach(each);
        each->warm_up();
      }
      if (!liveness_->here(q)) asking_[q]->beat();
      PeerState& state = peers_[q];
      state.asking = asking_[q].get();
      state.answering = answering_[q].get();
      if (!asking_[q]->direct()) {
        state.staging.resize(config_.requests.windows);
        for (auto& each : state.staging) each.resize(config_.requests.window_bytes);
      }
      if (!config_.read || peer.tables.rkey.empty()) continue;
      if (ucp_ep_rkey_unpack(asking_[q]->endpoint(), peer.tables.rkey.data(), &state.tables) != UCS_OK) continue;
      void* mapped = nullptr;
      if (!config_.allow_direct || ucp_rkey_ptr(state.tables, peer.tables.arena, &mapped) != UCS_OK) continue;
      if (std::memcmp(mapped, peer.tables.token.data(), std::min<std::size_t>(peer.tables.token.size(), kLine)) == 0) {
        state.mapped = static_cast<std::byte*>(mapped);
      }
    }
    liveness_->start(*fabric_);
    fabric_->attach(request_bell_.get());
    fabric_->attach(response_bell_.get());
  });
  std::string missing;
  const auto settled = [&] {
    missing.clear();
    for (const auto* plane : {&asking_, &answering_}) {
      for (const auto& each : *plane) {
        if (!each) continue;
        if (each->broken() != UCS_OK) {
          throw UcxError("cannot connect to rank " + std::to_string(each->peer()), each->broken());
        }
        if (!each->warm()) missing += (missing.empty() ? "" : ", ") + std::to_string(each->peer());
      }
    }
    return missing.empty();
  };
  if (!fabric_->until(settled, deadline_ns)) {
    throw std::runtime_error("the first put has not completed to ranks " + missing);
  }
  for (Table& table : tables_) {
    if (table.owner != config_.rank && peers_[table.owner].mapped) {
      table.data = peers_[table.owner].mapped + table.offset;
    }
  }
  server_->connect(answering_);
  if (!config_.serve_inline) server_->start();
}

// --- failures

Outcome Lookup::fail(Outcome outcome, std::uint32_t rank, std::string text) {
  details_ = {rank, next_, 0, 0, std::move(text)};
  return outcome;
}

bool Lookup::has_left(std::uint32_t peer) const {
  return server_->inbox().farewell(peer) || liveness_->dead(peer) || asking_[peer]->broken() != UCS_OK ||
         answering_[peer]->broken() != UCS_OK;
}

// On the progress thread. One that has said farewell has left: what is still wanted of it finds that.
void Lookup::broken(std::uint32_t peer, std::string why) {
  if (!server_->inbox().farewell(peer)) peers_[peer].failure->set(Outcome::peer_died, peer, std::move(why));
  request_bell_->stirred();
  response_bell_->stirred();
}

// Everything that is still wanted of an owner, now and later, fails; or gets default rows.
void Lookup::lose(std::uint32_t owner, Outcome outcome, const std::string& text) {
  PeerState& peer = peers_[owner];
  peer.failure->set(outcome, owner, text);
  peer.lost = true;
  for (; peer.oldest < peer.end; ++peer.oldest) {
    Job& job = peer.jobs[peer.oldest % peer.jobs.size()];
    Ask& ask = *job.ask;
    --ask.left;
    if (config_.degrade) {
      for (const Part* part : job.parts) {
        for (std::uint64_t b = 0; b < part->bags; ++b) {
          std::fill_n(part->out + b * part->stride, tables_[part->table].dim, config_.instead);
        }
        stats_[owner].degraded += part->bags;
      }
    } else if (ask.outcome == Outcome::ok) {
      ask.outcome = peer.failure->outcome();
      ask.details = {owner, job.number, 0, 0, peer.failure->text()};
    }
  }
  peer.writing = peer.end;
  peer.received = peer.sent;  // responses that still come are not looked at
}

void Lookup::find_failures() {
  looked_ns_ = now_ns();
  for (std::uint32_t q = 0; q < peers_.size(); ++q) {
    PeerState& peer = peers_[q];
    if (peer.oldest == peer.end) continue;
    const auto word = server_->inbox().farewell(q);
    if (!word) continue;
    pump(q);  // it may have answered before it left
    if (peer.oldest == peer.end) continue;
    const std::string text(word->text, word->text_bytes);
    if (word->code == Farewell::kClosed) {
      lose(q, Outcome::peer_left, text);
    } else {
      lose(q, Outcome::peer_erred, text);
    }
  }
}

// --- asking

// Whether bags of a table are pooled here. The tables of an owner that has failed are not read, though they could be.
bool Lookup::reads(const Table& table) const {
  return table.data && (table.owner == config_.rank || !peers_[table.owner].failure->failed());
}

void Lookup::write(std::uint32_t owner, PeerState& peer) {
  while (peer.writing < peer.end) {
    Job& job = peer.jobs[peer.writing % peer.jobs.size()];
    if (job.written()) {
      ++peer.writing;
      continue;
    }
    if (peer.sent - peer.received >= config_.requests.windows || !peer.asking->room(peer.sent)) return;
    Slot& slot = peer.slots[peer.sent % peer.slots.size()];
    std::byte* to = peer.asking->place(peer.sent);
    if (!to) to = peer.staging[peer.sent % peer.staging.size()].data();
    const std::uint64_t room = config_.requests.window_bytes, reply_room = config_.responses.window_bytes;
    const std::uint64_t bytes = job.rows
                                    ? write_fetch(job.fetches, tables_, job.cursor, to, room, reply_room, slot.rows)
                                    : write_query(job.parts, tables_, job.cursor, to, room, reply_room, slot.landings);
    slot.job = &job;
    ++job.in_flight;
    Header header{peer.sent, bytes, 0, Header::kInline, config_.checksums ? checksum(to, bytes) : 0, 0};
    header.seal(config_.epoch);
    peer.asking->post(header, to, bytes);
    ++peer.sent;
    ++stats_[owner].requests;
    stats_[owner].request_bytes += bytes;
    if (!peer.asking->direct()) fabric_->kick();
    std::atomic_thread_fence(std::memory_order_seq_cst);
    peer.asking->wake();
  }
}

// The response to the oldest request in flight is here: what comes from a peer is checked before it is used.
void Lookup::consume(std::uint32_t owner, PeerState& peer) {
  Slot& slot = peer.slots[peer.received % peer.slots.size()];
  Job& job = *slot.job;
  Header header;
  std::string wrong = responses_.read(peer.received, owner, header);
  const std::byte* from = responses_.payload(peer.received, owner);
  std::uint64_t expected = 0;
  if (job.rows) {
    for (const FetchLanding& each : slot.rows) expected += padded(each.bytes);
  } else {
    for (const Landing& each : slot.landings) expected += 4 * each.bags * each.dim;
  }
  if (wrong.empty() && config_.checksums && header.checksum != checksum(from, header.length)) {
    wrong = "its response does not match its checksum";
  }
  if (wrong.empty() && header.tag == kRefused && header.length == sizeof(Fault)) {
    if (job.ask->outcome == Outcome::ok) {
      job.ask->outcome = Outcome::refused;
      std::memcpy(&job.ask->fault, from, sizeof(Fault));
      job.ask->details = {owner, job.number, 0, 0, ""};
    }
    job.failed = true;  // the rest of it is not asked for
  } else if (wrong.empty() && (header.kind != Header::kInline || header.tag != kRows || header.length != expected)) {
    wrong = "its response has " + std::to_string(header.length) + " bytes and tag " + std::to_string(header.tag) +
            ", where " + std::to_string(expected) + " bytes of rows are expected";
  } else if (wrong.empty() && job.rows && !job.failed) {
    for (const FetchLanding& each : slot.rows) {
      std::memcpy(each.to, from, each.bytes);
      from += padded(each.bytes);
    }
  } else if (wrong.empty() && !job.failed) {
    for (const Landing& each : slot.landings) {
      const std::uint64_t row = 4 * std::uint64_t{each.dim};
      if (each.stride == each.dim) {
        std::memcpy(each.out, from, row * each.bags);
      } else {
        for (std::uint64_t b = 0; b < each.bags; ++b) std::memcpy(each.out + b * each.stride, from + b * row, row);
      }
      from += row * each.bags;
    }
  }
  if (!wrong.empty()) return lose(owner, Outcome::corrupt, wrong);
  stats_[owner].response_bytes += header.length;
  ++peer.received;
  --job.in_flight;
  retire(peer);
}

void Lookup::retire(PeerState& peer) {
  while (peer.oldest < peer.end) {
    Job& job = peer.jobs[peer.oldest % peer.jobs.size()];
    if (job.in_flight || !job.written()) return;
    for (std::size_t g = 0; job.rows && !job.failed && g < job.used; ++g) {
      const Gather& gather = job.gathers[g];
      pool_gathered(gather);
      const Table& table = tables_[gather.part->table];
      for (std::size_t k = 0; k < gather.missing.size(); ++k) {
        kept_[gather.part->table].insert(gather.missing[k], gather.buffer.get() + k * table.row_bytes);
      }
    }
    --job.ask->left;
    ++peer.oldest;
    peer.writing = std::max(peer.writing, peer.oldest);
  }
}

void Lookup::pump(std::uint32_t owner) {
  PeerState& peer = peers_[owner];
  if (peer.oldest == peer.end) return;
  if (peer.failure->failed()) return lose(owner, peer.failure->outcome(), "");
  const std::uint64_t seen = responses_.look(owner);
  if (seen > peer.sent) {
    return lose(owner, Outcome::corrupt, "its response counter says " + std::to_string(seen) + ", of " +
                                             std::to_string(peer.sent) + " requests");
  }
  while (!peer.lost && peer.received < seen) consume(owner, peer);
  if (!peer.lost) write(owner, peer);
}

// Take what has come, send what can be sent. Returns whether anything was served.
bool Lookup::pump() {
  for (std::uint32_t q = 0; q < peers_.size(); ++q) pump(q);
  return config_.serve_inline && server_->serve();
}

// Whether a wait is to end although what it waits for has not come; see Exchange::give_up.
template <typename Done>
Outcome Lookup::until(Done&& done, std::uint64_t deadline_ns) {
  pump();
  if (done()) return Outcome::ok;
  const std::uint64_t start = now_ns();
  bool woken = !config_.serve_inline;
  std::vector<std::uint32_t> behind;
  for (std::uint32_t q = 0; q < peers_.size(); ++q) {
    if (peers_[q].oldest == peers_[q].end) continue;
    behind.push_back(q);
    woken &= peers_[q].answering->direct();
  }
  const auto charge = [&] {
    const std::uint64_t waited = now_ns() - start;
    std::erase_if(behind, [&](std::uint32_t q) {
      if (peers_[q].oldest < peers_[q].end && !done()) return false;
      stats_[q].wait_ns += waited;
      return true;
    });
  };
  Backoff backoff(config_.wait, Sleeper(responses_arena_->data()), deadline_ns);
  const auto progressed = [&] {
    while (pump()) {
    }
    return done();
  };
  while (!backoff.until(progressed, woken)) {
    charge();
    find_failures();
    if (done()) break;
    const std::uint64_t now = now_ns();
    if (now >= deadline_ns) return fail(Outcome::timeout, config_.rank);
    if (!config_.interrupted || now - asked_ns_ < 50'000'000) continue;
    asked_ns_ = now;
    if (config_.interrupted()) return Outcome::interrupted;
  }
  charge();
  return Outcome::ok;
}

// Wait until another ask may be open, and open it.
Outcome Lookup::open_ask(std::uint64_t deadline_ns, Ask*& ask) {
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

// Find the rows of a part: kept here, in the cache, or to be fetched. If all are here, it is pooled at once.
void Lookup::gather(const Part& part, Job& job) {
  const Table& table = tables_[part.table];
  KeptRows& kept = kept_[part.table];
  AskStats& stats = stats_[table.owner];
  const std::uint64_t first = part.first(), count = static_cast<std::uint64_t>(part.offsets[part.bags]) - first;
  if (job.used == job.gathers.size()) job.gathers.emplace_back();
  Gather& it = job.gathers[job.used];
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
  if (it.missing.empty()) return pool_gathered(it);
  ++job.used;
  job.parts.push_back(&part);
  job.fetches.push_back({part.table, it.missing.data(), it.missing.size(), it.buffer.get()});
}

void Lookup::pool_gathered(const Gather& gather) {
  const Part& part = *gather.part;
  const Table& table = tables_[part.table];
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
  const Table& table = tables_[number];
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
    fault_ = check(part, tables_[part.table]);
    if (fault_.kind != Fault::none) return fail(Outcome::bad_bags, config_.rank);
  }
  Ask* opened = nullptr;
  const Outcome outcome = open_ask(deadline_ns, opened);
  if (outcome != Outcome::ok) return outcome;
  Ask& ask = *opened;
  number = ask.number;
  ask.parts = parts;
  for (const Part& part : ask.parts) {
    const Table& table = tables_[part.table];
    AskStats& stats = stats_[table.owner];
    stats.bags += part.bags;
    stats.rows += static_cast<std::uint64_t>(part.offsets[part.bags] - part.offsets[0]);
    if (part.bags == 0) continue;
    if (reads(table)) {
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
  for (const Part* part : ask.here) pool_here(*part, tables_[part->table], scratch_);
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

Outcome Lookup::finish(std::uint64_t deadline_ns) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  const Outcome own = until([&] { return next_ == 0 || missing(next_ - 1).empty(); }, deadline_ns);
  if (own != Outcome::ok) return own;
  for (const PeerState& peer : peers_) {
    if (peer.asking) peer.asking->acknowledge(1);
  }
  const Outcome outcome = until(
      [&] {
        for (std::uint32_t q = 0; q < peers_.size(); ++q) {
          if (q != config_.rank && server_->inbox().pulled(q) == 0 && !has_left(q)) return false;
        }
        return true;
      },
      deadline_ns);
  if (outcome == Outcome::timeout) {
    std::string who;
    for (std::uint32_t q = 0; q < peers_.size(); ++q) {
      if (q == config_.rank || server_->inbox().pulled(q) || has_left(q)) continue;
      who += (who.empty() ? "" : ", ") + std::to_string(q);
    }
    details_.text = "have not finished: ranks " + who;
  }
  return outcome;
}

std::string Lookup::transport(std::uint32_t peer) const {
  std::string name;
  if (asking_[peer]) fabric_->call([&] { name = asking_[peer]->transport(); });
  return name;
}

bool Lookup::close(std::uint32_t code, std::uint32_t blamed, const std::string& text, std::uint64_t deadline_ns) {
  Farewell word{};
  word.code = code;
  word.blamed = blamed;
  word.text_bytes = static_cast<std::uint32_t>(std::min(text.size(), Farewell::kTextBytes));
  std::memcpy(word.text, text.data(), word.text_bytes);
  for (const auto& each : asking_) {
    if (each) each->farewell(word);
  }
  fabric_->kick();
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (const auto* plane : {&asking_, &answering_}) {
    for (const auto& each : *plane) {
      if (each) each->wake();
    }
  }
  // A peer may write here until it has said farewell itself, or cannot any more. Until then it is served, too.
  const auto quiet = [&] {
    for (std::uint32_t q = 0; q < peers_.size(); ++q) {
      if (asking_[q] && !(asking_[q]->drained() && answering_[q]->drained() && has_left(q))) return false;
    }
    return true;
  };
  bool all_quiet = false;
  for (;;) {
    all_quiet = fabric_->until(quiet, config_.serve_inline ? std::min(deadline_ns, deadline_after(300'000)) : deadline_ns);
    if (all_quiet || now_ns() >= deadline_ns) break;
    while (server_->serve()) {
    }
  }
  server_->stop();
  fabric_->call([&] {
    if (liveness_) liveness_->stop(*fabric_);
    fabric_->detach(request_bell_.get());
    fabric_->detach(response_bell_.get());
    for (PeerState& peer : peers_) {
      if (peer.tables) ucp_rkey_destroy(std::exchange(peer.tables, nullptr));
    }
    for (auto* plane : {&asking_, &answering_}) {
      for (const auto& each : *plane) {
        if (each) each->disconnect();
      }
    }
  });
  const auto disconnected = [&] {
    bool all = true;
    for (auto* plane : {&asking_, &answering_}) {
      for (const auto& each : *plane) all &= !each || each->disconnected();
    }
    return all;
  };
  const bool all_closed = fabric_->until(disconnected, std::max(deadline_ns, deadline_after(1'000'000'000)));
  fabric_->call([&] {
    for (auto* plane : {&asking_, &answering_}) {
      for (auto& each : *plane) {
        if (!each) continue;
        fabric_->detach(each.get());
        if (!all_closed) each.release();  // leaked on purpose: UCX may still call back into it
      }
    }
  });
  closed_ = true;
  if (!all_closed) {
    new std::vector<PeerState>(std::move(peers_));
    peers_.clear();
    server_.release();
  }
  asking_.clear();
  answering_.clear();
  return all_quiet && all_closed;
}

}  // namespace blsrdma
