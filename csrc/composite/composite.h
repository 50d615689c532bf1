// Volume rendering of packed samples along rays (NeRF quadrature: Mildenhall et al. 2020, eq. 3; Max 1995).
//   alpha_i = 1 - exp(-sigma_i (t1_i - t0_i)),  T_i = prod_{j<i} (1 - alpha_j),  w_i = T_i alpha_i
//   value = sum w_i c_i,  opacity = sum w_i,  depth = sum w_i m_i / opacity,  variance = sum w_i (m_i - depth)^2 / opacity
// with m_i the midpoint. A ray stops before the first sample with T_i < early_stop.
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
  const float* grad_values;          // [R, C]
  const float* grad_opacity;         // [R]
  const float* grad_depth;           // [R]
  const float* grad_depth_variance;  // [R]
  const float* grad_weights;         // [S]
  const float* sigma;                // [S]
  const float* values;               // [S, C]
  const float* t_starts;             // [S]
  const float* t_ends;               // [S]
  const int32_t* ray_offsets;        // [R + 1]
  const float* opacity;              // [R]
  const float* depth;                // [R]
  const float* depth_variance;       // [R]
  const float* weights;              // [S]
  float* grad_sigma;                 // [S]
  float* grad_sample_values;         // [S, C]
  float* grad_t_starts;              // [S]
  float* grad_t_ends;                // [S]
  int64_t rays, samples;
  int32_t channels;
  float early_stop;
  auto fields() {
    return std::tie(grad_values, grad_opacity, grad_depth, grad_depth_variance, grad_weights, sigma, values, t_starts,
                    t_ends, ray_offsets, opacity, depth, depth_variance, weights, grad_sigma, grad_sample_values,
                    grad_t_starts, grad_t_ends, rays, samples, channels, early_stop);
  }
};

namespace TEXT3D_ISA {

constexpr float kMinimumOpacity = 1e-10f;  // below it depth and variance are 0 and pass no gradient

struct CompositeForwardRay {
  CompositeForwardParams p;
  TEXT3D_HD void operator()(int64_t ray) const {
    const int64_t begin = p.ray_offsets[ray], end = p.ray_offsets[ray + 1];
    float transmittance = 1.f, opacity = 0.f, first = 0.f, second = 0.f;
    for (int32_t c = 0; c < p.channels; ++c) p.out_values[ray * p.channels + c] = 0.f;
    // Moments about the first midpoint: the variance is a small difference of large numbers otherwise.
    const float origin = begin < end ? 0.5f * (p.t_starts[begin] + p.t_ends[begin]) : 0.f;
    for (int64_t i = begin; i < end; ++i) {
      if (transmittance < p.early_stop) {
        p.weights[i] = 0.f;
        continue;
      }
      const float pass = expf(-p.sigma[i] * (p.t_ends[i] - p.t_starts[i]));
      const float weight = transmittance * (1.f - pass);
      const float middle = 0.5f * (p.t_starts[i] + p.t_ends[i]) - origin;
      p.weights[i] = weight;
      opacity += weight;
      first += weight * middle;
      second += weight * middle * middle;
      for (int32_t c = 0; c < p.channels; ++c) p.out_values[ray * p.channels + c] += weight * p.values[i * p.channels + c];
      transmittance *= pass;
    }
    const bool seen = opacity > kMinimumOpacity;
    const float mean = seen ? first / opacity : 0.f;
    p.opacity[ray] = opacity;
    p.depth[ray] = seen ? origin + mean : 0.f;
    p.depth_variance[ray] = seen ? max_of(second / opacity - mean * mean, 0.f) : 0.f;
  }
};

// With g_i = dL/dw_i: dL/d(sigma_i delta_i) = T_{i+1} g_i - sum_{j>i} w_j g_j. The suffix is total - prefix, so the
// ray is walked in forward order.
struct CompositeBackwardRay {
  CompositeBackwardParams p;

  TEXT3D_HD float weight_gradient(int64_t ray, int64_t i, bool seen) const {
    float g = p.grad_weights[i] + p.grad_opacity[ray];
    for (int32_t c = 0; c < p.channels; ++c) g += p.grad_values[ray * p.channels + c] * p.values[i * p.channels + c];
    if (seen) {
      const float offset = 0.5f * (p.t_starts[i] + p.t_ends[i]) - p.depth[ray];
      g += (p.grad_depth[ray] * offset + p.grad_depth_variance[ray] * (offset * offset - p.depth_variance[ray])) / p.opacity[ray];
    }
    return g;
  }

  TEXT3D_HD void operator()(int64_t ray) const {
    const int64_t begin = p.ray_offsets[ray], end = p.ray_offsets[ray + 1];
    const bool seen = p.opacity[ray] > kMinimumOpacity;
    float suffix = 0.f;
    for (int64_t i = begin; i < end; ++i) suffix += p.weights[i] * weight_gradient(ray, i, seen);
    float transmittance = 1.f;
    for (int64_t i = begin; i < end; ++i) {
      const float delta = p.t_ends[i] - p.t_starts[i], weight = p.weights[i];
      const bool stopped = transmittance < p.early_stop;
      const float g = stopped ? 0.f : weight_gradient(ray, i, seen);
      suffix -= weight * g;
      transmittance *= stopped ? 1.f : expf(-p.sigma[i] * delta);
      const float optical = stopped ? 0.f : transmittance * g - suffix;
      p.grad_sigma[i] = optical * delta;
      float middle = 0.f;
      if (seen) {
        const float offset = 0.5f * (p.t_starts[i] + p.t_ends[i]) - p.depth[ray];
        middle = weight * (p.grad_depth[ray] + 2.f * p.grad_depth_variance[ray] * offset) / p.opacity[ray];
      }
      p.grad_t_starts[i] = 0.5f * middle - optical * p.sigma[i];
      p.grad_t_ends[i] = 0.5f * middle + optical * p.sigma[i];
      for (int32_t c = 0; c < p.channels; ++c)
        p.grad_sample_values[i * p.channels + c] = weight * p.grad_values[ray * p.channels + c];
    }
  }
};

}  // namespace TEXT3D_ISA
}  // namespace text3d
