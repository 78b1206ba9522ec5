#include "received.h"

#include <algorithm>

#include "calls.h"

namespace blsrdma {
namespace {

// The messages of one iteration: a Python object by hand, for one is made in each iteration.
struct Received {
  PyObject_HEAD
  PyObject* handle;

  Handle& of() const { return *nb::inst_ptr<Handle>(handle); }
};

PyTypeObject* received_type = nullptr;
Received* spare = nullptr;  // the last one that died: its handle is gone, it still holds its type

PyObject* new_received(PyObject* handle) {
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
    for (std::uint32_t q = 0; q < ranks; ++q) PyTuple_SetItem(all.ptr(), q, item(received, q).release().ptr());
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

}  // namespace

nb::object make_received(nb::handle handle) { return nb::steal(new_received(handle.ptr())); }

void bind_received(nb::module_& m) {
  received_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&received_spec));
  if (!received_type) throw nb::python_error();
  m.attr("Received") = nb::handle(reinterpret_cast<PyObject*>(received_type));
}

}  // namespace blsrdma
