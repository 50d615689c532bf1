// The grid of a fused kernel of a CPU, three dimensions, on points in lanes: values and Jacobian in one look-up, and
// gradients through both in one scatter. Points are [3, stride]; features are in panels, see mlp/tile.h:
// [panel][level, F][kPanel], Jacobians [panel][level, F, 3][kPanel]. For .cpp files only.
#pragma once
#include "hash_grid/corners.h"
#include "mlp/tile.h"

namespace text3d {
namespace TEXT3D_ISA {

// Tables up to this size stay near while tiles pass by; entries of larger ones are asked for ahead of their use.
constexpr int64_t kNear = 64 << 10;

using Cell3 = HashGridCell<Floats, Uints, 3>;

// The cell of the lanes from i on; with the clip, what is outside [0, 1] has no output.
inline Cell3 cell_of(const HashGridLevel& level, const float* x, int64_t stride, int64_t i) {
  Floats at[3], keep = constant<Floats>(1.f);
  for (int d = 0; d < 3; ++d) {
    at[d] = load_lanes(x + d * stride + i);
    if (level.clip) keep = select((at[d] >= 0.f) & (at[d] <= 1.f), keep, Floats{});
  }
  return Cell3(level, at, keep);
}

// Values at the corners to the value and its derivatives, axis by axis.
template <bool Slopes>
inline void interpolate(const Cell3& cell, const Floats (&theta)[8], Floats& value, Floats (&slopes)[3]) {
  Floats v[4], by0[4], w[2], u0[2], u1[2];
  for (int i = 0; i < 4; ++i) {
    v[i] = cell.weight[0][0] * theta[2 * i] + cell.weight[0][1] * theta[2 * i + 1];
    if (Slopes) by0[i] = cell.slope[0] * (theta[2 * i + 1] - theta[2 * i]);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats step = v[2 * i + 1] - v[2 * i];
    w[i] = v[2 * i] + cell.weight[1][1] * step;
    if (Slopes) u1[i] = cell.slope[1] * step, u0[i] = by0[2 * i] + cell.weight[1][1] * (by0[2 * i + 1] - by0[2 * i]);
  }
  value = w[0] + cell.weight[2][1] * (w[1] - w[0]);
  if (!Slopes) return;
  slopes[0] = u0[0] + cell.weight[2][1] * (u0[1] - u0[0]);
  slopes[1] = u1[0] + cell.weight[2][1] * (u1[1] - u1[0]);
  slopes[2] = cell.slope[2] * (w[1] - w[0]);
}

// The other way: a cotangent g of the value, and q of its derivative along a direction, to those at the corners.
template <bool Slopes>
inline void spread(const Cell3& cell, const Floats (&along)[3], Floats g, Floats q, Floats (&theta)[8]) {
  Floats part[8], slope_part[8];
  part[0] = g, slope_part[0] = q;
  for (int d = 0; d < 3; ++d) {
    const Floats tilt = Slopes ? cell.slope[d] * along[d] : Floats{};
    for (int i = (1 << d) - 1; i >= 0; --i) {
      const Floats value = part[i], slope = slope_part[i];
      part[i] = value * cell.weight[d][0], part[i + (1 << d)] = value * cell.weight[d][1];
      if (!Slopes) continue;
      part[i] -= slope * tilt, part[i + (1 << d)] += slope * tilt;
      slope_part[i] = slope * cell.weight[d][0], slope_part[i + (1 << d)] = slope * cell.weight[d][1];
    }
  }
  for (int c = 0; c < 8; ++c) theta[c] = part[c];
}

// Both corners along the first axis, entries of two features that are neighbours in memory, in one read.
inline void gather_pairs(const float* table, Uints index, Floats* out) {
  alignas(64) uint32_t lanes[kLanes];
  std::memcpy(lanes, &index, sizeof lanes);
  const float* from[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = table + int64_t(lanes[lane]) * 2;
  load_rows(from, out[0], out[1], out[2], out[3]);
}

// One level at `count` points. y and jacobian (with Slopes) are those of the level's first feature in the first panel.
template <int F, bool Hashed, bool Slopes>
__attribute__((flatten)) void encode_level(HashGridLevel level, const float* x, int64_t stride, int count,
                                           const float* table, int64_t features, float* y, float* jacobian) {
  level.hashed = Hashed;
  const float* entries = table + int64_t(level.first) * F;
  const bool far = int64_t(level.count) * F * int64_t(sizeof(float)) > kNear;
  for (int i = 0; i < count; i += kLanes) {
    const int ahead = i + kAhead * kLanes;
    if (far && ahead < count) {
      const Cell3 next = cell_of(level, x, stride, ahead);
      for (int c = 0; c < 8; ++c) {
        const Uints index = next.index(level, c);
        alignas(64) uint32_t lanes[kLanes];
        std::memcpy(lanes, &index, sizeof lanes);
        prefetch(entries, lanes, F * sizeof(float));
      }
    }
    const Cell3 cell = cell_of(level, x, stride, i);
    Floats theta[8][F];
    for (int c = 0; c < 8; c += 2) {
      const Uints index = cell.index(level, c), next = cell.index(level, c + 1);
      if (F == 2 && !Hashed && !any((Ints)(next - index != 1u))) {
        gather_pairs(entries, index, theta[c]);
      } else {
        gather<F>(entries, index, theta[c]);
        gather<F>(entries, next, theta[c + 1]);
      }
    }
    const int64_t panel = i / kPanel, lane = i % kPanel;
    for (int f = 0; f < F; ++f) {
      Floats corners[8], value, slopes[3];
      for (int c = 0; c < 8; ++c) corners[c] = theta[c][f];
      interpolate<Slopes>(cell, corners, value, slopes);
      store_lanes(y + (panel * features + f) * kPanel + lane, value);
      for (int d = 0; Slopes && d < 3; ++d)
        store_lanes(jacobian + ((panel * features + f) * 3 + d) * kPanel + lane, slopes[d]);
    }
  }
}

// The active levels at `count` points; what belongs to the others is left alone. jacobian may be null.
template <int F>
void encode_tile(const HashGridLayout& layout, const float* table, const float* x, int64_t stride, int count, float* y,
                 float* jacobian) {
  for (int l = 0; l < layout.active_levels; ++l) {
    const HashGridLevel level = hash_grid_level(layout, l);
    const auto run = jacobian ? level.hashed ? encode_level<F, true, true> : encode_level<F, false, true>
                              : level.hashed ? encode_level<F, true, false> : encode_level<F, false, false>;
    run(level, x, stride, count, table, int64_t(layout.levels) * F, y + l * F * kPanel,
        jacobian ? jacobian + l * F * 3 * kPanel : nullptr);
  }
}

// Points whose gradients go into the table.
struct ScatterPoints {
  const float* x;      // [3, stride]
  const float* along;  // [3, stride]: directions of the derivatives whose cotangents are q, or null
  const float* g;      // [panel][level, F][kPanel], cotangents of the values
  const float* q;      // likewise
  const float* used;   // [stride]: 0 for points that add nothing
  int64_t stride, count;
};

// One level's part of them: entries low to low + span - 1, or all if that is the level.
template <int F, bool Hashed, bool Slopes>
__attribute__((flatten)) void scatter_level(HashGridLevel level, const ScatterPoints& points, int64_t features, int first,
                                            uint32_t low, uint32_t span, float* table) {
  level.hashed = Hashed;
  constexpr int kGroups = 8 * F / 4, kRing = 4, kPart = F < 4 ? F : 4;
  static_assert(kAhead < kRing, "a block is still in use when its place is taken");
  const bool whole = span == level.count;
  const bool far = whole && int64_t(level.count) * F * int64_t(sizeof(float)) > kNear;
  float* entries = table + int64_t(level.first) * F;
  struct Pending {
    alignas(64) uint32_t index[8][kLanes];
    alignas(64) float sums[kGroups][kLanes][4];  // corners and their features
    bool pairs;
  } ring[kRing];
  const auto fill = [&](int64_t i, Pending& block) {
    const Cell3 cell = cell_of(level, points.x, points.stride, i);
    const int64_t at = (i / kPanel * features + first) * kPanel + i % kPanel;
    Floats along[3] = {}, sums[8 * F];
    for (int d = 0; Slopes && d < 3; ++d) along[d] = load_lanes(points.along + d * points.stride + i);
    for (int f = 0; f < F; ++f) {
      Floats corners[8];
      spread<Slopes>(cell, along, load_lanes(points.g + at + f * kPanel),
                     Slopes ? load_lanes(points.q + at + f * kPanel) : Floats{}, corners);
      for (int c = 0; c < 8; ++c) sums[c * F + f] = corners[c];
    }
    for (int group = 0; group < kGroups; ++group)
      store_rows(block.sums[group], sums[4 * group], sums[4 * group + 1], sums[4 * group + 2], sums[4 * group + 3]);
    block.pairs = F == 2 && !Hashed && whole;
    for (int c = 0; c < 8; c += 2) {
      const Uints index = cell.index(level, c), next = cell.index(level, c + 1);
      std::memcpy(block.index[c], &index, sizeof index);
      std::memcpy(block.index[c + 1], &next, sizeof next);
      if (block.pairs) block.pairs = !any((Ints)(next - index != 1u));
    }
    for (int c = 0; far && c < 8; ++c) prefetch(entries, block.index[c], F * sizeof(float));
  };
  for (int64_t i = -kAhead * kLanes; i < points.count; i += kLanes) {
    const int64_t ahead = i + kAhead * kLanes;
    if (ahead < points.count) fill(ahead, ring[ahead / kLanes % kRing]);
    if (i < 0) continue;
    const Pending& block = ring[i / kLanes % kRing];
    for (int lane = 0; lane < kLanes; ++lane) {
      if (points.used[i + lane] == 0.f) continue;
      if (block.pairs) {
        for (int c = 0; c < 8; c += 2) {
          float* entry = entries + int64_t(block.index[c][lane]) * F;
          Row<4> sum;
          sum.load(entry);
          sum.add(1.f, block.sums[c / 2 % kGroups][lane]);
          sum.store(entry);
        }
        continue;
      }
      for (int c = 0; c < 8; ++c) {
        const uint32_t index = block.index[c][lane];
        if (!whole && index - low >= span) continue;
        for (int f = 0; f < F; f += kPart) {
          float* entry = entries + int64_t(index) * F + f;
          Row<kPart> sum;
          sum.load(entry);
          sum.add(1.f, block.sums[(c * F + f) / 4][lane] + (c * F + f) % 4);
          sum.store(entry);
        }
      }
    }
  }
}

template <int F>
void scatter_level(const HashGridLayout& layout, int l, const ScatterPoints& points, uint32_t low, uint32_t span,
                   float* table) {
  const HashGridLevel level = hash_grid_level(layout, l);
  const auto run = points.along ? level.hashed ? scatter_level<F, true, true> : scatter_level<F, false, true>
                                : level.hashed ? scatter_level<F, true, false> : scatter_level<F, false, false>;
  run(level, points, int64_t(layout.levels) * F, l * F, low, span, table);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
