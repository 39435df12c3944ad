// The GPU's selection against the CPU's.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "fedcodec/arith.h"
#include "fedcodec/kernels.h"
#include "fedcodec/select.h"

namespace fedcodec::cuda {
namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (!ok && ++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

enum class Fill { kNormal, kHeavy, kEqual, kZeros, kFewNonZero, kTwo, kRising, kFalling, kOdd };
constexpr Fill kFills[] = {Fill::kNormal, Fill::kHeavy,      Fill::kEqual,
                           Fill::kZeros,  Fill::kFewNonZero, Fill::kTwo,
                           Fill::kRising, Fill::kFalling,    Fill::kOdd};

double value_of(Fill fill, uint64_t i, uint64_t n, std::mt19937_64& random) {
  constexpr double kTiny = std::numeric_limits<float>::denorm_min();
  constexpr double kOdd[] = {0.0, -0.0, kTiny, -kTiny, 0x1p-126, 1.0, -1.0, 3e38};
  switch (fill) {
    case Fill::kNormal:
      return std::normal_distribution<double>()(random);
    case Fill::kHeavy:
      return std::student_t_distribution<double>(2)(random);
    case Fill::kEqual:
      return i % 2 == 0 ? 0.5 : -0.5;
    case Fill::kZeros:
      return i % 3 == 0 ? -0.0 : 0.0;
    case Fill::kFewNonZero:
      return random() % 5000 == 0 ? static_cast<double>(random() % 7) - 3 : 0;
    case Fill::kTwo:
      return random() % 2 == 0 ? 1 : -2;
    case Fill::kRising:
      return static_cast<double>(i) / static_cast<double>(n);
    case Fill::kFalling:
      return static_cast<double>(n - i) / static_cast<double>(n);
    case Fill::kOdd:
      break;
  }
  return kOdd[random() % std::size(kOdd)];
}

struct Shape {
  uint64_t n;
  uint32_t group;
  Dtype held;
  Fill fill;
  bool aligned;
};

// Tensors on the device, and as the CPU's work values.
template <class W>
struct Tensors {
  std::vector<std::vector<W>> values;  // of the parts
  std::vector<std::vector<W>> flat;    // of the groups
  std::vector<uint64_t> sizes;         // of the groups
  std::vector<Part> host;
  cuda::Parts parts;

  Tensors(const std::vector<Shape>& shapes, uint32_t groups, Workspace& workspace)
      : flat(groups), sizes(groups) {
    std::mt19937_64 random(shapes.size() + shapes[0].n);
    uint32_t chunks = 0;
    for (const Shape& shape : shapes) {
      std::vector<uint8_t> bytes;
      values.emplace_back();
      for (uint64_t i = 0; i < shape.n; ++i)
        add(value_of(shape.fill, i, shape.n, random), shape.held, bytes);
      const size_t size = item_size(shape.held);
      auto* const data = workspace.array<uint8_t>(bytes.size() + size) + (shape.aligned ? 0 : size);
      workspace.copy(data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice);
      workspace.synchronize();
      host.push_back({data, shape.n, sizes[shape.group], shape.group, chunks, shape.held});
      sizes[shape.group] += shape.n;
      chunks += static_cast<uint32_t>(chunks_of(shape.n));
      auto& all = flat[shape.group];
      all.insert(all.end(), values.back().begin(), values.back().end());
    }
    parts = {workspace.upload(host), static_cast<uint32_t>(host.size()), chunks, groups};
  }

  void add(double x, Dtype held, std::vector<uint8_t>& bytes) {
    const auto append = [&](auto raw) {
      const auto* const from = reinterpret_cast<const uint8_t*>(&raw);
      bytes.insert(bytes.end(), from, from + sizeof(raw));
    };
    const float narrow = static_cast<float>(x);
    if (held == Dtype::kFloat64) {
      append(x);
      values.back().push_back(static_cast<W>(x));
    } else if (held == Dtype::kFloat32) {
      append(narrow);
      values.back().push_back(narrow);
    } else if (held == Dtype::kFloat16) {
      // What half a float16 is not, infinity, is not asked for here.
      append(f32_to_f16(std::clamp(narrow, -6e4f, 6e4f)));
      values.back().push_back(f16_to_f32(f32_to_f16(std::clamp(narrow, -6e4f, 6e4f))));
    } else {
      append(f32_to_bf16(narrow));
      values.back().push_back(bf16_to_f32(f32_to_bf16(narrow)));
    }
  }
};

template <class W>
struct Selected {
  std::vector<uint32_t> positions;
  std::vector<W> values;
  std::vector<uint64_t> begins = {0};

  void end_group() { begins.push_back(positions.size()); }
  void keep(uint64_t position, W value) {
    positions.push_back(static_cast<uint32_t>(position));
    values.push_back(value);
  }
  void cut(const std::vector<W>& x, Cut<KeyOf<W>> cut) {
    for (uint64_t i = 0; i < x.size(); ++i) {
      const KeyOf<W> key = key_of(x[i]);
      if (key > cut.key || (key == cut.key && cut.ties > 0)) keep(i, x[i]);
      if (key == cut.key && cut.ties > 0) --cut.ties;
    }
    end_group();
  }
  bool same(const uint32_t* p, const W* x, const uint64_t* b) const {
    return std::equal(begins.begin(), begins.end(), b) &&
           std::equal(positions.begin(), positions.end(), p) &&
           (values.empty() || std::memcmp(values.data(), x, values.size() * sizeof(W)) == 0);
  }
};

template <class W>
Cut<KeyOf<W>> reference_cut(const std::vector<W>& x, uint64_t k, bool drop_zeros) {
  if (k == 0) return {~KeyOf<W>{0}, 0};
  const std::span<const W> all(x);
  Cut<KeyOf<W>> cut = topk_threshold(*active_kernels(), {&all, 1}, k);
  if (cut.key == 0 && drop_zeros) cut.ties = 0;
  return cut;
}

template <class W, class Counts>
void expect_written(const Tensors<W>& tensors, const Counts& by, const KeptCounts& counts,
                    const Selected<W>& wanted, const std::string& what, Workspace& workspace) {
  const uint64_t m = wanted.positions.size();
  expect(counts.before[tensors.parts.chunks] == m, what + ": counts");
  if (counts.before[tensors.parts.chunks] != m) return;
  auto* const positions = workspace.array<uint32_t>(m);
  auto* const values = workspace.array<W>(m);
  auto* const not_finite = workspace.zeros<uint32_t>(1);
  write_kept(tensors.parts, by, counts, positions, values, not_finite, workspace);
  expect(wanted.same(positions, values, counts.begins) && *not_finite == 0, what + ": written");
}

template <class W>
void test_topk(const Tensors<W>& tensors, double density, bool drop_zeros,
               const std::string& name) {
  Workspace workspace(nullptr);
  Selected<W> wanted;
  std::vector<uint64_t> ks;
  for (const auto& x : tensors.flat) {
    ks.push_back(static_cast<uint64_t>(std::ceil(density * static_cast<double>(x.size()))));
    wanted.cut(x, reference_cut(x, ks.back(), drop_zeros));
  }
  const std::string what = name + " top-k " + std::to_string(density);
  // Looking for none in small groups; for enough; for too few; for hardly enough.
  std::vector<Sampling> samplings = {Sampling{}};
  if (density == 0.001) samplings.push_back({1, 4});
  if (density == 0.1) samplings.insert(samplings.end(), {{1, 4}, {1, -3}, {1, 0}});
  for (const Sampling& sampling : samplings) {
    auto* const not_finite = workspace.zeros<uint32_t>(1);
    const auto kept =
        topk<W>(tensors.parts, tensors.sizes, ks, drop_zeros, not_finite, workspace, sampling);
    expect(wanted.same(kept.positions, kept.values, kept.begins) && *not_finite == 0,
           what + " by sample " + std::to_string(sampling.deviations));
  }
}

template <class W>
void test_percentiles(const Tensors<W>& tensors, const std::string& name) {
  constexpr std::pair<double, Interpolation> kAsked[] = {{0.0, Interpolation::kHigher},
                                                         {37.5, Interpolation::kLower},
                                                         {99.99, Interpolation::kLinear},
                                                         {100.0, Interpolation::kLinear}};
  for (const auto& [percentile, interpolation] : kAsked) {
    {
      Workspace workspace(nullptr);
      const std::string what = name + " percentile " + std::to_string(percentile);
      const auto cuts = percentile_cuts<W>(tensors.parts, workspace.upload(tensors.sizes),
                                           percentile, interpolation, workspace);
      Selected<W> wanted;
      for (size_t g = 0; g < tensors.flat.size(); ++g) {
        const std::span<const W> all(tensors.flat[g]);
        const KeyOf<W> key =
            key_of(percentile_threshold(*active_kernels(), {&all, 1}, percentile, interpolation));
        expect(all.empty() || cuts.keys[g] == key, what);
        expect(cuts.ties[g] == 0, what + ": ties");
        wanted.cut(tensors.flat[g], {key, 0});
      }
      expect_written(tensors, cuts, count_kept(tensors.parts, cuts, workspace), wanted, what,
                     workspace);
    }
  }
}

template <class W>
void test_bits(const Tensors<W>& tensors, uint64_t one_in, const std::string& name) {
  Workspace workspace(nullptr);
  std::mt19937_64 random(one_in);
  std::vector<const uint32_t*> bits;
  Selected<W> wanted;
  for (const auto& x : tensors.flat) {
    std::vector<uint32_t> words((x.size() + 31) / 32);
    for (uint64_t i = 0; i < x.size(); ++i) {
      if (random() % one_in != 0) continue;
      words[i / 32] |= 1u << (i % 32);
      wanted.keep(i, x[i]);
    }
    wanted.end_group();
    bits.push_back(workspace.upload(words));
  }
  const uint32_t* const* const uploaded = workspace.upload(bits);
  expect_written(tensors, uploaded, count_kept(tensors.parts, uploaded, workspace), wanted,
                 name + " bits", workspace);
}

template <class W>
void test_selection(const std::vector<Shape>& shapes, uint32_t groups, const std::string& name) {
  Workspace workspace(nullptr);
  const Tensors<W> tensors(shapes, groups, workspace);
  for (double density : {0.001, 0.1, 1.0}) test_topk(tensors, density, density > 0.01, name);
  if (groups == 1) test_topk(tensors, 0.0, false, name);
  test_percentiles(tensors, name);
  for (uint64_t one_in : {1, 3, 1000}) test_bits(tensors, one_in, name);
}

template <class W>
void test_not_finite() {
  for (uint64_t n : {1, 4097, 20000}) {
    for (double bad : {std::nan(""), -HUGE_VAL, HUGE_VAL}) {
      for (uint64_t k : {uint64_t{0}, uint64_t{1}, n / 2}) {
        Workspace workspace(nullptr);
        std::vector<W> x(n, W{1});
        const Part part = {
            workspace.upload(x), n, 0, 0, 0, sizeof(W) == 4 ? Dtype::kFloat32 : Dtype::kFloat64};
        const cuda::Parts parts = {workspace.upload(std::vector{part}), 1,
                                   static_cast<uint32_t>(chunks_of(n)), 1};
        auto* const flags = workspace.zeros<uint32_t>(4);
        check_finite(parts, flags, workspace);
        topk<W>(parts, {&n, 1}, {&k, 1}, false, flags + 1, workspace, {1, 4});
        x[n / 2] = static_cast<W>(bad);
        workspace.copy(const_cast<void*>(part.data), x.data(), n * sizeof(W),
                       cudaMemcpyHostToDevice);
        check_finite(parts, flags + 2, workspace);
        topk<W>(parts, {&n, 1}, {&k, 1}, false, flags + 3, workspace, {1, 4});
        expect(flags[0] == 0 && flags[1] == 0 && flags[2] == 1 && flags[3] == 1,
               "not finite: " + std::to_string(n) + " " + std::to_string(k));
      }
    }
  }
}

void test_random_bits() {
  for (uint64_t n : {1, 2, 31, 4096, 65537, 200001}) {
    for (uint64_t k : {uint64_t{0}, n / 100, n / 2, n}) {
      Workspace workspace(nullptr);
      auto* const bits = workspace.zeros<uint32_t>((n + 31) / 32);
      set_random_bits(n + k, n, k, bits, workspace);
      std::vector<uint64_t> positions(k);
      active_kernels()->random_positions(n + k, n, 0, k, positions.data());
      std::vector<uint32_t> wanted((n + 31) / 32);
      for (uint64_t p : positions) wanted[p / 32] |= 1u << (p % 32);
      expect(std::equal(wanted.begin(), wanted.end(), bits), "random bits " + std::to_string(n));
    }
  }
}

template <class W>
void test_sum(Dtype held) {
  for (bool aligned : {true, false}) {
    Workspace workspace(nullptr);
    const Dtype work = sizeof(W) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
    const Tensors<W> tensors(
        {{9001, 0, held, Fill::kNormal, aligned}, {9001, 1, work, Fill::kHeavy, aligned}}, 2,
        workspace);
    W* const out = workspace.array<W>(9002) + (aligned ? 0 : 1);
    sum(tensors.host[0].data, held, tensors.host[1].data, 9001, sizeof(W) == 8, out, workspace);
    bool same = true;
    for (size_t i = 0; i < 9001; ++i)
      same = same && out[i] == tensors.flat[0][i] + tensors.flat[1][i];
    expect(same, "sum");
  }
}

void run() {
  const Dtype narrow[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBfloat16};
  // Each size by itself, and many parts in groups, of which some are empty.
  unsigned i = 0;
  for (uint64_t n : {0, 1, 31, 4095, 4096, 4097, 65535, 65537}) {
    const Fill fill = kFills[i % std::size(kFills)];
    test_selection<float>({{n, 0, narrow[i % 3], fill, i % 2 == 0}}, 1, std::to_string(n));
    if (n < 65536)
      test_selection<double>({{n, 0, Dtype::kFloat64, fill, i % 2 == 1}}, 1, std::to_string(n));
    ++i;
  }
  for (Fill fill : kFills) {
    const std::string name = "fill " + std::to_string(static_cast<int>(fill));
    const bool wide = fill == Fill::kHeavy || fill == Fill::kTwo || fill == Fill::kOdd;
    const std::vector<Shape> shapes = {
        {15000, 1, Dtype::kFloat32, fill, true},
        {0, 1, Dtype::kFloat32, fill, true},
        {33, 1, Dtype::kFloat16, fill, false},
        {5000, 1, wide ? Dtype::kFloat64 : Dtype::kBfloat16, fill, true},
        {0, 2, Dtype::kFloat32, fill, true},
        {4100, 4, wide ? Dtype::kFloat64 : Dtype::kFloat16, fill, false},
    };
    wide ? test_selection<double>(shapes, 6, name) : test_selection<float>(shapes, 6, name);
  }
  {
    Workspace workspace(nullptr);
    test_topk(Tensors<float>({{300000, 0, Dtype::kFloat32, Fill::kHeavy, true}}, 1, workspace),
              0.01, false, "large");
  }
  test_not_finite<float>();
  test_not_finite<double>();
  test_random_bits();
  for (Dtype held : narrow) test_sum<float>(held);
  test_sum<double>(Dtype::kFloat64);
  test_sum<double>(Dtype::kFloat32);
}

}  // namespace
}  // namespace fedcodec::cuda

int main() {
  fedcodec::cuda::run();
  std::printf("%d failures\n", fedcodec::cuda::failures);
  return fedcodec::cuda::failures;
}
