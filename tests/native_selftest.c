/* Checks every instruction set's kernels against plain loops without Python, so that they can be run for another
   processor too:

     aarch64-linux-gnu-gcc -static -O3 -std=c11 -Wall -Wextra -Imlxflash/_native tests/native_selftest.c \
         mlxflash/_native/compute.c mlxflash/_native/threads.c mlxflash/_native/kernels_*.c -lm -o selftest
     qemu-aarch64 ./selftest */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "compute.h"

enum { COLS = 1280, ROWS = 19, TOKENS = 9 };

static uint32_t random_bits(void) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static float random_float(void) { return (float)random_bits() / 2147483648.0f - 1; }

static float stored_value(enum kind kind, const uint8_t *p) {
    if (kind == F32) {
        float v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    const uint32_t h = p[0] | (uint32_t)p[1] << 8;
    if (kind == BF16) {
        const uint32_t bits = h << 16;
        float v;
        memcpy(&v, &bits, sizeof v);
        return v;
    }
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const float v = exponent == 0 ? ldexpf((float)fraction, -24) : ldexpf((float)(fraction + 1024), exponent - 25);
    return h & 0x8000 ? -v : v;
}

/* Random values of magnitude below 2. */
static void store_random(enum kind kind, uint8_t *p, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const float v = random_float();
        const uint16_t half = (uint16_t)random_bits() & 0xbfff;
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        if (kind == F32) memcpy(p + 4 * i, &v, 4);
        if (kind == F16) memcpy(p + 2 * i, &half, 2);
        if (kind == BF16) memcpy(p + 2 * i, (const uint16_t[]){(uint16_t)(bits >> 16)}, 2);
    }
}

static double weight(const struct format *f, const struct row *row, size_t col) {
    if (f->kind != AFFINE) return stored_value(f->kind, row->weights + col * kind_size(f->kind));
    unsigned q = 0;
    for (int b = 0; b < f->bits; b++) {
        const size_t at = col * (size_t)f->bits + (size_t)b;
        q |= (row->weights[at / 8] >> at % 8 & 1u) << b;
    }
    const size_t scale = col / f->group * kind_size(f->scale_kind);
    return (double)q * stored_value(f->scale_kind, row->scales + scale) +
           stored_value(f->scale_kind, row->biases + scale);
}

static double largest; /* error found, as a share of the bound */

static void compare(float found, double expected, double magnitude) {
    const double error = fabs(found - expected) / (3e-6 * magnitude + 1e-30);
    if (!(error <= largest)) largest = error;
}

static void check(const struct format *f, size_t m) {
    static uint8_t pool[ROWS * (3 * COLS * 8 + 2)];
    static float x[TOKENS * COLS], out[TOKENS * COLS];
    static double expected[TOKENS][COLS], magnitude[TOKENS][COLS];
    const size_t row = row_size(f), groups = f->kind == AFFINE ? f->cols / f->group : 0;
    const size_t scales = groups * kind_size(f->scale_kind), part = row + 2 * scales, stride = 2 * part + 2;
    for (size_t r = 0; r < 2 * ROWS; r++) {
        uint8_t *p = pool + r / 2 * stride + r % 2 * part;
        if (f->kind != AFFINE) store_random(f->kind, p, f->cols);
        else
            for (size_t i = 0; i < row; i++) p[i] = (uint8_t)random_bits();
        store_random(f->scale_kind, p + row, 2 * groups);
    }
    for (size_t i = 0; i < m * f->cols; i++) x[i] = random_float();

    const struct matmul matmul = {*f, {pool, pool + row, pool + row + scales}, stride, stride, m, ROWS, x, NULL, out};
    compute_matmul(&matmul);
    memset(expected, 0, sizeof expected);
    memset(magnitude, 0, sizeof magnitude);
    for (size_t t = 0; t < m; t++)
        for (size_t r = 0; r < ROWS; r++) {
            const uint8_t *record = pool + r * stride;
            const struct row up = {record, record + row, record + row + scales};
            const struct row down = {record + part, record + part + row, record + part + row + scales};
            double h = 0, size = 0;
            for (size_t c = 0; c < f->cols; c++) {
                h += weight(f, &up, c) * x[t * f->cols + c];
                size += fabs(x[t * f->cols + c]) * (f->kind == AFFINE ? (double)(1 << f->bits) : 2);
            }
            compare(out[t * ROWS + r], h, size);
            for (size_t c = 0; c < f->cols && h > 0; c++) expected[t][c] += h * weight(f, &down, c);
            for (size_t c = 0; c < f->cols; c++)
                magnitude[t][c] += 2 * size * (f->kind == AFFINE ? (double)(1 << f->bits) : 2);
        }

    const struct ffn ffn = {.format = *f, .pool = pool, .record_stride = stride, .n = ROWS, .m = m,
                            .up = {0, row, row + scales}, .down = {part, part + row, part + row + scales},
                            .act = RELU, .x = x, .out = out};
    memset(out, 0, sizeof out);
    compute_ffn(&ffn);
    for (size_t t = 0; t < m; t++)
        for (size_t c = 0; c < f->cols; c++) compare(out[t * f->cols + c], expected[t][c], magnitude[t][c]);
}

/* Rows of a quantised matrix, its scales and its biases, one after the other; how many bytes that is. */
static size_t store_matrix(const struct format *f, size_t rows, uint8_t *p) {
    const size_t scales = rows * scales_size(f);
    for (size_t i = 0; i < rows * row_size(f); i++) p[i] = (uint8_t)random_bits();
    store_random(f->scale_kind, p + rows * row_size(f), 2 * rows * scales_size(f) / kind_size(f->scale_kind));
    return rows * row_size(f) + 2 * scales;
}

static double matrix_weight(const struct matrix *matrix, const uint8_t *record, size_t r, size_t c) {
    const struct format *f = &matrix->format;
    const struct row row = {record + matrix->first.weights + r * row_size(f),
                            record + matrix->first.scales + r * scales_size(f),
                            record + matrix->first.biases + r * scales_size(f)};
    return weight(f, &row, c);
}

static struct matrix matrix_at(const struct format *f, size_t rows, size_t at) {
    const size_t words = rows * row_size(f);
    return (struct matrix){*f, {at, at + words, at + words + rows * scales_size(f)}};
}

/* ReLU blocks whose `down` has rows of one group of `f`. */
static void check_blocks(const struct format *f, size_t m) {
    enum { BLOCKS = 3, D = 96, MOST = BLOCKS * (128 * D * 2 + 4 * 128 * 16 + 8 * D) };
    static uint8_t pool[MOST];
    static float x[TOKENS * D], out[TOKENS * D];
    const struct format up = {AFFINE, f->scale_kind, 4, 32, D};
    size_t stride = 0;
    for (size_t i = 0; i < BLOCKS; i++) {
        const size_t first = store_matrix(&up, f->cols, pool + i * stride);
        stride = first + store_matrix(f, D, pool + i * stride + first);
    }
    for (size_t i = 0; i < m * D; i++) x[i] = random_float();
    const struct blocks call = {.pool = pool, .record_stride = stride, .n = BLOCKS, .m = m, .d = D,
                                .neurons = f->cols, .up = matrix_at(&up, f->cols, 0),
                                .down = matrix_at(f, D, f->cols * (row_size(&up) + 2 * scales_size(&up))),
                                .act = RELU, .x = x, .out = out};
    memset(out, 0, sizeof out);
    compute_blocks(&call);
    for (size_t t = 0; t < m; t++) {
        double expected[D] = {0}, magnitude[D] = {0};
        for (size_t i = 0; i < BLOCKS; i++)
            for (size_t r = 0; r < f->cols; r++) {
                const uint8_t *record = pool + i * stride;
                double h = 0, size = 0;
                for (size_t c = 0; c < D; c++) {
                    h += matrix_weight(&call.up, record, r, c) * x[t * D + c];
                    size += fabs(x[t * D + c]) * 32;
                }
                for (size_t c = 0; c < D; c++) {
                    if (h > 0) expected[c] += h * matrix_weight(&call.down, record, c, r);
                    magnitude[c] += size * (double)(2 << f->bits);
                }
            }
        for (size_t c = 0; c < D; c++) compare(out[t * D + c], expected[c], magnitude[c]);
    }
}

int main(void) {
    static const char *const names[] = {"avx512", "avx2", "neon", "portable"};
    static const size_t odd[] = {1, 7, 33, 515, COLS};
    bool passed = true;
    for (size_t n = 0; n < 4; n++) {
        if (!compute_set_isa(names[n])) continue;
        largest = 0;
        for (size_t m = 1; m <= TOKENS; m += m < 3 ? 1 : 3) {
            for (int kind = F32; kind <= BF16; kind++)
                for (size_t i = 0; i < 5; i++) check(&(struct format){.kind = (enum kind)kind, .cols = odd[i]}, m);
            for (int bits = 1; bits <= 8; bits += bits == 6 ? 2 : 1)
                for (size_t group = 32; group <= 128; group *= 2) {
                    for (size_t groups = 1; groups * group <= COLS; groups += 4)
                        check(&(struct format){AFFINE, (enum kind)(bits % 3), bits, group, groups * group}, m);
                    check_blocks(&(struct format){AFFINE, (enum kind)(bits % 3), bits, group, group}, m);
                }
        }
        printf("%s: largest error %.3f of the bound\n", names[n], largest);
        passed = passed && largest <= 1;
    }
    return passed ? 0 : 1;
}
