#include "interpolate/interpolate.h"
#include "common/triangle_sums.h"

namespace text3d {
namespace TEXT3D_ISA {

void interpolate_forward(const InterpolateForwardParams& p) {
  parallel_for(p.images * p.pixels, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) InterpolateForwardPixel{p}(i);
  });
}

void interpolate_backward(const InterpolateBackwardParams& p) {
  const InterpolateBackwardPixel pixel{p};
  for (int64_t image = 0; image < p.images; ++image) {
    const int64_t first = image * p.pixels;
    if (!p.grad_attr) {
      parallel_for(p.pixels, 4096, [&](int64_t begin, int64_t end) {
        for (int64_t i = first + begin; i < first + end; ++i) {
          const PixelCorners corners(p, i);
          if (corners.background()) pixel.background(i);
          else pixel(i, corners, [](int32_t, int32_t, float) {});
        }
      });
      continue;
    }
    float* table = p.grad_attr + (p.shared ? 0 : image * p.vertices * p.attributes);
    add_to_corners(p.pixels, p.tri, p.vertices, p.attributes, table, [&](int64_t begin, int64_t end, const auto& sums) {
      for (int64_t i = first + begin; i < first + end; ++i) {
        const PixelCorners corners(p, i);
        if (corners.background()) {
          pixel.background(i);
          continue;
        }
        float* to = sums(decode_triangle_id(p.rast[4 * i + 3]));
        pixel(i, corners, [&](int32_t k, int32_t c, float value) { to[k * p.attributes + c] += value; });
      }
    });
  }
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
