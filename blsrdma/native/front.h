// The loop of blsrdma.Exchange: begin and post, and with them what they give (handle.cpp, received.cpp), without a Python frame
// between the caller and the core.
#pragma once

#include <nanobind/nanobind.h>

namespace blsrdma {

void bind_front(nanobind::module_& m);  // Front, Handle and Received

}  // namespace blsrdma
