#include "antialias/antialias.h"
#include "common/launch.h"

namespace text3d {
namespace TEXT3D_ISA {

void antialias_forward(const AntialiasParams& p, cudaStream_t stream) {
  launch(p.batch * p.height * p.width, AntialiasPixel{p}, stream);
}

void antialias_backward(const AntialiasBackwardParams& p, cudaStream_t stream) {
  const int64_t count = p.batch * p.height * p.width;
  if (p.grad_color) launch(count, AntialiasColorGradient{p}, stream);
  if (p.grad_pos) launch(count, AntialiasPositionGradient{p}, stream);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
