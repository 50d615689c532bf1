// Exercised by test_emulation.py: cooperative kernels that are right, miss a barrier, or diverge at one.
#include <cstdio>
#include "common/launch.h"

__global__ void block_sum(const float* x, float* out) {
  TEXT3D_SHARED(float, partial, 4);
  float value = x[threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) *out = partial[0] + partial[1] + partial[2] + partial[3];
}

__global__ void missing_barrier(const float* x, float* out) {
  TEXT3D_SHARED(float, tile, 128);
  tile[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

__global__ void divergent(float* out) {
  if (threadIdx.x < 64) __syncthreads();
  out[threadIdx.x] = 1.f;
}

__global__ void votes(unsigned* out) {
  const unsigned even = __ballot_sync(0xffffffffu, threadIdx.x % 2 == 0);
  const unsigned same = __match_any_sync(0xffffffffu, threadIdx.x / 8);
  if (threadIdx.x == 9) out[0] = even, out[1] = same;
}

int main() {
  float x[128], out[128];
  for (int i = 0; i < 128; ++i) x[i] = float(i);
  for (int run = 0; run < 3; ++run) {
    TEXT3D_LAUNCH(block_sum, 1, 128, 0, nullptr, x, out);
    std::printf("sum %g\n", out[0]);
  }
  int wrong = 0;
  for (int run = 0; run < 3; ++run) {
    TEXT3D_LAUNCH(missing_barrier, 1, 128, 0, nullptr, x, out);
    for (int i = 0; i < 128; ++i) wrong += !(out[i] == float(127 - i));
  }
  std::printf("missing barrier noticed %d\n", int(wrong > 0));
  unsigned bits[2];
  TEXT3D_LAUNCH(votes, 1, 32, 0, nullptr, bits);
  std::printf("votes %x %x\n", bits[0], bits[1]);
  try {
    TEXT3D_LAUNCH(divergent, 1, 128, 0, nullptr, out);
  } catch (const std::exception& error) {
    std::printf("divergence %d\n", int(std::string(error.what()).find("not every thread reaches") != std::string::npos));
  }
}
