#include "marching_tets/marching_tets.h"
#include "common/launch.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

constexpr int kBlock = 256;

// Packs flags into words: each warp reads 32 neighbours and writes half a word. Flag(half, lane) gives bit 0 for the
// first words and bit 1 for the second ones, if there are any.
template <class Flag>
__global__ void flag_kernel(int64_t halves, Flag flag, uint32_t* first, uint32_t* second) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, half = thread >> 5;
  const int lane = int(thread & 31), value = half < halves ? flag(half, lane) : 0;
  const unsigned ones = __ballot_sync(~0u, value & 1);
  const unsigned twos = __ballot_sync(~0u, value & 2);
  if (lane != 0 || half >= halves) return;
  first[half] = ones;
  if (second) second[half] = twos;
}

template <class Flag>
void flag_words(int64_t words, const Flag& flag, uint64_t* first, uint64_t* second, cudaStream_t stream) {
  if (words == 0) return;
  const int64_t halves = 2 * words;
  TEXT3D_LAUNCH(flag_kernel, unsigned((32 * halves + kBlock - 1) / kBlock), kBlock, 0, stream, halves, flag,
                reinterpret_cast<uint32_t*>(first), reinterpret_cast<uint32_t*>(second));
}

TEXT3D_HD bool positive(float value, int32_t* bad) {
  if (!(value <= 3.402823466e+38f && value >= -3.402823466e+38f)) *bad = 1;  // any writer writes the same
  return value > 0.f;
}

struct KuhnSign {
  MarchingTetsKuhnFlagParams p;
  TEXT3D_HD int operator()(int64_t half, int lane) const {
    const int halves = 2 * KuhnShape{p.nx, p.ny, p.nz}.words();
    const int64_t row = half / halves;
    const int z = 32 * int(half - row * halves) + lane;
    return z <= p.nz && positive(p.sdf[row * (p.nz + 1) + z], p.bad);
  }
};

struct TetsSign {
  MarchingTetsFlagParams p;
  TEXT3D_HD int operator()(int64_t half, int lane) const {
    const int64_t v = 32 * half + lane;
    return v < p.num_vertices && positive(p.sdf[v], p.bad);
  }
};

struct TetsCrossing {
  MarchingTetsFlagParams p;
  TEXT3D_HD int operator()(int64_t half, int lane) const {
    const int64_t e = 32 * half + lane;
    return e < p.num_edges && edge_crosses(p, e);
  }
};

struct TetsTriangles {
  MarchingTetsFlagParams p;
  TEXT3D_HD int operator()(int64_t half, int lane) const {
    const int64_t t = 32 * half + lane;
    return t < p.num_tets ? tet_triangles(p, t) : 0;
  }
};

struct CountFlags {
  const uint64_t* words;
  int32_t* counts;  // one place further, behind a zero
  TEXT3D_HD void operator()(int64_t w) const { counts[w + 1] = popcount(words[w]); }
};

int64_t word_count(int64_t n) { return (n + 63) >> 6; }

}  // namespace

void marching_tets_kuhn_flag(const MarchingTetsKuhnFlagParams& p, cudaStream_t stream) {
  const KuhnShape shape{p.nx, p.ny, p.nz};
  const int64_t words = shape.rows() * shape.words();
  flag_words(words, KuhnSign{p}, p.signs, nullptr, stream);
  launch(words, KuhnCountWord{p}, stream);
}

// One thread a bit: where a word holds no surface, 32 threads leave together.
void marching_tets_kuhn_emit(const MarchingTetsKuhnEmitParams& p, cudaStream_t stream) {
  const KuhnShape shape{p.nx, p.ny, p.nz};
  const int64_t bits = 64 * shape.rows() * shape.words();
  launch(bits, KuhnEmitVertex{p}, stream);
  launch(bits, KuhnEmitFaces{p}, stream);
}

void marching_tets_kuhn_backward(const MarchingTetsKuhnBackwardParams& p, cudaStream_t stream) {
  const KuhnShape shape{p.nx, p.ny, p.nz};
  launch(shape.rows() * (p.nz + 1), KuhnBackwardVertex{p}, stream);
}

void marching_tets_flag(const MarchingTetsFlagParams& p, cudaStream_t stream) {
  const int64_t edge_words = word_count(p.num_edges), tet_words = word_count(p.num_tets);
  flag_words(word_count(p.num_vertices), TetsSign{p}, p.signs, nullptr, stream);
  flag_words(edge_words, TetsCrossing{p}, p.crossing, nullptr, stream);
  flag_words(tet_words, TetsTriangles{p}, p.triangles, p.triangles + tet_words, stream);
  launch(edge_words, CountFlags{p.crossing, p.edge_counts}, stream);
  launch(tet_words, CountFlags{p.triangles, p.tet_counts}, stream);
  launch(tet_words, CountFlags{p.triangles + tet_words, p.tet_counts + tet_words + 1}, stream);
}

void marching_tets_emit(const MarchingTetsEmitParams& p, cudaStream_t stream) {
  launch(p.num_edges, TetsEmitVertex{p}, stream);
  launch(p.num_tets, TetsEmitFaces{p}, stream);
}

void marching_tets_backward(const MarchingTetsBackwardParams& p, cudaStream_t stream) {
  launch(p.num_vertices, TetsBackwardVertex{p}, stream);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
