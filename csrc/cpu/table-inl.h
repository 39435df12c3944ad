// One stamp: all kernel bodies and the table of them. A stamp defines FEDCODEC_ISA and includes its
// intrinsics first. No header of the standard library but those of arith.h: the linker may keep a
// weak copy of an AVX object for everyone.
#include "fedcodec/arith.h"
#include "fedcodec/kernels.h"

#define FEDCODEC_TEXT_(x) #x
#define FEDCODEC_TEXT(x) FEDCODEC_TEXT_(x)
#define FEDCODEC_JOIN_(a, b) a##b
#define FEDCODEC_JOIN(a, b) FEDCODEC_JOIN_(a, b)

namespace fedcodec {
namespace {

#include "stream-inl.h"
//
#include "mask-inl.h"
//
#include "select-inl.h"
//
#include "random-inl.h"
//
#include "quantize-inl.h"
//
#include "sign-inl.h"
//
#include "channels-inl.h"
//
#include "convert-inl.h"
//
#include "sparse-inl.h"
//
#include "expand-inl.h"
//
#include "accumulate-inl.h"
//
#include "checksum-inl.h"
//
#include "roof-inl.h"

}  // namespace

extern const Kernels FEDCODEC_JOIN(kernels_, FEDCODEC_ISA);
const Kernels FEDCODEC_JOIN(kernels_, FEDCODEC_ISA) = {
    .name = FEDCODEC_TEXT(FEDCODEC_ISA),
    .max_key_f32 = max_key_f32,
    .max_key_f64 = max_key_f64,
    .count_digits_f32 = count_digits_f32,
    .count_digits_f64 = count_digits_f64,
    .compact_f32 = compact_f32,
    .compact_f64 = compact_f64,
    .compact_sum_f32 = compact_sum_f32,
    .compact_sum_f64 = compact_sum_f64,
    .refine_f32 = refine_f32,
    .refine_f64 = refine_f64,
    .count_above_f32 = count_above_f32,
    .count_above_f64 = count_above_f64,
    .add_norms_f32 = add_norms<float>,
    .add_norms_f64 = add_norms<double>,
    .mark_used_f32 = mark_used<float>,
    .mark_used_f64 = mark_used<double>,
    .pack_mask = pack_mask,
    .unpack_mask = unpack_mask,
    .count_bits = count_bits,
    .apply_mask_f32 = apply_mask_f32,
    .apply_mask_f64 = apply_mask_f64,
    .quantize_blocks = quantize_blocks,
    .channel_keys = channel_keys,
    .scales_from_keys = scales_from_keys,
    .quantize_nearest = quantize_nearest,
    .quantize_stochastic = quantize_stochastic,
    .dequantize = dequantize,
    .pack_codes = pack_codes,
    .unpack_codes = unpack_codes,
    .pack_signs = pack_signs,
    .unpack_signs = unpack_signs,
    .magnitude_sum = magnitude_sum,
    .f16_to_f32 = f16_to_f32,
    .bf16_to_f32 = bf16_to_f32,
    .f64_to_f32 = f64_to_f32,
    .f32_to_f16 = f32_to_f16,
    .f32_to_bf16 = f32_to_bf16,
    .f32_to_f64 = f32_to_f64,
    .f64_to_f16 = f64_to_f16,
    .f64_to_bf16 = f64_to_bf16,
    .max_key_u16 = max_key_u16,
    .sum_f32 = sum_f32,
    .sum_f64 = sum_f64,
    .subtract_f32 = subtract_f32,
    .subtract_f64 = subtract_f64,
    .narrow_positions = narrow_positions,
    .gap_sums = gap_sums,
    .pack_rice = pack_rice,
    .unpack_rice = unpack_rice,
    .sum_remainders = sum_remainders,
    .pack_bitmap = pack_bitmap,
    .unpack_bitmap = unpack_bitmap,
    .complement = complement,
    .gather_f32 = gather<float>,
    .gather_f64 = gather<double>,
    .scatter_f32 = scatter<float>,
    .scatter_f64 = scatter<double>,
    .expand_u16 = expand<uint16_t>,
    .expand_f32 = expand<float>,
    .expand_f64 = expand<double>,
    .random_words = random_words,
    .random_positions = random_positions,
    .add_f32 = add<float, float>,
    .add_f32_to_f64 = add<float, double>,
    .add_f64 = add<double, double>,
    .add_codes_f32 = add_codes<float>,
    .add_codes_f64 = add_codes<double>,
    .add_at_f32 = add_at<float, float>,
    .add_at_f64 = add_at<float, double>,
    .add_f64_at_f64 = add_at<double, double>,
    .crc32 = crc32,
    .roof = roof,
};

}  // namespace fedcodec
