/* A team of threads that spins between ops of a step and sleeps when no step comes.
 *
 * Items are claimed one at a time, so a thread that the system delays costs only
 * the items it holds, and a sleeping one costs nothing: the others take its share.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "internal.h"

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() sched_yield()
#endif

enum { SPIN = 20000 };   /* about 0.2 ms on a core of 4 GHz: longer than anything between two ops of a step */

/* Generation, number of items and next item in one word: a claim by compare-and-swap can only succeed in the run it was read from. */
#define ITEM_BITS 20
#define ITEM_MASK ((uint64_t)(1 << ITEM_BITS) - 1)
static inline uint64_t generation_of(uint64_t ticket) { return ticket >> 2 * ITEM_BITS; }
static inline int64_t items_of(uint64_t ticket) { return (int64_t)(ticket >> ITEM_BITS & ITEM_MASK); }

struct tops_team {
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int64_t done;
    tops_task task;
    void *context;
    _Alignas(64) _Atomic int sleeping;
    _Atomic bool quit;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int threads;                            /* with the caller */
    pthread_t workers[];
};

static void work(tops_team *team, uint64_t ticket) {
    while ((int64_t)(ticket & ITEM_MASK) < items_of(ticket)) {
        if (!atomic_compare_exchange_weak(&team->ticket, &ticket, ticket + 1)) continue;
        team->task(team->context, (int64_t)(ticket & ITEM_MASK));
        atomic_fetch_add(&team->done, 1);
        ticket = atomic_load(&team->ticket);
    }
}

static void *worker(void *argument) {
    tops_team *team = argument;
    uint64_t seen = 0;
    for (;;) {
        uint64_t ticket = atomic_load(&team->ticket);
        for (int spin = 0; spin < SPIN && generation_of(ticket) == seen; spin++) {
            RELAX();
            ticket = atomic_load_explicit(&team->ticket, memory_order_acquire);
        }
        if (generation_of(ticket) == seen) {
            pthread_mutex_lock(&team->mutex);
            atomic_fetch_add(&team->sleeping, 1);
            while (generation_of(ticket = atomic_load(&team->ticket)) == seen) pthread_cond_wait(&team->wake, &team->mutex);
            atomic_fetch_sub(&team->sleeping, 1);
            pthread_mutex_unlock(&team->mutex);
        }
        if (atomic_load(&team->quit)) return NULL;
        seen = generation_of(ticket);
        work(team, ticket);
    }
}

void tops_team_run(tops_team *team, int64_t items, tops_task task, void *context) {
    if (team->threads == 1 || items <= 1 || items > (int64_t)ITEM_MASK) {
        for (int64_t item = 0; item < items; item++) task(context, item);
        return;
    }
    /* No item of the last run is open, so nobody reads task and context but through the ticket that is stored next. */
    team->task = task;
    team->context = context;
    atomic_store(&team->done, 0);
    uint64_t generation = generation_of(atomic_load(&team->ticket)) + 1;
    uint64_t ticket = generation << 2 * ITEM_BITS | (uint64_t)items << ITEM_BITS;
    atomic_store(&team->ticket, ticket);
    if (atomic_load(&team->sleeping)) {
        pthread_mutex_lock(&team->mutex);
        pthread_cond_broadcast(&team->wake);
        pthread_mutex_unlock(&team->mutex);
    }
    work(team, ticket);
    for (int64_t spin = 0; atomic_load(&team->done) < items; spin++) {
        if (spin < SPIN) RELAX();
        else sched_yield();
    }
}

/* One thread per physical core that this process may run on, within the CPU quota of its control group. */
static int default_threads(void) {
    int count = 0;
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            char path[96];
            int first = cpu;
            snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
            FILE *file = fopen(path, "r");
            if (file) {
                if (fscanf(file, "%d", &first) != 1) first = cpu;
                fclose(file);
            }
            count += first == cpu || first >= CPU_SETSIZE || !CPU_ISSET(first, &allowed);
        }
    }
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (file) {
        long quota, period;
        if (fscanf(file, "%ld %ld", &quota, &period) == 2 && period > 0 && quota / period >= 1 && quota / period < count) count = (int)(quota / period);
        fclose(file);
    }
#endif
    if (count < 1) count = (int)sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : count;
}

tops_team *tops_team_create(int threads) {
    if (threads <= 0) threads = default_threads();
    tops_team *team = aligned_alloc(64, (sizeof *team + (size_t)threads * sizeof(pthread_t) + 63) / 64 * 64);
    if (!team) return NULL;
    atomic_init(&team->ticket, 0);
    atomic_init(&team->done, 0);
    atomic_init(&team->sleeping, 0);
    atomic_init(&team->quit, false);
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->wake, NULL);
    team->threads = 1;
    while (team->threads < threads && pthread_create(&team->workers[team->threads - 1], NULL, worker, team) == 0) team->threads++;
    return team;
}

void tops_team_destroy(tops_team *team) {
    pthread_mutex_lock(&team->mutex);
    atomic_store(&team->quit, true);
    atomic_fetch_add(&team->ticket, (uint64_t)1 << 2 * ITEM_BITS);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->mutex);
    for (int i = 0; i < team->threads - 1; i++) pthread_join(team->workers[i], NULL);
    pthread_mutex_destroy(&team->mutex);
    pthread_cond_destroy(&team->wake);
    free(team);
}

int tops_team_threads(const tops_team *team) { return team->threads; }
