#include "arena.h"

#include <sys/ipc.h>
#include <sys/shm.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <utility>

namespace blsrdma {
namespace {

// UCX makes System V segments, the arena's and those of its own queues, readable and writable by the group; nobody but the
// owner has any business there. (POSIX shared memory it makes for the owner alone.) A segment's id is the inode of its
// mapping.
void keep_others_out() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long inode = 0;
    char name[8] = "";
    if (std::sscanf(line.c_str(), "%*s %*s %*s %*s %lu %7s", &inode, name) != 2) continue;
    shmid_ds segment{};
    if (std::strncmp(name, "/SYSV", 5) != 0 || shmctl(static_cast<int>(inode), IPC_STAT, &segment) != 0) continue;
    if (segment.shm_cpid != getpid()) continue;
    segment.shm_perm.mode = 0600;
    shmctl(static_cast<int>(inode), IPC_SET, &segment);
  }
}

}  // namespace

Arena::Arena(ucp_context_h context, std::shared_ptr<void> owner, std::size_t bytes)
    : owner_(std::move(owner)), context_(context), bytes_(bytes) {
  ucp_mem_map_params_t params{};
  params.field_mask =
      UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.length = bytes;
  params.flags = UCP_MEM_MAP_ALLOCATE;
  params.memory_type = UCS_MEMORY_TYPE_HOST;
  const ucs_status_t status = ucp_mem_map(context_, &params, &handle_);
  if (status != UCS_OK) {
    throw UcxError("cannot allocate " + std::to_string(bytes) + " bytes of registered memory for windows", status);
  }
  ucp_mem_attr_t attributes{};
  attributes.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
  const ucs_status_t queried = ucp_mem_query(handle_, &attributes);
  if (queried != UCS_OK) {
    ucp_mem_unmap(context_, handle_);
    throw UcxError("ucp_mem_query", queried);
  }
  data_ = static_cast<std::byte*>(attributes.address);
  keep_others_out();
  std::memset(data_, 0, bytes_);
}

Arena::~Arena() { ucp_mem_unmap(context_, handle_); }

std::string Arena::packed_rkey() const { return packed(handle_); }

ucp_mem_h Arena::register_buffer(const std::byte* data, std::size_t bytes, std::string& rkey) const {
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                      UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.address = const_cast<std::byte*>(data);
  params.length = bytes;
  params.memory_type = UCS_MEMORY_TYPE_HOST;
  ucp_mem_h registered = nullptr;
  const ucs_status_t status = ucp_mem_map(context_, &params, &registered);
  if (status != UCS_OK) throw UcxError("cannot register a buffer of " + std::to_string(bytes) + " bytes", status);
  rkey = packed(registered);
  return registered;
}

void Arena::unregister_buffer(ucp_mem_h registered) const { ucp_mem_unmap(context_, registered); }

std::string Arena::packed(ucp_mem_h handle) const {
  void* buffer = nullptr;
  std::size_t size = 0;
  check(ucp_rkey_pack(context_, handle, &buffer, &size), "ucp_rkey_pack");
  std::string packed(static_cast<const char*>(buffer), size);
  ucp_rkey_buffer_release(buffer);
  return packed;
}

}  // namespace blsrdma
