// Sums by runs over a CUDA warp: neighbouring lanes with one key are summed first, and the last of them adds. For
// gradients of pixels to triangles, where runs are as long as triangles are wide.
#pragma once
#include "common/host_device.h"

namespace text3d {
namespace TEXT3D_ISA {

#if defined(__CUDACC__) || defined(TEXT3D_EMULATE)

// All 32 lanes must construct it, and call sum().
struct WarpRuns {
  int offset;   // of this lane within its run
  int longest;  // the largest offset of any lane
  bool last;    // does this lane end its run?

  __device__ __forceinline__ explicit WarpRuns(int64_t key) {
    const int lane = int(threadIdx.x) % 32;
    const int64_t before = __shfl_up_sync(~0u, key, 1);
    const unsigned starts = __ballot_sync(~0u, lane == 0 || before != key);
    offset = __clz(int(starts << (31 - lane)));  // bits above this lane are shifted out
    last = lane == 31 || (starts >> (lane + 1) & 1u);
    longest = __reduce_max_sync(~0u, offset);
  }
  // The sum of a run up to this lane: of all of it where `last`.
  __device__ __forceinline__ float sum(float value) const {
    for (int by = 1; by <= longest; by *= 2) {
      const float other = __shfl_up_sync(~0u, value, by);
      if (offset >= by) value += other;
    }
    return value;
  }
};

#endif

}  // namespace TEXT3D_ISA
}  // namespace text3d
