/* memory.h - what memory.c shares with other files of the core and with the tests. */
#ifndef SHML_MEMORY_H
#define SHML_MEMORY_H

#include "shml.h"

/* What must stay available when we take memory: 5 % of all, at most 512 MiB (guessed). */
uint64_t shml_memory_spare(const shml_memory_t *memory);

/* shml_ring_back with the folder that stands in for / (see shml_memory_read). */
int shml_ring_back_in(shml_seg_t *seg, int fd, uint32_t region, uint64_t need_end, const char *root,
                      shml_memory_t *memory);

static inline uint64_t shml_round_up(uint64_t n, uint64_t unit) { return n / unit * unit + (n % unit != 0 ? unit : 0); }
#endif
