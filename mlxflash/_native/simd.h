/* What each instruction set provides: kernels_body.h, compiled once per set. */
#ifndef MLXFLASH_SIMD_H
#define MLXFLASH_SIMD_H

#include "compute.h"

enum {
    BATCH = 8, /* the most rows handed to a kernel at once */
    CACHE_LINE = 64,
    BYTES_AHEAD = 4 << 10, /* how far before its turn memory is called into the cache */
};

#define INLINE static inline __attribute__((always_inline))

/* m tokens of `cols` floats, laid out as the format's kernels want to meet them (see kernels_body.h): the
   activations, or the accumulators of an output. `groups` holds, for each token, a float per group of columns. */
struct operand {
    struct format format;
    size_t m;
    size_t width, group_width; /* floats per token in x and in groups, with padding */
    const float *x, *groups;
};

struct simd {
    const char *name;
    void (*measure)(struct operand *shape); /* sets width and group_width */
    void (*arrange)(const struct operand *shape, const float *x, float *arranged, float *groups);
    /* out[t * out_stride + r] = x[t] . rows[r], for r < count, calling soon[r] into the cache meanwhile. */
    void (*dots)(const struct operand *x, const struct row *rows, const struct row *soon, size_t count, float *out,
                 size_t out_stride);
    /* acc[t] += sum over r < count of h[t * h_stride + r] * rows[r]. */
    void (*axpys)(const struct operand *shape, const struct row *rows, size_t count, const float *h,
                  size_t h_stride, float *acc, float *acc_groups);
    /* out[t * rows + r] += h[t] . row r, for r < rows, of an AFFINE matrix whose rows, from `first` on one after the
       other, are one group each; rows are a multiple of 32, and SPARE_BYTES after the last can be read. */
    void (*columns)(const struct format *format, size_t m, const float *h, struct row first, size_t rows, float *out);
    /* out[m, cols] += what the accumulators hold. */
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
