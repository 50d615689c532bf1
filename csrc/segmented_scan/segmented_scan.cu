// A warp per segment, 32 values at a time. A product's gradient first finds the products before each value, then goes
// from the end to the beginning with h_j = a_j h_{j+1} + b_j as a scan of these linear functions.
#include "segmented_scan/segmented_scan.h"
#include "common/launch.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

constexpr int kWarps = 4;  // warps, that is segments, a block

template <bool kProduct>
__device__ __forceinline__ float combined(float a, float b) {
  return kProduct ? a * b : a + b;
}

// Of this lane and those before it.
template <bool kProduct>
__device__ __forceinline__ float warp_scan(float x, int lane) {
  TEXT3D_UNROLL
  for (int by = 1; by < 32; by *= 2) {
    const float other = __shfl_up_sync(~0u, x, by);
    if (lane >= by) x = combined<kProduct>(other, x);
  }
  return x;
}

template <bool kProduct>
__device__ __forceinline__ void scan(const Segment& at, int lane, bool exclusive, const float* values, float* out) {
  constexpr float kNone = kProduct ? 1.f : 0.f;
  float carry = kNone;
  for (int64_t start = 0; start < at.length; start += 32) {
    const int64_t k = start + lane, source = k - (exclusive ? 1 : 0);
    const float own = source >= 0 && source < at.length ? values[at(source)] : kNone;
    const float upto = combined<kProduct>(carry, warp_scan<kProduct>(own, lane));
    if (k < at.length) out[at(k)] = upto;
    carry = __shfl_sync(~0u, upto, 31);
  }
}

template <bool kProduct>
__global__ void __launch_bounds__(kWarps * 32) segmented_scan_forward_kernel(SegmentedScanForwardParams p) {
  const int64_t segment = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (segment >= p.segments) return;
  const Segment at = segment_of(p.offsets, segment, p.count, p.reverse);
  scan<kProduct>(at, int(threadIdx.x) % 32, p.exclusive, p.values, p.out);
}

__global__ void __launch_bounds__(kWarps * 32) segmented_scan_backward_kernel(SegmentedScanBackwardParams p) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t segment = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, ahead = p.exclusive ? 1 : 0;
  if (segment >= p.segments) return;
  const Segment at = segment_of(p.offsets, segment, p.count, p.reverse);
  scan<true>(at, lane, true, p.values, p.grad_values);
  float behind = 0.f;  // h of the first value of the 32 that follow
  for (int64_t start = (at.length - 1) / 32 * 32; start >= 0 && at.length; start -= 32) {
    const int64_t j = start + lane;
    float a = j + 1 < at.length ? p.values[at(j + 1)] : 0.f, b = j + ahead < at.length ? p.grad[at(j + ahead)] : 0.f;
    TEXT3D_UNROLL
    for (int by = 1; by < 32; by *= 2) {
      const float next_a = __shfl_down_sync(~0u, a, by), next_b = __shfl_down_sync(~0u, b, by);
      if (lane + by < 32) b += a * next_b, a *= next_a;
    }
    const float h = a * behind + b;
    if (j < at.length) p.grad_values[at(j)] *= h;  // this lane wrote it
    behind = __shfl_sync(~0u, h, 0);
  }
}

// What is beyond the last offset, which only the device knows.
struct ZeroTail {
  const int32_t* last_offset;
  float* target;
  TEXT3D_HD void operator()(int64_t i) const {
    if (i >= *last_offset) target[i] = 0.f;
  }
};

unsigned blocks_for(int64_t segments) { return unsigned((segments + kWarps - 1) / kWarps); }

}  // namespace

void segmented_scan_forward(const SegmentedScanForwardParams& p, cudaStream_t stream) {
  launch(p.count, ZeroTail{p.offsets + p.segments, p.out}, stream);
  if (p.segments == 0) return;
  if (p.product) {
    TEXT3D_LAUNCH(segmented_scan_forward_kernel<true>, blocks_for(p.segments), kWarps * 32, 0, stream, p);
  } else {
    TEXT3D_LAUNCH(segmented_scan_forward_kernel<false>, blocks_for(p.segments), kWarps * 32, 0, stream, p);
  }
}

void segmented_scan_backward(const SegmentedScanBackwardParams& p, cudaStream_t stream) {
  launch(p.count, ZeroTail{p.offsets + p.segments, p.grad_values}, stream);
  if (p.segments == 0) return;
  TEXT3D_LAUNCH(segmented_scan_backward_kernel, blocks_for(p.segments), kWarps * 32, 0, stream, p);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
