#include "interpolate/interpolate.h"
#include <stdexcept>
#include <string>
#include "common/corner_sums.h"

namespace text3d {
namespace TEXT3D_ISA {

void interpolate_forward(const InterpolateForwardParams& p) {
  int32_t trouble = kNoTrouble;
  with_channels(p.attributes, [&](auto attributes) {
    const InterpolateForwardPixel<attributes> pixel{p};
    parallel_for(p.images * p.pixels, 4096, [&](int64_t begin, int64_t end) {
      int32_t found = kNoTrouble;
      for (int64_t i = begin; i < end; ++i) found |= pixel(i);
      if (found) __atomic_fetch_or(&trouble, found, __ATOMIC_RELAXED);
    });
  });
  if (trouble & kBadVertex)
    throw std::invalid_argument("tri: expected indices from 0 to " + std::to_string(p.vertices - 1) +
                                " like the vertices of attr, got some out of this range");
  if (trouble & kBadId)
    throw std::invalid_argument("rast: expected triangles below " + std::to_string(p.triangles) +
                                " like those of tri, got some out of this range");
}

void interpolate_backward(const InterpolateBackwardParams& p) {
  with_channels(p.attributes, [&](auto attributes) {
    const InterpolateBackwardPixel<attributes> pixel{p};
    // adder(i) takes pixel i's gradients to the corners: add(corner, attribute, value)
    const auto visit = [&](int64_t begin, int64_t end, const auto& adder) {
      for (int64_t i = begin; i < end; ++i) {
        const PixelCorners corners(p, i, pixel.attributes());
        if (corners.background()) pixel.background(i);
        else pixel(i, corners, adder(i));
      }
    };
    if (!p.grad_attr) {
      parallel_for(p.images * p.pixels, 4096, [&](int64_t begin, int64_t end) {
        visit(begin, end, [](int64_t) { return [](int32_t, int32_t, float) {}; });
      });
      return;
    }
    const int64_t stride = p.shared ? 0 : p.vertices * p.attributes;
    add_to_corners<attributes>(p.images, p.pixels, p.tri, p.vertices, p.attributes, p.grad_attr, stride,
                               [&](int64_t image, int64_t begin, int64_t end, auto& sums) {
      visit(image * p.pixels + begin, image * p.pixels + end, [&](int64_t i) {
        float* to = sums(decode_triangle_id(p.rast[4 * i + 3]));
        return [&pixel, to](int32_t k, int32_t c, float value) { to[k * pixel.attributes() + c] += value; };
      });
    });
  });
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
