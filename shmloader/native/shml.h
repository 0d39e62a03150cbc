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
 * Threads: every function may be called from any thread of an attached process, but a client has one want-list: only one
 * thread of a process may wait for samples at a time.
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
    /* This process's client slot, -1: not registered. Changed under the mutex only, since other threads may be in a
     * call when one unregisters: they get SHML_E_LEFT. */
    _Atomic int32_t self;
    const shml_env_t *env;
} shml_seg_t;

typedef struct shml_config {
    uint64_t ring_bytes;     /* multiple of 4096 */
    uint64_t resident_bytes; /* <= ring_bytes; the rest is transit */
    uint64_t num_records;    /* most records there can be at once; ids below this never collide in the index */
    uint32_t num_chunks;
    uint32_t is_sequential; /* chunks can be had in order only, by one client at a time */
    uint8_t uuid[16];
    uint8_t boot_id[16];
    uint64_t pid_namespace; /* inode of /proc/self/ns/pid */
} shml_config_t;

/* Bytes of control memory that `config` needs; the pages are touched as they are used. 0: config is bad. */
uint64_t shml_control_bytes(const shml_config_t *config);

/* Make a segment in `control` (zeroed, shml_control_bytes long). Chunks are given as arrays of
 * config->num_chunks first rows (ascending, contiguous) and row counts. The magic is stored last, so
 * whoever attaches early gets SHML_E_LAYOUT. */
int shml_control_format(void *control, uint64_t bytes, const shml_config_t *config, const uint64_t *first_rows,
                        const uint32_t *num_rows);

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

/* Enter this process: takes a slot and its byte, sets seg->self. `owner` is the slot of a worker's owner
 * (its generation `owner_gen`), else -1. SHML_E_CLIENTS when all slots are taken by living processes. */
int shml_client_register(shml_seg_t *seg, uint32_t role, int32_t owner, uint32_t owner_gen);
void shml_client_unregister(shml_seg_t *seg);
uint32_t shml_client_gen(const shml_seg_t *seg, int32_t slot);

/* Clean up after dead clients: frees what they had reserved, gives their chunks to others, drops their wants.
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

enum shml_ref_status {
    SHML_REF_READY = 0,
    SHML_REF_ERROR = 1,   /* ready, but the record is the JSON of why there is no sample */
    SHML_REF_MISSING = 2, /* not there yet */
    SHML_REF_BROKEN = 3,  /* will not come: its chunk was set aside or could not be read */
};

typedef struct shml_ref { /* where a record lies; valid while it is resident or pinned */
    uint64_t offset, num_bytes;
    uint32_t desc, gen;
    uint32_t status; /* enum shml_ref_status */
    uint32_t chunk;  /* of a record that is not there */
} shml_ref_t;

/* Ids from here up are not samples: SHML_CHUNK_ERROR | chunk is the JSON of why a chunk is broken. */
#define SHML_CHUNK_ERROR (UINT64_C(1) << 63)

/* Make room for record `id`. Errors: EXISTS, FULL (the resident part), TOOBIG, EXTEND (call
 * shml_ring_back, then again). The bytes at ring + ticket->offset are the caller's to write until
 * shml_commit or shml_abort; they are not zeroed. */
int shml_reserve(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, shml_ticket_t *ticket);
/* Publish: readers see all that was written before. status: SHML_REF_READY or SHML_REF_ERROR. STALE if the
 * reservation was taken away (only from the dead). */
int shml_commit(shml_seg_t *seg, const shml_ticket_t *ticket, uint32_t status);
int shml_abort(shml_seg_t *seg, const shml_ticket_t *ticket);

/* Look up `n` ids in one critical section. With `post`, what is missing becomes this client's want-list (else
 * the list is left alone; an empty one is posted when nothing is missing). *num_missing counts MISSING refs.
 * Protocol: seen = shml_wake_word(seg); shml_get_many(...); if missing: shml_wait(seg, seen, ms), again. */
int shml_get_many(shml_seg_t *seg, const uint64_t *ids, uint32_t n, int post, shml_ref_t *refs, uint32_t *num_missing);
uint32_t shml_wake_word(const shml_seg_t *seg);
/* Sleep until a commit met the last of this client's wants, a chunk that it waits for broke, or at most
 * min(timeout_ms, SHML_TICK_MS). */
void shml_wait(shml_seg_t *seg, uint32_t seen, uint32_t timeout_ms);

/* Which ids in [first, first + n) are ready or in error: bit i of `bits` ((n + 7) / 8 bytes, zeroed here). */
int shml_have(shml_seg_t *seg, uint64_t first, uint32_t n, uint8_t *bits);
/* The ids in [first, first + n) that some client wants, at most `max`, unsorted; returns how many. */
int shml_wanted(shml_seg_t *seg, uint64_t first, uint32_t n, uint64_t *ids, uint32_t max);
/* Count one more read of each sample and give the count before: the "epoch" of a transform's seed. */
int shml_count_reads(shml_seg_t *seg, const shml_ref_t *refs, uint32_t n, uint32_t *reads);

/* ---------------------------------------------------------------------------------------------------- *
 * Chunks (chunk.c): who reads what
 * ---------------------------------------------------------------------------------------------------- */
/* A chunk whose readers died this many times is set aside (DESIGN: a task that kills three prefetchers). */
#define SHML_MAX_ATTEMPTS 3

/* Take the unread chunk with most waiting rows, else the first unread one. NOTFOUND: there is none to take
 * now; wait on shml_work_word. For services. */
int shml_chunk_claim(shml_seg_t *seg, uint32_t *chunk);
/* Every row of a claimed chunk is committed (or in error). */
int shml_chunk_done(shml_seg_t *seg, uint32_t chunk);
/* It cannot be read; the JSON of the reason is record SHML_CHUNK_ERROR | chunk, if there was room. */
int shml_chunk_broken(shml_seg_t *seg, uint32_t chunk);
uint32_t shml_work_word(const shml_seg_t *seg);
void shml_work_wait(shml_seg_t *seg, uint32_t seen, uint32_t timeout_ms);
/* Something moved (bytes came in, say): readers wait on. */
void shml_touch(shml_seg_t *seg);

typedef struct shml_stats {
    uint64_t ring_bytes, resident_bytes, backed_bytes, used_bytes;
    uint64_t head_bytes;  /* end of the highest record */
    uint64_t num_records; /* most there can be: the rows of the source */
    uint64_t num_ready, num_errors, num_reserved, num_commits;
    uint64_t progress;
    uint32_t chunks_todo, chunks_claimed, chunks_done, chunks_broken;
    uint32_t num_owners, num_workers, num_services, num_reaped, num_services_lost, num_rebuilds;
    uint32_t state;  /* 1 ready, 3 poisoned */
    uint32_t frozen; /* the ring will not grow beyond backed_bytes: memory was refused */
} shml_stats_t;
int shml_get_stats(shml_seg_t *seg, shml_stats_t *stats);

/* Small texts that all clients share, each written once: the first `put` wins, later ones get EXISTS. */
enum shml_text { SHML_TEXT_SCHEMA = 0, SHML_TEXT_FATAL = 1, SHML_NUM_TEXTS = 2 };
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

/* Back the ring's next extent so that byte `need_end` has memory. Any number of writers may do so at once.
 * SHML_E_MEMORY freezes the ring at what it has. `fd` is the ring's. */
int shml_ring_back(shml_seg_t *seg, int fd, uint64_t need_end, shml_memory_t *memory);

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
    uint64_t reserved;
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
