/* A hash map from strings to pointers. */
#ifndef HASHMAP_H
#define HASHMAP_H

#include <stddef.h>

typedef struct hashmap hashmap;

/* NULL when there is no memory. */
hashmap *hashmap_new(void);
void hashmap_free(hashmap *map);

/* Stores value under key and gives back what was there before (NULL: nothing). -1 when there is no memory. */
int hashmap_put(hashmap *map, const char *key, void *value, void **replaced);

/* NULL when key is not in the map. */
void *hashmap_get(const hashmap *map, const char *key);
void *hashmap_remove(hashmap *map, const char *key);

size_t hashmap_count(const hashmap *map);

#endif
