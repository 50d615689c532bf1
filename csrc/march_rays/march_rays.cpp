// Two passes over the rays. The first walks the lattice, 32 intervals at a time, jumping over empty blocks of 8^3 cells,
// and remembers runs of neighbouring samples; the second writes the runs out. Only rays with more runs than fit are
// walked on in the second pass, by the same function, so the two passes cannot disagree about rounding.
#include "march_rays/march_rays.h"
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

static_assert(sizeof(MarchRay) <= 64 && sizeof(MarchRuns) <= 200, "text3d_fast/ops/march_rays.py allocates these");

namespace {

constexpr int32_t kBlock = 8;
constexpr int64_t kRaysPerTask = 32;

struct Walker {
  MarchGrid grid;
  const uint8_t* blocks;
  int32_t block_count[3];
  float step, cone_angle;
  double cone_rate;

  explicit Walker(const MarchRaysParams& p)
      : grid(march_grid(p)), blocks(p.blocks), step(float(p.step)), cone_angle(float(p.cone_angle)),
        cone_rate(std::log1p(p.cone_angle) / 0.69314718055994530942) {
    for (int a = 0; a < 3; ++a) block_count[a] = (grid.size[a] + kBlock - 1) / kBlock;
  }
};

// If the block that interval j's middle lies in is empty, the next interval whose middle may lie outside it; otherwise j.
template <bool kCone, bool kNested>
inline int32_t skip(const Walker& w, const MarchRay& ray, int32_t j) {
  const float time = lattice_middle<kCone>(ray, w.step, w.cone_rate, j);
  float point[3], reach = 0.f;
  for (int a = 0; a < 3; ++a) {
    point[a] = ray.velocity[a] * time + ray.position[a];
    reach = max_of(reach, fabsf(point[a]));
  }
  if (!(reach <= w.grid.outermost)) return j + 1;
  const int32_t level = kNested ? level_of(w.grid, reach) : 0;
  const float scale = kNested ? bits_to_float(uint32_t(127 - level) << 23) : 1.f;
  const float unscale = kNested ? bits_to_float(uint32_t(127 + level) << 23) : 1.f;
  int32_t block[3];
  for (int a = 0; a < 3; ++a) block[a] = cell_of(point[a], scale, w.grid.half_size[a], w.grid.size[a]) / kBlock;
  const int64_t index = ((int64_t(level) * w.block_count[0] + block[0]) * w.block_count[1] + block[1]) * w.block_count[2] + block[2];
  if (w.blocks[index]) return j;
  float leave = 3e38f;
  for (int a = 0; a < 3; ++a) {
    const bool forward = ray.velocity[a] > 0.f;
    int32_t face = (block[a] + (forward ? 1 : 0)) * kBlock;
    face = face < w.grid.size[a] ? face : w.grid.size[a];
    const float wall = (float(face) / w.grid.half_size[a] - 1.f) * unscale;
    const float reached = (wall - point[a]) / ray.velocity[a];
    if (ray.velocity[a] != 0.f) leave = min_of(leave, reached);
  }
  // Intervals grow along the ray: their length where the block ends is the longest.
  const float longest = kCone ? max_of(w.step, w.cone_angle * absolute_time(ray, time + leave)) : w.step;
  const float caution = 0.01f + 1e-6f * float(ray.count);
  const float steps = min_of(ceilf(leave / longest - caution), float(ray.count));
  return j + (steps > 1.f ? int32_t(steps) : 1);
}

constexpr int kTimes = 40;  // 33 are wanted; whole vectors are computed

inline void cone_times(const MarchRay& ray, float step, double cone_rate, int32_t j, float* times) {
  const MarchRay r = ray;
  for (int32_t i = 0; i < kTimes; ++i) times[i] = lattice_time<true>(r, step, cone_rate, float(j + i));
}

// Bit i: interval j + i has its middle in an occupied cell.
template <bool kCone, bool kNested>
inline uint32_t test_32(const Walker& w, const MarchRay& ray, int32_t j) {
  uint32_t hits = 0;
  const MarchGrid grid = w.grid;
  const MarchRay r = ray;
  if (kCone) {
    alignas(64) float times[kTimes];
    cone_times(r, w.step, w.cone_rate, j, times);
    for (int32_t i = 0; i < 32; ++i) hits |= occupied_at<kNested>(grid, r, 0.5f * (times[i] + times[i + 1])) << i;
    return hits;
  }
  const float step = w.step, first = float(j) + 0.5f;
  for (int32_t i = 0; i < 32; ++i) hits |= occupied_at<kNested>(grid, r, (first + float(i)) * step) << i;
  return hits;
}

// Walk on from runs.next until the ray ends or the slots are nearly full; returns whether the ray has ended.
template <bool kCone, bool kNested>
__attribute__((noinline)) bool walk(const Walker& w, const MarchRay& ray, MarchRuns& runs) {
  const bool tail = ray.tail_middle >= 0.f;
  const int32_t whole = ray.count - (tail ? 1 : 0);
  int32_t used = 0, j = runs.next;
  const auto add = [&](int32_t first, int32_t length) {
    if (used > 0 && runs.first[used - 1] + runs.length[used - 1] == first) {
      runs.length[used - 1] += length;
    } else {
      runs.first[used] = first;
      runs.length[used++] = length;
    }
  };
  while (j < whole && used <= kMarchRunSlots - 17) {
    const int32_t next = skip<kCone, kNested>(w, ray, j);
    if (next != j) {
      j = next;
      continue;
    }
    uint32_t hits = test_32<kCone, kNested>(w, ray, j);
    if (whole - j < 32) hits &= (1u << (whole - j)) - 1u;
    while (hits) {
      const int32_t first = __builtin_ctz(hits);
      const uint32_t rest = ~(hits >> first);
      const int32_t length = rest ? __builtin_ctz(rest) : 32;
      add(j + first, length);
      hits &= first + length >= 32 ? 0u : ~0u << (first + length);
    }
    j += 32;
  }
  if (j >= whole && j < INT32_MAX && used < kMarchRunSlots) {
    if (tail && occupied_at<kNested>(w.grid, ray, ray.tail_middle)) add(whole, 1);
    j = INT32_MAX;
  }
  runs.used = used;
  runs.next = j;
  return j == INT32_MAX;
}

bool walk_any(const MarchRaysParams& p, const Walker& w, const MarchRay& ray, MarchRuns& runs) {
  const bool nested = p.levels > 1;
  if (p.cone_angle > 0.) return nested ? walk<true, true>(w, ray, runs) : walk<true, false>(w, ray, runs);
  return nested ? walk<false, true>(w, ray, runs) : walk<false, false>(w, ray, runs);
}

// A block may be jumped over if none of its cells is occupied and, outside level 0, none of them lies in the middle
// part, which belongs to the next inner level.
void mark_blocks(const MarchRaysParams& p) {
  const int32_t bx = (p.x + kBlock - 1) / kBlock, by = (p.y + kBlock - 1) / kBlock, bz = (p.z + kBlock - 1) / kBlock;
  const auto overlaps_middle = [](int32_t block, int32_t size) {
    return 4 * (block + 1) * kBlock > size && 4 * block * kBlock < 3 * size;
  };
  parallel_for(int64_t(p.levels) * bx, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slab = begin; slab < end; ++slab) {
      const int32_t level = int32_t(slab / bx), i = int32_t(slab % bx);
      for (int32_t j = 0; j < by; ++j)
        for (int32_t k = 0; k < bz; ++k) {
          const bool middle = level > 0 && overlaps_middle(i, p.x) && overlaps_middle(j, p.y) && overlaps_middle(k, p.z);
          p.blocks[(slab * by + j) * bz + k] = middle;
        }
      for (int32_t x = i * kBlock; x < (i + 1) * kBlock && x < p.x; ++x)
        for (int32_t y = 0; y < p.y; ++y) {
          const uint8_t* row = p.binaries + ((int64_t(level) * p.x + x) * p.y + y) * p.z;
          uint8_t* marks = p.blocks + (slab * by + y / kBlock) * bz;
          int32_t z = 0;
          for (; z + kBlock <= p.z; z += kBlock) {
            uint64_t eight;
            std::memcpy(&eight, row + z, 8);
            marks[z / kBlock] |= uint8_t(eight != 0);
          }
          for (; z < p.z; ++z) marks[z / kBlock] |= uint8_t(row[z] != 0);
        }
    }
  });
}

void pack_bits(const MarchRaysParams& p) {
  const int64_t cells = int64_t(p.levels) * p.x * p.y * p.z, words = (cells + 31) / 32, whole = cells / 32;
  parallel_for(words, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t word = begin; word < end; ++word) {
      if (word >= whole) {
        p.bits[word] = pack_word(p.binaries, cells, word);
        continue;
      }
      uint32_t bits = 0;
      for (int part = 0; part < 4; ++part) {
        uint64_t eight;  // bytes that are 0 or 1; the product gathers their lowest bits in the top byte
        std::memcpy(&eight, p.binaries + word * 32 + part * 8, 8);
        bits |= uint32_t((eight * 0x0102040810204080ull) >> 56) << (8 * part);
      }
      p.bits[word] = bits;
    }
  });
}

// Write samples [out, out + length) of a run, as far as there is room.
void write_run(const MarchRaysParams& p, const Walker& w, const MarchRay& ray, int64_t r, int64_t out, int32_t first,
               int32_t length) {
  if (out + length > p.capacity) length = out < p.capacity ? int32_t(p.capacity - out) : 0;
  int32_t* __restrict ids = p.ray_ids + out;
  float* __restrict starts = p.t_starts + out;
  float* __restrict ends = p.t_ends + out;
  const MarchRay state = ray;
  const float step = w.step;
  if (p.cone_angle > 0.) {
    for (int32_t begin = 0; begin < length; begin += 32) {
      alignas(64) float times[kTimes];
      cone_times(state, step, w.cone_rate, first + begin, times);
      const int32_t count = length - begin < 32 ? length - begin : 32;
      for (int32_t i = 0; i < count; ++i) {
        ids[begin + i] = int32_t(r);
        starts[begin + i] = absolute_time(state, times[i]);
        ends[begin + i] = min_of(absolute_time(state, times[i + 1]), state.far);
      }
    }
    return;
  }
  for (int32_t i = 0; i < length; ++i) {
    ids[i] = int32_t(r);
    starts[i] = absolute_time(state, float(first + i) * step);
    ends[i] = min_of(absolute_time(state, float(first + i + 1) * step), state.far);
  }
}

}  // namespace

void march_rays_count(const MarchRaysParams& p) {
  pack_bits(p);
  mark_blocks(p);
  const Walker walker(p);
  for (int i = 0; i < 4; ++i) p.info[i] = 0;
  parallel_for(p.ray_count, kRaysPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      MarchRay& ray = p.rays[r];
      MarchRuns& runs = p.runs[r];
      const int flag = set_up_ray(p, r, ray);
      if (flag) __atomic_store_n(p.info + flag, int64_t(1), __ATOMIC_RELAXED);
      runs.used = runs.next = 0;
      int64_t count = 0;
      bool ended = ray.count == 0 || walk_any(p, walker, ray, runs);
      for (int32_t i = 0; i < runs.used; ++i) count += runs.length[i];
      if (!ended) {
        MarchRuns more;
        more.next = runs.next;
        while (!ended) {
          ended = walk_any(p, walker, ray, more);
          for (int32_t i = 0; i < more.used; ++i) count += more.length[i];
        }
      } else {
        runs.next = INT32_MAX;
      }
      p.ray_offsets[r + 1] = int32_t(count);
    }
  });
  int64_t total = 0;
  p.ray_offsets[0] = 0;
  const int64_t limit = p.capacity >= 0 ? p.capacity : INT32_MAX;
  for (int64_t r = 0; r < p.ray_count; ++r) {
    total += p.ray_offsets[r + 1];
    p.ray_offsets[r + 1] = int32_t(total < limit ? total : limit);
  }
  p.info[kMarchFound] = total;
  p.info[kMarchTooManySamples] = total > limit && p.capacity < 0;
  *p.overflow = p.capacity >= 0 && total > p.capacity;
}

void march_rays_emit(const MarchRaysParams& p) {
  const Walker walker(p);
  parallel_for(p.ray_count, kRaysPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const MarchRay& ray = p.rays[r];
      const MarchRuns& runs = p.runs[r];
      int64_t out = p.ray_offsets[r];
      for (int32_t i = 0; i < runs.used; out += runs.length[i++]) write_run(p, walker, ray, r, out, runs.first[i], runs.length[i]);
      if (runs.next == INT32_MAX) continue;
      MarchRuns more;
      more.next = runs.next;
      bool ended = false;
      while (!ended && out < p.capacity) {
        ended = walk_any(p, walker, ray, more);
        for (int32_t i = 0; i < more.used; out += more.length[i++]) write_run(p, walker, ray, r, out, more.first[i], more.length[i]);
      }
    }
  });
  const int64_t total = p.ray_offsets[p.ray_count];
  parallel_for(p.capacity - total, 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = total + begin; i < total + end; ++i) p.ray_ids[i] = 0, p.t_starts[i] = 0.f, p.t_ends[i] = 0.f;
  });
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
