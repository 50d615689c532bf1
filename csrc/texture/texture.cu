// A thread a pixel. Where pixels in a row meet one texel, as in magnified textures and coarse levels, its gradient is summed
// within the warp first, and one lane adds to memory.
#include "texture/texture.h"
#include "common/launch.h"
#include "common/segmented.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ TextureBackwardParams p, bool texels,
                                                            bool coordinates) {
  const int64_t total = p.batch * p.pixels, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const TextureBackwardPixel pixel{p, false, true, 0, 1};
  if (coordinates && i < total) pixel(i);
  if (!texels) return;
  const int64_t at = i < total ? i : total - 1, image = at / p.pixels;  // lanes beyond stay for the warp's sake
  const Place where = place(p.uv + at * uv_size(p.boundary), p.boundary);
  const bool valid = i < total && where.valid;
  const float* g = p.grad_out + at * p.channels;
  Level level{0, 0.f, 0.f};
  if (valid && p.filter >= kMipNearest)
    level = mip_level(where, p.uv_da ? p.uv_da + at * 2 * uv_size(p.boundary) : nullptr, p.bias ? p.bias + at : nullptr,
                      p.widths[0], p.heights[0], p.levels, p.filter, p.boundary);
  const int levels = p.filter == kMipLinear && p.levels > 1 ? 2 : 1, taps_each = p.filter == kNearest ? 1 : 4;
  TEXT3D_NO_UNROLL
  for (int n = 0; n < levels; ++n) {
    const int l = level.low + n;
    const float scale = n ? level.fraction : 1.f - level.fraction;
    double* sums = p.grad_mips[l];
    Taps taps;
    if (p.filter == kNearest) {
      taps.index[0] = nearest_texel(where, p.widths[0], p.heights[0], p.boundary), taps.weight[0] = 1.f;
      for (int k = 1; k < 4; ++k) taps.index[k] = -1, taps.weight[k] = 0.f;
    } else {
      taps = linear_taps(where, p.widths[l], p.heights[l], p.boundary);
    }
    TEXT3D_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k >= taps_each) break;
      const bool adds = valid && sums && taps.index[k] >= 0;
      if (!__any_sync(~0u, adds)) continue;
      const int64_t texel = pixel.level_offset(l, image) + taps.index[k] * p.channels;
      const WarpRuns runs(adds ? int64_t(l) << 56 | texel : -1);
      const float weight = scale * taps.weight[k];
      for (int c = 0; c < p.channels; ++c) {
        const float sum = runs.sum(adds ? weight * g[c] : 0.f);
        if (adds && runs.last) atomicAdd(sums + texel + c, double(sum));
      }
    }
  }
}

}  // namespace

void texture_forward(const TextureParams& p, cudaStream_t stream) { launch(p.batch * p.pixels, TexturePixel{p}, stream); }

void texture_backward(const TextureBackwardParams& p, cudaStream_t stream) {
  bool texels = false;
  for (int level = 0; level < p.levels; ++level) texels |= p.grad_mips[level] != nullptr;
  const int64_t blocks = (p.batch * p.pixels + kThreads - 1) / kThreads;
  if (blocks > 0)
    TEXT3D_LAUNCH(backward_kernel, unsigned(blocks), kThreads, 0, stream, p, texels,
                  p.grad_uv || p.grad_uv_da || p.grad_bias);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
