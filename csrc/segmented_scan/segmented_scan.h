// Running sums or products within segments of neighbouring values (segmented scan: Blelloch 1990).
// With k counting along a segment, from its other end if reversed, and e = 1 if exclusive, otherwise 0:
//   y_k = x_0 + ... + x_{k-e},  or the product of these; of none of them 0, or 1.
//
// Backward. Of a sum: the scan of dL/dy in the other direction. Of a product, with g_k = dL/dy_k, and without a division,
// so that factors of 0 do no harm:
//   dL/dx_j = (x_0 ... x_{j-1}) h_j,  h_j = g_{j+e} + x_{j+1} h_{j+1}
#pragma once
#include "common/host_device.h"

namespace text3d {

struct SegmentedScanForwardParams {
  const float* values;     // [S]
  const int32_t* offsets;  // [N + 1], segment n is values offsets[n] to offsets[n + 1]
  float* out;              // [S], 0 beyond the last offset
  int64_t segments, count;
  bool product, exclusive, reverse;
  auto fields() { return std::tie(values, offsets, out, segments, count, product, exclusive, reverse); }
};

struct SegmentedScanBackwardParams {  // of a product
  const float* grad;       // [S]
  const float* values;     // [S]
  const int32_t* offsets;  // [N + 1]
  float* grad_values;      // [S], 0 beyond the last offset
  int64_t segments, count;
  bool exclusive, reverse;
  auto fields() { return std::tie(grad, values, offsets, grad_values, segments, count, exclusive, reverse); }
};

namespace TEXT3D_ISA {

// A segment in the order of the scan.
struct Segment {
  int64_t first, step, length;

  TEXT3D_HD int64_t operator()(int64_t k) const { return first + step * k; }
};

// Wrong offsets must not send a kernel out of bounds.
TEXT3D_HD Segment segment_of(const int32_t* offsets, int64_t segment, int64_t count, bool reverse) {
  int64_t begin = offsets[segment], end = offsets[segment + 1];
  begin = begin < 0 ? 0 : begin;
  end = end < count ? end : count;
  return {reverse ? end - 1 : begin, reverse ? -1 : 1, end > begin ? end - begin : 0};
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
