/* Batched reads from files into memory: mlxflash._native._core.Reader.

   A batch is cut into pieces when it is submitted, in the order of its spans. Workers then take pieces with
   one atomic add each: no lock, no allocation and no Python between two reads. */
#define _GNU_SOURCE /* preadv */
#include "native.h"
#include "reader.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>
#include <sys/stat.h>
#include <unistd.h>

#define PIECE (512u << 10) /* a long span is shared by several workers; shorter pieces only cost more calls */
#define MOST_JOINED 64 /* spans in one read */
#define MOST_THREADS 1024
#define MOST_DEPTH 4096

/* ---- batches and the queue ---- */

static void batch_end(Queue *queue, Batch *batch) {
    pthread_mutex_lock(&queue->lock);
    batch->ended = true;
    /* Under the lock: the waiter frees the batch as soon as it sees it ended. */
    pthread_cond_broadcast(&batch->over);
    pthread_mutex_unlock(&queue->lock);
}

void batch_release(Queue *queue, Batch *batch) {
    if (atomic_fetch_sub(&batch->holders, 1) == 1) batch_end(queue, batch);
}

Piece *batch_next(Batch *batch) {
    size_t i = atomic_fetch_add_explicit(&batch->cursor, 1, memory_order_relaxed);
    return i < batch->count ? &batch->pieces[i] : NULL;
}

static void batch_skip_rest(Batch *batch) {
    atomic_store_explicit(&batch->cursor, batch->count, memory_order_relaxed);
}

Batch *queue_enter(Queue *queue, bool block) {
    pthread_mutex_lock(&queue->lock);
    while (block && !queue->head && !queue->closing) pthread_cond_wait(&queue->work, &queue->lock);
    Batch *batch = queue->head;
    if (batch) {
        atomic_fetch_add_explicit(&batch->holders, 1, memory_order_relaxed);
        /* Workers wake each other: the first reads start before the last worker is up, and no more wake
           than there is work for. */
        if (atomic_load_explicit(&batch->cursor, memory_order_relaxed) + 1 < batch->count)
            pthread_cond_signal(&queue->work);
    }
    pthread_mutex_unlock(&queue->lock);
    return batch;
}

void queue_leave(Queue *queue, Batch *batch) {
    pthread_mutex_lock(&queue->lock);
    if (queue->head == batch) {
        queue->head = batch->next_queued;
        if (!queue->head) queue->tail = NULL;
        /* For the queue's own hold; not the last one, the caller's is still there. */
        atomic_fetch_sub(&batch->holders, 1);
    }
    pthread_mutex_unlock(&queue->lock);
    batch_release(queue, batch);
}

static void queue_add(Queue *queue, Batch *batch) {
    pthread_mutex_lock(&queue->lock);
    if (queue->tail) queue->tail->next_queued = batch;
    else queue->head = batch;
    queue->tail = batch;
    pthread_cond_signal(&queue->work);
    pthread_mutex_unlock(&queue->lock);
}

bool piece_advance(Queue *queue, Piece *piece, ssize_t outcome) {
    if (outcome > 0) {
        piece->done += (uint32_t)outcome;
        return piece->done < piece->bytes;
    }
    if (outcome == -EINTR || outcome == -EAGAIN) return true;

    Batch *batch = piece->batch;
    struct stat file;
    /* A file opened with O_DIRECT ends with a short read and, at the odd offset after it, EINVAL. */
    if (outcome == -EINVAL && piece->done && !fstat(batch->fd, &file) && S_ISREG(file.st_mode) &&
        piece->offset + piece->done >= (uint64_t)file.st_size)
        outcome = 0;
    size_t index = (size_t)(piece - batch->pieces);
    pthread_mutex_lock(&queue->lock);
    if (!batch->error || index < batch->failed) {
        batch->error = outcome ? (int)-outcome : END_OF_FILE;
        batch->failed = index;
    }
    pthread_mutex_unlock(&queue->lock);
    batch_skip_rest(batch);
    return false;
}

/* Which of its spans a piece's next byte belongs to; `*inside` is how much of that one is done. */
static uint32_t piece_at(const Piece *piece, uint32_t *inside) {
    uint32_t k = 0;
    *inside = piece->done;
    while (k + 1 < piece->spans && *inside >= piece->parts[k].iov_len)
        *inside -= (uint32_t)piece->parts[k++].iov_len;
    return k;
}

Rest piece_rest(const Piece *piece) {
    if (piece->spans == 1)
        return (Rest){.to = piece->to + piece->done, .bytes = piece->bytes - piece->done, .count = 1};
    uint32_t inside, k = piece_at(piece, &inside);
    const struct iovec *part = &piece->parts[k];
    return (Rest){.to = (unsigned char *)part->iov_base + inside,
                  .bytes = (uint32_t)part->iov_len - inside,
                  .parts = part,
                  .count = inside ? 1 : piece->spans - k};
}

/* ---- the engine of threads ---- */

static void *thread_main(void *arg) {
    Queue *queue = arg;
    Batch *batch;
    while ((batch = queue_enter(queue, true))) {
        Piece *piece;
        while ((piece = batch_next(batch))) {
            ssize_t n;
            do {
                Rest rest = piece_rest(piece);
                off_t offset = (off_t)(piece->offset + piece->done);
                n = rest.count > 1 ? preadv(batch->fd, rest.parts, (int)rest.count, offset)
                                   : pread(batch->fd, rest.to, rest.bytes, offset);
            } while (piece_advance(queue, piece, n < 0 ? -errno : n));
        }
        queue_leave(queue, batch);
    }
    return NULL;
}

/* ---- the Python type ---- */

/* A batch as Python sees it: until wait() claims it, its memory cannot go away. */
typedef struct Ticket {
    struct Ticket *next;
    long long number;
    unsigned long long bytes, joined;
    Py_buffer dest;
    Batch *batch;
} Ticket;

typedef struct {
    PyObject_HEAD
    Queue queue;
    Ring *ring; /* NULL with the engine of threads */
    pthread_t *workers;
    int threads;
    const char *engine;
    pid_t process;
    /* What follows is touched with the GIL held only. */
    Ticket *tickets;
    long long last_ticket;
    unsigned long long joined;
    bool closed;
} Reader;

static const char reader_doc[] =
    "Reader(threads=16, engine='threads', depth=64)\n--\n\n"
    "Reads batches of file spans into memory. With engine 'threads' that many threads read; with\n"
    "'io_uring' one thread keeps up to `depth` reads in flight, and OSError says when the system has no\n"
    "such thing or refuses it.";

static const char submit_doc[] =
    "submit($self, fd, spans, dest, /)\n--\n\n"
    "Starts reading and returns a ticket for wait(). spans: a C-contiguous buffer of uint64 (file offset,\n"
    "offset in dest, bytes), one triple each; short ones that follow each other in the file are one read.\n"
    "dest: a writable contiguous buffer. fd must stay open until the batch has been waited for; dest is kept\n"
    "alive until then.";

static const char wait_doc[] =
    "wait($self, ticket, /)\n--\n\n"
    "Waits until every read of the batch is over and returns the bytes read. ReadError: a read failed;\n"
    "what else dest holds is then undefined, but nothing writes to it any more.";

static const char done_doc[] =
    "done($self, ticket, /)\n--\n\n"
    "Whether wait() would return at once.";

static const char close_doc[] =
    "close($self, /)\n--\n\n"
    "Drains the reads in flight, drops the tickets not waited for and ends the threads.";

static const char error_doc[] =
    "A read of a batch failed: errno as in OSError (EIO at the end of the file), index of the span in its\n"
    "batch, its offset in the file and its length.";

static void ticket_free(Ticket *ticket) {
    pthread_cond_destroy(&ticket->batch->over);
    free(ticket->batch);
    PyBuffer_Release(&ticket->dest);
    free(ticket);
}

static bool batch_ended(Queue *queue, const Batch *batch) {
    pthread_mutex_lock(&queue->lock);
    bool ended = batch->ended;
    pthread_mutex_unlock(&queue->lock);
    return ended;
}

static bool usable(const Reader *self) {
    /* A forked child has the reader's memory without its threads, and perhaps a lock that is never freed. */
    if (self->process != getpid())
        PyErr_SetString(PyExc_RuntimeError, "reader belongs to the process that made it");
    else if (self->closed)
        PyErr_SetString(PyExc_ValueError, "reader is closed");
    else
        return true;
    return false;
}

/* The place of the link to a ticket, so that it can be taken out; NULL with an exception set. */
static Ticket **find_ticket(Reader *self, PyObject *arg) {
    long long number = PyLong_AsLongLong(arg);
    if (number == -1 && PyErr_Occurred()) return NULL;
    if (!usable(self)) return NULL;
    for (Ticket **link = &self->tickets; *link; link = &(*link)->next)
        if ((*link)->number == number) return link;
    PyErr_Format(PyExc_ValueError, "ticket %lld is unknown or already waited for", number);
    return NULL;
}

/* Exporters say no in their own ways, and one that ignores the flags says yes to a strided array. */
static int get_buffer(PyObject *object, Py_buffer *view, int flags, const char *refusal) {
    if (!PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | flags)) {
        if (PyBuffer_IsContiguous(view, 'C')) return 0;
        PyBuffer_Release(view);
    } else if (!PyErr_ExceptionMatches(PyExc_BufferError) && !PyErr_ExceptionMatches(PyExc_ValueError)) {
        return -1;
    }
    PyErr_SetString(PyExc_ValueError, refusal);
    return -1;
}

/* Spans are checked whole before anything is built from them; -1 with an exception set, else the pieces. */
static Py_ssize_t check_spans(const Py_buffer *spans, const Py_buffer *dest) {
    const char *format = spans->format ? spans->format : "B";
    if (*format && strchr("@=<", *format)) format++;
    if (spans->itemsize != 8 || (strcmp(format, "Q") && strcmp(format, "L")) || spans->len % 24) {
        PyErr_SetString(PyExc_ValueError,
                        "spans must be uint64 triples of (file offset, offset in dest, bytes)");
        return -1;
    }
    const uint64_t *span = spans->buf;
    uint64_t size = (uint64_t)dest->len;
    size_t pieces = 0;
    for (Py_ssize_t i = 0; i < spans->len / 24; i++, span += 3) {
        const char *wrong = NULL;
        if (!span[2]) wrong = "is empty";
        else if (span[2] > size || span[1] > size - span[2]) wrong = "does not fit in dest";
        else if (span[0] > INT64_MAX - span[2]) wrong = "has an impossible file offset";
        if (wrong) {
            PyErr_Format(PyExc_ValueError,
                         "span %zd (file offset %llu, offset in dest %llu, bytes %llu) %s", i,
                         (unsigned long long)span[0], (unsigned long long)span[1],
                         (unsigned long long)span[2], wrong);
            return -1;
        }
        pieces += (span[2] + PIECE - 1) / PIECE;
    }
    return (Py_ssize_t)pieces;
}

static Ticket *ticket_new(int fd, const Py_buffer *spans, const Py_buffer *dest, size_t pieces) {
    Ticket *ticket = malloc(sizeof *ticket);
    size_t spans_count = (size_t)spans->len / 24;
    Batch *batch = malloc(sizeof *batch + pieces * sizeof(Piece) + spans_count * sizeof(struct iovec));
    if (!ticket || !batch) {
        free(ticket);
        free(batch);
        PyErr_NoMemory();
        return NULL;
    }
    *ticket = (Ticket){.dest = *dest, .batch = batch};
    *batch = (Batch){.fd = fd};
    atomic_init(&batch->holders, 1);
    pthread_cond_init(&batch->over, NULL);
    Piece *piece = batch->pieces; /* the next one to be filled */
    struct iovec *parts = (struct iovec *)(batch->pieces + pieces);
    const uint64_t *span = spans->buf;
    for (size_t i = 0; i < spans_count; i++, span += 3) {
        parts[i] = (struct iovec){(unsigned char *)dest->buf + span[1], (size_t)span[2]};
        ticket->bytes += span[2];
        Piece *last = piece == batch->pieces ? NULL : piece - 1;
        if (last && last->spans < MOST_JOINED && last->parts && last->offset + last->bytes == span[0] &&
            span[2] <= PIECE - last->bytes) {
            last->bytes += (uint32_t)span[2];
            last->spans++;
            ticket->joined++;
            continue;
        }
        for (uint64_t from = 0; from < span[2]; from += PIECE) {
            uint64_t left = span[2] - from;
            *piece++ = (Piece){
                .batch = batch,
                .to = (unsigned char *)dest->buf + span[1] + from,
                .offset = span[0] + from,
                .bytes = (uint32_t)(left < PIECE ? left : PIECE),
                .parts = span[2] <= PIECE ? &parts[i] : NULL, /* parts of a long span are joined with nothing */
                .spans = 1,
                .span = i,
            };
        }
    }
    batch->count = (size_t)(piece - batch->pieces);
    return ticket;
}

/* Keeps the GIL throughout: nothing in here waits for a read. */
static PyObject *reader_submit(PyObject *object, PyObject *args) {
    Reader *self = (Reader *)object;
    int fd;
    PyObject *spans_object, *dest_object;
    if (!PyArg_ParseTuple(args, "iOO:submit", &fd, &spans_object, &dest_object)) return NULL;
    Py_buffer spans, dest;
    if (get_buffer(spans_object, &spans, PyBUF_FORMAT, "spans must be C-contiguous") < 0) return NULL;
    if (get_buffer(dest_object, &dest, PyBUF_WRITABLE, "dest must be a writable contiguous buffer") < 0) {
        PyBuffer_Release(&spans);
        return NULL;
    }
    Ticket *ticket = NULL;
    Py_ssize_t pieces = check_spans(&spans, &dest);
    /* Asked last: a buffer's exporter may run Python code that closes the reader. */
    if (pieces >= 0 && usable(self)) ticket = ticket_new(fd, &spans, &dest, (size_t)pieces);
    PyBuffer_Release(&spans);
    if (!ticket) {
        PyBuffer_Release(&dest);
        return NULL;
    }
    ticket->number = ++self->last_ticket;
    ticket->next = self->tickets;
    self->tickets = ticket;
    self->joined += ticket->joined;
    if (pieces) queue_add(&self->queue, ticket->batch);
    else ticket->batch->ended = true;
    return PyLong_FromLongLong(ticket->number);
}

static void raise_read_error(const Ticket *ticket, PyObject *type) {
    const Batch *batch = ticket->batch;
    const Piece *piece = &batch->pieces[batch->failed];
    size_t index = piece->span, first = batch->failed;
    unsigned long long offset = piece->offset, length = 0;
    if (piece->spans > 1) {
        uint32_t inside, k = piece_at(piece, &inside);
        index += k;
        offset += piece->done - inside;
        length = piece->parts[k].iov_len;
    } else {
        while (first && batch->pieces[first - 1].span == index) first--;
        offset = batch->pieces[first].offset;
        for (size_t i = first; i < batch->count && batch->pieces[i].span == index; i++)
            length += batch->pieces[i].bytes;
    }

    int error = batch->error == END_OF_FILE ? EIO : batch->error;
    PyObject *message =
        PyUnicode_FromFormat("%s in read %zu of the batch: %llu bytes at file offset %llu",
                             batch->error == END_OF_FILE ? "end of file" : strerror(error), index,
                             length, offset);
    PyObject *exception = message ? PyObject_CallFunction(type, "iO", error, message) : NULL;
    Py_XDECREF(message);
    if (!exception) return;
    const char *names[] = {"offset", "length", "index"};
    unsigned long long values[] = {offset, length, index};
    for (int i = 0; i < 3; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(values[i]);
        int failed = !value || PyObject_SetAttrString(exception, names[i], value) < 0;
        Py_XDECREF(value);
        if (failed) goto done;
    }
    PyErr_SetObject(type, exception);
done:
    Py_DECREF(exception);
}

/* A signal does not end the wait: reads are short, and Python handles it as soon as this returns. */
static PyObject *reader_wait(PyObject *object, PyObject *arg) {
    Reader *self = (Reader *)object;
    Ticket **link = find_ticket(self, arg);
    if (!link) return NULL;
    Ticket *ticket = *link;
    *link = ticket->next;
    Batch *batch = ticket->batch;
    if (!batch_ended(&self->queue, batch)) {
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&self->queue.lock);
        while (!batch->ended) pthread_cond_wait(&batch->over, &self->queue.lock);
        pthread_mutex_unlock(&self->queue.lock);
        Py_END_ALLOW_THREADS
    }
    PyObject *result = NULL;
    if (batch->error) {
        PyObject *module = PyType_GetModule(Py_TYPE(object));
        PyObject *type = module ? PyObject_GetAttrString(module, "ReadError") : NULL;
        if (type) raise_read_error(ticket, type);
        Py_XDECREF(type);
    } else {
        result = PyLong_FromUnsignedLongLong(ticket->bytes);
    }
    ticket_free(ticket);
    return result;
}

static PyObject *reader_done(PyObject *object, PyObject *arg) {
    Ticket **link = find_ticket((Reader *)object, arg);
    if (!link) return NULL;
    return PyBool_FromLong(batch_ended(&((Reader *)object)->queue, (*link)->batch));
}

static void reader_stop(Reader *self) {
    if (self->closed) return;
    self->closed = true;
    Ticket *tickets = self->tickets;
    self->tickets = NULL;
    /* Nobody will see these batches. One that a thread waits for is off this list and read to its end. */
    for (Ticket *ticket = tickets; ticket; ticket = ticket->next) batch_skip_rest(ticket->batch);
    if (self->process == getpid()) {
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&self->queue.lock);
        self->queue.closing = true;
        pthread_cond_broadcast(&self->queue.work);
        pthread_mutex_unlock(&self->queue.lock);
        for (int i = 0; i < self->threads; i++) pthread_join(self->workers[i], NULL);
        Py_END_ALLOW_THREADS
    }
    if (self->ring) ring_close(self->ring);
    while (tickets) {
        Ticket *next = tickets->next;
        ticket_free(tickets);
        tickets = next;
    }
}

static PyObject *reader_close(PyObject *object, PyObject *unused) {
    (void)unused;
    reader_stop((Reader *)object);
    Py_RETURN_NONE;
}

static void reader_dealloc(PyObject *object) {
    Reader *self = (Reader *)object;
    PyTypeObject *type = Py_TYPE(object);
    reader_stop(self);
    if (self->process == getpid()) { /* in a forked child the threads would be awaited here for ever */
        pthread_cond_destroy(&self->queue.work);
        pthread_mutex_destroy(&self->queue.lock);
    }
    free(self->workers);
    PyObject_Free(object);
    Py_DECREF(type);
}

/* Workers take no signals: Python's are to interrupt the main thread. */
static int start_workers(Reader *self, int threads) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    while (!error && self->threads < threads) {
        error = pthread_create(&self->workers[self->threads], NULL, self->ring ? ring_main : thread_main,
                               self->ring ? (void *)self->ring : &self->queue);
        if (!error) self->threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

static PyObject *reader_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"threads", "engine", "depth", NULL};
    int threads = 16, depth = 64;
    const char *engine = "threads";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|isi:Reader", names, &threads, &engine, &depth))
        return NULL;
    bool ring = !strcmp(engine, "io_uring");
    if (!ring && strcmp(engine, "threads"))
        return PyErr_Format(PyExc_ValueError, "engine must be 'threads' or 'io_uring', not '%s'", engine);
    if (threads < 1 || threads > MOST_THREADS)
        return PyErr_Format(PyExc_ValueError, "threads must be from 1 to %d, not %d", MOST_THREADS, threads);
    if (depth < 1 || depth > MOST_DEPTH)
        return PyErr_Format(PyExc_ValueError, "depth must be from 1 to %d, not %d", MOST_DEPTH, depth);
    if (ring) threads = 1;

    Reader *self = (Reader *)PyType_GenericAlloc(type, 0);
    if (!self) return NULL;
    pthread_mutex_init(&self->queue.lock, NULL);
    pthread_cond_init(&self->queue.work, NULL);
    self->process = getpid();
    self->engine = ring ? "io_uring" : "threads";
    self->workers = calloc((size_t)threads, sizeof *self->workers);
    if (!self->workers) {
        PyErr_NoMemory();
    } else if (ring && !(self->ring = ring_open(&self->queue, (unsigned)depth))) {
        PyErr_SetFromErrno(PyExc_OSError);
    } else if ((errno = start_workers(self, threads))) {
        PyErr_SetFromErrno(PyExc_OSError);
    } else {
        return (PyObject *)self;
    }
    Py_DECREF(self);
    return NULL;
}

static PyMethodDef methods[] = {
    {"submit", reader_submit, METH_VARARGS, submit_doc},
    {"wait", reader_wait, METH_O, wait_doc},
    {"done", reader_done, METH_O, done_doc},
    {"close", reader_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"engine", T_STRING, offsetof(Reader, engine), READONLY, "'threads' or 'io_uring'"},
    {"threads", T_INT, offsetof(Reader, threads), READONLY, "the threads that read; io_uring has one"},
    {"joined", T_ULONGLONG, offsetof(Reader, joined), READONLY, "spans read together with the one before"},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, (void *)reader_doc}, {Py_tp_new, reader_new},       {Py_tp_dealloc, reader_dealloc},
    {Py_tp_methods, methods},        {Py_tp_members, members}, {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "mlxflash._native._core.Reader",
    .basicsize = sizeof(Reader),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = type_slots,
};

int mlxflash_add_reader(PyObject *module) {
    PyObject *error =
        PyErr_NewExceptionWithDoc("mlxflash._native._core.ReadError", error_doc, PyExc_OSError, NULL);
    if (!error) return -1;
    int failed = PyModule_AddObjectRef(module, "ReadError", error);
    Py_DECREF(error);
    if (failed) return -1;
    PyObject *reader = PyType_FromModuleAndSpec(module, &type_spec, NULL);
    if (!reader) return -1;
    failed = PyModule_AddType(module, (PyTypeObject *)reader);
    Py_DECREF(reader);
    return failed;
}
