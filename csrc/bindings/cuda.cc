// The extension module fedcodec._cuda: bodies of tensors in a GPU's memory, with the names and
// meanings of _native's calls.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "body.h"
#include "cuda/body.h"
#include "cuda/kernels.h"
#include "cuda/ops.h"
#include "cuda_ops.h"
#include "device_arrays.h"

namespace fedcodec::bindings {
namespace {

// Memory of a device that lives as long as this.
class Memory {
 public:
  Memory(uint64_t n_bytes, int device, uint64_t stream, bool zeros) : device_(device) {
    on_device(device, [&] {
      workspace_ = std::make_unique<gpu::Workspace>(to_stream(stream), gpu::Use::kLasting);
      data_ = zeros ? workspace_->zeros<uint8_t>(n_bytes) : workspace_->array<uint8_t>(n_bytes);
      workspace_->synchronize();
    });
  }
  ~Memory() {
    try {
      on_device(device_, [&] { workspace_.reset(); });
    } catch (const gpu::DeviceError&) {  // the process ends, and the memory with it
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint64_t pointer() const { return reinterpret_cast<uintptr_t>(data_); }

 private:
  int device_;
  std::unique_ptr<gpu::Workspace> workspace_;
  uint8_t* data_ = nullptr;
};

Place place_of(py::handle arrays) {
  Place place;
  for (const py::handle item : to_items(arrays, "arrays")) {
    // Of compensated values, the update: what is ours waits for its work.
    place.add(to_array(PyTuple_Check(item.ptr()) != 0 ? to_tuple(item, 3, 3, "a tensor's arrays")[1]
                                                      : py::reinterpret_borrow<py::object>(item)));
  }
  return place;
}

void set_values(Tensor& tensor, const DeviceArray& array) {
  if (array.n != tensor.n)
    throw py::value_error("a tensor's array has another number of elements than its shape");
  tensor.data = array.data();
  tensor.held = array.dtype;
}

void set_input(Tensor& tensor, const DeviceArray& array) {
  set_values(tensor, array);
  const bool work_values = item_size(tensor.dtype) == sizeof(uint16_t) && is_float(tensor.dtype) &&
                           tensor.held == Dtype::kFloat32;
  if (tensor.held != tensor.dtype && !work_values)
    throw py::type_error("a tensor's array is not of its dtype");
}

void set_output(Tensor& tensor, py::handle object) {
  set_values(tensor, to_array(object));
  if (tensor.held != tensor.dtype) throw py::type_error("a tensor's array is not of its dtype");
}

void set_compensated(Tensor& tensor, const py::tuple& tuple) {
  set_input(tensor, to_array(tuple[1]));
  tensor.update = tensor.data;
  tensor.update_held = tensor.held;
  for (const size_t which : {2, 0}) {
    set_input(tensor, to_array(tuple[which]));
    if (!is_float(tensor.dtype) || item_size(tensor.held) < sizeof(float))
      throw py::type_error("values and residuals must be float32, or float64 for a float64 tensor");
    if (which == 2) tensor.residual = tensor.data;
  }
}

void set_sum(Tensor& tensor, py::handle object) {
  set_values(tensor, to_array(object));
  const bool narrow = tensor.held == Dtype::kFloat32 && is_float(tensor.dtype);
  if (!narrow && tensor.held != Dtype::kFloat64)
    throw py::type_error("an accumulator must be float64, or float32 for a float tensor");
}

class DeviceEncoder : public Body {
 public:
  DeviceEncoder(const py::object& dtypes, const py::object& shapes, const py::object& segments)
      : Body(dtypes, shapes, segments, true) {}

  // Throws gpu::Refused.
  py::bytes encode(const py::object& header, const py::object& arrays, bool seal,
                   const py::int_& first) const {
    constexpr size_t kChecksum = 4;
    const auto inputs = tensors(arrays, [](Tensor& tensor, py::handle object) {
      PyTuple_Check(object.ptr()) != 0
          ? set_compensated(tensor, to_tuple(object, 3, 3, "a tensor's arrays"))
          : set_input(tensor, to_array(object));
    });
    const Bytes head(header);
    const uint64_t drawn = to_u64(first, "first");
    const size_t before = head.get().size();
    std::optional<NewBytes> payload;
    size_t size = 0;
    const auto allocate = [&](size_t body) {
      const py::gil_scoped_acquire acquired;
      size = before + body;
      payload.emplace(size + (seal ? kChecksum : 0));
      std::memcpy(payload->data(), head.get().data(), before);
      return payload->data() + before;
    };
    const Kernels& kernels = kernels_in_use();
    const Place place = place_of(arrays);
    const bool encoded = on_device(place.device, [&] {
      if (!gpu::encode_body(plan(kernels, inputs), drawn, place.stream(), allocate)) return false;
      if (!seal) return true;
      const uint32_t crc = checksum(kernels, 0, payload->data(), size);
      std::memcpy(payload->data() + size, &crc, kChecksum);
      return true;
    });
    if (!encoded) throw gpu::Refused{};
    return payload->shrunk_to(size + (seal ? kChecksum : 0));
  }
};

class DeviceDecoder : public Decoder {
 public:
  using Decoder::Decoder;

  py::object decode(const py::object& payload, const py::object& start, const py::object& stop,
                    const py::object& arrays) const {
    const Stretch body(payload, start, stop);
    const auto outputs = tensors(arrays, set_output);
    const Kernels& kernels = kernels_in_use();
    const Place place = place_of(arrays);
    on_device(place.device, [&] {
      gpu::decode_body(plan(kernels, outputs), body.data(), body.start(), body.stop(),
                       place.stream());
    });
    return arrays;
  }

  std::pair<double, double> accumulate(const py::object& payload, const py::object& start,
                                       const py::object& stop, const py::object& accumulators,
                                       double weight, std::pair<double, double> bounds, bool dry,
                                       std::optional<py::list> ledger) const {
    if (!std::isfinite(static_cast<float>(weight)))
      throw py::value_error("the weight is not a finite float32");
    const Stretch body(payload, start, stop);
    const auto sums = tensors(accumulators, set_sum);
    const Kernels& kernels = kernels_in_use();
    const Place place = place_of(accumulators);
    const Bounds after = on_device(place.device, [&] {
      return gpu::accumulate_body(plan(kernels, sums), body.data(), body.start(), body.stop(),
                                  weight, {bounds.first, bounds.second}, dry, place.stream());
    });
    const std::pair<double, double> bounds_after = {after.f32, after.f64};
    if (!dry && ledger) ledger->append(bounds_after);
    return bounds_after;
  }
};

// Runs body(workspace) where an array is.
template <class F>
void run_at(const DeviceArray& array, F body) {
  on_device(array.device, [&] {
    gpu::Workspace workspace(to_stream(array.stream));
    body(workspace);
    workspace.synchronize();
  });
}

void require_same_size(const DeviceArray& one, uint64_t n) {
  if (one.n != n) throw py::value_error("arrays of different sizes");
}

void merge(const DeviceArray& from, const DeviceArray& sum) {
  require_same_size(from, sum.n);
  if (from.dtype != sum.dtype) throw py::type_error("sums of different dtypes");
  run_at(sum, [&](gpu::Workspace& workspace) {
    gpu::merge_sums(from.data(), sum.dtype == Dtype::kFloat64, sum.n, sum.data(), workspace);
  });
}

void mean(const DeviceArray& sum, double weight, const DeviceArray& out) {
  require_same_size(out, sum.n);
  // On the stream of what is written: what its memory was used for before is ordered there.
  run_at(out, [&](gpu::Workspace& workspace) {
    gpu::mean_of_sums(sum.data(), sum.dtype == Dtype::kFloat64, sum.n, weight, out.dtype,
                      out.data(), workspace);
  });
}

py::bytes to_host(const DeviceArray& array) {
  NewBytes bytes(array.nbytes());
  uint8_t* const to = bytes.data();
  run_at(array, [&](gpu::Workspace& workspace) {
    gpu::Readback readback(workspace);
    readback.add(to, array.data(), array.nbytes());
    readback.finish();
  });
  return bytes.shrunk_to(array.nbytes());
}

void from_host(const DeviceArray& array, const py::object& data) {
  const Bytes bytes(data);
  if (bytes.get().size() != array.nbytes())
    throw py::value_error("an array of another size than the bytes");
  on_device(array.device, [&] {
    const gpu::Pinned by;  // outlives the workspace, which waits where a call fails
    gpu::Workspace workspace(to_stream(array.stream));
    gpu::to_device(array.data(), bytes.get().data(), array.nbytes(), by, workspace);
    workspace.synchronize();
  });
}

std::pair<int, int> versions() {
  int driver = 0, runtime = 0;
  static_cast<void>(cudaDriverGetVersion(&driver));
  static_cast<void>(cudaRuntimeGetVersion(&runtime));
  return {driver, runtime};
}

int device_count() {
  int n = 0;
  gpu::check(cudaGetDeviceCount(&n), "looking for devices");
  return n;
}

// Which device memory is on; -1 if it is none's.
int device_of(uint64_t pointer) {
  cudaPointerAttributes found = {};
  gpu::check(
      cudaPointerGetAttributes(&found, reinterpret_cast<void*>(static_cast<uintptr_t>(pointer))),
      "looking at a pointer");
  const bool device = found.type == cudaMemoryTypeDevice || found.type == cudaMemoryTypeManaged;
  return device ? found.device : -1;
}

}  // namespace
}  // namespace fedcodec::bindings

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
  using namespace fedcodec::bindings;
  m.doc() = "fedcodec's calls for arrays in a GPU's memory.";
#if defined(FEDCODEC_CUDA_EMULATED)
  m.attr("emulated") = true;
  m.def("set_memory", [](size_t n_bytes) { cuda_emulated_memory = n_bytes; });
  m.def("in_use", [] {
    std::vector<std::pair<uint64_t, uint64_t>> pools;  // what each keeps, and what is in use
    for (const CUmemPool_st& pool : cuda_emulated_pools) pools.emplace_back(pool.kept, pool.used);
    return pools;
  });
  m.def("has_context", [](int device) { return cuda_emulated_contexts[device].made.load(); });
#else
  m.attr("emulated") = false;
#endif
  static PyObject* malformed = PyErr_NewException("fedcodec._cuda.Malformed", nullptr, nullptr);
  static PyObject* non_finite = PyErr_NewException("fedcodec._cuda.NonFinite", nullptr, nullptr);
  static PyObject* refused = PyErr_NewException("fedcodec._cuda.Refused", nullptr, nullptr);
  m.add_object("Malformed", malformed);
  m.add_object("NonFinite", non_finite);
  m.add_object("Refused", refused);
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const fedcodec::Malformed& error) {
      PyErr_SetObject(malformed, py::make_tuple(error.message, error.offset).ptr());
    } catch (const fedcodec::cuda::Refused&) {
      PyErr_SetNone(refused);
    } catch (const fedcodec::cuda::OutOfMemory& error) {
      py::set_error(py::module_::import("fedcodec.errors").attr("DeviceMemoryError"), error.what());
    } catch (const fedcodec::cuda::DeviceError& error) {
      py::set_error(py::module_::import("fedcodec.errors").attr("BackendError"), error.what());
    }
  });
  py::class_<DeviceArray>(m, "DeviceArray")
      .def(py::init([](uint64_t pointer, uint64_t n, unsigned dtype, int device, uint64_t stream,
                       py::object owner) {
             if (!fedcodec::is_dtype(dtype)) refuse("dtype", std::to_string(dtype));
             return DeviceArray{pointer, n,      static_cast<fedcodec::Dtype>(dtype),
                                device,  stream, std::move(owner)};
           }),
           py::arg("pointer"), py::arg("n"), py::arg("dtype"), py::arg("device"), py::arg("stream"),
           py::arg("owner"))
      .def_readonly("pointer", &DeviceArray::pointer)
      .def_readonly("n", &DeviceArray::n)
      .def_readonly("device", &DeviceArray::device)
      .def_readonly("stream", &DeviceArray::stream)
      .def_property_readonly("dtype",
                             [](const DeviceArray& array) { return static_cast<int>(array.dtype); })
      .def_property_readonly("nbytes", &DeviceArray::nbytes)
      .def("__reduce__", [](const DeviceArray& array) {
        return py::make_tuple(
            py::module_::import("fedcodec.gpu").attr("restored"),
            py::make_tuple(to_host(array), array.n, static_cast<int>(array.dtype), array.device));
      });
  py::class_<Memory>(m, "Memory")
      .def(py::init<uint64_t, int, uint64_t, bool>(), py::arg("nbytes"), py::arg("device"),
           py::arg("stream"), py::arg("zeros"))
      .def_property_readonly("pointer", &Memory::pointer);
  py::class_<DeviceEncoder>(m, "Encoder")
      .def(py::init<py::object, py::object, py::object>(), py::arg("dtypes"), py::arg("shapes"),
           py::arg("segments"))
      .def("encode", &DeviceEncoder::encode, py::arg("header"), py::arg("arrays"), py::arg("seal"),
           py::arg("first") = 0);
  py::class_<DeviceDecoder>(m, "Decoder")
      .def(py::init<py::object, py::object, py::object>(), py::arg("dtypes"), py::arg("shapes"),
           py::arg("segments"))
      .def("check", &Decoder::check, py::arg("payload"), py::arg("start"), py::arg("stop"))
      .def("decode", &DeviceDecoder::decode, py::arg("payload"), py::arg("start"), py::arg("stop"),
           py::arg("arrays"))
      .def("accumulate", &DeviceDecoder::accumulate, py::arg("payload"), py::arg("start"),
           py::arg("stop"), py::arg("accumulators"), py::arg("weight"), py::arg("bounds"),
           py::arg("dry") = false, py::arg("ledger") = py::none())
      .def("decode_on_host", &Decoder::decode, py::arg("payload"), py::arg("start"),
           py::arg("stop"), py::arg("arrays"))
      .def("accumulate_on_host", &Decoder::accumulate, py::arg("payload"), py::arg("start"),
           py::arg("stop"), py::arg("accumulators"), py::arg("weight"), py::arg("bounds"),
           py::arg("dry") = false, py::arg("ledger") = py::none());
  bind_isa(m);  // the module has a core of its own
  bind_threads(m);
  bind_cuda_ops(m);
  m.def("merge", merge, py::arg("source"), py::arg("sum"));
  m.def("mean", mean, py::arg("sum"), py::arg("weight"), py::arg("out"));
  m.def("to_host", to_host, py::arg("array"));
  m.def("from_host", from_host, py::arg("array"), py::arg("data"));
  m.def("versions", versions);
  m.def("device_count", device_count);
  m.def("device_of", device_of, py::arg("pointer"));
}
