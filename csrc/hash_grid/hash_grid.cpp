// The CPU loops. Three kinds of pass:
//   by level: one level after the other over a batch of points, so that one table is in cache at a time, for all
//             threads; features are kept level by level and transposed at the end
//   by point: the same within chunks of points over threads, where sums over the levels are wanted
//   by entry: levels (and slices of levels, if there are more threads) over threads, each walking all points in order,
//             so that sums into the table need no atomics and do not depend on the number of threads
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include "hash_grid/corners.h"

namespace text3d {
namespace TEXT3D_ISA {

// y [points, F] of one level: the sum over the first C corners of weight * entry.
template <int D, int C, int F, class T, class Weigh>
__attribute__((flatten)) void encode_level(const HashGridLevel& level, const Points<D>& points, int64_t begin,
                                           int64_t end, const void* table, const Weigh& weigh, float* y) {
  const T* entries = static_cast<const T*>(table) + int64_t(level.first) * F;
  for_corners<D, C>(level, points, begin, end, entries, F * sizeof(T), weigh, [&](int64_t i, const Corners<C>& at) {
    for (int lane = 0; lane < kLanes; ++lane) {
      Row<F> sum;
      for (int c = 0; c < C; ++c) sum.add(at.weight[c][lane], entries + int64_t(at.index[c][lane]) * F);
      sum.store(y + (i + lane) * F);
    }
  });
}

template <int D, int C, int F, class Weigh>
void encode_level(const HashGridLevel& level, const Points<D>& points, int64_t begin, int64_t end, const void* table,
                  int dtype, const Weigh& weigh, float* y) {
  if (dtype == 0) encode_level<D, C, F, float>(level, points, begin, end, table, weigh, y);
  else if (dtype == 1) encode_level<D, C, F, half_t>(level, points, begin, end, table, weigh, y);
  else encode_level<D, C, F, bfloat16_t>(level, points, begin, end, table, weigh, y);
}

// jacobian [points, levels, F, D] of one level
template <int D, int F>
void encode_slopes(const HashGridLevel& level, const Points<D>& points, int64_t begin, int64_t end, const void* table,
                   int dtype, float* jacobian, int64_t row) {
  constexpr int C = 1 << D;
  for (int64_t i = begin; i < end; i += kLanes) {
    Floats x[D], keep, theta[C][F], slopes[F * D] = {};
    points.lanes(i, x, keep);
    const Block<D> block(level, x, keep);
    gather_corners<C, F>(table, dtype, level, block.index, theta);
    for (int c = 0; c < C; ++c)
      for (int d = 0; d < D; ++d) {
        const Floats weight = block.cell.first(c, d);
        for (int f = 0; f < F; ++f) slopes[f * D + d] += weight * theta[c][f];
      }
    store_rows<F * D>(jacobian + i * row, row, valid_lanes(points.count, i), slopes);
  }
}

// y [points, levels, F]; with `toward` [points, D] its derivative along that. jacobian [points, levels, F, D] or null.
template <int D, int F>
void encode(const HashGridLayout& layout, const float* x, int64_t count, const void* table, int dtype,
            const float* toward, float* out, float* jacobian) {
  constexpr int C = 1 << D;
  const int levels = layout.levels, active = layout.active_levels;
  const int64_t batch = batch_points(count, active * F), row = int64_t(levels) * F;
  Points<D> points(batch), along(toward ? batch : 0);
  const int64_t stride = points.stride * F;
  Array<float> staged(size_t(active * stride));  // [active, batch, F]
  for (int64_t begin = 0; begin < count; begin += batch) {
    const int64_t end = count - begin < batch ? count : begin + batch;
    const int64_t bad = points.load_together(x, begin, end, layout.clip != 0);
    if (bad >= 0) refuse(x, D, bad);
    if (toward) along.load_together(toward, begin, end, false);
    const int64_t chunks = (points.count + kChunk - 1) / kChunk;
    parallel_for(levels * chunks, 1, [&](int64_t task, int64_t) {
      const int l = int(task / chunks);
      const int64_t first = task % chunks * kChunk;
      const int64_t last = first + kChunk < points.count ? first + kChunk : points.count;
      float* slopes = jacobian ? jacobian + (begin * row + l * F) * D : nullptr;
      if (l < active) {
        const HashGridLevel level = hash_grid_level(layout, l);
        float* y = staged + l * stride;
        if (nearest(layout)) encode_level<D, 1, F>(level, points, first, last, table, dtype, Values(), y);
        else if (toward) encode_level<D, C, F>(level, points, first, last, table, dtype, Slopes<D>{along}, y);
        else encode_level<D, C, F>(level, points, first, last, table, dtype, Values(), y);
        if (slopes && !nearest(layout)) encode_slopes<D, F>(level, points, first, last, table, dtype, slopes, row * D);
      }
      if (slopes && (l >= active || nearest(layout))) {
        for (int64_t i = first; i < last; ++i) std::memset(slopes + i * row * D, 0, F * D * sizeof(float));
      }
    });
    parallel_for(points.count, 1024, [&](int64_t first, int64_t last) {
      float* y = out + (begin + first) * row;
      transpose_entries<F>(staged + first * F, stride, active, last - first, y, row);
      if (active == levels) return;
      for (int64_t i = 0; i < last - first; ++i)
        std::memset(y + i * row + active * F, 0, size_t(levels - active) * F * sizeof(float));
    });
  }
}

template <int D, int F>
struct Forward {
  static void run(const HashGridForwardParams& p) {
    encode<D, F>(p.layout, p.x, p.points, p.table, p.dtype, nullptr, p.y, p.jacobian);
  }
};

// grad_x [N, D] is gathered axis by axis over the levels and written at the end.
template <int D>
struct GradX {
  Array<float> sums;
  int64_t stride;
  explicit GradX(int64_t stride) : sums(size_t(stride * D)), stride(stride) {
    std::memset(sums, 0, size_t(stride * D) * sizeof(float));
  }
  void add(int64_t i, const Floats* value) {
    for (int d = 0; d < D; ++d) {
      float* sum = sums + d * stride + i;
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
      for (int l = 0; l < (nearest(p.layout) ? 0 : p.layout.active_levels); ++l) {
        const HashGridLevel level = hash_grid_level(p.layout, l);
        for (int64_t i = 0; i < points.count; i += kLanes) {
          const int valid = valid_lanes(points.count, i);
          const int64_t row = ((begin + i) * levels + l) * F;
          Floats x[D], keep, theta[C][F], grad_y[F], sum[D] = {};
          points.lanes(i, x, keep);
          prefetch<D>(points, i, level, p.table, F * value_bytes(p.dtype));
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
          if (p.cotangent_x) prefetch<D>(points, i, level, p.table, F * value_bytes(p.dtype));
          if (p.cotangent_params) prefetch<D>(points, i, level, p.cotangent_params, F * 4);
          const Block<D> block(level, x, keep);
          load_rows<F>(p.grad_y + row, levels, valid, grad_y);
          if (p.cotangent_x) {
            cotangents.lanes(i, toward, unused);
            gather_corners<C, F>(p.table, p.dtype, level, block.index, theta);
            for (int c = 0; c < C; ++c) {
              const Floats weight = block.cell.along(c, toward);
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

// table[corner] += weight of the corner * row(point), for entries low <= corner < low + span
template <int D, int C, int F, class Weigh>
__attribute__((flatten)) void scatter_level(const HashGridLevel& level, const Points<D>& points, const float* rows,
                                            float* table, uint32_t low, uint32_t span, const Weigh& weigh) {
  const int ahead = span == level.count ? F * int(sizeof(float)) : 0;  // no prefetch of what another thread may own
  for_corners<D, C>(level, points, 0, points.count, table, ahead, weigh, [&](int64_t i, const Corners<C>& at) {
    const int valid = valid_lanes(points.count, i);
    for (int lane = 0; lane < valid; ++lane)
      for (int c = 0; c < C; ++c) {
        if (at.index[c][lane] - low >= span) continue;
        float* entry = table + int64_t(at.index[c][lane]) * F;
        Row<F> sum;
        sum.load(entry);
        sum.add(at.weight[c][lane], rows + (i + lane) * F);
        sum.store(entry);
      }
  });
}

// grad_params[corner] += W_c grad_y + sum over d of (dW_c/dx_d) grad_jacobian_d, where `toward` v stands for
// grad_jacobian = grad_y v without the first term.
template <int D, int F>
struct Scatter {
  static void run(const HashGridLayout& layout, const float* x, int64_t points, const float* grad_y,
                  const float* grad_jacobian, const float* toward, float* grad_params, bool accumulate) {
    constexpr int C = 1 << D;
    const int levels = layout.levels, active = layout.active_levels;
    prefer_large_pages(grad_params, size_t(layout.offsets[levels]) * F * sizeof(float));
    // Slices depend on the number of threads, but no entry's sum does: each is added in the order of the points.
    const int slices = active ? (2 * thread_count() + active - 1) / active : 0;
    const int64_t batch = batch_points(points, active * F);
    Points<D> at(batch), along(toward ? batch : 0);
    Array<float> rows(size_t(batch * active * F));  // [active, batch, F]
    for (int64_t begin = 0; begin < points || begin == 0; begin += batch) {
      const int64_t end = points - begin < batch ? points : begin + batch, count = end - begin;
      if (count > 0) {
        const int64_t bad = at.load_together(x, begin, end, layout.clip != 0);
        if (bad >= 0) refuse(x, D, bad);
        if (toward) along.load_together(toward, begin, end, false);
        parallel_for(count, 1024, [&](int64_t first, int64_t last) {
          const int64_t row = int64_t(levels) * F;
          transpose_entries<F>(grad_y + (begin + first) * row, row, last - first, active, rows + first * F,
                               batch * F);
        });
      }
      parallel_for(int64_t(levels) * slices, 1, [&](int64_t task, int64_t) {
        const int l = levels - 1 - int(task / slices), slice = int(task % slices);  // the slow levels first
        const HashGridLevel level = hash_grid_level(layout, l);
        const auto low = uint32_t(uint64_t(level.count) * slice / slices);
        const auto span = uint32_t(uint64_t(level.count) * (slice + 1) / slices) - low;
        float* table = grad_params + int64_t(level.first) * F;
        if (begin == 0 && !accumulate) std::memset(table + int64_t(low) * F, 0, size_t(span) * F * sizeof(float));
        if (l >= active || count <= 0) return;
        const float* row = rows + l * batch * F;
        if (nearest(layout)) {
          scatter_level<D, 1, F>(level, at, row, table, low, span, Values());
          return;
        }
        if (toward) scatter_level<D, C, F>(level, at, row, table, low, span, Slopes<D>{along});
        else scatter_level<D, C, F>(level, at, row, table, low, span, Values());
        if (!grad_jacobian) return;
        Array<float> column(size_t(count * F));
        for (int d = 0; d < D; ++d) {
          for (int64_t i = 0; i < count; ++i)
            for (int f = 0; f < F; ++f)
              column[i * F + f] = grad_jacobian[(((begin + i) * levels + l) * F + f) * D + d];
          scatter_level<D, C, F>(level, at, column, table, low, span,
                              [d](const auto& cell, int64_t, int c) { return cell.first(c, d); });
        }
      });
    }
    if (!active && !accumulate) std::memset(grad_params, 0, size_t(layout.offsets[levels]) * F * sizeof(float));
  }
};

template <int D, int F>
struct Backward {
  static void run(const HashGridBackwardParams& p) {
    if (p.grad_x) BackwardX<D, F>::run(p);
    if (p.grad_params)
      Scatter<D, F>::run(p.layout, p.x, p.points, p.grad_y, p.grad_jacobian, nullptr, p.grad_params, p.accumulate);
  }
};

template <int D, int F>
struct Second {
  static void run(const HashGridSecondParams& p) {
    if (nearest(p.layout)) {  // nothing depends on x, and y is linear in the table
      const int levels = p.layout.levels;
      if (p.cotangent_params)
        encode<D, F>(p.layout, p.x, p.points, p.cotangent_params, 0, nullptr, p.grad_grad_y, nullptr);
      else
        std::memset(p.grad_grad_y, 0, size_t(p.points * levels * F) * sizeof(float));
      if (p.grad_x) std::memset(p.grad_x, 0, size_t(p.points * D) * sizeof(float));
      if (p.grad_params)
        std::memset(p.grad_params, 0, size_t(p.layout.offsets[levels]) * F * sizeof(float));
      return;
    }
    if (p.cotangent_x && !p.cotangent_params && !p.grad_x)  // usual: the derivative of a vjp by all but the points
      encode<D, F>(p.layout, p.x, p.points, p.table, p.dtype, p.cotangent_x, p.grad_grad_y, nullptr);
    else
      SecondPoints<D, F>::run(p);
    if (p.grad_params)
      Scatter<D, F>::run(p.layout, p.x, p.points, p.grad_y, nullptr, p.cotangent_x, p.grad_params, false);
  }
};

template <template <int, int> class Kernel, int D, class Params>
void dispatch_features(const Params& p) {
  const int features = p.layout.features;
  if (features == 1) Kernel<D, 1>::run(p);
  else if (features == 2) Kernel<D, 2>::run(p);
  else if (features == 4) Kernel<D, 4>::run(p);
  else Kernel<D, 8>::run(p);
}

template <template <int, int> class Kernel, class Params>
void dispatch(const Params& p) {
  if (p.layout.dim == 2) dispatch_features<Kernel, 2>(p);
  else if (p.layout.dim == 3) dispatch_features<Kernel, 3>(p);
  else dispatch_features<Kernel, 4>(p);
}

void hash_grid_forward(const HashGridForwardParams& p) { dispatch<Forward>(p); }
void hash_grid_backward(const HashGridBackwardParams& p) { dispatch<Backward>(p); }
void hash_grid_second(const HashGridSecondParams& p) { dispatch<Second>(p); }

}  // namespace TEXT3D_ISA
}  // namespace text3d
