#if defined(__aarch64__)
#include <arm_neon.h>

#include "simd.h"

#define LANES 4
typedef float32x4_t vf;
typedef uint32x4_t vu;

INLINE vf vf_load(const float *p) { return vld1q_f32(p); }
INLINE void vf_store(float *p, vf v) { vst1q_f32(p, v); }
INLINE vf vf_set(float v) { return vdupq_n_f32(v); }
INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE float vf_sum(vf v) { return vaddvq_f32(v); }
INLINE vf vf_from_f16(const uint8_t *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
INLINE vf vf_from_bf16(const uint8_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
INLINE vf vf_from_field(vu v) { return vcvtq_f32_u32(v); }
INLINE vf vf_pick(vf v, vu index) {
    const vu bytes = index * 0x04040404 + 0x03020100;
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), vreinterpretq_u8_u32(bytes)));
}
INLINE vf vf_pairs(vf a, vf b) { return vpaddq_f32(a, b); }

INLINE vu vu_lanes(void) { return (vu){0, 1, 2, 3}; }
INLINE vu vu_load(const uint8_t *p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
INLINE vu vu_load3(const uint8_t *p) {
    static const uint8_t lanes[16] = {0, 1, 2, 255, 3, 4, 5, 255, 6, 7, 8, 255, 9, 10, 11, 255};
    return vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(lanes)));
}
INLINE vu vu_load5(const uint8_t *p) {
    static const uint8_t lanes[16] = {0, 1, 2, 255, 2, 3, 4, 255, 5, 6, 7, 255, 7, 8, 9, 255};
    return vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(lanes))) >> (vu){0, 4, 0, 4};
}

#include "kernels_body.h"

SIMD_TABLE(neon);
#endif
