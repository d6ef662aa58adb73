/* Splits products into parts for the threads, and chooses the instruction set. */
#define _GNU_SOURCE
#include "compute.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "simd.h"
#include "threads.h"

enum {
    TOKENS = 8,            /* that the FFN takes through the pool at once: a row is then still in the cache */
    MAX_PARTS = 16,        /* of a pool, each with its own accumulators */
    RECORDS_PER_PART = 32, /* at least: clearing and adding up accumulators must not show */
    PART_BYTES = 64 << 10, /* of a matrix: large enough to hide the hand-over, small enough to even out */
    FETCH_BYTES = 2 << 10, /* of a row that is needed soon, but not in a sequence */
};

static const struct simd *_Atomic simd; /* NULL until first asked for */

static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

size_t kind_size(enum kind kind) { return kind == F32 ? 4 : 2; }

size_t row_size(const struct format *format) {
    return format->kind == AFFINE ? format->cols * (size_t)format->bits / 8 : format->cols * kind_size(format->kind);
}

size_t scales_size(const struct format *format) {
    return format->kind == AFFINE ? format->cols / format->group * kind_size(format->scale_kind) : 0;
}

/* --- instruction set ----------------------------------------------------------------------------------- */

static const struct simd *const sets[] = { /* best first */
#if defined(__x86_64__)
    &simd_avx512, &simd_avx2,
#elif defined(__aarch64__)
    &simd_neon,
#endif
    &simd_portable,
};
enum { SET_COUNT = sizeof sets / sizeof *sets };

static bool is_supported(const struct simd *set) {
#if defined(__x86_64__)
    if (set == &simd_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (set == &simd_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    (void)set;
    return true;
}

static void choose_simd(void) {
    for (int i = 0; simd == NULL; i++)
        if (is_supported(sets[i])) simd = sets[i];
}

const char *compute_isa(void) {
    choose_simd();
    return simd->name;
}

bool compute_set_isa(const char *name) {
    for (int i = 0; i < SET_COUNT; i++)
        if (strcmp(sets[i]->name, name) == 0 && is_supported(sets[i])) {
            threads_lock();
            simd = sets[i];
            threads_unlock();
            return true;
        }
    return false;
}

/* --- working memory ------------------------------------------------------------------------------------ */

/* Kept from call to call, because a call may last only microseconds. Guarded by the threads' lock. */
struct buffer {
    float *data;
    size_t size;
};

static bool reserve(struct buffer *buffer, size_t floats) {
    if (floats <= buffer->size) return true;
    free(buffer->data);
    const size_t bytes = divide_up(floats * sizeof(float), CACHE_LINE) * CACHE_LINE;
    buffer->data = aligned_alloc(CACHE_LINE, bytes);
    buffer->size = buffer->data == NULL ? 0 : bytes / sizeof(float);
    return buffer->data != NULL;
}

/* The operand for m tokens of x, laid out in `buffer`; of no x, its measures. */
static bool prepare(const struct format *format, const float *x, size_t m, struct buffer *buffer,
                    struct operand *operand) {
    *operand = (struct operand){.format = *format, .m = m};
    simd->measure(operand);
    if (x == NULL) return true;
    if (!reserve(buffer, m * (operand->width + operand->group_width))) return false;
    float *groups = buffer->data + m * operand->width;
    simd->arrange(operand, x, buffer->data, groups);
    operand->x = buffer->data;
    operand->groups = groups;
    return true;
}

static struct buffer arranged, arranged_too, accumulators;

static size_t rows_ahead(const struct format *format) { return divide_up(BYTES_AHEAD, row_size(format) + 1); }

/* --- matmul -------------------------------------------------------------------------------------------- */

struct matmul_job {
    const struct matmul *call;
    struct operand x;
    size_t rows_per_part, ahead;
};

static struct row matrix_row(const struct matmul *call, size_t r) {
    const struct row *first = &call->first;
    return (struct row){first->weights + r * call->row_stride, first->scales + r * call->scale_stride,
                        first->biases + r * call->scale_stride};
}

static void matmul_part(void *context, size_t part) {
    const struct matmul_job *job = context;
    const struct matmul *call = job->call;
    const size_t begin = part * job->rows_per_part, end = least(begin + job->rows_per_part, call->rows);
    for (size_t first = begin; first < end; first += BATCH) {
        const size_t count = least(BATCH, end - first);
        struct row rows[BATCH], soon[BATCH];
        for (size_t i = 0; i < count; i++) {
            rows[i] = matrix_row(call, first + i);
            soon[i] = matrix_row(call, least(first + i + job->ahead, call->rows - 1));
        }
        simd->dots(&job->x, rows, soon, count, call->out + first, call->rows);
    }
    if (call->bias == NULL) return;
    for (size_t t = 0; t < call->m; t++)
        for (size_t r = begin; r < end; r++) call->out[t * call->rows + r] += call->bias[r];
}

bool compute_matmul(const struct matmul *call) {
    if (call->m == 0 || call->rows == 0) return true;
    choose_simd();
    threads_lock();
    struct matmul_job job = {.call = call};
    const bool ready = prepare(&call->format, call->x, call->m, &arranged, &job.x);
    if (ready) {
        job.rows_per_part = divide_up(divide_up(PART_BYTES, row_size(&call->format) + 1), BATCH) * BATCH;
        job.ahead = rows_ahead(&call->format);
        threads_run(matmul_part, &job, divide_up(call->rows, job.rows_per_part),
                    call->rows * call->row_stride * call->m);
    }
    threads_unlock();
    return ready;
}

/* --- ffn ----------------------------------------------------------------------------------------------- */

/* The live records are cut into parts by their number alone, and each part adds up its own output: the result
   depends neither on how many threads there are nor on which of them was quick. */
struct ffn_job {
    const struct ffn *call;
    struct operand x;     /* the accumulators have its shape */
    const uint32_t *live; /* the records to do, or NULL for all of them */
    size_t live_count, parts, first_token, ahead;
    float *sums; /* [parts][m * (width + group_width)] */
    bool used[MAX_PARTS];
};

/* Rows whose part in the output is known but not yet added. */
struct pending {
    size_t count;
    struct row rows[BATCH];
    float h[TOKENS][BATCH];
};

static float activate(enum act act, float threshold, float v) {
    switch (act) {
    case RELU:
    case DRELU: return v > 0 ? v : 0;
    case RELU2: return v > 0 ? v * v : 0;
    case FATRELU: return v > threshold ? v : 0;
    case SILU: return v / (1 + expf(-v));
    case GELU: return 0.5f * v * erfcf(v * -0.70710678f);
    case GELU_TANH: return v / (1 + expf(-1.5957691f * (v + 0.044715f * v * v * v)));
    }
    return v;
}

static struct row part_at(const uint8_t *record, struct part part) {
    return (struct row){record + part.weights, record + part.scales, record + part.biases};
}

static struct row row_at(const struct ffn *call, struct part part, size_t record) {
    return part_at(call->pool + record * call->record_stride, part);
}

static size_t live_record(const struct ffn_job *job, size_t i) { return job->live == NULL ? i : job->live[i]; }

/* Calls the beginning of a row into the cache: from there the processor follows by itself. */
static void fetch(const struct format *format, const struct row *row) {
    const size_t size = least(row_size(format), FETCH_BYTES);
    for (size_t i = 0; i < size; i += CACHE_LINE) __builtin_prefetch(row->weights + i);
}

static size_t sum_size(const struct ffn_job *job) { return job->x.m * (job->x.width + job->x.group_width); }

static void add_pending(struct ffn_job *job, size_t part, struct pending *pending) {
    if (pending->count == 0) return;
    float *sums = job->sums + part * sum_size(job);
    if (!job->used[part]) memset(sums, 0, sum_size(job) * sizeof *sums);
    job->used[part] = true;
    simd->axpys(&job->x, pending->rows, pending->count, pending->h[0], BATCH, sums,
                sums + job->x.m * job->x.width);
    pending->count = 0;
}

static bool any(const float h[TOKENS][BATCH], size_t m, size_t i) {
    for (size_t t = 0; t < m; t++)
        if (h[t][i] != 0) return true;
    return false;
}

static void ffn_part(void *context, size_t part) {
    struct ffn_job *job = context;
    const struct ffn *call = job->call;
    const bool computed = call->hidden == NULL, gated = call->gated && computed;
    const struct part lead = call->gated ? call->gate : call->up;
    const float *lead_bias = call->gated ? call->gate_bias : call->up_bias;
    const size_t m = job->x.m, begin = job->live_count * part / job->parts,
                 end = job->live_count * (part + 1) / job->parts;
    struct pending pending = {0};
    for (size_t first = begin; first < end; first += BATCH) {
        size_t count = least(BATCH, end - first), records[BATCH];
        struct row rows[BATCH], soon[BATCH];
        float h[TOKENS][BATCH];
        for (size_t i = 0; i < count; i++) {
            records[i] = live_record(job, first + i);
            if (!computed) continue;
            rows[i] = row_at(call, lead, records[i]);
            soon[i] = row_at(call, lead, live_record(job, least(first + i + job->ahead, end - 1)));
        }
        if (computed) simd->dots(&job->x, rows, soon, count, h[0], BATCH);
        size_t open = 0; /* those which some token leaves on, moved to the front */
        for (size_t i = 0; i < count; i++) {
            const float bias = lead_bias == NULL ? 0 : lead_bias[records[i]];
            for (size_t t = 0; t < m; t++)
                h[t][open] = computed ? activate(call->act, call->threshold, h[t][i] + bias)
                                      : call->hidden[(job->first_token + t) * call->n + records[i]];
            records[open] = records[i];
            open += any(h, m, open);
        }
        if (gated && open > 0) {
            float up[TOKENS][BATCH];
            for (size_t i = 0; i < open; i++) rows[i] = row_at(call, call->up, records[i]);
            for (size_t i = 0; i < open; i++) soon[i] = rows[least(i + job->ahead, open - 1)];
            simd->dots(&job->x, rows, soon, open, up[0], BATCH);
            for (size_t t = 0; t < m; t++)
                for (size_t i = 0; i < open; i++) {
                    if (call->up_bias != NULL) up[t][i] += call->up_bias[records[i]];
                    h[t][i] *= call->act == DRELU ? activate(RELU, 0, up[t][i]) : up[t][i];
                }
        }
        for (size_t i = 0; i < open; i++) {
            if (!any(h, m, i)) continue;
            for (size_t t = 0; t < m; t++) {
                pending.h[t][pending.count] = h[t][i];
                if (call->active != NULL) call->active[(job->first_token + t) * call->n + records[i]] = h[t][i] != 0;
            }
            pending.rows[pending.count] = row_at(call, call->down, records[i]);
            fetch(&call->format, &pending.rows[pending.count]);
            if (++pending.count == BATCH) add_pending(job, part, &pending);
        }
    }
    add_pending(job, part, &pending);
}

static void add_up(const struct ffn_job *job, float *out) {
    const size_t size = sum_size(job);
    float *total = NULL;
    for (size_t part = 0; part < job->parts; part++) {
        float *sums = job->sums + part * size;
        if (!job->used[part]) continue;
        for (size_t i = 0; total != NULL && i < size; i++) total[i] += sums[i];
        if (total == NULL) total = sums;
    }
    if (total != NULL) simd->collect(&job->x, total, total + job->x.m * job->x.width, out);
}

bool compute_ffn(const struct ffn *call) {
    if (call->active != NULL) memset(call->active, 0, call->m * call->n);
    if (call->m == 0 || call->n == 0) return true;
    choose_simd();
    threads_lock();
    uint32_t *live = NULL;
    size_t live_count = call->n;
    bool ready = true;
    if (call->mask != NULL) {
        live = malloc(call->n * sizeof *live);
        ready = live != NULL;
        live_count = 0;
        for (size_t i = 0; ready && i < call->n; i++) {
            live[live_count] = (uint32_t)i;
            live_count += call->mask[i] != 0;
        }
    }
    const size_t parts = least(divide_up(live_count, RECORDS_PER_PART), MAX_PARTS);
    for (size_t t = 0; ready && t < call->m; t += TOKENS) {
        struct ffn_job job = {.call = call, .live = live, .live_count = live_count, .parts = parts,
                              .first_token = t, .ahead = rows_ahead(&call->format)};
        const size_t d = call->format.cols;
        const float *x = call->hidden == NULL ? call->x + t * d : NULL;
        ready = prepare(&call->format, x, least(TOKENS, call->m - t), &arranged, &job.x);
        ready = ready && reserve(&accumulators, parts * sum_size(&job));
        if (!ready) break;
        job.sums = accumulators.data;
        threads_run(ffn_part, &job, parts, live_count * call->record_stride * job.x.m);
        add_up(&job, call->out + t * d);
    }
    threads_unlock();
    free(live);
    return ready;
}

/* --- blocks -------------------------------------------------------------------------------------------- */

/* As in the FFN, records are cut into parts by their number alone, each with its own sums. */
struct blocks_job {
    const struct blocks *call;
    struct operand gate_x, up_x;
    size_t parts;
    float *sums; /* [parts][m][d] */
};

/* Rows [0, count) of a record's matrix times an operand: out[t * out_stride + r]. */
static void matrix_dots(const struct operand *x, const struct matrix *matrix, const uint8_t *record, size_t count,
                        float *out, size_t out_stride) {
    const struct format *format = &matrix->format;
    const size_t row = row_size(format), scales = scales_size(format), ahead = rows_ahead(format);
    for (size_t first = 0; first < count; first += BATCH) {
        const size_t batch = least(BATCH, count - first);
        struct row rows[2][BATCH];
        for (size_t i = 0; i < batch; i++)
            for (int soon = 0; soon < 2; soon++) {
                const size_t r = soon ? least(first + i + ahead, count - 1) : first + i;
                rows[soon][i] = (struct row){record + matrix->first.weights + r * row,
                                             record + matrix->first.scales + r * scales,
                                             record + matrix->first.biases + r * scales};
            }
        simd->dots(x, rows[0], rows[1], batch, out + first, out_stride);
    }
}

static void blocks_part(void *context, size_t part) {
    struct blocks_job *job = context;
    const struct blocks *call = job->call;
    const size_t m = job->up_x.m, d = call->d, neurons = call->neurons;
    float *sums = job->sums + part * m * d, h[TOKENS * MOST_NEURONS], up[TOKENS * MOST_NEURONS];
    memset(sums, 0, m * d * sizeof *sums);
    for (size_t i = call->n * part / job->parts; i < call->n * (part + 1) / job->parts; i++) {
        if (call->mask != NULL && !call->mask[i]) continue;
        const uint8_t *record = call->pool + i * call->record_stride;
        const float *lead_bias = call->gated ? call->gate_bias : call->up_bias;
        const struct operand *lead_x = call->gated ? &job->gate_x : &job->up_x;
        matrix_dots(lead_x, call->gated ? &call->gate : &call->up, record, neurons, h, neurons);
        if (call->gated) matrix_dots(&job->up_x, &call->up, record, neurons, up, neurons);
        for (size_t t = 0; t < m; t++)
            for (size_t r = 0; r < neurons; r++) {
                float *v = &h[t * neurons + r];
                *v = activate(call->act, call->threshold, *v + (lead_bias == NULL ? 0 : lead_bias[i * neurons + r]));
                if (!call->gated) continue;
                const float u = up[t * neurons + r] + (call->up_bias == NULL ? 0 : call->up_bias[i * neurons + r]);
                *v *= call->act == DRELU ? activate(RELU, 0, u) : u;
            }
        simd->columns(&call->down.format, m, h, part_at(record, call->down.first), d, sums);
    }
}

bool compute_blocks(const struct blocks *call) {
    if (call->m == 0 || call->n == 0) return true;
    choose_simd();
    threads_lock();
    const size_t parts = least(call->n, MAX_PARTS), d = call->d;
    bool ready = true;
    for (size_t t = 0; ready && t < call->m; t += TOKENS) {
        const size_t m = least(TOKENS, call->m - t);
        struct blocks_job job = {.call = call, .parts = parts};
        ready = prepare(&call->up.format, call->x + t * d, m, &arranged, &job.up_x) &&
                (!call->gated || prepare(&call->gate.format, call->x + t * d, m, &arranged_too, &job.gate_x)) &&
                reserve(&accumulators, parts * m * d);
        if (!ready) break;
        job.sums = accumulators.data;
        threads_run(blocks_part, &job, parts, call->n * call->record_stride * m);
        float *out = call->out + t * d;
        for (size_t part = 0; part < parts; part++)
            for (size_t i = 0; i < m * d; i++) out[i] += job.sums[part * m * d + i];
    }
    threads_unlock();
    return ready;
}

/* --- copying and measuring ----------------------------------------------------------------------------- */

struct copy_job {
    uint8_t *target;
    const uint8_t *source;
    size_t target_stride, source_stride, count, size, rows_per_part;
    const int64_t *target_rows, *source_rows;
};

static void copy_part(void *context, size_t part) {
    const struct copy_job *job = context;
    const size_t begin = part * job->rows_per_part, end = least(begin + job->rows_per_part, job->count);
    for (size_t i = begin; i < end; i++)
        memcpy(job->target + (size_t)job->target_rows[i] * job->target_stride,
               job->source + (size_t)job->source_rows[i] * job->source_stride, job->size);
}

void compute_copy(uint8_t *target, size_t target_stride, const int64_t *target_rows, const uint8_t *source,
                  size_t source_stride, const int64_t *source_rows, size_t count, size_t size) {
    if (count == 0 || size == 0) return;
    struct copy_job job = {target,      source,      target_stride, source_stride, count, size,
                           divide_up(PART_BYTES, size), target_rows, source_rows};
    threads_lock();
    threads_run(copy_part, &job, divide_up(count, job.rows_per_part), 2 * count * size);
    threads_unlock();
}

struct sweep_job {
    const uint8_t *bytes;
    size_t size, part_size;
    _Atomic uint32_t total;
};

static void sweep_part(void *context, size_t part) {
    struct sweep_job *job = context;
    const size_t begin = part * job->part_size;
    job->total += simd->sweep(job->bytes + begin, least(job->part_size, job->size - begin));
}

double compute_read_bandwidth(const uint8_t *bytes, size_t size) {
    choose_simd();
    threads_lock();
    struct sweep_job job = {.bytes = bytes, .size = size, .part_size = 1 << 20};
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    threads_run(sweep_part, &job, divide_up(size, job.part_size), size);
    clock_gettime(CLOCK_MONOTONIC, &end);
    threads_unlock();
    const double seconds = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    return seconds > 0 ? (double)size / seconds : 0;
}
