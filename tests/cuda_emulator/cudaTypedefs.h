// The driver's calls, as much of them as csrc/cuda asks the runtime for.
#pragma once

#include "cuda_runtime.h"

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_CONTEXT = 201 };
using CUcontext = CUctx_st*;
using CUdevice = int;
using PFN_cuDevicePrimaryCtxRetain_v7000 = CUresult (*)(CUcontext*, CUdevice);
using PFN_cuCtxPushCurrent_v4000 = CUresult (*)(CUcontext);
using PFN_cuCtxPopCurrent_v4000 = CUresult (*)(CUcontext*);

constexpr unsigned long long cudaEnableDefault = 0;

inline CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (device < 0 || device >= kCudaDevices) return CUDA_ERROR_INVALID_CONTEXT;
  *context = &cuda_emulated_contexts[device];
  (*context)->made = true;
  return CUDA_SUCCESS;
}
inline CUresult cuCtxPushCurrent(CUcontext context) {
  cuda_emulated_pushed.push_back(context);
  return CUDA_SUCCESS;
}
inline CUresult cuCtxPopCurrent(CUcontext* context) {
  if (cuda_emulated_pushed.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = cuda_emulated_pushed.back();
  cuda_emulated_pushed.pop_back();
  return CUDA_SUCCESS;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** found, unsigned,
                                                    unsigned long long) {
  const std::pair<const char*, void*> all[] = {
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(cuDevicePrimaryCtxRetain)},
      {"cuCtxPushCurrent", reinterpret_cast<void*>(cuCtxPushCurrent)},
      {"cuCtxPopCurrent", reinterpret_cast<void*>(cuCtxPopCurrent)},
  };
  *found = nullptr;
  for (const auto& [name, call] : all) {
    if (std::strcmp(name, symbol) == 0) *found = call;
  }
  return cudaSuccess;
}
