// What the CPU loops of the hash grid are made of: points in lanes, entries of tables in registers, and the corners of
// blocks of cells, asked for before they are read.
#pragma once
#include <atomic>
#include <stdexcept>
#include <string>
#include "common/lanes.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

inline Floats split_position(Floats position, Uints& cell) {
  const Floats bounded = min_of(max_of(position, broadcast(-2147483648.f)), broadcast(2147483520.f));
  Ints whole = __builtin_convertvector(bounded, Ints);
  whole += bounded < __builtin_convertvector(whole, Floats);  // truncation went up: -1 where the comparison holds
  cell = (Uints)whole;
  return bounded - __builtin_convertvector(whole, Floats);
}

inline Uints wrap_index(Uints index, uint32_t count) {
  index = min_of(index, index - count);  // enough for any point in [0, 1]: it is below 2 count
  if (__builtin_expect(any((Ints)(index >= count)), 0))
    for (int lane = 0; lane < kLanes; ++lane) index[lane] %= count;
  return index;
}

}  // namespace TEXT3D_ISA
}  // namespace text3d

#include "hash_grid/hash_grid.h"

namespace text3d {
namespace TEXT3D_ISA {

constexpr int64_t kChunk = 8192;          // points of one task of a pass by point or by level
constexpr int64_t kBatch = 65536;         // points that a pass by level keeps level by level at a time, at most
constexpr int64_t kStaged = 8 << 20;      // and the bytes of their features, if that is at least a chunk

// Points [begin, end) axis by axis, padded to whole lanes with copies of the last.
template <int D>
struct Points {
  int64_t count = 0, stride = 0;
  Array<float> memory;

  explicit Points(int64_t most) : stride((most + kLanes - 1) / kLanes * kLanes), memory(size_t(stride * (D + 1))) {}

  // Returns a point that is not finite, or -1.
  int64_t load(const float* x, int64_t begin, int64_t end, bool clip) {
    count = end - begin;
    const int64_t bad = fill(x + begin * D, 0, count, clip);
    return bad < 0 ? bad : begin + bad;
  }

  // The same by all threads.
  int64_t load_together(const float* x, int64_t begin, int64_t end, bool clip) {
    count = end - begin;
    std::atomic<int64_t> bad{-1};
    parallel_for(count, kChunk, [&](int64_t first, int64_t last) {
      const int64_t found = fill(x + begin * D, first, last, clip);
      if (found >= 0) bad = begin + found;
    });
    return bad;
  }

  int64_t fill(const float* x, int64_t first, int64_t last, bool clip) {
    float* keep = memory + D * stride;
    int64_t bad = -1;
    const int64_t end = last < count ? last : (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = first; i < end; ++i) {
      const float* point = x + (i < count ? i : count - 1) * D;
      float inside = 1.f, zero = 0.f;
      for (int d = 0; d < D; ++d) {
        memory[d * stride + i] = point[d];
        inside = inside_unit(point[d], inside);
        zero += point[d] - point[d];
      }
      keep[i] = clip ? inside : 1.f;
      if (!(zero == 0.f) && bad < 0) bad = i < count ? i : count - 1;
    }
    return bad;
  }

  void lanes(int64_t i, Floats* x, Floats& keep) const {
    for (int d = 0; d < D; ++d) x[d] = load_lanes(memory + d * stride + i);
    keep = load_lanes(memory + D * stride + i);
  }
};

[[noreturn]] inline void refuse(const float* x, int dim, int64_t point) {
  std::string message = "x: expected finite values, got (";
  for (int d = 0; d < dim; ++d) message += (d ? ", " : "") + std::to_string(x[point * dim + d]);
  throw std::invalid_argument(message + ") at point " + std::to_string(point));
}

// The features of all corners of a block of cells. Out of line: one copy serves every pass, and it is bound by memory.
template <int C, int F, class T>
__attribute__((noinline)) void gather_corners(const void* table, const HashGridLevel& level, const Uints* index,
                                              Floats (*theta)[F]) {
  const T* entries = static_cast<const T*>(table) + int64_t(level.first) * F;
  for (int c = 0; c < C; ++c) gather<F>(entries, index[c], theta[c]);
}

template <int C, int F>
inline void gather_corners(const void* table, int dtype, const HashGridLevel& level, const Uints* index,
                           Floats (*theta)[F]) {
  if (dtype == 0) gather_corners<C, F, float>(table, level, index, theta);
  else if (dtype == 1) gather_corners<C, F, half_t>(table, level, index, theta);
  else gather_corners<C, F, bfloat16_t>(table, level, index, theta);
}

// Rows of `from` [N, levels, F]: lane i reads row[i * levels]. Lanes beyond `valid` repeat the last valid one.
template <int F>
inline void load_rows(const float* row, int levels, int valid, Floats* out) {
  alignas(64) uint32_t step[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) step[lane] = uint32_t((lane < valid ? lane : valid - 1) * levels);
  Uints index;
  std::memcpy(&index, step, sizeof index);
  gather<F>(row, index, out);
}

template <int F>
inline void store_rows(float* row, int64_t stride, int valid, const Floats* values) {
  alignas(64) float staged[F][kLanes];
  for (int f = 0; f < F; ++f) store_lanes(staged[f], values[f]);
  for (int lane = 0; lane < valid; ++lane)
    for (int f = 0; f < F; ++f) row[lane * stride + f] = staged[f][lane];
}

template <int F>
inline void store_zero(float* row, int64_t stride, int valid) {
  for (int lane = 0; lane < valid; ++lane)
    for (int f = 0; f < F; ++f) row[lane * stride + f] = 0.f;
}

// F floats of a table entry in one register.
template <int F>
struct Row {
  typedef float Vector __attribute__((vector_size(4 * F)));
  Vector value = {};

  void add(float weight, const float* from) {
    Vector other;
    std::memcpy(&other, from, sizeof other);
    value += weight * other;
  }
  template <class T>
  void add(float weight, const T* from) {
    float other[F];
    load_floats<F>(from, other);
    add(weight, other);
  }
  void load(const float* from) { std::memcpy(&value, from, sizeof value); }
  void store(float* to) const { std::memcpy(to, &value, sizeof value); }
};

template <>
struct Row<1> {
  float value = 0.f;
  template <class T>
  void add(float weight, const T* from) { value += weight * load_float(*from); }
  void load(const float* from) { value = *from; }
  void store(float* to) const { *to = value; }
};

#if defined(__SSE2__)
template <>
struct Row<2> {  // in half a register of 16 bytes: GCC 12 passes vectors of 8 through general registers
  __m128 value = _mm_setzero_ps();
  static __m128 pair(const float* from) { return _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(from))); }
  static __m128 pair(const bfloat16_t* from) {
    int32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_cvtsi32_si128(bits)));
  }
  static __m128 pair(const half_t* from) {
#if defined(__F16C__)
    int32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return _mm_cvtph_ps(_mm_cvtsi32_si128(bits));
#else
    return _mm_setr_ps(load_float(from[0]), load_float(from[1]), 0.f, 0.f);
#endif
  }
  template <class T>
  void add(float weight, const T* from) { value += _mm_set1_ps(weight) * pair(from); }
  void load(const float* from) { value = pair(from); }
  void store(float* to) const { _mm_storel_pi(reinterpret_cast<__m64*>(to), value); }
};
#endif

// F floats at column c of row r of `from` go to row c, column r of `to`; strides in floats.
template <int F>
inline void transpose_entries(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                              int64_t to_stride) {
  int64_t r = 0;
#if defined(__AVX2__)
  if constexpr (F == 2) {
    const auto load = [](const float* at) { return _mm256_castps_pd(_mm256_loadu_ps(at)); };
    const auto store = [](float* at, __m256d pairs) { _mm256_storeu_ps(at, _mm256_castpd_ps(pairs)); };
    for (; r + 4 <= rows; r += 4) {
      int64_t c = 0;
      for (; c + 4 <= columns; c += 4) {
        const float* corner = from + r * from_stride + c * F;
        const __m256d row0 = load(corner), row1 = load(corner + from_stride);
        const __m256d row2 = load(corner + 2 * from_stride), row3 = load(corner + 3 * from_stride);
        const __m256d even01 = _mm256_unpacklo_pd(row0, row1), odd01 = _mm256_unpackhi_pd(row0, row1);
        const __m256d even23 = _mm256_unpacklo_pd(row2, row3), odd23 = _mm256_unpackhi_pd(row2, row3);
        float* out = to + c * to_stride + r * F;
        store(out, _mm256_permute2f128_pd(even01, even23, 0x20));
        store(out + to_stride, _mm256_permute2f128_pd(odd01, odd23, 0x20));
        store(out + 2 * to_stride, _mm256_permute2f128_pd(even01, even23, 0x31));
        store(out + 3 * to_stride, _mm256_permute2f128_pd(odd01, odd23, 0x31));
      }
      for (; c < columns; ++c)
        for (int k = 0; k < 4; ++k)
          std::memcpy(to + c * to_stride + (r + k) * F, from + (r + k) * from_stride + c * F, F * sizeof(float));
    }
  }
#endif
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      std::memcpy(to + c * to_stride + r * F, from + r * from_stride + c * F, F * sizeof(float));
}

// One block: cells and indices of one level.
template <int D>
struct Block {
  static constexpr int C = 1 << D;
  HashGridCell<Floats, Uints, D> cell;
  Uints index[C];
  Block(const HashGridLevel& level, const Floats* x, Floats keep) : cell(level, x, keep) {
    for (int c = 0; c < C; ++c) index[c] = cell.index(level, c);
  }
};

// Tables beyond the second-level cache are read at random: ask for the entries of a later block while this one is
// computed. Into the second-level cache: the first has too few open requests, and asking it took half as long again.
constexpr int kAhead = 3;                   // blocks
constexpr int64_t kCached = 256 << 10;      // bytes of a table that need no prefetch

// Always inline, both: a call without results or side effects is one that GCC drops.
__attribute__((always_inline)) inline void prefetch(const void* entries, const uint32_t (&index)[kLanes],
                                                    int entry_bytes) {
  for (int lane = 0; lane < kLanes; ++lane)
    __builtin_prefetch(static_cast<const char*>(entries) + int64_t(index[lane]) * entry_bytes, 0, 2);
}

template <int D>
__attribute__((always_inline)) inline void prefetch(const Points<D>& points, int64_t i, const HashGridLevel& level,
                                                    const void* table, int entry_bytes) {
  i += kAhead * kLanes;
  if (i >= points.count || int64_t(level.count) * entry_bytes <= kCached) return;
  Floats x[D], keep;
  points.lanes(i, x, keep);
  const HashGridCell<Floats, Uints, D> cell(level, x, keep);
  const char* entries = static_cast<const char*>(table) + int64_t(level.first) * entry_bytes;
  for (int c = 0; c < 1 << D; ++c) {
    const Uints index = cell.index(level, c);
    alignas(64) uint32_t lanes[kLanes];
    std::memcpy(lanes, &index, sizeof index);
    prefetch(entries, lanes, entry_bytes);
  }
}

inline int valid_lanes(int64_t count, int64_t i) { return count - i < kLanes ? int(count - i) : kLanes; }

// Points of a pass by level that go together, at least 1.
inline int64_t batch_points(int64_t points, int features) {
  int64_t most = features ? kStaged / (features * int64_t(sizeof(float))) : kBatch;
  most = most < kChunk ? kChunk : most > kBatch ? kBatch : most;
  return points < 1 ? 1 : points < most ? points : most;
}

inline int value_bytes(int dtype) { return dtype == 0 ? 4 : 2; }

// body(points of a chunk, index of the first)
template <int D, class Params, class Body>
void by_point(const Params& p, const Body& body) {
  std::atomic<int64_t> bad{-1};
  const int64_t share = p.points / (4 * thread_count()) + kLanes;
  const int64_t chunk = share < kChunk ? share / kLanes * kLanes : kChunk;
  parallel_for(p.points, chunk, [&](int64_t begin, int64_t end) {
    Points<D> points(end - begin);
    const int64_t found = points.load(p.x, begin, end, p.layout.clip != 0);
    if (found >= 0) {
      bad = found;
      return;
    }
    body(points, begin);
  });
  if (bad >= 0) refuse(p.x, D, bad);
}

// Indices and weights of the first C corners of one block, in memory: computed when their entries are asked for, used
// later.
template <int C>
struct Corners {
  alignas(64) uint32_t index[C][kLanes];
  alignas(64) float weight[C][kLanes];
};

// The corners of the block of points from i on. Out of line, with Hashed known: a branch for each corner takes as long as
// the corner, and a copy in every pass that calls this takes as long to compile as all else.
template <int D, int C, bool Hashed, class Weigh>
__attribute__((noinline, flatten)) void fill_corners(HashGridLevel level, const Points<D>& points, int64_t i,
                                                     const Weigh& weigh, Corners<C>& corners) {
  level.hashed = Hashed;
  Floats x[D], keep;
  points.lanes(i, x, keep);
  const HashGridCell<Floats, Uints, D> cell(level, x, keep);
  for (int c = 0; c < C; ++c) {
    const Uints index = cell.index(level, c);
    std::memcpy(corners.index[c], &index, sizeof index);
    store_lanes(corners.weight[c], weigh(cell, i, c));
  }
}

// body(first point of a block, its Corners) for the blocks from `begin` to `end`; their entries are on the way by then.
// weigh(cell, first point of a block, corner) are the weights.
template <int D, int C, class Weigh, class Body>
__attribute__((always_inline)) inline void for_corners(const HashGridLevel& level, const Points<D>& points,
                                                       int64_t begin, int64_t end, const void* entries,
                                                       int entry_bytes, const Weigh& weigh, const Body& body) {
  constexpr int kRing = 4;
  static_assert(kAhead < kRing, "a block is still in use when its place is taken");
  const bool far = int64_t(level.count) * entry_bytes > kCached;
  const auto fill = level.hashed ? fill_corners<D, C, true, Weigh> : fill_corners<D, C, false, Weigh>;
  Corners<C> ring[kRing];
  for (int64_t i = begin - kAhead * kLanes; i < end; i += kLanes) {
    const int64_t next = i + kAhead * kLanes;
    if (next < end) {
      Corners<C>& corners = ring[next / kLanes % kRing];
      fill(level, points, next, weigh, corners);
      for (int c = 0; far && c < C; ++c) prefetch(entries, corners.index[c], entry_bytes);
    }
    if (i >= begin) body(i, ring[i / kLanes % kRing]);
  }
}

// Weights of the corners: their values, or their derivatives along a direction of each point.
struct Values {
  template <class Cell>
  Floats operator()(const Cell& cell, int64_t, int corner) const { return cell.value(corner); }
};

template <int D>
struct Slopes {
  const Points<D>& directions;
  template <class Cell>
  Floats operator()(const Cell& cell, int64_t i, int corner) const {
    Floats along[D], unused;
    directions.lanes(i, along, unused);
    return cell.along(corner, along);
  }
};

}  // namespace TEXT3D_ISA
}  // namespace text3d
