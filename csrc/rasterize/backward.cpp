#include "common/corner_sums.h"
#include "common/lanes.h"
#include "rasterize/rasterize.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

const float kZeros[4] = {};
typedef float Row __attribute__((vector_size(16)));

// Pixels that see a triangle, up to kLanes, and what their gradients to the corners (x, y, z, w each) depend on.
template <bool kDerivatives>
struct PixelBatch {
  int32_t count = 0, ids[kLanes], column[kLanes] = {}, row[kLanes] = {};
  float grad_u[kLanes] = {}, grad_v[kLanes] = {};
  const float *corners[3][kLanes], *grad_db[kLanes];

  template <class Add>
  void flush(float width, float height, Add& add) {
    for (int l = count; l < kLanes; ++l) {
      for (int k = 0; k < 3; ++k) corners[k][l] = corners[k][0];
      grad_db[l] = kZeros;
    }
    Corner<Floats> c[3];
    for (int k = 0; k < 3; ++k) load_rows(corners[k], c[k].x, c[k].y, c[k].z, c[k].w);
    Floats db[4], g[3][3];
    if constexpr (kDerivatives) load_rows(grad_db, db[0], db[1], db[2], db[3]);
    const Floats fx = __builtin_convertvector(2 * load_lanes(column) + 1, Floats) / width - 1.f;
    const Floats fy = __builtin_convertvector(2 * load_lanes(row) + 1, Floats) / height - 1.f;
    resolve_gradient<kDerivatives>(c[0], c[1], c[2], fx, fy, 2.f / width, 2.f / height, load_lanes(grad_u),
                                   load_lanes(grad_v), db, g);
    Row out[3][kLanes];
    for (int k = 0; k < 3; ++k)
      store_rows(reinterpret_cast<float(*)[4]>(out[k]), g[k][0], g[k][1], Floats{}, g[k][2]);
    for (int l = 0; l < count; ++l) {
      float* sums = add(ids[l]);
      for (int k = 0; k < 3; ++k) {
        Row sum;
        std::memcpy(&sum, sums + 4 * k, sizeof sum);
        sum += out[k][l];
        std::memcpy(sums + 4 * k, &sum, sizeof sum);
      }
    }
    count = 0;
  }
};

template <bool kDerivatives>
void add_gradients(const RasterizeBackwardParams& p) {
  const int64_t pixels = int64_t(p.height) * p.width, stride = p.instanced ? 4 * p.vertices : 0;
  const float width = float(p.width), height = float(p.height);
  add_to_corners<4>(p.batch, pixels, p.tri, p.vertices, 4, p.grad_pos, stride,
                    [&](int64_t image, int64_t begin, int64_t end, auto& add) {
    const float* pos = p.pos + image * stride;
    int32_t x = int32_t(begin % p.width), y = int32_t(begin / p.width);
    PixelBatch<kDerivatives> batch;
    for (int64_t i = image * pixels + begin; i < image * pixels + end; ++i, ++x) {
      if (x == p.width) x = 0, ++y;
      const int32_t id = decode_triangle_id(p.rast[4 * i + 3]);
      if (id < 0 || id >= p.triangles) continue;
      const float* g = p.grad_rast + 4 * i;
      const float* db = kDerivatives ? p.grad_db + 4 * i : kZeros;
      bool any = (g[0] != 0.f) | (g[1] != 0.f);
      if (kDerivatives) any |= (db[0] != 0.f) | (db[1] != 0.f) | (db[2] != 0.f) | (db[3] != 0.f);
      if (!any) continue;
      const int l = batch.count++;
      batch.ids[l] = id, batch.column[l] = x, batch.row[l] = y;
      batch.grad_u[l] = g[0], batch.grad_v[l] = g[1], batch.grad_db[l] = db;
      for (int k = 0; k < 3; ++k) batch.corners[k][l] = pos + 4 * int64_t(p.tri[3 * int64_t(id) + k]);
      if (batch.count == kLanes) batch.flush(width, height, add);
    }
    if (batch.count) batch.flush(width, height, add);
  });
}

}  // namespace

void rasterize_backward(const RasterizeBackwardParams& p) {
  if (p.grad_db) {
    add_gradients<true>(p);
  } else {
    add_gradients<false>(p);
  }
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
