/* layout.h - what lies in the control memory, who writes each field, and what must hold.
 *
 * Control memory, in this order, every region 64-byte aligned:
 *
 *   header   shml_control_t
 *   clients  shml_client_t[max_clients]
 *   wants    uint64_t[max_clients][SHML_MAX_WANTS]
 *   orders   shml_order_t[SHML_MAX_ORDERS]
 *   marks    uint64_t[SHML_MAX_ORDERS][max_clients]
 *   read     uint64_t[SHML_MAX_ORDERS][SHML_READ_POSITIONS / 64]
 *   texts    shml_shared_text_t[SHML_NUM_TEXTS]
 *   chunks   shml_chunk_t[num_chunks]
 *   descs    shml_desc_t[num_descs]
 *   pins     uint64_t[num_descs][SHML_PIN_WORDS]
 *   buckets  uint32_t[num_buckets]
 *   reads    uint32_t[num_records]
 *
 * One robust process-shared mutex ("the mutex") orders all writes, except the fields marked "any", which are
 * atomics of their own.
 *
 * TRUTH AND DERIVED STATE. A process can be killed between any two stores. So the truth is kept in few places,
 * each changed by one store that is made last (a descriptor's `state`, a chunk's `word` or `spilled`, a client's
 * `state`), and everything else under the mutex is derived: buckets and chains, the free and hole lists, head, counts.
 * `dirty` is 1 while derived state may disagree with the truth. Whoever gets the mutex with EOWNERDEAD and
 * finds it dirty builds all derived state again (table.c, shml_rebuild), which can itself be killed and begun
 * again. Until the kill the stores reached memory in program order as far as the compiler kept it (the
 * kernel's exit orders the rest), so stores of truth are release stores and that is enough.
 *
 * THE RING has three regions: resident (records stay, no pins), transit and raw (records give way). In resident records
 * are laid one behind the other; a writer that dies or gives up leaves a HOLE, which the next record of its size
 * takes; HOLEs at the top join the free space. In transit and raw the blocks are in a list by offset; free space is the
 * gaps between them, and a HOLE is a block that may always be evicted.
 *
 * A DESCRIPTOR'S LIFE. FREE -> CLAIMED (a row that a service decodes; no bytes yet) -> RESERVED (the writer fills the
 * bytes, without the mutex) -> READY or ERROR -> (transit and raw: evicted) FREE. What is not a row is RESERVED at
 * once. When a claimant or writer of a row dies over it, the row is SUSPECT (no bytes; `deaths` counts), to be claimed
 * alone; at SHML_MAX_ATTEMPTS it is ASIDE for ever. A commit sets `deaths` to 0.
 *
 * PINS. A client's bit in a descriptor's mask says that it reads the record. Set under the mutex together with the
 * look-up; cleared without it, by a release store of the same process or by whoever reaps it; looked at with acquire
 * by who wants to evict. How often a process has pinned a record is its own affair (seg->pin_counts).
 *
 * WHAT IS KEPT, softest first: what a living order has not come to yet (the order stamp: gives way to what somebody
 * waits for), what a client that waits for the rest of its batch has found (the want stamp: it copies that out after
 * one tick, or when told that it is in the way), what is pinned. There is room for the want stamps of two clients; what
 * a third waits for is only safe when one of them is through and the third has posted again.
 */
#ifndef SHML_LAYOUT_H
#define SHML_LAYOUT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "shml.h"

#define SHML_MAGIC       UINT64_C(0x314c44524c4d4853) /* "SHMLRDL1" */
#define SHML_VERSION     5u
#define SHML_MAX_CLIENTS 256u
#define SHML_MAX_WANTS   512u
#define SHML_NO_WANT     UINT64_MAX /* an empty place in the guests' list of wants */
#define SHML_PIN_WORDS   (SHML_MAX_CLIENTS / 64u)
#define SHML_ALIGN       64u
#define SHML_SPILL_PAGE  UINT64_C(4096) /* what is spilled begins at a multiple of this */
/* So many positions from an order's low-water mark on it is known whether they were read. */
#define SHML_READ_POSITIONS 16384u

enum { SHML_SEG_READY = 1, SHML_SEG_POISONED = 3 };

enum { SHML_CLIENT_FREE = 0, SHML_CLIENT_ACTIVE = 1 };

/* A client: an attached process. Written by that process under the mutex when it enters, by whoever reaps it when
 * it is dead. Its slot number is its byte in the lock inode. */
struct shml_client {
    _Atomic uint32_t state; /* truth; ACTIVE is stored after all else, FREE after all else was undone */
    /* Looked at without the mutex too, by who counts clients or probes whether one lives: what that finds is a guess,
     * and confirmed under the mutex before anything is done about it. */
    _Atomic uint32_t gen;  /* +1 each time the slot is given away */
    _Atomic uint32_t role; /* enum shml_role */
    _Atomic int32_t pid;
    _Atomic uint64_t starttime; /* with pid: which process, even when pids are used again */
    int32_t owner;              /* slot of a worker's owner or a prefetcher's supervisor, -1: none */
    uint32_t owner_gen;
    uint32_t num_wants;             /* of its want-list; commits take met ids out */
    _Atomic uint32_t wake;          /* futex word, any: +1 when the last want is met */
    uint64_t least_want, most_want; /* bounds of its want-list, to pass over it quickly */
    uint32_t want_gen;    /* odd while there may be want stamps of it; +1 with the first, +1 when its look-up ends */
    uint32_t num_working; /* derived: descriptors that it has CLAIMED or RESERVED */
};
_Static_assert(sizeof(struct shml_client) == 64, "a client is a cache line");

enum { SHML_CHUNK_TODO = 0, SHML_CHUNK_CLAIMED = 1, SHML_CHUNK_DONE = 2, SHML_CHUNK_BROKEN = 3 };

/* Rows [first_row, first_row + num_rows) of the source. `word` is the truth: state in bits 0-3, STAYS in bit 4, deaths
 * of claimants in bits 8-15, the claimant's slot in bits 16-31; one store changes all. In an open set a place, which
 * one chunk of a stream has after the other (open.c): then `first_row` is truth as well. */
typedef struct shml_chunk {
    uint64_t first_row; /* written by format only; open sets: an id, by claim_open under the mutex; UINT64_MAX: none */
    uint32_t num_rows;  /* written by format only */
    _Atomic uint32_t word;
    uint32_t unit;                  /* written by format only: the index of its unit's first chunk */
    uint32_t reader, reader_gen;    /* of a unit's first chunk: slot + 1 and generation of the client that reads it */
    uint32_t waiting;               /* scratch of shml_chunks_wanted, under the mutex */
    uint32_t num_final, num_stored; /* derived: rows that are resident or ASIDE; rows that are resident */
    uint64_t resident_bytes;        /* derived: of its resident rows */
    _Atomic uint64_t spilled;       /* truth, stored once; where its encoded rows are on disk (spill.c), 0: nowhere */
    uint64_t reserved;
} shml_chunk_t;
_Static_assert(sizeof(shml_chunk_t) == 64, "a chunk is a cache line");

enum {
    SHML_DESC_FREE = 0,
    SHML_DESC_RESERVED = 1,
    SHML_DESC_READY = 2,
    SHML_DESC_ERROR = 3,
    SHML_DESC_HOLE = 4,    /* a block without a record */
    SHML_DESC_CLAIMED = 5, /* a row without a block: this and those below */
    SHML_DESC_SUSPECT = 6,
    SHML_DESC_ASIDE = 7,
};

/* One record, block or row. `state` is the truth and stored last; the other fields are then as it says. */
typedef struct shml_desc {
    uint64_t id;
    uint64_t offset;
    uint64_t num_bytes; /* multiple of SHML_ALIGN; 0: no block */
    uint64_t until;     /* order stamp: of use while order `order` (generation order_gen) is below this position */
    _Atomic uint32_t state;
    uint32_t gen;         /* +1 at every reservation: a ticket of an earlier one is stale */
    uint32_t next;        /* derived: index + 1 of the next in the bucket, the free or the resident hole list; 0 ends */
    uint32_t after;       /* derived: transit and raw: index + 1 of the next block by offset; 0 ends */
    uint16_t owner;       /* slot of the claiming or reserving client */
    uint16_t deaths;      /* of clients that had it claimed or reserved, since its last commit */
    uint16_t order;       /* order stamp: slot + 1; 0: none */
    uint16_t order_gen;   /* order stamp: low bits of the order's generation */
    uint16_t want[2];     /* want stamps: slot + 1 of two clients; 0: none */
    uint16_t want_gen[2]; /* a want stamp holds while the low bits of that client's want_gen are this */
} shml_desc_t;
_Static_assert(sizeof(shml_desc_t) == 64, "a descriptor is a cache line");

enum { SHML_ORDER_FREE = 0, SHML_ORDER_LIVE = 1 };

/* An order. Written under the mutex by who begins, joins, finishes and ends it, or reaps a client that did. */
typedef struct shml_order {
    _Atomic uint32_t state; /* truth, stored last */
    uint32_t gen;           /* +1, or more in an open set, each time the slot is given away */
    uint32_t kind, rank, world_size, drop_last;
    int32_t owner;        /* slot of the client that began it; joined: that it was begun for */
    uint32_t num_readers; /* of a joined order; 0: begun by a sampler */
    uint64_t seed, epoch;
    uint64_t num_positions; /* truth; who finishes a joined order lowers it */
    /* Derived: the least mark of living clients that have one, where it was while nobody has; joined: 0 until all
     * readers have joined. */
    uint64_t low_water;
    uint64_t key;                           /* of a joined order */
    uint64_t joined[SHML_MAX_READERS / 64]; /* truth: bit `reader` is 1 once that reader has joined, and stays so */
    uint32_t is_finished;                   /* num_positions was told by who came to the stream's end */
    uint32_t reserved[5];
} shml_order_t;
_Static_assert(sizeof(shml_order_t) == 128, "an order is two cache lines");
/* Marks: marks[order][client] is 0 while the client has not read in that order, else 1 + its mark. Written under the
 * mutex, by that client, and to 0 by who begins the order or reaps the client. In a joined order a client has one from
 * joining to leaving, it only grows, and with the last of them the order ends.
 * Read: bit `position % SHML_READ_POSITIONS` is 1 if that position, at or above low_water, was read. Written under the mutex
 * by its reader; a hint, which keeps services from making again what was read and evicted: a bit that a kill leaves
 * wrong costs a decoding in vain, or a reader's waiting for what was not made ahead. */

/* A region of the ring. */
typedef struct shml_region {
    uint64_t begin, end; /* written by format only */
    _Atomic uint64_t
        backed_end; /* truth; read without the mutex for the quota of pins: there is memory below this; raw: until shml_raw_release only grows */
    uint64_t head;  /* derived: end of the highest block */
    uint64_t used_bytes;     /* derived: of RESERVED, READY and ERROR */
    _Atomic uint32_t frozen; /* truth; read as backed_end: memory was refused, backed_end is final */
    uint32_t num_blocks;     /* derived: blocks, HOLEs included */
    uint32_t first;          /* derived; transit, raw: the list by offset: index + 1 of the first block */
    uint32_t cursor;   /* derived; transit, raw: index + 1 of the block after which the search goes on, 0: at `begin` */
    uint32_t searched; /* a hint; the work word when the search last began at `begin`; resident: 1: it was full once */
    uint32_t last;     /* derived; transit, raw: index + 1 of the last block of the list */
} shml_region_t;
_Static_assert(sizeof(shml_region_t) == 64, "layout");

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
    uint64_t control_bytes, ring_bytes, num_records, record_bytes, raw_budget_bytes, spill_bytes;
    uint64_t most_resident; /* samples that may be resident; 0: any number */
    uint64_t most_transit;  /* samples that may be in transit; 0: any number */
    uint32_t max_clients, num_chunks, num_descs, num_buckets;
    uint32_t rows_per_chunk, chunks_per_order; /* of an open set; else 0 */
    uint64_t clients_at, wants_at, orders_at, marks_at, read_at, texts_at, chunks_at, descs_at, pins_at, buckets_at,
        reads_at;

    /* The mutex, and what it needs to be repaired. */
    _Alignas(64) pthread_mutex_t mutex;
    _Atomic uint32_t state;       /* SHML_SEG_*; any, only ever to POISONED */
    _Atomic uint32_t dirty;       /* under the mutex: derived state may be wrong */
    _Atomic uint32_t poison_line; /* where it was poisoned, for the report */

    /* Under the mutex; what of it is truth and what derived is told at the type. */
    _Alignas(64) shml_region_t regions[SHML_NUM_REGIONS];

    /* Truth under the mutex. */
    _Alignas(64) uint32_t num_reaped;
    uint32_t num_services_lost, num_rebuilds;
    uint32_t desc_end; /* no descriptor at or above this index was ever used; stored before one is, only grows */
    /* Counts of what happened. A kill between one of them and what it counts makes it wrong by one. */
    uint64_t num_commits, commit_bytes, num_evicted, num_starved, num_fetched;
    _Atomic uint64_t spill_end; /* of the file on disk: given out up to here; only grows */
    uint32_t spill_frozen;      /* the disk refused: no more is given out */

    /* Derived, under the mutex. */
    _Alignas(64) uint32_t num_ready; /* of samples, as the next */
    uint32_t num_errors, num_reserved, num_claimed, num_suspect, num_aside;
    uint32_t free_list; /* FREE descriptors below desc_end; index + 1 */
    uint32_t hole_list; /* HOLE descriptors of the resident region; index + 1 */
    uint32_t chunks_todo, chunks_claimed, chunks_done, chunks_broken;
    uint64_t promised_rows; /* of chunks that STAY and are not DONE: those that are not resident yet */
    uint64_t num_resident;  /* samples with a block in resident: RESERVED, READY and ERROR ones */
    uint64_t num_stored;    /* of these READY and ERROR ones: the sum of all chunks' num_stored */
    uint64_t num_transit;   /* samples with a block in transit: RESERVED, READY and ERROR ones */

    /* Written by anybody, each alone. */
    _Alignas(64) _Atomic uint64_t progress; /* +1 whenever anything moves: readers that wait look at it */
    _Atomic uint32_t work;                  /* futex word, see shml_work_word */
    _Atomic uint32_t sleepers;              /* on `work`; one that was killed is counted for ever: a wake too many */
    _Atomic uint64_t reaped_at_ns;          /* CAS claims the next reaping */
    _Atomic uint64_t epoch;
    _Atomic uint64_t num_reads, fetched_bytes, decoding_ns;
    _Atomic uint32_t num_orders; /* LIVE ones: a hint, so that readers without any need not look */

    /* Readers without a slot (guest.c): neither truth nor derived, a hint to services of what to make. */
    _Alignas(64) _Atomic uint32_t guest_wake; /* futex word, any: +1 when they should look again */
    _Atomic uint64_t num_guest_reads;         /* any */
    uint64_t guest_next;                      /* under the mutex: wants listed, ever; the next is put at this modulo */
    uint64_t guest_wants[SHML_MAX_WANTS];     /* under the mutex: ids, or SHML_NO_WANT */
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
static inline shml_order_t *shml_order_table(shml_control_t *c)
{
    return (shml_order_t *)((uint8_t *)c + c->orders_at);
}
static inline uint64_t *shml_marks(shml_control_t *c, uint32_t order)
{
    return (uint64_t *)((uint8_t *)c + c->marks_at) + (uint64_t)order * SHML_MAX_CLIENTS;
}
static inline uint64_t *shml_read_bits(shml_control_t *c, uint32_t order)
{
    return (uint64_t *)((uint8_t *)c + c->read_at) + (uint64_t)order * (SHML_READ_POSITIONS / 64);
}
static inline _Atomic uint64_t *shml_pins(shml_control_t *c, uint32_t desc)
{
    return (_Atomic uint64_t *)((uint8_t *)c + c->pins_at) + (uint64_t)desc * SHML_PIN_WORDS;
}
static inline _Atomic uint32_t *shml_reads(shml_control_t *c)
{
    return (_Atomic uint32_t *)((uint8_t *)c + c->reads_at);
}

static inline uint32_t shml_word_state(uint32_t word) { return word & 0xf; }
static inline uint32_t shml_word_deaths(uint32_t word) { return word >> 8 & 0xff; }
static inline uint32_t shml_word_slot(uint32_t word) { return word >> 16; }
/* Where its region has memory, or will have unless it is refused. */
static inline uint64_t shml_limit(const shml_region_t *r) { return r->frozen ? r->backed_end : r->end; }
static inline int shml_is_sample(uint64_t id) { return id < SHML_RAW; }
static inline int shml_is_open(const shml_control_t *c) { return c->rows_per_chunk != 0; }
static inline int shml_is_resident(const shml_control_t *c, uint64_t offset)
{
    return offset < c->regions[SHML_RESIDENT].end;
}
/* Are there as many samples in resident as may be? */
static inline int shml_is_resident_full(const shml_control_t *c)
{
    return c->most_resident > 0 && c->num_resident >= c->most_resident;
}
/* And in transit, so that one must go for the next? */
static inline int shml_is_transit_full(const shml_control_t *c)
{
    return c->most_transit > 0 && c->num_transit >= c->most_transit;
}
static inline int shml_has_block(uint32_t state) { return state >= SHML_DESC_RESERVED && state <= SHML_DESC_HOLE; }
static inline int shml_is_there(uint32_t state) { return state == SHML_DESC_READY || state == SHML_DESC_ERROR; }
static inline int shml_is_active(shml_control_t *c, uint32_t slot)
{
    return slot < SHML_MAX_CLIENTS && shml_clients(c)[slot].state == SHML_CLIENT_ACTIVE;
}
/* Does want stamp `i` hold: of a look-up that is not complete? */
static inline int shml_want_holds(shml_control_t *c, const shml_desc_t *desc, int i)
{
    return desc->want[i] != 0 && shml_is_active(c, desc->want[i] - 1u) &&
           (uint16_t)shml_clients(c)[desc->want[i] - 1].want_gen == desc->want_gen[i];
}
static inline int shml_is_wanted(shml_control_t *c, const shml_desc_t *desc)
{
    return shml_want_holds(c, desc, 0) || shml_want_holds(c, desc, 1);
}
/* Is an order stamp on it, of a living order that is not past it? */
static inline int shml_is_ordered(shml_control_t *c, const shml_desc_t *desc)
{
#ifdef SHML_BREAK_ORDERS /* defined by a negative control of the tests: the suites must then fail */
    (void)c, (void)desc;
    return 0;
#else
    if (desc->order == 0 || desc->order > SHML_MAX_ORDERS)
        return 0;
    const shml_order_t *order = &shml_order_table(c)[desc->order - 1];
    return order->state == SHML_ORDER_LIVE && (uint16_t)order->gen == desc->order_gen && order->low_water < desc->until;
#endif
}

/* Bracket every change of derived state, and of truth that takes two stores. Brackets nest: what begin returned is
 * what end gets, so that only the outermost one ends the change. The fences keep the compiler from moving a store out
 * of the bracket; the processor need not be held back, since a killed process's stores are all there before the next
 * has the mutex. */
static inline uint32_t shml_begin_change(shml_control_t *c)
{
    uint32_t was = atomic_exchange_explicit(&c->dirty, 1, memory_order_relaxed);
    atomic_signal_fence(memory_order_seq_cst);
    return was;
}
static inline void shml_end_change(shml_control_t *c, uint32_t was)
{
    atomic_signal_fence(memory_order_seq_cst);
    atomic_store_explicit(&c->dirty, was, memory_order_relaxed);
}

/* Internal functions that cross files. All of them but lock, unlock and tell need the mutex. */
/* control.c */
int shml_lock(shml_seg_t *seg); /* repairs after a dead owner; POISONED, TIMEOUT */
void shml_unlock(shml_seg_t *seg);
int shml_poison(shml_seg_t *seg, uint32_t line); /* returns SHML_E_POISONED */
int shml_mutex_init(pthread_mutex_t *mutex);     /* robust, process-shared */
/* table.c: the index, and what a descriptor's state counts for; in a bracket of the caller's */
shml_desc_t *shml_find(shml_seg_t *seg, uint64_t id, int *status); /* NULL: not there, or *status < 0 */
void shml_link(shml_control_t *c, uint32_t index);
int shml_unlink(shml_control_t *c, uint32_t index);
int64_t shml_pop(shml_control_t *c, uint32_t *list);    /* the first of a list, out of it; -1: damaged */
int64_t shml_desc_take(shml_seg_t *seg);                /* a FREE descriptor, out of the list; FULL, POISONED */
int shml_has_desc(const shml_control_t *c);             /* is there one? */
void shml_desc_give(shml_control_t *c, uint32_t index); /* into the list of FREE ones */
void shml_desc_set(shml_control_t *c, shml_desc_t *desc, uint32_t state);   /* store the state and count again */
void shml_desc_count(shml_control_t *c, const shml_desc_t *desc, int sign); /* what it counts for, in or out */
void shml_desc_stamp(shml_desc_t *desc, const shml_stamp_t *stamp);         /* order stamp; NULL or NO_ORDER: none */
/* rebuild.c */
int shml_rebuild(shml_seg_t *seg); /* all derived state from the truth */
/* region.c: blocks of transit and raw */
typedef struct shml_search { /* one search over several critical sections; zeroed at its beginning */
    int is_begun, num_laps;
    int is_thinning;             /* this lap looks for a sample that gives way, not for room */
    int is_thinned;              /* one was taken out */
    int has_own;                 /* the row has a descriptor already */
    uint32_t before, before_gen; /* goes on after this block: index + 1 */
    int64_t left;                /* so many blocks are still to be looked at in this lap */
} shml_search_t;
typedef struct shml_spot { /* where a block goes */
    uint64_t offset;
    uint32_t region, before;   /* transit, raw: behind this block (index + 1) */
    uint32_t hole, hole_index; /* resident: 1: into the HOLE with this index */
} shml_spot_t;
enum { SHML_SEARCH_ON = 1 }; /* unlock, lock, go on */
int shml_region_search(shml_seg_t *seg, uint32_t region, uint64_t num_bytes, int urgent, shml_search_t *search,
                       shml_spot_t *spot);
int shml_region_evict(shml_seg_t *seg, const shml_spot_t *spot, uint64_t num_bytes); /* what lies where it goes */
/* Before a sample goes to transit: have fewer than most_transit there. FULL: none gives way. */
int shml_region_thin(shml_seg_t *seg, int urgent, shml_search_t *search);
void shml_region_insert(shml_control_t *c, const shml_spot_t *spot, uint32_t index);
int shml_is_evictable(shml_control_t *c, uint32_t index, int urgent); /* a block of transit or raw */
int shml_is_pinned(shml_control_t *c, uint32_t index);
/* Out of descriptors: evict some blocks of transit, softest first. Whether there is a free descriptor now. */
int shml_region_spare(shml_seg_t *seg, int urgent);
void shml_region_tell(shml_seg_t *seg);                  /* what was just written may be evicted: tell the services */
int shml_region_clear(shml_seg_t *seg, uint32_t region); /* evict all; 0: something is in use, nothing was done */
/* ring.c */
int shml_desc_hole(shml_seg_t *seg, uint32_t index); /* RESERVED -> HOLE or free space */
/* claim.c: what the client in `slot` claimed or reserved, when it is gone */
int shml_desc_lose(shml_seg_t *seg, uint32_t index, int is_own_death);
int shml_claims_release(shml_seg_t *seg, uint32_t slot, int is_own_death);
int shml_row_forget(shml_seg_t *seg, uint32_t index); /* a row without a block is nowhere again; in a bracket */
/* chunk.c */
/* The chunks of a claimant that is gone: to do again; with `is_own_death` one more death on their record. */
void shml_chunk_release(shml_seg_t *seg, uint32_t slot, int is_own_death);
int32_t shml_chunk_of(shml_control_t *c, uint64_t id); /* -1: none */
int shml_chunk_take(shml_seg_t *seg, uint32_t chunk);  /* shml_chunk_claim, with the mutex */
/* By another than the client in `slot`. */
int shml_chunk_unit_is_taken(shml_control_t *c, uint32_t chunk, uint32_t slot);
void shml_chunk_renew(shml_seg_t *seg, uint32_t chunk); /* TODO, nobody has died over it */
uint64_t shml_chunk_promise(const shml_chunk_t *chunk); /* what of promised_rows is its */
/* Have the chunk's rows STAY, if resident is not promised away; whether they do. */
int shml_chunk_stay(shml_seg_t *seg, uint32_t chunk);
void shml_chunk_settle(shml_seg_t *seg, uint64_t id);    /* DONE, if all rows of the chunk of `id` are final */
void shml_chunk_unstay(shml_seg_t *seg, uint32_t chunk); /* its rows find no room in resident */
/* want.c */
void shml_wake_client(shml_seg_t *seg, shml_client_t *client);
void shml_wants_met(shml_seg_t *seg, uint64_t id); /* take `id` out of all want-lists, wake who has none left */
void shml_wants_wake(shml_seg_t *seg, uint64_t first, uint64_t n); /* wake who wants any of these */
void shml_wants_press(shml_seg_t *seg);                      /* wake who waits for samples: its stamps are in the way */
void shml_wants_stamp(shml_control_t *c, shml_desc_t *desc); /* by the first two clients that want it */
void shml_wants_post(shml_seg_t *seg, uint32_t slot, const uint64_t *ids, uint32_t n, const shml_ref_t *refs,
                     uint32_t num_missing, int is_take);
/* List `list` of SHML_NUM_WANT_LISTS: those of the slots, of length 0 where nobody is, and last that of the guests. */
#define SHML_NUM_WANT_LISTS (SHML_MAX_CLIENTS + 1u)
const uint64_t *shml_want_list(shml_control_t *c, uint32_t list, uint32_t *n);
void shml_wants_end(shml_seg_t *seg, uint32_t slot); /* withdraw the list, end the stamps */
/* read.c */
int shml_look_up(shml_seg_t *seg, uint64_t id, shml_ref_t *ref);
/* guest.c */
uint32_t shml_guest_num_wants(const shml_control_t *c); /* of guest_wants, empty places included */
/* They are there, or will never come: out of the guests' wants; wakes the guests if there were any. */
void shml_guests_met(shml_seg_t *seg, uint64_t first, uint64_t n);
void shml_guests_wake(shml_seg_t *seg);              /* needs no mutex */
int shml_is_awaited(shml_control_t *c, uint64_t id); /* is it in somebody's want-list? */
/* pin.c */
int shml_pin_refs(shml_seg_t *seg, uint32_t slot, shml_ref_t *refs, uint32_t n); /* those in transit and raw */
void shml_pins_clear(shml_seg_t *seg, uint32_t slot);                            /* of a dead client */
int shml_pins_keep(shml_seg_t *seg, uint32_t slot); /* leaving: 1 if it has pins, so that the slot stays */
/* order.c */
shml_order_t *shml_order_living(shml_control_t *c, uint32_t slot, uint32_t gen); /* NULL: it has ended */
/* The steps of a beginning, in a bracket of the caller's: a FREE slot, filled but not LIVE (or FULL); then LIVE. */
int shml_order_fill(shml_seg_t *seg, const shml_order_info_t *order, int32_t owner);
void shml_order_start(shml_seg_t *seg, uint32_t slot);
void shml_order_tell(const shml_control_t *c, uint32_t slot, shml_order_info_t *order);
void shml_order_stop(shml_seg_t *seg, uint32_t slot); /* end it */
/* Give the client in `slot` this mark + 1, or 0: none; with the last of a joined order that ends. */
void shml_mark_store(shml_seg_t *seg, uint32_t order, uint32_t slot, uint64_t value);
void shml_mark_set(shml_seg_t *seg, uint32_t slot, const shml_place_t *place, uint64_t mark);
void shml_orders_release(shml_seg_t *seg, uint32_t slot);       /* the orders and marks of a client that is gone */
uint64_t shml_low_water(shml_control_t *c, uint32_t order);     /* what it must be */
int shml_is_read(shml_control_t *c, const shml_stamp_t *stamp); /* the position before stamp->until */
int shml_has_marks(shml_control_t *c, uint32_t order);          /* of living clients */
/* join.c */
int shml_is_whole(const shml_order_t *order); /* have all its readers joined? 1 if it is not a joined one */
/* open.c */
int32_t shml_open_chunk_of(shml_control_t *c, uint64_t id); /* the place whose chunk has this row now; -1: none */
/* Will row `id` ever be made? GONE: of no living order; AT_END: its order ends before it. In closed sets always. */
enum { SHML_ROW_COMES, SHML_ROW_GONE, SHML_ROW_AT_END };
int shml_row_comes(shml_control_t *c, uint64_t id);
/* Before order `slot` begins with generation `gen`; closed sets: nothing. FULL: ids of that generation are in use. */
int shml_open_renew(shml_seg_t *seg, uint32_t slot, uint32_t gen);
/* Has a service one of order slot `slot`'s places CLAIMED? Closed sets: no. */
int shml_open_has_claimed(shml_control_t *c, uint32_t slot);
/* Will no row of the place's chunk be read any more? Such a place may be given away. */
int shml_open_is_spent(shml_control_t *c, uint32_t index);
int shml_open_place_is_good(shml_control_t *c, uint32_t index); /* for shml_check */

#define SHML_POISON(seg) shml_poison((seg), __LINE__)
static inline uint64_t shml_align(uint64_t n) { return (n + (SHML_ALIGN - 1)) & ~(uint64_t)(SHML_ALIGN - 1); }
/* What so many bytes take of the file on disk; where a chunk lies in it, of its `spilled`. */
static inline uint64_t shml_spill_pages(uint64_t n) { return (n + SHML_SPILL_PAGE - 1) & ~(SHML_SPILL_PAGE - 1); }
static inline uint64_t shml_spilled_offset(uint64_t spilled) { return (spilled >> 32) * SHML_SPILL_PAGE; }
static inline uint64_t shml_spilled_bytes(uint64_t spilled) { return (spilled & UINT32_MAX) * SHML_ALIGN; }
#endif
