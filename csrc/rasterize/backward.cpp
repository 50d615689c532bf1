#include "common/corner_sums.h"
#include "rasterize/rasterize.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

constexpr int kGradientLanes = 16;

// Gradients of up to kGradientLanes pixels that see a triangle, to the corners (x, y, z, w each) of their triangles.
struct PixelBatch {
  int32_t count = 0, ids[kGradientLanes];
  float fx[kGradientLanes], fy[kGradientLanes], corners[3][4][kGradientLanes];
  float grad[2][kGradientLanes], grad_db[4][kGradientLanes];

  template <class Add>
  void flush(float scale_x, float scale_y, Add& add) {
    float out[9][kGradientLanes];
#pragma omp simd
    for (int l = 0; l < kGradientLanes; ++l) {
      const Corner c0{corners[0][0][l], corners[0][1][l], 0.f, corners[0][3][l]};
      const Corner c1{corners[1][0][l], corners[1][1][l], 0.f, corners[1][3][l]};
      const Corner c2{corners[2][0][l], corners[2][1][l], 0.f, corners[2][3][l]};
      const float db[4] = {grad_db[0][l], grad_db[1][l], grad_db[2][l], grad_db[3][l]};
      float g[3][3];
      resolve_gradient(c0, c1, c2, fx[l], fy[l], scale_x, scale_y, grad[0][l], grad[1][l], db, g);
      for (int k = 0; k < 3; ++k)
        for (int c = 0; c < 3; ++c) out[3 * k + c][l] = g[k][c];
    }
    for (int l = 0; l < count; ++l) {
      float* sums = add(ids[l]);
      for (int k = 0; k < 3; ++k) {
        sums[4 * k] += out[3 * k][l], sums[4 * k + 1] += out[3 * k + 1][l], sums[4 * k + 3] += out[3 * k + 2][l];
      }
    }
    count = 0;
  }
};

}  // namespace

void rasterize_backward(const RasterizeBackwardParams& p) {
  const int64_t pixels = int64_t(p.height) * p.width;
  const float width = float(p.width), height = float(p.height), scale_x = 2.f / width, scale_y = 2.f / height;
  const int64_t stride = p.instanced ? 4 * p.vertices : 0;
  add_to_corners<4>(p.batch, pixels, p.tri, p.vertices, 4, p.grad_pos, stride,
                    [&](int64_t image, int64_t begin, int64_t end, auto& add) {
    const float* pos = p.pos + image * stride;
    PixelBatch batch{};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = 4 * (image * pixels + i);
      const int32_t id = decode_triangle_id(p.rast[at + 3]);
      if (id < 0 || id >= p.triangles) continue;
      const float* g = p.grad_rast + at;
      const float* db = p.grad_db ? p.grad_db + at : nullptr;
      if (g[0] == 0.f && g[1] == 0.f && (!db || (db[0] == 0.f && db[1] == 0.f && db[2] == 0.f && db[3] == 0.f))) continue;
      const int l = batch.count++;
      batch.ids[l] = id;
      batch.fx[l] = pixel_centre(int32_t(i % p.width), width), batch.fy[l] = pixel_centre(int32_t(i / p.width), height);
      batch.grad[0][l] = g[0], batch.grad[1][l] = g[1];
      for (int c = 0; c < 4; ++c) batch.grad_db[c][l] = db ? db[c] : 0.f;
      for (int k = 0; k < 3; ++k)
        for (int c = 0; c < 4; ++c) batch.corners[k][c][l] = pos[4 * int64_t(p.tri[3 * int64_t(id) + k]) + c];
      if (batch.count == kGradientLanes) batch.flush(scale_x, scale_y, add);
    }
    if (batch.count) batch.flush(scale_x, scale_y, add);
  });
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
