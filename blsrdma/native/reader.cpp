#include "reader.h"

#include <sys/uio.h>

#include <cerrno>
#include <cstring>
#include <vector>

namespace blsrdma {
namespace {

constexpr std::size_t kMostPieces = 1024;         // of one call: IOV_MAX
constexpr std::uint64_t kMostBytes = 1u << 26;  // about; a call cannot be interrupted

}  // namespace

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

int Reader::read(std::byte* to, const std::vector<iovec>& pieces) const {
  for (std::size_t first = 0; first < pieces.size();) {
    std::size_t count = 0;
    std::uint64_t bytes = 0;
    for (; count < kMostPieces && first + count < pieces.size() && bytes < kMostBytes; ++count) {
      bytes += pieces[first + count].iov_len;
    }
    const iovec here{to, bytes};
    const ssize_t got = process_vm_readv(pid_, &here, 1, &pieces[first], count, 0);
    if (got < 0) return errno;
    if (static_cast<std::uint64_t>(got) != bytes) return EFAULT;
    to += bytes;
    first += count;
  }
  return 0;
}

}  // namespace blsrdma
