// Words of 64 flags: counting, scanning, and packing the signs of floats into them.
// Beside host_device.h the only header that knows its machine, for the instructions that do these things.
#pragma once
#include "common/host_device.h"
#if !defined(__CUDACC__) && (defined(__AVX2__) || defined(__AVX512F__))
#include <immintrin.h>
#endif

namespace text3d {
namespace TEXT3D_ISA {

TEXT3D_HD int popcount(uint64_t word) {
#if defined(__CUDA_ARCH__)
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

// Position of the lowest set bit; word must not be 0.
TEXT3D_HD int lowest_bit(uint64_t word) {
#if defined(__CUDA_ARCH__)
  return __ffsll((long long)word) - 1;
#else
  return __builtin_ctzll(word);
#endif
}

TEXT3D_HD uint64_t bits_below(int count) { return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1; }

// Bit i: values[i] > 0. `bad` gets a bit where a value is NaN or infinite. count <= 64.
TEXT3D_HD uint64_t sign_bits(const float* values, int count, uint64_t& bad) {
  uint64_t bits = 0;
  int i = 0;
  bad = 0;
#if !defined(__CUDACC__) && defined(__AVX512F__) && defined(__AVX512DQ__)
  for (; i + 16 <= count; i += 16) {
    const __m512 x = _mm512_loadu_ps(values + i);
    bits |= uint64_t(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ)) << i;
    bad |= uint64_t(_mm512_fpclass_ps_mask(x, 0x99)) << i;  // quiet and signalling NaN, both infinities
  }
#elif !defined(__CUDACC__) && defined(__AVX2__)
  const __m256 largest = _mm256_set1_ps(3.402823466e+38f), magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (; i + 8 <= count; i += 8) {
    const __m256 x = _mm256_loadu_ps(values + i);
    bits |= uint64_t(unsigned(_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ)))) << i;
    bad |= uint64_t(unsigned(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_and_ps(x, magnitude), largest, _CMP_NLE_UQ)))) << i;
  }
#endif
  for (; i < count; ++i) {
    const float x = values[i];
    bits |= uint64_t(x > 0.f) << i;
    bad |= uint64_t(!(x <= 3.402823466e+38f && x >= -3.402823466e+38f)) << i;
  }
  return bits;
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
