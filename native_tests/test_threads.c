/* Threads that stand for processes over one segment and one batch ring: each with a handle, a slot and pins of its own,
 * they do at random whatever clients do. What it is for is ThreadSanitizer (make tsan), which sees each access to
 * memory that nothing orders; built without it, it is a short stress. The environment is the real one but for who lives:
 * a thread cannot be killed, so one that "dies" takes no further step with that handle, and says so.
 *
 * One race is meant: a guest copies a record that may be written anew meanwhile, and asks afterwards whether its copy is
 * whole (guest.c). That copy is made here, by copy_as_guest, which the sanitizer does not look into; all that surrounds
 * it, the check among it, it does. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/mman.h>

#include "batch.h"
#include "layout.h"
#include "test.h"

#if defined(NUM_STEPS) /* said by who builds it */
#elif defined(__SANITIZE_THREAD__)
#define NUM_STEPS 2500 /* of a thread; some seconds */
#else
#define NUM_STEPS 5000
#endif
#define NUM_RECORDS 96u
#define ROWS        6u /* of a chunk */
#define NUM_CHUNKS  (NUM_RECORDS / ROWS)
#define BATCH_MAP   (UINT64_C(64) << 20)
#define MAIL_SLOTS  4

static shml_control_t *control;
static uint8_t *ring;
static uint64_t control_bytes, ring_bytes;
static int ring_fd;
static shml_env_t env, batch_env; /* of the segment: is_dead tells; of the batch ring: all live */
static _Atomic int is_dead[SHML_MAX_CLIENTS];

/* ThreadSanitizer does not know pthread_mutex_clocklock, which the real one waits with. */
static int env_lock(void *ctx, pthread_mutex_t *mutex, uint32_t timeout_ms)
{
    (void)ctx, (void)timeout_ms;
    return pthread_mutex_lock(mutex);
}
static int env_alive(void *ctx, int lock_fd, uint32_t slot, const shml_client_t *client)
{
    (void)ctx, (void)lock_fd, (void)client;
    return !atomic_load_explicit(&is_dead[slot], memory_order_acquire);
}
static int env_hold(void *ctx, int lock_fd, uint32_t slot, int take)
{
    (void)ctx, (void)lock_fd;
    if (take)
        atomic_store_explicit(&is_dead[slot], 0, memory_order_relaxed);
    return 0;
}
static int batch_alive(void *ctx, int lock_fd, uint32_t slot, const shml_client_t *client)
{
    (void)ctx, (void)lock_fd, (void)slot, (void)client;
    return 1;
}
static int batch_hold(void *ctx, int lock_fd, uint32_t slot, int take)
{
    (void)ctx, (void)lock_fd, (void)slot, (void)take;
    return 0;
}

typedef struct process {
    shml_seg_t seg;
    pthread_mutex_t pin_lock;
    uint64_t random;
    shml_order_info_t order; /* that it has begun */
    int has_order;
} process_t;

static uint32_t draw(process_t *p, uint32_t n) { return (uint32_t)(test_random(&p->random) >> 33) % n; }

static void enter(process_t *p, uint32_t role)
{
    p->seg = (shml_seg_t){.control = control, .ring = ring, .ring_bytes = ring_bytes, .lock_fd = -1, .env = &env};
    p->seg.self = -1;
    p->has_order = 0;
    pthread_mutex_init(&p->pin_lock, NULL);
    p->seg.pin_lock = &p->pin_lock;
    p->seg.pin_counts = calloc(control->num_descs, sizeof *p->seg.pin_counts);
    CHECK(p->seg.pin_counts != NULL);
    if (role != 0)
        CHECK_EQ(shml_client_register(&p->seg, role, -1, 0), SHML_OK);
}
static void leave(process_t *p)
{
    shml_client_unregister(&p->seg);
    free(p->seg.pin_counts);
}
static void die(process_t *p)
{
    atomic_store_explicit(&is_dead[p->seg.self], 1, memory_order_release);
    free(p->seg.pin_counts);
}

/* ------------------------------------------------ records ---------------------------------------------- */
static uint8_t byte_of(uint64_t id) { return (uint8_t)(id * 7 + 3); }
static uint64_t bytes_of(uint64_t id) { return 64 * (1 + id % 5); }

static void check_bytes(const uint8_t *bytes, const shml_ref_t *ref, uint64_t id)
{
    for (uint64_t i = 0; i < ref->num_bytes; i++)
        CHECK_EQ(bytes[i], byte_of(id));
}

/* Write it, or part of it; who is to die stops there. 0: there was no room, or it is there. */
static int write_some(process_t *p, uint64_t id, int urgent, const shml_stamp_t *stamp, shml_ticket_t *ticket)
{
    int rc = shml_reserve(&p->seg, id, bytes_of(id), stamp, urgent, ticket);
    CHECK(rc == SHML_OK || rc == SHML_E_FULL || rc == SHML_E_EXISTS || rc == SHML_E_MEMORY);
    if (rc == SHML_OK)
        memset(ring + ticket->offset, byte_of(id), ticket->num_bytes);
    return rc == SHML_OK;
}
static void put(process_t *p, uint64_t id, int urgent, const shml_stamp_t *stamp)
{
    shml_ticket_t ticket;
    if (!write_some(p, id, urgent, stamp, &ticket))
        return;
    if (draw(p, 10) == 0)
        CHECK_EQ(shml_abort(&p->seg, &ticket), SHML_OK);
    else
        CHECK_EQ(shml_commit(&p->seg, &ticket, draw(p, 20) == 0 ? SHML_REF_ERROR : SHML_REF_READY), SHML_OK);
}

/* Pin what there is, read it, let it go. */
static void read_some(process_t *p, uint64_t kind, uint32_t most, int flags, const shml_place_t *place)
{
    uint64_t ids[8];
    shml_ref_t refs[8];
    shml_found_t found;
    uint32_t n = 1 + draw(p, 8), seen = shml_wake_word(&p->seg);
    for (uint32_t i = 0; i < n; i++)
        ids[i] = kind | draw(p, most);
    CHECK_EQ(shml_get_many(&p->seg, ids, n, flags, place, refs, &found), SHML_OK);
    if (found.num_missing == 0 || (flags & SHML_GET_TAKE) != 0) {
        for (uint32_t i = 0; i < n; i++)
            if (refs[i].status <= SHML_REF_ERROR)
                check_bytes(ring + refs[i].offset, &refs[i], ids[i] & 0xff);
        if (refs[0].status <= SHML_REF_ERROR && refs[0].chunk == 1) {
            CHECK_EQ(shml_pin_again(&p->seg, &refs[0]), SHML_OK);
            CHECK_EQ(shml_unpin(&p->seg, refs, 1), SHML_OK);
        }
        CHECK_EQ(shml_unpin(&p->seg, refs, n), SHML_OK);
    } else if (flags & SHML_GET_POST)
        shml_wait(&p->seg, seen, 1);
}

/* ------------------------------------------------ services --------------------------------------------- */
static void decode(process_t *p)
{
    uint64_t ids[4], first = draw(p, NUM_RECORDS);
    uint8_t got[4];
    uint32_t n = 1 + draw(p, 4);
    for (uint32_t i = 0; i < n; i++)
        ids[i] = (first + i) % NUM_RECORDS;
    CHECK_EQ(shml_claim_rows(&p->seg, ids, n, got), SHML_OK);
    shml_stamp_t stamp = {.order = p->has_order ? p->order.slot : SHML_NO_ORDER, .gen = p->order.gen, .until = first};
    for (uint32_t i = 0; i < n; i++)
        if (got[i] && draw(p, 5) != 0)
            put(p, ids[i], (int)draw(p, 2), &stamp);
    CHECK_EQ(shml_unclaim_rows(&p->seg, ids, n), SHML_OK);
}

static void fetch(process_t *p)
{
    uint32_t chunk = draw(p, NUM_CHUNKS);
    uint64_t offset, num_bytes;
    int outcome = SHML_FETCH_OK;
    if (shml_chunk_claim(&p->seg, chunk) != SHML_OK)
        return;
    shml_ticket_t ticket;
    if (draw(p, 6) == 0 && shml_spill_reserve(&p->seg, chunk, 100, &offset) == SHML_OK) {
        CHECK_EQ(shml_spill_commit(&p->seg, chunk, offset, 100), SHML_OK);
        CHECK_EQ(shml_spill_find(&p->seg, chunk, &offset, &num_bytes), SHML_OK);
    } else if (write_some(p, SHML_RAW | chunk, (int)draw(p, 2), NULL, &ticket)) {
        memset(ring + ticket.offset, byte_of(chunk), ticket.num_bytes);
        CHECK_EQ(shml_commit(&p->seg, &ticket, SHML_REF_READY), SHML_OK);
    } else
        outcome = SHML_FETCH_GIVEN_UP;
    CHECK_EQ(shml_chunk_end(&p->seg, chunk, outcome), SHML_OK);
}

static void look_around(process_t *p)
{
    uint64_t ids[64], offset, num_bytes;
    uint32_t chunks[NUM_CHUNKS], counts[NUM_CHUNKS], n = 0;
    uint8_t states[NUM_CHUNKS], rows[4];
    shml_order_info_t orders[SHML_MAX_ORDERS];
    shml_stats_t stats;
    for (; n < NUM_CHUNKS; n++)
        chunks[n] = n;
    CHECK_EQ(shml_chunk_look(&p->seg, chunks, n, states), SHML_OK);
    CHECK_EQ(shml_look(&p->seg, (uint64_t[]){1, 20, 40, 60}, 4, NULL, rows), SHML_OK);
    CHECK(shml_wanted(&p->seg, ids, 64) >= 0);
    CHECK(shml_chunks_wanted(&p->seg, chunks, counts, NUM_CHUNKS) >= 0);
    CHECK(shml_orders(&p->seg, orders, SHML_MAX_ORDERS) >= 0);
    CHECK_EQ(shml_get_stats(&p->seg, &stats), SHML_OK);
    (void)shml_num_orders(&p->seg);
    (void)shml_count_clients(&p->seg, SHML_WORKER);
    (void)shml_pin_quota(&p->seg);
    (void)shml_client_gen(&p->seg, (int32_t)draw(p, 8));
    (void)shml_spill_find(&p->seg, draw(p, NUM_CHUNKS), &offset, &num_bytes);
    shml_touch(&p->seg);
    shml_work_wait(&p->seg, shml_work_word(&p->seg), 1);
}

static void order(process_t *p)
{
    if (p->has_order)
        CHECK_EQ(shml_order_end(&p->seg, p->order.slot, p->order.gen), SHML_OK);
    else {
        p->order = (shml_order_info_t){.seed = 1, .num_positions = NUM_RECORDS, .world_size = 1};
        CHECK_EQ(shml_order_begin(&p->seg, &p->order), SHML_OK);
    }
    p->has_order = !p->has_order;
}

/* In the middle of everything: a row claimed, a record reserved, a chunk being fetched, pins. */
static void die_and_come_again(process_t *p)
{
    uint64_t ids[2] = {draw(p, NUM_RECORDS), draw(p, NUM_RECORDS)};
    uint8_t got[2];
    shml_ref_t refs[2];
    shml_found_t found;
    shml_ticket_t ticket;
    CHECK_EQ(shml_claim_rows(&p->seg, ids, 1, got), SHML_OK);
    (void)shml_chunk_claim(&p->seg, draw(p, NUM_CHUNKS));
    if (got[0])
        (void)write_some(p, ids[0], 1, NULL, &ticket);
    CHECK_EQ(shml_get_many(&p->seg, ids, 2, SHML_GET_POST | SHML_GET_TAKE, NULL, refs, &found), SHML_OK);
    die(p);
    enter(p, SHML_SERVICE);
}

static void serve(process_t *p)
{
    switch (draw(p, 12)) {
    case 0: fetch(p); break;
    case 1: look_around(p); break;
    case 2: order(p); break;
    case 3: CHECK(shml_reap(&p->seg, draw(p, 4) == 0) >= 0); break;
    case 4: read_some(p, SHML_RAW, NUM_CHUNKS, SHML_GET_TAKE, NULL); break;
    case 5:
        if (draw(p, 8) == 0)
            die_and_come_again(p);
        break;
    case 6: (void)shml_raw_release(&p->seg, ring_fd); break;
    default: decode(p);
    }
}

/* ------------------------------------------------ readers ---------------------------------------------- */
static void read_as_client(process_t *p)
{
    static const int flags[] = {0, 0, SHML_GET_POST, SHML_GET_POST | SHML_GET_TAKE};
    uint32_t reads[2];
    shml_order_info_t orders[SHML_MAX_ORDERS];
    int num_orders = draw(p, 4) == 0 ? shml_orders(&p->seg, orders, SHML_MAX_ORDERS) : 0;
    shml_place_t place = {0};
    if (num_orders > 0)
        place = (shml_place_t){.order = orders[0].slot, .gen = orders[0].gen, .begin = draw(p, 50), .end = 60};
    read_some(p, 0, NUM_RECORDS, flags[draw(p, 4)], num_orders > 0 ? &place : NULL);
    CHECK_EQ(shml_count_reads(&p->seg, (uint64_t[]){draw(p, NUM_RECORDS), 3}, 2, reads), SHML_OK);
    shml_epoch_set(&p->seg, shml_epoch_get(&p->seg) + 1);
    if (draw(p, 50) == 0) {
        leave(p);
        enter(p, SHML_WORKER);
    }
    CHECK(shml_reap(&p->seg, 0) >= 0);
}

/* The race that is meant. Byte by byte, since memcpy would be looked into. */
__attribute__((no_sanitize("thread"), noinline)) static void copy_as_guest(uint8_t *out, const uint8_t *in, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        ((volatile uint8_t *)out)[i] = ((const volatile uint8_t *)in)[i];
}

static void read_as_guest(process_t *p)
{
    static _Thread_local uint8_t copies[4][64 * 5];
    uint64_t ids[4];
    shml_ref_t refs[4];
    uint8_t valid[4];
    uint32_t num_missing, seen = shml_guest_word(&p->seg);
    for (int i = 0; i < 4; i++)
        ids[i] = draw(p, NUM_RECORDS);
    CHECK_EQ(shml_guest_get(&p->seg, ids, 4, refs, &num_missing), SHML_OK);
    for (int i = 0; i < 4; i++)
        if (refs[i].status <= SHML_REF_ERROR)
            copy_as_guest(copies[i], ring + refs[i].offset, refs[i].num_bytes);
    CHECK_EQ(shml_guest_check(&p->seg, refs, 4, valid), SHML_OK);
    for (int i = 0; i < 4; i++)
        if (valid[i])
            check_bytes(copies[i], &refs[i], ids[i]);
    if (num_missing > 0)
        shml_guest_wait(&p->seg, seen, 1);
}

/* ------------------------------------------------ the segment ------------------------------------------ */
typedef void (*step_t)(process_t *);
static const struct {
    uint32_t role;
    step_t step;
} cast[] = {{SHML_SERVICE, serve},         {SHML_SERVICE, serve},         {SHML_SERVICE, serve},
            {SHML_WORKER, read_as_client}, {SHML_WORKER, read_as_client}, {0, read_as_guest}};
#define CAST (sizeof cast / sizeof *cast)

static void *act(void *index)
{
    uintptr_t me = (uintptr_t)index;
    process_t p = {.random = 1000 + me};
    enter(&p, cast[me].role);
    for (int step = 0; step < NUM_STEPS; step++)
        cast[me].step(&p);
    leave(&p);
    return NULL;
}

static void run(void *(*body)(void *), size_t n)
{
    pthread_t threads[16];
    test_in_child = 1; /* a check that fails in a thread ends the program */
    for (size_t i = 0; i < n; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, body, (void *)i), 0);
    for (size_t i = 0; i < n; i++)
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
    test_in_child = 0;
}

static void new_segment(uint64_t most_resident, uint64_t most_transit)
{
    uint64_t first_rows[NUM_CHUNKS];
    uint32_t num_rows[NUM_CHUNKS], units[NUM_CHUNKS];
    shml_config_t config = {.resident_bytes = 4096,
                            .transit_bytes = 8192,
                            .raw_bytes = 4096,
                            .raw_budget_bytes = 2048,
                            .num_records = NUM_RECORDS,
                            .num_chunks = NUM_CHUNKS,
                            .most_resident = most_resident,
                            .most_transit = most_transit,
                            .spill_bytes = 1 << 20};
    env = shml_env_linux;
    env.lock = env_lock, env.alive = env_alive, env.hold = env_hold;
    control_bytes = shml_control_bytes(&config);
    control = mmap(NULL, control_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ring_bytes = config.resident_bytes + config.transit_bytes + config.raw_bytes;
    ring_fd = memfd_create("threads", MFD_CLOEXEC);
    CHECK(control != MAP_FAILED && ring_fd >= 0 && ftruncate(ring_fd, (off_t)ring_bytes) == 0);
    ring = mmap(NULL, ring_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring_fd, 0);
    CHECK(ring != MAP_FAILED);
    for (uint32_t i = 0; i < NUM_CHUNKS; i++)
        first_rows[i] = i * ROWS, num_rows[i] = ROWS, units[i] = i - i % 2;
    CHECK_EQ(shml_control_format(control, control_bytes, &config, first_rows, num_rows, units), SHML_OK);
    for (int i = 0; i < SHML_NUM_REGIONS; i++)
        control->regions[i].backed_end = control->regions[i].end;
}

static void clients_and_guests_share_a_segment_of(uint64_t most_resident, uint64_t most_transit)
{
    const char *what = "";
    new_segment(most_resident, most_transit);
    run(act, CAST);
    process_t last = {.random = 7};
    enter(&last, SHML_SERVICE);
    while (shml_reap(&last.seg, 1) > 0)
        ;
    shml_stats_t stats;
    CHECK_EQ(shml_get_stats(&last.seg, &stats), SHML_OK);
    CHECK(stats.num_commits > 0 && stats.num_evicted > 0 && stats.num_reaped > 0 && stats.num_guest_reads > 0);
    if (shml_check(&last.seg, NULL, &what) != SHML_OK)
        test_fail(__FILE__, __LINE__, "%s", what);
    for (uint64_t id = 0; id < NUM_RECORDS; id++)
        read_some(&last, 0, NUM_RECORDS, SHML_GET_TAKE, NULL);
    leave(&last);
    munmap(control, control_bytes);
    munmap(ring, ring_bytes);
    close(ring_fd);
}
static void clients_and_guests_share_a_segment(void) { clients_and_guests_share_a_segment_of(0, 0); }
static void they_do_where_few_samples_may_stay_or_pass(void) { clients_and_guests_share_a_segment_of(9, 12); }

/* ------------------------------------------------ batches ---------------------------------------------- */
/* A token is in the mail before its slot is filled: so nothing but the slot's own word orders the bytes. */
typedef struct mail {
    _Atomic int is_full;
    shml_slot_t slot;
    uint64_t num_bytes;
} mail_t;
static mail_t mails[2][MAIL_SLOTS];
static _Atomic int num_at_work;
static shml_batch_t *batch;
static int batch_fd;

static void *work(void *index)
{
    uintptr_t me = (uintptr_t)index;
    uint64_t random = 50 + me;
    shml_bhandle_t h = {batch, BATCH_MAP, batch_fd, -1, &batch_env};
    CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_OK);
    for (int step = 0; step < NUM_STEPS; step++) {
        mail_t *mail = &mails[me][test_random(&random) % MAIL_SLOTS];
        uint64_t num_bytes = 1 + test_random(&random) % 5000;
        shml_slot_t slot;
        if (atomic_load_explicit(&mail->is_full, memory_order_acquire) ||
            shml_slot_acquire(&h, num_bytes, 6, &slot) != SHML_OK)
            continue;
        int is_sent = test_random(&random) % 8 != 0;
        if (is_sent) {
            mail->slot = slot;
            mail->num_bytes = num_bytes;
            atomic_store_explicit(&mail->is_full, 1, memory_order_release);
        }
        memset((uint8_t *)batch + slot.offset, (int)slot.gen & 0xff, num_bytes);
        CHECK_EQ(is_sent ? shml_slot_send(&h, &slot) : shml_slot_drop(&h, &slot), SHML_OK);
    }
    atomic_fetch_sub(&num_at_work, 1);
    while (atomic_load(&num_at_work) > 0) /* what it sent is its own as long as it lives */
        sched_yield();
    return NULL;
}

static int take(shml_bhandle_t *h, mail_t *mail)
{
    uint32_t held, total;
    if (!atomic_load_explicit(&mail->is_full, memory_order_acquire))
        return 0;
    shml_slot_t slot = mail->slot;
    if (shml_slot_adopt(h, &slot, &held, &total) != SHML_OK)
        return 0; /* not sent yet */
    for (uint64_t i = 0; i < mail->num_bytes; i++)
        CHECK_EQ(((uint8_t *)batch)[slot.offset + i], (uint8_t)slot.gen);
    atomic_store_explicit(&mail->is_full, 0, memory_order_release);
    CHECK_EQ(shml_slot_release(h, &slot), SHML_OK);
    return 1;
}

static void *train(void *index)
{
    (void)index;
    shml_bhandle_t h = {batch, BATCH_MAP, batch_fd, -1, &batch_env};
    shml_batch_stats_t stats;
    uint64_t num_taken = 0, rounds = 0;
    CHECK_EQ(shml_batch_register(&h, SHML_OWNER), SHML_OK);
    do {
        for (int i = 0; i < 2 * MAIL_SLOTS; i++)
            num_taken += (uint64_t)take(&h, &mails[i / MAIL_SLOTS][i % MAIL_SLOTS]);
        if (rounds++ % 200 == 0)
            CHECK(shml_batch_get_stats(&h, &stats) == SHML_OK && shml_batch_trim(&h) >= 0);
    } while (atomic_load(&num_at_work) > 0);
    CHECK(num_taken > 0);
    return NULL;
}

static void *act_in_batch(void *index) { return (uintptr_t)index < 2 ? work(index) : train(index); }

static void workers_and_their_trainer_share_a_batch_ring(void)
{
    const char *what = "";
    batch_env = shml_env_linux;
    batch_env.lock = env_lock, batch_env.alive = batch_alive, batch_env.hold = batch_hold;
    batch_fd = memfd_create("threads", MFD_CLOEXEC);
    CHECK(batch_fd >= 0 && ftruncate(batch_fd, (off_t)BATCH_MAP) == 0);
    batch = mmap(NULL, BATCH_MAP, PROT_READ | PROT_WRITE, MAP_SHARED, batch_fd, 0);
    CHECK((void *)batch != MAP_FAILED);
    CHECK_EQ(shml_batch_format(batch, BATCH_MAP, UINT64_C(16) << 20), SHML_OK);
    atomic_store(&num_at_work, 2);
    run(act_in_batch, 3);
    shml_bhandle_t h = {batch, BATCH_MAP, batch_fd, -1, &batch_env};
    if (shml_batch_verify(&h, &what) != SHML_OK)
        test_fail(__FILE__, __LINE__, "%s", what);
    munmap(batch, BATCH_MAP);
    close(batch_fd);
}

TEST_MAIN(TEST(clients_and_guests_share_a_segment), TEST(they_do_where_few_samples_may_stay_or_pass),
          TEST(workers_and_their_trainer_share_a_batch_ring))
