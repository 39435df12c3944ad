// CUDA on the CPU, for machines without a GPU: as much of the runtime and of the device's language
// as csrc/cuda uses. Blocks run one after the other, the threads of a block as fibers that change
// at barriers only, in an order that changes too, so that what needs a barrier and has none is
// likely to show. Device memory is host memory, poisoned when it is new.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define FEDCODEC_CUDA_EMULATED 1
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

// --- the language
// --------------------------------------------------------------------------------------------------

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
// As nvcc has them, they may stand for other types' bytes.
struct [[gnu::may_alias]] alignas(8) uint2 {
  uint32_t x, y;
};
struct [[gnu::may_alias]] alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

constexpr int warpSize = 32;
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

constexpr size_t kStack = size_t{1} << 17;
constexpr unsigned kWarp = 32;

struct Exchange {
  uint64_t values[kWarp];
  unsigned ballot;  // of those that are not 0
};

struct Warp {
  Exchange exchanges[2];
  unsigned arrived = 0;
  unsigned live = 0;
  uint64_t generation = 0;
};

struct Thread {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf at;
  bool started = false;
  bool done = false;
  const uint64_t* waits_for = nullptr;  // a generation
  uint64_t seen = 0;                    // of it
  dim3 index;
  void* own = nullptr;  // AddressSanitizer's
};

// One block at a time, also when several host threads launch.
struct Block {
  std::recursive_mutex mutex;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned live = 0, arrived = 0;
  uint64_t generation = 0;
  unsigned current = 0;
  jmp_buf scheduler;
  const void* stack = nullptr;  // the scheduler's
  size_t stack_size = 0;
  std::function<void()> body;
};
inline Block block;

inline Thread& self() { return block.threads[block.current]; }

// AddressSanitizer is told of every change of stacks; a null place to keep its own ends the fiber.
#if defined(__SANITIZE_ADDRESS__)
inline void leave(void** own, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(own, stack, size);
}
inline void arrive(void* own, const void** from, size_t* size) {
  __sanitizer_finish_switch_fiber(own, from, size);
}
#else
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
#endif

inline void yield() {
  leave(&self().own, block.stack, block.stack_size);
  if (_setjmp(self().at) == 0) _longjmp(block.scheduler, 1);
  arrive(self().own, &block.stack, &block.stack_size);
}

inline void await(const uint64_t& generation, uint64_t seen) {
  self().waits_for = &generation;
  self().seen = seen;
  yield();
}

inline void release_if_complete() {
  if (block.live > 0 && block.arrived == block.live) {
    block.arrived = 0;
    ++block.generation;
  }
}
inline void release_if_complete(Warp& warp) {
  if (warp.live > 0 && warp.arrived == warp.live) {
    warp.arrived = 0;
    ++warp.generation;
  }
}

inline void barrier() {
  const uint64_t seen = block.generation;
  ++block.arrived;
  release_if_complete();
  if (block.generation == seen) await(block.generation, seen);
}

[[noreturn]] inline void partial_warp() {
  std::fprintf(stderr, "cuda emulator: a warp-wide call of part of a warp\n");
  std::abort();
}

// The values of a full warp's threads: only whole warps may call it.
inline const Exchange& exchange(unsigned mask, uint64_t value) {
  if (mask != ~0u) partial_warp();
  const unsigned lane = block.current % kWarp;
  Warp& warp = block.warps[block.current / kWarp];
  const uint64_t seen = warp.generation;
  Exchange& all = warp.exchanges[seen % 2];
  if (warp.arrived == 0) all.ballot = 0;
  all.values[lane] = value;
  all.ballot |= unsigned{value != 0} << lane;
  ++warp.arrived;
  release_if_complete(warp);
  if (warp.generation == seen) await(warp.generation, seen);
  return all;
}

inline void enter() {
  arrive(nullptr, &block.stack, &block.stack_size);
  block.body();
  Thread& thread = self();
  thread.done = true;
  --block.live;
  Warp& warp = block.warps[block.current / kWarp];
  --warp.live;
  release_if_complete();
  release_if_complete(warp);
  leave(nullptr, block.stack, block.stack_size);
  _longjmp(block.scheduler, 1);
}

// A function of its own: nothing of the scheduler's may live in registers across the jump.
__attribute__((noinline)) inline void resume(Thread& thread) {
  void* own = nullptr;
  leave(&own, thread.stack.get(), kStack);
  if (_setjmp(block.scheduler) != 0) return arrive(own, nullptr, nullptr);
  if (thread.started) _longjmp(thread.at, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline void run_block(unsigned n_threads) {
  if (block.threads.size() < n_threads) block.threads.resize(n_threads);
  block.warps.assign((n_threads + kWarp - 1) / kWarp, {});
  block.live = n_threads;
  block.arrived = 0;
  for (unsigned i = 0; i < n_threads; ++i) {
    Thread& thread = block.threads[i];
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    thread.started = thread.done = false;
    thread.waits_for = nullptr;
    thread.index = dim3(i % blockDim.x, i / blockDim.x);
    ++block.warps[i / kWarp].live;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, enter, 0);
  }
  for (bool forward = blockIdx.x % 2 == 0; block.live > 0; forward = !forward) {
    bool progress = false;
    for (unsigned step = 0; step < n_threads; ++step) {
      const unsigned i = forward ? step : n_threads - 1 - step;
      Thread& thread = block.threads[i];
      if (thread.done || (thread.waits_for && *thread.waits_for == thread.seen)) continue;
      thread.waits_for = nullptr;
      block.current = i;
      threadIdx = thread.index;
      resume(thread);
      progress = true;
    }
    if (!progress) {
      std::fprintf(stderr, "cuda emulator: a barrier that not all threads reach\n");
      std::abort();
    }
  }
}

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace cuda_emulator

inline void __syncthreads() { cuda_emulator::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_emulator::exchange(mask, 0); }
inline void __threadfence() {}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_emulator::exchange(mask, predicate != 0).ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == ~0u;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  const uint64_t word = cuda_emulator::to_word(value);
  return cuda_emulator::from_word<T>(cuda_emulator::exchange(mask, word).values[from & 31]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = cuda_emulator::block.current % 32;
  return __shfl_sync(mask, value, static_cast<int>(lane < by ? lane : lane - by));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = cuda_emulator::block.current % 32;
  return __shfl_sync(mask, value, static_cast<int>(lane + by > 31 ? lane : lane + by));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
  const unsigned lane = cuda_emulator::block.current % 32;
  return __shfl_sync(mask, value, static_cast<int>(lane) ^ by);
}

inline unsigned min(unsigned a, unsigned b) { return std::min(a, b); }
inline unsigned max(unsigned a, unsigned b) { return std::max(a, b); }
inline int min(int a, int b) { return std::min(a, b); }

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = static_cast<T>(before + value);
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}
template <class T>
T atomicMin(T* at, T value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <class T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at = before | value;
  return before;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
void __stwb(T* at, T value) {
  *at = value;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}

// --- the runtime
// ---------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
};
using cudaStream_t = struct CUstream_st*;
using cudaMemPool_t = struct CUmemPool_st*;
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice
};
constexpr unsigned cudaHostAllocDefault = 0;
#define cudaStreamLegacy (reinterpret_cast<cudaStream_t>(1))

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "emulated error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
constexpr int kCudaDevices = 2;
inline cudaError_t cudaGetDeviceCount(int* n) {
  *n = kCudaDevices;
  return cudaSuccess;
}

// Of a device, where what a thread does goes: its own choice, or what the driver's calls push.
struct CUctx_st {
  int device;
  std::atomic<bool> made = false;
};
inline CUctx_st cuda_emulated_contexts[kCudaDevices] = {{0}, {1}};
inline thread_local int cuda_emulated_device = 0;
inline thread_local std::vector<CUctx_st*> cuda_emulated_pushed;

inline cudaError_t cudaGetDevice(int* device) {
  *device =
      cuda_emulated_pushed.empty() ? cuda_emulated_device : cuda_emulated_pushed.back()->device;
  return cudaSuccess;
}
// As all calls that need a context make it where it is not.
inline int cuda_emulated_current() {
  int device = 0;
  cudaGetDevice(&device);
  cuda_emulated_contexts[device].made = true;
  return device;
}
inline cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  if (device < 0 || device >= kCudaDevices) return cudaErrorInvalidDevice;
  cuda_emulated_contexts[device].made = true;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (!cuda_emulated_pushed.empty()) cuda_emulated_pushed.pop_back();
  cuda_emulated_device = device;
  return cudaInitDevice(device, 0, 0);
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

enum cudaMemoryType { cudaMemoryTypeHost = 1, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  *attributes = {cudaMemoryTypeDevice, 0};
  return cudaSuccess;
}

enum cudaMemAllocationType { cudaMemAllocationTypePinned = 1 };
enum cudaMemLocationType { cudaMemLocationTypeDevice = 1 };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold = 4 };
struct cudaMemPoolProps {
  cudaMemAllocationType allocType;
  struct {
    cudaMemLocationType type;
    int id;
  } location;
};
struct CUmemPool_st {
  uint64_t kept = 0;
  std::atomic<uint64_t> used = 0;
};
inline std::deque<CUmemPool_st> cuda_emulated_pools;
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  *pool = &cuda_emulated_pools.emplace_back();
  return cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr, void* kept) {
  pool->kept = *static_cast<uint64_t*>(kept);
  return cudaSuccess;
}

// Tests set how many bytes there are, for all that is allocated from then on.
inline std::atomic<size_t> cuda_emulated_memory = SIZE_MAX;
constexpr unsigned char kCudaPoison = 0xa5;

// A copy from host memory waits until the thread's next call for a stream.
struct CudaEmulatedCopy {
  void* to;
  const void* from;
  size_t n;
};
inline thread_local std::vector<CudaEmulatedCopy> cuda_emulated_copies;
inline void cuda_emulated_catch_up() {
  for (const auto& [to, from, n] : cuda_emulated_copies) std::memcpy(to, from, n);
  cuda_emulated_copies.clear();
}

// In front of what is allocated.
struct alignas(256) CudaEmulatedBlock {
  cudaMemPool_t pool;
  uint64_t n;
};
inline cudaError_t cudaMallocFromPoolAsync(void** memory, size_t n, cudaMemPool_t pool,
                                           cudaStream_t) {
  cuda_emulated_current();
  if (n > cuda_emulated_memory) return cudaErrorMemoryAllocation;
  cuda_emulated_memory -= n;
  void* const block = std::aligned_alloc(256, sizeof(CudaEmulatedBlock) + (n + 255) / 256 * 256);
  if (block == nullptr) return cudaErrorMemoryAllocation;
  *memory = new (block) CudaEmulatedBlock{pool, n} + 1;
  pool->used += n;
  std::memset(*memory, kCudaPoison, n);
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  cuda_emulated_catch_up();
  CudaEmulatedBlock* const block = static_cast<CudaEmulatedBlock*>(memory) - 1;
  block->pool->used -= block->n;
  std::free(block);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, size_t n, unsigned) {
  cuda_emulated_current();
  *memory = std::malloc(n);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind,
                                   cudaStream_t) {
  cuda_emulated_catch_up();
  if (kind == cudaMemcpyHostToDevice) {
    cuda_emulated_copies.push_back({to, from, n});
  } else {
    std::memcpy(to, from, n);
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t) {
  cuda_emulated_catch_up();
  std::memset(to, value, n);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  cuda_emulated_catch_up();
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_emulator;
  cuda_emulated_catch_up();
  const std::lock_guard lock(block.mutex);
  const std::tuple<std::remove_cv_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  block.body = [&] { std::apply(kernel, values); };
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y);
      run_block(blockDim.x * blockDim.y);
    }
  }
  return cudaSuccess;
}
