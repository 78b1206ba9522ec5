// The simulated CUDA driver: the driver API over host memory. What it is for, and how tests use it: __init__.py.
// Here is what all its functions share, and what tests call; the functions themselves are in the files included at the end.

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdarg>
#include <set>

#include "block.h"
#include "memory.h"

#define SIMULATED extern "C" __attribute__((visibility("default")))

namespace {

struct Fault {
  int result = 0, after = 0;
};

struct Module {
  Context* context;
  void* library;
  bool alive = true;
};
struct Function {
  Module* module;
  std::string name;
  const simulated::Kernel* kernel;
  int dynamic_shared = 48 << 10;
};

// Handles are pointers to objects that are never deleted, so that a stale one is known as one.
struct State {
  std::mutex mutex;
  int pid = 0;  // that called cuInit
  std::vector<int> devices;
  std::vector<Context*> primary;
  std::set<Context*> contexts;
  std::set<Stream*> streams;
  std::set<Event*> events;
  std::set<Module*> modules;
  std::set<Function*> functions;
  Memory memory;
  HostFunctions host_functions;
  std::map<std::string, Fault> faults;
  std::map<std::string, long> calls;
  std::atomic<long> complaints{0};
  uint64_t made = 0;  // streams so far
  const size_t memory_bytes = size_t(setting("SIMULATED_CUDA_MEMORY", 2l << 30));
  const bool peers = setting("SIMULATED_CUDA_PEERS", 1) != 0;
  const bool verbose = setting("SIMULATED_CUDA_VERBOSE", 0) != 0;
};

State& state() {
  static State* forever = new State;
  return *forever;
}

thread_local std::vector<Context*> current;  // the stack; the last is the current one

__attribute__((format(printf, 1, 2))) void complain(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "simulated CUDA: ");
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  ++state().complaints;
}

CUresult refuse(CUresult result, const char* why) {
  if (state().verbose) std::fprintf(stderr, "simulated CUDA: refused (%d): %s\n", int(result), why);
  return result;
}

int injected(const char* name) {  // with the mutex held
  auto fault = state().faults.find(name);
  if (fault == state().faults.end() || fault->second.after-- > 0) return 0;
  int result = fault->second.result;
  state().faults.erase(fault);
  return result;
}

// Every function of the API starts with one of these, which holds the state's mutex for the rest of the call.
class Call {
 public:
  explicit Call(const char* name) : lock_(state().mutex) {
    if (in_host_function) {
      complain("%s called from a host function (cuLaunchHostFunc): it must not call CUDA", name);
      std::abort();
    }
    ++state().calls[name];
    if (state().pid != getpid()) result = refuse(CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called in this process");
    else result = CUresult(injected(name));
  }
  void unlock() { lock_.unlock(); }
  CUresult result;

 protected:
  std::unique_lock<std::mutex> lock_;
};
class ContextCall : public Call {
 public:
  explicit ContextCall(const char* name) : Call(name) {
    if (result) return;
    context = current.empty() ? nullptr : current.back();
    if (!context) result = refuse(CUDA_ERROR_INVALID_CONTEXT, "no current context");
    else if (!context->alive) result = refuse(CUDA_ERROR_CONTEXT_IS_DESTROYED, "the current context was destroyed");
    else if (context->error) result = CUresult(context->error.load());
  }
  Context* context = nullptr;
};
#define CALL(KIND)            \
  KIND call(__func__);      \
  if (call.result) return call.result

bool valid(CUdevice device) { return device >= 0 && size_t(device) < state().devices.size(); }

template <class T, class H>
T* known(const std::set<T*>& all, H handle) {
  T* object = reinterpret_cast<T*>(handle);
  return all.count(object) && object->alive ? object : nullptr;
}
template <class T>
uintptr_t address(T pointer) {
  if constexpr (std::is_pointer_v<T>) return reinterpret_cast<uintptr_t>(pointer);
  else return uintptr_t(pointer);
}

Stream* make_stream(Context* context) {
  auto* stream = new Stream(context, pace().seed * 1000003 + state().made++);
  state().streams.insert(stream);
  context->streams.push_back(stream);
  return stream;
}

// 0 and CU_STREAM_LEGACY: a stream of its own, which does not wait for others as CUDA's does.
Stream* find_stream(Context* context, CUstream handle) {
  if (address(handle) <= 1) return context->null ? context->null : context->null = make_stream(context);
  return known(state().streams, handle);
}

// Waits for all streams of a context, as cuMemFree and the like do; with the mutex released.
CUresult drain(ContextCall& call) {
  std::vector<Stream*> streams;
  for (Stream* stream : state().streams)
    if (stream->context == call.context) streams.push_back(stream);  // destroyed ones too: their work goes on
  call.unlock();
  for (Stream* stream : streams) stream->wait();
  return CUresult(call.context->error.load());
}

// While it lives, device memory can be used: the ranges of these pointers, or all that there is.
class Access {
 public:
  explicit Access(std::initializer_list<uintptr_t> pointers) {
    std::lock_guard lock(state().mutex);
    for (uintptr_t pointer : pointers)
      if (Range* range = state().memory.find(pointer)) use(range->base);
  }
  Access() {
    std::lock_guard lock(state().mutex);
    for (auto& [base, range] : state().memory.all()) use(base);
  }
  ~Access() {
    std::lock_guard lock(state().mutex);
    for (uintptr_t base : bases_)
      if (Range* range = state().memory.find(base)) state().memory.unuse(*range);  // else freed by another context
  }
  Access(const Access&) = delete;

 private:
  void use(uintptr_t base) {
    state().memory.use(*state().memory.find(base));
    bases_.push_back(base);
  }
  std::vector<uintptr_t> bases_;
};

void run_fault(const char* kind, Context* context) {  // "kernel", "copy"
  std::lock_guard lock(state().mutex);
  if (int error = injected(kind)) context->error = error;
}

void report_beyond(Range& range) {
  if (long at = state().memory.beyond(range); at >= 0) complain("somebody wrote byte %ld of an allocation of %zu bytes", at, range.bytes);
}

void destroy(Context* context) {
  for (Stream* stream : context->streams) {
    stream->alive = false;
    stream->end();
  }
  context->alive = false;
  std::vector<uintptr_t> bases;
  for (auto& [base, range] : state().memory.all())
    if (range.context == context) bases.push_back(base);
  for (uintptr_t base : bases) {
    Range* range = state().memory.find(base);
    if (range->kind == Kind::device) {
      report_beyond(*range);
      range->header->magic = 0;
    }
    if (range->kind == Kind::imported) Memory::leave(*range);
    if (range->header) state().memory.unmap(*range);
    if (range->fd >= 0) close(range->fd);
    state().memory.remove(range);
  }
  for (Event* event : state().events)
    if (event->context == context) event->alive = false;
  for (Module* module : state().modules)
    if (module->context == context) module->alive = false;
}
}  // namespace

// For tests.

SIMULATED void simulated_fail(const char* function, int result, int after_calls) {
  std::lock_guard lock(state().mutex);
  if (result) state().faults[function] = {result, after_calls};
  else state().faults.erase(function);
}
SIMULATED void simulated_hold(int on) { pace().hold(on != 0); }
SIMULATED long simulated_step(long count, long milliseconds) { return pace().step(count, milliseconds); }
SIMULATED long simulated_calls(const char* function) {
  std::lock_guard lock(state().mutex);
  auto calls = state().calls.find(function);
  return calls == state().calls.end() ? 0 : calls->second;
}
SIMULATED long simulated_complaints() { return state().complaints; }
SIMULATED long simulated_live(const char* what) {
  std::lock_guard lock(state().mutex);
  std::string_view name(what);
  long count = 0;
  auto alive = [](auto& all) { return std::count_if(all.begin(), all.end(), [](auto* object) { return object->alive; }); };
  if (name == "streams")
    for (Context* context : state().contexts) count -= context->alive && context->null;
  if (name == "streams") return count + alive(state().streams);
  if (name == "events") return alive(state().events);
  if (name == "modules") return alive(state().modules);
  for (auto& [base, range] : state().memory.all()) {
    constexpr const char* kKinds[] = {"device", "imported", "pinned", "registered"};
    count += name == kKinds[int(range.kind)];
  }
  return count;
}

#include "devices.inc"
#include "memory.inc"
#include "streams.inc"
#include "modules.inc"
