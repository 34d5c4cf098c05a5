/* Ops: done at once, or recorded as one program of all their stages, which a launch goes through. A launch reads it from front to back,
 * and that is all that stands between two ops: after a step has streamed a model through the caches, everything else is far away. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* While it is recorded, a stage's context is an offset in `contexts`, because that moves when it grows. */
struct tops_graph {
    tops_stage *stages;
    int64_t count, most;
    unsigned char *contexts;
    size_t bytes, capacity;
    const unsigned char *scratch;   /* of the stream, to which contexts may point */
};

static bool make_room(tops_graph *graph, size_t bytes) {
    if (graph->count + MOST_STAGES > graph->most) {
        int64_t most = 2 * graph->most + 64;
        void *stages = realloc(graph->stages, (size_t)most * sizeof *graph->stages);
        if (!stages) return false;
        graph->stages = stages;
        graph->most = most;
    }
    if (graph->bytes + bytes > graph->capacity) {
        size_t capacity = 2 * graph->capacity + bytes;
        unsigned char *contexts = realloc(graph->contexts, capacity);
        if (!contexts) return false;
        graph->contexts = contexts;
        graph->capacity = capacity;
    }
    return true;
}

int tops_do(tops_stream *stream, const tops_stage *stages, int count, void *context, size_t bytes) {
    tops_graph *graph = stream->recording;
    if (!graph) {
        tops_stage now[MOST_STAGES];
        for (int i = 0; i < count; i++) {
            now[i] = stages[i];
            now[i].context = context;
        }
        return tops_team_do(stream, now, count);
    }
    size_t padded = (bytes + 63) / 64 * 64, at = graph->bytes;
    if (!make_room(graph, padded)) return tops_fail(TOPS_OUT_OF_MEMORY, "the system has no memory left for a graph");
    memcpy(graph->contexts + at, context, bytes);
    graph->bytes += padded;
    for (int i = 0; i < count; i++) {
        graph->stages[graph->count] = stages[i];
        graph->stages[graph->count++].context = (void *)at;
    }
    return TOPS_OK;
}

int tops_graph_begin(tops_stream *stream) {
    REQUIRE(!stream->recording, "graph: the stream records one already");
    stream->recording = calloc(1, sizeof *stream->recording);
    if (!stream->recording) return tops_fail(TOPS_OUT_OF_MEMORY, "the system has no memory left for a graph");
    return TOPS_OK;
}

int tops_graph_end(tops_stream *stream, tops_graph **graph) {
    tops_graph *made = stream->recording;
    REQUIRE(made, "graph: the stream records none");
    for (int64_t i = 0; i < made->count; i++) made->stages[i].context = made->contexts + (size_t)made->stages[i].context;
    made->scratch = stream->scratch;
    stream->recording = NULL;
    *graph = made;
    return TOPS_OK;
}

int tops_graph_launch(tops_stream *stream, tops_graph *graph) {
    REQUIRE(!stream->recording, "graph: the stream records one, which must end before another is launched");
    REQUIRE(graph->scratch == stream->scratch, "graph: was recorded before tops_stream_reserve gave the stream more scratch");
    return tops_team_walk(stream, graph->stages, graph->count);
}

int tops_graph_free(tops_stream *stream, tops_graph *graph) {
    tops_team_rest(stream->team);
    free(graph->stages);
    free(graph->contexts);
    free(graph);
    return TOPS_OK;
}
