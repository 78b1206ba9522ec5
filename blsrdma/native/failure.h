// What calls of an Exchange can come to, and the one failure that ends it.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

namespace blsrdma {

enum class Outcome : int {
  ok = 0,
  timeout,         // the deadline passed
  large,           // complete, but for messages larger than their windows: pull() them
  peer_died,       // its process is gone, or its connection, or it has been silent for too long
  peer_erred,      // it left with an error; text: what it said
  peer_left,       // it closed without an error and will not post this iteration
  window_held,     // i - lag - 1 is not released here
  count_negative,  // counts[rank] < 0
  count_sum,       // the counts do not add up; a: sum, b: expected
  corrupt,         // what lies in a window is no message; text: how
  tag_mismatch,    // rank declared another element type: a there, b here
  concurrent,      // another thread is in a call on this exchange
  interrupted,     // Config::interrupted said so
  bad_bags,        // of a lookup: bags that cannot be looked up; see Fault
  refused,         // of a lookup: rank, an owner, says that of bags that this rank has not found bad
  version_mismatch,  // of a lookup: rank, an owner, has loaded version a of its tables, this rank another one
  gpu_failed,        // of a lookup: this rank's GPU has, pooling its own tables; text: how, a: the driver's code
};

struct Details {
  std::uint32_t rank = 0;
  std::uint64_t iteration = 0;
  std::uint64_t a = 0;
  std::uint64_t b = 0;
  std::string text;
};

// The first failure of an exchange, from whichever thread notices it. Whoever waits or posts looks at failed() only.
class Failure {
 public:
  bool failed() const { return failed_.load(std::memory_order_acquire); }

  void set(Outcome outcome, std::uint32_t rank, std::string text) {
    const std::lock_guard lock(mutex_);
    if (failed()) return;
    outcome_ = outcome;
    rank_ = rank;
    text_ = std::move(text);
    failed_.store(true, std::memory_order_release);
  }
  // Once failed() holds nothing changes any more.
  Outcome outcome() const { return outcome_; }
  std::uint32_t rank() const { return rank_; }
  const std::string& text() const { return text_; }

 private:
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  Outcome outcome_ = Outcome::ok;
  std::uint32_t rank_ = 0;
  std::string text_;
};

}  // namespace blsrdma
