// A warp per ray, 32 samples at a time: the product of the transmittances is a warp scan, sums are kept per lane and
// reduced once at the end of the ray. The backward pass first finds the transmittance at which each 32 samples start
// (12 bytes a sample, which the second visit finds in the cache), then goes from far to near, so that its suffix sums do
// not cancel as total minus prefix would.
#include "composite/composite.h"
#include "common/launch.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

constexpr int kWarps = 4;  // warps, that is rays, a block
constexpr int kChunk = 8;  // channels at a time where their number is not known at compile time

__device__ __forceinline__ float warp_sum(float x) {
  TEXT3D_UNROLL
  for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
  return x;
}

__device__ __forceinline__ float scan_product(float x, int lane) {
  TEXT3D_UNROLL
  for (int by = 1; by < 32; by *= 2) {
    const float other = __shfl_up_sync(~0u, x, by);
    if (lane >= by) x *= other;
  }
  return x;
}

// The sum over this and all later lanes.
__device__ __forceinline__ float scan_sum_from_behind(float x, int lane) {
  TEXT3D_UNROLL
  for (int by = 1; by < 32; by *= 2) {
    const float other = __shfl_down_sync(~0u, x, by);
    if (lane + by < 32) x += other;
  }
  return x;
}

struct Range {
  int64_t begin, end;
};

// Wrong offsets must not send a kernel out of bounds.
__device__ __forceinline__ Range samples_of(const int32_t* offsets, int64_t ray, int64_t samples) {
  const int64_t begin = offsets[ray], end = offsets[ray + 1];
  return {begin < 0 ? 0 : begin, end < samples ? end : samples};
}

template <int kChannels>
__global__ void __launch_bounds__(kWarps * 32, 8) composite_forward_kernel(CompositeForwardParams p) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t ray = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (ray >= p.rays) return;
  const int channels = kChannels ? kChannels : p.channels;
  const auto [begin, end] = samples_of(p.ray_offsets, ray, p.samples);
  const float origin = begin < end ? 0.5f * (p.t_starts[begin] + p.t_ends[begin]) : 0.f;
  float carry = 1.f, opacity = 0.f, first = 0.f, second = 0.f, least = 0.f;
  float sums[kChannels ? kChannels : 1] = {};
  int64_t start = begin;
  for (; start < end && carry >= p.early_stop; start += 32) {
    const int64_t i = start + lane;
    const bool real = i < end;
    const float t_start = real ? p.t_starts[i] : 0.f, t_end = real ? p.t_ends[i] : 0.f;
    const float alpha = real ? opacity_of(p.sigma[i] * (t_end - t_start)) : 0.f;
    const float after = carry * scan_product(1.f - alpha, lane);
    const float previous = __shfl_up_sync(~0u, after, 1);
    const float before = lane == 0 ? carry : previous;
    carry = __shfl_sync(~0u, after, 31);
    const float weight = before < p.early_stop ? 0.f : before * alpha;
    const float middle = 0.5f * (t_start + t_end) - origin;
    if (real) {
      p.weights[i] = weight;
      opacity += weight;
      first += weight * middle;
      second += weight * middle * middle;
      least = min_of(least, weight);
      TEXT3D_UNROLL
      for (int c = 0; c < kChannels; ++c) sums[c] += weight * p.values[i * kChannels + c];
    }
  }
  for (int64_t i = start + lane; i < end; i += 32) p.weights[i] = 0.f;
  opacity = warp_sum(opacity), first = warp_sum(first), second = warp_sum(second);
  least = __any_sync(~0u, least < 0.f) ? -1.f : 0.f;
  if (kChannels) {
    TEXT3D_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const float sum = warp_sum(sums[c]);
      if (lane == 0) p.out_values[ray * channels + c] = sum;
    }
  } else {
    const int64_t live = start < end ? start : end;
    for (int from = 0; from < channels; from += kChunk) {
      float chunk[kChunk] = {};
      for (int64_t i = begin + lane; i < live; i += 32) {
        const float weight = p.weights[i];  // this lane wrote it
        TEXT3D_UNROLL
        for (int c = 0; c < kChunk; ++c)
          if (from + c < channels) chunk[c] += weight * p.values[i * channels + from + c];
      }
      TEXT3D_UNROLL
      for (int c = 0; c < kChunk; ++c) {
        const float sum = warp_sum(chunk[c]);
        if (lane == 0 && from + c < channels) p.out_values[ray * channels + from + c] = sum;
      }
    }
  }
  if (lane == 0) {
    const bool seen = opacity > kMinimumOpacity;
    const float mean = seen ? first / opacity : 0.f;
    p.opacity[ray] = opacity;
    p.depth[ray] = seen ? origin + mean : 0.f;
    p.depth_variance[ray] = seen ? variance_of(second / opacity, mean, least) : 0.f;
  }
}

template <int kChannels>
__global__ void __launch_bounds__(kWarps * 32, 8) composite_backward_kernel(CompositeBackwardParams p) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t ray = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (ray >= p.rays) return;
  const int channels = kChannels ? kChannels : p.channels;
  const auto [begin, end] = samples_of(p.ray_offsets, ray, p.samples);
  const CompositeRayGradient g = ray_gradient(p, ray);
  const float* grad_out = p.grad_values ? p.grad_values + ray * channels : nullptr;
  float cotangent[kChannels ? kChannels : 1] = {};
  if (grad_out) {
    TEXT3D_UNROLL
    for (int c = 0; c < kChannels; ++c) cotangent[c] = grad_out[c];
  }

  float carry = 1.f;
  int64_t start = begin;
  for (; start < end && carry >= p.early_stop; start += 32) {
    const int64_t i = start + lane;
    if (lane == 0) p.grad_sigma[start] = carry;  // kept there until the gradient overwrites it
    const float alpha = i < end ? opacity_of(p.sigma[i] * (p.t_ends[i] - p.t_starts[i])) : 0.f;
    carry = __shfl_sync(~0u, carry * scan_product(1.f - alpha, lane), 31);
  }
  for (int64_t i = start + lane; i < end; i += 32) {
    p.grad_sigma[i] = 0.f;
    if (p.grad_t_starts) p.grad_t_starts[i] = 0.f, p.grad_t_ends[i] = 0.f;
    for (int c = 0; c < channels; ++c) p.grad_sample_values[i * channels + c] = 0.f;
  }

  float suffix = 0.f;
  for (start -= 32; start >= begin; start -= 32) {
    const int64_t i = start + lane;
    const bool real = i < end;
    carry = __shfl_sync(~0u, lane == 0 ? p.grad_sigma[start] : 0.f, 0);
    const float t_start = real ? p.t_starts[i] : 0.f, t_end = real ? p.t_ends[i] : 0.f;
    const float sigma = real ? p.sigma[i] : 0.f, weight = real ? p.weights[i] : 0.f;
    const float delta = t_end - t_start, middle = 0.5f * (t_start + t_end);
    const float after = carry * scan_product(1.f - opacity_of(sigma * delta), lane);
    const float previous = __shfl_up_sync(~0u, after, 1);
    const bool stopped = (lane == 0 ? carry : previous) < p.early_stop;
    float gradient = g.of_weight(middle);
    if (real) {
      if (p.grad_weights) gradient += p.grad_weights[i];
      if (kChannels) {
        TEXT3D_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          gradient += cotangent[c] * p.values[i * kChannels + c];
          p.grad_sample_values[i * kChannels + c] = weight * cotangent[c];
        }
      } else {
        for (int c = 0; c < channels; ++c) {
          const float one = grad_out ? grad_out[c] : 0.f;
          gradient += one * p.values[i * channels + c];
          p.grad_sample_values[i * channels + c] = weight * one;
        }
      }
    }
    const float from_here = scan_sum_from_behind(weight == 0.f ? 0.f : weight * gradient, lane);
    const float behind = __shfl_down_sync(~0u, from_here, 1);
    const float optical = stopped ? 0.f : after * gradient - (suffix + (lane == 31 ? 0.f : behind));
    suffix += __shfl_sync(~0u, from_here, 0);
    if (real) {
      p.grad_sigma[i] = optical * delta;
      if (p.grad_t_starts) {
        const float moved = 0.5f * g.of_middle(weight, middle);
        p.grad_t_starts[i] = moved - optical * sigma;
        p.grad_t_ends[i] = moved + optical * sigma;
      }
    }
  }
}

// Padding of capacity mode: beyond the last offset, which only the device knows.
struct ZeroWeights {
  CompositeForwardParams p;
  TEXT3D_HD void operator()(int64_t i) const {
    if (i >= p.ray_offsets[p.rays]) p.weights[i] = 0.f;
  }
};

struct ZeroGradients {
  CompositeBackwardParams p;
  TEXT3D_HD void operator()(int64_t i) const {
    if (i < p.ray_offsets[p.rays]) return;
    p.grad_sigma[i] = 0.f;
    if (p.grad_t_starts) p.grad_t_starts[i] = 0.f, p.grad_t_ends[i] = 0.f;
    for (int c = 0; c < p.channels; ++c) p.grad_sample_values[i * p.channels + c] = 0.f;
  }
};

}  // namespace

void composite_forward(const CompositeForwardParams& p, cudaStream_t stream) {
  launch(p.samples, ZeroWeights{p}, stream);
  const unsigned blocks = unsigned((p.rays + kWarps - 1) / kWarps);
  if (blocks == 0) return;
  switch (p.channels) {
    case 3: TEXT3D_LAUNCH(composite_forward_kernel<3>, blocks, kWarps * 32, 0, stream, p); break;
    case 4: TEXT3D_LAUNCH(composite_forward_kernel<4>, blocks, kWarps * 32, 0, stream, p); break;
    case 7: TEXT3D_LAUNCH(composite_forward_kernel<7>, blocks, kWarps * 32, 0, stream, p); break;
    default: TEXT3D_LAUNCH(composite_forward_kernel<0>, blocks, kWarps * 32, 0, stream, p);
  }
}

void composite_backward(const CompositeBackwardParams& p, cudaStream_t stream) {
  launch(p.samples, ZeroGradients{p}, stream);
  const unsigned blocks = unsigned((p.rays + kWarps - 1) / kWarps);
  if (blocks == 0) return;
  switch (p.channels) {
    case 3: TEXT3D_LAUNCH(composite_backward_kernel<3>, blocks, kWarps * 32, 0, stream, p); break;
    case 4: TEXT3D_LAUNCH(composite_backward_kernel<4>, blocks, kWarps * 32, 0, stream, p); break;
    case 7: TEXT3D_LAUNCH(composite_backward_kernel<7>, blocks, kWarps * 32, 0, stream, p); break;
    default: TEXT3D_LAUNCH(composite_backward_kernel<0>, blocks, kWarps * 32, 0, stream, p);
  }
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
