#include "serve.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace blsrdma {
namespace {

constexpr std::uint64_t kLeastRestNs = 200'000;    // shorter rests are saved up: a sleep overshoots by half of that
constexpr std::uint64_t kLongestRestNs = 20'000'000;

void add(std::atomic<std::uint64_t>& to, std::uint64_t more) {  // one writer
  to.store(to.load(std::memory_order_relaxed) + more, std::memory_order_relaxed);
}

}  // namespace

Server::Server(std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> requests, TableSets& tables, const Config& config,
               Unserved unserved, Wrong wrong)
    : fabric_(std::move(fabric)),
      arena_(std::move(requests)),
      tables_(tables),
      config_(config),
      inbox_(*arena_, config.requests, config.rank, config.request_epoch),
      unserved_(std::move(unserved)),
      wrong_(std::move(wrong)),
      clients_(config.requests.ranks) {
  for (std::uint32_t q = 0; q < config.requests.ranks; ++q) stats_.push_back(std::make_unique<ServeStats>());
}

void Server::connect(const std::vector<std::unique_ptr<Channel>>& responses) {
  for (std::uint32_t q = 0; q < clients_.size(); ++q) {
    clients_[q].channel = responses[q].get();
    if (!responses[q] || responses[q]->direct()) continue;
    clients_[q].staging.resize(config_.responses.windows);
    for (auto& each : clients_[q].staging) each.resize(config_.responses.window_bytes);
  }
}

void Server::start() {
  // Signals are for the application's threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread_.native_handle(), "blsrdma-serve");
}

void Server::stop() {
  stopping_.store(true);
  if (scratch_.gpu) scratch_.gpu->stop();
  if (!thread_.joinable()) return;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  Sleeper(arena_->data()).wake();
  thread_.join();
}

bool Server::waiting(std::uint32_t number, Client& client) {
  if (!client.channel || client.given_up) return false;
  if (inbox_.look(number) <= client.next) return false;
  if (inbox_.seen(number) - client.next > config_.requests.windows) {
    client.given_up = true;
    wrong_(number, "its request counter says " + std::to_string(inbox_.seen(number)) + ", of which " +
                       std::to_string(client.next) + " are answered, with " + std::to_string(config_.requests.windows) +
                       " windows");
    return false;
  }
  // On a put path the response before last may have arrived there, and yet not be known to be complete here.
  return client.channel->room(client.next);
}

bool Server::pending() {
  for (std::uint32_t q = 0; q < clients_.size(); ++q) {
    if (waiting(q, clients_[q])) return true;
  }
  return false;
}

bool Server::serve() {
  bool any = false;
  for (std::uint32_t step = 1; step < clients_.size(); ++step) {
    const auto q = static_cast<std::uint32_t>((config_.rank + step) % clients_.size());
    if (!waiting(q, clients_[q])) continue;
    if (unserved_(q)) {
      clients_[q].given_up = true;
      continue;
    }
    answer(q, clients_[q]);
    any = true;
  }
  return any;
}

void Server::answer(std::uint32_t number, Client& client) {
  const std::uint64_t began = now_ns();
  const std::uint64_t n = client.next;
  ServeStats& stats = *stats_[number];
  std::byte* reply = client.channel->place(n);
  if (!reply) reply = client.staging[n % config_.responses.windows].data();

  Header header;
  std::string wrong = inbox_.read(n, number, header);
  if (wrong.empty() && header.kind != Header::kInline) wrong = "not a request";
  if (wrong.empty() && config_.checksums && header.checksum != checksum(inbox_.payload(n, number), header.length)) {
    wrong = "its request does not match its checksum";
  }
  Answer answer;
  const std::vector<Table>* tables = wrong.empty() ? tables_.hold(header.tag) : nullptr;
  if (tables) {
    answer = answer_query(inbox_.payload(n, number), header.length, *tables, config_.rank, client.carry, reply,
                          config_.responses.window_bytes, scratch_);
    tables_.let_go();
  } else {
    client.carry.active = false;
    answer.fault.kind = wrong.empty() ? Fault::version : Fault::malformed;
    answer.fault.value = static_cast<std::int64_t>(header.tag);
  }
  Header back{n, answer.bytes, kRows, Header::kInline, 0, 0};
  if (answer.fault.kind != Fault::none) {
    std::memcpy(reply, &answer.fault, sizeof answer.fault);  // every window has room for that
    back.tag = kRefused;
    back.length = sizeof answer.fault;
    add(stats.refused, 1);
  }
  if (config_.checksums) back.checksum = checksum(reply, back.length);
  back.seal(config_.response_epoch);
  add(stats.bags, answer.bags);
  add(stats.rows, answer.rows);
  ++client.next;
  client.channel->post(back, reply, back.length);
  if (!client.channel->direct()) fabric_->start();
  std::atomic_thread_fence(std::memory_order_seq_cst);  // pairs with that of a sleeper
  client.channel->wake();
  const std::uint64_t busy = now_ns() - began;
  add(stats.busy_ns, busy);
  add(stats.requests, 1);
  rest(busy);
}

// With a share of s, w ns of work are followed by w (1 / s - 1) ns of rest.
void Server::rest(std::uint64_t busy_ns) {
  if (config_.share >= 1.0) return;
  debt_ns_ += static_cast<std::uint64_t>(static_cast<double>(busy_ns) * (1.0 / config_.share - 1.0));
  if (debt_ns_ < kLeastRestNs || stopping_.load(std::memory_order_relaxed)) return;
  const std::uint64_t ns = std::min(debt_ns_, kLongestRestNs), before = now_ns();
  const timespec span{0, static_cast<long>(ns)};
  nanosleep(&span, nullptr);
  debt_ns_ -= std::min(debt_ns_, now_ns() - before);
}

void Server::run() {
  const bool woken = std::all_of(clients_.begin(), clients_.end(),
                                 [](const Client& each) { return !each.channel || each.channel->direct(); });
  while (!stopping_.load(std::memory_order_relaxed)) {
    Backoff backoff(config_.wait, Sleeper(arena_->data()), kNever);
    const auto wanted = [&] { return stopping_.load(std::memory_order_relaxed) || pending(); };
    while (!backoff.until(wanted, woken)) {
    }
    while (!stopping_.load(std::memory_order_relaxed) && serve()) {
    }
  }
}

}  // namespace blsrdma
