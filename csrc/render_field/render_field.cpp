// Rounds of samples. A window of rays is open; each contributes the next block of its samples to a round, and is closed
// when it has no more or when its transmittance is below the stop, so that what lies behind is never looked at. Within a
// round the hash grid and the network run over all samples with their own loops, then shading and compositing ray by ray.
#include <stdexcept>
#include <vector>
#include "common/memory.h"
#include "common/parallel.h"
#include "render_field/render_field.h"

namespace text3d {
namespace TEXT3D_ISA {

// of the other files of this instruction set
void hash_grid_forward(const HashGridForwardParams&);
void hash_grid_backward(const HashGridBackwardParams&);
void hash_grid_second(const HashGridSecondParams&);
void mlp_forward(const MLPForwardParams&);
void mlp_backward(const MLPBackwardParams&);
void mlp_second(const MLPSecondParams&);

namespace {

constexpr int64_t kRound = 32768;               // samples
constexpr int64_t kWindow = 1024;               // rays
constexpr int64_t kBlock = kRound / kWindow;    // samples of a ray in a round, while the window is full
constexpr int64_t kLongBlock = 256;             // and when few rays are left

// A ray in the window.
struct OpenRay {
  int64_t ray = -1, next = 0, end = 0;  // its samples that are still to come
  int64_t first = 0, count = 0;         // its samples in this round
  float transmittance = 1.f;
  // forward
  float origin = 0.f, opacity = 0.f, moment = 0.f, second_moment = 0.f, orientation = 0.f, values[6] = {};
  // backward
  float prefix = 0.f;
  RayCotangents cotangents;
};

void check_offsets(const RenderFieldInputs& in) {
  bool fine = in.ray_offsets[0] == 0 && in.ray_offsets[in.rays] <= in.samples;
  for (int64_t r = 0; r < in.rays; ++r) fine &= in.ray_offsets[r] <= in.ray_offsets[r + 1];
  if (!fine) throw std::invalid_argument("samples.ray_offsets: expected to rise from 0 to at most the number of samples");
}

// The samples of a round and what is computed for them, one row each.
struct Round {
  Array<float> x, position, features, by_feature, gradient, out, grad_out, grad_gradient, tangent, grad_features, unit;
  int64_t count = 0;

  Round(const RenderFieldInputs& in, bool backward) {
    const int64_t most = in.samples < kRound ? in.samples : kRound;
    const size_t size = size_t(most < 1 ? 1 : most), encoded = size * in.layout.mlp.inputs;
    x.resize(size * 3), position.resize(size * 3), features.resize(encoded), out.resize(size * 4);
    if (in.normals) {
      by_feature.resize(encoded), gradient.resize(size * 3), unit.resize(size * 4);
      for (size_t i = 0; i < size; ++i)
        for (int c = 0; c < 4; ++c) unit[4 * i + c] = c == 0 ? 1.f : 0.f;
    }
    if (!backward) return;
    grad_out.resize(size * 4), grad_features.resize(encoded);
    if (in.normals) grad_gradient.resize(size * 3), tangent.resize(encoded);
  }
};

// The field at the samples of the round: the network's outputs and, for normals, d raw / dx.
void evaluate(const RenderFieldInputs& in, const OpenRay* rays, int64_t open, Round& round) {
  const FieldLayout& l = in.layout;
  parallel_for(open, 32, [&](int64_t begin, int64_t end) {
    for (const OpenRay* r = rays + begin; r < rays + end; ++r)
      for (int64_t k = 0; k < r->count; ++k) {
        const float middle = 0.5f * (in.t_starts[r->next + k] + in.t_ends[r->next + k]);
        for (int d = 0; d < 3; ++d) {
          const float at = in.origins[3 * r->ray + d] + middle * in.directions[3 * r->ray + d];
          round.position[3 * (r->first + k) + d] = at;
          round.x[3 * (r->first + k) + d] = field_coordinate(l, at);
        }
      }
  });
  HashGridForwardParams encode = {};
  encode.x = round.x, encode.table = in.table, encode.y = round.features, encode.points = round.count;
  encode.layout = l.grid;
  hash_grid_forward(encode);
  MLPForwardParams network = {};
  network.x = round.features, network.weights = in.weights, network.y = round.out, network.points = round.count;
  network.layout = l.mlp;
  mlp_forward(network);
  if (!in.normals) return;
  MLPBackwardParams slopes = {};
  slopes.grad_y = round.unit, slopes.x = round.features, slopes.weights = in.weights;
  slopes.grad_x = round.by_feature, slopes.points = round.count, slopes.layout = l.mlp;
  mlp_backward(slopes);
  HashGridBackwardParams chain = {};
  chain.x = round.x, chain.table = in.table, chain.grad_y = round.by_feature, chain.grad_x = round.gradient;
  chain.points = round.count, chain.layout = l.grid;
  hash_grid_backward(chain);
}

// What the samples of a ray add: body(k, position, albedo, d raw / dx, opacity, slope of the density), in order. The
// functions of the network's outputs come first, in loops that the compiler vectorizes.
template <class Body>
void walk(const RenderFieldInputs& in, const OpenRay& r, const Round& round, const Body& body) {
  const FieldLayout& l = in.layout;
  const float* starts = in.t_starts + r.next;
  const float* ends = in.t_ends + r.next;
  const float* out = round.out + 4 * r.first;
  const float* x = round.position + 3 * r.first;
  float raw[kLongBlock], alpha[kLongBlock], slope[kLongBlock], albedo[3 * kLongBlock];
  const int64_t count = r.count;
  for (int64_t k = 0; k < count; ++k) raw[k] = out[4 * k] + field_blob(l, x + 3 * k);
  if (l.exponential) {
    for (int64_t k = 0; k < count; ++k) alpha[k] = density_of<true>(l, raw[k]);
    for (int64_t k = 0; k < count; ++k) slope[k] = density_slope<true>(l, raw[k], alpha[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) alpha[k] = density_of<false>(l, raw[k]);
    for (int64_t k = 0; k < count; ++k) slope[k] = density_slope<false>(l, raw[k], alpha[k]);
  }
  for (int64_t k = 0; k < count; ++k) alpha[k] = opacity_of(alpha[k] * (ends[k] - starts[k]));
  for (int64_t k = 0; k < count; ++k)
    for (int c = 0; c < 3; ++c) albedo[3 * k + c] = out[4 * k + 1 + c];
  for (int64_t k = 0; k < 3 * count; ++k) albedo[k] = sigmoid_of(albedo[k]);
  for (int64_t k = 0; k < count; ++k) {
    float gradient[3] = {};
    if (in.normals) world_gradient(l, x + 3 * k, round.gradient + 3 * (r.first + k), gradient);
    body(k, x + 3 * k, albedo + 3 * k, gradient, alpha[k], slope[k]);
  }
}

// Opens rays, makes rounds of their samples and closes them: open(ray) fills an OpenRay, composite(ray) reads a block of
// it, each(round) follows when all have, close(ray) is called at its end, also for rays without samples.
template <class Open, class Composite, class Each, class Close>
void for_rounds(const RenderFieldInputs& in, Round& round, const Open& open, const Composite& composite,
                const Each& each, const Close& close) {
  const int64_t window = in.rays < kWindow ? in.rays : kWindow;
  std::vector<OpenRay> rays(size_t(window > 0 ? window : 0));
  int64_t next = 0;
  while (true) {
    int64_t used = 0;
    for (OpenRay& r : rays)
      if (r.ray >= 0) rays[used++] = r;
    for (; used < window && next < in.rays; ++next) {
      OpenRay r;
      r.ray = next, r.next = in.ray_offsets[next], r.end = in.ray_offsets[next + 1];
      open(r);
      if (r.next < r.end) rays[used++] = r;
      else close(r);
    }
    if (used == 0) return;
    int64_t block = kRound / used;
    block = block > kLongBlock ? kLongBlock : block < kBlock ? kBlock : block;
    round.count = 0;
    for (int64_t k = 0; k < used; ++k) {
      OpenRay& r = rays[k];
      r.first = round.count, r.count = r.end - r.next < block ? r.end - r.next : block;
      round.count += r.count;
    }
    evaluate(in, rays.data(), used, round);
    parallel_for(used, 16, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) composite(rays[k]);
    });
    each();
    for (int64_t k = 0; k < window; ++k) {
      OpenRay& r = rays[k];
      if (k >= used) {
        r.ray = -1;
        continue;
      }
      r.next += r.count;
      if (r.next < r.end && r.transmittance >= in.early_stop) continue;
      close(r);
      r.ray = -1;
    }
  }
}

}  // namespace

void render_field_forward(const RenderFieldForwardParams& p) {
  const RenderFieldInputs& in = p.in;
  check_offsets(in);
  const int channels = in.normals ? 6 : 3;
  Round round(in, false);
  const auto open = [&](OpenRay& r) {
    if (r.next < r.end) r.origin = 0.5f * (in.t_starts[r.next] + in.t_ends[r.next]);
  };
  const auto composite = [&](OpenRay& r) {
    walk(in, r, round, [&](int64_t k, const float* x, const float* albedo, const float* gradient, float alpha, float) {
      const float weight = r.transmittance < in.early_stop ? 0.f : r.transmittance * alpha;
      r.transmittance *= 1.f - alpha;
      if (weight == 0.f) return;
      const float middle = 0.5f * (in.t_starts[r.next + k] + in.t_ends[r.next + k]) - r.origin;
      const FieldShading shading(in, r.ray, x, albedo, gradient);
      r.opacity += weight, r.moment += weight * middle, r.second_moment += weight * middle * middle;
      for (int c = 0; c < 3; ++c) r.values[c] += weight * shading.color[c];
      if (!in.normals) return;
      for (int d = 0; d < 3; ++d) r.values[3 + d] += weight * shading.normal[d];
      r.orientation += weight * shading.facing * shading.facing;
    });
  };
  const auto close = [&](const OpenRay& r) {
    const bool seen = r.opacity > kMinimumOpacity;
    const float mean = seen ? r.moment / r.opacity : 0.f;
    for (int c = 0; c < channels; ++c) p.values[r.ray * channels + c] = r.values[c];
    p.opacity[r.ray] = r.opacity;
    p.depth[r.ray] = seen ? r.origin + mean : 0.f;
    p.depth_variance[r.ray] = seen ? max_of(r.second_moment / r.opacity - mean * mean, 0.f) : 0.f;
    if (p.orientation) p.orientation[r.ray] = r.orientation;
  };
  for_rounds(in, round, open, composite, [] {}, close);
}

void render_field_backward(const RenderFieldBackwardParams& p) {
  const RenderFieldInputs& in = p.in;
  const FieldLayout& l = in.layout;
  check_offsets(in);
  const int64_t weights = mlp_params(l.mlp);
  std::memset(p.grad_params, 0, size_t(l.grid.offsets[l.grid.levels]) * l.grid.features * sizeof(float));
  std::memset(p.grad_weights, 0, size_t(weights) * sizeof(float));
  Round round(in, true);
  Array<float> part{size_t(weights)};
  const auto open = [&](OpenRay& r) { r.cotangents = RayCotangents(p, r.ray); };
  const auto composite = [&](OpenRay& r) {
    walk(in, r, round, [&](int64_t k, const float* x, const float* albedo, const float* gradient, float alpha,
                           float slope) {
      const int64_t i = r.first + k;
      float* grad_out = round.grad_out + 4 * i;
      float* grad_gradient = in.normals ? round.grad_gradient + 3 * i : nullptr;
      const float start = in.t_starts[r.next + k], end = in.t_ends[r.next + k];
      const bool beyond = r.transmittance < in.early_stop;
      const float weight = r.transmittance * alpha;
      r.transmittance *= 1.f - alpha;
      for (int c = 0; c < 4; ++c) grad_out[c] = 0.f;
      for (int d = 0; grad_gradient && d < 3; ++d) grad_gradient[d] = 0.f;
      if (beyond) return;
      const FieldShading shading(in, r.ray, x, albedo, gradient);
      float grad_color[3], grad_normal[3] = {};
      const float own = r.cotangents.of_sample(in, r.ray, shading, 0.5f * (start + end), weight, grad_color, grad_normal);
      r.prefix += weight * own;
      // A sample that ends the ray has nothing behind it.
      const float behind = r.next + k + 1 == r.end || r.transmittance < in.early_stop ? 0.f : r.cotangents.total - r.prefix;
      grad_out[0] = (r.transmittance * own - behind) * (end - start) * slope;
      shading.backward(in, r.ray, grad_color, grad_normal, grad_out, grad_gradient);
      // of the coordinates in [0, 1]
      for (int d = 0; grad_gradient && d < 3; ++d) grad_gradient[d] /= 2.f * l.radius;
    });
  };
  const auto each = [&] {
    if (in.normals) {
      HashGridSecondParams second = {};
      second.x = round.x, second.table = in.table, second.grad_y = round.by_feature;
      second.cotangent_x = round.grad_gradient, second.grad_grad_y = round.tangent, second.grad_params = p.grad_params;
      second.points = round.count, second.layout = l.grid, second.accumulate = true;
      hash_grid_second(second);
      MLPSecondParams network = {};
      network.cotangent_x = round.tangent, network.grad_y = round.unit, network.cotangent_y = round.grad_out;
      network.x = round.features, network.weights = in.weights, network.grad_x = round.grad_features;
      network.grad_weights = part, network.points = round.count, network.layout = l.mlp;
      mlp_second(network);
    } else {
      MLPBackwardParams network = {};
      network.grad_y = round.grad_out, network.x = round.features, network.weights = in.weights;
      network.grad_x = round.grad_features, network.grad_weights = part, network.points = round.count;
      network.layout = l.mlp;
      mlp_backward(network);
    }
    for (int64_t i = 0; i < weights; ++i) p.grad_weights[i] += part[i];
    HashGridBackwardParams scatter = {};
    scatter.x = round.x, scatter.table = in.table, scatter.grad_y = round.grad_features;
    scatter.grad_params = p.grad_params, scatter.points = round.count, scatter.layout = l.grid;
    scatter.accumulate = true;
    hash_grid_backward(scatter);
  };
  for_rounds(in, round, open, composite, each, [](const OpenRay&) {});
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
