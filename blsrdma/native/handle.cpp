#include "handle.h"

#include "calls.h"
#include "received.h"

namespace blsrdma {

using namespace nb::literals;

namespace {

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
  return make_received(self);
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

}  // namespace

void bind_handle(nb::module_& m) {
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
}

}  // namespace blsrdma
