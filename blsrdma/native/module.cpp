// The bindings: thin. Python decides (settings, rendezvous, typed errors); this moves bytes and waits without the GIL.
#include <dlfcn.h>
#include <link.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "exchange.h"
#include "front.h"
#include "module_cuda.h"
#include "module_lookup.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace blsrdma;

namespace {

// A reference to a Python object that C++ may drop on any thread.
std::shared_ptr<void> keep_alive(nb::object object) {
  return {object.release().ptr(), [](void* pointer) {
            if (!Py_IsInitialized()) return;
            nb::gil_scoped_acquire gil;
            Py_DECREF(static_cast<PyObject*>(pointer));
          }};
}

std::uint64_t deadline(std::int64_t timeout_ns) {
  return timeout_ns < 0 ? kNever : deadline_after(static_cast<std::uint64_t>(timeout_ns));
}

// Asked from within a wait, which has released the GIL: has Ctrl-C been pressed?
bool interrupted() {
  const nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// Run a wait without the GIL.
template <typename Wait>
int without_gil(std::int64_t timeout_ns, Wait&& wait) {
  Outcome outcome;
  {
    const nb::gil_scoped_release release;
    outcome = wait(deadline(timeout_ns));
  }
  if (outcome == Outcome::interrupted) throw nb::python_error();
  return static_cast<int>(outcome);
}

// The file of every libucp in this process, and the one that this module calls.
std::pair<std::string, std::vector<std::string>> loaded_ucp() {
  std::vector<std::string> files;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* out) {
        const char* base = std::strrchr(info->dlpi_name, '/');
        if (std::strncmp(base ? base + 1 : info->dlpi_name, "libucp", 6) == 0) {
          static_cast<std::vector<std::string>*>(out)->emplace_back(info->dlpi_name);
        }
        return 0;
      },
      &files);
  Dl_info used{};
  dladdr(reinterpret_cast<void*>(&ucp_get_version), &used);
  return {used.dli_fname ? used.dli_fname : "", files};
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "UCX one-sided puts, windows and counters. Private: use blsrdma's public names.";

  // What a late peer may still write is kept until the process ends, on purpose; objects alive at exit are no news.
  nb::set_leak_warnings(false);

  nb::register_exception_translator([](const std::exception_ptr& pending, void*) {
    try {
      std::rethrow_exception(pending);
    } catch (const UcxError& error) {
      const nb::object type = nb::module_::import_("blsrdma.errors").attr("UcxError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });

  m.def("loaded_ucp", &loaded_ucp);
  m.def("ucp_version", &ucp_get_version_string);
  m.attr("CONTROL_BYTES") = kControlBytes;
  m.attr("HEADER_BYTES") = kHeaderBytes;
  m.attr("STAGING_BYTES") = kStagingBytes;
  m.attr("LINE_BYTES") = kLine;
  m.attr("LEAST_PAYLOAD") = kLeastPayload;
  m.attr("FAREWELL_TEXT_BYTES") = Farewell::kTextBytes;

  nb::enum_<Outcome>(m, "Outcome", nb::is_arithmetic())
      .value("OK", Outcome::ok)
      .value("TIMEOUT", Outcome::timeout)
      .value("LARGE", Outcome::large)
      .value("PEER_DIED", Outcome::peer_died)
      .value("PEER_ERRED", Outcome::peer_erred)
      .value("PEER_LEFT", Outcome::peer_left)
      .value("WINDOW_HELD", Outcome::window_held)
      .value("COUNT_NEGATIVE", Outcome::count_negative)
      .value("COUNT_SUM", Outcome::count_sum)
      .value("CORRUPT", Outcome::corrupt)
      .value("TAG_MISMATCH", Outcome::tag_mismatch)
      .value("CONCURRENT", Outcome::concurrent)
      .value("BAD_BAGS", Outcome::bad_bags)
      .value("VERSION_MISMATCH", Outcome::version_mismatch)
      .value("GPU_FAILED", Outcome::gpu_failed)
      .value("REFUSED", Outcome::refused);

  nb::class_<Fabric>(m, "Fabric")
      .def("__init__",
           [](Fabric* self, std::uintptr_t worker, nb::object owner) {
             new (self) Fabric(reinterpret_cast<ucp_worker_h>(worker), keep_alive(std::move(owner)));
           },
           "worker"_a, "owner"_a)
      .def("stop",
           [](nb::handle_t<Fabric> self, std::int64_t timeout_ns) {
             Fabric& fabric = nb::cast<Fabric&>(self);
             bool stopped = false;
             {
               const nb::gil_scoped_release release;
               stopped = fabric.stop(timeout_ns < 0 ? kNever : static_cast<std::uint64_t>(timeout_ns));
             }
             if (!stopped) Py_INCREF(self.ptr());  // its thread still uses it: leaked on purpose
             return stopped;
           },
           "timeout_ns"_a, "False: the progress thread has not ended in time.");

  nb::class_<Arena>(m, "Arena")
      .def("__init__",
           [](Arena* self, std::uintptr_t context, nb::object owner, std::size_t bytes) {
             auto kept = keep_alive(std::move(owner));
             const nb::gil_scoped_release release;  // zeroing takes time
             new (self) Arena(reinterpret_cast<ucp_context_h>(context), std::move(kept), bytes);
           },
           "context"_a, "owner"_a, "size"_a)
      .def_prop_ro("address", [](const Arena& self) { return reinterpret_cast<std::uintptr_t>(self.data()); })
      .def_prop_ro("size", &Arena::bytes)
      .def("packed_rkey",
           [](const Arena& self) {
             const std::string packed = self.packed_rkey();
             return nb::bytes(packed.data(), packed.size());
           })
      .def("array", [](nb::handle_t<Arena> self) {
        Arena& arena = nb::cast<Arena&>(self);
        // The array keeps the arena alive: a view that outlives the exchange reads old memory, never freed memory.
        return nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(arena.data(), {arena.bytes()}, self);
      });

  nb::class_<Geometry>(m, "Geometry")
      .def(nb::init<>())
      .def_rw("ranks", &Geometry::ranks)
      .def_rw("windows", &Geometry::windows)
      .def_rw("window_bytes", &Geometry::window_bytes)
      .def_rw("window_stride", &Geometry::window_stride)
      .def_rw("control_offset", &Geometry::control_offset)
      .def_rw("windows_offset", &Geometry::windows_offset)
      .def_rw("staging_offset", &Geometry::staging_offset)
      .def_rw("arena_bytes", &Geometry::arena_bytes)
      .def("window", &Geometry::window, "receiver"_a, "source"_a, "iteration"_a)
      .def("control", &Geometry::control, "source"_a);

  nb::class_<Exchange>(m, "Exchange")
      .def("__init__",
           [](Exchange* self, std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> arena, const Geometry& geometry,
              std::uint32_t rank, std::uint32_t lag, std::uint64_t epoch, bool copy_self, bool direct, bool checksums,
              std::int64_t keepalive_ns, std::uint32_t spins, std::uint32_t yields, std::uint64_t device_bytes) {
             const std::uint64_t keepalive = keepalive_ns < 0 ? kNever : static_cast<std::uint64_t>(keepalive_ns);
             new (self) Exchange(std::move(fabric), std::move(arena),
                                 {geometry, rank, lag, epoch, copy_self, direct, checksums, device_bytes, keepalive,
                                  {spins, yields}, interrupted});
           },
           "fabric"_a, "arena"_a, "geometry"_a, "rank"_a, "lag"_a, "epoch"_a, "copy_self"_a, "direct"_a, "checksums"_a,
           "keepalive_ns"_a, "spins"_a, "yields"_a, "device_bytes"_a = 0)
      .def("connect",
           [](Exchange& self, const std::vector<std::tuple<std::uint32_t, nb::bytes, nb::bytes, std::uint64_t, nb::bytes, int>>& peers,
              std::vector<int> pidfds, std::int64_t timeout_ns) {
             const auto text = [](const nb::bytes& bytes) { return std::string(bytes.c_str(), bytes.size()); };
             std::vector<PeerAddress> addresses;
             for (const auto& [rank, address, rkey, arena, token, pid] : peers) {
               addresses.push_back({rank, text(address), text(rkey), arena, text(token), pid});
             }
             const nb::gil_scoped_release release;
             self.connect(addresses, std::move(pidfds), deadline(timeout_ns));
           },
           "peers"_a, "pidfds"_a, "timeout_ns"_a)
      .def_prop_ro("next", &Exchange::next)
      .def_prop_ro("failed", &Exchange::failed)
      .def("ready", &Exchange::ready, "iteration"_a)
      .def("why_failed", [](Exchange& self) { return static_cast<int>(self.why_failed()); })
      .def_prop_ro("leads", &Exchange::leads)
      .def("pull",
           [](Exchange& self, std::uint64_t iteration,
              const std::vector<std::pair<std::uint32_t, std::uintptr_t>>& into, std::int64_t timeout_ns) {
             std::vector<std::pair<std::uint32_t, std::byte*>> memory;
             for (const auto& [source, address] : into) memory.emplace_back(source, reinterpret_cast<std::byte*>(address));
             return without_gil(timeout_ns,
                                  [&](std::uint64_t until) { return self.pull(iteration, memory, until); });
           },
           "iteration"_a, "into"_a, "timeout_ns"_a)
      .def("copy_out",
           [](const Exchange& self, std::uint64_t iteration, std::uintptr_t to) {
             const nb::gil_scoped_release release;
             self.copy_out(iteration, reinterpret_cast<std::byte*>(to));
           },
           "iteration"_a, "to"_a)
      .def("message",
           [](const Exchange& self, std::uint64_t iteration, std::uint32_t source) {
             return std::pair(reinterpret_cast<std::uintptr_t>(self.message(iteration, source)),
                              self.length(iteration, source));
           },
           "iteration"_a, "source"_a, "Address and length in bytes of a message, after wait().")
      .def("counter", &Exchange::counter, "source"_a)
      .def("bytes_outstanding", &Exchange::bytes_outstanding, "peer"_a)
      .def("silence_ns", &Exchange::silence_ns, "peer"_a)
      .def("details",
           [](const Exchange& self) {
             const Details& it = self.details();
             return std::tuple(it.rank, it.iteration, it.a, it.b,
                               nb::steal<nb::str>(PyUnicode_DecodeUTF8(it.text.data(), Py_ssize_t(it.text.size()), "replace")));
           })
      .def("stats",
           [](const Exchange& self, std::uint32_t peer) {
             const PeerStats& it = self.stats(peer);
             return std::tuple(it.messages, it.bytes, it.waits, it.wait_ns, it.wait_max_ns, it.last);
           },
           "peer"_a)
      .def("direct", &Exchange::direct, "peer"_a)
      .def("reads", &Exchange::reads, "peer"_a)
      .def("transport", &Exchange::transport, "peer"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("close",
           [](Exchange& self, std::uint32_t code, std::uint32_t blamed, const std::string& text, std::int64_t timeout_ns) {
             const nb::gil_scoped_release release;
             return self.close(code, blamed, text, deadline(timeout_ns));
           },
           "code"_a, "blamed"_a, "text"_a, "timeout_ns"_a);

  bind_front(m);
  bind_lookup(m);
  bind_cuda(m);
}
