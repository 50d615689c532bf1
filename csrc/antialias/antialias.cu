#include "antialias/antialias.h"
#include "common/launch.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

// The pairs of pixel i with its right, left, next-row and previous-row neighbours, as far as they blend.
template <class Params, class Visit>
TEXT3D_HD void visit_pairs(const Params& p, int64_t i, const Visit& visit) {
  const int64_t column = i % p.width, row = i / p.width % p.height, image = i / (p.width * p.height);
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t step = axis == 0 ? 1 : p.width, at = axis == 0 ? column : row, size = axis == 0 ? p.width : p.height;
    for (int back = 0; back < 2; ++back) {
      if (back ? at == 0 : at + 1 >= size) continue;
      const Pair pair = blend(p, image, row - (back && axis == 1), column - (back && axis == 0), axis);
      const int64_t first = back ? i - step : i;
      if (pair.alpha != 0.f) visit(pair, Neighbours{first, first + step, axis});
    }
  }
}

// Each pixel gathers from its four pairs: no atomics, one order of summation.
struct AntialiasPixel {
  AntialiasParams p;
  TEXT3D_HD void operator()(int64_t i) const {
    float* out = p.out + i * p.channels;
    for (int c = 0; c < p.channels; ++c) out[c] = p.color[i * p.channels + c];
    visit_pairs(p, i, [&](const Pair& pair, const Neighbours& n) {
      if (n.target(pair) == i) mix(p, out, pair.alpha, n);
    });
  }
};

struct AntialiasGradient {
  AntialiasBackwardParams p;
  TEXT3D_HD void operator()(int64_t i) const {
    float* out = p.grad_color ? p.grad_color + i * p.channels : nullptr;
    for (int c = 0; out && c < p.channels; ++c) out[c] = p.grad_out[i * p.channels + c];
    const int64_t image = i / (p.width * p.height);
    float* grad_pos = p.grad_pos ? p.grad_pos + first_vertex(p, image) * 4 : nullptr;
    visit_pairs(p, i, [&](const Pair& pair, const Neighbours& n) {
      const float* g = p.grad_out + n.target(pair) * p.channels;
      for (int c = 0; out && c < p.channels; ++c) out[c] += (i == n.first ? -pair.alpha : pair.alpha) * g[c];
      if (grad_pos && pair.movable && i == n.first)
        position_gradient(p, image, n, pair, [&](int32_t vertex, float x, float y, float w) {
          float* to = grad_pos + int64_t(vertex) * 4;
          atomic_add(to, x), atomic_add(to + 1, y), atomic_add(to + 3, w);
        });
    });
  }
};

}  // namespace

void antialias_forward(const AntialiasParams& p, cudaStream_t stream) {
  launch(p.batch * p.height * p.width, AntialiasPixel{p}, stream);
}

void antialias_backward(const AntialiasBackwardParams& p, cudaStream_t stream) {
  launch(p.batch * p.height * p.width, AntialiasGradient{p}, stream);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
