// The CPU loops. Two kinds of pass:
//   by point: chunks of points over threads; inside, the level is the outer loop, so that one table is in cache at a time
//   by entry: levels (and slices of levels, if there are more threads) over threads, each walking all points in order,
//             so that sums into the table need no atomics and do not depend on the number of threads
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include "common/lanes.h"
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

constexpr int64_t kChunk = 8192;    // points of one task of a pass by point
constexpr int64_t kBatch = 65536;   // points that a pass by entry transposes at a time

using Buffer = std::unique_ptr<float[]>;

// Points [begin, end) axis by axis, padded to whole lanes with copies of the last.
template <int D>
struct Points {
  int64_t count = 0, stride = 0;
  Buffer memory;

  explicit Points(int64_t most) : stride((most + kLanes - 1) / kLanes * kLanes), memory(new float[stride * (D + 1)]) {}

  // Returns the first point that is not finite, or -1.
  int64_t load(const float* x, int64_t begin, int64_t end, bool clip) {
    count = end - begin;
    float* keep = memory.get() + D * stride;
    int64_t bad = -1;
    for (int64_t i = 0; i < (count + kLanes - 1) / kLanes * kLanes; ++i) {
      const float* point = x + (begin + (i < count ? i : count - 1)) * D;
      float inside = 1.f, zero = 0.f;
      for (int d = 0; d < D; ++d) {
        memory[d * stride + i] = point[d];
        inside = inside_unit(point[d], inside);
        zero += point[d] - point[d];
      }
      keep[i] = clip ? inside : 1.f;
      if (!(zero == 0.f) && bad < 0) bad = begin + (i < count ? i : count - 1);
    }
    return bad;
  }

  void lanes(int64_t i, Floats* x, Floats& keep) const {
    for (int d = 0; d < D; ++d) x[d] = load_lanes(memory.get() + d * stride + i);
    keep = load_lanes(memory.get() + D * stride + i);
  }
};

[[noreturn]] inline void refuse(const float* x, int dim, int64_t point) {
  std::string message = "x: expected finite values, got (";
  for (int d = 0; d < dim; ++d) message += (d ? ", " : "") + std::to_string(x[point * dim + d]);
  throw std::invalid_argument(message + ") at point " + std::to_string(point));
}

// The features of all corners of a block of cells. Out of line: one copy serves every pass, and it is bound by memory.
template <int C, int F, class T>
__attribute__((noinline)) void gather_corners(const void* table, const HashGridLevel& level, const Uints* index, Floats (*theta)[F]) {
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

// Tables beyond the second-level cache are read at random: ask for the entries of a later block while this one computes.
// (Forward pass, one thread: 72 ms without, 26 ms with it, although cells are computed twice.)
constexpr int kAhead = 4;                   // blocks
constexpr int64_t kCached = 256 << 10;      // bytes of a table that need no prefetch

// Always inline: a call without results or side effects is one that GCC drops.
template <int D, bool Write>
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
    for (int lane = 0; lane < kLanes; ++lane) __builtin_prefetch(entries + int64_t(lanes[lane]) * entry_bytes, Write);
  }
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

inline int valid_lanes(int64_t count, int64_t i) { return count - i < kLanes ? int(count - i) : kLanes; }

template <int D, int F>
struct Forward {
  static void run(const HashGridForwardParams& p) {
    constexpr int C = 1 << D;
    const int levels = p.layout.levels;
    const int64_t row = int64_t(levels) * F;
    by_point<D>(p, [&](const Points<D>& points, int64_t begin) {
      for (int l = 0; l < levels; ++l) {
        const HashGridLevel level = hash_grid_level(p.layout, l);
        for (int64_t i = 0; i < points.count; i += kLanes) {
          const int valid = valid_lanes(points.count, i);
          float* y = p.y + (begin + i) * row + l * F;
          float* jacobian = p.jacobian ? p.jacobian + ((begin + i) * row + l * F) * D : nullptr;
          if (l >= p.layout.active_levels) {
            store_zero<F>(y, row, valid);
            if (jacobian) store_zero<F * D>(jacobian, row * D, valid);
            continue;
          }
          Floats x[D], keep, theta[C][F], sum[F] = {};
          points.lanes(i, x, keep);
          prefetch<D, false>(points, i, level, p.table, F * value_bytes(p.dtype));
          const Block<D> block(level, x, keep);
          gather_corners<C, F>(p.table, p.dtype, level, block.index, theta);
          for (int c = 0; c < C; ++c) {
            const Floats weight = block.cell.value(c);
            for (int f = 0; f < F; ++f) sum[f] += weight * theta[c][f];
          }
          store_rows<F>(y, row, valid, sum);
          if (!jacobian) continue;
          Floats slopes[F * D] = {};
          for (int c = 0; c < C; ++c)
            for (int d = 0; d < D; ++d) {
              const Floats weight = block.cell.first(c, d);
              for (int f = 0; f < F; ++f) slopes[f * D + d] += weight * theta[c][f];
            }
          store_rows<F * D>(jacobian, row * D, valid, slopes);
        }
      }
    });
  }
};

// grad_x [N, D] is gathered axis by axis over the levels and written at the end.
template <int D>
struct GradX {
  Buffer sums;
  int64_t stride;
  explicit GradX(int64_t stride) : sums(new float[stride * D]()), stride(stride) {}
  void add(int64_t i, const Floats* value) {
    for (int d = 0; d < D; ++d) {
      float* sum = sums.get() + d * stride + i;
      store_lanes(sum, load_lanes(sum) + value[d]);
    }
  }
  void write(float* out, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      for (int d = 0; d < D; ++d) out[i * D + d] = sums[d * stride + i];
  }
};

template <int D, int F>
struct BackwardX {
  static void run(const HashGridBackwardParams& p) {
    constexpr int C = 1 << D;
    const int levels = p.layout.levels;
    by_point<D>(p, [&](const Points<D>& points, int64_t begin) {
      GradX<D> grad(points.stride);
      for (int l = 0; l < p.layout.active_levels; ++l) {
        const HashGridLevel level = hash_grid_level(p.layout, l);
        for (int64_t i = 0; i < points.count; i += kLanes) {
          const int valid = valid_lanes(points.count, i);
          const int64_t row = ((begin + i) * levels + l) * F;
          Floats x[D], keep, theta[C][F], grad_y[F], sum[D] = {};
          points.lanes(i, x, keep);
          prefetch<D, false>(points, i, level, p.table, F * value_bytes(p.dtype));
          const Block<D> block(level, x, keep);
          gather_corners<C, F>(p.table, p.dtype, level, block.index, theta);
          load_rows<F>(p.grad_y + row, levels, valid, grad_y);
          for (int c = 0; c < C; ++c) {
            Floats dot = theta[c][0] * grad_y[0];
            for (int f = 1; f < F; ++f) dot += theta[c][f] * grad_y[f];
            for (int d = 0; d < D; ++d) sum[d] += block.cell.first(c, d) * dot;
          }
          if (p.grad_jacobian) {
            // grad_jacobian [F, D] of each lane, then its product with the derivative of the Jacobian
            Floats outer[F * D];
            const float* from = p.grad_jacobian + row * D;
            for (int k = 0; k < F * D; ++k)
              for (int lane = 0; lane < kLanes; ++lane)
                outer[k][lane] = from[int64_t(lane < valid ? lane : valid - 1) * levels * F * D + k];
            for (int c = 0; c < C; ++c)
              for (int d = 0; d < D; ++d) {
                Floats dot = theta[c][0] * outer[d];
                for (int f = 1; f < F; ++f) dot += theta[c][f] * outer[f * D + d];
                for (int e = 0; e < D; ++e) sum[e] += block.cell.second(c, d, e) * dot;
              }
          }
          grad.add(i, sum);
        }
      }
      grad.write(p.grad_x + begin * D, points.count);
    });
  }
};

template <int D, int F>
struct SecondPoints {
  static void run(const HashGridSecondParams& p) {
    constexpr int C = 1 << D;
    const int levels = p.layout.levels;
    by_point<D>(p, [&](const Points<D>& points, int64_t begin) {
      GradX<D> grad(points.stride);
      Points<D> cotangents(points.stride);
      if (p.cotangent_x) cotangents.load(p.cotangent_x, begin, begin + points.count, false);
      for (int l = 0; l < levels; ++l) {
        const HashGridLevel level = hash_grid_level(p.layout, l);
        for (int64_t i = 0; i < points.count; i += kLanes) {
          const int valid = valid_lanes(points.count, i);
          const int64_t row = ((begin + i) * levels + l) * F;
          if (l >= p.layout.active_levels) {
            store_zero<F>(p.grad_grad_y + row, int64_t(levels) * F, valid);
            continue;
          }
          Floats x[D], keep, unused, toward[D], theta[C][F], grad_y[F], grad_grad_y[F] = {}, sum[D] = {};
          points.lanes(i, x, keep);
          if (p.cotangent_x) prefetch<D, false>(points, i, level, p.table, F * value_bytes(p.dtype));
          if (p.cotangent_params) prefetch<D, false>(points, i, level, p.cotangent_params, F * 4);
          const Block<D> block(level, x, keep);
          load_rows<F>(p.grad_y + row, levels, valid, grad_y);
          if (p.cotangent_x) {
            cotangents.lanes(i, toward, unused);
            gather_corners<C, F>(p.table, p.dtype, level, block.index, theta);
            for (int c = 0; c < C; ++c) {
              Floats weight = block.cell.first(c, 0) * toward[0];
              for (int d = 1; d < D; ++d) weight += block.cell.first(c, d) * toward[d];
              Floats dot = {};
              for (int f = 0; f < F; ++f) {
                grad_grad_y[f] += weight * theta[c][f];
                dot += theta[c][f] * grad_y[f];
              }
              for (int e = 0; e < D; ++e)
                for (int d = 0; d < D; ++d) sum[e] += block.cell.second(c, d, e) * toward[d] * dot;
            }
          }
          if (p.cotangent_params) {
            gather_corners<C, F>(p.cotangent_params, 0, level, block.index, theta);
            for (int c = 0; c < C; ++c) {
              const Floats weight = block.cell.value(c);
              Floats dot = {};
              for (int f = 0; f < F; ++f) {
                grad_grad_y[f] += weight * theta[c][f];
                dot += theta[c][f] * grad_y[f];
              }
              for (int e = 0; e < D; ++e) sum[e] += block.cell.first(c, e) * dot;
            }
          }
          store_rows<F>(p.grad_grad_y + row, int64_t(levels) * F, valid, grad_grad_y);
          grad.add(i, sum);
        }
      }
      if (p.grad_x) grad.write(p.grad_x + begin * D, points.count);
    });
  }
};

// Fresh memory costs a page fault for every 4 KiB, a third of the time of a scatter into 48 MB: ask for large pages.
inline void prefer_large_pages(void* begin, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kLarge * kLarge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only a hint: may fail
#else
  (void)begin, (void)bytes;
#endif
}

// F floats as one vector, for read-modify-write of table entries.
template <int F>
struct Entry {
  typedef float Vector __attribute__((vector_size(4 * F)));
  static void add(float* to, float weight, const float* value) {
    Vector sum, addend;
    std::memcpy(&sum, to, sizeof sum);
    std::memcpy(&addend, value, sizeof addend);
    sum += weight * addend;
    std::memcpy(to, &sum, sizeof sum);
  }
};
template <>
struct Entry<1> {
  static void add(float* to, float weight, const float* value) { *to += weight * *value; }
};

// grad_params[corner] += W_c grad_y + sum over d of (dW_c/dx_d) grad_jacobian_d, where `toward` v stands for
// grad_jacobian = grad_y v without the first term.
template <int D, int F>
struct Scatter {
  static constexpr int C = 1 << D;

  static void run(const HashGridLayout& layout, const float* x, int64_t points, const float* grad_y,
                  const float* grad_jacobian, const float* toward, float* grad_params) {
    const int levels = layout.levels, active = layout.active_levels;
    prefer_large_pages(grad_params, size_t(layout.offsets[levels]) * F * sizeof(float));
    // Slices depend on the number of threads, but no entry's sum does: each is added in the order of the points.
    const int slices = active ? (2 * thread_count() + active - 1) / active : 0;
    const int64_t batch = points < kBatch ? points : kBatch;
    Points<D> at(batch), along(toward ? batch : 0);
    Buffer rows(new float[size_t(batch * active * F)]);  // [active, batch, F]
    for (int64_t begin = 0; begin < points || begin == 0; begin += kBatch) {
      const int64_t end = points - begin < kBatch ? points : begin + kBatch, count = end - begin;
      if (count > 0) {
        const int64_t bad = at.load(x, begin, end, layout.clip != 0);
        if (bad >= 0) refuse(x, D, bad);
        if (toward) along.load(toward, begin, end, false);
        parallel_for(count, 1024, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i)
            for (int l = 0; l < active; ++l)
              std::memcpy(rows.get() + (l * batch + i) * F, grad_y + ((begin + i) * levels + l) * F, F * sizeof(float));
        });
      }
      parallel_for(int64_t(levels) * slices, 1, [&](int64_t task, int64_t) {
        const int l = levels - 1 - int(task / slices), slice = int(task % slices);  // the slow levels first
        const HashGridLevel level = hash_grid_level(layout, l);
        const auto low = uint32_t(uint64_t(level.count) * slice / slices);
        const auto high = uint32_t(uint64_t(level.count) * (slice + 1) / slices);
        float* table = grad_params + int64_t(level.first) * F;
        if (begin == 0) std::memset(table + int64_t(low) * F, 0, size_t(high - low) * F * sizeof(float));
        if (l >= active || count <= 0) return;
        const float* rows_of_level = rows.get() + l * batch * F;
        const float* jacobian = grad_jacobian ? grad_jacobian + (begin * levels + l) * F * D : nullptr;
        if (slices == 1) level_pass<false>(level, at, along, toward, rows_of_level, jacobian, levels, grad_params, 0, 0);
        else level_pass<true>(level, at, along, toward, rows_of_level, jacobian, levels, grad_params, low, high);
      });
    }
    if (!active) std::memset(grad_params, 0, size_t(layout.offsets[levels]) * F * sizeof(float));
  }

  template <bool Sliced>
  static void level_pass(const HashGridLevel& level, const Points<D>& at, const Points<D>& along, bool toward,
                         const float* rows, const float* jacobian, int levels, float* grad_params, uint32_t low,
                         uint32_t high) {
    float* table = grad_params + int64_t(level.first) * F;
    for (int64_t i = 0; i < at.count; i += kLanes) {
      const int valid = valid_lanes(at.count, i);
      Floats x[D], keep, direction[D], weight[C];
      at.lanes(i, x, keep);
      if (!Sliced) prefetch<D, true>(at, i, level, grad_params, F * 4);
      const Block<D> block(level, x, keep);
      if (toward) {
        Floats unused;
        along.lanes(i, direction, unused);
        for (int c = 0; c < C; ++c) {
          weight[c] = block.cell.first(c, 0) * direction[0];
          for (int d = 1; d < D; ++d) weight[c] += block.cell.first(c, d) * direction[d];
        }
      } else {
        for (int c = 0; c < C; ++c) weight[c] = block.cell.value(c);
      }
      for (int lane = 0; lane < valid; ++lane)
        for (int c = 0; c < C; ++c) {
          const uint32_t entry = block.index[c][lane];
          if (Sliced && (entry < low || entry >= high)) continue;
          Entry<F>::add(table + int64_t(entry) * F, weight[c][lane], rows + (i + lane) * F);
        }
      if (!jacobian) continue;
      for (int d = 0; d < D; ++d) {
        for (int c = 0; c < C; ++c) weight[c] = block.cell.first(c, d);
        for (int lane = 0; lane < valid; ++lane) {
          float column[F];
          for (int f = 0; f < F; ++f) column[f] = jacobian[((i + lane) * levels * F + f) * D + d];
          for (int c = 0; c < C; ++c) {
            const uint32_t entry = block.index[c][lane];
            if (Sliced && (entry < low || entry >= high)) continue;
            Entry<F>::add(table + int64_t(entry) * F, weight[c][lane], column);
          }
        }
      }
    }
  }
};

template <int D, int F>
struct Backward {
  static void run(const HashGridBackwardParams& p) {
    if (p.grad_x) BackwardX<D, F>::run(p);
    if (p.grad_params)
      Scatter<D, F>::run(p.layout, p.x, p.points, p.grad_y, p.grad_jacobian, nullptr, p.grad_params);
  }
};

template <int D, int F>
struct Second {
  static void run(const HashGridSecondParams& p) {
    SecondPoints<D, F>::run(p);
    if (p.grad_params) Scatter<D, F>::run(p.layout, p.x, p.points, p.grad_y, nullptr, p.cotangent_x, p.grad_params);
  }
};

template <template <int, int> class Kernel, class Params>
void dispatch(const Params& p) {
  const int features = p.layout.features;
  if (p.layout.dim == 2) {
    if (features == 1) Kernel<2, 1>::run(p);
    else if (features == 2) Kernel<2, 2>::run(p);
    else if (features == 4) Kernel<2, 4>::run(p);
    else Kernel<2, 8>::run(p);
  } else {
    if (features == 1) Kernel<3, 1>::run(p);
    else if (features == 2) Kernel<3, 2>::run(p);
    else if (features == 4) Kernel<3, 4>::run(p);
    else Kernel<3, 8>::run(p);
  }
}

void hash_grid_forward(const HashGridForwardParams& p) { dispatch<Forward>(p); }
void hash_grid_backward(const HashGridBackwardParams& p) { dispatch<Backward>(p); }
void hash_grid_second(const HashGridSecondParams& p) { dispatch<Second>(p); }

}  // namespace TEXT3D_ISA
}  // namespace text3d
