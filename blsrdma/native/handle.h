// One iteration between post() and release(), blsrdma.Handle: wait, ready, sent, release.
#pragma once

#include <nanobind/nanobind.h>

namespace blsrdma {

void bind_handle(nanobind::module_& m);

}  // namespace blsrdma
