#include "device-inl.cuh"
#include "kernels.h"

namespace fedcodec::cuda {
namespace {

// --- reading values
// ------------------------------------------------------------------------------------------------

// Where more values follow, whole words are read: of the bytes past a chunk's, fewer than kMargin.
constexpr unsigned kMargin = 8;
constexpr unsigned kMarginValues = 8 * kMargin;  // of a bit each

template <unsigned kWords>
__device__ void words_at(const uint8_t* from, uint32_t (&words)[kWords]) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  const auto* const aligned = reinterpret_cast<const uint32_t*>(from - address % 4);
  const unsigned shift = static_cast<unsigned>(address % 4) * 8;
  uint32_t all[kWords + 1];
  for (unsigned i = 0; i <= kWords; ++i) all[i] = aligned[i];
  for (unsigned i = 0; i < kWords; ++i) words[i] = __funnelshift_r(all[i], all[i + 1], shift);
}

template <class T>
__device__ T unaligned(const uint8_t* from) {
  T x;
  memcpy(&x, from, sizeof(x));
  return x;
}

// A chunk's values: by its offset, or all of a thread where whole words may be read.
class Codes {
 public:
  __device__ Codes(const CodedGroup& group, Stretch at)
      : data_(in_device_memory(group.data) + at.begin / 8 * group.bits),
        scales_(in_device_memory(group.scales)),
        bits_(group.bits),
        runs_(group.grid, at) {}

  __device__ float operator()(unsigned offset) const {
    const uint8_t* const from = data_ + offset * bits_ / 8;
    const unsigned skipped = offset * bits_ % 8;
    uint32_t bytes = from[0];
    if (skipped + bits_ > 8) bytes |= uint32_t{from[1]} << 8;
    return decoded(bytes >> skipped, scale_at(offset));
  }

  __device__ void read(float (&x)[kPerThread]) const {
    // Four codes, and the bits before them in their first byte, are at most a word.
    uint32_t codes[kRows][1];
    for (unsigned row = 0; row < kRows; ++row) {
      words_at(data_ + offset_of(row) * bits_ / 8, codes[row]);
      codes[row][0] >>= offset_of(row) * bits_ % 8;
    }
    float scale = scale_at(offset_of(0));
    const bool one = runs_.run(offset_of(0)) == runs_.run(offset_of(kRows - 1) + kRowElements - 1);
    for (unsigned i = 0; i < kPerThread; ++i) {
      const unsigned row = i / kRowElements;
      const unsigned within = i % kRowElements;
      if (!one) scale = scale_at(offset_of(row) + within);
      x[i] = decoded(codes[row][0] >> within * bits_, scale);
    }
  }

 private:
  __device__ float decoded(uint32_t code, float scale) const {
    const auto extended = static_cast<int32_t>(code << (32 - bits_)) >> (32 - bits_);
    return dequantize(static_cast<int8_t>(extended), levels_of(bits_), scale);
  }
  __device__ float scale_at(unsigned offset) const {
    return unaligned<float>(scales_ + 4 * runs_.channel(runs_.number(offset)));
  }

  const uint8_t* data_;
  const uint8_t* scales_;
  unsigned bits_;
  Runs runs_;
};

class Signs {
 public:
  __device__ Signs(const CodedGroup& group, Stretch at)
      : data_(in_device_memory(group.data) + at.begin / 8),
        plus_(unaligned<uint32_t>(in_device_memory(group.scales))) {}

  __device__ float operator()(unsigned offset) const {
    return bit_cast<float>(plus_ ^ (uint32_t{data_[offset / 8]} >> offset % 8 & 1) << 31);
  }

  __device__ void read(float (&x)[kPerThread]) const {
    for (unsigned i = 0; i < kPerThread; ++i) x[i] = (*this)(offset_of_element(i));
  }

 private:
  const uint8_t* data_;
  uint32_t plus_;
};

template <class T>
class Plain {
 public:
  using Value = std::conditional_t<std::is_same_v<T, double>, double, float>;
  __device__ Plain(const CodedGroup& group, Stretch at)
      : data_(in_device_memory(group.data) + at.begin * sizeof(T)) {}

  __device__ Value operator()(unsigned offset) const {
    return convert<Value>(unaligned<T>(data_ + offset * sizeof(T)));
  }

  __device__ void read(Value (&x)[kPerThread]) const {
    for (unsigned row = 0; row < kRows; ++row) {
      uint32_t words[sizeof(T)];
      words_at(data_ + offset_of(row) * sizeof(T), words);
      T values[kRowElements];
      memcpy(values, words, sizeof(values));
      for (unsigned i = 0; i < kRowElements; ++i)
        x[row * kRowElements + i] = convert<Value>(values[i]);
    }
  }

 private:
  const uint8_t* data_;
};

__device__ inline bool is_wide(const CodedGroup& group) {
  return group.form == Form::kPlain && group.dtype == Dtype::kFloat64;
}

// Calls f with what reads a chunk of a group that is not wide.
template <class F>
__device__ void with_reader(const CodedGroup& group, Stretch at, F&& f) {
  if (group.form == Form::kCodes) return f(Codes(group, at));
  if (group.form == Form::kSigns) return f(Signs(group, at));
  if (group.dtype == Dtype::kFloat32) return f(Plain<float>(group, at));
  if (group.dtype == Dtype::kFloat16) return f(Plain<Float16>(group, at));
  f(Plain<Bfloat16>(group, at));
}

template <class Reader, class W>
__device__ void read_chunk(const Reader& reader, const CodedGroup& group, Stretch at,
                           W (&x)[kPerThread]) {
  if (group.m - at.begin >= kChunkElements + kMarginValues) return reader.read(x);
  for (unsigned i = 0; i < kPerThread; ++i) {
    const unsigned offset = offset_of_element(i);
    x[i] = offset < at.count ? reader(offset) : 0;
  }
}

// --- writing and adding
// --------------------------------------------------------------------------------------------

// What becomes of a value that fits its tensor's dtype: it is written ...
struct Write {
  static constexpr bool kReads = false;
  template <class Out, class W>
  __device__ Out operator()(const Out&, W value) const {
    return convert<Out>(value);
  }
};

// ... or added: fl(acc + fl(weight * value)).
struct Add {
  static constexpr bool kReads = true;
  double weight;
  template <class Out, class W>
  __device__ Out operator()(const Out& acc, W value) const {
    return acc + static_cast<Out>(weight) * convert<Out>(value);
  }
};

// Rounds values to the tensor's dtype where writing them does not.
template <class Put, unsigned kCount, class W>
__device__ void fit(const Target& target, W* x) {
  if constexpr (Put::kReads) {
    with_type(target.dtype, [&](auto type) {
      using T = decltype(type);
      if constexpr (!std::is_same_v<T, double>) {
        for (unsigned i = 0; i < kCount; ++i) x[i] = convert<W>(convert<T>(x[i]));
      }
    });
  }
}

// Calls f with a value of the type that the target holds; sums are not of halves.
template <class Put, class F>
__device__ void with_held(const Target& target, F&& f) {
  with_type(target.held, [&](auto type) {
    if constexpr (!Put::kReads || sizeof(type) > 2) f(type);
  });
}

template <class Put, class W>
__device__ void put_chunk(const Target& target, Stretch at, W (&x)[kPerThread], Put put) {
  fit<Put, kPerThread>(target, x);
  with_held<Put>(target, [&](auto type) {
    using Out = decltype(type);
    Out* const to = in_device_memory(static_cast<Out*>(target.data) + at.begin);
    if (in_whole_rows(to, at.count)) {
      Row<Out> rows[kRows];
      if constexpr (Put::kReads) {
        for (unsigned row = 0; row < kRows; ++row)
          rows[row] = *reinterpret_cast<const Row<Out>*>(to + offset_of(row));
      }
      for (unsigned i = 0; i < kPerThread; ++i) {
        Out& of = rows[i / kRowElements].of[i % kRowElements];
        of = put(of, x[i]);
      }
      for (unsigned row = 0; row < kRows; ++row) store_row(rows[row], to + offset_of(row));
      return;
    }
    for (unsigned i = 0; i < kPerThread; ++i) {
      const unsigned offset = offset_of_element(i);
      if (offset < at.count) to[offset] = put(to[offset], x[i]);
    }
  });
}

// --- all of a call
// -------------------------------------------------------------------------------------------------

template <class Put>
__global__ void __launch_bounds__(kThreads)
    put_dense(const CodedGroup* groups, uint32_t count, const Target* targets, Put put) {
  const CodedGroup& group = groups[owner_of<&CodedGroup::first_chunk>(groups, count, blockIdx.x)];
  const Stretch at = stretch_of(group.first_chunk, group.m, blockIdx.x);
  const Target& target = targets[group.first_target];
  if (is_wide(group)) {
    double x[kPerThread];
    read_chunk(Plain<double>(group, at), group, at, x);
    put_chunk(target, at, x, put);
  } else {
    float x[kPerThread];
    with_reader(group, at, [&](const auto& reader) { read_chunk(reader, group, at, x); });
    put_chunk(target, at, x, put);
  }
}

// Values lie apart and wait for memory: as many threads as can be share a chunk.
constexpr unsigned kShares = 4;

// Four blocks at once are fewer than fit: to fit in more, ptxas would spill.
template <class Put>
__global__ void __launch_bounds__(kThreads, 4)
    put_sparse(const CodedGroup* groups, uint32_t count, const Target* all_targets,
               const uint32_t* all_positions, Put put) {
  const unsigned chunk = blockIdx.x / kShares;
  const CodedGroup& group = groups[owner_of<&CodedGroup::first_chunk>(groups, count, chunk)];
  const Stretch at = stretch_of(group.first_chunk, group.m, chunk);
  const Target* const targets = all_targets + group.first_target;
  const uint32_t* const positions = all_positions + group.begin + at.begin;
  const auto put_all = [&](const auto& reader) {
    for (unsigned offset = blockIdx.x % kShares * kThreads + threadIdx.x; offset < at.count;
         offset += kShares * kThreads) {
      auto x = reader(offset);
      const uint32_t position = positions[offset];
      const Target& target = targets[owner_of<&Target::first>(targets, group.targets, position)];
      fit<Put, 1>(target, &x);
      with_held<Put>(target, [&](auto type) {
        auto& of =
            in_device_memory(static_cast<decltype(type)*>(target.data))[position - target.first];
        of = put(of, x);
      });
    }
  };
  is_wide(group) ? put_all(Plain<double>(group, at)) : with_reader(group, at, put_all);
}

template <class Put>
void put_groups(const CodedGroups& groups, Put put, Workspace& workspace) {
  if (groups.positions == nullptr) {
    launch(put_dense<Put>, groups.chunks, workspace.stream(), groups.groups, groups.count,
           groups.targets, put);
  } else {
    launch(put_sparse<Put>, kShares * groups.chunks, workspace.stream(), groups.groups,
           groups.count, groups.targets, groups.positions, put);
  }
}

template <class W, class Put>
__global__ void __launch_bounds__(kThreads)
    put_sum(const void* first, Dtype held, const void* second, Target to, Put put) {
  const Stretch at = stretch_of(0, to.n, blockIdx.x);
  W x[kPerThread];
  W more[kPerThread];
  load_chunk<W>(first, held, at, x);
  load_chunk<W>(second, kDtypeOf<W>, at, more);
  for (unsigned i = 0; i < kPerThread; ++i) x[i] += more[i];
  put_chunk(to, at, x, put);
}

template <class Put>
void put_sums(const void* first, Dtype held, const void* second, bool wide, const Target& to,
              Put put, Workspace& workspace) {
  const auto kernel = wide ? put_sum<double, Put> : put_sum<float, Put>;
  launch(kernel, chunks_of(to.n), workspace.stream(), first, held, second, to, put);
}

Dtype dtype_of_sums(bool wide) { return wide ? Dtype::kFloat64 : Dtype::kFloat32; }

}  // namespace

void decode_values(const CodedGroups& groups, Workspace& workspace) {
  put_groups(groups, Write{}, workspace);
}

void accumulate_values(const CodedGroups& groups, double weight, Workspace& workspace) {
  put_groups(groups, Add{weight}, workspace);
}

void decode_sum(const void* first, const void* second, bool wide, const Target& to,
                Workspace& workspace) {
  put_sums(first, dtype_of_sums(wide), second, wide, to, Write{}, workspace);
}

void accumulate_sum(const void* first, const void* second, bool wide, const Target& to,
                    double weight, Workspace& workspace) {
  put_sums(first, dtype_of_sums(wide), second, wide, to, Add{weight}, workspace);
}

void sum(const void* update, Dtype held, const void* residual, uint64_t n, bool wide, void* out,
         Workspace& workspace) {
  const Dtype dtype = dtype_of_sums(wide);
  put_sums(update, held, residual, wide, {out, n, 0, dtype, dtype}, Write{}, workspace);
}

}  // namespace fedcodec::cuda
