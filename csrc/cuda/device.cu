#include "device.h"

#include <cudaTypedefs.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "fedcodec/threads.h"

namespace fedcodec::cuda {
namespace {

// The driver's own calls, which the runtime finds: its library is not linked.
template <class Call>
Call driver_call(const char* name, unsigned since) {
  void* found = nullptr;
  check(cudaGetDriverEntryPointByVersion(name, &found, since, cudaEnableDefault),
        "looking for the driver's calls");
  if (found == nullptr) throw DeviceError(std::string("the driver lacks ") + name);
  return reinterpret_cast<Call>(found);
}

void check_driver(CUresult result) {
  if (result == CUDA_SUCCESS) return;
  throw DeviceError("choosing the device: the driver's error " + std::to_string(result));
}

// The one that the runtime uses, never released: it holds what outlives all calls.
CUcontext context_of(int device) {
  static const auto retain =
      driver_call<PFN_cuDevicePrimaryCtxRetain_v7000>("cuDevicePrimaryCtxRetain", 7000);
  static std::mutex mutex;
  static auto* const contexts = new std::vector<std::pair<int, CUcontext>>;
  const std::lock_guard lock(mutex);
  for (const auto& [of, context] : *contexts) {
    if (of == device) return context;
  }
  check(cudaInitDevice(device, 0, 0), "choosing the device");
  CUcontext context = nullptr;
  check_driver(retain(&context, device));
  contexts->emplace_back(device, context);
  return context;
}

auto pop_context() {
  static const auto pop = driver_call<PFN_cuCtxPopCurrent_v4000>("cuCtxPopCurrent", 4000);
  return pop;
}

// More than this of the calls' memory goes back to the device.
constexpr uint64_t kKept = uint64_t{1} << 30;

// Two for each device, never destroyed: the runtime may be gone by then.
cudaMemPool_t pool_of_this_device(Use use) {
  static std::mutex mutex;
  static auto* const pools = new std::vector<std::tuple<int, Use, cudaMemPool_t>>;
  int device = 0;
  check(cudaGetDevice(&device), "asking for the device");
  const std::lock_guard lock(mutex);
  for (const auto& [of, for_what, pool] : *pools) {
    if (of == device && for_what == use) return pool;
  }
  cudaMemPoolProps props = {};
  props.allocType = cudaMemAllocationTypePinned;
  props.location.type = cudaMemLocationTypeDevice;
  props.location.id = device;
  cudaMemPool_t pool = nullptr;
  check(cudaMemPoolCreate(&pool, &props), "making a memory pool");
  uint64_t kept = use == Use::kCall ? kKept : 0;
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept),
        "making a memory pool");
  pools->emplace_back(device, use, pool);
  return pool;
}

// Those not in use, never destroyed.
struct Idle {
  std::mutex mutex;
  std::vector<uint8_t*> blocks;
};
Idle& idle() {
  static auto* const only = new Idle;
  return *only;
}

// The device copies one while the host copies the next.
constexpr size_t kSlice = size_t{1} << 20;

// One thread alone is slower than the device.
void copy_on_host(uint8_t* to, const uint8_t* from, uint64_t n) {
  for_ranges(n, 64, [=](uint64_t begin, uint64_t end) {
    std::memcpy(to + begin, from + begin, end - begin);
  });
}

}  // namespace

void check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or the next call would report it again
  const std::string message = std::string(what) + ": " + cudaGetErrorString(result);
  if (result == cudaErrorMemoryAllocation) throw OutOfMemory(message);
  throw DeviceError(message);
}

// To choose a device and the one before again would make a context on that: hundreds of megabytes
// on the first GPU, for every process that uses another.
OnDevice::OnDevice(int device) {
  int before = 0;
  check(cudaGetDevice(&before), "asking for the device");
  if (before == device) return;
  static const auto push = driver_call<PFN_cuCtxPushCurrent_v4000>("cuCtxPushCurrent", 4000);
  pop_context();
  check_driver(push(context_of(device)));
  pushed_ = true;
}

OnDevice::~OnDevice() {
  CUcontext popped = nullptr;
  if (pushed_) static_cast<void>(pop_context()(&popped));
}

Workspace::Workspace(cudaStream_t stream, Use use)
    : stream_(stream), pool_(pool_of_this_device(use)), failures_(std::uncaught_exceptions()) {}

Workspace::~Workspace() {
  // A call that ends early leaves work behind; what that reads and writes is about to be given up.
  if (std::uncaught_exceptions() > failures_ || !uploads_.empty())
    static_cast<void>(cudaStreamSynchronize(stream_));
  for (void* memory : held_) static_cast<void>(cudaFreeAsync(memory, stream_));
}

void* Workspace::bytes(uint64_t n, size_t size) {
  if (n > std::numeric_limits<size_t>::max() / size)
    throw DeviceError("more memory than can be addressed");
  const size_t n_bytes = n == 0 ? size : n * size;
  held_.reserve(held_.size() + 1);
  void* memory = nullptr;
  check(cudaMallocFromPoolAsync(&memory, n_bytes, pool_, stream_), "allocating a workspace");
  held_.push_back(memory);
  return memory;
}

void Workspace::copy(void* to, const void* from, uint64_t n_bytes, cudaMemcpyKind kind) {
  if (n_bytes > 0) check(cudaMemcpyAsync(to, from, n_bytes, kind, stream_), "copying");
}

Pinned::Pinned() : data_(nullptr) {
  {
    const std::lock_guard lock(idle().mutex);
    if (!idle().blocks.empty()) {
      data_ = idle().blocks.back();
      idle().blocks.pop_back();
      return;
    }
  }
  void* made = nullptr;
  check(cudaHostAlloc(&made, kSize, cudaHostAllocDefault), "allocating pinned host memory");
  data_ = static_cast<uint8_t*>(made);
}

Pinned::~Pinned() {
  const std::lock_guard lock(idle().mutex);
  idle().blocks.push_back(data_);
}

// The pinned memory goes to another call: nothing may be on its way to it.
Readback::~Readback() {
  if (in_flight_) static_cast<void>(cudaStreamSynchronize(workspace_.stream()));
}

void Readback::add(void* to, const void* from, uint64_t n_bytes) {
  if (n_bytes > 0)
    copies_.push_back({static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), n_bytes});
}

void Readback::finish() {
  for (size_t next = 0; next < copies_.size();) {
    size_t used = 0;
    std::vector<Copy> slices;  // to pinned memory and on
    in_flight_ = true;
    while (next < copies_.size() && used < Pinned::kSize) {
      Copy& copy = copies_[next];
      const size_t n = std::min<uint64_t>(Pinned::kSize - used, copy.n_bytes);
      workspace_.copy(pinned_.data() + used, copy.from, n, cudaMemcpyDeviceToHost);
      slices.push_back({copy.to, pinned_.data() + used, n});
      copy = {copy.to + n, copy.from + n, copy.n_bytes - n};
      used += n;
      next += copy.n_bytes == 0;
    }
    workspace_.synchronize();
    in_flight_ = false;
    for (const Copy& slice : slices) copy_on_host(slice.to, slice.from, slice.n_bytes);
  }
  copies_.clear();
}

void to_device(void* to, const void* from, uint64_t n_bytes, const Pinned& by,
               Workspace& workspace) {
  for (uint64_t at = 0; at < n_bytes; at += kSlice) {
    const size_t n = std::min<uint64_t>(kSlice, n_bytes - at);
    uint8_t* const slice = by.data() + at % Pinned::kSize;
    if (at > 0 && slice == by.data()) workspace.synchronize();
    copy_on_host(slice, static_cast<const uint8_t*>(from) + at, n);
    workspace.copy(static_cast<uint8_t*>(to) + at, slice, n, cudaMemcpyHostToDevice);
  }
}

void Workspace::synchronize() {
  check(cudaStreamSynchronize(stream_), "running the kernels");
  uploads_.clear();
}

}  // namespace fedcodec::cuda
