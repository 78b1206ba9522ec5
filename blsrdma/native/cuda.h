// CUDA's driver API, looked up at run time: this module builds, loads and runs on machines without a GPU, and needs neither
// CUDA's headers nor its runtime library. What torch, cupy and UCX do on the same device shares its primary context.
//
// Declared here is what is used, under the names and with the types of cuda.h (a CUdeviceptr is a 64-bit integer, handles
// are opaque pointers, enumerations are ints); tests/gpu compares the declarations with another set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace blsrdma::cuda {

using Result = int;
using Ordinal = int;  // CUdevice
using Address = unsigned long long;  // CUdeviceptr
using Context = struct Context_*;
using Stream = struct Stream_*;
using Event = struct Event_*;
using Module = struct Module_*;
using Function = struct Function_*;
using HostFunction = void (*)(void*);

struct Uuid {
  char bytes[16];
};
struct IpcHandle {
  char bytes[64];
};

inline constexpr Result kSuccess = 0;
inline constexpr Result kNotReady = 600;

// name in this table, name in the library, parameters; all return a Result.
#define BLSRDMA_CUDA_FUNCTIONS(ONE)                                                                                        \
  ONE(init, "cuInit", (unsigned flags))                                                                                    \
  ONE(driver_version, "cuDriverGetVersion", (int* version))                                                                \
  ONE(device_count, "cuDeviceGetCount", (int* count))                                                                      \
  ONE(device_get, "cuDeviceGet", (Ordinal * device, int ordinal))                                                          \
  ONE(device_name, "cuDeviceGetName", (char* name, int size, Ordinal device))                                              \
  ONE(device_uuid, "cuDeviceGetUuid_v2", (Uuid * uuid, Ordinal device))                                                    \
  ONE(device_memory, "cuDeviceTotalMem_v2", (std::size_t * bytes, Ordinal device))                                         \
  ONE(device_attribute, "cuDeviceGetAttribute", (int* value, int attribute, Ordinal device))                               \
  ONE(context_retain, "cuDevicePrimaryCtxRetain", (Context * context, Ordinal device))                                     \
  ONE(context_release, "cuDevicePrimaryCtxRelease_v2", (Ordinal device))                                                   \
  ONE(context_set, "cuCtxSetCurrent", (Context context))                                                                   \
  ONE(context_get, "cuCtxGetCurrent", (Context * context))                                                                 \
  ONE(memory_info, "cuMemGetInfo_v2", (std::size_t * free, std::size_t * total))                                           \
  ONE(memory_allocate, "cuMemAlloc_v2", (Address * address, std::size_t bytes))                                            \
  ONE(memory_free, "cuMemFree_v2", (Address address))                                                                      \
  ONE(host_allocate, "cuMemAllocHost_v2", (void** pointer, std::size_t bytes))                                             \
  ONE(host_free, "cuMemFreeHost", (void* pointer))                                                                         \
  ONE(host_register, "cuMemHostRegister_v2", (void* pointer, std::size_t bytes, unsigned flags))                           \
  ONE(host_unregister, "cuMemHostUnregister", (void* pointer))                                                             \
  ONE(host_address, "cuMemHostGetDevicePointer_v2", (Address * address, void* pointer, unsigned flags))                    \
  ONE(copy, "cuMemcpyAsync", (Address to, Address from, std::size_t bytes, Stream stream))                                 \
  ONE(fill, "cuMemsetD8Async", (Address to, unsigned char value, std::size_t bytes, Stream stream))                        \
  ONE(stream_create, "cuStreamCreateWithPriority", (Stream * stream, unsigned flags, int priority))                        \
  ONE(stream_destroy, "cuStreamDestroy_v2", (Stream stream))                                                               \
  ONE(stream_wait, "cuStreamWaitEvent", (Stream stream, Event event, unsigned flags))                                      \
  ONE(stream_query, "cuStreamQuery", (Stream stream))                                                                      \
  ONE(event_create, "cuEventCreate", (Event * event, unsigned flags))                                                      \
  ONE(event_record, "cuEventRecord", (Event event, Stream stream))                                                         \
  ONE(event_query, "cuEventQuery", (Event event))                                                                          \
  ONE(event_elapsed, "cuEventElapsedTime", (float* milliseconds, Event start, Event end))                                  \
  ONE(event_destroy, "cuEventDestroy_v2", (Event event))                                                                   \
  ONE(host_function, "cuLaunchHostFunc", (Stream stream, HostFunction function, void* argument))                           \
  ONE(ipc_handle, "cuIpcGetMemHandle", (IpcHandle * handle, Address address))                                              \
  ONE(ipc_open, "cuIpcOpenMemHandle_v2", (Address * address, IpcHandle handle, unsigned flags))                            \
  ONE(ipc_close, "cuIpcCloseMemHandle", (Address address))                                                                 \
  ONE(pointer_attribute, "cuPointerGetAttribute", (void* value, int attribute, Address address))                           \
  ONE(module_load, "cuModuleLoadData", (Module * module, const void* image))                                               \
  ONE(module_unload, "cuModuleUnload", (Module module))                                                                    \
  ONE(module_function, "cuModuleGetFunction", (Function * function, Module module, const char* name))                      \
  ONE(function_set, "cuFuncSetAttribute", (Function function, int attribute, int value))                                   \
  ONE(function_get, "cuFuncGetAttribute", (int* value, int attribute, Function function))                                  \
  ONE(launch, "cuLaunchKernel",                                                                                            \
      (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,           \
       unsigned block_z, unsigned shared_bytes, Stream stream, void** arguments, void** extra))                            \
  ONE(error_name, "cuGetErrorName", (Result error, const char** name))                                                     \
  ONE(error_text, "cuGetErrorString", (Result error, const char** text))

struct Functions {
#define BLSRDMA_CUDA_ONE(name, symbol, parameters) Result(*name) parameters = nullptr;
  BLSRDMA_CUDA_FUNCTIONS(BLSRDMA_CUDA_ONE)
#undef BLSRDMA_CUDA_ONE
};

// A call that the driver refused. `result` is its code.
class Error : public std::runtime_error {
 public:
  Error(const std::string& what, Result result);
  Result result() const { return result_; }

 private:
  Result result_;
};

// Load the driver's library, and initialise it; once it is, another `path` means nothing. Throws Error, with result -1 where
// there is no such library, or a function is missing from it; then it may be tried again.
const Functions& load(const char* path = "libcuda.so.1");
// After load().
const Functions& api();

void check(Result result, const char* what);

inline constexpr unsigned kNonBlocking = 1;        // CU_STREAM_NON_BLOCKING: not ordered against the null stream
inline constexpr unsigned kNoTiming = 2;           // CU_EVENT_DISABLE_TIMING
inline constexpr unsigned kPortable = 1;           // CU_MEMHOSTREGISTER_PORTABLE
inline constexpr unsigned kLazyPeerAccess = 1;     // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
inline constexpr int kMultiprocessors = 16;        // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
inline constexpr int kMajor = 75, kMinor = 76;     // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
inline constexpr int kMemoryType = 2;              // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
inline constexpr int kDeviceOrdinal = 9;           // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
inline constexpr int kDynamicShared = 8;           // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

// Makes a context current in this thread for as long as it lives; then the one before, if there was one, is so again: torch's
// current device is that of the current context.
class Entered {
 public:
  explicit Entered(Context context);
  ~Entered();
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  Context before_ = nullptr;  // to go back to
};

// The primary context of one device.
class Device {
 public:
  explicit Device(Ordinal ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  Ordinal ordinal() const { return ordinal_; }
  [[nodiscard]] Entered enter() const { return Entered(context_); }
  std::string name() const;
  std::string uuid() const;  // 16 bytes
  int attribute(int which) const;
  std::size_t total_bytes() const;
  std::size_t free_bytes() const;

 private:
  Ordinal ordinal_ = 0;
  Context context_ = nullptr;
};

}  // namespace blsrdma::cuda
