// Drawing triangles into the keys of a band of rows, on a CPU. Blocks of triangles are set up lane by lane; the pixels of
// a small triangle are tested in rows of lanes with 32-bit edge functions, those of a large one come from exact spans.
#pragma once
#include "common/lanes.h"
#include "rasterize/rasterize.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

constexpr int32_t kBlock = 16;                        // triangles set up together
constexpr int32_t kSpan = 8;                          // pixels drawn together
constexpr int32_t kSmallExtent = 64 * kSubpixels;     // edge functions fit 32 bits
constexpr int32_t kExactExtent = 1 << 25;             // edge functions are exact as doubles
enum State : int32_t { kCulled, kCrossing, kSmall, kLarge };

struct Image {
  const float* pos;              // [V, 4]
  const SnappedVertex* snapped;  // [V]
  const int32_t* tri;            // [F, 3]
  int64_t vertices;
  Viewport view;

  ClippedPolygon clipped(int32_t id) const {
    const int32_t* v = tri + 3 * int64_t(id);
    const float* corners[3] = {pos + 4 * int64_t(v[0]), pos + 4 * int64_t(v[1]), pos + 4 * int64_t(v[2])};
    return clip(corners, view);
  }
  SnappedTriangle triangle(int32_t id) const {
    const int32_t* v = tri + 3 * int64_t(id);
    return {snapped[v[0]], snapped[v[1]], snapped[v[2]]};
  }
};

// Keys of rows [begin, end), rows padded by kSpan columns.
struct Canvas {
  int64_t* keys;
  const int64_t* previous;  // keys that drawn ones must exceed, or null
  int32_t stride, begin, end;
  int64_t cell(int32_t x, int32_t y) const { return int64_t(y - begin) * stride + x; }
};

struct TriangleBlock {
  int32_t ids[kBlock], state[kBlock];
  int32_t x[3][kBlock], y[3][kBlock];
  float z[3][kBlock];
  int32_t outside_any[kBlock], outside_all[kBlock];  // of the corners' codes
  int32_t left[kBlock], right[kBlock], bottom[kBlock], top[kBlock];

  // kChecked: returns false if a vertex index is out of range; such a triangle is culled.
  template <bool kChecked>
  bool load(const Image& image) {
    static const SnappedVertex nowhere = {0, 0, 0.f, kInvalid};
    bool fine = true;
    for (int32_t start = 0; start < kBlock; start += kLanes) {
      const float* rows[3][kLanes];
      for (int32_t l = 0; l < kLanes; ++l) {
        const int32_t* v = image.tri + 3 * int64_t(ids[start + l]);
        bool valid = true;
        if (kChecked)
          valid = (uint64_t(v[0]) < uint64_t(image.vertices)) & (uint64_t(v[1]) < uint64_t(image.vertices)) &
                  (uint64_t(v[2]) < uint64_t(image.vertices));
        fine &= valid;
        for (int k = 0; k < 3; ++k)
          rows[k][l] = reinterpret_cast<const float*>(valid ? image.snapped + v[k] : &nowhere);
      }
      Ints any{}, all = ~Ints{};
      for (int k = 0; k < 3; ++k) {
        Floats column, row, depth, code;  // bits of SnappedVertex's fields
        load_rows(rows[k], column, row, depth, code);
        store_lanes(x[k] + start, Ints(column)), store_lanes(y[k] + start, Ints(row)), store_lanes(z[k] + start, depth);
        any |= Ints(code), all &= Ints(code);
      }
      store_lanes(outside_any + start, any), store_lanes(outside_all + start, all);
    }
    return fine;
  }

  void bounds(const Viewport& view) {
    for (int32_t l = 0; l < kBlock; ++l) {
      const int32_t x0 = smallest(x[0][l], x[1][l], x[2][l]), x1 = largest(x[0][l], x[1][l], x[2][l]);
      const int32_t y0 = smallest(y[0][l], y[1][l], y[2][l]), y1 = largest(y[0][l], y[1][l], y[2][l]);
      left[l] = first_pixel(x0), right[l] = last_pixel(x1, view.width);
      bottom[l] = first_pixel(y0), top[l] = last_pixel(y1, view.height);
      const bool empty = (left[l] > right[l]) | (bottom[l] > top[l]);
      const bool small = (x1 - x0 < kSmallExtent) & (y1 - y0 < kSmallExtent);
      const bool gone = (outside_any[l] >= int32_t(kInvalid)) | (outside_all[l] != 0);
      const int32_t projected = empty ? kCulled : small ? kSmall : kLarge;
      state[l] = gone ? int32_t(kCulled) : outside_any[l] ? int32_t(kCrossing) : projected;
    }
  }
  static int32_t smallest(int32_t a, int32_t b, int32_t c) { return a < b ? (a < c ? a : c) : (b < c ? b : c); }
  static int32_t largest(int32_t a, int32_t b, int32_t c) { return a > b ? (a > c ? a : c) : (b > c ? b : c); }
};

// SnappedTriangle's arithmetic for a block of small triangles; edge 0 is area - edge 1 - edge 2. Lanes that are not small
// overflow; they are not drawn, but it must be defined: products and sums of unsigned numbers.
struct SmallTriangles {
  int32_t area[kBlock], owned[3][kBlock];
  int32_t edge1[kBlock], edge2[kBlock];                      // at the lower left pixel that is drawn
  int32_t right1[kBlock], right2[kBlock], up1[kBlock], up2[kBlock];  // steps of a pixel
  float z[kBlock], slope1[kBlock], slope2[kBlock];

  SmallTriangles(const TriangleBlock& t, int32_t first_row) {
    static_assert(kBlock % kLanes == 0, "whole lanes");
    for (int32_t l = 0; l < kBlock; l += kLanes) {
      // Relative to the lower left pixel's centre: differences fit 32 bits only if the triangle is small.
      const Ints bottom = load_lanes(t.bottom + l), row = bottom > first_row ? bottom : Ints{} + first_row;
      const Uints ox = Uints(load_lanes(t.left + l) * kSubpixels + kHalfPixel), oy = Uints(row * kSubpixels + kHalfPixel);
      Ints x0 = load_lanes(t.x[0] + l), x1 = load_lanes(t.x[1] + l), x2 = load_lanes(t.x[2] + l);
      Ints y0 = load_lanes(t.y[0] + l), y1 = load_lanes(t.y[1] + l), y2 = load_lanes(t.y[2] + l);
      Floats z0 = load_lanes(t.z[0] + l), z1 = load_lanes(t.z[1] + l), z2 = load_lanes(t.z[2] + l);
      const Ints second = (x1 < x0) | ((x1 == x0) & (y1 < y0));
      const Ints sx = second ? x1 : x0, sy = second ? y1 : y0;
      const Ints third = (x2 < sx) | ((x2 == sx) & (y2 < sy));
      rotate(second & ~third, third, x0, x1, x2);
      rotate(second & ~third, third, y0, y1, y2);
      rotate(second & ~third, third, z0, z1, z2);
      const Uints doubled = Uints(x1 - x0) * Uints(y2 - y0) - Uints(y1 - y0) * Uints(x2 - x0);
      const Ints turned = Ints(doubled) < 0;
      swap_if(turned, x1, x2), swap_if(turned, y1, y2), swap_if(turned, z1, z2);
      const Ints twice = turned ? Ints(0u - doubled) : Ints(doubled);
      const Ints dx0 = x2 - x1, dy0 = y2 - y1, dx1 = x0 - x2, dy1 = y0 - y2, dx2 = x1 - x0, dy2 = y1 - y0;
      store_lanes(area + l, twice);
      store_lanes(owned[0] + l, bias(dx0, dy0)), store_lanes(owned[1] + l, bias(dx1, dy1));
      store_lanes(owned[2] + l, bias(dx2, dy2));
      store_lanes(edge1 + l, Ints(Uints(dx1) * (oy - Uints(y2)) - Uints(dy1) * (ox - Uints(x2))));
      store_lanes(edge2 + l, Ints(Uints(dx2) * (oy - Uints(y0)) - Uints(dy2) * (ox - Uints(x0))));
      store_lanes(right1 + l, Ints(Uints(-dy1) * kSubpixels)), store_lanes(right2 + l, Ints(Uints(-dy2) * kSubpixels));
      store_lanes(up1 + l, Ints(Uints(dx1) * kSubpixels)), store_lanes(up2 + l, Ints(Uints(dx2) * kSubpixels));
      const Floats inverse = 1.f / __builtin_convertvector(twice, Floats);
      store_lanes(z + l, z0), store_lanes(slope1 + l, (z1 - z0) * inverse), store_lanes(slope2 + l, (z2 - z0) * inverse);
    }
  }
  // 0 where the edge owns the points on it, otherwise 1.
  static Ints bias(Ints dx, Ints dy) { return 1 + ((dy < 0) | ((dy == 0) & (dx > 0))); }
  template <class T>
  static void rotate(Ints second, Ints third, T& a, T& b, T& c) {
    const T a0 = a, b0 = b, c0 = c;
    a = second ? b0 : third ? c0 : a0;
    b = second ? c0 : third ? a0 : b0;
    c = second ? a0 : third ? b0 : c0;
  }
  template <class T>
  static void swap_if(Ints yes, T& a, T& b) {
    const T a0 = a;
    a = yes ? b : a, b = yes ? a0 : b;
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// As below, which GCC compiles to many more instructions: it widens both halves of a key, here they are interleaved.
template <bool Peeling>
inline void draw_small(const SmallTriangles& t, const TriangleBlock& block, int32_t l, const Canvas& canvas) {
  static_assert(kSpan == kLanes, "a row of lanes");
  const int32_t begin = block.bottom[l] > canvas.begin ? block.bottom[l] : canvas.begin;
  const int32_t end = block.top[l] < canvas.end - 1 ? block.top[l] : canvas.end - 1, columns = block.right[l] - block.left[l];
  const Ints order = {0, 1, 4, 5, 2, 3, 6, 7};  // interleaving puts these columns in place
  const Ints up1 = Ints{} + t.up1[l], up2 = Ints{} + t.up2[l], id = Ints{} + ~block.ids[l];
  const Ints inside0 = Ints{} + (t.area[l] - t.owned[0][l]), owned1 = Ints{} + t.owned[1][l], owned2 = Ints{} + t.owned[2][l];
  const Floats z = broadcast(t.z[l]), slope1 = broadcast(t.slope1[l]), slope2 = broadcast(t.slope2[l]);
  Ints row1 = t.edge1[l] + order * t.right1[l], row2 = t.edge2[l] + order * t.right2[l];
  int64_t cell = canvas.cell(block.left[l], begin);
  for (int32_t y = begin; y <= end; ++y, row1 += up1, row2 += up2, cell += canvas.stride) {
    Ints e1 = row1, e2 = row2;
    for (int32_t x = 0; x <= columns; x += kSpan, e1 += kSpan * t.right1[l], e2 += kSpan * t.right2[l]) {
      const Ints sign = (inside0 - e1 - e2) | (e1 - owned1) | (e2 - owned2);
      const Floats depth = (z + __builtin_convertvector(e1, Floats) * slope1) + __builtin_convertvector(e2, Floats) * slope2;
      const __m256 clamped = _mm256_min_ps(_mm256_set1_ps(1.f), _mm256_max_ps(_mm256_set1_ps(-1.f), (__m256)depth));
      const Ints bits = (Ints)clamped, ordered = bits ^ Ints(Uints(bits >> 31) >> 1);
      // kNothing outside
      const __m256 high = _mm256_blendv_ps((__m256)ordered, (__m256)(Ints{} + 0x7fffffff), (__m256)sign);
      const __m256 low = _mm256_blendv_ps((__m256)id, (__m256)~Ints{}, (__m256)sign);
      const __m256i halves[2] = {(__m256i)_mm256_unpacklo_ps(low, high), (__m256i)_mm256_unpackhi_ps(low, high)};
      for (int half = 0; half < 2; ++half) {
        auto* const keys = reinterpret_cast<__m256i*>(canvas.keys + cell + x + 4 * half);
        const __m256i before = _mm256_loadu_si256(keys);
        __m256i better = _mm256_cmpgt_epi64(before, halves[half]);
        if (Peeling) {
          const auto* previous = reinterpret_cast<const __m256i*>(canvas.previous + cell + x + 4 * half);
          better = _mm256_and_si256(better, _mm256_cmpgt_epi64(halves[half], _mm256_loadu_si256(previous)));
        }
        _mm256_storeu_si256(keys, _mm256_blendv_epi8(before, halves[half], better));
      }
    }
  }
}
#else
template <bool Peeling>
inline void draw_small(const SmallTriangles& t, const TriangleBlock& block, int32_t l, const Canvas& canvas) {
  const int32_t begin = block.bottom[l] > canvas.begin ? block.bottom[l] : canvas.begin;
  const int32_t end = block.top[l] < canvas.end - 1 ? block.top[l] : canvas.end - 1, columns = block.right[l] - block.left[l];
  const int32_t right1 = t.right1[l], right2 = t.right2[l], up1 = t.up1[l], up2 = t.up2[l];
  const int32_t inside0 = t.area[l] - t.owned[0][l], owned1 = t.owned[1][l], owned2 = t.owned[2][l];
  const float z = t.z[l], slope1 = t.slope1[l], slope2 = t.slope2[l];
  const int32_t id = ~block.ids[l];
  int64_t cell = canvas.cell(block.left[l], begin);
  int32_t row1 = t.edge1[l], row2 = t.edge2[l];
  for (int32_t y = begin; y <= end; ++y, row1 += up1, row2 += up2, cell += canvas.stride) {
    for (int32_t x = 0; x <= columns; x += kSpan) {
      int64_t* keys = canvas.keys + cell + x;
      const int64_t* previous = Peeling ? canvas.previous + cell + x : nullptr;
      const int32_t start1 = row1 + x * right1, start2 = row2 + x * right2;
#pragma omp simd
      for (int32_t lane = 0; lane < kSpan; ++lane) {
        const int32_t e1 = start1 + lane * right1, e2 = start2 + lane * right2;
        const int32_t sign = (inside0 - e1 - e2) | (e1 - owned1) | (e2 - owned2);
        const float depth = SnappedTriangle::clamp_depth((z + float(e1) * slope1) + float(e2) * slope2);
        const int32_t bits = int32_t(float_to_bits(depth));
        const int32_t outside = sign >> 31, ordered = bits ^ ((bits >> 31) & 0x7fffffff);
        // kNothing outside, made of 32-bit halves: widening a mask costs more than widening a key
        const uint32_t high = uint32_t((ordered & ~outside) | (outside & 0x7fffffff)), low = uint32_t(id | outside);
        const int64_t key = int64_t(uint64_t(high) << 32 | low);
        bool better = key < keys[lane];
        if (Peeling) better &= key > previous[lane];
        keys[lane] = better ? key : keys[lane];
      }
    }
  }
}
#endif

// The columns [first, last] of a row with edges n_k + s_k * column >= 0.
inline void narrow(int64_t n, int64_t s, int64_t& first, int64_t& last) {
  if (s == 0) {
    if (n < 0) last = -1;
  } else if (s > 0) {
    if (n < 0) {
      const int64_t at = (-n + s - 1) / s;
      first = at > first ? at : first;
    }
  } else if (n < 0) {
    last = -1;
  } else {
    const int64_t at = n / -s;
    last = at < last ? at : last;
  }
}

template <bool Peeling, class Number>
inline void draw_span(int64_t* keys, const int64_t* previous, int64_t count, Number e1, Number e2, Number s1, Number s2,
                      const SnappedTriangle& t, int64_t id) {
  const float z = t.z, slope1 = t.slope1, slope2 = t.slope2;
  for (int64_t i = 0; i < count; ++i) {
    const float f1 = float(e1 + Number(i) * s1), f2 = float(e2 + Number(i) * s2);
    const float depth = SnappedTriangle::clamp_depth((z + f1 * slope1) + f2 * slope2);
    const int32_t bits = int32_t(float_to_bits(depth));
    const int64_t key = int64_t(uint64_t(int64_t(bits ^ ((bits >> 31) & 0x7fffffff))) << 32) | id;
    bool better = key < keys[i];
    if (Peeling) better &= key > previous[i];
    keys[i] = better ? key : keys[i];
  }
}

template <bool Peeling>
void draw_large(const SnappedTriangle& t, int32_t triangle, const Viewport& view, const Canvas& canvas) {
  if (t.orientation == 0) return;
  const int32_t x0 = TriangleBlock::smallest(t.x[0], t.x[1], t.x[2]), x1 = TriangleBlock::largest(t.x[0], t.x[1], t.x[2]);
  const int32_t y0 = TriangleBlock::smallest(t.y[0], t.y[1], t.y[2]), y1 = TriangleBlock::largest(t.y[0], t.y[1], t.y[2]);
  const int32_t left = first_pixel(x0), right = last_pixel(x1, view.width);
  int32_t begin = first_pixel(y0), end = last_pixel(y1, view.height);
  begin = begin > canvas.begin ? begin : canvas.begin, end = end < canvas.end - 1 ? end : canvas.end - 1;
  if (left > right) return;
  const bool exact = x1 - x0 < kExactExtent && y1 - y0 < kExactExtent;
  const int64_t s1 = -int64_t(t.dy(1)) * kSubpixels, s2 = -int64_t(t.dy(2)) * kSubpixels, id = uint32_t(~triangle);
  for (int32_t y = begin; y <= end; ++y) {
    const int32_t px = left * kSubpixels + kHalfPixel, py = y * kSubpixels + kHalfPixel;
    const int64_t e1 = t.edge(1, px, py), e2 = t.edge(2, px, py);
    int64_t first = 0, last = right - left;
    narrow(t.area - e1 - e2 - t.owned[0], -s1 - s2, first, last);
    narrow(e1 - t.owned[1], s1, first, last);
    narrow(e2 - t.owned[2], s2, first, last);
    if (first > last) continue;
    const int64_t cell = canvas.cell(left + int32_t(first), y), from1 = e1 + first * s1, from2 = e2 + first * s2;
    const int64_t* previous = Peeling ? canvas.previous + cell : nullptr;
    if (exact) {
      draw_span<Peeling>(canvas.keys + cell, previous, last - first + 1, double(from1), double(from2), double(s1),
                         double(s2), t, id);
    } else {
      draw_span<Peeling>(canvas.keys + cell, previous, last - first + 1, from1, from2, s1, s2, t, id);
    }
  }
}

template <bool Peeling>
void draw_crossing(const Image& image, int32_t id, const Canvas& canvas) {
  const ClippedPolygon polygon = image.clipped(id);
  SnappedTriangle fan[1 + kPlanes];
  const int32_t triangles = polygon.triangles();
  bool forwards = false, backwards = false;
  for (int32_t k = 0; k < triangles; ++k) {
    fan[k] = polygon.triangle(k);
    forwards |= fan[k].orientation > 0, backwards |= fan[k].orientation < 0;
  }
  if (!(forwards && backwards)) {  // no triangle takes away what another adds
    for (int32_t k = 0; k < triangles; ++k) draw_large<Peeling>(fan[k], id, image.view, canvas);
    return;
  }
  int32_t left, right, bottom, top;
  polygon.bounds(image.view, left, right, bottom, top);
  bottom = bottom > canvas.begin ? bottom : canvas.begin, top = top < canvas.end - 1 ? top : canvas.end - 1;
  for (int32_t y = bottom; y <= top; ++y)
    for (int32_t x = left; x <= right; ++x) {
      float depth;
      if (!cover(fan, triangles, x * kSubpixels + kHalfPixel, y * kSubpixels + kHalfPixel, depth)) continue;
      const int64_t key = depth_key(depth, id), cell = canvas.cell(x, y);
      if (key < canvas.keys[cell] && (!Peeling || key > canvas.previous[cell])) canvas.keys[cell] = key;
    }
}

template <bool Peeling>
void draw_block(const Image& image, const TriangleBlock& block, int32_t filled, const Canvas& canvas) {
  const SmallTriangles small(block, canvas.begin);
  for (int32_t l = 0; l < filled; ++l) {
    if (block.state[l] == kSmall) {
      if (small.area[l] != 0) draw_small<Peeling>(small, block, l, canvas);
    } else if (block.state[l] == kLarge) {
      draw_large<Peeling>(image.triangle(block.ids[l]), block.ids[l], image.view, canvas);
    } else if (block.state[l] == kCrossing) {
      draw_crossing<Peeling>(image, block.ids[l], canvas);
    }
  }
}

}  // namespace
}  // namespace TEXT3D_ISA
}  // namespace text3d
