// One owner's rows by UCX gets: for memory that can neither be mapped here nor read in its process, over RDMA mostly. The
// owner's processor takes no part.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "fabric.h"
#include "ucx.h"

namespace blsrdma {

class Getter final : public Driven {
 public:
  static constexpr std::size_t kMost = 64;  // gets in flight

  struct Piece {
    std::byte* to;
    std::uint64_t bytes;
    std::uint64_t from;  // its address there
  };
  // What is got together. Whoever posts it keeps it, and where it lands, until it is done, or else the getter idle.
  struct Batch {
    std::vector<Piece> pieces;
    std::uint64_t word_at = 0;  // a word there that is got once all pieces are here, and not before; 0: none
    std::uint64_t word = 0;
    bool done() const { return done_.load(std::memory_order_acquire); }

   private:
    friend class Getter;
    Getter* getter_ = nullptr;
    std::size_t taken_ = 0, left_ = 0;
    std::atomic<bool> done_{true};
  };
  using Failed = std::function<void(ucs_status_t)>;

  // `failed` is called in a turn, at most once: nothing is done after that.
  Getter(ucp_ep_h endpoint, ucp_rkey_h rkey, Failed failed)
      : endpoint_(endpoint), rkey_(rkey), failed_(std::move(failed)) {}

  void abandon() { abandoned_.store(true); }  // what has not been started stays undone

  // In the fabric's turn.
  void post(Batch& batch);
  bool idle() const { return in_flight_ == 0; }
  bool advance() override;
  bool waiting() const override { return in_flight_ || (!abandoned_.load() && !(batches_.empty() && words_.empty())); }

 private:
  static void got(void* request, ucs_status_t status, void* batch);
  void start(Batch& batch, const Piece& piece);
  void finish(Batch& batch, ucs_status_t status);

  ucp_ep_h endpoint_;
  ucp_rkey_h rkey_;
  Failed failed_;
  std::atomic<bool> abandoned_{false};
  std::deque<Batch*> batches_;  // with pieces to be started
  std::deque<Batch*> words_;    // whose pieces are here, and whose words are to be got
  std::size_t in_flight_ = 0;
};

}  // namespace blsrdma
