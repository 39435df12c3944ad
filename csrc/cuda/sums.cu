// Sums themselves: of tensors that are no floats, of other sums, and what becomes of them.
#include <limits>

#include "device-inl.cuh"
#include "kernels.h"

namespace fedcodec::cuda {
namespace {

template <class T>
__global__ void add_exact(const uint8_t* bytes, uint64_t n, double weight, double* acc) {
  const uint64_t i = thread_number();
  if (i >= n) return;
  T value;
  memcpy(&value, bytes + i * sizeof(T), sizeof(T));
  acc[i] = acc[i] + weight * static_cast<double>(value);
}

template <class T>
__global__ void add_sum(const T* from, uint64_t n, T* acc) {
  const uint64_t i = thread_number();
  if (i < n) acc[i] = acc[i] + from[i];
}

// A whole mean as its dtype's integer, to the nearest that there is.
template <class T>
__device__ T clipped(double whole) {
  constexpr T kLeast = std::numeric_limits<T>::min(), kMost = std::numeric_limits<T>::max();
  if (whole >= static_cast<double>(kMost)) return kMost;
  return whole <= static_cast<double>(kLeast) ? kLeast : static_cast<T>(whole);
}

template <class T>
__device__ void put(void* out, uint64_t i, T value) {
  static_cast<T*>(out)[i] = value;
}

__device__ void put_rounded(Dtype dtype, double mean, void* out, uint64_t i) {
  const double whole = rint(mean);
  switch (dtype) {
    case Dtype::kFloat32:
      return put(out, i, static_cast<float>(mean));
    case Dtype::kFloat64:
      return put(out, i, mean);
    case Dtype::kFloat16:
      return put(out, i, f64_to_f16(mean));
    case Dtype::kBfloat16:
      return put(out, i, f64_to_bf16(mean));
    case Dtype::kInt8:
      return put(out, i, clipped<int8_t>(whole));
    case Dtype::kInt16:
      return put(out, i, clipped<int16_t>(whole));
    case Dtype::kInt32:
      return put(out, i, clipped<int32_t>(whole));
    case Dtype::kInt64:
      return put(out, i, clipped<int64_t>(whole));
    case Dtype::kUint8:
      return put(out, i, clipped<uint8_t>(whole));
    case Dtype::kUint16:
      return put(out, i, clipped<uint16_t>(whole));
    case Dtype::kUint32:
      return put(out, i, clipped<uint32_t>(whole));
    case Dtype::kUint64:
      return put(out, i, clipped<uint64_t>(whole));
    case Dtype::kBool:
      return put(out, i, static_cast<uint8_t>(whole > 0));
  }
}

template <class T>
__global__ void write_mean(const T* sum, uint64_t n, double weight, double most, Dtype dtype,
                           void* out) {
  const uint64_t i = thread_number();
  if (i >= n) return;
  double mean = (0.0 + static_cast<double>(sum[i])) / weight;  // -0 becomes 0
  mean = mean > most ? most : mean;
  mean = mean < -most ? -most : mean;
  put_rounded(dtype, mean, out, i);
}

double largest_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
      return 65504.0;
    case Dtype::kBfloat16:
      return 0x1.FEp127;
    case Dtype::kFloat32:
      return static_cast<double>(std::numeric_limits<float>::max());
    default:
      return std::numeric_limits<double>::max();
  }
}

}  // namespace

void accumulate_exact(Dtype dtype, const uint8_t* bytes, uint64_t n, double weight, double* acc,
                      Workspace& workspace) {
  const auto add = [&](auto kernel) {
    launch(kernel, ceil_div(n, kThreads), workspace.stream(), bytes, n, weight, acc);
  };
  switch (dtype) {
    case Dtype::kInt8:
      return add(add_exact<int8_t>);
    case Dtype::kInt16:
      return add(add_exact<int16_t>);
    case Dtype::kInt32:
      return add(add_exact<int32_t>);
    case Dtype::kInt64:
      return add(add_exact<int64_t>);
    case Dtype::kUint16:
      return add(add_exact<uint16_t>);
    case Dtype::kUint32:
      return add(add_exact<uint32_t>);
    case Dtype::kUint64:
      return add(add_exact<uint64_t>);
    default:
      return add(add_exact<uint8_t>);
  }
}

void merge_sums(const void* from, bool wide, uint64_t n, void* acc, Workspace& workspace) {
  const auto add = [&]<class T>(void (*kernel)(const T*, uint64_t, T*)) {
    launch(kernel, ceil_div(n, kThreads), workspace.stream(), static_cast<const T*>(from), n,
           static_cast<T*>(acc));
  };
  wide ? add(add_sum<double>) : add(add_sum<float>);
}

void mean_of_sums(const void* sum, bool wide, uint64_t n, double weight, Dtype dtype, void* out,
                  Workspace& workspace) {
  const auto write =
      [&]<class T>(void (*kernel)(const T*, uint64_t, double, double, Dtype, void*)) {
        launch(kernel, ceil_div(n, kThreads), workspace.stream(), static_cast<const T*>(sum), n,
               weight, largest_of(dtype), dtype, out);
      };
  wide ? write(write_mean<double>) : write(write_mean<float>);
}

}  // namespace fedcodec::cuda
