// Device memory, host memory that the driver knows, and memory of other processes. Device memory is a memfd each, mapped into a
// range of addresses that is used for nothing else, and never twice: a freed pointer is known as one.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "stream.h"

enum class Kind { device, imported, pinned, registered };

inline const size_t kPage = size_t(sysconf(_SC_PAGESIZE));
constexpr size_t kGranularity = 256;    // of cuMemAlloc: allocations do not start at pages, so that nobody relies on it
constexpr unsigned char kUnset = 0xCB;  // what new device memory holds ...
constexpr size_t kSetAtMost = 64 << 20; // ... unless that would take too long

// The first page of a device allocation's memfd; not part of what users see.
struct Header {
  static constexpr uint32_t kMagic = 0x53434d45;
  std::atomic<uint32_t> magic;  // 0 once it is freed
  unsigned char id[16];
  std::atomic<int> importers[64];  // process ids
};
static_assert(sizeof(Header) <= 4096);

struct Handle {  // inside a CUipcMemHandle
  uint32_t magic;
  int32_t pid, fd, device;
  uint64_t bytes, offset;  // offset: of the allocation in its first page
  unsigned char id[16];
};
static_assert(sizeof(Handle) <= sizeof(CUipcMemHandle));

struct Range {
  Kind kind;
  Context* context;
  uintptr_t base;
  size_t bytes;
  int device = 0;  // ordinal
  uint64_t id = 0;
  // device and imported memory:
  int fd = -1;
  Header* header = nullptr;
  uintptr_t map = 0;
  size_t map_bytes = 0;
  int opened = 0;
  int uses = 0;  // by operations that run
};

// Where device memory is: see Memory.
constexpr size_t kArena = size_t(1) << 40;
inline uintptr_t arena = 0;
inline struct sigaction before_fault;

// Says what happened, and leaves it to whoever handled it before.
inline void on_fault(int, siginfo_t* info, void*) {
  constexpr char kText[] = "simulated CUDA: the host touched device memory, or a kernel memory that is not allocated\n";
  if (reinterpret_cast<uintptr_t>(info->si_addr) - arena < kArena && write(2, kText, sizeof(kText) - 1) < 0) _exit(1);
  sigaction(SIGSEGV, &before_fault, nullptr);
}

class Memory {
 public:
  // The range that holds `pointer`, or null.
  Range* find(uintptr_t pointer) {
    auto after = ranges_.upper_bound(pointer);
    if (after == ranges_.begin()) return nullptr;
    Range& range = std::prev(after)->second;
    return pointer < range.base + range.bytes ? &range : nullptr;
  }
  bool overlaps(uintptr_t pointer, size_t bytes) {
    auto after = ranges_.lower_bound(pointer);
    return find(pointer) || (after != ranges_.end() && after->first < pointer + bytes);
  }
  bool is_device(uintptr_t pointer) const { return arena && pointer - arena < kArena; }
  const std::map<uintptr_t, Range>& all() const { return ranges_; }

  Range* add(Range range) {
    range.id = ++ids_;
    return &(ranges_[range.base] = range);
  }
  void remove(Range* range) { ranges_.erase(range->base); }

  // Null where there is no memory left.
  Range* allocate(Context* context, size_t bytes) {
    size_t offset = (kPage - (bytes + kGranularity - 1) / kGranularity * kGranularity % kPage) % kPage;
    int fd = int(syscall(SYS_memfd_create, "simulated-cuda", MFD_CLOEXEC));
    if (fd < 0) return nullptr;
    size_t map_bytes = (offset + bytes + kPage - 1) / kPage * kPage;
    Range range{Kind::device, context, 0, bytes, context->device};
    if (ftruncate(fd, off_t(kPage + map_bytes)) || !map(range, fd, map_bytes, offset)) {
      close(fd);
      return nullptr;
    }
    range.fd = fd;
    if (getrandom(range.header->id, sizeof(range.header->id), 0) < 0) return nullptr;
    range.header->magic = Header::kMagic;
    if (map_bytes <= kSetAtMost) {
      use(range);
      std::memset(reinterpret_cast<void*>(range.map), kUnset, map_bytes);
      unuse(range);
    }
    return add(range);
  }

  // Imports another process's allocation; null with errno where there is none (any more).
  Range* import(Context* context, const Handle& handle, int device) {
    std::string path = "/proc/" + std::to_string(handle.pid) + "/fd/" + std::to_string(handle.fd);
    int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    struct stat status;
    size_t map_bytes = (handle.offset + handle.bytes + kPage - 1) / kPage * kPage;
    if (fd < 0) return nullptr;
    Range range{Kind::imported, context, 0, handle.bytes, device};
    bool right = !fstat(fd, &status) && size_t(status.st_size) == kPage + map_bytes && map(range, fd, map_bytes, handle.offset);
    close(fd);
    if (!right) return nullptr;
    if (range.header->magic != Header::kMagic || std::memcmp(range.header->id, handle.id, sizeof(handle.id))) {
      unmap(range);
      return nullptr;
    }
    for (auto& slot : range.header->importers) {
      int nobody = 0;
      if (slot.compare_exchange_strong(nobody, getpid())) break;
    }
    range.opened = 1;
    return add(range);
  }

  void unmap(Range& range) {
    munmap(range.header, kPage);
    // Stays reserved: see the top.
    mmap(reinterpret_cast<void*>(range.map), range.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }

  // Device memory can be touched only while an operation that may use it runs: the host, which cannot, mostly finds out.
  void use(Range& range) {
    if (range.header && protect_ && range.uses++ == 0) allow(range, PROT_READ | PROT_WRITE);
  }
  void unuse(Range& range) {
    if (range.header && protect_ && --range.uses == 0) allow(range, PROT_NONE);
  }

  // The id of another living process that still has this allocation open, or 0.
  static int importer(const Range& range) {
    for (auto& slot : range.header->importers)
      if (int pid = slot; pid && lives(pid)) return pid;
    return 0;
  }
  static void leave(Range& range) {
    for (auto& slot : range.header->importers) {
      int me = getpid();
      if (slot.compare_exchange_strong(me, 0)) return;
    }
  }

  // The first byte behind the allocation in its last page that somebody wrote to, or -1.
  long beyond(Range& range) {
    if (range.map_bytes > kSetAtMost) return -1;
    auto* byte = reinterpret_cast<const unsigned char*>(range.base);
    long found = -1;
    use(range);
    for (size_t i = range.bytes; range.base + i < range.map + range.map_bytes && found < 0; ++i)
      if (byte[i] != kUnset) found = long(i);
    unuse(range);
    return found;
  }

 private:
  static bool lives(int pid) {  // and is not only waited for
    std::FILE* file = std::fopen(("/proc/" + std::to_string(pid) + "/stat").c_str(), "r");
    char state = 'X';
    if (!file) return false;
    if (std::fscanf(file, "%*d (%*[^)]) %c", &state) != 1) state = 'X';
    std::fclose(file);
    return state != 'Z' && state != 'X';
  }
  static void allow(const Range& range, int what) { mprotect(reinterpret_cast<void*>(range.map), range.map_bytes, what); }

  bool map(Range& range, int fd, size_t map_bytes, size_t offset) {
    if (arena == 0) {
      void* all = mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (all == MAP_FAILED) return false;
      arena = next_ = reinterpret_cast<uintptr_t>(all);
      struct sigaction action {};
      action.sa_sigaction = on_fault;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK;
      sigaction(SIGSEGV, &action, &before_fault);
    }
    if (next_ + map_bytes + 2 * kPage > arena + kArena) return false;
    void* at = reinterpret_cast<void*>(next_ + kPage);
    if (mmap(at, map_bytes, protect_ ? PROT_NONE : PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, kPage) == MAP_FAILED) return false;
    void* header = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (header == MAP_FAILED) return false;
    range.header = static_cast<Header*>(header);
    range.map = reinterpret_cast<uintptr_t>(at);
    range.map_bytes = map_bytes;
    range.base = range.map + offset;
    next_ = range.map + map_bytes;
    return true;
  }

  std::map<uintptr_t, Range> ranges_;
  uintptr_t next_ = 0;
  const bool protect_ = setting("SIMULATED_CUDA_PROTECT", 1) != 0;
  uint64_t ids_ = 0;
};
