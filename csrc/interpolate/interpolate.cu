#include "interpolate/interpolate.h"
#include "common/launch.h"
#include "common/warp.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

constexpr int kThreads = 128;

// Adds to the corners' gradients; together: the warp's pixels share them and are summed first.
struct AddToCorners {
  float* to[3];
  bool together, writes;
  TEXT3D_HD void operator()(int32_t k, int32_t c, float value) const {
    if (together) value = warp_sum(value);
    if (to[k] && writes) atomic_add(to[k] + c, value);
  }
};

__global__ void gradient_kernel(InterpolateBackwardParams p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, total = p.images * p.pixels;
  const int64_t at = i < total ? i : total - 1;
  const int32_t id = decode_triangle_id(p.rast[4 * at + 3]), image = int32_t(at / p.pixels);
  const PixelCorners corners(p, at, p.attributes);
  const bool seen = i < total && !corners.background();
  const int32_t first_id = __shfl_sync(~0u, id, 0), first_image = __shfl_sync(~0u, image, 0);
  const bool together = __all_sync(~0u, seen && id == first_id && image == first_image);
  if (i >= total) return;
  if (!seen) return InterpolateBackwardPixel<0>{p}.background(i);
  AddToCorners add;
  add.together = together && p.grad_attr, add.writes = !together || threadIdx.x % 32 == 0;
  const int64_t first = p.shared ? 0 : int64_t(image) * p.vertices;
  for (int k = 0; k < 3; ++k)
    add.to[k] = p.grad_attr ? p.grad_attr + (first + corners.vertices[k]) * p.attributes : nullptr;
  InterpolateBackwardPixel<0>{p}(i, corners, add);
}

}  // namespace

void interpolate_forward(const InterpolateForwardParams& p, cudaStream_t stream) {
  launch(p.images * p.pixels, InterpolateForwardPixel<0>{p}, stream);
}

void interpolate_backward(const InterpolateBackwardParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.images * p.pixels + kThreads - 1) / kThreads;
  if (blocks > 0) TEXT3D_LAUNCH(gradient_kernel, unsigned(blocks), kThreads, 0, stream, p);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
