// The small network on 16 points, for a warp: products on tensor cores, activations in shared memory, weights through the
// first-level cache. The gradient of the weights is summed by a block of such warps together. For .cu files only.
#pragma once
#include <stdexcept>
#include <string>
#include "common/launch.h"
#include "common/mma.h"
#include "mlp/mlp.h"

namespace text3d {
namespace TEXT3D_ISA {

constexpr int kPoints = 16;                  // of a warp
constexpr int kSharedWanted = 96 << 10;      // bytes: two blocks of this fit on a multiprocessor of sm_90
enum MLPPass { kForward, kBackward, kSecond };

// Floats from one row of a matrix to the next: eight rows of four columns lie in different banks.
TEXT3D_HD int row_stride(int width) { return (width + 7) / 8 * 8 + 4; }

// Where a warp keeps its matrices [16, width]: floats from its begin.
struct WarpMatrices {
  int activation[kMLPLayers + 1], before[kMLPLayers + 1], tangent[kMLPLayers + 1], before_tangent[kMLPLayers + 1];
  int cotangent[2], of_value[2], total;

  WarpMatrices() = default;
  WarpMatrices(const MLPLayout& l, MLPPass pass) {
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

  // Warps of a block, at most four.
  int warps() const {
    const int bytes = total * int(sizeof(float));
    return 4 * bytes <= kSharedWanted ? 4 : 2 * bytes <= kSharedWanted ? 2 : 1;
  }
};

// Lets a kernel have the shared memory of `warps` warps; returns its bytes.
template <class Kernel>
int reserve_shared(Kernel kernel, const char* op, const WarpMatrices& at, int warps) {
  const int bytes = warps * at.total * int(sizeof(float));
#if !defined(TEXT3D_EMULATE)
  if (bytes > 48 << 10 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(std::string(op) + ": activations of " + std::to_string(bytes / warps) + " bytes a warp do not "
                             "fit into this GPU's shared memory; use a smaller width or fewer layers");
  }
#else
  (void)kernel, (void)op;
#endif
  return bytes;
}

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
__device__ __forceinline__ void load_rows(const float* from, int64_t first, int64_t points, int columns, float* to) {
  const int stride = row_stride(columns);
  for_elements(columns, [&](int row, int column) {
    to[row * stride + column] = from && first + row < points ? from[(first + row) * columns + column] : 0.f;
  });
}

__device__ __forceinline__ void store_rows(const float* from, int64_t first, int64_t points, int columns, float* to) {
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

// A warp's view of its matrices and of the network. Where a pass leaves its result is said with it.
template <class Kind>
struct WarpNetwork {
  const MLPLayout& l;
  const WarpMatrices& at;
  const float* weights;
  float* block;  // matrices of the block's first warp
  float* own;    // of this one

  __device__ __forceinline__ WarpNetwork(const MLPLayout& l, const WarpMatrices& at, const float* weights, float* block)
      : l(l), at(at), weights(weights), block(block), own(block + threadIdx.x / 32 * at.total) {}

  __device__ __forceinline__ int layers() const { return mlp_layers(l); }
  __device__ __forceinline__ float* inputs() const { return own + at.activation[0]; }
  __device__ __forceinline__ float* outputs() const { return own + at.activation[layers()]; }

  // From inputs() to outputs().
  __device__ __forceinline__ void values() const {
    for (int i = 0; i < layers(); ++i) {
      const MLPLayer layer = mlp_layer(l, i);
      const int from = row_stride(layer.inputs), to = row_stride(layer.outputs);
      const float* a = own + at.activation[i];
      const float* w = weights + layer.weight;
      float* value = own + at.activation[i + 1];
      float* before = own + at.before[i + 1];
      product<Kind>(layer.outputs, layer.inputs, [&](int row, int k) { return a[row * from + k]; },
                    [&](int k, int n) { return __ldg(w + int64_t(n) * layer.inputs + k); },
                    [&](int row, int n, float sum) {
                      const float z = sum + (layer.bias < 0 ? 0.f : __ldg(weights + layer.bias + n));
                      before[row * to + n] = z;
                      value[row * to + n] = activation_value(layer.activation, z);
                    });
    }
  }

  // From at.tangent[0], and the cotangents of the weights unless they are null, to at.tangent[layers()].
  __device__ __forceinline__ void tangents(const float* cotangent_weights) const {
    const float* cw = cotangent_weights;
    for (int i = 0; i < layers(); ++i) {
      const MLPLayer layer = mlp_layer(l, i);
      const int from = row_stride(layer.inputs), to = row_stride(layer.outputs);
      const float* a = own + at.activation[i];
      const float* moved = own + at.tangent[i];
      const float* w = weights + layer.weight;
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
  }

  struct Reversed {
    int turn;      // e_0 is in cotangent[turn], f_0 in of_value[turn]
    bool curved;   // is there any f_0? Otherwise it is 0 and not written
  };

  // From cotangent[0] = e_L, for kSecond after tangents() and, if with_values, of_value[0] = f_L, otherwise 0.
  // gradient: where this block sums those of the weights, or null; then all its warps must call this together, those
  // without points with zeros. with_x: are there tangents of the inputs?
  template <MLPPass kPass>
  __device__ __forceinline__ Reversed reverse(const float* cotangent_weights, bool with_x, bool with_values,
                                              bool want_inputs, float* gradient) const {
    const float* cw = kPass == kSecond ? cotangent_weights : nullptr;
    Reversed result = {0, kPass == kSecond && with_values};
    for (int i = layers() - 1; i >= 0; --i) {
      const MLPLayer layer = mlp_layer(l, i);
      const int to = row_stride(layer.outputs), turn = result.turn;
      const bool smooth = !piecewise_linear(layer.activation);
      const float* before = own + at.before[i + 1];
      float* delta = own + at.cotangent[turn];
      float* v = own + at.of_value[turn];
      for_elements(layer.outputs, [&](int row, int n) {
        const int k = row * to + n;
        const float slope = activation_slope(layer.activation, before[k]);
        if constexpr (kPass == kSecond) {
          float value = result.curved ? v[k] * slope : 0.f;
          if (smooth)
            value += delta[k] * own[at.before_tangent[i + 1] + k] * activation_curvature(layer.activation, before[k]);
          v[k] = value;
        }
        delta[k] *= slope;
      });
      result.curved |= kPass == kSecond && smooth;
      if (gradient) {
        __syncthreads();
        float* of_block = block + at.cotangent[turn];
        if constexpr (kPass == kBackward) {
          add_outer<Kind>(layer, of_block, block + at.activation[i], at.total, true, gradient);
        } else {
          if (result.curved)
            add_outer<Kind>(layer, block + at.of_value[turn], block + at.activation[i], at.total, true, gradient);
          if (i > 0 || with_x)
            add_outer<Kind>(layer, of_block, block + at.tangent[i], at.total, false, gradient);
        }
        __syncthreads();
      }
      if (i == 0 && !want_inputs) return result;
      if constexpr (kPass == kSecond) {
        if (result.curved) back<Kind>(layer, weights, v, false, own + at.of_value[1 - turn]);
        if (cw) back<Kind>(layer, cw, delta, result.curved, own + at.of_value[1 - turn]);
        result.curved |= cw != nullptr;
      }
      back<Kind>(layer, weights, delta, false, own + at.cotangent[1 - turn]);
      result.turn = 1 - turn;
    }
    return result;
  }
};

// The sum of the blocks' gradients, in their order: out [size] = sum over parts of partial [parts, size].
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

}  // namespace TEXT3D_ISA
}  // namespace text3d
