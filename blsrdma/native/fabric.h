// The UCX worker and the one thread that drives it.
//
// A message that has been posted must arrive although neither its sender nor its receiver calls again, so somebody else
// progresses the worker: this thread, and only this thread, makes UCX calls on it. It sleeps while nothing is in flight
// and nothing arrives. Direct stores (see channel.h) never come here. It also hears of the death of processes on this host.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "ucx.h"
#include "wait.h"

namespace blsrdma {

// Something that the progress thread takes care of.
class Driven {
 public:
  virtual ~Driven() = default;
  virtual bool advance() { return false; }        // one step, if one is possible; true when something moved
  virtual bool waiting() const { return false; }  // work is queued or in flight
  virtual void stirred() {}                       // UCX has moved something: perhaps into this process's memory
  virtual void tick(std::uint64_t /*now_ns*/) {}  // about once a second
};

class Fabric {
 public:
  // `owner` keeps the worker alive for as long as the fabric lives.
  Fabric(ucp_worker_h worker, std::shared_ptr<void> owner);
  ~Fabric();
  Fabric(const Fabric&) = delete;
  Fabric& operator=(const Fabric&) = delete;

  ucp_worker_h worker() const { return worker_; }

  // Run `work` on the progress thread and wait for it; what it throws is thrown here.
  void call(const std::function<void()>& work);
  // The same, but wait no longer than until the deadline: false, and `work` may still run later, so that all it refers to
  // has to be kept.
  bool call(std::function<void()> work, std::uint64_t deadline_ns);
  // Wait until `done`, evaluated on the progress thread, holds: true; or until the deadline: false (as above).
  bool until(std::function<bool()> done, std::uint64_t deadline_ns);
  // New work is queued in some Driven: wake the thread if it sleeps. Cheap when it does not.
  void kick();
  // Idempotent; afterwards call() throws. False: the thread has not ended in time, because something that it runs does not
  // return, and the fabric and all that it drives have to be kept.
  bool stop(std::uint64_t at_most_ns = kNever);

  // On the progress thread (inside call).
  void attach(Driven* driven);
  void detach(Driven* driven);
  void watch(int fd, std::function<void()> readable);  // `readable` is called on the progress thread
  void unwatch(int fd);

 private:
  void run();
  bool run_commands();
  bool anything_waiting() const;
  void sleep(int milliseconds);
  void look_at_watches(int milliseconds);

  std::shared_ptr<void> owner_;
  ucp_worker_h worker_;
  int events_ = -1;  // an epoll of the worker's events, of wake_, and of what is watched
  int wake_ = -1;
  int pid_;
  std::atomic<bool> sleeping_{false};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;  // guards commands_ only
  std::deque<std::function<void()>> commands_;
  std::vector<Driven*> driven_;                   // this and the next: touched by the progress thread only
  std::map<int, std::function<void()>> watches_;  // by file descriptor
  std::promise<void> ended_;
  std::future<void> end_ = ended_.get_future();
  std::thread thread_;
};

}  // namespace blsrdma
