// The roofs that benchmarks measure kernels by.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "arrays.h"
#include "fedcodec/kernels.h"
#include "ops.h"

namespace fedcodec::bindings {

// A roof is the machine's: not of the instruction set in use, but of the best one.
inline const Kernels& best_kernels() {
  const KernelChoice* choices = nullptr;
  size_t best = kernel_choices(&choices) - 1;
  while (!choices[best].usable) --best;
  return *choices[best].table;
}

inline Store to_store(const std::string& name) {
  if (name == "plain") return Store::kPlain;
  if (name == "prefetched") return Store::kPrefetched;
  if (name == "streamed") return Store::kStreamed;
  throw py::value_error("no way to store is " + name);
}

// The memory of a one-dimensional array; none of None.
struct Stream {
  Stream(py::handle object, const char* what) {
    if (object.is_none()) return;
    const Vector vector(object, what);
    data = static_cast<uint8_t*>(vector.data());
    size = vector.nbytes();
    writable = vector.writable();
  }
  uint8_t* data = nullptr;
  size_t size = 0;
  bool writable = true;
};

inline unsigned roof(const py::object& first, const py::object& second, const py::object& target,
                     const std::string& store) {
  const Stream a(first, "a"), b(second, "b"), out(target, "out");
  if (!out.writable) throw py::value_error("out is read-only");
  const Store way = to_store(store);
  const Kernels& kernels = best_kernels();
  const ReleasedGil released;
  return kernels.roof(a.data, a.size, b.data, b.size, out.data, out.size, way);
}

inline void bind_roof(py::module_& m) {
  m.def("roof", roof, py::arg("a"), py::arg("b") = py::none(), py::arg("out") = py::none(),
        py::arg("store") = "plain");
}

}  // namespace fedcodec::bindings
