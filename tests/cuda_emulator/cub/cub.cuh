// As much of CUB as csrc/cuda uses, with the same meanings.
#pragma once

#include "cuda_runtime.h"

namespace cub {

template <class T, int kThreads>
class BlockScan {
 public:
  struct TempStorage {
    T values[kThreads + 1];
  };
  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  void ExclusiveSum(T in, T& out) {
    T total;
    ExclusiveSum(in, out, total);
  }
  void ExclusiveSum(T in, T& out, T& total) {
    storage_.values[threadIdx.x] = in;
    __syncthreads();
    if (threadIdx.x == 0) {
      T sum{};
      for (int i = 0; i < kThreads; ++i) sum += std::exchange(storage_.values[i], sum);
      storage_.values[kThreads] = sum;
    }
    __syncthreads();
    out = storage_.values[threadIdx.x];
    total = storage_.values[kThreads];
  }
  void InclusiveSum(T in, T& out) {
    ExclusiveSum(in, out);
    out += in;
  }

 private:
  TempStorage& storage_;
};

template <class T, int kThreads>
class BlockReduce {
 public:
  struct TempStorage {
    T values[kThreads];
  };
  explicit BlockReduce(TempStorage& storage) : storage_(storage) {}

  // Valid in thread 0 only.
  template <class Op>
  T Reduce(T in, Op op) {
    storage_.values[threadIdx.x] = in;
    __syncthreads();
    if (threadIdx.x != 0) return T{};
    T all = storage_.values[0];
    for (int i = 1; i < kThreads; ++i) all = op(all, storage_.values[i]);
    return all;
  }
  T Sum(T in) {
    return Reduce(in, [](T a, T b) { return static_cast<T>(a + b); });
  }

 private:
  TempStorage& storage_;
};

struct DeviceScan {
  template <class In, class Out>
  static cudaError_t ExclusiveSum(void* temporary, size_t& n_bytes, const In* in, Out* out,
                                  int64_t n, cudaStream_t) {
    if (temporary == nullptr) {
      n_bytes = 1;
      return cudaSuccess;
    }
    Out sum{};
    for (int64_t i = 0; i < n; ++i) {
      const Out next = static_cast<Out>(in[i]);
      out[i] = sum;
      sum = static_cast<Out>(sum + next);
    }
    return cudaSuccess;
  }
};

}  // namespace cub
