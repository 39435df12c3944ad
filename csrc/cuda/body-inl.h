// What both ways of a body on a GPU need: how values travel, in the kernels' words.
#pragma once

#include "../body/decode-inl.h"
#include "kernels.h"

namespace fedcodec::cuda {
namespace {

// Values as they are encoded or decoded, without their place in memory.
struct Described {
  Form form;
  Dtype dtype;
  unsigned bits;
  Grid grid;
};

Described described(const Layout& layout) {
  const cuda::Form form = layout.form == fedcodec::Form::kPlain   ? Form::kPlain
                          : layout.form == fedcodec::Form::kCodes ? Form::kCodes
                                                                  : Form::kSigns;
  return {form, layout.dtype, layout.bits, layout.grid};
}

// Bytes of a group's scales, in front of its codes.
uint64_t scale_bytes(const Layout& layout) {
  switch (layout.form) {
    case fedcodec::Form::kPlain:
      return 0;
    case fedcodec::Form::kSigns:
      return sizeof(float);
    default:
      return layout.grid.channels * sizeof(float);
  }
}

}  // namespace
}  // namespace fedcodec::cuda
