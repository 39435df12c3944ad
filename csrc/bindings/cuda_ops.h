// fedcodec.ops for arrays in a GPU's memory, in the submodule `ops` of _cuda: a table of contents.
// ops/__init__.py has checked sizes and dtypes; what else is wrong raises Refused.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/ops.h"
#include "device_arrays.h"
#include "ops.h"

namespace fedcodec::bindings {

inline gpu::Elements elements(const DeviceArray& array) {
  return {array.data(), array.n, array.dtype};
}

// Runs body(stream) where the arrays are, once others' work on them is done.
template <class F>
auto run_on(const std::vector<const DeviceArray*>& arrays, F body) {
  Place place;
  for (const DeviceArray* array : arrays) place.add(*array);
  return on_device(place.device, [&] { return body(place.stream()); });
}

using Spaces = std::vector<const DeviceArray*>;

inline std::vector<gpu::Elements> space_of(const Spaces& parts) {
  std::vector<gpu::Elements> space;
  for (const DeviceArray* part : parts) space.push_back(elements(*part));
  return space;
}

inline void bind_cuda_ops(py::module_& m) {
  using Array = DeviceArray;
  using Draws = std::optional<std::tuple<uint64_t, uint64_t, uint64_t>>;
  auto ops = m.def_submodule("ops");
  ops.def("topk", [](const Spaces& parts, uint64_t k, const Array& positions, const Array& values) {
    Spaces arrays = parts;
    arrays.insert(arrays.end(), {&positions, &values});
    run_on(arrays, [&](cudaStream_t stream) {
      gpu::topk(space_of(parts), k, {elements(positions), elements(values)}, stream);
    });
  });
  ops.def("topk_threshold", [](const Spaces& parts, uint64_t k) {
    const gpu::Threshold found = run_on(parts, [&](cudaStream_t stream) {
      return gpu::topk_threshold(space_of(parts), k, stream);
    });
    return std::pair(found.magnitude, found.ties);
  });
  ops.def("percentile_threshold",
          [](const Spaces& parts, double percentile, const std::string& interpolation) {
            return run_on(parts, [&](cudaStream_t stream) {
              return gpu::percentile_threshold(space_of(parts), percentile,
                                               interpolation_of(interpolation), stream);
            });
          });
  ops.def("compact",
          [](const Spaces& parts, double threshold, uint64_t ties, const py::function& allocate) {
            py::tuple made;
            run_on(parts, [&](cudaStream_t stream) {
              const auto arrays = [&](uint64_t kept) -> gpu::KeptArrays {
                const py::gil_scoped_acquire acquired;
                made = allocate(kept);
                return {elements(to_array(made[0])), elements(to_array(made[1]))};
              };
              gpu::compact(space_of(parts), {threshold, ties}, arrays, stream);
            });
            return made;
          });
  ops.def("copy", [](const Array& from, const Array& to) {
    run_on({&from, &to}, [&](cudaStream_t stream) {
      gpu::Workspace workspace(stream);
      workspace.copy(to.data(), from.data(), to.nbytes(), cudaMemcpyDeviceToDevice);
      workspace.synchronize();
    });
  });
  ops.def("apply_mask", [](const Array& values, const Array& mask, const Array& out) {
    run_on({&values, &mask, &out}, [&](cudaStream_t stream) {
      gpu::apply_mask(elements(values), elements(mask), elements(out), stream);
    });
  });
  ops.def("pack_mask", [](const Array& mask, const Array& bits) {
    run_on({&mask, &bits},
           [&](cudaStream_t stream) { gpu::pack_mask(elements(mask), elements(bits), stream); });
  });
  ops.def("unpack_mask", [](const Array& bits, const Array& mask) {
    run_on({&bits, &mask},
           [&](cudaStream_t stream) { gpu::unpack_mask(elements(bits), elements(mask), stream); });
  });
  ops.def("quantize", [](const Array& values, unsigned bits, size_t inner, size_t channels,
                         const Draws& draw, const Array& codes, const Array& scales) {
    const Draw keyed = draw ? std::make_from_tuple<Draw>(*draw) : Draw{};
    run_on({&values, &codes, &scales}, [&](cudaStream_t stream) {
      gpu::quantize(elements(values), bits, {inner, channels}, draw ? &keyed : nullptr,
                    elements(codes), elements(scales), stream);
    });
  });
  ops.def("dequantize", [](const Array& codes, const Array& scales, unsigned bits, size_t inner,
                           size_t channels, const Array& out) {
    run_on({&codes, &scales, &out}, [&](cudaStream_t stream) {
      gpu::dequantize(elements(codes), elements(scales), bits, {inner, channels}, elements(out),
                      stream);
    });
  });
  ops.def("accumulate_codes", [](const Array& sum, const Array& codes, const Array& scales,
                                 unsigned bits, size_t inner, size_t channels, double weight) {
    run_on({&sum, &codes, &scales}, [&](cudaStream_t stream) {
      gpu::accumulate_codes(elements(sum), elements(codes), elements(scales), bits,
                            {inner, channels}, weight, stream);
    });
  });
  ops.def("pack_codes", [](const Array& codes, unsigned bits, const Array& packed) {
    run_on({&codes, &packed}, [&](cudaStream_t stream) {
      gpu::pack_codes(elements(codes), bits, elements(packed), stream);
    });
  });
  ops.def("unpack_codes", [](const Array& packed, unsigned bits, const Array& codes) {
    run_on({&packed, &codes}, [&](cudaStream_t stream) {
      gpu::unpack_codes(elements(packed), bits, elements(codes), stream);
    });
  });
  ops.def("mean_magnitude", [](const Array& values) {
    return run_on({&values}, [&](cudaStream_t stream) {
      return gpu::mean_magnitude(elements(values), nullptr, stream);
    });
  });
  ops.def("pack_signs", [](const Array& values, const Array& bits) {
    run_on({&values, &bits}, [&](cudaStream_t stream) {
      const gpu::Elements packed = elements(bits);
      gpu::mean_magnitude(elements(values), &packed, stream);
    });
  });
  ops.def("unpack_signs", [](const Array& bits, float magnitude, const Array& out) {
    run_on({&bits, &out}, [&](cudaStream_t stream) {
      gpu::unpack_signs(elements(bits), magnitude, elements(out), stream);
    });
  });
  ops.def("narrow", [](const Array& values, unsigned dtype, const Array& out) {
    run_on({&values, &out}, [&](cudaStream_t stream) {
      gpu::narrow(elements(values), static_cast<Dtype>(dtype), elements(out), stream);
    });
  });
  ops.def("widen", [](const Array& halves, unsigned dtype, const Array& out) {
    run_on({&halves, &out}, [&](cudaStream_t stream) {
      gpu::widen(elements(halves), static_cast<Dtype>(dtype), elements(out), stream);
    });
  });
  ops.def("pack_sparse", [](const Array& positions, uint64_t n) {
    const auto packed = run_on({&positions}, [&](cudaStream_t stream) {
      return gpu::pack_sparse(elements(positions), n, stream);
    });
    return py::bytes(reinterpret_cast<const char*>(packed.data()), packed.size());
  });
  ops.def("scatter", [](const Array& positions, const Array& values, const Array& out) {
    run_on({&positions, &values, &out}, [&](cudaStream_t stream) {
      gpu::scatter(elements(positions), elements(values), elements(out), stream);
    });
  });
  ops.def("accumulate", [](const Array& sum, const Array& values, double weight) {
    run_on({&sum, &values}, [&](cudaStream_t stream) {
      gpu::accumulate(elements(sum), nullptr, elements(values), weight, stream);
    });
  });
  ops.def("accumulate_sparse",
          [](const Array& sum, const Array& positions, const Array& values, double weight) {
            run_on({&sum, &positions, &values}, [&](cudaStream_t stream) {
              const gpu::Elements places = elements(positions);
              gpu::accumulate(elements(sum), &places, elements(values), weight, stream);
            });
          });
}

}  // namespace fedcodec::bindings
