// No read-back and no overflow: one thread a triangle draws it if it is small, or queues it; one warp draws a medium one,
// blocks share out large and clipped ones by tiles of 64 x 64 pixels. All lower keys with 64-bit atomicMin, whose order does
// not matter, so the result is that of the CPU, bit for bit. A last kernel resolves the keys. Clipping is a warp's work.
//
// queue: two counters (medium, large), two words unused, then `queue_capacity` pairs (image, triangle): the medium ones
// from the front, the large ones from the back. Every triangle is queued at most once, so they never meet.
#include "rasterize/rasterize.h"
#include "common/launch.h"
#include "common/segmented.h"
#include "common/vector_io.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

constexpr int32_t kSmallPixels = 128, kMediumPixels = 4096;  // of the bounding box (Schuetz et al., arXiv 2604.21749)
constexpr int32_t kSmallExtent = 64 * kSubpixels;            // 32-bit edge functions below
constexpr int kWarps = 8, kTile = 64, kTileThreads = 128;
constexpr int64_t kMostBlocks = 1024;

struct Box {
  int32_t left, right, bottom, top;
  TEXT3D_HD bool empty() const { return left > right || bottom > top; }
  TEXT3D_HD int64_t pixels() const { return int64_t(right - left + 1) * (top - bottom + 1); }
};

TEXT3D_HD Box bounds(const SnappedTriangle& t, const Viewport& view) {
  const int32_t x12 = t.x[1] > t.x[2] ? t.x[1] : t.x[2];  // corner 0 has the smallest x
  int32_t y0 = t.y[0], y1 = t.y[0];
  TEXT3D_UNROLL for (int k = 1; k < 3; ++k) y0 = t.y[k] < y0 ? t.y[k] : y0, y1 = t.y[k] > y1 ? t.y[k] : y1;
  return {first_pixel(t.x[0]), last_pixel(x12, view.width), first_pixel(y0), last_pixel(y1, view.height)};
}

struct Scene {
  RasterizeForwardParams p;
  Viewport view;
  int64_t pixels;
  TEXT3D_HD explicit Scene(const RasterizeForwardParams& p)
      : p(p), view(p.height, p.width), pixels(int64_t(p.height) * p.width) {}

  TEXT3D_HD void lower(int32_t image, int32_t x, int32_t y, float depth, int32_t id) const {
    const int64_t cell = image * pixels + int64_t(y) * view.width + x, key = depth_key(depth, id);
    if (key >= p.keys[cell]) return;  // a stale value is only larger
    if (p.previous && key <= p.previous[cell]) return;
    atomic_min(p.keys + cell, key);
  }
  TEXT3D_HD const SnappedVertex& vertex(int32_t image, int32_t index) const {
    return p.snapped[(p.instanced ? image * p.vertices : 0) + index];
  }
  TEXT3D_HD SnappedTriangle triangle(int32_t image, int32_t id) const {
    const int32_t* v = p.tri + 3 * int64_t(id);
    return {vertex(image, v[0]), vertex(image, v[1]), vertex(image, v[2])};
  }
  TEXT3D_HD uint32_t outside(int32_t image, int32_t id) const {
    const int32_t* v = p.tri + 3 * int64_t(id);
    return vertex(image, v[0]).code | vertex(image, v[1]).code | vertex(image, v[2]).code;
  }
};

struct ClearKeys {
  int64_t* keys;
  TEXT3D_HD void operator()(int64_t i) const { keys[i] = kNothing; }
};

struct SnapVertex {
  const float* pos;
  SnappedVertex* snapped;
  Viewport view;
  TEXT3D_HD void operator()(int64_t i) const {
    const float x = pos[4 * i], y = pos[4 * i + 1], z = pos[4 * i + 2], w = pos[4 * i + 3];
    snapped[i] = snap(x, y, z, w, outcode(x, y, z, w, view.guard), view);
  }
};

struct DrawSmall {
  Scene scene;
  TEXT3D_HD void enqueue(int32_t image, int32_t id, bool large) const {
    int32_t* queue = scene.p.queue;
    const int64_t place = atomic_add(queue + int(large), 1);
    int32_t* entry = queue + 4 + 2 * (large ? scene.p.queue_capacity - 1 - place : place);
    entry[0] = image, entry[1] = id;
  }
  TEXT3D_HD void operator()(int64_t i) const {
    const RasterizeForwardParams& p = scene.p;
    const int32_t image = int32_t(i / p.largest_count);
    int64_t id = i % p.largest_count;
    if (p.ranges) {
      if (id >= p.ranges[2 * image + 1]) return;
      id += p.ranges[2 * image];
    }
    const int32_t* v = p.tri + 3 * id;
    if (uint64_t(v[0]) >= uint64_t(p.vertices) || uint64_t(v[1]) >= uint64_t(p.vertices) ||
        uint64_t(v[2]) >= uint64_t(p.vertices))
      return;
    const SnappedVertex a = scene.vertex(image, v[0]), b = scene.vertex(image, v[1]), c = scene.vertex(image, v[2]);
    const uint32_t any = a.code | b.code | c.code;
    if (any >= kInvalid || (a.code & b.code & c.code)) return;
    if (any) return enqueue(image, int32_t(id), true);
    const SnappedTriangle t(a, b, c);
    const Box box = bounds(t, scene.view);
    if (t.orientation == 0 || box.empty()) return;
    const int32_t y0 = t.y[0], y1 = t.y[1], y2 = t.y[2];
    const int32_t low = y0 < y1 ? (y0 < y2 ? y0 : y2) : (y1 < y2 ? y1 : y2);
    const int32_t high = y0 > y1 ? (y0 > y2 ? y0 : y2) : (y1 > y2 ? y1 : y2);
    const bool narrow = t.x[1] - t.x[0] < kSmallExtent && t.x[2] - t.x[0] < kSmallExtent && high - low < kSmallExtent;
    if (!narrow || box.pixels() > kSmallPixels) return enqueue(image, int32_t(id), box.pixels() > kMediumPixels);
    const int32_t px = box.left * kSubpixels + kHalfPixel, py = box.bottom * kSubpixels + kHalfPixel;
    const int32_t area = int32_t(t.area), right1 = -t.dy(1) * kSubpixels, right2 = -t.dy(2) * kSubpixels;
    int32_t row1 = int32_t(t.edge(1, px, py)), row2 = int32_t(t.edge(2, px, py));
    for (int32_t y = box.bottom; y <= box.top; ++y) {
      int32_t e1 = row1, e2 = row2;
      for (int32_t x = box.left; x <= box.right; ++x) {
        if (((area - e1 - e2 - t.owned[0]) | (e1 - t.owned[1]) | (e2 - t.owned[2])) >= 0)
          scene.lower(image, x, y, t.depth(float(e1), float(e2)), int32_t(id));
        e1 += right1, e2 += right2;
      }
      row1 += t.dx(1) * kSubpixels, row2 += t.dx(2) * kSubpixels;
    }
  }
};

// A warp draws 8 x 4 pixels at a time.
__global__ void draw_medium(Scene scene) {
  const int32_t count = scene.p.queue[0], lane = int32_t(threadIdx.x) % 32, warps = int32_t(gridDim.x) * kWarps;
  for (int32_t item = int32_t(blockIdx.x) * kWarps + int32_t(threadIdx.x) / 32; item < count; item += warps) {
    const int32_t image = scene.p.queue[4 + 2 * item], id = scene.p.queue[5 + 2 * item];
    const SnappedTriangle t = scene.triangle(image, id);
    const Box box = bounds(t, scene.view);
    for (int32_t y = box.bottom + lane / 8; y <= box.top; y += 4) {
      for (int32_t x = box.left + lane % 8; x <= box.right; x += 8) {
        const int32_t px = x * kSubpixels + kHalfPixel, py = y * kSubpixels + kHalfPixel;
        const int64_t e1 = t.edge(1, px, py), e2 = t.edge(2, px, py);
        if (t.inside(t.area - e1 - e2, e1, e2)) scene.lower(image, x, y, t.depth(float(e1), float(e2)), id);
      }
    }
  }
}

// Can any pixel centre of the tile be inside? Looks at the corner where the edge function is largest.
TEXT3D_HD bool touches(const SnappedTriangle& t, int32_t x, int32_t y) {
  const int32_t px = x * kSubpixels + kHalfPixel, py = y * kSubpixels + kHalfPixel, across = (kTile - 1) * kSubpixels;
  bool all = true;
  TEXT3D_UNROLL for (int k = 0; k < 3; ++k)
    all &= t.edge(k, t.dy(k) < 0 ? px + across : px, t.dx(k) > 0 ? py + across : py) >= 0;
  return all;
}

// A queued triangle, ready to be drawn: its fan and the pixels that it may cover.
struct Prepared {
  SnappedTriangle fan[1 + kPlanes];
  Box box;
  int32_t triangles, image, id;
};

// Where a warp clips: corners before and after a plane, and what remains.
struct ClipRoom {
  double points[2][3 + kPlanes][4];
  ClippedPolygon polygon;
};

// clip() of visibility.h by a warp, a lane for each edge: the same operations on the same numbers. Lanes 0 to 2 have a
// corner of the triangle each.
__device__ __forceinline__ void clip_by_warp(const float* corner, const Viewport& view, ClipRoom& room) {
  const int32_t lane = int32_t(threadIdx.x) % 32;
  int32_t count = 3, from = 0;
  if (lane == 0) room.polygon.count = 0;
  if (lane < 3)
    for (int c = 0; c < 4; ++c) room.points[0][lane][c] = corner[c];
  __syncwarp();
  for (int32_t plane = 0; plane < kPlanes; ++plane) {
    const int32_t edge = lane < count ? lane : 0;
    const double *here = room.points[from][edge], *there = room.points[from][edge + 1 < count ? edge + 1 : 0];
    const double d_here = plane_distance(here, plane, view.guard), d_there = plane_distance(there, plane, view.guard);
    const bool keeps = lane < count && d_here >= 0., crosses = lane < count && (d_here >= 0.) != (d_there >= 0.);
    const unsigned kept = __ballot_sync(~0u, keeps), crossed = __ballot_sync(~0u, crosses), below = (1u << lane) - 1u;
    const int32_t total = __popc(kept) + __popc(crossed), place = __popc(kept & below) + __popc(crossed & below);
    if (total < 3 || total > 3 + kPlanes) return;  // more: rounding made a non-convex polygon, which cannot be drawn
    if (keeps)
      for (int c = 0; c < 4; ++c) room.points[1 - from][place][c] = here[c];
    if (crosses) {
      const bool entering = d_there >= 0.;
      const double *inner = entering ? there : here, *outer = entering ? here : there;
      const double near = entering ? d_there : d_here, far = entering ? d_here : d_there;
      const double t = near / (near - far);
      for (int c = 0; c < 4; ++c) room.points[1 - from][place + int32_t(keeps)][c] = inner[c] + t * (outer[c] - inner[c]);
    }
    __syncwarp();
    count = total, from = 1 - from;
  }
  const double* point = room.points[from][lane < count ? lane : 0];
  const float x = float(point[0]), y = float(point[1]), z = float(point[2]), w = float(point[3]);
  const float bound = 2.f * view.guard * w;
  const bool fine = w >= kMinimumW && fabsf(x) <= bound && fabsf(y) <= bound && fabsf(z) <= 2.f * w;
  if (!__all_sync(~0u, fine)) return;
  if (lane < count) room.polygon.corners[lane] = snap(x, y, z, w, 0, view);
  if (lane == 0) room.polygon.count = count;
  __syncwarp();
}

// All lanes of a warp.
__device__ __forceinline__ void prepare(const Scene& scene, int32_t item, ClipRoom& room, Prepared& out) {
  const int32_t* entry = scene.p.queue + 4 + 2 * (scene.p.queue_capacity - 1 - item);
  const int32_t image = entry[0], id = entry[1], lane = int32_t(threadIdx.x) % 32;
  if (lane == 0) out.image = image, out.id = id;
  if (!scene.outside(image, id)) {
    if (lane == 0) {
      out.fan[0] = scene.triangle(image, id);
      out.box = bounds(out.fan[0], scene.view);
      out.triangles = out.box.empty() ? 0 : 1;
    }
    return;
  }
  const float* pos = scene.p.pos + (scene.p.instanced ? 4 * image * scene.p.vertices : 0);
  clip_by_warp(pos + 4 * int64_t(scene.p.tri[3 * int64_t(id) + (lane < 3 ? lane : 0)]), scene.view, room);
  __syncwarp();
  const int32_t triangles = room.polygon.count < 3 ? 0 : room.polygon.triangles();
  if (lane < triangles) out.fan[lane] = room.polygon.triangle(lane);
  if (lane == 0) {
    out.triangles = triangles;
    if (triangles > 0) {
      room.polygon.bounds(scene.view, out.box.left, out.box.right, out.box.bottom, out.box.top);
      if (out.box.empty()) out.triangles = 0;
    }
  }
}

__global__ void draw_large(Scene scene) {
  constexpr int32_t kTogether = kTileThreads / 32;  // triangles that a block prepares at a time, one a warp
  TEXT3D_SHARED(Prepared, prepared, kTogether);
  TEXT3D_SHARED(ClipRoom, rooms, kTogether);
  const int32_t count = scene.p.queue[1], thread = int32_t(threadIdx.x), blocks = int32_t(gridDim.x);
  // Few triangles: several blocks share the tiles of one. Many: each block has its own ones.
  const int32_t sharing = blocks > count ? blocks / (count > 0 ? count : 1) : 1, groups = blocks / sharing;
  const int32_t part = int32_t(blockIdx.x) % sharing, group = int32_t(blockIdx.x) / sharing;
  for (int64_t first = group < groups ? group : count; first < count; first += int64_t(groups) * kTogether) {
    __syncthreads();  // what was prepared before is no longer read
    const int64_t own = first + int64_t(groups) * (thread / 32);
    if (own < count) prepare(scene, int32_t(own), rooms[thread / 32], prepared[thread / 32]);
    __syncthreads();
    for (int32_t n = 0; n < kTogether && first + int64_t(groups) * n < count; ++n) {
      const Prepared& item = prepared[n];
      if (item.triangles == 0) continue;
      const Box box = item.box;
      const int32_t columns = (box.right - box.left) / kTile + 1, tiles = columns * ((box.top - box.bottom) / kTile + 1);
      for (int32_t tile = part; tile < tiles; tile += sharing) {
        const int32_t x0 = box.left + tile % columns * kTile, y0 = box.bottom + tile / columns * kTile;
        if (item.triangles == 1 && !touches(item.fan[0], x0, y0)) continue;
        for (int32_t i = thread; i < kTile * kTile; i += kTileThreads) {
          const int32_t x = x0 + i % kTile, y = y0 + i / kTile;
          float depth;
          if (x <= box.right && y <= box.top &&
              cover(item.fan, item.triangles, x * kSubpixels + kHalfPixel, y * kSubpixels + kHalfPixel, depth))
            scene.lower(item.image, x, y, depth, item.id);
        }
      }
    }
  }
}

TEXT3D_HD Corner<float> load_corner(const float* p) { return {p[0], p[1], p[2], p[3]}; }

struct ResolvePixel {
  Scene scene;
  TEXT3D_HD void operator()(int64_t i) const {
    const RasterizeForwardParams& p = scene.p;
    const int32_t id = key_triangle(p.keys[i]);
    float rast[4] = {0.f, 0.f, 0.f, 0.f}, db[4] = {0.f, 0.f, 0.f, 0.f};
    if (id >= 0) {
      const int32_t* v = p.tri + 3 * int64_t(id);
      const float* pos = p.pos + (p.instanced ? i / scene.pixels * p.vertices * 4 : 0);
      const int64_t within = i % scene.pixels;
      const float width = float(p.width), height = float(p.height);
      resolve(load_corner(pos + 4 * int64_t(v[0])), load_corner(pos + 4 * int64_t(v[1])), load_corner(pos + 4 * int64_t(v[2])),
              pixel_centre(int32_t(within % p.width), width), pixel_centre(int32_t(within / p.width), height), 2.f / width,
              2.f / height, rast, db);
      rast[3] = encode_triangle_id(id);
    }
    store_values<4>(p.rast + 4 * i, rast);
    store_values<4>(p.rast_db + 4 * i, db);
  }
};

constexpr int kGradientThreads = 128;

// Pixels in a row that see one triangle are summed first.
__global__ void gradient_kernel(RasterizeBackwardParams p) {
  const int64_t pixels = int64_t(p.height) * p.width, total = p.batch * pixels;
  const int64_t i = int64_t(blockIdx.x) * kGradientThreads + threadIdx.x;
  const int64_t image = i / pixels, within = i % pixels;
  int32_t id = i < total ? decode_triangle_id(p.rast[4 * i + 3]) : -1;
  if (id >= p.triangles) id = -1;
  float grad[3][3] = {};
  const int64_t first = p.instanced ? image * p.vertices : 0;
  const int32_t* v = p.tri + 3 * int64_t(id < 0 ? 0 : id);
  if (id >= 0) {
    float db[4] = {0.f, 0.f, 0.f, 0.f};
    if (p.grad_db) load_values<4>(p.grad_db + 4 * i, db);
    const float width = float(p.width), height = float(p.height), *pos = p.pos + 4 * first;
    resolve_gradient<true>(load_corner(pos + 4 * int64_t(v[0])), load_corner(pos + 4 * int64_t(v[1])),
                           load_corner(pos + 4 * int64_t(v[2])), pixel_centre(int32_t(within % p.width), width),
                           pixel_centre(int32_t(within / p.width), height), 2.f / width, 2.f / height,
                           p.grad_rast[4 * i], p.grad_rast[4 * i + 1], db, grad);
  }
  if (p.contributions) {
    for (int k = 0; k < 3 && id >= 0; ++k)
      for (int c = 0; c < 3; ++c) p.contributions[12 * i + 4 * k + (c < 2 ? c : 3)] = grad[k][c];
    return;
  }
  const WarpRuns runs(id >= 0 ? (image << 32 | id) : -1);
  TEXT3D_UNROLL for (int k = 0; k < 3; ++k) {
    TEXT3D_UNROLL for (int c = 0; c < 3; ++c) {
      const float value = runs.sum(grad[k][c]);
      if (id >= 0 && runs.last) atomic_add(p.grad_pos + 4 * (first + v[k]) + (c < 2 ? c : 3), value);
    }
  }
}

}  // namespace

void rasterize_forward(const RasterizeForwardParams& p, cudaStream_t stream) {
  const Scene scene(p);
  const int64_t cells = p.batch * scene.pixels, drawn = p.batch * p.largest_count;
  if (cells == 0) return;
  launch(cells, ClearKeys{p.keys}, stream);
  if (drawn > 0) {
    cudaMemsetAsync(p.queue, 0, 16, stream);
    launch(p.vertices * (p.instanced ? p.batch : 1), SnapVertex{p.pos, p.snapped, scene.view}, stream);
    launch(drawn, DrawSmall{scene}, stream);
    // Enough blocks to fill a GPU whatever the queues turn out to hold, no more than could have work.
    const int64_t warps = drawn < kMostBlocks * kWarps ? drawn : kMostBlocks * kWarps;
    TEXT3D_LAUNCH(draw_medium, unsigned((warps + kWarps - 1) / kWarps), 32 * kWarps, 0, stream, scene);
    const int64_t tiles = drawn * ((p.width - 1) / kTile + 1) * ((p.height - 1) / kTile + 1);
    TEXT3D_LAUNCH(draw_large, unsigned(tiles < kMostBlocks ? tiles : kMostBlocks), kTileThreads, 0, stream, scene);
  }
  launch(cells, ResolvePixel{scene}, stream);
}

void rasterize_backward(const RasterizeBackwardParams& p, cudaStream_t stream) {
  const int64_t cells = p.batch * p.height * p.width, blocks = (cells + kGradientThreads - 1) / kGradientThreads;
  if (cells == 0 || p.triangles == 0) return;
  TEXT3D_LAUNCH(gradient_kernel, unsigned(blocks), kGradientThreads, 0, stream, p);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
