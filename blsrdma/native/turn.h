// One thread at a time calls an exchange or a lookup; a second one is told so.
#pragma once

#include <atomic>

namespace blsrdma {

// Marks an object as in use by a thread for the span of a call; false: another one is in a call.
class Turn {
 public:
  explicit Turn(std::atomic<bool>& busy) : busy_(busy), mine_(!busy.exchange(true, std::memory_order_acquire)) {}
  ~Turn() {
    if (mine_) busy_.store(false, std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  explicit operator bool() const { return mine_; }

 private:
  std::atomic<bool>& busy_;
  bool mine_;
};

}  // namespace blsrdma
