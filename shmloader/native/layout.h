/* layout.h - what lies in the control memory, who writes each field, and what must hold.
 *
 * Control memory, in this order, every region 64-byte aligned:
 *
 *   header   shml_control_t
 *   clients  shml_client_t[max_clients]
 *   wants    uint64_t[max_clients][SHML_MAX_WANTS]
 *   orders   shml_order_t[SHML_MAX_ORDERS]     reserved: not used yet
 *   texts    shml_shared_text_t[SHML_NUM_TEXTS]
 *   chunks   shml_chunk_t[num_chunks]
 *   descs    shml_desc_t[num_descs]
 *   pins     uint64_t[num_descs][SHML_PIN_WORDS]  reserved: not used yet
 *   buckets  uint32_t[num_buckets]
 *
 * One robust process-shared mutex ("the mutex") orders all writes, except the fields marked "any", which are
 * atomics of their own.
 *
 * TRUTH AND DERIVED STATE. A process can be killed between any two stores. So the truth is kept in few places,
 * each changed by one store that is made last (a descriptor's `state`, a chunk's `word`, a client's `state`),
 * and everything else under the mutex is derived: buckets and chains, the free and hole lists, head, counts.
 * `dirty` is 1 while derived state may disagree with the truth. Whoever gets the mutex with EOWNERDEAD and
 * finds it dirty builds all derived state again (table.c, shml_rebuild), which can itself be killed and begun
 * again. Until the kill the stores reached memory in program order as far as the compiler kept it (the
 * kernel's exit orders the rest), so stores of truth are release stores and that is enough.
 *
 * A DESCRIPTOR'S LIFE. FREE -> RESERVED (the writer fills the bytes, without the mutex) -> READY or ERROR. A writer
 * that dies or gives up leaves a HOLE: a block of the resident part without a record, which the next
 * record of its size takes. HOLEs at the top of the used part go back to the free space at once.
 */
#ifndef SHML_LAYOUT_H
#define SHML_LAYOUT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "shml.h"

#define SHML_MAGIC       UINT64_C(0x314c44524c4d4853) /* "SHMLRDL1" */
#define SHML_VERSION     1u
#define SHML_MAX_CLIENTS 256u
#define SHML_MAX_WANTS   512u
#define SHML_MAX_ORDERS  64u
#define SHML_PIN_WORDS   (SHML_MAX_CLIENTS / 64u)
#define SHML_ALIGN       64u

enum { SHML_SEG_READY = 1, SHML_SEG_POISONED = 3 };

enum { SHML_CLIENT_FREE = 0, SHML_CLIENT_ACTIVE = 1 };

/* A client: an attached process. Written by that process under the mutex when it enters, by whoever reaps it when
 * it is dead. Its slot number is its byte in the lock inode. */
struct shml_client {
    _Atomic uint32_t state; /* truth; ACTIVE is stored after all else, FREE after all else was undone */
    uint32_t gen;           /* +1 each time the slot is given away */
    uint32_t role;          /* enum shml_role */
    int32_t pid;
    uint64_t starttime; /* with pid: which process, even when pids are used again */
    int32_t owner;      /* slot of a worker's owner or a prefetcher's supervisor, -1: none */
    uint32_t owner_gen;
    uint32_t num_wants;             /* of its want-list; commits take met ids out */
    _Atomic uint32_t wake;          /* futex word, any: +1 when the last want is met */
    uint64_t least_want, most_want; /* bounds of its want-list, to pass over it quickly */
    uint64_t reserved;
};
_Static_assert(sizeof(struct shml_client) == 64, "a client is a cache line");

enum { SHML_CHUNK_TODO = 0, SHML_CHUNK_CLAIMED = 1, SHML_CHUNK_DONE = 2, SHML_CHUNK_BROKEN = 3 };

/* Rows [first_row, first_row + num_rows) of the source. `word` is the truth: state in bits 0-7, deaths of claimants
 * in bits 8-15, the claimant's slot in bits 16-31; one store changes all. */
typedef struct shml_chunk {
    uint64_t first_row; /* written by format only */
    uint32_t num_rows;  /* written by format only */
    _Atomic uint32_t word;
    uint32_t waiting; /* scratch of claim, under the mutex */
    uint32_t reserved[3];
} shml_chunk_t;
_Static_assert(sizeof(shml_chunk_t) == 32, "layout");

enum { SHML_DESC_FREE = 0, SHML_DESC_RESERVED = 1, SHML_DESC_READY = 2, SHML_DESC_ERROR = 3, SHML_DESC_HOLE = 4 };

/* Where one record lies. `state` is the truth and stored last; the other fields are then as it says. */
typedef struct shml_desc {
    uint64_t id;
    uint64_t version; /* reserved: 0 */
    uint64_t offset;
    uint64_t num_bytes; /* multiple of SHML_ALIGN */
    _Atomic uint32_t state;
    uint32_t gen;            /* +1 at every reservation: a ticket of an earlier one is stale */
    uint32_t owner;          /* slot of the reserving client */
    uint32_t next;           /* derived: index + 1 of the next in the bucket, the free or the hole list; 0 ends */
    _Atomic uint32_t reads;  /* any */
    uint32_t order_slot;     /* reserved */
    uint64_t order_position; /* reserved */
} shml_desc_t;
_Static_assert(sizeof(shml_desc_t) == 64, "a descriptor is a cache line");

typedef struct shml_order { /* reserved for the orders of larger-than-ring data */
    uint64_t seed, epoch, low_water;
    uint64_t reserved[5];
} shml_order_t;
_Static_assert(sizeof(shml_order_t) == 64, "layout");

typedef struct shml_shared_text {
    _Atomic uint32_t num_bytes; /* truth, stored last; 0: not written */
    uint32_t reserved[15];
    uint8_t text[SHML_TEXT_BYTES];
} shml_shared_text_t;

struct shml_control {
    /* Written by format only, before `magic`. */
    _Atomic uint64_t magic;
    uint32_t version;
    uint32_t abi; /* hash of sizes and offsets, page size, mutex size */
    uint8_t uuid[16];
    uint8_t boot_id[16];
    uint64_t pid_namespace;
    uint64_t control_bytes, ring_bytes, resident_bytes;
    uint32_t max_clients, num_chunks, num_descs, num_buckets;
    uint32_t is_sequential, reserved0;
    uint64_t clients_at, wants_at, orders_at, texts_at, chunks_at, descs_at, pins_at, buckets_at;

    /* The mutex, and what it needs to be repaired. */
    _Alignas(64) pthread_mutex_t mutex;
    _Atomic uint32_t state;       /* SHML_SEG_*; any, only ever to POISONED */
    _Atomic uint32_t dirty;       /* under the mutex: derived state may be wrong */
    _Atomic uint32_t poison_line; /* where it was poisoned, for the report */

    /* Truth under the mutex. */
    _Alignas(64) uint64_t backed_end; /* the ring has memory below this; only grows */
    uint32_t frozen;                  /* 1: memory was refused, backed_end is final */
    uint32_t num_reaped, num_services_lost, num_rebuilds;
    uint32_t desc_end;    /* no descriptor at or above this index was ever used; stored before one is, only grows */
    uint64_t num_commits; /* ever; a kill between it and the state counts a decode that was done again: two */

    /* Derived, under the mutex. */
    _Alignas(64) uint64_t head; /* end of the highest record: the free space of the resident part begins here */
    uint64_t used_bytes;        /* of RESERVED, READY and ERROR */
    uint32_t num_ready, num_errors, num_reserved;
    uint32_t free_list;    /* FREE descriptors below desc_end; index + 1 */
    uint32_t hole_list;    /* HOLE descriptors; index + 1 */
    uint32_t chunk_cursor; /* no chunk below this is TODO */
    uint32_t chunks_todo, chunks_claimed, chunks_done, chunks_broken;

    /* Written by anybody, each alone. */
    _Alignas(64) _Atomic uint64_t progress; /* +1 whenever anything moves: readers that wait look at it */
    _Atomic uint32_t work;                  /* futex word: +1 when there may be a chunk to claim, or none is left */
    _Atomic uint64_t reaped_at_ns;          /* CAS claims the next reaping */
    _Atomic uint64_t epoch;
};

/* Regions. */
static inline shml_client_t *shml_clients(shml_control_t *c) { return (shml_client_t *)((uint8_t *)c + c->clients_at); }
static inline uint64_t *shml_wants(shml_control_t *c, uint32_t slot)
{
    return (uint64_t *)((uint8_t *)c + c->wants_at) + (uint64_t)slot * SHML_MAX_WANTS;
}
static inline shml_shared_text_t *shml_texts(shml_control_t *c)
{
    return (shml_shared_text_t *)((uint8_t *)c + c->texts_at);
}
static inline shml_chunk_t *shml_chunks(shml_control_t *c) { return (shml_chunk_t *)((uint8_t *)c + c->chunks_at); }
static inline shml_desc_t *shml_descs(shml_control_t *c) { return (shml_desc_t *)((uint8_t *)c + c->descs_at); }
static inline uint32_t *shml_buckets(shml_control_t *c) { return (uint32_t *)((uint8_t *)c + c->buckets_at); }

/* Bracket every change of derived state. The fences keep the compiler from moving a store out of the bracket; the
 * processor need not be held back, since a killed process's stores are all there before the next has the mutex. */
static inline void shml_begin_change(shml_control_t *c)
{
    atomic_store_explicit(&c->dirty, 1, memory_order_relaxed);
    atomic_signal_fence(memory_order_seq_cst);
}
static inline void shml_end_change(shml_control_t *c)
{
    atomic_signal_fence(memory_order_seq_cst);
    atomic_store_explicit(&c->dirty, 0, memory_order_relaxed);
}

/* Internal functions that cross files. All of them but lock and unlock need the mutex. */
int shml_lock(shml_seg_t *seg); /* repairs after a dead owner; POISONED, TIMEOUT */
void shml_unlock(shml_seg_t *seg);
int shml_poison(shml_seg_t *seg, uint32_t line);                   /* returns SHML_E_POISONED */
int shml_mutex_init(pthread_mutex_t *mutex);                       /* robust, process-shared */
int shml_rebuild(shml_seg_t *seg);                                 /* all derived state from the truth */
shml_desc_t *shml_find(shml_seg_t *seg, uint64_t id, int *status); /* NULL: not there, or *status < 0 */
void shml_link(shml_control_t *c, uint32_t index);
int shml_unlink(shml_control_t *c, uint32_t index);
int shml_desc_hole(shml_seg_t *seg, uint32_t index); /* RESERVED -> HOLE or free space */
/* The chunks of a claimant that is gone: to do again; with `is_own_death` one more death on their record. */
void shml_chunk_release(shml_seg_t *seg, uint32_t slot, int is_own_death);
int32_t shml_chunk_of(shml_control_t *c, uint64_t id); /* -1: none */
void shml_wants_met(shml_seg_t *seg, uint64_t id);     /* take `id` out of all want-lists, wake who has none left */
void shml_wants_wake(shml_seg_t *seg, uint64_t first, uint64_t n); /* wake who wants any of these */

#define SHML_POISON(seg) shml_poison((seg), __LINE__)
static inline uint64_t shml_align(uint64_t n) { return (n + (SHML_ALIGN - 1)) & ~(uint64_t)(SHML_ALIGN - 1); }
#endif
