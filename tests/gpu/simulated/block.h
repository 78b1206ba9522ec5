// Runs the threads of one block of a kernel. They are fibers of the calling thread, but only where one has to wait for
// another: a fiber runs thread after thread, and as long as none waits at a barrier nothing is switched. Threads run in
// rising or falling order by turns, so that a kernel in which a barrier is missing does not go unnoticed.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "launch.h"

namespace simulated {

class Block {
 public:
  Block(const char* name, const Kernel& kernel, void** arguments, dim3 grid, dim3 block, unsigned shared_bytes)
    : name_(name), kernel_(kernel), arguments_(arguments), shared_bytes_(shared_bytes), size_(block.x * block.y * block.z) {
    here.block_size = block;
    here.grid_size = grid;
    shared_.resize(shared_bytes + kCanary + 16);
    here.shared = shared_.data() + (-reinterpret_cast<uintptr_t>(shared_.data()) & 15);
    allow(this, sizeof(*this));
    allow(here.shared, shared_bytes);
  }

  void run(uint3 index, bool falling);

  void barrier(int line) {
    if (waiting_.empty()) line_ = line;
    if (line_ != line) differ("threads wait at different __syncthreads: lines ", line_, line);
    waiting_.push_back(current_);
    if (release_block()) return;
    wait();
  }

  const unsigned char* gather(unsigned mask, const void* mine, unsigned bytes, int line) {
    unsigned thread = current_->thread, lane = thread % kWarp;
    if (!(mask >> lane & 1)) fail("a lane that is not in its own mask");
    Group& group = find(thread / kWarp, mask);
    if (group.waiting.empty()) {
      group.line = line;
      group.turn ^= 1;
      std::memset(group.slots[group.turn], kGarbage, sizeof(group.slots[0]));
    }
    if (group.line != line) differ("lanes of a warp wait at different lines: ", group.line, line);
    unsigned char* slots = group.slots[group.turn];
    if (bytes) std::memcpy(slots + lane * kSlot, mine, bytes);
    group.waiting.push_back(current_);
    if (!release(group, thread / kWarp)) wait();
    return slots;
  }

  // What a thread of the block may use beside the device's memory: its stack, shared memory, parameters. Null: none of these.
  const Here::Known* own(const void* at) const {
    auto* byte = static_cast<const unsigned char*>(at);
    for (const Here::Known& part : own_)
      if (byte >= part.from && byte < part.to) return &part;
    return nullptr;
  }
  void allow(const void* from, size_t bytes) {
    auto* byte = static_cast<const unsigned char*>(from);
    own_.push_back({byte, byte + bytes});
  }
  void remember(const Here::Known& known) { here.known[known_++ % Here::kKnown] = known; }
  const Kernel& kernel() const { return kernel_; }

  unsigned active() const { return alive_[current_->thread / kWarp]; }

  [[noreturn]] void fail(const char* text, const char* file = nullptr, int line = 0) {
    const uint3 &block = here.block, &thread = here.thread;
    std::fprintf(stderr, "simulated CUDA: kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s", name_, block.x, block.y, block.z,
                 thread.x, thread.y, thread.z, text);
    if (file) std::fprintf(stderr, " at %s:%d", file, line);
    std::fputc('\n', stderr);
    std::abort();
  }

  Here here{};
  static Block& running() { return *running_; }  // on this thread

 private:
  friend class Fibers;
  static constexpr int kGarbage = 0xCB;  // memory that was not written has to look so
  static constexpr unsigned kCanary = 64;

  struct Fiber {
    ucontext_t start;
    jmp_buf state;
    bool started = false;
    unsigned thread = 0;
    void* stack = nullptr;
  };
  struct Group {  // the lanes of a warp that exchange under one mask
    unsigned warp, mask;
    int line = 0;
    unsigned turn = 0;
    std::vector<Fiber*> waiting;
    alignas(16) unsigned char slots[2][kWarp * kSlot];  // by turns: a lane reads while the next exchange begins
  };

  [[noreturn]] void differ(const char* what, int one, int other) {
    fail((what + std::to_string(one) + " and " + std::to_string(other)).c_str());
  }

  unsigned flat(unsigned turn) const { return falling_ ? size_ - 1 - turn : turn; }

  Group& find(unsigned warp, unsigned mask) {
    for (auto& group : groups_)
      if (group->warp == warp && group->mask == mask) return *group;
    groups_.push_back(std::make_unique<Group>());
    groups_.back()->warp = warp;
    groups_.back()->mask = mask;
    return *groups_.back();
  }

  // Whoever waited is ready if all that have to be there are; true if so (the caller is then not among the ready).
  bool release(Group& group, unsigned warp) {
    if (group.waiting.size() < unsigned(__builtin_popcount(group.mask & alive_[warp]))) return false;
    wake(group.waiting);
    return true;
  }
  bool release_block() {
    if (waiting_.size() < size_ - finished_) return false;
    wake(waiting_);
    return true;
  }
  void wake(std::vector<Fiber*>& waiting) {
    for (Fiber* fiber : waiting)
      if (fiber != current_) ready_.push_back(fiber);
    waiting.clear();
  }

  void finish(unsigned thread) {  // a thread has returned: nobody waits for it any more
    ++finished_;
    unsigned warp = thread / kWarp;
    alive_[warp] &= ~(1u << thread % kWarp);
    if (!waiting_.empty()) release_block();
    for (auto& group : groups_)
      if (group->warp == warp && !group->waiting.empty()) release(*group, warp);
  }

  void place(unsigned thread) {
    const dim3& size = here.block_size;
    here.thread = {thread % size.x, thread / size.x % size.y, thread / (size.x * size.y)};
  }

  void work() {  // the life of a fiber
    for (;;) {
      while (next_ < size_) {
        unsigned thread = flat(next_++);
        current_->thread = thread;
        place(thread);
        kernel_.thread(&here, arguments_);
        finish(thread);
      }
      idle_.push_back(current_);
      wait();
    }
  }
  static void enter() { running_->work(); }

  void wait() {
    Fiber* self = current_;
    if (!_setjmp(self->state)) _longjmp(scheduler_, 1);
  }
  void resume(Fiber* fiber) {
    current_ = fiber;
    if (_setjmp(scheduler_)) return;
    if (fiber->started) {
      place(fiber->thread);
      _longjmp(fiber->state, 1);
    }
    fiber->started = true;
    setcontext(&fiber->start);
  }

  const char* name_;
  const Kernel& kernel_;
  void** arguments_;
  unsigned shared_bytes_, size_;
  std::vector<unsigned char> shared_;
  bool falling_ = false;
  unsigned next_ = 0, finished_ = 0;
  int line_ = 0;
  std::vector<unsigned> alive_;  // of each warp, the lanes that have not returned
  std::vector<Fiber*> waiting_, ready_, idle_;
  std::vector<std::unique_ptr<Group>> groups_;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  std::vector<Here::Known> own_;
  unsigned known_ = 0;
  static inline thread_local Block* running_ = nullptr;
};

// The stacks of one thread, kept from block to block.
class Fibers {
 public:
  static constexpr size_t kStack = 128 << 10;

  Block::Fiber* get(size_t number) {
    if (number == all_.size()) {
      auto fiber = std::make_unique<Block::Fiber>();
      fiber->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fiber->stack == MAP_FAILED) std::abort();
      mprotect(fiber->stack, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
      all_.push_back(std::move(fiber));
    }
    Block::Fiber* fiber = all_[number].get();
    fiber->started = false;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack;
    fiber->start.uc_stack.ss_size = kStack;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, &Block::enter, 0);
    return fiber;
  }
  ~Fibers() {
    for (auto& fiber : all_) munmap(fiber->stack, kStack);
  }

 private:
  std::vector<std::unique_ptr<Block::Fiber>> all_;
};

inline void Block::run(uint3 index, bool falling) {
  static thread_local Fibers fibers;
  size_t used = 0;
  running_ = this;
  here.block = index;
  falling_ = falling;
  next_ = finished_ = 0;
  alive_.assign((size_ + kWarp - 1) / kWarp, ~0u);
  if (size_ % kWarp) alive_.back() = (1u << size_ % kWarp) - 1;
  waiting_.clear();
  ready_.clear();
  idle_.clear();
  groups_.clear();
  std::memset(here.shared, kGarbage, shared_bytes_ + kCanary);
  while (finished_ < size_) {
    if (next_ < size_) {
      Fiber* fiber = idle_.empty() ? fibers.get(used++) : idle_.back();
      if (!idle_.empty()) idle_.pop_back();
      if (!own(fiber->stack)) allow(fiber->stack, Fibers::kStack);
      resume(fiber);
      continue;
    }
    if (ready_.empty()) fail("no thread can go on: not all have come to the barrier");
    falling_ = !falling_;
    std::vector<Fiber*> now;
    now.swap(ready_);
    std::sort(now.begin(), now.end(), [](Fiber* a, Fiber* b) { return a->thread < b->thread; });
    if (falling_) std::reverse(now.begin(), now.end());
    for (Fiber* fiber : now) resume(fiber);
  }
  for (unsigned i = 0; i < kCanary; ++i)
    if (here.shared[shared_bytes_ + i] != kGarbage) fail("written beyond the block's dynamic shared memory");
}

}  // namespace simulated
