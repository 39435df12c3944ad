// Index sets of the GPU's kernels against the CPU's, byte for byte.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "fedcodec/body.h"
#include "fedcodec/reader.h"
#include "fedcodec/tiles.h"

namespace {

using namespace fedcodec;
using fedcodec::cuda::CodedTile;
using fedcodec::cuda::PlannedSet;
using fedcodec::cuda::Workspace;

using Random = std::mt19937_64;
using Bytes = std::vector<uint8_t>;
using Positions = std::vector<int64_t>;

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (!ok && ++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

const Kernels& kernels() { return *active_kernels(); }

struct Group {
  uint64_t n;
  Positions positions;
};

template <class T>
std::vector<T> download(Workspace& workspace, const T* from, uint64_t n) {
  std::vector<T> to(n);
  workspace.copy(to.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost);
  workspace.synchronize();
  return to;
}

// --- packing
// ------------------------------------------------------------------------------------------------------

void pack(const std::vector<Group>& groups, const std::string& what) {
  Workspace workspace(nullptr);
  std::vector<uint64_t> sizes, begins = {0}, offsets;
  std::vector<uint32_t> positions;
  for (const Group& group : groups) {
    sizes.push_back(group.n);
    for (const int64_t position : group.positions)
      positions.push_back(static_cast<uint32_t>(position));
    begins.push_back(positions.size());
  }
  const auto plans = cuda::plan_tiles(sizes, workspace.upload(begins), workspace.upload(positions),
                                      positions.size(), workspace);
  const auto sets = download(workspace, plans.sets, groups.size());
  Bytes expected;
  for (size_t g = 0; g < groups.size(); ++g) {
    const Bytes set = pack_sparse(kernels(), groups[g].positions, groups[g].n);
    const PlannedSet& planned = sets[g];
    expect(planned.t == set[0] &&
               planned.tiles == ceil_div(groups[g].n, uint64_t{1} << planned.t) &&
               1 + planned.header_bytes + planned.data_bytes == set.size(),
           what + ", plan of group " + std::to_string(g));
    // What lies between the sets stays as it is.
    expected.resize(expected.size() + g % 4);
    offsets.push_back(expected.size());
    expected.insert(expected.end(), set.begin(), set.end());
  }
  uint8_t* const out = workspace.zeros<uint8_t>(ceil_div(expected.size(), 4) * 4);
  cuda::write_tiles(plans, static_cast<uint32_t>(groups.size()), workspace.upload(offsets), out,
                    workspace);
  expect(download(workspace, out, expected.size()) == expected, what + ", bytes");
}

// --- unpacking
// ----------------------------------------------------------------------------------------------------

// Nothing where a header is not of the format, or data are missing.
std::optional<std::vector<CodedTile>> read_headers(const Bytes& set, uint64_t n) {
  Reader in(set.data(), 0, set.size());
  std::vector<CodedTile> tiles;
  try {
    const unsigned t = in.byte("t");
    if (t < kMinTileBits || t > kMaxTileBits) return {};
    uint64_t before = 0;
    for (uint64_t start = 0; start < n; start += uint64_t{1} << t) {
      const uint64_t length = std::min(uint64_t{1} << t, n - start);
      const unsigned first = in.byte("a header");
      Tile tile = {first & 3, (first & 4) != 0, first >> 3, in.varint("c"), 0};
      if (tile.mode == kBitmap && (tile.r > 0 || tile.complement)) return {};
      if (tile.mode == kList && (tile.r > 0 || t > kMinTileBits)) return {};
      if (tile.mode > kRice || tile.r > kMaxRice || tile.coded > length) return {};
      if (tile.has_unary()) tile.unary = in.varint("u");
      tiles.push_back({tile, nullptr, start, before, static_cast<uint32_t>(length)});
      before += tile.kept(length);
    }
    for (CodedTile& tile : tiles) tile.data = in.take(tile_bytes(tile.tile, tile.length), "data");
  } catch (const Malformed&) {
    return {};
  }
  return tiles;
}

// Whether the bytes are an index set, as the CPU has it too. Their last is the last of the memory.
bool unpack(const Bytes& set, uint64_t n, const std::string& what) {
  std::optional<SparseSet> expected;
  Reader reader(set.data(), 0, set.size());
  try {
    expected.emplace(kernels(), reader, n);
  } catch (const Malformed&) {
  }
  auto tiles = read_headers(set, n);
  if (!tiles) {
    expect(!expected, what + ", headers");
    return false;
  }
  Workspace workspace(nullptr);
  const uint64_t room = ceil_div(set.size(), 256) * 256;
  uint8_t* const payload = workspace.array<uint8_t>(room) + (room - set.size());
  workspace.copy(payload, set.data(), set.size(), cudaMemcpyHostToDevice);
  for (CodedTile& tile : *tiles) tile.data = payload + (tile.data - set.data());
  const CodedTile* const coded = workspace.upload(*tiles);
  uint32_t* const malformed = workspace.upload(std::vector<uint32_t>{UINT32_MAX});
  cuda::check_tiles(coded, tiles->size(), malformed, workspace);
  const uint32_t found = download(workspace, malformed, 1)[0];
  expect((found == UINT32_MAX) == expected.has_value(), what + ", check");
  if (found != UINT32_MAX || !expected) return false;
  const uint64_t kept = expected->kept();
  uint32_t* const out = workspace.array<uint32_t>(kept);
  cuda::unpack_tiles(coded, tiles->size(), out, workspace);
  Positions wanted(kept);
  expected->unpack(kernels(), wanted.data());
  const auto positions = download(workspace, out, kept);
  expect(std::equal(positions.begin(), positions.end(), wanted.begin(), wanted.end(),
                    [](uint32_t a, int64_t b) { return int64_t{a} == b; }),
         what + ", positions");
  return true;
}

// --- inputs
// -------------------------------------------------------------------------------------------------------

Positions scattered(uint64_t n, double density, Random& random) {
  Positions positions;
  std::bernoulli_distribution keep(density);
  for (uint64_t i = 0; i < n; ++i) {
    if (keep(random)) positions.push_back(static_cast<int64_t>(i));
  }
  return positions;
}

// Runs of what is kept and of what is not, of lengths of any size up to `longest`.
Positions clustered(uint64_t n, uint64_t longest, Random& random) {
  Positions positions;
  bool keep = false;
  for (uint64_t i = 0; i < n; keep = !keep) {
    const uint64_t run = 1 + random() % (1 + longest / (1 + random() % longest));
    for (uint64_t j = 0; j < run && i < n; ++j, ++i) {
      if (keep) positions.push_back(static_cast<int64_t>(i));
    }
  }
  return positions;
}

// Tiles as another encoder may choose them.
Bytes foreign(unsigned t, uint64_t n, Random& random) {
  constexpr double kDensities[] = {0, 0.0001, 0.01, 0.2, 0.6, 0.95, 1};
  Bytes headers = {static_cast<uint8_t>(t)}, data;
  for (uint64_t start = 0; start < n; start += uint64_t{1} << t) {
    const uint64_t length = std::min(uint64_t{1} << t, n - start);
    const Positions set = scattered(length, kDensities[random() % 7], random);
    const std::vector<uint32_t> coded(set.begin(), set.end());
    const uint64_t c = coded.size();
    Tile tile = {static_cast<unsigned>(random() % 3), random() % 2 > 0, 0, c, 0};
    if (tile.mode == kList && t > kMinTileBits) tile.mode = kRice;
    if (tile.mode == kBitmap) tile.complement = false;
    if (tile.mode == kRice) tile.r = static_cast<unsigned>(random() % (kMaxRice + 1));
    if (tile.has_unary()) {
      tile.unary = c;
      for (size_t i = 0; i < c; ++i)
        tile.unary += (i == 0 ? coded[0] : coded[i] - coded[i - 1] - 1) >> tile.r;
    }
    Bytes header(header_bytes(tile)), bytes(tile_bytes(tile, length));
    put_header(header.data(), tile);
    if (tile.mode == kBitmap) {
      kernels().pack_bitmap(coded.data(), c, bytes.data());
    } else if (tile.mode == kList) {
      for (size_t i = 0; i < c; ++i) std::memcpy(bytes.data() + 2 * i, &coded[i], 2);
    } else if (c > 0) {
      const size_t remainders = ceil_div(c * tile.r, 8);
      kernels().pack_rice(coded.data(), c, tile.r, bytes.data(), bytes.data() + remainders,
                          bytes.size() - remainders);
    }
    headers.insert(headers.end(), header.begin(), header.end());
    data.insert(data.end(), bytes.begin(), bytes.end());
  }
  headers.insert(headers.end(), data.begin(), data.end());
  return headers;
}

void both(const std::vector<Group>& groups, const std::string& what) {
  pack(groups, what);
  for (const Group& group : groups) {
    const std::string name = what + " of " + std::to_string(group.n);
    expect(unpack(pack_sparse(kernels(), group.positions, group.n), group.n, name), name);
  }
}

void test_ours(Random& random) {
  constexpr uint64_t kSizes[] = {0,     1,     31,    4095,   4096,   0,      4097,
                                 65535, 65536, 65537, 131072, 200003, 524289, 0};
  for (const double density :
       {0.0, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999, 1.0}) {
    std::vector<Group> groups;
    for (const uint64_t n : kSizes) groups.push_back({n, scattered(n, density, random)});
    both(groups, "density " + std::to_string(density));
  }
  for (const uint64_t longest : {3, 100, 10000, 300000}) {
    std::vector<Group> groups;
    for (const uint64_t n : kSizes) groups.push_back({n, clustered(n, longest, random)});
    both(groups, "runs up to " + std::to_string(longest));
  }
  both({}, "no group");
  const uint64_t most = (uint64_t{1} << 32) - 1;
  both({{uint64_t{1} << 26, {0, 1, 70000, (1 << 26) - 1}}}, "few positions");
  Positions few;
  for (int i = 0; i < 3000; ++i) few.push_back(static_cast<int64_t>(random() % most));
  few.push_back(static_cast<int64_t>(most - 1));
  std::sort(few.begin(), few.end());
  few.erase(std::unique(few.begin(), few.end()), few.end());
  expect(unpack(pack_sparse(kernels(), few, most), most, "large"), "large");
}

void test_foreign(Random& random) {
  std::set<unsigned> seen;
  for (int i = 0; i < 40; ++i) {
    const unsigned t = i % 4 == 0 ? 18 : kMinTileBits;
    const uint64_t n = 1 + random() % (t == 18 ? 600000 : 200000);
    const Bytes set = foreign(t, n, random);
    expect(unpack(set, n, "foreign " + std::to_string(i)), "foreign " + std::to_string(i));
    const auto tiles = *read_headers(set, n);
    for (const CodedTile& tile : tiles) seen.insert(tile.tile.mode | tile.tile.complement << 2);
  }
  expect(seen == std::set<unsigned>{kBitmap, kList, kRice, kList | 4, kRice | 4}, "modes");
}

void test_mutated(Random& random) {
  int valid = 0, refused = 0;
  for (int i = 0; i < 1500; ++i) {
    const uint64_t n = 1 + random() % (i % 50 == 0 ? 150000 : 300);
    Bytes set = i % 2 == 0 ? foreign(kMinTileBits, n, random)
                           : pack_sparse(kernels(), clustered(n, 1 + random() % 40, random), n);
    for (uint64_t j = 0; j <= random() % 3; ++j) {
      uint8_t& byte = set[random() % set.size()];
      byte = static_cast<uint8_t>(random() % 2 == 0 ? byte ^ 1 << random() % 8 : random());
    }
    ++(unpack(set, n, "mutated " + std::to_string(i)) ? valid : refused);
  }
  expect(valid > 100 && refused > 100, "mutations of both kinds");
}

// Every Rice tile of a few bits, most of which are wrong.
void test_small() {
  constexpr unsigned kR = 2;
  for (unsigned bits = 0; bits < 1u << 13; ++bits) {
    const uint8_t c = static_cast<uint8_t>(1 + (bits >> 12));
    const uint8_t u = static_cast<uint8_t>(bits >> 9 & 7);
    const uint8_t remainders = static_cast<uint8_t>(bits >> 5 & 15);
    const uint8_t unary = static_cast<uint8_t>(bits & 31);
    Bytes set = {kMinTileBits, kRice | kR << 3, c, u, remainders};
    if (u > 0) set.push_back(unary);
    unpack(set, 12, "small " + std::to_string(bits));
  }
}

// The lowest of the tiles that are wrong is found.
void test_lowest(Random& random) {
  constexpr uint64_t kTiles = 5;
  const uint64_t n = kTiles << kMinTileBits;
  for (uint64_t wrong = 0; wrong < kTiles; ++wrong) {
    Bytes set = pack_sparse(kernels(), scattered(n, 0.01, random), n);
    auto tiles = *read_headers(set, n);
    for (uint64_t i = wrong; i < kTiles; ++i) {
      const size_t last = tile_bytes(tiles[i].tile, tiles[i].length) - 1;
      set[static_cast<size_t>(tiles[i].data - set.data()) + last] = 0;
    }
    Workspace workspace(nullptr);
    const uint8_t* const payload = workspace.upload(set);
    for (CodedTile& tile : tiles) tile.data = payload + (tile.data - set.data());
    uint32_t* const malformed = workspace.upload(std::vector<uint32_t>{UINT32_MAX});
    cuda::check_tiles(workspace.upload(tiles), kTiles, malformed, workspace);
    expect(download(workspace, malformed, 1)[0] == wrong, "lowest " + std::to_string(wrong));
  }
}

}  // namespace

int main() {
  Random random(4);
  test_ours(random);
  test_foreign(random);
  test_mutated(random);
  test_small();
  test_lowest(random);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
