#include "common/corner_sums.h"
#include "common/lanes.h"
#include "rasterize/rasterize.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

const float kZeros[4] = {};

// Pixels that see a triangle, up to kLanes, and what their gradients to the corners (x, y, z, w each) depend on.
struct PixelBatch {
  int32_t count = 0, ids[kLanes];
  float fx[kLanes], fy[kLanes];
  const float *corners[3][kLanes], *grad[kLanes], *grad_db[kLanes];

  template <class Add>
  void flush(float scale_x, float scale_y, Add& add) {
    for (int l = count; l < kLanes; ++l) {
      for (int k = 0; k < 3; ++k) corners[k][l] = corners[k][0];
      fx[l] = fy[l] = 0.f, grad[l] = grad_db[l] = kZeros;
    }
    Corner<Floats> c[3];
    for (int k = 0; k < 3; ++k) load_rows(corners[k], c[k].x, c[k].y, c[k].z, c[k].w);
    Floats u, v, unused[2], db[4], g[3][3];
    load_rows(grad, u, v, unused[0], unused[1]);
    load_rows(grad_db, db[0], db[1], db[2], db[3]);
    resolve_gradient(c[0], c[1], c[2], load_lanes(fx), load_lanes(fy), scale_x, scale_y, u, v, db, g);
    float out[3][kLanes][4];
    for (int k = 0; k < 3; ++k) store_rows(out[k], g[k][0], g[k][1], Floats{}, g[k][2]);
    for (int l = 0; l < count; ++l) {
      float* sums = add(ids[l]);
      for (int k = 0; k < 3; ++k)
        for (int channel = 0; channel < 4; ++channel) sums[4 * k + channel] += out[k][l][channel];
    }
    count = 0;
  }
};

bool any_of(const float* values, int count) {
  bool any = false;
  for (int i = 0; i < count; ++i) any |= values[i] != 0.f;
  return any;
}

}  // namespace

void rasterize_backward(const RasterizeBackwardParams& p) {
  const int64_t pixels = int64_t(p.height) * p.width, stride = p.instanced ? 4 * p.vertices : 0;
  const float width = float(p.width), height = float(p.height), scale_x = 2.f / width, scale_y = 2.f / height;
  add_to_corners<4>(p.batch, pixels, p.tri, p.vertices, 4, p.grad_pos, stride,
                    [&](int64_t image, int64_t begin, int64_t end, auto& add) {
    const float* pos = p.pos + image * stride;
    int32_t x = int32_t(begin % p.width), y = int32_t(begin / p.width);
    PixelBatch batch;
    for (int64_t i = image * pixels + begin; i < image * pixels + end; ++i, ++x) {
      if (x == p.width) x = 0, ++y;
      const int32_t id = decode_triangle_id(p.rast[4 * i + 3]);
      if (id < 0 || id >= p.triangles) continue;
      const float* g = p.grad_rast + 4 * i;
      const float* db = p.grad_db ? p.grad_db + 4 * i : kZeros;
      if (!(any_of(g, 2) | any_of(db, 4))) continue;
      const int l = batch.count++;
      batch.ids[l] = id, batch.fx[l] = pixel_centre(x, width), batch.fy[l] = pixel_centre(y, height);
      batch.grad[l] = g, batch.grad_db[l] = db;
      for (int k = 0; k < 3; ++k) batch.corners[k][l] = pos + 4 * int64_t(p.tri[3 * int64_t(id) + k]);
      if (batch.count == kLanes) batch.flush(scale_x, scale_y, add);
    }
    if (batch.count) batch.flush(scale_x, scale_y, add);
  });
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
