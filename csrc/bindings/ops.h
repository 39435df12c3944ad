// The kernels one by one, for ops/cpu.py: names and meanings of ops/reference.py, in the submodule
// `ops`. ops/__init__.py has checked the arguments but for values that are not finite; here only
// types and layouts are, by the casters (no argument converts).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
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
#include "fedcodec/parallel.h"
#include "fedcodec/select.h"
#include "fedcodec/threads.h"

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

// Lets others have the GIL. At the end of the interpreter a thread that asks for it back is unwound
// or kept waiting, as versions differ; here it always waits, for C++ destructors cannot be unwound.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();
    }
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

// Runs body(kernels) as all tensor-sized work runs: without the GIL and in the default
// floating-point mode.
template <class Body>
auto compute(Body body) {
  const Kernels& kernels = kernels_in_use();
  const ReleasedGil released;
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

// A value that is not finite, by itself or as a narrower type: the first of its array.
struct NotFinite {
  size_t element;
  double value;
  std::string as = {};
};

inline bool is_finite(uint32_t key) { return key < kInfinityKey32; }
inline bool is_finite(uint64_t key) { return key < kInfinityKey64; }

// Throws NotFinite; element 0 of x is counted as `first`.
template <class Float>
void require_finite(const Kernels& kernels, const Float* x, size_t n, size_t first = 0) {
  if (is_finite(largest_key(kernels, x, n))) return;
  const size_t i =
      static_cast<size_t>(std::find_if(x, x + n, [](Float v) { return !std::isfinite(v); }) - x);
  throw NotFinite{first + i, widened(kernels, x[i])};
}

// Calls body(first, how many) for ranges of n elements whose bits fill bytes.
template <class Body>
void in_ranges(size_t n, Body body) {
  for_ranges(n, size_t{1} << 14, [&](uint64_t begin, uint64_t end) { body(begin, end - begin); });
}

// Stays in cache between a check and the work; whole bytes of bits.
constexpr size_t kStretch = 4096;

// Calls body(start, length) for stretches of finite values; throws NotFinite at the first other.
template <class Float, class Body>
void for_finite(const Kernels& kernels, const Float* x, size_t n, Body body) {
  for_ranges(n, kStretch, [&](uint64_t begin, uint64_t end) {
    for (size_t start = begin; start < end; start += kStretch) {
      const size_t length = std::min(kStretch, end - start);
      require_finite(kernels, x + start, length, start);
      body(start, length);
    }
  });
}

template <class T>
size_t size_of(const Array<T>& array) {
  return static_cast<size_t>(array.size());
}

template <class T>
Array<T> array_of(size_t n) {
  return Array<T>(static_cast<py::ssize_t>(n));
}

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

  void require_finite(const Kernels& kernels) const {
    size_t first = 0;
    for (const auto part : spans_) {
      bindings::require_finite(kernels, part.data(), part.size(), first);
      first += part.size();
    }
  }

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
    parts.require_finite(kernels);
    const auto cut = fedcodec::topk_threshold(kernels, parts.get(), k);
    return std::pair(widened(kernels, magnitude_of(cut.key)), cut.ties);
  });
  return py::make_tuple(threshold, ties);
}

inline Interpolation interpolation_of(const std::string& name) {
  return name == "lower"    ? Interpolation::kLower
         : name == "higher" ? Interpolation::kHigher
                            : Interpolation::kLinear;
}

template <class Float>
double percentile_threshold(const PartList<Float>& parts, double percentile,
                            const std::string& name) {
  const Interpolation interpolation = interpolation_of(name);
  return compute([&](const Kernels& kernels) {
    parts.require_finite(kernels);
    return widened(kernels,
                   fedcodec::percentile_threshold(kernels, parts.get(), percentile, interpolation));
  });
}

template <class Float>
using Pieces = std::vector<Selection<Float>>;

// Copies what was kept of elements that are counted from `first`.
template <class Float>
void copy_pieces(const Pieces<Float>& pieces, int64_t first, int64_t* positions, Float* values) {
  for_each_piece<Float>(pieces,
                        [&](const Selection<Float>& piece, size_t from, size_t count, size_t to) {
                          const uint32_t* const kept = piece.positions.get() + from;
                          std::transform(kept, kept + count, positions + to,
                                         [first](uint32_t position) { return first + position; });
                          std::copy_n(piece.values.get() + from, count, values + to);
                        });
}

// Calls body(first element, parts) for stretches of at most kMostInOnePass elements.
template <class Float, class Body>
void for_each_pass(Parts<Float> parts, Body body) {
  std::vector<std::span<const Float>> some;
  uint64_t first = 0;
  uint64_t n = 0;
  const auto flush = [&] {
    body(first, Parts<Float>(some));
    some.clear();
    first += n;
    n = 0;
  };
  for (auto part : parts) {
    for (; part.size() > kMostInOnePass - n; flush()) {
      some.push_back(part.first(kMostInOnePass - n));
      part = part.subspan(kMostInOnePass - n);
      n = kMostInOnePass;
    }
    some.push_back(part);
    n += part.size();
  }
  flush();
}

template <class Float>
py::tuple compact(const PartList<Float>& parts, double threshold, uint64_t ties) {
  struct Found {
    uint64_t first;
    size_t size;
    Pieces<Float> kept;
  };
  std::vector<Found> found;
  size_t size = 0;
  compute([&](const Kernels& kernels) {
    // What is not finite is above each cut.
    const auto largest = key_of(std::numeric_limits<Float>::max());
    Cut<KeyOf<Float>> cut = {key_of(narrowed<Float>(kernels, threshold)), ties};
    if (cut.key > largest) cut = {largest, 0};
    for_each_pass(parts.get(), [&](uint64_t first, Parts<Float> some) {
      Pieces<Float> pieces = select(kernels, some, cut);
      size_t above = 0;
      for (const auto& [positions, values, m] : pieces) {
        if (!is_finite(largest_key(kernels, values.get(), m))) parts.require_finite(kernels);
        if (cut.ties > 0) above += count_all_above(kernels, values.get(), m, cut.key);
      }
      const size_t m = size_of<Float>(pieces);
      if (cut.ties > 0) cut.ties -= m - above;
      found.push_back({first, m, std::move(pieces)});
      size += m;
    });
  });
  auto positions = array_of<int64_t>(size);
  auto values = array_of<Float>(size);
  int64_t* at = positions.mutable_data();
  Float* x = values.mutable_data();
  compute([&](const Kernels&) {
    for (const auto& [first, m, kept] : found) {
      copy_pieces(kept, static_cast<int64_t>(first), at, x);
      at += m;
      x += m;
    }
  });
  return py::make_tuple(std::move(positions), std::move(values));
}

template <class Float>
py::tuple topk(const PartList<Float>& parts, uint64_t k) {
  uint64_t n = 0;
  for (const auto part : parts.get()) n += part.size();
  if (n > kMostInOnePass) {
    const py::tuple cut = topk_threshold(parts, k);
    return compact(parts, py::cast<double>(cut[0]), py::cast<uint64_t>(cut[1]));
  }
  auto positions = array_of<int64_t>(k);
  auto values = array_of<Float>(k);
  int64_t* at = positions.mutable_data();
  Float* x = values.mutable_data();
  compute([&](const Kernels& kernels) {
    copy_pieces(fedcodec::topk(kernels, parts.get(), k, nullptr), 0, at, x);
    // What is not finite is larger than all others.
    if (k == 0 || !is_finite(max_key(kernels, x, k))) parts.require_finite(kernels);
  });
  return py::make_tuple(std::move(positions), std::move(values));
}

inline Array<int64_t> random_positions(uint64_t n, uint64_t k, uint64_t seed) {
  auto positions = array_of<int64_t>(k);
  uint64_t* out = reinterpret_cast<uint64_t*>(positions.mutable_data());
  compute([&](const Kernels& kernels) { sorted_random_positions(kernels, seed, n, k, out); });
  return positions;
}

// --- maps: n elements in, a known number out -----------------------------------------------------

// Where a result is to be written, if not to a new array.
template <class T>
using Out = std::optional<Array<T>>;

template <class T>
Array<T> out_or_new(const Out<T>& out, size_t n) {
  return out ? *out : array_of<T>(n);
}

// Calls body(kernels, input, n, output) for an output of `length` elements.
template <class To, class From, class Body>
Array<To> map(const Array<From>& in, size_t length, const Out<To>& out, Body body) {
  auto result = out_or_new(out, length);
  const From* from = in.data();
  To* to = result.mutable_data();
  const size_t n = size_of(in);
  compute([&](const Kernels& kernels) { body(kernels, from, n, to); });
  return result;
}

template <class Float>
Array<Float> apply_mask(const Array<Float>& values, const Array<bool>& mask,
                        const Out<Float>& out) {
  const uint8_t* keep = reinterpret_cast<const uint8_t*>(mask.data());
  return map<Float>(values, size_of(values), out,
                    [&](const Kernels& kernels, const Float* x, size_t n, Float* masked) {
                      for_finite(kernels, x, n, [&](size_t start, size_t length) {
                        uint8_t bits[kStretch / 8];
                        kernels.pack_mask(keep + start, length, bits);
                        fedcodec::apply_mask(kernels, x + start, bits, length, masked + start);
                      });
                    });
}

inline const uint8_t* bytes_of(const bool* mask) { return reinterpret_cast<const uint8_t*>(mask); }
inline uint8_t* bytes_of(bool* mask) { return reinterpret_cast<uint8_t*>(mask); }

inline py::tuple quantize(const Array<float>& values, unsigned bits, size_t inner, size_t channels,
                          const std::optional<std::tuple<uint64_t, uint64_t, uint64_t>>& draw,
                          const Out<int8_t>& codes_out, const Out<float>& scales_out) {
  auto scales = out_or_new(scales_out, channels);
  float* scale = scales.mutable_data();
  std::optional<Draw> drawn;
  if (draw) drawn = {std::get<0>(*draw), std::get<1>(*draw), std::get<2>(*draw)};
  auto codes = map<int8_t>(
      values, size_of(values), codes_out,
      [&](const Kernels& kernels, const float* x, size_t n, int8_t* out) {
        if (!is_finite(fedcodec::quantize(kernels, x, n, {inner, channels}, bits, drawn, scale,
                                          Codes::kBytes, reinterpret_cast<uint8_t*>(out))))
          require_finite(kernels, x, n);
      });
  return py::make_tuple(std::move(codes), std::move(scales));
}

inline double mean_magnitude_of(const Array<float>& values) {
  const float* x = values.data();
  const size_t n = size_of(values);
  return compute([&](const Kernels& kernels) {
    const uint32_t key = largest_key(kernels, x, n);
    if (!is_finite(key)) require_finite(kernels, x, n);
    return widened(kernels, mean_magnitude(kernels, x, n, key));
  });
}

inline uint32_t narrow_key(float x) { return key_of(x); }
inline uint32_t narrow_key(uint16_t bits) { return bits & 0x7fffu; }
inline uint32_t largest_narrow(const Kernels& kernels, const float* x, size_t n) {
  return kernels.max_key_f32(x, n);
}
inline uint32_t largest_narrow(const Kernels& kernels, const uint16_t* x, size_t n) {
  return kernels.max_key_u16(x, n);
}

// A narrower type: its infinity's key, and how values become it.
template <class Float, class To>
struct Narrower {
  std::string name;
  uint32_t infinity;
  void (*convert)(const Kernels&, const Float*, size_t, To*);
};

template <class Float, class To>
Array<To> narrow_to(const Narrower<Float, To>& type, const Array<Float>& values, bool finite,
                    const py::object& out) {
  return map<To>(values, size_of(values), py::cast<Out<To>>(out),
                 [&](const Kernels& kernels, const Float* x, size_t n, To* to) {
                   if (!finite)
                     return in_ranges(n, [&](size_t i, size_t count) {
                       type.convert(kernels, x + i, count, to + i);
                     });
                   for_finite(kernels, x, n, [&](size_t start, size_t length) {
                     To* const first = to + start;
                     type.convert(kernels, x + start, length, first);
                     if (largest_narrow(kernels, first, length) < type.infinity) return;
                     const size_t i = static_cast<size_t>(
                         std::find_if(first, first + length,
                                      [&](To v) { return narrow_key(v) >= type.infinity; }) -
                         to);
                     const double infinity = std::numeric_limits<double>::infinity();
                     throw NotFinite{i, std::signbit(x[i]) ? -infinity : infinity, type.name};
                   });
                 });
}

// With `finite`, throws NotFinite for what is not finite, or becomes so.
template <class Float>
py::array narrow(const Array<Float>& values, const std::string& dtype, const py::object& out,
                 bool finite) {
  constexpr bool wide = sizeof(Float) == sizeof(double);
  if (dtype == "float32") {
    const auto convert = [](const Kernels& k, const Float* x, size_t n, float* to) {
      if constexpr (wide) {
        k.f64_to_f32(x, n, to);
      } else {
        std::copy_n(x, n, to);
      }
    };
    return narrow_to<Float, float>({dtype, kInfinityKey32, convert}, values, finite, out);
  }
  const auto convert_f16 = [](const Kernels& k, const Float* x, size_t n, uint16_t* to) {
    if constexpr (wide) {
      k.f64_to_f16(x, n, to);
    } else {
      k.f32_to_f16(x, n, to);
    }
  };
  const auto convert_bf16 = [](const Kernels& k, const Float* x, size_t n, uint16_t* to) {
    if constexpr (wide) {
      k.f64_to_bf16(x, n, to);
    } else {
      k.f32_to_bf16(x, n, to);
    }
  };
  if (dtype == "float16")
    return narrow_to<Float, uint16_t>({dtype, 0x7c00, convert_f16}, values, finite, out);
  return narrow_to<Float, uint16_t>({dtype, 0x7f80, convert_bf16}, values, finite, out);
}

// Throws std::invalid_argument for codes of more bits.
inline void require_bits(const int8_t* codes, size_t n, unsigned bits) {
  const int end = 1 << (bits - 1);
  uint8_t all = 0;
  for (size_t i = 0; i < n; ++i) all |= static_cast<uint8_t>(codes[i] + end);
  if (all >> bits != 0)
    throw std::invalid_argument("codes of " + std::to_string(bits) + " bits are from " +
                                std::to_string(-end) + " to " + std::to_string(end - 1));
}

// --- in place: at positions, and sums ------------------------------------------------------------

// Calls body(first index, how many, offset, positions from the offset) for stretches of increasing
// positions.
template <class Body>
void for_each_stretch(const int64_t* positions, size_t n, Body body) {
  run_ranges(cut_ranges(n, 1, kLeastPositions), [&](uint64_t begin, uint64_t end) {
    uint32_t narrow[kStretch];
    for (size_t i = begin; i < end;) {
      const int64_t offset = positions[i];
      const auto is_near = [&](int64_t position) {
        return position - offset <= std::numeric_limits<uint32_t>::max();
      };
      const int64_t* const first = positions + i;
      const int64_t* last = first + std::min<uint64_t>(kStretch, end - i);
      if (!is_near(last[-1])) last = std::partition_point(first, last, is_near);
      std::transform(first, last, narrow, [offset](int64_t position) {
        return static_cast<uint32_t>(position - offset);
      });
      const size_t m = static_cast<size_t>(last - first);
      body(i, m, offset, narrow);
      i += m;
    }
  });
}

template <class Float>
void scatter(const Array<int64_t>& positions, const Array<Float>& values, Array<Float>& out) {
  const Float* x = values.data();
  Float* to = out.mutable_data();
  const int64_t* at = positions.data();
  const size_t n = size_of(positions);
  compute([&](const Kernels& kernels) {
    require_finite(kernels, x, n);
    for_each_stretch(at, n, [&](size_t i, size_t count, int64_t offset, const uint32_t* narrow) {
      fedcodec::scatter(kernels, narrow, x + i, count, to + offset);
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
          require_finite(kernels, x, n);
          const auto factor = narrowed<Accumulator>(kernels, weight);
          in_ranges(n,
                    [&](size_t i, size_t count) { (kernels.*add)(x + i, count, factor, acc + i); });
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
          require_finite(kernels, x, n);
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
          const auto factor = narrowed<Accumulator>(kernels, weight);
          in_ranges(n, [&](size_t i, size_t count) {
            const auto part = [&](size_t at, size_t n_of_part, Grid grid,
                                  const float* scales_of_part) {
              (kernels.*add)(q + i + at, n_of_part, grid, levels_of(bits), scales_of_part, factor,
                             acc + i + at);
            };
            for_each_grid({inner, channels}, scale, i, count, part);
          });
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
    return checksum(kernels, static_cast<uint32_t>(value), static_cast<const uint8_t*>(view.buf),
                    static_cast<size_t>(view.len));
  });
}

// --- the tables ----------------------------------------------------------------------------------

template <class Float>
void bind_for(py::module_& m) {
  m.def("apply_mask", apply_mask<Float>, py::arg("values").noconvert(), py::arg("mask").noconvert(),
        py::arg("out").noconvert() = py::none());
  m.def("narrow", narrow<Float>, py::arg("values").noconvert(), py::arg("dtype"),
        py::arg("out") = py::none(), py::arg("finite") = false);
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

inline void bind_threads(py::module_& m) {
  m.def("num_threads", thread_count);
  m.def("set_num_threads", set_thread_count);
}

inline void bind_ops(py::module_& parent) {
  bind_isa(parent);
  bind_threads(parent);
  py::module_ m =
      parent.def_submodule("ops", "The kernels, with the names and meanings of ops/reference.py.");
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const NotFinite& found) {
      const std::string message = "values" + (found.as.empty() ? "" : " as " + found.as) +
                                  ": element " + std::to_string(found.element) + " is " +
                                  std::string(py::str(py::float_(found.value)));
      py::set_error(py::module_::import("fedcodec.errors").attr("NonFiniteError"), message.c_str());
    }
  });
  bind_for<float>(m);
  bind_for<double>(m);

  m.def("topk_threshold", [](const py::list& parts, uint64_t k) {
    return with_parts(parts, [&](const auto& list) { return topk_threshold(list, k); });
  });
  m.def("topk", [](const py::list& parts, uint64_t k) {
    return with_parts(parts, [&](const auto& list) { return topk(list, k); });
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

  const auto into = py::arg("out").noconvert() = py::none();
  m.def(
      "pack_mask",
      [](const Array<bool>& mask, const Out<uint8_t>& out) {
        return map<uint8_t>(mask, (size_of(mask) + 7) / 8, out,
                            [](const Kernels& k, const bool* x, size_t n, uint8_t* bits) {
                              in_ranges(n, [&](size_t i, size_t count) {
                                k.pack_mask(bytes_of(x) + i, count, bits + i / 8);
                              });
                            });
      },
      py::arg("mask").noconvert(), into);
  m.def(
      "unpack_mask",
      [](const Array<uint8_t>& bits, size_t n, const Out<bool>& out) {
        return map<bool>(bits, n, out, [n](const Kernels& k, const uint8_t* x, size_t, bool* mask) {
          in_ranges(n, [&](size_t i, size_t count) {
            k.unpack_mask(x + i / 8, count, bytes_of(mask) + i);
          });
        });
      },
      py::arg("bits").noconvert(), py::arg("n"), into);

  m.def("quantize", quantize, py::arg("values").noconvert(), py::arg("bits"), py::arg("inner"),
        py::arg("channels"), py::arg("draw") = py::none(),
        py::arg("codes_out").noconvert() = py::none(),
        py::arg("scales_out").noconvert() = py::none());
  m.def(
      "dequantize",
      [](const Array<int8_t>& codes, const Array<float>& scales, unsigned bits, size_t inner,
         size_t channels, const Out<float>& out) {
        const float* scale = scales.data();
        return map<float>(codes, size_of(codes), out,
                          [&](const Kernels& k, const int8_t* q, size_t n, float* values) {
                            in_ranges(n, [&](size_t i, size_t count) {
                              const auto part = [&](size_t at, size_t n_of_part, Grid grid,
                                                    const float* scales_of_part) {
                                k.dequantize(q + i + at, n_of_part, grid, levels_of(bits),
                                             scales_of_part, values + i + at);
                              };
                              for_each_grid({inner, channels}, scale, i, count, part);
                            });
                          });
      },
      py::arg("codes").noconvert(), py::arg("scales").noconvert(), py::arg("bits"),
      py::arg("inner"), py::arg("channels"), into);
  m.def(
      "pack_codes",
      [](const Array<int8_t>& codes, unsigned bits, const Out<uint8_t>& out) {
        return map<uint8_t>(codes, (size_of(codes) * bits + 7) / 8, out,
                            [bits](const Kernels& k, const int8_t* q, size_t n, uint8_t* packed) {
                              in_ranges(n, [&](size_t first, size_t count) {
                                for (size_t i = first; i < first + count; i += kStretch) {
                                  const size_t length = std::min(kStretch, first + count - i);
                                  require_bits(q + i, length, bits);
                                  k.pack_codes(q + i, length, bits, packed + i / 8 * bits);
                                }
                              });
                            });
      },
      py::arg("codes").noconvert(), py::arg("bits"), into);
  m.def(
      "unpack_codes",
      [](const Array<uint8_t>& packed, unsigned bits, size_t n, const Out<int8_t>& out) {
        return map<int8_t>(packed, n, out,
                           [&](const Kernels& k, const uint8_t* x, size_t, int8_t* codes) {
                             in_ranges(n, [&](size_t i, size_t count) {
                               k.unpack_codes(x + i / 8 * bits, count, bits, codes + i);
                             });
                           });
      },
      py::arg("packed").noconvert(), py::arg("bits"), py::arg("n"), into);

  m.def("mean_magnitude", mean_magnitude_of, py::arg("values").noconvert());
  m.def(
      "pack_signs",
      [](const Array<float>& values, const Out<uint8_t>& out) {
        return map<uint8_t>(values, (size_of(values) + 7) / 8, out,
                            [](const Kernels& k, const float* x, size_t n, uint8_t* bits) {
                              for_finite(k, x, n, [&](size_t start, size_t length) {
                                k.pack_signs(x + start, length, bits + start / 8);
                              });
                            });
      },
      py::arg("values").noconvert(), into);
  m.def(
      "unpack_signs",
      [](const Array<uint8_t>& bits, double magnitude, size_t n, const Out<float>& out) {
        return map<float>(bits, n, out,
                          [&](const Kernels& k, const uint8_t* x, size_t, float* values) {
                            const float value = narrowed<float>(k, magnitude);
                            in_ranges(n, [&](size_t i, size_t count) {
                              k.unpack_signs(x + i / 8, count, value, values + i);
                            });
                          });
      },
      py::arg("bits").noconvert(), py::arg("magnitude"), py::arg("n"), into);
  m.def(
      "widen",
      [](const Array<uint16_t>& bits, const std::string& dtype, const Out<float>& out) {
        const bool bfloat16 = dtype == "bfloat16";
        return map<float>(
            bits, size_of(bits), out,
            [&](const Kernels& k, const uint16_t* x, size_t n, float* values) {
              const auto convert = bfloat16 ? k.bf16_to_f32 : k.f16_to_f32;
              in_ranges(n, [&](size_t i, size_t count) { convert(x + i, count, values + i); });
            });
      },
      py::arg("bits").noconvert(), py::arg("dtype"), into);

  m.def(
      "philox",
      [](uint64_t codec_seed, uint64_t call_seed, uint64_t first, size_t n,
         const Out<uint32_t>& out) {
        auto result = out_or_new(out, n);
        uint32_t* words = result.mutable_data();
        compute([&](const Kernels& k) {
          in_ranges(n, [&](size_t i, size_t count) {
            k.random_words({codec_seed, call_seed, first + i}, count, words + i);
          });
        });
        return result;
      },
      py::arg("codec_seed"), py::arg("call_seed"), py::arg("first"), py::arg("n"), into);
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
