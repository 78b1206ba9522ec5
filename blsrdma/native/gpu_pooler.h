// Pooling of bags whose rows lie in GPU memory, for whoever has a Pool (pool.h): the same bits, put together by the GPU.
//
// Jobs are collected in page-locked memory: addresses of rows, lengths, weights, sums that go on. run() sends them there in one
// copy, has each pooled by a kernel (blsrdma/gpu/pool_rows.cu), fetches all results in one copy, and puts them where they
// belong. It waits no longer than Config::patience_ns: then, and after any error, the GPU has failed, for good. What the GPU
// may still use is never touched nor freed then.
//
// One thread at a time calls it; stop() and what says whether it has failed are anybody's.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda.h"
#include "pool.h"

namespace blsrdma {

class GpuPooler {
 public:
  struct Config {
    std::uint64_t request_bytes = 0;   // of the largest request that is pooled at once,
    std::uint64_t response_bytes = 0;  // and of its response
    std::uint32_t dim = 0;             // of the widest table
    std::uint64_t patience_ns = 0;
  };

  // `image`: of pool_rows.cu. Allocates all that it will ever need. Throws cuda::Error.
  GpuPooler(std::shared_ptr<cuda::Device> device, const std::string& image, const Config& config);
  ~GpuPooler();  // after close(); else what cannot be freed in an instant is leaked
  GpuPooler(const GpuPooler&) = delete;
  GpuPooler& operator=(const GpuPooler&) = delete;

  // As blsrdma::pool(), once run() has been called; until then `out` and `unfinished` have to stay.
  void pool(const Pool& bags);
  // The same for rows as they are stored, `bytes` each.
  void copy(const std::byte* const* rows, std::uint64_t count, std::uint64_t bytes, std::byte* to);
  // Whether so many bags and rows of one Pool can be pooled at once.
  bool fits(std::uint64_t bags, std::uint64_t rows, std::uint32_t dim) const;
  bool pending() const { return !jobs_.empty(); }
  void drop() { clear(); }  // what has been asked for since the last run()
  bool run();  // false: the GPU has failed, and results are not there

  bool failed() const { return failed_.load(std::memory_order_acquire); }
  // Once it has failed: the driver's code, or -1 where it has not done its work in time; in words.
  cuda::Result result() const { return result_; }
  const std::string& text() const { return text_; }
  std::uint64_t waited_ms() const { return waited_ms_; }  // for what it has not done

  void stop() { stopped_.store(true); }  // nobody waits for it any more: a run() under way ends as if time had run out
  bool close(std::uint64_t deadline_ns);  // false: the GPU is still at work, or has failed: its memory is kept
  std::uint64_t patience_ns() const { return patience_ns_.load(); }
  void set_patience_ns(std::uint64_t ns) { patience_ns_.store(ns); }
  std::uint64_t bytes() const { return in_bytes_ + out_bytes_; }  // of page-locked memory, and as much of the GPU's

 private:
  struct Job {
    Pool bags;                   // of which out, unfinished and stride count
    std::uint64_t in = 0;        // its addresses in `in_`, and what else it has there
    std::uint64_t starts = 0, weights = 0, sum = 0;
    std::uint64_t out = 0;       // in `out_`
    bool aligned = false;        // rows can be read by four elements, or words
    std::uint64_t rows = 0;      // to be copied: so many of so many bytes
    std::uint64_t row_bytes = 0;
    std::byte* to = nullptr;     // none: pooled
  };

  void allocate(const std::string& image);
  bool make_room(std::uint64_t in, std::uint64_t out);
  std::uint64_t put(const void* from, std::uint64_t bytes);
  void launch(const Job& job);
  void wait();
  void deliver(const Job& job) const;
  void fail(cuda::Result result, std::string text);
  void clear();

  std::shared_ptr<cuda::Device> device_;
  const pid_t pid_;
  std::atomic<std::uint64_t> patience_ns_;
  std::uint64_t in_bytes_ = 0, out_bytes_ = 0;
  cuda::Module module_ = nullptr;
  cuda::Function pool_[4] = {}, copy_ = nullptr;  // by format
  cuda::Stream stream_ = nullptr;
  std::byte *in_ = nullptr, *out_ = nullptr;  // page-locked
  cuda::Address device_in_ = 0, device_out_ = 0;
  std::vector<Job> jobs_;
  std::uint64_t in_used_ = 0, out_used_ = 0;
  std::atomic<bool> stopped_{false}, failed_{false};
  cuda::Result result_ = 0;
  std::uint64_t waited_ms_ = 0;
  std::string text_;
};

}  // namespace blsrdma
