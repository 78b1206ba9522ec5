// The memory of another process on this host, read by whoever wants it (process_vm_readv): nothing is registered there, no
// other thread is asked, and its owner may be busy or stopped meanwhile.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace blsrdma {

class Reader {
 public:
  // Whether the process lets this one read its memory, by a trial: `token` lies at `at` there. A policy of the system
  // (ptrace scope, seccomp, another user) may forbid it.
  bool open(pid_t pid, std::uint64_t at, const std::string& token);
  explicit operator bool() const { return pid_ != 0; }
  // 0, or errno. That the process had this pid all the while is known once it is found alive afterwards.
  int read(std::byte* to, std::uint64_t bytes, std::uint64_t from) const;
  // The same for many pieces, which go to `to` one after another.
  int read(std::byte* to, const std::vector<iovec>& pieces) const;

 private:
  pid_t pid_ = 0;
};

}  // namespace blsrdma
