// Lookup: requests out, responses in, waiting for them, and what fails on the way.
#include <algorithm>
#include <cstring>
#include <utility>

#include "lookup.h"

namespace blsrdma {

// --- failures

Outcome Lookup::fail(Outcome outcome, std::uint32_t rank, std::string text) {
  details_ = {rank, next_, 0, 0, std::move(text)};
  return outcome;
}

bool Lookup::has_left(std::uint32_t peer) const {
  return server_->inbox().farewell(peer) || liveness_->dead(peer) || asking_[peer]->broken() != UCS_OK ||
         answering_[peer]->broken() != UCS_OK;
}

// In a turn of the fabric. One that has said farewell has left: what is still wanted of it finds that.
void Lookup::broken(std::uint32_t peer, std::string why) {
  if (!server_->inbox().farewell(peer)) peers_[peer].failure->set(Outcome::peer_died, peer, std::move(why));
  request_bell_->stirred();
  response_bell_->stirred();
}

void Lookup::fill_in(std::uint32_t owner, const Part& part) {
  for (std::uint64_t b = 0; b < part.bags; ++b) {
    std::fill_n(part.out + b * part.stride, tables()[part.table].dim, config_.instead);
  }
  stats_[owner].degraded += part.bags;
}

// Bags of an owner that has failed: the ask fails, or they get default rows.
void Lookup::give_up(std::uint32_t owner, const Part& part, Ask& ask) {
  if (config_.degrade) {
    fill_in(owner, part);
  } else if (ask.outcome == Outcome::ok) {
    ask.outcome = peers_[owner].failure->outcome();
    ask.details = {owner, ask.number, 0, 0, peers_[owner].failure->text()};
  }
}

// An owner's word that it will not answer, or that it cannot: then it is an owner that has failed, but it may go on asking.
void Lookup::refused(std::uint32_t owner, Job& job, const Fault& fault) {
  Ask& ask = *job.ask;
  const bool able = fault.kind != Fault::device;
  if (!able && config_.degrade && !job.parts.empty()) {
    for (const Part* part : job.parts) fill_in(owner, *part);
    return;
  }
  if (ask.outcome != Outcome::ok) return;
  ask.outcome = able ? Outcome::refused : Outcome::peer_erred;
  ask.fault = fault;
  ask.details = {owner, job.number, 0, 0, ""};
  if (able) return;
  ask.details.text = fault.value < 0 ? "its GPU has not pooled its rows within " + std::to_string(fault.limit) + " ms"
                                     : "its GPU has failed, with CUDA's error " + std::to_string(fault.value);
}

// Everything that is still wanted of an owner, now and later, fails; or gets default rows.
void Lookup::lose(std::uint32_t owner, Outcome outcome, const std::string& text) {
  PeerState& peer = peers_[owner];
  peer.failure->set(outcome, owner, text);
  peer.lost = true;
  for (; peer.oldest < peer.end; ++peer.oldest) {
    Job& job = peer.jobs[peer.oldest % peer.jobs.size()];
    --job.ask->left;
    for (const Part* part : job.parts) give_up(owner, *part, *job.ask);
    for (const Part* part : job.getting) give_up(owner, *part, *job.ask);
    if (job.parts.empty() && job.getting.empty() && job.ask->outcome == Outcome::ok) {  // rows to be kept
      job.ask->outcome = peer.failure->outcome();
      job.ask->details = {owner, job.number, 0, 0, peer.failure->text()};
    }
  }
  peer.writing = peer.end;
  peer.received = peer.sent;  // responses that still come are not looked at
  if (!peer.getter) return;
  peer.getter->abandon();
  for (Job& job : peer.jobs) peer.unclaimed.push_back(std::exchange(job.gathers, {}));
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
                                    ? write_fetch(job.fetches, tables(), job.cursor, to, room, reply_room, slot.rows)
                                    : write_query(job.parts, tables(), job.cursor, to, room, reply_room, slot.landings);
    slot.job = &job;
    ++job.in_flight;
    Header header{peer.sent, bytes, job.ask->version, Header::kInline, config_.checksums ? checksum(to, bytes) : 0, 0};
    header.seal(config_.epoch);
    peer.asking->post(header, to, bytes);
    ++peer.sent;
    ++stats_[owner].requests;
    stats_[owner].request_bytes += bytes;
    if (!peer.asking->direct()) fabric_->start();
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
    Fault fault;
    std::memcpy(&fault, from, sizeof fault);
    if (!job.failed) refused(owner, job, fault);
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
  retire(owner, peer);
}

void Lookup::retire(std::uint32_t owner, PeerState& peer) {
  while (peer.oldest < peer.end) {
    Job& job = peer.jobs[peer.oldest % peer.jobs.size()];
    if (job.in_flight || !job.written() || !job.got()) return;
    if (!job.getting.empty() && liveness_->dead(owner)) return lose(owner, Outcome::peer_died, "its process has ended");
    if (!job.getting.empty() && job.batch->word_at && job.batch->word != job.ask->version) {
      return lose(owner, Outcome::peer_died, overwritten());
    }
    for (std::size_t g = 0; !job.failed && g < job.used; ++g) {
      const Gather& gather = job.gathers[g];
      pool_gathered(gather);
      const Table& table = tables()[gather.part->table];
      for (std::size_t k = 0; job.ask->version == version_ && k < gather.missing.size(); ++k) {
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
  if (!peer.lost && peer.getter) retire(owner, peer);
  if (!peer.lost) write(owner, peer);
}

// Take what has come, send what can be sent. Returns whether anything was served.
bool Lookup::pump() {
  for (std::uint32_t q = 0; q < peers_.size(); ++q) pump(q);
  move_on();
  return config_.serve_inline && server_->serve();
}

// Whether a wait is to end although what it waits for has not come; see Exchange::give_up.
Outcome Lookup::until(const std::function<bool()>& done, std::uint64_t deadline_ns) {
  pump();
  if (done()) return Outcome::ok;
  const std::uint64_t start = now_ns();
  bool woken = !config_.serve_inline;
  std::vector<std::uint32_t> behind;
  for (std::uint32_t q = 0; q < peers_.size(); ++q) {
    if (peers_[q].oldest == peers_[q].end) continue;
    behind.push_back(q);
    woken &= peers_[q].answering->direct() && !peers_[q].getter;
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
    if (remote_) fabric_->drive();
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

}  // namespace blsrdma
