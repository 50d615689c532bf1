// Persistent blocks of warps with 16 points each keep the gradient of the weights in a buffer of their own: who adds what
// is fixed, so that no atomics are needed, and a last pass adds the buffers up in order.
#include "mlp/warp_tile.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

// All three kinds of pass; what a pass has no use for is null.
struct Work {
  const float *x, *weights, *grad_y, *cotangent_x, *cotangent_weights;
  float *y, *grad_x, *grad_grad_y, *partial;  // partial: [blocks, num_params], or null
  int64_t points;
  MLPLayout layout;
  WarpMatrices matrices;
};

// kPass decides which lines are there.
template <MLPPass kPass, class Kind>
__global__ void __launch_bounds__(128, 1) mlp_kernel(const __grid_constant__ Work work) {
  TEXT3D_DYNAMIC_SHARED(float, shared);
  const MLPLayout& l = work.layout;
  const WarpMatrices& at = work.matrices;
  const WarpNetwork<Kind> network(l, at, work.weights, shared);
  const int layers = network.layers(), warps = blockDim.x / 32;
  float* own = network.own;
  float* gradient = work.partial ? work.partial + int64_t(blockIdx.x) * mlp_params(l) : nullptr;
  if (gradient) {
    for (int64_t i = threadIdx.x; i < mlp_params(l); i += blockDim.x) gradient[i] = 0.f;
    __syncthreads();
  }
  const int64_t step = int64_t(warps) * kPoints, tiles = (work.points + step - 1) / step;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * step + threadIdx.x / 32 * kPoints;
    load_rows(work.x, first, work.points, l.inputs, network.inputs());
    network.values();
    if constexpr (kPass == kForward) {
      store_rows(network.outputs(), first, work.points, l.outputs, work.y);
    } else {
      const float* cw = kPass == kSecond ? work.cotangent_weights : nullptr;
      const bool with_x = kPass == kSecond && work.cotangent_x;
      if constexpr (kPass == kSecond) {
        load_rows(work.cotangent_x, first, work.points, l.inputs, own + at.tangent[0]);
        network.tangents(cw);
        if (work.grad_grad_y) store_rows(own + at.tangent[layers], first, work.points, l.outputs, work.grad_grad_y);
      }
      load_rows(work.grad_y, first, work.points, l.outputs, own + at.cotangent[0]);
      const auto [turn, curved] = network.template reverse<kPass>(cw, with_x, false, work.grad_x != nullptr, gradient);
      if (work.grad_x) {
        const float* result = own + (kPass == kSecond ? at.of_value[turn] : at.cotangent[turn]);
        store_rows(kPass == kSecond && !curved ? nullptr : result, first, work.points, l.inputs, work.grad_x);
      }
    }
    __syncthreads();
  }
}

template <MLPPass kPass, class Kind>
unsigned launch_pass(const Work& work, int blocks, cudaStream_t stream) {
  const int warps = work.matrices.warps();
  const int64_t step = int64_t(warps) * kPoints, tiles = (work.points + step - 1) / step;
  const unsigned grid = unsigned(tiles < blocks ? (tiles < 1 ? 1 : tiles) : blocks);
  const int bytes = reserve_shared(mlp_kernel<kPass, Kind>, "mlp", work.matrices, warps);
  TEXT3D_LAUNCH((mlp_kernel<kPass, Kind>), grid, unsigned(warps * 32), bytes, stream, work);
  return grid;
}

template <MLPPass kPass>
void run(Work& work, int dtype, int blocks, float* grad_weights, cudaStream_t stream) {
  work.matrices = WarpMatrices(work.layout, kPass);
  const unsigned grid = dtype == 1   ? launch_pass<kPass, MmaHalf>(work, blocks, stream)
                        : dtype == 2 ? launch_pass<kPass, MmaBfloat16>(work, blocks, stream)
                                     : launch_pass<kPass, MmaFloat>(work, blocks, stream);
  if (!grad_weights) return;
  const int64_t size = mlp_params(work.layout);
  launch(size, SumPartials{work.partial, grad_weights, size, int(grid)}, stream);
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
