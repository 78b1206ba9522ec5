#pragma once

#include <nanobind/nanobind.h>

namespace blsrdma {

// Adds Lookup, and the kernel by itself for tests, to the module.
void bind_lookup(nanobind::module_& m);

}  // namespace blsrdma
