/* The kernels, written once over a vector type. An including file defines, for its instruction set:

     LANES                        floats in a vector
     vf, vu                       vectors of LANES float and uint32_t (arithmetic operators work on both)
     vf_load vf_store vf_set vf_fma vf_sum       the usual; vf_fma(a, b, c) = a * b + c
     vf_from_f16 vf_from_bf16     LANES halves at an address, as floats
     vf_pick(v, i)                v[i[lane]] for every lane
     vf_pairs(a, b)               sums of neighbouring lanes, a's and then b's
     vu_load, vu_load3, vu_load5  LANES little-endian values of 32, 24 and 20 bits at an address; what lies above
                                  a value's bits in its lane is open. A whole vector is read for each.
     vf_from_field                the float of a value below 2^31
     vu_lanes                     0, 1, 2 ...

   A q is never shifted down to be used. A 32-bit lane holds V consecutive q's, taken in runs of at most 8;
   masking the k-th of a run in place and converting gives q * 2^(bits * k), and x carries 2^-(bits * k), so a q
   of any width costs one AND, one conversion and one FMA, all exact. For this x is arranged so that the values
   which meet the k-th q's of a vector of lanes are neighbours: vector block * V + k holds, for every lane,
   column (block * LANES + lane) * V + k. Only the topmost q of a full lane is shifted, because not every
   instruction set converts unsigned integers. The scale is applied once per lane and block; the bias meets the
   sum of the group's x, which every row shares.

   Tokens are taken in tiles of 4, 2 and 1. A tile's x has its tokens' vectors next to each other, so that one
   pointer reaches them all; vectors are padded with zeros. Accumulators are laid out like x. */

#include <string.h>

#include "simd.h"

#define UNROLL _Pragma("GCC unroll 32")

#define LANE_VALUES(bits) ((bits) == 1 ? 32 : (bits) == 2 ? 16 : (bits) == 3 || (bits) == 4 ? 8 : 4)
#define RUN_VALUES(bits) (LANE_VALUES(bits) < 8 ? LANE_VALUES(bits) : 8)
#define LANE_BITS(bits) ((bits) * LANE_VALUES(bits))
#define BLOCK_BYTES(bits) ((size_t)LANE_BITS(bits) * LANES / 8)
#define VECTOR_BYTES ((size_t)LANES * 4)
#define KIND_SIZE(kind) ((kind) == F32 ? 4 : 2)

INLINE vu vu_set(uint32_t value) { return (vu){0} + value; }

/* --- loading ------------------------------------------------------------------------------------------ */

INLINE vf load_values(int kind, const uint8_t *p) {
    if (kind == F32) return vf_load((const float *)(const void *)p);
    return kind == F16 ? vf_from_f16(p) : vf_from_bf16(p);
}

/* The first `count` < LANES values; the other lanes are zero. */
INLINE vf load_some_values(const int kind, const uint8_t *p, size_t count) {
    uint8_t padded[LANES * 4] = {0};
    memcpy(padded, p, count * KIND_SIZE(kind));
    return load_values(kind, padded);
}

INLINE vf field(const int bits, const int k, vu lanes) {
    if (bits * (k + 1) == 32) return vf_from_field(lanes >> (32 - bits));
    return vf_from_field(lanes & vu_set(((1u << bits) - 1) << (bits * k)));
}

static float field_unit(int bits, int k) {
    k %= RUN_VALUES(bits);
    return bits * (k + 1) == 32 ? 1.0f : 1.0f / (float)(1u << (bits * k));
}

/* --- rows of an affine format --------------------------------------------------------------------------- */

/* What a vector read at a row's end would reach beyond, where memory may end: from the weights at `first` on,
   the row is read from `lanes` + `offset`, and its last scales from here if they do not fill a vector. */
struct row_end {
    const uint8_t *first;
    size_t offset;
    uint8_t lanes[2 * VECTOR_BYTES], scales[VECTOR_BYTES], biases[VECTOR_BYTES];
};

/* Where the rows' scales belong: lane l, counted from a vector of scales on, to scale l >> shift. */
struct affine_shape {
    size_t groups, lanes; /* in a row; in a group */
    int shift;
};

INLINE struct affine_shape affine_shape(const int bits, const struct format *f) {
    const size_t lanes = f->group / LANE_VALUES(bits);
    return (struct affine_shape){f->cols / f->group, lanes, __builtin_ctz((unsigned)lanes)};
}

INLINE void copy_row_end(const int bits, const struct format *f, const struct row *row, struct row_end *end) {
    const size_t groups = f->cols / f->group, scale = KIND_SIZE(f->scale_kind), left = groups % LANES;
    const size_t size = f->cols / 8 * (size_t)bits;
    if (left != 0) {
        memset(end->scales, 0, sizeof end->scales);
        memset(end->biases, 0, sizeof end->biases);
        memcpy(end->scales, row->scales + (groups - left) * scale, left * scale);
        memcpy(end->biases, row->biases + (groups - left) * scale, left * scale);
    }
    const size_t begin = size < VECTOR_BYTES ? 0 : size - VECTOR_BYTES;
    const size_t first = size < VECTOR_BYTES ? 0 : (begin / BLOCK_BYTES(bits) + 1) * BLOCK_BYTES(bits);
    end->first = row->weights + first;
    end->offset = first - begin;
    if (first == size) return;
    memset(end->lanes, 0, sizeof end->lanes);
    if (size < VECTOR_BYTES) memcpy(end->lanes, row->weights, size);
    else memcpy(end->lanes, row->weights + begin, VECTOR_BYTES);
}

/* The lanes at *w, which moves on. */
INLINE vu next_lanes(const int bits, const uint8_t **w, const struct row_end *end) {
    const uint8_t *p = *w == end->first ? end->lanes + end->offset : *w;
    *w = p + BLOCK_BYTES(bits);
    if (LANE_BITS(bits) == 24) return vu_load3(p);
    return LANE_BITS(bits) == 20 ? vu_load5(p) : vu_load(p);
}

/* --- dots: one row times a tile of tokens ---------------------------------------------------------------- */

/* One row at a time, since memory likes one stream best. What comes BYTES_AHEAD later is called into the cache
   meanwhile: the rest of the row and then another one's beginning, where the processor's own guess would end. */
struct ahead {
    const uint8_t *at, *then;
    size_t left; /* bytes until `then` */
};

INLINE struct ahead look_ahead(const struct row *row, const struct row *soon, size_t row_bytes) {
    if (row_bytes <= BYTES_AHEAD) return (struct ahead){soon->weights, soon->weights, SIZE_MAX};
    return (struct ahead){row->weights + BYTES_AHEAD, soon->weights, row_bytes - BYTES_AHEAD};
}

INLINE void call_ahead(struct ahead *ahead, size_t size) {
    for (size_t i = 0; i < size; i += CACHE_LINE) __builtin_prefetch(ahead->at + i);
    ahead->at += size;
    if (ahead->left > size) {
        ahead->left -= size;
    } else {
        ahead->at = ahead->then;
        ahead->left = SIZE_MAX;
    }
}

INLINE void dense_dot(const int kind, const int M, const struct operand *p, const struct row *row,
                      const struct row *soon, const float *x, float *out, size_t out_stride) {
    enum { MOST = 8 }; /* sums in flight, to hide an FMA's latency */
    const int U = MOST / M;
    const size_t cols = p->format.cols;
    const uint8_t *w = row->weights;
    struct ahead ahead = look_ahead(row, soon, cols * KIND_SIZE(kind));
    vf sum[MOST][4];
    UNROLL for (int u = 0; u < U; u++)
        UNROLL for (int t = 0; t < M; t++) sum[u][t] = vf_set(0);
    size_t c = 0;
    for (; c + U * LANES <= cols; c += U * LANES, x += U * M * LANES) {
        call_ahead(&ahead, U * LANES * KIND_SIZE(kind));
        UNROLL for (int u = 0; u < U; u++) {
            const vf v = load_values(kind, w + (c + u * LANES) * KIND_SIZE(kind));
            UNROLL for (int t = 0; t < M; t++) sum[u][t] = vf_fma(v, vf_load(x + (u * M + t) * LANES), sum[u][t]);
        }
    }
    for (; c < cols; c += LANES, x += M * LANES) {
        const uint8_t *p = w + c * KIND_SIZE(kind);
        const vf v = cols - c < LANES ? load_some_values(kind, p, cols - c) : load_values(kind, p);
        UNROLL for (int t = 0; t < M; t++) sum[0][t] = vf_fma(v, vf_load(x + t * LANES), sum[0][t]);
    }
    UNROLL for (int t = 0; t < M; t++) {
        UNROLL for (int u = 1; u < U; u++) sum[0][t] += sum[u][t];
        out[t * out_stride] = vf_sum(sum[0][t]);
    }
}

INLINE void affine_dot(const int bits, const int M, const struct operand *p, const struct row *row,
                       const struct row *soon, const float *x, const float *x_groups, float *out,
                       size_t out_stride) {
    const int V = LANE_VALUES(bits), RUN = RUN_VALUES(bits);
    const struct affine_shape shape = affine_shape(bits, &p->format);
    const enum kind scale_kind = p->format.scale_kind;
    const uint8_t *w = row->weights, *next = soon->weights;
    struct row_end end;
    copy_row_end(bits, &p->format, row, &end);
    vf sum[4];
    UNROLL for (int t = 0; t < M; t++) sum[t] = vf_set(0);
    for (size_t g = 0; g < shape.groups; g += LANES, x_groups += M * LANES) {
        const bool is_whole = shape.groups - g >= LANES;
        const size_t offset = g * KIND_SIZE(scale_kind);
        const vf scales = load_values(scale_kind, is_whole ? row->scales + offset : end.scales);
        const vf biases = load_values(scale_kind, is_whole ? row->biases + offset : end.biases);
        __builtin_prefetch(soon->scales + offset);
        __builtin_prefetch(soon->biases + offset);
        UNROLL for (int t = 0; t < M; t++) sum[t] = vf_fma(biases, vf_load(x_groups + t * LANES), sum[t]);
        vu lane = vu_lanes();
        const size_t lane_count = (is_whole ? LANES : shape.groups - g) * shape.lanes;
        for (size_t done = 0; done < lane_count; done += LANES, lane += LANES) {
            vu lanes = next_lanes(bits, &w, &end);
            vf part[2][4]; /* two, since one would wait for its own FMAs */
            __builtin_prefetch(next);
            next += BLOCK_BYTES(bits);
            UNROLL for (int t = 0; t < M; t++) part[0][t] = part[1][t] = vf_set(0);
            for (int run = 0; run < V; run += RUN, x += RUN * M * LANES) {
                UNROLL for (int k = 0; k < RUN; k++) {
                    const vf v = field(bits, k, lanes);
                    UNROLL for (int t = 0; t < M; t++)
                        part[k % 2][t] = vf_fma(v, vf_load(x + (k * M + t) * LANES), part[k % 2][t]);
                }
                if (RUN < V) lanes >>= RUN * bits;
            }
            const vf scale = vf_pick(scales, lane >> shape.shift);
            UNROLL for (int t = 0; t < M; t++) sum[t] = vf_fma(scale, part[0][t] + part[1][t], sum[t]);
        }
    }
    UNROLL for (int t = 0; t < M; t++) out[t * out_stride] = vf_sum(sum[t]);
}

/* --- axpys: several rows, each times a number, into several tokens' accumulators ----------------------- */

INLINE void dense_axpys(const int kind, const int R, const int M, const struct operand *p, const struct row *rows,
                        const float *h, size_t h_stride, float *acc) {
    const size_t cols = p->format.cols;
    const uint8_t *w[4];
    vf factor[4][4];
    UNROLL for (int r = 0; r < R; r++) {
        w[r] = rows[r].weights;
        UNROLL for (int t = 0; t < M; t++) factor[t][r] = vf_set(h[t * h_stride + r]);
    }
    size_t c = 0;
    for (; c + LANES <= cols; c += LANES, acc += M * LANES) {
        vf v[4];
        UNROLL for (int r = 0; r < R; r++) v[r] = load_values(kind, w[r] + c * KIND_SIZE(kind));
        UNROLL for (int t = 0; t < M; t++) {
            vf sum = vf_load(acc + t * LANES);
            UNROLL for (int r = 0; r < R; r++) sum = vf_fma(factor[t][r], v[r], sum);
            vf_store(acc + t * LANES, sum);
        }
    }
    UNROLL for (int r = 0; r < R && c < cols; r++) {
        const vf v = load_some_values(kind, w[r] + c * KIND_SIZE(kind), cols - c);
        UNROLL for (int t = 0; t < M; t++)
            vf_store(acc + t * LANES, vf_fma(factor[t][r], v, vf_load(acc + t * LANES)));
    }
}

INLINE void affine_axpys(const int bits, const int R, const int M, const struct operand *p, const struct row *rows,
                         const float *h, size_t h_stride, float *acc, float *acc_groups) {
    const int V = LANE_VALUES(bits), RUN = RUN_VALUES(bits);
    const struct affine_shape shape = affine_shape(bits, &p->format);
    const enum kind scale_kind = p->format.scale_kind;
    struct row_end ends[4];
    const uint8_t *w[4];
    UNROLL for (int r = 0; r < R; r++) {
        copy_row_end(bits, &p->format, &rows[r], &ends[r]);
        w[r] = rows[r].weights;
    }
    for (size_t g = 0; g < shape.groups; g += LANES, acc_groups += M * LANES) {
        const bool is_whole = shape.groups - g >= LANES;
        vf scales[4];
        UNROLL for (int r = 0; r < R; r++) {
            const size_t offset = g * KIND_SIZE(scale_kind);
            const vf biases = load_values(scale_kind, is_whole ? rows[r].biases + offset : ends[r].biases);
            scales[r] = load_values(scale_kind, is_whole ? rows[r].scales + offset : ends[r].scales);
            UNROLL for (int t = 0; t < M; t++) {
                float *acc_t = acc_groups + t * LANES;
                vf_store(acc_t, vf_fma(vf_set(h[t * h_stride + r]), biases, vf_load(acc_t)));
            }
        }
        vu lane = vu_lanes();
        const size_t lane_count = (is_whole ? LANES : shape.groups - g) * shape.lanes;
        for (size_t done = 0; done < lane_count; done += LANES, lane += LANES) {
            vu lanes[4];
            vf factor[4][4];
            UNROLL for (int r = 0; r < R; r++) {
                const vf scale = vf_pick(scales[r], lane >> shape.shift);
                UNROLL for (int t = 0; t < M; t++) factor[t][r] = scale * vf_set(h[t * h_stride + r]);
                lanes[r] = next_lanes(bits, &w[r], &ends[r]);
            }
            for (int run = 0; run < V; run += RUN, acc += RUN * M * LANES) {
                UNROLL for (int k = 0; k < RUN; k++) {
                    vf v[4];
                    UNROLL for (int r = 0; r < R; r++) v[r] = field(bits, k, lanes[r]);
                    UNROLL for (int t = 0; t < M; t++) {
                        float *acc_t = acc + (k * M + t) * LANES;
                        vf sum = vf_load(acc_t);
                        UNROLL for (int r = 0; r < R; r++) sum = vf_fma(factor[t][r], v[r], sum);
                        vf_store(acc_t, sum);
                    }
                }
                UNROLL for (int r = 0; r < R && RUN < V; r++) lanes[r] >>= RUN * bits;
            }
        }
    }
}

/* --- columns: many rows of one group each, as a block's down matrix has them -------------------------- */

enum { MOST_ROW_LANES = 32, MOST_ROW_VALUES = 512 }; /* of a row, in vectors with padding */

/* As many rows as lanes at a time: their bytes follow each other, so their lanes do, and vectors of lanes are added pair
   by pair until there is one lane to each row. x holds h as each vector of lanes meets it, `patterns` in turn. */
INLINE void affine_columns(const int bits, const int M, const struct format *f, struct row row, size_t rows,
                           const float *x, const float *x_sums, size_t patterns, float *out) {
    const int V = LANE_VALUES(bits), RUN = RUN_VALUES(bits);
    const size_t lanes = f->cols / V, scale = KIND_SIZE(f->scale_kind);
    for (size_t r = 0; r < rows; r += LANES) {
        vf part[4][MOST_ROW_LANES];
        for (size_t i = 0; i < lanes; i++, row.weights += BLOCK_BYTES(bits)) {
            const float *at = x + i % patterns * V * M * LANES;
            vf sum[2][4];
            __builtin_prefetch(row.weights + BYTES_AHEAD);
            vu q = LANE_BITS(bits) == 24   ? vu_load3(row.weights)
                   : LANE_BITS(bits) == 20 ? vu_load5(row.weights)
                                           : vu_load(row.weights);
            UNROLL for (int t = 0; t < M; t++) sum[0][t] = sum[1][t] = vf_set(0);
            for (int run = 0; run < V; run += RUN, at += RUN * M * LANES) {
                UNROLL for (int k = 0; k < RUN; k++) {
                    const vf v = field(bits, k, q);
                    UNROLL for (int t = 0; t < M; t++)
                        sum[k % 2][t] = vf_fma(v, vf_load(at + (k * M + t) * LANES), sum[k % 2][t]);
                }
                if (RUN < V) q >>= RUN * bits;
            }
            UNROLL for (int t = 0; t < M; t++) part[t][i] = sum[0][t] + sum[1][t];
        }
        const vf scales = load_values(f->scale_kind, row.scales + r * scale);
        const vf biases = load_values(f->scale_kind, row.biases + r * scale);
        UNROLL for (int t = 0; t < M; t++) {
            for (size_t left = lanes; left > 1; left /= 2)
                for (size_t i = 0; i < left / 2; i++) part[t][i] = vf_pairs(part[t][2 * i], part[t][2 * i + 1]);
            float *to = out + t * rows + r;
            vf_store(to, vf_fma(scales, part[t][0], vf_fma(biases, vf_set(x_sums[t]), vf_load(to))));
        }
    }
}

/* --- one function per way of storing a row and number of tokens: 4, 2, 1 ------------------------------- */

#define AXPY_ROWS 4
#define DOT_ROWS 4

typedef void (*dots_function)(const struct operand *p, const struct row *rows, const struct row *soon, size_t count,
                              const float *x, const float *x_groups, float *out, size_t out_stride);
typedef void (*axpys_function)(const struct operand *p, const struct row *rows, size_t count, const float *h,
                               size_t h_stride, float *acc, float *acc_groups);

/* R rows for M tokens: each value of x is loaded once for R rows. Four tokens and more are not waiting for memory. */
INLINE void dense_dots(const int kind, const int R, const int M, const struct operand *p, const struct row *rows,
                       const struct row *soon, const float *x, float *out, size_t out_stride) {
    const size_t cols = p->format.cols;
    vf sum[DOT_ROWS][4];
    UNROLL for (int r = 0; r < R; r++) {
        __builtin_prefetch(soon[r].weights);
        UNROLL for (int t = 0; t < M; t++) sum[r][t] = vf_set(0);
    }
    for (size_t c = 0; c < cols; c += LANES, x += M * LANES) {
        const bool is_whole = cols - c >= LANES;
        UNROLL for (int r = 0; r < R; r++) {
            const uint8_t *w = rows[r].weights + c * KIND_SIZE(kind);
            const vf v = is_whole ? load_values(kind, w) : load_some_values(kind, w, cols - c);
            UNROLL for (int t = 0; t < M; t++) sum[r][t] = vf_fma(v, vf_load(x + t * LANES), sum[r][t]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < M; t++) out[t * out_stride + r] = vf_sum(sum[r][t]);
}

INLINE void all_dots(const int kind, const int bits, const int M, const struct operand *p, const struct row *rows,
                     const struct row *soon, size_t count, const float *x, const float *x_groups, float *out,
                     size_t out_stride) {
    size_t r = 0;
    if (kind != AFFINE && M == 4)
        for (; r + DOT_ROWS <= count; r += DOT_ROWS)
            dense_dots(kind, DOT_ROWS, M, p, rows + r, soon + r, x, out + r, out_stride);
    for (; r < count; r++)
        if (kind == AFFINE) affine_dot(bits, M, p, rows + r, soon + r, x, x_groups, out + r, out_stride);
        else dense_dot(kind, M, p, rows + r, soon + r, x, out + r, out_stride);
}

INLINE void some_axpys(const int kind, const int bits, const int R, const int M, const struct operand *p,
                       const struct row *rows, const float *h, size_t h_stride, float *acc, float *acc_groups) {
    if (kind == AFFINE) affine_axpys(bits, R, M, p, rows, h, h_stride, acc, acc_groups);
    else dense_axpys(kind, R, M, p, rows, h, h_stride, acc);
}

#define DEFINE_TILE(name, kind, bits, M)                                                                          \
    static void name##_dots_##M(const struct operand *p, const struct row *rows, const struct row *soon,          \
                                size_t count, const float *x, const float *x_groups, float *out,                  \
                                size_t out_stride) {                                                              \
        all_dots(kind, bits, M, p, rows, soon, count, x, x_groups, out, out_stride);                              \
    }                                                                                                             \
    static void name##_axpys_##M(const struct operand *p, const struct row *rows, size_t count, const float *h,   \
                                 size_t h_stride, float *acc, float *acc_groups) {                                \
        size_t r = 0;                                                                                             \
        for (; r + AXPY_ROWS <= count; r += AXPY_ROWS)                                                            \
            some_axpys(kind, bits, AXPY_ROWS, M, p, rows + r, h + r, h_stride, acc, acc_groups);                  \
        for (; r < count; r++) some_axpys(kind, bits, 1, M, p, rows + r, h + r, h_stride, acc, acc_groups);       \
    }
#define DEFINE(name, kind, bits) \
    DEFINE_TILE(name, kind, bits, 4) DEFINE_TILE(name, kind, bits, 2) DEFINE_TILE(name, kind, bits, 1)
#define DEFINE_COLUMNS(bits, M)                                                                                   \
    static void columns##bits##_##M(const struct format *f, struct row row, size_t rows, const float *x,          \
                                    const float *x_sums, size_t patterns, float *out) {                           \
        affine_columns(bits, M, f, row, rows, x, x_sums, patterns, out);                                          \
    }
#define DEFINE_AFFINE(bits)                                                                \
    DEFINE(affine##bits, AFFINE, bits) DEFINE_COLUMNS(bits, 4) DEFINE_COLUMNS(bits, 2)     \
    DEFINE_COLUMNS(bits, 1)

DEFINE(f32, F32, 8)
DEFINE(f16, F16, 8)
DEFINE(bf16, BF16, 8)
DEFINE_AFFINE(1)
DEFINE_AFFINE(2)
DEFINE_AFFINE(3)
DEFINE_AFFINE(4)
DEFINE_AFFINE(5)
DEFINE_AFFINE(6)
DEFINE_AFFINE(8)

/* Indexed by the largest power of two (0, 1, 2) of tokens done at once. */
#define FUNCTIONS(name)                                            \
    {                                                              \
        {name##_dots_1, name##_dots_2, name##_dots_4}, {           \
            name##_axpys_1, name##_axpys_2, name##_axpys_4         \
        }                                                          \
    }
struct functions {
    dots_function dots[3];
    axpys_function axpys[3];
};
static const struct functions dense_functions[] = {
    [F32] = FUNCTIONS(f32), [F16] = FUNCTIONS(f16), [BF16] = FUNCTIONS(bf16)};
static const struct functions affine_functions[] = {
    [1] = FUNCTIONS(affine1), [2] = FUNCTIONS(affine2), [3] = FUNCTIONS(affine3), [4] = FUNCTIONS(affine4),
    [5] = FUNCTIONS(affine5), [6] = FUNCTIONS(affine6), [8] = FUNCTIONS(affine8)};

typedef void (*columns_function)(const struct format *f, struct row row, size_t rows, const float *x,
                                 const float *x_sums, size_t patterns, float *out);
#define COLUMNS(bits) {columns##bits##_1, columns##bits##_2, columns##bits##_4}
static const columns_function columns_functions[][3] = {[1] = COLUMNS(1), [2] = COLUMNS(2), [3] = COLUMNS(3),
                                                        [4] = COLUMNS(4), [5] = COLUMNS(5), [6] = COLUMNS(6),
                                                        [8] = COLUMNS(8)};

static const struct functions *functions_for(const struct format *format) {
    return format->kind == AFFINE ? &affine_functions[format->bits] : &dense_functions[format->kind];
}

static int tokens_at_once(size_t left) { return left >= 4 ? 2 : left >= 2 ? 1 : 0; }

/* Where a token's first vector lies, and how far apart its vectors are. */
struct place {
    size_t first, first_group, step;
};

static struct place place_of(const struct operand *p, size_t token) {
    size_t tile = 0, tokens;
    while (tile + (tokens = (size_t)1 << tokens_at_once(p->m - tile)) <= token) tile += tokens;
    const size_t within = (token - tile) * LANES;
    return (struct place){tile * p->width + within, tile * p->group_width + within, tokens * LANES};
}

/* A row's part from a column on. Panels begin where groups and blocks of lanes do. */
static struct row row_from(const struct format *f, const struct row *row, size_t column) {
    if (f->kind != AFFINE) return (struct row){.weights = row->weights + column * KIND_SIZE(f->kind)};
    const size_t scale = column / f->group * KIND_SIZE(f->scale_kind);
    return (struct row){row->weights + column / 8 * (size_t)f->bits, row->scales + scale, row->biases + scale};
}

/* The x of long rows would leave the first-level cache between one row and the next, so all rows first take the
   columns whose x stays there. A multiple of any block and of LANES groups. */
enum { PANEL_FLOATS = 8192 };

static void dot_panels(const struct operand *p, const struct row *rows, const struct row *soon, size_t count,
                       size_t tokens, dots_function function, const float *x, const float *groups, float *out,
                       size_t out_stride) {
    const struct format *f = &p->format;
    const size_t panel = PANEL_FLOATS / tokens;
    for (size_t t = 0; t < tokens; t++) memset(out + t * out_stride, 0, count * sizeof *out);
    for (size_t column = 0; column < f->cols; column += panel) {
        struct operand part = *p;
        struct row here[BATCH], next[BATCH];
        float sums[4][BATCH];
        part.format.cols = f->cols - column < panel ? f->cols - column : panel;
        for (size_t r = 0; r < count; r++) {
            here[r] = row_from(f, &rows[r], column);
            next[r] = row_from(f, &soon[r], column);
        }
        function(&part, here, next, count, x + column * tokens,
                 f->kind == AFFINE ? groups + column / f->group * tokens : groups, sums[0], BATCH);
        for (size_t t = 0; t < tokens; t++)
            for (size_t r = 0; r < count; r++) out[t * out_stride + r] += sums[t][r];
    }
}

static void dots(const struct operand *p, const struct row *rows, const struct row *soon, size_t count, float *out,
                 size_t out_stride) {
    const struct functions *f = functions_for(&p->format);
    for (size_t t = 0; t < p->m;) {
        const int power = tokens_at_once(p->m - t);
        const size_t tokens = (size_t)1 << power;
        const float *x = p->x + t * p->width, *groups = p->groups + t * p->group_width;
        float *to = out + t * out_stride;
        if (p->format.cols * tokens <= PANEL_FLOATS)
            f->dots[power](p, rows, soon, count, x, groups, to, out_stride);
        else
            dot_panels(p, rows, soon, count, tokens, f->dots[power], x, groups, to, out_stride);
        t += tokens;
    }
}

static void axpys(const struct operand *p, const struct row *rows, size_t count, const float *h, size_t h_stride,
                  float *acc, float *acc_groups) {
    const struct functions *f = functions_for(&p->format);
    for (size_t t = 0; t < p->m;) {
        const int power = tokens_at_once(p->m - t);
        f->axpys[power](p, rows, count, h + t * h_stride, h_stride, acc + t * p->width,
                        acc_groups + t * p->group_width);
        t += (size_t)1 << power;
    }
}

static void columns(const struct format *f, size_t m, const float *h, struct row row, size_t rows, float *out) {
    const size_t V = LANE_VALUES(f->bits), lanes = f->cols / V, patterns = lanes > LANES ? lanes / LANES : 1;
    for (size_t t = 0; t < m;) {
        const int power = tokens_at_once(m - t);
        const size_t tokens = (size_t)1 << power;
        float x[4 * MOST_ROW_VALUES], sums[4] = {0};
        for (size_t each = 0; each < tokens; each++) {
            const float *from = h + (t + each) * f->cols;
            for (size_t i = 0; i < patterns * V * LANES; i++) {
                const size_t k = i / LANES % V, lane = (i / (V * LANES) * LANES + i % LANES) % lanes;
                x[(i / LANES * tokens + each) * LANES + i % LANES] = from[lane * V + k] * field_unit(f->bits, (int)k);
            }
            for (size_t c = 0; c < f->cols; c++) sums[each] += from[c];
        }
        columns_functions[f->bits][power](f, row, rows, x, sums, patterns, out + t * rows);
        t += tokens;
    }
}

/* --- layouts ------------------------------------------------------------------------------------------- */

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

static void measure(struct operand *p) {
    const struct format *f = &p->format;
    const size_t block = f->kind == AFFINE ? (size_t)LANES * LANE_VALUES(f->bits) : LANES;
    p->width = round_up(f->cols, block);
    p->group_width = f->kind == AFFINE ? round_up(f->cols / f->group, LANES) : 0;
}

static void arrange(const struct operand *p, const float *x, float *arranged, float *groups) {
    const struct format *f = &p->format;
    const size_t V = f->kind == AFFINE ? LANE_VALUES(f->bits) : 1, lanes = f->cols / V;
    memset(arranged, 0, p->m * p->width * sizeof *arranged);
    memset(groups, 0, p->m * p->group_width * sizeof *groups);
    float unit[32] = {1};
    for (size_t k = 0; k < V && f->kind == AFFINE; k++) unit[k] = field_unit(f->bits, (int)k);
    for (size_t t = 0; t < p->m; t++) {
        const struct place at = place_of(p, t);
        float *to = arranged + at.first;
        for (size_t block = 0; block < lanes; block += LANES) {
            const size_t here = lanes - block < LANES ? lanes - block : LANES;
            for (size_t k = 0; k < V; k++, to += at.step)
                for (size_t lane = 0; lane < here; lane++) to[lane] = x[(block + lane) * V + k] * unit[k];
        }
        for (size_t g = 0; g * f->group < f->cols && f->kind == AFFINE; g++) {
            vf sum = vf_set(0);
            for (size_t c = 0; c < f->group; c += LANES) sum += vf_load(x + g * f->group + c);
            groups[at.first_group + g / LANES * at.step + g % LANES] = vf_sum(sum);
        }
        x += f->cols;
    }
}

static void collect(const struct operand *p, const float *acc, const float *acc_groups, float *out) {
    const struct format *f = &p->format;
    const size_t V = f->kind == AFFINE ? LANE_VALUES(f->bits) : 1, lanes = f->cols / V;
    float unit[32] = {1};
    for (size_t k = 0; k < V && f->kind == AFFINE; k++) unit[k] = field_unit(f->bits, (int)k);
    for (size_t t = 0; t < p->m; t++) {
        const struct place at = place_of(p, t);
        const float *from = acc + at.first;
        for (size_t block = 0; block < lanes; block += LANES) {
            const size_t here = lanes - block < LANES ? lanes - block : LANES;
            for (size_t k = 0; k < V; k++, from += at.step)
                for (size_t lane = 0; lane < here; lane++) out[(block + lane) * V + k] += from[lane] * unit[k];
        }
        for (size_t g = 0; g * f->group < f->cols && f->kind == AFFINE; g++) {
            const float bias = acc_groups[at.first_group + g / LANES * at.step + g % LANES];
            for (size_t c = 0; c < f->group; c++) out[g * f->group + c] += bias;
        }
        out += f->cols;
    }
}

static uint32_t sweep(const uint8_t *p, size_t size) {
    vu sum[4] = {vu_set(0), vu_set(0), vu_set(0), vu_set(0)};
    const size_t step = sizeof sum;
    for (; size >= step; p += step, size -= step)
        UNROLL for (int i = 0; i < 4; i++) sum[i] += vu_load(p + i * sizeof(vu));
    const vu all = sum[0] + sum[1] + sum[2] + sum[3];
    uint32_t total = 0;
    for (int i = 0; i < LANES; i++) total += all[i];
    while (size-- > 0) total += *p++;
    return total;
}

#define SIMD_TABLE(isa) \
    const struct simd simd_##isa = {#isa, measure, arrange, dots, axpys, columns, collect, sweep}
