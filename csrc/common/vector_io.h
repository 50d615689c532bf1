// Rows of values in as few loads, stores and reductions as the chip has. For .cu files only.
#pragma once
#include "common/host_device.h"

namespace text3d {
namespace TEXT3D_ISA {

// What one load or store moves.
template <int Bytes> struct Words;
template <> struct Words<2> { using Type = uint16_t; };
template <> struct Words<4> { using Type = uint32_t; };
template <> struct Words<8> { using Type = uint2; };
template <> struct Words<16> { using Type = uint4; };

// Count values side by side, as float; `from` is aligned to their size, up to 16 bytes.
template <int Count, class T>
TEXT3D_HD void load_values(const T* from, float* out) {
  constexpr int kBytes = Count * int(sizeof(T)), kStep = kBytes < 16 ? kBytes : 16, kPart = kStep / int(sizeof(T));
  using Word = typename Words<kStep>::Type;
  TEXT3D_UNROLL
  for (int part = 0; part < kBytes / kStep; ++part) {
#if defined(__CUDA_ARCH__) || defined(TEXT3D_EMULATE)
    const Word word = __ldg(reinterpret_cast<const Word*>(from) + part);
#else
    Word word;
    std::memcpy(&word, from + part * kPart, sizeof word);
#endif
    T values[kPart];
    memcpy(values, &word, sizeof word);
    TEXT3D_UNROLL
    for (int i = 0; i < kPart; ++i) out[part * kPart + i] = load_float(values[i]);
  }
}

// Count values side by side; `to` is aligned to their size, up to 16 bytes.
template <int Count>
TEXT3D_HD void store_values(float* to, const float* values) {
  constexpr int kBytes = Count * int(sizeof(float));
  constexpr int kStep = kBytes % 16 == 0 ? 16 : kBytes % 8 == 0 ? 8 : 4, kPart = kStep / int(sizeof(float));
  using Word = typename Words<kStep>::Type;
  TEXT3D_UNROLL
  for (int part = 0; part < kBytes / kStep; ++part) {
    Word word;
    memcpy(&word, values + part * kPart, sizeof word);
#if defined(__CUDA_ARCH__)
    reinterpret_cast<Word*>(to)[part] = word;
#else
    std::memcpy(to + part * kPart, &word, sizeof word);
#endif
  }
}

// Adds F values; `to` is aligned to their size, up to 16 bytes.
template <int F>
TEXT3D_HD void add_values(float* to, const float* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (F == 1) {
    atomic_add(to, values[0]);
  } else if constexpr (F == 2) {
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "f"(values[0]), "f"(values[1])
                 : "memory");
  } else {
    TEXT3D_UNROLL
    for (int f = 0; f < F; f += 4)
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to + f)), "f"(values[f]),
                   "f"(values[f + 1]), "f"(values[f + 2]), "f"(values[f + 3])
                   : "memory");
  }
#else
  TEXT3D_UNROLL
  for (int f = 0; f < F; ++f) atomic_add(to + f, values[f]);
#endif
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
