// Vertex attributes at the pixels of rasterize: value = u a_0 + v a_1 + (1 - u - v) a_2, and its pixel derivatives
// da/dX = (a_0 - a_2) du/dX + (a_1 - a_2) dv/dX, da/dY alike.
#pragma once
#include "common/triangle_id.h"

namespace text3d {

struct InterpolateForwardParams {
  const float* attr;     // [B, V, A], or [V, A] if shared by the images
  const float* rast;     // [B, H, W, 4]
  const int32_t* tri;    // [F, 3]
  const float* rast_db;  // [B, H, W, 4] or null
  const int32_t* chosen; // [D] attributes whose derivatives are wanted, or null: all
  float* out;            // [B, H, W, A]
  float* out_da;         // [B, H, W, 2 D]
  int64_t images, pixels, vertices, triangles;  // pixels: of one image
  int32_t attributes, derivatives, shared;
  auto fields() {
    return std::tie(attr, rast, tri, rast_db, chosen, out, out_da, images, pixels, vertices, triangles, attributes,
                    derivatives, shared);
  }
};

struct InterpolateBackwardParams {
  const float* attr;       // as above
  const float* rast;
  const int32_t* tri;
  const float* rast_db;
  const int32_t* chosen;
  const float* grad_out;   // [B, H, W, A]
  const float* grad_da;    // [B, H, W, 2 D]
  float* grad_attr;        // as attr, zeroed; null if not wanted
  float* grad_rast;        // [B, H, W, 4]
  float* grad_db;          // [B, H, W, 4], null without derivatives
  int64_t images, pixels, vertices, triangles;
  int32_t attributes, derivatives, shared;
  auto fields() {
    return std::tie(attr, rast, tri, rast_db, chosen, grad_out, grad_da, grad_attr, grad_rast, grad_db, images, pixels,
                    vertices, triangles, attributes, derivatives, shared);
  }
};

namespace TEXT3D_ISA {

enum PixelTrouble : int32_t { kNoTrouble = 0, kBadId = 1, kBadVertex = 2 };

// The corners' attributes seen by pixel i of all images; null pointers at the background and where an index is out of range.
struct PixelCorners {
  const float* attr[3];
  int32_t vertices[3];
  int32_t trouble;
  template <class Params>
  TEXT3D_HD PixelCorners(const Params& p, int64_t i, int32_t attributes) {
    const int32_t id = decode_triangle_id(p.rast[4 * i + 3]);
    attr[0] = attr[1] = attr[2] = nullptr, trouble = id < p.triangles ? kNoTrouble : kBadId;
    if (id < 0 || id >= p.triangles) return;
    for (int k = 0; k < 3; ++k) vertices[k] = p.tri[3 * int64_t(id) + k];
    const uint64_t count = uint64_t(p.vertices);
    if ((uint64_t(vertices[0]) >= count) | (uint64_t(vertices[1]) >= count) | (uint64_t(vertices[2]) >= count)) {
      trouble = kBadVertex;
      return;
    }
    const int64_t first = p.shared ? 0 : i / p.pixels * p.vertices;
    for (int k = 0; k < 3; ++k) attr[k] = p.attr + (first + vertices[k]) * attributes;
  }
  TEXT3D_HD bool background() const { return !attr[0]; }
};

// One pixel's values; returns its PixelTrouble. kAttributes: their number, if known when this is compiled, otherwise 0.
template <int kAttributes>
struct InterpolateForwardPixel {
  InterpolateForwardParams p;
  TEXT3D_HD int32_t operator()(int64_t i) const {
    const int32_t attributes = kAttributes ? kAttributes : p.attributes;
    float* out = p.out + i * attributes;
    float* da = p.out_da + i * 2 * p.derivatives;
    const PixelCorners corners(p, i, attributes);
    if (corners.background()) {
      for (int32_t c = 0; c < attributes; ++c) out[c] = 0.f;
      for (int32_t c = 0; c < 2 * p.derivatives; ++c) da[c] = 0.f;
      return corners.trouble;
    }
    const float u = p.rast[4 * i], v = p.rast[4 * i + 1], w = 1.f - u - v;
    const float *a0 = corners.attr[0], *a1 = corners.attr[1], *a2 = corners.attr[2];
    for (int32_t c = 0; c < attributes; ++c) out[c] = u * a0[c] + v * a1[c] + w * a2[c];
    const float* db = p.rast_db + 4 * i;
    for (int32_t d = 0; d < p.derivatives; ++d) {
      const int32_t c = p.chosen ? p.chosen[d] : d;
      const float along_u = a0[c] - a2[c], along_v = a1[c] - a2[c];
      da[2 * d] = along_u * db[0] + along_v * db[2], da[2 * d + 1] = along_u * db[1] + along_v * db[3];
    }
    return kNoTrouble;
  }
};

// Gradients of one pixel: to u, v and rast_db here; to the corners through add(corner, attribute, value).
// kDerivatives: false if it is known when this is compiled that there are none.
template <int kAttributes, bool kDerivatives = true>
struct InterpolateBackwardPixel {
  InterpolateBackwardParams p;
  TEXT3D_HD int32_t attributes() const { return kAttributes ? kAttributes : p.attributes; }
  template <class Add>
  TEXT3D_HD void operator()(int64_t i, const PixelCorners& corners, const Add& add) const {
    const float u = p.rast[4 * i], v = p.rast[4 * i + 1], w = 1.f - u - v;
    const float *a0 = corners.attr[0], *a1 = corners.attr[1], *a2 = corners.attr[2];
    float gu = 0.f, gv = 0.f;
    const float* grad_out = p.grad_out + i * attributes();
    for (int32_t c = 0; c < attributes(); ++c) {
      const float g = grad_out[c];
      gu += g * (a0[c] - a2[c]), gv += g * (a1[c] - a2[c]);
      add(0, c, u * g), add(1, c, v * g), add(2, c, w * g);
    }
    store(p.grad_rast + 4 * i, gu, gv, 0.f, 0.f);
    if (!kDerivatives || !p.derivatives) return;
    const float* db = p.rast_db + 4 * i;
    float g_db[4] = {0.f, 0.f, 0.f, 0.f};
    for (int32_t d = 0; d < p.derivatives; ++d) {
      const int32_t c = p.chosen ? p.chosen[d] : d;
      const float gx = p.grad_da[(i * p.derivatives + d) * 2], gy = p.grad_da[(i * p.derivatives + d) * 2 + 1];
      const float along_u = a0[c] - a2[c], along_v = a1[c] - a2[c];
      g_db[0] += gx * along_u, g_db[1] += gy * along_u, g_db[2] += gx * along_v, g_db[3] += gy * along_v;
      const float g0 = gx * db[0] + gy * db[1], g1 = gx * db[2] + gy * db[3];
      add(0, c, g0), add(1, c, g1), add(2, c, -g0 - g1);
    }
    store(p.grad_db + 4 * i, g_db[0], g_db[1], g_db[2], g_db[3]);
  }
  TEXT3D_HD void background(int64_t i) const {
    store(p.grad_rast + 4 * i, 0.f, 0.f, 0.f, 0.f);
    if (p.derivatives) store(p.grad_db + 4 * i, 0.f, 0.f, 0.f, 0.f);
  }
  TEXT3D_HD static void store(float* to, float a, float b, float c, float d) { to[0] = a, to[1] = b, to[2] = c, to[3] = d; }
};

}  // namespace TEXT3D_ISA
}  // namespace text3d
