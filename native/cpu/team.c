/* A team of threads that spins between ops of a step and sleeps when no step comes.
 *
 * Each thread has a share of neighbouring items, so that it reads one stream of memory, and the same one in every step. It takes
 * them from the front; a thread whose share is empty takes items from the back of others'. So a thread that the system delays
 * costs only the item it holds, and a sleeping one costs nothing.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() sched_yield()
#endif

enum { SPIN = 20000 };   /* about 0.2 ms on a core of 4 GHz: longer than anything between two ops of a step */

/* What is left of a share, in one word: the run it belongs to, its first item and the one behind its last. A claim by compare-and-swap
 * can only succeed in the run it was read from, and while a claimed item is open its run is, too: task and context stay. */
typedef uint64_t span;
enum { MOST_ITEMS = 0xffff };
static inline span span_of(uint32_t run, int64_t first, int64_t until) { return (span)run << 32 | (span)first << 16 | (span)until; }
static inline uint32_t run_of(span s) { return (uint32_t)(s >> 32); }
static inline int64_t first_of(span s) { return (int64_t)(s >> 16 & 0xffff); }
static inline int64_t until_of(span s) { return (int64_t)(s & 0xffff); }

typedef struct {
    _Alignas(64) _Atomic span left;
    tops_team *team;
    pthread_t thread;
} share;

struct tops_team {
    _Alignas(64) _Atomic int64_t done;      /* items of this run */
    tops_task task;
    void *context;
    int64_t base;                           /* of item 0 */
    uint32_t run;
    _Alignas(64) _Atomic int sleeping;
    _Atomic bool quit;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int threads;                            /* with the caller, whose share is the first */
    share shares[];
};

static void work(tops_team *team, int me, uint32_t run) {
    int64_t finished = 0;
    for (int i = 0; i < team->threads; i++) {
        _Atomic span *left = &team->shares[(me + i) % team->threads].left;
        span seen = atomic_load(left);
        while (run_of(seen) == run && first_of(seen) < until_of(seen)) {
            int64_t item = i == 0 ? first_of(seen) : until_of(seen) - 1;
            span rest = i == 0 ? span_of(run, item + 1, until_of(seen)) : span_of(run, first_of(seen), item);
            if (!atomic_compare_exchange_weak(left, &seen, rest)) continue;
            team->task(team->context, team->base + item);
            finished++;
            seen = atomic_load(left);
        }
    }
    if (finished) atomic_fetch_add(&team->done, finished);
}

static void *worker(void *argument) {
    share *own = argument;
    tops_team *team = own->team;
    uint32_t run = 0;
    for (;;) {
        span seen = atomic_load(&own->left);
        for (int spin = 0; spin < SPIN && run_of(seen) == run; spin++) {
            RELAX();
            seen = atomic_load_explicit(&own->left, memory_order_acquire);
        }
        if (run_of(seen) == run) {
            pthread_mutex_lock(&team->mutex);
            atomic_fetch_add(&team->sleeping, 1);
            while (run_of(seen = atomic_load(&own->left)) == run) pthread_cond_wait(&team->wake, &team->mutex);
            atomic_fetch_sub(&team->sleeping, 1);
            pthread_mutex_unlock(&team->mutex);
        }
        if (atomic_load(&team->quit)) return NULL;
        run = run_of(seen);
        work(team, (int)(own - team->shares), run);
    }
}

/* Every thread's share is set, which is what starts it; the caller's last, so that the others begin at once. */
static void deal(tops_team *team, int64_t items) {
    team->run++;
    for (int64_t i = team->threads - 1; i >= 0; i--)
        atomic_store(&team->shares[i].left, span_of(team->run, items * i / team->threads, items * (i + 1) / team->threads));
    if (atomic_load(&team->sleeping)) {
        pthread_mutex_lock(&team->mutex);
        pthread_cond_broadcast(&team->wake);
        pthread_mutex_unlock(&team->mutex);
    }
}

void tops_team_run(tops_team *team, int64_t items, tops_task task, void *context) {
    if (team->threads == 1 || items <= 1) {
        for (int64_t item = 0; item < items; item++) task(context, item);
        return;
    }
    team->task = task;
    team->context = context;
    for (team->base = 0; team->base < items; team->base += MOST_ITEMS) {
        int64_t part = items - team->base < MOST_ITEMS ? items - team->base : MOST_ITEMS;
        atomic_store(&team->done, 0);
        deal(team, part);
        work(team, 0, team->run);
        for (int64_t spin = 0; atomic_load(&team->done) < part; spin++) {
            if (spin < SPIN) RELAX();
            else sched_yield();
        }
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
    size_t bytes = sizeof(tops_team) + (size_t)threads * sizeof(share);
    tops_team *team = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!team) return NULL;
    memset(team, 0, bytes);
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->wake, NULL);
    for (team->threads = 1; team->threads < threads; team->threads++) {
        share *next = team->shares + team->threads;
        next->team = team;
        if (pthread_create(&next->thread, NULL, worker, next) != 0) break;
    }
    return team;
}

void tops_team_destroy(tops_team *team) {
    atomic_store(&team->quit, true);
    deal(team, 0);
    for (int i = 1; i < team->threads; i++) pthread_join(team->shares[i].thread, NULL);
    pthread_mutex_destroy(&team->mutex);
    pthread_cond_destroy(&team->wake);
    free(team);
}

int tops_team_threads(const tops_team *team) { return team->threads; }
