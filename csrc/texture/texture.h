// Texture sampling: nearest, bilinear, mip-mapped; wrap, clamp, zero and seamless cube maps.
// Semantics as in text3d_fast/reference/texture.py. Texel (i, j) is centred at ((i + 0.5) / W, (j + 0.5) / H).
#pragma once
#include "common/host_device.h"

namespace text3d {

constexpr int kMaxMips = 16;

struct TextureParams {
  Array<const float*, kMaxMips> mips;       // each [B or 1, H_l, W_l, C]; cube: [B or 1, 6, N_l, N_l, C]
  Array<int32_t, kMaxMips> heights, widths;
  Array<int32_t, kMaxMips> batched;         // 1: the level has a texture for each image
  const float* uv;                               // [B, P, 2]; cube: directions [B, P, 3]
  const float* uv_da;                            // [B, P, 4] (cube: 6), interleaved d/dX, d/dY; or null
  const float* bias;                             // [B, P] or null
  float* out;                                    // [B, P, C]
  int64_t batch, pixels;                         // B, P
  int32_t channels, levels;
  int32_t filter;                                // 0 nearest, 1 linear, 2 linear-mipmap-nearest, 3 linear-mipmap-linear
  int32_t boundary;                              // 0 wrap, 1 clamp, 2 zero, 3 cube
  auto fields() {
    return std::tie(mips, heights, widths, batched, uv, uv_da, bias, out, batch, pixels, channels, levels, filter,
                    boundary);
  }
};

struct TextureBackwardParams {
  const float* grad_out;                         // [B, P, C]
  Array<const float*, kMaxMips> mips;       // these as in TextureParams
  Array<int32_t, kMaxMips> heights, widths, batched;
  const float* uv;
  const float* uv_da;
  const float* bias;
  Array<double*, kMaxMips> grad_mips;       // like mips, zeroed; null: not wanted. A texel may get millions of terms
  float* grad_uv;                                // like uv, or null
  float* grad_uv_da;                             // like uv_da, or null
  float* grad_bias;                              // like bias, or null
  int64_t batch, pixels;
  int32_t channels, levels, filter, boundary;
  auto fields() {
    return std::tie(grad_out, mips, heights, widths, batched, uv, uv_da, bias, grad_mips, grad_uv, grad_uv_da, grad_bias,
                    batch, pixels, channels, levels, filter, boundary);
  }
};

namespace TEXT3D_ISA {

constexpr int kNearest = 0, kLinear = 1, kMipNearest = 2, kMipLinear = 3;
constexpr int kWrap = 0, kClamp = 1, kZero = 2, kCube = 3;

TEXT3D_HD int clamp_int(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
TEXT3D_HD int wrap_int(int x, int size) {
  const int r = x % size;
  return r < 0 ? r + size : r;
}

// OpenGL cube faces +X -X +Y -Y +Z -Z, as CUBE_FACES of the reference.
struct CubeFace { int axis, sign, s_axis, s_sign, t_axis, t_sign; };
TEXT3D_HD CubeFace cube_face(int face) {
  switch (face) {
    case 0: return {0, 1, 2, -1, 1, -1};
    case 1: return {0, -1, 2, 1, 1, -1};
    case 2: return {1, 1, 0, 1, 2, 1};
    case 3: return {1, -1, 0, 1, 2, -1};
    case 4: return {2, 1, 0, 1, 1, -1};
    default: return {2, -1, 0, -1, 1, -1};
  }
}

// Where a pixel samples: (s, t) in [0, 1] on a face (0 unless a cube), with what the chain rule back to uv needs.
struct Place {
  float s, t, major;
  int face;
  bool valid;  // no: coordinates that are NaN or infinite, the direction 0; these sample 0 and pass no gradient
};

TEXT3D_HD bool is_number(float x) { return fabsf(x) <= 3.4028234663852886e38f; }

TEXT3D_HD Place place(const float* uv, int boundary) {
  Place p;
  p.face = 0, p.major = 1.f;
  if (boundary == kCube) {
    const float x = fabsf(uv[0]), y = fabsf(uv[1]), z = fabsf(uv[2]);
    const int axis = z > x && z > y ? 2 : y > x ? 1 : 0;
    p.face = 2 * axis + (uv[axis] < 0.f);
    p.major = fabsf(uv[axis]);
    p.valid = p.major > 0.f && is_number(x) && is_number(y) && is_number(z);
    const CubeFace f = cube_face(p.face);
    p.s = p.valid ? 0.5f * (uv[f.s_axis] * f.s_sign / p.major) + 0.5f : 0.5f;
    p.t = p.valid ? 0.5f * (uv[f.t_axis] * f.t_sign / p.major) + 0.5f : 0.5f;
    return p;
  }
  p.s = uv[0], p.t = uv[1];
  p.valid = is_number(p.s) && is_number(p.t);
  if (!p.valid) p.s = p.t = 0.f;
  if (boundary == kWrap) p.s -= floorf(p.s), p.t -= floorf(p.t);
  return p;
}

// The four texels of one level: linear index (-1: none), weight, and the weight's derivatives by s and t.
struct Taps {
  int64_t index[4];
  float weight[4], ds[4], dt[4];
};

TEXT3D_HD int64_t cube_texel(int face, int column, int row, int size, bool* corner) {
  const int s = 2 * column + 1 - size, t = 2 * row + 1 - size;
  const bool off_s = s > size || s < -size, off_t = t > size || t < -size;
  *corner = off_s && off_t;
  if (!off_s && !off_t) return (int64_t(face) * size + row) * size + column;
  if (*corner) return -1;
  // Surface coordinates in half texels; folded over the edge, the coordinate that overshot becomes the major one.
  const CubeFace f = cube_face(face);
  int point[3];
  point[f.axis] = f.sign * (size - 1);
  point[f.s_axis] = f.s_sign * clamp_int(s, -size, size);
  point[f.t_axis] = f.t_sign * clamp_int(t, -size, size);
  const int major = off_s ? f.s_axis : f.t_axis;
  const int new_face = 2 * major + (point[major] < 0);
  const CubeFace g = cube_face(new_face);
  const int new_column = (point[g.s_axis] * g.s_sign + size - 1) / 2, new_row = (point[g.t_axis] * g.t_sign + size - 1) / 2;
  return (int64_t(new_face) * size + new_row) * size + new_column;
}

TEXT3D_HD int nearest_coordinate(float x, int size) { return int(floorf(clamp(x * float(size), -1.f, float(size)))); }

TEXT3D_HD int64_t nearest_texel(const Place& p, int width, int height, int boundary) {
  int column = nearest_coordinate(p.s, width), row = nearest_coordinate(p.t, height);
  if (boundary == kZero && (column < 0 || column >= width || row < 0 || row >= height)) return -1;
  column = clamp_int(column, 0, width - 1), row = clamp_int(row, 0, height - 1);
  return (int64_t(p.face) * height + row) * width + column;
}

// Position along one side in texels, clamped as the boundary says; `slope` is d position / d coordinate.
TEXT3D_HD float tap_position(float coordinate, int size, int boundary, float* slope) {
  const float raw = coordinate * float(size) - 0.5f;
  float position = raw;
  if (boundary == kClamp) position = clamp(raw, 0.f, float(size - 1));
  if (boundary == kZero) position = clamp(raw, -1.f, float(size));
  *slope = position == raw ? float(size) : 0.f;
  return position;
}

TEXT3D_HD Taps linear_taps(const Place& p, int width, int height, int boundary) {
  float slope_s, slope_t;
  const float x = tap_position(p.s, width, boundary, &slope_s), y = tap_position(p.t, height, boundary, &slope_t);
  const int column = int(floorf(x)), row = int(floorf(y));
  const float fx = x - floorf(x), fy = y - floorf(y);
  Taps taps;
  int missing = -1;
  TEXT3D_UNROLL
  for (int k = 0; k < 4; ++k) {
    const int dx = k & 1, dy = k >> 1;
    int i = column + dx, j = row + dy;
    const float wx = dx ? fx : 1.f - fx, wy = dy ? fy : 1.f - fy;
    taps.weight[k] = wx * wy;
    taps.ds[k] = (dx ? slope_s : -slope_s) * wy;
    taps.dt[k] = (dy ? slope_t : -slope_t) * wx;
    if (boundary == kCube) {
      bool corner;
      taps.index[k] = cube_texel(p.face, i, j, width, &corner);
      if (corner) missing = k;
    } else if (boundary == kZero && (i < 0 || i >= width || j < 0 || j >= height)) {
      taps.index[k] = -1;
    } else {
      i = boundary == kWrap ? wrap_int(i, width) : clamp_int(i, 0, width - 1);
      j = boundary == kWrap ? wrap_int(j, height) : clamp_int(j, 0, height - 1);
      taps.index[k] = int64_t(j) * width + i;
    }
  }
  if (missing >= 0)
    TEXT3D_UNROLL
    for (int k = 0; k < 4; ++k)
      if (k != missing) {
        taps.weight[k] += taps.weight[missing] / 3.f;
        taps.ds[k] += taps.ds[missing] / 3.f;
        taps.dt[k] += taps.dt[missing] / 3.f;
      }
  return taps;
}

// Derivatives of (s, t) by (X, Y) in texels of level 0.
struct Footprint {
  float sx, sy, tx, ty;        // d position / d X, d Y
  float scale_s, scale_t;      // from derivatives of (s, t) to texels
};

TEXT3D_HD Footprint footprint(const Place& p, const float* uv_da, int width, int height, int boundary) {
  Footprint f;
  f.scale_s = float(width), f.scale_t = float(height);
  if (boundary == kCube) {
    const CubeFace c = cube_face(p.face);
    const float s = 2.f * p.s - 1.f, t = 2.f * p.t - 1.f;
    f.scale_s *= 0.5f / p.major, f.scale_t *= 0.5f / p.major;
    const float mx = uv_da[2 * c.axis] * c.sign, my = uv_da[2 * c.axis + 1] * c.sign;
    f.sx = f.scale_s * (uv_da[2 * c.s_axis] * c.s_sign - s * mx), f.sy = f.scale_s * (uv_da[2 * c.s_axis + 1] * c.s_sign - s * my);
    f.tx = f.scale_t * (uv_da[2 * c.t_axis] * c.t_sign - t * mx), f.ty = f.scale_t * (uv_da[2 * c.t_axis + 1] * c.t_sign - t * my);
    return f;
  }
  f.sx = f.scale_s * uv_da[0], f.sy = f.scale_s * uv_da[1];
  f.tx = f.scale_t * uv_da[2], f.ty = f.scale_t * uv_da[3];
  return f;
}

struct Level {
  int low;          // first level
  float fraction;   // weight of the next one (kMipLinear)
  float raw;        // before clamping to [0, levels - 1]
};

TEXT3D_HD Level mip_level(const Place& p, const float* uv_da, const float* bias, int width, int height, int levels, int filter,
                          int boundary) {
  Level level{0, 0.f, 0.f};
  if (uv_da) {
    const Footprint f = footprint(p, uv_da, width, height, boundary);
    const float a = f.sx * f.sx + f.tx * f.tx, b = f.sy * f.sy + f.ty * f.ty, c = f.sx * f.sy + f.tx * f.ty;
    const float root = sqrtf(max_of(0.25f * (a - b) * (a - b) + c * c, 1e-30f));
    level.raw = 0.5f * log2f(max_of(0.5f * (a + b) + root, 1e-30f));
  }
  if (bias) level.raw += *bias;
  const float clamped = clamp(level.raw, 0.f, float(levels - 1));
  if (filter == kMipNearest) {
    level.low = clamp_int(int(floorf(clamped + 0.5f)), 0, levels - 1);
  } else {
    level.low = clamp_int(int(floorf(clamped)), 0, levels > 1 ? levels - 2 : 0);
    level.fraction = clamped - float(level.low);
  }
  return level;
}

TEXT3D_HD int uv_size(int boundary) { return boundary == kCube ? 3 : 2; }

struct TexturePixel {
  TextureParams p;

  TEXT3D_HD const float* level_texels(int level, int64_t image) const {
    const int64_t faces = p.boundary == kCube ? 6 : 1;
    return p.mips[level] + (p.batched[level] ? image * faces * p.heights[level] * p.widths[level] * p.channels : 0);
  }

  TEXT3D_HD void add_level(int level, float scale, const Place& at, int64_t image, float* out) const {
    const Taps taps = linear_taps(at, p.widths[level], p.heights[level], p.boundary);
    const float* texels = level_texels(level, image);
    for (int k = 0; k < 4; ++k) {
      if (taps.index[k] < 0) continue;
      const float weight = scale * taps.weight[k];
      const float* texel = texels + taps.index[k] * p.channels;
      for (int c = 0; c < p.channels; ++c) out[c] += weight * texel[c];
    }
  }

  TEXT3D_HD void operator()(int64_t i) const {
    const int64_t image = i / p.pixels;
    const Place at = place(p.uv + i * uv_size(p.boundary), p.boundary);
    float* out = p.out + i * p.channels;
    for (int c = 0; c < p.channels; ++c) out[c] = 0.f;
    if (!at.valid) return;
    if (p.filter == kNearest) {
      const int64_t index = nearest_texel(at, p.widths[0], p.heights[0], p.boundary);
      if (index < 0) return;
      const float* texel = level_texels(0, image) + index * p.channels;
      for (int c = 0; c < p.channels; ++c) out[c] = texel[c];
      return;
    }
    if (p.filter == kLinear) return add_level(0, 1.f, at, image, out);
    const Level level = mip_level(at, p.uv_da ? p.uv_da + i * 2 * uv_size(p.boundary) : nullptr, p.bias ? p.bias + i : nullptr,
                                  p.widths[0], p.heights[0], p.levels, p.filter, p.boundary);
    add_level(level.low, 1.f - level.fraction, at, image, out);
    if (level.fraction > 0.f) add_level(level.low + 1, level.fraction, at, image, out);
  }
};

// Backward for one pixel. `owner` of `owners` adds only to texels in its bands of rows: with owners > 1 threads share the
// pixels and split the texels, so no atomics are needed and every texel sums in pixel order. CUDA adds to texels itself.
struct TextureBackwardPixel {
  const TextureBackwardParams& p;
  bool texels, coordinates;  // which gradients this pass writes
  int owner, owners;

  TEXT3D_HD int64_t level_offset(int level, int64_t image) const {
    const int64_t faces = p.boundary == kCube ? 6 : 1;
    return p.batched[level] ? image * faces * p.heights[level] * p.widths[level] * p.channels : 0;
  }

  TEXT3D_HD void add_texel(int level, int64_t image, int64_t index, float weight, const float* g) const {
    if (index < 0 || !p.grad_mips[level]) return;
    if (owners > 1 && int(index / p.widths[level] / 8 % owners) != owner) return;
    double* texel = p.grad_mips[level] + level_offset(level, image) + index * p.channels;
    for (int c = 0; c < p.channels; ++c) texel[c] += double(weight * g[c]);
  }

  // Adds scale * d(level's value . g) to *ds, *dt; returns value . g.
  TEXT3D_HD float level_gradient(int level, float scale, const Place& at, int64_t image, const float* g, float* ds,
                                 float* dt) const {
    const Taps taps = linear_taps(at, p.widths[level], p.heights[level], p.boundary);
    const float* source = p.mips[level] + level_offset(level, image);
    float value = 0.f;
    for (int k = 0; k < 4; ++k) {
      if (taps.index[k] < 0) continue;
      if (texels) add_texel(level, image, taps.index[k], scale * taps.weight[k], g);
      if (!coordinates) continue;
      const float* texel = source + taps.index[k] * p.channels;
      float dot = 0.f;
      for (int c = 0; c < p.channels; ++c) dot += g[c] * texel[c];
      value += taps.weight[k] * dot;
      *ds += scale * taps.ds[k] * dot;
      *dt += scale * taps.dt[k] * dot;
    }
    return value;
  }

  TEXT3D_HD void write_uv(int64_t i, const Place& at, float ds, float dt) const {
    if (!p.grad_uv) return;
    if (p.boundary != kCube) {
      p.grad_uv[2 * i] = ds, p.grad_uv[2 * i + 1] = dt;
      return;
    }
    const CubeFace f = cube_face(at.face);
    const float scale = 0.5f / at.major, s = 2.f * at.s - 1.f, t = 2.f * at.t - 1.f;
    float* out = p.grad_uv + 3 * i;
    out[f.s_axis] = scale * ds * f.s_sign;
    out[f.t_axis] = scale * dt * f.t_sign;
    out[f.axis] = -scale * (ds * s + dt * t) * f.sign;
  }

  TEXT3D_HD void write_level(int64_t i, const Place& at, float d_level) const {
    if (p.grad_bias) p.grad_bias[i] = d_level;
    if (!p.grad_uv_da) return;
    const int stride = 2 * uv_size(p.boundary);
    const Footprint f = footprint(at, p.uv_da + i * stride, p.widths[0], p.heights[0], p.boundary);
    const float a = f.sx * f.sx + f.tx * f.tx, b = f.sy * f.sy + f.ty * f.ty, c = f.sx * f.sy + f.tx * f.ty;
    const float square = 0.25f * (a - b) * (a - b) + c * c;
    const float root = sqrtf(max_of(square, 1e-30f)), lambda = 0.5f * (a + b) + root;
    if (!is_number(lambda)) {  // a footprint that is NaN or infinite chose its level without a slope
      for (int k = 0; k < stride; ++k) p.grad_uv_da[i * stride + k] = 0.f;
      return;
    }
    const float d_lambda = lambda > 1e-30f ? d_level * 0.72134752f / lambda : 0.f;  // 1 / (2 ln 2)
    const float tilt = square > 1e-30f ? 0.25f * (a - b) / root : 0.f;
    const float da = d_lambda * (0.5f + tilt), db = d_lambda * (0.5f - tilt), dc = square > 1e-30f ? d_lambda * c / root : 0.f;
    const float sx = f.scale_s * (2.f * da * f.sx + dc * f.sy), sy = f.scale_s * (2.f * db * f.sy + dc * f.sx);
    const float tx = f.scale_t * (2.f * da * f.tx + dc * f.ty), ty = f.scale_t * (2.f * db * f.ty + dc * f.tx);
    float* out = p.grad_uv_da + i * stride;
    if (p.boundary != kCube) {
      out[0] = sx, out[1] = sy, out[2] = tx, out[3] = ty;
      return;
    }
    const CubeFace face = cube_face(at.face);
    const float s = 2.f * at.s - 1.f, t = 2.f * at.t - 1.f;
    out[2 * face.s_axis] = sx * face.s_sign, out[2 * face.s_axis + 1] = sy * face.s_sign;
    out[2 * face.t_axis] = tx * face.t_sign, out[2 * face.t_axis + 1] = ty * face.t_sign;
    out[2 * face.axis] = -(sx * s + tx * t) * face.sign, out[2 * face.axis + 1] = -(sy * s + ty * t) * face.sign;
  }

  TEXT3D_HD void operator()(int64_t i) const {
    const int64_t image = i / p.pixels;
    const Place at = place(p.uv + i * uv_size(p.boundary), p.boundary);
    const float* g = p.grad_out + i * p.channels;
    float ds = 0.f, dt = 0.f, d_level = 0.f;
    const float* uv_da = p.uv_da ? p.uv_da + i * 2 * uv_size(p.boundary) : nullptr;
    if (!at.valid) {
      // the output is a constant 0 there
    } else if (p.filter == kNearest) {
      if (texels) add_texel(0, image, nearest_texel(at, p.widths[0], p.heights[0], p.boundary), 1.f, g);
    } else if (p.filter == kLinear) {
      level_gradient(0, 1.f, at, image, g, &ds, &dt);
    } else {
      const Level level = mip_level(at, uv_da, p.bias ? p.bias + i : nullptr, p.widths[0], p.heights[0], p.levels, p.filter,
                                    p.boundary);
      const float low = level_gradient(level.low, 1.f - level.fraction, at, image, g, &ds, &dt);
      if (p.filter == kMipLinear && p.levels > 1) {
        const float high = level_gradient(level.low + 1, level.fraction, at, image, g, &ds, &dt);
        if (level.raw >= 0.f && level.raw <= float(p.levels - 1)) d_level = high - low;
      }
    }
    if (!coordinates) return;
    if (!at.valid) {
      for (int k = 0; p.grad_uv && k < uv_size(p.boundary); ++k) p.grad_uv[i * uv_size(p.boundary) + k] = 0.f;
      for (int k = 0; p.grad_uv_da && k < 2 * uv_size(p.boundary); ++k) p.grad_uv_da[i * 2 * uv_size(p.boundary) + k] = 0.f;
      if (p.grad_bias) p.grad_bias[i] = 0.f;
      return;
    }
    write_uv(i, at, ds, dt);
    write_level(i, at, d_level);
  }
};

}  // namespace TEXT3D_ISA
}  // namespace text3d
