// The hash grid at 16 points, for a warp: a lane takes a point and every second level, lanes p and p + 16 share point p.
// Features are rows of matrices in shared memory, `stride` floats apart. Tables are float32. For .cu files only.
#pragma once
#include <type_traits>
#include "hash_grid/entries.h"
#include "hash_grid/hash_grid.h"

namespace text3d {
namespace TEXT3D_ISA {

// The sum of both lanes of a point, in both.
__device__ __forceinline__ float sum_of_point(float x) { return x + __shfl_xor_sync(~0u, x, 16); }

// Runs of the 16 points that share a key: sums over a run, kept by its last point. All lanes must call.
struct PointRuns {
  int offset;  // of this point within its run
  bool last;   // does it end its run?

  // head: does a run begin at this point?
  __device__ __forceinline__ explicit PointRuns(bool head) {
    const int point = int(threadIdx.x) % 16;
    const unsigned half = __ballot_sync(~0u, head || point == 0) >> (threadIdx.x & 16) & 0xffffu;
    offset = __clz(int(half << (31 - point)));  // bits above this point are shifted out
    last = point == 15 || (half >> (point + 1) & 1u);
  }
  // The sum from the begin of the run up to this point.
  __device__ __forceinline__ float sum(float value) const {
    TEXT3D_UNROLL
    for (int by = 1; by < 16; by *= 2) {
      const float other = __shfl_up_sync(~0u, value, by);
      if (offset >= by) value += other;
    }
    return value;
  }
  __device__ __forceinline__ float product(float value) const {
    TEXT3D_UNROLL
    for (int by = 1; by < 16; by *= 2) {
      const float other = __shfl_up_sync(~0u, value, by);
      if (offset >= by) value *= other;
    }
    return value;
  }
};

// One lane's point. Methods in which all lanes must take part say so.
template <int D>
struct GridPoint {
  static constexpr int kCorners = 1 << D;
  const HashGridLayout& l;
  float x[D], keep;
  bool real;  // the others have features of 0 and pass nothing back
  int point, half;

  __device__ __forceinline__ GridPoint(const HashGridLayout& l, const float* at, bool real)
      : l(l), keep(1.f), real(real), point(int(threadIdx.x) % 16), half(int(threadIdx.x) % 32 / 16) {
    TEXT3D_UNROLL
    for (int d = 0; d < D; ++d) {
      x[d] = at[d];
      if (l.clip) keep = inside_unit(x[d], keep);
    }
  }

  // body(number of features as a constant, the first of them): two at a time where there are several
  template <class Body>
  __device__ __forceinline__ void for_features(const Body& body) const {
    if (l.features == 1) return body(std::integral_constant<int, 1>(), 0);
    for (int f = 0; f < l.features; f += 2) body(std::integral_constant<int, 2>(), f);
  }

  // body(corner, features [N] at it) for all corners of a cell
  template <int N, class Cell, class Body>
  __device__ __forceinline__ void for_corners(const float* table, const HashGridLevel& level, const Cell& cell, int f,
                                              const Body& body) const {
    const float* entries = table + int64_t(level.first) * l.features + f;
    const bool pairs = l.features == 2 && ((level.first | level.count) & 1u) == 0;
    TEXT3D_UNROLL
    for (int c = 0; c < kCorners; c += 2) {
      if (c > 0 && level.nearest) break;
      const uint32_t a = cell.index(level, c), b = cell.index(level, c + 1);
      float at_a[N], at_b[N];
      if (N == 2 && pairs) {
        load_pair<N>(entries, true, a, b, at_a, at_b);
      } else {
        load_values<N>(entries + int64_t(a) * l.features, at_a);
        load_values<N>(entries + int64_t(b) * l.features, at_b);
      }
      body(c, at_a);
      if (!level.nearest) body(c + 1, at_b);
    }
  }

  // features [16, levels * F] = weigh(cell, corner) times the corners' features, summed
  template <class Weigh>
  __device__ __forceinline__ void weighted(const float* table, int stride, float* features, const Weigh& weigh) const {
    float* row = features + point * stride;
    for (int k = half; k < l.levels; k += 2) {
      const HashGridLevel level = hash_grid_level(l, k);
      const HashGridCell<float, uint32_t, D> cell(level, x, keep);
      for_features([&](auto count, int f) {
        constexpr int N = decltype(count)::value;
        float sum[N] = {};
        if (real && k < l.active_levels)
          for_corners<N>(table, level, cell, f, [&](int c, const float* theta) {
            const float weight = weigh(cell, c);
            TEXT3D_UNROLL
            for (int n = 0; n < N; ++n) sum[n] += weight * theta[n];
          });
        TEXT3D_UNROLL
        for (int n = 0; n < N; ++n) row[k * l.features + f + n] = sum[n];
      });
    }
    __syncwarp();
  }

  // The encoding.
  __device__ __forceinline__ void encode(const float* table, int stride, float* features) const {
    weighted(table, stride, features, [](const auto& cell, int c) { return cell.value(c); });
  }

  // Its derivative along a direction.
  __device__ __forceinline__ void encode_along(const float* table, const float* direction, int stride,
                                               float* features) const {
    weighted(table, stride, features, [&](const auto& cell, int c) { return cell.along(c, direction); });
  }

  // gradient [D] = cotangents [16, levels * F] times the derivative of the encoding. All lanes.
  __device__ __forceinline__ void pull_back(const float* table, const float* cotangents, int stride,
                                            float* gradient) const {
    const float* row = cotangents + point * stride;
    TEXT3D_UNROLL
    for (int d = 0; d < D; ++d) gradient[d] = 0.f;
    for (int k = half; k < (nearest(l) || !real ? 0 : l.active_levels); k += 2) {
      const HashGridLevel level = hash_grid_level(l, k);
      const HashGridCell<float, uint32_t, D> cell(level, x, keep);
      for_features([&](auto count, int f) {
        constexpr int N = decltype(count)::value;
        for_corners<N>(table, level, cell, f, [&](int c, const float* theta) {
          float dot = 0.f;
          TEXT3D_UNROLL
          for (int n = 0; n < N; ++n) dot += theta[n] * row[k * l.features + f + n];
          TEXT3D_UNROLL
          for (int d = 0; d < D; ++d) gradient[d] += cell.first(c, d) * dot;
        });
      });
    }
    TEXT3D_UNROLL
    for (int d = 0; d < D; ++d) gradient[d] = sum_of_point(gradient[d]);
    __syncwarp();  // the cotangents are no longer read
  }

  // gradient of the table += the encoding's pull-back of cotangents [16, levels * F] and, unless null, of `also` through
  // its derivative along the direction. Points in a row that share a cell are summed first. All lanes.
  __device__ __forceinline__ void scatter(const float* cotangents, const float* also, const float* direction, int stride,
                                          float* gradient) const {
    for (int begin = 0; begin < l.active_levels; begin += 2) {
      const int k = begin + half < l.active_levels ? begin + half : begin;
      const bool adds = real && begin + half < l.active_levels;
      const HashGridLevel level = hash_grid_level(l, k);
      const HashGridCell<float, uint32_t, D> cell(level, x, adds ? keep : 0.f);
      bool head = false;
      TEXT3D_UNROLL
      for (int d = 0; d < D; ++d) head |= __shfl_up_sync(~0u, cell.term[d][0], 1) != cell.term[d][0];
      head |= __shfl_up_sync(~0u, int(adds), 1) != int(adds);
      const PointRuns runs(head);
      const bool together = __popc(__ballot_sync(~0u, runs.last)) <= 16;
      const float* row = cotangents + point * stride + k * l.features;
      const float* other = also ? also + point * stride + k * l.features : nullptr;
      for_features([&](auto count, int f) {
        constexpr int N = decltype(count)::value;
        float* entries = gradient + int64_t(level.first) * l.features + f;
        TEXT3D_UNROLL
        for (int c = 0; c < kCorners; ++c) {
          if (c > 0 && level.nearest) break;
          const float weight = cell.value(c), slope = other ? cell.along(c, direction) : 0.f;
          float values[N];
          TEXT3D_UNROLL
          for (int n = 0; n < N; ++n) {
            values[n] = adds ? weight * row[f + n] : 0.f;
            if (other && adds) values[n] += slope * other[f + n];
            if (together) values[n] = runs.sum(values[n]);
          }
          if (adds && (!together || runs.last)) add_values<N>(entries + int64_t(cell.index(level, c)) * l.features, values);
        }
      });
    }
  }
};

}  // namespace TEXT3D_ISA
}  // namespace text3d
