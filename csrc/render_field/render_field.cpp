// Groups of rays. Each group walks its rays in tiles of samples: a window of rays is open, each adds its next few samples
// to a tile and is closed when it has no more or when its transmittance is below the stop, so that little of what lies
// behind is ever looked at. A tile goes through grid, network, shading and compositing in the caches of one core, samples
// in lanes. The backward pass computes it again and leaves the cotangents of what was encoded in the group's segment;
// when segments are full, threads take levels of the grid's table and add the segments of all groups, in order. Rays are
// dealt out to groups without regard to threads, so results do not depend on their number.
#include <atomic>
#include <memory>
#include <stdexcept>
#include <vector>
#include "hash_grid/tile.h"
#include "render_field/render_field.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

constexpr int kWindow = 64;            // rays that are open in a group, and that are dealt out at a time
constexpr int kSamples = 256;          // samples of a tile
constexpr int kLongest = 32;           // of which one ray adds at most so many
constexpr int kSegment = 1024;         // samples of a group between two scatters
constexpr int64_t kGroups = 32;

int64_t groups_of(const RenderFieldInputs& in) {
  const int64_t chunks = (in.rays + kWindow - 1) / kWindow;
  return chunks < kGroups ? chunks : kGroups;
}

void check_offsets(const RenderFieldInputs& in) {
  bool fine = in.ray_offsets[0] == 0 && in.ray_offsets[in.rays] <= in.samples;
  for (int64_t r = 0; r < in.rays; ++r) fine &= in.ray_offsets[r] <= in.ray_offsets[r + 1];
  if (!fine) throw std::invalid_argument("samples.ray_offsets: expected to rise from 0 to at most the number of samples");
}

// A ray in the window.
struct OpenRay {
  int64_t ray = -1, next = 0, end = 0;  // its samples that are still to come
  float transmittance = 1.f;
  // forward
  float origin = 0.f, opacity = 0.f, moment = 0.f, second_moment = 0.f, orientation = 0.f, values[6] = {};
  // backward
  float prefix = 0.f;
  RayCotangents cotangents;
};

// A number for each sample of a tile; a ray's first ones are written in whole lanes.
using Column = float[kSamples + kLongest];

// The samples of a tile before the network, and its samples after it, kTile at a time.
struct Tile {
  alignas(64) float x[3][kSamples], position[3][kSamples];  // in the unit cube and in the world
  Column start, end, from[6];                               // of each sample; origin and direction of its ray
  int owner[kSamples];                                      // in the window
  bool last[kSamples];                                      // of its ray
  int count = 0;
  // of kTile samples
  alignas(64) float raw[kTile], alpha[kTile], slope[kTile], albedo[3][kTile], gradient[3][kTile];
  alignas(64) float grad_gradient[3][kTile];
};

// What the backward pass leaves for the table, see ScatterPoints.
struct Segment {
  Array<float> x, along, g, q, used;
  int count = 0;
  void resize(int features, bool normals) {
    x.resize(3 * kSegment), g.resize(size_t(features) * kSegment), used.resize(kSegment);
    if (normals) along.resize(3 * kSegment), q.resize(size_t(features) * kSegment);
  }
};

class Group {
 public:
  Tile tile;
  MLPTile network;
  Segment segment;

  Group(const RenderFieldInputs& in, int64_t index, bool backward)
      : network(in.layout.mlp, in.weights, backward || in.normals, backward && in.normals), in_(in), next_(index * kWindow),
        features_(size_t(in.layout.mlp.inputs) * kSamples) {
    std::memset(features_, 0, sizeof(float) * in.layout.mlp.inputs * kSamples);
    if (in.normals) jacobian_.resize(size_t(in.layout.mlp.inputs) * 3 * kSamples);
    if (backward) segment.resize(in.layout.mlp.inputs, in.normals);
  }

  // Tiles, until there are no more rays or, if there are segments, the segment has no room for another: open(ray) fills an
  // OpenRay, each(first, count, rays) takes kTile samples of the tile, close(ray) is called at the end of a ray, also of
  // one without samples. Returns false if a sample's position is not finite.
  template <class Open, class Each, class Close>
  bool run(const Open& open, const Each& each, const Close& close) {
    segment.count = 0;
    while (segment.count + kSamples <= kSegment) {
      for (; used_ < kWindow && next_ < in_.rays; step()) {
        OpenRay& r = rays_[used_] = OpenRay();
        r.ray = next_, r.next = in_.ray_offsets[next_], r.end = in_.ray_offsets[next_ + 1];
        open(r);
        if (r.next < r.end) ++used_;
        else close(r);
      }
      if (used_ == 0) return true;
      if (!fill()) return false;
      encode();
      for (int first = 0; first < tile.count; first += kTile)
        each(first, tile.count - first < kTile ? tile.count - first : kTile, rays_);
      int kept = 0;
      for (int k = 0; k < used_; ++k) {
        if (rays_[k].next < rays_[k].end && rays_[k].transmittance >= in_.early_stop) rays_[kept++] = rays_[k];
        else close(rays_[k]);
      }
      used_ = kept;
    }
    return true;
  }

  bool done() const { return used_ == 0 && next_ >= in_.rays; }

  // The network and what follows from it for samples first to first + count - 1 of the tile, whose columns then begin at
  // 0. q: d out_0 / d features, in panels, wanted for normals; it is kept there.
  void evaluate(int first, int count, float* q) {
    const FieldLayout& l = in_.layout;
    const int panels = (count + kPanel - 1) / kPanel, features = l.mlp.inputs;
    const int64_t size = int64_t(panels) * features * kPanel;
    std::memcpy(network.inputs(), features_ + int64_t(first) * features, sizeof(float) * size);
    network.forward(panels);
    const float* out = network.outputs();
    for (int i = 0; i < panels * kPanel; i += kLanes) {
      const float* from = out + i / kPanel * 4 * kPanel + i % kPanel;
      store_lanes(tile.raw + i, load_lanes(from));
      for (int c = 0; c < 3; ++c) store_lanes(tile.albedo[c] + i, sigmoid_of(load_lanes(from + (1 + c) * kPanel)));
    }
    for (int i = 0; i < panels * kPanel; ++i) {
      const float at[3] = {tile.position[0][first + i], tile.position[1][first + i], tile.position[2][first + i]};
      tile.raw[i] += field_blob(l, at);
    }
    density(first, panels * kPanel);
    if (!in_.normals) return;
    start_slopes(panels);
    network.backward(panels, true);
    std::memcpy(q, network.input_gradients(), sizeof(float) * size);
    const int active = l.grid.active_levels * l.grid.features;
    for (int i = 0; i < panels * kPanel; i += kLanes) {
      const float* by = q + i / kPanel * features * kPanel + i % kPanel;
      const float* j = jacobian_ + ((first + i) / kPanel * features * 3) * kPanel + i % kPanel;
      Floats sum[3] = {};
      for (int e = 0; e < active; ++e)
        for (int d = 0; d < 3; ++d) sum[d] += load_lanes(by + e * kPanel) * load_lanes(j + (e * 3 + d) * kPanel);
      for (int d = 0; d < 3; ++d) store_lanes(tile.gradient[d] + i, sum[d]);
    }
  }

  // Cotangents that make the network's backward pass that of out_0.
  void start_slopes(int panels) {
    float* to = network.output_cotangents();
    for (int row = 0; row < panels * 4; ++row)
      for (int lane = 0; lane < kPanel; ++lane) to[row * kPanel + lane] = row % 4 == 0 ? 1.f : 0.f;
  }

  // tangents of the features along tile.grad_gradient
  void tangents(int first, int panels) {
    const int features = in_.layout.mlp.inputs, active = in_.layout.grid.active_levels * in_.layout.grid.features;
    for (int panel = 0; panel < panels; ++panel) {
      float* to = network.input_tangents() + int64_t(panel) * features * kPanel;
      const float* j = jacobian_ + (first / kPanel + panel) * features * 3 * kPanel;
      for (int half = 0; half < kPanel; half += kLanes) {
        Floats along[3];
        for (int d = 0; d < 3; ++d) along[d] = load_lanes(tile.grad_gradient[d] + panel * kPanel + half);
        for (int e = 0; e < features; ++e) {
          Floats sum = {};
          for (int d = 0; e < active && d < 3; ++d) sum += along[d] * load_lanes(j + (e * 3 + d) * kPanel + half);
          store_lanes(to + e * kPanel + half, sum);
        }
      }
    }
  }

 private:
  // the group's next ray
  void step() {
    if (++next_ % kWindow == 0) next_ += (groups_of(in_) - 1) * kWindow;
  }

  bool fill() {
    int block = kSamples / used_;
    block = block > kLongest ? kLongest : block;
    tile.count = 0;
    for (int k = 0; k < used_; ++k) {
      OpenRay& r = rays_[k];
      const int count = r.end - r.next < block ? int(r.end - r.next) : block;
      for (int i = 0; i < count; ++i) {
        const int at = tile.count + i;
        tile.owner[at] = k, tile.last[at] = r.next + i + 1 == r.end;
        tile.start[at] = in_.t_starts[r.next + i], tile.end[at] = in_.t_ends[r.next + i];
      }
      for (int d = 0; d < 6; ++d) {
        const float value = d < 3 ? in_.origins[3 * r.ray + d] : in_.directions[3 * r.ray + d - 3];
        for (int i = 0; i < count; i += kLanes) store_lanes(tile.from[d] + tile.count + i, broadcast(value));
      }
      tile.count += count, r.next += count;
    }
    for (int i = tile.count; i % kPanel; ++i) {  // whole panels
      tile.start[i] = tile.start[tile.count - 1], tile.end[i] = tile.end[tile.count - 1];
      for (int d = 0; d < 6; ++d) tile.from[d][i] = tile.from[d][tile.count - 1];
    }
    float zero = 0.f;
    for (int d = 0; d < 3; ++d)
      for (int i = 0; i < (tile.count + kPanel - 1) / kPanel * kPanel; ++i) {
        const float at = tile.from[d][i] + 0.5f * (tile.start[i] + tile.end[i]) * tile.from[3 + d][i];
        tile.position[d][i] = at;
        tile.x[d][i] = field_coordinate(in_.layout, at);
        zero += at - at;
      }
    return zero == 0.f;
  }

  void encode() {
    const HashGridLayout& grid = in_.layout.grid;
    const auto run = grid.features == 1 ? encode_tile<1> : grid.features == 2 ? encode_tile<2>
                   : grid.features == 4 ? encode_tile<4> : encode_tile<8>;
    const int whole = (tile.count + kPanel - 1) / kPanel * kPanel;
    run(grid, in_.table, tile.x[0], kSamples, whole, features_, jacobian_);
  }

  // raw to opacities and the slopes of the density, in loops that the compiler vectorizes
  void density(int first, int count) {
    const FieldLayout& l = in_.layout;
    float* raw = tile.raw;
    float* alpha = tile.alpha;
    if (l.exponential) {
      for (int i = 0; i < count; ++i) alpha[i] = density_of<true>(l, raw[i]);
      for (int i = 0; i < count; ++i) tile.slope[i] = density_slope<true>(l, raw[i], alpha[i]);
    } else {
      for (int i = 0; i < count; ++i) alpha[i] = density_of<false>(l, raw[i]);
      for (int i = 0; i < count; ++i) tile.slope[i] = density_slope<false>(l, raw[i], alpha[i]);
    }
    for (int i = 0; i < count; ++i) alpha[i] = opacity_of(alpha[i] * (tile.end[first + i] - tile.start[first + i]));
  }

  const RenderFieldInputs& in_;
  OpenRay rays_[kWindow];
  int used_ = 0;
  int64_t next_;
  Array<float> features_, jacobian_;  // of the tile, in panels
};

// What a sample's colour depends on, from the tile.
FieldShading shade(const RenderFieldInputs& in, const Tile& tile, int64_t ray, int first, int i) {
  float x[3], albedo[3], gradient[3] = {}, by_coordinate[3];
  for (int d = 0; d < 3; ++d) x[d] = tile.position[d][first + i], albedo[d] = tile.albedo[d][i];
  for (int d = 0; in.normals && d < 3; ++d) by_coordinate[d] = tile.gradient[d][i];
  if (in.normals) world_gradient(in.layout, x, by_coordinate, gradient);
  return FieldShading(in, ray, x, albedo, gradient);
}

[[noreturn]] void refuse_positions() { throw std::invalid_argument("samples: expected finite positions along the rays"); }

}  // namespace

void render_field_forward(const RenderFieldForwardParams& p) {
  const RenderFieldInputs& in = p.in;
  check_offsets(in);
  const int channels = in.normals ? 6 : 3;
  const auto open = [&](OpenRay& r) {
    if (r.next < r.end) r.origin = 0.5f * (in.t_starts[r.next] + in.t_ends[r.next]);
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
  std::atomic<bool> finite{true};
  parallel_for(groups_of(in), 1, [&](int64_t index, int64_t) {
    const std::unique_ptr<Group> group(new Group(in, index, false));
    Array<float> q(in.normals ? size_t(in.layout.mlp.inputs) * kTile : 0);
    const auto each = [&](int first, int count, OpenRay* rays) {
      const Tile& tile = group->tile;
      group->evaluate(first, count, q);
      for (int i = 0; i < count; ++i) {
        OpenRay& r = rays[tile.owner[first + i]];
        const float alpha = tile.alpha[i];
        const float weight = r.transmittance < in.early_stop ? 0.f : r.transmittance * alpha;
        r.transmittance *= 1.f - alpha;
        if (weight == 0.f) continue;
        const float middle = 0.5f * (tile.start[first + i] + tile.end[first + i]) - r.origin;
        const FieldShading shading = shade(in, tile, r.ray, first, i);
        r.opacity += weight, r.moment += weight * middle, r.second_moment += weight * middle * middle;
        for (int c = 0; c < 3; ++c) r.values[c] += weight * shading.color[c];
        if (!in.normals) continue;
        for (int d = 0; d < 3; ++d) r.values[3 + d] += weight * shading.normal[d];
        r.orientation += weight * shading.facing * shading.facing;
      }
    };
    if (!group->run(open, each, close)) finite = false;
  });
  if (!finite) refuse_positions();
}

void render_field_backward(const RenderFieldBackwardParams& p) {
  const RenderFieldInputs& in = p.in;
  const FieldLayout& l = in.layout;
  check_offsets(in);
  const int64_t weights = mlp_params(l.mlp), count = groups_of(in);
  const int features = l.mlp.inputs;
  std::memset(p.grad_params, 0, size_t(l.grid.offsets[l.grid.levels]) * l.grid.features * sizeof(float));
  std::memset(p.grad_weights, 0, size_t(weights) * sizeof(float));
  std::vector<std::unique_ptr<Group>> groups(static_cast<size_t>(count));
  for (int64_t g = 0; g < count; ++g) groups[g].reset(new Group(in, g, true));

  const auto open = [&](OpenRay& r) { r.cotangents = RayCotangents(p, r.ray); };
  // Cotangents of the network's outputs, in panels, and of d raw / dx; 0 where samples are beyond a stop or missing.
  const auto composite = [&](Tile& tile, int first, int samples, OpenRay* rays, float* to, float* used) {
    std::memset(to, 0, sizeof(float) * 4 * kTile);
    std::memset(tile.grad_gradient, 0, sizeof tile.grad_gradient);
    std::memset(used, 0, sizeof(float) * kTile);
    for (int i = 0; i < samples; ++i) {
      OpenRay& r = rays[tile.owner[first + i]];
      const float start = tile.start[first + i], end = tile.end[first + i];
      const bool beyond = r.transmittance < in.early_stop;
      const float before = r.transmittance, weight = before * tile.alpha[i];
      r.transmittance *= 1.f - tile.alpha[i];
      if (beyond) continue;
      used[i] = 1.f;
      const FieldShading shading = shade(in, tile, r.ray, first, i);
      float grad_color[3], grad_normal[3] = {}, grad_out[4], grad_gradient[3] = {};
      const float own = r.cotangents.of_sample(in, r.ray, shading, 0.5f * (start + end), weight, grad_color, grad_normal);
      r.prefix += weight * own;
      // A sample that ends the ray has nothing behind it.
      const float behind = tile.last[first + i] || r.transmittance < in.early_stop ? 0.f : r.cotangents.total - r.prefix;
      grad_out[0] = (r.transmittance * own - behind) * (end - start) * tile.slope[i];
      shading.backward(in, r.ray, grad_color, grad_normal, grad_out, grad_gradient);
      for (int c = 0; c < 4; ++c) to[(i / kPanel * 4 + c) * kPanel + i % kPanel] = grad_out[c];
      // of the coordinates in [0, 1]
      for (int d = 0; in.normals && d < 3; ++d) tile.grad_gradient[d][i] = grad_gradient[d] / (2.f * l.radius);
    }
  };
  const auto walk = [&](Group& group) {
    return group.run(open, [&](int first, int samples, OpenRay* rays) {
      Tile& tile = group.tile;
      MLPTile& network = group.network;
      Segment& s = group.segment;
      const int panels = (samples + kPanel - 1) / kPanel, size = panels * kPanel;
      float* q = in.normals ? s.q + int64_t(s.count) * features : nullptr;
      group.evaluate(first, samples, q);
      float used[kTile];
      composite(tile, first, samples, rays,
                in.normals ? network.output_cotangents_of_values() : network.output_cotangents(), used);
      const float* g;
      if (in.normals) {
        group.tangents(first, panels);
        network.tangent(panels, true, nullptr);
        group.start_slopes(panels);
        network.backward_second(panels, true, true, nullptr);
        network.add_second_gradients(panels, true);
        g = network.input_gradients_of_values();
        for (int d = 0; d < 3; ++d)
          std::memcpy(s.along + d * kSegment + s.count, tile.grad_gradient[d], sizeof(float) * size);
      } else {
        network.backward(panels, true);
        network.add_gradients(panels);
        g = network.input_gradients();
      }
      std::memcpy(s.g + int64_t(s.count) * features, g, sizeof(float) * size * features);
      std::memcpy(s.used + s.count, used, sizeof(float) * size);
      for (int d = 0; d < 3; ++d) std::memcpy(s.x + d * kSegment + s.count, tile.x[d] + first, sizeof(float) * size);
      s.count += size;
    }, [](const OpenRay&) {});
  };
  const auto scatter = l.grid.features == 1 ? scatter_level<1> : l.grid.features == 2 ? scatter_level<2>
                     : l.grid.features == 4 ? scatter_level<4> : scatter_level<8>;
  const int active = l.grid.active_levels;
  // Slices depend on the number of threads, but no entry's sum does.
  const int slices = active ? (2 * thread_count() + active - 1) / active : 0;
  std::atomic<bool> finite{true};
  bool more = count > 0;
  while (more) {
    parallel_for(count, 1, [&](int64_t g, int64_t) {
      if (!walk(*groups[g])) finite = false;
    });
    if (!finite) refuse_positions();
    parallel_for(int64_t(active) * slices, 1, [&](int64_t task, int64_t) {
      const int level = active - 1 - int(task / slices), slice = int(task % slices);  // the slow levels first
      const uint32_t entries = l.grid.offsets[level + 1] - l.grid.offsets[level];
      const auto low = uint32_t(uint64_t(entries) * slice / slices);
      const auto span = uint32_t(uint64_t(entries) * (slice + 1) / slices) - low;
      for (const auto& group : groups) {
        const Segment& s = group->segment;
        scatter(l.grid, level, {s.x, in.normals ? static_cast<const float*>(s.along) : nullptr, s.g, s.q, s.used,
                                kSegment, s.count}, low, span, p.grad_params);
      }
    });
    more = false;
    for (const auto& group : groups) more |= !group->done();
  }
  Array<float> part{size_t(weights)};
  for (const auto& group : groups) {
    group->network.write_gradients(part);
    for (int64_t i = 0; i < weights; ++i) p.grad_weights[i] += part[i];
  }
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
