// Lookup: its beginning and its end.
#include "lookup.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#include <utility>

namespace blsrdma {
namespace {

// Both planes have their own check words, so that a record of one is none of the other.
constexpr std::uint64_t kResponsePlane = 0x9e3779b97f4a7c15u;

// Tables that are mapped have no page entries yet: a fault for every 4 KiB, in the first asks, which they would slow down
// many times. Kernels before 5.14 cannot do it at once, and leave it to the asks.
void fault_in(const std::byte* data, std::uint64_t bytes) {
#ifdef MADV_POPULATE_READ
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(data) / page * page;
  const auto end = reinterpret_cast<std::uintptr_t>(data) + bytes;
  if (bytes) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_READ);
#endif
}

}  // namespace

Lookup::Lookup(std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> requests, std::shared_ptr<Arena> responses,
               std::shared_ptr<Arena> table_memory, std::vector<Table> tables, const Config& config)
    : fabric_(std::move(fabric)),
      requests_arena_(std::move(requests)),
      responses_arena_(std::move(responses)),
      tables_arena_(std::move(table_memory)),
      tables_(std::move(tables), config.version),
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
  version_ = loaded_ = config.version;
  for (const Table& each : tables_.at(0)) {
    peers_[each.owner].owns = true;
    owns_ |= each.owner == config.rank;
  }
  for (PeerState& each : peers_) each.announced = each.moved = config.version;
  if (tables_arena_) {
    VersionWord(tables_arena_->data(), 1).clear();
    VersionWord(tables_arena_->data(), 0).set(config.version);
  }
  std::uint64_t remote = 0;
  for (const Table& each : tables_.at(0)) remote += each.owner == config.rank ? 0 : each.rows * each.row_bytes;
  costs_.resize(tables_.at(0).size());
  kept_.resize(tables_.at(0).size());
  for (std::size_t t = 0; t < kept_.size(); ++t) {
    const Table& table = tables_.at(0)[t];
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
      drop_getters();
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
  new std::tuple(fabric_, requests_arena_, responses_arena_, tables_arena_);
  // Requests and responses that are being put are read from these; what is got lands here.
  new std::vector<PeerState>(std::move(peers_));
  server_.release();
}

void Lookup::use(std::shared_ptr<GpuPooler> serving, std::shared_ptr<GpuPooler> own, const std::vector<std::uint32_t>& tables) {
  serving_gpu_ = std::move(serving);
  own_gpu_ = std::move(own);
  server_->use(serving_gpu_.get());
  scratch_.gpu = own_gpu_.get();
  for (std::uint32_t place = 0; place < TableSets::kPlaces; ++place) {
    for (const std::uint32_t each : tables) tables_.at(place).at(each).on_gpu = true;
  }
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
      state.tables_there = peer.tables.arena;
      if (ucp_ep_rkey_unpack(asking_[q]->endpoint(), peer.tables.rkey.data(), &state.tables) != UCS_OK) state.tables = nullptr;
      if (!config_.allow_direct) continue;
      void* mapped = nullptr;
      // Only the token tells that this is the arena.
      if (state.tables && ucp_rkey_ptr(state.tables, peer.tables.arena, &mapped) == UCS_OK &&
          std::memcmp(mapped, peer.tables.token.data(), std::min<std::size_t>(peer.tables.token.size(), kLine)) == 0) {
        state.mapped = static_cast<std::byte*>(mapped);
      } else {
        state.reader.open(peer.tables.pid, peer.tables.arena, peer.tables.token);
      }
    }
    liveness_->start(*fabric_);
    fabric_->attach(request_bell_.get());
    fabric_->attach(response_bell_.get());
  });
  // Shared: where the deadline passes first, `settled` may still be run once this call has ended.
  const auto missing = std::make_shared<Remark>();
  const auto settled = [this, missing] {
    std::string cold;
    for (const auto* plane : {&asking_, &answering_}) {
      for (const auto& each : *plane) {
        if (!each) continue;
        if (each->broken() != UCS_OK) {
          throw UcxError("cannot connect to rank " + std::to_string(each->peer()), each->broken());
        }
        if (!each->warm()) cold += (cold.empty() ? "" : ", ") + std::to_string(each->peer());
      }
    }
    missing->set(cold);
    return cold.empty();
  };
  if (!fabric_->until(settled, deadline_ns)) {
    throw std::runtime_error("the first put has not completed to ranks " + missing->get());
  }
  fabric_->call([&] {
    for (const auto* plane : {&asking_, &answering_}) {
      for (const auto& each : *plane) {
        if (!each) continue;
        each->note_order();
        remote_ |= !each->direct();
      }
    }
  });
  open_getters(peers, deadline_ns);
  for (std::uint32_t place = 0; place < (config_.second_place ? TableSets::kPlaces : 1); ++place) {
    for (Table& table : tables_.at(place)) {
      if (table.owner != config_.rank && peers_[table.owner].mapped) {
        table.data = peers_[table.owner].mapped + table.offset;
        fault_in(table.data, table.rows * table.row_bytes);
      }
    }
  }
  server_->connect(answering_);
  if (!config_.serve_inline) server_->start();
}

// Where tables can neither be mapped nor read, but got without their owner: try it on its token.
void Lookup::open_getters(const std::vector<Peer>& peers, std::uint64_t deadline_ns) {
  struct Trial {
    Getter::Batch batch;
    std::array<std::byte, kLine> token{};
  };
  // Shared with the condition below, which may be evaluated after the deadline.
  const auto trials = std::make_shared<std::map<std::uint32_t, Trial>>();
  fabric_->call([&] {
    for (const Peer& peer : peers) {
      const std::uint32_t q = peer.requests.rank;
      PeerState& state = peers_[q];
      // Where this process has been forbidden to read the other's memory, cma has been, too.
      const bool forbidden = config_.allow_direct && peer.tables.pid != 0;
      if (!state.owns || !state.tables || state.mapped || state.reader || !asking_[q]->gets(!forbidden)) continue;
      state.getter = std::make_unique<Getter>(asking_[q]->endpoint(), state.tables, [this, q](ucs_status_t status) {
        broken(q, std::string("its connection is lost, reading its tables: ") + ucs_status_string(status));
      });
      fabric_->attach(state.getter.get());
      Trial& trial = (*trials)[q];
      trial.batch.pieces.push_back({trial.token.data(), kLine, state.tables_there});
      state.getter->post(trial.batch);
      remote_ = true;
    }
  });
  if (trials->empty()) return;
  const auto tried = [this, trials] {
    for (const auto& [q, trial] : *trials) {
      if (!trial.batch.done() && !peers_[q].failure->failed()) return false;
    }
    return true;
  };
  const bool in_time = fabric_->until(tried, deadline_ns);
  std::string missing;
  for (const auto& [q, trial] : *trials) {
    if (!trial.batch.done()) missing += (missing.empty() ? "" : ", ") + std::to_string(q);
  }
  if (!missing.empty()) new std::shared_ptr(trials);  // gets may still land there
  if (!in_time) throw std::runtime_error("the first get has not completed from ranks " + missing);
  for (const Peer& peer : peers) {
    const std::uint32_t q = peer.requests.rank;
    const auto trial = trials->find(q);
    if (trial == trials->end()) continue;
    const std::size_t length = std::min<std::size_t>(peer.tables.token.size(), kLine);
    if (trial->second.batch.done() && std::memcmp(trial->second.token.data(), peer.tables.token.data(), length) == 0) continue;
    throw std::runtime_error("what is got from rank " + std::to_string(q) + " is not its tables" +
                             (peers_[q].failure->failed() ? ": " + peers_[q].failure->text() : ""));
  }
}

// Nothing is got any more; in a turn. What is in flight may still land.
void Lookup::drop_getters() {
  for (PeerState& peer : peers_) {
    if (!peer.getter) continue;
    peer.getter->abandon();
    fabric_->detach(peer.getter.get());
  }
}

Outcome Lookup::finish(std::uint64_t deadline_ns) {
  const Turn turn(busy_);
  if (!turn) return Outcome::concurrent;
  const Outcome own = until([&] { return next_ == 0 || missing(next_ - 1).empty(); }, deadline_ns);
  if (own != Outcome::ok) return own;
  finished_ = true;
  tell_owners();
  const Outcome outcome = until(
      [&] {
        for (std::uint32_t q = 0; q < peers_.size(); ++q) {
          if (q != config_.rank && !(server_->inbox().pulled(q) & 1) && !has_left(q)) return false;
        }
        return true;
      },
      deadline_ns);
  if (outcome == Outcome::timeout) {
    std::string who;
    for (std::uint32_t q = 0; q < peers_.size(); ++q) {
      if (q == config_.rank || (server_->inbox().pulled(q) & 1) || has_left(q)) continue;
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
  const auto quiet = [this] {
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
  // Every call from here on is bounded too; see Exchange::close.
  const std::uint64_t last_ns = std::max(deadline_ns, deadline_after(1'000'000'000));
  const bool reached = fabric_->call([this] {
    if (liveness_) liveness_->stop(*fabric_);
    fabric_->detach(request_bell_.get());
    fabric_->detach(response_bell_.get());
    drop_getters();
    for (auto* plane : {&asking_, &answering_}) {
      for (const auto& each : *plane) {
        if (each) each->disconnect();
      }
    }
  }, last_ns);
  if (!reached) return false;
  const auto disconnected = [this] {
    bool all = true;
    for (auto* plane : {&asking_, &answering_}) {
      for (const auto& each : *plane) all &= !each || each->disconnected();
    }
    for (PeerState& peer : peers_) {  // gets refer to the key until they have completed
      const bool idle = !peer.getter || peer.getter->idle();
      if (idle && peer.tables) ucp_rkey_destroy(std::exchange(peer.tables, nullptr));
      all &= idle;
    }
    return all;
  };
  // What a peer has put into a socket or a queue before it died may arrive after its death; its farewell is the last of it.
  bool silent = all_quiet;
  for (std::uint32_t q = 0; q < peers_.size(); ++q) {
    silent &= !asking_[q] || (asking_[q]->was_direct() && answering_[q]->was_direct()) || server_->inbox().farewell(q).has_value();
  }
  const bool all_closed = fabric_->until(disconnected, last_ns);
  const bool detached = fabric_->call([this, all_closed] {
    for (auto* plane : {&asking_, &answering_}) {
      for (auto& each : *plane) {
        if (!each) continue;
        fabric_->detach(each.get());
        if (!all_closed) each.release();  // leaked on purpose: UCX may still call back into it
      }
    }
  }, last_ns);
  if (!detached) return false;
  closed_ = true;
  if (!all_closed) {
    new std::vector<PeerState>(std::move(peers_));
    peers_.clear();
    server_.release();
  }
  asking_.clear();
  answering_.clear();
  return silent && all_closed;
}

}  // namespace blsrdma
