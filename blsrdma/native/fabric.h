// The UCX worker, and who drives it.
//
// A message that has been posted must arrive although neither its sender nor its receiver calls again, so a thread
// progresses the worker. It sleeps while nothing is in flight and nothing arrives. It also hears of the death of processes
// on this host. Direct stores (see channel.h) never come here.
//
// A caller that waits has nothing better to do than to drive the worker itself: then what arrives needs no change of
// threads to be seen, and where cores are few none has to be shared with the thread. So UCX calls on the worker, and all
// that is Driven, belong to whoever holds the turn: the thread for one round, or a caller for one drive(). The thread sees
// that callers drive, and naps; it takes over when none has for a nap's length.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ucx.h"
#include "wait.h"

namespace blsrdma {

// Something that is taken care of in turns.
class Driven {
 public:
  virtual ~Driven() = default;
  virtual bool advance() { return false; }        // one step, if one is possible; true when something moved
  virtual bool waiting() const { return false; }  // work is queued or in flight
  virtual void stirred() {}                       // UCX has moved something: perhaps into this process's memory
  virtual void tick(std::uint64_t /*now_ns*/) {}  // about once a second
};

// A text that is written in turns, and read by a caller whose patience has ended before the turn has.
class Remark {
 public:
  void set(std::string text) {
    const std::lock_guard lock(mutex_);
    text_ = std::move(text);
  }
  std::string get() const {
    const std::lock_guard lock(mutex_);
    return text_;
  }

 private:
  mutable std::mutex mutex_;
  std::string text_;
};

class Fabric {
 public:
  // `owner` keeps the worker alive for as long as the fabric lives.
  Fabric(ucp_worker_h worker, std::shared_ptr<void> owner);
  ~Fabric();
  Fabric(const Fabric&) = delete;
  Fabric& operator=(const Fabric&) = delete;

  ucp_worker_h worker() const { return worker_; }

  // Run `work`, which may make UCX calls, in a turn of this thread.
  void call(const std::function<void()>& work);
  // Have the progress thread run it, and wait for it, but no longer than until the deadline: false, and `work` may still
  // run later, so that all it refers to has to be kept. What it throws is thrown here.
  bool call(std::function<void()> work, std::uint64_t deadline_ns);
  // Wait until `done`, evaluated on the progress thread, holds: true; or until the deadline: false (as above).
  bool until(std::function<bool()> done, std::uint64_t deadline_ns);
  // New work is queued in some Driven: wake the thread if it sleeps. Cheap when it does not.
  void kick();
  // One round of progress on the caller's own thread; nothing, if somebody else is at it. For those who wait. What is still
  // in flight when no caller comes again is the thread's, a nap later.
  void drive();
  // drive(), and kick() if something is left to be done: for those who have queued something and may go away now.
  void start();
  // Idempotent; afterwards call() throws. False: the thread has not ended in time, because something that it runs does not
  // return, and the fabric and all that it drives have to be kept.
  bool stop(std::uint64_t at_most_ns = kNever);

  // For whoever has the turn (inside call, or what is called by Driven).
  void attach(Driven* driven);
  void detach(Driven* driven);
  void watch(int fd, std::function<void()> readable);  // `readable` is called in a turn
  void unwatch(int fd);

 private:
  void run();
  bool round();
  void nap();
  bool run_commands();
  bool anything_waiting() const;
  void look_at_watches(int milliseconds, std::unique_lock<std::mutex>& turn);

  std::shared_ptr<void> owner_;
  ucp_worker_h worker_;
  int events_ = -1;  // an epoll of the worker's events, of wake_, and of what is watched
  int wake_ = -1;
  int pid_;
  std::atomic<bool> sleeping_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<std::uint64_t> drives_{0};  // calls of drive(): while it changes, callers drive
  std::mutex turn_;                       // whose turn it is to call UCX
  std::mutex mutex_;                      // guards commands_ only
  std::deque<std::function<void()>> commands_;
  std::vector<Driven*> driven_;                   // this and the next: touched by whoever has the turn only
  std::map<int, std::function<void()>> watches_;  // by file descriptor
  std::promise<void> ended_;
  std::future<void> end_ = ended_.get_future();
  std::thread thread_;
};

}  // namespace blsrdma
