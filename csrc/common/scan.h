// Running sums over a CUDA block, for scans of any length by two launches: one adds up tiles of kScanTile values, the
// other begins each tile with the sum of those before it.
#pragma once
#include "common/host_device.h"

namespace text3d {
namespace TEXT3D_ISA {

constexpr int kScanTile = 1024;  // values, and threads of the block that scans them

#if defined(__CUDACC__) || defined(TEXT3D_EMULATE)

__device__ __forceinline__ int64_t warp_running_sum(int64_t value) {
  const int lane = int(threadIdx.x) % 32;
  for (int by = 1; by < 32; by *= 2) {
    const int64_t other = __shfl_up_sync(~0u, value, by);
    if (lane >= by) value += other;
  }
  return value;
}

// The sum of the values of this thread and those before it; all threads of the block (kScanTile) must call it. totals:
// shared memory for kScanTile / 32 values; synchronize before using it again.
__device__ __forceinline__ int64_t block_running_sum(int64_t value, int64_t* totals) {
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  value = warp_running_sum(value);
  if (lane == 31) totals[warp] = value;
  __syncthreads();
  if (warp == 0) totals[lane] = warp_running_sum(totals[lane]);
  __syncthreads();
  return value + (warp > 0 ? totals[warp - 1] : 0);
}

#endif

}  // namespace TEXT3D_ISA
}  // namespace text3d
