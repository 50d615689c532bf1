// Rays in parallel; along a ray, blocks of 16 samples: exponentials and moments vectorized, only the product of the
// transmittances is a chain. The backward pass gathers the gradients of the weights on the way out and their suffix sums
// on the way back, so nothing cancels.
#include "composite/composite.h"
#include <stdexcept>
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

constexpr int64_t kRaysPerTask = 32;
constexpr int kLanes = 16;

void check_offsets(const int32_t* offsets, int64_t rays, int64_t samples) {
  bool fine = offsets[0] == 0 && offsets[rays] <= samples;
  for (int64_t r = 0; r < rays; ++r) fine &= offsets[r] <= offsets[r + 1];
  if (!fine) throw std::invalid_argument("samples.ray_offsets: expected to rise from 0 to at most the number of samples");
}

void fill_zero(float* target, int64_t begin, int64_t end) {
  if (!target) return;
  parallel_for(end - begin, 1 << 16, [&](int64_t a, int64_t b) { std::memset(target + begin + a, 0, sizeof(float) * (b - a)); });
}

// Read up to 16 samples; the rest of the lanes is empty intervals.
inline void load(const float* source, int64_t count, float* lanes) {
  if (count >= kLanes) {
    std::memcpy(lanes, source, sizeof(float) * kLanes);
  } else {
    for (int k = 0; k < kLanes; ++k) lanes[k] = k < count ? source[k] : 0.f;
  }
}

template <int kChannels>
void forward_ray(const CompositeForwardParams& p, int64_t ray) {
  const int channels = kChannels ? kChannels : p.channels;
  const int64_t begin = p.ray_offsets[ray], end = p.ray_offsets[ray + 1];
  float* out = p.out_values + ray * channels;
  float sums[kChannels ? kChannels : 1] = {};
  if (!kChannels) std::memset(out, 0, sizeof(float) * channels);
  // Moments about the first middle: the variance is a small difference of large numbers otherwise.
  const float origin = begin < end ? 0.5f * (p.t_starts[begin] + p.t_ends[begin]) : 0.f;
  float transmittance = 1.f, opacity = 0.f, first = 0.f, second = 0.f;
  int64_t i = begin;
  for (; i < end && transmittance >= p.early_stop; i += kLanes) {
    const int64_t count = end - i;
    const int n = count < kLanes ? int(count) : kLanes;
    alignas(64) float sigma[kLanes], starts[kLanes], ends[kLanes], alpha[kLanes], before[kLanes], weight[kLanes];
    load(p.sigma + i, count, sigma), load(p.t_starts + i, count, starts), load(p.t_ends + i, count, ends);
    for (int k = 0; k < kLanes; ++k) alpha[k] = opacity_of(sigma[k] * (ends[k] - starts[k]));
    for (int k = 0; k < kLanes; ++k) {
      before[k] = transmittance;
      transmittance *= 1.f - alpha[k];
    }
    float block = 0.f, block_first = 0.f, block_second = 0.f;
#pragma omp simd reduction(+ : block, block_first, block_second)
    for (int k = 0; k < kLanes; ++k) {
      weight[k] = before[k] < p.early_stop ? 0.f : before[k] * alpha[k];
      const float middle = 0.5f * (starts[k] + ends[k]) - origin, moment = weight[k] * middle;
      block += weight[k], block_first += moment, block_second += moment * middle;
    }
    opacity += block, first += block_first, second += block_second;
    std::memcpy(p.weights + i, weight, sizeof(float) * n);
    const float* values = p.values + i * channels;
    if (kChannels) {
      for (int k = 0; k < n; ++k)
        for (int c = 0; c < kChannels; ++c) sums[c] += weight[k] * values[k * kChannels + c];
    } else {
      for (int k = 0; k < n; ++k)
        for (int c = 0; c < channels; ++c) out[c] += weight[k] * values[int64_t(k) * channels + c];
    }
  }
  if (i < end) std::memset(p.weights + i, 0, sizeof(float) * (end - i));
  for (int c = 0; c < kChannels; ++c) out[c] = sums[c];
  const bool seen = opacity > kMinimumOpacity;
  const float mean = seen ? first / opacity : 0.f;
  p.opacity[ray] = opacity;
  p.depth[ray] = seen ? origin + mean : 0.f;
  p.depth_variance[ray] = seen ? max_of(second / opacity - mean * mean, 0.f) : 0.f;
}

// after, gradient: room for the samples of the ray
template <int kChannels>
void backward_ray(const CompositeBackwardParams& p, int64_t ray, float* after, float* gradient) {
  const int channels = kChannels ? kChannels : p.channels;
  const int64_t begin = p.ray_offsets[ray], end = p.ray_offsets[ray + 1];
  const CompositeRayGradient g = ray_gradient(p, ray);
  const float* grad_out = p.grad_values ? p.grad_values + ray * channels : nullptr;
  float cotangent[kChannels ? kChannels : 1] = {};
  for (int c = 0; c < kChannels; ++c) cotangent[c] = grad_out ? grad_out[c] : 0.f;
  float transmittance = 1.f;
  int64_t i = begin;
  for (; i < end && transmittance >= p.early_stop; i += kLanes) {
    const int64_t count = end - i;
    const int n = count < kLanes ? int(count) : kLanes;
    alignas(64) float sigma[kLanes], starts[kLanes], ends[kLanes], pass[kLanes], next[kLanes], dot[kLanes] = {};
    load(p.sigma + i, count, sigma), load(p.t_starts + i, count, starts), load(p.t_ends + i, count, ends);
    for (int k = 0; k < kLanes; ++k) pass[k] = 1.f - opacity_of(sigma[k] * (ends[k] - starts[k]));
    // The transmittance after a sample; 0 stands for a sample beyond the stop, whose gradient is 0.
    for (int k = 0; k < kLanes; ++k) {
      const bool stopped = transmittance < p.early_stop;
      transmittance *= pass[k];
      next[k] = stopped ? 0.f : transmittance;
    }
    const float* values = p.values + i * channels;
    const float* weights = p.weights + i;
    float* grad_values = p.grad_sample_values + i * channels;
    if (!grad_out) {
      std::memset(grad_values, 0, sizeof(float) * n * channels);
    } else if (kChannels) {
      for (int k = 0; k < n; ++k)
        for (int c = 0; c < kChannels; ++c) {
          dot[k] += values[k * kChannels + c] * cotangent[c];
          grad_values[k * kChannels + c] = weights[k] * cotangent[c];
        }
    } else {
      for (int k = 0; k < n; ++k)
        for (int c = 0; c < channels; ++c) {
          dot[k] += values[int64_t(k) * channels + c] * grad_out[c];
          grad_values[int64_t(k) * channels + c] = weights[k] * grad_out[c];
        }
    }
    if (p.grad_weights)
      for (int k = 0; k < n; ++k) dot[k] += p.grad_weights[i + k];
    float* after_block = after + (i - begin);
    float* gradient_block = gradient + (i - begin);
    for (int k = 0; k < kLanes; ++k) {
      after_block[k] = next[k];
      gradient_block[k] = dot[k] + g.of_weight(0.5f * (starts[k] + ends[k]));
    }
  }
  if (i < end) {
    std::memset(p.grad_sigma + i, 0, sizeof(float) * (end - i));
    std::memset(p.grad_sample_values + i * channels, 0, sizeof(float) * (end - i) * channels);
    if (p.grad_t_starts) std::memset(p.grad_t_starts + i, 0, sizeof(float) * (end - i));
    if (p.grad_t_ends) std::memset(p.grad_t_ends + i, 0, sizeof(float) * (end - i));
  }
  const int64_t seen = (i < end ? i : end) - begin;
  float suffix = 0.f;
  for (int64_t k = seen - 1; k >= 0; --k) {
    const float own = gradient[k];
    gradient[k] = after[k] * own - suffix;  // now dL / d(sigma delta)
    suffix += p.weights[begin + k] * own;
  }
  const float* starts = p.t_starts + begin;
  const float* ends = p.t_ends + begin;
  for (int64_t k = 0; k < seen; ++k) p.grad_sigma[begin + k] = gradient[k] * (ends[k] - starts[k]);
  if (!p.grad_t_starts) return;
  for (int64_t k = 0; k < seen; ++k) {
    const float middle = 0.5f * g.of_middle(p.weights[begin + k], 0.5f * (starts[k] + ends[k]));
    const float optical = gradient[k] * p.sigma[begin + k];
    p.grad_t_starts[begin + k] = middle - optical;
    p.grad_t_ends[begin + k] = middle + optical;
  }
}

using ForwardRay = void (*)(const CompositeForwardParams&, int64_t);
using BackwardRay = void (*)(const CompositeBackwardParams&, int64_t, float*, float*);

ForwardRay pick_forward(int channels) {
  switch (channels) {
    case 1: return forward_ray<1>;
    case 3: return forward_ray<3>;
    case 4: return forward_ray<4>;
    case 6: return forward_ray<6>;
    case 7: return forward_ray<7>;
    default: return forward_ray<0>;
  }
}

BackwardRay pick_backward(int channels) {
  switch (channels) {
    case 1: return backward_ray<1>;
    case 3: return backward_ray<3>;
    case 4: return backward_ray<4>;
    case 6: return backward_ray<6>;
    case 7: return backward_ray<7>;
    default: return backward_ray<0>;
  }
}

}  // namespace

void composite_forward(const CompositeForwardParams& p) {
  check_offsets(p.ray_offsets, p.rays, p.samples);
  const ForwardRay run = pick_forward(p.channels);
  parallel_for(p.rays, kRaysPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t ray = begin; ray < end; ++ray) run(p, ray);
  });
  fill_zero(p.weights, p.ray_offsets[p.rays], p.samples);  // padding of capacity mode belongs to no ray
}

void composite_backward(const CompositeBackwardParams& p) {
  check_offsets(p.ray_offsets, p.rays, p.samples);
  const BackwardRay run = pick_backward(p.channels);
  parallel_for(p.rays, kRaysPerTask, [&](int64_t begin, int64_t end) {
    int64_t longest = 0;
    for (int64_t ray = begin; ray < end; ++ray) {
      const int64_t length = p.ray_offsets[ray + 1] - p.ray_offsets[ray];
      longest = length > longest ? length : longest;
    }
    longest += kLanes;
    float* room = new float[2 * longest];
    for (int64_t ray = begin; ray < end; ++ray) run(p, ray, room, room + longest);
    delete[] room;
  });
  const int64_t used = p.ray_offsets[p.rays];
  fill_zero(p.grad_sigma, used, p.samples);
  fill_zero(p.grad_sample_values, used * p.channels, p.samples * p.channels);
  fill_zero(p.grad_t_starts, used, p.samples);
  fill_zero(p.grad_t_ends, used, p.samples);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
