// Small fully connected networks, their gradients and the gradients of those.
//   z_l = W_l a_{l-1} + b_l,   a_l = phi_l(z_l),   a_0 = x,   y = a_L
// Backward, from g = dL/dy:  delta_l = e_l phi'(z_l),  e_L = g,  e_{l-1} = W_l^T delta_l
//   dL/dx = e_0,  dL/dW_l = delta_l a_{l-1}^T,  dL/db_l = delta_l
// Second order, from cotangents x' of dL/dx and W', b' of the others: S = <x', dL/dx> + <W', dL/dW> + <b', dL/db> is
// <g, y'> with the tangents  z'_l = W_l a'_{l-1} + W'_l a_{l-1} + b'_l,  a'_l = phi'(z_l) z'_l,  a'_0 = x'.  So
//   dS/dg = y',  dS/dW_l = v_l a_{l-1}^T + delta_l a'_{l-1}^T,  dS/db_l = v_l,  dS/dx = f_0  where
//   v_l = f_l phi'(z_l) + e_l phi''(z_l) z'_l,  f_L = 0,  f_{l-1} = W_l^T v_l + W'_l^T delta_l
// The parameters are flat: for each layer W_l [out, in] by rows, then b_l [out].
#pragma once
#include "common/host_device.h"

namespace text3d {

constexpr int kMLPLayers = 9;  // 8 hidden ones and the output

enum MLPActivation : int32_t { kNone, kRelu, kSilu, kSoftplus, kSigmoid, kExp, kTanh };

struct MLPLayout {
  int32_t inputs, outputs, width, hidden_layers;
  int32_t activation, output_activation;  // MLPActivation
  int32_t bias;                           // 0 or 1
};
#define TEXT3D_MLP_LAYOUT(l) \
  l.inputs, l.outputs, l.width, l.hidden_layers, l.activation, l.output_activation, l.bias

struct MLPForwardParams {
  const float* x;        // [N, inputs]
  const float* weights;  // [num_params]
  float* y;              // [N, outputs]
  int64_t points;
  int32_t dtype;         // CUDA: of what products multiply, 0 float32, 1 float16, 2 bfloat16
  MLPLayout layout;
  auto fields() { return std::tie(x, weights, y, points, dtype, TEXT3D_MLP_LAYOUT(layout)); }
};

struct MLPBackwardParams {
  const float* grad_y;   // [N, outputs]
  const float* x;        // [N, inputs]
  const float* weights;  // [num_params]
  float* grad_x;         // [N, inputs], or null: not wanted
  float* grad_weights;   // [num_params], or null
  float* partial;        // CUDA: room [blocks, num_params], if grad_weights are wanted
  int32_t blocks;
  int64_t points;
  int32_t dtype;         // CUDA: of what products multiply, 0 float32, 1 float16, 2 bfloat16
  MLPLayout layout;
  auto fields() {
    return std::tie(grad_y, x, weights, grad_x, grad_weights, partial, blocks, points, dtype, TEXT3D_MLP_LAYOUT(layout));
  }
};

// Gradient of the backward pass, given cotangents of its two results.
struct MLPSecondParams {
  const float* cotangent_x;        // [N, inputs], of grad_x, or null: zero
  const float* cotangent_weights;  // [num_params], of grad_weights, or null: zero
  const float* grad_y;             // [N, outputs], the backward pass's input
  const float* x;                  // [N, inputs]
  const float* weights;            // [num_params]
  float* grad_grad_y;              // [N, outputs], or null
  float* grad_x;                   // [N, inputs], or null
  float* grad_weights;             // [num_params], or null
  float* partial;                  // CUDA, as above
  int32_t blocks;
  int64_t points;
  int32_t dtype;                   // CUDA, as above
  MLPLayout layout;
  auto fields() {
    return std::tie(cotangent_x, cotangent_weights, grad_y, x, weights, grad_grad_y, grad_x, grad_weights, partial,
                    blocks, points, dtype, TEXT3D_MLP_LAYOUT(layout));
  }
};

namespace TEXT3D_ISA {

// What a layer is, and where its parameters are.
struct MLPLayer {
  int32_t inputs, outputs, activation;
  int64_t weight, bias;  // offsets into the parameters; bias is -1 if there is none
};

TEXT3D_HD int mlp_layers(const MLPLayout& layout) { return layout.hidden_layers + 1; }

TEXT3D_HD MLPLayer mlp_layer(const MLPLayout& layout, int layer) {
  const bool last = layer == layout.hidden_layers;
  MLPLayer out;
  out.inputs = layer ? layout.width : layout.inputs;
  out.outputs = last ? layout.outputs : layout.width;
  out.activation = last ? layout.output_activation : layout.activation;
  const int64_t bias = layout.bias;
  out.weight = layer ? layout.width * (layout.inputs + bias) + (layer - 1) * (layout.width * (layout.width + bias)) : 0;
  out.bias = layout.bias ? out.weight + int64_t(out.inputs) * out.outputs : -1;
  return out;
}

TEXT3D_HD int64_t mlp_params(const MLPLayout& layout) {
  const MLPLayer last = mlp_layer(layout, layout.hidden_layers);
  return last.weight + int64_t(last.outputs) * (last.inputs + layout.bias);
}

// Whether phi'' is 0 wherever it exists; then z and a have the same sign and phi' needs only that.
TEXT3D_HD bool piecewise_linear(int32_t activation) { return activation == kNone || activation == kRelu; }

// Real is float, or lanes of it, below.
template <class Real>
TEXT3D_HD Real constant(float value) { return Real{} + value; }

// e^x to 1e-7 of its value; below -87 and above 88 it stays what it is there.
template <class Real>
TEXT3D_HD Real exp_of(Real x) {
  Real y = max_of(constant<Real>(-87.f), x);  // NaN passes
  y = min_of(constant<Real>(88.f), y);
  const Real shifted = y * 1.44269504f + 12582912.f;  // rounds to an integer, which the low bits then hold
  const Real whole = shifted - 12582912.f;
  const Real r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;  // |r| <= 0.35
  Real p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r;
  const Real scale = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  return scale + scale * p;
}

template <class Real>
TEXT3D_HD Real sigmoid_of(Real x) { return 1.f / (1.f + exp_of(-x)); }

template <class Real>
TEXT3D_HD Real activation_value(int32_t kind, Real z) {
  switch (kind) {
    case kRelu: return max_of(Real{}, z);
    case kSilu: return z * sigmoid_of(z);
    case kSoftplus: {  // log(1 + u) as 2 artanh(u / (2 + u)), u in (0, 1]
      const Real u = exp_of(min_of(z, -z)), s = u / (2.f + u), t = s * s;
      Real p = t * (1.f / 13) + 1.f / 11;
      p = p * t + 1.f / 9;
      p = p * t + 1.f / 7;
      p = p * t + 1.f / 5;
      p = p * t + 1.f / 3;
      p = p * t + 1.f;
      return max_of(Real{}, z) + 2.f * s * p;
    }
    case kSigmoid: return sigmoid_of(z);
    case kExp: return exp_of(z);
    case kTanh: return 1.f - 2.f / (1.f + exp_of(2.f * z));
    default: return z;
  }
}

template <class Real>
TEXT3D_HD Real activation_slope(int32_t kind, Real z) {
  switch (kind) {
    case kRelu: return select(z > Real{}, constant<Real>(1.f), Real{});
    case kSilu: {
      const Real s = sigmoid_of(z);
      return s * (1.f + z * (1.f - s));
    }
    case kSoftplus: return sigmoid_of(z);
    case kSigmoid: {
      const Real s = sigmoid_of(z);
      return s * (1.f - s);
    }
    case kExp: return exp_of(z);
    case kTanh: {
      const Real t = activation_value(kTanh, z);
      return 1.f - t * t;
    }
    default: return constant<Real>(1.f);
  }
}

template <class Real>
TEXT3D_HD Real activation_curvature(int32_t kind, Real z) {
  switch (kind) {
    case kSilu: {
      const Real s = sigmoid_of(z);
      return s * (1.f - s) * (2.f + z * (1.f - 2.f * s));
    }
    case kSoftplus: {
      const Real s = sigmoid_of(z);
      return s * (1.f - s);
    }
    case kSigmoid: {
      const Real s = sigmoid_of(z);
      return s * (1.f - s) * (1.f - 2.f * s);
    }
    case kExp: return exp_of(z);
    case kTanh: {
      const Real t = activation_value(kTanh, z);
      return -2.f * t * (1.f - t * t);
    }
    default: return Real{};
  }
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
