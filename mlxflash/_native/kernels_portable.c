/* For any processor: the compiler's own vectors, and plain C where they have no word for it. */
#include <string.h>

#include "simd.h"

#define LANES 4
typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

INLINE vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf vf_set(float v) { return (vf){v, v, v, v}; }
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE float vf_sum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }

INLINE uint32_t half(const uint8_t *p, int lane) { return p[2 * lane] | (uint32_t)p[2 * lane + 1] << 8; }
INLINE vf vf_from_f16(const uint8_t *p) {
    const vu h = {half(p, 0), half(p, 1), half(p, 2), half(p, 3)};
    /* Exponent and fraction in place, as a number 2^112 too small; infinities and NaNs need all exponent
       bits set. */
    const vu small = (h & 0x7fff) << 13, special = (vu)(small >= 0x7c00u << 13) & 0x7f800000;
    return (vf)((vu)((vf)small * 0x1p112f) | special | (h & 0x8000) << 16);
}
INLINE vf vf_from_bf16(const uint8_t *p) {
    return (vf)((vu){half(p, 0), half(p, 1), half(p, 2), half(p, 3)} << 16);
}
INLINE vf vf_from_field(vu v) { return __builtin_convertvector((vi)v, vf); }
INLINE vf vf_pick(vf v, vu i) { return (vf){v[i[0] & 3], v[i[1] & 3], v[i[2] & 3], v[i[3] & 3]}; }
INLINE vf vf_pairs(vf a, vf b) { return (vf){a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]}; }

INLINE uint32_t three_bytes(const uint8_t *p) { return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16; }

INLINE vu vu_lanes(void) { return (vu){0, 1, 2, 3}; }
INLINE vu vu_load(const uint8_t *p) {
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE vu vu_load3(const uint8_t *p) {
    return (vu){three_bytes(p), three_bytes(p + 3), three_bytes(p + 6), three_bytes(p + 9)};
}
INLINE vu vu_load5(const uint8_t *p) {
    return (vu){three_bytes(p), three_bytes(p + 2), three_bytes(p + 5), three_bytes(p + 7)} >> (vu){0, 4, 0, 4};
}

#include "kernels_body.h"

SIMD_TABLE(portable);
