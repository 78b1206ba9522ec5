// Contexts, streams and events. A stream is a thread with a queue; whatever is queued runs in order, at its own pace.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "declarations.h"
#include "pace.h"

class Stream;

struct Context {
  explicit Context(int device_) : device(device_) {}
  const int device;
  int retained = 0;
  std::atomic<bool> alive{true};
  std::atomic<int> error{0};  // sticky: whatever went wrong on the device
  Stream* null = nullptr;
  std::vector<Stream*> streams;  // that were not destroyed, the null stream among them
};

// What an event holds after cuEventRecord: done when the stream gets there.
struct Record {
  void finish(int error_) {
    std::lock_guard lock(mutex);
    time = std::chrono::steady_clock::now();
    error = error_;
    done = true;
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return done; });
  }
  bool is_done() {
    std::lock_guard lock(mutex);
    return done;
  }
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  int error = 0;
  std::chrono::steady_clock::time_point time;
};

struct Event {
  Context* context;
  unsigned flags;
  bool alive = true;
  std::shared_ptr<Record> last;  // none before the first record
};

inline thread_local bool in_host_function = false;

// Host functions run on one thread, one after another, as a real driver may do it.
class HostFunctions {
 public:
  void run(CUhostFn function, void* data) {
    Record over;
    {
      std::lock_guard lock(mutex_);
      if (!std::exchange(started_, true)) std::thread([this] { work(); }).detach();
      queue_.push_back([&over, function, data] {
        function(data);
        over.finish(0);
      });
      changed_.notify_one();
    }
    over.wait();
  }

 private:
  void work() {
    in_host_function = true;
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return !queue_.empty(); });
      auto function = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      function();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  bool started_ = false;
  std::deque<std::function<void()>> queue_;
};

class Stream {
 public:
  Stream(Context* context_, uint64_t seed) : context(context_), random(seed) {
    std::thread([this] { work(); }).detach();
  }

  // Queues `run`; returns its place in the queue, for wait(). After a sticky error nothing runs, but `always` is done.
  uint64_t push(std::function<void(Stream&)> run, std::function<void(int error)> always = nullptr) {
    std::lock_guard lock(mutex_);
    queue_.push_back({std::move(run), std::move(always)});
    changed_.notify_all();
    return ++queued_;
  }
  uint64_t queued() {
    std::lock_guard lock(mutex_);
    return queued_;
  }
  bool idle() {
    std::lock_guard lock(mutex_);
    return done_ == queued_;
  }
  void wait(uint64_t place) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return done_ >= place; });
  }
  void wait() { wait(queued()); }
  void end() {  // when what is queued is done
    std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }

  Context* const context;
  bool alive = true;
  Random random;  // of the stream's own thread

 private:
  struct Operation {
    std::function<void(Stream&)> run;
    std::function<void(int)> always;
  };
  void work() {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return !queue_.empty() || ended_; });
      if (queue_.empty()) return;  // the object stays: a stale handle has to be known as one
      Operation operation = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      if (!context->error) pace().gate(random, false);
      if (!context->error && operation.run) operation.run(*this);
      if (operation.always) operation.always(context->error);
      operation = {};
      lock.lock();
      ++done_;
      changed_.notify_all();
      lock.unlock();
      pace().done();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Operation> queue_;
  uint64_t queued_ = 0, done_ = 0;
  bool ended_ = false;
};
