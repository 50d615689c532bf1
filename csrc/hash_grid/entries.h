// Entries of tables. For .cu files only.
#pragma once
#include "common/vector_io.h"

namespace text3d {
namespace TEXT3D_ISA {

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

}  // namespace TEXT3D_ISA
}  // namespace text3d
