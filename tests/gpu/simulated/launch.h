// What the simulated driver and an image (a .cu file compiled by g++, see kernel.h) agree on. No standard headers: a .cu
// file that NVRTC compiles sees none either, and its own typedefs must not collide with theirs.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simulated {

constexpr unsigned kWarp = 32;
constexpr unsigned kSlot = 16;  // the largest value that a warp exchanges, bytes

// Where a thread of a running kernel is. One for each block that runs; `thread` changes whenever another thread runs.
struct Here {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned char* shared;  // dynamic shared memory of the block
  struct Known {
    const unsigned char *from, *to;
  };
  static constexpr unsigned kKnown = 8;
  Known known[kKnown];  // memory that the kernel was found to be allowed to use; nothing is freed while it runs
};

// The driver's services for the kernel that runs on the calling thread; an image gets their addresses when it is loaded.
struct Runtime {
  // __syncthreads. `line` is the caller's, so that threads waiting at different barriers are found.
  void (*barrier)(int line);
  // Gathers `bytes` of every lane of `mask`; returns kWarp slots of kSlot bytes, valid until the lane's next call with this mask.
  const unsigned char* (*gather)(unsigned mask, const void* mine, unsigned bytes, int line);
  unsigned (*active)();  // the lanes of the warp that have not returned
  void (*touch)(const void* at, unsigned long bytes, bool write);  // of memory that is not known yet; fails if it must not
  void (*fail)(const char* text, const char* file, int line);  // assert, __trap: does not come back
};

// Exported by an image for kernel NAME as simulated_kernel_NAME.
struct Kernel {
  void (*thread)(Here*, void** arguments);  // runs one thread of the kernel
  unsigned count;                           // of its parameters
  const unsigned* sizes;                    // of its parameters, bytes
  unsigned max_threads;                     // __launch_bounds__, else 1024
};

}  // namespace simulated
