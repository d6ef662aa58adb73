/* The kernels' plain C face: products with rows of weights, whatever they are stored as. Nothing here knows
   Python. Addresses need only the alignment of a byte, except `x`, `out` and biases (float). */
#ifndef MLXFLASH_COMPUTE_H
#define MLXFLASH_COMPUTE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum kind { F32, F16, BF16, AFFINE };
enum act { RELU, RELU2, FATRELU, SILU, GELU, GELU_TANH, DRELU };

/* How a row of `cols` weights is stored. AFFINE is MLX's: a little-endian stream of `bits`-bit q's, and for
   each `group` of columns a scale and a bias (each of scale_kind); weight = scale * q + bias. */
struct format {
    enum kind kind, scale_kind;
    int bits;
    size_t group, cols;
};

struct row {
    const uint8_t *weights, *scales, *biases;
};

/* out[m, rows] = x[m, cols] @ W^T + bias; row r of W lies at first + r * the strides. */
struct matmul {
    struct format format;
    struct row first;
    size_t row_stride, scale_stride;
    size_t m, rows;
    const float *x, *bias;
    float *out;
};

/* Where one matrix's row lies inside a record. */
struct part {
    size_t weights, scales, biases;
};

/* out[m, d] += act(x @ up^T + up_bias) @ down, over the first n records of a pool. */
struct ffn {
    struct format format;
    const uint8_t *pool;
    size_t record_stride, n, m;
    bool gated;
    struct part gate, up, down;
    const float *gate_bias, *up_bias; /* [n], or NULL */
    enum act act;
    float threshold;
    const uint8_t *mask; /* [n]: 0 leaves a record out; or NULL */
    uint8_t *active;     /* [m, n]: whether the record took part; or NULL */
    const float *x;
    float *out;
};

/* A quantised matrix inside a record, its rows one after the other. */
struct matrix {
    struct format format;
    struct part first;
};

/* out[m, d] += act(x @ up^T + up_bias) @ down^T, over the first n records of a pool, each a block of neurons: gate and
   up [neurons, d], down [d, neurons], each in a format of its own; a row of down is one group. */
struct blocks {
    const uint8_t *pool;
    size_t record_stride, n, m, d, neurons;
    bool gated;
    struct matrix gate, up, down;
    const float *gate_bias, *up_bias; /* [n, neurons], or NULL */
    enum act act;
    float threshold;
    const uint8_t *mask; /* [n]: 0 leaves a record out; or NULL */
    const float *x;
    float *out;
};
enum {
    MOST_NEURONS = 128, /* of a block */
    SPARE_BYTES = 64,   /* of a record after down's weights, which may be read */
};

size_t kind_size(enum kind kind);
size_t row_size(const struct format *format);

size_t scales_size(const struct format *format);

/* All return false when there is no memory for their working buffers. */
bool compute_matmul(const struct matmul *call);
bool compute_ffn(const struct ffn *call);
bool compute_blocks(const struct blocks *call);

void compute_copy(uint8_t *target, size_t target_stride, const int64_t *target_rows, const uint8_t *source,
                  size_t source_stride, const int64_t *source_rows, size_t count, size_t size);
double compute_read_bandwidth(const uint8_t *bytes, size_t size); /* bytes per second */

const char *compute_isa(void);
bool compute_set_isa(const char *name);

#endif
