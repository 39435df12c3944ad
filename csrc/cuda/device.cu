#include "device.h"

#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

namespace fedcodec::cuda {
namespace {

// Memory that was given back waits for the next call; more than this goes back to the device.
constexpr uint64_t kKept = uint64_t{1} << 30;

// One for each device, never destroyed: the runtime may be gone by then.
cudaMemPool_t pool_of_this_device() {
  static std::mutex mutex;
  static auto* const pools = new std::vector<std::pair<int, cudaMemPool_t>>;
  int device = 0;
  check(cudaGetDevice(&device), "asking for the device");
  const std::lock_guard lock(mutex);
  for (const auto& [of, pool] : *pools) {
    if (of == device) return pool;
  }
  cudaMemPoolProps props = {};
  props.allocType = cudaMemAllocationTypePinned;
  props.location.type = cudaMemLocationTypeDevice;
  props.location.id = device;
  cudaMemPool_t pool = nullptr;
  check(cudaMemPoolCreate(&pool, &props), "making a memory pool");
  uint64_t kept = kKept;
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept),
        "making a memory pool");
  pools->emplace_back(device, pool);
  return pool;
}

}  // namespace

void check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or the next call would report it again
  throw DeviceError(std::string(what) + ": " + cudaGetErrorString(result));
}

Workspace::Workspace(cudaStream_t stream) : stream_(stream), pool_(pool_of_this_device()) {}

Workspace::~Workspace() {
  for (void* memory : held_) static_cast<void>(cudaFreeAsync(memory, stream_));
}

void* Workspace::bytes(uint64_t n, size_t size) {
  if (n > std::numeric_limits<size_t>::max() / size)
    throw DeviceError("more memory than can be addressed");
  const size_t n_bytes = n == 0 ? size : n * size;
  held_.reserve(held_.size() + 1);
  void* memory = nullptr;
  if (cudaMallocFromPoolAsync(&memory, n_bytes, pool_, stream_) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    throw DeviceError("out of memory for " + std::to_string(n_bytes) + " bytes of workspace");
  }
  held_.push_back(memory);
  return memory;
}

void Workspace::copy(void* to, const void* from, uint64_t n_bytes, cudaMemcpyKind kind) {
  if (n_bytes > 0) check(cudaMemcpyAsync(to, from, n_bytes, kind, stream_), "copying");
}

void Workspace::synchronize() { check(cudaStreamSynchronize(stream_), "running the kernels"); }

}  // namespace fedcodec::cuda
