#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

enum {
    /* Calls follow each other within microseconds inside a layer, and then a disk read may last milliseconds:
       a thread that finds no work looks again for about as long as waking it takes, then sleeps. */
    SPIN_NANOSECONDS = 20000,
    /* For less than this the caller is done before a sleeping thread could help. */
    BYTES_WORTH_WAKING = 2 << 20,
};

static pthread_mutex_t calls = PTHREAD_MUTEX_INITIALIZER; /* one job at a time */
static pthread_mutex_t sleep_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_arrived = PTHREAD_COND_INITIALIZER;
static pthread_cond_t work_finished = PTHREAD_COND_INITIALIZER;

static pthread_t workers[MAX_THREADS];
static atomic_int wanted; /* threads including the caller; 0: not asked yet */
static int started;       /* workers running */

/* The job. `ticket` is its number (high half) and how many parts nobody has claimed (low half): taking a
   part by compare-and-swap means a worker that wakes late can neither claim from a finished job nor see the
   fields of one while they change. */
static task job;
static void *job_context;
static _Atomic uint64_t ticket;
static _Atomic uint32_t unfinished;
static atomic_int sleepers;
static atomic_bool caller_sleeps, quit;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static bool has_work(void) { return (uint32_t)atomic_load(&ticket) != 0 || atomic_load(&quit); }
static bool is_finished(void) { return atomic_load(&unfinished) == 0; }

static bool spin_until(bool (*condition)(void)) {
    for (int64_t end = 0;;) {
        for (int i = 0; i < 32; i++) {
            if (condition()) return true;
            relax();
        }
        const int64_t now = nanoseconds();
        if (end == 0) end = now + SPIN_NANOSECONDS;
        if (now >= end) return false;
    }
}

static void work(void) {
    uint64_t seen = atomic_load(&ticket);
    while ((uint32_t)seen != 0) {
        if (!atomic_compare_exchange_weak(&ticket, &seen, seen - 1)) continue;
        job(job_context, (uint32_t)seen - 1);
        if (atomic_fetch_sub(&unfinished, 1) == 1 && atomic_load(&caller_sleeps)) {
            pthread_mutex_lock(&sleep_mutex);
            pthread_cond_signal(&work_finished);
            pthread_mutex_unlock(&sleep_mutex);
        }
        seen = atomic_load(&ticket);
    }
}

static void *worker(void *unused) {
    while (!atomic_load(&quit)) {
        work();
        if (spin_until(has_work)) continue;
        pthread_mutex_lock(&sleep_mutex);
        atomic_fetch_add(&sleepers, 1);
        while (!has_work()) pthread_cond_wait(&work_arrived, &sleep_mutex);
        atomic_fetch_sub(&sleepers, 1);
        pthread_mutex_unlock(&sleep_mutex);
    }
    return unused;
}

static void start_workers(void) {
    sigset_t all, before; /* signals belong to the threads that existed before */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started < wanted - 1 && pthread_create(&workers[started], NULL, worker, NULL) == 0) started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void stop_workers(void) {
    pthread_mutex_lock(&sleep_mutex);
    atomic_store(&quit, true);
    pthread_cond_broadcast(&work_arrived);
    pthread_mutex_unlock(&sleep_mutex);
    while (started > 0) pthread_join(workers[--started], NULL);
    atomic_store(&quit, false);
}

/* A forked child has the pool's memory but none of its threads; holding `calls` across the fork means there
   is no job half done. */
static void fork_child(void) {
    pthread_mutex_init(&calls, NULL);
    pthread_mutex_init(&sleep_mutex, NULL);
    pthread_cond_init(&work_arrived, NULL);
    pthread_cond_init(&work_finished, NULL);
    started = 0;
    atomic_store(&sleepers, 0);
}

static void fork_prepare(void) { pthread_mutex_lock(&calls); }
static void fork_parent(void) { pthread_mutex_unlock(&calls); }
static void register_fork_handlers(void) { pthread_atfork(fork_prepare, fork_parent, fork_child); }

static int available_cores(void) {
    long cores = 0;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cores = CPU_COUNT(&set);
#elif defined(__APPLE__)
    int fast = 0; /* the efficiency cores would hold up the others more than they help */
    size_t size = sizeof fast;
    if (sysctlbyname("hw.perflevel0.logicalcpu", &fast, &size, NULL, 0) == 0) cores = fast;
#endif
    if (cores < 1) cores = sysconf(_SC_NPROCESSORS_ONLN);
    return cores < 1 ? 1 : cores > 16 ? 16 : (int)cores;
}

void threads_lock(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork_handlers);
    pthread_mutex_lock(&calls);
}

void threads_unlock(void) { pthread_mutex_unlock(&calls); }

int threads_count(void) {
    if (wanted == 0) wanted = available_cores();
    return wanted;
}

void threads_set_count(int count) {
    threads_lock();
    stop_workers();
    wanted = count;
    threads_unlock();
}

void threads_run(task function, void *context, size_t parts, size_t bytes) {
    static uint64_t number;
    const size_t helpers = (size_t)threads_count() - 1;
    const bool all_sleep = (size_t)atomic_load(&sleepers) == (size_t)started;
    if (helpers == 0 || parts < 2 || parts > UINT32_MAX || (all_sleep && bytes < BYTES_WORTH_WAKING)) {
        for (size_t i = 0; i < parts; i++) function(context, i);
        return;
    }
    if ((size_t)started < helpers) start_workers();

    job = function;
    job_context = context;
    atomic_store(&unfinished, (uint32_t)parts);
    atomic_store(&ticket, ++number << 32 | parts);
    if (atomic_load(&sleepers) > 0) {
        pthread_mutex_lock(&sleep_mutex);
        pthread_cond_broadcast(&work_arrived);
        pthread_mutex_unlock(&sleep_mutex);
    }
    work();
    if (!spin_until(is_finished)) {
        pthread_mutex_lock(&sleep_mutex);
        atomic_store(&caller_sleeps, true);
        while (!is_finished()) pthread_cond_wait(&work_finished, &sleep_mutex);
        atomic_store(&caller_sleeps, false);
        pthread_mutex_unlock(&sleep_mutex);
    }
}
