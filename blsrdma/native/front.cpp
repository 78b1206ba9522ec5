#include "front.h"

#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "arrays.h"
#include "exchange.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace blsrdma {
namespace {

// A copy of so many bytes takes less than giving the GIL away and taking it back.
constexpr std::uint64_t kShortCopy = 16 << 10;

class Handle;

// The base class of blsrdma.Exchange: its loop.
class Front {
 public:
  Front(std::shared_ptr<Exchange> exchange, nb::object memory, std::int64_t timeout_ns, bool copy_self)
      : core(std::move(exchange)),
        memory(std::move(memory)),
        timeout_ns(timeout_ns),
        copy_self(copy_self),
        ranks(core->ranks()),
        window_bytes(core->window_bytes()),
        views(core->records() * ranks),
        held(core->records()) {}

  nb::object& slot(std::uint64_t iteration) { return held[iteration % held.size()]; }

  const std::shared_ptr<Exchange> core;
  nb::object memory;                 // the arena as an array: views of windows keep it alive
  const std::int64_t timeout_ns;     // negative: never
  const bool copy_self;
  const std::uint32_t ranks;
  const std::uint64_t window_bytes;
  bool usable = true;                // neither closed nor failed: else Exchange._usable() says what it is
  std::int64_t large_bytes = 0;      // of large messages received and held
  nb::object span;                   // of a trace: called with (kind, iteration, start), or none
  std::vector<nb::object> views;     // of windows, given out last: by iteration % records and source, like windows
  std::vector<nb::object> held;      // the handle of iteration i at i % size, until it is both released and sent, or its
                                     // record is used again, which the core permits only then
};

// One iteration of an exchange, from post() until release().
class Handle {
 public:
  Front& front() const { return *nb::inst_ptr<Front>(exchange); }

  void drop_large() {
    front().large_bytes -= large_bytes;
    large_bytes = 0;
    large.reset();
  }

  nb::object exchange;
  nb::object send;       // kept alive: the exchange reads it until sent()
  nb::object descr;      // of `buffer`, where it is numpy's
  nb::object described;  // blsrdma.buffers.SendBuffer, made when somebody asks for it
  nb::object out;        // where all messages are, if the caller gave a place
  nb::object large;      // messages that no window holds: a dict of byte arrays by source
  Buffer buffer;
  std::uint64_t iteration = 0;
  std::int64_t large_bytes = 0;
  bool released = false;
  bool pulling = false;  // large messages are being written where `out` or `large` say
};

// The messages of one iteration: a Python object by hand, for one is made in each iteration.
struct Received {
  PyObject_HEAD
  PyObject* handle;

  Handle& of() const { return *nb::inst_ptr<Handle>(handle); }
};

PyTypeObject* received_type = nullptr;
Received* spare = nullptr;  // the last one that died: its handle is gone, it still holds its type

PyObject* make_received(PyObject* handle) {
  Received* made = spare ? reinterpret_cast<Received*>(PyObject_Init(reinterpret_cast<PyObject*>(spare), received_type))
                         : PyObject_New(Received, received_type);
  if (!made) throw nb::python_error();
  if (spare) {
    Py_DECREF(received_type);  // PyObject_Init took one more
    spare = nullptr;
  }
  made->handle = Py_NewRef(handle);
  return reinterpret_cast<PyObject*>(made);
}

void drop_received(PyObject* self) {
  auto* it = reinterpret_cast<Received*>(self);
  Py_CLEAR(it->handle);
  if (!spare) {
    spare = it;
    return;
  }
  PyTypeObject* type = Py_TYPE(self);
  PyObject_Free(self);
  Py_DECREF(type);
}

// --- what Python decides

// `cached` is never given back: what is static must not touch Python when the process ends.
nb::handle python(const char* module, const char* name, PyObject*& cached) {
  if (!cached) cached = nb::object(nb::module_::import_(module).attr(name)).release().ptr();
  return cached;
}

void check_usable(const Front& front, nb::handle exchange) {
  if (!front.usable) exchange.attr("_usable")();
}

// Like check_usable, for calls that do not themselves meet a failure of the core.
void check_unfailed(const Front& front, nb::handle exchange) {
  if (!front.usable || front.core->failed()) exchange.attr("_unfailed")();
}

[[noreturn]] void refuse(nb::handle exchange, Outcome outcome) {
  if (outcome == Outcome::interrupted) throw nb::python_error();  // it is set already
  const nb::object error = exchange.attr("_error")(static_cast<int>(outcome));
  PyErr_SetObject(error.type().ptr(), error.ptr());
  throw nb::python_error();
}

[[noreturn]] void refuse_released(std::uint64_t iteration, const char* what) {
  static PyObject* type = nullptr;
  PyErr_Format(python("blsrdma.errors", "WindowHeld", type).ptr(), "iteration %llu has been released: its %s",
               static_cast<unsigned long long>(iteration), what);
  throw nb::python_error();
}

// --- waiting

std::int64_t nanoseconds(nb::handle timeout, const Front& front) {
  if (timeout.is_none()) return front.timeout_ns;
  static PyObject* timeout_ns = nullptr;
  return nb::cast<std::int64_t>(python("blsrdma.settings", "timeout_ns", timeout_ns)(timeout));
}

std::uint64_t deadline(std::int64_t ns) { return ns < 0 ? kNever : deadline_after(static_cast<std::uint64_t>(ns)); }

// `fast()`: whether `call` would return at once; then it keeps the GIL, else it runs without.
template <typename Call>
Outcome with_or_without_gil(bool at_once, std::int64_t timeout_ns, Call&& call) {
  if (at_once) return call(kNever);
  const nb::gil_scoped_release release;
  return call(deadline(timeout_ns));
}

// Records a span of a trace, where there is one: from its making to finish().
class Span {
 public:
  Span(const Front& front, const char* kind, std::uint64_t iteration)
      : front_(front), kind_(kind), iteration_(iteration), start_(front.span.is_valid() ? now_ns() : 0) {}
  void finish(Outcome outcome = Outcome::ok) {
    if (front_.span.is_valid()) front_.span(kind_, iteration_, start_, static_cast<int>(outcome));
  }

 private:
  const Front& front_;
  const char* kind_;
  std::uint64_t iteration_;
  std::uint64_t start_;
};

// --- the loop

std::uint64_t begin(nb::handle_t<Front> self, nb::handle timeout) {
  Front& front = *nb::inst_ptr<Front>(self);
  check_usable(front, self);
  const std::uint64_t iteration = front.core->next();
  Span span(front, "begin", iteration);
  const bool at_once = front.core->soon([&] { return front.core->may_begin(); });
  const Outcome outcome = with_or_without_gil(at_once, at_once ? 0 : nanoseconds(timeout, front),
                                              [&](std::uint64_t until) { return front.core->begin(until); });
  span.finish(outcome);
  if (outcome != Outcome::ok) refuse(self, outcome);
  return iteration;
}

void describe_or_ask(nb::handle object, Buffer& buffer, nb::object& described) {
  if (describe(object.ptr(), buffer)) return;
  static PyObject* ask = nullptr;
  described = python("blsrdma.buffers", "describe", ask)(object);
  buffer.address = reinterpret_cast<std::byte*>(nb::cast<std::uintptr_t>(described.attr("address")));
  buffer.items = nb::cast<std::int64_t>(described.attr("items"));
  buffer.item_bytes = nb::cast<std::uint64_t>(described.attr("item_bytes"));
  buffer.tag = nb::cast<std::uint64_t>(described.attr("tag"));
  buffer.writable = nb::cast<bool>(described.attr("writable"));
}

// One 64-bit number per rank, on the stack for as many ranks as a host has.
class PerRank {
 public:
  explicit PerRank(std::size_t ranks) : many_(ranks > few_.size() ? ranks : 0) {}
  std::int64_t* data() { return many_.empty() ? few_.data() : many_.data(); }

 private:
  std::array<std::int64_t, 64> few_;
  std::vector<std::int64_t> many_;
};

nb::object post(nb::handle_t<Front> self, nb::handle send, nb::handle counts, nb::handle timeout) {
  Front& front = *nb::inst_ptr<Front>(self);
  Exchange& core = *front.core;
  check_usable(front, self);
  nb::object made = nb::inst_alloc(nb::type<Handle>());
  Handle& handle = *new (nb::inst_ptr<Handle>(made)) Handle;
  nb::inst_mark_ready(made);
  Buffer& buffer = handle.buffer;
  describe_or_ask(send, buffer, handle.described);
  PerRank room(front.ranks);
  const std::int64_t* split = room.data();
  nb::object converted;
  if (counts.is_none()) {
    if (buffer.items % front.ranks) {
      static PyObject* equal_counts = nullptr;
      python("blsrdma.buffers", "equal_counts", equal_counts)(buffer.items, front.ranks);  // raises
    }
    std::fill_n(room.data(), front.ranks, buffer.items / front.ranks);
  } else if (!(split = integers(counts.ptr(), front.ranks, room.data()))) {
    static PyObject* as_counts = nullptr;
    converted = python("blsrdma.buffers", "as_counts", as_counts)(counts, front.ranks);
    split = integers(converted.ptr(), front.ranks, room.data());
  }
  const std::uint64_t iteration = core.next();
  Span span(front, "post", iteration);
  const bool at_once = buffer.bytes() <= std::min(kShortCopy, front.window_bytes) && core.soon([&] { return core.may_post(); });
  const Outcome outcome =
      with_or_without_gil(at_once, at_once ? 0 : nanoseconds(timeout, front), [&](std::uint64_t until) {
        return core.post(buffer.address, static_cast<std::uint64_t>(buffer.items), buffer.item_bytes, split, buffer.tag, until);
      });
  span.finish(outcome);
  if (outcome != Outcome::ok) refuse(self, outcome);
  handle.exchange = nb::borrow(self);
  handle.send = nb::borrow(send);
  if (buffer.descr) handle.descr = nb::borrow(buffer.descr);
  handle.iteration = iteration;
  front.slot(iteration) = made;
  return made;
}

bool ready(const Handle& handle) {
  check_unfailed(handle.front(), handle.exchange);
  return handle.released || handle.front().core->ready(handle.iteration);
}

bool sent(const Handle& handle) {
  const nb::object exchange = handle.exchange;
  Front& front = handle.front();
  const std::uint64_t iteration = handle.iteration;
  check_unfailed(front, exchange);
  if (front.core->sent(iteration)) return true;
  // Peers that ask the same, and nothing else, may be waiting for this rank to pull their large messages.
  bool pulled = false;
  for (std::size_t i = 0; i < front.held.size(); ++i) {
    const nb::object each = front.held[i];
    if (!each.is_valid()) continue;
    const Handle& other = *nb::inst_ptr<Handle>(each);
    if (other.released || !front.core->ready(other.iteration)) continue;
    if (front.core->wait(other.iteration, 0) != Outcome::large) continue;
    static PyObject* pull_ahead = nullptr;
    python("blsrdma.handle", "pull_ahead", pull_ahead)(each);
    pulled = true;
  }
  return pulled && front.core->sent(iteration);
}

// Everything went into windows and `out` fits: copy it there. False: Python looks at it.
bool copy_out(Handle& handle, nb::handle out, nb::handle counts) {
  Exchange& core = *handle.front().core;
  const std::uint32_t ranks = handle.front().ranks;
  Buffer target;
  if (!describe(out.ptr(), target) || target.tag != handle.buffer.tag || !target.writable) return false;
  std::uint64_t total = 0;
  for (std::uint32_t q = 0; q < ranks; ++q) total += core.length(handle.iteration, q);
  if (total != target.bytes()) return false;
  if (!counts.is_none()) {
    PerRank room(ranks);
    const std::int64_t* expected = integers(counts.ptr(), ranks, room.data());
    if (!expected) return false;
    for (std::uint32_t q = 0; q < ranks; ++q) {
      if (static_cast<std::uint64_t>(expected[q]) * target.item_bytes != core.length(handle.iteration, q)) return false;
    }
  }
  if (total <= kShortCopy) {
    core.copy_out(handle.iteration, target.address);
  } else {
    const nb::gil_scoped_release release;
    core.copy_out(handle.iteration, target.address);
  }
  handle.out = nb::borrow(out);
  return true;
}

nb::object wait(nb::handle_t<Handle> self, nb::handle timeout, nb::handle out, nb::handle counts) {
  Handle& handle = *nb::inst_ptr<Handle>(self);
  Front& front = handle.front();
  check_usable(front, handle.exchange);
  if (handle.released) refuse_released(handle.iteration, "windows may hold a later one");
  Span span(front, "wait", handle.iteration);
  const bool at_once = front.core->soon([&] { return front.core->ready(handle.iteration); });
  std::uint64_t until = kNever;
  const Outcome outcome =
      with_or_without_gil(at_once, at_once ? 0 : nanoseconds(timeout, front), [&](std::uint64_t end) {
        until = end;
        return front.core->wait(handle.iteration, end);
      });
  span.finish(outcome);
  if (outcome != Outcome::ok && outcome != Outcome::large) refuse(handle.exchange, outcome);
  const bool plain = outcome == Outcome::ok && (out.is_none() ? counts.is_none() : copy_out(handle, out, counts));
  if (!plain) {
    if (at_once) until = deadline(nanoseconds(timeout, front));
    static PyObject* place = nullptr;
    python("blsrdma.handle", "place", place)(self, out, counts, outcome == Outcome::large, until == kNever ? -1 : std::int64_t(until));
  }
  return nb::steal(make_received(self.ptr()));
}

void release(nb::handle_t<Handle> self) {
  Handle& handle = *nb::inst_ptr<Handle>(self);
  if (handle.released) return;
  handle.released = true;
  const nb::object exchange = handle.exchange;  // the slot below may hold the last reference to this handle
  Front& front = handle.front();
  if (!front.core->open()) return;
  Span span(front, "release", handle.iteration);
  front.core->release(handle.iteration);
  span.finish();
  if (!handle.pulling) handle.drop_large();
  if (front.core->sent(handle.iteration) && front.slot(handle.iteration).is(self)) front.slot(handle.iteration).reset();
}

// --- the messages

Handle& checked(const Received& received) {
  Handle& handle = received.of();
  check_usable(handle.front(), handle.exchange);
  if (handle.released) refuse_released(handle.iteration, "views are gone");
  return handle;
}

nb::object made(PyObject* object) {
  if (!object) throw nb::python_error();
  return nb::steal(object);
}

nb::object item(const Received& received, std::uint32_t source) {
  Handle& handle = checked(received);
  Front& front = handle.front();
  const std::uint64_t length = front.core->length(handle.iteration, source);
  const std::byte* at = front.core->message(handle.iteration, source);
  const std::uint64_t item_bytes = handle.buffer.item_bytes;
  const bool own = source == front.core->rank();
  const bool of_send = own && !(front.copy_self && length <= front.window_bytes);
  if (handle.out.is_valid() || handle.large.is_valid() || !handle.buffer.plain() || !item_bytes || length % item_bytes) {
    static PyObject* message = nullptr;
    return python("blsrdma.handle", "message", message)(nb::handle(received.handle), source);
  }
  auto* const data = const_cast<std::byte*>(at);
  const auto items = static_cast<std::int64_t>(length / item_bytes);
  if (of_send) return made(view(handle.buffer, data, items, handle.send.ptr()));
  // Messages of one source tend to be of one size: the array made for this window the last time will mostly do.
  nb::object& last = front.views[handle.iteration % front.held.size() * front.ranks + source];
  if (!last.is_valid() || !reusable(last.ptr(), handle.buffer, data, items)) {
    last = made(view(handle.buffer, data, items, front.memory.ptr()));
  }
  return last;
}

std::uint32_t source_of(const Received& received, Py_ssize_t index) {
  const auto ranks = static_cast<Py_ssize_t>(received.of().front().ranks);
  if (index < 0) index += ranks;
  if (index < 0 || index >= ranks) {
    PyErr_Format(PyExc_IndexError, "rank %zd of %zd", index, ranks);
    throw nb::python_error();
  }
  return static_cast<std::uint32_t>(index);
}

nb::object subscript(const Received& received, nb::handle key) {
  if (PyIndex_Check(key.ptr())) {
    const Py_ssize_t index = PyNumber_AsSsize_t(key.ptr(), PyExc_IndexError);
    if (index == -1 && PyErr_Occurred()) throw nb::python_error();
    return item(received, source_of(received, index));
  }
  Py_ssize_t start, stop, step;
  if (PySlice_Unpack(key.ptr(), &start, &stop, &step) != 0) throw nb::python_error();
  const Py_ssize_t count = PySlice_AdjustIndices(Py_ssize_t(received.of().front().ranks), &start, &stop, step);
  nb::list some;
  for (Py_ssize_t i = 0; i < count; ++i) some.append(item(received, static_cast<std::uint32_t>(start + i * step)));
  return some;
}

nb::list counts(const Received& received) {
  const Handle& handle = checked(received);
  nb::list all;
  const std::uint64_t item_bytes = std::max<std::uint64_t>(1, handle.buffer.item_bytes);
  for (std::uint32_t q = 0; q < handle.front().ranks; ++q) all.append(handle.front().core->length(handle.iteration, q) / item_bytes);
  return all;
}

// Slots instead of methods: indexing and iterating call these without looking anything up.
template <typename Call>
PyObject* guarded(Call&& call) noexcept {
  try {
    return call().release().ptr();
  } catch (nb::python_error& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

Py_ssize_t received_length(PyObject* self) { return reinterpret_cast<Received*>(self)->of().front().ranks; }

PyObject* received_item(PyObject* self, Py_ssize_t index) {
  return guarded([&] {
    const Received& received = *reinterpret_cast<Received*>(self);
    return item(received, source_of(received, index));
  });
}

// All of them at once: who iterates asks for all, and the end of a sequence by IndexError would cost more than its items.
PyObject* received_iterate(PyObject* self) {
  return guarded([&] {
    const Received& received = *reinterpret_cast<Received*>(self);
    const std::uint32_t ranks = received.of().front().ranks;
    const nb::object all = nb::steal(PyTuple_New(ranks));
    for (std::uint32_t q = 0; q < ranks; ++q) PyTuple_SET_ITEM(all.ptr(), q, item(received, q).release().ptr());
    return nb::steal(PyObject_GetIter(all.ptr()));
  });
}

PyObject* received_subscript(PyObject* self, PyObject* key) {
  return guarded([&] { return subscript(*reinterpret_cast<Received*>(self), key); });
}

PyObject* received_counts(PyObject* self, PyObject*) {
  return guarded([&] { return counts(*reinterpret_cast<Received*>(self)); });
}

PyMethodDef received_methods[] = {
    {"counts", received_counts, METH_NOARGS, "Items per source, in units of `send`'s leading dimension."},
    {nullptr, nullptr, 0, nullptr},
};

constexpr const char* kReceived =
    "The messages of one iteration: received[q] is rank q's, a view without a copy, of the kind and dtype of `send`.\n\n"
    "Its shape is (n, *send.shape[1:]). It is valid until the handle is released; read-only by convention.";

PyType_Slot received_slots[] = {
    {Py_tp_doc, const_cast<char*>(kReceived)},
    {Py_tp_dealloc, reinterpret_cast<void*>(drop_received)},
    {Py_tp_methods, received_methods},
    {Py_sq_length, reinterpret_cast<void*>(received_length)},
    {Py_sq_item, reinterpret_cast<void*>(received_item)},
    {Py_tp_iter, reinterpret_cast<void*>(received_iterate)},
    {Py_mp_length, reinterpret_cast<void*>(received_length)},
    {Py_mp_subscript, reinterpret_cast<void*>(received_subscript)},
    {0, nullptr},
};

PyType_Spec received_spec = {"blsrdma.Received", sizeof(Received), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                             received_slots};

// An exchange holds its handles in flight, and a handle its exchange: the collector must be able to see that.
int front_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  for (const nb::object& each : nb::inst_ptr<Front>(self)->held) Py_VISIT(each.ptr());
  return 0;
}

int front_clear(PyObject* self) {
  for (nb::object& each : nb::inst_ptr<Front>(self)->held) each.reset();
  return 0;
}

PyType_Slot front_slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(front_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(front_clear)},
    {0, nullptr},
};

int handle_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  const Handle& handle = *nb::inst_ptr<Handle>(self);
  for (const nb::object* each : {&handle.exchange, &handle.send, &handle.described, &handle.out, &handle.large}) Py_VISIT(each->ptr());
  return 0;
}

int handle_clear(PyObject* self) {
  nb::inst_ptr<Handle>(self)->send.reset();
  return 0;
}

PyType_Slot handle_slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(handle_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(handle_clear)},
    {0, nullptr},
};

nb::object described(Handle& handle) {
  static PyObject* describe_in_python = nullptr;
  if (!handle.described.is_valid()) {
    handle.described = python("blsrdma.buffers", "describe", describe_in_python)(handle.send);
  }
  return handle.described;
}

nb::object or_none(const nb::object& object) { return object.is_valid() ? object : nb::none(); }

}  // namespace

void bind_front(nb::module_& m) {
  import_arrays();
  nb::class_<Front>(m, "Front", nb::type_slots(front_slots), nb::is_weak_referenceable(), nb::dynamic_attr())
      .def(nb::init<std::shared_ptr<Exchange>, nb::object, std::int64_t, bool>(), "core"_a, "memory"_a, "timeout_ns"_a,
           "copy_self"_a)
      .def("begin", &begin, "timeout"_a = nb::none(),
           "Wait until work on the next iteration may begin, and return its number i.\n\n"
           "It may when iteration i - lag - 1 is complete: every rank has posted it. Notes the lead, see stats(). The handle\n"
           "of i - lag - 1 has still to be released before i can be posted. Raises PeerTimeout, PeerFailed.")
      .def("post", &post, "send"_a, "counts"_a = nb::none(), "timeout"_a = nb::none(),
           "Send this rank's messages of the next iteration, one to every rank.\n\n"
           "Parameters:\n"
           "    send: a C-contiguous numpy array or torch tensor in CPU memory, of any dtype. It belongs to the exchange\n"
           "        until the handle says sent(): do not write into it before.\n"
           "    counts: counts[q] items along the leading dimension go to rank q, in rank order; they add up to\n"
           "        send.shape[0]. None: equal parts.\n"
           "    timeout: seconds, for the lag bound (begin() has already waited for it in the usual loop).\n\n"
           "Returns at once unless the lag bound is reached. Nothing has been sent when it raises: SendBufferError,\n"
           "CountsError, WindowHeld (iteration i - lag - 1 has not been released), PeerTimeout, PeerFailed. A message larger\n"
           "than window_bytes stays in `send` until its receiver has pulled it.")
      .def_rw("_live", &Front::usable)
      .def_rw("_large_bytes", &Front::large_bytes)
      .def_prop_rw("_span", [](const Front& front) { return or_none(front.span); },
                   [](Front& front, nb::object span) { front.span = span.is_none() ? nb::object() : std::move(span); },
                   nb::arg().none())
      .def("_held", [](const Front& front) {
        nb::list handles;
        for (const nb::object& each : front.held) {
          if (each.is_valid()) handles.append(each);
        }
        return handles;
      })
      .def("_let_go", [](Front& front) {
        for (nb::object& each : front.held) each.reset();
        for (nb::object& each : front.views) each.reset();
      });

  nb::class_<Handle>(m, "Handle", nb::type_slots(handle_slots),
                     "One iteration of an exchange, from post() until release().\n\n"
                     "`with handle as received:` waits, gives the messages and releases them at the end.")
      .def_ro("iteration", &Handle::iteration)
      .def_ro("released", &Handle::released)
      .def_prop_ro("item_bytes", [](const Handle& handle) { return handle.buffer.item_bytes; },
                   "Bytes of one item of `send`, along its leading dimension.")
      .def("ready", &ready,
           "Whether every rank's message is here (large ones: their address), so that wait() need not wait for a peer.")
      .def("wait", &wait, "timeout"_a = nb::none(), nb::kw_only(), "out"_a = nb::none(), "counts"_a = nb::none(),
           "Wait for every rank's message of this iteration. Says nothing about sent().\n\n"
           "Parameters:\n"
           "    timeout: seconds; None: the exchange's.\n"
           "    out: memory for all messages, one after the other in rank order: a contiguous array or tensor of the same\n"
           "        element type, with as many items as there are in all. What arrives then lives there, after release too.\n"
           "        None: views of the windows; messages larger than a window get memory that counts against memory_limit.\n"
           "    counts: items expected from each rank, in units of the leading dimension of `send` (of `out`, if given).\n\n"
           "Raises PeerTimeout at the deadline (the wait may be repeated), PeerFailed, WindowCorrupt; and, with nothing\n"
           "lost: CountsError naming both ranks and sizes, SendBufferError for an unusable `out`, MemoryLimitExceeded.")
      .def("sent", &sent,
           "Whether `send` may be overwritten: the messages have left it, the large ones have been pulled, and the\n"
           "message to oneself, which is a view of it unless copy_self is set, has been released.\n\n"
           "Messages larger than window_bytes are pulled when their receiver waits for them, releases them or, into memory\n"
           "that counts against memory_limit, asks sent() itself: two ranks that both poll it do not wait for each other,\n"
           "unless that limit forbids it. After a failure a peer that has not heard of it yet may still be pulling: keep\n"
           "`send` until close() has returned.")
      .def("release", &release,
           "Give the windows back; the views die here. May come before wait(): then the messages are not wanted.")
      .def("__enter__", [](nb::handle_t<Handle> self) { return wait(self, nb::none(), nb::none(), nb::none()); })
      .def("__exit__", [](nb::handle_t<Handle> self, nb::handle, nb::handle, nb::handle) { release(self); },
           "kind"_a.none(), "error"_a.none(), "trace"_a.none())
      // For blsrdma/handle.py.
      .def_prop_ro("_exchange", [](const Handle& handle) { return handle.exchange; })
      .def_prop_ro("_send", [](const Handle& handle) { return handle.send; })
      .def_prop_ro("_buffer", &described)
      .def_prop_rw("_out", [](const Handle& handle) { return or_none(handle.out); },
                   [](Handle& handle, nb::object out) { handle.out = out.is_none() ? nb::object() : std::move(out); },
                   nb::arg().none())
      .def_prop_rw("_large", [](const Handle& handle) { return or_none(handle.large); },
                   [](Handle& handle, nb::object large) { handle.large = std::move(large); })
      .def_rw("_large_bytes", &Handle::large_bytes)
      .def_rw("_pulling", &Handle::pulling);

  received_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&received_spec));
  if (!received_type) throw nb::python_error();
  m.attr("Received") = nb::handle(reinterpret_cast<PyObject*>(received_type));
}

}  // namespace blsrdma
