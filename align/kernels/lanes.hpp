// Sixteen floats at a time, of memory in float32 or bfloat16; for CPUs with AVX-512.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

using bfloat16 = uint16_t;

// A mask of the first `count` lanes.
inline __mmask16 first(int64_t count) { return count < 16 ? __mmask16((1u << count) - 1) : __mmask16(0xffff); }

inline __m512 load(const float* at, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, at); }
inline __m512 load(const bfloat16* at, __mmask16 mask = 0xffff) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store(float* at, __m512 value, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(at, mask, value); }
inline void store(bfloat16* at, __m512 value, __mmask16 mask = 0xffff) {  // to the nearest, ties to even
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(at, mask, _mm512_cvtepi32_epi16(rounded));
}

// To a unit in the last place or so (Cephes' polynomial); 0 below −104, and what is not a number stays so.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

}  // namespace
