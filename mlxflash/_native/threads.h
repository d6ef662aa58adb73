/* A small persistent pool of threads. One job runs at a time, between threads_lock and threads_unlock;
   the calling thread works on it too. */
#ifndef MLXFLASH_THREADS_H
#define MLXFLASH_THREADS_H

#include <stddef.h>

enum { MAX_THREADS = 256 };

typedef void (*task)(void *context, size_t part);

void threads_lock(void);
void threads_unlock(void);

int threads_count(void);
void threads_set_count(int count); /* takes the lock itself */

/* Runs job(context, 0..parts-1), each part once, in any order and on any thread; returns when all are done.
   `bytes` is about how much memory that goes through. The caller holds the lock. */
void threads_run(task job, void *context, size_t parts, size_t bytes);

#endif
