// How fast streams go: at random, held, or step by step. A step is whatever passes one gate: an operation, a piece of a copy, some
// blocks of a kernel.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>

inline long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtol(text, nullptr, 0) : otherwise;
}

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }
  uint64_t below(uint64_t limit) { return limit ? next() % limit : 0; }

 private:
  uint64_t state_;
};

class Pace {
 public:
  void hold(bool on) {
    std::lock_guard lock(mutex_);
    held_ = on;
    allowed_ = 0;
    changed_.notify_all();
  }

  // Lets held streams take `count` steps and waits until these are done; returns how many were taken in time.
  long step(long count, long milliseconds) {
    std::unique_lock lock(mutex_);
    allowed_ = count;
    changed_.notify_all();
    changed_.wait_for(lock, std::chrono::milliseconds(milliseconds), [this] { return allowed_ == 0 && under_way_ == 0; });
    count -= allowed_;
    allowed_ = 0;
    return count;
  }

  // Called by a stream's thread before each step; `part`: of an operation that has begun.
  void gate(Random& random, bool part) {
    done();
    if (held_) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return !held_ || allowed_ > 0; });
      if (held_) {
        --allowed_;
        ++under_way_;
        stepping_ = true;
      }
    } else if (delay_ && (!part || random.below(4) == 0)) {
      usleep(unsigned(random.below(uint64_t(delay_) + 1)));
    } else {
      std::this_thread::yield();
    }
  }

  // What the last gate let pass is done (or waits for something else than this GPU).
  void done() {
    if (!stepping_) return;
    stepping_ = false;
    std::lock_guard lock(mutex_);
    --under_way_;
    changed_.notify_all();
  }

  const uint64_t seed = uint64_t(setting("SIMULATED_CUDA_SEED", 1));

 private:
  const long delay_ = setting("SIMULATED_CUDA_DELAY_US", 0);
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<bool> held_{false};
  long allowed_ = 0, under_way_ = 0;
  static inline thread_local bool stepping_ = false;
};

inline Pace& pace() {
  static Pace* forever = new Pace;  // streams outlive main
  return *forever;
}
