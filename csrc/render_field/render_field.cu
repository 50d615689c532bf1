// A warp takes a few rays and goes through their packed samples 16 at a time, across the borders of rays: lanes p and
// p + 16 share a sample. Encoding, network on tensor cores, shading and compositing of a tile are in registers and shared
// memory; the quadrature is a scan by runs of samples of one ray, whose open end is carried into the next tile. Where a ray
// stops, the next tile begins at the next ray, so that what lies behind is never evaluated. The backward pass goes the
// same way; blocks sum the gradients of the weights in buffers of their own, those of the table are added in place.
#include "render_field/render_field.h"
#include "hash_grid/warp_tile.h"
#include "mlp/warp_tile.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

constexpr int kMostRays = 32;     // of a warp at a time: one for each lane
constexpr int64_t kGroups = 2048; // of rays that a GPU should have to choose from, before they get larger

struct Plan {
  WarpMatrices matrices;
  int64_t groups;
  int rays;  // of a group
  Plan(const RenderFieldInputs& in, MLPPass pass) : matrices(in.layout.mlp, pass) {
    const int64_t share = (in.rays + kGroups - 1) / kGroups;
    rays = int(share < 1 ? 1 : share < kMostRays ? share : kMostRays);
    groups = (in.rays + rays - 1) / rays;
  }
};

// A lane's sample of a tile.
struct TileSample {
  int64_t index, ray, begin, end;  // begin, end: of the ray's samples
  bool real;                       // the last tile of a group may not be full
};

// Consecutive rays, and the samples of them that are still to come.
struct RayGroup {
  int64_t first = 0, next = 0, end = 0;
  int64_t offset = 0;  // where the samples of this lane's ray begin
  int count = 0;       // rays

  RayGroup() = default;
  __device__ __forceinline__ RayGroup(const RenderFieldInputs& in, int64_t first, int most) : first(first) {
    count = in.rays - first < most ? int(in.rays - first) : most;
    const int lane = int(threadIdx.x) % 32;
    offset = bounded(in, first + (lane < count ? lane : count));
    next = __shfl_sync(~0u, offset, 0);
    end = bounded(in, first + count);
  }
  // Wrong offsets must not send a kernel out of bounds.
  __device__ __forceinline__ static int64_t bounded(const RenderFieldInputs& in, int64_t ray) {
    const int64_t offset = in.ray_offsets[ray];
    return offset < 0 ? 0 : offset < in.samples ? offset : in.samples;
  }
  __device__ __forceinline__ TileSample sample() const {
    const int point = int(threadIdx.x) % 16;
    TileSample out;
    out.real = next + point < end;
    out.index = out.real ? next + point : end - 1;
    int ray = 0;  // the last one that begins at or before the sample
    for (int by = kMostRays / 2; by > 0; by /= 2) {
      const int64_t begin = __shfl_sync(~0u, offset, ray + by);
      if (ray + by < count && begin <= out.index) ray += by;
    }
    out.ray = first + ray;
    out.begin = __shfl_sync(~0u, offset, ray);
    const int64_t after = __shfl_sync(~0u, offset, (ray + 1) % 32);
    out.end = ray + 1 < count ? after : end;
    return out;
  }
};

// What a lane knows of the field at its sample.
struct FieldSample {
  float start, end, position[3], x[3];   // x: the grid's coordinate
  float albedo[3], gradient[3];          // gradient: d raw / dx
  float alpha, slope;                    // of the sample, of the density by raw
  __device__ __forceinline__ float middle() const { return 0.5f * (start + end); }
};

// The cotangent of the raw density alone.
template <class Network>
__device__ __forceinline__ void seed_unit(const Network& network) {
  float* seed = network.own + network.at.cotangent[0];
  for_elements(4, [&](int row, int n) { seed[row * row_stride(4) + n] = n == 0 ? 1.f : 0.f; });
}

template <bool kNormals, class Network>
__device__ __forceinline__ FieldSample evaluate(const RenderFieldInputs& in, const Network& network, const TileSample& at) {
  const FieldLayout& l = in.layout;
  FieldSample out;
  out.start = at.real ? in.t_starts[at.index] : 0.f, out.end = at.real ? in.t_ends[at.index] : 0.f;
  TEXT3D_UNROLL
  for (int d = 0; d < 3; ++d) {
    out.position[d] = at.real ? in.origins[3 * at.ray + d] + out.middle() * in.directions[3 * at.ray + d] : 0.f;
    out.x[d] = field_coordinate(l, out.position[d]), out.gradient[d] = 0.f;
  }
  const GridPoint<3> grid(l.grid, out.x, at.real);
  const int stride = row_stride(l.mlp.inputs);
  grid.encode(in.table, stride, network.inputs());
  network.values();
  if constexpr (kNormals) {
    seed_unit(network);
    const int turn = network.template reverse<kBackward>(nullptr, false, false, true, nullptr).turn;
    float by_coordinate[3];
    grid.pull_back(in.table, network.own + network.at.cotangent[turn], stride, by_coordinate);
    world_gradient(l, out.position, by_coordinate, out.gradient);
  }
  const float* values = network.outputs() + grid.point * row_stride(4);
  const float raw = values[0] + field_blob(l, out.position);
  const float density = l.exponential ? density_of<true>(l, raw) : density_of<false>(l, raw);
  out.slope = l.exponential ? density_slope<true>(l, raw, density) : density_slope<false>(l, raw, density);
  out.alpha = at.real ? opacity_of(density * (out.end - out.start)) : 0.f;
  TEXT3D_UNROLL
  for (int c = 0; c < 3; ++c) out.albedo[c] = sigmoid_of(values[1 + c]);
  __syncwarp();  // the next tile may write where the values are
  return out;
}

// Transmittance along the runs of a tile, `carry` that of the ray that was open before it.
struct TileRuns {
  PointRuns runs;
  bool open;                    // does this lane's ray come from the tile before?
  float before, after, weight;  // transmittance to both sides of the sample

  __device__ __forceinline__ TileRuns(const TileSample& at, float alpha, float carry, float early_stop)
      : runs(__shfl_up_sync(~0u, at.ray, 1) != at.ray) {
    open = runs.offset == int(threadIdx.x) % 16;
    after = runs.product(1.f - alpha) * (open ? carry : 1.f);
    const float previous = __shfl_up_sync(~0u, after, 1);
    before = runs.offset > 0 ? previous : open ? carry : 1.f;
    weight = before < early_stop ? 0.f : before * alpha;
  }
  // The sum along the ray up to this sample.
  __device__ __forceinline__ float sum(float value, float carry) const { return runs.sum(value) + (open ? carry : 0.f); }
};

// The end of a tile: goes on to the next one, and says whether the last sample's ray is finished.
struct TileEnd {
  int last;       // lane of the last sample
  bool finished;  // its ray

  __device__ __forceinline__ TileEnd(RayGroup& rays, const TileSample& at, bool stopped) {
    last = rays.end - rays.next < kPoints ? int(rays.end - rays.next) - 1 : kPoints - 1;
    finished = __shfl_sync(~0u, int(stopped || at.index + 1 >= at.end), last) != 0;
    const int64_t skip = __shfl_sync(~0u, at.end, last);
    rays.next += last + 1;
    if (finished && skip > rays.next) rays.next = skip;
  }
  __device__ __forceinline__ float carry(float value, float at_begin) const {
    const float other = __shfl_sync(~0u, value, last);
    return finished ? at_begin : other;
  }
};

template <bool kNormals>
__global__ void __launch_bounds__(128, 1) forward_kernel(const __grid_constant__ RenderFieldForwardParams p,
                                                      const __grid_constant__ Plan plan) {
  TEXT3D_DYNAMIC_SHARED(float, shared);
  constexpr int kValues = kNormals ? 6 : 3, kSums = 4 + kValues;  // opacity, two moments, orientation, values
  const RenderFieldInputs& in = p.in;
  const WarpNetwork<MmaFloat> network(in.layout.mlp, plan.matrices, in.weights, shared);
  const int lane = int(threadIdx.x) % 32, warps = blockDim.x / 32;
  for (int64_t group = int64_t(blockIdx.x) * warps + threadIdx.x / 32; group < plan.groups;
       group += int64_t(gridDim.x) * warps) {
    RayGroup rays(in, group * plan.rays, plan.rays);
    if (lane < rays.count) {  // rays without samples stay so
      const int64_t ray = rays.first + lane;
      for (int c = 0; c < kValues; ++c) p.values[ray * kValues + c] = 0.f;
      p.opacity[ray] = p.depth[ray] = p.depth_variance[ray] = 0.f;
      if (kNormals) p.orientation[ray] = 0.f;
    }
    __syncwarp();
    float transmittance = 1.f, carried[kSums] = {};
    while (rays.next < rays.end) {
      const TileSample at = rays.sample();
      const FieldSample field = evaluate<kNormals>(in, network, at);
      const TileRuns tile(at, field.alpha, transmittance, in.early_stop);
      const float origin = at.real ? 0.5f * (in.t_starts[at.begin] + in.t_ends[at.begin]) : 0.f;
      float sums[kSums] = {};
      if (at.real && tile.weight != 0.f) {
        const FieldShading shading(in, at.ray, field.position, field.albedo, field.gradient);
        const float middle = field.middle() - origin;
        sums[0] = tile.weight, sums[1] = tile.weight * middle, sums[2] = tile.weight * middle * middle;
        if (kNormals) sums[3] = tile.weight * shading.facing * shading.facing;
        TEXT3D_UNROLL
        for (int c = 0; c < kValues; ++c)
          sums[4 + c] = tile.weight * (c < 3 ? shading.color[c % 3] : shading.normal[c % 3]);
      }
      TEXT3D_UNROLL
      for (int k = 0; k < kSums; ++k) sums[k] = tile.sum(sums[k], carried[k]);
      const bool stopped = tile.after < in.early_stop;
      const TileEnd end(rays, at, stopped);
      if (lane < kPoints && at.real && (at.index + 1 == at.end || (lane == end.last && stopped))) {
        const bool seen = sums[0] > kMinimumOpacity;
        const float mean = seen ? sums[1] / sums[0] : 0.f;
        p.opacity[at.ray] = sums[0];
        p.depth[at.ray] = seen ? origin + mean : 0.f;
        p.depth_variance[at.ray] = seen ? max_of(sums[2] / sums[0] - mean * mean, 0.f) : 0.f;
        if (kNormals) p.orientation[at.ray] = sums[3];
        TEXT3D_UNROLL
        for (int c = 0; c < kValues; ++c) p.values[at.ray * kValues + c] = sums[4 + c];
      }
      transmittance = end.carry(tile.after, 1.f);
      TEXT3D_UNROLL
      for (int k = 0; k < kSums; ++k) carried[k] = end.carry(sums[k], 0.f);
    }
  }
}

template <bool kNormals>
__global__ void __launch_bounds__(128, 1) backward_kernel(const __grid_constant__ RenderFieldBackwardParams p,
                                                       const __grid_constant__ Plan plan) {
  TEXT3D_DYNAMIC_SHARED(float, shared);
  const RenderFieldInputs& in = p.in;
  const FieldLayout& l = in.layout;
  const WarpMatrices& matrices = plan.matrices;
  const WarpNetwork<MmaFloat> network(l.mlp, matrices, in.weights, shared);
  const int warps = blockDim.x / 32, stride = row_stride(l.mlp.inputs);
  const int64_t size = mlp_params(l.mlp);
  float* gradient = p.partial + blockIdx.x * size;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) gradient[i] = 0.f;
  RayGroup rays;
  int64_t group = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  float transmittance = 1.f, prefix = 0.f;
  while (true) {
    for (; rays.next >= rays.end && group < plan.groups; group += int64_t(gridDim.x) * warps) {
      rays = RayGroup(in, group * plan.rays, plan.rays);
      transmittance = 1.f, prefix = 0.f;
    }
    const bool busy = rays.next < rays.end;  // the others help to sum
    if (!__syncthreads_or(busy)) break;
    const TileSample at = rays.sample();
    const FieldSample field = evaluate<kNormals>(in, network, at);
    const TileRuns tile(at, field.alpha, transmittance, in.early_stop);
    RayCotangents ray;
    float own = 0.f, grad_out[4] = {}, grad_gradient[3] = {}, grad_color[3] = {}, grad_normal[3] = {};
    const bool counts = at.real && !(tile.before < in.early_stop);
    if (counts) {
      ray = RayCotangents(p, at.ray);
      const FieldShading shading(in, at.ray, field.position, field.albedo, field.gradient);
      own = ray.of_sample(in, at.ray, shading, field.middle(), tile.weight, grad_color, grad_normal);
      shading.backward(in, at.ray, grad_color, grad_normal, grad_out, grad_gradient);
    }
    const float met = tile.sum(counts ? tile.weight * own : 0.f, prefix);
    if (counts) {
      // A sample that ends the ray has nothing behind it.
      const float behind = at.index + 1 == at.end || tile.after < in.early_stop ? 0.f : ray.total - met;
      grad_out[0] = (tile.after * own - behind) * (field.end - field.start) * field.slope;
    }
    if (busy) {
      const TileEnd end(rays, at, tile.after < in.early_stop);
      transmittance = end.carry(tile.after, 1.f), prefix = end.carry(met, 0.f);
    }

    const GridPoint<3> grid(l.grid, field.x, at.real);
    float* seed = network.own + (kNormals ? matrices.of_value[0] : matrices.cotangent[0]) + grid.point * row_stride(4);
    TEXT3D_UNROLL
    for (int c = 0; c < 4; ++c) seed[c] = grad_out[c];  // both lanes of a point write the same
    if constexpr (kNormals) {
      TEXT3D_UNROLL
      for (int d = 0; d < 3; ++d) grad_gradient[d] /= 2.f * l.radius;  // of the coordinates in [0, 1]
      seed_unit(network);
      grid.encode_along(in.table, grad_gradient, stride, network.own + matrices.tangent[0]);
      network.tangents(nullptr);
      const int turn = network.template reverse<kSecond>(nullptr, true, true, true, gradient).turn;
      grid.scatter(network.own + matrices.of_value[turn], network.own + matrices.cotangent[turn], grad_gradient, stride,
                   p.grad_params);
    } else {
      __syncwarp();
      const int turn = network.template reverse<kBackward>(nullptr, false, false, true, gradient).turn;
      grid.scatter(network.own + matrices.cotangent[turn], nullptr, nullptr, stride, p.grad_params);
    }
    __syncwarp();  // the next tile writes what the scatter has read
  }
}

unsigned blocks_of(const Plan& plan, int64_t most) {
  const int64_t blocks = (plan.groups + plan.matrices.warps() - 1) / plan.matrices.warps();
  return unsigned(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

template <bool kNormals>
void run(const RenderFieldForwardParams& p, cudaStream_t stream) {
  const Plan plan(p.in, kNormals ? kBackward : kForward);
  const int warps = plan.matrices.warps();
  const int bytes = reserve_shared(forward_kernel<kNormals>, "render_field", plan.matrices, warps);
  TEXT3D_LAUNCH(forward_kernel<kNormals>, blocks_of(plan, 1 << 16), unsigned(warps * 32), bytes, stream, p, plan);
}

template <bool kNormals>
void run(const RenderFieldBackwardParams& p, cudaStream_t stream) {
  const Plan plan(p.in, kNormals ? kSecond : kBackward);
  const int warps = plan.matrices.warps();
  const unsigned blocks = blocks_of(plan, p.blocks);
  const int bytes = reserve_shared(backward_kernel<kNormals>, "render_field", plan.matrices, warps);
  TEXT3D_LAUNCH(backward_kernel<kNormals>, blocks, unsigned(warps * 32), bytes, stream, p, plan);
  const int64_t size = mlp_params(p.in.layout.mlp);
  launch(size, SumPartials{p.partial, p.grad_weights, size, int(blocks)}, stream);
}

}  // namespace

void render_field_forward(const RenderFieldForwardParams& p, cudaStream_t stream) {
  if (p.in.rays == 0) return;
  if (p.in.normals) run<true>(p, stream);
  else run<false>(p, stream);
}

void render_field_backward(const RenderFieldBackwardParams& p, cudaStream_t stream) {
  const HashGridLayout& grid = p.in.layout.grid;
  cudaMemsetAsync(p.grad_params, 0, size_t(grid.offsets[grid.levels]) * grid.features * sizeof(float), stream);
  if (p.in.normals) run<true>(p, stream);
  else run<false>(p, stream);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
