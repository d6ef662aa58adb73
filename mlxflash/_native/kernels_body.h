/* The kernels, written once over a vector type. An including file defines, for its instruction set:

     LANES, REGISTERS             floats in a vector; vector registers
     vf, vu                       vectors of LANES float and uint32_t (arithmetic operators work on both)
     vf_load vf_store vf_set vf_fma vf_sum       the usual; vf_fma(a, b, c) = a * b + c
     vf_from_f16 vf_from_bf16     LANES halves at an address, as floats
     vf_pick(v, i)                v[i[lane]] for every lane
     vu_load, vu_load3, vu_load5  LANES little-endian values of 32, 24 and 20 bits at an address; of what lies
                                  above a value's bits in its lane nothing is said. Reads no byte beyond.
     vf_from_field                the float of a value below 2^31
     vu_lane_groups(shift)        lane >> shift for every lane

   A q is never shifted down to be used. A 32-bit lane holds V consecutive q's; masking the k-th in place and
   converting gives q * 2^(bits * k), and x carries the factor 2^-(bits * k), so a q costs one AND, one
   conversion and one FMA whatever its width, all exact. For this x is arranged so that the values which meet
   the k-th q's of a vector of lanes are neighbours: arranged[(block * V + k) * LANES + lane] belongs to column
   (block * LANES + lane) * V + k. Only the topmost q of a full lane is shifted, because not every instruction
   set converts unsigned integers. The scale is applied once per lane and block; the bias meets the sum of the
   group's x, which every row shares. */

#include <string.h>

#include "simd.h"

#define UNROLL _Pragma("GCC unroll 32")

/* V: the q's in a lane. They are taken in runs of at most 8, between which the lane is shifted. */
#define LANE_VALUES(bits) ((bits) == 1 ? 32 : (bits) == 2 ? 16 : (bits) == 3 || (bits) == 4 ? 8 : 4)
#define LANE_BITS(bits) ((bits) * LANE_VALUES(bits))
#define BLOCK_BYTES(bits) ((size_t)LANE_BITS(bits) * LANES / 8)
#define KIND_SIZE(kind) ((kind) == F32 ? 4 : 2)

INLINE vu vu_set(uint32_t value) { return (vu){0} + value; }

/* --- loading ------------------------------------------------------------------------------------------ */

INLINE vf load_values(const int kind, const uint8_t *p) {
    if (kind == F32) return vf_load((const float *)(const void *)p);
    return kind == F16 ? vf_from_f16(p) : vf_from_bf16(p);
}

/* The first `count` < LANES values; the other lanes are zero. */
INLINE vf load_some_values(const int kind, const uint8_t *p, size_t count) {
    uint8_t padded[LANES * 4] = {0};
    memcpy(padded, p, count * KIND_SIZE(kind));
    return load_values(kind, padded);
}

static inline vf load_scales(enum kind kind, const uint8_t *p, size_t first, size_t count) {
    p += first * KIND_SIZE(kind);
    if (count < LANES) return load_some_values(kind, p, count);
    return load_values(kind, p);
}

INLINE vu load_lanes(const int bits, const uint8_t *p) {
    if (LANE_BITS(bits) == 24) return vu_load3(p);
    return LANE_BITS(bits) == 20 ? vu_load5(p) : vu_load(p);
}

/* The first `count` lanes; q's of the other lanes are zero. */
INLINE vu load_some_lanes(const int bits, const uint8_t *p, size_t count) {
    if (count >= LANES) return load_lanes(bits, p);
    uint8_t padded[BLOCK_BYTES(bits)];
    memset(padded, 0, sizeof padded);
    memcpy(padded, p, count * LANE_BITS(bits) / 8);
    return load_lanes(bits, padded);
}

INLINE vf field(const int bits, const int k, vu lanes) {
    if (bits * (k + 1) == 32) return vf_from_field(lanes >> (32 - bits));
    return vf_from_field(lanes & vu_set(((1u << bits) - 1) << (bits * k)));
}

static float field_unit(int bits, int k) {
    return bits * (k + 1) == 32 ? 1.0f : 1.0f / (float)(UINT64_C(1) << (bits * k));
}

/* --- dots: several rows times several tokens in registers ---------------------------------------------- */

INLINE void dense_dots(const int kind, const int R, const int M, const struct operand *p, const struct row *rows,
                       const float *x, float *out, size_t out_stride) {
    const int U = R * M >= 8 ? 1 : R * M >= 4 ? 2 : 4; /* enough sums in flight to hide an FMA's latency */
    const size_t cols = p->format.cols, width = p->width;
    const uint8_t *w[4];
    vf sum[4][4][4];
    UNROLL for (int r = 0; r < R; r++) w[r] = rows[r].weights;
    UNROLL for (int u = 0; u < U; u++)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < M; t++) sum[u][r][t] = vf_set(0);
    size_t c = 0;
    for (; c + U * LANES <= cols; c += U * LANES)
        UNROLL for (int u = 0; u < U; u++)
            UNROLL for (int r = 0; r < R; r++) {
                const vf v = load_values(kind, w[r] + (c + u * LANES) * KIND_SIZE(kind));
                UNROLL for (int t = 0; t < M; t++)
                    sum[u][r][t] = vf_fma(v, vf_load(x + t * width + c + u * LANES), sum[u][r][t]);
            }
    for (; c < cols; c += LANES) {
        const size_t left = cols - c;
        vf v[4], xv[4];
        UNROLL for (int r = 0; r < R; r++) {
            const uint8_t *p = w[r] + c * KIND_SIZE(kind);
            v[r] = left < LANES ? load_some_values(kind, p, left) : load_values(kind, p);
        }
        UNROLL for (int t = 0; t < M; t++) {
            const float *p = x + t * width + c;
            xv[t] = left < LANES ? load_some_values(F32, (const uint8_t *)p, left) : vf_load(p);
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < M; t++) sum[0][r][t] = vf_fma(v[r], xv[t], sum[0][r][t]);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < M; t++) {
            vf total = sum[0][r][t];
            UNROLL for (int u = 1; u < U; u++) total += sum[u][r][t];
            out[t * out_stride + r] = vf_sum(total);
        }
}

/* How the lanes of one group follow each other: `lanes` of them; the groups of a block's lanes start at
   `first` and move on by `step` every `blocks` blocks. */
struct lane_map {
    size_t lanes, blocks;
    vu first, step;
};

INLINE struct lane_map map_lanes(const int bits, size_t group) {
    const size_t lanes = group / LANE_VALUES(bits);
    return (struct lane_map){
        lanes,
        lanes > LANES ? lanes / LANES : 1,
        vu_lane_groups(__builtin_ctz((unsigned)lanes)),
        vu_set(lanes > LANES ? 1 : (uint32_t)(LANES / lanes)),
    };
}

INLINE void affine_dots(const int bits, const int R, const int M, const struct operand *p, const struct row *rows,
                        const float *x, const float *x_groups, float *out, size_t out_stride) {
    const int V = LANE_VALUES(bits);
    const size_t groups = p->format.cols / p->format.group, width = p->width, group_width = p->group_width;
    const struct lane_map map = map_lanes(bits, p->format.group);
    const enum kind scale_kind = p->format.scale_kind;
    const uint8_t *w[4];
    vf sum[4][4];
    UNROLL for (int r = 0; r < R; r++) {
        w[r] = rows[r].weights;
        UNROLL for (int t = 0; t < M; t++) sum[r][t] = vf_set(0);
    }
    for (size_t g = 0; g < groups; g += LANES) {
        const size_t here = groups - g < LANES ? groups - g : LANES;
        vf scales[4];
        UNROLL for (int r = 0; r < R; r++) {
            const vf biases = load_scales(scale_kind, rows[r].biases, g, here);
            scales[r] = load_scales(scale_kind, rows[r].scales, g, here);
            UNROLL for (int t = 0; t < M; t++)
                sum[r][t] = vf_fma(biases, vf_load(x_groups + t * group_width + g), sum[r][t]);
        }
        size_t left = here * map.lanes;
        for (vu at = map.first; left > 0; at += map.step) {
            vf scale[4];
            UNROLL for (int r = 0; r < R; r++) scale[r] = vf_pick(scales[r], at);
            for (size_t b = 0; b < map.blocks; b++) {
                vu q[4];
                vf part[4][4];
                UNROLL for (int r = 0; r < R; r++) {
                    q[r] = load_some_lanes(bits, w[r], left);
                    w[r] += BLOCK_BYTES(bits);
                }
                UNROLL for (int k = 0; k < V; k++)
                    UNROLL for (int r = 0; r < R; r++) {
                        const vf v = field(bits, k, q[r]);
                        UNROLL for (int t = 0; t < M; t++) {
                            const vf xv = vf_load(x + t * width + k * LANES);
                            if (k == 0) part[r][t] = v * xv;
                            else part[r][t] = vf_fma(v, xv, part[r][t]);
                        }
                    }
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int t = 0; t < M; t++) sum[r][t] = vf_fma(scale[r], part[r][t], sum[r][t]);
                x += V * LANES;
                left = left > LANES ? left - LANES : 0;
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < M; t++) out[t * out_stride + r] = vf_sum(sum[r][t]);
}

/* --- axpys: several rows, each times a number, into several tokens' accumulators ----------------------- */

INLINE void dense_axpys(const int kind, const int R, const int M, const struct operand *p, const struct row *rows,
                        const float *h, size_t h_stride, float *acc) {
    const size_t cols = p->format.cols, width = p->width;
    const uint8_t *w[4];
    vf factor[4][4];
    UNROLL for (int r = 0; r < R; r++) {
        w[r] = rows[r].weights;
        UNROLL for (int t = 0; t < M; t++) factor[t][r] = vf_set(h[t * h_stride + r]);
    }
    for (size_t c = 0; c < cols; c += LANES) {
        const size_t left = cols - c;
        vf v[4];
        UNROLL for (int r = 0; r < R; r++) {
            const uint8_t *p = w[r] + c * KIND_SIZE(kind);
            v[r] = left < LANES ? load_some_values(kind, p, left) : load_values(kind, p);
        }
        UNROLL for (int t = 0; t < M; t++) {
            vf sum = vf_load(acc + t * width + c);
            UNROLL for (int r = 0; r < R; r++) sum = vf_fma(factor[t][r], v[r], sum);
            vf_store(acc + t * width + c, sum);
        }
    }
}

INLINE void affine_axpys(const int bits, const int R, const int M, const struct operand *p, const struct row *rows,
                         const float *h, size_t h_stride, float *acc, float *acc_groups) {
    const int V = LANE_VALUES(bits);
    const size_t groups = p->format.cols / p->format.group, width = p->width, group_width = p->group_width;
    const struct lane_map map = map_lanes(bits, p->format.group);
    const enum kind scale_kind = p->format.scale_kind;
    const uint8_t *w[4];
    UNROLL for (int r = 0; r < R; r++) w[r] = rows[r].weights;
    for (size_t g = 0; g < groups; g += LANES) {
        const size_t here = groups - g < LANES ? groups - g : LANES;
        vf scales[4], biases[4];
        UNROLL for (int r = 0; r < R; r++) {
            biases[r] = load_scales(scale_kind, rows[r].biases, g, here);
            scales[r] = load_scales(scale_kind, rows[r].scales, g, here);
        }
        UNROLL for (int t = 0; t < M; t++) {
            vf sum = vf_load(acc_groups + t * group_width + g);
            UNROLL for (int r = 0; r < R; r++) sum = vf_fma(vf_set(h[t * h_stride + r]), biases[r], sum);
            vf_store(acc_groups + t * group_width + g, sum);
        }
        size_t left = here * map.lanes;
        for (vu at = map.first; left > 0; at += map.step) {
            vf factor[4][4];
            UNROLL for (int r = 0; r < R; r++) {
                const vf scale = vf_pick(scales[r], at);
                UNROLL for (int t = 0; t < M; t++) factor[t][r] = scale * vf_set(h[t * h_stride + r]);
            }
            for (size_t b = 0; b < map.blocks; b++) {
                vu q[4];
                UNROLL for (int r = 0; r < R; r++) {
                    q[r] = load_some_lanes(bits, w[r], left);
                    w[r] += BLOCK_BYTES(bits);
                }
                UNROLL for (int k = 0; k < V; k++) {
                    vf v[4];
                    UNROLL for (int r = 0; r < R; r++) v[r] = field(bits, k, q[r]);
                    UNROLL for (int t = 0; t < M; t++) {
                        vf sum = vf_load(acc + t * width + k * LANES);
                        UNROLL for (int r = 0; r < R; r++) sum = vf_fma(factor[t][r], v[r], sum);
                        vf_store(acc + t * width + k * LANES, sum);
                    }
                }
                acc += V * LANES;
                left = left > LANES ? left - LANES : 0;
            }
        }
    }
}

/* --- one function per way of storing a row and number of tokens: 4, 2, 1 ------------------------------- */

/* As many rows at once as the registers hold sums for. */
#define DENSE_ROWS(M) (REGISTERS >= 32 || M < 4 ? 4 : 2)
#define AFFINE_ROWS(M) (REGISTERS >= 32 || M < 4 ? 2 : 1)
#define AXPY_ROWS 4

typedef void (*dots_function)(const struct operand *p, const struct row *rows, size_t count, const float *x,
                              const float *x_groups, float *out, size_t out_stride);
typedef void (*axpys_function)(const struct operand *p, const struct row *rows, size_t count, const float *h,
                               size_t h_stride, float *acc, float *acc_groups);

#define DEFINE_DENSE(name, kind, M)                                                                              \
    static void name##_dots_##M(const struct operand *p, const struct row *rows, size_t count, const float *x,   \
                                const float *x_groups, float *out, size_t out_stride) {                          \
        (void)x_groups;                                                                                          \
        size_t r = 0;                                                                                            \
        for (; r + DENSE_ROWS(M) <= count; r += DENSE_ROWS(M))                                                   \
            dense_dots(kind, DENSE_ROWS(M), M, p, rows + r, x, out + r, out_stride);                             \
        for (; r < count; r++) dense_dots(kind, 1, M, p, rows + r, x, out + r, out_stride);                      \
    }                                                                                                            \
    static void name##_axpys_##M(const struct operand *p, const struct row *rows, size_t count, const float *h,  \
                                 size_t h_stride, float *acc, float *acc_groups) {                               \
        (void)acc_groups;                                                                                        \
        size_t r = 0;                                                                                            \
        for (; r + AXPY_ROWS <= count; r += AXPY_ROWS)                                                           \
            dense_axpys(kind, AXPY_ROWS, M, p, rows + r, h + r, h_stride, acc);                                  \
        for (; r < count; r++) dense_axpys(kind, 1, M, p, rows + r, h + r, h_stride, acc);                       \
    }

#define DEFINE_AFFINE(name, bits, M)                                                                             \
    static void name##_dots_##M(const struct operand *p, const struct row *rows, size_t count, const float *x,   \
                                const float *x_groups, float *out, size_t out_stride) {                          \
        size_t r = 0;                                                                                            \
        for (; r + AFFINE_ROWS(M) <= count; r += AFFINE_ROWS(M))                                                 \
            affine_dots(bits, AFFINE_ROWS(M), M, p, rows + r, x, x_groups, out + r, out_stride);                 \
        for (; r < count; r++) affine_dots(bits, 1, M, p, rows + r, x, x_groups, out + r, out_stride);           \
    }                                                                                                            \
    static void name##_axpys_##M(const struct operand *p, const struct row *rows, size_t count, const float *h,  \
                                 size_t h_stride, float *acc, float *acc_groups) {                               \
        size_t r = 0;                                                                                            \
        for (; r + AXPY_ROWS <= count; r += AXPY_ROWS)                                                           \
            affine_axpys(bits, AXPY_ROWS, M, p, rows + r, h + r, h_stride, acc, acc_groups);                     \
        for (; r < count; r++) affine_axpys(bits, 1, M, p, rows + r, h + r, h_stride, acc, acc_groups);          \
    }

#define DEFINE(which, name, how) which(name, how, 4) which(name, how, 2) which(name, how, 1)
DEFINE(DEFINE_DENSE, f32, F32)
DEFINE(DEFINE_DENSE, f16, F16)
DEFINE(DEFINE_DENSE, bf16, BF16)
DEFINE(DEFINE_AFFINE, affine1, 1)
DEFINE(DEFINE_AFFINE, affine2, 2)
DEFINE(DEFINE_AFFINE, affine3, 3)
DEFINE(DEFINE_AFFINE, affine4, 4)
DEFINE(DEFINE_AFFINE, affine5, 5)
DEFINE(DEFINE_AFFINE, affine6, 6)
DEFINE(DEFINE_AFFINE, affine8, 8)

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

static const struct functions *functions_for(const struct format *format) {
    return format->kind == AFFINE ? &affine_functions[format->bits] : &dense_functions[format->kind];
}

static int tokens_at_once(size_t left) { return left >= 4 ? 2 : left >= 2 ? 1 : 0; }

static void dots(const struct operand *p, const struct row *rows, size_t count, float *out, size_t out_stride) {
    const struct functions *f = functions_for(&p->format);
    for (size_t t = 0; t < p->m;) {
        const int power = tokens_at_once(p->m - t);
        f->dots[power](p, rows, count, p->x + t * p->width, p->groups + t * p->group_width, out + t * out_stride,
                       out_stride);
        t += (size_t)1 << power;
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
    const size_t V = LANE_VALUES(f->bits), lanes = f->cols / V, group_count = f->cols / f->group;
    float unit[32];
    for (size_t k = 0; k < V; k++) unit[k] = field_unit(f->bits, (int)k);
    memset(arranged, 0, p->m * p->width * sizeof *arranged);
    memset(groups, 0, p->m * p->group_width * sizeof *groups);
    for (size_t t = 0; t < p->m; t++, arranged += p->width, groups += p->group_width) {
        for (size_t g = 0; g < group_count; g++) {
            vf sum = vf_set(0);
            for (size_t c = 0; c < f->group; c += LANES) sum += vf_load(x + g * f->group + c);
            groups[g] = vf_sum(sum);
        }
        for (size_t lane = 0; lane < lanes; lane++, x += V)
            for (size_t k = 0; k < V; k++)
                arranged[(lane / LANES * V + k) * LANES + lane % LANES] = x[k] * unit[k];
    }
}

static void collect(const struct operand *p, const float *acc, const float *acc_groups, float *out) {
    const struct format *f = &p->format;
    if (f->kind != AFFINE) {
        for (size_t c = 0; c < f->cols; c++) out[c] += acc[c];
        return;
    }
    const size_t V = LANE_VALUES(f->bits), lanes = f->cols / V, lanes_per_group = f->group / V;
    for (size_t lane = 0; lane < lanes; lane++)
        for (size_t k = 0; k < V; k++)
            *out++ += acc[(lane / LANES * V + k) * LANES + lane % LANES] * field_unit(f->bits, (int)k) +
                      acc_groups[lane / lanes_per_group];
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
    const struct simd simd_##isa = {#isa, measure, arrange, dots, axpys, collect, sweep}
