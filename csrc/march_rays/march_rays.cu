// Four launches, no host synchronization: set up rays and pack bits; a warp per ray counts, 32 intervals at a time with
// ballots, and adds to its tile's total; blocks scan the counts of a tile each; a warp per ray writes. Rounding is spelled out in march_rays.h, so that the
// counting and the writing kernel agree.
#include "march_rays/march_rays.h"
#include "common/launch.h"
#include "common/scan.h"

namespace text3d {
namespace TEXT3D_ISA {

static_assert(sizeof(MarchRay) <= 64, "text3d_fast/ops/march_rays.py allocates these");

namespace {

constexpr int kWarps = 4;              // warps, that is rays, a block
constexpr int kPaddingPerWarp = 1024;

struct Prepare {
  MarchRaysParams p;
  int64_t cells, words;
  TEXT3D_HD void operator()(int64_t i) const {
    if (i == 0) p.ray_offsets[0] = 0;
    if (i < words) p.bits[i] = pack_word(p.binaries, cells, i);
    if (i < p.ray_count) {
      MarchRay ray;
      const int flag = set_up_ray(p, i, ray);
      p.rays[i] = ray;
      if (flag) p.info[flag] = 1;  // info was zeroed before the launch
    }
  }
};

template <bool kCone>
TEXT3D_HD uint32_t hit_at(const MarchRaysParams& p, const MarchGrid& grid, const MarchRay& ray, float step, double cone_rate,
                          int32_t j) {
  const bool cut = j == ray.count - 1 && ray.tail_middle >= 0.f;
  const float time = cut ? ray.tail_middle : lattice_middle<kCone>(ray, step, cone_rate, j);
  return p.levels > 1 ? occupied_at<true>(grid, ray, time) : occupied_at<false>(grid, ray, time);
}

template <bool kCone>
__global__ void march_count_kernel(MarchRaysParams p, double cone_rate) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (r >= p.ray_count) return;
  const MarchGrid grid = march_grid(p);
  const MarchRay ray = p.rays[r];
  const float step = float(p.step);
  int32_t count = 0;
  for (int32_t j = 0; j < ray.count; j += 32) {
    const bool hit = j + lane < ray.count && hit_at<kCone>(p, grid, ray, step, cone_rate, j + lane);
    count += __popc(__ballot_sync(~0u, hit));
  }
  if (lane == 0) p.ray_offsets[r + 1] = count, atomic_add(p.info + kMarchTiles + r / kScanTile, int64_t(count));
}

// A block a tile: counts to offsets in place, clipped to the capacity; totals in 64 bits.
__global__ void __launch_bounds__(kScanTile) march_scan_kernel(MarchRaysParams p) {
  TEXT3D_SHARED(int64_t, totals, kScanTile / 32);
  const int thread = int(threadIdx.x);
  const int64_t limit = p.capacity >= 0 ? p.capacity : INT32_MAX, tile = blockIdx.x;
  int64_t before = 0;  // samples of the tiles before this one
  for (int64_t i = thread; i < tile; i += kScanTile) before += p.info[kMarchTiles + i];
  before = block_running_sum(before, totals);
  TEXT3D_SHARED(int64_t, sum_before, 1);
  if (thread == kScanTile - 1) *sum_before = before;
  __syncthreads();
  const int64_t r = tile * kScanTile + thread;
  const int64_t sum = *sum_before + block_running_sum(r < p.ray_count ? p.ray_offsets[r + 1] : 0, totals);
  if (r < p.ray_count) p.ray_offsets[r + 1] = int32_t(sum < limit ? sum : limit);
  if (thread == kScanTile - 1 && tile == int64_t(gridDim.x) - 1) {
    p.info[kMarchFound] = sum;
    p.info[kMarchTooManySamples] = p.capacity < 0 && sum > limit;
    *p.overflow = p.capacity >= 0 && sum > p.capacity;
  }
}

template <bool kCone>
__global__ void march_emit_kernel(MarchRaysParams p, double cone_rate) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (r >= p.ray_count) {  // spare warps fill the padding
    const int64_t total = p.ray_offsets[p.ray_count], begin = (r - p.ray_count) * kPaddingPerWarp;
    for (int64_t i = begin + lane; i < begin + kPaddingPerWarp && i < p.capacity; i += 32)
      if (i >= total) p.ray_ids[i] = 0, p.t_starts[i] = 0.f, p.t_ends[i] = 0.f;
    return;
  }
  const int64_t end = p.ray_offsets[r + 1];
  int64_t out = p.ray_offsets[r];
  if (out == end) return;
  const MarchGrid grid = march_grid(p);
  const MarchRay ray = p.rays[r];
  const float step = float(p.step);
  for (int32_t j = 0; j < ray.count && out < end; j += 32) {
    const int32_t mine = j + lane;
    const bool hit = mine < ray.count && hit_at<kCone>(p, grid, ray, step, cone_rate, mine);
    const uint32_t hits = __ballot_sync(~0u, hit);
    const int64_t slot = out + __popc(hits & ((1u << lane) - 1u));
    if (hit && slot < end) {
      p.ray_ids[slot] = int32_t(r);
      p.t_starts[slot] = absolute_time(ray, lattice_time<kCone>(ray, step, cone_rate, float(mine)));
      p.t_ends[slot] = min_of(absolute_time(ray, lattice_time<kCone>(ray, step, cone_rate, float(mine + 1))), ray.far);
    }
    out += __popc(hits);
  }
}

double cone_rate_of(const MarchRaysParams& p) { return std::log1p(p.cone_angle) / 0.69314718055994530942; }

}  // namespace

void march_rays_count(const MarchRaysParams& p, cudaStream_t stream) {
  const int64_t cells = int64_t(p.levels) * p.x * p.y * p.z, words = (cells + 31) / 32;
  const int64_t tiles = (p.ray_count + kScanTile - 1) / kScanTile;
  cudaMemsetAsync(p.info, 0, (kMarchTiles + tiles) * sizeof(int64_t), stream);
  launch(words > p.ray_count ? words : p.ray_count, Prepare{p, cells, words}, stream);
  const unsigned blocks = unsigned((p.ray_count + kWarps - 1) / kWarps);
  if (blocks && p.cone_angle > 0.) TEXT3D_LAUNCH(march_count_kernel<true>, blocks, kWarps * 32, 0, stream, p, cone_rate_of(p));
  if (blocks && p.cone_angle == 0.) TEXT3D_LAUNCH(march_count_kernel<false>, blocks, kWarps * 32, 0, stream, p, 0.);
  TEXT3D_LAUNCH(march_scan_kernel, unsigned(tiles ? tiles : 1), kScanTile, 0, stream, p);
}

void march_rays_emit(const MarchRaysParams& p, cudaStream_t stream) {
  const int64_t warps = p.ray_count + (p.capacity + kPaddingPerWarp - 1) / kPaddingPerWarp;
  const unsigned blocks = unsigned((warps + kWarps - 1) / kWarps);
  if (blocks == 0) return;
  if (p.cone_angle > 0.)
    TEXT3D_LAUNCH(march_emit_kernel<true>, blocks, kWarps * 32, 0, stream, p, cone_rate_of(p));
  else
    TEXT3D_LAUNCH(march_emit_kernel<false>, blocks, kWarps * 32, 0, stream, p, 0.);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
