// Products of small matrices by the tensor cores of a warp: d [16, 8] += a [16, k] b [k, 8], sums in float32.
// Of a fragment a lane holds rows g and g + 8 of a and d and column g of b, g = lane / 4 (PTX ISA, "Matrix fragments for
// mma.m16n8k8" and "m16n8k16"). a and b are functions (row, column) -> float, called for what the lane needs.
#pragma once
#include "common/host_device.h"

namespace text3d {
namespace TEXT3D_ISA {

enum MmaKind : int { kMmaTf32, kMmaHalf, kMmaBfloat16 };

// float32 in three products of 11 bits each: the error is 2^-21 of the product.
struct MmaFloat { static constexpr MmaKind kKind = kMmaTf32; static constexpr int kStep = 8; };
// Operands rounded to 16 bits.
struct MmaHalf { static constexpr MmaKind kKind = kMmaHalf; static constexpr int kStep = 16; };
struct MmaBfloat16 { static constexpr MmaKind kKind = kMmaBfloat16; static constexpr int kStep = 16; };

#if defined(TEXT3D_EMULATE)
inline uint32_t round_tf32(float x) { return text3d_emulation::round_tf32(x); }
inline uint32_t round_pair(MmaKind kind, float low, float high) {
  return text3d_emulation::round_pair(kind == kMmaHalf, low, high);
}
#define TEXT3D_MMA(kind, d, a, b) ::text3d_emulation::mma(int(kind), d, a, b, __FILE__, __LINE__)
#else
__device__ __forceinline__ uint32_t round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ uint32_t round_pair(MmaKind kind, float low, float high) {
  uint32_t bits;
  if (kind == kMmaHalf) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

#define TEXT3D_MMA_PTX(shape_and_types)                                                                          \
  asm volatile("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"      \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ __forceinline__ void mma(MmaKind kind, float* d, const uint32_t* a, const uint32_t* b) {
  if (kind == kMmaTf32) TEXT3D_MMA_PTX("m16n8k8.row.col.f32.tf32.tf32.f32");
  else if (kind == kMmaHalf) TEXT3D_MMA_PTX("m16n8k16.row.col.f32.f16.f16.f32");
  else TEXT3D_MMA_PTX("m16n8k16.row.col.f32.bf16.bf16.f32");
}
#define TEXT3D_MMA(kind, d, a, b) mma(kind, d, a, b)
#endif

// One step from k0 on; all lanes of the warp together.
template <class Kind, class A, class B>
__device__ __forceinline__ void multiply_add(float (&d)[4], int lane, int k0, const A& a, const B& b) {
  const int g = lane / 4, t = lane % 4;
  if constexpr (Kind::kKind == kMmaTf32) {
    const float from_a[4] = {a(g, k0 + t), a(g + 8, k0 + t), a(g, k0 + t + 4), a(g + 8, k0 + t + 4)};
    const float from_b[2] = {b(k0 + t, g), b(k0 + t + 4, g)};
    uint32_t large_a[4], small_a[4], large_b[2], small_b[2];
    TEXT3D_UNROLL
    for (int i = 0; i < 4; ++i) {
      large_a[i] = round_tf32(from_a[i]);
      small_a[i] = round_tf32(from_a[i] - bits_to_float(large_a[i]));
    }
    TEXT3D_UNROLL
    for (int i = 0; i < 2; ++i) {
      large_b[i] = round_tf32(from_b[i]);
      small_b[i] = round_tf32(from_b[i] - bits_to_float(large_b[i]));
    }
    TEXT3D_MMA(Kind::kKind, d, small_a, large_b);
    TEXT3D_MMA(Kind::kKind, d, large_a, small_b);
    TEXT3D_MMA(Kind::kKind, d, large_a, large_b);
  } else {
    uint32_t pairs_a[4], pairs_b[2];
    TEXT3D_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, k = k0 + 2 * t + i / 2 * 8;
      pairs_a[i] = round_pair(Kind::kKind, a(row, k), a(row, k + 1));
    }
    TEXT3D_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int k = k0 + 2 * t + i * 8;
      pairs_b[i] = round_pair(Kind::kKind, b(k, g), b(k + 1, g));
    }
    TEXT3D_MMA(Kind::kKind, d, pairs_a, pairs_b);
  }
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
