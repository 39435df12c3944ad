// The kernels one by one, for ops/cpu.py: names and meanings of ops/reference.py, in the submodule
// `ops`. ops/__init__.py has checked the arguments; here only types and layouts are, by the casters
// (no argument converts).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fedcodec/arith.h"
#include "fedcodec/float_env.h"
#include "fedcodec/kernels.h"
#include "fedcodec/select.h"

namespace fedcodec::bindings {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

inline const Kernels& kernels_in_use() {
  const Kernels* table = active_kernels();
  if (table == nullptr)
    throw std::runtime_error("FEDCODEC_ISA names no instruction set that this processor can run");
  return *table;
}

// Runs body(kernels) as all tensor-sized work runs: without the GIL and in the default
// floating-point mode.
template <class Body>
auto compute(Body body) {
  const Kernels& kernels = kernels_in_use();
  const py::gil_scoped_release released;
  const DefaultFloatEnv env;
  return body(kernels);
}

// Scalars too go through kernels: the compiler may move a conversion of its own out of the default
// mode, a call never.
template <class Float>
Float narrowed(const Kernels& kernels, double x) {
  if constexpr (sizeof(Float) == sizeof(double)) return x;
  float out;
  kernels.f64_to_f32(&x, 1, &out);
  return static_cast<Float>(out);
}
inline double widened(const Kernels&, double x) { return x; }
inline double widened(const Kernels& kernels, float x) {
  double out;
  kernels.f32_to_f64(&x, 1, &out);
  return out;
}

template <class T>
size_t size_of(const Array<T>& array) {
  return static_cast<size_t>(array.size());
}

template <class T>
Array<T> array_of(size_t n) {
  return Array<T>(static_cast<py::ssize_t>(n));
}

template <class Float>
struct Of;
template <>
struct Of<float> {
  static constexpr auto count_above = &Kernels::count_above_f32;
  static constexpr auto compact = &Kernels::compact_f32;
  static constexpr auto apply_mask = &Kernels::apply_mask_f32;
  static constexpr auto scatter = &Kernels::scatter_f32;
  static constexpr auto topk_threshold = topk_threshold_f32;
  static constexpr auto percentile_threshold = percentile_threshold_f32;
};
template <>
struct Of<double> {
  static constexpr auto count_above = &Kernels::count_above_f64;
  static constexpr auto compact = &Kernels::compact_f64;
  static constexpr auto apply_mask = &Kernels::apply_mask_f64;
  static constexpr auto scatter = &Kernels::scatter_f64;
  static constexpr auto topk_threshold = topk_threshold_f64;
  static constexpr auto percentile_threshold = percentile_threshold_f64;
};

// --- selection -----------------------------------------------------------------------------------

template <class Float>
class PartList {
 public:
  explicit PartList(const py::list& parts) {
    for (const py::handle part : parts) {
      if (!py::isinstance<Array<Float>>(part))
        throw py::type_error("parts must be contiguous arrays of one float type");
      arrays_.push_back(py::reinterpret_borrow<Array<Float>>(part));
      spans_.emplace_back(arrays_.back().data(), size_of(arrays_.back()));
    }
  }
  Parts<Float> get() const { return spans_; }

 private:
  std::vector<Array<Float>> arrays_;
  std::vector<std::span<const Float>> spans_;
};

// Calls body(part list) with the float type that the first part has; float32 where there is none.
template <class Body>
auto with_parts(const py::list& parts, Body body) {
  const bool wide = !parts.empty() && py::isinstance<Array<double>>(parts[0]);
  return wide ? body(PartList<double>(parts)) : body(PartList<float>(parts));
}

template <class Float>
py::tuple topk_threshold(const PartList<Float>& parts, uint64_t k) {
  const auto [threshold, ties] = compute([&](const Kernels& kernels) {
    const auto cut = Of<Float>::topk_threshold(kernels, parts.get(), k);
    return std::pair(widened(kernels, magnitude_of(cut.key)), cut.ties);
  });
  return py::make_tuple(threshold, ties);
}

template <class Float>
double percentile_threshold(const PartList<Float>& parts, double percentile,
                            const std::string& name) {
  const Interpolation interpolation = name == "lower"    ? Interpolation::kLower
                                      : name == "higher" ? Interpolation::kHigher
                                                         : Interpolation::kLinear;
  return compute([&](const Kernels& kernels) {
    return widened(
        kernels, Of<Float>::percentile_threshold(kernels, parts.get(), percentile, interpolation));
  });
}

template <class Float>
py::tuple compact(const PartList<Float>& parts, double threshold, uint64_t ties) {
  const auto key =
      compute([&](const Kernels& kernels) { return key_of(narrowed<Float>(kernels, threshold)); });
  size_t n = 0;
  size_t above = 0;
  compute([&](const Kernels& kernels) {
    for (const auto part : parts.get()) {
      n += part.size();
      above += (kernels.*Of<Float>::count_above)(part.data(), part.size(), key);
    }
  });
  // Exact for the ties that topk_threshold counted, an upper bound for others.
  const size_t most = above + static_cast<size_t>(std::min<uint64_t>(n - above, ties));
  auto positions = array_of<int64_t>(most);
  auto values = array_of<Float>(most);
  int64_t* next_position = positions.mutable_data();
  Float* next_value = values.mutable_data();
  compute([&](const Kernels& kernels) {
    constexpr size_t kStretch = 16384;
    const auto narrow = std::make_unique<uint32_t[]>(kStretch);
    const auto found = std::make_unique<Float[]>(kStretch);
    int64_t base = 0;
    for (const auto part : parts.get()) {
      for (size_t start = 0; start < part.size(); start += kStretch) {
        const size_t length = std::min(kStretch, part.size() - start);
        const size_t m = (kernels.*Of<Float>::compact)(part.data() + start, length, key, &ties,
                                                       narrow.get(), found.get());
        const int64_t offset = base + static_cast<int64_t>(start);
        next_position = std::transform(narrow.get(), narrow.get() + m, next_position,
                                       [offset](uint32_t position) { return offset + position; });
        next_value = std::copy_n(found.get(), m, next_value);
      }
      base += static_cast<int64_t>(part.size());
    }
  });
  const auto kept = static_cast<py::ssize_t>(next_position - positions.data());
  positions.resize({kept});
  values.resize({kept});
  return py::make_tuple(std::move(positions), std::move(values));
}

inline Array<int64_t> random_positions(uint64_t n, uint64_t k, uint64_t seed) {
  auto positions = array_of<int64_t>(k);
  uint64_t* out = reinterpret_cast<uint64_t*>(positions.mutable_data());
  compute([&](const Kernels& kernels) { sorted_random_positions(kernels, seed, n, k, out); });
  return positions;
}

// --- masks ---------------------------------------------------------------------------------------

template <class Float>
Array<Float> apply_mask(const Array<Float>& values, const Array<bool>& mask) {
  const size_t n = size_of(values);
  auto out = array_of<Float>(n);
  const Float* x = values.data();
  const uint8_t* keep = reinterpret_cast<const uint8_t*>(mask.data());
  Float* masked = out.mutable_data();
  compute([&](const Kernels& kernels) {
    constexpr size_t kStretch = 4096;
    uint8_t bits[kStretch / 8];
    for (size_t start = 0; start < n; start += kStretch) {
      const size_t length = std::min(kStretch, n - start);
      kernels.pack_mask(keep + start, length, bits);
      (kernels.*Of<Float>::apply_mask)(x + start, bits, length, masked + start);
    }
  });
  return out;
}

// --- maps: n elements in, a known number out -----------------------------------------------------

// Calls body(kernels, input, n, output) for a new array of `length` elements.
template <class Out, class In, class Body>
Array<Out> map(const Array<In>& in, size_t length, Body body) {
  auto out = array_of<Out>(length);
  const In* from = in.data();
  Out* to = out.mutable_data();
  const size_t n = size_of(in);
  compute([&](const Kernels& kernels) { body(kernels, from, n, to); });
  return out;
}

inline const uint8_t* bytes_of(const bool* mask) { return reinterpret_cast<const uint8_t*>(mask); }
inline uint8_t* bytes_of(bool* mask) { return reinterpret_cast<uint8_t*>(mask); }

inline int levels_of(unsigned bits) { return (1 << (bits - 1)) - 1; }

inline py::tuple quantize(const Array<float>& values, unsigned bits, size_t inner, size_t channels,
                          const std::optional<std::tuple<uint64_t, uint64_t, uint64_t>>& draw) {
  auto scales = array_of<float>(channels);
  float* scale = scales.mutable_data();
  const int levels = levels_of(bits);
  const Grid grid = {inner, channels};
  auto codes = map<int8_t>(values, size_of(values),
                           [&](const Kernels& kernels, const float* x, size_t n, int8_t* out) {
                             const size_t blocks = n / inner + (n % inner != 0);
                             if (!draw && blocks == channels) {
                               kernels.quantize_blocks(x, n, inner, levels, scale, out);
                               return;
                             }
                             const auto keys = std::make_unique<uint32_t[]>(channels);
                             kernels.channel_keys(x, n, grid, keys.get());
                             kernels.scales_from_keys(keys.get(), channels, levels, scale);
                             if (draw) {
                               const auto [codec_seed, call_seed, first] = *draw;
                               kernels.quantize_stochastic(x, n, grid, levels, scale,
                                                           {codec_seed, call_seed, first}, out);
                             } else {
                               kernels.quantize_nearest(x, n, grid, levels, scale, out);
                             }
                           });
  return py::make_tuple(std::move(codes), std::move(scales));
}

inline double mean_magnitude_of(const Array<float>& values) {
  const float* x = values.data();
  const size_t n = size_of(values);
  return compute([&](const Kernels& kernels) {
    const uint32_t key = kernels.max_key_f32(x, n);
    if (key == 0) return 0.0;
    const int exponent = exponent_of(key);
    return widened(kernels, mean_magnitude(kernels.magnitude_sum(x, n, exponent), n, exponent));
  });
}

template <class Float>
py::array narrow(const Array<Float>& values, const std::string& dtype) {
  const size_t n = size_of(values);
  if (dtype == "float32") {
    return map<float>(values, n,
                      [](const Kernels& kernels, const Float* x, size_t count, float* out) {
                        if constexpr (sizeof(Float) == sizeof(double)) {
                          kernels.f64_to_f32(x, count, out);
                        } else {
                          std::copy_n(x, count, out);
                        }
                      });
  }
  return map<uint16_t>(values, n,
                       [&](const Kernels& kernels, const Float* x, size_t count, uint16_t* out) {
                         if constexpr (sizeof(Float) == sizeof(double)) {
                           dtype == "float16" ? kernels.f64_to_f16(x, count, out)
                                              : kernels.f64_to_bf16(x, count, out);
                         } else {
                           dtype == "float16" ? kernels.f32_to_f16(x, count, out)
                                              : kernels.f32_to_bf16(x, count, out);
                         }
                       });
}

// --- in place: at positions, and sums ------------------------------------------------------------

// Calls body(first index, how many, offset, positions from the offset) for stretches of increasing
// positions.
template <class Body>
void for_each_stretch(const int64_t* positions, size_t n, Body body) {
  constexpr size_t kStretch = 4096;
  uint32_t narrow[kStretch];
  for (size_t i = 0; i < n;) {
    const int64_t offset = positions[i];
    size_t m = 0;
    for (; i + m < n && m < kStretch &&
           positions[i + m] - offset <= std::numeric_limits<uint32_t>::max();
         ++m) {
      narrow[m] = static_cast<uint32_t>(positions[i + m] - offset);
    }
    body(i, m, offset, narrow);
    i += m;
  }
}

template <class Float>
void scatter(const Array<int64_t>& positions, const Array<Float>& values, Array<Float>& out) {
  const Float* x = values.data();
  Float* to = out.mutable_data();
  const int64_t* at = positions.data();
  const size_t n = size_of(positions);
  compute([&](const Kernels& kernels) {
    for_each_stretch(at, n, [&](size_t i, size_t count, int64_t offset, const uint32_t* narrow) {
      (kernels.*Of<Float>::scatter)(narrow, x + i, count, to + offset);
    });
  });
}

template <class Float, class Accumulator, class Add>
void bind_accumulate(py::module_& m, Add Kernels::* add) {
  m.def(
      "accumulate",
      [add](Array<Accumulator>& accumulator, const Array<Float>& values, double weight) {
        Accumulator* acc = accumulator.mutable_data();
        const Float* x = values.data();
        const size_t n = size_of(values);
        compute([&](const Kernels& kernels) {
          (kernels.*add)(x, n, narrowed<Accumulator>(kernels, weight), acc);
        });
      },
      py::arg("accumulator").noconvert(), py::arg("values").noconvert(), py::arg("weight"));
}

template <class Float, class Accumulator, class Add>
void bind_accumulate_sparse(py::module_& m, Add Kernels::* add) {
  m.def(
      "accumulate_sparse",
      [add](Array<Accumulator>& accumulator, const Array<int64_t>& positions,
            const Array<Float>& values, double weight) {
        Accumulator* acc = accumulator.mutable_data();
        const int64_t* at = positions.data();
        const Float* x = values.data();
        const size_t n = size_of(positions);
        compute([&](const Kernels& kernels) {
          for_each_stretch(at, n,
                           [&](size_t i, size_t count, int64_t offset, const uint32_t* narrow) {
                             (kernels.*add)(narrow, x + i, count,
                                            narrowed<Accumulator>(kernels, weight), acc + offset);
                           });
        });
      },
      py::arg("accumulator").noconvert(), py::arg("positions").noconvert(),
      py::arg("values").noconvert(), py::arg("weight"));
}

template <class Accumulator, class Add>
void bind_accumulate_codes(py::module_& m, Add Kernels::* add) {
  m.def(
      "accumulate_codes",
      [add](Array<Accumulator>& accumulator, const Array<int8_t>& codes, const Array<float>& scales,
            unsigned bits, size_t inner, size_t channels, double weight) {
        Accumulator* acc = accumulator.mutable_data();
        const int8_t* q = codes.data();
        const float* scale = scales.data();
        const size_t n = size_of(codes);
        compute([&](const Kernels& kernels) {
          (kernels.*add)(q, n, {inner, channels}, levels_of(bits), scale,
                         narrowed<Accumulator>(kernels, weight), acc);
        });
      },
      py::arg("accumulator").noconvert(), py::arg("codes").noconvert(),
      py::arg("scales").noconvert(), py::arg("bits"), py::arg("inner"), py::arg("channels"),
      py::arg("weight"));
}

inline uint32_t crc32(const py::object& data, uint64_t value) {
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  const auto release = std::unique_ptr<Py_buffer, void (*)(Py_buffer*)>(&view, PyBuffer_Release);
  return compute([&](const Kernels& kernels) {
    return kernels.crc32(static_cast<uint32_t>(value), static_cast<const uint8_t*>(view.buf),
                         static_cast<size_t>(view.len));
  });
}

// --- the tables ----------------------------------------------------------------------------------

template <class Float>
void bind_for(py::module_& m) {
  m.def("apply_mask", apply_mask<Float>, py::arg("values").noconvert(),
        py::arg("mask").noconvert());
  m.def("narrow", narrow<Float>, py::arg("values").noconvert(), py::arg("dtype"));
  m.def("scatter", scatter<Float>, py::arg("positions").noconvert(), py::arg("values").noconvert(),
        py::arg("out").noconvert());
}

inline void bind_isa(py::module_& m) {
  m.def("isa", [] { return kernels_in_use().name; });
  m.def("isas", [] {
    const KernelChoice* choices = nullptr;
    const size_t n = kernel_choices(&choices);
    std::vector<std::pair<std::string, bool>> names;
    for (size_t i = 0; i < n; ++i) names.emplace_back(choices[i].table->name, choices[i].usable);
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    if (!use_kernels(name.c_str()))
      throw py::value_error("this processor cannot run the instruction set '" + name + "'");
  });
}

inline void bind_ops(py::module_& parent) {
  bind_isa(parent);
  py::module_ m =
      parent.def_submodule("ops", "The kernels, with the names and meanings of ops/reference.py.");
  bind_for<float>(m);
  bind_for<double>(m);

  m.def("topk_threshold", [](const py::list& parts, uint64_t k) {
    return with_parts(parts, [&](const auto& list) { return topk_threshold(list, k); });
  });
  m.def("percentile_threshold",
        [](const py::list& parts, double percentile, const std::string& interpolation) {
          return with_parts(parts, [&](const auto& list) {
            return percentile_threshold(list, percentile, interpolation);
          });
        });
  m.def(
      "compact",
      [](const py::list& parts, double threshold, uint64_t ties) {
        return with_parts(parts, [&](const auto& list) { return compact(list, threshold, ties); });
      },
      py::arg("parts"), py::arg("threshold"), py::arg("ties") = 0);
  m.def("random_positions", random_positions, py::arg("n"), py::arg("k"), py::arg("seed"));

  m.def(
      "pack_mask",
      [](const Array<bool>& mask) {
        return map<uint8_t>(mask, (size_of(mask) + 7) / 8,
                            [](const Kernels& k, const bool* x, size_t n, uint8_t* out) {
                              k.pack_mask(bytes_of(x), n, out);
                            });
      },
      py::arg("mask").noconvert());
  m.def(
      "unpack_mask",
      [](const Array<uint8_t>& bits, size_t n) {
        return map<bool>(bits, n, [n](const Kernels& k, const uint8_t* x, size_t, bool* out) {
          k.unpack_mask(x, n, bytes_of(out));
        });
      },
      py::arg("bits").noconvert(), py::arg("n"));

  m.def("quantize", quantize, py::arg("values").noconvert(), py::arg("bits"), py::arg("inner"),
        py::arg("channels"), py::arg("draw") = py::none());
  m.def(
      "dequantize",
      [](const Array<int8_t>& codes, const Array<float>& scales, unsigned bits, size_t inner,
         size_t channels) {
        const float* scale = scales.data();
        return map<float>(codes, size_of(codes),
                          [&](const Kernels& k, const int8_t* q, size_t n, float* out) {
                            k.dequantize(q, n, {inner, channels}, levels_of(bits), scale, out);
                          });
      },
      py::arg("codes").noconvert(), py::arg("scales").noconvert(), py::arg("bits"),
      py::arg("inner"), py::arg("channels"));
  m.def(
      "pack_codes",
      [](const Array<int8_t>& codes, unsigned bits) {
        return map<uint8_t>(codes, (size_of(codes) * bits + 7) / 8,
                            [bits](const Kernels& k, const int8_t* q, size_t n, uint8_t* out) {
                              k.pack_codes(q, n, bits, out);
                            });
      },
      py::arg("codes").noconvert(), py::arg("bits"));
  m.def(
      "unpack_codes",
      [](const Array<uint8_t>& packed, unsigned bits, size_t n) {
        return map<int8_t>(packed, n, [&](const Kernels& k, const uint8_t* x, size_t, int8_t* out) {
          k.unpack_codes(x, n, bits, out);
        });
      },
      py::arg("packed").noconvert(), py::arg("bits"), py::arg("n"));

  m.def("mean_magnitude", mean_magnitude_of, py::arg("values").noconvert());
  m.def(
      "pack_signs",
      [](const Array<float>& values) {
        return map<uint8_t>(values, (size_of(values) + 7) / 8,
                            [](const Kernels& k, const float* x, size_t n, uint8_t* out) {
                              k.pack_signs(x, n, out);
                            });
      },
      py::arg("values").noconvert());
  m.def(
      "unpack_signs",
      [](const Array<uint8_t>& bits, double magnitude, size_t n) {
        return map<float>(bits, n, [&](const Kernels& k, const uint8_t* x, size_t, float* out) {
          k.unpack_signs(x, n, narrowed<float>(k, magnitude), out);
        });
      },
      py::arg("bits").noconvert(), py::arg("magnitude"), py::arg("n"));
  m.def(
      "widen",
      [](const Array<uint16_t>& bits, const std::string& dtype) {
        return map<float>(bits, size_of(bits),
                          [&](const Kernels& k, const uint16_t* x, size_t n, float* out) {
                            dtype == "float16" ? k.f16_to_f32(x, n, out) : k.bf16_to_f32(x, n, out);
                          });
      },
      py::arg("bits").noconvert(), py::arg("dtype"));

  m.def(
      "philox",
      [](uint64_t codec_seed, uint64_t call_seed, uint64_t first, size_t n) {
        auto words = array_of<uint32_t>(n);
        uint32_t* out = words.mutable_data();
        compute([&](const Kernels& k) { k.random_words({codec_seed, call_seed, first}, n, out); });
        return words;
      },
      py::arg("codec_seed"), py::arg("call_seed"), py::arg("first"), py::arg("n"));
  m.def(
      "draw_seed",
      [](uint64_t codec_seed, uint64_t call_seed, uint32_t group) {
        return draw_seed(codec_seed, call_seed, group);
      },
      py::arg("codec_seed"), py::arg("call_seed"), py::arg("group"));

  bind_accumulate<float, float>(m, &Kernels::add_f32);
  bind_accumulate<float, double>(m, &Kernels::add_f32_to_f64);
  bind_accumulate<double, double>(m, &Kernels::add_f64);
  bind_accumulate_sparse<float, float>(m, &Kernels::add_at_f32);
  bind_accumulate_sparse<float, double>(m, &Kernels::add_at_f64);
  bind_accumulate_sparse<double, double>(m, &Kernels::add_f64_at_f64);
  bind_accumulate_codes<float>(m, &Kernels::add_codes_f32);
  bind_accumulate_codes<double>(m, &Kernels::add_codes_f64);

  m.def("crc32", crc32, py::arg("data"), py::arg("value") = 0);
}

}  // namespace fedcodec::bindings
