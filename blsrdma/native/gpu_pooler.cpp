#include "gpu_pooler.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "wait.h"

namespace blsrdma {

using cuda::api;
using cuda::check;

namespace {

constexpr unsigned kThreads = 128;                       // of a block, as pool_rows.cu bounds them
constexpr int kPriority = -1;                            // what is asked for is short, and somebody waits for it
constexpr std::uint64_t kLoads[] = {16, 8, 4, 2};        // bytes of four elements, by format
constexpr std::uint64_t kPartingNs = 100'000'000;        // for a GPU that is at rest to say so
constexpr std::uint64_t kNapNs = 20'000;
constexpr std::uint32_t kYields = 2000;

// As pool_rows.cu has it, too.
struct KernelJob {
  cuda::Address rows, weights, starts, out, sum;
  std::uint64_t summed, bags;
  std::int32_t dim, elements, lanes, slices, mean, unfinished;
};

std::uint64_t aligned(std::uint64_t bytes) { return (bytes + 15) & ~std::uint64_t{15}; }

std::uint64_t in_bytes_of(std::uint64_t bags, std::uint64_t rows, bool weighted, std::uint64_t sum_dim) {
  return aligned(8 * rows) + aligned(8 * (bags + 1)) + (weighted ? aligned(4 * rows) : 0) + aligned(4 * sum_dim);
}

void nap(std::uint32_t round) {
  if (round < kYields) {
    sched_yield();
  } else {
    const timespec span{0, static_cast<long>(kNapNs)};
    nanosleep(&span, nullptr);
  }
}

}  // namespace

// A request has 4 bytes for each bag, and at least 4 for each row, which take 8 and 8 here; a head for the paddings; and as
// much for weights. Beside that there is one sum that goes on, and one that does not end.
GpuPooler::GpuPooler(std::shared_ptr<cuda::Device> device, const std::string& image, const Config& config)
    : device_(std::move(device)), pid_(getpid()), patience_ns_(config.patience_ns),
      in_bytes_(aligned(3 * config.request_bytes + 4 * std::uint64_t{config.dim} + 64)),
      out_bytes_(aligned(config.response_bytes + 4 * std::uint64_t{config.dim} + 64)) {
  const cuda::Entered entered = device_->enter();
  try {
    allocate(image);
  } catch (const cuda::Error&) {
    close(deadline_after(kPartingNs));
    throw;
  }
}

void GpuPooler::allocate(const std::string& image) {
  check(api().module_load(&module_, image.c_str()), "cuModuleLoadData");
  constexpr const char* kNames[] = {"pool_fp32", "pool_fp16", "pool_int8", "pool_int4"};
  for (int format = 0; format < 4; ++format) {
    check(api().module_function(&pool_[format], module_, kNames[format]), "cuModuleGetFunction");
  }
  check(api().module_function(&copy_, module_, "copy_rows"), "cuModuleGetFunction");
  check(api().stream_create(&stream_, cuda::kNonBlocking, kPriority), "cuStreamCreateWithPriority");
  check(api().host_allocate(reinterpret_cast<void**>(&in_), in_bytes_), "cuMemAllocHost");
  check(api().host_allocate(reinterpret_cast<void**>(&out_), out_bytes_), "cuMemAllocHost");
  check(api().memory_allocate(&device_in_, in_bytes_), "cuMemAlloc");
  check(api().memory_allocate(&device_out_, out_bytes_), "cuMemAlloc");
}

GpuPooler::~GpuPooler() { close(deadline_after(kPartingNs)); }

bool GpuPooler::fits(std::uint64_t bags, std::uint64_t rows, std::uint32_t dim) const {
  return in_bytes_of(bags, rows, true, dim) <= in_bytes_ && 4 * bags * dim + 16 <= out_bytes_;
}

// Whether a job can be put down: what is there already goes first, if it has to.
bool GpuPooler::make_room(std::uint64_t in, std::uint64_t out) {
  if (failed()) return false;
  if (in_used_ + in > in_bytes_ || out_used_ + out > out_bytes_) run();
  if (in > in_bytes_ || out > out_bytes_) fail(-1, "a request is larger than what was set aside for it");  // excluded by Config
  return !failed();
}

std::uint64_t GpuPooler::put(const void* from, std::uint64_t bytes) {
  const std::uint64_t at = in_used_;
  std::memcpy(in_ + at, from, bytes);
  in_used_ += aligned(bytes);
  return at;
}

void GpuPooler::pool(const Pool& bags) {
  std::uint64_t rows = 0;
  for (std::uint64_t b = 0; b < bags.bags; ++b) rows += bags.lengths[b];
  const std::uint64_t out = aligned(4 * bags.bags * bags.dim);
  const bool room = make_room(in_bytes_of(bags.bags, rows, bags.weights, bags.sum ? bags.dim : 0), out);
  Job& job = jobs_.emplace_back();
  job.bags = bags;
  if (!room) return;  // run() says so
  job.in = put(bags.rows, 8 * rows);
  job.starts = in_used_;
  auto* starts = reinterpret_cast<std::uint64_t*>(in_ + in_used_);
  starts[0] = 0;
  for (std::uint64_t b = 0; b < bags.bags; ++b) starts[b + 1] = starts[b] + bags.lengths[b];
  in_used_ += aligned(8 * (bags.bags + 1));
  if (bags.weights) job.weights = put(bags.weights, 4 * rows);
  if (bags.sum) job.sum = put(bags.sum, 4 * std::uint64_t{bags.dim});
  // Rows of one table: if the first can be read by four elements, so can all.
  const std::uint64_t loads = kLoads[static_cast<std::uint32_t>(bags.format)];
  job.aligned = bags.dim % 4 == 0 && (rows == 0 || reinterpret_cast<std::uintptr_t>(bags.rows[0]) % loads == 0);
  job.out = out_used_;
  out_used_ += out;
}

void GpuPooler::copy(const std::byte* const* rows, std::uint64_t count, std::uint64_t bytes, std::byte* to) {
  if (count == 0) return;
  const std::uint64_t out = aligned(count * bytes);
  const bool room = make_room(aligned(8 * count), out);
  Job& job = jobs_.emplace_back();
  job.rows = count;
  job.row_bytes = bytes;
  job.to = to;
  if (!room) return;
  job.in = put(rows, 8 * count);
  job.aligned = bytes % 4 == 0 && reinterpret_cast<std::uintptr_t>(rows[0]) % 4 == 0;
  job.out = out_used_;
  out_used_ += out;
}

bool GpuPooler::run() {
  if (!pending()) return !failed();
  if (!failed()) {
    try {
      const cuda::Entered entered = device_->enter();
      if (in_used_) check(api().copy(device_in_, reinterpret_cast<cuda::Address>(in_), in_used_, stream_), "cuMemcpyAsync");
      for (const Job& job : jobs_) launch(job);
      if (out_used_) check(api().copy(reinterpret_cast<cuda::Address>(out_), device_out_, out_used_, stream_), "cuMemcpyAsync");
      wait();
      if (!failed()) {
        for (const Job& job : jobs_) deliver(job);
      }
    } catch (const cuda::Error& error) {
      fail(error.result(), error.what());
    }
  }
  clear();
  return !failed();
}

void GpuPooler::launch(const Job& job) {
  const auto blocks_for = [](std::uint64_t units) { return static_cast<unsigned>((units + kThreads - 1) / kThreads); };
  const cuda::Address rows = device_in_ + job.in, out = device_out_ + job.out;
  if (job.to) {
    int word = job.aligned ? 4 : 1;
    std::uint64_t count = job.rows, bytes = job.row_bytes;
    void* arguments[] = {const_cast<cuda::Address*>(&rows), const_cast<cuda::Address*>(&out), &count, &bytes, &word};
    check(api().launch(copy_, blocks_for(count * bytes / static_cast<std::uint64_t>(word)), 1, 1, kThreads, 1, 1, 0, stream_,
                       arguments, nullptr), "cuLaunchKernel");
    return;
  }
  const Pool& bags = job.bags;
  const std::uint32_t elements = job.aligned ? 4 : 1, columns = (bags.dim + elements - 1) / elements;
  std::uint32_t lanes = 8;
  while (lanes < columns && lanes < 32) lanes *= 2;
  const std::uint32_t slices = (columns + lanes - 1) / lanes;
  KernelJob what{rows,
                 bags.weights ? device_in_ + job.weights : 0,
                 device_in_ + job.starts,
                 out,
                 bags.sum ? device_in_ + job.sum : 0,
                 bags.summed,
                 bags.bags,
                 static_cast<std::int32_t>(bags.dim),
                 static_cast<std::int32_t>(elements),
                 static_cast<std::int32_t>(lanes),
                 static_cast<std::int32_t>(slices),
                 bags.mean,
                 bags.unfinished != nullptr};
  void* arguments[] = {&what};
  check(api().launch(pool_[static_cast<std::uint32_t>(bags.format)], blocks_for(bags.bags * slices * lanes), 1, 1, kThreads, 1, 1,
                     0, stream_, arguments, nullptr), "cuLaunchKernel");
}

void GpuPooler::wait() {
  const std::uint64_t began = now_ns(), until = deadline_after(patience_ns());
  for (std::uint32_t round = 0;; ++round) {
    const cuda::Result result = api().stream_query(stream_);
    if (result == cuda::kSuccess) return;
    if (result != cuda::kNotReady) check(result, "pooling");
    if (const std::uint64_t now = now_ns(); stopped_.load() || now >= until) {
      waited_ms_ = (now - began) / 1'000'000;
      return fail(-1, "it was not done within " + std::to_string(waited_ms_) + " ms: it hangs, or is held up");
    }
    nap(round);
  }
}

void GpuPooler::deliver(const Job& job) const {
  const std::byte* from = out_ + job.out;
  if (job.to) {
    std::memcpy(job.to, from, job.rows * job.row_bytes);
    return;
  }
  const Pool& bags = job.bags;
  const std::uint64_t row = 4 * std::uint64_t{bags.dim}, whole = bags.bags - (bags.unfinished != nullptr);
  if (bags.stride == bags.dim) {
    std::memcpy(bags.out, from, row * whole);
  } else {
    for (std::uint64_t b = 0; b < whole; ++b) std::memcpy(bags.out + b * bags.stride, from + b * row, row);
  }
  if (bags.unfinished) std::memcpy(bags.unfinished, from + whole * row, row);
}

void GpuPooler::fail(cuda::Result result, std::string text) {
  if (failed()) return;
  result_ = result;
  text_ = std::move(text);
  failed_.store(true, std::memory_order_release);
}

void GpuPooler::clear() {
  jobs_.clear();
  in_used_ = out_used_ = 0;
}

bool GpuPooler::close(std::uint64_t deadline_ns) {
  if (!stream_) return true;
  if (getpid() != pid_) return true;  // a fork's child: nothing here is its own
  try {
    const cuda::Entered entered = device_->enter();
    // To free memory is to wait for all that the GPU does: only of one that is seen to get on.
    if (device_in_) check(api().fill(device_in_, 0, 16, stream_), "cuMemsetD8Async");
    for (std::uint32_t round = 0;; ++round) {
      const cuda::Result result = api().stream_query(stream_);
      if (result == cuda::kSuccess) break;
      if (result != cuda::kNotReady) return false;
      if (now_ns() >= deadline_ns) return false;
      nap(round);
    }
  } catch (const cuda::Error&) {
    return false;
  }
  if (device_in_) api().memory_free(std::exchange(device_in_, 0));
  if (device_out_) api().memory_free(std::exchange(device_out_, 0));
  if (in_) api().host_free(std::exchange(in_, nullptr));
  if (out_) api().host_free(std::exchange(out_, nullptr));
  api().stream_destroy(std::exchange(stream_, nullptr));
  api().module_unload(std::exchange(module_, nullptr));
  return true;
}

}  // namespace blsrdma
