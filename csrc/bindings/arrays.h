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
#include <utility>
#include <vector>

#include "fedcodec/memory.h"

namespace fedcodec::bindings {

namespace py = pybind11;

// A 1-D array whose elements lie side by side in the machine's byte order.
class Vector {
 public:
  Vector(py::handle object, const char* what) : array_(to_array(object, what)) {
    const int flags = py::detail::array_proxy(array_.ptr())->flags;
    const bool plain = (flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_) != 0 &&
                       (flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
    const char order = array_.dtype().byteorder();
    if (array_.ndim() != 1 || !plain || (order != '=' && order != '|')) refuse(object, what);
  }

  bool is(char kind, size_t item_size) const {
    return array_.dtype().kind() == kind && static_cast<size_t>(array_.itemsize()) == item_size;
  }
  size_t size() const { return static_cast<size_t>(array_.size()); }
  size_t nbytes() const { return static_cast<size_t>(array_.nbytes()); }
  bool writable() const { return array_.writeable(); }
  // Read-only memory is never written to: callers ask `writable` first.
  void* data() const { return const_cast<void*>(array_.data()); }

 private:
  // A default py::array would be a new NumPy array.
  static py::array to_array(py::handle object, const char* what) {
    if (!py::isinstance<py::array>(object)) refuse(object, what);
    return py::reinterpret_borrow<py::array>(object);
  }

  [[noreturn]] static void refuse(py::handle object, const char* what) {
    throw py::type_error(std::string(what) +
                         " must be a contiguous one-dimensional NumPy array, not " +
                         std::string(py::str(py::type::handle_of(object))));
  }

  py::array array_;
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

// Describes plain arrays in one pass: their dtypes and shapes as bytes, and 1-D arrays over their
// memory, held as the wire holds them. None unless each is contiguous, aligned, in the machine's
// byte order, of a dtype of the wire and, if asked, writable, and no two share memory with each
// other or with `source`: then arrays.py looks closer.
inline py::object flatten(const py::list& arrays, const py::object& source, bool writable) {
  const auto& numpy = py::detail::npy_api::get();
  const int needed = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ |
                     py::detail::npy_api::NPY_ARRAY_ALIGNED_ |
                     (writable ? py::detail::npy_api::NPY_ARRAY_WRITEABLE_ : 0);
  const py::dtype f32 = py::dtype::of<float>(), f64 = py::dtype::of<double>(),
                  half = py::dtype::of<uint16_t>(), byte = py::dtype::of<uint8_t>();
  using Span = std::pair<uintptr_t, uintptr_t>;
  std::vector<Span> spans;
  spans.reserve(arrays.size() + 1);
  std::optional<Bytes> bytes;
  if (!source.is_none()) {
    bytes.emplace(source);
    const auto start = reinterpret_cast<uintptr_t>(bytes->get().data());
    if (!bytes->get().empty()) spans.emplace_back(start, start + bytes->get().size());
  }
  std::string described;
  py::list flat(arrays.size());
  for (size_t i = 0; i < arrays.size(); ++i) {
    PyObject* const item = PyList_GET_ITEM(arrays.ptr(), static_cast<Py_ssize_t>(i));
    if (Py_TYPE(item) != numpy.PyArray_Type_) return py::none();
    const py::array array = py::reinterpret_borrow<py::array>(item);
    const int flags = py::detail::array_proxy(item)->flags;
    const py::dtype dtype = array.dtype();
    const char order = dtype.byteorder(), kind = dtype.kind();
    const auto size = dtype.itemsize();
    const bool is_float = kind == 'f' && size <= 8;
    if ((flags & needed) != needed || (order != '=' && order != '|') ||
        !(is_float || kind == 'i' || kind == 'u' || kind == 'b')) {
      return py::none();
    }
    described += {kind, static_cast<char>(size), static_cast<char>(array.ndim())};
    described.append(reinterpret_cast<const char*>(array.shape()),
                     static_cast<size_t>(array.ndim()) * sizeof(py::ssize_t));
    const py::dtype& held = !is_float ? byte : size == 2 ? half : size == 4 ? f32 : f64;
    const Py_intptr_t n = array.nbytes() / held.itemsize();
    PyObject* const view = numpy.PyArray_NewFromDescr_(
        numpy.PyArray_Type_, py::object(held).release().ptr(), 1, &n, nullptr,
        const_cast<void*>(array.data()), flags & ~py::detail::npy_api::NPY_ARRAY_OWNDATA_, nullptr);
    if (view == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(flat.ptr(), static_cast<Py_ssize_t>(i), view);
    if (numpy.PyArray_SetBaseObject_(view, array.inc_ref().ptr()) != 0)
      throw py::error_already_set();
    const auto start = reinterpret_cast<uintptr_t>(array.data());
    if (n > 0) spans.emplace_back(start, start + static_cast<uintptr_t>(array.nbytes()));
  }
  std::sort(spans.begin(), spans.end());
  const auto overlap = std::adjacent_find(
      spans.begin(), spans.end(), [](Span one, Span next) { return next.first < one.second; });
  if (overlap != spans.end()) return py::none();
  return py::make_tuple(py::bytes(described), std::move(flat));
}

}  // namespace fedcodec::bindings
