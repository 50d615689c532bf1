// Volume rendering of packed samples along rays (NeRF quadrature: Mildenhall et al. 2020, eq. 3; Max 1995).
//   alpha_i = 1 - exp(-sigma_i (t1_i - t0_i)),  T_i = prod_{j<i} (1 - alpha_j),  w_i = T_i alpha_i
//   value = sum w_i c_i,  opacity = sum w_i,  depth = sum w_i m_i / opacity,  variance = sum w_i (m_i - depth)^2 / opacity
// with m_i the midpoint. A ray stops before the first sample with T_i < early_stop: its weight and all later ones are 0.
//
// Backward, with g_i = dL/dw_i:  dL/d(sigma_i delta_i) = T_{i+1} g_i - sum_{j>i} w_j g_j.
#pragma once
#include "common/host_device.h"

namespace text3d {

struct CompositeForwardParams {
  const float* sigma;          // [S]
  const float* values;         // [S, C]
  const float* t_starts;       // [S]
  const float* t_ends;         // [S]
  const int32_t* ray_offsets;  // [R + 1]
  float* out_values;           // [R, C]
  float* opacity;              // [R]
  float* depth;                // [R]
  float* depth_variance;       // [R]
  float* weights;              // [S]
  int64_t rays, samples;
  int32_t channels;
  float early_stop;
  auto fields() {
    return std::tie(sigma, values, t_starts, t_ends, ray_offsets, out_values, opacity, depth, depth_variance, weights,
                    rays, samples, channels, early_stop);
  }
};

struct CompositeBackwardParams {
  const float* grad_values;          // [R, C], or null: 0; likewise the four below
  const float* grad_opacity;         // [R]
  const float* grad_depth;           // [R]
  const float* grad_depth_variance;  // [R]
  const float* grad_weights;         // [S]
  const float* sigma;                // [S]
  const float* values;               // [S, C]
  const float* t_starts;             // [S]
  const float* t_ends;               // [S]
  const int32_t* ray_offsets;        // [R + 1]
  const float* opacity;              // [R], from the forward pass, as the three below
  const float* depth;                // [R]
  const float* depth_variance;       // [R]
  const float* weights;              // [S]
  float* grad_sigma;                 // [S]
  float* grad_sample_values;         // [S, C]
  float* grad_t_starts;              // [S], or null: not wanted
  float* grad_t_ends;                // [S], or null: not wanted
  int64_t rays, samples;
  int32_t channels;
  float early_stop;
  auto fields() {
    return std::tie(grad_values, grad_opacity, grad_depth, grad_depth_variance, grad_weights, sigma, values, t_starts,
                    t_ends, ray_offsets, opacity, depth, depth_variance, weights, grad_sigma, grad_sample_values, grad_t_starts,
                    grad_t_ends, rays, samples, channels, early_stop);
  }
};

namespace TEXT3D_ISA {

constexpr float kMinimumOpacity = 1e-10f;  // below it depth and variance are 0 and pass no gradient

// 1 - exp(-x), accurate also for small x, NaN for NaN; no library call and no branch, so that loops over it vectorize.
TEXT3D_HD float opacity_of(float x) {
  float y = -x;
  y = y < -87.f ? -87.f : y;
  y = y > 88.f ? 88.f : y;
  const float shifted = y * 1.44269504f + 12582912.f;  // rounds to an integer, which the low bits then hold
  const float whole = shifted - 12582912.f;
  const float r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;  // |r| <= 0.35
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r;
  const float scale = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  return (1.f - scale) - scale * p;
}

// From the mean square and the mean. Where no weight is negative, only rounding can make it so.
TEXT3D_HD float variance_of(float mean_square, float mean, float least_weight) {
  const float variance = mean_square - mean * mean;
  return variance < 0.f && least_weight >= 0.f ? 0.f : variance;
}

// What the gradient of a ray needs besides its samples.
struct CompositeRayGradient {
  float opacity, depth, variance;                     // cotangents; the two latter divided by the ray's opacity
  float mean_depth, mean_variance;

  // dL/dw of a sample, without the parts of its values and of its own weight's cotangent
  TEXT3D_HD float of_weight(float middle) const {
    const float offset = middle - mean_depth;
    return opacity + depth * offset + variance * (offset * offset - mean_variance);
  }
  // dL/dm of a sample
  TEXT3D_HD float of_middle(float weight, float middle) const {
    return weight * (depth + 2.f * variance * (middle - mean_depth));
  }
};

TEXT3D_HD CompositeRayGradient ray_gradient(const CompositeBackwardParams& p, int64_t ray) {
  const bool seen = p.opacity[ray] > kMinimumOpacity;
  const float by = seen ? 1.f / p.opacity[ray] : 0.f;
  CompositeRayGradient g;
  g.opacity = p.grad_opacity ? p.grad_opacity[ray] : 0.f;
  g.depth = p.grad_depth ? p.grad_depth[ray] * by : 0.f;
  g.variance = p.grad_depth_variance ? p.grad_depth_variance[ray] * by : 0.f;
  g.mean_depth = p.depth[ray];
  g.mean_variance = p.depth_variance[ray];
  return g;
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
