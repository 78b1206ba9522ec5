// The simulated CUDA driver: the driver API over host memory. What it is for, and how tests use it: __init__.py.
// Here is what all functions share, and the functions about devices, contexts and memory; streams.inc and modules.inc have the rest.

#include <dlfcn.h>

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

size_t used(Context* context) {
    size_t bytes = 0;
    for (auto& [base, range] : state().memory.all())
        if (range.kind == Kind::device && range.device == context->device) bytes += range.map_bytes;
    return bytes;
}

// Whether `bytes` at `pointer` may be copied from or to. Memory the driver does not know is taken for pageable host memory.
CUresult check(uintptr_t pointer, size_t bytes, bool* pageable) {
    Memory& memory = state().memory;
    Range* range = memory.find(pointer);
    if (range) {
        if (pointer + bytes > range->base + range->bytes) return refuse(CUDA_ERROR_INVALID_VALUE, "beyond the end of an allocation");
        if (range->kind == Kind::imported && range->header->magic != Header::kMagic)
            complain("a copy from or to memory that its owner, another process, has freed");
        return CUDA_SUCCESS;
    }
    if (memory.is_device(pointer)) return refuse(CUDA_ERROR_INVALID_VALUE, "device memory that is not allocated (any more)");
    if (memory.overlaps(pointer, bytes)) return refuse(CUDA_ERROR_INVALID_VALUE, "runs into memory of another kind");
    if (pointer == 0) return refuse(CUDA_ERROR_INVALID_VALUE, "a null pointer");
    *pageable = true;
    return CUDA_SUCCESS;
}

void run_fault(const char* kind, Context* context) {  // "kernel", "copy"
    std::lock_guard lock(state().mutex);
    if (int error = injected(kind)) context->error = error;
}

// In pieces, from one end or the other: who looks too early sees some of it.
template <class Piece>
void in_pieces(Stream& stream, size_t bytes, Piece piece) {
    const size_t size = std::min<size_t>((bytes + 3) / 4, 1 << 20);
    const size_t count = (bytes + size - 1) / size;
    const bool backwards = stream.random.below(2);
    for (size_t i = 0; i < count; ++i) {
        if (i) pace().gate(stream.random, true);
        size_t at = (backwards ? count - 1 - i : i) * size;
        piece(at, std::min(size, bytes - at));
    }
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
        if (range->kind == Kind::device) range->header->magic = 0;
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

struct Name {
    CUresult result;
    const char *name, *text;
};
constexpr Name kNames[] = {
#define N(NAME, TEXT) {NAME, #NAME, TEXT}
    N(CUDA_SUCCESS, "no error"),
    N(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    N(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    N(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    N(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    N(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    N(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    N(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    N(CUDA_ERROR_MAP_FAILED, "mapping of buffer object failed"),
    N(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices"),
    N(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    N(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    N(CUDA_ERROR_NOT_READY, "device not ready"),
    N(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    N(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    N(CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    N(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    N(CUDA_ERROR_ASSERT, "device-side assert triggered"),
    N(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped"),
    N(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region"),
    N(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    N(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    N(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    N(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    N(CUDA_ERROR_UNKNOWN, "unknown error"),
#undef N
};

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

// The driver and its devices.

SIMULATED CUresult cuInit(unsigned flags) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    if (in_host_function) {
        complain("cuInit called from a host function (cuLaunchHostFunc): it must not call CUDA");
        std::abort();
    }
    ++s.calls["cuInit"];
    if (int result = injected("cuInit")) return CUresult(result);
    if (flags) return refuse(CUDA_ERROR_INVALID_VALUE, "flags of cuInit");
    if (s.pid && s.pid != getpid()) return refuse(CUDA_ERROR_NOT_INITIALIZED, "a fork of a process that uses CUDA");
    if (s.pid) return CUDA_SUCCESS;
    long count = setting("SIMULATED_CUDA_DEVICES", 1);
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) {
        for (int device = 0; device < count; ++device) s.devices.push_back(device);
    } else {
        for (char* end; *visible; visible = *end ? end + 1 : end) {
            long device = std::strtol(visible, &end, 10);
            if (end == visible || device < 0 || device >= count) break;  // as CUDA: what follows is not visible either
            s.devices.push_back(int(device));
        }
    }
    if (s.devices.empty()) return CUDA_ERROR_NO_DEVICE;
    s.primary.resize(s.devices.size());
    s.pid = getpid();
    return CUDA_SUCCESS;
}

SIMULATED CUresult cuDriverGetVersion(int* version) {
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = 13000;
    return CUDA_SUCCESS;
}

SIMULATED CUresult cuGetErrorName(CUresult error, const char** name) {
    if (!name) return CUDA_ERROR_INVALID_VALUE;
    *name = nullptr;
    for (auto& known : kNames)
        if (known.result == error) *name = known.name;
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
SIMULATED CUresult cuGetErrorString(CUresult error, const char** text) {
    if (!text) return CUDA_ERROR_INVALID_VALUE;
    *text = nullptr;
    for (auto& known : kNames)
        if (known.result == error) *text = known.text;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

SIMULATED CUresult cuDeviceGetCount(int* count) {
    CALL(Call);
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    *count = int(state().devices.size());
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    CALL(Call);
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    if (!valid(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    CALL(Call);
    if (!name || length <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
    std::snprintf(name, size_t(length), "Simulated GPU %d", state().devices[size_t(device)]);
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    CALL(Call);
    if (!uuid) return CUDA_ERROR_INVALID_VALUE;
    if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
    char text[32];
    std::snprintf(text, sizeof(text), "simulated GPU %02d", state().devices[size_t(device)] % 100);
    std::memcpy(uuid->bytes, text, 16);
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    CALL(Call);
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = state().memory_bytes;
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    CALL(Call);
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
    switch (int(attribute)) {
        case 1: *value = 1024; break;         // MAX_THREADS_PER_BLOCK
        case 2: case 3: *value = 1024; break;  // MAX_BLOCK_DIM_X, Y
        case 4: *value = 64; break;           // MAX_BLOCK_DIM_Z
        case 5: *value = 2147483647; break;   // MAX_GRID_DIM_X
        case 6: case 7: *value = 65535; break;  // MAX_GRID_DIM_Y, Z
        case 8: *value = 48 << 10; break;     // MAX_SHARED_MEMORY_PER_BLOCK
        case 10: *value = 32; break;          // WARP_SIZE
        case 12: *value = 65536; break;       // MAX_REGISTERS_PER_BLOCK
        case 13: *value = 1980000; break;     // CLOCK_RATE, kHz
        case 16: *value = 132; break;         // MULTIPROCESSOR_COUNT
        case 18: case 20: *value = 0; break;  // INTEGRATED, COMPUTE_MODE
        case 19: *value = 1; break;           // CAN_MAP_HOST_MEMORY
        case 31: *value = 1; break;           // CONCURRENT_KERNELS
        case 33: *value = state().devices[size_t(device)] + 1; break;  // PCI_BUS_ID
        case 34: case 50: *value = 0; break;  // PCI_DEVICE_ID, PCI_DOMAIN_ID
        case 36: *value = 2619000; break;     // MEMORY_CLOCK_RATE, kHz
        case 37: *value = 5120; break;        // GLOBAL_MEMORY_BUS_WIDTH, bits
        case 38: *value = 50 << 20; break;    // L2_CACHE_SIZE
        case 39: *value = 2048; break;        // MAX_THREADS_PER_MULTIPROCESSOR
        case 40: *value = 3; break;           // ASYNC_ENGINE_COUNT
        case 41: *value = 1; break;           // UNIFIED_ADDRESSING
        case 75: *value = 9; break;           // COMPUTE_CAPABILITY_MAJOR
        case 76: *value = 0; break;           // COMPUTE_CAPABILITY_MINOR
        case 78: *value = 1; break;           // STREAM_PRIORITIES_SUPPORTED
        case 81: *value = 228 << 10; break;   // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        case 82: *value = 65536; break;       // MAX_REGISTERS_PER_MULTIPROCESSOR
        case 83: *value = 1; break;           // MANAGED_MEMORY
        case 88: *value = 0; break;           // PAGEABLE_MEMORY_ACCESS
        case 91: *value = 1; break;           // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
        case 97: *value = 227 << 10; break;   // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        case 98: *value = 0; break;           // CAN_FLUSH_REMOTE_WRITES
        case 99: *value = 1; break;           // HOST_REGISTER_SUPPORTED
        case 102: case 103: case 115: case 124: *value = 0; break;  // virtual memory, its handles, pools, DMA_BUF_SUPPORTED
        case 106: *value = 32; break;         // MAX_BLOCKS_PER_MULTIPROCESSOR
        case 116: case 117: case 118: *value = 0; break;  // GPU_DIRECT_RDMA_*
        case 125: *value = 0; break;          // IPC_EVENT_SUPPORTED
        default: return refuse(CUDA_ERROR_INVALID_VALUE, "a device attribute that the simulation does not have");
    }
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
    CALL(Call);
    if (!can) return CUDA_ERROR_INVALID_VALUE;
    if (!valid(device) || !valid(peer)) return CUDA_ERROR_INVALID_DEVICE;
    *can = device != peer && state().peers;
    return CUDA_SUCCESS;
}

// Contexts.

SIMULATED CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    CALL(Call);
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
    Context*& primary = state().primary[size_t(device)];
    if (!primary) state().contexts.insert(primary = new Context(device));
    ++primary->retained;
    *context = reinterpret_cast<CUcontext>(primary);
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    CALL(Call);
    if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
    Context*& primary = state().primary[size_t(device)];
    if (!primary) return refuse(CUDA_ERROR_INVALID_CONTEXT, "released more often than retained");
    if (--primary->retained) return CUDA_SUCCESS;
    if (primary->error) return CUDA_SUCCESS;  // a new context would not help: the process has to end
    std::vector<Stream*> streams = primary->streams;
    call.unlock();
    for (Stream* stream : streams) stream->wait();
    std::lock_guard lock(state().mutex);
    destroy(primary);
    primary = nullptr;
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuCtxSetCurrent(CUcontext context) {
    CALL(Call);
    if (!context) {
        if (!current.empty()) current.pop_back();
        return CUDA_SUCCESS;
    }
    Context* wanted = known(state().contexts, context);
    if (!wanted) return refuse(CUDA_ERROR_INVALID_CONTEXT, "cuCtxSetCurrent");
    if (current.empty()) current.push_back(wanted);
    else current.back() = wanted;
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuCtxGetCurrent(CUcontext* context) {
    CALL(Call);
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    *context = reinterpret_cast<CUcontext>(current.empty() ? nullptr : current.back());
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuCtxPushCurrent_v2(CUcontext context) {
    CALL(Call);
    Context* wanted = known(state().contexts, context);
    if (!wanted) return refuse(CUDA_ERROR_INVALID_CONTEXT, "cuCtxPushCurrent");
    current.push_back(wanted);
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    CALL(Call);
    if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = reinterpret_cast<CUcontext>(current.back());
    current.pop_back();
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuCtxGetDevice(CUdevice* device) {
    CALL(ContextCall);
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    *device = call.context->device;
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuCtxSynchronize() {
    CALL(ContextCall);
    return drain(call);
}

// Memory.

SIMULATED CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    CALL(ContextCall);
    if (!free || !total) return CUDA_ERROR_INVALID_VALUE;
    *total = state().memory_bytes;
    *free = *total - used(call.context);
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
    CALL(ContextCall);
    if (!pointer || !bytes) return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemAlloc of 0 bytes");
    if (bytes > state().memory_bytes - used(call.context)) return CUDA_ERROR_OUT_OF_MEMORY;
    Range* range = state().memory.allocate(call.context, bytes);
    if (!range) return CUDA_ERROR_OUT_OF_MEMORY;
    *pointer = range->base;
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuMemFree_v2(CUdeviceptr pointer) {
    CALL(ContextCall);
    if (!pointer) return CUDA_SUCCESS;
    Range* range = state().memory.find(pointer);
    if (!range || range->kind != Kind::device || range->base != pointer)
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemFree of what cuMemAlloc did not return, or was freed");
    if (CUresult error = drain(call)) return error;
    std::lock_guard lock(state().mutex);
    range = state().memory.find(pointer);
    if (!range) return refuse(CUDA_ERROR_INVALID_VALUE, "freed by two threads at once");
    if (long at = Memory::beyond(*range); at >= 0)
        complain("somebody wrote byte %ld of an allocation of %zu bytes (%s)", at, range->bytes, "found by cuMemFree");
    if (int pid = Memory::importer(*range)) complain("cuMemFree of memory that process %d has open (cuIpcOpenMemHandle)", pid);
    range->header->magic = 0;
    state().memory.unmap(*range);
    close(range->fd);
    state().memory.remove(range);
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr pointer) {
    CALL(ContextCall);
    Range* range = state().memory.find(pointer);
    if (!range) return refuse(CUDA_ERROR_NOT_FOUND, "cuMemGetAddressRange");
    if (base) *base = range->base;
    if (bytes) *bytes = range->bytes;
    return CUDA_SUCCESS;
}

SIMULATED CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    CALL(ContextCall);
    if (!pointer || !bytes || flags & ~7u) return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemHostAlloc");
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    state().memory.add({Kind::pinned, call.context, address(memory), bytes, call.context->device});
    *pointer = memory;
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuMemAllocHost_v2(void** pointer, size_t bytes) {
    {
        CALL(ContextCall);  // counted, and made to fail, under its own name
    }
    return cuMemHostAlloc(pointer, bytes, 0);
}
SIMULATED CUresult cuMemFreeHost(void* pointer) {
    CALL(ContextCall);
    Range* range = state().memory.find(address(pointer));
    if (!range || range->kind != Kind::pinned || range->base != address(pointer))
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemFreeHost of what cuMemAllocHost did not return, or was freed");
    if (CUresult error = drain(call)) return error;
    std::lock_guard lock(state().mutex);
    range = state().memory.find(address(pointer));
    if (!range) return refuse(CUDA_ERROR_INVALID_VALUE, "freed by two threads at once");
    munmap(pointer, range->bytes);
    state().memory.remove(range);
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned flags) {
    CALL(ContextCall);
    if (!pointer || !bytes || flags & ~15u) return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemHostRegister");
    if (state().memory.is_device(address(pointer))) return refuse(CUDA_ERROR_INVALID_VALUE, "device memory is not registered");
    if (state().memory.overlaps(address(pointer), bytes)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    uintptr_t first = address(pointer) / kPage * kPage;
    std::vector<unsigned char> resident((address(pointer) + bytes - first + kPage - 1) / kPage);
    if (mincore(reinterpret_cast<void*>(first), address(pointer) + bytes - first, resident.data()))
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemHostRegister of memory that is not mapped");
    state().memory.add({Kind::registered, call.context, address(pointer), bytes, call.context->device});
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuMemHostUnregister(void* pointer) {
    CALL(ContextCall);
    Range* range = state().memory.find(address(pointer));
    if (!range || range->kind != Kind::registered || range->base != address(pointer))
        return refuse(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "cuMemHostUnregister");
    if (CUresult error = drain(call)) return error;
    std::lock_guard lock(state().mutex);
    if ((range = state().memory.find(address(pointer)))) state().memory.remove(range);
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* host, unsigned flags) {
    CALL(ContextCall);
    Range* range = state().memory.find(address(host));
    if (!device || flags || !range || range->header) return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemHostGetDevicePointer");
    *device = address(host);  // as on every 64-bit Linux
    return CUDA_SUCCESS;
}

SIMULATED CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle) {
    CALL(ContextCall);
    Stream* stream = find_stream(call.context, handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuMemcpyAsync: the stream");
    if (!bytes) return CUDA_SUCCESS;
    bool pageable = false;
    if (CUresult result = check(to, bytes, &pageable)) return result;
    if (CUresult result = check(from, bytes, &pageable)) return result;
    if (to < from + bytes && from < to + bytes) complain("cuMemcpyAsync of %zu bytes between overlapping ranges", bytes);
    uint64_t place = stream->push([to, from, bytes](Stream& on) {
        in_pieces(on, bytes, [&](size_t at, size_t size) {
            std::memcpy(reinterpret_cast<char*>(to) + at, reinterpret_cast<const char*>(from) + at, size);
        });
        run_fault("copy", on.context);
    });
    if (!pageable) return CUDA_SUCCESS;
    Context* context = call.context;
    call.unlock();
    stream->wait(place);  // as CUDA does with memory that it cannot reach: it is not asynchronous
    return CUresult(context->error.load());
}
SIMULATED CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream handle) {
    CALL(ContextCall);
    Stream* stream = find_stream(call.context, handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuMemsetD8Async: the stream");
    if (!bytes) return CUDA_SUCCESS;
    bool pageable = false;
    if (CUresult result = check(to, bytes, &pageable)) return result;
    if (pageable) return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemsetD8Async of pageable host memory");
    stream->push([to, value, bytes](Stream& on) {
        in_pieces(on, bytes, [&](size_t at, size_t size) { std::memset(reinterpret_cast<char*>(to) + at, value, size); });
    });
    return CUDA_SUCCESS;
}

SIMULATED CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr pointer) {
    CALL(ContextCall);
    Range* range = state().memory.find(pointer);
    if (!handle || !range || range->kind != Kind::device) return refuse(CUDA_ERROR_INVALID_VALUE, "cuIpcGetMemHandle of no device memory of ours");
    // Of the allocation, wherever in it the pointer points: as CUDA does, and does not say.
    Handle inside{Header::kMagic, getpid(), range->fd, state().devices[size_t(range->device)], range->bytes, range->base - range->map, {}};
    std::memcpy(inside.id, range->header->id, sizeof(inside.id));
    std::memset(handle, 0, sizeof(*handle));
    std::memcpy(handle, &inside, sizeof(inside));
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* pointer, CUipcMemHandle handle, unsigned flags) {
    CALL(ContextCall);
    Handle inside;
    std::memcpy(&inside, &handle, sizeof(inside));
    if (!pointer || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) return refuse(CUDA_ERROR_INVALID_VALUE, "cuIpcOpenMemHandle: flags");
    if (inside.magic != Header::kMagic) return refuse(CUDA_ERROR_INVALID_VALUE, "cuIpcOpenMemHandle: no handle");
    if (inside.pid == getpid()) return refuse(CUDA_ERROR_INVALID_CONTEXT, "cuIpcOpenMemHandle of one's own memory");
    auto& devices = state().devices;
    auto device = std::find(devices.begin(), devices.end(), inside.device);
    if (device == devices.end()) return refuse(CUDA_ERROR_INVALID_DEVICE, "cuIpcOpenMemHandle: a device that is not visible here");
    int ordinal = int(device - devices.begin());
    if (ordinal != call.context->device && !state().peers) return refuse(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "cuIpcOpenMemHandle");
    for (auto& [base, range] : state().memory.all())
        if (range.kind == Kind::imported && range.context == call.context && !std::memcmp(range.header->id, inside.id, sizeof(inside.id))) {
            ++state().memory.find(base)->opened;
            *pointer = base;
            return CUDA_SUCCESS;
        }
    Range* range = state().memory.import(call.context, inside, ordinal);
    if (!range) return refuse(CUDA_ERROR_INVALID_VALUE, "cuIpcOpenMemHandle: freed, or its process is gone");
    *pointer = range->base;
    return CUDA_SUCCESS;
}
SIMULATED CUresult cuIpcCloseMemHandle(CUdeviceptr pointer) {
    CALL(ContextCall);
    Range* range = state().memory.find(pointer);
    if (!range || range->kind != Kind::imported || range->base != pointer) return refuse(CUDA_ERROR_INVALID_VALUE, "cuIpcCloseMemHandle");
    if (--range->opened) return CUDA_SUCCESS;
    if (CUresult error = drain(call)) return error;
    std::lock_guard lock(state().mutex);
    Memory::leave(*range);
    state().memory.unmap(*range);
    state().memory.remove(range);
    return CUDA_SUCCESS;
}

namespace {

CUresult pointer_attribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    Range* range = state().memory.find(pointer);
    if (!data) return CUDA_ERROR_INVALID_VALUE;
    auto set = [data](auto value) {
        std::memcpy(data, &value, sizeof(value));
        return CUDA_SUCCESS;
    };
    bool on_device = range && range->header;
    CUresult found = range ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_CONTEXT: set(range ? range->context : nullptr); return found;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: set(!range ? 0u : on_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST); return found;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: set(range ? pointer : CUdeviceptr(0)); return found;
        case CU_POINTER_ATTRIBUTE_HOST_POINTER: set(range && !on_device ? pointer : CUdeviceptr(0)); return on_device ? CUDA_ERROR_INVALID_VALUE : found;
        case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: set(0u); return found;
        case CU_POINTER_ATTRIBUTE_BUFFER_ID: set(range ? static_cast<unsigned long long>(range->id) : 0ull); return found;
        case CU_POINTER_ATTRIBUTE_IS_MANAGED: set(0u); return found;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: set(range ? range->device : -2); return found;
        case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: set(unsigned(range && range->kind == Kind::device)); return found;
        case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: set(range ? CUdeviceptr(range->base) : 0); return found;
        case CU_POINTER_ATTRIBUTE_RANGE_SIZE: set(range ? range->bytes : size_t(0)); return found;
        case CU_POINTER_ATTRIBUTE_MAPPED: set(unsigned(range != nullptr)); return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE: set(0u); return found;
    }
    return refuse(CUDA_ERROR_INVALID_VALUE, "a pointer attribute that the simulation does not have");
}

}  // namespace

SIMULATED CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    CALL(ContextCall);
    return pointer_attribute(data, attribute, pointer);
}
SIMULATED CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** data, CUdeviceptr pointer) {
    CALL(ContextCall);
    if (!attributes || !data) return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < count; ++i) {
        CUresult result = pointer_attribute(data[i], attributes[i], pointer);
        if (result && state().memory.find(pointer) && attributes[i] != CU_POINTER_ATTRIBUTE_HOST_POINTER) return result;
    }
    return CUDA_SUCCESS;
}

#include "streams.inc"
#include "modules.inc"
