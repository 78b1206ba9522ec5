// Wakes whoever of this process sleeps on an arena's word when UCX has moved something, perhaps a counter, into memory.
#pragma once

#include <atomic>

#include "fabric.h"
#include "layout.h"

namespace blsrdma {

class Doorbell final : public Driven {
 public:
  explicit Doorbell(Sleeper sleeper) : sleeper_(sleeper) {}
  void stirred() override {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    sleeper_.wake();
  }

 private:
  Sleeper sleeper_;
};

}  // namespace blsrdma
