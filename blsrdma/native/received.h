// The messages of one iteration, blsrdma.Received: views of windows, or of `send`.
#pragma once

#include <nanobind/nanobind.h>

namespace blsrdma {

// A new Received of `handle`, a complete Handle. Throws nanobind::python_error.
nanobind::object make_received(nanobind::handle handle);

void bind_received(nanobind::module_& m);

}  // namespace blsrdma
