// Rays in parallel; along a ray, blocks of 16 samples: everything vectorized, the products of the
// transmittances as scans. The backward pass gathers the gradients of the weights on the way out and their suffix sums
// on the way back, so nothing cancels.
#include "composite/composite.h"
#include <stdexcept>
#include "common/memory.h"
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

// Scans over 16 lanes in four steps of a shuffle and an operation, instead of a chain of sixteen. Vectors stay inside the
// functions, because their calling convention differs between instruction sets.
using Lanes = float __attribute__((vector_size(sizeof(float) * kLanes)));
using LaneIndices = int __attribute__((vector_size(sizeof(int) * kLanes)));
#if defined(__clang__)
#define TEXT3D_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TEXT3D_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, LaneIndices{__VA_ARGS__})
#endif

// after[k] = start * x[0] * ... * x[k], before[k] = the same without x[k]
inline void scan_product(const float* x, float start, float* before, float* after) {
  Lanes v;
  std::memcpy(&v, x, sizeof v);
  const Lanes one = Lanes{} + 1.f;
  v *= TEXT3D_SHUFFLE(v, one, 16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14);
  v *= TEXT3D_SHUFFLE(v, one, 16, 17, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13);
  v *= TEXT3D_SHUFFLE(v, one, 16, 17, 18, 19, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11);
  v *= TEXT3D_SHUFFLE(v, one, 16, 17, 18, 19, 20, 21, 22, 23, 0, 1, 2, 3, 4, 5, 6, 7);
  const Lanes shifted = TEXT3D_SHUFFLE(v, one, 16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14) * start;
  v *= start;
  std::memcpy(before, &shifted, sizeof shifted);
  std::memcpy(after, &v, sizeof v);
}

// behind[k] = start + x[k + 1] + ... + x[15]; returns start + the sum of all
inline float scan_sum_from_behind(const float* x, float start, float* behind) {
  Lanes v;
  std::memcpy(&v, x, sizeof v);
  const Lanes zero = {};
  v += TEXT3D_SHUFFLE(v, zero, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
  v += TEXT3D_SHUFFLE(v, zero, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17);
  v += TEXT3D_SHUFFLE(v, zero, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19);
  v += TEXT3D_SHUFFLE(v, zero, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
  const Lanes shifted = TEXT3D_SHUFFLE(v, zero, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16) + start;
  std::memcpy(behind, &shifted, sizeof shifted);
  return start + v[0];
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
  float transmittance = 1.f, opacity = 0.f, first = 0.f, second = 0.f, least = 0.f;
  int64_t i = begin;
  for (; i < end && transmittance >= p.early_stop; i += kLanes) {
    const int64_t count = end - i;
    const int n = count < kLanes ? int(count) : kLanes;
    alignas(64) float sigma[kLanes], starts[kLanes], ends[kLanes], alpha[kLanes], pass[kLanes];
    alignas(64) float before[kLanes], after[kLanes], weight[kLanes];
    load(p.sigma + i, count, sigma), load(p.t_starts + i, count, starts), load(p.t_ends + i, count, ends);
    for (int k = 0; k < kLanes; ++k) alpha[k] = opacity_of(sigma[k] * (ends[k] - starts[k]));
    for (int k = 0; k < kLanes; ++k) pass[k] = 1.f - alpha[k];
    scan_product(pass, transmittance, before, after);
    transmittance = after[kLanes - 1];
    float block = 0.f, block_first = 0.f, block_second = 0.f;
#pragma omp simd reduction(+ : block, block_first, block_second) reduction(min : least)
    for (int k = 0; k < kLanes; ++k) {
      weight[k] = before[k] < p.early_stop ? 0.f : before[k] * alpha[k];
      const float middle = 0.5f * (starts[k] + ends[k]) - origin, moment = weight[k] * middle;
      block += weight[k], block_first += moment, block_second += moment * middle;
      least = weight[k] < least ? weight[k] : least;
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
  p.depth_variance[ray] = seen ? variance_of(second / opacity, mean, least) : 0.f;
}

// room: for twice the samples of the ray, rounded up to blocks: T_{i+1} g_i and w_i g_i
template <int kChannels>
void backward_ray(const CompositeBackwardParams& p, int64_t ray, float* room) {
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
    alignas(64) float sigma[kLanes], starts[kLanes], ends[kLanes], pass[kLanes], dot[kLanes] = {};
    alignas(64) float before[kLanes], next[kLanes], weight[kLanes];
    load(p.sigma + i, count, sigma), load(p.t_starts + i, count, starts), load(p.t_ends + i, count, ends);
    for (int k = 0; k < kLanes; ++k) pass[k] = 1.f - opacity_of(sigma[k] * (ends[k] - starts[k]));
    scan_product(pass, transmittance, before, next);
    transmittance = next[kLanes - 1];
    load(p.weights + i, count, weight);
    const float* values = p.values + i * channels;
    float* grad_values = p.grad_sample_values + i * channels;
    if (!grad_out) {
      std::memset(grad_values, 0, sizeof(float) * n * channels);
    } else if (kChannels) {
      for (int k = 0; k < n; ++k)
        for (int c = 0; c < kChannels; ++c) {
          dot[k] += values[k * kChannels + c] * cotangent[c];
          grad_values[k * kChannels + c] = weight[k] * cotangent[c];
        }
    } else {
      for (int k = 0; k < n; ++k)
        for (int c = 0; c < channels; ++c) {
          dot[k] += values[int64_t(k) * channels + c] * grad_out[c];
          grad_values[int64_t(k) * channels + c] = weight[k] * grad_out[c];
        }
    }
    if (p.grad_weights)
      for (int k = 0; k < n; ++k) dot[k] += p.grad_weights[i + k];
    float* block = room + 2 * (i - begin);
    for (int k = 0; k < kLanes; ++k) {
      const float own = dot[k] + g.of_weight(0.5f * (starts[k] + ends[k]));
      block[k] = before[k] < p.early_stop ? 0.f : next[k] * own;
      block[kLanes + k] = weight[k] == 0.f ? 0.f : weight[k] * own;
    }
  }
  if (i < end) {
    std::memset(p.grad_sigma + i, 0, sizeof(float) * (end - i));
    std::memset(p.grad_sample_values + i * channels, 0, sizeof(float) * (end - i) * channels);
    if (p.grad_t_starts) std::memset(p.grad_t_starts + i, 0, sizeof(float) * (end - i));
    if (p.grad_t_ends) std::memset(p.grad_t_ends + i, 0, sizeof(float) * (end - i));
  }
  float suffix = 0.f;
  for (i -= kLanes; i >= begin; i -= kLanes) {
    const int64_t count = end - i;
    const int n = count < kLanes ? int(count) : kLanes;
    const float* block = room + 2 * (i - begin);
    alignas(64) float sigma[kLanes], starts[kLanes], ends[kLanes], weight[kLanes], behind[kLanes], optical[kLanes];
    load(p.t_starts + i, count, starts), load(p.t_ends + i, count, ends);
    suffix = scan_sum_from_behind(block + kLanes, suffix, behind);
    // A sample beyond the stop is followed by nothing that has a weight, so its optical gradient is 0 - 0.
    for (int k = 0; k < kLanes; ++k) optical[k] = block[k] - behind[k];
    alignas(64) float out[kLanes];
    for (int k = 0; k < kLanes; ++k) out[k] = optical[k] * (ends[k] - starts[k]);
    std::memcpy(p.grad_sigma + i, out, sizeof(float) * n);
    if (!p.grad_t_starts) continue;
    load(p.sigma + i, count, sigma), load(p.weights + i, count, weight);
    for (int k = 0; k < n; ++k) {
      const float middle = 0.5f * g.of_middle(weight[k], 0.5f * (starts[k] + ends[k]));
      p.grad_t_starts[i + k] = middle - optical[k] * sigma[k];
      p.grad_t_ends[i + k] = middle + optical[k] * sigma[k];
    }
  }
}

using ForwardRay = void (*)(const CompositeForwardParams&, int64_t);
using BackwardRay = void (*)(const CompositeBackwardParams&, int64_t, float*);

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
    Array<float> room(size_t(2 * longest));
    for (int64_t ray = begin; ray < end; ++ray) run(p, ray, room);
  });
  const int64_t used = p.ray_offsets[p.rays];
  fill_zero(p.grad_sigma, used, p.samples);
  fill_zero(p.grad_sample_values, used * p.channels, p.samples * p.channels);
  fill_zero(p.grad_t_starts, used, p.samples);
  fill_zero(p.grad_t_ends, used, p.samples);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
