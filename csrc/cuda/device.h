// The CUDA runtime as csrc/cuda uses it: errors, memory, launches.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace fedcodec::cuda {

// What the device, its driver or its memory refuses.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct OutOfMemory : DeviceError {
  using DeviceError::DeviceError;
};

void check(cudaError_t result, const char* what);

// Makes a device the current one of this thread, until the end of a call.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  bool pushed_ = false;
};

// Of calls, whose memory waits for the next; or of what outlives them, from a pool of its own that
// keeps nothing: beyond what a pool keeps, each synchronization would take the calls' memory too.
enum class Use { kCall, kLasting };

// Memory of the current device, for one stream's use. Freed with the workspace, when the stream
// gets there.
class Workspace {
 public:
  explicit Workspace(cudaStream_t stream, Use use = Use::kCall);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  cudaStream_t stream() const { return stream_; }

  // Uninitialised, aligned to 256 bytes; not null for n = 0 either.
  template <class T>
  T* array(uint64_t n) {
    static_assert(std::is_trivially_copyable_v<T>);
    return static_cast<T*>(bytes(n, sizeof(T)));
  }
  template <class T>
  T* zeros(uint64_t n) {
    T* const made = array<T>(n);
    check(cudaMemsetAsync(made, 0, n * sizeof(T), stream_), "clearing memory");
    return made;
  }
  // A copy of what may change as soon as this returns. A GPU that reads any host memory may do so
  // later, so a copy here stays until it has.
  template <class T>
  T* upload(std::span<const T> from) {
    const std::span<const std::byte> bytes = std::as_bytes(from);
    uploads_.emplace_back(bytes.begin(), bytes.end());
    T* const made = array<T>(from.size());
    copy(made, uploads_.back().data(), bytes.size(), cudaMemcpyHostToDevice);
    return made;
  }
  template <class T>
  T* upload(const std::vector<T>& from) {
    return upload(std::span<const T>(from));
  }

  // Host memory is in use until the stream is synchronized.
  void copy(void* to, const void* from, uint64_t n_bytes, cudaMemcpyKind kind);
  void synchronize();

 private:
  void* bytes(uint64_t n, size_t size);

  cudaStream_t stream_;
  cudaMemPool_t pool_;
  int failures_;  // in flight when this was made
  std::vector<void*> held_;
  std::vector<std::vector<std::byte>> uploads_;  // that may be on their way
};

// Host memory that copies to and from the device need not go around, kept for the next call.
class Pinned {
 public:
  static constexpr size_t kSize = size_t{8} << 20;

  Pinned();
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_;
};

// Copies to any host memory, all with one synchronization if they fit into pinned memory.
class Readback {
 public:
  explicit Readback(Workspace& workspace) : workspace_(workspace) {}
  ~Readback();
  Readback(const Readback&) = delete;
  Readback& operator=(const Readback&) = delete;

  void add(void* to, const void* from, uint64_t n_bytes);
  void finish();

 private:
  struct Copy {
    uint8_t* to;
    const uint8_t* from;
    uint64_t n_bytes;
  };

  Workspace& workspace_;
  Pinned pinned_;
  std::vector<Copy> copies_;
  bool in_flight_ = false;
};

// Copies from any host memory. The pinned memory is in use until the stream is synchronized.
void to_device(void* to, const void* from, uint64_t n_bytes, const Pinned& by,
               Workspace& workspace);

// Blocks of so many threads, each of which takes one chunk of a tensor at most.
constexpr unsigned kThreads = 256;
constexpr unsigned kChunkElements = 4096;
constexpr unsigned kPerThread = kChunkElements / kThreads;

constexpr uint64_t chunks_of(uint64_t n) { return (n + kChunkElements - 1) / kChunkElements; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), uint64_t blocks, cudaStream_t stream,
            Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffffu) throw DeviceError("more blocks of threads than CUDA can launch");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
        "launching a kernel");
}

}  // namespace fedcodec::cuda
