// The id channel of a rasterized image: triangle index + 1 as a float, as a bit pattern above 2^24.
#pragma once
#include "common/host_device.h"

namespace text3d {
namespace TEXT3D_ISA {

// -> triangle index, -1 at the background
TEXT3D_HD int32_t decode_triangle_id(float channel) {
  if (channel <= 16777216.f) return channel > 0.f ? int32_t(channel) - 1 : -1;
  return int32_t(float_to_bits(channel) - 0x4a800000u) - 1;
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
