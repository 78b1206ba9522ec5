#include "module_cuda.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstring>

#include "calls.h"
#include "gpu_exchange.h"
#include "gpu_pooler.h"

namespace blsrdma {

using namespace nb::literals;
using cuda::api;
using cuda::check;

namespace {

using Released = nb::call_guard<nb::gil_scoped_release>;
using Grid = std::array<unsigned, 3>;

// What belongs to a device and is given back by close(), or by the collector; not once the interpreter is going.
template <typename Handle>
struct Owned {
  Owned(std::shared_ptr<cuda::Device> device, Handle handle) : device(std::move(device)), handle(handle) {}
  std::shared_ptr<cuda::Device> device;
  Handle handle;
};

struct Memory : Owned<cuda::Address> {
  Memory(std::shared_ptr<cuda::Device> owner, std::uint64_t bytes) : Owned(std::move(owner), 0), bytes(bytes) {
    const cuda::Entered entered = device->enter();
    if (bytes) check(api().memory_allocate(&handle, bytes), "cuMemAlloc");
  }
  ~Memory() { close(); }
  void close() {
    if (!handle) return;
    const cuda::Entered entered = device->enter();
    api().memory_free(std::exchange(handle, 0));
  }
  std::uint64_t bytes;
};

// Page-locked memory of the host, which kernels can read and write, too.
struct HostMemory : Owned<void*> {
  HostMemory(std::shared_ptr<cuda::Device> owner, std::uint64_t bytes) : Owned(std::move(owner), nullptr), bytes(bytes) {
    const cuda::Entered entered = device->enter();
    if (!bytes) return;
    check(api().host_allocate(&handle, bytes), "cuMemAllocHost");
    check(api().host_address(&address, handle, 0), "cuMemHostGetDevicePointer");
  }
  ~HostMemory() { close(); }
  void close() {
    if (!handle) return;
    const cuda::Entered entered = device->enter();
    api().host_free(std::exchange(handle, nullptr));
  }
  std::uint64_t bytes;
  cuda::Address address = 0;  // for kernels
};

// Another process's device memory.
struct Mapping : Owned<cuda::Address> {
  Mapping(std::shared_ptr<cuda::Device> owner, const nb::bytes& ipc_handle) : Owned(std::move(owner), 0) {
    cuda::IpcHandle given{};
    if (ipc_handle.size() != sizeof given) throw std::invalid_argument("an IPC handle has 64 bytes");
    std::memcpy(given.bytes, ipc_handle.c_str(), sizeof given);
    const cuda::Entered entered = device->enter();
    check(api().ipc_open(&handle, given, cuda::kLazyPeerAccess), "cuIpcOpenMemHandle");
  }
  ~Mapping() { close(); }
  void close() {
    if (!handle) return;
    const cuda::Entered entered = device->enter();
    api().ipc_close(std::exchange(handle, 0));
  }
};

struct Stream : Owned<cuda::Stream> {
  explicit Stream(std::shared_ptr<cuda::Device> owner) : Owned(std::move(owner), nullptr) {
    const cuda::Entered entered = device->enter();
    check(api().stream_create(&handle, cuda::kNonBlocking, 0), "cuStreamCreateWithPriority");
  }
  ~Stream() { close(); }
  void close() {
    if (!handle) return;
    const cuda::Entered entered = device->enter();
    api().stream_destroy(std::exchange(handle, nullptr));
  }
};

struct Event : Owned<cuda::Event> {
  Event(std::shared_ptr<cuda::Device> owner, bool timing) : Owned(std::move(owner), nullptr) {
    const cuda::Entered entered = device->enter();
    check(api().event_create(&handle, timing ? 0 : cuda::kNoTiming), "cuEventCreate");
  }
  ~Event() { close(); }
  void close() {
    if (!handle) return;
    const cuda::Entered entered = device->enter();
    api().event_destroy(std::exchange(handle, nullptr));
  }
};

struct Module : Owned<cuda::Module> {
  Module(std::shared_ptr<cuda::Device> owner, const nb::bytes& image) : Owned(std::move(owner), nullptr) {
    const cuda::Entered entered = device->enter();
    check(api().module_load(&handle, image.c_str()), "cuModuleLoadData");
  }
  ~Module() { close(); }
  void close() {
    if (!handle) return;
    const cuda::Entered entered = device->enter();
    api().module_unload(std::exchange(handle, nullptr));
  }
};

struct Function {
  std::shared_ptr<Module> module;
  cuda::Function handle = nullptr;
};

cuda::Stream stream_of(std::uintptr_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

// Poll until it is done: with the GIL released, and a bound.
template <typename Query>
bool wait_for(const cuda::Device& device, std::int64_t timeout_ns, Query&& query) {
  const nb::gil_scoped_release release;
  const cuda::Entered entered = device.enter();
  const std::uint64_t until = deadline(timeout_ns);
  for (std::uint32_t round = 0;; ++round) {
    const cuda::Result result = query();
    if (result == cuda::kSuccess) return true;
    if (result != cuda::kNotReady) check(result, "waiting for the device");
    if (now_ns() >= until) return false;
    if (round < 1000) {
      sched_yield();
    } else {
      const timespec nap{0, 50'000};
      nanosleep(&nap, nullptr);
    }
  }
}

// Each argument is an object that shows its bytes: a numpy scalar or array of one element, a ctypes object. In its own size.
void launch(const Function& function, const Grid& grid, const Grid& block, unsigned shared_bytes, std::uintptr_t stream,
            const nb::sequence& arguments) {
  constexpr std::size_t kRoom = 4096, kMost = 64;
  alignas(16) std::byte room[kRoom];
  void* pointers[kMost];
  std::size_t used = 0, count = 0;
  for (const nb::handle argument : arguments) {
    Py_buffer view;
    if (PyObject_GetBuffer(argument.ptr(), &view, PyBUF_SIMPLE) != 0) throw nb::python_error();
    const auto bytes = static_cast<std::size_t>(view.len);
    const bool fits = count < kMost && used + bytes <= kRoom;
    if (fits) std::memcpy(room + used, view.buf, bytes);
    PyBuffer_Release(&view);
    if (!fits) throw std::length_error("a kernel takes at most 64 arguments of 4096 bytes");
    pointers[count++] = room + used;
    used = (used + bytes + 15) & ~std::size_t{15};
  }
  const cuda::Entered entered = function.module->device->enter();
  check(api().launch(function.handle, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared_bytes,
                     stream_of(stream), pointers, nullptr), "cuLaunchKernel");
}

std::uint64_t nanoseconds(std::int64_t timeout_ns) { return timeout_ns < 0 ? kNever : static_cast<std::uint64_t>(timeout_ns); }

int waited(Outcome outcome) {
  if (outcome == Outcome::interrupted) throw nb::python_error();  // it is set already
  return static_cast<int>(outcome);
}

template <typename Type>
nb::class_<Type> owned(nb::module_& m, const char* name, const char* doc) {
  return nb::class_<Type>(m, name, doc).def("close", &Type::close).def_prop_ro("address", [](const Type& self) {
    return (std::uintptr_t)self.handle;  // an integer already, or a pointer
  });
}

void bind_device(nb::module_& m) {
  using cuda::Device;
  nb::class_<Device>(m, "Device", "The primary context of a device, which torch and cupy use as well.")
      .def(nb::init<int>(), "ordinal"_a)
      .def_prop_ro("ordinal", &Device::ordinal)
      .def_prop_ro("name", &Device::name)
      .def_prop_ro("uuid", [](const Device& self) { return nb::bytes(self.uuid().data(), 16); })
      .def_prop_ro("capability", [](const Device& self) {
        return std::pair(self.attribute(cuda::kMajor), self.attribute(cuda::kMinor));
      })
      .def_prop_ro("multiprocessors", [](const Device& self) { return self.attribute(cuda::kMultiprocessors); })
      .def_prop_ro("total_bytes", &Device::total_bytes)
      .def_prop_ro("free_bytes", &Device::free_bytes)
      .def("memory", [](std::shared_ptr<Device> self, std::uint64_t bytes) { return std::make_shared<Memory>(std::move(self), bytes); },
           "size"_a, "Device memory (cuMemAlloc); its contents are undefined.")
      .def("host_memory", [](std::shared_ptr<Device> self, std::uint64_t bytes) { return std::make_shared<HostMemory>(std::move(self), bytes); },
           "size"_a, "Page-locked host memory that kernels can use.")
      .def("map", [](std::shared_ptr<Device> self, const nb::bytes& handle) { return std::make_shared<Mapping>(std::move(self), handle); },
           "ipc_handle"_a, "Another process's device memory.")
      .def("stream", [](std::shared_ptr<Device> self) { return std::make_shared<Stream>(std::move(self)); })
      .def("event", [](std::shared_ptr<Device> self, bool timing) { return std::make_shared<Event>(std::move(self), timing); },
           "timing"_a = false)
      .def("module", [](std::shared_ptr<Device> self, const nb::bytes& image) { return std::make_shared<Module>(std::move(self), image); },
           "image"_a, "A cubin, or PTX with a terminating zero.")
      .def("copy", [](const Device& self, std::uintptr_t to, std::uintptr_t from, std::uint64_t bytes, std::uintptr_t stream) {
             const cuda::Entered entered = self.enter();
             if (bytes) check(api().copy(to, from, bytes, stream_of(stream)), "cuMemcpyAsync");
           },
           "to"_a, "from_"_a, "size"_a, "stream"_a = 0, Released(), "Between any two addresses, behind what is on the stream.")
      .def("fill", [](const Device& self, std::uintptr_t to, std::uint8_t value, std::uint64_t bytes, std::uintptr_t stream) {
             const cuda::Entered entered = self.enter();
             if (bytes) check(api().fill(to, value, bytes, stream_of(stream)), "cuMemsetD8Async");
           },
           "to"_a, "value"_a, "size"_a, "stream"_a = 0, Released())
      .def("record", [](const Device& self, const Event& event, std::uintptr_t stream) {
             const cuda::Entered entered = self.enter();
             check(api().event_record(event.handle, stream_of(stream)), "cuEventRecord");
           },
           "event"_a, "stream"_a = 0)
      .def("order", [](const Device& self, std::uintptr_t stream, const Event& event) {
             const cuda::Entered entered = self.enter();
             check(api().stream_wait(stream_of(stream), event.handle, 0), "cuStreamWaitEvent");
           },
           "stream"_a, "event"_a, "What is put on the stream from now on waits for the event.")
      .def("synchronize", [](const Device& self, std::uintptr_t stream, std::int64_t timeout_ns) {
             return wait_for(self, timeout_ns, [&] { return api().stream_query(stream_of(stream)); });
           },
           "stream"_a, "timeout_ns"_a, "Wait for all that is on the stream; False at the deadline.")
      .def("finish", [](const Device& self, const Event& event, std::int64_t timeout_ns) {
             return wait_for(self, timeout_ns, [&] { return api().event_query(event.handle); });
           },
           "event"_a, "timeout_ns"_a, "Wait for the event; False at the deadline.");

  owned<Memory>(m, "Memory", "Device memory.")
      .def_ro("size", &Memory::bytes)
      .def("ipc_handle", [](const Memory& self) {
        cuda::IpcHandle handle{};
        const cuda::Entered entered = self.device->enter();
        check(api().ipc_handle(&handle, self.handle), "cuIpcGetMemHandle");
        return nb::bytes(handle.bytes, sizeof handle.bytes);
      });
  nb::class_<HostMemory>(m, "HostMemory", "Page-locked host memory; `address` is the kernels', `host` the process's.")
      .def("close", &HostMemory::close)
      .def_ro("size", &HostMemory::bytes)
      .def_ro("address", &HostMemory::address)
      .def_prop_ro("host", [](const HostMemory& self) { return reinterpret_cast<std::uintptr_t>(self.handle); });
  owned<Mapping>(m, "Mapping", "Another process's device memory.");
  owned<Stream>(m, "Stream", "A stream of its own; `address` is the CUstream.");
  owned<Event>(m, "Event", "").def("elapsed_ms", [](const Event& self, const Event& start) {
    float milliseconds = 0;
    check(api().event_elapsed(&milliseconds, start.handle, self.handle), "cuEventElapsedTime");
    return milliseconds;
  }, "start"_a);
  nb::class_<Module>(m, "Module", "Compiled kernels.")
      .def("close", &Module::close)
      .def("function", [](std::shared_ptr<Module> self, const std::string& name) {
             Function function{std::move(self)};
             const cuda::Entered entered = function.module->device->enter();
             check(api().module_function(&function.handle, function.module->handle, name.c_str()), "cuModuleGetFunction");
             return function;
           },
           "name"_a);
  nb::class_<Function>(m, "Function", "A kernel.")
      .def("launch", &launch, "grid"_a, "block"_a, "shared_bytes"_a, "stream"_a, "arguments"_a,
           "Put it on a stream. Each argument shows its bytes (a numpy scalar, a ctypes object), in the size the kernel takes.")
      .def("allow_shared", [](const Function& self, int bytes) {
             const cuda::Entered entered = self.module->device->enter();
             check(api().function_set(self.handle, cuda::kDynamicShared, bytes), "cuFuncSetAttribute");
           },
           "size"_a, "Launches may ask for so much dynamic shared memory.")
      .def("attribute", [](const Function& self, int which) {
             int value = 0;
             const cuda::Entered entered = self.module->device->enter();
             check(api().function_get(&value, which, self.handle), "cuFuncGetAttribute");
             return value;
           },
           "which"_a);
}

void bind_pooler(nb::module_& m) {
  nb::class_<GpuPooler>(m, "GpuPooler")
      .def("__init__",
           [](GpuPooler* self, std::shared_ptr<cuda::Device> device, const nb::bytes& image, std::uint64_t request_bytes,
              std::uint64_t response_bytes, std::uint32_t dim, std::int64_t patience_ns) {
             new (self) GpuPooler(std::move(device), std::string(image.c_str(), image.size()),
                                  {request_bytes, response_bytes, dim, nanoseconds(patience_ns)});
           },
           "device"_a, "image"_a, "request_bytes"_a, "response_bytes"_a, "dim"_a, "patience_ns"_a)
      .def_prop_rw("patience_ns", &GpuPooler::patience_ns,
                   [](GpuPooler& self, std::int64_t timeout_ns) { self.set_patience_ns(nanoseconds(timeout_ns)); })
      .def_prop_ro("size", &GpuPooler::bytes)
      .def("failure", [](const GpuPooler& self) {
             return self.failed() ? std::pair(self.result(), self.text()) : std::pair(0, std::string());
           },
           "The driver's code and words; no words: it has not failed.")
      .def("close", [](GpuPooler& self, std::int64_t timeout_ns) { return self.close(deadline(timeout_ns)); }, "timeout_ns"_a,
           Released(), "False: the GPU still uses its memory, which is kept.");
}

void bind_exchange(nb::module_& m) {
  nb::class_<GpuExchange>(m, "GpuExchange")
      .def("__init__",
           [](GpuExchange* self, std::shared_ptr<cuda::Device> device, std::uint32_t rank, std::uint32_t ranks,
              std::uint64_t window_bytes, std::uint64_t window_stride, std::uint32_t windows, std::uint32_t lag) {
             new (self) GpuExchange(std::move(device), rank, ranks, {window_bytes, window_stride, windows, lag});
           },
           "device"_a, "rank"_a, "ranks"_a, "window_bytes"_a, "window_stride"_a, "windows"_a, "lag"_a, Released())
      .def("ipc_handle", [](const GpuExchange& self) {
        const std::string handle = self.ipc_handle();
        return nb::bytes(handle.data(), handle.size());
      })
      .def("map", [](GpuExchange& self, std::uint32_t peer, const nb::bytes& handle) {
             return self.map(peer, std::string(handle.c_str(), handle.size()));
           },
           "peer"_a, "ipc_handle"_a)
      .def("why_not", &GpuExchange::why_not, "peer"_a)
      .def("mapped", &GpuExchange::mapped, "peer"_a)
      .def("attach", &GpuExchange::attach, "core"_a, "arena"_a)
      .def_prop_ro("device_bytes", &GpuExchange::device_bytes)
      .def("announce",
           [](GpuExchange& self, const std::vector<std::uint64_t>& bytes, std::uint64_t tag, std::int64_t timeout_ns) {
             return waited(with_or_without_gil(
                 false, timeout_ns, [&](std::uint64_t until) { return self.announce(bytes.data(), tag, until); }));
           },
           "sizes"_a, "tag"_a, "timeout_ns"_a)
      .def("address", &GpuExchange::address, "peer"_a)
      .def("order_for_writing", [](GpuExchange& self, std::uintptr_t stream) { self.order_for_writing(stream_of(stream)); },
           "stream"_a)
      .def("send", [](GpuExchange& self, std::uintptr_t from, std::uintptr_t stream) { self.send(from, stream_of(stream)); },
           "from_"_a, "stream"_a, Released())
      .def("wait",
           [](GpuExchange& self, std::uint64_t iteration, std::uintptr_t stream, std::int64_t timeout_ns) {
             return waited(with_or_without_gil(
                 false, timeout_ns, [&](std::uint64_t until) { return self.wait(iteration, stream_of(stream), until); }));
           },
           "iteration"_a, "stream"_a, "timeout_ns"_a)
      .def("message", &GpuExchange::message, "iteration"_a, "source"_a)
      .def("release", [](GpuExchange& self, std::uint64_t iteration, std::uintptr_t stream) { self.release(iteration, stream_of(stream)); },
           "iteration"_a, "stream"_a)
      .def("sent", &GpuExchange::sent, "iteration"_a)
      .def("order_after_sent", [](GpuExchange& self, std::uint64_t iteration, std::uintptr_t stream) {
             self.order_after_sent(iteration, stream_of(stream));
           },
           "iteration"_a, "stream"_a)
      .def("quiesce", [](GpuExchange& self, std::int64_t timeout_ns) { return self.quiesce(deadline(timeout_ns)); },
           "timeout_ns"_a, Released())
      .def("close", &GpuExchange::close, "quiet"_a, Released());
}

}  // namespace

void bind_cuda(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("cuda", "CUDA's driver API, looked up at run time. Private.");
  nb::register_exception_translator([](const std::exception_ptr& pending, void*) {
    try {
      std::rethrow_exception(pending);
    } catch (const cuda::Error& error) {
      const nb::object type = nb::module_::import_("blsrdma.errors").attr("GpuError");
      PyErr_SetObject(type.ptr(), nb::make_tuple(error.what(), error.result()).ptr());
    }
  });
  m.def("load", [](const std::string& path) {
          int version = 0;
          check(cuda::load(path.c_str()).driver_version(&version), "cuDriverGetVersion");
          return version;
        },
        "path"_a = "libcuda.so.1", "Load the driver, once; the CUDA version it supports, 1000 times the major one.");
  m.def("device_count", [] {
    int count = 0;
    check(cuda::load().device_count(&count), "cuDeviceGetCount");
    return count;
  });
  m.def("device_of", [](std::uintptr_t address) {
          int type = 0, ordinal = -1;
          if (api().pointer_attribute(&type, cuda::kMemoryType, address) != cuda::kSuccess || type != 2) return -1;
          check(api().pointer_attribute(&ordinal, cuda::kDeviceOrdinal, address), "cuPointerGetAttribute");
          return ordinal;
        },
        "address"_a, "The device that memory is on; -1: none.");
  bind_device(m);
  bind_pooler(m);
  bind_exchange(m);
}

}  // namespace blsrdma
