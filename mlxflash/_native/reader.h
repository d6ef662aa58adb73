/* What the two engines of the reader share: batches of reads and the queue they wait in. No Python here:
   the threads that run this never hold the GIL. */
#ifndef MLXFLASH_READER_H
#define MLXFLASH_READER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#define END_OF_FILE (-1) /* in place of an errno: no errno says it */

typedef struct Batch Batch;

/* One read as an engine issues it: a span, a part of a long one, or several that follow each other in the
   file and go to places of their own. */
typedef struct {
    Batch *batch;
    struct iovec *parts; /* where each of the `spans` spans goes */
    unsigned char *to;   /* where it goes, if it is one span or a part of one */
    uint64_t offset;
    uint32_t bytes, done; /* `done` grows when the kernel reads less than it was asked for */
    uint32_t spans;
    size_t span; /* the first */
} Piece;

struct Batch {
    Batch *next_queued;
    int fd;
    atomic_size_t cursor;  /* the next piece nobody has started; at or past `count` nothing is left */
    atomic_size_t holders; /* the queue, and every worker or read in flight; the last one ends the batch */
    pthread_cond_t over;
    bool ended;
    int error; /* an errno or END_OF_FILE, of the piece `failed`: the lowest one that failed */
    size_t failed;
    size_t count;
    Piece pieces[];
};

typedef struct {
    pthread_mutex_t lock; /* guards the links, `ended`, `error` and `failed` of the batches, and `closing` */
    pthread_cond_t work;
    Batch *head, *tail; /* batches with reads left to start, oldest first; workers enter only the head */
    bool closing;
} Queue;

typedef struct Ring Ring;

/* Symbols shared by two files of one module need not be seen by anyone else. */
#pragma GCC visibility push(hidden)

/* The oldest batch with work, held; NULL when there is none and `block` is false, or on closing. */
Batch *queue_enter(Queue *queue, bool block);
/* To be called when batch_next has said NULL: takes the batch off the queue and lets go of it. */
void queue_leave(Queue *queue, Batch *batch);
Piece *batch_next(Batch *batch);
void batch_release(Queue *queue, Batch *batch);
/* What is left to read of a piece: one place, unless `count` is above 1, then that many from `parts` on.
   After a read that ended inside a span the rest of that span comes by itself. */
typedef struct {
    unsigned char *to;
    uint32_t bytes;
    const struct iovec *parts;
    uint32_t count;
} Rest;
Rest piece_rest(const Piece *piece);
/* Takes in the outcome of a read, bytes or -errno; true while the piece needs another read. */
bool piece_advance(Queue *queue, Piece *piece, ssize_t outcome);

/* io_uring. ring_open: NULL with errno set where the system has no such thing or refuses it. */
Ring *ring_open(Queue *queue, unsigned depth);
void *ring_main(void *ring);
void ring_close(Ring *ring);

#pragma GCC visibility pop

#endif
