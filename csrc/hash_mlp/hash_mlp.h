// A small network on top of a hash grid, y = MLP(e(x)), and its gradients, without the encoding of all points in memory.
#pragma once
#include "common/host_device.h"
#include "hash_grid/hash_grid.h"
#include "mlp/mlp.h"

namespace text3d {

struct HashMLPForwardParams {
  const float* x;        // [N, D]
  const float* table;    // [entries, F]
  const float* weights;  // [num_params]
  float* y;              // [N, outputs]
  int64_t points;
  HashGridLayout grid;
  MLPLayout mlp;         // of as many inputs as the grid has features
  auto fields() {
    return std::tie(x, table, weights, y, points, TEXT3D_HASH_GRID_LAYOUT(grid), TEXT3D_MLP_LAYOUT(mlp));
  }
};

struct HashMLPBackwardParams {
  const float* grad_y;   // [N, outputs]
  const float* x;        // [N, D]
  const float* table;    // [entries, F]
  const float* weights;  // [num_params]
  float* grad_x;         // [N, D], or null: not wanted; likewise the two below
  float* grad_params;    // [entries, F]
  float* grad_weights;   // [num_params]
  float* partial;        // CUDA: room [blocks, num_params], if grad_weights are wanted
  int32_t blocks;
  int64_t points;
  HashGridLayout grid;
  MLPLayout mlp;
  auto fields() {
    return std::tie(grad_y, x, table, weights, grad_x, grad_params, grad_weights, partial, blocks, points,
                    TEXT3D_HASH_GRID_LAYOUT(grid), TEXT3D_MLP_LAYOUT(mlp));
  }
};

}  // namespace text3d
