// Launching CUDA kernels. Two ways:
//   launch(n, functor, stream)                                functor(i) for i in [0, n): independent elements
//   TEXT3D_LAUNCH(kernel, grid, block, shared, stream, args)  a __global__ kernel whose threads cooperate
// Both also run on the host, compiled under common/emulate.h, where stream and device are ignored.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include "common/host_device.h"

#if defined(TEXT3D_EMULATE)
// emulate.h is included ahead of every file
#elif defined(__CUDACC__)
#include <cuda_runtime.h>

#define TEXT3D_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)      \
  do {                                                                     \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__);    \
    ::text3d::TEXT3D_ISA::check_launch(#kernel);                           \
  } while (0)
// Shared memory of a block, count elements; through macros so that the emulation can poison it.
#define TEXT3D_SHARED(type, name, count) __shared__ type name[count]
#define TEXT3D_DYNAMIC_SHARED(type, name)                     \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* name = reinterpret_cast<type*>(name##_raw)

namespace text3d {
namespace TEXT3D_ISA {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string message = std::string("launching ") + kernel + ": " + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver)
    message += " (the NVIDIA driver is missing or older than the CUDA runtime that text3d_fast was built with)";
  if (error == cudaErrorNoKernelImageForDevice)
    message += " (built for other GPUs; reinstall with TEXT3D_CUDA_ARCHS set to this GPU's compute capability)";
  throw std::runtime_error(message);
}

template <class Functor>
__global__ void functor_kernel(int64_t n, Functor functor) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) functor(i);
}

template <class Functor>
inline void launch(int64_t n, const Functor& functor, cudaStream_t stream, int block = 256) {
  if (n <= 0) return;
  TEXT3D_LAUNCH(functor_kernel, unsigned((n + block - 1) / block), block, 0, stream, n, functor);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
#endif
