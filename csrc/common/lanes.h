// Lanes: vectors as wide as the instruction set that a .cpp is compiled for, through the compiler's vector extension.
// For .cpp files only. Include before headers whose templates take lanes where CUDA passes single numbers.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own gather intrinsics start from an undefined register
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "common/host_device.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace text3d {
namespace TEXT3D_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Uints __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Floats broadcast(float value) { return value - Floats{}; }  // value + 0 would be an addition: of -0

inline Floats load_lanes(const float* from) {
  Floats lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Ints load_lanes(const int32_t* from) {
  Ints lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline void store_lanes(int32_t* to, Ints lanes) { std::memcpy(to, &lanes, sizeof lanes); }
inline void store_lanes(float* to, Floats lanes) { std::memcpy(to, &lanes, sizeof lanes); }

inline Floats min_of(Floats a, Floats b) { return a < b ? a : b; }
inline Floats max_of(Floats a, Floats b) { return a > b ? a : b; }
inline Uints min_of(Uints a, Uints b) { return a < b ? a : b; }
inline Floats bits_to_float(Uints bits) { return (Floats)bits; }
inline Uints float_to_bits(Floats value) { return (Uints)value; }
inline Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }

inline bool any(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  int32_t seen = 0;
  for (int lane = 0; lane < kLanes; ++lane) seen |= mask[lane];
  return seen != 0;
#endif
}

// Four vectors of lanes a, b, c, d as rows (a, b, c, d) and back: within each four lanes, a 4 x 4 transposition.
inline void transpose4(Floats& a, Floats& b, Floats& c, Floats& d) {
#if defined(__AVX512F__)
  const __m512 ab0 = _mm512_unpacklo_ps((__m512)a, (__m512)b), ab1 = _mm512_unpackhi_ps((__m512)a, (__m512)b);
  const __m512 cd0 = _mm512_unpacklo_ps((__m512)c, (__m512)d), cd1 = _mm512_unpackhi_ps((__m512)c, (__m512)d);
  a = (Floats)_mm512_shuffle_ps(ab0, cd0, 0x44), b = (Floats)_mm512_shuffle_ps(ab0, cd0, 0xee);
  c = (Floats)_mm512_shuffle_ps(ab1, cd1, 0x44), d = (Floats)_mm512_shuffle_ps(ab1, cd1, 0xee);
#elif defined(__AVX2__)
  const __m256 ab0 = _mm256_unpacklo_ps((__m256)a, (__m256)b), ab1 = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  const __m256 cd0 = _mm256_unpacklo_ps((__m256)c, (__m256)d), cd1 = _mm256_unpackhi_ps((__m256)c, (__m256)d);
  a = (Floats)_mm256_shuffle_ps(ab0, cd0, 0x44), b = (Floats)_mm256_shuffle_ps(ab0, cd0, 0xee);
  c = (Floats)_mm256_shuffle_ps(ab1, cd1, 0x44), d = (Floats)_mm256_shuffle_ps(ab1, cd1, 0xee);
#elif defined(__SSE2__)
  __m128 rows[4] = {(__m128)a, (__m128)b, (__m128)c, (__m128)d};
  _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
  a = (Floats)rows[0], b = (Floats)rows[1], c = (Floats)rows[2], d = (Floats)rows[3];
#else
  const Floats from[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) a[i] = from[i][0], b[i] = from[i][1], c[i] = from[i][2], d[i] = from[i][3];
#endif
}

// Four floats from each lane's address, and to it.
inline void load_rows(const float* const from[kLanes], Floats& x, Floats& y, Floats& z, Floats& w) {
  Floats* const parts[4] = {&x, &y, &z, &w};
  for (int part = 0; part < 4; ++part) {
#if defined(__AVX512F__)
    __m512 rows = _mm512_castps128_ps512(_mm_loadu_ps(from[part]));
    rows = _mm512_insertf32x4(rows, _mm_loadu_ps(from[4 + part]), 1);
    rows = _mm512_insertf32x4(rows, _mm_loadu_ps(from[8 + part]), 2);
    *parts[part] = (Floats)_mm512_insertf32x4(rows, _mm_loadu_ps(from[12 + part]), 3);
#elif defined(__AVX2__)
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(from[part]));
    *parts[part] = (Floats)_mm256_insertf128_ps(low, _mm_loadu_ps(from[4 + part]), 1);
#else
    *parts[part] = load_lanes(from[part]);
#endif
  }
  transpose4(x, y, z, w);
}
inline void store_rows(float (*to)[4], Floats x, Floats y, Floats z, Floats w) {
  transpose4(x, y, z, w);
  const Floats parts[4] = {x, y, z, w};
  for (int part = 0; part < 4; ++part) {
#if defined(__AVX512F__)
    _mm_storeu_ps(to[part], _mm512_castps512_ps128((__m512)parts[part]));
    _mm_storeu_ps(to[4 + part], _mm512_extractf32x4_ps((__m512)parts[part], 1));
    _mm_storeu_ps(to[8 + part], _mm512_extractf32x4_ps((__m512)parts[part], 2));
    _mm_storeu_ps(to[12 + part], _mm512_extractf32x4_ps((__m512)parts[part], 3));
#elif defined(__AVX2__)
    _mm_storeu_ps(to[part], _mm256_castps256_ps128((__m256)parts[part]));
    _mm_storeu_ps(to[4 + part], _mm256_extractf128_ps((__m256)parts[part], 1));
#else
    store_lanes(to[part], parts[part]);
#endif
  }
}

// Half-precision bits in the low 16 bits of each lane.
inline Floats half_to_floats(Uints bits) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)bits));
#else
  const Uints magnitude = (bits & 0x7fffu) << 13;
  const Uints special = (Uints)(magnitude >= 0x0f800000u) & 0x7f800000u;  // infinity and NaN
  const Floats scaled = (Floats)magnitude * 5.192296858534828e33f;       // 2^112 moves the exponent's bias
  return (Floats)((Uints)scaled | special | ((bits & 0x8000u) << 16));
#endif
}

inline Floats bfloat16_to_floats(Uints bits) { return (Floats)(bits << 16); }

// out[f] = table[index * Features + f]
template <int Features>
inline void gather(const float* table, Uints index, Floats* out) {
#if defined(__AVX512F__)
  if constexpr (Features == 1) {
    out[0] = (Floats)_mm512_i32gather_ps((__m512i)index, table, 4);
  } else {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512i pair = (__m512i)(index * uint32_t(Features / 2));
    const __m256i low = _mm512_castsi512_si256(pair), high = _mm512_extracti64x4_epi64(pair, 1);
    for (int f = 0; f < Features; f += 2) {
      const __m512 a = _mm512_castpd_ps(_mm512_i32gather_pd(low, table + f, 8));
      const __m512 b = _mm512_castpd_ps(_mm512_i32gather_pd(high, table + f, 8));
      out[f] = (Floats)_mm512_permutex2var_ps(a, even, b);
      out[f + 1] = (Floats)_mm512_permutex2var_ps(a, odd, b);
    }
  }
#elif defined(__AVX2__)
  // Whole entries one by one take half the time of gathers feature by feature.
  if constexpr (Features == 1) {
    out[0] = (Floats)_mm256_i32gather_ps(table, (__m256i)index, 4);
  } else {
    const float* from[kLanes];
    alignas(32) uint32_t lanes[kLanes];
    std::memcpy(lanes, &index, sizeof lanes);
    for (int lane = 0; lane < kLanes; ++lane) from[lane] = table + int64_t(lanes[lane]) * Features;
    if constexpr (Features == 2) {
      __m256d pairs[2];  // lanes 0, 1, 4, 5 and 2, 3, 6, 7
      for (int half = 0; half < 2; ++half) {
        const auto two = [&](int lane) {
          const __m128d first = _mm_load_sd(reinterpret_cast<const double*>(from[lane]));
          return _mm_loadh_pd(first, reinterpret_cast<const double*>(from[lane + 1]));
        };
        pairs[half] = _mm256_insertf128_pd(_mm256_castpd128_pd256(two(2 * half)), two(2 * half + 4), 1);
      }
      const __m256 a = _mm256_castpd_ps(pairs[0]), b = _mm256_castpd_ps(pairs[1]);
      out[0] = (Floats)_mm256_shuffle_ps(a, b, 0x88), out[1] = (Floats)_mm256_shuffle_ps(a, b, 0xdd);
    } else {
      for (int f = 0; f < Features; f += 4) {
        load_rows(from, out[f], out[f + 1], out[f + 2], out[f + 3]);
        for (int lane = 0; lane < kLanes; ++lane) from[lane] += 4;
      }
    }
  }
#else
  for (int lane = 0; lane < kLanes; ++lane)
    for (int f = 0; f < Features; ++f) out[f][lane] = table[int64_t(index[lane]) * Features + f];
#endif
}

inline Uints gather_words(const uint32_t* table, Uints index) {
#if defined(__AVX512F__)
  return (Uints)_mm512_i32gather_epi32((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (Uints)_mm256_i32gather_epi32(reinterpret_cast<const int*>(table), (__m256i)index, 4);
#else
  Uints out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = table[index[lane]];
  return out;
#endif
}

// The same from 16-bit storage. `table` must be aligned to 4 bytes and readable to the end of its last 4-byte word.
template <int Features, class Decode>
inline void gather_16bit(const void* table, Uints index, Floats* out, const Decode& decode) {
  const auto* words = static_cast<const uint32_t*>(table);
  if constexpr (Features == 1) {
    out[0] = decode((gather_words(words, index >> 1) >> ((index & 1u) << 4)) & 0xffffu);
  } else {
    for (int f = 0; f < Features; f += 2) {
      const Uints pair = gather_words(words + f / 2, index * uint32_t(Features / 2));
      out[f] = decode(pair & 0xffffu);
      out[f + 1] = decode(pair >> 16);
    }
  }
}

template <int Features>
inline void gather(const half_t* table, Uints index, Floats* out) {
  gather_16bit<Features>(table, index, out, [](Uints bits) { return half_to_floats(bits); });
}

template <int Features>
inline void gather(const bfloat16_t* table, Uints index, Floats* out) {
  gather_16bit<Features>(table, index, out, [](Uints bits) { return bfloat16_to_floats(bits); });
}

// N numbers of 16 bits
template <int N, class T>
inline void load_floats(const T* from, float* to) {
  for (int i = 0; i < N; ++i) to[i] = load_float(from[i]);
}
#if defined(__AVX2__) && defined(__F16C__)
template <>
inline void load_floats<4>(const half_t* from, float* to) {
  _mm_storeu_ps(to, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
template <>
inline void load_floats<8>(const half_t* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
template <>
inline void load_floats<4>(const bfloat16_t* from, float* to) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  _mm_storeu_ps(to, _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), bits)));
}
template <>
inline void load_floats<8>(const bfloat16_t* from, float* to) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
#endif

}  // namespace TEXT3D_ISA
}  // namespace text3d
