/* batch.h - what lies in a batch ring, who writes it, and what must hold.
 *
 * One sparse memfd, mapped whole by the training process (the owner) and its workers:
 *
 *   struct shml_batch        header, clients, slots
 *   from SHML_BATCH_DATA_AT  the slots' bytes: address ranges that do not overlap, only these have memory
 *
 * A SLOT'S LIFE is one atomic word {gen, owner, state}. `owner` is the worker to whose pool the slot belongs, also
 * while the training process holds it. Every change of a word is a compare-and-swap of the whole, so each change has
 * one winner and a token whose generation is not the slot's is refused.
 *
 *      NONE ──new──▶ FILLING ──send──▶ SENT ──adopt──▶ HELD ──release──▶ FREE ──acquire──▶ FILLING
 *        ▲             │ drop             │ drop                            │
 *        └── discard ◀─┴────▶ FREE ◀──────┘                                 └── discard ──▶ NONE
 *
 * From NONE to another state and back only under the mutex; all else without it. All states but NONE count against
 * the budget with the slot's whole capacity, whether or not it has memory yet. No sum is kept: it is added up
 * from the slots when one is made, under the mutex, so nothing can come to disagree with the truth.
 *
 *   field        written by                                             when
 *   word         NONE -> FILLING, FILLING -> NONE: worker                under the mutex
 *                FREE -> FILLING, FILLING -> SENT, -> FREE: its worker    any time
 *                SENT -> HELD -> FREE: the training process               any time, any thread
 *                a dead worker's, but not HELD: another worker            under the mutex
 *   offset,      whoever makes the slot                                  under the mutex, in state NONE
 *   capacity
 *   is_backed    1: who has the slot FILLING, after fallocate            any time
 *                0: who discards it, before its memory goes            under the mutex
 *   slot_end     whoever makes the slot, before its word                 under the mutex
 *   clients      client.c                                                under the mutex
 *   num_*        anybody, statistics
 *
 * WHAT A KILL LEAVES, and who repairs it (F(x): FILLING, of worker x):
 *   killed in ...                    leaves                              repaired by
 *   new, before the word             NONE, a range nobody reads          nobody needs to
 *   new, after it; back, anywhere    F(dead), some memory, not is_backed the next to take it backs it again
 *   filling                          F(dead)                             a worker without a free slot takes or discards
 *   send, before and after           F(dead) or SENT(dead)               it; SENT can be adopted until then
 *   adopt, release (the owner)       anything                            its workers end too, the memfd goes
 *   discard, after the claim         F(dead), partly without memory      as F(dead): it is not is_backed
 *   register, before the sweep       an ACTIVE, dead client              bury, or whoever takes its slot of the clients
 *   any, holding the mutex           EOWNERDEAD                          the next: slot_end made anew, ranges checked
 *
 * A slot of the clients is used again after its process is gone. What its predecessor had FILLING or SENT is set
 * FREE before the newcomer can acquire (the "sweep", in the critical section that made it a client), so the pool
 * is inherited and FILLING(self) is always one's own.
 */
#ifndef SHML_BATCH_H
#define SHML_BATCH_H

#include <stdbool.h>

#include "layout.h"

#define SHML_BATCH_MAGIC   UINT64_C(0x31544142424d4853) /* "SHMBBAT1" */
#define SHML_BATCH_VERSION 1u
#define SHML_MAX_SLOTS     1024u
/* From this size on a slot begins at and consists of huge pages. */
#define SHML_HUGE_SLOT_BYTES  (UINT64_C(1) << 20)
#define SHML_BATCH_PAGE_BYTES UINT64_C(4096)

enum { SHML_SLOT_NONE = 0, SHML_SLOT_FREE = 1, SHML_SLOT_FILLING = 2, SHML_SLOT_SENT = 3, SHML_SLOT_HELD = 4 };

/* A cache line each: workers and the owner change neighbouring ones at the same time. */
typedef struct shml_batch_slot {
    _Alignas(64) _Atomic uint64_t word; /* gen in bits 32-63, the pool's worker in bits 8-23, state in bits 0-7 */
    _Atomic uint64_t offset, capacity;
    _Atomic uint32_t is_backed;
} shml_batch_slot_t;
_Static_assert(sizeof(shml_batch_slot_t) == 64, "a slot is a cache line");

struct shml_batch {
    /* Written by format only, before `magic`. */
    _Atomic uint64_t magic;
    uint32_t version, abi;
    uint64_t map_bytes, budget_bytes;

    _Alignas(64) pthread_mutex_t mutex;
    _Atomic uint32_t is_poisoned; /* any, only ever to 1 */

    _Alignas(64) _Atomic uint32_t slot_end; /* derived: all slots from here up are NONE */
    _Atomic uint64_t num_acquired, num_refused;

    _Alignas(64) struct shml_client clients[SHML_MAX_CLIENTS];
    shml_batch_slot_t slots[SHML_MAX_SLOTS];
};

#define SHML_BATCH_DATA_AT SHML_HUGE_BYTES
_Static_assert(sizeof(struct shml_batch) <= SHML_BATCH_DATA_AT, "the header ends before the slots' bytes");

static inline uint64_t shml_slot_word(uint32_t gen, uint32_t owner, uint32_t state)
{
    return (uint64_t)gen << 32 | (uint64_t)(owner & 0xffff) << 8 | state;
}
static inline uint32_t shml_slot_gen(uint64_t word) { return (uint32_t)(word >> 32); }
static inline uint32_t shml_slot_owner(uint64_t word) { return (uint32_t)(word >> 8) & 0xffff; }
static inline uint32_t shml_slot_state(uint64_t word) { return (uint32_t)(word & 0xff); }

/* Shared by batch.c and slot.c. */
static inline uint64_t shml_slot_load(const shml_batch_slot_t *slot)
{
    return atomic_load_explicit(&slot->word, memory_order_acquire); /* SYNC(range), SYNC(batch), SYNC(reuse) */
}

static inline bool shml_slot_swap(shml_batch_slot_t *slot, uint64_t from, uint64_t to)
{
    return atomic_compare_exchange_strong_explicit(&slot->word, &from, to, memory_order_acq_rel, memory_order_acquire);
}

static inline uint64_t shml_slot_size(const shml_batch_slot_t *slot)
{
    return atomic_load_explicit(&slot->capacity, memory_order_relaxed);
}
static inline uint64_t shml_slot_at(const shml_batch_slot_t *slot)
{
    return atomic_load_explicit(&slot->offset, memory_order_relaxed);
}

static inline uint32_t shml_slot_end(const shml_batch_t *batch)
{
    uint32_t end = atomic_load_explicit(&batch->slot_end, memory_order_acquire);
    return end < SHML_MAX_SLOTS ? end : SHML_MAX_SLOTS;
}

static inline uint64_t shml_slot_unit(uint64_t capacity)
{
    return capacity >= SHML_HUGE_SLOT_BYTES ? SHML_HUGE_BYTES : SHML_BATCH_PAGE_BYTES;
}

/* Within this process's mapping, whatever the shared memory says. */
static inline bool shml_slot_range_is_good(const shml_bhandle_t *h, uint64_t offset, uint64_t capacity)
{
    uint64_t unit = shml_slot_unit(capacity);
    return offset >= SHML_BATCH_DATA_AT && offset <= h->map_bytes && capacity > 0 &&
           capacity <= h->map_bytes - offset && offset % unit == 0 && capacity % unit == 0;
}

static inline int shml_batch_poison(shml_batch_t *batch)
{
    atomic_store_explicit(&batch->is_poisoned, 1, memory_order_relaxed);
    return SHML_E_POISONED;
}

/* *repaired goes to unlock. POISONED, TIMEOUT, SYS. */
int shml_batch_lock(shml_bhandle_t *h, uint32_t timeout_ms, int *repaired);
void shml_batch_unlock(shml_bhandle_t *h, int repaired);

/* Capacity of a new slot for `num_bytes`; 0: too large. */
uint64_t shml_slot_capacity(uint64_t num_bytes);
#endif
