// Registered memory that peers can write: allocated by UCX, so that peers on the same host can map it.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "ucx.h"

namespace blsrdma {

class Arena {
 public:
  // `owner` keeps the context alive for as long as the arena, and so any view of it, lives. The memory is zeroed, and so touched: a machine that is short of memory (or of
  // /dev/shm) says so here and not in the middle of a run.
  Arena(ucp_context_h context, std::shared_ptr<void> owner, std::size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  ucp_mem_h handle() const { return handle_; }
  std::string packed_rkey() const;

  // Let peers read memory that is not the arena's: its registration, and the key to it in `rkey`.
  ucp_mem_h register_buffer(const std::byte* data, std::size_t bytes, std::string& rkey) const;
  void unregister_buffer(ucp_mem_h registered) const;

 private:
  std::string packed(ucp_mem_h handle) const;

  std::shared_ptr<void> owner_;
  ucp_context_h context_;
  std::size_t bytes_;
  ucp_mem_h handle_ = nullptr;
  std::byte* data_ = nullptr;
};

}  // namespace blsrdma
