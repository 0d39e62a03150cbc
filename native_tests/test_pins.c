/* Pins: what a look-up holds, how often, for whom, and until when. One process stands in for all. */
#define _GNU_SOURCE
#include <sched.h>

#include "transit.h"

static shml_seg_t *writer, *one, *two;

/* A service and two workers; transit has room for eight records of 1 KiB. */
static void new_pins(void)
{
    new_stage(transit_shape);
    writer = enter(SHML_SERVICE);
    one = enter(SHML_WORKER);
    two = enter(SHML_WORKER);
}

/* Nobody keeps anything: one record may take all of transit. Asked without changing anything if it may not. */
static int is_all_free(void)
{
    shml_ticket_t ticket;
    int rc = shml_reserve(writer, UINT64_C(1) << 40, 8 * KIB, &no_stamp, 1, &ticket);
    if (rc == SHML_OK)
        CHECK_EQ(shml_abort(writer, &ticket), SHML_OK);
    else
        CHECK_EQ(rc, SHML_E_FULL);
    return rc == SHML_OK;
}

/* ---------------------------------------------------------------------------------------------------- *
 * What a look-up pins
 * ---------------------------------------------------------------------------------------------------- */
/* A look-up that misses nothing pins what lies in transit, in one go. */
static void a_complete_look_up_pins_all_of_it(void)
{
    new_pins();
    for (uint64_t id = 0; id < 4; id++)
        (void)put(writer, id, KIB);
    shml_ref_t refs[4];
    CHECK_EQ(get(one, (uint64_t[]){3, 1, 0, 2}, 4, 0, refs), 0);
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(refs[i].status, SHML_REF_READY);
        CHECK_EQ(refs[i].chunk, 1);
        check_bytes(&refs[i], (uint64_t[]){3, 1, 0, 2}[i], 0);
    }
    CHECK_EQ(one->pinned_bytes, 4 * KIB);
    for (uint32_t i = 0; i < 4; i++) {
        CHECK(!is_all_free());
        CHECK_EQ(shml_unpin(one, &refs[i], 1), SHML_OK);
    }
    CHECK_EQ(one->pinned_bytes, 0);
    CHECK(is_all_free());
    check_stage(writer);
}

/* A look-up that misses one record holds none: nobody sleeps with pins. */
static void an_incomplete_look_up_pins_nothing(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    for (int flags = 0; flags <= SHML_GET_POST; flags += SHML_GET_POST) {
        shml_ref_t refs[2];
        CHECK_EQ(get(one, (uint64_t[]){0, 9}, 2, flags, refs), 1);
        CHECK_EQ(refs[0].status, SHML_REF_READY);
        CHECK(refs[0].chunk != 1);
        CHECK_EQ(refs[1].status, SHML_REF_MISSING);
        CHECK_EQ(refs[1].chunk, 2);
        CHECK_EQ(one->pinned_bytes, 0);
    }
    withdraw(one);
    CHECK(is_all_free());
    check_stage(writer);
}

/* With TAKE what is there is pinned, to be copied out, although something is missing. */
static void take_pins_what_is_there(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    (void)put(writer, 2, KIB);
    shml_ref_t refs[3];
    CHECK_EQ(get(one, (uint64_t[]){0, 9, 2}, 3, SHML_GET_POST | SHML_GET_TAKE, refs), 1);
    CHECK(refs[0].chunk == 1 && refs[2].chunk == 1);
    CHECK_EQ(refs[1].status, SHML_REF_MISSING);
    CHECK_EQ(one->pinned_bytes, 2 * KIB);
    withdraw(one); /* which gives no pins back */
    CHECK(!is_all_free());
    check_bytes(&refs[0], 0, 0);
    check_bytes(&refs[2], 2, 0);
    CHECK_EQ(shml_unpin(one, refs, 3), SHML_OK); /* passes over what is missing */
    CHECK_EQ(one->pinned_bytes, 0);
    CHECK(is_all_free());
    check_stage(writer);
}

/* TAKE still posts what is missing, and the reader is woken for it. */
static void take_waits_for_the_rest(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    shml_ref_t refs[2];
    CHECK_EQ(get(one, (uint64_t[]){0, 9}, 2, SHML_GET_POST | SHML_GET_TAKE, refs), 1);
    CHECK_EQ(shml_unpin(one, refs, 2), SHML_OK);
    uint64_t wanted;
    CHECK_EQ(shml_wanted(writer, &wanted, 1), 1);
    CHECK_EQ(wanted, 9);
    uint32_t seen = shml_wake_word(one);
    (void)put(writer, 9, KIB);
    CHECK(shml_wake_word(one) != seen);
}

/* Resident records stay anyway: they cost a reader neither a pin nor his quota. */
static void resident_records_need_no_pin(void)
{
    new_stage(small_shape);
    writer = enter(SHML_SERVICE), one = enter(SHML_WORKER);
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    (void)put(writer, 0, KIB);
    (void)put(writer, 40, KIB);
    CHECK_EQ(row_of(writer, 0), SHML_ROW_FINAL);
    shml_ref_t refs[2];
    CHECK_EQ(get(one, (uint64_t[]){0, 40}, 2, 0, refs), 0);
    CHECK_EQ(refs[0].chunk, 0);
    CHECK_EQ(refs[1].chunk, 1);
    CHECK_EQ(one->pinned_bytes, KIB);
    CHECK_EQ(shml_unpin(one, refs, 2), SHML_OK);
    CHECK_EQ(shml_unpin(one, refs, 1), SHML_OK); /* of the resident one alone: nothing to do, ever */
    CHECK_EQ(one->pinned_bytes, 0);
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Counts
 * ---------------------------------------------------------------------------------------------------- */
/* A record that was looked up three times is held until it was given back three times; its bytes count once. */
static void each_look_up_needs_its_own_unpin(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    shml_ref_t refs[3] = {pin(one, 0), pin(one, 0), pin(one, 0)};
    CHECK_EQ(one->pinned_bytes, KIB);
    for (int i = 0; i < 3; i++) {
        CHECK(!is_all_free());
        CHECK_EQ(one->pinned_bytes, KIB);
        unpin(one, &refs[i]);
    }
    CHECK_EQ(one->pinned_bytes, 0);
    CHECK(is_all_free());
    check_stage(writer);
}

/* An id that one look-up names twice is pinned twice. */
static void a_repeated_id_is_pinned_as_often(void)
{
    new_pins();
    (void)put(writer, 5, KIB);
    shml_ref_t refs[2];
    CHECK_EQ(get(one, (uint64_t[]){5, 5}, 2, 0, refs), 0);
    CHECK(refs[0].chunk == 1 && refs[1].chunk == 1);
    CHECK_EQ(one->pinned_bytes, KIB);
    unpin(one, &refs[0]);
    CHECK(!is_all_free());
    unpin(one, &refs[1]);
    CHECK(is_all_free());
}

/* A view of one record takes a pin of its own, which may outlive the look-up's. */
static void one_more_pin_outlives_the_first(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    shml_ref_t ref = pin(one, 0);
    CHECK_EQ(shml_pin_again(one, &ref), SHML_OK);
    unpin(one, &ref);
    CHECK(!is_all_free());
    CHECK_EQ(shml_pin_again(one, &ref), SHML_OK);
    unpin(one, &ref);
    unpin(one, &ref);
    CHECK(is_all_free());
    CHECK_EQ(one->pinned_bytes, 0);
}

/* More pins than a count can hold are refused; none of those that were had is lost. */
static void pins_are_refused_before_their_count_overflows(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    shml_ref_t ref = pin(one, 0);
    uint32_t n = 1;
    while (n < 70000 && shml_pin_again(one, &ref) == SHML_OK)
        n++;
    CHECK(!is_all_free());
    check_bytes(&ref, 0, 0);
    while (--n > 0)
        unpin(one, &ref);
    CHECK(!is_all_free());
    unpin(one, &ref);
    CHECK(is_all_free());
    check_stage(writer);
}

/* The same for look-ups: one that cannot be pinned is no success without a pin. */
static void look_ups_are_refused_before_their_count_overflows(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    shml_ref_t first = pin(one, 0), ref;
    shml_found_t found;
    uint32_t n = 1;
    for (; n < 70000 && shml_get_many(one, &(uint64_t){0}, 1, 0, NULL, &ref, &found) == SHML_OK; n++)
        CHECK_EQ(ref.chunk, 1);
    while (n-- > 0) {
        CHECK(n % 1000 != 0 || !is_all_free());
        unpin(one, &first);
    }
    CHECK(is_all_free());
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Several clients
 * ---------------------------------------------------------------------------------------------------- */
/* What one client gives back, another still holds. */
static void clients_pin_each_for_itself(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    shml_ref_t first = pin(one, 0), second = pin(two, 0);
    CHECK_EQ(first.offset, second.offset);
    unpin(one, &first);
    CHECK_EQ(one->pinned_bytes, 0);
    CHECK_EQ(two->pinned_bytes, KIB);
    CHECK(!is_all_free());
    unpin(two, &second);
    CHECK(is_all_free());
    check_stage(writer);
}

/* A client of any slot can pin: the mask has a bit for each. */
static void a_client_in_any_slot_pins(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    static shml_seg_t *clients[SHML_MAX_CLIENTS];
    static shml_ref_t refs[SHML_MAX_CLIENTS];
    uint32_t n = 0;
    for (; n < SHML_MAX_CLIENTS - 3; n++) {
        clients[n] = enter(SHML_OWNER);
        refs[n] = pin(clients[n], 0);
    }
    CHECK_EQ(clients[n - 1]->self, SHML_MAX_CLIENTS - 1);
    for (uint32_t i = 0; i < n; i++) {
        CHECK(!is_all_free());
        unpin(clients[(i * 101) % n], &refs[(i * 101) % n]); /* 253 is 11 * 23: all of them once */
    }
    CHECK(is_all_free());
    check_stage(writer);
}

/* Giving back takes no mutex: it may be held by somebody who is frozen. */
static void pins_are_given_back_without_the_mutex(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    shml_ref_t ref = pin(one, 0);
    CHECK_EQ(shml_pin_again(one, &ref), SHML_OK);
    uint32_t num_locks = stage.num_locks;
    stage.is_held = 1; /* a lock now would fail the test */
    unpin(one, &ref);
    unpin(one, &ref);
    stage.is_held = 0;
    CHECK_EQ(stage.num_locks, num_locks);
    CHECK(is_all_free());
}

/* The last pin that is given back tells the services, who may wait for the room. */
static void giving_the_last_pin_back_tells_the_services(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    shml_ref_t ref = pin(one, 0);
    CHECK(!is_all_free());
    uint32_t seen = shml_work_word(writer);
    unpin(one, &ref);
    CHECK(shml_work_word(writer) != seen);
}

/* An error's text is read like a sample, and held like one. */
static void errors_are_pinned_too(void)
{
    new_pins();
    shml_ticket_t ticket = reserve(writer, 0, KIB);
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_ERROR), SHML_OK);
    shml_ref_t ref = look(one, 0);
    CHECK_EQ(ref.status, SHML_REF_ERROR);
    CHECK_EQ(ref.chunk, 1);
    CHECK(!is_all_free());
    unpin(one, &ref);
    CHECK(is_all_free());
}

/* Rebuilding derived state keeps all pins: masks are truth. */
static void pins_outlive_a_repair(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    shml_ref_t ref = pin(one, 0);
    break_mutex();
    CHECK(!is_all_free());
    CHECK_EQ(stats_of(writer).num_rebuilds, 1);
    check_bytes(&ref, 0, 0);
    unpin(one, &ref);
    CHECK(is_all_free());
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Who dies, who leaves
 * ---------------------------------------------------------------------------------------------------- */
/* What a dead client had pinned, others may have once it is buried; until then it is kept. */
static void pins_of_the_dead_are_cleared(void)
{
    new_pins();
    (void)put(writer, 0, 2 * KIB);
    (void)put(writer, 1, 6 * KIB);
    (void)pin(one, 0);
    (void)pin(one, 0);
    shml_ref_t ref = pin(two, 1);
    stage.is_dead[one->self] = 1;
    CHECK_EQ(shml_reap(writer, 1), 1);
    CHECK(!is_all_free()); /* 1 is of the living */
    CHECK_EQ(put(writer, 20, 2 * KIB), 0);
    unpin(two, &ref);
    CHECK(is_all_free());
    check_stage(writer);
}

/* Who gets a dead client's slot inherits none of its pins. */
static void a_slot_is_given_away_without_pins(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    (void)pin(one, 0);
    int32_t slot = one->self;
    bury(writer, one);
    shml_seg_t *next = enter(SHML_WORKER);
    CHECK_EQ(next->self, slot);
    CHECK(is_all_free());
    (void)put(writer, 1, KIB);
    shml_ref_t ref = pin(next, 1);
    CHECK(!is_all_free());
    unpin(next, &ref);
    CHECK(is_all_free());
    check_stage(writer);
}

/* A process may leave while it still reads: its records stay, and nobody gets its slot, until its last pin is back. */
static void who_leaves_with_pins_keeps_its_slot(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    shml_ref_t ref = pin(one, 0);
    CHECK_EQ(shml_pin_again(one, &ref), SHML_OK);
    int32_t slot = one->self;
    uint32_t gen = shml_client_gen(writer, slot);
    shml_client_unregister(one);
    shml_ref_t other;
    shml_found_t found;
    CHECK_EQ(shml_get_many(one, &(uint64_t){0}, 1, 0, NULL, &other, &found), SHML_E_LEFT);
    for (int i = 0; i < 2; i++) {
        CHECK(!is_all_free());
        CHECK_EQ(shml_reap(writer, 1), 0);
        shml_seg_t *next = enter(SHML_WORKER);
        CHECK(next->self != slot);
        CHECK_EQ(shml_client_gen(writer, slot), gen);
        check_bytes(&ref, 0, 0);
        check_stage(writer);
        unpin(one, &ref);
    }
    CHECK_EQ(one->pinned_bytes, 0);
    CHECK(is_all_free());
    (void)shml_reap(writer, 1);
    shml_seg_t *next = enter(SHML_WORKER);
    CHECK_EQ(next->self, slot);
    check_stage(writer);
}

/* A process that left with pins and was killed then is buried like any other. */
static void who_left_with_pins_and_died_is_buried(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    (void)pin(one, 0);
    int32_t slot = one->self;
    shml_client_unregister(one);
    CHECK(!is_all_free());
    stage.is_dead[slot] = 1;
    CHECK_EQ(shml_reap(writer, 1), 1);
    CHECK(is_all_free());
    shml_seg_t *next = enter(SHML_WORKER);
    CHECK_EQ(next->self, slot);
    check_stage(writer);
}

/* Who left with pins may enter again, and has them still. */
static void who_left_with_pins_may_come_back(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    (void)put(writer, 1, KIB);
    shml_ref_t old = pin(one, 0);
    int32_t slot = one->self;
    shml_client_unregister(one);
    CHECK_EQ(shml_client_register(one, SHML_WORKER, -1, 0), SHML_OK);
    shml_ref_t new = pin(one, 1);
    CHECK_EQ(one->pinned_bytes, 2 * KIB);
    unpin(one, &new);
    CHECK(!is_all_free());
    unpin(one, &old);
    CHECK(is_all_free());
    (void)put(writer, 2, KIB);
    new = pin(one, 2); /* still a client */
    shml_seg_t *next = enter(SHML_WORKER);
    CHECK(next->self != one->self);
    CHECK(one->self == slot || next->self == slot); /* no slot is lost */
    unpin(one, &new);
    CHECK_EQ(shml_pin_quota(one), 8 * KIB / 2 / 3);
    check_stage(writer);
}

/* Leaving gives back everything but the pins: wants, marks and orders hold nothing any more. */
static void who_leaves_with_pins_wants_nothing(void)
{
    new_pins();
    (void)put(writer, 0, KIB);
    (void)put(writer, 1, KIB);
    shml_order_info_t order = begin_order(one, 10), other = begin_order(two, 10);
    read_to(one, &other, 0, 1);
    read_to(two, &other, 0, 7);
    shml_ref_t ref = pin(one, 0);
    CHECK_EQ(get(one, (uint64_t[]){1, 9}, 2, SHML_GET_POST, NULL), 1);
    shml_client_unregister(one);
    uint64_t wanted;
    CHECK_EQ(shml_wanted(writer, &wanted, 1), 0);
    CHECK_EQ(shml_order_end(two, order.slot, order.gen), SHML_E_STALE);
    CHECK_EQ(low_water(two, &other), 7);
    CHECK_EQ(put(writer, 20, 7 * KIB), KIB); /* over 1 */
    unpin(one, &ref);
    CHECK(is_all_free());
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Quota
 * ---------------------------------------------------------------------------------------------------- */
/* Half of transit may be pinned, shared by the owners and workers that live; services take no part. */
static void the_quota_is_shared_by_the_living(void)
{
    new_stage(transit_shape);
    writer = enter(SHML_SERVICE);
    one = enter(SHML_OWNER);
    CHECK_EQ(shml_pin_quota(one), 4 * KIB);
    two = enter_under(SHML_WORKER, one);
    CHECK_EQ(shml_pin_quota(one), 2 * KIB);
    CHECK_EQ(shml_pin_quota(two), 2 * KIB);
    shml_seg_t *three = enter_under(SHML_WORKER, one), *four = enter_under(SHML_WORKER, one);
    (void)enter(SHML_SERVICE);
    CHECK_EQ(shml_pin_quota(four), KIB);
    bury(one, three);
    bury(one, four);
    CHECK_EQ(shml_pin_quota(two), 2 * KIB);
    shml_client_unregister(two);
    CHECK_EQ(shml_pin_quota(one), 4 * KIB);
}

/* Who holds more than its share is told, by the look-up that exceeds it, and gets its pins all the same. */
static void who_exceeds_the_quota_is_told(void)
{
    new_pins(); /* two readers: 2 KiB each */
    for (uint64_t id = 0; id < 4; id++)
        (void)put(writer, id, KIB);
    shml_ref_t refs[4];
    shml_found_t found;
    const uint64_t ids[] = {0, 1, 2, 0};
    for (uint32_t i = 0; i < 4; i++) {
        test_note("look-up %u", i);
        CHECK_EQ(shml_get_many(one, &ids[i], 1, 0, NULL, &refs[i], &found), SHML_OK);
        CHECK_EQ(refs[i].chunk, 1);
        CHECK_EQ(found.over_quota, i >= 2);
    }
    CHECK_EQ(shml_unpin(one, refs, 4), SHML_OK);
    CHECK_EQ(shml_get_many(one, ids, 2, 0, NULL, refs, &found), SHML_OK);
    CHECK_EQ(found.over_quota, 0);
    CHECK_EQ(shml_unpin(one, refs, 2), SHML_OK);
    CHECK_EQ(shml_get_many(two, ids, 3, 0, NULL, refs, &found), SHML_OK);
    CHECK_EQ(found.over_quota, 1);
    CHECK_EQ(shml_unpin(two, refs, 3), SHML_OK);
    CHECK(is_all_free());
}

/* ---------------------------------------------------------------------------------------------------- *
 * Threads
 * ---------------------------------------------------------------------------------------------------- */
#define NUM_READERS 6u
#define NUM_WRITERS 2u

static shml_env_t thread_env; /* the kernel's mutex, and nobody dies */
static _Atomic uint32_t num_writing, num_torn, num_errors, num_read;
static uint64_t num_thread_ids, thread_blocks; /* ids, and the largest record in blocks of 64 bytes */
static uint32_t thread_writes;                 /* of each writer */

static int always_alive(void *ctx, int lock_fd, uint32_t slot, const shml_client_t *client)
{
    (void)ctx, (void)lock_fd, (void)slot, (void)client;
    return 1;
}
static int no_byte(void *ctx, int lock_fd, uint32_t slot, int take)
{
    (void)ctx, (void)lock_fd, (void)slot, (void)take;
    return 0;
}

/* As env_linux.c does, but by a call that TSan knows. */
static int lock_in_thread(void *ctx, pthread_mutex_t *mutex, uint32_t timeout_ms)
{
    (void)ctx, (void)timeout_ms;
    return pthread_mutex_lock(mutex);
}

/* Every byte is of one and the same writing of `id`, now and while it is pinned. */
static int is_whole(const shml_ref_t *ref, uint64_t id)
{
    const uint8_t *bytes = stage.ring + ref->offset;
    uint8_t first = bytes[0];
    if (bytes[1] != (uint8_t)id)
        return 0;
    for (uint64_t i = 0; i < ref->num_bytes; i += 2)
        if (bytes[i] != first || bytes[i + 1] != (uint8_t)id)
            return 0;
    return 1;
}

typedef struct thread_part {
    shml_seg_t *seg;
    uint64_t seed;
} thread_part_t;

/* Look up some that are there, hold them, give them back one by one. */
static void *read_in_thread(void *arg)
{
    shml_seg_t *seg = ((thread_part_t *)arg)->seg;
    uint64_t seed = ((thread_part_t *)arg)->seed;
    for (int round = 0; num_writing > 0; round++) {
        uint64_t ids[4];
        shml_ref_t refs[4];
        shml_found_t found;
        uint32_t n = 1 + (uint32_t)(test_random(&seed) % 4);
        for (uint32_t i = 0; i < n; i++)
            ids[i] = test_random(&seed) % num_thread_ids;
        if (shml_get_many(seg, ids, n, SHML_GET_TAKE, NULL, refs, &found) != SHML_OK) {
            num_errors++;
            continue;
        }
        for (uint32_t i = 0; i < n; i++) {
            if (refs[i].status != SHML_REF_READY || refs[i].chunk != 1)
                continue;
            num_read++;
            num_torn += !is_whole(&refs[i], ids[i]);
            num_errors += round % 3 == 0 && shml_pin_again(seg, &refs[i]) != SHML_OK;
        }
        if (round % 8 == 0)
            (void)sched_yield(); /* with pins: others evict around them */
        for (uint32_t i = 0; i < n; i++) {
            if (refs[i].status != SHML_REF_READY || refs[i].chunk != 1)
                continue;
            num_torn += !is_whole(&refs[i], ids[i]);
            for (int pins = 0; pins < (round % 3 == 0 ? 2 : 1); pins++)
                num_errors += shml_unpin(seg, &refs[i], 1) != SHML_OK;
        }
        (void)sched_yield(); /* a writer that finds no room yields, too: else it would hardly come to run again */
    }
    return NULL;
}

/* Write records over whatever is not pinned. */
static void *write_in_thread(void *arg)
{
    shml_seg_t *seg = ((thread_part_t *)arg)->seg;
    uint64_t seed = ((thread_part_t *)arg)->seed;
    for (uint32_t written = 0; written < thread_writes && num_errors == 0;) {
        uint64_t id = test_random(&seed) % num_thread_ids;
        shml_ticket_t ticket;
        int rc = shml_reserve(seg, id, 64 * (1 + test_random(&seed) % thread_blocks), &no_stamp, 1, &ticket);
        if (rc != SHML_OK) {
            num_errors += rc != SHML_E_FULL && rc != SHML_E_EXISTS;
            (void)sched_yield();
            continue;
        }
        for (uint64_t i = 0; i < ticket.num_bytes; i += 2) {
            stage.ring[ticket.offset + i] = (uint8_t)written;
            stage.ring[ticket.offset + i + 1] = (uint8_t)id;
        }
        num_errors += shml_commit(seg, &ticket, SHML_REF_READY) != SHML_OK;
        written++;
    }
    num_writing--;
    return NULL;
}

/* Threads of two clients read, and two services write, until the writers are through. */
static void run_threads(void)
{
    shml_seg_t *second = enter(SHML_SERVICE);
    thread_env = shml_env_linux;
    thread_env.alive = always_alive;
    thread_env.hold = no_byte;
    thread_env.lock = lock_in_thread;
    writer->env = second->env = one->env = two->env = &thread_env;
    num_torn = num_errors = num_read = 0;
    num_writing = NUM_WRITERS;
    pthread_t threads[NUM_READERS + NUM_WRITERS];
    thread_part_t parts[NUM_READERS + NUM_WRITERS];
    for (uint32_t i = 0; i < NUM_READERS + NUM_WRITERS; i++) {
        shml_seg_t *seg = i < NUM_READERS ? (i % 2 == 0 ? one : two) : i % 2 == 0 ? writer : second;
        parts[i] = (thread_part_t){seg, i};
        CHECK_EQ(pthread_create(&threads[i], NULL, i < NUM_READERS ? read_in_thread : write_in_thread, &parts[i]), 0);
    }
    for (uint32_t i = 0; i < NUM_READERS + NUM_WRITERS; i++)
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
    CHECK_EQ(num_torn, 0);
    CHECK_EQ(num_errors, 0);
    CHECK(num_read > 0);
    CHECK_EQ(one->pinned_bytes + two->pinned_bytes, 0);
    for (uint32_t i = 0; i < stage.control->num_descs; i++)
        CHECK_EQ(one->pin_counts[i] | two->pin_counts[i], 0);
    CHECK(stats_of(writer).num_evicted > 0);
    check_stage(writer);
}

/* Threads pin and give back the same records while services write over all that is free: nothing is torn, and in the
 * end nothing is held. */
static void threads_pin_the_same_records(void)
{
    new_pins();
    /* So many that never all of them fit: else each is there, and nobody has anything to write any more. */
    num_thread_ids = 48, thread_blocks = 16, thread_writes = 10000;
    run_threads();
    CHECK(is_all_free());
    check_stage(writer);
}

/* The same in a long list, where searches give the mutex away in between. */
static void threads_pin_while_long_searches_go_on(void)
{
    new_stage((shape_t){0, 192 * KIB, 4 * KIB, 1});
    writer = enter(SHML_SERVICE), one = enter(SHML_WORKER), two = enter(SHML_WORKER);
    for (uint64_t id = 0; id < 3072; id++) { /* all kept, but for the last few */
        shml_ticket_t ticket = reserve(writer, 100000 + id, 64);
        if (id >= 3000)
            CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
    }
    num_thread_ids = 50, thread_blocks = 4, thread_writes = 1000;
    run_threads();
}

TEST_MAIN(TEST(a_complete_look_up_pins_all_of_it), TEST(an_incomplete_look_up_pins_nothing),
          TEST(take_pins_what_is_there), TEST(take_waits_for_the_rest), TEST(resident_records_need_no_pin),
          TEST(each_look_up_needs_its_own_unpin), TEST(a_repeated_id_is_pinned_as_often),
          TEST(one_more_pin_outlives_the_first), TEST(pins_are_refused_before_their_count_overflows),
          TEST(look_ups_are_refused_before_their_count_overflows), TEST(clients_pin_each_for_itself),
          TEST(a_client_in_any_slot_pins), TEST(pins_are_given_back_without_the_mutex),
          TEST(giving_the_last_pin_back_tells_the_services), TEST(errors_are_pinned_too), TEST(pins_outlive_a_repair),
          TEST(pins_of_the_dead_are_cleared), TEST(a_slot_is_given_away_without_pins),
          TEST(who_leaves_with_pins_keeps_its_slot), TEST(who_left_with_pins_and_died_is_buried),
          TEST(who_left_with_pins_may_come_back), TEST(who_leaves_with_pins_wants_nothing),
          TEST(the_quota_is_shared_by_the_living), TEST(who_exceeds_the_quota_is_told),
          TEST(threads_pin_the_same_records), TEST(threads_pin_while_long_searches_go_on))
