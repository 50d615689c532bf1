// Marching tetrahedra (Doi and Koide 1991): one vertex on each edge whose ends differ in sign, one or two triangles in
// each tet with both signs. Signs are kept as words of 64 flags, and flags are ranked: number of set flags before a word
// plus those below in it. So ids follow from signs, and nothing is as large as the grid but one bit a vertex.
//
// Kuhn grid: vertex (x, y, z) is number (x (ny + 1) + y) (nz + 1) + z. Its edges go to the corners of the cube above it,
// corner 4 dx + 2 dy + dz = 1..7. In this order edges are lexicographic by (smaller, larger) vertex. A row (x, y) has
// `words` words of signs, word w for z in [64 w, 64 w + 64).
#pragma once
#include "common/bits.h"
#include "common/host_device.h"

namespace text3d {

struct MarchingTetsKuhnFlagParams {
  const float* sdf;   // [V]
  uint64_t* signs;    // [W], W = (nx + 1) (ny + 1) words
  int32_t* counts;    // [3, W + 1]: at i + 1 vertices, tets with one triangle, with two, of word i; zero at 0 on entry
  int32_t* bad;       // [1]: set to 1 if a value is NaN or infinite
  int32_t nx, ny, nz;
  auto fields() { return std::tie(sdf, signs, counts, bad, nx, ny, nz); }
};

struct MarchingTetsKuhnEmitParams {
  const float* positions;   // [V, 3]
  const float* sdf;         // [V]
  const uint64_t* signs;    // [W]
  const int32_t* offsets;   // [3, W + 1]: running sums of counts
  float* vertices;          // [N, 3]
  int32_t* faces;           // [M, 3]
  int32_t nx, ny, nz;
  auto fields() { return std::tie(positions, sdf, signs, offsets, vertices, faces, nx, ny, nz); }
};

struct MarchingTetsKuhnBackwardParams {
  const float* grad_vertices;  // [N, 3]
  const float* positions;      // [V, 3]
  const float* sdf;            // [V]
  const uint64_t* signs;       // [W]
  const int32_t* offsets;      // [W + 1]: vertices before word i
  float* grad_positions;       // [V, 3], zero on entry, or null
  float* grad_sdf;             // [V], zero on entry
  int32_t nx, ny, nz;
  auto fields() {
    return std::tie(grad_vertices, positions, sdf, signs, offsets, grad_positions, grad_sdf, nx, ny, nz);
  }
};

struct MarchingTetsFlagParams {
  const float* sdf;         // [V]
  const int32_t* tets;      // [T, 4]
  const int32_t* edges;     // [E, 2]
  uint64_t* signs;          // [ceil(V / 64)]
  uint64_t* crossing;       // [ceil(E / 64)]: edges whose ends differ in sign
  uint64_t* triangles;      // [2, ceil(T / 64)]: tets with one triangle, tets with two
  int32_t* edge_counts;     // [ceil(E / 64) + 1]: at i + 1 the set flags of word i; zero at 0 on entry
  int32_t* tet_counts;      // [2, ceil(T / 64) + 1]: likewise of triangles
  int32_t* bad;             // [1]: set to 1 if a value is NaN or infinite
  int64_t num_vertices, num_tets, num_edges;
  auto fields() {
    return std::tie(sdf, tets, edges, signs, crossing, triangles, edge_counts, tet_counts, bad, num_vertices, num_tets,
                    num_edges);
  }
};

struct MarchingTetsEmitParams {
  const float* positions;       // [V, 3]
  const float* sdf;             // [V]
  const int32_t* tets;          // [T, 4]
  const int32_t* edges;         // [E, 2]
  const int32_t* tet_edges;     // [T, 6]
  const uint64_t* signs;        // [ceil(V / 64)]
  const uint64_t* crossing;     // [ceil(E / 64)]
  const uint64_t* triangles;    // [2, ceil(T / 64)]
  const int32_t* edge_offsets;  // [ceil(E / 64) + 1]: running sums of edge_counts
  const int32_t* tet_offsets;   // [2, ceil(T / 64) + 1]
  float* vertices;              // [N, 3]
  int32_t* faces;               // [M, 3]
  int64_t num_tets, num_edges;
  auto fields() {
    return std::tie(positions, sdf, tets, edges, tet_edges, signs, crossing, triangles, edge_offsets, tet_offsets, vertices,
                    faces, num_tets, num_edges);
  }
};

struct MarchingTetsBackwardParams {
  const float* grad_vertices;   // [N, 3]
  const float* positions;       // [V, 3]
  const float* sdf;             // [V]
  const int32_t* edges;         // [E, 2]
  const int32_t* low_offsets;   // [V + 1]: edges whose smaller end is v are low_offsets[v] to low_offsets[v + 1]
  const int32_t* high_offsets;  // [V + 1]: those whose larger end it is are high_edges at high_offsets[v] to [v + 1]
  const int32_t* high_edges;    // [E]
  const uint64_t* crossing;     // [ceil(E / 64)]
  const int32_t* edge_offsets;  // [ceil(E / 64) + 1]
  float* grad_positions;        // [V, 3] or null
  float* grad_sdf;              // [V]
  int64_t num_vertices;
  auto fields() {
    return std::tie(grad_vertices, positions, sdf, edges, low_offsets, high_offsets, high_edges, crossing, edge_offsets,
                    grad_positions, grad_sdf, num_vertices);
  }
};

namespace TEXT3D_ISA {

// The triangles of sign pattern `inside` (bit i: corner i is inside): up to six edge numbers, three bits each, the first
// lowest. Edges are 01, 02, 03, 12, 13, 23; orders and windings are kaolin's.
TEXT3D_HD constexpr uint32_t pack_edges(int a, int b, int c, int d = 0, int e = 0, int f = 0) {
  return uint32_t(a | b << 3 | c << 6 | d << 9 | e << 12 | f << 15);
}
TEXT3D_HD constexpr uint32_t triangle_edges(int inside) {
  switch (inside) {
    case 1: return pack_edges(1, 0, 2);
    case 2: return pack_edges(4, 0, 3);
    case 3: return pack_edges(1, 4, 2, 1, 3, 4);
    case 4: return pack_edges(3, 1, 5);
    case 5: return pack_edges(2, 3, 0, 2, 5, 3);
    case 6: return pack_edges(1, 4, 0, 1, 5, 4);
    case 7: return pack_edges(4, 2, 5);
    case 8: return pack_edges(4, 5, 2);
    case 9: return pack_edges(4, 1, 0, 4, 5, 1);
    case 10: return pack_edges(3, 2, 0, 3, 5, 2);
    case 11: return pack_edges(1, 3, 5);
    case 12: return pack_edges(4, 1, 2, 4, 3, 1);
    case 13: return pack_edges(3, 0, 4);
    case 14: return pack_edges(2, 0, 1);
    default: return 0;
  }
}
// Number of triangles: 0 if all corners agree, 2 if they split in pairs, otherwise 1. Two bits a pattern.
TEXT3D_HD constexpr int triangle_count(int inside) { return int(0x16696994u >> (2 * inside)) & 3; }

// The two corners of edge i of a tet, and the corners (4 dx + 2 dy + dz) of the six tets of a cube, three bits each.
TEXT3D_HD constexpr int edge_corner(int edge, int end) { return int((end ? 0xfb9u >> (2 * edge) : 0x940u >> (2 * edge)) & 3u); }
TEXT3D_HD constexpr int kuhn_corner(int tet, int corner) {
  constexpr uint32_t first = 0u | 6u << 3 | 4u << 6 | 7u << 9, second = 0u | 4u << 3 | 5u << 6 | 7u << 9;
  constexpr uint32_t third = 0u | 2u << 3 | 6u << 6 | 7u << 9, fourth = 0u | 3u << 3 | 2u << 6 | 7u << 9;
  constexpr uint32_t fifth = 0u | 5u << 3 | 1u << 6 | 7u << 9, sixth = 0u | 1u << 3 | 3u << 6 | 7u << 9;
  const uint32_t packed = tet < 3 ? (tet == 0 ? first : tet == 1 ? second : third)
                                  : (tet == 3 ? fourth : tet == 4 ? fifth : sixth);
  return int(packed >> (3 * corner) & 7u);
}

// The zero of the linear function through (a, s_a) and (b, s_b), whose signs differ.
TEXT3D_HD void cross_edge(const float* positions, const float* sdf, int64_t a, int64_t b, float* vertex) {
  const float t = sdf[a] / (sdf[a] - sdf[b]);
  TEXT3D_UNROLL
  for (int axis = 0; axis < 3; ++axis) {
    const float start = positions[3 * a + axis];
    vertex[axis] = start + t * (positions[3 * b + axis] - start);
  }
}

// Adds what the vertex on edge (a, b) passes to its end a, or to b if `to_high`.
TEXT3D_HD void cross_edge_gradient(const float* grad, const float* positions, const float* sdf, int64_t a, int64_t b,
                                   bool to_high, float* grad_position, float& grad_sdf) {
  const float difference = sdf[a] - sdf[b], t = sdf[a] / difference;
  const float share = to_high ? t : 1.f - t;
  float along = 0.f;
  TEXT3D_UNROLL
  for (int axis = 0; axis < 3; ++axis) {
    along += grad[axis] * (positions[3 * b + axis] - positions[3 * a + axis]);
    grad_position[axis] += share * grad[axis];
  }
  grad_sdf += along * share / difference;  // dt/ds_a = (1 - t) / difference, dt/ds_b = t / difference
}

struct KuhnShape {
  int32_t nx, ny, nz;
  TEXT3D_HD int32_t words() const { return (nz + 64) >> 6; }
  TEXT3D_HD int64_t rows() const { return int64_t(nx + 1) * (ny + 1); }
  TEXT3D_HD int64_t vertex(int x, int y, int z) const { return (int64_t(x) * (ny + 1) + y) * (nz + 1) + z; }
  TEXT3D_HD int64_t step(int corner) const {
    return (int64_t(corner >> 2) * (ny + 1) + (corner >> 1 & 1)) * (nz + 1) + (corner & 1);
  }
};

// Signs of the rows around (x, y), word by word.
struct KuhnSigns {
  const uint64_t* signs;
  KuhnShape shape;

  TEXT3D_HD int64_t word_index(int x, int y, int w) const { return (int64_t(x) * (shape.ny + 1) + y) * shape.words() + w; }
  // Bits z of word w where an edge upwards in z exists.
  TEXT3D_HD uint64_t cells(int w) const { return bits_below(shape.nz - 64 * w); }
  TEXT3D_HD uint64_t above(const uint64_t* row, int w) const {
    return (row[w] >> 1) | (w + 1 < shape.words() ? row[w + 1] << 63 : 0);
  }
  // corners[c] bit z: the sign of corner c of the cube above (x, y, z). Rows beyond the grid repeat (x, y).
  TEXT3D_HD void corner_words(int x, int y, int w, uint64_t corners[8]) const {
    TEXT3D_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int dx = x < shape.nx ? c >> 1 : 0, dy = y < shape.ny ? c & 1 : 0;
      const uint64_t* row = signs + word_index(x + dx, y + dy, 0);
      corners[2 * c] = row[w];
      corners[2 * c + 1] = above(row, w);
    }
  }
  // crossing[c - 1] bit z: the edge from (x, y, z) to corner c exists and its ends differ.
  TEXT3D_HD uint64_t crossing_words(int x, int y, int w, uint64_t crossing[7]) const {
    uint64_t corners[8];
    corner_words(x, y, w, corners);
    const uint64_t cell = cells(w);
    uint64_t any = 0;
    TEXT3D_UNROLL
    for (int c = 1; c < 8; ++c) {
      const bool exists = (x < shape.nx || !(c & 4)) && (y < shape.ny || !(c & 2));
      crossing[c - 1] = exists ? (corners[0] ^ corners[c]) & (c & 1 ? cell : ~uint64_t(0)) : 0;
      any |= crossing[c - 1];
    }
    return any;
  }
  // Tets of cubes (x, y, z) with one triangle (its flag in `one`) and with two.
  TEXT3D_HD void tet_words(const uint64_t corners[8], int tet, uint64_t cell, uint64_t& one, uint64_t& two) const {
    const uint64_t a = corners[kuhn_corner(tet, 0)], b = corners[kuhn_corner(tet, 1)];
    const uint64_t c = corners[kuhn_corner(tet, 2)], d = corners[kuhn_corner(tet, 3)];
    const uint64_t odd = a ^ b ^ c ^ d;
    one = odd & cell;
    two = ((a ^ b) | (a ^ c)) & ~odd & cell;
  }
};

TEXT3D_HD int rank_in_word(const uint64_t crossing[7], int bit) {
  const uint64_t below = bits_below(bit);
  int rank = 0;
  TEXT3D_UNROLL
  for (int c = 0; c < 7; ++c) rank += popcount(crossing[c] & below);
  return rank;
}

TEXT3D_HD int flags_at(const uint64_t crossing[7], int bit) {
  int flags = 0;
  TEXT3D_UNROLL
  for (int c = 0; c < 7; ++c) flags |= int(crossing[c] >> bit & 1) << c;
  return flags;
}

struct KuhnCountWord {
  MarchingTetsKuhnFlagParams p;
  TEXT3D_HD void count(int x, int y, int w) const {
    const KuhnSigns grid{p.signs, {p.nx, p.ny, p.nz}};
    const int64_t index = grid.word_index(x, y, w), total = grid.shape.rows() * grid.shape.words() + 1;
    uint64_t crossing[7];
    int vertices = 0, ones = 0, twos = 0;
    if (grid.crossing_words(x, y, w, crossing)) {
      TEXT3D_UNROLL
      for (int c = 0; c < 7; ++c) vertices += popcount(crossing[c]);
      if (x < p.nx && y < p.ny) {
        uint64_t corners[8], one, two;
        grid.corner_words(x, y, w, corners);
        TEXT3D_UNROLL
        for (int tet = 0; tet < 6; ++tet) {
          grid.tet_words(corners, tet, grid.cells(w), one, two);
          ones += popcount(one), twos += popcount(two);
        }
      }
    }
    int32_t* out = p.counts + index + 1;
    out[0] = vertices, out[total] = ones, out[2 * total] = twos;
  }
  TEXT3D_HD void operator()(int64_t index) const {
    const int words = KuhnShape{p.nx, p.ny, p.nz}.words();
    const int64_t row = index / words;
    const int x = int(row / (p.ny + 1));
    count(x, int(row - int64_t(x) * (p.ny + 1)), int(index - row * words));
  }
};

// The vertices on the edges from one grid vertex to the corners above it; i counts the bits of all words.
struct KuhnEmitVertex {
  MarchingTetsKuhnEmitParams p;
  TEXT3D_HD void operator()(int64_t i) const {
    const KuhnSigns grid{p.signs, {p.nx, p.ny, p.nz}};
    const int64_t index = i >> 6, row = index / grid.shape.words();
    if (p.offsets[index] == p.offsets[index + 1]) return;
    const int w = int(index - row * grid.shape.words()), bit = int(i & 63), x = int(row / (p.ny + 1));
    const int y = int(row - int64_t(x) * (p.ny + 1));
    uint64_t crossing[7];
    grid.crossing_words(x, y, w, crossing);
    const int flags = flags_at(crossing, bit);
    if (!flags) return;
    const int64_t vertex = grid.shape.vertex(x, y, 64 * w + bit);
    int64_t id = p.offsets[index] + rank_in_word(crossing, bit);
    for (int c = 1; c < 8; ++c)
      if (flags >> (c - 1) & 1) cross_edge(p.positions, p.sdf, vertex, vertex + grid.shape.step(c), p.vertices + 3 * id++);
  }
};

// The id of the vertex on the edge from grid vertex (x, y, z) to its corner c.
TEXT3D_HD int32_t kuhn_edge_id(const KuhnSigns& grid, const int32_t* offsets, int x, int y, int z, int c) {
  uint64_t crossing[7];
  grid.crossing_words(x, y, z >> 6, crossing);
  const int flags = flags_at(crossing, z & 63);
  return offsets[grid.word_index(x, y, z >> 6)] + rank_in_word(crossing, z & 63) + popcount(flags & ((1 << (c - 1)) - 1));
}

// The triangles of one cube; i counts the bits of all words.
struct KuhnEmitFaces {
  MarchingTetsKuhnEmitParams p;
  TEXT3D_HD void operator()(int64_t i) const {
    const KuhnSigns grid{p.signs, {p.nx, p.ny, p.nz}};
    const int64_t index = i >> 6, row = index / grid.shape.words(), total = grid.shape.rows() * grid.shape.words() + 1;
    const int32_t *ones = p.offsets + total, *twos = p.offsets + 2 * total;
    if (ones[index] == ones[index + 1] && twos[index] == twos[index + 1]) return;
    const int w = int(index - row * grid.shape.words()), bit = int(i & 63), x = int(row / (p.ny + 1));
    const int y = int(row - int64_t(x) * (p.ny + 1));
    uint64_t corners[8];
    grid.corner_words(x, y, w, corners);
    int cube = 0;
    TEXT3D_UNROLL
    for (int c = 0; c < 8; ++c) cube |= int(corners[c] >> bit & 1) << c;
    if (!(grid.cells(w) >> bit & 1) || cube == 0 || cube == 255) return;
    int64_t one = ones[index], two = twos[index];
    TEXT3D_UNROLL
    for (int tet = 0; tet < 6; ++tet) {
      uint64_t flags_one, flags_two;
      grid.tet_words(corners, tet, bits_below(bit), flags_one, flags_two);
      one += popcount(flags_one), two += popcount(flags_two);
    }
    two = ones[total - 1] + 2 * two;
    for (int tet = 0; tet < 6; ++tet) {
      int inside = 0;
      TEXT3D_UNROLL
      for (int c = 0; c < 4; ++c) inside |= (cube >> kuhn_corner(tet, c) & 1) << c;
      const int count = triangle_count(inside);
      const int64_t face = count == 1 ? one : two;
      uint32_t packed = triangle_edges(inside);
      for (int corner = 0; corner < 3 * count; ++corner, packed >>= 3) {
        const int a = kuhn_corner(tet, edge_corner(packed & 7, 0)), b = kuhn_corner(tet, edge_corner(packed & 7, 1));
        const int low = a < b ? a : b;  // of two corners joined by an edge the smaller number has the smaller coordinates
        p.faces[3 * face + corner] = kuhn_edge_id(grid, p.offsets, x + (low >> 2), y + (low >> 1 & 1),
                                                  64 * w + bit + (low & 1), a ^ b);
      }
      one += count & 1, two += count & 2;
    }
  }
};

// All that one grid vertex gets, in the order of its edges: to the corners above it, then from those below it.
struct KuhnBackwardVertex {
  MarchingTetsKuhnBackwardParams p;
  TEXT3D_HD void operator()(int64_t vertex) const {
    const KuhnSigns grid{p.signs, {p.nx, p.ny, p.nz}};
    const int64_t row = vertex / (p.nz + 1);
    const int z = int(vertex - row * (p.nz + 1)), x = int(row / (p.ny + 1)), y = int(row - int64_t(x) * (p.ny + 1));
    uint64_t crossing[7];
    float position[3] = {0.f, 0.f, 0.f}, sdf = 0.f;
    bool touched = false;
    if (grid.crossing_words(x, y, z >> 6, crossing)) {
      const int flags = flags_at(crossing, z & 63);
      int64_t id = flags ? p.offsets[grid.word_index(x, y, z >> 6)] + rank_in_word(crossing, z & 63) : 0;
      for (int c = 1; c < 8; ++c) {
        if (!(flags >> (c - 1) & 1)) continue;
        touched = true;
        cross_edge_gradient(p.grad_vertices + 3 * id++, p.positions, p.sdf, vertex, vertex + grid.shape.step(c), false,
                            position, sdf);
      }
    }
    for (int c = 1; c < 8; ++c) {
      const int lx = x - (c >> 2), ly = y - (c >> 1 & 1), lz = z - (c & 1);
      if (lx < 0 || ly < 0 || lz < 0) continue;
      const uint64_t low = p.signs[grid.word_index(lx, ly, lz >> 6)] >> (lz & 63);
      const uint64_t high = p.signs[grid.word_index(x, y, z >> 6)] >> (z & 63);
      if (!((low ^ high) & 1)) continue;
      touched = true;
      const int64_t id = kuhn_edge_id(grid, p.offsets, lx, ly, lz, c);
      cross_edge_gradient(p.grad_vertices + 3 * id, p.positions, p.sdf, vertex - grid.shape.step(c), vertex, true, position,
                          sdf);
    }
    if (!touched) return;
    p.grad_sdf[vertex] = sdf;
    if (!p.grad_positions) return;
    TEXT3D_UNROLL
    for (int axis = 0; axis < 3; ++axis) p.grad_positions[3 * vertex + axis] = position[axis];
  }
};

TEXT3D_HD bool flag_at(const uint64_t* words, int64_t i) { return words[i >> 6] >> (i & 63) & 1; }

TEXT3D_HD int64_t rank_of(const uint64_t* words, const int32_t* offsets, int64_t i) {
  return offsets[i >> 6] + popcount(words[i >> 6] & bits_below(int(i & 63)));
}

TEXT3D_HD int tet_case(const uint64_t* signs, const int32_t* tet) {
  return int(flag_at(signs, tet[0])) | int(flag_at(signs, tet[1])) << 1 | int(flag_at(signs, tet[2])) << 2 |
         int(flag_at(signs, tet[3])) << 3;
}

// Number of triangles of tet t.
TEXT3D_HD int tet_triangles(const MarchingTetsFlagParams& p, int64_t t) {
  return triangle_count(tet_case(p.signs, p.tets + 4 * t));
}

TEXT3D_HD bool edge_crosses(const MarchingTetsFlagParams& p, int64_t e) {
  return flag_at(p.signs, p.edges[2 * e]) != flag_at(p.signs, p.edges[2 * e + 1]);
}

struct TetsEmitVertex {
  MarchingTetsEmitParams p;
  TEXT3D_HD void operator()(int64_t e) const {
    if (!flag_at(p.crossing, e)) return;
    const int64_t id = rank_of(p.crossing, p.edge_offsets, e);
    cross_edge(p.positions, p.sdf, p.edges[2 * e], p.edges[2 * e + 1], p.vertices + 3 * id);
  }
};

struct TetsEmitFaces {
  MarchingTetsEmitParams p;
  TEXT3D_HD void operator()(int64_t t) const {
    const int64_t words = (p.num_tets + 63) >> 6;
    const bool one = flag_at(p.triangles, t), two = flag_at(p.triangles + words, t);
    if (!one && !two) return;
    const int64_t face = one ? rank_of(p.triangles, p.tet_offsets, t)
                             : p.tet_offsets[words] + 2 * rank_of(p.triangles + words, p.tet_offsets + words + 1, t);
    uint32_t packed = triangle_edges(tet_case(p.signs, p.tets + 4 * t));
    for (int corner = 0; corner < (one ? 3 : 6); ++corner, packed >>= 3)
      p.faces[3 * face + corner] = int32_t(rank_of(p.crossing, p.edge_offsets, p.tet_edges[6 * t + (packed & 7)]));
  }
};

struct TetsBackwardVertex {
  MarchingTetsBackwardParams p;
  TEXT3D_HD void add(int64_t e, bool to_high, float* position, float& sdf) const {
    if (!flag_at(p.crossing, e)) return;
    const int64_t id = rank_of(p.crossing, p.edge_offsets, e);
    cross_edge_gradient(p.grad_vertices + 3 * id, p.positions, p.sdf, p.edges[2 * e], p.edges[2 * e + 1], to_high, position,
                        sdf);
  }
  TEXT3D_HD void operator()(int64_t v) const {
    float position[3] = {0.f, 0.f, 0.f}, sdf = 0.f;
    for (int64_t e = p.low_offsets[v]; e < p.low_offsets[v + 1]; ++e) add(e, false, position, sdf);
    for (int64_t i = p.high_offsets[v]; i < p.high_offsets[v + 1]; ++i) add(p.high_edges[i], true, position, sdf);
    p.grad_sdf[v] = sdf;
    if (!p.grad_positions) return;
    TEXT3D_UNROLL
    for (int axis = 0; axis < 3; ++axis) p.grad_positions[3 * v + axis] = position[axis];
  }
};

}  // namespace TEXT3D_ISA
}  // namespace text3d
