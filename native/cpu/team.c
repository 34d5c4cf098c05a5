/* A team of threads that goes through the stages of a program together, spins between them and sleeps when no program comes.
 *
 * Each thread has a share of a stage's items, neighbours, so that it reads one stream of memory, and the same one in every step. It
 * takes them from the front; a thread that has long waited for others takes items from the back of theirs. A stage is over when its
 * items are done, whoever did them: a thread that the system delays costs only the item it holds, and a sleeping one costs nothing.
 *
 * Nobody hands out work between two stages. All threads see the program; each says in a word of its own what it has done, and goes on
 * when the others' words add up. Where cores share no cache a line takes 0.3 us from one to another, and this takes one such line.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() sched_yield()
#endif

enum { SPIN = 20000, STEAL = 100 };   /* turns of waiting: 0.2 ms at 4 GHz, longer than anything between two stages of a step, and 1 us */

/* What is left of a share, in one word: the number of its stage, its first item and the one behind its last. While nobody has taken
 * anything from it, the word is of an earlier stage. Numbers only grow. */
typedef uint64_t span;
enum { ITEM_BITS = 12 };              /* enough for MOST_ITEMS */
static inline span span_of(uint64_t number, int64_t first, int64_t until) { return number << 2 * ITEM_BITS | (span)first << ITEM_BITS | (span)until; }
static inline uint64_t number_of(span s) { return s >> 2 * ITEM_BITS; }
static inline int64_t first_of(span s) { return (int64_t)(s >> ITEM_BITS & ((1 << ITEM_BITS) - 1)); }
static inline int64_t until_of(span s) { return (int64_t)(s & ((1 << ITEM_BITS) - 1)); }

typedef struct {
    _Alignas(64) _Atomic span left;
    _Alignas(64) _Atomic span done;           /* the last stage of which the thread has done something, and how many items: until_of */
    _Atomic bool inside;                      /* the thread may look at the program */
    tops_team *team;
    pthread_t thread;
} share;

struct tops_team {
    _Alignas(64) _Atomic uint64_t epoch;      /* of the program; odd where there is none */
    _Atomic(const tops_stage *) stages;
    _Atomic int64_t count;
    _Atomic uint64_t first;                   /* number of stages[0] */
    _Atomic int sleeping;
    _Atomic bool quit;
    tops_stage own[MOST_STAGES];              /* a program that is not recorded */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int threads;                              /* with the caller, whose share is the first */
    share shares[];
};

static _Thread_local int me;                  /* place in the team; a caller's is 0 */
int tops_me(void) { return me; }

/* ---- a program ---- */

typedef struct {
    uint64_t epoch, number;   /* of the stage */
    int64_t items, finished;  /* of the stage, and by this thread */
    tops_stage stage;
} position;

/* Does items of one thread's share until none is left. */
static void work(tops_team *team, position *at, int whose) {
    const tops_stage *stage = &at->stage;
    _Atomic span *left = &team->shares[whose].left;
    span whole = span_of(at->number, at->items * whose / team->threads, at->items * (whose + 1) / team->threads);
    span seen = atomic_load_explicit(left, memory_order_relaxed);
    int64_t before = at->finished;
    while (number_of(seen) <= at->number) {
        span from = number_of(seen) < at->number ? whole : seen;
        if (first_of(from) == until_of(from)) break;
        if (!atomic_compare_exchange_weak(left, &seen, whose == me ? from + (1 << ITEM_BITS) : from - 1)) continue;
        if (!at->finished++ && stage->begin) stage->begin(stage->context);
        stage->task(stage->context, stage->base + (whose == me ? first_of(from) : until_of(from) - 1));
        seen = atomic_load_explicit(left, memory_order_relaxed);
    }
    if (at->finished > before) atomic_store_explicit(&team->shares[me].done, span_of(at->number, 0, at->finished), memory_order_release);
}

/* The number of the stage to go on with; the present one's if that is not over. */
static uint64_t next_number(const tops_team *team, const position *at) {
    int64_t done = at->finished;
    for (int i = 0; i < team->threads; i++) {
        span word = i == me ? 0 : atomic_load_explicit(&team->shares[i].done, memory_order_acquire);
        if (number_of(word) > at->number) return number_of(word);
        if (number_of(word) == at->number) done += until_of(word);
    }
    return at->number + (done == at->items);
}

/* Whether what was read before this was the program's. */
static bool goes_on(const tops_team *team, const position *at) {
    atomic_thread_fence(memory_order_acquire);
    return atomic_load(&team->epoch) == at->epoch;
}

static int64_t items_of(const tops_stage *stage) {
    return stage->serial ? 1 : stage->count_at ? *(const volatile int64_t *)((const unsigned char *)stage->context + stage->count_at) : stage->items;
}

static void wake(tops_team *team) {
    if (!atomic_load(&team->sleeping)) return;
    pthread_mutex_lock(&team->mutex);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->mutex);
}

static bool open_at(uint64_t epoch) { return epoch % 2 == 0; }

/* Afterwards nobody believes what it reads of the program, which may go. */
static void end(tops_team *team) {
    uint64_t epoch = atomic_load(&team->epoch);
    if (open_at(epoch)) atomic_store(&team->epoch, epoch + 1);
}

static uint64_t begin(tops_team *team, const tops_stage *stages, int64_t count) {
    uint64_t epoch = atomic_load(&team->epoch) + 1, first = atomic_load(&team->first) + (uint64_t)atomic_load(&team->count);
    atomic_store_explicit(&team->stages, stages, memory_order_relaxed);
    atomic_store_explicit(&team->count, count, memory_order_relaxed);
    atomic_store_explicit(&team->first, first, memory_order_relaxed);
    atomic_store(&team->epoch, epoch);
    wake(team);
    return epoch;
}

/* Goes through the program of that epoch to its end, or until another is published; how many stages that were. With a stream it is the
 * caller, which runs the serial ones. What was read of a program counts only if its epoch lasts: it may be gone. */
static int64_t walk(tops_team *team, tops_stream *stream, uint64_t epoch, int *status) {
    const tops_stage *stages = atomic_load(&team->stages);
    int64_t count = atomic_load(&team->count);
    uint64_t first = atomic_load(&team->first);
    position at = {.epoch = epoch, .number = first};
    while (at.number - first < (uint64_t)count && goes_on(team, &at)) {
        const tops_stage *stage = stages + (at.number - first);
        at.stage = *stage;
        at.finished = 0;
        if (stream && stage->serial) {
            *status = stage->serial(stream, stage->context);
            at.number++;
            if (*status) break;
            atomic_store_explicit(&team->shares[0].done, span_of(at.number - 1, 0, 1), memory_order_release);
            continue;   /* if it had programs of its own, the epoch is over */
        }
        if (!goes_on(team, &at)) break;
        at.items = items_of(&at.stage);
        if (!goes_on(team, &at)) break;
        if (!at.stage.serial) work(team, &at, me);
        uint64_t number;
        for (int64_t turn = 1; (number = next_number(team, &at)) == at.number && goes_on(team, &at); turn++) {
            if (turn % STEAL == 0 && !at.stage.serial)
                for (int i = 1; i < team->threads; i++) work(team, &at, (me + i) % team->threads);
            if (turn < SPIN) RELAX();
            else sched_yield();
        }
        at.number = number;
    }
    return (int64_t)(at.number - first);
}

static void *worker(void *argument) {
    share *own = argument;
    tops_team *team = own->team;
    uint64_t last = 1, epoch = 1;   /* the one before the first */
    me = (int)(own - team->shares);
    for (;;) {
        for (int spin = 0; spin < SPIN && ((epoch = atomic_load_explicit(&team->epoch, memory_order_acquire)) == last || !open_at(epoch)); spin++) RELAX();
        if (epoch == last || !open_at(epoch)) {
            pthread_mutex_lock(&team->mutex);
            atomic_fetch_add(&team->sleeping, 1);
            while (((epoch = atomic_load(&team->epoch)) == last || !open_at(epoch)) && !atomic_load(&team->quit))
                pthread_cond_wait(&team->wake, &team->mutex);
            atomic_fetch_sub(&team->sleeping, 1);
            pthread_mutex_unlock(&team->mutex);
        }
        if (atomic_load(&team->quit)) return NULL;
        last = epoch;
        atomic_store(&own->inside, true);
        if (atomic_load(&team->epoch) == epoch) walk(team, NULL, epoch, NULL);
        atomic_store(&own->inside, false);
    }
}

static int run_alone(tops_stream *stream, const tops_stage *stages, int64_t count) {
    int status = TOPS_OK;
    for (const tops_stage *stage = stages; stage < stages + count && !status; stage++) {
        if (stage->serial) {
            status = stage->serial(stream, stage->context);
            continue;
        }
        int64_t items = items_of(stage);
        if (items && stage->begin) stage->begin(stage->context);
        for (int64_t item = 0; item < items; item++) stage->task(stage->context, stage->base + item);
    }
    return status;
}

int tops_team_walk(tops_stream *stream, const tops_stage *stages, int64_t count) {
    tops_team *team = stream->team;
    if (team->threads == 1) return run_alone(stream, stages, count);
    int status = TOPS_OK;
    for (int64_t done = 0; done < count && !status;) {
        end(team);   /* the program of whose stage this one is a part */
        done += walk(team, stream, begin(team, stages + done, count - done), &status);
    }
    end(team);
    return status;
}

int tops_team_do(tops_stream *stream, const tops_stage *stages, int count) {
    tops_team *team = stream->team;
    if (team->threads == 1 || (count == 1 && items_of(stages) <= 1)) return run_alone(stream, stages, count);
    memcpy(team->own, stages, (size_t)count * sizeof *stages);
    return tops_team_walk(stream, team->own, count);
}

void tops_team_run(tops_stream *stream, int64_t items, tops_task task, void *context) {
    for (int64_t base = 0; base < items; base += MOST_ITEMS) {
        tops_stage stage = {.task = task, .context = context, .base = base, .items = items - base < MOST_ITEMS ? items - base : MOST_ITEMS};
        tops_team_do(stream, &stage, 1);
    }
}

void tops_team_rest(const tops_team *team) {
    for (int i = 1; i < team->threads; i++)
        while (atomic_load(&team->shares[i].inside)) sched_yield();
}

tops_team *tops_team_create(int threads) {
    if (threads <= 0) threads = tops_processors();
    size_t bytes = sizeof(tops_team) + (size_t)threads * sizeof(share);
    tops_team *team = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!team) return NULL;
    memset(team, 0, bytes);
    atomic_store(&team->first, 1);   /* words are 0, which is of no stage */
    atomic_store(&team->epoch, 1);
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
    wake(team);
    for (int i = 1; i < team->threads; i++) pthread_join(team->shares[i].thread, NULL);
    pthread_mutex_destroy(&team->mutex);
    pthread_cond_destroy(&team->wake);
    free(team);
}

int tops_team_threads(const tops_team *team) { return team->threads; }
