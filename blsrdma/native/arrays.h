// Arrays and tensors, without a Python frame between: what blsrdma/buffers.py does, for the plain cases. What is not plain
// (other classes, layouts, devices, dtypes) is left to that module, which gives a buffer or an error that says what is wrong.
//
// numpy by its C API; torch by the DLPack exchange table of its Tensor class, so that nothing of torch is linked.
// All of this needs the GIL.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>

namespace blsrdma {

// C-contiguous memory, items along the leading dimension; and, when plain(), how to make an array like it.
struct Buffer {
  enum class Kind : std::uint8_t { other, numpy, torch };
  static constexpr int kDimensions = 8;

  std::byte* address = nullptr;
  std::int64_t items = 0;
  std::uint64_t item_bytes = 0;  // of one item: the product of the trailing dimensions times the element
  std::uint64_t tag = 0;         // element type: the kind's letter | bytes << 8, see buffers.py
  Kind kind = Kind::other;
  bool writable = true;
  std::uint8_t dimensions = 0;
  std::uint8_t code = 0;  // torch: DLPack's
  std::int64_t trailing[kDimensions - 1] = {};
  PyObject* descr = nullptr;  // numpy: the dtype, borrowed from the array

  bool plain() const { return kind != Kind::other; }
  std::uint64_t bytes() const { return static_cast<std::uint64_t>(items) * item_bytes; }
};

// Once, at import. Throws nanobind::python_error.
void import_arrays();

// Whether `object` is plain; then `buffer` says what it is.
bool describe(PyObject* object, Buffer& buffer);

// A new array or tensor of `items` items at `data`, which `owner` keeps alive, of the kind, dtype and trailing dimensions of
// `like`, a plain buffer. nullptr: a Python error is set.
PyObject* view(const Buffer& like, std::byte* data, std::int64_t items, PyObject* owner);

// Whether `made`, a view of the same memory from an earlier call for a buffer of the same kind, dtype and dimensions, can be
// given out again instead of a new one: nobody else holds it, and it still is what it was made as.
bool reusable(PyObject* made, const Buffer& like, const std::byte* data, std::int64_t items);

// `object` as `count` 64-bit integers, if it is a plain vector or list of so many: where they are, or `room`, filled.
// nullptr: it is something else, and no error is set.
const std::int64_t* integers(PyObject* object, std::size_t count, std::int64_t* room);

}  // namespace blsrdma
