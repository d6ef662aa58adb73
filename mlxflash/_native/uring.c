/* The io_uring engine: one thread keeps `depth` reads in flight. It alone submits and reaps, so that the
   kernel can leave all completion work to the moment it asks (DEFER_TASKRUN) and interrupt nobody. */
#define _GNU_SOURCE /* syscall, MAP_POPULATE */
#include "reader.h"

#include <errno.h>

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Headers older than the kernel they meet lack these; the values are the kernel's ABI. */
#define SETUP_R_DISABLED (1U << 6)     /* 5.10 */
#define SETUP_SINGLE_ISSUER (1U << 12) /* 6.0 */
#define SETUP_DEFER_TASKRUN (1U << 13) /* 6.1 */
#define REGISTER_ENABLE_RINGS 12

struct Ring {
    Queue *queue;
    unsigned depth;
    int fd;
    unsigned sq_mask, cq_mask;
    _Atomic unsigned *sq_head, *sq_tail, *cq_head, *cq_tail;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    size_t rings_bytes, sqes_bytes;
};

static int ring_setup(unsigned depth, struct io_uring_params *params) {
    /* Created disabled: the ring belongs to the thread that enables it, not to this one. */
    *params = (struct io_uring_params){
        .flags = SETUP_R_DISABLED | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN};
    int fd = (int)syscall(__NR_io_uring_setup, depth, params);
    if (fd < 0 && errno == EINVAL) {
        *params = (struct io_uring_params){0};
        fd = (int)syscall(__NR_io_uring_setup, depth, params);
    }
    return fd;
}

Ring *ring_open(Queue *queue, unsigned depth) {
    struct io_uring_params params;
    int fd = ring_setup(depth, &params);
    if (fd < 0) return NULL;
    /* Plain reads came with Linux 5.6, as did this feature; the single mapping is older than both. */
    Ring *ring = calloc(1, sizeof *ring);
    if (!ring || !(params.features & IORING_FEAT_RW_CUR_POS)) {
        errno = ring ? ENOSYS : ENOMEM;
        goto failed;
    }
    size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    ring->rings_bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    ring->sqes_bytes = params.sq_entries * sizeof(struct io_uring_sqe);
    ring->rings = mmap(NULL, ring->rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                       IORING_OFF_SQ_RING);
    if (ring->rings == MAP_FAILED) goto failed;
    ring->sqes = mmap(NULL, ring->sqes_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                      IORING_OFF_SQES);
    if (ring->sqes == MAP_FAILED) {
        int error = errno;
        munmap(ring->rings, ring->rings_bytes);
        errno = error;
        goto failed;
    }
    unsigned char *base = ring->rings;
    ring->queue = queue;
    ring->depth = depth;
    ring->fd = fd;
    ring->sq_mask = params.sq_entries - 1;
    ring->cq_mask = params.cq_entries - 1;
    ring->sq_head = (_Atomic unsigned *)(base + params.sq_off.head);
    ring->sq_tail = (_Atomic unsigned *)(base + params.sq_off.tail);
    ring->cq_head = (_Atomic unsigned *)(base + params.cq_off.head);
    ring->cq_tail = (_Atomic unsigned *)(base + params.cq_off.tail);
    ring->cqes = (struct io_uring_cqe *)(base + params.cq_off.cqes);
    /* The indirection between ring and entries is never used: entry i stays at place i. */
    unsigned *array = (unsigned *)(base + params.sq_off.array);
    for (unsigned i = 0; i < params.sq_entries; i++) array[i] = i;
    return ring;

failed:;
    int error = errno;
    free(ring);
    close(fd);
    errno = error;
    return NULL;
}

void ring_close(Ring *ring) {
    munmap(ring->sqes, ring->sqes_bytes);
    munmap(ring->rings, ring->rings_bytes);
    close(ring->fd);
    free(ring);
}

/* There is always a free entry: at most `depth` reads are queued or in flight. */
static void ring_push(Ring *ring, const Piece *piece) {
    unsigned tail = atomic_load_explicit(ring->sq_tail, memory_order_relaxed);
    struct io_uring_sqe *sqe = &ring->sqes[tail & ring->sq_mask];
    Rest rest = piece_rest(piece);
    bool several = rest.count > 1;
    *sqe = (struct io_uring_sqe){
        .opcode = several ? IORING_OP_READV : IORING_OP_READ,
        .fd = piece->batch->fd,
        .addr = several ? (uintptr_t)rest.parts : (uintptr_t)rest.to,
        .len = several ? rest.count : rest.bytes,
        .off = piece->offset + piece->done,
        .user_data = (uintptr_t)piece,
    };
    atomic_store_explicit(ring->sq_tail, tail + 1, memory_order_release);
}

void *ring_main(void *arg) {
    Ring *ring = arg;
    Queue *queue = ring->queue;
    Batch *batch = NULL;
    unsigned inflight = 0;
    /* Fails on a ring that the older kernel did not create disabled, and need not succeed there. */
    syscall(__NR_io_uring_register, ring->fd, REGISTER_ENABLE_RINGS, NULL, 0);
    for (;;) {
        while (inflight < ring->depth) {
            if (!batch && !(batch = queue_enter(queue, inflight == 0))) break;
            Piece *piece = batch_next(batch);
            if (piece) {
                atomic_fetch_add_explicit(&batch->holders, 1, memory_order_relaxed);
                ring_push(ring, piece);
                inflight++;
            } else {
                queue_leave(queue, batch);
                batch = NULL;
            }
        }
        if (!inflight) return NULL;

        unsigned unsubmitted = atomic_load_explicit(ring->sq_tail, memory_order_relaxed) -
                               atomic_load_explicit(ring->sq_head, memory_order_acquire);
        /* Waking for every read costs CPU, waiting for all lets the disk run dry; and a batch handed in
           meanwhile is seen at the next waking only. */
        unsigned enough = (inflight + 3) / 4;
        /* Every failure of this call (interrupted, short of memory) means: reap what there is, try again. */
        syscall(__NR_io_uring_enter, ring->fd, unsubmitted, enough, IORING_ENTER_GETEVENTS, NULL, 0);

        unsigned head = atomic_load_explicit(ring->cq_head, memory_order_relaxed);
        unsigned tail = atomic_load_explicit(ring->cq_tail, memory_order_acquire);
        for (; head != tail; head++) {
            const struct io_uring_cqe *cqe = &ring->cqes[head & ring->cq_mask];
            Piece *piece = (Piece *)(uintptr_t)cqe->user_data;
            if (piece_advance(queue, piece, cqe->res)) {
                ring_push(ring, piece);
            } else {
                inflight--;
                batch_release(queue, piece->batch);
            }
        }
        atomic_store_explicit(ring->cq_head, head, memory_order_release);
    }
}

#else

Ring *ring_open(Queue *queue, unsigned depth) {
    (void)queue, (void)depth;
    errno = ENOSYS;
    return NULL;
}
void *ring_main(void *ring) { return ring; }
void ring_close(Ring *ring) { (void)ring; }

#endif
