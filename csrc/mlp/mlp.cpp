// Tiles of 64 points, each through all layers in the caches of one core; nothing but inputs and outputs is in memory.
// The gradients of the weights are summed in at most 64 parts whose borders do not depend on the number of threads.
#include "mlp/tile.h"
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

constexpr int64_t kForwardChunk = 16 * kTile;
constexpr int64_t kSmallestPart = 16 * kTile, kParts = 64;

int64_t part_points(int64_t points) {
  const int64_t share = ((points + kParts - 1) / kParts + kTile - 1) / kTile * kTile;
  return share < kSmallestPart ? kSmallestPart : share;
}

inline int panels_of(int count) { return (count + kPanel - 1) / kPanel; }

// body(first point, number of points) for the tiles of [begin, end)
template <class Body>
void for_tiles(int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; i += kTile) body(i, int(end - i < kTile ? end - i : kTile));
}

// Cotangents of a tile; the points that fill it up send none.
void load_cotangents(const float* rows, int columns, int count, float* to) {
  const int panels = panels_of(count);
  rows_to_panels(rows, columns, columns, count, panels, to);
  for (int point = count; point < panels * kPanel; ++point)
    for (int column = 0; column < columns; ++column)
      to[(int64_t(point / kPanel) * columns + column) * kPanel + point % kPanel] = 0.f;
}

// The sum of the parts [parts, size], in order.
void sum_parts(const float* parts, int64_t count, int64_t size, float* out) {
  if (count == 0) std::memset(out, 0, size_t(size) * sizeof(float));
  else std::memcpy(out, parts, size_t(size) * sizeof(float));
  for (int64_t part = 1; part < count; ++part)
    for (int64_t i = 0; i < size; ++i) out[i] += parts[part * size + i];
}

}  // namespace

void mlp_forward(const MLPForwardParams& p) {
  const int inputs = p.layout.inputs, outputs = p.layout.outputs;
  parallel_for(p.points, kForwardChunk, [&](int64_t begin, int64_t end) {
    MLPTile tile(p.layout, p.weights, false, false);
    for_tiles(begin, end, [&](int64_t i, int count) {
      const int panels = panels_of(count);
      rows_to_panels(p.x + i * inputs, inputs, inputs, count, panels, tile.inputs());
      tile.forward(panels);
      panels_to_rows(tile.outputs(), outputs, count, p.y + i * outputs, outputs);
    });
  });
}

void mlp_backward(const MLPBackwardParams& p) {
  const int inputs = p.layout.inputs, outputs = p.layout.outputs;
  const int64_t part = part_points(p.points), parts = (p.points + part - 1) / part, size = mlp_params(p.layout);
  Array<float> sums(size_t(p.grad_weights ? parts * size : 0));
  parallel_for(p.points, part, [&](int64_t begin, int64_t end) {
    MLPTile tile(p.layout, p.weights, true, false);
    for_tiles(begin, end, [&](int64_t i, int count) {
      const int panels = panels_of(count);
      rows_to_panels(p.x + i * inputs, inputs, inputs, count, panels, tile.inputs());
      load_cotangents(p.grad_y + i * outputs, outputs, count, tile.output_cotangents());
      tile.forward(panels);
      tile.backward(panels, p.grad_x != nullptr);
      if (p.grad_x) panels_to_rows(tile.input_gradients(), inputs, count, p.grad_x + i * inputs, inputs);
      if (p.grad_weights) tile.add_gradients(panels);
    });
    if (p.grad_weights) tile.write_gradients(sums + begin / part * size);
  });
  if (p.grad_weights) sum_parts(sums, parts, size, p.grad_weights);
}

void mlp_second(const MLPSecondParams& p) {
  const int inputs = p.layout.inputs, outputs = p.layout.outputs;
  const int64_t part = part_points(p.points), parts = (p.points + part - 1) / part, size = mlp_params(p.layout);
  Array<float> sums(size_t(p.grad_weights ? parts * size : 0));
  const bool with_x = p.cotangent_x != nullptr;
  parallel_for(p.points, part, [&](int64_t begin, int64_t end) {
    MLPTile tile(p.layout, p.weights, true, true);
    for_tiles(begin, end, [&](int64_t i, int count) {
      const int panels = panels_of(count);
      rows_to_panels(p.x + i * inputs, inputs, inputs, count, panels, tile.inputs());
      load_cotangents(p.grad_y + i * outputs, outputs, count, tile.output_cotangents());
      if (with_x) rows_to_panels(p.cotangent_x + i * inputs, inputs, inputs, count, panels, tile.input_tangents());
      tile.forward(panels);
      tile.tangent(panels, with_x, p.cotangent_weights);
      if (p.grad_grad_y) panels_to_rows(tile.output_tangents(), outputs, count, p.grad_grad_y + i * outputs, outputs);
      if (!p.grad_x && !p.grad_weights) return;
      const bool any = tile.backward_second(panels, p.grad_x != nullptr, false, p.cotangent_weights);
      if (p.grad_x && any)
        panels_to_rows(tile.input_gradients_of_values(), inputs, count, p.grad_x + i * inputs, inputs);
      if (p.grad_x && !any) std::memset(p.grad_x + i * inputs, 0, sizeof(float) * count * inputs);
      if (p.grad_weights) tile.add_second_gradients(panels, with_x);
    });
    if (p.grad_weights) tile.write_gradients(sums + begin / part * size);
  });
  if (p.grad_weights) sum_parts(sums, parts, size, p.grad_weights);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
