// The only file that knows which machine it is compiled for: qualifiers, atomics, half-precision storage.
//
// TEXT3D_ISA is the namespace of everything that contains code: baseline, avx2, avx512 (set by setup.py for each
// compilation of a .cpp), or cuda. Plain data (Params) lives in namespace text3d itself.
#pragma once
#include <cstdint>
#include <cstring>
#include <cmath>
#include <tuple>

#ifndef TEXT3D_ISA
#define TEXT3D_ISA interface  // module.cpp: sees Params only
#endif

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define TEXT3D_HD __host__ __device__ __forceinline__
#define TEXT3D_UNROLL _Pragma("unroll")
#define TEXT3D_NO_UNROLL _Pragma("unroll 1")
#else
#define TEXT3D_HD inline
#define TEXT3D_UNROLL
#define TEXT3D_NO_UNROLL
#if defined(__F16C__)
#include <immintrin.h>
#endif
#endif

namespace text3d {

// Storage types: raw bits, no arithmetic; load_float / store_float convert.
struct half_t { uint16_t bits; };
struct bfloat16_t { uint16_t bits; };

// A fixed array inside Params, readable on every machine (std::array is not, in device code).
template <class T, int N>
struct Array {
  T data[N];
#if defined(__CUDACC__)
  __host__ __device__
#endif
      __attribute__((always_inline)) const T& operator[](int i) const { return data[i]; }
};

namespace TEXT3D_ISA {

TEXT3D_HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

TEXT3D_HD uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

TEXT3D_HD float load_float(float value) { return value; }
TEXT3D_HD double load_float(double value) { return value; }
TEXT3D_HD float load_float(bfloat16_t value) { return bits_to_float(uint32_t(value.bits) << 16); }
TEXT3D_HD float load_float(half_t value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#elif defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31u, mantissa = value.bits & 1023u;
  if (exponent == 31u) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0u) {
    float magnitude = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24: a subnormal half
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
#endif
}

// *target += value, atomically across threads. Host: compare-exchange, as torch tensors are plain memory.
TEXT3D_HD void atomic_add(float* target, float value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(target, value);
#else
  auto* word = reinterpret_cast<uint32_t*>(target);
  uint32_t seen = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &seen, float_to_bits(bits_to_float(seen) + value), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
#endif
}

TEXT3D_HD int64_t atomic_add(int64_t* target, int64_t value) {
#if defined(__CUDA_ARCH__)
  return int64_t(atomicAdd(reinterpret_cast<unsigned long long*>(target), (unsigned long long)value));
#else
  return __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
#endif
}

TEXT3D_HD int32_t atomic_add(int32_t* target, int32_t value) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(target, value);
#else
  return __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
#endif
}

// *target = min(*target, value), atomically across threads.
TEXT3D_HD void atomic_min(int64_t* target, int64_t value) {
#if defined(__CUDA_ARCH__)
  atomicMin(reinterpret_cast<long long*>(target), (long long)value);
#else
  int64_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (value < seen && !__atomic_compare_exchange_n(target, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
#endif
}

TEXT3D_HD float min_of(float a, float b) { return a < b ? a : b; }
TEXT3D_HD float max_of(float a, float b) { return a > b ? a : b; }
TEXT3D_HD float select(bool mask, float a, float b) { return mask ? a : b; }
TEXT3D_HD float clamp(float x, float low, float high) { return min_of(max_of(x, low), high); }

}  // namespace TEXT3D_ISA
}  // namespace text3d
