/* copy.h - copying what is written once and read by another core. */
#ifndef SHML_COPY_H
#define SHML_COPY_H

#include <stdint.h>

/* Copy n bytes that do not overlap. Large ones go past the cache where the processor can: they would only push out
 * what the next records need, and their reader is another process. Then shml_copy_done must come before the store that
 * publishes the copy. */
void shml_copy(uint8_t *out, const uint8_t *in, uint64_t n);
/* Streaming stores are not ordered by a release store: this orders them. */
void shml_copy_done(void);
#endif
