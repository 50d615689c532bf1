#include "composite/composite.h"
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

void composite_forward(const CompositeForwardParams& p) {
  parallel_for(p.rays, 64, [&](int64_t begin, int64_t end) {
    for (int64_t ray = begin; ray < end; ++ray) CompositeForwardRay{p}(ray);
  });
}

void composite_backward(const CompositeBackwardParams& p) {
  parallel_for(p.rays, 64, [&](int64_t begin, int64_t end) {
    for (int64_t ray = begin; ray < end; ++ray) CompositeBackwardRay{p}(ray);
  });
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
