// Triangle rasterization: visibility (visibility.h), then u, v, z/w and pixel derivatives of what is seen.
//   q_i = (x_i - fx w_i, y_i - fy w_i);  a_0 = q_1 x q_2, a_1 = q_2 x q_0, a_2 = q_0 x q_1;  S = a_0 + a_1 + a_2
//   u = a_0 / S,  v = a_1 / S,  z/w = sum z_i a_i / sum w_i a_i
// at the pixel's centre (fx, fy) of [-1, 1]^2. Row 0 is the bottom.
#pragma once
#include "rasterize/visibility.h"

namespace text3d {

struct RasterizeForwardParams {
  const float* pos;         // [B, V, 4], or [V, 4] if not instanced
  const int32_t* tri;       // [F, 3]
  const int32_t* ranges;    // [B, 2] first triangle and count of each image, null: all triangles in every image
  const int64_t* previous;  // [B, H, W] keys of the layer before, or null: draw only what lies behind them
  SnappedVertex* snapped;   // [B, V] or [V], scratch
  int64_t* keys;            // [B, H, W] visible keys; on a CPU null unless wanted
  int32_t* queue;           // CUDA: scratch, see rasterize.cu; CPU: null
  float* rast;              // [B, H, W, 4] u, v, z/w, id + 1
  float* rast_db;           // [B, H, W, 4] du/dX, du/dY, dv/dX, dv/dY
  int64_t batch, vertices, triangles;
  int64_t largest_count;    // triangles of the image that has most
  int64_t queue_capacity;
  int32_t height, width, instanced;
  auto fields() {
    return std::tie(pos, tri, ranges, previous, snapped, keys, queue, rast, rast_db, batch, vertices, triangles,
                    largest_count, queue_capacity, height, width, instanced);
  }
};

struct RasterizeBackwardParams {
  const float* pos;        // [B, V, 4], or [V, 4] if not instanced
  const int32_t* tri;      // [F, 3]
  const float* rast;       // [B, H, W, 4]
  const float* grad_rast;  // [B, H, W, 4]; only u and v are read
  const float* grad_db;    // [B, H, W, 4] or null
  float* grad_pos;         // as pos, zeroed
  float* contributions;    // CUDA: [B, H, W, 3, 4] instead of adding to grad_pos, or null
  int64_t batch, vertices, triangles;
  int32_t height, width, instanced;
  auto fields() {
    return std::tie(pos, tri, rast, grad_rast, grad_db, grad_pos, contributions, batch, vertices, triangles, height,
                    width, instanced);
  }
};

namespace TEXT3D_ISA {

constexpr float kMinimumDenominator = 1e-6f;  // of gradients, relative to the triangle's extent

TEXT3D_HD float pixel_centre(int32_t pixel, float size) { return float(2 * pixel + 1) / size - 1.f; }

// Number: float, or lanes of them on a CPU (common/lanes.h).
template <class Number>
TEXT3D_HD Number safe_reciprocal(Number x) { return select(x != 0.f, 1.f / x, Number{}); }
template <class Number>
TEXT3D_HD Number clamp_between(Number x, float low, float high) {
  return min_of(max_of(x, Number{} + low), Number{} + high);
}

template <class Number>
struct Corner { Number x, y, z, w; };

// The homogeneous edge functions at a pixel and their slopes in fx and fy.
template <class Number>
struct Barycentrics {
  Number qx[3], qy[3], w[3];
  Number a[3], slope_x[3], slope_y[3];
  TEXT3D_HD Barycentrics(const Corner<Number>& c0, const Corner<Number>& c1, const Corner<Number>& c2, Number fx, Number fy) {
    w[0] = c0.w, w[1] = c1.w, w[2] = c2.w;
    qx[0] = c0.x - fx * c0.w, qx[1] = c1.x - fx * c1.w, qx[2] = c2.x - fx * c2.w;
    qy[0] = c0.y - fy * c0.w, qy[1] = c1.y - fy * c1.w, qy[2] = c2.y - fy * c2.w;
    TEXT3D_UNROLL for (int k = 0; k < 3; ++k) {
      const int i = (k + 1) % 3, j = (k + 2) % 3;
      a[k] = qx[i] * qy[j] - qy[i] * qx[j];
      slope_x[k] = w[j] * qy[i] - w[i] * qy[j];
      slope_y[k] = w[i] * qx[j] - w[j] * qx[i];
    }
  }
  TEXT3D_HD Number sum() const { return a[0] + a[1] + a[2]; }
  // What |sum()| is for a triangle of this extent that is not thin: it scales alike with size and with the corners' w.
  TEXT3D_HD Number extent() const {
    return qx[0] * qx[0] + qy[0] * qy[0] + qx[1] * qx[1] + qy[1] * qy[1] + qx[2] * qx[2] + qy[2] * qy[2];
  }
  TEXT3D_HD Number sum_slope_x() const { return slope_x[0] + slope_x[1] + slope_x[2]; }
  TEXT3D_HD Number sum_slope_y() const { return slope_y[0] + slope_y[1] + slope_y[2]; }
};

// rast and rast_db of a covered pixel, all but the id.
template <class Number>
TEXT3D_HD void resolve(const Corner<Number>& c0, const Corner<Number>& c1, const Corner<Number>& c2, Number fx, Number fy,
                       float scale_x, float scale_y, Number rast[3], Number db[4]) {
  const Barycentrics<Number> b(c0, c1, c2, fx, fy);
  const Number inverse = safe_reciprocal(b.sum());
  const Number u = b.a[0] * inverse, v = b.a[1] * inverse;
  const Number sum_x = b.sum_slope_x(), sum_y = b.sum_slope_y(), sx = inverse * scale_x, sy = inverse * scale_y;
  db[0] = (b.slope_x[0] - u * sum_x) * sx, db[1] = (b.slope_y[0] - u * sum_y) * sy;
  db[2] = (b.slope_x[1] - v * sum_x) * sx, db[3] = (b.slope_y[1] - v * sum_y) * sy;
  const Number u1 = clamp_between(u, 0.f, 1.f), v1 = clamp_between(v, 0.f, 1.f);
  const Number shrink = 1.f / max_of(u1 + v1, Number{} + 1.f);
  const Number depth = (c0.z * b.a[0] + c1.z * b.a[1] + c2.z * b.a[2]) *
                      safe_reciprocal(c0.w * b.a[0] + c1.w * b.a[1] + c2.w * b.a[2]);
  rast[0] = u1 * shrink, rast[1] = v1 * shrink, rast[2] = clamp_between(depth, -1.f, 1.f);
}

// Gradients to x, y, w of the three corners, of the unclamped formulae. kDerivatives: is there a gradient to db?
template <bool kDerivatives, class Number>
TEXT3D_HD void resolve_gradient(const Corner<Number>& c0, const Corner<Number>& c1, const Corner<Number>& c2, Number fx,
                                Number fy, float scale_x, float scale_y, Number grad_u, Number grad_v,
                                const Number grad_db[4], Number grad[3][3]) {
  const Barycentrics<Number> b(c0, c1, c2, fx, fy);
  const Number least = kMinimumDenominator * b.extent();
  Number sum = b.sum();
  sum = select(sum < 0.f, min_of(sum, -least), max_of(sum, least));
  const Number inverse = safe_reciprocal(sum), u = b.a[0] * inverse, v = b.a[1] * inverse;
  Number gu = grad_u, gv = grad_v, g_inverse_over{}, gsx[3] = {}, gsy[3] = {};
  if constexpr (kDerivatives) {
    const Number sum_x = b.sum_slope_x(), sum_y = b.sum_slope_y();
    // du/dX = (slope_x_0 - u sum_x) / S * scale_x, and so on.
    const Number gux = grad_db[0] * scale_x * inverse, guy = grad_db[1] * scale_y * inverse;
    const Number gvx = grad_db[2] * scale_x * inverse, gvy = grad_db[3] * scale_y * inverse;
    gu = gu - gux * sum_x - guy * sum_y, gv = gv - gvx * sum_x - gvy * sum_y;
    g_inverse_over = gux * (b.slope_x[0] - u * sum_x) + guy * (b.slope_y[0] - u * sum_y) +
                     gvx * (b.slope_x[1] - v * sum_x) + gvy * (b.slope_y[1] - v * sum_y);
    gsx[2] = -(gux * u + gvx * v), gsy[2] = -(guy * u + gvy * v);
    gsx[0] = gux + gsx[2], gsx[1] = gvx + gsx[2], gsy[0] = guy + gsy[2], gsy[1] = gvy + gsy[2];
  }
  const Number g_sum = -inverse * (gu * u + gv * v + g_inverse_over);
  const Number ga[3] = {gu * inverse + g_sum, gv * inverse + g_sum, g_sum};
  TEXT3D_UNROLL for (int n = 0; n < 3; ++n) {
    // Corner n is the first factor (i) of edge k = n + 2 and the second (j) of edge k = n + 1.
    const int as_i = (n + 2) % 3, as_j = (n + 1) % 3, next = (n + 1) % 3, before = (n + 2) % 3;
    Number gx = ga[as_i] * b.qy[next] - ga[as_j] * b.qy[before];
    Number gy = ga[as_j] * b.qx[before] - ga[as_i] * b.qx[next], gw{};
    if constexpr (kDerivatives) {
      gx = gx + gsy[as_j] * b.w[before] - gsy[as_i] * b.w[next];
      gy = gy + gsx[as_i] * b.w[next] - gsx[as_j] * b.w[before];
      gw = gsx[as_j] * b.qy[before] - gsx[as_i] * b.qy[next] + gsy[as_i] * b.qx[next] - gsy[as_j] * b.qx[before];
    }
    grad[n][0] = gx, grad[n][1] = gy, grad[n][2] = gw - fx * gx - fy * gy;
  }
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
