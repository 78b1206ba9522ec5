#include "liveness.h"

#include <poll.h>
#include <unistd.h>

#include <atomic>

#include "wait.h"

namespace blsrdma {
namespace {

constexpr std::uint64_t kTickNs = 1'000'000'000;  // what is due between two ticks; see fabric.cpp
constexpr std::uint64_t kLateNs = 2 * kTickNs;

}  // namespace

Liveness::Liveness(const Inbox& inbox, std::uint32_t self, std::vector<int> pidfds, std::uint64_t keepalive_ns, Died died)
    : inbox_(inbox),
      self_(self),
      pidfds_(std::move(pidfds)),
      keepalive_ns_(keepalive_ns),
      died_(std::move(died)),
      pulses_(pidfds_.size()) {
  for (Pulse& each : pulses_) each.since = now_ns();
}

Liveness::~Liveness() {
  for (const int fd : pidfds_) {
    if (fd >= 0) ::close(fd);
  }
}

void Liveness::start(Fabric& fabric) {
  for (std::uint32_t q = 0; q < pidfds_.size(); ++q) {
    if (!here(q)) continue;
    fabric.watch(pidfds_[q], [this, &fabric, q] {
      fabric.unwatch(pidfds_[q]);  // it stays readable
      died_(q, "its process has ended");
    });
  }
  fabric.attach(this);
}

void Liveness::stop(Fabric& fabric) {
  fabric.detach(this);
  for (std::uint32_t q = 0; q < pidfds_.size(); ++q) {
    if (here(q)) fabric.unwatch(pidfds_[q]);
  }
}

void Liveness::tick(std::uint64_t now) {
  // While this thread did not run (a loaded machine, a debugger, SIGSTOP) it heard nobody: no fault of the peers'.
  const std::uint64_t deaf = ticked_ && now - ticked_ > kLateNs ? now - ticked_ - kTickNs : 0;
  ticked_ = now;
  for (std::uint32_t q = 0; q < pulses_.size(); ++q) {
    Pulse& pulse = pulses_[q];
    if (q == self_ || here(q) || pulse.gone) continue;
    const std::uint64_t signs = inbox_.signs_of_life(q);
    // One that has never been heard is still connecting; the rendezvous has a deadline for that.
    const std::uint64_t since = signs != pulse.signs || signs == 0 ? now : pulse.since + deaf;
    std::atomic_ref<std::uint64_t>(pulse.since).store(since, std::memory_order_relaxed);
    if (signs != pulse.signs) {
      pulse.signs = signs;
    } else if (now - pulse.since > keepalive_ns_) {
      pulse.gone = true;
      died_(q, "no sign of life for " + std::to_string((now - pulse.since) / 1'000'000'000u) +
                   " s: stopped, or unreachable");
    }
  }
}

bool Liveness::dead(std::uint32_t peer) const {
  if (!here(peer)) return false;
  pollfd fd{pidfds_[peer], POLLIN, 0};
  return ::poll(&fd, 1, 0) == 1 && (fd.revents & POLLIN);
}

std::uint64_t Liveness::silence_ns(std::uint32_t peer) const {
  return now_ns() - std::atomic_ref<std::uint64_t>(pulses_[peer].since).load(std::memory_order_relaxed);
}

}  // namespace blsrdma
