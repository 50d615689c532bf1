#include "texture/texture.h"
#include "common/launch.h"

namespace text3d {
namespace TEXT3D_ISA {

void texture_forward(const TextureParams& p, cudaStream_t stream) { launch(p.batch * p.pixels, TexturePixel{p}, stream); }

void texture_backward(const TextureBackwardParams& p, cudaStream_t stream) {
  launch(p.batch * p.pixels, TextureBackwardPixel{p, true, true, 0, 1}, stream);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
