#include "composite/composite.h"
#include "common/launch.h"

namespace text3d {
namespace TEXT3D_ISA {

void composite_forward(const CompositeForwardParams& p, cudaStream_t stream) { launch(p.rays, CompositeForwardRay{p}, stream); }

void composite_backward(const CompositeBackwardParams& p, cudaStream_t stream) {
  launch(p.rays, CompositeBackwardRay{p}, stream);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
