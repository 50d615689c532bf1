// Chunks of points, each through the loops of the grid and of the network.
#include "hash_mlp/hash_mlp.h"
#include "common/memory.h"

namespace text3d {
namespace TEXT3D_ISA {

// of the other files of this instruction set
void hash_grid_forward(const HashGridForwardParams&);
void hash_grid_backward(const HashGridBackwardParams&);
void mlp_forward(const MLPForwardParams&);
void mlp_backward(const MLPBackwardParams&);

namespace {

constexpr int64_t kChunkPoints = 65536;  // whose encoding is in memory at a time

// body(first point, number of points); once for no points, so that gradients of none are written too
template <class Body>
void for_chunks(int64_t points, const Body& body) {
  int64_t first = 0;
  do {
    const int64_t count = points - first < kChunkPoints ? points - first : kChunkPoints;
    body(first, count);
    first += count;
  } while (first < points);
}

size_t chunk_features(int64_t points, const MLPLayout& mlp) {
  return size_t(points < kChunkPoints ? points : kChunkPoints) * mlp.inputs;
}

void encode(const float* x, const float* table, const HashGridLayout& grid, int64_t points, float* features) {
  HashGridForwardParams encoding = {};
  encoding.x = x, encoding.table = table, encoding.y = features, encoding.points = points, encoding.layout = grid;
  hash_grid_forward(encoding);
}

}  // namespace

void hash_mlp_forward(const HashMLPForwardParams& p) {
  Array<float> features(chunk_features(p.points, p.mlp));
  for_chunks(p.points, [&](int64_t first, int64_t count) {
    encode(p.x + first * p.grid.dim, p.table, p.grid, count, features);
    MLPForwardParams network = {};
    network.x = features, network.weights = p.weights, network.y = p.y + first * p.mlp.outputs, network.points = count;
    network.layout = p.mlp;
    mlp_forward(network);
  });
}

void hash_mlp_backward(const HashMLPBackwardParams& p) {
  const size_t size = chunk_features(p.points, p.mlp), weights = size_t(p.grad_weights ? mlp_params(p.mlp) : 0);
  const bool inner = p.grad_x || p.grad_params;
  Array<float> features(size), grad_features(inner ? size : 0), part(weights);
  for_chunks(p.points, [&](int64_t first, int64_t count) {
    const float* x = p.x + first * p.grid.dim;
    encode(x, p.table, p.grid, count, features);
    MLPBackwardParams network = {};
    network.grad_y = p.grad_y + first * p.mlp.outputs, network.x = features, network.weights = p.weights;
    network.grad_x = inner ? static_cast<float*>(grad_features) : nullptr;
    network.grad_weights = !p.grad_weights ? nullptr : first ? static_cast<float*>(part) : p.grad_weights;
    network.points = count, network.layout = p.mlp;
    mlp_backward(network);
    for (size_t i = 0; first && i < weights; ++i) p.grad_weights[i] += part[i];
    if (!inner) return;
    HashGridBackwardParams encoding = {};
    encoding.x = x, encoding.table = p.table, encoding.grad_y = grad_features, encoding.grad_params = p.grad_params;
    encoding.grad_x = p.grad_x ? p.grad_x + first * p.grid.dim : nullptr;
    encoding.points = count, encoding.layout = p.grid, encoding.accumulate = first > 0;
    hash_grid_backward(encoding);
  });
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
