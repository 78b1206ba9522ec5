// The UCX worker and the one thread that drives it.
//
// A message that has been posted must arrive although neither its sender nor its receiver calls again, so somebody else
// progresses the worker: this thread, and only this thread, makes UCX calls on it. It sleeps while nothing is in flight
// and nothing arrives. Direct stores (see channel.h) never come here.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "ucx.h"

namespace blsrdma {

// Something that the progress thread moves forward.
class Driven {
 public:
  virtual ~Driven() = default;
  virtual bool advance() = 0;       // one step, if one is possible; true when something moved
  virtual bool waiting() const = 0;  // work is queued or in flight
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
  // Wait until `done`, evaluated on the progress thread, holds: true; or until the deadline: false.
  bool until(const std::function<bool()>& done, std::uint64_t deadline_ns);
  void attach(Driven* driven);  // from the progress thread (inside call)
  void detach(Driven* driven);  // from the progress thread (inside call)
  // New work is queued in some Driven: wake the thread if it sleeps. Cheap when it does not.
  void kick();
  void stop();  // idempotent; afterwards call() throws

 private:
  void run();
  bool run_commands();
  bool anything_waiting() const;
  void sleep(int milliseconds);

  std::shared_ptr<void> owner_;
  ucp_worker_h worker_;
  int worker_fd_ = -1;
  int wake_fd_ = -1;
  std::atomic<bool> sleeping_{false};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;  // guards commands_ only
  std::deque<std::function<void()>> commands_;
  std::vector<Driven*> driven_;  // touched by the progress thread only
  std::thread thread_;
};

}  // namespace blsrdma
