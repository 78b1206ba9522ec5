// An owner's answers: requests are looked up, and the pooled rows put into their senders' response windows, apart from the
// rank's own loop: by a thread that needs no GIL, or by whoever calls serve() (inline).
//
// The response to request n is its acknowledgement: with lag + 1 request windows a client puts n only after it has consumed
// the response to n - lag - 1, so the window of a request is never overwritten before it has been answered.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "arena.h"
#include "channel.h"
#include "inbox.h"
#include "query.h"
#include "versions.h"
#include "wait.h"

namespace blsrdma {

// Of one client; read by other threads while the server writes.
struct ServeStats {
  std::atomic<std::uint64_t> requests{0};
  std::atomic<std::uint64_t> bags{0};
  std::atomic<std::uint64_t> rows{0};
  std::atomic<std::uint64_t> refused{0};
  std::atomic<std::uint64_t> busy_ns{0};
};

class Server {
 public:
  struct Config {
    Geometry requests;   // of this rank's request arena
    Geometry responses;  // of the clients' response arenas
    std::uint32_t rank = 0;
    std::uint64_t request_epoch = 0;
    std::uint64_t response_epoch = 0;
    bool checksums = false;
    WaitPolicy wait;
    double share = 1.0;  // of one core, at most
  };
  using Unserved = std::function<bool(std::uint32_t client)>;                   // it has died: nothing to be done for it
  using Wrong = std::function<void(std::uint32_t client, std::string what)>;    // it writes what no client writes

  Server(std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> requests, TableSets& tables, const Config& config, Unserved unserved,
         Wrong wrong);
  ~Server() { stop(); }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // The channels of responses, by client (none for oneself); to be set before anything is served.
  void connect(const std::vector<std::unique_ptr<Channel>>& responses);
  void use(GpuPooler* gpu) { scratch_.gpu = gpu; }  // for tables on a GPU; before anything is served
  void start();  // a thread that serves until stop()
  void stop();   // idempotent; afterwards nothing touches the channels any more

  // One request of each client that has one, if its response can be sent. Returns whether there was any. One thread at a time.
  bool serve();
  bool pending();  // whether a request is here; same thread as serve()

  std::uint64_t served(std::uint32_t client) const { return stats_[client]->requests.load(std::memory_order_relaxed); }
  const ServeStats& stats(std::uint32_t client) const { return *stats_[client]; }
  const Inbox& inbox() const { return inbox_; }

 private:
  struct Client {
    Channel* channel = nullptr;
    std::uint64_t next = 0;  // request to be answered
    bool given_up = false;
    Carry carry;
    std::vector<std::vector<std::byte>> staging;  // responses on their way, by window; none where stores are direct
  };

  void run();
  void answer(std::uint32_t number, Client& client);
  void rest(std::uint64_t busy_ns);
  bool waiting(std::uint32_t number, Client& client);

  std::shared_ptr<Fabric> fabric_;
  std::shared_ptr<Arena> arena_;
  TableSets& tables_;
  const Config config_;
  Inbox inbox_;
  Unserved unserved_;
  Wrong wrong_;
  std::vector<Client> clients_;
  std::vector<std::unique_ptr<ServeStats>> stats_;
  Scratch scratch_;
  std::uint64_t debt_ns_ = 0;  // of rest
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace blsrdma
