// Values to bytes and back on CUDA, against the CPU's kernels and arith.h, bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "fedcodec/arith.h"
#include "fedcodec/parallel.h"

namespace {

using namespace fedcodec;
using cuda::CodedGroup;
using cuda::Form;
using cuda::Target;
using cuda::ValueGroup;
using Bytes = std::vector<uint8_t>;

constexpr uint64_t kSizes[] = {1, 7, 31, 255, 4095, 4096, 4097, 4200, 8192, 20011, 65537};
constexpr Dtype kFloats[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBfloat16, Dtype::kFloat64};
constexpr uint8_t kGuard = 0xee;

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (!ok && ++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

std::mt19937_64 engine(20261122);
uint64_t below(uint64_t n) { return engine() % n; }

template <class T, size_t n>
T any_of(const T (&from)[n]) {
  return from[below(n)];
}

// --- one element
// -------------------------------------------------------------------------------------------------

double load(const uint8_t* data, Dtype dtype, uint64_t i) {
  const auto as = [&]<class T>(T x) {
    std::memcpy(&x, data + i * sizeof(T), sizeof(T));
    return x;
  };
  switch (dtype) {
    case Dtype::kFloat64:
      return as(double{});
    case Dtype::kFloat32:
      return static_cast<double>(as(float{}));
    case Dtype::kFloat16:
      return static_cast<double>(f16_to_f32(as(uint16_t{})));
    default:
      return static_cast<double>(bf16_to_f32(as(uint16_t{})));
  }
}

void store(double x, Dtype dtype, uint8_t* data, uint64_t i) {
  const auto put = [&]<class T>(T value) { std::memcpy(data + i * sizeof(T), &value, sizeof(T)); };
  switch (dtype) {
    case Dtype::kFloat64:
      return put(x);
    case Dtype::kFloat32:
      return put(static_cast<float>(x));
    case Dtype::kFloat16:
      return put(f64_to_f16(x));
    default:
      return put(f64_to_bf16(x));
  }
}

double rounded(double x, Dtype dtype) {
  uint8_t bytes[8];
  store(x, dtype, bytes, 0);
  return load(bytes, dtype, 0);
}

void add(double weight, double x, Dtype held, uint8_t* sums, uint64_t i) {
  const double sum = load(sums, held, i);
  if (held == Dtype::kFloat64) return store(sum + weight * x, held, sums, i);
  const float product = static_cast<float>(weight) * static_cast<float>(x);
  store(static_cast<double>(static_cast<float>(sum) + product), held, sums, i);
}

// Elements of a type, `skewed` away from where they could be read 16 bytes at a time.
class Elements {
 public:
  Elements(uint64_t n, Dtype dtype, bool skewed)
      : bytes_((n + skewed) * item_size(dtype), kGuard), skip_(skewed ? item_size(dtype) : 0) {}
  uint8_t* data() { return bytes_.data() + skip_; }
  const uint8_t* data() const { return bytes_.data() + skip_; }
  bool operator==(const Elements&) const = default;

 private:
  Bytes bytes_;
  size_t skip_;
};

double some_value(int pattern, Dtype dtype) {
  const double sign = below(2) != 0 ? -1 : 1;
  const double unit = static_cast<double>(below(uint64_t{1} << 53)) * 0x1p-53;
  switch (pattern) {
    case 0:
      return sign * unit;
    case 1:
      return sign * 0.0;
    case 2:
      return sign * static_cast<double>(below(5)) * 0.5;
    case 3:
      return sign * unit * (dtype == Dtype::kFloat16 ? 0x1p-15 : 0x1p-130);
    case 4:
      return dtype == Dtype::kFloat16 ? sign * 65280 : sign * 0x1.fep127;
    case 5:
      // At the middle between halves, or just above.
      return sign * std::ldexp(1 + static_cast<double>(below(2048)) * 0x1p-11 +
                                   static_cast<double>(below(3)) * 0x1p-40,
                               static_cast<int>(below(28)) - 14);
    default:
      return 1;
  }
}
constexpr int kPatterns = 7;

// Which are finite in another dtype too.
Elements some_elements(uint64_t n, Dtype dtype, Dtype other) {
  Elements x(n, dtype, below(3) == 0);
  const int pattern = static_cast<int>(below(kPatterns));
  const Dtype narrow = other == Dtype::kFloat16 ? other : dtype;
  for (uint64_t i = 0; i < n; ++i) store(some_value(pattern, narrow), dtype, x.data(), i);
  return x;
}

// --- groups
// ------------------------------------------------------------------------------------------------------

struct Coding {
  Form form;
  Dtype dtype = Dtype::kFloat32;
  unsigned bits = 8;
  Grid grid = {1, 1};

  uint64_t scale_bytes() const {
    return form == Form::kCodes ? 4 * grid.channels : form == Form::kSigns ? 4 : 0;
  }
  uint64_t data_bytes(uint64_t m) const {
    if (form == Form::kPlain) return m * item_size(dtype);
    return form == Form::kCodes ? (m * bits + 7) / 8 : (m + 7) / 8;
  }
};

std::vector<Coding> codings(uint64_t m) {
  std::vector<Coding> all = {{Form::kSigns}};
  for (Dtype dtype : kFloats) all.push_back({Form::kPlain, dtype});
  std::vector<Grid> grids = {{m, 1}, {1, 7}, {3, 5}, {64, 10}, {1, 5000}, {5000, 3}, {2, 4099}};
  for (size_t block : {2, 4, 32, 128, 256, 512, 1000, 1024, 1024, 2048, 4096, 8192})
    grids.push_back({block, (m + block - 1) / block});
  for (const Grid& grid : grids) {
    all.push_back({Form::kCodes, {}, 8, grid});
    all.push_back({Form::kCodes, {}, 2 + static_cast<unsigned>(below(6)), grid});
  }
  return all;
}

struct Case {
  std::string name;
  Coding coding;
  uint64_t m;
  Dtype held;
  Elements x;
  uint64_t drawn;
  size_t lead;  // bytes before
  Bytes coded;  // scales and data
};

Bytes coded_by_cpu(const Case& of, const std::optional<Draw>& draw) {
  const Kernels& kernels = *active_kernels();
  const Coding& coding = of.coding;
  const uint64_t n_scales = coding.scale_bytes();
  Bytes out(n_scales + coding.data_bytes(of.m));
  uint8_t* const data = out.data() + n_scales;
  std::vector<float> x(of.m);
  for (uint64_t i = 0; i < of.m; ++i) {
    const double value = load(of.x.data(), of.held, i);
    x[i] = static_cast<float>(value);
    if (coding.form == Form::kPlain) store(value, coding.dtype, data, i);
  }
  if (coding.form == Form::kCodes) {
    std::vector<float> scales(coding.grid.channels);
    quantize(kernels, x.data(), of.m, coding.grid, coding.bits, draw, scales.data(), Codes::kPacked,
             data);
    std::memcpy(out.data(), scales.data(), n_scales);
  } else if (coding.form == Form::kSigns) {
    const uint32_t largest = signs(kernels, x.data(), of.m, data);
    const float magnitude = mean_magnitude(kernels, x.data(), of.m, largest);
    std::memcpy(out.data(), &magnitude, sizeof(magnitude));
  }
  return out;
}

// What the device makes of cases, whose outputs it writes at unaligned places between guards.
bool encode(std::vector<Case>& cases, const Draw* draw, std::vector<Bytes>& outs) {
  cuda::Workspace workspace(nullptr);
  std::vector<ValueGroup> groups;
  uint64_t chunks = 0;
  uint64_t scales = 0;
  outs.clear();
  for (const Case& of : cases)
    outs.emplace_back(of.lead + of.coding.scale_bytes() + of.coding.data_bytes(of.m) + 3, kGuard);
  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& of = cases[i];
    const Coding& coding = of.coding;
    uint8_t* const out = outs[i].data() + of.lead;
    groups.push_back({of.x.data(), of.held, of.m, static_cast<uint32_t>(chunks), coding.form,
                      coding.dtype, coding.bits, coding.grid, scales, of.drawn, out,
                      out + coding.scale_bytes()});
    chunks += cuda::chunks_of(of.m);
    if (coding.form == Form::kCodes) scales += coding.grid.channels;
  }
  uint32_t* const not_finite = workspace.zeros<uint32_t>(1);
  cuda::encode_values({groups, workspace.upload(groups), chunks, scales}, draw, not_finite,
                      workspace);
  return *not_finite == 0;
}

std::vector<Case> test_encode(uint64_t m, bool stochastic) {
  const Draw draw = {0x123456789abcdef, 42, 0};
  std::vector<Case> cases;
  uint64_t drawn = (uint64_t{1} << 40) + below(4);
  for (const Coding& coding : codings(m)) {
    const Dtype held = any_of(kFloats);
    cases.push_back(
        {"", coding, m, held, some_elements(m, held, coding.dtype), drawn, below(17), {}});
    Case& made = cases.back();
    made.name =
        "m " + std::to_string(m) + " form " + std::to_string(static_cast<int>(coding.form)) +
        " dtype " + std::to_string(static_cast<int>(coding.dtype)) + " bits " +
        std::to_string(coding.bits) + " inner " + std::to_string(coding.grid.inner) + " channels " +
        std::to_string(coding.grid.channels) + " held " + std::to_string(static_cast<int>(held));
    std::optional<Draw> from;
    if (stochastic) from = {draw.codec_seed, draw.call_seed, drawn};
    made.coded = coded_by_cpu(made, from);
    drawn += m;
  }
  std::shuffle(cases.begin(), cases.end(), engine);
  std::vector<Bytes> outs;
  expect(encode(cases, stochastic ? &draw : nullptr, outs), "finite values taken for others");
  for (size_t i = 0; i < cases.size(); ++i) {
    Bytes wanted(cases[i].lead, kGuard);
    wanted.insert(wanted.end(), cases[i].coded.begin(), cases[i].coded.end());
    wanted.resize(wanted.size() + 3, kGuard);
    expect(outs[i] == wanted, (stochastic ? "stochastic " : "encode ") + cases[i].name);
  }
  return cases;
}

void test_refusals() {
  const auto taken = [](const Coding& coding, Dtype held, uint64_t m, double wrong) {
    std::vector<Case> cases;
    for (uint64_t i = 0; i < 3; ++i) {
      cases.push_back({"", coding, m, held, Elements(m, held, false), 0, 1, {}});
      for (uint64_t j = 0; j < m; ++j) store(1, held, cases.back().x.data(), j);
    }
    store(wrong, held, cases[1].x.data(), m - 1);
    std::vector<Bytes> outs;
    return encode(cases, nullptr, outs);
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (uint64_t m : {1, 4096, 5001}) {
    for (const Coding& coding : codings(m)) {
      for (Dtype held : kFloats) {
        expect(!taken(coding, held, m, -kInfinity), "infinity");
        expect(!taken(coding, held, m, std::nan("")), "not a number");
      }
    }
    expect(!taken({Form::kPlain, Dtype::kFloat16}, Dtype::kFloat32, m, 65520), "beyond float16");
    expect(taken({Form::kPlain, Dtype::kFloat16}, Dtype::kFloat32, m, 65519), "within float16");
    expect(!taken({Form::kSigns}, Dtype::kFloat64, m, 1e300), "beyond float32");
    expect(!taken({Form::kCodes, {}, 8, {m, 1}}, Dtype::kFloat64, m, 1e300), "beyond float32");
  }
}

// --- from bytes
// --------------------------------------------------------------------------------------------------

std::vector<double> decoded(const Case& of) {
  const Coding& coding = of.coding;
  const uint8_t* const data = of.coded.data() + coding.scale_bytes();
  std::vector<double> values(of.m);
  std::vector<int8_t> codes(of.m);
  if (coding.form == Form::kCodes && coding.bits < 8)
    active_kernels()->unpack_codes(data, of.m, coding.bits, codes.data());
  for (uint64_t i = 0; i < of.m; ++i) {
    if (coding.form == Form::kPlain) {
      values[i] = load(data, coding.dtype, i);
    } else if (coding.form == Form::kSigns) {
      const bool negative = (data[i / 8] >> (i % 8) & 1) != 0;
      values[i] = (negative ? -1 : 1) * load(of.coded.data(), Dtype::kFloat32, 0);
    } else {
      const int8_t code = coding.bits == 8 ? static_cast<int8_t>(data[i]) : codes[i];
      const uint64_t channel = i / coding.grid.inner % coding.grid.channels;
      const auto scale = static_cast<float>(load(of.coded.data(), Dtype::kFloat32, channel));
      values[i] = static_cast<double>(dequantize(code, levels_of(coding.bits), scale));
    }
  }
  return values;
}

// Decodes or adds all cases at once, and by hand.
void test_decode(std::vector<Case>& cases, bool sparse, const double* weight) {
  cuda::Workspace workspace(nullptr);
  std::vector<Bytes> bytes;
  std::vector<CodedGroup> groups;
  std::vector<Target> targets;
  std::vector<Elements> outs;
  std::vector<Elements> wanted;
  std::vector<uint32_t> positions(3);  // of nothing: groups begin anywhere
  uint64_t chunks = 0;
  for (Case& of : cases) {
    const Coding& coding = of.coding;
    // The most negative codes are to be read too.
    if (coding.form == Form::kCodes && coding.bits == 8) of.coded.back() = 0x80;
    bytes.emplace_back(of.lead);
    bytes.back().insert(bytes.back().end(), of.coded.begin(), of.coded.end());
    const uint64_t begin = positions.size();
    uint64_t n = of.m;
    if (sparse) {
      n = 0;
      for (uint64_t i = 0; i < of.m; ++i) {
        n += below(3);
        positions.push_back(static_cast<uint32_t>(n++));
      }
      n += below(3);
    }
    const auto first_target = static_cast<uint32_t>(targets.size());
    const std::vector<double> values = decoded(of);
    uint64_t next = 0;
    for (uint64_t first = 0; first < n || targets.size() == first_target;) {
      const uint64_t length = sparse && below(4) != 0 ? std::min(below(n), n - first) : n - first;
      const Dtype dtype = any_of(kFloats);
      Dtype held = dtype;
      if (weight != nullptr) held = below(3) != 0 ? Dtype::kFloat32 : Dtype::kFloat64;
      outs.emplace_back(length, held, below(3) == 0);
      for (uint64_t i = 0; i < length && weight != nullptr; ++i)
        store(some_value(0, held), held, outs.back().data(), i);
      wanted.push_back(outs.back());
      targets.push_back({nullptr, length, first, dtype, held});
      for (; next < of.m; ++next) {
        const uint64_t at = sparse ? positions[begin + next] : next;
        if (at >= first + length) break;
        const double value = rounded(values[next], dtype);
        weight != nullptr ? add(*weight, value, held, wanted.back().data(), at - first)
                          : store(value, held, wanted.back().data(), at - first);
      }
      first += length;
    }
    const uint8_t* const from = bytes.back().data() + of.lead;
    groups.push_back({coding.form, coding.dtype, coding.bits, coding.grid, from,
                      from + coding.scale_bytes(), of.m, chunks, begin, first_target,
                      static_cast<uint32_t>(targets.size()) - first_target});
    chunks += cuda::chunks_of(of.m);
  }
  for (size_t i = 0; i < targets.size(); ++i) targets[i].data = outs[i].data();
  const cuda::CodedGroups all = {workspace.upload(groups), static_cast<uint32_t>(groups.size()),
                                 chunks, workspace.upload(targets),
                                 sparse ? workspace.upload(positions) : nullptr};
  weight != nullptr ? cuda::accumulate_values(all, *weight, workspace)
                    : cuda::decode_values(all, workspace);
  for (size_t g = 0; g < groups.size(); ++g) {
    for (uint32_t i = groups[g].first_target; i < groups[g].first_target + groups[g].targets; ++i) {
      expect(outs[i] == wanted[i], std::string(sparse ? "sparse " : "dense ") +
                                       (weight != nullptr ? "add " : "decode ") + cases[g].name +
                                       " to " + std::to_string(static_cast<int>(targets[i].dtype)));
    }
  }
}

void test_sums(uint64_t n) {
  const double weight = 0.7;
  for (bool wide : {false, true}) {
    const Dtype type = wide ? Dtype::kFloat64 : Dtype::kFloat32;
    for (Dtype dtype : kFloats) {
      const Elements first = some_elements(n, type, type);
      const Elements second = some_elements(n, type, type);
      Elements out(n, dtype, below(2) == 0);
      Elements wanted = out;
      const Dtype held = below(2) == 0 ? Dtype::kFloat32 : Dtype::kFloat64;
      Elements sums = Elements(n, held, below(2) == 0);
      for (uint64_t i = 0; i < n; ++i) store(some_value(0, held), held, sums.data(), i);
      Elements wanted_sums = sums;
      for (uint64_t i = 0; i < n; ++i) {
        double sum = load(first.data(), type, i) + load(second.data(), type, i);
        if (!wide) sum = static_cast<double>(static_cast<float>(sum));
        store(sum, dtype, wanted.data(), i);
        add(weight, rounded(sum, dtype), held, wanted_sums.data(), i);
      }
      cuda::Workspace workspace(nullptr);
      cuda::decode_sum(first.data(), second.data(), wide, {out.data(), n, 0, dtype, dtype},
                       workspace);
      cuda::accumulate_sum(first.data(), second.data(), wide, {sums.data(), n, 0, dtype, held},
                           weight, workspace);
      expect(out == wanted, "a sum of " + std::to_string(n));
      expect(sums == wanted_sums, "an added sum of " + std::to_string(n));
    }
  }
}

void test_uploads() {
  cuda::Workspace workspace(nullptr);
  std::vector<uint32_t> values(1000, 1), found(values.size());
  const uint32_t* const uploaded = workspace.upload(values);
  values.assign(values.size(), 2);
  workspace.copy(found.data(), uploaded, found.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost);
  workspace.synchronize();
  expect(found == std::vector<uint32_t>(1000, 1), "an upload of what changes afterwards");
}

}  // namespace

int main() {
  const double weight = 0.3;
  for (uint64_t m : kSizes) {
    test_encode(m, true);
    std::vector<Case> cases = test_encode(m, false);
    for (bool sparse : {false, true}) {
      test_decode(cases, sparse, nullptr);
      test_decode(cases, sparse, &weight);
    }
    test_sums(m);
  }
  test_refusals();
  test_uploads();
  std::printf("%d failures\n", failures);
  return failures;
}
