#include "cuda.h"

#include <dlfcn.h>

#include <mutex>

namespace blsrdma::cuda {
namespace {

std::mutex loading;
Functions functions;
bool loaded = false;

std::string described(const std::string& what, Result result) {
  const char *name = nullptr, *text = nullptr;
  if (functions.error_name) functions.error_name(result, &name);
  if (functions.error_text) functions.error_text(result, &text);
  return what + " failed: " + (name ? name : "result " + std::to_string(result)) + (text ? std::string(": ") + text : "");
}

}  // namespace

Error::Error(const std::string& what, Result result)
    : std::runtime_error(result < 0 ? what : described(what, result)), result_(result) {}

const Functions& load(const char* path) {
  const std::lock_guard lock(loading);
  if (loaded) return functions;
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw Error(std::string("there is no CUDA driver here: ") + dlerror(), -1);
  Functions found;
#define BLSRDMA_CUDA_ONE(name, symbol, parameters)                                                     \
  found.name = reinterpret_cast<decltype(found.name)>(dlsym(library, symbol));                         \
  if (!found.name) throw Error(std::string(path) + " is too old a CUDA driver: it has no " + symbol, -1);
  BLSRDMA_CUDA_FUNCTIONS(BLSRDMA_CUDA_ONE)
#undef BLSRDMA_CUDA_ONE
  functions = found;
  check(functions.init(0), "cuInit");
  loaded = true;
  return functions;
}

const Functions& api() { return functions; }

void check(Result result, const char* what) {
  if (result != kSuccess) throw Error(what, result);
}

Entered::Entered(Context context) {
  Context now = nullptr;
  check(functions.context_get(&now), "cuCtxGetCurrent");
  if (now == context) return;
  check(functions.context_set(context), "cuCtxSetCurrent");
  before_ = now;
}

Entered::~Entered() {
  if (before_) functions.context_set(before_);
}

Device::Device(Ordinal ordinal) {
  load();
  check(functions.device_get(&ordinal_, ordinal), "cuDeviceGet");
  check(functions.context_retain(&context_, ordinal_), "cuDevicePrimaryCtxRetain");
}

Device::~Device() { functions.context_release(ordinal_); }

std::string Device::name() const {
  char text[256] = "";
  check(functions.device_name(text, sizeof text, ordinal_), "cuDeviceGetName");
  return text;
}

std::string Device::uuid() const {
  Uuid uuid{};
  check(functions.device_uuid(&uuid, ordinal_), "cuDeviceGetUuid");
  return {uuid.bytes, sizeof uuid.bytes};
}

int Device::attribute(int which) const {
  int value = 0;
  check(functions.device_attribute(&value, which, ordinal_), "cuDeviceGetAttribute");
  return value;
}

std::size_t Device::total_bytes() const {
  std::size_t bytes = 0;
  check(functions.device_memory(&bytes, ordinal_), "cuDeviceTotalMem");
  return bytes;
}

std::size_t Device::free_bytes() const {
  const Entered entered = enter();
  std::size_t free = 0, total = 0;
  check(functions.memory_info(&free, &total), "cuMemGetInfo");
  return free;
}

}  // namespace blsrdma::cuda
