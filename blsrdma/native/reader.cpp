#include "reader.h"

#include <sys/uio.h>

#include <cerrno>
#include <cstring>
#include <vector>

namespace blsrdma {

bool Reader::open(pid_t pid, std::uint64_t at, const std::string& token) {
  pid_ = pid;
  std::vector<std::byte> there(token.size());
  if (pid == 0 || read(there.data(), there.size(), at) != 0 || std::memcmp(there.data(), token.data(), token.size()) != 0) {
    pid_ = 0;
  }
  return pid_ != 0;
}

int Reader::read(std::byte* to, std::uint64_t bytes, std::uint64_t from) const {
  while (bytes) {
    const iovec here{to, bytes}, there{reinterpret_cast<void*>(from), bytes};
    const ssize_t got = process_vm_readv(pid_, &here, 1, &there, 1, 0);
    if (got <= 0) return got < 0 ? errno : EFAULT;
    to += got;
    from += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::uint64_t>(got);
  }
  return 0;
}

}  // namespace blsrdma
