// Do the peers still live? Asked on the progress thread, so that a death is noticed whatever the application does.
//
// On this host by a pidfd, which is readable once its process has ended. Elsewhere by UCX, which reports a broken
// connection, and by heartbeats: counters that each peer puts here once a second (see Channel::tick).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "fabric.h"
#include "inbox.h"

namespace blsrdma {

class Liveness final : public Driven {
 public:
  using Died = std::function<void(std::uint32_t rank, std::string why)>;

  // pidfds[q]: of rank q's process if it is on this host, else -1; owned from here on. `died` is called on the progress
  // thread, once a peer.
  Liveness(const Inbox& inbox, std::uint32_t self, std::vector<int> pidfds, std::uint64_t keepalive_ns, Died died);
  ~Liveness() override;

  void start(Fabric& fabric);  // in a turn
  void stop(Fabric& fabric);   // in a turn
  void tick(std::uint64_t now) override;

  bool here(std::uint32_t peer) const { return pidfds_[peer] >= 0; }
  bool dead(std::uint32_t peer) const;  // its process on this host has ended
  // Since the last sign of life of a peer elsewhere.
  std::uint64_t silence_ns(std::uint32_t peer) const;

 private:
  struct Pulse {
    std::uint64_t signs = 0;
    std::uint64_t since = 0;
    bool gone = false;
  };

  const Inbox& inbox_;
  std::uint32_t self_;
  std::vector<int> pidfds_;
  std::uint64_t keepalive_ns_;
  Died died_;
  std::uint64_t ticked_ = 0;  // when, last
  mutable std::vector<Pulse> pulses_;  // `since` is read by other threads, for messages only
};

}  // namespace blsrdma
