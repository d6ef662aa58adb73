/* What each instruction set provides: kernels_body.h, compiled once per set. */
#ifndef MLXFLASH_SIMD_H
#define MLXFLASH_SIMD_H

#include "compute.h"

#define INLINE static inline __attribute__((always_inline))

/* The kernels read q's a 32-bit lane at a time, so the activations they meet are laid out in that order:
   see kernels_body.h. `groups` holds their sum over each group of columns. For the other formats x is the
   caller's. Accumulators of the output (`acc`, `acc_groups`) have the same layouts. */
struct operand {
    struct format format;
    size_t m;
    size_t width, group_width; /* floats from one token to the next in x and in groups */
    const float *x, *groups;
};

struct simd {
    const char *name;
    /* Sets width and group_width for the format. */
    void (*measure)(struct operand *shape);
    /* Lays out m tokens of `cols` contiguous floats for an AFFINE operand. */
    void (*arrange)(const struct operand *shape, const float *x, float *arranged, float *groups);
    /* out[t * out_stride + r] = x[t] . rows[r], for r < count. */
    void (*dots)(const struct operand *x, const struct row *rows, size_t count, float *out, size_t out_stride);
    /* acc[t] += sum over r < count of h[t * h_stride + r] * rows[r]. */
    void (*axpys)(const struct operand *shape, const struct row *rows, size_t count, const float *h,
                  size_t h_stride, float *acc, float *acc_groups);
    /* out[cols] += what one token's accumulators hold. */
    void (*collect)(const struct operand *shape, const float *acc, const float *acc_groups, float *out);
    uint32_t (*sweep)(const uint8_t *bytes, size_t size); /* reads everything */
};

extern const struct simd simd_portable;
#if defined(__x86_64__)
extern const struct simd simd_avx2, simd_avx512;
#elif defined(__aarch64__)
extern const struct simd simd_neon;
#endif

#endif
