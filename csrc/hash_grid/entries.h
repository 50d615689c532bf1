// Entries of tables and rows of features in as few loads and stores as the chip has. For .cu files only.
#pragma once
#include "common/host_device.h"

namespace text3d {
namespace TEXT3D_ISA {

// An entry, or a pair of entries, as one load.
template <int Bytes> struct Words;
template <> struct Words<2> { using Type = uint16_t; };
template <> struct Words<4> { using Type = uint32_t; };
template <> struct Words<8> { using Type = uint2; };
template <> struct Words<16> { using Type = uint4; };

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

template <int F>
TEXT3D_HD void load_entry(const void* table, int dtype, int64_t entry, float* out) {
  if (dtype == 0) load_values<F>(static_cast<const float*>(table) + entry * F, out);
  else if (dtype == 1) load_values<F>(static_cast<const half_t*>(table) + entry * F, out);
  else load_values<F>(static_cast<const bfloat16_t*>(table) + entry * F, out);
}

// Both entries of a pair of corners. Index a and index a ^ 1 are one aligned load: always half of the dense cells, and of
// the hashed ones, as the hash leaves x itself in its low bits.
template <int F, class T>
TEXT3D_HD void load_pair(const T* table, bool even, uint32_t a, uint32_t b, float* at_a, float* at_b) {
  if constexpr (2 * F * sizeof(T) <= 16) {
    if (even) {
      float pair[2 * F];
      load_values<2 * F>(table + int64_t(a & ~1u) * F, pair);
      const bool upper = a & 1u;
      TEXT3D_UNROLL
      for (int f = 0; f < F; ++f) {
        at_a[f] = upper ? pair[F + f] : pair[f];
        at_b[f] = upper ? pair[f] : pair[F + f];
      }
      if (b != (a ^ 1u)) load_values<F>(table + int64_t(b) * F, at_b);
      return;
    }
  }
  load_values<F>(table + int64_t(a) * F, at_a);
  load_values<F>(table + int64_t(b) * F, at_b);
}

// F values side by side; `to` is aligned to their size, up to 16 bytes.
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

}  // namespace TEXT3D_ISA
}  // namespace text3d
