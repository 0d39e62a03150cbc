/* shml.h - the shared-memory core of shmloader: one decoded copy of every sample for all processes of a node.
 *
 * The core is C11 with no Python in it. It works on memory that the caller maps and passes in, and reaches
 * the operating system (liveness, clock, locks, waiting) through `shml_env_t`, so that a test can put any
 * state in front of it and stand in for the kernel. It never prints, never aborts and never allocates.
 *
 * Three inodes make a segment:
 *   control   table, clients, chunks; mapped read-write by every client (layout.h)
 *   ring      the records; mapped read-write by services, read-only by readers
 *   lock      one byte per client, held by a POSIX lock as long as the client's process lives
 * and each training process has one batch ring (batch.c), where its workers build batches.
 *
 * Errors: functions return SHML_OK or a negative `shml_status`; SHML_E_SYS leaves the cause in errno.
 * Threads: every function may be called from any thread of an attached process, but a client has one want-list: only
 * one thread of a process may wait for samples at a time.
 */
#ifndef SHML_H
#define SHML_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum shml_status {
    SHML_OK = 0,
    SHML_E_INVAL = -1,      /* an argument is out of its range */
    SHML_E_NOTFOUND = -2,   /* no such record, field, chunk or slot */
    SHML_E_EXISTS = -3,     /* the id is reserved or ready already */
    SHML_E_FULL = -4,       /* no room: ring, table or batch ring */
    SHML_E_TOOBIG = -5,     /* larger than the whole ring could ever hold */
    SHML_E_EXTEND = -6,     /* the ring must be backed further first: shml_ring_back */
    SHML_E_MEMORY = -7,     /* the machine or a memory cgroup has not enough memory */
    SHML_E_CLIENTS = -8,    /* the table of clients is full */
    SHML_E_STALE = -9,      /* the generation differs: the thing was given to another */
    SHML_E_POISONED = -10,  /* the shared state is damaged, nothing works any more */
    SHML_E_LAYOUT = -11,    /* not a segment, or one of another version or ABI */
    SHML_E_TIMEOUT = -12,   /* the mutex was not had in SHML_LOCK_TIMEOUT_MS */
    SHML_E_SYS = -13,       /* a system call failed: errno */
    SHML_E_NAMESPACE = -14, /* another PID namespace */
    SHML_E_CORRUPT = -15,   /* a record is not what its header says */
    SHML_E_LEFT = -16,      /* this process is no client (any more) */
};

/* A holder of the mutex works for microseconds; one that was not had for this long is frozen (guessed). */
#define SHML_LOCK_TIMEOUT_MS 30000u
/* Bound on every wait: a wake that was lost with its killed sender delays by this much, no more. */
#define SHML_TICK_MS  100u
#define SHML_MAX_RANK 6
/* Orders that live at once; readers of a joined one. */
#define SHML_MAX_ORDERS  64u
#define SHML_MAX_READERS 256u

typedef struct shml_control shml_control_t;
typedef struct shml_client shml_client_t;
typedef struct shml_batch shml_batch_t;

/* ---------------------------------------------------------------------------------------------------- *
 * The operating system, as the core sees it (env_linux.c: `shml_env_linux`). Tests replace any of these.
 * ---------------------------------------------------------------------------------------------------- */
typedef struct shml_env {
    void *ctx;
    /* Lock a robust process-shared mutex: 0, EOWNERDEAD (locked, owner died), ETIMEDOUT, ENOTRECOVERABLE. */
    int (*lock)(void *ctx, pthread_mutex_t *mutex, uint32_t timeout_ms);
    /* Unlock; with `repaired`, first mark a mutex that was had with EOWNERDEAD consistent. */
    void (*unlock)(void *ctx, pthread_mutex_t *mutex, int repaired);
    /* 1 while the process of `client`, which holds byte `slot` of `lock_fd`, can still store, else 0. */
    int (*alive)(void *ctx, int lock_fd, uint32_t slot, const shml_client_t *client);
    /* Take (1) or give back (0) byte `slot` of `lock_fd` for this process: 0 or an errno. */
    int (*hold)(void *ctx, int lock_fd, uint32_t slot, int take);
    uint64_t (*now_ns)(void *ctx); /* CLOCK_MONOTONIC */
    /* Sleep while *word == seen, at most timeout_ms. Spurious returns are fine. */
    void (*wait)(void *ctx, uint32_t *word, uint32_t seen, uint32_t timeout_ms);
    void (*wake)(void *ctx, uint32_t *word); /* all waiters */
    int32_t (*pid)(void *ctx);
    uint64_t (*starttime)(void *ctx); /* of this process, in clock ticks since boot: /proc/self/stat field 22 */
} shml_env_t;

extern const shml_env_t shml_env_linux;

/* ---------------------------------------------------------------------------------------------------- *
 * Segment
 * ---------------------------------------------------------------------------------------------------- */

/* One process's handle to a segment. The caller fills all but `self`, which shml_client_register sets. */
typedef struct shml_seg {
    shml_control_t *control; /* mapped read-write */
    uint8_t *ring;           /* mapped; read-only in readers; NULL where no payload is touched */
    uint64_t ring_bytes;     /* of that mapping */
    int lock_fd;
    /* This process's pins: counts by descriptor (num_descs of them, zeroed by the caller, NULL in a process that never
     * pins) and the lock over them. A client's bit in a descriptor's mask is set while its count is not 0. */
    uint16_t *pin_counts;
    pthread_mutex_t *pin_lock; /* of this process alone; taken after the segment's mutex where both are */
    uint64_t pinned_bytes;     /* of records with a count, each once; under pin_lock */
    uint64_t num_pinned;       /* records with a count; the same */
    /* This process's client slot, -1: not registered. Changed under the mutex only, since other threads may be in a
     * call when one unregisters: they get SHML_E_LEFT. */
    _Atomic int32_t self;
    const shml_env_t *env;
    /* Slot + 1 of a client that has left with pins (self is -1): until the last of them is given back it stays ACTIVE,
     * with role 0. Under the mutex and pin_lock; 0: none. */
    uint32_t leaving;
} shml_seg_t;

typedef struct shml_config {
    /* The regions of the ring, one behind the other; multiples of 4096. */
    uint64_t resident_bytes;   /* records that stay */
    uint64_t transit_bytes;    /* records that give way to others; 0: all that does not fit is refused */
    uint64_t raw_bytes;        /* encoded chunks, for the services alone */
    uint64_t raw_budget_bytes; /* so many of them are kept before one is evicted for another */
    uint64_t num_records;      /* samples of the source; ids below this never collide in the index */
    uint32_t num_chunks;
    uint64_t record_bytes;  /* of every sample, about; 0: not known. For what is promised before the first is there */
    uint64_t spill_bytes;   /* of the file for encoded chunks on disk; a multiple of 4096, 0: there is none */
    uint64_t most_resident; /* so many samples stay, and no more; 0: as many as find room. Needs a transit region. */
    uint64_t most_transit;  /* so many samples are in transit at once, and no more; 0: as many as find room */
    /* Not 0: an open set (open.c), of streams whose end is not known; each order's is cut into chunks of so many rows.
     * num_chunks is then SHML_MAX_ORDERS times the chunks that an order has places for, at least 2; num_records is how
     * many samples may be there at once; and resident_bytes is 0, transit_bytes is not. */
    uint32_t rows_per_chunk;
    uint8_t uuid[16];
    uint8_t boot_id[16];
    uint64_t pid_namespace; /* inode of /proc/self/ns/pid */
} shml_config_t;

/* Bytes of control memory that `config` needs; the pages are touched as they are used. 0: config is bad. */
uint64_t shml_control_bytes(const shml_config_t *config);

/* Make a segment in `control` (zeroed, shml_control_bytes long). Chunks are given as arrays of
 * config->num_chunks first rows (ascending, contiguous), row counts and units: units[i] is the index of the first
 * chunk of i's unit (ascending), whose chunks one client reads one after the other. An open set has none of these
 * (NULL). The magic is stored last, so whoever attaches early gets SHML_E_LAYOUT. */
int shml_control_format(void *control, uint64_t bytes, const shml_config_t *config, const uint64_t *first_rows,
                        const uint32_t *num_rows, const uint32_t *units);

/* Check that `control` is a whole segment of this version, ABI, boot and PID namespace. */
int shml_control_check(const void *control, uint64_t bytes, const uint8_t boot_id[16], uint64_t pid_namespace);

/* Walk everything (mutex held inside) and compare with the invariants in layout.h. `scratch` has
 * shml_control_bytes-many bytes or is NULL (then overlap of records is not checked).
 * On SHML_E_CORRUPT *what names the invariant. For tests and diagnosis. */
int shml_check(shml_seg_t *seg, void *scratch, const char **what);

/* Thread id of the mutex's holder, 0: free. A hint for the report of SHML_E_TIMEOUT. */
int32_t shml_mutex_holder(const shml_control_t *control);

/* ---------------------------------------------------------------------------------------------------- *
 * Clients (client.c)
 * ---------------------------------------------------------------------------------------------------- */
enum shml_role { SHML_OWNER = 1, SHML_WORKER = 2, SHML_SERVICE = 3 };

/* So many slots, the last ones, no worker gets: a prefetcher that takes a dead one's place, or the next supervisor, must
 * find one although workers wait for each that becomes free. As many as a set has prefetchers at most (options.py), a
 * supervisor and the next one, and some owners. */
#define SHML_KEPT_CLIENTS 72u

/* Enter this process: takes a slot and its byte, sets seg->self. `owner` is the slot of a worker's owner
 * (its generation `owner_gen`), else -1. SHML_E_CLIENTS when all slots are taken by living processes; for
 * a worker when all but the last SHML_KEPT_CLIENTS are: it may then read as a guest. */
int shml_client_register(shml_seg_t *seg, uint32_t role, int32_t owner, uint32_t owner_gen);
/* Leave: gives back all but pins. With pins held the slot stays this process's, counted in no role, until the last
 * shml_unpin, which works after this too; who registers again before gets the same slot. */
void shml_client_unregister(shml_seg_t *seg);
uint32_t shml_client_gen(const shml_seg_t *seg, int32_t slot);

/* Clean up after dead clients: what they had claimed, reserved, pinned, wanted, ordered and marked.
 * Does nothing if anybody did so less than 100 ms ago, unless `now`. Returns how many it buried, or a status. */
int shml_reap(shml_seg_t *seg, int now);

/* Living clients of `role` (as far as reaped). */
uint32_t shml_count_clients(const shml_seg_t *seg, uint32_t role);

/* Is `offset` of the lock inode held by another process? Its pid, 0: no. For the supervisor's byte. */
int32_t shml_byte_holder(int lock_fd, uint64_t offset);

/* Have the kernel kill this process when its parent, `parent`, dies. Call it from the main thread. Returns 0 if the
 * parent is gone already: then end at once. */
int shml_die_with_parent(int32_t parent);

/* For the batch ring, which has clients of its own. Under that ring's mutex: take a slot of `clients`. */
int shml_clients_take(shml_client_t *clients, uint32_t max_clients, int lock_fd, const shml_env_t *env, uint32_t role,
                      int32_t owner, uint32_t owner_gen);

/* ---------------------------------------------------------------------------------------------------- *
 * Records (ring.c)
 * ---------------------------------------------------------------------------------------------------- */
typedef struct shml_ticket { /* a reservation; only the reserving process may write and commit */
    uint64_t offset, num_bytes;
    uint32_t desc, gen;
} shml_ticket_t;

/* Ids from SHML_RAW up are not samples: SHML_RAW | chunk is an encoded chunk (in the raw region), and
 * SHML_CHUNK_ERROR | chunk is the JSON of why a chunk is broken (never evicted; in open sets while its rows may be
 * read). */
#define SHML_RAW         (UINT64_C(1) << 62)
#define SHML_CHUNK_ERROR (UINT64_C(1) << 63)

enum shml_ref_status {
    SHML_REF_READY = 0,
    SHML_REF_ERROR = 1,   /* ready, but the record is the JSON of why there is no sample */
    SHML_REF_MISSING = 2, /* not there yet, or not any more */
    SHML_REF_BROKEN = 3,  /* will not come: its chunk was set aside or could not be read */
    SHML_REF_ASIDE = 4,   /* will not come: SHML_MAX_ATTEMPTS prefetchers died over this very row */
    SHML_REF_END = 5,     /* will not come: its order has fewer positions (open sets) */
};

typedef struct shml_ref { /* where a record lies; valid while it is resident or pinned */
    uint64_t offset, num_bytes;
    uint32_t desc, gen;
    uint32_t status; /* enum shml_ref_status */
    uint32_t chunk;  /* READY, ERROR: 1 if this look-up pinned it, else 0; others: its chunk, UINT32_MAX: none */
} shml_ref_t;

/* Until when a record is of use, so that it is not evicted before: while order `order` (of generation `gen`) lives and
 * its low-water mark is below `until`. order == SHML_NO_ORDER: nobody is known to need it. */
#define SHML_NO_ORDER UINT32_MAX
typedef struct shml_stamp {
    uint32_t order, gen;
    uint64_t until;
} shml_stamp_t;

/* ---- writing (services) ---- */

/* Take rows to decode: got[i] = 1 where ids[i] is nowhere yet and now is this client's (CLAIMED), else 0. A row over
 * which a client died (SUSPECT) is only had alone (n == 1), so that it can take no others with it. A claim ends with
 * shml_commit, shml_abort, shml_unclaim_rows or this client's death, which makes the row SUSPECT, and after
 * SHML_MAX_ATTEMPTS deaths sets it ASIDE. Rows of broken chunks are not had, nor in open sets what will not come.
 * INVAL: an id is none of a row; FULL: there is no descriptor left, and nothing gives way to the row (got tells what
 * was claimed all the same). */
int shml_claim_rows(shml_seg_t *seg, const uint64_t *ids, uint32_t n, uint8_t *got);
int shml_unclaim_rows(shml_seg_t *seg, const uint64_t *ids, uint32_t n); /* those that still are CLAIMED by us */

/* Make room for record `id` (a row that this client has claimed, or an id that is nowhere or SUSPECT). Rows of chunks
 * that STAY go to the resident region while it has room and fewer than most_resident samples, all others to transit (if
 * there is none, to resident); SHML_RAW ids to the raw region; SHML_CHUNK_ERROR ids to resident, or transit.
 * In transit and raw room that was never used comes first, in raw within its budget; then the first run of bytes that is
 * free or held by evictable blocks, which are evicted. Where most_transit samples are in transit, the first of them that
 * is evictable goes before, whatever room there is.
 * Not evictable: RESERVED; pinned; wanted by a client whose posted look-up is not complete (want stamp); stamped by a
 * living order that is not past it, unless `urgent`; raw of a chunk that STAYs and is not DONE.
 * Errors: EXISTS (ready, or reserved or claimed by another), FULL (nothing can be evicted now: wait on
 * shml_work_word, try again; with `urgent` the readers that hold stamps are told to copy what they have),
 * TOOBIG (larger than its region), MEMORY (larger than what a frozen transit or raw has), EXTEND (call shml_ring_back
 * for ticket->desc == the region, need_end == ticket->offset + ticket->num_bytes, then again). `stamp` may be NULL.
 * The bytes at ring + ticket->offset are the caller's to write until shml_commit or shml_abort; they are not zeroed. */
int shml_reserve(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, const shml_stamp_t *stamp, int urgent,
                 shml_ticket_t *ticket);
/* Publish: readers see all that was written before. status: SHML_REF_READY or SHML_REF_ERROR. STALE if the
 * reservation was taken away (only from the dead). */
int shml_commit(shml_seg_t *seg, const shml_ticket_t *ticket, uint32_t status);
int shml_abort(shml_seg_t *seg, const shml_ticket_t *ticket);

/* ---- reading ---- */

/* Which batch of which order a look-up is: the positions [begin, end) of the order that its rows are. */
typedef struct shml_place {
    uint32_t order, gen;
    uint64_t begin, end;
} shml_place_t;

enum { SHML_GET_POST = 1, SHML_GET_TAKE = 2 };

typedef struct shml_found {
    uint32_t num_missing;
    uint32_t over_quota; /* 1: with these pins the client holds more than its share of transit: copy, then unpin */
} shml_found_t;

/* Look up `n` ids in one critical section.
 * Nothing missing: every ref in transit is pinned (ref.chunk == 1), in this section.
 * Else, with SHML_GET_POST, what is missing becomes this client's want-list, and what is there in transit is stamped as
 * wanted by this client until its next complete or posted look-up, so that it stays while the rest comes (a record has
 * room for the stamps of two clients). With SHML_GET_TAKE what is there
 * is pinned although something is missing: the caller copies it out, unpins it and asks for the rest only, so that
 * nobody sleeps on what others need the room of. Without either nothing is changed.
 * place (NULL: not known): this client's mark in the order becomes place->begin when the look-up is posted and
 * place->end when it is complete.
 * Protocol: get(0); if missing: loop { seen = shml_wake_word; get(POST, or POST | TAKE once what is stamped was in the way
 * of others: num_starved has moved); ...; shml_wait(seen) }; a look-up of n == 0 with POST withdraws the wants. Only
 * look-ups with POST end stamps: another thread may be waiting with them. */
int shml_get_many(shml_seg_t *seg, const uint64_t *ids, uint32_t n, int flags, const shml_place_t *place,
                  shml_ref_t *refs, shml_found_t *found);
/* Give pins back (those of refs with chunk == 1 and status READY or ERROR), without the mutex, from any thread. INVAL,
 * STALE: one of them was pinned no more. */
int shml_unpin(shml_seg_t *seg, const shml_ref_t *refs, uint32_t n);
/* One more of a pin that the caller holds. */
int shml_pin_again(shml_seg_t *seg, const shml_ref_t *ref);
/* Bytes of transit that this client may have pinned: half of it, shared by the living owners and workers. */
uint64_t shml_pin_quota(const shml_seg_t *seg);
/* And samples: the same of most_transit; UINT64_MAX where any number may be there. */
uint64_t shml_pin_quota_samples(const shml_seg_t *seg);

uint32_t shml_wake_word(const shml_seg_t *seg);
/* Sleep until a commit met the last of this client's wants, a chunk that it waits for broke, its stamps are in the way
 * of others, or at most min(timeout_ms, SHML_TICK_MS). */
void shml_wait(shml_seg_t *seg, uint32_t seen, uint32_t timeout_ms);

enum shml_row {
    SHML_ROW_MISSING = 0,
    SHML_ROW_SUSPECT = 1, /* missing, and a prefetcher died over it */
    SHML_ROW_WORK = 2,    /* claimed or reserved */
    SHML_ROW_TRANSIT = 3, /* there, for now */
    SHML_ROW_FINAL = 4, /* resident, aside, of a broken chunk, of no living order or at its end: nothing to do, ever */
};
/* What there is of each id. With `stamp`, ids[i] is the row at position stamp->until + i - 1 of an order: FINAL also if it
 * was read there, whatever became of it since; and what is in transit and no living order needs any more is stamped
 * anew with (stamp->order, stamp->gen, stamp->until + i). */
int shml_look(shml_seg_t *seg, const uint64_t *ids, uint32_t n, const shml_stamp_t *stamp, uint8_t *rows);
/* Ids that clients want and that are MISSING or SUSPECT; at most `max`, unsorted, perhaps repeated; returns how
 * many. */
int shml_wanted(shml_seg_t *seg, uint64_t *ids, uint32_t max);
/* Count one more read of each row and give the count before: the "epoch" of a transform's seed. */
int shml_count_reads(shml_seg_t *seg, const uint64_t *ids, uint32_t n, uint32_t *reads);

/* ---------------------------------------------------------------------------------------------------- *
 * Guests (guest.c): readers for whom there is no slot in the table of clients
 * ---------------------------------------------------------------------------------------------------- */
/* Look up `n` ids in one critical section, for a process that is no client. Nothing is pinned: of what is there,
 * ref.chunk is 1 if it may give way to others (copy it, then shml_guest_check), 0 if it is resident and stays. What is
 * missing goes onto a want-list that all guests share: at most SHML_MAX_WANTS ids, of which the oldest give way.
 * Protocol: loop { seen = shml_guest_word; get; copy; check; if something is missing: shml_guest_wait(seen) }, asking
 * again only for what is still to be had; a guest that gives up just ends: what it wanted is made once, in vain. */
int shml_guest_get(shml_seg_t *seg, const uint64_t *ids, uint32_t n, shml_ref_t *refs, uint32_t *num_missing);
/* valid[i] = 1: what was read of record refs[i] between shml_guest_get and now is that record; 0: it has given way
 * meanwhile, or was not there. INVAL: a ref that shml_guest_get did not give. */
int shml_guest_check(shml_seg_t *seg, const shml_ref_t *refs, uint32_t n, uint8_t *valid);
uint32_t shml_guest_word(const shml_seg_t *seg);
/* Sleep until something that a guest wants was met, or will never come, or at most min(timeout_ms, SHML_TICK_MS). */
void shml_guest_wait(shml_seg_t *seg, uint32_t seen, uint32_t timeout_ms);

/* ---------------------------------------------------------------------------------------------------- *
 * Chunks (chunk.c): who fetches what
 * ---------------------------------------------------------------------------------------------------- */
/* A chunk whose fetchers, or a row whose decoders, died this many times is set aside. */
#define SHML_MAX_ATTEMPTS 3

/* Of shml_chunk_look: the state, and */
#define SHML_CHUNK_STAYS   0x10u /* its rows go to the resident region */
#define SHML_CHUNK_HAS_RAW 0x20u /* its encoded rows are at hand: in the raw region, or spilled */
int shml_chunk_look(shml_seg_t *seg, const uint32_t *chunks, uint32_t n, uint8_t *states);
/* Take a chunk to fetch. Decides whether its rows STAY: while the resident region is not promised away.
 * EXISTS: its raw record is there, or it is spilled. STALE: another has it, or reads its unit. NOTFOUND: it is done or
 * broken. INVAL: no such chunk, or an open set (shml_chunk_claim_open). */
int shml_chunk_claim(shml_seg_t *seg, uint32_t chunk);
/* The claim's end: fetched (its raw record is committed, or it is spilled), given up for now (0), or it cannot be read
 * (broken: the JSON of the reason is record SHML_CHUNK_ERROR | chunk, if there was room). A chunk becomes DONE by
 * itself, when all of its rows are FINAL, and a claim of it ends with that. STALE: this client has not claimed it (any
 * more). */
enum { SHML_FETCH_GIVEN_UP = 0, SHML_FETCH_OK = 1, SHML_FETCH_BROKEN = 2 };
int shml_chunk_end(shml_seg_t *seg, uint32_t chunk, int outcome);
/* Chunks that are not fetched, not claimed, and have rows that clients wait for, with how many; at most `max`;
 * returns how many. */
int shml_chunks_wanted(shml_seg_t *seg, uint32_t *chunks, uint32_t *counts, uint32_t max);
/* Give the raw region's memory back (`fd` is the ring's) if every chunk is done or broken and no raw record is pinned.
 * Returns 1 if it was, else 0. */
int shml_raw_release(shml_seg_t *seg, int fd);

/* ---- encoded chunks on disk (spill.c): for the services alone, who write and read the file ---- */

/* The file is no larger than this, and a chunk in it neither (both by the width of where it lies). */
#define SHML_MAX_SPILL_BYTES   (UINT64_C(1) << 44)
#define SHML_MAX_SPILLED_BYTES (UINT64_C(1) << 37)
/* Room for the encoded rows of a chunk that this client has claimed: *offset, a multiple of 4096. What is reserved and
 * not committed (a kill, an error) is lost: no room is given out twice.
 * STALE: this client has not claimed it (any more). FULL: there is no room for so much, or the disk refused more. */
int shml_spill_reserve(shml_seg_t *seg, uint32_t chunk, uint64_t num_bytes, uint64_t *offset);
/* They are written: from now on the chunk is there for good, and is not fetched again. End the claim with
 * shml_chunk_end. STALE: as above. INVAL: outside of what was given out. EXISTS: it is spilled already. */
int shml_spill_commit(shml_seg_t *seg, uint32_t chunk, uint64_t offset, uint64_t num_bytes);
/* What was reserved at `offset` and will never be committed gives its blocks of the disk back: they read as zeros, and
 * the room is not given out again. INVAL: outside of what was given out. SYS: this disk cannot. */
int shml_spill_give_back(const shml_seg_t *seg, int fd, uint64_t offset, uint64_t num_bytes);
/* The disk refused: nothing more is spilled. 1: it was this call that said so, 0: somebody had before. */
int shml_spill_freeze(shml_seg_t *seg);
/* Where a spilled chunk lies, for good; num_bytes is rounded up to 64. Takes no lock. NOTFOUND: it is not spilled. */
int shml_spill_find(const shml_seg_t *seg, uint32_t chunk, uint64_t *offset, uint64_t *num_bytes);

/* The futex word of the services: +1 when wants are posted, a chunk is fetched or free again, an order begins, moves or
 * ends, or something can be evicted that could not before. */
uint32_t shml_work_word(const shml_seg_t *seg);
void shml_work_wait(shml_seg_t *seg, uint32_t seen, uint32_t timeout_ms);
void shml_work_tell(shml_seg_t *seg);
/* Something moved (bytes came in, say): readers wait on. */
void shml_touch(shml_seg_t *seg);
/* Count bytes read from the source. */
void shml_count_fetched(shml_seg_t *seg, uint64_t num_bytes);
/* Count time spent making samples. */
void shml_count_decoding(shml_seg_t *seg, uint64_t ns);

/* The chunk of each id as a number, UINT32_MAX: none. */
int shml_row_chunks(shml_seg_t *seg, const uint64_t *ids, uint32_t n, uint32_t *chunks);

/* ---------------------------------------------------------------------------------------------------- *
 * Open sets (open.c): streams whose end is not known
 * ---------------------------------------------------------------------------------------------------- */
/* A row is a position of one order: SHML_POSITION_BITS of position, 6 bits of the order's slot, 16 of its generation.
 * Of an order that does not live it is MISSING and nobody makes it; at or beyond the order's num_positions it is at the
 * END. */
#define SHML_POSITION_BITS 40u
#define SHML_MAX_POSITION  ((UINT64_C(1) << SHML_POSITION_BITS) - 1) /* also num_positions where the end is not known */
static inline uint64_t shml_open_id(uint32_t slot, uint32_t gen, uint64_t position)
{
    return (uint64_t)(gen & 0xffffu) << (SHML_POSITION_BITS + 6) | (uint64_t)slot << SHML_POSITION_BITS | position;
}
/* Give chunk `number` (the rows from position number * rows_per_chunk on) of a living order its place, whose index is
 * *chunk, and claim it as shml_chunk_claim does. What had the place goes, with all that belongs to it: the raw and the
 * error record, rows that are suspect or aside. EXISTS: its raw record is there. STALE: no such living order, or
 * another client has the chunk, or reads the order's stream. NOTFOUND: it is done, broken, wholly consumed, or at the
 * end. FULL: the place is in use: by a chunk of this order that is not consumed (and be it still to be fetched), by who
 * fetches another, by a record of it that is pinned or being written. */
int shml_chunk_claim_open(shml_seg_t *seg, uint32_t slot, uint32_t gen, uint64_t number, uint32_t *chunk);
/* The id of the first row of the chunk that has this place now, UINT64_MAX: none. While the place's raw record is
 * pinned it stays so: pin, then compare. */
int shml_chunk_first(shml_seg_t *seg, uint32_t chunk, uint64_t *first_row);

/* ---------------------------------------------------------------------------------------------------- *
 * Orders (order.c, join.c): what will be read, as far as it is known
 * ---------------------------------------------------------------------------------------------------- */
typedef struct shml_order_info {
    uint64_t seed, epoch, num_positions;
    uint32_t kind, rank, world_size, drop_last; /* order.py's; the core does not look at them */
    /* Told by shml_orders: */
    uint32_t slot, gen;
    uint64_t low_water; /* the least mark of its living readers, or the last there was: positions below are consumed */
    uint32_t num_readers; /* of a joined order; 0: begun by shml_order_begin */
    uint32_t is_finished;
} shml_order_info_t;
/* Begin an order; it lives until shml_order_end, or until this client is gone. FULL: SHML_MAX_ORDERS live. Sets slot,
 * gen.
 */
int shml_order_begin(shml_seg_t *seg, shml_order_info_t *order);
int shml_order_end(shml_seg_t *seg, uint32_t slot, uint32_t gen); /* STALE: it has ended */

/* A joined order is one that `num_readers` clients share out: reader r reads the positions r, r + num_readers, ... */
typedef struct shml_join {
    uint64_t key; /* which order: the readers of one have the same */
    uint32_t reader, num_readers;
    int32_t owner; /* the client that it is read for: the order ends with it, and outlives the reader that came first */
    uint32_t owner_gen;
} shml_join_t;
/* Join the order with this key, num_readers and owner that lives and lacks this reader; if there is none, begin it with
 * order's seed, epoch, num_positions, kind. This client's mark is then `reader`: the first position that it has to
 * read. *order: as the order lives. Until all readers have joined its low-water mark is 0; it ends when the last that
 * has joined has left it or is gone. FULL: SHML_MAX_ORDERS live. INVAL: no such reader, the owner does not live, or
 * this client reads in it already (as another reader). */
int shml_order_join(shml_seg_t *seg, const shml_join_t *join, shml_order_info_t *order);
int shml_order_leave(shml_seg_t *seg, uint32_t slot,
                     uint32_t gen); /* STALE: this client does not read in it (any more) */
/* Services: the stream has ended after so many positions, or fewer if that was known. Wakes who waits for what is
 * beyond. STALE: no such joined order lives. */
int shml_order_finish(shml_seg_t *seg, uint32_t slot, uint32_t gen, uint64_t num_positions);
/* The living orders; at most `max`; returns how many. shml_num_orders: a guess without the mutex. */
int shml_orders(shml_seg_t *seg, shml_order_info_t *orders, uint32_t max);
uint32_t shml_num_orders(const shml_seg_t *seg);

typedef struct shml_region_stats {
    uint64_t bytes, backed_bytes, used_bytes; /* used: of records; in resident also the end of the highest, `head` */
    uint64_t head_bytes;
    uint32_t num_blocks, frozen; /* frozen: memory was refused, it will not grow beyond backed_bytes */
} shml_region_stats_t;

typedef struct shml_stats {
    shml_region_stats_t resident, transit, raw;
    uint64_t num_records;                      /* the rows of the source */
    uint64_t num_resident, most_resident;      /* samples that stay, those being written included; 0: any number may */
    uint64_t num_transit, most_transit;        /* the same of those that give way to others */
    uint64_t num_ready, num_errors, num_aside; /* samples there are (resident and transit); that cannot be made */
    uint64_t num_reserved, num_claimed, num_suspect;
    uint64_t num_commits;     /* of samples, ever: decodes */
    uint64_t commit_bytes;    /* of those */
    uint64_t num_reads;       /* samples handed out, ever */
    uint64_t num_guest_reads; /* of these to guests */
    uint64_t num_evicted;     /* samples evicted, ever */
    uint64_t num_starved;     /* urgent reservations that found no room at once, ever */
    uint64_t fetched_bytes;   /* from the source, ever */
    uint64_t decoding_ns;     /* that services have spent making samples, all together, ever */
    uint64_t num_fetched;     /* chunks fetched, ever */
    uint64_t progress;
    uint64_t spill_bytes, spill_used_bytes; /* of the file on disk; of it given out, with what is lost */
    uint32_t chunks_todo, chunks_claimed, chunks_done, chunks_broken;
    uint32_t num_owners, num_workers, num_services, num_reaped, num_services_lost, num_rebuilds;
    uint32_t num_orders;
    uint32_t spill_frozen; /* 1: the disk refused more */
    uint32_t state;        /* 1 ready, 3 poisoned */
} shml_stats_t;
int shml_get_stats(shml_seg_t *seg, shml_stats_t *stats);

/* Small texts that all clients share, each written once: the first `put` wins, later ones get EXISTS. */
enum shml_text {
    SHML_TEXT_SCHEMA = 0,
    SHML_TEXT_FATAL = 1,
    SHML_TEXT_MEMORY = 2,  /* a warning: memory was refused */
    SHML_TEXT_REFETCH = 3, /* a warning: chunks are fetched again and again */
    SHML_TEXT_BAD_ROW = 4, /* put by who warns of the set's first bad row, before */
    SHML_TEXT_SHOWN = 3,   /* + the place of MEMORY or REFETCH: put by who shows that warning, before */
    SHML_NUM_TEXTS = 7
};
#define SHML_TEXT_BYTES 32768u
int shml_text_put(shml_seg_t *seg, uint32_t which, const void *text, uint32_t num_bytes);
/* Returns its length (copied to `text`, SHML_TEXT_BYTES large), NOTFOUND if nobody put it yet. */
int shml_text_get(shml_seg_t *seg, uint32_t which, void *text);
/* One shared number: the epoch that `set_epoch` told. */
void shml_epoch_set(shml_seg_t *seg, uint64_t epoch);
uint64_t shml_epoch_get(const shml_seg_t *seg);

/* ---------------------------------------------------------------------------------------------------- *
 * Memory (memory.c)
 * ---------------------------------------------------------------------------------------------------- */
#define SHML_EXTENT_BYTES (UINT64_C(64) << 20)
#define SHML_HUGE_BYTES   (UINT64_C(2) << 20)

typedef struct shml_memory {
    uint64_t total_bytes;     /* the smallest limit: MemTotal or a memory cgroup's (v1 or v2, ancestors too) */
    uint64_t available_bytes; /* the least of MemAvailable and limit - usage (page cache counted as free) */
    char limited_by[128];     /* "MemAvailable" or the cgroup's path */
} shml_memory_t;
/* What this process may use. `root` is "" for the real /proc and /sys/fs/cgroup; tests give a folder. */
int shml_memory_read(const char *root, shml_memory_t *memory);

/* Back bytes [from, to) of `fd` with memory (fallocate), unless fewer than to - from + `spare_bytes` are available:
 * SHML_E_MEMORY, nothing changed. `at` is where byte `from` is mapped, or NULL: with it, huge pages are used where
 * whole 2 MiB pages allow and the kernel can (MADV_COLLAPSE, Linux 6.1); that it cannot is no error. */
int shml_back(int fd, uint64_t from, uint64_t to, void *at, uint64_t spare_bytes, const char *root,
              shml_memory_t *memory);

/* Back the next extent of a region so that byte `need_end` (from the ring's start) has memory. Any number of writers
 * may do so at once. SHML_E_MEMORY freezes that region at what it has; a frozen resident region is only full, since
 * what finds no room goes to transit. `fd` is the ring's. */
enum shml_region_index { SHML_RESIDENT = 0, SHML_TRANSIT = 1, SHML_RAW_REGION = 2, SHML_NUM_REGIONS = 3 };
int shml_ring_back(shml_seg_t *seg, int fd, uint32_t region, uint64_t need_end, shml_memory_t *memory);

/* ---------------------------------------------------------------------------------------------------- *
 * Mappings (map.c) and access faults (fault.c)
 * ---------------------------------------------------------------------------------------------------- */
/* Map `num_bytes` of `fd` shared, at an address that is a multiple of 2 MiB. The mapping is not inherited by
 * fork: a child finds a reservation without access there (and counts one more shml_forks). `name` appears
 * in the report of an access fault. */
void *shml_map(int fd, uint64_t num_bytes, int writable, const char *name);
void shml_unmap(void *at, uint64_t num_bytes);
uint64_t shml_forks(void); /* how many forks lie between this process and the one that loaded the core */
/* Report a write to a read-only mapping of ours (one write(2) to stderr: `advice`), then do what was to be done.
 * Once per process; call it after others have installed theirs. */
int shml_fault_report(const char *advice);

/* ---------------------------------------------------------------------------------------------------- *
 * Gather (gather.c): records -> batch
 * ---------------------------------------------------------------------------------------------------- */
typedef struct shml_record { /* the head of a record; `num_fields` shml_field_t follow */
    uint32_t num_fields;
    uint32_t source;
    uint64_t seal; /* 0, or a checksum of all other bytes (checksum.py), which the core does not look at */
} shml_record_t;

typedef struct shml_field {
    uint64_t offset; /* from the start of the record; 0: the sample lacks this field */
    uint64_t num_bytes;
    uint32_t dims[SHML_MAX_RANK]; /* unused ones are 0 */
} shml_field_t;

/* Copy field `index` of a record out, checked against the record's bounds. NOTFOUND: absent. CORRUPT. */
int shml_record_field(const uint8_t *record, uint64_t num_bytes, uint32_t index, shml_field_t *field);

typedef struct shml_measure { /* of one field over the samples of a batch that have it */
    uint32_t min_dims[SHML_MAX_RANK], max_dims[SHML_MAX_RANK];
    uint32_t num_absent;
} shml_measure_t;
/* Measure fields 0..num_fields-1 over n records. */
int shml_measure(const uint8_t *ring, uint64_t ring_bytes, const shml_ref_t *refs, uint32_t n, uint32_t num_fields,
                 shml_measure_t *measures);

enum shml_op {
    SHML_COPY = 1,      /* items as stored; dimension 0 may be shorter than `dims[0]`: the tail is `pad` */
    SHML_NORMALIZE = 2, /* stored uint8, out float32: value * scale[c] + shift[c], c the first dimension */
    SHML_MASK = 3,      /* out int64 [dims[0]]: 1 where the sample's first dimension has an item, else 0 */
    SHML_PRESENT = 4,   /* out uint8 (bool): 1 if the sample has the field */
    SHML_SOURCE = 5,    /* out int64: the record's source; `field` is ignored */
};
#define SHML_MAX_CHANNELS 16

typedef struct shml_gather {
    uint32_t op, field;
    uint32_t item_bytes;          /* of a stored item: 1, 2, 4, 8 or 16 */
    uint32_t rank;                /* of one sample's value; 0: a scalar */
    uint32_t dims[SHML_MAX_RANK]; /* of one sample's place in the batch */
    uint8_t pad[16];              /* one item of `out` (NORMALIZE: a float32); also fills an absent sample's place */
    uint32_t num_channels;        /* NORMALIZE: dims[0] */
    float scale[SHML_MAX_CHANNELS], shift[SHML_MAX_CHANNELS];
    uint8_t *out;       /* n places in a row (with `rows`: as many as the largest + 1) */
    uint64_t out_bytes; /* of `out`: the bound */
} shml_gather_t;
/* Fill every op's `out` from n records: record i goes to place rows[i] (NULL: i). Dimensions beyond the first must
 * agree with `dims` (CORRUPT says they do not), the first may be less for COPY and MASK. Takes no lock: the
 * records are resident or pinned. */
int shml_gather(const uint8_t *ring, uint64_t ring_bytes, const shml_ref_t *refs, uint32_t n, const uint32_t *rows,
                const shml_gather_t *ops, uint32_t num_ops);

/* ---------------------------------------------------------------------------------------------------- *
 * Batch ring (batch.c): slots in which workers build batches for one training process
 * ---------------------------------------------------------------------------------------------------- */
typedef struct shml_slot { /* a batch's place; crosses a worker's queue in the batch's stead */
    uint64_t offset, capacity;
    uint32_t index, gen;
} shml_slot_t;

typedef struct shml_bhandle { /* one process's handle; the caller fills all but `self` */
    shml_batch_t *batch;      /* the whole memfd, mapped read-write */
    uint64_t map_bytes;
    int fd; /* of that memfd; its first bytes are also the liveness bytes of the batch ring's clients */
    int32_t self;
    const shml_env_t *env;
} shml_bhandle_t;

typedef struct shml_batch_stats {
    uint64_t budget_bytes, backed_bytes;
    uint32_t num_slots, num_free, num_filling, num_sent, num_held;
    uint64_t num_acquired, num_refused;
} shml_batch_stats_t;

/* Format a batch ring in `at` (zeroed, map_bytes long, sparse): slots back at most budget_bytes at once. */
int shml_batch_format(void *at, uint64_t map_bytes, uint64_t budget_bytes);
int shml_batch_check(const void *at, uint64_t map_bytes);
/* Enter this process as the owner (SHML_OWNER) or one of its workers; sets h->self. */
int shml_batch_register(shml_bhandle_t *h, uint32_t role);
void shml_batch_unregister(shml_bhandle_t *h);
/* Worker: a slot of at least num_bytes, FREE -> FILLING(self): one of its own that is free, else, while it has fewer
 * than max_slots, one that a dead worker left, else a new one if the budget lasts (smaller free slots of
 * its own, or of the dead, are given back to make room). FULL: none; the batch goes inline. Never waits. */
int shml_slot_acquire(shml_bhandle_t *h, uint64_t num_bytes, uint32_t max_slots, shml_slot_t *slot);
int shml_slot_send(shml_bhandle_t *h, const shml_slot_t *slot); /* FILLING(self) -> SENT(self) */
int shml_slot_drop(shml_bhandle_t *h, const shml_slot_t *slot); /* FILLING(self) or SENT(self) -> FREE */
/* Owner: SENT(worker) -> HELD. STALE if it was given to another. *held: slots of that worker that the owner now
 * holds, this one included; *total: slots of that worker. */
int shml_slot_adopt(shml_bhandle_t *h, const shml_slot_t *slot, uint32_t *held, uint32_t *total);
int shml_slot_release(shml_bhandle_t *h, const shml_slot_t *slot); /* HELD -> FREE; lock-free, any thread */
/* Give back the memory of all slots that are free or of dead workers. Returns how many, or a status. */
int shml_batch_trim(shml_bhandle_t *h);
int shml_batch_get_stats(shml_bhandle_t *h, shml_batch_stats_t *stats);
/* Structural invariants, for tests: budget, no overlap of slots, states. */
int shml_batch_verify(shml_bhandle_t *h, const char **what);

/* ---------------------------------------------------------------------------------------------------- *
 * Failpoints (failpoint.h): only in builds with -DSHML_FAILPOINTS
 * ---------------------------------------------------------------------------------------------------- */
#endif
