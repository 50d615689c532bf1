// The small network on a tile of points, for a CPU. Points are in lanes: a matrix of a tile is [panel][feature][kPanel],
// two vectors of points side by side, so that a panel of a layer is a few KiB and every product is one loop over
// registers. For .cpp files only.
#pragma once
#include "common/lanes.h"
#include "common/memory.h"
#include "mlp/mlp.h"

namespace text3d {
namespace TEXT3D_ISA {

constexpr int kPanel = 2 * kLanes;                        // points of a panel
constexpr int kTile = 64;                                 // points of a tile
constexpr int kPanels = kTile / kPanel;                   // panels of a tile
constexpr int kBlockRows = sizeof(Floats) == 64 ? 12 : 6; // rows of a product in registers: 2 vectors for each

// A matrix by its strides, read one number at a time.
struct Strided {
  const float* at;
  int64_t row, column;
};

// c [R, kPanel] = (add ? c : bias) + sum over `panels` of a [R, depth] b [depth, kPanel]; a panel of a is `hop` further,
// that of b follows on. The rows of b and c are b_row and c_row apart; bias may be null.
template <int R>
__attribute__((always_inline)) inline void multiply_block(Strided a, int64_t hop, const float* b, int64_t b_row,
                                                          int panels, int depth, const float* bias, bool add,
                                                          float* c, int64_t c_row) {
  Floats sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    sum[r][0] = add ? load_lanes(c + r * c_row) : broadcast(bias ? bias[r] : 0.f);
    sum[r][1] = add ? load_lanes(c + r * c_row + kLanes) : sum[r][0];
  }
  for (int panel = 0; panel < panels; ++panel, a.at += hop) {
    const float* from = a.at;
    for (int k = 0; k < depth; ++k, from += a.column, b += b_row) {
      const Floats b0 = load_lanes(b), b1 = load_lanes(b + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Floats factor = broadcast(from[r * a.row]);
        sum[r][0] += factor * b0;
        sum[r][1] += factor * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store_lanes(c + r * c_row, sum[r][0]);
    store_lanes(c + r * c_row + kLanes, sum[r][1]);
  }
}

using MultiplyBlock = void (*)(Strided, int64_t, const float*, int64_t, int, int, const float*, bool, float*, int64_t);

template <int R>
void multiply_rows(Strided a, int64_t hop, const float* b, int64_t b_row, int panels, int depth, const float* bias,
                   bool add, float* c, int64_t c_row) {
  multiply_block<R>(a, hop, b, b_row, panels, depth, bias, add, c, c_row);
}

inline MultiplyBlock pick_block(int rows) {
  static const MultiplyBlock blocks[] = {
      multiply_rows<1>, multiply_rows<2>, multiply_rows<3>, multiply_rows<4>,  multiply_rows<5>,  multiply_rows<6>,
#if defined(__AVX512F__)
      multiply_rows<7>, multiply_rows<8>, multiply_rows<9>, multiply_rows<10>, multiply_rows<11>, multiply_rows<12>,
#endif
  };
  return blocks[rows - 1];
}

// body(first row, number of rows): rows in blocks of about the same size, at most kBlockRows.
template <class Body>
inline void for_blocks(int rows, const Body& body) {
  const int blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int block = 0, row = 0; block < blocks; ++block) {
    const int count = rows / blocks + (block < rows % blocks);
    body(row, count);
    row += count;
  }
}

// c [panels][rows][kPanel] = bias or c, + a [rows, depth] b [panels][depth][kPanel]
inline void multiply(const Strided& a, int rows, int depth, const float* b, int panels, const float* bias, bool add,
                     float* c) {
  for_blocks(rows, [&](int row, int count) {
    const MultiplyBlock run = pick_block(count);
    const Strided part = {a.at + row * a.row, a.row, a.column};
    for (int panel = 0; panel < panels; ++panel)
      run(part, 0, b + int64_t(panel) * depth * kPanel, kPanel, 1, depth, bias ? bias + row : nullptr, add,
          c + (int64_t(panel) * rows + row) * kPanel, kPanel);
  });
}

// Columns of the gradient of a weight, padded to whole panels.
inline int padded(int columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// sum [rows, padded(columns)] += d [panels][rows][kPanel] times the points' rows [panels * kPanel, padded(columns)]
inline void add_outer(const float* d, int rows, const float* by_point, int columns, int panels, float* sum) {
  const int64_t width = padded(columns);
  for_blocks(rows, [&](int row, int count) {
    const MultiplyBlock run = pick_block(count);
    const Strided part = {d + row * kPanel, kPanel, 1};
    for (int64_t column = 0; column < width; column += kPanel)
      run(part, int64_t(rows) * kPanel, by_point + column, width, panels, kPanel, nullptr, true,
          sum + row * width + column, width);
  });
}

// `count` points' rows [count, columns] as panels [panels][columns][kPanel]; what is missing repeats the last point.
inline void rows_to_panels(const float* rows, int64_t stride, int columns, int count, int panels, float* to) {
  for (int panel = 0; panel < panels; ++panel)
    for (int half = 0; half < 2; ++half) {
      const float* from[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int point = panel * kPanel + half * kLanes + lane;
        from[lane] = rows + (point < count ? point : count - 1) * stride;
      }
      float* out = to + int64_t(panel) * columns * kPanel + half * kLanes;
      int column = 0;
      for (; column + 4 <= columns; column += 4) {
        Floats a, b, c, d;
        load_rows(from, a, b, c, d);
        store_lanes(out + column * kPanel, a), store_lanes(out + (column + 1) * kPanel, b);
        store_lanes(out + (column + 2) * kPanel, c), store_lanes(out + (column + 3) * kPanel, d);
        for (int lane = 0; lane < kLanes; ++lane) from[lane] += 4;
      }
      for (; column < columns; ++column)
        for (int lane = 0; lane < kLanes; ++lane) out[column * kPanel + lane] = *from[lane]++;
    }
}

// The way back, for the first `count` points; the columns beyond are not touched.
inline void panels_to_rows(const float* panels_of, int columns, int count, float* rows, int64_t stride) {
  for (int begin = 0; begin < count; begin += kLanes) {
    const float* from = panels_of + int64_t(begin / kPanel) * columns * kPanel + begin % kPanel;
    const int valid = count - begin < kLanes ? count - begin : kLanes;
    float* out = rows + begin * stride;
    int column = 0;
    for (; column + 4 <= columns; column += 4) {
      alignas(64) float staged[kLanes][4];
      store_rows(staged, load_lanes(from + column * kPanel), load_lanes(from + (column + 1) * kPanel),
                 load_lanes(from + (column + 2) * kPanel), load_lanes(from + (column + 3) * kPanel));
      for (int lane = 0; lane < valid; ++lane) std::memcpy(out + lane * stride + column, staged[lane], sizeof staged[0]);
    }
    for (; column < columns; ++column)
      for (int lane = 0; lane < valid; ++lane) out[lane * stride + column] = from[column * kPanel + lane];
  }
}

// Everything that one thread needs for a tile.
class MLPTile {
 public:
  // second: also the tangents and what goes with them
  MLPTile(const MLPLayout& layout, const float* weights, bool backward, bool second)
      : layers_(mlp_layers(layout)), weights_(weights) {
    int64_t matrices = 0, sums = 0, widest = 0;
    for (int l = 0; l < layers_; ++l) {
      layer_[l] = mlp_layer(layout, l);
      const MLPLayer& layer = layer_[l];
      width_[l] = layer.inputs, width_[l + 1] = layer.outputs;
      sum_[l] = sums;
      sums += int64_t(layer.outputs) * (padded(layer.inputs) + kPanel);  // then those of the biases, in lanes
    }
    for (int l = 0; l <= layers_; ++l) {
      matrix_[l] = matrices;
      matrices += int64_t(width_[l]) * kTile;
      widest = padded(width_[l]) > widest ? padded(width_[l]) : widest;
    }
    const size_t size = size_t(matrices);
    a_.resize(size), z_.resize(size);
    if (backward) {
      delta_.resize(size), by_point_.resize(size_t(widest) * kTile);
      sums_.resize(size_t(sums));
      std::memset(sums_, 0, size_t(sums) * sizeof(float));
    }
    if (second) at_.resize(size), zt_.resize(size), v_.resize(size);
  }

  float* inputs() { return a_; }                            // [panels][inputs][kPanel], to be filled
  float* input_tangents() { return at_; }                   // likewise
  const float* outputs() const { return a_ + matrix_[layers_]; }
  const float* output_tangents() const { return at_ + matrix_[layers_]; }
  float* output_cotangents() { return delta_ + matrix_[layers_]; }  // e_L, to be filled; backward() scales it
  float* output_cotangents_of_values() { return v_ + matrix_[layers_]; }  // f_L, likewise, if `with_values`
  const float* input_gradients() const { return delta_; }   // e_0
  const float* input_gradients_of_values() const { return v_; }  // f_0

  void forward(int panels) {
    for (int l = 0; l < layers_; ++l) {
      const MLPLayer& layer = layer_[l];
      const bool simple = piecewise_linear(layer.activation);
      float* a = a_ + matrix_[l + 1];
      float* z = simple ? a : z_ + matrix_[l + 1];
      multiply(weight(weights_, l), layer.outputs, layer.inputs, a_ + matrix_[l], panels, bias(weights_, l), false, z);
      if (layer.activation == kNone) continue;
      apply(int64_t(panels) * layer.outputs * kPanel,
            [&](int64_t i) { store_lanes(a + i, activation_value(layer.activation, load_lanes(z + i))); });
    }
  }

  // cotangent_weights may be null; without `with_x` the inputs' tangents are 0
  void tangent(int panels, bool with_x, const float* cotangent_weights) {
    for (int l = 0; l < layers_; ++l) {
      const MLPLayer& layer = layer_[l];
      float* zt = zt_ + matrix_[l + 1];
      float* at = at_ + matrix_[l + 1];
      const bool moves = l > 0 || with_x;
      if (moves)
        multiply(weight(weights_, l), layer.outputs, layer.inputs, at_ + matrix_[l], panels, nullptr, false, zt);
      else
        std::memset(zt, 0, sizeof(float) * panels * layer.outputs * kPanel);
      if (cotangent_weights) {
        multiply(weight(cotangent_weights, l), layer.outputs, layer.inputs, a_ + matrix_[l], panels, nullptr, true, zt);
        const float* add = bias(cotangent_weights, l);
        for (int64_t row = 0; add && row < int64_t(panels) * layer.outputs; ++row)
          for (int half = 0; half < 2; ++half) {
            float* to = zt + row * kPanel + half * kLanes;
            store_lanes(to, load_lanes(to) + add[row % layer.outputs]);
          }
      }
      const float* z = preactivation(l);
      apply(int64_t(panels) * layer.outputs * kPanel, [&](int64_t i) {
        store_lanes(at + i, load_lanes(zt + i) * activation_slope(layer.activation, load_lanes(z + i)));
      });
    }
  }

  // From output_cotangents(): all delta_l, and e_0 in input_gradients() if wanted.
  void backward(int panels, bool with_inputs) {
    for (int l = layers_ - 1; l >= 0; --l) {
      scale_by_slope(l, panels, delta_ + matrix_[l + 1]);
      if (l > 0 || with_inputs) back(weights_, l, panels, delta_ + matrix_[l + 1], false, delta_ + matrix_[l]);
    }
  }

  // The same after tangent(), also for the values: v_l, f_0. with_values: f_L is in output_cotangents_of_values(),
  // otherwise 0. Returns whether there are any v.
  bool backward_second(int panels, bool with_inputs, bool with_values, const float* cotangent_weights) {
    bool curved = with_values;
    for (int l = layers_ - 1; l >= 0; --l) {
      const MLPLayer& layer = layer_[l];
      const int64_t size = int64_t(panels) * layer.outputs * kPanel;
      float* delta = delta_ + matrix_[l + 1];
      float* v = v_ + matrix_[l + 1];
      const float* z = preactivation(l);
      const float* zt = zt_ + matrix_[l + 1];
      const bool bends = !piecewise_linear(layer.activation);
      if (curved) scale_by_slope(l, panels, v);
      if (bends)
        apply(size, [&](int64_t i) {
          const Floats old = curved ? load_lanes(v + i) : Floats{};
          store_lanes(v + i, old + load_lanes(delta + i) * load_lanes(zt + i) *
                                       activation_curvature(layer.activation, load_lanes(z + i)));
        });
      curved |= bends;
      scale_by_slope(l, panels, delta);
      has_v_[l] = curved;
      if (l > 0 || with_inputs) {
        if (curved) back(weights_, l, panels, v, false, v_ + matrix_[l]);
        if (cotangent_weights) back(cotangent_weights, l, panels, delta, curved, v_ + matrix_[l]);
        curved |= cotangent_weights != nullptr;
        back(weights_, l, panels, delta, false, delta_ + matrix_[l]);
      }
    }
    return curved;
  }

  // After backward(): adds the tile's part of the weights' gradients.
  void add_gradients(int panels) {
    for (int l = 0; l < layers_; ++l) add_gradient(l, panels, a_ + matrix_[l], delta_ + matrix_[l + 1], true);
  }

  // After backward_second()
  void add_second_gradients(int panels, bool with_x) {
    for (int l = 0; l < layers_; ++l) {
      if (has_v_[l]) add_gradient(l, panels, a_ + matrix_[l], v_ + matrix_[l + 1], true);
      if (l > 0 || with_x) add_gradient(l, panels, at_ + matrix_[l], delta_ + matrix_[l + 1], false);
    }
  }

  // The sums of all tiles so far, flat.
  void write_gradients(float* out) const {
    for (int l = 0; l < layers_; ++l) {
      const MLPLayer& layer = layer_[l];
      const int64_t width = padded(layer.inputs);
      const float* sums = sums_ + sum_[l];
      for (int row = 0; row < layer.outputs; ++row)
        std::memcpy(out + layer.weight + int64_t(row) * layer.inputs, sums + row * width, sizeof(float) * layer.inputs);
      const float* of_bias = sums + layer.outputs * width;
      for (int row = 0; layer.bias >= 0 && row < layer.outputs; ++row) {
        float sum = 0.f;
        for (int k = 0; k < kPanel; ++k) sum += of_bias[row * kPanel + k];
        out[layer.bias + row] = sum;
      }
    }
  }

 private:
  template <class Body>
  static void apply(int64_t count, const Body& body) {
    for (int64_t i = 0; i < count; i += kLanes) body(i);
  }

  Strided weight(const float* weights, int l) const {
    return {weights + layer_[l].weight, layer_[l].inputs, 1};
  }
  const float* bias(const float* weights, int l) const {
    return layer_[l].bias < 0 ? nullptr : weights + layer_[l].bias;
  }
  const float* preactivation(int l) const {  // or what has its sign
    return (piecewise_linear(layer_[l].activation) ? a_ : z_) + matrix_[l + 1];
  }

  void scale_by_slope(int l, int panels, float* values) {
    const MLPLayer& layer = layer_[l];
    if (layer.activation == kNone) return;
    const float* z = preactivation(l);
    apply(int64_t(panels) * layer.outputs * kPanel, [&](int64_t i) {
      store_lanes(values + i, load_lanes(values + i) * activation_slope(layer.activation, load_lanes(z + i)));
    });
  }

  // to = (add ? to : 0) + W_l^T from
  void back(const float* weights, int l, int panels, const float* from, bool add, float* to) {
    const MLPLayer& layer = layer_[l];
    const Strided transposed = {weights + layer.weight, 1, layer.inputs};
    multiply(transposed, layer.inputs, layer.outputs, from, panels, nullptr, add, to);
  }

  void add_gradient(int l, int panels, const float* a, const float* d, bool with_bias) {
    const MLPLayer& layer = layer_[l];
    const int64_t width = padded(layer.inputs);
    panels_to_rows(a, layer.inputs, panels * kPanel, by_point_, width);
    if (width > layer.inputs)
      for (int point = 0; point < panels * kPanel; ++point)
        std::memset(by_point_ + point * width + layer.inputs, 0, sizeof(float) * (width - layer.inputs));
    float* sums = sums_ + sum_[l];
    add_outer(d, layer.outputs, by_point_, layer.inputs, panels, sums);
    if (!with_bias || layer.bias < 0) return;
    float* of_bias = sums + layer.outputs * width;
    for (int panel = 0; panel < panels; ++panel)
      apply(int64_t(layer.outputs) * kPanel, [&](int64_t i) {
        store_lanes(of_bias + i, load_lanes(of_bias + i) + load_lanes(d + int64_t(panel) * layer.outputs * kPanel + i));
      });
  }

  int layers_;
  const float* weights_;
  MLPLayer layer_[kMLPLayers];
  int width_[kMLPLayers + 1];
  int64_t matrix_[kMLPLayers + 1], sum_[kMLPLayers];
  bool has_v_[kMLPLayers] = {};
  Array<float> a_, z_, delta_;     // activations, what they are of (smooth ones), backward: e and delta
  Array<float> at_, zt_, v_;       // their tangents, f and v
  Array<float> by_point_, sums_;
};

}  // namespace TEXT3D_ISA
}  // namespace text3d
