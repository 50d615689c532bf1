// The image is cut into bands of rows. First, chunks of triangles are sorted into the bands that they touch; then each
// band is drawn by one thread into keys that fit its cache, without atomics, and resolved while they are still there.
#include "common/lanes.h"
#include "rasterize/rasterize.h"
#include <cstring>
#include <memory>
#include <stdexcept>
#include "common/memory.h"
#include "common/parallel.h"
#include "rasterize/draw.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

constexpr int32_t kChunk = 4096;            // triangles sorted into bands at once
constexpr int64_t kBandBytes = 192 << 10;   // of a band's keys

// The triangles of one chunk, band after band.
struct Bin {
  Array<int32_t> ids;      // ids[offsets[band]] to ids[offsets[band + 1]]
  Array<int32_t> offsets;  // [bands + 1]
};

struct Bands {
  int32_t shift, count;  // 2^shift rows each
  Bands(const Viewport& view) : shift(2) {
    const int64_t row_bytes = int64_t(view.width) * 8;
    const int32_t wanted = 4 * thread_count();
    while ((row_bytes << (shift + 1)) <= kBandBytes && (view.height >> (shift + 1)) >= wanted) ++shift;
    count = ((view.height - 1) >> shift) + 1;
  }
};

// Returns false if a vertex index is out of range.
bool sort_into_bands(const Image& image, const Bands& bands, int64_t begin, int64_t end, Bin& bin) {
  int32_t ids[kChunk], low[kChunk], high[kChunk], kept = 0;
  bool fine = true;
  TriangleBlock block;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int32_t filled = int32_t(end - start < kBlock ? end - start : kBlock);
    for (int32_t l = 0; l < kBlock; ++l) block.ids[l] = int32_t(start + (l < filled ? l : filled - 1));
    fine &= block.load<true>(image);
    block.bounds(image.view);
    for (int32_t l = 0; l < filled; ++l) {
      if (block.state[l] == kCrossing) {
        const ClippedPolygon polygon = image.clipped(block.ids[l]);
        if (polygon.count < 3) continue;
        polygon.bounds(image.view, block.left[l], block.right[l], block.bottom[l], block.top[l]);
        if (block.left[l] > block.right[l] || block.bottom[l] > block.top[l]) continue;
      }
      ids[kept] = block.ids[l], low[kept] = block.bottom[l] >> bands.shift, high[kept] = block.top[l] >> bands.shift;
      kept += block.state[l] != kCulled;  // no branch: nobody can predict which triangles lie between pixel centres
    }
  }
  // Most triangles touch one band: what is left over is for a loop that seldom runs, otherwise GCC would unroll it.
  bin.offsets.resize(size_t(bands.count) + 1);
  std::memset(bin.offsets, 0, (size_t(bands.count) + 1) * sizeof(int32_t));
  for (int32_t i = 0; i < kept; ++i) {
    ++bin.offsets[low[i]];
    for (int32_t b = low[i] + 1; b <= high[i]; ++b) ++bin.offsets[b];
  }
  int32_t total = 0;
  for (int32_t b = 0; b <= bands.count; ++b) {  // starts; filling moves each to its end, the next one's start
    const int32_t count = bin.offsets[b];
    bin.offsets[b] = total, total += count;
  }
  bin.ids.resize(size_t(total));
  for (int32_t i = 0; i < kept; ++i) {
    bin.ids[bin.offsets[low[i]]++] = ids[i];
    for (int32_t b = low[i] + 1; b <= high[i]; ++b) bin.ids[bin.offsets[b]++] = ids[i];
  }
  for (int32_t b = bands.count; b > 0; --b) bin.offsets[b] = bin.offsets[b - 1];
  bin.offsets[0] = 0;
  return fine;
}

Floats encode_triangle_ids(Ints ids) {
  const Floats large = (Floats)(ids + int32_t(0x4a800000 + 1));
  return ids < (1 << 24) ? __builtin_convertvector(ids + 1, Floats) : large;
}

// rast and rast_db of the row's pixels [column, column + count), at most kLanes.
void resolve_pixels(const Image& image, const int64_t* keys, int32_t row, int32_t column, int32_t count, float* rast,
                    float* rast_db) {
  Ints ids = {};
  for (int l = 0; l < kLanes; ++l) ids[l] = l < count ? key_triangle(keys[l]) : -1;
  const Ints covered = ids >= 0;
  if (!any(covered)) {
    std::memset(rast, 0, size_t(count) * 16);
    std::memset(rast_db, 0, size_t(count) * 16);
    return;
  }
  const float* corners[3][kLanes];
  const float* nothing = image.pos;
  for (int l = 0; l < kLanes; ++l) {
    const int32_t* vertices = image.tri + 3 * int64_t(ids[l] < 0 ? 0 : ids[l]);
    for (int k = 0; k < 3; ++k) corners[k][l] = ids[l] < 0 ? nothing : image.pos + 4 * int64_t(vertices[k]);
  }
  Corner<Floats> c[3];
  for (int k = 0; k < 3; ++k) load_rows(corners[k], c[k].x, c[k].y, c[k].z, c[k].w);
  const float width = float(image.view.width), height = float(image.view.height);
  Floats fx, r[3], db[4];
  for (int l = 0; l < kLanes; ++l) fx[l] = float(2 * (column + l) + 1);
  resolve(c[0], c[1], c[2], fx / width - 1.f, broadcast(pixel_centre(row, height)), 2.f / width, 2.f / height, r, db);
  const Floats channel = covered ? encode_triangle_ids(ids) : Floats{};
  for (Floats& value : r) value = covered ? value : Floats{};
  for (Floats& value : db) value = covered ? value : Floats{};
  if (count == kLanes) {
    store_rows(reinterpret_cast<float(*)[4]>(rast), r[0], r[1], r[2], channel);
    store_rows(reinterpret_cast<float(*)[4]>(rast_db), db[0], db[1], db[2], db[3]);
    return;
  }
  float out[2][kLanes][4];
  store_rows(out[0], r[0], r[1], r[2], channel);
  store_rows(out[1], db[0], db[1], db[2], db[3]);
  std::memcpy(rast, out[0], size_t(count) * 16);
  std::memcpy(rast_db, out[1], size_t(count) * 16);
}

void draw_band(const Image& image, const Bands& bands, const Bin* bins, int64_t chunks, int32_t band, int64_t* scratch,
               const int64_t* previous, int64_t* keys_out, float* rast, float* rast_db) {
  const int32_t begin = band << bands.shift, width = image.view.width;
  const int32_t end = begin + (1 << bands.shift) < image.view.height ? begin + (1 << bands.shift) : image.view.height;
  Canvas canvas{scratch, nullptr, width + kSpan, begin, end};
  const int64_t cells = int64_t(end - begin) * canvas.stride;
  for (int64_t i = 0; i < cells; ++i) scratch[i] = kNothing;
  if (previous) {
    canvas.previous = scratch + cells;
    for (int32_t y = begin; y < end; ++y)
      std::memcpy(scratch + cells + int64_t(y - begin) * canvas.stride, previous + int64_t(y) * width, size_t(width) * 8);
  }
  TriangleBlock block;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int32_t first = bins[chunk].offsets[band], last = bins[chunk].offsets[band + 1];
    for (int32_t start = first; start < last; start += kBlock) {
      const int32_t filled = last - start < kBlock ? last - start : kBlock;
      for (int32_t l = 0; l < kBlock; ++l) block.ids[l] = bins[chunk].ids[start + (l < filled ? l : filled - 1)];
      block.load<false>(image);
      block.bounds(image.view);
      if (previous) {
        draw_block<true>(image, block, filled, canvas);
      } else {
        draw_block<false>(image, block, filled, canvas);
      }
    }
  }
  for (int32_t y = begin; y < end; ++y) {
    const int64_t* row = canvas.keys + int64_t(y - begin) * canvas.stride;
    const int64_t pixel = int64_t(y) * width;
    if (keys_out) std::memcpy(keys_out + pixel, row, size_t(width) * 8);
    for (int32_t x = 0; x < width; x += kLanes)
      resolve_pixels(image, row + x, y, x, width - x < kLanes ? width - x : kLanes, rast + 4 * (pixel + x),
                     rast_db + 4 * (pixel + x));
  }
}

void snap_vertices(const float* pos, int64_t count, const Viewport& view, SnappedVertex* snapped) {
  parallel_for(count, 8192, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float x = pos[4 * i], y = pos[4 * i + 1], z = pos[4 * i + 2], w = pos[4 * i + 3];
      snapped[i] = snap(x, y, z, w, outcode(x, y, z, w, view.guard), view);
    }
  });
}

}  // namespace

void rasterize_forward(const RasterizeForwardParams& p) {
  const int64_t pixels = int64_t(p.height) * p.width;
  if (pixels == 0 || p.batch == 0) return;
  const Viewport view(p.height, p.width);
  const Bands bands(view);
  snap_vertices(p.pos, p.vertices * (p.instanced ? p.batch : 1), view, p.snapped);
  const int64_t most = p.ranges ? p.largest_count : p.triangles;
  std::unique_ptr<Bin[]> bins(new Bin[size_t((most + kChunk - 1) / kChunk)]);
  bool fine = true;
  for (int64_t b = 0; b < p.batch && fine; ++b) {
    const int64_t first = p.ranges ? p.ranges[2 * b] : 0, count = p.ranges ? p.ranges[2 * b + 1] : p.triangles;
    const int64_t own = p.instanced ? b * p.vertices : 0, chunks = (count + kChunk - 1) / kChunk;
    const Image image{p.pos + 4 * own, p.snapped + own, p.tri, p.vertices, view};
    parallel_for(count, kChunk, [&](int64_t begin, int64_t end) {
      if (!sort_into_bands(image, bands, first + begin, first + end, bins[begin / kChunk]))
        __atomic_store_n(&fine, false, __ATOMIC_RELAXED);
    });
    if (fine) parallel_for(bands.count, 1, [&](int64_t band, int64_t) {
      const size_t cells = (size_t(view.width) + kSpan) << bands.shift;
      Array<int64_t> scratch(cells * (p.previous ? 2 : 1));
      draw_band(image, bands, bins.get(), chunks, int32_t(band), scratch, p.previous ? p.previous + b * pixels : nullptr,
                p.keys ? p.keys + b * pixels : nullptr, p.rast + 4 * b * pixels, p.rast_db + 4 * b * pixels);
    });
  }
  if (!fine)
    throw std::invalid_argument("tri: expected indices from 0 to " + std::to_string(p.vertices - 1) +
                                ", got some out of this range");
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
