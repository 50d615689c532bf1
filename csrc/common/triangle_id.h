// The id channel of a rasterized image: triangle index + 1 as a float, as a bit pattern above 2^24, 0 at the background.
#pragma once
#include "common/host_device.h"

namespace text3d {
namespace TEXT3D_ISA {

TEXT3D_HD float encode_triangle_id(int32_t id) {
  return id < (1 << 24) ? float(id + 1) : bits_to_float(0x4a800000u + uint32_t(id) + 1u);
}
// -> triangle index, -1 at the background
TEXT3D_HD int32_t decode_triangle_id(float channel) {
  if (!(channel > 0.f)) return -1;
  return channel <= 16777216.f ? int32_t(channel) - 1 : int32_t(float_to_bits(channel) - 0x4a800000u) - 1;
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
