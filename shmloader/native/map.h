/* map.h - the table of this process's mappings, shared by map.c and fault.c. */
#ifndef SHML_MAP_H
#define SHML_MAP_H

#include <stdatomic.h>
#include <stdint.h>

/* Control and ring of each dataset, and one batch ring: 500 datasets in a process (guessed to be plenty). */
#define SHML_MAX_MAPPINGS 1024

typedef struct shml_mapping {
    uintptr_t at;
    _Atomic uint64_t num_bytes; /* 0: the entry is free */
    int is_inherited;           /* a reservation in the place of a mapping of the parent's */
    char name[24];
} shml_mapping_t;

/* The mapping that holds `address`, or NULL. Async-signal-safe. */
const shml_mapping_t *shml_mapping_at(uintptr_t address);
#endif
