#include "fabric.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <future>
#include <memory>
#include <system_error>
#include <utility>

#include "wait.h"

namespace blsrdma {
namespace {

constexpr unsigned kSpins = 64;                      // idle rounds before the thread gives the core away
constexpr unsigned kYields = 256;                    // idle rounds, work in flight, before it sleeps
constexpr int kBusySleepMs = 1;                      // bound of a sleep while work is in flight
constexpr int kIdleSleepMs = 500;                    // bound of a sleep otherwise
constexpr int kStartRounds = 16;                     // of one start(): what is queued takes one or two
constexpr long kNapNs = 100'000;                     // how long what callers have left is left alone
constexpr std::chrono::milliseconds kLeastCall{200};  // how long a bounded call waits, however late it is
constexpr std::uint64_t kTickNs = 1'000'000'000;
constexpr std::uint64_t kWatchNs = 100'000'000;      // how long a busy thread may be deaf to its watches

int checked(int result, const char* what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}

void ring(int eventfd) {
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = write(eventfd, &one, sizeof one);
}

}  // namespace

Fabric::Fabric(ucp_worker_h worker, std::shared_ptr<void> owner)
    : owner_(std::move(owner)), worker_(worker), pid_(getpid()) {
  int worker_fd = -1;
  check(ucp_worker_get_efd(worker_, &worker_fd), "ucp_worker_get_efd (the context needs the WAKEUP feature)");
  events_ = checked(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
  wake_ = checked(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd");
  watch(worker_fd, [] {});  // what woke the thread it finds by progress
  watch(wake_, [this] {
    std::uint64_t count = 0;
    [[maybe_unused]] const auto drained = read(wake_, &count, sizeof count);
  });
  // Signals are for the application's threads: the progress thread blocks them all.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] {
    run();
    ended_.set_value();
  });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread_.native_handle(), "blsrdma");
}

Fabric::~Fabric() {
  stop();  // whoever wants a bound has asked for it before
  close(wake_);
  close(events_);
}

bool Fabric::stop(std::uint64_t at_most_ns) {
  stopping_ = true;
  if (!thread_.joinable()) return true;
  if (getpid() != pid_) {  // in the child of a fork the thread does not exist
    thread_.detach();
    return true;
  }
  ring(wake_);
  const std::uint64_t deadline_ns = deadline_after(at_most_ns);
  if (at_most_ns != kNever && end_.wait_for(std::chrono::nanoseconds(at_most_ns)) != std::future_status::ready) return false;
  // Nor is a caller of another thread at it: the next one finds that the end has come.
  while (!turn_.try_lock()) {
    if (now_ns() >= deadline_ns) return false;
    sched_yield();
  }
  turn_.unlock();
  thread_.join();
  return true;
}

void Fabric::kick() {
  // Pairs with the fence in run(): either the thread sees the new work before it sleeps, or we see that it sleeps.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_relaxed)) ring(wake_);
}

void Fabric::call(const std::function<void()>& work) {
  if (getpid() != pid_) throw std::runtime_error("the fabric is closed");
  {
    // A round is short. Only a thread that is held up keeps the turn, and then stop() says so.
    std::unique_lock turn(turn_, std::defer_lock);
    do {
      if (stopping_) throw std::runtime_error("the fabric is closed");
    } while (!turn.try_lock() && (sched_yield(), true));
    if (stopping_) throw std::runtime_error("the fabric is closed");  // it may have ended since the last look
    run_commands();  // those that a bounded call has left behind come first
    work();
  }
  kick();
}

bool Fabric::call(std::function<void()> work, std::uint64_t deadline_ns) {
  const auto task = std::make_shared<std::packaged_task<void()>>(std::move(work));
  auto done = task->get_future();
  {
    const std::lock_guard lock(mutex_);
    if (stopping_ || getpid() != pid_) throw std::runtime_error("the fabric is closed");
    commands_.emplace_back([task] { (*task)(); });
  }
  ring(wake_);
  if (deadline_ns != kNever) {
    const std::uint64_t now = now_ns();
    const std::chrono::nanoseconds left(deadline_ns > now ? deadline_ns - now : 0);
    // At least a moment: a deadline that has passed already is no reason not to try.
    if (done.wait_for(std::max<std::chrono::nanoseconds>(left, kLeastCall)) != std::future_status::ready) return false;
  }
  done.get();
  return true;
}

bool Fabric::until(std::function<bool()> done, std::uint64_t deadline_ns) {
  const auto holds = std::make_shared<bool>(false);
  for (;;) {
    if (!call([holds, done] { *holds = done(); }, deadline_ns)) return false;
    if (*holds) return true;
    if (now_ns() >= deadline_ns) return false;
    usleep(200);  // the thread itself goes on meanwhile
  }
}

void Fabric::attach(Driven* driven) { driven_.push_back(driven); }

void Fabric::detach(Driven* driven) { std::erase(driven_, driven); }

void Fabric::watch(int fd, std::function<void()> readable) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = fd;
  checked(epoll_ctl(events_, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
  watches_[fd] = std::move(readable);
}

void Fabric::unwatch(int fd) {
  if (watches_.erase(fd)) epoll_ctl(events_, EPOLL_CTL_DEL, fd, nullptr);
}

// Leaves the turn to others while it waits.
void Fabric::look_at_watches(int milliseconds, std::unique_lock<std::mutex>& turn) {
  epoll_event ready[16];
  if (milliseconds) turn.unlock();
  const int count = epoll_wait(events_, ready, std::size(ready), milliseconds);
  if (milliseconds) turn.lock();
  for (int i = 0; i < count; ++i) {
    const auto found = watches_.find(ready[i].data.fd);
    if (found == watches_.end()) continue;  // unwatched by one before it
    const auto readable = found->second;    // a copy: it may unwatch itself
    readable();
  }
}

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

bool Fabric::round() {
  bool moved = false;
  if (ucp_worker_progress(worker_) != 0) {
    moved = true;
    for (std::size_t i = 0; i < driven_.size(); ++i) driven_[i]->stirred();
  }
  for (std::size_t i = 0; i < driven_.size(); ++i) moved |= driven_[i]->advance();
  return moved;
}

void Fabric::drive() {
  drives_.store(drives_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);  // any change does
  const std::unique_lock turn(turn_, std::try_to_lock);
  if (turn && !stopping_.load(std::memory_order_relaxed)) round();
}

void Fabric::start() {
  drives_.store(drives_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  {
    const std::unique_lock turn(turn_, std::try_to_lock);
    if (turn && !stopping_.load(std::memory_order_relaxed)) {
      for (int rounds = 0; rounds < kStartRounds && round(); ++rounds) {
      }
      if (!anything_waiting()) return;
    }
  }
  kick();
}

// Until a command comes, or a nap's length.
void Fabric::nap() {
  pollfd command{wake_, POLLIN, 0};
  const timespec most{0, kNapNs};
  if (ppoll(&command, 1, &most, nullptr) != 1) return;
  std::uint64_t count = 0;
  [[maybe_unused]] const auto drained = read(wake_, &count, sizeof count);
}

void Fabric::run() {
  unsigned idle = 0;
  std::uint64_t next_tick = now_ns() + kTickNs, next_watch = 0, drives = 0;
  for (unsigned rounds = 0; !stopping_.load(std::memory_order_relaxed); ++rounds) {
    const std::uint64_t drives_now = drives_.load(std::memory_order_relaxed);
    const bool driven = std::exchange(drives, drives_now) != drives_now;
    if (driven) nap();
    std::unique_lock turn(turn_);
    bool moved = run_commands();
    if (!driven) moved |= round();
    if (driven || rounds % 64 == 0 || idle >= kSpins) {
      const std::uint64_t now = now_ns();
      if (now >= next_watch) {
        look_at_watches(0, turn);
        next_watch = now + kWatchNs;
      }
      if (now >= next_tick) {
        for (std::size_t i = 0; i < driven_.size(); ++i) driven_[i]->tick(now);
        next_tick = now + kTickNs;
      }
    }
    if (moved || driven) {
      idle = 0;
      continue;
    }
    if (++idle < kSpins) {
      turn.unlock();
      relax();
      continue;
    }
    const bool in_flight = anything_waiting();
    if (in_flight && idle < kYields) {
      turn.unlock();
      sched_yield();
      continue;
    }
    sleeping_.store(true, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    // UCS_ERR_BUSY: events are pending already, progress first.
    if ((in_flight || !anything_waiting()) && ucp_worker_arm(worker_) == UCS_OK) {
      look_at_watches(in_flight ? kBusySleepMs : kIdleSleepMs, turn);
    }
    sleeping_.store(false, std::memory_order_relaxed);
    if (!in_flight) idle = 0;
  }
  const std::lock_guard turn(turn_);
  run_commands();  // nobody waits for a command that never runs
}

}  // namespace blsrdma
