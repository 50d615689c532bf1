// A warp takes 16 points: encoding and network are in shared memory, only x and y in the device's.
#include "hash_mlp/hash_mlp.h"
#include "hash_grid/warp_tile.h"
#include "mlp/warp_tile.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

template <int D>
__device__ __forceinline__ GridPoint<D> grid_point(const HashGridLayout& l, const float* x, int64_t first,
                                                   int64_t points) {
  const int64_t i = first + threadIdx.x % 16;
  float at[D];
  TEXT3D_UNROLL
  for (int d = 0; d < D; ++d) at[d] = i < points ? x[i * D + d] : 0.f;
  return GridPoint<D>(l, at, i < points);
}

template <int D>
__global__ void __launch_bounds__(128, 1) forward_kernel(const __grid_constant__ HashMLPForwardParams p,
                                                      const __grid_constant__ WarpMatrices matrices) {
  TEXT3D_DYNAMIC_SHARED(float, shared);
  const WarpNetwork<MmaFloat> network(p.mlp, matrices, p.weights, shared);
  const int64_t warps = blockDim.x / 32, step = int64_t(gridDim.x) * warps * kPoints;
  for (int64_t first = (blockIdx.x * warps + threadIdx.x / 32) * kPoints; first < p.points; first += step) {
    grid_point<D>(p.grid, p.x, first, p.points).encode(p.table, row_stride(p.mlp.inputs), network.inputs());
    network.values();
    store_rows(network.outputs(), first, p.points, p.mlp.outputs, p.y);
  }
}

template <int D>
__global__ void __launch_bounds__(128, 1) backward_kernel(const __grid_constant__ HashMLPBackwardParams p,
                                                       const __grid_constant__ WarpMatrices matrices) {
  TEXT3D_DYNAMIC_SHARED(float, shared);
  const WarpNetwork<MmaFloat> network(p.mlp, matrices, p.weights, shared);
  const int64_t warps = blockDim.x / 32, step = warps * kPoints, tiles = (p.points + step - 1) / step;
  const int64_t size = mlp_params(p.mlp);
  const int stride = row_stride(p.mlp.inputs);
  float* gradient = p.grad_weights ? p.partial + blockIdx.x * size : nullptr;
  for (int64_t i = threadIdx.x; gradient && i < size; i += blockDim.x) gradient[i] = 0.f;
  __syncthreads();
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {  // all warps together
    const int64_t first = tile * step + threadIdx.x / 32 * kPoints;
    const GridPoint<D> grid = grid_point<D>(p.grid, p.x, first, p.points);
    grid.encode(p.table, stride, network.inputs());
    network.values();
    load_rows(p.grad_y, first, p.points, p.mlp.outputs, network.own + matrices.cotangent[0]);
    const bool inner = p.grad_x || p.grad_params;
    const int turn = network.template reverse<kBackward>(nullptr, false, false, inner, gradient).turn;
    const float* cotangents = network.own + matrices.cotangent[turn];
    if (p.grad_x) {
      float sum[D];
      grid.pull_back(p.table, cotangents, stride, sum);
      TEXT3D_UNROLL
      for (int d = 0; d < D; ++d)
        if (grid.real && grid.half == 0) p.grad_x[(first + grid.point) * D + d] = sum[d];
    }
    if (p.grad_params) grid.scatter(cotangents, nullptr, nullptr, stride, p.grad_params);
    __syncwarp();
  }
}

template <int D>
void forward(const HashMLPForwardParams& p, cudaStream_t stream) {
  const WarpMatrices matrices(p.mlp, kForward);
  const int warps = matrices.warps(), bytes = reserve_shared(forward_kernel<D>, "hash_mlp", matrices, warps);
  const int64_t step = int64_t(warps) * kPoints, tiles = (p.points + step - 1) / step;
  TEXT3D_LAUNCH(forward_kernel<D>, unsigned(tiles < 1 << 16 ? tiles : 1 << 16), unsigned(warps * 32), bytes, stream, p,
                matrices);
}

template <int D>
void backward(const HashMLPBackwardParams& p, cudaStream_t stream) {
  const WarpMatrices matrices(p.mlp, kBackward);
  const int warps = matrices.warps(), bytes = reserve_shared(backward_kernel<D>, "hash_mlp", matrices, warps);
  const int64_t step = int64_t(warps) * kPoints, tiles = (p.points + step - 1) / step;
  const unsigned blocks = unsigned(tiles < 1 ? 1 : tiles < p.blocks ? tiles : p.blocks);
  TEXT3D_LAUNCH(backward_kernel<D>, blocks, unsigned(warps * 32), bytes, stream, p, matrices);
  const int64_t size = mlp_params(p.mlp);
  if (p.grad_weights) launch(size, SumPartials{p.partial, p.grad_weights, size, int(blocks)}, stream);
}

}  // namespace

void hash_mlp_forward(const HashMLPForwardParams& p, cudaStream_t stream) {
  if (p.points == 0) return;
  if (p.grid.dim == 2) forward<2>(p, stream);
  else if (p.grid.dim == 3) forward<3>(p, stream);
  else forward<4>(p, stream);
}

void hash_mlp_backward(const HashMLPBackwardParams& p, cudaStream_t stream) {
  const int64_t values = int64_t(p.grid.offsets[p.grid.levels]) * p.grid.features;
  if (p.grad_params) cudaMemsetAsync(p.grad_params, 0, size_t(values) * sizeof(float), stream);
  if (p.grid.dim == 2) backward<2>(p, stream);
  else if (p.grid.dim == 3) backward<3>(p, stream);
  else backward<4>(p, stream);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
