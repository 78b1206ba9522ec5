#include "fabric.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <future>
#include <system_error>
#include <utility>

#include "wait.h"

namespace blsrdma {
namespace {

constexpr unsigned kSpins = 64;           // idle rounds before the thread gives the core away
constexpr unsigned kYields = 256;         // idle rounds, work in flight, before it sleeps
constexpr int kBusySleepMs = 1;           // bound of a sleep while work is in flight
constexpr int kIdleSleepMs = 500;         // bound of a sleep otherwise (UCX keep-alive runs inside progress)

}  // namespace

Fabric::Fabric(ucp_worker_h worker, std::shared_ptr<void> owner) : owner_(std::move(owner)), worker_(worker) {
  check(ucp_worker_get_efd(worker_, &worker_fd_), "ucp_worker_get_efd (the context needs the WAKEUP feature)");
  wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  // Signals are for the application's threads: the progress thread blocks them all.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread_.native_handle(), "blsrdma");
}

Fabric::~Fabric() {
  stop();
  close(wake_fd_);
}

void Fabric::stop() {
  if (stopping_.exchange(true)) return;
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = write(wake_fd_, &one, sizeof one);
  if (thread_.joinable()) thread_.join();
}

void Fabric::kick() {
  // Pairs with the fence in sleep(): either the thread sees the new work before it sleeps, or we see that it sleeps.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!sleeping_.load(std::memory_order_relaxed)) return;
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = write(wake_fd_, &one, sizeof one);
}

void Fabric::call(const std::function<void()>& work) {
  std::packaged_task<void()> task(work);
  auto done = task.get_future();
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) throw std::runtime_error("the fabric is closed");
    commands_.emplace_back([&task] { task(); });
  }
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = write(wake_fd_, &one, sizeof one);
  done.get();
}

bool Fabric::until(const std::function<bool()>& done, std::uint64_t deadline_ns) {
  for (;;) {
    bool holds = false;
    call([&] { holds = done(); });
    if (holds) return true;
    if (now_ns() >= deadline_ns) return false;
    usleep(200);  // the thread itself goes on meanwhile
  }
}

void Fabric::attach(Driven* driven) { driven_.push_back(driven); }

void Fabric::detach(Driven* driven) { std::erase(driven_, driven); }

bool Fabric::run_commands() {
  std::deque<std::function<void()>> commands;
  {
    const std::lock_guard lock(mutex_);
    commands.swap(commands_);
  }
  for (auto& command : commands) command();
  return !commands.empty();
}

bool Fabric::anything_waiting() const {
  return std::any_of(driven_.begin(), driven_.end(), [](const Driven* each) { return each->waiting(); });
}

void Fabric::sleep(int milliseconds) {
  // UCS_ERR_BUSY: events are pending already, progress first.
  if (ucp_worker_arm(worker_) != UCS_OK) return;
  pollfd fds[2] = {{worker_fd_, POLLIN, 0}, {wake_fd_, POLLIN, 0}};
  ::poll(fds, 2, milliseconds);
  if (fds[1].revents & POLLIN) {
    std::uint64_t count = 0;
    [[maybe_unused]] const auto drained = read(wake_fd_, &count, sizeof count);
  }
}

void Fabric::run() {
  unsigned idle = 0;
  while (!stopping_.load(std::memory_order_relaxed)) {
    bool moved = run_commands();
    moved |= ucp_worker_progress(worker_) != 0;
    for (std::size_t i = 0; i < driven_.size(); ++i) moved |= driven_[i]->advance();
    if (moved) {
      idle = 0;
      continue;
    }
    if (++idle < kSpins) {
      relax();
      continue;
    }
    const bool in_flight = anything_waiting();
    if (in_flight && idle < kYields) {
      sched_yield();
      continue;
    }
    sleeping_.store(true, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (in_flight || !anything_waiting()) sleep(in_flight ? kBusySleepMs : kIdleSleepMs);
    sleeping_.store(false, std::memory_order_relaxed);
    if (!in_flight) idle = 0;
  }
  run_commands();  // nobody waits for a command that never runs
}

}  // namespace blsrdma
