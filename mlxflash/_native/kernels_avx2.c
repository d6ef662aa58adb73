#if defined(__x86_64__)
#include <immintrin.h>

#include "simd.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define LANES 8
typedef __m256 vf;
typedef uint32_t vu __attribute__((vector_size(32)));

INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
INLINE vf vf_set(float v) { return _mm256_set1_ps(v); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float vf_sum(vf v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
INLINE vf vf_from_f16(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE vf vf_from_bf16(const uint8_t *p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE vf vf_from_field(vu v) { return _mm256_cvtepi32_ps((__m256i)v); }
INLINE vf vf_pick(vf v, vu index) { return _mm256_permutevar8x32_ps(v, (__m256i)index); }
INLINE vf vf_pairs(vf a, vf b) {
    const __m256d pairs = _mm256_castps_pd(_mm256_hadd_ps(a, b));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, _MM_SHUFFLE(3, 1, 2, 0)));
}

/* The 16 bytes at `low` and at `high`, each shuffled by `lanes`. */
INLINE vu shuffle_halves(const uint8_t *low, const uint8_t *high, __m128i lanes) {
    const __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const void *)low));
    return (vu)_mm256_shuffle_epi8(_mm256_inserti128_si256(v, _mm_loadu_si128((const void *)high), 1),
                                   _mm256_broadcastsi128_si256(lanes));
}

INLINE vu vu_lanes(void) { return (vu){0, 1, 2, 3, 4, 5, 6, 7}; }
INLINE vu vu_load(const uint8_t *p) { return (vu)_mm256_loadu_si256((const void *)p); }
INLINE vu vu_load3(const uint8_t *p) {
    return shuffle_halves(p, p + 12, _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
}
INLINE vu vu_load5(const uint8_t *p) {
    return shuffle_halves(p, p + 10, _mm_setr_epi8(0, 1, 2, -1, 2, 3, 4, -1, 5, 6, 7, -1, 7, 8, 9, -1)) >>
           (vu){0, 4, 0, 4, 0, 4, 0, 4};
}

#include "kernels_body.h"

SIMD_TABLE(avx2);

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
