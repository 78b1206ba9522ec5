// The calls of the inference loop, from Python's arguments to the core and back without a Python frame between: post, wait,
// the views, release. Whatever is not the usual case (errors, large messages, odd buffers) is decided in Python:
// blsrdma/exchange.py and blsrdma/handle.py, which this calls by name.
#pragma once

#include <nanobind/nanobind.h>

namespace blsrdma {

void bind_front(nanobind::module_& m);

}  // namespace blsrdma
