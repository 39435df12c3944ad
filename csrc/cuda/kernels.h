// The kernels of the GPU, as functions that launch them on a workspace's stream and return at once.
//
// Pointers are to device memory unless they are said to be the host's. Whoever calls has proved
// every length; a kernel cannot fail, but for device memory that runs out. What is done to one
// element is arith.h's; all groups of a call go through the same launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "device.h"
#include "fedcodec/body.h"
#include "fedcodec/kernels.h"
#include "fedcodec/tiles.h"
#include "fedcodec/typed.h"

namespace fedcodec::cuda {

// --- what is encoded
// -----------------------------------------------------------------------------------------------

// A tensor's elements. A chunk is kChunkElements of them; parts lie in the order of their groups.
struct Part {
  const void* data;  // aligned to its elements only
  uint64_t n;
  uint64_t first;  // the number of its first element in its group
  uint32_t group;
  uint32_t first_chunk;  // chunks of the parts before
  Dtype held;            // float32, float16, bfloat16 or float64
};

struct Parts {
  const Part* parts;
  uint32_t count;
  uint32_t chunks;  // of all
  uint32_t groups;
};

// Groups are selected and coded as values of type W: float, or double where a tensor is float64.
// Narrower elements are widened as they are read. A group that is selected from has fewer than 2^32
// elements.

// --- selection
// -----------------------------------------------------------------------------------------------------

// The cut of group g keeps keys above keys[g] and the first ties[g] equal to it.
template <class W>
struct Cuts {
  KeyOf<W>* keys;
  uint64_t* ties;
};

// The cut that keeps what is above a percentile (0 to 100) of each group's magnitudes.
// `sizes[g]` is the group's number of elements.
template <class W>
Cuts<W> percentile_cuts(const Parts& parts, const uint64_t* sizes, double percentile,
                        Interpolation interpolation, Workspace& workspace);

// Which elements a cut, or a bit string for each group, keeps of each chunk.
struct KeptCounts {
  uint64_t* before;  // chunks + 1: how many are kept in the chunks before, in all groups
  uint64_t* begins;  // groups + 1: the same of the groups before
  uint32_t* ties;    // chunks: how many of the kept ones equal the cut
};

template <class W>
KeptCounts count_kept(const Parts& parts, const Cuts<W>& cuts, Workspace& workspace);
// bits[g] is group g's bit string, of whole 4-byte words.
KeptCounts count_kept(const Parts& parts, const uint32_t* const* bits, Workspace& workspace);

// What is kept, in order: positions within the group and values, with room for all. Raises
// *not_finite to 1 if one is not finite.
template <class W>
void write_kept(const Parts& parts, const Cuts<W>& cuts, const KeptCounts& counts,
                uint32_t* positions, W* values, uint32_t* not_finite, Workspace& workspace);
template <class W>
void write_kept(const Parts& parts, const uint32_t* const* bits, const KeptCounts& counts,
                uint32_t* positions, W* values, uint32_t* not_finite, Workspace& workspace);

// How top-k looks for a bound that few elements reach: in a sample of groups of so many elements at
// least, so many standard deviations below the likely one. The result does not depend on it.
struct Sampling {
  uint64_t fewest = uint64_t{1} << 18;
  double deviations = 4;
};

// What top-k keeps, in order.
template <class W>
struct Kept {
  uint32_t* positions;
  W* values;
  uint64_t* begins;  // groups + 1
};

// Keeps the counts[g] largest of group g, counts being at most its size, and with `drop_zeros` no
// zeros. Most groups are read only once. `sizes` and `counts` are the host's.
template <class W>
Kept<W> topk(const Parts& parts, std::span<const uint64_t> sizes, std::span<const uint64_t> counts,
             bool drop_zeros, uint32_t* not_finite, Workspace& workspace,
             const Sampling& sampling = {});

// The cuts by which top-k keeps counts[g] of group g, at least one. They read the groups as it
// does.
template <class W>
Cuts<W> topk_cuts(const Parts& parts, std::span<const uint64_t> sizes,
                  std::span<const uint64_t> counts, Workspace& workspace);

// Raises *not_finite to 1 if an element is not finite.
void check_finite(const Parts& parts, uint32_t* not_finite, Workspace& workspace);

// Sets the bits of a group's random positions (numerics.md, section 6); `bits` is zeroed.
void set_random_bits(uint64_t seed, uint64_t n, uint64_t k, uint32_t* bits, Workspace& workspace);

// out = a + b, rounded once: float32 sums unless `wide`. `update` may be narrower than the sum.
void sum(const void* update, Dtype held, const void* residual, uint64_t n, bool wide, void* out,
         Workspace& workspace);

// --- index sets in the wire's tiles
// --------------------------------------------------------------------------------

// A wire tile as it will be written.
struct PlannedTile {
  Tile tile;
  uint64_t begin;   // of the positions that it keeps, among all
  uint64_t start;   // in its group
  uint32_t length;  // elements; 0: the slot is empty
  uint32_t group;
};

// One for each group, in device memory: what was planned.
struct PlannedSet {
  uint64_t header_bytes;  // of all its tiles
  uint64_t data_bytes;
  uint64_t first_tile;  // its slot
  uint32_t tiles;
  uint32_t t;
};

struct Plans {
  PlannedTile* tiles;
  uint64_t slots;            // one for every 2^16 elements of a group
  uint64_t* headers_before;  // slots + 1: bytes of the headers of all slots before, in all groups
  uint64_t* data_before;     // slots + 1
  PlannedSet* sets;          // groups
  const uint32_t* positions;
  uint32_t* others;  // where a tile keeps more than half, what it does not keep, from its start
};

// Chooses tiles, modes and parameters (numerics.md, section 7) for the positions kept of each
// group: [begins[g], begins[g + 1]) of `positions`, which the plans refer to. `sizes` is the
// host's: elements of each group, below 2^32. `kept_at_most` bounds begins[groups].
Plans plan_tiles(std::span<const uint64_t> sizes, const uint64_t* begins, const uint32_t* positions,
                 uint64_t kept_at_most, Workspace& workspace);

// Writes each group's index set, 1 + header_bytes + data_bytes, to out + offsets[g], offsets being
// in device memory; those bytes are zeroed. `out` is whole aligned 4-byte words: bits are or'ed
// into those that the sets touch, to which nothing else writes meanwhile.
void write_tiles(const Plans& plans, uint32_t groups, const uint64_t* offsets, uint8_t* out,
                 Workspace& workspace);

// A wire tile to read, whose header is checked, and that it has all of its data.
struct CodedTile {
  Tile tile;
  const uint8_t* data;
  uint64_t start;   // in its group
  uint64_t before;  // positions of the tiles before, in all groups: where its own are written
  uint32_t length;
};

// Lowers *malformed, UINT32_MAX before, to the lowest index of a tile whose data are not of the
// format.
void check_tiles(const CodedTile* tiles, uint64_t n, uint32_t* malformed, Workspace& workspace);

// The positions, within their groups, that n tiles keep; check_tiles has found nothing.
void unpack_tiles(const CodedTile* tiles, uint64_t n, uint32_t* positions, Workspace& workspace);

// --- values: to bytes
// ----------------------------------------------------------------------------------------------

enum class Form : uint8_t { kPlain, kCodes, kSigns };

// A group's m > 0 values and how they travel (layout_of of layout-inl.h).
struct ValueGroup {
  const void* x;  // aligned to its elements only
  Dtype held;     // of x: any float
  uint64_t m;
  uint32_t first_chunk;  // chunks of the groups before
  Form form;
  Dtype dtype;           // kPlain: what they travel as
  unsigned bits;         // kCodes
  Grid grid;             // kCodes
  uint64_t first_scale;  // scales of the groups before
  uint64_t drawn;        // kCodes, stochastic: the number of the first value
  uint8_t* scales;       // kCodes: channels float32, kSigns: one; no alignment
  uint8_t* data;         // no alignment
};

struct ValueGroups {
  std::span<const ValueGroup> host;
  const ValueGroup* groups;  // the same, uploaded
  uint64_t chunks;           // of all
  uint64_t scales;           // of all kCodes
};

// Writes the bytes of all groups; `draw.first` is not read. Raises *not_finite to 1 if a value is
// not finite, as it is or as it travels: what is written is meaningless then.
void encode_values(const ValueGroups& groups, const Draw* draw, uint32_t* not_finite,
                   Workspace& workspace);

// --- values: from bytes, to tensors or into sums
// ---------------------------------------------------------------------------

// A group's m > 0 values as they travelled; the bytes are checked. The word of memory in which
// `data` begins may be read whole.
struct CodedGroup {
  Form form;
  Dtype dtype;            // kPlain
  unsigned bits;          // kCodes
  Grid grid;              // kCodes
  const uint8_t* scales;  // kCodes, kSigns; no alignment
  const uint8_t* data;    // no alignment
  uint64_t m;
  uint64_t first_chunk;   // chunks of m of the groups before
  uint64_t begin;         // sparse: where its positions begin among all
  uint32_t first_target;  // its tensors
  uint32_t targets;
};

// A tensor that values are decoded to or added to.
struct Target {
  void* data;
  uint64_t n;
  uint64_t first;  // the number of its first element in its group
  Dtype dtype;     // that values are rounded to
  Dtype held;      // of data: the same, or the sum's float32 or float64
};

struct CodedGroups {
  const CodedGroup* groups;
  uint32_t count;
  uint64_t chunks;  // of all
  const Target* targets;
  const uint32_t* positions;  // of what is kept, or null: all are
};

// Writes values, each rounded once to its tensor's dtype. What is not kept stays as it is.
void decode_values(const CodedGroups& groups, Workspace& workspace);
// acc = fl(acc + fl(weight * decoded)) as numerics.md, section 8, has it.
void accumulate_values(const CodedGroups& groups, double weight, Workspace& workspace);

// out = first + second and acc of what two terms of a residual decode to: float32, or float64 where
// `wide`; `to` is as in decode_values.
void decode_sum(const void* first, const void* second, bool wide, const Target& to,
                Workspace& workspace);
void accumulate_sum(const void* first, const void* second, bool wide, const Target& to,
                    double weight, Workspace& workspace);

// acc += weight * value for n values, without alignment, of a dtype that is no float.
void accumulate_exact(Dtype dtype, const uint8_t* bytes, uint64_t n, double weight, double* acc,
                      Workspace& workspace);

// --- one array by itself
// -------------------------------------------------------------------------------------------

void widen_positions(const uint32_t* from, uint64_t n, int64_t* to, Workspace& workspace);
// Raises *invalid to 1 unless they increase strictly from 0 to below `below`.
void narrow_positions(const int64_t* from, uint64_t n, uint64_t below, uint32_t* to,
                      uint32_t* invalid, Workspace& workspace);

// A mask keeps where its byte is not 0. Raises *not_finite to 1 if a value is not finite, kept or
// not.
void apply_mask(const void* values, bool wide, uint64_t n, const uint8_t* mask, void* out,
                uint32_t* not_finite, Workspace& workspace);
void pack_mask(const uint8_t* mask, uint64_t n, uint8_t* bits, Workspace& workspace);
void unpack_mask(const uint8_t* bits, uint64_t n, uint8_t* mask, Workspace& workspace);

// Codes of 2 to 7 bits. Raises *invalid to 1 if one takes more.
void pack_codes(const int8_t* codes, uint64_t n, unsigned bits, uint8_t* packed, uint32_t* invalid,
                Workspace& workspace);
void unpack_codes(const uint8_t* packed, uint64_t n, unsigned bits, int8_t* codes,
                  Workspace& workspace);
// Raises *invalid to 1 if a scale is negative, or a code times it not finite.
void check_scales(const float* scales, uint64_t n, unsigned bits, uint32_t* invalid,
                  Workspace& workspace);

// --- sums
// -----------------------------------------------------------------------------------------------

// acc += from, of float32, or float64 where they are wide.
void merge_sums(const void* from, bool wide, uint64_t n, void* acc, Workspace& workspace);
// The mean of such sums of that weight: rounded to a float dtype, to its largest value at most;
// half to even and clipped to an integer dtype; for a bool true where it rounds to 1.
void mean_of_sums(const void* sum, bool wide, uint64_t n, double weight, Dtype dtype, void* out,
                  Workspace& workspace);

}  // namespace fedcodec::cuda
