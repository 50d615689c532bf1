#include "interpolate/interpolate.h"
#include "common/corner_sums.h"

namespace text3d {
namespace TEXT3D_ISA {

void interpolate_forward(const InterpolateForwardParams& p) {
  parallel_for(p.images * p.pixels, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) InterpolateForwardPixel{p}(i);
  });
}

void interpolate_backward(const InterpolateBackwardParams& p) {
  const InterpolateBackwardPixel pixel{p};
  if (!p.grad_attr) {
    parallel_for(p.images * p.pixels, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const PixelCorners corners(p, i);
        if (corners.background()) pixel.background(i);
        else pixel(i, corners, [](int32_t, int32_t, float) {});
      }
    });
    return;
  }
  const int64_t stride = p.shared ? 0 : p.vertices * p.attributes;
  with_channels(p.attributes, [&](auto channels) {
    add_to_corners<channels>(p.images, p.pixels, p.tri, p.vertices, p.attributes, p.grad_attr, stride,
                             [&](int64_t image, int64_t begin, int64_t end, auto& add) {
      const int64_t first = image * p.pixels;
      for (int64_t i = first + begin; i < first + end; ++i) {
        const PixelCorners corners(p, i);
        if (corners.background()) {
          pixel.background(i);
          continue;
        }
        float* to = add(decode_triangle_id(p.rast[4 * i + 3]));
        pixel(i, corners, [&](int32_t k, int32_t c, float value) { to[k * p.attributes + c] += value; });
      }
    });
  });
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
