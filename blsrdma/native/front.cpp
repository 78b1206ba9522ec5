#include "front.h"

#include <nanobind/stl/shared_ptr.h>

#include <algorithm>

#include "calls.h"
#include "handle.h"
#include "received.h"

namespace blsrdma {

using namespace nb::literals;

namespace {

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

nb::object post(nb::handle_t<Front> self, nb::handle send, nb::handle counts, nb::handle timeout) {
  Front& front = *nb::inst_ptr<Front>(self);
  Exchange& core = *front.core;
  check_usable(front, self);
  nb::object made = nb::inst_alloc(nb::type<Handle>());
  Handle& handle = *new (nb::inst_ptr<Handle>(made)) Handle;
  nb::inst_mark_ready(made);
  Buffer& buffer = handle.buffer;
  describe_or_ask(send, buffer, handle.described);
  if (buffer.descr) handle.descr = nb::borrow(buffer.descr);
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
  handle.iteration = iteration;
  nb::object& slot = front.slot(iteration);
  if (slot.is_valid()) nb::inst_ptr<Handle>(slot)->drop_large();  // it was released while it was being pulled
  slot = made;
  return made;
}

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
  bind_handle(m);
  bind_received(m);
}

}  // namespace blsrdma
