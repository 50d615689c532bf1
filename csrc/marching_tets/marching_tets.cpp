#include "marching_tets/marching_tets.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

// Per sign pattern of a cube: the corners of its triangles, those of tets with one triangle first. A corner is the edge
// it lies on: the lower cube corner, and 8 times the step to the upper one.
struct CubeTriangles {
  uint8_t ones, twos;  // triangles, not tets
  uint8_t corners[36];
};
struct CubeTable {
  CubeTriangles cubes[256];
};

constexpr CubeTable make_cube_table() {
  CubeTable table{};
  for (int cube = 0; cube < 256; ++cube) {
    CubeTriangles& out = table.cubes[cube];
    int filled = 0;
    for (int wanted = 1; wanted <= 2; ++wanted) {
      for (int tet = 0; tet < 6; ++tet) {
        int inside = 0;
        for (int c = 0; c < 4; ++c) inside |= (cube >> kuhn_corner(tet, c) & 1) << c;
        if (triangle_count(inside) != wanted) continue;
        (wanted == 1 ? out.ones : out.twos) += uint8_t(wanted);
        for (int i = 0; i < 3 * wanted; ++i) {
          const int edge = int(triangle_edges(inside) >> (3 * i) & 7u);
          const int a = kuhn_corner(tet, edge_corner(edge, 0)), b = kuhn_corner(tet, edge_corner(edge, 1));
          out.corners[filled++] = uint8_t((a < b ? a : b) | (a ^ b) << 3);
        }
      }
    }
  }
  return table;
}

constexpr CubeTable kCubes = make_cube_table();

// For the vertices of one row with crossing edges: the id of the first, and which corners above they go to.
struct Row {
  int32_t* first;  // [nz + 1]
  uint8_t* flags;  // [nz + 1]
};

// Fills `row` with row (x, y), and emits its vertices.
template <bool kEmit>
inline void read_row(const MarchingTetsKuhnEmitParams& p, const KuhnSigns& grid, int x, int y, Row& row) {
  const int words = grid.shape.words();
  const int32_t* offsets = p.offsets + grid.word_index(x, y, 0);
  if (offsets[0] == offsets[words]) return;
  for (int w = 0; w < words; ++w) {
    if (offsets[w] == offsets[w + 1]) continue;
    uint64_t crossing[7];
    int32_t id = offsets[w];
    for (uint64_t left = grid.crossing_words(x, y, w, crossing); left; left &= left - 1) {
      const int bit = lowest_bit(left), z = 64 * w + bit, flags = flags_at(crossing, bit);
      row.first[z] = id;
      row.flags[z] = uint8_t(flags);
      if (kEmit) {
        const int64_t vertex = grid.shape.vertex(x, y, z);
        for (int f = flags; f; f &= f - 1, ++id)
          cross_edge(p.positions, p.sdf, vertex, vertex + grid.shape.step(lowest_bit(uint64_t(f)) + 1),
                     p.vertices + 3 * int64_t(id));
      } else {
        id += popcount(uint64_t(flags));
      }
    }
  }
}

// The triangles of the cubes above row (x, y); rows[2 dx + dy].
inline void emit_faces(const MarchingTetsKuhnEmitParams& p, const KuhnSigns& grid, int x, int y, const Row rows[4]) {
  const int words = grid.shape.words();
  const int64_t total = grid.shape.rows() * words + 1, index = grid.word_index(x, y, 0);
  const int32_t *ones = p.offsets + total, *twos = p.offsets + 2 * total;
  for (int w = 0; w < words; ++w) {
    const int64_t i = index + w;
    if (ones[i] == ones[i + 1] && twos[i] == twos[i + 1]) continue;
    uint64_t corners[8], active = 0;
    grid.corner_words(x, y, w, corners);
    for (int c = 1; c < 8; ++c) active |= corners[0] ^ corners[c];
    int32_t* one = p.faces + 3 * int64_t(ones[i]);
    int32_t* two = p.faces + 3 * (int64_t(ones[total - 1]) + 2 * int64_t(twos[i]));
    for (active &= grid.cells(w); active; active &= active - 1) {
      const int bit = lowest_bit(active), z = 64 * w + bit;
      int cube = 0;
      for (int c = 0; c < 8; ++c) cube |= int(corners[c] >> bit & 1) << c;
      const CubeTriangles& triangles = kCubes.cubes[cube];
      const uint8_t* corner = triangles.corners;
      const auto id = [&](int code) {
        const Row& row = rows[(code & 7) >> 1];
        const int at = z + (code & 1);
        return row.first[at] + popcount(uint64_t(row.flags[at] & ((1u << ((code >> 3) - 1)) - 1)));
      };
      for (int n = 3 * triangles.ones; n > 0; --n) *one++ = id(*corner++);
      for (int n = 3 * triangles.twos; n > 0; --n) *two++ = id(*corner++);
    }
  }
}

// What the edges of source row (x - dx, y - dy) give to row (x, y): their lower ends if both are the same row, and the
// upper ends of those that go there.
inline void gather_row(const MarchingTetsKuhnBackwardParams& p, const KuhnSigns& grid, int x, int y, int dx, int dy) {
  const int words = grid.shape.words(), sx = x - dx, sy = y - dy;
  const int32_t* offsets = p.offsets + grid.word_index(sx, sy, 0);
  float unused[3] = {0.f, 0.f, 0.f};
  const auto add = [&](int64_t id, int64_t low, int64_t high, bool to_high) {
    const int64_t target = to_high ? high : low;
    cross_edge_gradient(p.grad_vertices + 3 * id, p.positions, p.sdf, low, high, to_high,
                        p.grad_positions ? p.grad_positions + 3 * target : unused, p.grad_sdf[target]);
  };
  const int to_row = 4 * dx + 2 * dy;
  for (int w = 0; w < words; ++w) {
    if (offsets[w] == offsets[w + 1]) continue;
    uint64_t crossing[7];
    int64_t id = offsets[w];
    for (uint64_t left = grid.crossing_words(sx, sy, w, crossing); left; left &= left - 1) {
      const int bit = lowest_bit(left), flags = flags_at(crossing, bit);
      const int64_t low = grid.shape.vertex(sx, sy, 64 * w + bit);
      for (int f = flags; f; f &= f - 1, ++id) {
        const int corner = lowest_bit(uint64_t(f)) + 1;
        const int64_t high = low + grid.shape.step(corner);
        if (to_row == 0) add(id, low, high, false);
        if ((corner & 6) == to_row) add(id, low, high, true);
      }
    }
  }
}

}  // namespace

void marching_tets_kuhn_flag(const MarchingTetsKuhnFlagParams& p) {
  const KuhnShape shape{p.nx, p.ny, p.nz};
  const int words = shape.words();
  parallel_for(shape.rows(), 128, [&](int64_t begin, int64_t end) {
    bool any_bad = false;
    for (int64_t row = begin; row < end; ++row) {
      for (int w = 0; w < words; ++w) {
        const int left = p.nz + 1 - 64 * w;
        uint64_t bad;
        p.signs[row * words + w] = sign_bits(p.sdf + row * (p.nz + 1) + 64 * w, left < 64 ? left : 64, bad);
        any_bad |= bad != 0;
      }
    }
    if (any_bad) __atomic_store_n(p.bad, 1, __ATOMIC_RELAXED);
  });
  parallel_for(p.nx + 1, 4, [&](int64_t begin, int64_t end) {
    for (int x = int(begin); x < end; ++x)
      for (int y = 0; y <= p.ny; ++y)
        for (int w = 0; w < words; ++w) KuhnCountWord{p}.count(x, y, w);
  });
}

void marching_tets_kuhn_emit(const MarchingTetsKuhnEmitParams& p) {
  const KuhnSigns grid{p.signs, {p.nx, p.ny, p.nz}};
  parallel_for(p.nx + 1, 4, [&](int64_t begin, int64_t end) {
    const int64_t length = p.nz + 1;
    Array<int32_t> first(size_t(4 * length));
    Array<uint8_t> flags(size_t(4 * length));
    Row rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = {first + r * length, flags + r * length};
    for (int x = int(begin); x < end; ++x) {
      for (int y = 0; y <= p.ny; ++y) {
        read_row<true>(p, grid, x, y, rows[1]);
        if (x == p.nx) continue;
        read_row<false>(p, grid, x + 1, y, rows[3]);
        if (y > 0) emit_faces(p, grid, x, y - 1, rows);
        for (int r = 0; r < 4; r += 2) {
          const Row swapped = rows[r];
          rows[r] = rows[r + 1], rows[r + 1] = swapped;
        }
      }
    }
  });
}

void marching_tets_kuhn_backward(const MarchingTetsKuhnBackwardParams& p) {
  const KuhnSigns grid{p.signs, {p.nx, p.ny, p.nz}};
  parallel_for(p.nx + 1, 4, [&](int64_t begin, int64_t end) {
    for (int x = int(begin); x < end; ++x)
      for (int y = 0; y <= p.ny; ++y)
        for (int dx = 0; dx <= (x > 0); ++dx)
          for (int dy = 0; dy <= (y > 0); ++dy) gather_row(p, grid, x, y, dx, dy);
  });
}

namespace {

template <class Functor>
inline void for_each(int64_t n, int64_t grain, const Functor& functor) {
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) functor(i);
  });
}

inline int64_t word_count(int64_t n) { return (n + 63) >> 6; }

}  // namespace

void marching_tets_flag(const MarchingTetsFlagParams& p) {
  for_each(word_count(p.num_vertices), 256, [&](int64_t w) {
    const int64_t left = p.num_vertices - 64 * w;
    uint64_t bad;
    p.signs[w] = sign_bits(p.sdf + 64 * w, int(left < 64 ? left : 64), bad);
    if (bad) __atomic_store_n(p.bad, 1, __ATOMIC_RELAXED);
  });
  for_each(word_count(p.num_edges), 256, [&](int64_t w) {
    const int64_t begin = 64 * w, end = begin + 64 < p.num_edges ? begin + 64 : p.num_edges;
    uint64_t word = 0;
    for (int64_t e = begin; e < end; ++e) word |= uint64_t(edge_crosses(p, e)) << (e - begin);
    p.crossing[w] = word;
    p.edge_counts[w + 1] = popcount(word);
  });
  const int64_t words = word_count(p.num_tets);
  for_each(words, 256, [&](int64_t w) {
    const int64_t begin = 64 * w, end = begin + 64 < p.num_tets ? begin + 64 : p.num_tets;
    uint64_t one = 0, two = 0;
    for (int64_t t = begin; t < end; ++t) {
      const uint64_t count = uint64_t(tet_triangles(p, t));
      one |= (count & 1) << (t - begin), two |= (count >> 1) << (t - begin);
    }
    p.triangles[w] = one, p.triangles[words + w] = two;
    p.tet_counts[w + 1] = popcount(one), p.tet_counts[words + w + 2] = popcount(two);
  });
}

void marching_tets_emit(const MarchingTetsEmitParams& p) {
  for_each(word_count(p.num_edges), 1024, [&](int64_t w) {
    for (uint64_t word = p.crossing[w]; word; word &= word - 1) TetsEmitVertex{p}(64 * w + lowest_bit(word));
  });
  const int64_t words = word_count(p.num_tets);
  for_each(words, 1024, [&](int64_t w) {
    for (uint64_t word = p.triangles[w] | p.triangles[words + w]; word; word &= word - 1)
      TetsEmitFaces{p}(64 * w + lowest_bit(word));
  });
}

void marching_tets_backward(const MarchingTetsBackwardParams& p) { for_each(p.num_vertices, 4096, TetsBackwardVertex{p}); }

}  // namespace TEXT3D_ISA
}  // namespace text3d
