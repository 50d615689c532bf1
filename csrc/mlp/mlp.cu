// A warp takes 16 points through all layers on tensor cores, activations in shared memory, weights through the first-level
// cache. Persistent blocks keep the gradient of the weights in a buffer of their own: who adds what is fixed, so that no
// atomics are needed, and a last pass adds the buffers up in order.
#include "mlp/mlp.h"
#include <stdexcept>
#include <string>
#include "common/launch.h"
#include "common/mma.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

constexpr int kPoints = 16;                      // of a warp
constexpr int kSharedWanted = 96 << 10;          // bytes: two blocks of this fit on a multiprocessor of sm_90
enum Pass { kForward, kBackward, kSecond };

// Floats from one row of a matrix to the next: eight rows of four columns lie in different banks.
TEXT3D_HD int row_stride(int width) { return (width + 7) / 8 * 8 + 4; }

// Where a warp keeps its matrices [16, width]: floats from its begin.
struct Shared {
  int activation[kMLPLayers + 1], before[kMLPLayers + 1], tangent[kMLPLayers + 1], before_tangent[kMLPLayers + 1];
  int cotangent[2], of_value[2], total;

  Shared() = default;
  Shared(const MLPLayout& l, Pass pass) {
    const int layers = mlp_layers(l);
    int widest = 0, next = 0;
    for (int i = 0; i <= layers; ++i) {
      const int width = i == layers ? l.outputs : mlp_layer(l, i).inputs;
      widest = row_stride(width) > widest ? row_stride(width) : widest;
    }
    const int largest = kPoints * widest;
    for (int i = 0; i <= layers; ++i) {
      const int size = kPoints * row_stride(i == layers ? l.outputs : mlp_layer(l, i).inputs);
      const bool smooth = i > 0 && !piecewise_linear(mlp_layer(l, i - 1).activation);
      if (pass == kForward) {
        activation[i] = before[i] = i % 2 * largest, next = 2 * largest;
        continue;
      }
      activation[i] = before[i] = next, next += size;
      if (smooth) before[i] = next, next += size;
      if (pass == kBackward) continue;
      tangent[i] = next, next += size;
      before_tangent[i] = next, next += smooth ? size : 0;
    }
    for (int i = 0; i < 2; ++i) {
      cotangent[i] = next, next += pass == kForward ? 0 : largest;
      of_value[i] = next, next += pass == kSecond ? largest : 0;
    }
    total = next;
  }
};

// All three kinds of pass; what a pass has no use for is null.
struct Work {
  const float *x, *weights, *grad_y, *cotangent_x, *cotangent_weights;
  float *y, *grad_x, *grad_grad_y, *partial;  // partial: [blocks, num_params], or null
  int64_t points;
  MLPLayout layout;
  Shared shared;
};

// done(row, column, sum) for c [16, columns] = sum over k < depth of a(row, k) b(k, column); all lanes together.
template <class Kind, class A, class B, class Done>
__device__ __forceinline__ void product(int columns, int depth, const A& a, const B& b, const Done& done) {
  const int lane = threadIdx.x % 32;
  for (int column = 0; column < columns; column += 8) {
    float d[4] = {};
    const auto inside = [&](int k, int n) { return k < depth && column + n < columns ? b(k, column + n) : 0.f; };
    for (int k = 0; k < depth; k += Kind::kStep)
      multiply_add<Kind>(d, lane, k, [&](int row, int i) { return i < depth ? a(row, i) : 0.f; }, inside);
    TEXT3D_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int at = column + lane % 4 * 2 + i % 2;
      if (at < columns) done(lane / 4 + i / 2 * 8, at, d[i]);
    }
  }
  __syncwarp();
}

template <class Body>
__device__ __forceinline__ void for_elements(int columns, const Body& body) {
  for (int i = threadIdx.x % 32; i < kPoints * columns; i += 32) body(i / columns, i % columns);
  __syncwarp();
}

// The points' rows of a matrix in memory; 0 for points beyond the last.
__device__ __forceinline__ void load(const float* from, int64_t first, int64_t points, int columns, float* to) {
  const int stride = row_stride(columns);
  for_elements(columns, [&](int row, int column) {
    to[row * stride + column] = from && first + row < points ? from[(first + row) * columns + column] : 0.f;
  });
}

__device__ __forceinline__ void store(const float* from, int64_t first, int64_t points, int columns, float* to) {
  const int stride = row_stride(columns);
  for_elements(columns, [&](int row, int column) {
    if (first + row < points) to[(first + row) * columns + column] = from ? from[row * stride + column] : 0.f;
  });
}

// out [16, layer.inputs] = (add ? out : 0) + d [16, layer.outputs] W
template <class Kind>
__device__ __forceinline__ void back(const MLPLayer& layer, const float* weights, const float* d, bool add, float* out) {
  const int from = row_stride(layer.outputs), to = row_stride(layer.inputs);
  const float* w = weights + layer.weight;
  product<Kind>(layer.inputs, layer.outputs, [&](int row, int k) { return d[row * from + k]; },
                [&](int k, int n) { return __ldg(w + int64_t(k) * layer.inputs + n); },
                [&](int row, int n, float sum) { out[row * to + n] = (add ? out[row * to + n] : 0.f) + sum; });
}

// The block's sums of d^T a over its points, added to the gradient of a weight; with_bias: and those of d. All threads.
template <class Kind>
__device__ __forceinline__ void add_outer(const MLPLayer& layer, const float* d, const float* a, int region,
                                          bool with_bias, float* gradient) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int of_d = row_stride(layer.outputs), of_a = row_stride(layer.inputs), depth = warps * kPoints;
  const int across = (layer.inputs + 7) / 8, tiles = (layer.outputs + 15) / 16 * across;
  for (int tile = warp; tile < tiles; tile += warps) {
    const int row0 = tile / across * 16, column0 = tile % across * 8;
    float sum[4] = {};
    for (int k = 0; k < depth; k += Kind::kStep)
      multiply_add<Kind>(
          sum, lane, k,
          [&](int row, int p) {
            return row0 + row < layer.outputs ? d[p / kPoints * region + p % kPoints * of_d + row0 + row] : 0.f;
          },
          [&](int p, int n) {
            return column0 + n < layer.inputs ? a[p / kPoints * region + p % kPoints * of_a + column0 + n] : 0.f;
          });
    TEXT3D_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + lane / 4 + i / 2 * 8, column = column0 + lane % 4 * 2 + i % 2;
      if (row < layer.outputs && column < layer.inputs)
        gradient[layer.weight + int64_t(row) * layer.inputs + column] += sum[i];
    }
  }
  if (!with_bias || layer.bias < 0) return;
  for (int row = threadIdx.x; row < layer.outputs; row += blockDim.x) {
    float sum = 0.f;
    for (int p = 0; p < depth; ++p) sum += d[p / kPoints * region + p % kPoints * of_d + row];
    gradient[layer.bias + row] += sum;
  }
}

// kPass decides which lines are there.
template <Pass kPass, class Kind>
__global__ void __launch_bounds__(128) mlp_kernel(const __grid_constant__ Work work) {
  TEXT3D_DYNAMIC_SHARED(float, shared);
  const MLPLayout& l = work.layout;
  const Shared& at = work.shared;
  const int layers = mlp_layers(l), warps = blockDim.x / 32, region = at.total;
  float* own = shared + threadIdx.x / 32 * region;
  float* gradient = work.partial ? work.partial + int64_t(blockIdx.x) * mlp_params(l) : nullptr;
  if (gradient) {
    for (int64_t i = threadIdx.x; i < mlp_params(l); i += blockDim.x) gradient[i] = 0.f;
    __syncthreads();
  }
  const int64_t step = int64_t(warps) * kPoints, tiles = (work.points + step - 1) / step;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * step + threadIdx.x / 32 * kPoints;
    load(work.x, first, work.points, l.inputs, own + at.activation[0]);
    for (int i = 0; i < layers; ++i) {
      const MLPLayer layer = mlp_layer(l, i);
      const int from = row_stride(layer.inputs), to = row_stride(layer.outputs);
      const float* a = own + at.activation[i];
      const float* w = work.weights + layer.weight;
      float* value = own + at.activation[i + 1];
      float* before = own + at.before[i + 1];
      product<Kind>(layer.outputs, layer.inputs, [&](int row, int k) { return a[row * from + k]; },
                    [&](int k, int n) { return __ldg(w + int64_t(n) * layer.inputs + k); },
                    [&](int row, int n, float sum) {
                      const float z = sum + (layer.bias < 0 ? 0.f : __ldg(work.weights + layer.bias + n));
                      before[row * to + n] = z;
                      value[row * to + n] = activation_value(layer.activation, z);
                    });
    }
    if constexpr (kPass == kForward) {
      store(own + at.activation[layers], first, work.points, l.outputs, work.y);
    } else {
      const float* cw = kPass == kSecond ? work.cotangent_weights : nullptr;
      const bool with_x = kPass == kSecond && work.cotangent_x;
      if constexpr (kPass == kSecond) {
        load(work.cotangent_x, first, work.points, l.inputs, own + at.tangent[0]);
        for (int i = 0; i < layers; ++i) {
          const MLPLayer layer = mlp_layer(l, i);
          const int from = row_stride(layer.inputs), to = row_stride(layer.outputs);
          const float* a = own + at.activation[i];
          const float* moved = own + at.tangent[i];
          const float* w = work.weights + layer.weight;
          const float* before = own + at.before[i + 1];
          float* tangent = own + at.tangent[i + 1];
          product<Kind>(layer.outputs, layer.inputs, [&](int row, int k) { return moved[row * from + k]; },
                        [&](int k, int n) { return __ldg(w + int64_t(n) * layer.inputs + k); },
                        [&](int row, int n, float sum) { tangent[row * to + n] = sum; });
          if (cw)
            product<Kind>(layer.outputs, layer.inputs, [&](int row, int k) { return a[row * from + k]; },
                          [&](int k, int n) { return __ldg(cw + layer.weight + int64_t(n) * layer.inputs + k); },
                          [&](int row, int n, float sum) {
                            tangent[row * to + n] += sum + (layer.bias < 0 ? 0.f : __ldg(cw + layer.bias + n));
                          });
          const bool smooth = !piecewise_linear(layer.activation);
          float* before_tangent = own + at.before_tangent[i + 1];
          for_elements(layer.outputs, [&](int row, int n) {
            const int k = row * to + n;
            if (smooth) before_tangent[k] = tangent[k];
            tangent[k] *= activation_slope(layer.activation, before[k]);
          });
        }
        if (work.grad_grad_y) store(own + at.tangent[layers], first, work.points, l.outputs, work.grad_grad_y);
      }
      int turn = 0;
      bool curved = false;
      load(work.grad_y, first, work.points, l.outputs, own + at.cotangent[0]);
      for (int i = layers - 1; i >= 0; --i) {
        const MLPLayer layer = mlp_layer(l, i);
        const int to = row_stride(layer.outputs);
        const bool smooth = !piecewise_linear(layer.activation);
        const float* before = own + at.before[i + 1];
        float* delta = own + at.cotangent[turn];
        float* v = own + at.of_value[turn];
        for_elements(layer.outputs, [&](int row, int n) {
          const int k = row * to + n;
          const float slope = activation_slope(layer.activation, before[k]);
          if constexpr (kPass == kSecond) {
            float value = curved ? v[k] * slope : 0.f;
            if (smooth)
              value += delta[k] * own[at.before_tangent[i + 1] + k] * activation_curvature(layer.activation, before[k]);
            v[k] = value;
          }
          delta[k] *= slope;
        });
        curved |= kPass == kSecond && smooth;
        if (gradient) {
          __syncthreads();
          float* of_block = shared + at.cotangent[turn];
          if constexpr (kPass == kBackward) {
            add_outer<Kind>(layer, of_block, shared + at.activation[i], region, true, gradient);
          } else {
            if (curved)
              add_outer<Kind>(layer, shared + at.of_value[turn], shared + at.activation[i], region, true, gradient);
            if (i > 0 || with_x)
              add_outer<Kind>(layer, of_block, shared + at.tangent[i], region, false, gradient);
          }
          __syncthreads();
        }
        if (i > 0 || work.grad_x) {
          if constexpr (kPass == kSecond) {
            if (curved) back<Kind>(layer, work.weights, v, false, own + at.of_value[1 - turn]);
            if (cw) back<Kind>(layer, cw, delta, curved, own + at.of_value[1 - turn]);
            curved |= cw != nullptr;
          }
          back<Kind>(layer, work.weights, delta, false, own + at.cotangent[1 - turn]);
          turn = 1 - turn;
        }
      }
      if (work.grad_x) {
        const float* result = own + (kPass == kSecond ? at.of_value[turn] : at.cotangent[turn]);
        store(kPass == kSecond && !curved ? nullptr : result, first, work.points, l.inputs, work.grad_x);
      }
    }
    __syncthreads();
  }
}

// Warps of a block and blocks of a launch.
struct Shape {
  int bytes, warps;
  unsigned grid;
  Shape(const Work& work, int blocks) {
    bytes = work.shared.total * int(sizeof(float));
    warps = 4 * bytes <= kSharedWanted ? 4 : 2 * bytes <= kSharedWanted ? 2 : 1;
    const int64_t step = int64_t(warps) * kPoints, tiles = (work.points + step - 1) / step;
    grid = unsigned(tiles < blocks ? (tiles < 1 ? 1 : tiles) : blocks);
  }
};

template <Pass kPass, class Kind>
void launch_pass(const Work& work, const Shape& shape, cudaStream_t stream) {
#if !defined(TEXT3D_EMULATE)
  if (shape.warps * shape.bytes > 48 << 10 &&
      cudaFuncSetAttribute(mlp_kernel<kPass, Kind>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           shape.warps * shape.bytes) != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("mlp: activations of " + std::to_string(shape.bytes) + " bytes a warp do not fit into this "
                             "GPU's shared memory; use a smaller width or fewer layers");
  }
#endif
  TEXT3D_LAUNCH((mlp_kernel<kPass, Kind>), shape.grid, unsigned(shape.warps * 32), shape.warps * shape.bytes, stream,
                work);
}

struct SumPartials {
  const float* partial;
  float* out;
  int64_t size;
  int parts;
  TEXT3D_HD void operator()(int64_t i) const {
    float sum = 0.f;
    for (int part = 0; part < parts; ++part) sum += partial[part * size + i];
    out[i] = sum;
  }
};

template <Pass kPass>
void run(Work& work, int dtype, int blocks, float* grad_weights, cudaStream_t stream) {
  work.shared = Shared(work.layout, kPass);
  const Shape shape(work, blocks);
  if (dtype == 1) launch_pass<kPass, MmaHalf>(work, shape, stream);
  else if (dtype == 2) launch_pass<kPass, MmaBfloat16>(work, shape, stream);
  else launch_pass<kPass, MmaFloat>(work, shape, stream);
  if (!grad_weights) return;
  const int64_t size = mlp_params(work.layout);
  launch(size, SumPartials{work.partial, grad_weights, size, int(shape.grid)}, stream);
}

}  // namespace

void mlp_forward(const MLPForwardParams& p, cudaStream_t stream) {
  Work work = {};
  work.x = p.x, work.weights = p.weights, work.y = p.y, work.points = p.points, work.layout = p.layout;
  if (p.points) run<kForward>(work, p.dtype, 1 << 16, nullptr, stream);
}

void mlp_backward(const MLPBackwardParams& p, cudaStream_t stream) {
  Work work = {};
  work.x = p.x, work.weights = p.weights, work.grad_y = p.grad_y, work.grad_x = p.grad_x, work.points = p.points;
  work.layout = p.layout, work.partial = p.grad_weights ? p.partial : nullptr;
  run<kBackward>(work, p.dtype, p.blocks, p.grad_weights, stream);
}

void mlp_second(const MLPSecondParams& p, cudaStream_t stream) {
  Work work = {};
  work.x = p.x, work.weights = p.weights, work.grad_y = p.grad_y, work.cotangent_x = p.cotangent_x;
  work.cotangent_weights = p.cotangent_weights, work.grad_grad_y = p.grad_grad_y, work.grad_x = p.grad_x;
  work.points = p.points, work.layout = p.layout, work.partial = p.grad_weights ? p.partial : nullptr;
  run<kSecond>(work, p.dtype, p.blocks, p.grad_weights, stream);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
