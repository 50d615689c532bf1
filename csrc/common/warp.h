// Sums over a CUDA warp, for gradients of many pixels to one triangle. On a host (without emulation) a warp has one lane.
#pragma once
#include "common/host_device.h"

namespace text3d {
namespace TEXT3D_ISA {

// The sum over all 32 lanes, in every lane; all must call it.
TEXT3D_HD float warp_sum(float value) {
#if defined(__CUDA_ARCH__) || defined(TEXT3D_EMULATE)
  TEXT3D_UNROLL for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
#endif
  return value;
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
