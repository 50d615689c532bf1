// Analytic antialiasing of silhouettes (Laine et al. 2020, section 3.6), from text3d_fast/reference/antialias.py.
//
// Neighbouring pixels p0, p1 (to the right, or in the next row) with different triangle ids are blended where a
// silhouette edge of the nearer triangle crosses between their centres, by how far it reaches past the middle.
#pragma once
#include "common/triangle_id.h"

namespace text3d {

struct AntialiasParams {
  const float* color;       // [B, H, W, C]
  const float* rast;        // [B, H, W, 4]
  const float* pos;         // [B or 1, V, 4]
  const int32_t* tri;       // [F, 3]
  const int32_t* opposite;  // [F, 3], vertex across edge k (from corner k + 1 to k + 2), or -1
  float* out;               // [B, H, W, C]
  uint8_t* flags;           // CPU: [B * H * W + 8], 1 where a pixel's triangle has a silhouette edge; CUDA: null
  int64_t batch, pos_batch, height, width, vertices, faces;
  int32_t channels;
  auto fields() {
    return std::tie(color, rast, pos, tri, opposite, out, flags, batch, pos_batch, height, width, vertices, faces, channels);
  }
};

struct AntialiasBackwardParams {
  const float* grad_out;    // [B, H, W, C]
  const float* color;       // these as in AntialiasParams
  const float* rast;
  const float* pos;
  const int32_t* tri;
  const int32_t* opposite;
  const uint8_t* flags;     // as the forward pass left them
  float* grad_color;        // [B, H, W, C] or null
  float* grad_pos;          // like pos, zeroed; or null
  int64_t batch, pos_batch, height, width, vertices, faces;
  int32_t channels;
  float boost;
  auto fields() {
    return std::tie(grad_out, color, rast, pos, tri, opposite, flags, grad_color, grad_pos, batch, pos_batch, height, width,
                    vertices, faces, channels, boost);
  }
};

namespace TEXT3D_ISA {

constexpr float kSlack = 1.f / 16.f;        // a crossing this far beyond either centre still counts, in pixels
constexpr float kSmallestSpan = 1e-3f;      // the gradient treats shorter edges as this long across the pair

// A vertex relative to a pixel centre, homogeneous, in pixels: along the pair, across it, w.
struct Relative { float along, across, w; };

// A vertex in clip space without z. Number: float, or lanes of them on a CPU.
template <class Number>
struct ClipPoint { Number x, y, w; };

// Does what lies across edge a-b (vertex d) fold back to the side of its own triangle (vertex c)? The same for every pixel
// that looks at the edge. Points are taken relative to a's projection; d may be c: an edge without a neighbour.
template <class Number>
TEXT3D_HD auto on_silhouette(const ClipPoint<Number>& a, const ClipPoint<Number>& b, const ClipPoint<Number>& c,
                             const ClipPoint<Number>& d) {
  const Number x = a.x / a.w, y = a.y / a.w, bx = b.x - b.w * x, by = b.y - b.w * y;
  const Number own = bx * (c.y - c.w * y) - by * (c.x - c.w * x), other = bx * (d.y - d.w * y) - by * (d.x - d.w * x);
  return (a.w > 0.f) & (b.w > 0.f) & (((own > 0.f) & (other > 0.f)) | ((own < 0.f) & (other < 0.f)));
}

struct Pair {
  float alpha;     // 0: nothing to blend
  bool movable;    // alpha changes with the crossing
  int32_t a, b;    // the edge's vertices
  float x0, y0;    // the chosen pixel's centre, in pixels
};

// Where the vertices of an image start in pos.
template <class Params>
TEXT3D_HD int64_t first_vertex(const Params& p, int64_t image) {
  return p.pos_batch > 1 ? image * p.vertices : 0;
}

template <class Params>
TEXT3D_HD ClipPoint<float> clip_point(const Params& p, int64_t image, int32_t vertex) {
  const float* v = p.pos + (first_vertex(p, image) + vertex) * 4;
  return {v[0], v[1], v[3]};
}

template <class Params>
TEXT3D_HD Relative relative(const Params& p, int64_t image, int32_t vertex, float x0, float y0, int axis) {
  const float* v = p.pos + (first_vertex(p, image) + vertex) * 4;
  const float x = (v[0] + v[3]) * (0.5f * float(p.width)) - v[3] * x0;
  const float y = (v[1] + v[3]) * (0.5f * float(p.height)) - v[3] * y0;
  return axis == 0 ? Relative{x, y, v[3]} : Relative{y, x, v[3]};
}

// Pixel p0 = (row, column) and its neighbour along the axis (0: to the right, 1: next row), which must exist.
template <class Params>
TEXT3D_HD Pair blend(const Params& p, int64_t image, int64_t row, int64_t column, int axis) {
  Pair pair{0.f, false, 0, 0, 0.f, 0.f};
  const int64_t first = (image * p.height + row) * p.width + column, second = first + (axis == 0 ? 1 : p.width);
  const float* r0 = p.rast + 4 * first;
  const float* r1 = p.rast + 4 * second;
  if (float_to_bits(r0[3]) == float_to_bits(r1[3])) return pair;
  const int32_t id0 = decode_triangle_id(r0[3]), id1 = decode_triangle_id(r1[3]);
  const bool take0 = id1 < 0 || (id0 >= 0 && r0[2] < r1[2]);
  const int64_t face = take0 ? id0 : id1;
  if (face < 0 || face >= p.faces) return pair;
  pair.x0 = float(column + (axis == 0 && !take0)) + 0.5f;
  pair.y0 = float(row + (axis == 1 && !take0)) + 0.5f;
  const int32_t* corner = p.tri + 3 * face;
  Relative v[3];
  for (int k = 0; k < 3; ++k)
    if (uint64_t(corner[k]) >= uint64_t(p.vertices)) return pair;
  for (int k = 0; k < 3; ++k) v[k] = relative(p, image, corner[k], pair.x0, pair.y0, axis);
  const float sign = take0 ? 1.f : -1.f;
  float best = -1e30f;
  TEXT3D_UNROLL
  for (int k = 0; k < 3; ++k) {
    const Relative &a = v[(k + 1) % 3], &b = v[(k + 2) % 3];
    if (!(a.w > 0.f && b.w > 0.f)) continue;
    const float across_a = a.across / a.w, across_b = b.across / b.w;
    if ((across_a < 0.f) == (across_b < 0.f)) continue;
    const float along_a = a.along / a.w, along_b = b.along / b.w, span = across_b - across_a;
    if (!(fabsf(span) >= fabsf(along_b - along_a))) continue;
    const float crossing = sign * (along_a - across_a * (along_b - along_a) / span);
    if (!(crossing > best)) continue;
    const int32_t from = corner[(k + 1) % 3], to = corner[(k + 2) % 3], across = p.opposite[3 * face + k];
    if (!on_silhouette(clip_point(p, image, from), clip_point(p, image, to), clip_point(p, image, corner[k]),
                       clip_point(p, image, across >= 0 && across < p.vertices ? across : corner[k])))
      continue;
    best = crossing, pair.a = from, pair.b = to;
  }
  if (!(best > -kSlack && best < 1.f + kSlack)) return pair;
  pair.movable = best > 0.f && best < 1.f;
  pair.alpha = sign * (0.5f - clamp(best, 0.f, 1.f));
  return pair;
}

// Neighbours along the axis: the blended image gains alpha (color[second] - color[first]) at the target pixel.
struct Neighbours {
  int64_t first, second;
  int axis;
  TEXT3D_HD int64_t target(const Pair& pair) const { return pair.alpha > 0.f ? first : second; }
};

template <class Params>
TEXT3D_HD void mix(const Params& p, float* out, float alpha, const Neighbours& n) {
  for (int c = 0; c < p.channels; ++c)
    out[c] += alpha * (p.color[n.second * p.channels + c] - p.color[n.first * p.channels + c]);
}

// The gradient through a movable pair's crossing to the ends of its edge: add(vertex, x, y, w).
template <class Add>
TEXT3D_HD void position_gradient(const AntialiasBackwardParams& p, int64_t image, const Neighbours& n, const Pair& pair,
                                 const Add& add) {
  float d_alpha = 0.f;
  for (int c = 0; c < p.channels; ++c)
    d_alpha += p.grad_out[n.target(pair) * p.channels + c] *
               (p.color[n.second * p.channels + c] - p.color[n.first * p.channels + c]);
  const Relative a = relative(p, image, pair.a, pair.x0, pair.y0, n.axis);
  const Relative b = relative(p, image, pair.b, pair.x0, pair.y0, n.axis);
  const float along = b.along / b.w - a.along / a.w, across_a = a.across / a.w, raw = b.across / b.w - across_a;
  const bool short_edge = fabsf(raw) < kSmallestSpan;
  const float span = short_edge ? (raw < 0.f ? -kSmallestSpan : kSmallestSpan) : raw;
  const float ratio = across_a / span, d_crossing = -d_alpha;  // alpha = +-1/2 - crossing
  const float d_span = short_edge ? 0.f : d_crossing * ratio * along / span;
  const float half_width = 0.5f * float(p.width), half_height = 0.5f * float(p.height);
  // d crossing, along and across the pair, to x, y, w of one vertex.
  const auto scatter = [&](int32_t vertex, const Relative& v, float d_along, float d_across) {
    const float dx = (n.axis == 0 ? d_along : d_across) / v.w, dy = (n.axis == 0 ? d_across : d_along) / v.w;
    const float x = (n.axis == 0 ? v.along : v.across) / v.w, y = (n.axis == 0 ? v.across : v.along) / v.w;
    add(vertex, p.boost * dx * half_width, p.boost * dy * half_height,
        p.boost * (dx * (half_width - pair.x0 - x) + dy * (half_height - pair.y0 - y)));
  };
  scatter(pair.a, a, d_crossing * (1.f + ratio), -d_crossing * along / span - d_span);
  scatter(pair.b, b, -d_crossing * ratio, d_span);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
