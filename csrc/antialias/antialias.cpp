#include "antialias/antialias.h"
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

void antialias_forward(const AntialiasParams& p) {
  const AntialiasPixel pixel{p};
  parallel_for(p.batch * p.height * p.width, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pixel(i);
  });
}

void antialias_backward(const AntialiasBackwardParams& p) {
  const int64_t count = p.batch * p.height * p.width;
  if (p.grad_color)
    parallel_for(count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) AntialiasColorGradient{p}(i);
    });
  // One thread: only silhouette pixels do any work, and the sums come out the same in every run.
  if (p.grad_pos)
    for (int64_t i = 0; i < count; ++i) AntialiasPositionGradient{p}(i);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
