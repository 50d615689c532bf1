// Volume rendering of a field, density and colour = MLP(hash grid(x)), without anything in memory that grows with the
// number of samples: encode, network, shading and compositing in rounds of samples, computed again for the gradients.
//   raw = MLP_0(e(x)) + blob(x),  sigma = sharpness * softplus(raw) or exp(raw),  albedo = sigmoid(MLP_1..3(e(x)))
//   n = -v / |v|,  v = d raw / dx = J_e^T q / (2 radius) + blob'(x),  q = d MLP_0 / de
//   light = diffuse max(0, n . l) + ambient,  colour = albedo, albedo * light, or light
// and the quadrature of composite.h. The backward pass goes forward along the rays, where what is behind a sample is the
// total minus what was met: sum over j > i of w_j g_j = sum of all - prefix, and the sum of all follows from the outputs.
// Its second order: with c = dL/dv, d(c . v) is that of <q, e'> with e' = J_e c, see hash_grid.h and mlp.h.
#pragma once
#include "common/host_device.h"
#include "composite/composite.h"
#include "hash_grid/hash_grid.h"
#include "mlp/mlp.h"

namespace text3d {

enum RenderFieldMode : int32_t { kAlbedo, kLambertian, kTextureless };

struct FieldLayout {
  HashGridLayout grid;
  MLPLayout mlp;
  float radius, sharpness, blob_scale, blob_width;
  int32_t exponential;  // density: 0 softplus, 1 exp
  int32_t gaussian;     // blob: 0 linear, 1 gaussian
};
#define TEXT3D_FIELD_LAYOUT(l)                                                                                       \
  TEXT3D_HASH_GRID_LAYOUT(l.grid), TEXT3D_MLP_LAYOUT(l.mlp), l.radius, l.sharpness, l.blob_scale, l.blob_width,      \
      l.exponential, l.gaussian

struct RenderFieldInputs {
  const float* origins;        // [R, 3]
  const float* directions;     // [R, 3]
  const float* table;          // [entries, F]
  const float* weights;        // [num_params]
  const float* t_starts;       // [S]
  const float* t_ends;         // [S]
  const int32_t* ray_offsets;  // [R + 1]
  const float* light_position; // [V, 3], or null with kAlbedo; likewise the two below
  const float* light_diffuse;  // [V, 3]
  const float* light_ambient;  // [V, 3]
  int64_t rays, samples, rays_per_view;
  int32_t mode;                // RenderFieldMode
  int32_t normals;             // 1: values are colour and normal; must be 1 where there are lights
  float early_stop;
  FieldLayout layout;
};
#define TEXT3D_RENDER_FIELD_INPUTS(p)                                                                               \
  p.origins, p.directions, p.table, p.weights, p.t_starts, p.t_ends, p.ray_offsets, p.light_position,               \
      p.light_diffuse, p.light_ambient, p.rays, p.samples, p.rays_per_view, p.mode, p.normals, p.early_stop,        \
      TEXT3D_FIELD_LAYOUT(p.layout)

struct RenderFieldForwardParams {
  RenderFieldInputs in;
  float* values;          // [R, 3 or 6]
  float* opacity;         // [R]
  float* depth;           // [R]
  float* depth_variance;  // [R]
  float* orientation;     // [R], or null without normals
  auto fields() {
    return std::tie(TEXT3D_RENDER_FIELD_INPUTS(in), values, opacity, depth, depth_variance, orientation);
  }
};

struct RenderFieldBackwardParams {
  RenderFieldInputs in;
  const float* grad_values;          // [R, 3 or 6], or null: zero; likewise the four below
  const float* grad_opacity;         // [R]
  const float* grad_depth;           // [R]
  const float* grad_depth_variance;  // [R]
  const float* grad_orientation;     // [R]
  const float* values;               // [R, 3 or 6], from the forward pass, as the three below
  const float* opacity;              // [R]
  const float* depth;                // [R]
  const float* depth_variance;       // [R]
  float* grad_params;                // [entries, F]
  float* grad_weights;               // [num_params]
  float* partial;                    // CUDA: room [blocks, num_params]
  int32_t blocks;
  auto fields() {
    return std::tie(TEXT3D_RENDER_FIELD_INPUTS(in), grad_values, grad_opacity, grad_depth, grad_depth_variance,
                    grad_orientation, values, opacity, depth, depth_variance, grad_params, grad_weights,
                    partial, blocks);
  }
};

namespace TEXT3D_ISA {

constexpr float kSmallestGradient = 1e-6f;   // below it a normal is shorter than 1
constexpr float kSmallestDistance = 1e-12f;

TEXT3D_HD float norm_of(const float* v) { return sqrtf(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]); }

TEXT3D_HD float field_blob(const FieldLayout& l, const float* x) {
  const float square = x[0] * x[0] + x[1] * x[1] + x[2] * x[2];
  if (l.gaussian) return l.blob_scale * exp_of(-square / (2.f * l.blob_width * l.blob_width));
  return l.blob_scale * (1.f - sqrtf(square) / l.blob_width);
}

TEXT3D_HD void add_blob_gradient(const FieldLayout& l, const float* x, float* gradient) {
  const float by = l.gaussian ? -field_blob(l, x) / (l.blob_width * l.blob_width)
                              : -l.blob_scale / l.blob_width / max_of(norm_of(x), kSmallestDistance);
  for (int d = 0; d < 3; ++d) gradient[d] += by * x[d];
}

// The grid's coordinate in [0, 1].
TEXT3D_HD float field_coordinate(const FieldLayout& l, float x) {
  return clamp((x + l.radius) / (2.f * l.radius), 0.f, 1.f);
}

// d raw / dx in the world, with the blob's part
TEXT3D_HD void world_gradient(const FieldLayout& l, const float* x, const float* by_coordinate, float* gradient) {
  for (int d = 0; d < 3; ++d) gradient[d] = by_coordinate[d] / (2.f * l.radius);
  add_blob_gradient(l, x, gradient);
}

template <bool kExponential>
TEXT3D_HD float density_of(const FieldLayout& l, float raw) {
  return l.sharpness * (kExponential ? exp_of(min_of(15.f, raw)) : activation_value(kSoftplus, raw));
}

// Its derivative, given its value.
template <bool kExponential>
TEXT3D_HD float density_slope(const FieldLayout& l, float raw, float density) {
  return kExponential ? (raw <= 15.f ? density : 0.f) : l.sharpness * sigmoid_of(raw);
}

// A sample's colour and normal, and what their gradients need.
struct FieldShading {
  float albedo[3], color[3], normal[3], light[3], towards[3], length, facing;
  bool lit;

  // gradient: d raw / dx, unless there are no normals
  TEXT3D_HD FieldShading(const RenderFieldInputs& in, int64_t ray, const float* x, const float* albedo_of,
                         const float* gradient) {
    for (int c = 0; c < 3; ++c) color[c] = albedo[c] = albedo_of[c];
    lit = false, facing = 0.f, length = 1.f;
    if (!in.normals) return;
    const float norm = norm_of(gradient);
    length = norm > kSmallestGradient ? norm : -kSmallestGradient;  // the sign says that it is constant
    for (int d = 0; d < 3; ++d) normal[d] = -gradient[d] / fabsf(length);
    for (int d = 0; d < 3; ++d) facing += normal[d] * in.directions[3 * ray + d];
    facing = max_of(facing, 0.f);
    if (in.mode == kAlbedo) return;
    const int64_t view = ray / in.rays_per_view * 3;
    for (int d = 0; d < 3; ++d) towards[d] = in.light_position[view + d] - x[d];
    const float distance = max_of(norm_of(towards), kSmallestDistance);
    float cosine = 0.f;
    for (int d = 0; d < 3; ++d) towards[d] /= distance, cosine += normal[d] * towards[d];
    lit = cosine >= 0.f;
    for (int c = 0; c < 3; ++c) {
      light[c] = in.light_diffuse[view + c] * (lit ? cosine : 0.f) + in.light_ambient[view + c];
      color[c] = in.mode == kTextureless ? light[c] : albedo[c] * light[c];
    }
  }

  // Cotangents of colour and normal (which is used up) to those of out[1..3] and of the gradient.
  TEXT3D_HD void backward(const RenderFieldInputs& in, int64_t ray, const float* grad_color, float* grad_normal,
                          float* grad_out, float* grad_gradient) const {
    const int64_t view = in.mode == kAlbedo ? 0 : ray / in.rays_per_view * 3;
    float grad_cosine = 0.f;
    for (int c = 0; c < 3; ++c) {
      float grad_albedo = grad_color[c];
      if (in.mode != kAlbedo) {
        const bool textured = in.mode == kLambertian;
        grad_albedo = textured ? grad_color[c] * light[c] : 0.f;
        if (lit) grad_cosine += grad_color[c] * (textured ? albedo[c] : 1.f) * in.light_diffuse[view + c];
      }
      grad_out[1 + c] = grad_albedo * albedo[c] * (1.f - albedo[c]);
    }
    if (!in.normals) return;
    if (in.mode != kAlbedo)
      for (int d = 0; d < 3; ++d) grad_normal[d] += grad_cosine * towards[d];
    float along = 0.f;
    for (int d = 0; d < 3; ++d) along += normal[d] * grad_normal[d];
    if (length < 0.f) along = 0.f;
    for (int d = 0; d < 3; ++d) grad_gradient[d] = -(grad_normal[d] - normal[d] * along) / fabsf(length);
  }
};

// What the gradient of a ray needs besides its samples.
struct RayCotangents {
  CompositeRayGradient sums = {};
  float values[6] = {}, orientation = 0.f;
  float total = 0.f;  // sum of w dL/dw over the ray's samples

  RayCotangents() = default;
  TEXT3D_HD RayCotangents(const RenderFieldBackwardParams& p, int64_t ray) {
    const float opacity = p.opacity[ray], by = opacity > kMinimumOpacity ? 1.f / opacity : 0.f;
    sums.opacity = p.grad_opacity ? p.grad_opacity[ray] : 0.f;
    sums.depth = p.grad_depth ? p.grad_depth[ray] * by : 0.f;
    sums.variance = p.grad_depth_variance ? p.grad_depth_variance[ray] * by : 0.f;
    sums.mean_depth = p.depth[ray], sums.mean_variance = p.depth_variance[ray];
    orientation = p.grad_orientation ? p.grad_orientation[ray] : 0.f;
    total = opacity * sums.opacity;
    const int channels = p.in.normals ? 6 : 3;
    for (int c = 0; c < 6; ++c) {
      if (c >= channels) continue;
      values[c] = p.grad_values ? p.grad_values[ray * channels + c] : 0.f;
      total += p.values[ray * channels + c] * values[c];
    }
  }

  // dL/dw of a sample with weight w, and the cotangents of its colour and its normal.
  TEXT3D_HD float of_sample(const RenderFieldInputs& in, int64_t ray, const FieldShading& shading, float middle, float w,
                            float* grad_color, float* grad_normal) const {
    float own = sums.of_weight(middle);
    for (int c = 0; c < 3; ++c) own += values[c] * shading.color[c], grad_color[c] = w * values[c];
    for (int d = 0; in.normals && d < 3; ++d) {
      own += values[3 + d] * shading.normal[d];
      grad_normal[d] = w * (values[3 + d] + 2.f * orientation * shading.facing * in.directions[3 * ray + d]);
    }
    return own;
  }
};

}  // namespace TEXT3D_ISA
}  // namespace text3d
