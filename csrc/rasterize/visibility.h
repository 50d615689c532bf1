// Which triangle a pixel sees: one exact definition, shared by every backend and by reference/rasterize.py, where it is
// spelled out. Integers decide coverage; the few float operations here are never contracted to fma (setup.py).
#pragma once
#include "common/triangle_id.h"

namespace text3d {

// A projected vertex. code: bit k set outside of clip plane k; kInvalid if it has no projection. x, y, z hold if code is 0.
struct SnappedVertex {
  int32_t x, y;  // 1/256 pixel from the image's lower left corner
  float z;       // z / w
  uint32_t code;
};

namespace TEXT3D_ISA {

constexpr int32_t kSubpixels = 256, kHalfPixel = 128;
constexpr int32_t kPlanes = 6;  // near, far, right, left, top, bottom
constexpr uint32_t kInvalid = 1u << kPlanes;
constexpr float kMinimumW = 1.17549435e-38f;
constexpr int64_t kNothing = INT64_MAX;  // the key of a pixel that no triangle covers

struct Viewport {
  int32_t height, width;
  float half_width, half_height, guard;
  TEXT3D_HD Viewport(int32_t height, int32_t width)
      : height(height), width(width), half_width(float(width) * kHalfPixel), half_height(float(height) * kHalfPixel) {
    const int32_t larger = height > width ? height : width;
    int32_t power = 1;
    while (power < larger) power *= 2;
    guard = float((1 << 21) / power);
  }
};

TEXT3D_HD bool is_finite(float x, float y, float z, float w) {
  const float large = 3.4028234663852886e38f;  // NaN fails the comparisons too
  return (fabsf(x) <= large) & (fabsf(y) <= large) & (fabsf(z) <= large) & (fabsf(w) <= large);
}

TEXT3D_HD uint32_t outcode(float x, float y, float z, float w, float guard) {
  const float wide = guard * w;
  uint32_t code = uint32_t(!(z + w >= 0.f)) | uint32_t(!(w - z >= 0.f)) << 1 | uint32_t(!(wide - x >= 0.f)) << 2 |
                  uint32_t(!(wide + x >= 0.f)) << 3 | uint32_t(!(wide - y >= 0.f)) << 4 |
                  uint32_t(!(wide + y >= 0.f)) << 5;
  return is_finite(x, y, z, w) & ((code != 0) | (w >= kMinimumW)) ? code : kInvalid;
}

TEXT3D_HD SnappedVertex snap(float x, float y, float z, float w, uint32_t code, const Viewport& view) {
  const float safe = code ? 1.f : w;
  const float inverse = 1.f / safe;
  const float sx = code ? 0.f : rintf((x * inverse) * view.half_width);
  const float sy = code ? 0.f : rintf((y * inverse) * view.half_height);
  return {int32_t(sx) + view.width * kHalfPixel, int32_t(sy) + view.height * kHalfPixel, z * inverse, code};
}

// Keys order by depth, then by the larger triangle index.
TEXT3D_HD int64_t depth_key(float depth, int32_t id) {
  const int32_t bits = int32_t(float_to_bits(depth));
  const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return int64_t((uint64_t(uint32_t(ordered)) << 32) | uint32_t(~id));
}
TEXT3D_HD int32_t key_triangle(int64_t key) { return key == kNothing ? -1 : int32_t(~uint32_t(uint64_t(key))); }

// Pixels whose centres lie in [low, high], snapped coordinates: [first, last], within an axis of `size` pixels.
TEXT3D_HD int32_t first_pixel(int32_t low) {
  const int32_t first = (low + (kHalfPixel - 1)) >> 8;
  return first > 0 ? first : 0;
}
TEXT3D_HD int32_t last_pixel(int32_t high, int32_t size) {
  const int32_t last = (high - kHalfPixel) >> 8;
  return last < size - 1 ? last : size - 1;
}

// A snapped triangle in canonical order: the smallest (x, y) first, then counter-clockwise.
struct SnappedTriangle {
  int32_t x[3], y[3];
  int64_t area;         // twice, in 1/256 pixel squared
  int32_t orientation;  // 1 or -1, as given; 0: degenerate, covers nothing
  int32_t owned[3];     // 0 if edge k owns the points on it, otherwise 1
  float z, slope1, slope2;

  SnappedTriangle() = default;
  TEXT3D_HD SnappedTriangle(const SnappedVertex& a, const SnappedVertex& b, const SnappedVertex& c) {
    const SnappedVertex *v0 = &a, *v1 = &b, *v2 = &c;
    if (less(b, *v0)) v0 = &b, v1 = &c, v2 = &a;
    if (less(c, *v0)) v0 = &c, v1 = &a, v2 = &b;
    area = int64_t(v1->x - v0->x) * (v2->y - v0->y) - int64_t(v1->y - v0->y) * (v2->x - v0->x);
    orientation = area > 0 ? 1 : area < 0 ? -1 : 0;
    if (area < 0) {
      const SnappedVertex* other = v1;
      v1 = v2, v2 = other, area = -area;
    }
    x[0] = v0->x, x[1] = v1->x, x[2] = v2->x;
    y[0] = v0->y, y[1] = v1->y, y[2] = v2->y;
    TEXT3D_UNROLL for (int k = 0; k < 3; ++k) owned[k] = owns(dx(k), dy(k)) ? 0 : 1;
    const float inverse = 1.f / float(area);
    z = v0->z, slope1 = (v1->z - v0->z) * inverse, slope2 = (v2->z - v0->z) * inverse;
  }
  TEXT3D_HD static bool less(const SnappedVertex& a, const SnappedVertex& b) {
    return a.x < b.x || (a.x == b.x && a.y < b.y);
  }
  // The infinitesimal shift (e, e^2) of the pixel centre decides points on an edge.
  TEXT3D_HD static bool owns(int32_t dx, int32_t dy) { return dy < 0 || (dy == 0 && dx > 0); }
  TEXT3D_HD int32_t dx(int k) const { return x[(k + 2) % 3] - x[(k + 1) % 3]; }
  TEXT3D_HD int32_t dy(int k) const { return y[(k + 2) % 3] - y[(k + 1) % 3]; }
  // Twice the area of (edge k, point): positive inside.
  TEXT3D_HD int64_t edge(int k, int32_t px, int32_t py) const {
    const int a = (k + 1) % 3;
    return int64_t(dx(k)) * (py - y[a]) - int64_t(dy(k)) * (px - x[a]);
  }
  TEXT3D_HD bool inside(int64_t e0, int64_t e1, int64_t e2) const {
    return ((e0 - owned[0]) | (e1 - owned[1]) | (e2 - owned[2])) >= 0;
  }
  TEXT3D_HD float depth(float e1, float e2) const { return clamp_depth((z + e1 * slope1) + e2 * slope2); }
  TEXT3D_HD static float clamp_depth(float z) { return z < -1.f ? -1.f : z > 1.f ? 1.f : z; }
};

// What remains of a triangle after clipping, as a fan around corner 0.
struct ClippedPolygon {
  SnappedVertex corners[3 + kPlanes];
  int32_t count;

  TEXT3D_HD int32_t triangles() const { return count - 2; }
  TEXT3D_HD SnappedTriangle triangle(int32_t k) const { return {corners[0], corners[k + 1], corners[k + 2]}; }
  TEXT3D_HD void bounds(const Viewport& view, int32_t& left, int32_t& right, int32_t& bottom, int32_t& top) const {
    int32_t x0 = corners[0].x, x1 = x0, y0 = corners[0].y, y1 = y0;
    for (int32_t i = 1; i < count; ++i) {
      x0 = corners[i].x < x0 ? corners[i].x : x0, x1 = corners[i].x > x1 ? corners[i].x : x1;
      y0 = corners[i].y < y0 ? corners[i].y : y0, y1 = corners[i].y > y1 ? corners[i].y : y1;
    }
    left = first_pixel(x0), right = last_pixel(x1, view.width);
    bottom = first_pixel(y0), top = last_pixel(y1, view.height);
  }
};

TEXT3D_HD double plane_distance(const double* p, int32_t plane, double guard) {
  if (plane < 2) return plane == 0 ? p[2] + p[3] : p[3] - p[2];
  const double wide = guard * p[3], along = plane < 4 ? p[0] : p[1];
  return plane % 2 == 0 ? wide - along : wide + along;
}

// Sutherland and Hodgman (1974), plane after plane, in double: a corner far behind the camera would leave no correct
// digit in a float intersection. Each intersection goes from the inside corner to the outside one, so that both
// triangles at an edge get the same point. Returns count 0 if nothing is left.
TEXT3D_HD ClippedPolygon clip(const float* const vertices[3], const Viewport& view) {
  double points[2][3 + kPlanes][4];
  int32_t count = 3, from = 0;
  for (int i = 0; i < 3; ++i)
    for (int c = 0; c < 4; ++c) points[0][i][c] = vertices[i][c];
  ClippedPolygon polygon;
  polygon.count = 0;
  for (int32_t plane = 0; plane < kPlanes; ++plane) {
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i) {
      const double *here = points[from][i], *there = points[from][i + 1 < count ? i + 1 : 0];
      const double d_here = plane_distance(here, plane, view.guard), d_there = plane_distance(there, plane, view.guard);
      if (d_here >= 0.) {
        if (kept == 3 + kPlanes) return polygon;  // rounding made a non-convex polygon: cannot be drawn
        for (int c = 0; c < 4; ++c) points[1 - from][kept][c] = here[c];
        ++kept;
      }
      if ((d_here >= 0.) != (d_there >= 0.)) {
        if (kept == 3 + kPlanes) return polygon;
        const bool entering = d_there >= 0.;
        const double *inner = entering ? there : here, *outer = entering ? here : there;
        const double near = entering ? d_there : d_here, far = entering ? d_here : d_there;
        const double t = near / (near - far);
        for (int c = 0; c < 4; ++c) points[1 - from][kept][c] = inner[c] + t * (outer[c] - inner[c]);
        ++kept;
      }
    }
    count = kept, from = 1 - from;
    if (count < 3) return polygon;
  }
  for (int32_t i = 0; i < count; ++i) {
    const float x = float(points[from][i][0]), y = float(points[from][i][1]);
    const float z = float(points[from][i][2]), w = float(points[from][i][3]);
    const float bound = 2.f * view.guard * w;
    if (!(w >= kMinimumW && fabsf(x) <= bound && fabsf(y) <= bound && fabsf(z) <= 2.f * w)) return polygon;
    polygon.corners[i] = snap(x, y, z, w, 0, view);
  }
  polygon.count = count;
  return polygon;
}

// Does the polygon cover the point (signed count of its fan's triangles not 0), and at which depth (the smallest)?
TEXT3D_HD bool cover(const SnappedTriangle* fan, int32_t triangles, int32_t px, int32_t py, float& depth) {
  int32_t winding = 0;
  depth = 2.f;
  for (int32_t k = 0; k < triangles; ++k) {
    const SnappedTriangle& t = fan[k];
    const int64_t e1 = t.edge(1, px, py), e2 = t.edge(2, px, py);
    if (t.orientation == 0 || !t.inside(t.area - e1 - e2, e1, e2)) continue;
    winding += t.orientation;
    const float z = t.depth(float(e1), float(e2));
    depth = z < depth ? z : depth;
  }
  return winding != 0;
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
