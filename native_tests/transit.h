/* transit.h - a small segment with a resident, a transit and a raw region, and clients of one process that stand for
 * many processes.
 *
 * Each client has an shml_seg_t with pins of its own over the same memory. The environment (stage_env) stands in for
 * the kernel: it knows who is dead, whose clock it is, and fails the test where real life would hang: a mutex locked
 * twice, unlocked by who does not hold it, or left inconsistent. Record `id` is written with bytes that tell the id and
 * which writing of it this was. Include it after `#define _GNU_SOURCE`; for one test at a time. */
#ifndef SHML_TEST_TRANSIT_H
#define SHML_TEST_TRANSIT_H

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>

#include "layout.h"
#include "test.h"

#define NUM_RECORDS 64u
#define NUM_CHUNKS  16u
#define ROWS        4u /* of a chunk */
#define MAX_SEATS   320
#define KIB         UINT64_C(1024)

typedef struct shape {
    uint64_t resident_bytes, transit_bytes, raw_bytes;
    uint32_t unit_chunks; /* chunks of a unit */
} shape_t;
TEST_UNUSED static const shape_t small_shape = {4 * KIB, 8 * KIB, 4 * KIB, 1};
TEST_UNUSED static const shape_t transit_shape = {0, 8 * KIB, 4 * KIB, 1}; /* no chunk stays */

/* Not 0: the segments are open sets, and an order has so many places for chunks of ROWS rows. */
static uint32_t chunks_per_order;
/* Not 0: so many samples stay at most. */
static uint64_t most_resident;
/* Not 0: so many samples are in transit at most. */
static uint64_t most_transit;

typedef struct seat { /* of a pseudo-process */
    shml_seg_t seg;
    pthread_mutex_t pin_lock;
    uint16_t *pin_counts;
} seat_t;

typedef struct stage {
    shml_config_t config;
    shml_control_t *control;
    uint8_t *ring, *scratch;
    uint64_t control_bytes, ring_bytes;
    int ring_fd;
    seat_t seats[MAX_SEATS];
    int num_seats;
    int is_held;    /* the mutex */
    int owner_died; /* the next to lock it gets EOWNERDEAD */
    int is_repair;  /* the present holder got EOWNERDEAD */
    uint8_t is_dead[SHML_MAX_CLIENTS];
    uint64_t now_ns;
    uint32_t num_locks;
    void (*on_unlock)(void); /* what others do whenever the mutex is free; it ends itself by setting this to NULL */
} stage_t;
static stage_t stage = {.ring_fd = -1};

/* ------------------------------------------------ the kernel's part ------------------------------------ */
static int stage_lock(void *ctx, pthread_mutex_t *mutex, uint32_t timeout_ms)
{
    (void)ctx, (void)mutex, (void)timeout_ms;
    stage.num_locks++;
    if (stage.is_held)
        test_fail(__FILE__, __LINE__, "the mutex is locked twice: a deadlock");
    stage.is_held = 1;
    stage.is_repair = stage.owner_died;
    stage.owner_died = 0;
    return stage.is_repair ? EOWNERDEAD : 0;
}

static void stage_unlock(void *ctx, pthread_mutex_t *mutex, int repaired)
{
    (void)ctx, (void)mutex;
    if (!stage.is_held)
        test_fail(__FILE__, __LINE__, "a mutex is unlocked that is not held");
    if (stage.is_repair && !repaired)
        test_fail(__FILE__, __LINE__, "the mutex of a dead owner is unlocked inconsistent");
    stage.is_held = stage.is_repair = 0;
    if (stage.on_unlock != NULL)
        stage.on_unlock();
}

static int stage_alive(void *ctx, int lock_fd, uint32_t slot, const shml_client_t *client)
{
    (void)ctx, (void)lock_fd, (void)client;
    return !stage.is_dead[slot];
}

static int stage_hold(void *ctx, int lock_fd, uint32_t slot, int take)
{
    (void)ctx, (void)lock_fd;
    if (take)
        stage.is_dead[slot] = 0;
    return 0;
}

/* A second further each time: nothing is ever "less than 100 ms ago". */
static uint64_t stage_now_ns(void *ctx)
{
    (void)ctx;
    return stage.now_ns += UINT64_C(1000000000);
}
static void stage_wait(void *ctx, uint32_t *word, uint32_t seen, uint32_t timeout_ms)
{
    (void)ctx, (void)word, (void)seen, (void)timeout_ms;
}
static void stage_wake(void *ctx, uint32_t *word) { (void)ctx, (void)word; }
static int32_t stage_pid(void *ctx)
{
    (void)ctx;
    return 4711;
}
static uint64_t stage_starttime(void *ctx)
{
    (void)ctx;
    return 1;
}

static const shml_env_t stage_env = {
    .lock = stage_lock,
    .unlock = stage_unlock,
    .alive = stage_alive,
    .hold = stage_hold,
    .now_ns = stage_now_ns,
    .wait = stage_wait,
    .wake = stage_wake,
    .pid = stage_pid,
    .starttime = stage_starttime,
};

/* ------------------------------------------------ segment and clients ---------------------------------- */
static shml_region_t *region(uint32_t index) { return &stage.control->regions[index]; }

static void clear_stage(void)
{
    if (stage.control != NULL)
        munmap(stage.control, stage.control_bytes);
    if (stage.ring != NULL)
        munmap(stage.ring, stage.ring_bytes);
    if (stage.ring_fd >= 0)
        close(stage.ring_fd);
    free(stage.scratch);
    for (int i = 0; i < stage.num_seats; i++)
        free(stage.seats[i].pin_counts);
    memset(&stage, 0, sizeof stage);
    stage.ring_fd = -1;
}

/* A fresh segment without clients, of which no byte is backed. */
static void new_bare_stage(shape_t shape)
{
    static const uint8_t boot_id[16] = "a test's boot id";
    uint64_t first_rows[NUM_CHUNKS];
    uint32_t num_rows[NUM_CHUNKS], units[NUM_CHUNKS];
    clear_stage();
    stage.config = (shml_config_t){.resident_bytes = shape.resident_bytes,
                                   .transit_bytes = shape.transit_bytes,
                                   .raw_bytes = shape.raw_bytes,
                                   .most_resident = most_resident,
                                   .most_transit = most_transit,
                                   .num_records = NUM_RECORDS,
                                   .num_chunks = NUM_CHUNKS,
                                   .pid_namespace = 4026531836};
    if (chunks_per_order > 0) {
        stage.config.rows_per_chunk = ROWS;
        stage.config.num_chunks = SHML_MAX_ORDERS * chunks_per_order;
    }
    memcpy(stage.config.boot_id, boot_id, sizeof boot_id);
    stage.control_bytes = shml_control_bytes(&stage.config);
    CHECK(stage.control_bytes > 0);
    stage.ring_bytes = shape.resident_bytes + shape.transit_bytes + shape.raw_bytes;
    stage.control = mmap(NULL, stage.control_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(stage.control != MAP_FAILED);
    stage.ring_fd = memfd_create("ring", MFD_CLOEXEC);
    CHECK(stage.ring_fd >= 0 && ftruncate(stage.ring_fd, (off_t)stage.ring_bytes) == 0);
    stage.ring = mmap(NULL, stage.ring_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, stage.ring_fd, 0);
    CHECK(stage.ring != MAP_FAILED);
    stage.scratch = malloc(stage.control_bytes);
    for (uint32_t i = 0; i < NUM_CHUNKS; i++)
        first_rows[i] = i * ROWS, num_rows[i] = ROWS, units[i] = i - i % shape.unit_chunks;
    CHECK_EQ(shml_control_format(stage.control, stage.control_bytes, &stage.config, first_rows, num_rows, units),
             SHML_OK);
}

/* The same, with memory everywhere. */
TEST_UNUSED static void new_stage(shape_t shape)
{
    new_bare_stage(shape);
    for (uint32_t i = 0; i < SHML_NUM_REGIONS; i++)
        region(i)->backed_end = region(i)->end;
}

/* A process that is no client yet. */
static shml_seg_t *new_seat(void)
{
    CHECK(stage.num_seats < MAX_SEATS);
    seat_t *seat = &stage.seats[stage.num_seats++];
    seat->pin_counts = calloc(stage.control->num_descs, sizeof *seat->pin_counts);
    pthread_mutex_init(&seat->pin_lock, NULL);
    seat->seg = (shml_seg_t){.control = stage.control,
                             .ring = stage.ring,
                             .ring_bytes = stage.ring_bytes,
                             .lock_fd = -1,
                             .pin_counts = seat->pin_counts,
                             .pin_lock = &seat->pin_lock,
                             .env = &stage_env};
    seat->seg.self = -1;
    return &seat->seg;
}

static shml_seg_t *enter_under(uint32_t role, const shml_seg_t *owner)
{
    shml_seg_t *seg = new_seat();
    int32_t slot = owner != NULL ? owner->self : -1;
    CHECK_EQ(shml_client_register(seg, role, slot, shml_client_gen(seg, slot)), SHML_OK);
    return seg;
}
TEST_UNUSED static shml_seg_t *enter(uint32_t role) { return enter_under(role, NULL); }

/* `seg` is killed, and `by` cleans up after it. */
TEST_UNUSED static void bury(shml_seg_t *by, const shml_seg_t *seg)
{
    stage.is_dead[seg->self] = 1;
    CHECK_EQ(shml_reap(by, 1), 1);
}

/* Whether a living client has read in it; else its low-water mark is not derived. */
static int has_readers(uint32_t order)
{
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++)
        if (shml_marks(stage.control, order)[slot] != 0)
            return 1;
    return 0;
}

/* Somebody died while it held the mutex, in the middle of a change, and nothing that layout.h calls derived is right: the
 * next to lock it builds all of that again. */
TEST_UNUSED static void break_mutex(void)
{
    shml_control_t *c = stage.control;
    for (uint32_t i = 0; i < SHML_NUM_REGIONS; i++) {
        shml_region_t *r = region(i);
        r->head = r->used_bytes = 64;
        r->num_blocks = r->first = r->cursor = r->last = 3;
    }
    for (uint32_t i = 0; i < c->desc_end && i < c->num_descs; i++)
        shml_descs(c)[i].next = shml_descs(c)[i].after = i + 1;
    for (uint32_t i = 0; i < c->num_buckets; i++)
        shml_buckets(c)[i] = i % 2;
    for (uint32_t i = 0; i < SHML_MAX_CLIENTS; i++)
        shml_clients(c)[i].num_working = 7;
    for (uint32_t i = 0; i < c->num_chunks; i++) {
        shml_chunk_t *chunk = &shml_chunks(c)[i];
        chunk->num_final = chunk->num_stored = 1;
        chunk->resident_bytes = 64;
    }
    for (uint32_t i = 0; i < SHML_MAX_ORDERS; i++)
        if (has_readers(i))
            shml_order_table(c)[i].low_water = UINT64_MAX;
    c->num_ready = c->num_errors = c->num_reserved = c->num_claimed = c->num_suspect = c->num_aside = 9;
    c->chunks_todo = c->chunks_claimed = c->chunks_done = c->chunks_broken = 9;
    c->free_list = c->hole_list = 1;
    c->promised_rows = 12345;
    c->num_resident = c->num_stored = c->num_transit = 77;
    c->num_orders = 5;
    c->dirty = 1;
    stage.owner_died = 1;
}

TEST_UNUSED static void check_stage(shml_seg_t *seg)
{
    const char *what = "";
    int rc = shml_check(seg, stage.scratch, &what);
    if (rc != SHML_OK)
        test_fail(__FILE__, __LINE__, "shml_check: %d %s", rc, what);
}

TEST_UNUSED static shml_stats_t stats_of(shml_seg_t *seg)
{
    shml_stats_t stats;
    CHECK_EQ(shml_get_stats(seg, &stats), SHML_OK);
    return stats;
}

/* ------------------------------------------------ records ---------------------------------------------- */
static const shml_stamp_t no_stamp = {.order = SHML_NO_ORDER};

/* Byte `i` of the `version`th writing of `id`. */
static uint8_t pattern(uint64_t id, uint32_t version, uint64_t i)
{
    return (uint8_t)(id * 29 + version * 7 + i / SHML_ALIGN + 1);
}

static void fill(const shml_ticket_t *ticket, uint64_t id, uint32_t version)
{
    CHECK(ticket->num_bytes > 0 && ticket->offset <= stage.ring_bytes &&
          ticket->num_bytes <= stage.ring_bytes - ticket->offset);
    for (uint64_t i = 0; i < ticket->num_bytes; i++)
        stage.ring[ticket->offset + i] = pattern(id, version, i);
}

static void check_bytes(const shml_ref_t *ref, uint64_t id, uint32_t version)
{
    CHECK(ref->num_bytes > 0 && ref->offset <= stage.ring_bytes && ref->num_bytes <= stage.ring_bytes - ref->offset);
    for (uint64_t i = 0; i < ref->num_bytes; i++)
        if (stage.ring[ref->offset + i] != pattern(id, version, i))
            test_fail(__FILE__, __LINE__, "byte %llu of record %llu is not what was written", (unsigned long long)i,
                      (unsigned long long)id);
}

TEST_UNUSED static shml_ticket_t reserve_for(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, shml_stamp_t stamp)
{
    shml_ticket_t ticket;
    int rc = shml_reserve(seg, id, num_bytes, &stamp, 0, &ticket);
    if (rc != SHML_OK)
        test_fail(__FILE__, __LINE__, "reserving %llu bytes for %llu: %d", (unsigned long long)num_bytes,
                  (unsigned long long)id, rc);
    fill(&ticket, id, 0);
    return ticket;
}
TEST_UNUSED static shml_ticket_t reserve(shml_seg_t *seg, uint64_t id, uint64_t num_bytes)
{
    return reserve_for(seg, id, num_bytes, no_stamp);
}
TEST_UNUSED static int try_reserve(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, int urgent)
{
    shml_ticket_t ticket;
    return shml_reserve(seg, id, num_bytes, &no_stamp, urgent, &ticket);
}

/* Write a record; returns where it lies in its region. */
TEST_UNUSED static uint64_t put_for(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, shml_stamp_t stamp)
{
    shml_ticket_t ticket = reserve_for(seg, id, num_bytes, stamp);
    CHECK_EQ(shml_commit(seg, &ticket, SHML_REF_READY), SHML_OK);
    for (uint32_t i = 0; i < SHML_NUM_REGIONS; i++)
        if (ticket.offset >= region(i)->begin && ticket.offset < region(i)->end)
            return ticket.offset - region(i)->begin;
    test_fail(__FILE__, __LINE__, "record %llu is in no region", (unsigned long long)id);
}
TEST_UNUSED static uint64_t put(shml_seg_t *seg, uint64_t id, uint64_t num_bytes)
{
    return put_for(seg, id, num_bytes, no_stamp);
}

/* Fill transit with records `first`, `first` + 1, ... of `num_bytes`; returns how many. */
TEST_UNUSED static uint32_t fill_transit(shml_seg_t *seg, uint64_t first, uint64_t num_bytes)
{
    uint32_t n = (uint32_t)(stage.config.transit_bytes / num_bytes);
    for (uint32_t i = 0; i < n; i++)
        CHECK_EQ(put(seg, first + i, num_bytes), i * num_bytes);
    return n;
}

static uint8_t row_of(shml_seg_t *seg, uint64_t id)
{
    uint8_t row;
    CHECK_EQ(shml_look(seg, &id, 1, NULL, &row), SHML_OK);
    return row;
}
TEST_UNUSED static int is_in_transit(shml_seg_t *seg, uint64_t id) { return row_of(seg, id) == SHML_ROW_TRANSIT; }

/* Bit i: record first + i is in transit. */
TEST_UNUSED static uint32_t in_transit(shml_seg_t *seg, uint64_t first, uint32_t n)
{
    uint32_t bits = 0;
    for (uint32_t i = 0; i < n; i++)
        bits |= (uint32_t)is_in_transit(seg, first + i) << i;
    return bits;
}

static uint32_t get(shml_seg_t *seg, const uint64_t *ids, uint32_t n, int flags, shml_ref_t *refs)
{
    shml_ref_t none[64];
    shml_found_t found;
    CHECK(refs != NULL || n <= 64);
    CHECK_EQ(shml_get_many(seg, ids, n, flags, NULL, refs != NULL ? refs : none, &found), SHML_OK);
    return found.num_missing;
}

/* One that is there, whose pin the caller has if it is not resident. */
TEST_UNUSED static shml_ref_t look(shml_seg_t *seg, uint64_t id)
{
    shml_ref_t ref;
    CHECK_EQ(get(seg, &id, 1, 0, &ref), 0);
    return ref;
}
TEST_UNUSED static shml_ref_t pin(shml_seg_t *seg, uint64_t id)
{
    shml_ref_t ref = look(seg, id);
    CHECK_EQ(ref.status, SHML_REF_READY);
    CHECK_EQ(ref.chunk, 1);
    check_bytes(&ref, id, 0);
    return ref;
}
TEST_UNUSED static void unpin(shml_seg_t *seg, const shml_ref_t *ref) { CHECK_EQ(shml_unpin(seg, ref, 1), SHML_OK); }

TEST_UNUSED static void withdraw(shml_seg_t *seg) { (void)get(seg, NULL, 0, SHML_GET_POST, NULL); }

/* ------------------------------------------------ orders and claims ------------------------------------ */
TEST_UNUSED static shml_order_info_t begin_order(shml_seg_t *seg, uint64_t num_positions)
{
    shml_order_info_t order = {.seed = 1, .num_positions = num_positions, .world_size = 1};
    CHECK_EQ(shml_order_begin(seg, &order), SHML_OK);
    return order;
}

TEST_UNUSED static shml_stamp_t until(const shml_order_info_t *order, uint64_t position)
{
    return (shml_stamp_t){.order = order->slot, .gen = order->gen, .until = position};
}

/* `seg` has read up to `end`: its look-up of `id`, which is there, is complete. */
TEST_UNUSED static void read_to(shml_seg_t *seg, const shml_order_info_t *order, uint64_t id, uint64_t end)
{
    shml_place_t place = {.order = order->slot, .gen = order->gen, .begin = end > 0 ? end - 1 : 0, .end = end};
    shml_ref_t ref;
    shml_found_t found;
    CHECK_EQ(shml_get_many(seg, &id, 1, 0, &place, &ref, &found), SHML_OK);
    CHECK_EQ(found.num_missing, 0);
    CHECK_EQ(shml_unpin(seg, &ref, 1), SHML_OK);
}

TEST_UNUSED static uint64_t low_water(shml_seg_t *seg, const shml_order_info_t *order)
{
    shml_order_info_t orders[SHML_MAX_ORDERS];
    int n = shml_orders(seg, orders, SHML_MAX_ORDERS);
    for (int i = 0; i < n; i++)
        if (orders[i].slot == order->slot && orders[i].gen == order->gen)
            return orders[i].low_water;
    test_fail(__FILE__, __LINE__, "the order does not live");
}

TEST_UNUSED static int claim_row(shml_seg_t *seg, uint64_t id)
{
    uint8_t got = 0xff;
    CHECK_EQ(shml_claim_rows(seg, &id, 1, &got), SHML_OK);
    CHECK(got <= 1);
    return got;
}

TEST_UNUSED static uint8_t chunk_state(shml_seg_t *seg, uint32_t chunk)
{
    uint8_t state;
    CHECK_EQ(shml_chunk_look(seg, &chunk, 1, &state), SHML_OK);
    return state;
}
#endif
