/* A hash map from strings to pointers: open addressing, linear probing, backward-shift deletion.
   The map copies its keys and never looks at the values. */

#include "hashmap.h"

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SMALLEST = 16 };

typedef struct {
    char *key;          /* NULL: the slot is free */
    void *value;
    uint64_t hash;
} slot;

struct hashmap {
    slot *slots;
    size_t capacity;    /* a power of two */
    size_t count;
};

/* FNV-1a, then a final mix so that the low bits depend on all of the key. */
static uint64_t hash_of(const char *key) {
    uint64_t h = 0xcbf29ce484222325u;
    for (const unsigned char *p = (const unsigned char *)key; *p; p++) {
        h ^= *p;
        h *= 0x100000001b3u;
    }
    h ^= h >> 33;
    h *= 0xff51afd7ed558ccdu;
    h ^= h >> 33;
    return h;
}

static size_t home(const hashmap *map, uint64_t hash) {
    return (size_t)hash & (map->capacity - 1);
}

static size_t next(const hashmap *map, size_t i) {
    return (i + 1) & (map->capacity - 1);
}

/* The slot that holds key, or the free slot where it belongs. */
static slot *find(const hashmap *map, const char *key, uint64_t hash) {
    size_t i = home(map, hash);
    while (map->slots[i].key) {
        if (map->slots[i].hash == hash && strcmp(map->slots[i].key, key) == 0)
            break;
        i = next(map, i);
    }
    return &map->slots[i];
}

hashmap *hashmap_new(void) {
    hashmap *map = malloc(sizeof *map);
    if (!map)
        return NULL;
    map->slots = calloc(SMALLEST, sizeof *map->slots);
    if (!map->slots) {
        free(map);
        return NULL;
    }
    map->capacity = SMALLEST;
    map->count = 0;
    return map;
}

void hashmap_free(hashmap *map) {
    if (!map)
        return;
    for (size_t i = 0; i < map->capacity; i++)
        free(map->slots[i].key);
    free(map->slots);
    free(map);
}

/* Moves every entry to a table of the given capacity. On failure the map is as it was. */
static int resize(hashmap *map, size_t capacity) {
    assert((capacity & (capacity - 1)) == 0);
    slot *old = map->slots;
    size_t old_capacity = map->capacity;
    slot *slots = calloc(capacity, sizeof *slots);
    if (!slots)
        return -1;
    map->slots = slots;
    map->capacity = capacity;
    for (size_t i = 0; i < old_capacity; i++)
        if (old[i].key)
            *find(map, old[i].key, old[i].hash) = old[i];
    free(old);
    return 0;
}

int hashmap_put(hashmap *map, const char *key, void *value, void **replaced) {
    if (4 * (map->count + 1) > 3 * map->capacity && resize(map, 2 * map->capacity) != 0)
        return -1;
    uint64_t hash = hash_of(key);
    slot *s = find(map, key, hash);
    if (replaced)
        *replaced = s->key ? s->value : NULL;
    if (!s->key) {
        s->key = strdup(key);
        if (!s->key)
            return -1;
        s->hash = hash;
        map->count++;
    }
    s->value = value;
    return 0;
}

void *hashmap_get(const hashmap *map, const char *key) {
    const slot *s = find(map, key, hash_of(key));
    return s->key ? s->value : NULL;
}

/* Removes key and returns its value. Later entries of the same run move back, so that no probe ends too early. */
void *hashmap_remove(hashmap *map, const char *key) {
    slot *s = find(map, key, hash_of(key));
    if (!s->key)
        return NULL;
    void *value = s->value;
    free(s->key);
    size_t hole = (size_t)(s - map->slots);
    for (size_t i = next(map, hole); map->slots[i].key; i = next(map, i)) {
        size_t from_home = (i - home(map, map->slots[i].hash)) & (map->capacity - 1);
        size_t from_hole = (i - hole) & (map->capacity - 1);
        if (from_home >= from_hole) {
            map->slots[hole] = map->slots[i];
            hole = i;
        }
    }
    map->slots[hole].key = NULL;
    map->count--;
    return value;
}

size_t hashmap_count(const hashmap *map) {
    return map->count;
}

