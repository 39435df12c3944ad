// Arrays in a GPU's memory as Python hands them over, and how calls on them run.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/device.h"
#include "fedcodec/body.h"
#include "fedcodec/float_env.h"
#include "ops.h"

namespace fedcodec::bindings {

namespace gpu = fedcodec::cuda;

inline cudaStream_t to_stream(uint64_t stream) {
  return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(stream));
}

// Elements side by side in a GPU's memory, which `owner` keeps alive; work on them goes to a
// stream.
struct DeviceArray {
  uint64_t pointer;
  uint64_t n;
  Dtype dtype;
  int device;
  uint64_t stream;
  py::object owner;

  void* data() const { return reinterpret_cast<void*>(static_cast<uintptr_t>(pointer)); }
  uint64_t nbytes() const { return n * item_size(dtype); }
};

inline const DeviceArray& to_array(py::handle object) {
  if (!py::isinstance<DeviceArray>(object))
    throw py::type_error("a tensor's array must be a DeviceArray");
  return *py::cast<const DeviceArray*>(object);
}

// Runs body() as all work on a GPU runs: there, and without the GIL.
template <class F>
auto on_device(int device, F body) {
  const ReleasedGil released;
  const DefaultFloatEnv env;
  const gpu::OnDevice current(device);
  return body();
}

// Where the arrays of a call are, all of them.
struct Place {
  int device = 0;
  std::vector<uint64_t> streams = {};  // that others' work on them may be on

  void add(const DeviceArray& array) {
    device = array.device;
    if (std::find(streams.begin(), streams.end(), array.stream) == streams.end())
      streams.push_back(array.stream);
  }

  // The stream for the call's own work, once that of the others is done.
  cudaStream_t stream() const {
    for (size_t i = 1; i < streams.size(); ++i)
      gpu::check(cudaStreamSynchronize(to_stream(streams[i])), "waiting for a stream");
    return to_stream(streams.empty() ? 0 : streams[0]);
  }
};

}  // namespace fedcodec::bindings
