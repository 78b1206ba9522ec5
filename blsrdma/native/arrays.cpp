#include "arrays.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>  // DLPack's structures

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include <cstring>
#include <memory>

namespace nb = nanobind;

namespace blsrdma {
namespace {

// --- DLPack 1.x, what nanobind does not declare. The layout is fixed by the major version.

struct Managed {  // DLManagedTensorVersioned
  std::uint32_t major = 1, minor = 1;
  void* context = nullptr;
  void (*deleter)(Managed*) = nullptr;
  std::uint64_t flags = 0;
  nb::dlpack::dltensor tensor;
};

struct ExchangeTable {  // DLPackExchangeAPI
  std::uint32_t major, minor;
  void* previous;
  void* allocate;
  void* from_object;
  int (*to_object)(Managed*, void**);                  // steals the tensor
  int (*look)(void*, nb::dlpack::dltensor*);           // borrows: shape and strides are the object's
  void* current_stream;
};

constexpr std::int32_t kCpu = 1;

PyObject* torch_tensor = nullptr;  // the class, once torch has been imported by the application
const ExchangeTable* torch_table = nullptr;

// torch is not imported here: who never uses it never pays for it.
bool know_torch() {
  if (torch_tensor) return torch_table != nullptr;
  PyObject* modules = PySys_GetObject("modules");  // borrowed, as the next
  PyObject* torch = modules ? PyDict_GetItemString(modules, "torch") : nullptr;
  if (!torch) return false;
  torch_tensor = PyObject_GetAttrString(torch, "Tensor");
  if (!torch_tensor) {  // being imported
    PyErr_Clear();
    return false;
  }
  PyObject* capsule = PyObject_GetAttrString(torch_tensor, "__dlpack_c_exchange_api__");
  if (capsule) {
    const auto* table = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (table && table->major == 1) torch_table = table;  // the class owns it, and lives for ever
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  return torch_table != nullptr;
}

// The kind's letter of a DLPack type, as in buffers.py; 0: not plain.
char letter(nb::dlpack::dtype type) {
  using Code = nb::dlpack::dtype_code;
  if (type.lanes != 1 || type.bits % 8) return 0;
  switch (static_cast<Code>(type.code)) {
    case Code::Int: return 'i';
    case Code::UInt: return 'u';
    case Code::Float: return 'f';
    case Code::Bfloat: return 'B';
    case Code::Complex: return 'c';
    case Code::Bool: return 'b';
    default: return 0;
  }
}

bool from_numpy(PyArrayObject* array, Buffer& buffer) {
  PyArray_Descr* type = PyArray_DESCR(array);
  const int dimensions = PyArray_NDIM(array);
  if (!std::strchr("biufcmMSU", type->kind) || !PyArray_ISNOTSWAPPED(array) || !PyArray_ISALIGNED(array) ||
      !PyArray_IS_C_CONTIGUOUS(array) ||
      dimensions < 1 || dimensions > Buffer::kDimensions) {
    return false;
  }
  const npy_intp* shape = PyArray_DIMS(array);
  const auto element = static_cast<std::uint64_t>(PyDataType_ELSIZE(type));
  buffer.address = static_cast<std::byte*>(PyArray_DATA(array));
  buffer.items = shape[0];
  buffer.item_bytes = element;
  for (int d = 1; d < dimensions; ++d) {
    buffer.trailing[d - 1] = shape[d];
    buffer.item_bytes *= static_cast<std::uint64_t>(shape[d]);
  }
  buffer.tag = static_cast<std::uint64_t>(static_cast<unsigned char>(type->kind)) | element << 8;
  buffer.kind = Buffer::Kind::numpy;
  buffer.writable = PyArray_ISWRITEABLE(array);
  buffer.dimensions = static_cast<std::uint8_t>(dimensions);
  buffer.descr = reinterpret_cast<PyObject*>(type);
  return true;
}

bool from_torch(PyObject* tensor, Buffer& buffer) {
  nb::dlpack::dltensor it;
  if (torch_table->look(tensor, &it) != 0) {  // sparse, conjugate, requires grad, …: buffers.py knows what to say or do
    PyErr_Clear();
    return false;
  }
  const char kind = letter(it.dtype);
  if (!kind || it.device.device_type != kCpu || it.ndim < 1 || it.ndim > Buffer::kDimensions) return false;
  const std::uint64_t element = it.dtype.bits / 8;
  std::int64_t expected = 1;
  bool empty = false;
  for (int d = it.ndim - 1; d >= 0; --d) {
    empty |= it.shape[d] == 0;
    if (it.strides && it.shape[d] > 1 && it.strides[d] != expected) expected = -1;
    if (expected < 0) break;
    expected *= it.shape[d];
  }
  if (expected < 0 && !empty) return false;
  buffer.address = static_cast<std::byte*>(it.data) + it.byte_offset;
  buffer.items = it.shape[0];
  buffer.item_bytes = element;
  for (int d = 1; d < it.ndim; ++d) {
    buffer.trailing[d - 1] = it.shape[d];
    buffer.item_bytes *= static_cast<std::uint64_t>(it.shape[d]);
  }
  buffer.tag = static_cast<std::uint64_t>(static_cast<unsigned char>(kind)) | element << 8;
  buffer.kind = Buffer::Kind::torch;
  buffer.writable = true;
  buffer.dimensions = static_cast<std::uint8_t>(it.ndim);
  buffer.code = it.dtype.code;
  return true;
}

// A tensor that torch owns, of memory that `owner` keeps alive.
struct Lent {
  Managed managed;
  std::int64_t shape[Buffer::kDimensions];
  std::int64_t strides[Buffer::kDimensions];
  PyObject* owner;

  static void give_back(Managed* managed) {
    std::unique_ptr<Lent> it(static_cast<Lent*>(managed->context));
    if (!Py_IsInitialized()) return;
    const nb::gil_scoped_acquire gil;  // torch may free a tensor on any thread
    Py_DECREF(it->owner);
  }
};

PyObject* torch_view(const Buffer& like, std::byte* data, std::int64_t items, PyObject* owner) {
  auto lent = std::make_unique<Lent>();
  lent->shape[0] = items;
  for (int d = 1; d < like.dimensions; ++d) lent->shape[d] = like.trailing[d - 1];
  std::int64_t stride = 1;
  for (int d = like.dimensions - 1; d >= 0; --d) {
    lent->strides[d] = stride;
    stride *= lent->shape[d];
  }
  nb::dlpack::dltensor& tensor = lent->managed.tensor;
  tensor.data = data;
  tensor.device.device_type = kCpu;
  tensor.ndim = like.dimensions;
  tensor.dtype = {like.code, static_cast<std::uint8_t>(like.tag >> 8 << 3), 1};
  tensor.shape = lent->shape;
  tensor.strides = lent->strides;
  lent->managed.context = lent.get();
  lent->managed.deleter = Lent::give_back;
  lent->owner = Py_NewRef(owner);
  void* made = nullptr;
  if (torch_table->to_object(&lent->managed, &made) != 0) {  // it has not been taken over
    Py_DECREF(owner);
    return nullptr;
  }
  lent.release();
  return static_cast<PyObject*>(made);
}

PyObject* numpy_view(const Buffer& like, std::byte* data, std::int64_t items, PyObject* owner) {
  npy_intp shape[Buffer::kDimensions] = {static_cast<npy_intp>(items)};
  for (int d = 1; d < like.dimensions; ++d) shape[d] = static_cast<npy_intp>(like.trailing[d - 1]);
  Py_INCREF(like.descr);  // the next call steals it
  PyObject* array = PyArray_NewFromDescr(&PyArray_Type, reinterpret_cast<PyArray_Descr*>(like.descr), like.dimensions, shape,
                                         nullptr, data, like.writable ? NPY_ARRAY_CARRAY : NPY_ARRAY_CARRAY_RO, nullptr);
  if (!array) return nullptr;
  if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(array), Py_NewRef(owner)) != 0) Py_CLEAR(array);
  return array;
}

int import_numpy() {
  import_array1(-1);
  return 0;
}

}  // namespace

void import_arrays() {
  if (import_numpy() != 0) throw nb::python_error();
}

bool describe(PyObject* object, Buffer& buffer) {
  if (PyArray_CheckExact(object)) return from_numpy(reinterpret_cast<PyArrayObject*>(object), buffer);
  if (!know_torch() || Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(torch_tensor)) return false;
  return from_torch(object, buffer);
}

PyObject* view(const Buffer& like, std::byte* data, std::int64_t items, PyObject* owner) {
  return like.kind == Buffer::Kind::numpy ? numpy_view(like, data, items, owner) : torch_view(like, data, items, owner);
}

bool reusable(PyObject* made, const Buffer& like, const std::byte* data, std::int64_t items) {
  Buffer it;
  return Py_REFCNT(made) == 1 && describe(made, it) && it.kind == like.kind && it.tag == like.tag && it.descr == like.descr &&
         it.address == data && it.items == items && it.dimensions == like.dimensions && it.writable == like.writable &&
         std::memcmp(it.trailing, like.trailing, sizeof it.trailing) == 0;
}

const std::int64_t* integers(PyObject* object, std::size_t count, std::int64_t* room) {
  if (PyList_CheckExact(object)) {
    if (static_cast<std::size_t>(PyList_Size(object)) != count) return nullptr;
    for (std::size_t i = 0; i < count; ++i) {
      PyObject* each = PyList_GetItem(object, Py_ssize_t(i));
      if (!PyLong_CheckExact(each)) return nullptr;
      int overflow = 0;
      room[i] = PyLong_AsLongLongAndOverflow(each, &overflow);
      if (overflow) return nullptr;
    }
    return room;
  }
  Buffer it;
  if (!describe(object, it) || it.dimensions != 1 || it.tag != ('i' | sizeof(std::int64_t) << 8) ||
      static_cast<std::size_t>(it.items) != count) {
    return nullptr;
  }
  return reinterpret_cast<const std::int64_t*>(it.address);
}

}  // namespace blsrdma
