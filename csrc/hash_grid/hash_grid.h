// Multiresolution hash-grid encoding (Mueller et al. 2022, section 3), its gradients and their gradients.
//   y_f = sum over the 2^D corners c of the cell of W_c(x) theta_cf,   W_c = product over d of w_d or 1 - w_d
// Everything below is linear in the corner values, so three weights serve all orders:
//   W_c,   its derivative by x_d,   its second derivative by x_d and x_e.
#pragma once
#include "common/host_device.h"

namespace text3d {

constexpr int kHashGridLevels = 32;

struct HashGridLayout {
  float scales[kHashGridLevels];
  uint32_t resolutions[kHashGridLevels];  // vertices a side; 0: the first entry serves all
  uint32_t offsets[kHashGridLevels + 1];  // first entry of each level
  int32_t hashed[kHashGridLevels];
  float offset;                           // position = x * scale + offset
  int32_t dim, features, levels, active_levels;
  int32_t interpolation;                  // 0 linear, 1 smoothstep, 2 nearest
  int32_t clip;                           // 1 (the ngp dialect): nothing outside [0, 1], tiles repeat along whole axes
};
#define TEXT3D_HASH_GRID_LAYOUT(l) \
  l.scales, l.resolutions, l.offsets, l.hashed, l.offset, l.dim, l.features, l.levels, l.active_levels, l.interpolation, \
      l.clip

struct HashGridForwardParams {
  const float* x;      // [N, D]
  const void* table;   // [entries, F] of dtype; on a CPU readable to the end of its last 4-byte word
  float* y;            // [N, L F]
  float* jacobian;     // [N, L F, D] or null
  int64_t points;
  int32_t dtype;       // of the table: 0 float32, 1 float16, 2 bfloat16
  HashGridLayout layout;
  auto fields() { return std::tie(x, table, y, jacobian, points, dtype, TEXT3D_HASH_GRID_LAYOUT(layout)); }
};

struct HashGridBackwardParams {
  const float* x;              // [N, D]
  const void* table;           // [entries, F]
  const float* grad_y;         // [N, L F]
  const float* grad_jacobian;  // [N, L F, D], or null: zero
  float* grad_x;               // [N, D], or null: not wanted
  float* grad_params;          // [entries, F], or null
  int64_t* fixed;              // CUDA's deterministic mode: [entries, F] zeros to sum in fixed point, or null
  const float* fixed_scale;    // [1], a power of two: units of fixed in 1
  int64_t points;
  int32_t dtype;
  HashGridLayout layout;
  bool accumulate = false;     // for hash_mlp on a CPU: add to grad_params instead of writing it
  auto fields() {
    return std::tie(x, table, grad_y, grad_jacobian, grad_x, grad_params, fixed, fixed_scale, points, dtype,
                    TEXT3D_HASH_GRID_LAYOUT(layout));
  }
};

// Gradient of the backward pass without grad_jacobian, given cotangents of its two results.
struct HashGridSecondParams {
  const float* x;              // [N, D]
  const void* table;           // [entries, F]
  const float* grad_y;         // [N, L F], the first backward pass's input
  const float* cotangent_x;    // [N, D], of grad_x, or null: zero
  const float* cotangent_params;  // [entries, F], of grad_params, or null: zero
  float* grad_grad_y;          // [N, L F]
  float* grad_x;               // [N, D], or null
  float* grad_params;          // [entries, F], or null; from cotangent_x alone
  int64_t* fixed;              // as above
  const float* fixed_scale;
  int64_t points;
  int32_t dtype;
  HashGridLayout layout;
  auto fields() {
    return std::tie(x, table, grad_y, cotangent_x, cotangent_params, grad_grad_y, grad_x, grad_params, fixed,
                    fixed_scale, points, dtype, TEXT3D_HASH_GRID_LAYOUT(layout));
  }
};

namespace TEXT3D_ISA {

TEXT3D_HD bool nearest(const HashGridLayout& layout) { return layout.interpolation == 2; }

struct HashGridLevel {
  float scale, offset;
  uint32_t first, count;  // entries
  uint32_t factor[4];     // of each axis: primes, or strides of a dense level
  bool hashed, smoothstep, nearest, clip;
};

TEXT3D_HD HashGridLevel hash_grid_level(const HashGridLayout& layout, int level) {
  HashGridLevel out;
  out.scale = layout.scales[level];
  out.offset = layout.offset;
  out.first = layout.offsets[level];
  out.count = layout.offsets[level + 1] - out.first;
  out.hashed = layout.hashed[level] != 0;
  out.smoothstep = layout.interpolation == 1;
  out.nearest = nearest(layout);
  out.clip = layout.clip != 0;
  if (out.hashed) {
    out.factor[0] = 1u, out.factor[1] = 2654435761u, out.factor[2] = 805459861u, out.factor[3] = 3674653429u;
  } else {
    uint64_t stride = layout.resolutions[level] ? 1u : 0u;
    for (int d = 0; d < 4; ++d) {
      if (out.clip && stride > out.count) stride = 0;
      out.factor[d] = uint32_t(stride);
      stride *= layout.resolutions[level];
    }
  }
  return out;
}

// floor(position) as a cell, saturated to int32 (minus infinity and beyond stay defined), and what is left over.
TEXT3D_HD float split_position(float position, uint32_t& cell) {
  const float bounded = clamp(position, -2147483648.f, 2147483520.f);
  const float whole = floorf(bounded);
  cell = uint32_t(int32_t(whole));
  return bounded - whole;
}

TEXT3D_HD uint32_t wrap_index(uint32_t index, uint32_t count) { return index < count ? index : index % count; }

TEXT3D_HD float inside_unit(float x, float keep) { return x >= 0.f && x <= 1.f ? keep : 0.f; }

// Real and Index are float and uint32_t, or lanes of them.
template <class Real, class Index, int D>
struct HashGridCell {
  Index term[D][2];   // what both vertices along each axis add to the index
  Real weight[D][2];  // their weights
  Real slope[D];      // derivative of weight[d][1]
  Real curvature[D];  // and its derivative

  // `keep` is 1, or 0 for a point that has no output.
  TEXT3D_HD HashGridCell(const HashGridLevel& level, const Real* x, Real keep) {
    TEXT3D_UNROLL
    for (int d = 0; d < D; ++d) {
      Index cell;
      const Real t = split_position(x[d] * level.scale + level.offset, cell);
      term[d][0] = cell * level.factor[d];
      term[d][1] = term[d][0] + level.factor[d];
      if (level.smoothstep) {
        weight[d][1] = t * t * (3.f - 2.f * t);
        slope[d] = t * (1.f - t) * (6.f * level.scale);
        curvature[d] = (1.f - 2.f * t) * (6.f * level.scale * level.scale);
      } else if (!level.nearest) {
        weight[d][1] = t;
        slope[d] = t * 0.f + level.scale;
        curvature[d] = t * 0.f;
      } else {  // corner 0 alone counts
        weight[d][1] = slope[d] = curvature[d] = t * 0.f;
      }
      weight[d][0] = 1.f - weight[d][1];
    }
    // one factor of each product belongs to axis 0
    weight[0][0] = weight[0][0] * keep, weight[0][1] = weight[0][1] * keep;
    slope[0] = slope[0] * keep, curvature[0] = curvature[0] * keep;
  }

  TEXT3D_HD Index index(const HashGridLevel& level, int corner) const {
    Index sum = term[0][corner & 1];
    TEXT3D_UNROLL
    for (int d = 1; d < D; ++d) {
      const Index next = term[d][corner >> d & 1];
      sum = level.hashed ? sum ^ next : sum + next;
    }
    return level.hashed ? sum & (level.count - 1u) : wrap_index(sum, level.count);
  }

  TEXT3D_HD Real value(int corner) const {
    Real product = weight[0][corner & 1];
    TEXT3D_UNROLL
    for (int d = 1; d < D; ++d) product = product * weight[d][corner >> d & 1];
    return product;
  }

  TEXT3D_HD Real first(int corner, int along) const {  // d value / dx_along
    Real product = corner >> along & 1 ? slope[along] : -slope[along];
    TEXT3D_UNROLL
    for (int d = 0; d < D; ++d)
      if (d != along) product = product * weight[d][corner >> d & 1];
    return product;
  }

  TEXT3D_HD Real along(int corner, const Real* direction) const {  // d value / dx . direction
    Real sum = first(corner, 0) * direction[0];
    TEXT3D_UNROLL
    for (int d = 1; d < D; ++d) sum = sum + first(corner, d) * direction[d];
    return sum;
  }

  TEXT3D_HD Real second(int corner, int a, int b) const {  // d2 value / dx_a dx_b
    Real product;
    if (a == b) {
      product = corner >> a & 1 ? curvature[a] : -curvature[a];
    } else {
      product = slope[a] * slope[b];
      product = (corner >> a ^ corner >> b) & 1 ? -product : product;
    }
    TEXT3D_UNROLL
    for (int d = 0; d < D; ++d)
      if (d != a && d != b) product = product * weight[d][corner >> d & 1];
    return product;
  }
};

}  // namespace TEXT3D_ISA
}  // namespace text3d
