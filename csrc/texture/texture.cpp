#include "texture/texture.h"
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

void texture_forward(const TextureParams& p) {
  const TexturePixel pixel{p};
  parallel_for(p.batch * p.pixels, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pixel(i);
  });
}

void texture_backward(const TextureBackwardParams& p) {
  bool texels = false;
  for (int level = 0; level < p.levels; ++level) texels |= p.grad_mips[level] != nullptr;
  const int64_t count = p.batch * p.pixels;
  const int owners = thread_count();
  if (p.grad_uv || p.grad_uv_da || p.grad_bias)
    parallel_for(count, 4096, [&](int64_t begin, int64_t end) {
      const TextureBackwardPixel pixel{p, false, true, 0, 1};
      for (int64_t i = begin; i < end; ++i) pixel(i);
    });
  if (texels)
    parallel_for(owners, 1, [&](int64_t begin, int64_t end) {
      for (int64_t owner = begin; owner < end; ++owner) {
        const TextureBackwardPixel pixel{p, true, false, int(owner), owners};
        for (int64_t i = 0; i < count; ++i) pixel(i);
      }
    });
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
