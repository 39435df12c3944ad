// NumPy arrays and byte buffers as they come from Python: looked at, never copied or converted.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fedcodec/memory.h"

namespace fedcodec::bindings {

namespace py = pybind11;

// A NumPy array whose elements lie side by side, row by row, in the machine's byte order.
class Elements {
 public:
  Elements(py::handle object, const char* what) : array_(to_array(object, what)) {
    const int flags = py::detail::array_proxy(array_.ptr())->flags;
    const bool plain = (flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_) != 0 &&
                       (flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
    const char order = array_.dtype().byteorder();
    if (!plain || (order != '=' && order != '|')) refuse(object, what);
  }

  bool is(char kind, size_t item_size) const {
    return array_.dtype().kind() == kind && static_cast<size_t>(array_.itemsize()) == item_size;
  }
  bool is_float() const { return array_.dtype().kind() == 'f'; }
  size_t size() const { return static_cast<size_t>(array_.size()); }
  size_t item_size() const { return static_cast<size_t>(array_.itemsize()); }
  size_t nbytes() const { return static_cast<size_t>(array_.nbytes()); }
  bool writable() const { return array_.writeable(); }
  // Read-only memory is never written to: callers ask `writable` first.
  void* data() const { return const_cast<void*>(array_.data()); }

 protected:
  bool is_vector() const { return array_.ndim() == 1; }
  [[noreturn]] static void refuse(py::handle object, const char* what,
                                  const char* wanted = "a contiguous NumPy array") {
    throw py::type_error(std::string(what) + " must be " + wanted + ", not " +
                         std::string(py::str(py::type::handle_of(object))));
  }

 private:
  // A default py::array would be a new NumPy array.
  static py::array to_array(py::handle object, const char* what) {
    if (!py::isinstance<py::array>(object)) refuse(object, what);
    return py::reinterpret_borrow<py::array>(object);
  }

  py::array array_;
};

class Vector : public Elements {
 public:
  Vector(py::handle object, const char* what) : Elements(object, what) {
    if (!is_vector()) refuse(object, what, "a contiguous one-dimensional NumPy array");
  }
};

// The bytes of any object with a contiguous buffer, held as long as this lives.
class Bytes {
 public:
  explicit Bytes(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(Bytes&& other) noexcept : view_(other.view_) { other.view_ = {}; }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  Bytes& operator=(Bytes&&) = delete;

  std::span<const uint8_t> get() const {
    return {static_cast<const uint8_t*>(view_.buf), static_cast<size_t>(view_.len)};
  }

 private:
  Py_buffer view_;
};

// A new bytes object of unset content, to be written before anyone else sees it.
class NewBytes {
 public:
  explicit NewBytes(size_t size) {
    if (size > static_cast<size_t>(PY_SSIZE_T_MAX)) throw std::bad_alloc();
    object_ = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
    if (object_ == nullptr) throw py::error_already_set();
    prefer_large_pages(data(), size);
  }
  ~NewBytes() { Py_XDECREF(object_); }
  NewBytes(const NewBytes&) = delete;
  NewBytes& operator=(const NewBytes&) = delete;

  uint8_t* data() { return reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(object_)); }
  py::bytes shrunk_to(size_t size) {
    if (_PyBytes_Resize(&object_, static_cast<Py_ssize_t>(size)) != 0)
      throw py::error_already_set();
    return py::reinterpret_steal<py::bytes>(std::exchange(object_, nullptr));
  }

 private:
  PyObject* object_;
};

inline uint64_t to_u64(py::handle object, const char* what) {
  if (PyLong_CheckExact(object.ptr())) {
    const unsigned long long value = PyLong_AsUnsignedLongLong(object.ptr());
    if (value != ~0ull || PyErr_Occurred() == nullptr) return value;
    PyErr_Clear();
  }
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) throw py::error_already_set();
  const unsigned long long value = PyLong_AsUnsignedLongLong(index.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::value_error(std::string(what) + " must be from 0 to 2^64 - 1");
  }
  return value;
}

// What DLPack's capsules named "dltensor" hold first; the layout is frozen.
struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// One array as it lies in memory; `kind` is NumPy's letter, or B for bfloat16.
struct Plain {
  char kind;
  size_t item_size;
  std::span<const Py_ssize_t> shape;
  void* data;
  size_t nbytes;
};

inline std::optional<Plain> plain_array(PyObject* object, bool writable) {
  using Api = py::detail::npy_api;
  const int needed = Api::NPY_ARRAY_C_CONTIGUOUS_ | Api::NPY_ARRAY_ALIGNED_ |
                     (writable ? Api::NPY_ARRAY_WRITEABLE_ : 0);
  const py::array array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  const char order = dtype.byteorder(), kind = dtype.kind();
  const auto size = static_cast<size_t>(dtype.itemsize());
  const bool known = (kind == 'f' && size <= 8) || kind == 'i' || kind == 'u' || kind == 'b';
  if (!known || (order != '=' && order != '|') ||
      (py::detail::array_proxy(object)->flags & needed) != needed) {
    return {};
  }
  return Plain{kind,
               size,
               {array.shape(), static_cast<size_t>(array.ndim())},
               const_cast<void*>(array.data()),
               static_cast<size_t>(array.nbytes())};
}

inline std::optional<Plain> plain_array(const DlTensor& tensor) {
  constexpr int32_t kCpu = 1;
  constexpr std::string_view kKinds = "iuf?B?b";
  static_assert(sizeof(Py_ssize_t) == sizeof(int64_t));
  const char kind = tensor.code < kKinds.size() ? kKinds[tensor.code] : '?';
  if (tensor.device_type != kCpu || kind == '?' || tensor.lanes != 1 || tensor.bits % 8 != 0 ||
      (kind == 'f' && (tensor.bits < 16 || tensor.bits > 64))) {
    return {};
  }
  int64_t n = 1;
  bool contiguous = true;
  for (int32_t i = tensor.ndim; i-- > 0; n *= tensor.shape[i]) {
    contiguous &= tensor.strides == nullptr || tensor.strides[i] == n || tensor.shape[i] == 1;
  }
  const size_t size = tensor.bits / 8;
  void* const data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  if (n > 0 && (!contiguous || reinterpret_cast<uintptr_t>(data) % size != 0)) return {};
  return Plain{
      kind,
      size,
      {reinterpret_cast<const Py_ssize_t*>(tensor.shape), static_cast<size_t>(tensor.ndim)},
      data,
      static_cast<size_t>(n) * size};
}

constexpr const char* kCapsule = "dltensor";

// Looks at NumPy arrays or DLPack's capsules in one pass: their dtypes and shapes as bytes. None
// unless each is contiguous, aligned, in the machine's byte order, of a dtype of the wire and, if
// asked, writable, and no two share memory with each other or with `source`: then arrays.py looks
// closer.
inline py::object describe(const py::list& items, const py::object& source, bool writable) {
  using Span = std::pair<uintptr_t, uintptr_t>;
  std::vector<Span> spans;
  spans.reserve(items.size() + 1);
  const auto add = [&](const void* data, size_t nbytes) {
    const auto start = reinterpret_cast<uintptr_t>(data);
    if (nbytes > 0) spans.emplace_back(start, start + nbytes);
  };
  std::optional<Bytes> bytes;
  if (!source.is_none()) {
    bytes.emplace(source);
    add(bytes->get().data(), bytes->get().size());
  }
  std::string described;
  described.reserve(items.size() * 32);
  for (const py::handle item : items) {
    std::optional<Plain> plain;
    if (Py_TYPE(item.ptr()) == py::detail::npy_api::get().PyArray_Type_) {
      plain = plain_array(item.ptr(), writable);
    } else if (PyCapsule_IsValid(item.ptr(), kCapsule) != 0) {
      plain =
          plain_array(*static_cast<const DlTensor*>(PyCapsule_GetPointer(item.ptr(), kCapsule)));
    }
    if (!plain) return py::none();
    described +=
        {plain->kind, static_cast<char>(plain->item_size), static_cast<char>(plain->shape.size())};
    described.append(reinterpret_cast<const char*>(plain->shape.data()), plain->shape.size_bytes());
    add(plain->data, plain->nbytes);
  }
  std::sort(spans.begin(), spans.end());
  const auto overlap = std::adjacent_find(
      spans.begin(), spans.end(), [](Span one, Span next) { return next.first < one.second; });
  if (overlap != spans.end()) return py::none();
  return py::bytes(described);
}

// NumPy arrays over the memory of capsules that were described: of floats, of the bits of 16-bit
// floats, or of bytes.
inline py::list arrays_over(const py::list& capsules) {
  const auto& numpy = py::detail::npy_api::get();
  const py::dtype f32 = py::dtype::of<float>(), f64 = py::dtype::of<double>(),
                  half = py::dtype::of<uint16_t>(), byte = py::dtype::of<uint8_t>();
  py::list arrays(capsules.size());
  for (size_t i = 0; i < capsules.size(); ++i) {
    const py::object capsule = capsules[i];
    const void* const pointer = PyCapsule_GetPointer(capsule.ptr(), kCapsule);
    if (pointer == nullptr) throw py::error_already_set();
    const auto plain = plain_array(*static_cast<const DlTensor*>(pointer));
    if (!plain) throw py::value_error("a capsule has changed");
    const bool is_float = plain->kind == 'f' || plain->kind == 'B';
    const py::dtype& dtype = !is_float               ? byte
                             : plain->item_size == 2 ? half
                             : plain->item_size == 4 ? f32
                                                     : f64;
    const auto n = static_cast<Py_intptr_t>(plain->nbytes) / dtype.itemsize();
    auto array = py::reinterpret_steal<py::object>(numpy.PyArray_NewFromDescr_(
        numpy.PyArray_Type_, py::object(dtype).release().ptr(), 1, &n, nullptr, plain->data,
        py::detail::npy_api::NPY_ARRAY_WRITEABLE_, nullptr));
    if (!array || numpy.PyArray_SetBaseObject_(array.ptr(), capsule.inc_ref().ptr()) != 0)
      throw py::error_already_set();
    arrays[i] = std::move(array);
  }
  return arrays;
}

}  // namespace fedcodec::bindings
