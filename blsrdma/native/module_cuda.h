// CUDA's driver API, and the exchange on device windows, as Python sees them: blsrdma._native.cuda.
#pragma once

#include <nanobind/nanobind.h>

namespace blsrdma {

void bind_cuda(nanobind::module_& m);

}  // namespace blsrdma
