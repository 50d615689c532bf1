#include "interpolate/interpolate.h"
#include "common/launch.h"
#include "common/segmented.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

constexpr int kThreads = 128;

// Adds to the corners' gradients the sums over runs of pixels that see one triangle; all lanes of a whole warp call it.
// In the last warp of the grid, which may not be whole, each pixel adds on its own.
struct AddToCorners {
  float* to[3];
  const WarpRuns& runs;
  bool whole, seen;
  __device__ __forceinline__ void operator()(int32_t k, int32_t c, float value) const {
    if (whole) value = runs.sum(seen ? value : 0.f);
    if (seen && (runs.last || !whole)) atomic_add(to[k] + c, value);
  }
};

struct AddNothing {
  __device__ __forceinline__ void operator()(int32_t, int32_t, float) const {}
};

__global__ void gradient_kernel(InterpolateBackwardParams p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, total = p.images * p.pixels;
  const int64_t at = i < total ? i : total - 1, image = at / p.pixels;
  PixelCorners corners(p, at, p.attributes);
  const bool seen = i < total && !corners.background();
  const int64_t triangle = decode_triangle_id(p.rast[4 * at + 3]);
  const WarpRuns runs(seen ? (image << 32 | triangle) : -1);
  const bool whole = __all_sync(~0u, i < total), any = __any_sync(~0u, seen);
  if (i >= total) return;
  const InterpolateBackwardPixel<0> pixel{p};
  if (!any || (!seen && (!whole || !p.grad_attr))) return pixel.background(i);
  if (!p.grad_attr) return pixel(i, corners, AddNothing{});
  AddToCorners add{{nullptr, nullptr, nullptr}, runs, whole, seen};
  const int64_t first = p.shared ? 0 : image * p.vertices;
  for (int k = 0; k < 3; ++k) {
    if (!seen) corners.attr[k] = p.attr, corners.vertices[k] = 0;  // something to read: another lane sees a vertex
    add.to[k] = p.grad_attr + (first + corners.vertices[k]) * p.attributes;
  }
  pixel(i, corners, add);
  if (!seen) pixel.background(i);
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
