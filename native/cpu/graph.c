/* Calls of ops: run at once, or recorded one after the other and run by one launch. A launch reads its calls from front to back, which
 * costs less than to make them: after a step has streamed a model through the caches, whatever a caller needs for them is far away. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

struct tops_graph {
    unsigned char *calls;   /* each a header and its arguments */
    size_t bytes, capacity;
};

typedef struct {
    tops_body body;
    size_t bytes;           /* to the next header */
} header;

static size_t header_and(size_t bytes) { return (sizeof(header) + bytes + 15) / 16 * 16; }

int tops_call(tops_stream *stream, tops_body body, void *arguments, size_t bytes) {
    tops_graph *graph = stream->recording;
    if (!graph) return body(stream, arguments);
    header call = {body, header_and(bytes)};
    if (graph->bytes + call.bytes > graph->capacity) {
        size_t capacity = 2 * graph->capacity + call.bytes;
        unsigned char *calls = realloc(graph->calls, capacity);
        if (!calls) return tops_fail(TOPS_OUT_OF_MEMORY, "the system has no %zu bytes of memory left", capacity);
        graph->calls = calls;
        graph->capacity = capacity;
    }
    memcpy(graph->calls + graph->bytes, &call, sizeof call);
    memcpy(graph->calls + graph->bytes + sizeof call, arguments, bytes);
    graph->bytes += call.bytes;
    return TOPS_OK;
}

int tops_graph_begin(tops_stream *stream) {
    REQUIRE(!stream->recording, "graph: the stream records one already");
    stream->recording = calloc(1, sizeof *stream->recording);
    if (!stream->recording) return tops_fail(TOPS_OUT_OF_MEMORY, "the system has no memory left for a graph");
    return TOPS_OK;
}

int tops_graph_end(tops_stream *stream, tops_graph **graph) {
    REQUIRE(stream->recording, "graph: the stream records none");
    *graph = stream->recording;
    stream->recording = NULL;
    return TOPS_OK;
}

int tops_graph_launch(tops_stream *stream, tops_graph *graph) {
    REQUIRE(!stream->recording, "graph: the stream records one, which must end before another is launched");
    for (size_t at = 0; at < graph->bytes;) {
        header *call = (header *)(graph->calls + at);
        int status = call->body(stream, call + 1);
        if (status) return status;
        at += call->bytes;
    }
    return TOPS_OK;
}

int tops_graph_free(tops_stream *stream, tops_graph *graph) {
    (void)stream;
    free(graph->calls);
    free(graph);
    return TOPS_OK;
}
