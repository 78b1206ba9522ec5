// What the calls of the inference loop share on their way from Python's arguments to the core and back (front.cpp, handle.cpp,
// received.cpp): the objects behind blsrdma.Exchange and Handle, waiting with and without the GIL, refusals. Whatever is not
// the usual case (errors, large messages, odd buffers) is decided in Python, in blsrdma/exchange.py and blsrdma/handle.py,
// which these call by name.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "arrays.h"
#include "exchange.h"

namespace blsrdma {

namespace nb = nanobind;

// A copy of so many bytes takes less than giving the GIL away and taking it back.
inline constexpr std::uint64_t kShortCopy = 16 << 10;

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

// --- what Python decides

// `cached` is never given back: what is static must not touch Python when the process ends.
inline nb::handle python(const char* module, const char* name, PyObject*& cached) {
  if (!cached) cached = nb::object(nb::module_::import_(module).attr(name)).release().ptr();
  return cached;
}

inline void check_usable(const Front& front, nb::handle exchange) {
  if (!front.usable) exchange.attr("_usable")();
}

// Like check_usable, for calls that do not themselves meet a failure of the core.
inline void check_unfailed(const Front& front, nb::handle exchange) {
  if (!front.usable || front.core->failed()) exchange.attr("_unfailed")();
}

[[noreturn]] inline void refuse(nb::handle exchange, Outcome outcome) {
  if (outcome == Outcome::interrupted) throw nb::python_error();  // it is set already
  const nb::object error = exchange.attr("_error")(static_cast<int>(outcome));
  PyErr_SetObject(error.type().ptr(), error.ptr());
  throw nb::python_error();
}

[[noreturn]] inline void refuse_released(std::uint64_t iteration, const char* what) {
  static PyObject* type = nullptr;
  PyErr_Format(python("blsrdma.errors", "WindowHeld", type).ptr(), "iteration %llu has been released: its %s",
               static_cast<unsigned long long>(iteration), what);
  throw nb::python_error();
}

// --- waiting

inline std::int64_t nanoseconds(nb::handle timeout, const Front& front) {
  if (timeout.is_none()) return front.timeout_ns;
  static PyObject* timeout_ns = nullptr;
  return nb::cast<std::int64_t>(python("blsrdma.settings", "timeout_ns", timeout_ns)(timeout));
}

inline std::uint64_t deadline(std::int64_t ns) { return ns < 0 ? kNever : deadline_after(static_cast<std::uint64_t>(ns)); }

// `call`, which takes a deadline: with the GIL where it would return at once, else without.
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
    if (!front_.span.is_valid() || outcome == Outcome::interrupted) return;  // interrupted: a Python error is set
    front_.span(kind_, iteration_, start_, static_cast<int>(outcome));
  }

 private:
  const Front& front_;
  const char* kind_;
  std::uint64_t iteration_;
  std::uint64_t start_;
};

// One 64-bit number per rank, on the stack for as many ranks as a host has.
class PerRank {
 public:
  explicit PerRank(std::size_t ranks) : many_(ranks > few_.size() ? ranks : 0) {}
  std::int64_t* data() { return many_.empty() ? few_.data() : many_.data(); }

 private:
  std::array<std::int64_t, 64> few_;
  std::vector<std::int64_t> many_;
};

inline nb::object or_none(const nb::object& object) { return object.is_valid() ? object : nb::none(); }

}  // namespace blsrdma
