// The CUDA loops.
//   forward:   a thread per point and group of levels that fills one 32-byte sector of y; groups one after the other
//              (blockIdx.y), so that few tables share the cache; neighbours along x come in one load where they can
//   by point:  (gradients to x and grad_y) a thread per point, levels inside: no atomics
//   scatter:   (gradients to params) a thread per point and group of levels that shares a sector of the cotangent; runs
//              of threads in one cell, as along a ray, are summed within the warp first; sums in float32, or in fixed
//              point when the result must not vary
#include "common/launch.h"
#include "hash_grid/entries.h"
#include "hash_grid/hash_grid.h"

namespace text3d {
namespace TEXT3D_ISA {

constexpr int kThreads = 256;

template <int D>
TEXT3D_HD float load_point(const float* points, int64_t i, bool clip, float* x) {
  float keep = 1.f;
  TEXT3D_UNROLL
  for (int d = 0; d < D; ++d) {
    x[d] = points[i * D + d];
    if (clip) keep = inside_unit(x[d], keep);
  }
  return keep;
}

// One level of the forward pass: sum [F], and slopes [F, D] if they are wanted. Eight corners at a time are on their way.
template <int D, int F, class T>
TEXT3D_HD void encode_point(const HashGridLevel& level, const float* x, float keep, const void* entries, bool jacobian,
                            float* sum, float* slopes) {
  constexpr int kCorners = 1 << D, kTogether = kCorners < 8 ? kCorners : 8;
  const HashGridCell<float, uint32_t, D> cell(level, x, keep);
  const T* table = static_cast<const T*>(entries) + int64_t(level.first) * F;
  if (level.nearest) {
    load_values<F>(table + int64_t(cell.index(level, 0)) * F, sum);
    TEXT3D_UNROLL
    for (int f = 0; f < F; ++f) sum[f] *= keep;
    return;
  }
  const bool even = ((level.first | level.count) & 1u) == 0;
  TEXT3D_UNROLL
  for (int begin = 0; begin < kCorners; begin += kTogether) {
    float theta[kTogether][F];
    TEXT3D_UNROLL
    for (int c = 0; c < kTogether; c += 2)
      load_pair<F>(table, even, cell.index(level, begin + c), cell.index(level, begin + c + 1), theta[c], theta[c + 1]);
    TEXT3D_UNROLL
    for (int c = 0; c < kTogether; ++c) {
      const float weight = cell.value(begin + c);
      TEXT3D_UNROLL
      for (int f = 0; f < F; ++f) sum[f] += weight * theta[c][f];
    }
    if (!jacobian) continue;
    TEXT3D_UNROLL
    for (int c = 0; c < kTogether; ++c) {
      TEXT3D_UNROLL
      for (int d = 0; d < D; ++d) {
        const float weight = cell.first(begin + c, d);
        TEXT3D_UNROLL
        for (int f = 0; f < F; ++f) slopes[f * D + d] += weight * theta[c][f];
      }
    }
  }
}

// Levels of one thread of the forward and the scatter pass: a sector of y or its cotangent, at most four.
template <int F>
constexpr int kLevelsPerThread = F >= 8 ? 1 : F == 4 ? 2 : 4;

template <int D, int F, class T>  // at least one block an SM: left to itself, ptxas spills for a sixth
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ HashGridForwardParams p) {
  constexpr int kGroup = kLevelsPerThread<F>;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.points) return;
  float x[D], y[kGroup * F] = {};
  const float keep = load_point<D>(p.x, i, p.layout.clip != 0, x);
  const int levels = p.layout.levels, begin = blockIdx.y * kGroup;
  const int count = levels - begin < kGroup ? levels - begin : kGroup;
  const int64_t row = (i * levels + begin) * F;
  TEXT3D_NO_UNROLL
  for (int k = 0; k < count; ++k) {
    float sum[F] = {}, slopes[F * D] = {};
    if (begin + k < p.layout.active_levels)
      encode_point<D, F, T>(hash_grid_level(p.layout, begin + k), x, keep, p.table, p.jacobian != nullptr, sum, slopes);
    TEXT3D_UNROLL
    for (int j = 0; j < kGroup; ++j) {  // y[k] = sum in registers, which have no address
      TEXT3D_UNROLL
      for (int f = 0; f < F; ++f) y[j * F + f] = j == k ? sum[f] : y[j * F + f];
    }
    if (p.jacobian) store_values<F * D>(p.jacobian + (row + k * F) * D, slopes);
  }
  if (count == kGroup && levels * F % (kGroup * F < 4 ? kGroup * F : 4) == 0) {
    store_values<kGroup * F>(p.y + row, y);
  } else {
    TEXT3D_UNROLL
    for (int j = 0; j < kGroup; ++j)
      if (j < count) store_values<F>(p.y + row + j * F, y + j * F);
  }
}

template <int D, int F>
struct BackwardX {
  HashGridBackwardParams p;
  TEXT3D_HD void operator()(int64_t i) const {
    float x[D], sum[D] = {};
    const float keep = load_point<D>(p.x, i, p.layout.clip != 0, x);
    for (int l = 0; l < (nearest(p.layout) ? 0 : p.layout.active_levels); ++l) {
      const HashGridLevel level = hash_grid_level(p.layout, l);
      const HashGridCell<float, uint32_t, D> cell(level, x, keep);
      const int64_t row = (i * p.layout.levels + l) * F;
      float grad_y[F];
      load_values<F>(p.grad_y + row, grad_y);
      TEXT3D_UNROLL
      for (int c = 0; c < 1 << D; ++c) {
        float theta[F], dot = 0.f;
        load_entry<F>(p.table, p.dtype, int64_t(level.first) + cell.index(level, c), theta);
        TEXT3D_UNROLL
        for (int f = 0; f < F; ++f) dot += theta[f] * grad_y[f];
        TEXT3D_UNROLL
        for (int d = 0; d < D; ++d) sum[d] += cell.first(c, d) * dot;
        if (!p.grad_jacobian) continue;
        TEXT3D_UNROLL
        for (int d = 0; d < D; ++d) {
          dot = 0.f;
          TEXT3D_UNROLL
          for (int f = 0; f < F; ++f) dot += theta[f] * p.grad_jacobian[(row + f) * D + d];
          TEXT3D_UNROLL
          for (int e = 0; e < D; ++e) sum[e] += cell.second(c, d, e) * dot;
        }
      }
    }
    TEXT3D_UNROLL
    for (int d = 0; d < D; ++d) p.grad_x[i * D + d] = sum[d];
  }
};

template <int D, int F>
struct SecondPoints {
  HashGridSecondParams p;
  TEXT3D_HD void operator()(int64_t i) const {
    float x[D], toward[D], sum[D] = {};
    const float keep = load_point<D>(p.x, i, p.layout.clip != 0, x);
    TEXT3D_UNROLL
    for (int d = 0; d < D; ++d) toward[d] = p.cotangent_x ? p.cotangent_x[i * D + d] : 0.f;
    for (int l = 0; l < p.layout.levels; ++l) {
      const int64_t row = (i * p.layout.levels + l) * F;
      float grad_y[F], grad_grad_y[F] = {};
      if (l < p.layout.active_levels) {
        const HashGridLevel level = hash_grid_level(p.layout, l);
        const HashGridCell<float, uint32_t, D> cell(level, x, keep);
        load_values<F>(p.grad_y + row, grad_y);
        TEXT3D_UNROLL
        for (int c = 0; c < 1 << D; ++c) {
          if (c > 0 && level.nearest) break;
          const int64_t entry = int64_t(level.first) + cell.index(level, c);
          float theta[F], dot = 0.f;
          if (p.cotangent_x) {
            const float weight = cell.along(c, toward);
            load_entry<F>(p.table, p.dtype, entry, theta);
            TEXT3D_UNROLL
            for (int f = 0; f < F; ++f) grad_grad_y[f] += weight * theta[f], dot += theta[f] * grad_y[f];
            TEXT3D_UNROLL
            for (int e = 0; e < D; ++e) {
              TEXT3D_UNROLL
              for (int d = 0; d < D; ++d) sum[e] += cell.second(c, d, e) * toward[d] * dot;
            }
          }
          if (p.cotangent_params) {
            const float weight = cell.value(c);
            dot = 0.f;
            load_values<F>(p.cotangent_params + entry * F, theta);
            TEXT3D_UNROLL
            for (int f = 0; f < F; ++f) grad_grad_y[f] += weight * theta[f], dot += theta[f] * grad_y[f];
            TEXT3D_UNROLL
            for (int e = 0; e < D; ++e) sum[e] += cell.first(c, e) * dot;
          }
        }
      }
      store_values<F>(p.grad_grad_y + row, grad_grad_y);
    }
    if (p.grad_x) {
      TEXT3D_UNROLL
      for (int d = 0; d < D; ++d) p.grad_x[i * D + d] = sum[d];
    }
  }
};

struct ScatterArguments {
  const float *x, *grad_y, *grad_jacobian, *toward;
  float* grad_params;
  int64_t* fixed;
  const float* fixed_scale;
  int64_t points;
  HashGridLayout layout;
};

template <int F>
TEXT3D_HD void add_fixed(int64_t* to, const float* values, float scale) {
  TEXT3D_UNROLL
  for (int f = 0; f < F; ++f) atomic_add(to + f, int64_t(rint(double(values[f]) * double(scale))));
}

__device__ __forceinline__ int run_end(unsigned heads, int lane) {  // the first lane after this one.s run
  const unsigned after = lane == 31 ? 0u : heads >> (lane + 1);
  return after ? lane + __ffs(int(after)) : 32;
}

template <int D, int F>
__global__ void __launch_bounds__(kThreads, 1) scatter_kernel(const __grid_constant__ ScatterArguments p) {
  constexpr int kCorners = 1 << D;
  constexpr unsigned kAll = 0xffffffffu;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool real = i < p.points;  // the others stay for the warp's sake
  const int64_t point = real ? i : p.points - 1;
  const int lane = threadIdx.x & 31, begin = blockIdx.y * kLevelsPerThread<F>;
  const int end = begin + kLevelsPerThread<F> < p.layout.active_levels ? begin + kLevelsPerThread<F> : p.layout.active_levels;
  float x[D], toward[D] = {};
  const float keep = load_point<D>(p.x, point, p.layout.clip != 0, x);
  if (p.toward) {
    TEXT3D_UNROLL
    for (int d = 0; d < D; ++d) toward[d] = p.toward[point * D + d];
  }

  TEXT3D_NO_UNROLL
  for (int l = begin; l < end; ++l) {  // their cotangents share a sector, which the first brings into the cache
    const HashGridLevel level = hash_grid_level(p.layout, l);
    const HashGridCell<float, uint32_t, D> cell(level, x, real ? keep : 0.f);
    const int64_t row = (point * p.layout.levels + l) * F;
    float grad_y[F];
    load_values<F>(p.grad_y + row, grad_y);

    bool head = lane == 0;
    TEXT3D_UNROLL
    for (int d = 0; d < D; ++d) {
      const uint32_t before = __shfl_up_sync(kAll, cell.term[d][0], 1);
      head = head || before != cell.term[d][0];
    }
    const unsigned heads = __ballot_sync(kAll, head);
    const bool together = __popc(heads) <= 16 && !p.fixed;  // fixed point sums do not depend on the order anyway
    const int last = run_end(heads, lane);
    float* table = p.grad_params + int64_t(level.first) * F;

    TEXT3D_UNROLL
    for (int c = 0; c < kCorners; ++c) {
      if (c > 0 && level.nearest) break;
      float values[F];
      if (p.toward) {
        const float weight = cell.along(c, toward);
        TEXT3D_UNROLL
        for (int f = 0; f < F; ++f) values[f] = weight * grad_y[f];
      } else {
        const float weight = cell.value(c);
        TEXT3D_UNROLL
        for (int f = 0; f < F; ++f) values[f] = weight * grad_y[f];
        if (p.grad_jacobian) {
          TEXT3D_UNROLL
          for (int d = 0; d < D; ++d) {
            const float slope = cell.first(c, d);
            TEXT3D_UNROLL
            for (int f = 0; f < F; ++f) values[f] += slope * p.grad_jacobian[(row + f) * D + d];
          }
        }
      }
      const uint32_t entry = cell.index(level, c);
      if (p.fixed) {
        if (real) add_fixed<F>(p.fixed + (int64_t(level.first) + entry) * F, values, *p.fixed_scale);
      } else if (together) {
        for (int step = 1; step < 32; step *= 2) {
          TEXT3D_UNROLL
          for (int f = 0; f < F; ++f) {
            const float other = __shfl_down_sync(kAll, values[f], step);
            if (lane + step < last) values[f] += other;
          }
        }
        if (head) add_values<F>(table + int64_t(entry) * F, values);
      } else if (real) {
        add_values<F>(table + int64_t(entry) * F, values);
      }
    }
  }
}

struct FromFixed {
  const int64_t* fixed;
  const float* scale;
  float* out;
  TEXT3D_HD void operator()(int64_t i) const { out[i] = float(double(fixed[i]) / double(*scale)); }
};

template <int D, int F>
struct Scatter {
  static void run(const ScatterArguments& p, cudaStream_t stream) {
    const int64_t values = int64_t(p.layout.offsets[p.layout.levels]) * F;
    cudaMemsetAsync(p.grad_params, 0, size_t(values) * sizeof(float), stream);
    if (p.points <= 0 || p.layout.active_levels <= 0) return;
    const int groups = (p.layout.active_levels + kLevelsPerThread<F> - 1) / kLevelsPerThread<F>;
    const dim3 grid(unsigned((p.points + kThreads - 1) / kThreads), unsigned(groups));
    TEXT3D_LAUNCH((scatter_kernel<D, F>), grid, kThreads, 0, stream, p);
    if (p.fixed) launch(values, FromFixed{p.fixed, p.fixed_scale, p.grad_params}, stream);
  }
};

template <int D, int F>
struct Forward {
  static void run(const HashGridForwardParams& p, cudaStream_t stream) {
    if (p.points <= 0) return;
    const int groups = (p.layout.levels + kLevelsPerThread<F> - 1) / kLevelsPerThread<F>;
    const dim3 grid(unsigned((p.points + kThreads - 1) / kThreads), unsigned(groups));
    if (p.dtype == 0) TEXT3D_LAUNCH((forward_kernel<D, F, float>), grid, kThreads, 0, stream, p);
    else if (p.dtype == 1) TEXT3D_LAUNCH((forward_kernel<D, F, half_t>), grid, kThreads, 0, stream, p);
    else TEXT3D_LAUNCH((forward_kernel<D, F, bfloat16_t>), grid, kThreads, 0, stream, p);
  }
};

template <int D, int F>
struct Backward {
  static void run(const HashGridBackwardParams& p, cudaStream_t stream) {
    if (p.grad_x) launch(p.points, BackwardX<D, F>{p}, stream);
    if (p.grad_params)
      Scatter<D, F>::run({p.x, p.grad_y, p.grad_jacobian, nullptr, p.grad_params, p.fixed, p.fixed_scale, p.points, p.layout},
                         stream);
  }
};

template <int D, int F>
struct Second {
  static void run(const HashGridSecondParams& p, cudaStream_t stream) {
    launch(p.points, SecondPoints<D, F>{p}, stream);
    if (p.grad_params)
      Scatter<D, F>::run({p.x, p.grad_y, nullptr, p.cotangent_x, p.grad_params, p.fixed, p.fixed_scale, p.points, p.layout},
                         stream);
  }
};

template <template <int, int> class Kernel, int D, class Params>
void dispatch_features(const Params& p, cudaStream_t stream) {
  const int features = p.layout.features;
  if (features == 1) Kernel<D, 1>::run(p, stream);
  else if (features == 2) Kernel<D, 2>::run(p, stream);
  else if (features == 4) Kernel<D, 4>::run(p, stream);
  else Kernel<D, 8>::run(p, stream);
}

template <template <int, int> class Kernel, class Params>
void dispatch(const Params& p, cudaStream_t stream) {
  if (p.layout.dim == 2) dispatch_features<Kernel, 2>(p, stream);
  else if (p.layout.dim == 3) dispatch_features<Kernel, 3>(p, stream);
  else dispatch_features<Kernel, 4>(p, stream);
}

void hash_grid_forward(const HashGridForwardParams& p, cudaStream_t stream) { dispatch<Forward>(p, stream); }
void hash_grid_backward(const HashGridBackwardParams& p, cudaStream_t stream) { dispatch<Backward>(p, stream); }
void hash_grid_second(const HashGridSecondParams& p, cudaStream_t stream) { dispatch<Second>(p, stream); }

}  // namespace TEXT3D_ISA
}  // namespace text3d
