#include "interpolate/interpolate.h"
#include <stdexcept>
#include <string>
#include "common/corner_sums.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

// visit(first, last, corners) for the runs of pixels [first, last) within [begin, end) that see one triangle of one
// image, or the background. If their number is known, the attributes lie in copies that no result can overlap.
template <int kAttributes, class Params, class Visit>
void for_runs(const Params& p, int64_t begin, int64_t end, const Visit& visit) {
  while (begin < end) {
    const int64_t image_end = (begin / p.pixels + 1) * p.pixels, stop = image_end < end ? image_end : end;
    for (int64_t first = begin, last; first < stop; first = last) {
      const uint32_t id = float_to_bits(p.rast[4 * first + 3]);
      for (last = first + 1; last < stop && float_to_bits(p.rast[4 * last + 3]) == id;) ++last;
      PixelCorners corners(p, first, kAttributes ? kAttributes : p.attributes);
      float values[3][kAttributes ? kAttributes : 1];
      for (int k = 0; kAttributes && k < 3 && !corners.background(); ++k) {
        for (int c = 0; c < kAttributes; ++c) values[k][c] = corners.attr[k][c];
        corners.attr[k] = values[k];
      }
      visit(first, last, corners);
    }
    begin = stop;
  }
}

template <int kAttributes, bool kDerivatives>
void add_gradients(const InterpolateBackwardParams& p) {
  const InterpolateBackwardPixel<kAttributes, kDerivatives> pixel{p};
  const auto visit = [&](int64_t begin, int64_t end, CornerAdder<kAttributes>* adder) {
    for_runs<kAttributes>(p, begin, end, [&](int64_t first, int64_t last, const PixelCorners& corners) {
      if (corners.background()) {
        for (int64_t i = first; i < last; ++i) pixel.background(i);
        return;
      }
      const int32_t id = decode_triangle_id(p.rast[4 * first + 3]);
      if constexpr (kAttributes != 0) {
        float sums[3 * kAttributes] = {};
        for (int64_t i = first; i < last; ++i)
          pixel(i, corners, [&](int32_t k, int32_t c, float value) { sums[k * kAttributes + c] += value; });
        if (adder) adder->add(id, sums);
      } else {
        float* sums = adder ? (*adder)(id) : nullptr;
        for (int64_t i = first; i < last; ++i)
          pixel(i, corners, [&](int32_t k, int32_t c, float value) {
            if (sums) sums[k * p.attributes + c] += value;
          });
      }
    });
  };
  if (!p.grad_attr) {
    parallel_for(p.images * p.pixels, kCornerPixels, [&](int64_t begin, int64_t end) { visit(begin, end, nullptr); });
    return;
  }
  const int64_t stride = p.shared ? 0 : p.vertices * p.attributes;
  add_to_corners<kAttributes>(p.images, p.pixels, p.tri, p.vertices, p.attributes, p.grad_attr, stride,
                              [&](int64_t image, int64_t begin, int64_t end, CornerAdder<kAttributes>& adder) {
    visit(image * p.pixels + begin, image * p.pixels + end, &adder);
  });
}

}  // namespace

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
    if (p.derivatives) {
      add_gradients<attributes, true>(p);
    } else {
      add_gradients<attributes, false>(p);
    }
  });
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
