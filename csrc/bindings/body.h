// The fused calls: what Python's tuples say becomes a plan, and body.cc runs it without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "arrays.h"
#include "fedcodec/body.h"
#include "fedcodec/parallel.h"
#include "ops.h"

namespace fedcodec::bindings {

// --- tuples to a plan
// ------------------------------------------------------------------------------------------------

// The items of a sequence as they are now: tuples do not change.
inline py::tuple to_items(py::handle object, const char* what) {
  if (PySequence_Check(object.ptr()) == 0)
    throw py::type_error(std::string(what) + " must be a sequence");
  const auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(object.ptr()));
  if (!items) throw py::error_already_set();
  return items;
}

inline py::tuple to_tuple(py::handle object, size_t least, size_t most, const char* what) {
  if (!py::isinstance<py::tuple>(object))
    throw py::type_error(std::string(what) + " must be a tuple");
  const py::tuple tuple = py::reinterpret_borrow<py::tuple>(object);
  if (tuple.size() < least || tuple.size() > most) {
    throw py::value_error(std::string(what) + " has " + std::to_string(tuple.size()) + " elements");
  }
  return tuple;
}

inline std::string to_name(py::handle object, const char* what) {
  if (!py::isinstance<py::str>(object))
    throw py::type_error(std::string(what) + " must be a string");
  return py::cast<std::string>(object);
}

inline double to_double(py::handle object) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

[[noreturn]] inline void refuse(const char* what, const std::string& value) {
  throw py::value_error("no " + std::string(what) + " is " + value);
}

inline Dtype to_dtype(py::handle object) {
  const uint64_t id = to_u64(object, "a dtype");
  if (!is_dtype(id)) refuse("dtype", std::to_string(id));
  return static_cast<Dtype>(id);
}

inline uint64_t product(std::span<const uint64_t> shape) {
  uint64_t n = 1;
  for (uint64_t size : shape) n = size == 0 ? 0 : n;
  for (uint64_t size : shape) {
    if (n != 0 && (__builtin_mul_overflow(n, size, &n) || n >> 63 != 0)) {
      throw py::value_error("a shape has 2^63 elements or more");
    }
  }
  return n;
}

// The type of the values in a float tensor's array.
inline Dtype held_in(const Elements& array, Dtype dtype) {
  if (array.is('f', sizeof(float))) return Dtype::kFloat32;
  if (array.is('f', sizeof(double))) return Dtype::kFloat64;
  const bool bits = array.is('u', sizeof(uint16_t)) || array.is('f', sizeof(uint16_t));
  if (bits && item_size(dtype) == sizeof(uint16_t)) return dtype;
  throw py::type_error(
      "a float tensor's array must be float32, float64 or the bits of a half tensor");
}

// Where the bytes of a tensor are, in an array of any shape.
inline void set_values(Tensor& tensor, const Elements& array) {
  const size_t size = item_size(tensor.dtype);
  const bool coded = is_float(tensor.dtype);
  if (coded) {
    tensor.held = held_in(array, tensor.dtype);
  } else if (array.is_float() || (array.item_size() != 1 && array.item_size() != size)) {
    throw py::type_error("the array of a tensor that is no float is not of its dtype, nor bytes");
  }
  if (array.nbytes() / (coded ? item_size(tensor.held) : size) != tensor.n ||
      (!coded && array.nbytes() % size != 0)) {
    throw py::value_error("a tensor's array has another number of elements than its shape");
  }
  tensor.data = array.data();
}

inline void set_input(Tensor& tensor, py::handle object) {
  set_values(tensor, Elements(object, "a tensor's array"));
  const bool work_values =
      item_size(tensor.dtype) == sizeof(uint16_t) && tensor.held == Dtype::kFloat32;
  if (is_float(tensor.dtype) && tensor.held != tensor.dtype && !work_values)
    throw py::type_error("a tensor's array is not of its dtype");
}

inline void set_output(Tensor& tensor, py::handle object) {
  const Elements array(object, "a tensor's array");
  set_values(tensor, array);
  if (is_float(tensor.dtype) && tensor.held != tensor.dtype)
    throw py::type_error("a tensor's array is not of its dtype");
  if (!array.writable()) throw py::value_error("a tensor's array is read-only");
}

// Values to be filled, and the update and the residual that they are the sum of.
inline void set_compensated(Tensor& tensor, const py::tuple& tuple) {
  set_input(tensor, tuple[1]);
  tensor.update = tensor.data;
  tensor.update_held = tensor.held;
  const auto work = [&](py::handle object, const char* what) {
    set_input(tensor, object);
    if (!is_float(tensor.dtype) || item_size(tensor.held) < sizeof(float))
      throw py::type_error(std::string(what) + " must be float32, or float64 for a float64 tensor");
    return tensor.data;
  };
  tensor.residual = work(tuple[2], "a residual");
  work(tuple[0], "compensated values");
  if (!Elements(tuple[0], "compensated values").writable())
    throw py::value_error("compensated values are read-only");
}

inline void set_accumulator(Tensor& tensor, py::handle object) {
  const Elements array(object, "an accumulator");
  if (array.is('f', sizeof(float)) && is_float(tensor.dtype)) {
    tensor.held = Dtype::kFloat32;
  } else if (array.is('f', sizeof(double))) {
    tensor.held = Dtype::kFloat64;
  } else {
    throw py::type_error("an accumulator must be float64, or float32 for a float tensor");
  }
  if (array.size() != tensor.n)
    throw py::value_error("an accumulator has another size than its tensor");
  if (!array.writable()) throw py::value_error("an accumulator is read-only");
  tensor.data = array.data();
}

// The tensors and the segments of bodies, read from Python's tuples once for all calls.
class Body {
 public:
  Body(const Body&) = delete;
  Body& operator=(const Body&) = delete;

 protected:
  Body(py::handle dtypes, py::handle shapes, py::handle segments, bool encodes)
      : encodes_(encodes) {
    const py::tuple ids = to_items(dtypes, "dtypes"), of_tensors = to_items(shapes, "shapes");
    if (ids.size() != of_tensors.size())
      throw py::value_error("there must be one dtype and one shape for each tensor");
    std::vector<size_t> counts;
    for (const py::handle shape : of_tensors) {
      const py::tuple items = to_items(shape, "a shape");
      for (const py::handle size : items) sizes_.push_back(to_u64(size, "a dimension"));
      counts.push_back(items.size());
    }
    // Only now do the sizes stay where they are.
    const uint64_t* next = sizes_.data();
    for (size_t i = 0; i < counts.size(); ++i) {
      const Dtype dtype = to_dtype(ids[i]);
      const std::span shape(next, counts[i]);
      tensors_.push_back({dtype, shape, product(shape), nullptr, dtype});
      next += counts[i];
    }
    std::vector<bool> used(tensors_.size());
    for (const py::handle segment : to_items(segments, "segments"))
      segments_.push_back(to_segment(segment, used));
  }

  // With what each of a call's arrays says of its tensor.
  template <class F>
  std::vector<Tensor> tensors(py::handle arrays, F&& set) const {
    std::vector<Tensor> tensors = tensors_;
    const py::tuple items = to_items(arrays, "arrays");
    if (items.size() != tensors.size())
      throw py::value_error("there must be one array for each tensor");
    for (size_t i = 0; i < tensors.size(); ++i) set(tensors[i], items[i]);
    return tensors;
  }

  const std::vector<Tensor>& shapes() const { return tensors_; }
  Plan plan(const Kernels& kernels, const std::vector<Tensor>& tensors) const {
    return {kernels, tensors, segments_};
  }

 private:
  Segment to_segment(py::handle object, std::vector<bool>& used) {
    const py::tuple tuple = to_tuple(object, 2, 2, "a segment");
    Segment segment;
    const py::tuple indices = to_items(tuple[0], "a segment's tensors");
    segment.tensors.reserve(indices.size());
    for (const py::handle index : indices) {
      const uint64_t i = to_u64(index, "a tensor's index");
      if (i >= used.size() || used[i]) refuse("tensor of a segment of its own", std::to_string(i));
      used[i] = true;
      segment.tensors.push_back(i);
    }
    segment.coder = to_coder(tuple[1]);
    return segment;
  }

  Coder to_coder(py::handle object, bool inside = false) {
    const py::tuple tuple = to_tuple(object, 3, 3, "a coder");
    const std::string kind = to_name(tuple[0], "a coder's kind");
    Coder coder;
    if (kind == "residual") {
      if (inside) throw py::value_error("residuals are nested");
      coder.terms.push_back(to_coder(tuple[1], true));
      coder.terms.push_back(to_coder(tuple[2], true));
    } else if (kind == "coder") {
      if (!tuple[1].is_none()) coder.select = to_select(tuple[1]);
      if (!tuple[2].is_none()) coder.quantize = to_quantize(tuple[2]);
      if (coder.select.kind != Select::Kind::kAll &&
          coder.quantize.kind == Quantize::Kind::kInteger &&
          coder.quantize.granularity == Quantize::Granularity::kChannel) {
        throw py::value_error("scales per channel cannot follow a select stage");
      }
    } else {
      refuse("coder", kind);
    }
    return coder;
  }

  Select to_select(py::handle object) {
    const py::tuple tuple = to_tuple(object, 2, 5, "a select stage");
    const std::string kind = to_name(tuple[0], "a select stage's kind");
    Select select;
    if (kind == "mask") {
      set_mask(select, to_tuple(object, 3, 3, "a mask stage"));
      return select;
    }
    const uint64_t scope = to_u64(tuple[1], "a scope");
    if (scope > 1) refuse("scope", std::to_string(scope));
    select.flat = scope == 0;
    if (kind == "structured") {
      const size_t size = encodes_ ? 5 : 3;
      set_structured(select, to_tuple(object, size, size, "a structured stage"));
      return select;
    }
    if (!encodes_) {
      if (kind != "sparse" && kind != "random") refuse("select stage to decode", kind);
      select.kind = kind == "random" ? Select::Kind::kRandom : Select::Kind::kSparse;
      return select;
    }
    const size_t size = kind == "random" || kind == "percentile" ? 4 : 3;
    to_tuple(object, size, size, "a select stage");
    if (kind == "topk") {
      select.kind = Select::Kind::kTopK;
      select.counts = to_numbers(tuple[2], "a number of values to keep");
    } else if (kind == "random") {
      select.kind = Select::Kind::kRandom;
      select.counts = to_numbers(tuple[2], "a number of values to keep");
      select.seeds = to_numbers(tuple[3], "a seed");
    } else if (kind == "threshold") {
      select.kind = Select::Kind::kThreshold;
      select.value = to_double(tuple[2]);
      if (!(select.value >= 0)) refuse("threshold", std::to_string(select.value));
    } else if (kind == "percentile") {
      select.kind = Select::Kind::kPercentile;
      select.value = to_double(tuple[2]);
      if (!(select.value >= 0 && select.value <= 100))
        refuse("percentile", std::to_string(select.value));
      select.interpolation = to_interpolation(to_name(tuple[3], "an interpolation"));
    } else {
      refuse("select stage to encode", kind);
    }
    return select;
  }

  static void set_structured(Select& select, const py::tuple& tuple) {
    select.kind = Select::Kind::kStructured;
    if (select.flat) throw py::value_error("channels are of each tensor by itself");
    select.axis = to_u64(tuple[2], "an axis");
    if (tuple.size() == 3) return;
    if (!tuple[3].is_none()) {
      select.value = to_double(tuple[3]);
      if (!(select.value > 0 && select.value <= 1)) refuse("density", std::to_string(select.value));
    }
    const uint64_t order = to_u64(tuple[4], "the order of a norm");
    if (order != 1 && order != 2) refuse("order of a norm", std::to_string(order));
    select.order = static_cast<int>(order);
  }

  void set_mask(Select& select, const py::tuple& tuple) {
    select.kind = Select::Kind::kMask;
    select.flat = true;
    select.n = to_u64(tuple[2], "a mask's size");
    masks_.emplace_back(tuple[1]);
    select.bits = masks_.back().get();
    const size_t whole = select.n / 8;
    const unsigned rest = select.n % 8;
    if (select.bits.size() != whole + (rest != 0) ||
        (rest != 0 && select.bits[whole] >> rest != 0)) {
      throw py::value_error("a mask's bits do not fit its size");
    }
  }

  static std::vector<uint64_t> to_numbers(py::handle object, const char* what) {
    std::vector<uint64_t> numbers;
    for (const py::handle number : to_items(object, "a stage's parameters by group")) {
      numbers.push_back(to_u64(number, what));
    }
    return numbers;
  }

  static Interpolation to_interpolation(const std::string& name) {
    if (name == "linear") return Interpolation::kLinear;
    if (name == "lower") return Interpolation::kLower;
    if (name == "higher") return Interpolation::kHigher;
    refuse("interpolation", name);
  }

  static Quantize::Granularity to_granularity(const std::string& name) {
    if (name == "block") return Quantize::Granularity::kBlock;
    if (name == "group") return Quantize::Granularity::kGroup;
    if (name == "channel") return Quantize::Granularity::kChannel;
    refuse("granularity", name);
  }

  Quantize to_quantize(py::handle object) const {
    const py::tuple tuple = to_tuple(object, 1, 7, "a quantize stage");
    const std::string kind = to_name(tuple[0], "a quantize stage's kind");
    Quantize quantize;
    if (kind == "sign") {
      to_tuple(object, 1, 1, "a sign stage");
      quantize.kind = Quantize::Kind::kSign;
    } else if (kind == "cast") {
      to_tuple(object, 2, 2, "a cast stage");
      quantize.kind = Quantize::Kind::kCast;
      quantize.dtype = to_dtype(tuple[1]);
      if (quantize.dtype != Dtype::kFloat16 && quantize.dtype != Dtype::kBfloat16) {
        throw py::value_error("a cast stage casts to float16 or bfloat16");
      }
    } else if (kind == "integer") {
      const size_t size = encodes_ ? 7 : 4;
      set_integer(quantize, to_tuple(object, size, size, "an integer stage"));
    } else {
      refuse("quantize stage", kind);
    }
    return quantize;
  }

  static void set_integer(Quantize& quantize, const py::tuple& tuple) {
    quantize.kind = Quantize::Kind::kInteger;
    const uint64_t bits = to_u64(tuple[1], "a number of bits");
    if (bits < 2 || bits > 8) refuse("integer stage's number of bits", std::to_string(bits));
    quantize.bits = static_cast<unsigned>(bits);
    quantize.granularity = to_granularity(to_name(tuple[2], "a granularity"));
    if (quantize.granularity != Quantize::Granularity::kGroup)
      quantize.size = to_u64(tuple[3], "a size or axis");
    if (quantize.granularity == Quantize::Granularity::kBlock && quantize.size == 0) {
      throw py::value_error("a block has at least one value");
    }
    if (tuple.size() == 4) return;
    quantize.stochastic = py::bool_(tuple[4]);
    quantize.codec_seed = to_u64(tuple[5], "a seed");
    quantize.call_seed = to_u64(tuple[6], "a seed");
  }

  bool encodes_;
  std::vector<uint64_t> sizes_;  // of all shapes, one after the other
  std::vector<Tensor> tensors_;
  std::vector<Segment> segments_;
  std::vector<Bytes> masks_;
};

// --- the calls
// -------------------------------------------------------------------------------------------------------

class Encoder : public Body {
 public:
  Encoder(const py::object& dtypes, const py::object& shapes, const py::object& segments)
      : Body(dtypes, shapes, segments, true),
        bound_(body_bound(plan(kernels_in_use(), this->shapes()))) {}

  py::bytes encode(const py::object& header, const py::object& arrays, bool seal,
                   const py::int_& first) const {
    constexpr size_t kChecksum = 4;
    const auto inputs = tensors(arrays, [](Tensor& tensor, py::handle object) {
      PyTuple_Check(object.ptr()) != 0
          ? set_compensated(tensor, to_tuple(object, 3, 3, "a tensor's arrays"))
          : set_input(tensor, object);
    });
    const Bytes head(header);
    const uint64_t drawn = to_u64(first, "first");
    NewBytes payload(head.get().size() + bound_ + kChecksum);
    uint8_t* const out = payload.data();
    const size_t size = compute([&](const Kernels& kernels) {
      size_t at = head.get().size();
      if (at > 0) std::memcpy(out, head.get().data(), at);
      uint32_t crc = kernels.crc32(0, out, at);
      at += encode_body(plan(kernels, inputs), drawn, {out + at, bound_}, seal ? &crc : nullptr);
      if (!seal) return at;
      std::memcpy(out + at, &crc, kChecksum);
      return at + kChecksum;
    });
    return payload.shrunk_to(size);
  }

 private:
  size_t bound_;  // of a body
};

// The body of a payload that someone else wrote.
class Stretch {
 public:
  Stretch(const py::object& payload, const py::object& start, const py::object& stop)
      : bytes_(payload), start_(to_u64(start, "start")), stop_(to_u64(stop, "stop")) {
    if (start_ > stop_ || stop_ > bytes_.get().size())
      throw py::value_error("start and stop leave the payload");
  }
  const uint8_t* data() const { return bytes_.get().data(); }
  size_t start() const { return start_; }
  size_t stop() const { return stop_; }

  // The bytes are read while the arrays are written.
  void require_apart(const std::vector<Tensor>& tensors) const {
    const auto first = reinterpret_cast<uintptr_t>(data());
    for (const Tensor& tensor : tensors) {
      const auto start = reinterpret_cast<uintptr_t>(tensor.data);
      const uintptr_t size = tensor.n * item_size(tensor.held);
      if (start < first + bytes_.get().size() && first < start + size) {
        throw py::value_error("an array shares its memory with the payload");
      }
    }
  }

 private:
  Bytes bytes_;
  size_t start_;
  size_t stop_;
};

class Decoder : public Body {
 public:
  Decoder(const py::object& dtypes, const py::object& shapes, const py::object& segments)
      : Body(dtypes, shapes, segments, false) {}

  // Into new arrays where none are given.
  py::object decode(const py::object& payload, const py::object& start, const py::object& stop,
                    const py::object& arrays) const {
    const Stretch body(payload, start, stop);
    const auto decode_to = [&](const std::vector<Tensor>& outputs) {
      compute([&](const Kernels& kernels) {
        decode_body(plan(kernels, outputs), body.data(), body.start(), body.stop());
      });
    };
    if (arrays.is_none()) {
      std::vector<Tensor> outputs = shapes();
      py::list fresh = allocate(outputs);
      decode_to(outputs);
      return fresh;
    }
    const auto outputs = tensors(arrays, set_output);
    body.require_apart(outputs);
    decode_to(outputs);
    return arrays;
  }

  void check(const py::object& payload, const py::object& start, const py::object& stop) const {
    const Stretch body(payload, start, stop);
    compute([&](const Kernels& kernels) {
      check_body(plan(kernels, shapes()), body.data(), body.start(), body.stop());
    });
  }

  std::pair<double, double> accumulate(const py::object& payload, const py::object& start,
                                       const py::object& stop, const py::object& accumulators,
                                       double weight, std::pair<double, double> bounds, bool dry,
                                       std::optional<py::list> ledger) const {
    if (!std::isfinite(static_cast<float>(weight)))
      throw py::value_error("the weight is not a finite float32");
    const Stretch body(payload, start, stop);
    const auto sums = tensors(accumulators, set_accumulator);
    body.require_apart(sums);
    const Bounds after = compute([&](const Kernels& kernels) {
      return accumulate_body(plan(kernels, sums), body.data(), body.start(), body.stop(), weight,
                             {bounds.first, bounds.second}, dry);
    });
    const std::pair<double, double> bounds_after = {after.f32, after.f64};
    if (!dry && ledger) ledger->append(bounds_after);
    return bounds_after;
  }

 private:
  static py::list allocate(std::vector<Tensor>& tensors) {
    const auto& numpy = py::detail::npy_api::get();
    py::list arrays(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      Tensor& tensor = tensors[i];
      auto array = py::reinterpret_steal<py::object>(numpy.PyArray_NewFromDescr_(
          numpy.PyArray_Type_, py::dtype(number_of(tensor.dtype)).release().ptr(),
          static_cast<int>(tensor.shape.size()),
          reinterpret_cast<const Py_intptr_t*>(tensor.shape.data()), nullptr, nullptr, 0, nullptr));
      if (!array) throw py::error_already_set();
      tensor.data = py::detail::array_proxy(array.ptr())->data;
      arrays[i] = std::move(array);
    }
    return arrays;
  }

  // NumPy's number of a type; it has no bfloat16, whose bits float16 holds.
  static int number_of(Dtype dtype) {
    using Api = py::detail::npy_api;
    constexpr int kFloat16 = 23;
    constexpr int kNumbers[] = {-1,
                                Api::NPY_FLOAT32_,
                                kFloat16,
                                kFloat16,
                                Api::NPY_FLOAT64_,
                                -1,
                                -1,
                                -1,
                                Api::NPY_INT8_,
                                Api::NPY_INT16_,
                                Api::NPY_INT32_,
                                Api::NPY_INT64_,
                                Api::NPY_UINT8_,
                                Api::NPY_UINT16_,
                                Api::NPY_UINT32_,
                                Api::NPY_UINT64_,
                                Api::NPY_BOOL_};
    return kNumbers[static_cast<uint8_t>(dtype)];
  }
};

// --- index sets by themselves
// ----------------------------------------------------------------------------------------

inline uint64_t to_group_size(const py::object& n) {
  const uint64_t size = to_u64(n, "n");
  if (size >> 63 != 0) throw py::value_error("n must be below 2^63");
  return size;
}

inline py::bytes pack_sparse(const py::object& positions, const py::object& n) {
  const Vector array(positions, "positions");
  if (!array.is('i', sizeof(int64_t))) throw py::type_error("positions must be int64");
  const std::span<const int64_t> from(static_cast<const int64_t*>(array.data()), array.size());
  const uint64_t size = to_group_size(n);
  const auto packed =
      compute([&](const Kernels& kernels) { return pack_sparse(kernels, from, size); });
  return py::bytes(reinterpret_cast<const char*>(packed.data()), packed.size());
}

inline py::tuple unpack_sparse(const py::object& buffer, const py::object& n) {
  const Bytes bytes(buffer);
  const uint64_t size = to_group_size(n);
  Reader reader(bytes.get().data(), 0, bytes.get().size());
  const SparseSet set =
      compute([&](const Kernels& kernels) { return SparseSet(kernels, reader, size); });
  auto positions = array_of<int64_t>(set.kept());
  int64_t* out = positions.mutable_data();
  compute([&](const Kernels& kernels) { set.unpack(kernels, out); });
  return py::make_tuple(std::move(positions), reader.offset());
}

// --- the table
// ---------------------------------------------------------------------------------------------------------

inline void bind_body(py::module_& m) {
  static PyObject* malformed = PyErr_NewException("fedcodec._native.Malformed", nullptr, nullptr);
  static PyObject* non_finite = PyErr_NewException("fedcodec._native.NonFinite", nullptr, nullptr);
  m.add_object("Malformed", malformed);
  m.add_object("NonFinite", non_finite);
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const Malformed& error) {
      PyErr_SetObject(malformed, py::make_tuple(error.message, error.offset).ptr());
    } catch (const NonFinite& error) {
      PyErr_SetObject(non_finite,
                      py::make_tuple(error.tensor, error.element, error.value, error.narrow).ptr());
    }
  });
  py::class_<Encoder>(m, "Encoder")
      .def(py::init<py::object, py::object, py::object>(), py::arg("dtypes"), py::arg("shapes"),
           py::arg("segments"))
      .def("encode", &Encoder::encode, py::arg("header"), py::arg("arrays"), py::arg("seal"),
           py::arg("first") = 0);
  py::class_<Decoder>(m, "Decoder")
      .def(py::init<py::object, py::object, py::object>(), py::arg("dtypes"), py::arg("shapes"),
           py::arg("segments"))
      .def("check", &Decoder::check, py::arg("payload"), py::arg("start"), py::arg("stop"))
      .def("decode", &Decoder::decode, py::arg("payload"), py::arg("start"), py::arg("stop"),
           py::arg("arrays") = py::none())
      .def("accumulate", &Decoder::accumulate, py::arg("payload"), py::arg("start"),
           py::arg("stop"), py::arg("accumulators"), py::arg("weight"), py::arg("bounds"),
           py::arg("dry") = false, py::arg("ledger") = py::none());
  m.def("describe", describe, py::arg("items"), py::arg("source") = py::none(),
        py::arg("writable") = false);
  m.def("arrays_over", arrays_over, py::arg("capsules"));
  m.def("pack_sparse", pack_sparse, py::arg("positions"), py::arg("n"));
  m.def("unpack_sparse", unpack_sparse, py::arg("buffer"), py::arg("n"));
}

}  // namespace fedcodec::bindings
