// NumPy arrays and byte buffers as they come from Python: looked at, never copied or converted.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

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

}  // namespace fedcodec::bindings
