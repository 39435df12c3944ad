// Fuzzes the reading of bodies: the first bytes choose tensors and coders, the rest is the body.
//
// With clang: -DFEDCODEC_LIBFUZZER -fsanitize=fuzzer,address,undefined. Otherwise a program of its
// own: it runs the files that it is given, or `body_fuzz COUNT [SEED]` random cases, most of them a
// valid body with a few bytes changed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fedcodec/body.h"
#include "fedcodec/threads.h"

namespace {

using namespace fedcodec;

constexpr size_t kPrefix = 64;  // bytes that choose

class Choices {
 public:
  Choices(const uint8_t* bytes, size_t n) : bytes_(bytes), n_(n) {}
  size_t below(size_t limit) { return (at_ < n_ ? bytes_[at_++] : 0u) % limit; }

 private:
  const uint8_t* bytes_;
  size_t n_;
  size_t at_ = 0;
};

// Tensors with exactly their memory, and coders that serve to encode and to decode.
class Case {
 public:
  Case(const uint8_t* bytes, size_t n) : choices_(bytes, n) {
    const size_t count = 1 + choices_.below(4);
    for (size_t i = 0; i < count; ++i) add_tensor();
    segments_.resize(1 + choices_.below(2));
    for (size_t i = 0; i < count; ++i)
      segments_[choices_.below(segments_.size())].tensors.push_back(i);
    for (Segment& segment : segments_) segment.coder = coder(segment);
  }

  Plan plan() const { return {*active_kernels(), tensors_, segments_}; }
  std::vector<Tensor>& tensors() { return tensors_; }

  // Points the tensors to new memory of exactly their size: for their values, or for sums.
  std::vector<std::vector<uint8_t>> allocate(uint8_t fill, bool sums) {
    std::vector<std::vector<uint8_t>> memory;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      Tensor& tensor = tensors_[i];
      if (sums)
        tensor.held = is_float(tensor.dtype) && i % 2 == 0 ? Dtype::kFloat32 : Dtype::kFloat64;
      memory.emplace_back(tensor.n * item_size(tensor.held), fill);
      tensor.data = memory.back().data();
    }
    return memory;
  }

 private:
  void add_tensor() {
    constexpr Dtype kDtypes[] = {Dtype::kFloat32,  Dtype::kFloat32, Dtype::kFloat16,
                                 Dtype::kBfloat16, Dtype::kFloat64, Dtype::kInt64,
                                 Dtype::kUint8,    Dtype::kBool};
    constexpr uint64_t kSizes[] = {0, 1, 3, 8, 65, 300, 1000, 66000};
    const Dtype dtype = kDtypes[choices_.below(std::size(kDtypes))];
    std::vector<uint64_t>& shape = shapes_.emplace_back();
    shape.push_back(kSizes[choices_.below(std::size(kSizes))]);
    if (choices_.below(2) == 1) shape.push_back(1 + choices_.below(5));
    const uint64_t n = shape[0] * (shape.size() == 2 ? shape[1] : 1);
    tensors_.push_back({dtype, shape, n, nullptr, dtype});
  }

  Coder coder(const Segment& segment, bool inside = false) {
    Coder coder;
    if (!inside && choices_.below(6) == 0) {
      coder.terms.push_back(this->coder(segment, true));
      coder.terms.push_back(this->coder(segment, true));
      return coder;
    }
    coder.select = select(segment);
    coder.quantize = quantize(coder.select.kind == Select::Kind::kAll);
    return coder;
  }

  Select select(const Segment& segment) {
    constexpr Select::Kind kKinds[] = {Select::Kind::kAll,       Select::Kind::kTopK,
                                       Select::Kind::kThreshold, Select::Kind::kPercentile,
                                       Select::Kind::kRandom,    Select::Kind::kMask,
                                       Select::Kind::kStructured};
    Select select;
    select.kind = kKinds[choices_.below(std::size(kKinds))];
    select.flat = choices_.below(2) == 1 || select.kind == Select::Kind::kMask;
    const bool structured = select.kind == Select::Kind::kStructured;
    if (select.kind == Select::Kind::kAll || structured) select.flat = false;
    select.value = static_cast<double>(choices_.below(100)) / (structured ? 100 : 1);
    select.axis = choices_.below(3);
    select.order = 1 + static_cast<int>(choices_.below(2));
    const size_t divisor = 1 + choices_.below(200);
    for (size_t i : segment.tensors) {
      if (!is_float(tensors_[i].dtype)) continue;
      select.n += tensors_[i].n;
      if (!select.flat) select.counts.push_back(tensors_[i].n / divisor);
    }
    if (select.flat) select.counts.push_back(select.n / divisor);
    select.seeds.assign(select.counts.size(), divisor);
    if (select.kind == Select::Kind::kMask) {
      std::vector<uint8_t>& mask =
          masks_.emplace_back((select.n + 7) / 8, static_cast<uint8_t>(divisor));
      if (select.n % 8 != 0)
        mask.back() = static_cast<uint8_t>(mask.back() & ((1u << select.n % 8) - 1));
      select.bits = mask;
      select.n += choices_.below(50) == 49;  // a mask of another model
    }
    return select;
  }

  Quantize quantize(bool dense) {
    constexpr Quantize::Kind kKinds[] = {Quantize::Kind::kNone, Quantize::Kind::kInteger,
                                         Quantize::Kind::kInteger, Quantize::Kind::kSign,
                                         Quantize::Kind::kCast};
    Quantize quantize;
    quantize.kind = kKinds[choices_.below(std::size(kKinds))];
    quantize.bits = 2 + static_cast<unsigned>(choices_.below(7));
    quantize.granularity = static_cast<Quantize::Granularity>(choices_.below(dense ? 3 : 2));
    quantize.size = choices_.below(70);
    if (quantize.granularity == Quantize::Granularity::kBlock) ++quantize.size;
    if (quantize.granularity == Quantize::Granularity::kChannel) quantize.size %= 3;
    quantize.stochastic = choices_.below(2) == 1;
    quantize.dtype = choices_.below(2) == 1 ? Dtype::kFloat16 : Dtype::kBfloat16;
    return quantize;
  }

  Choices choices_;
  std::vector<Tensor> tensors_;
  std::vector<Segment> segments_;
  std::vector<std::vector<uint8_t>> masks_;
  std::vector<std::vector<uint64_t>> shapes_;
};

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

template <class Call>
bool accepts(Call call) {
  try {
    call();
    return true;
  } catch (const Malformed&) {
    return false;
  }
}

std::vector<uint8_t> valid_body(const std::vector<uint8_t>& prefix, std::mt19937_64& random) {
  Case chosen(prefix.data(), prefix.size());
  const auto memory = chosen.allocate(0, false);
  const int scale = static_cast<int>(random() % 8);
  for (Tensor& tensor : chosen.tensors()) {
    // Small numbers as float16, bfloat16, float32 or anything else.
    uint16_t* words = static_cast<uint16_t*>(tensor.data);
    for (size_t i = 0; i < tensor.n * item_size(tensor.dtype) / 2; ++i) {
      words[i] = static_cast<uint16_t>(random() & (random() % 4 == 0 ? 0x33ff : 0x3)) &
                 (scale < 2 ? 0 : 0xffff);
    }
  }
  std::vector<uint8_t> body(body_bound(chosen.plan()));
  try {
    body.resize(encode_body(chosen.plan(), 0, body));
  } catch (const NonFinite&) {
    body.clear();
  } catch (const std::invalid_argument&) {
    body.clear();
  }
  return body;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  set_thread_count(3);
  const size_t prefix = std::min(size, kPrefix);
  Case chosen(data, prefix);
  // A buffer of its own, so that a sanitizer sees a read beyond it.
  const std::vector<uint8_t> body(data + prefix, data + size);

  const auto decoded = chosen.allocate(7, false);
  const auto untouched = decoded;
  const bool valid = accepts([&] { decode_body(chosen.plan(), body.data(), 0, body.size()); });
  if (!valid) require(decoded == untouched, "a refused body was written");
  require(valid == accepts([&] { check_body(chosen.plan(), body.data(), 0, body.size()); }),
          "check and decode differ");

  const auto sums = chosen.allocate(0, true);
  const auto before = sums;
  const bool added = accepts(
      [&] { accumulate_body(chosen.plan(), body.data(), 0, body.size(), 0.25, {0, 0}, false); });
  require(valid || !added, "a body that does not decode was added");
  if (!added) require(sums == before, "a refused body was added");
  return 0;
}

#ifndef FEDCODEC_LIBFUZZER
namespace {

void mutate(std::vector<uint8_t>& body, std::mt19937_64& random) {
  for (size_t changes = random() % 4; changes > 0 && !body.empty(); --changes) {
    const size_t at =
        random() % 2 == 0 ? random() % body.size() : random() % std::min<size_t>(24, body.size());
    switch (random() % 5) {
      case 0:
        body.resize(at);
        break;
      case 1:
        body.insert(body.begin() + static_cast<ptrdiff_t>(at), static_cast<uint8_t>(random()));
        break;
      case 2: {
        const std::vector<uint8_t> largest = {0xff, 0xff, 0xff, 0xff, 0xff,
                                              0xff, 0xff, 0xff, 0xff, 0x01};
        body.insert(body.begin() + static_cast<ptrdiff_t>(at),
                    largest.end() - 1 - static_cast<ptrdiff_t>(random() % 10), largest.end());
        break;
      }
      case 3:
        body[at] = static_cast<uint8_t>(random());
        break;
      default:
        body[at] = static_cast<uint8_t>(body[at] ^ 1u << random() % 8);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  char* end = nullptr;
  const unsigned long count = argc > 1 ? std::strtoul(argv[1], &end, 10) : 0;
  if (argc < 2 || *end != '\0') {
    for (int i = 1; i < argc; ++i) {
      std::ifstream file(argv[i], std::ios::binary);
      const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    }
    return 0;
  }
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  for (unsigned long i = 0; i < count; ++i) {
    std::vector<uint8_t> input(kPrefix);
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
    std::vector<uint8_t> body = valid_body(input, random);
    mutate(body, random);
    input.insert(input.end(), body.begin(), body.end());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%lu cases\n", count);
  return 0;
}
#endif
