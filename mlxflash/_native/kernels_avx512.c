#if defined(__x86_64__)
#include <immintrin.h>

#include "simd.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define LANES 16
typedef __m512 vf;
typedef uint32_t vu __attribute__((vector_size(64)));

INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
INLINE vf vf_set(float v) { return _mm512_set1_ps(v); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float vf_sum(vf v) { return _mm512_reduce_add_ps(v); }
INLINE vf vf_from_f16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE vf vf_from_bf16(const uint8_t *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vf vf_from_field(vu v) { return _mm512_cvtepi32_ps((__m512i)v); }
INLINE vf vf_pick(vf v, vu index) { return _mm512_permutexvar_ps((__m512i)index, v); }
INLINE vf vf_pairs(vf a, vf b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
}

INLINE vu vu_lanes(void) { return (vu){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
INLINE vu vu_load(const uint8_t *p) { return (vu)_mm512_loadu_si512(p); }
INLINE vu vu_load3(const uint8_t *p) {
    const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
    const __m128i lanes = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    const __m512i spread = _mm512_permutexvar_epi32(quarters, _mm512_loadu_si512(p));
    return (vu)_mm512_shuffle_epi8(spread, _mm512_broadcast_i32x4(lanes));
}
INLINE vu vu_load5(const uint8_t *p) {
    typedef uint16_t words __attribute__((vector_size(64)));
    const words quarters = {0,  1,  2,  3,  4,  0, 0, 0, 5,  6,  7,  8,  9,  0, 0, 0,
                            10, 11, 12, 13, 14, 0, 0, 0, 15, 16, 17, 18, 19, 0, 0, 0};
    const __m128i lanes = _mm_setr_epi8(0, 1, 2, -1, 2, 3, 4, -1, 5, 6, 7, -1, 7, 8, 9, -1);
    const __m512i spread = _mm512_permutexvar_epi16((__m512i)quarters, _mm512_loadu_si512(p));
    return (vu)_mm512_shuffle_epi8(spread, _mm512_broadcast_i32x4(lanes)) >>
           (vu){0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4};
}

#include "kernels_body.h"

SIMD_TABLE(avx512);

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
