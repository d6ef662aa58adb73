/* The Python face of compute.h: checks every size against its buffer, then works without the GIL. */
#include "native.h"

#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include "compute.h"
#include "threads.h"

/* --- checked sizes: SIZE_MAX stands for anything too large, which no buffer holds ---------------------- */

static size_t times(size_t a, size_t b) {
    size_t result;
    return __builtin_mul_overflow(a, b, &result) ? SIZE_MAX : result;
}

static size_t plus(size_t a, size_t b) {
    size_t result;
    return __builtin_add_overflow(a, b, &result) ? SIZE_MAX : result;
}

/* What `count` rows of `size` bytes reach, `stride` apart. */
static size_t rows_extent(size_t count, size_t stride, size_t size) {
    return count == 0 ? 0 : plus(times(count - 1, stride), size);
}

static bool fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    PyErr_FormatV(PyExc_ValueError, format, arguments);
    va_end(arguments);
    return false;
}

static bool are_sizes(const char *names, ...) {
    va_list values;
    va_start(values, names);
    bool valid = true;
    while (va_arg(values, int)) valid = valid && va_arg(values, Py_ssize_t) >= 0;
    va_end(values);
    return valid || fail("%s must not be negative", names);
}

/* --- buffers ------------------------------------------------------------------------------------------- */

struct views {
    Py_buffer views[16];
    int count;
};

static void release(struct views *held) {
    while (held->count > 0) PyBuffer_Release(&held->views[--held->count]);
}

enum element { BYTES, FLOATS, INDICES, WRITABLE = 16 };

/* The address of at least `need` bytes in `object`, valid until `held` is released. Arrays of another type
   than the element asked for are refused; plain bytes are taken at their word. */
static void *view(struct views *held, PyObject *object, const char *name, int element, size_t need) {
    Py_buffer *buffer = &held->views[held->count];
    const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (element & WRITABLE ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, buffer, flags) < 0) return NULL;
    held->count++;
    element &= ~WRITABLE;
    const char *format = buffer->format == NULL ? "B" : buffer->format;
    const bool is_plain = strcmp(format, "B") == 0 || strcmp(format, "b") == 0 || strcmp(format, "c") == 0;
    const size_t size = element == FLOATS ? sizeof(float) : element == INDICES ? sizeof(int64_t) : 1;
    if (!PyBuffer_IsContiguous(buffer, 'C')) { /* MLX gives what it has, whatever was asked for */
        fail("%s must be C-contiguous", name);
    } else if (element == FLOATS && !is_plain && strcmp(format, "f") != 0) {
        fail("%s must hold float32", name);
    } else if (element == INDICES && !is_plain && strcmp(format, "q") != 0 &&
               !(strcmp(format, "l") == 0 && sizeof(long) == sizeof(int64_t))) {
        fail("%s must hold int64", name);
    } else if ((size_t)buffer->len < need) {
        fail("%s is too small: %zd bytes of the %zu needed", name, buffer->len, need);
    } else if ((uintptr_t)buffer->buf % size != 0) {
        fail("%s is not aligned to its elements", name);
    } else {
        return buffer->buf != NULL ? buffer->buf : held; /* an empty one may have no address */
    }
    return NULL;
}

/* As view, but None gives NULL; false means an error. */
static bool view_optional(struct views *held, PyObject *object, const char *name, int element, size_t need,
                          void *address) {
    if (object == Py_None) return true;
    void *found = view(held, object, name, element, need);
    memcpy(address, &found, sizeof found);
    return found != NULL;
}

/* --- formats ------------------------------------------------------------------------------------------- */

static bool parse_kind(const char *name, const char *what, bool may_be_affine, enum kind *kind) {
    static const char *const names[] = {[F32] = "f32", [F16] = "f16", [BF16] = "bf16", [AFFINE] = "affine"};
    for (int i = 0; name != NULL && i < (may_be_affine ? 4 : 3); i++)
        if (strcmp(name, names[i]) == 0) {
            *kind = (enum kind)i;
            return true;
        }
    return fail("%s must be \"f32\", \"f16\"%s", what, may_be_affine ? ", \"bf16\" or \"affine\"" : " or \"bf16\"");
}

static bool parse_format(const char *dtype, const char *scale_dtype, Py_ssize_t cols, Py_ssize_t group, int bits,
                         struct format *format) {
    if (!parse_kind(dtype, "dtype", true, &format->kind)) return false;
    format->cols = (size_t)cols;
    if (format->kind != AFFINE) return true;
    if (!parse_kind(scale_dtype, "scale_dtype", false, &format->scale_kind)) return false;
    if (bits < 1 || bits > 8 || bits == 7) return fail("bits must be 1, 2, 3, 4, 5, 6 or 8, not %d", bits);
    if (group != 32 && group != 64 && group != 128) return fail("group must be 32, 64 or 128, not %zd", group);
    if (cols % group != 0) return fail("%zd columns are not a multiple of the group of %zd", cols, group);
    format->bits = bits;
    format->group = (size_t)group;
    return true;
}

static PyObject *finish(struct views *held, bool done, bool had_memory) {
    release(held);
    if (!done) return NULL;
    if (!had_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* --- matmul -------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(matmul_doc,
"matmul(out, x, w, dtype, m, rows, cols, row_stride, *, scales=None, biases=None, scale_dtype=None, group=0,\n"
"       bits=0, bias=None)\n\n"
"out[m, rows] = x[m, cols] @ w[rows, cols].T + bias[rows], with out, x and bias float32 and the rows of w\n"
"row_stride bytes apart. dtype: f32, f16, bf16, or affine, which is what mlx.core.quantize makes (bits 1-6, 8).");

static PyObject *matmul(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"out", "x", "w", "dtype", "m", "rows", "cols", "row_stride", "scales", "biases",
                            "scale_dtype", "group", "bits", "bias", NULL};
    PyObject *out, *x, *w, *scales = Py_None, *biases = Py_None, *bias = Py_None;
    const char *dtype, *scale_dtype = NULL;
    Py_ssize_t m, rows, cols, row_stride, group = 0;
    int bits = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOsnnnn|$OOzniO", names, &out, &x, &w, &dtype, &m, &rows,
                                     &cols, &row_stride, &scales, &biases, &scale_dtype, &group, &bits, &bias))
        return NULL;
    struct matmul call = {.m = (size_t)m, .rows = (size_t)rows, .row_stride = (size_t)row_stride};
    if (!are_sizes("m, rows, cols and row_stride", 1, m, 1, rows, 1, cols, 1, row_stride, 0) ||
        !parse_format(dtype, scale_dtype, cols, group, bits, &call.format))
        return NULL;
    struct views held = {.count = 0};
    const size_t width = row_size(&call.format);
    bool done = call.row_stride >= width || fail("row_stride of %zd is less than a row's %zu bytes", row_stride, width);
    if (done && call.format.kind == AFFINE) {
        call.scale_stride = scales_size(&call.format);
        const size_t need = times(call.rows, call.scale_stride);
        done = (call.first.scales = view(&held, scales, "scales", BYTES, need)) != NULL &&
               (call.first.biases = view(&held, biases, "biases", BYTES, need)) != NULL;
    }
    done = done &&
           (call.out = view(&held, out, "out", FLOATS | WRITABLE, times(times(call.m, call.rows), 4))) != NULL &&
           (call.x = view(&held, x, "x", FLOATS, times(times(call.m, call.format.cols), 4))) != NULL &&
           (call.first.weights = view(&held, w, "w", BYTES, rows_extent(call.rows, call.row_stride, width))) != NULL &&
           view_optional(&held, bias, "bias", FLOATS, times(call.rows, 4), &call.bias);
    bool had_memory = true;
    if (done) {
        Py_BEGIN_ALLOW_THREADS
        had_memory = compute_matmul(&call);
        Py_END_ALLOW_THREADS
    }
    return finish(&held, done, had_memory);
}

/* --- ffn ----------------------------------------------------------------------------------------------- */

static bool parse_act(const char *name, bool gated, enum act *act) {
    static const char *const names[] = {
        [RELU] = "relu", [RELU2] = "relu2", [FATRELU] = "fatrelu", [SILU] = "silu",
        [GELU] = "gelu", [GELU_TANH] = "gelu_tanh", [DRELU] = "drelu"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0) {
            *act = (enum act)i;
            return i != DRELU || gated || fail("drelu needs a gate");
        }
    return fail("act must be relu, relu2, fatrelu, silu, gelu, gelu_tanh or drelu, not %s", name);
}

/* One matrix's rows inside a record, checked to lie within it; *extent grows to what it reaches. */
static bool parse_part(const char *name, const struct format *format, size_t stride, Py_ssize_t weights,
                       Py_ssize_t scales, Py_ssize_t biases, struct part *part, size_t *extent) {
    const bool affine = format->kind == AFFINE;
    if (weights < 0 || (affine && (scales < 0 || biases < 0)))
        return fail(affine ? "%s needs its offset and those of its scales and biases" : "%s needs its offset", name);
    *part = (struct part){(size_t)weights, affine ? (size_t)scales : 0, affine ? (size_t)biases : 0};
    const size_t ends[] = {part->weights + row_size(format), affine ? part->scales + scales_size(format) : 0,
                           affine ? part->biases + scales_size(format) : 0};
    for (int i = 0; i < 3; i++) {
        if (ends[i] > stride) return fail("%s reaches byte %zu of records of %zu", name, ends[i], stride);
        if (ends[i] > *extent) *extent = ends[i];
    }
    return true;
}

PyDoc_STRVAR(ffn_doc,
"ffn(out, x, pool, n, dtype, m, d, record_stride, *, gate=-1, up=-1, down, gate_bias=None, up_bias=None,\n"
"    act='relu', threshold=0.0, slots_mask=None, group=0, bits=0, scale_dtype=None, gate_scales=-1,\n"
"    gate_biases=-1, up_scales=-1, up_biases=-1, down_scales=-1, down_biases=-1, active=None, hidden=None)\n\n"
"Adds to out[m, d] the feed-forward of x[m, d] over the first n records of a pool. A record holds a row of d\n"
"values for up and down, and for gate unless that is -1, at these byte offsets. h = act(up.x + up_bias), or\n"
"act(gate.x + gate_bias) * (up.x + up_bias); out += h * down. act: relu, relu2, fatrelu (v where\n"
"v > threshold), silu, gelu, gelu_tanh, drelu (relu on both). Biases are float32 [n]; slots_mask is uint8 [n],\n"
"0 to leave a record out; active, uint8 [m, n], receives h != 0. Rows that meet only zeros are not read.\n"
"hidden, float32 [m, n], is h itself: records then need no up, and x may be None.");

static PyObject *ffn(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"out", "x", "pool", "n", "dtype", "m", "d", "record_stride", "gate", "up", "down",
                            "gate_bias", "up_bias", "act", "threshold", "slots_mask", "group", "bits", "scale_dtype",
                            "gate_scales", "gate_biases", "up_scales", "up_biases", "down_scales", "down_biases",
                            "active", "hidden", NULL};
    PyObject *out, *x, *pool, *gate_bias = Py_None, *up_bias = Py_None, *mask = Py_None, *active = Py_None,
                              *hidden = Py_None;
    const char *dtype, *scale_dtype = NULL, *act = "relu";
    Py_ssize_t n, m, d, stride, group = 0, gate = -1, up = -1, down = -1, gate_scales = -1, gate_biases = -1,
                                up_scales = -1, up_biases = -1, down_scales = -1, down_biases = -1;
    float threshold = 0;
    int bits = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOnsnnn|$nnnOOsfOniznnnnnnOO", names, &out, &x, &pool, &n, &dtype,
                                     &m, &d, &stride, &gate, &up, &down, &gate_bias, &up_bias, &act, &threshold,
                                     &mask, &group, &bits, &scale_dtype, &gate_scales, &gate_biases, &up_scales,
                                     &up_biases, &down_scales, &down_biases, &active, &hidden))
        return NULL;
    struct ffn call = {.n = (size_t)n, .m = (size_t)m, .record_stride = (size_t)stride, .gated = gate >= 0,
                       .threshold = threshold};
    struct format *format = &call.format;
    size_t extent = 0;
    if (!are_sizes("n, m, d and record_stride", 1, n, 1, m, 1, d, 1, stride, 0) ||
        !parse_format(dtype, scale_dtype, d, group, bits, format) || !parse_act(act, call.gated, &call.act) ||
        (call.gated && !parse_part("gate", format, call.record_stride, gate, gate_scales, gate_biases, &call.gate,
                                   &extent)) ||
        (hidden == Py_None &&
         !parse_part("up", format, call.record_stride, up, up_scales, up_biases, &call.up, &extent)) ||
        !parse_part("down", format, call.record_stride, down, down_scales, down_biases, &call.down, &extent) ||
        (!call.gated && gate_bias != Py_None && !fail("gate_bias needs a gate")))
        return NULL;
    struct views held = {.count = 0};
    const size_t floats = times(times(call.m, format->cols), 4);
    bool had_memory = true;
    const bool done =
        (call.out = view(&held, out, "out", FLOATS | WRITABLE, floats)) != NULL &&
        view_optional(&held, hidden, "hidden", FLOATS, times(times(call.m, call.n), 4), &call.hidden) &&
        (call.hidden != NULL || (call.x = view(&held, x, "x", FLOATS, floats)) != NULL) &&
        (call.pool = view(&held, pool, "pool", BYTES, rows_extent(call.n, call.record_stride, extent))) != NULL &&
        view_optional(&held, gate_bias, "gate_bias", FLOATS, times(call.n, 4), &call.gate_bias) &&
        view_optional(&held, up_bias, "up_bias", FLOATS, times(call.n, 4), &call.up_bias) &&
        view_optional(&held, mask, "slots_mask", BYTES, call.n, &call.mask) &&
        view_optional(&held, active, "active", BYTES | WRITABLE, times(call.m, call.n), &call.active);
    if (done) {
        Py_BEGIN_ALLOW_THREADS
        had_memory = compute_ffn(&call);
        Py_END_ALLOW_THREADS
    }
    return finish(&held, done, had_memory);
}

/* --- blocks -------------------------------------------------------------------------------------------- */

/* A quantised matrix [rows, cols] inside a record: (bits, group, weights, scales, biases), the last three byte offsets;
   `room` bytes after its weights lie in the record too. */
static bool parse_matrix(const char *name, PyObject *said, const char *scale_dtype, size_t rows, Py_ssize_t cols,
                         size_t room, size_t stride, struct matrix *matrix) {
    int bits;
    Py_ssize_t group, weights, scales, biases;
    if (!PyTuple_Check(said)) return fail("%s must be a tuple", name);
    if (!PyArg_ParseTuple(said, "innnn", &bits, &group, &weights, &scales, &biases) ||
        !parse_format("affine", scale_dtype, cols, group, bits, &matrix->format) ||
        !are_sizes("a matrix's offsets", 1, weights, 1, scales, 1, biases, 0))
        return false;
    matrix->first = (struct part){(size_t)weights, (size_t)scales, (size_t)biases};
    const size_t words = plus(times(rows, row_size(&matrix->format)), room);
    const size_t values = times(rows, scales_size(&matrix->format));
    if (plus(matrix->first.weights, words) > stride || plus(matrix->first.scales, values) > stride ||
        plus(matrix->first.biases, values) > stride)
        return fail("%s reaches beyond records of %zu bytes", name, stride);
    return true;
}

PyDoc_STRVAR(blocks_doc,
"blocks(out, x, pool, n, m, d, neurons, record_stride, scale_dtype, *, gate=None, up, down, gate_bias=None,\n"
"       up_bias=None, act='relu', threshold=0.0, slots_mask=None)\n\n"
"Adds to out[m, d] the feed-forward of x[m, d] over the first n records of a pool, as ffn does. A record is a block\n"
"of neurons (32, 64 or 128): affine matrices up and perhaps gate [neurons, d] and down [d, neurons], each given as\n"
"(bits, group, byte offsets of weights, scales and biases). down's group is the block, d a multiple of 32. Biases are\n"
"float32 [n, neurons].");

static PyObject *blocks(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"out", "x", "pool", "n", "m", "d", "neurons", "record_stride", "scale_dtype", "gate", "up",
                            "down", "gate_bias", "up_bias", "act", "threshold", "slots_mask", NULL};
    PyObject *out, *x, *pool, *gate = Py_None, *up = Py_None, *down = Py_None, *gate_bias = Py_None, *up_bias = Py_None,
                              *mask = Py_None;
    const char *scale_dtype, *act = "relu";
    Py_ssize_t n, m, d, neurons, stride;
    float threshold = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOnnnnns|$OOOOOsfO", names, &out, &x, &pool, &n, &m, &d, &neurons,
                                     &stride, &scale_dtype, &gate, &up, &down, &gate_bias, &up_bias, &act, &threshold,
                                     &mask))
        return NULL;
    struct blocks call = {.n = (size_t)n, .m = (size_t)m, .d = (size_t)d, .neurons = (size_t)neurons,
                          .record_stride = (size_t)stride, .gated = gate != Py_None, .threshold = threshold};
    if (!are_sizes("n, m, d, neurons and record_stride", 1, n, 1, m, 1, d, 1, neurons, 1, stride, 0) ||
        !parse_act(act, call.gated, &call.act) ||
        (call.gated && !parse_matrix("gate", gate, scale_dtype, call.neurons, d, 0, call.record_stride, &call.gate)) ||
        !parse_matrix("up", up, scale_dtype, call.neurons, d, 0, call.record_stride, &call.up) ||
        !parse_matrix("down", down, scale_dtype, call.d, neurons, SPARE_BYTES, call.record_stride, &call.down) ||
        (call.down.format.group != call.neurons && !fail("down's group is not the block of %zd neurons", neurons)) ||
        (call.d % 32 != 0 && !fail("a width of %zd is not a multiple of 32", d)))
        return NULL;
    struct views held = {.count = 0};
    const size_t floats = times(times(call.m, call.d), 4), biases = times(times(call.n, call.neurons), 4);
    bool had_memory = true;
    const bool done =
        (call.out = view(&held, out, "out", FLOATS | WRITABLE, floats)) != NULL &&
        (call.x = view(&held, x, "x", FLOATS, floats)) != NULL &&
        (call.pool = view(&held, pool, "pool", BYTES, times(call.n, call.record_stride))) != NULL &&
        view_optional(&held, gate_bias, "gate_bias", FLOATS, biases, &call.gate_bias) &&
        view_optional(&held, up_bias, "up_bias", FLOATS, biases, &call.up_bias) &&
        view_optional(&held, mask, "slots_mask", BYTES, call.n, &call.mask);
    if (done) {
        Py_BEGIN_ALLOW_THREADS
        had_memory = compute_blocks(&call);
        Py_END_ALLOW_THREADS
    }
    return finish(&held, done, had_memory);
}

/* --- copy_rows, read_bandwidth ------------------------------------------------------------------------- */

static bool are_rows(const char *name, const int64_t *rows, size_t count, size_t stride, size_t size, size_t length) {
    for (size_t i = 0; i < count; i++)
        if (rows[i] < 0 || plus(times((size_t)rows[i], stride), size) > length)
            return fail("%s[%zu] = %lld lies outside its buffer", name, i, (long long)rows[i]);
    return true;
}

PyDoc_STRVAR(copy_rows_doc,
"copy_rows(dst, dst_stride, dst_slots, src, src_stride, src_rows, bytes)\n\n"
"Copies row src_rows[i] of src to row dst_slots[i] of dst, for every i; strides and bytes are in bytes, the\n"
"indices int64. Slots must differ, and dst must not overlap src.");

static PyObject *copy_rows(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *target, *target_rows, *source, *source_rows;
    Py_ssize_t target_stride, source_stride, size;
    if (!PyArg_ParseTuple(args, "OnOOnOn", &target, &target_stride, &target_rows, &source, &source_stride,
                          &source_rows, &size) ||
        !are_sizes("strides and bytes", 1, target_stride, 1, source_stride, 1, size, 0))
        return NULL;
    struct views held = {.count = 0};
    uint8_t *to;
    const uint8_t *from;
    const int64_t *slots, *rows;
    bool done = (to = view(&held, target, "dst", BYTES | WRITABLE, 0)) != NULL &&
                (from = view(&held, source, "src", BYTES, 0)) != NULL &&
                (slots = view(&held, target_rows, "dst_slots", INDICES, 0)) != NULL &&
                (rows = view(&held, source_rows, "src_rows", INDICES, 0)) != NULL;
    if (done) {
        const Py_buffer *v = held.views;
        const size_t count = (size_t)v[2].len / sizeof *slots;
        done = (v[2].len == v[3].len || fail("dst_slots and src_rows differ in length")) &&
               are_rows("dst_slots", slots, count, (size_t)target_stride, (size_t)size, (size_t)v[0].len) &&
               are_rows("src_rows", rows, count, (size_t)source_stride, (size_t)size, (size_t)v[1].len);
        if (done) {
            Py_BEGIN_ALLOW_THREADS
            compute_copy(to, (size_t)target_stride, slots, from, (size_t)source_stride, rows, count, (size_t)size);
            Py_END_ALLOW_THREADS
        }
    }
    return finish(&held, done, true);
}

PyDoc_STRVAR(read_bandwidth_doc,
"read_bandwidth(buffer)\n\nReads the whole buffer with all threads and returns how fast, in GB/s.");

static PyObject *read_bandwidth(PyObject *module, PyObject *buffer) {
    (void)module;
    struct views held = {.count = 0};
    const uint8_t *bytes = view(&held, buffer, "buffer", BYTES, 0);
    if (bytes == NULL) return finish(&held, false, true);
    double rate;
    Py_BEGIN_ALLOW_THREADS
    rate = compute_read_bandwidth(bytes, (size_t)held.views[0].len);
    Py_END_ALLOW_THREADS
    release(&held);
    return PyFloat_FromDouble(rate * 1e-9);
}

/* --- settings ------------------------------------------------------------------------------------------ */

static PyObject *get_threads(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(threads_count());
}

static PyObject *set_threads(PyObject *module, PyObject *count) {
    (void)module;
    const long n = PyLong_AsLong(count);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 1 || n > MAX_THREADS) {
        fail("threads must be between 1 and %d, not %ld", MAX_THREADS, n);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    threads_set_count((int)n);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *isa(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(compute_isa());
}

static PyObject *set_isa(PyObject *module, PyObject *args) {
    (void)module;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    bool found;
    Py_BEGIN_ALLOW_THREADS
    found = compute_set_isa(name);
    Py_END_ALLOW_THREADS
    if (!found) {
        fail("this processor has no %s", name);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"matmul", (PyCFunction)(void (*)(void))matmul, METH_VARARGS | METH_KEYWORDS, matmul_doc},
    {"ffn", (PyCFunction)(void (*)(void))ffn, METH_VARARGS | METH_KEYWORDS, ffn_doc},
    {"blocks", (PyCFunction)(void (*)(void))blocks, METH_VARARGS | METH_KEYWORDS, blocks_doc},
    {"copy_rows", copy_rows, METH_VARARGS, copy_rows_doc},
    {"read_bandwidth", read_bandwidth, METH_O, read_bandwidth_doc},
    {"get_threads", get_threads, METH_NOARGS, "get_threads()\n\nHow many threads the kernels use."},
    {"set_threads", set_threads, METH_O, "set_threads(n)\n\nUse n threads, the caller's among them."},
    {"isa", isa, METH_NOARGS, "isa()\n\nThe instruction set in use: avx512, avx2, neon or portable."},
    {"set_isa", set_isa, METH_VARARGS, "set_isa(name)\n\nUse another instruction set that the processor has."},
    {NULL, NULL, 0, NULL},
};

int mlxflash_add_kernels(PyObject *module) { return PyModule_AddFunctions(module, methods); }
