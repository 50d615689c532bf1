#include "marching_tets/marching_tets.h"
#include "common/launch.h"

namespace text3d {
namespace TEXT3D_ISA {

void marching_tets_kuhn_flag(const MarchingTetsKuhnFlagParams& p, cudaStream_t stream) {
  const KuhnShape shape{p.nx, p.ny, p.nz};
  const int64_t words = shape.rows() * shape.words();
  launch(words, KuhnSignWord{p}, stream);
  launch(words, KuhnCountWord{p}, stream);
}

// One thread a bit: the words that hold no surface leave at once, 32 threads together.
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
  launch((p.num_vertices + 63) >> 6, TetsSignWord{p}, stream);
  launch((p.num_edges + 63) >> 6, TetsEdgeWord{p}, stream);
  launch((p.num_tets + 63) >> 6, TetsTetWord{p}, stream);
}

void marching_tets_emit(const MarchingTetsEmitParams& p, cudaStream_t stream) {
  launch((p.num_edges + 63) >> 6, TetsVertexWord{p}, stream);
  launch((p.num_tets + 63) >> 6, TetsFaceWord{p}, stream);
}

void marching_tets_backward(const MarchingTetsBackwardParams& p, cudaStream_t stream) {
  launch(p.num_vertices, TetsBackwardVertex{p}, stream);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
