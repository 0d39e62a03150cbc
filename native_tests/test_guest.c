/* Guests: what they copy is whole or known not to be, what they want is made, and they leave nothing. One process
 * stands in for all, but for the last test. */
#define _GNU_SOURCE
#include <sched.h>

#include "transit.h"

static shml_seg_t *writer, *reader, *guest;

static void new_cast(shape_t shape)
{
    new_stage(shape);
    writer = enter(SHML_SERVICE);
    reader = enter(SHML_WORKER);
    guest = new_seat();
}
static void new_transit(void) { new_cast(transit_shape); }

static uint32_t ask(const uint64_t *ids, uint32_t n, shml_ref_t *refs)
{
    uint32_t num_missing;
    CHECK_EQ(shml_guest_get(guest, ids, n, refs, &num_missing), SHML_OK);
    return num_missing;
}
static shml_ref_t ask_one(uint64_t id)
{
    shml_ref_t ref;
    CHECK_EQ(ask(&id, 1, &ref), ref.status == SHML_REF_MISSING);
    return ref;
}
static int is_valid(const shml_ref_t *ref)
{
    uint8_t valid = 7;
    CHECK_EQ(shml_guest_check(guest, ref, 1, &valid), SHML_OK);
    CHECK(valid <= 1);
    return valid;
}

static int is_wanted(uint64_t id)
{
    uint64_t ids[SHML_MAX_WANTS];
    int n = shml_wanted(writer, ids, SHML_MAX_WANTS), found = 0;
    CHECK(n >= 0);
    for (int i = 0; i < n; i++)
        found += ids[i] == id;
    CHECK(found <= 1);
    return found;
}
static uint32_t num_wanted(void)
{
    uint64_t ids[SHML_MAX_WANTS];
    int n = shml_wanted(writer, ids, SHML_MAX_WANTS);
    CHECK(n >= 0);
    return (uint32_t)n;
}

/* ---------------------------------------------------------------------------------------------------- *
 * Looking up
 * ---------------------------------------------------------------------------------------------------- */
static void a_guest_finds_what_is_there_and_pins_nothing(void)
{
    new_transit();
    (void)put(writer, 3, KIB);
    shml_ref_t ref = ask_one(3);
    CHECK(ref.status == SHML_REF_READY && ref.chunk == 1);
    check_bytes(&ref, 3, 0);
    CHECK_EQ(is_valid(&ref), 1);
    CHECK_EQ(guest->pinned_bytes, 0);
    for (uint64_t id = 10; id < 20; id++)
        (void)put(writer, id, KIB); /* nothing keeps 3 */
    CHECK_EQ(is_in_transit(writer, 3), 0);
    check_stage(writer);
}

static void what_is_resident_is_told_apart_and_stays_valid(void)
{
    new_cast(small_shape);
    CHECK_EQ(shml_chunk_claim(writer, 2), SHML_OK);
    shml_ticket_t ticket = reserve(writer, 8, 512);
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
    shml_ref_t ref = ask_one(8);
    CHECK(ref.status == SHML_REF_READY && ref.chunk == 0);
    for (uint64_t id = 12; id < 40; id++)
        (void)put(writer, id, KIB);
    CHECK_EQ(is_valid(&ref), 1);
    check_bytes(&ref, 8, 0);
}

static void what_gave_way_is_not_valid(void)
{
    new_transit();
    uint32_t n = fill_transit(writer, 0, KIB);
    shml_ref_t ref = ask_one(0);
    CHECK_EQ(is_valid(&ref), 1);
    (void)put(writer, n, KIB); /* where 0 was */
    CHECK_EQ(is_valid(&ref), 0);
}

static void what_gave_way_is_not_valid_while_its_bytes_are_written(void)
{
    new_transit();
    uint32_t n = fill_transit(writer, 0, KIB);
    shml_ref_t ref = ask_one(0);
    (void)reserve(writer, n, KIB);
    CHECK_EQ(is_valid(&ref), 0);
}

/* The descriptor and the place may be the same as before. */
static void what_was_made_again_meanwhile_is_not_valid(void)
{
    new_transit();
    uint32_t n = fill_transit(writer, 0, KIB);
    shml_ref_t ref = ask_one(0);
    (void)put(writer, n, KIB);
    for (uint32_t i = 1; i < n; i++)
        (void)put(writer, n + i, KIB);
    (void)put(writer, 0, KIB);
    shml_ref_t again = ask_one(0);
    CHECK(again.status == SHML_REF_READY);
    CHECK_EQ(is_valid(&ref), 0);
    CHECK_EQ(is_valid(&again), 1);
}

/* Its descriptor is another row's, which has no bytes and no new generation yet. */
static void what_gave_way_is_not_valid_when_its_descriptor_is_a_claim(void)
{
    new_transit();
    shml_ref_t refs[4];
    const uint64_t ids[] = {0, 1, 2, 3};
    for (uint64_t id = 0; id < 4; id++)
        (void)put(writer, id, 2 * KIB);
    CHECK_EQ(ask(ids, 4, refs), 0);
    (void)put(writer, 10, 8 * KIB); /* all four are gone: three descriptors are free */
    for (uint64_t id = 20; id < 23; id++)
        CHECK_EQ(claim_row(writer, id), 1);
    for (int i = 0; i < 4; i++)
        CHECK_EQ(is_valid(&refs[i]), 0);
}

static void what_is_not_there_is_not_valid(void)
{
    new_transit();
    shml_ref_t ref = ask_one(5);
    CHECK_EQ(ref.status, SHML_REF_MISSING);
    CHECK_EQ(is_valid(&ref), 0);
    (void)put(writer, 5, KIB);
    CHECK_EQ(is_valid(&ref), 0);
}

static void a_ref_that_no_look_up_gave_is_refused(void)
{
    new_transit();
    shml_ref_t ref = {.desc = stage.control->num_descs};
    uint8_t valid;
    CHECK_EQ(shml_guest_check(guest, &ref, 1, &valid), SHML_E_INVAL);
}

static void reads_of_guests_are_counted_once(void)
{
    new_cast(small_shape);
    CHECK_EQ(shml_chunk_claim(writer, 2), SHML_OK);
    shml_ticket_t ticket = reserve(writer, 8, 512);
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
    (void)put(writer, 40, KIB);
    shml_ref_t refs[3];
    uint8_t valid[3];
    CHECK_EQ(ask((uint64_t[]){8, 40, 41}, 3, refs), 1);
    CHECK_EQ(shml_guest_check(guest, &refs[1], 2, valid), SHML_OK);
    shml_stats_t stats = stats_of(guest);
    CHECK(stats.num_guest_reads == 2 && stats.num_reads == 2);
    (void)get(reader, (uint64_t[]){8}, 1, 0, refs);
    stats = stats_of(guest);
    CHECK(stats.num_guest_reads == 2 && stats.num_reads == 3);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Wants and wakes
 * ---------------------------------------------------------------------------------------------------- */
static void what_a_guest_misses_is_wanted_once_until_it_is_there(void)
{
    new_transit();
    shml_ref_t refs[3];
    uint32_t word = shml_guest_word(guest), work = shml_work_word(writer);
    CHECK_EQ(ask((uint64_t[]){5, 6, 5}, 3, refs), 3);
    CHECK(shml_work_word(writer) != work);
    work = shml_work_word(writer);
    CHECK_EQ(ask((uint64_t[]){6, 5}, 2, refs), 2);
    CHECK_EQ(shml_work_word(writer), work); /* nothing new */
    CHECK(is_wanted(5) && is_wanted(6) && num_wanted() == 2);
    uint32_t chunks[4], counts[4];
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, 4), 1);
    CHECK(chunks[0] == 1 && counts[0] == 2);
    CHECK_EQ(shml_guest_word(guest), word);
    (void)put(writer, 7, KIB);
    CHECK_EQ(shml_guest_word(guest), word);
    (void)put(writer, 5, KIB);
    CHECK(shml_guest_word(guest) != word);
    CHECK(!is_wanted(5) && is_wanted(6));
    check_stage(writer);
}

static void a_client_s_wants_and_a_guest_s_are_met_together(void)
{
    new_transit();
    (void)get(reader, (uint64_t[]){5}, 1, SHML_GET_POST, NULL);
    uint32_t wake = shml_wake_word(reader), word = shml_guest_word(guest);
    CHECK_EQ(ask_one(5).status, SHML_REF_MISSING);
    (void)put(writer, 5, KIB);
    CHECK(shml_wake_word(reader) != wake && shml_guest_word(guest) != word);
    CHECK_EQ(num_wanted(), 0);
}

static void what_is_no_row_is_not_wanted(void)
{
    new_transit();
    shml_ref_t refs[3];
    CHECK_EQ(ask((uint64_t[]){SHML_RAW | 1, SHML_CHUNK_ERROR | 1, NUM_RECORDS}, 3, refs), 3);
    CHECK_EQ(stage.control->guest_next, 0);
    check_stage(writer);
}

static void the_oldest_wants_give_way_when_the_list_is_full(void)
{
    new_transit();
    shml_control_t *c = stage.control;
    (void)ask_one(1);
    (void)ask_one(2);
    while (c->guest_next < SHML_MAX_WANTS) /* of rows that were met */
        c->guest_wants[c->guest_next++] = SHML_NO_WANT;
    CHECK(is_wanted(1) && is_wanted(2));
    (void)ask_one(3);
    CHECK(!is_wanted(1) && is_wanted(2) && is_wanted(3));
    (void)ask_one(1); /* asks again at its tick */
    CHECK(is_wanted(1) && !is_wanted(2) && is_wanted(3));
    check_stage(writer);
}

static void rows_of_a_broken_chunk_are_wanted_no_more_and_their_guests_woken(void)
{
    new_transit();
    shml_ref_t refs[3];
    CHECK_EQ(ask((uint64_t[]){7, 8, 12}, 3, refs), 3);
    uint32_t word = shml_guest_word(guest);
    CHECK_EQ(shml_chunk_claim(writer, 2), SHML_OK);
    CHECK_EQ(shml_chunk_end(writer, 2, SHML_FETCH_BROKEN), SHML_OK);
    CHECK(shml_guest_word(guest) != word);
    CHECK(is_wanted(7) && !is_wanted(8) && is_wanted(12));
    CHECK_EQ(ask_one(8).status, SHML_REF_BROKEN);
    CHECK_EQ(num_wanted(), 2);
    for (uint32_t i = 0; i < 3; i++)
        CHECK(stage.control->guest_wants[i] != 8);
}

static void a_row_set_aside_is_wanted_no_more_and_its_guests_woken(void)
{
    new_transit();
    (void)ask_one(8);
    uint32_t word = shml_guest_word(guest);
    for (int i = 0; i < SHML_MAX_ATTEMPTS; i++) {
        shml_seg_t *dying = enter(SHML_SERVICE);
        CHECK_EQ(shml_guest_word(guest), word);
        CHECK_EQ(claim_row(dying, 8), 1);
        bury(writer, dying);
    }
    CHECK(shml_guest_word(guest) != word);
    CHECK_EQ(ask_one(8).status, SHML_REF_ASIDE);
    CHECK_EQ(num_wanted(), 0);
    CHECK_EQ(stage.control->guest_wants[0], SHML_NO_WANT);
}

static void guests_are_woken_when_nothing_more_will_come(void)
{
    new_transit();
    uint32_t word = shml_guest_word(guest);
    CHECK_EQ(shml_text_put(writer, SHML_TEXT_MEMORY, "m", 1), SHML_OK);
    CHECK_EQ(shml_guest_word(guest), word);
    CHECK_EQ(shml_text_put(writer, SHML_TEXT_FATAL, "f", 1), SHML_OK);
    CHECK(shml_guest_word(guest) != word);
    word = shml_guest_word(guest);
    CHECK_EQ(SHML_POISON(writer), SHML_E_POISONED);
    CHECK(shml_guest_word(guest) != word);
    shml_ref_t ref = {0};
    uint32_t num_missing;
    uint8_t valid;
    CHECK_EQ(shml_guest_get(guest, (uint64_t[]){1}, 1, &ref, &num_missing), SHML_E_POISONED);
    CHECK_EQ(shml_guest_check(guest, &ref, 1, &valid), SHML_E_POISONED);
}

static void guests_are_woken_and_their_wants_stay_when_a_holder_of_the_mutex_died(void)
{
    new_transit();
    (void)put(writer, 3, KIB);
    shml_ref_t ref = ask_one(3);
    (void)ask_one(5);
    uint32_t word = shml_guest_word(guest);
    break_mutex();
    CHECK_EQ(is_valid(&ref), 1);
    CHECK(shml_guest_word(guest) != word);
    CHECK_EQ(is_wanted(5), 1);
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * The table of clients
 * ---------------------------------------------------------------------------------------------------- */
static void the_last_slots_are_not_for_workers(void)
{
    new_transit();
    for (uint32_t n = 2; n < SHML_MAX_CLIENTS - SHML_KEPT_CLIENTS; n++)
        (void)enter(SHML_WORKER);
    CHECK_EQ(shml_client_register(guest, SHML_WORKER, -1, 0), SHML_E_CLIENTS);
    for (uint32_t n = 0; n < SHML_KEPT_CLIENTS; n++)
        (void)enter(SHML_SERVICE);
    CHECK_EQ(shml_client_register(guest, SHML_OWNER, -1, 0), SHML_E_CLIENTS);
    check_stage(writer);
}

static void a_guest_becomes_a_client_when_a_slot_is_free(void)
{
    new_transit();
    shml_seg_t *last = NULL;
    for (uint32_t n = 2; n < SHML_MAX_CLIENTS - SHML_KEPT_CLIENTS; n++)
        last = enter(SHML_WORKER);
    (void)put(writer, 3, KIB);
    CHECK_EQ(ask_one(3).status, SHML_REF_READY);
    int32_t slot = last->self;
    stage.is_dead[slot] = 1;
    CHECK_EQ(shml_client_register(guest, SHML_WORKER, -1, 0), SHML_OK);
    CHECK_EQ(guest->self, slot);
    shml_ref_t ref = pin(guest, 3);
    CHECK_EQ(is_valid(&ref), 1); /* and may still look up as one */
    unpin(guest, &ref);
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Copies, while others go on
 * ---------------------------------------------------------------------------------------------------- */
static uint64_t seed;
static uint64_t dice(uint64_t n) { return test_random(&seed) % n; }

#define MOST_BYTES (3 * KIB)
typedef struct model { /* of the records that were written, by id */
    uint32_t version;
    uint64_t num_bytes;
} model_t;
static model_t model[NUM_RECORDS];
static shml_ticket_t under_way; /* what `writer` is writing */
static uint64_t under_way_id;
static int is_under_way;

/* A service's step: it takes a place and writes some of it, or commits what it has written. */
static void write_some(void)
{
    if (is_under_way) {
        fill(&under_way, under_way_id, model[under_way_id].version);
        CHECK_EQ(shml_commit(writer, &under_way, SHML_REF_READY), SHML_OK);
        is_under_way = 0;
        return;
    }
    under_way_id = dice(NUM_RECORDS);
    uint64_t num_bytes = shml_align(1 + dice(MOST_BYTES));
    if (shml_reserve(writer, under_way_id, num_bytes, NULL, 1, &under_way) != SHML_OK)
        return; /* it is there */
    is_under_way = 1;
    model[under_way_id] = (model_t){model[under_way_id].version + 1, num_bytes};
    memset(stage.ring + under_way.offset, 0xee, dice(num_bytes + 1));
}

/* Copy a record in pieces, while the service goes on in between. */
static void copy_slowly(const shml_ref_t *ref, uint8_t *out)
{
    for (uint64_t at = 0; at < ref->num_bytes;) {
        uint64_t step = 1 + dice(ref->num_bytes - at);
        memcpy(out + at, stage.ring + ref->offset + at, step);
        at += step;
        for (uint64_t n = dice(3); n > 0; n--)
            write_some();
    }
}

static void a_copy_that_is_said_to_be_whole_is_the_record(void)
{
    static uint8_t copies[4][MOST_BYTES];
    uint32_t num_whole = 0, num_torn = 0;
    for (uint64_t round = 0; round < 40; round++) {
        seed = round;
        test_note("seed %llu", (unsigned long long)round);
        memset(model, 0, sizeof model);
        is_under_way = 0;
        new_transit();
        for (int step = 0; step < 300; step++) {
            uint64_t ids[4];
            shml_ref_t refs[4];
            model_t then[4];
            uint8_t valid[4];
            uint32_t n = 1 + (uint32_t)dice(4);
            for (uint32_t i = 0; i < n; i++)
                ids[i] = dice(NUM_RECORDS);
            (void)ask(ids, n, refs);
            for (uint32_t i = 0; i < n; i++)
                then[i] = model[ids[i]];
            for (uint32_t i = 0; i < n; i++) {
                if (refs[i].status == SHML_REF_READY) {
                    CHECK_EQ(refs[i].num_bytes, then[i].num_bytes);
                    copy_slowly(&refs[i], copies[i]);
                }
            }
            CHECK_EQ(shml_guest_check(guest, refs, n, valid), SHML_OK);
            for (uint32_t i = 0; i < n; i++) {
                CHECK(valid[i] <= (refs[i].status == SHML_REF_READY));
                num_whole += valid[i];
                num_torn += refs[i].status == SHML_REF_READY && !valid[i];
                for (uint64_t k = 0; valid[i] && k < refs[i].num_bytes; k++)
                    CHECK_EQ(copies[i][k], pattern(ids[i], then[i].version, k));
            }
            write_some();
        }
        check_stage(writer);
    }
    CHECK(num_whole > 1000 && num_torn > 1000);
}

static void what_a_guest_wants_comes_although_all_else_is_made_too(void)
{
    new_transit();
    seed = 1;
    for (int round = 0; round < 200; round++) {
        uint64_t id = dice(NUM_RECORDS), ids[SHML_MAX_WANTS];
        shml_ref_t ref = ask_one(id);
        for (int step = 0; ref.status == SHML_REF_MISSING; step++) {
            CHECK(step < 4);
            int n = shml_wanted(writer, ids, SHML_MAX_WANTS);
            for (int i = 0; i < n; i++)
                (void)put(writer, ids[i], KIB);
            ref = ask_one(id);
        }
        check_bytes(&ref, id, 0);
        CHECK_EQ(is_valid(&ref), 1);
    }
}

/* ---------------------------------------------------------------------------------------------------- *
 * With a mutex and another process
 * ---------------------------------------------------------------------------------------------------- */
static void write_for_ever(void)
{
    uint32_t version = 0;
    for (uint64_t id = 0;; id = (id + 1) % NUM_RECORDS) {
        shml_ticket_t ticket;
        if (shml_reserve(writer, id, KIB, NULL, 1, &ticket) != SHML_OK)
            continue;
        version++;
        /* All words of a record are alike: its id and which writing it was. */
        volatile uint64_t *words = (void *)(stage.ring + ticket.offset);
        for (uint64_t i = 0; i < KIB / 8; i++)
            words[i] = (uint64_t)version << 32 | id;
        CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
        sched_yield(); /* else the other finds the mutex taken nearly always */
    }
}

static void a_copy_is_whole_while_another_process_evicts(void)
{
    new_transit();
    for (int i = 0; i < stage.num_seats; i++)
        stage.seats[i].seg.env = &shml_env_linux; /* a real mutex; nobody asks who lives */
    pid_t child = test_child();
    CHECK(child >= 0);
    if (child == 0)
        write_for_ever();
    uint32_t num_whole = 0, num_gone = 0;
    uint64_t copy[KIB / 8];
    seed = 2;
    while (num_whole < 4000) {
        uint64_t id = dice(NUM_RECORDS);
        shml_ref_t ref = ask_one(id);
        if (ref.status != SHML_REF_READY) {
            sched_yield();
            continue;
        }
        memcpy(copy, stage.ring + ref.offset, KIB);
        if (!is_valid(&ref)) {
            num_gone++;
            continue;
        }
        num_whole++;
        for (uint64_t i = 0; i < KIB / 8; i++)
            if ((copy[i] & UINT32_MAX) != id || copy[i] != copy[0]) {
                kill(child, SIGKILL);
                test_fail(__FILE__, __LINE__, "a copy of %llu is torn at %llu", (unsigned long long)id,
                          (unsigned long long)i);
            }
    }
    kill(child, SIGKILL);
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFSIGNALED(status));
    printf("test_guest: %u whole, %u gave way\n", num_whole, num_gone);
}

TEST_MAIN(TEST(a_guest_finds_what_is_there_and_pins_nothing), TEST(what_is_resident_is_told_apart_and_stays_valid),
          TEST(what_gave_way_is_not_valid), TEST(what_gave_way_is_not_valid_while_its_bytes_are_written),
          TEST(what_was_made_again_meanwhile_is_not_valid),
          TEST(what_gave_way_is_not_valid_when_its_descriptor_is_a_claim), TEST(what_is_not_there_is_not_valid),
          TEST(a_ref_that_no_look_up_gave_is_refused), TEST(reads_of_guests_are_counted_once),
          TEST(what_a_guest_misses_is_wanted_once_until_it_is_there),
          TEST(a_client_s_wants_and_a_guest_s_are_met_together), TEST(what_is_no_row_is_not_wanted),
          TEST(the_oldest_wants_give_way_when_the_list_is_full),
          TEST(rows_of_a_broken_chunk_are_wanted_no_more_and_their_guests_woken),
          TEST(a_row_set_aside_is_wanted_no_more_and_its_guests_woken),
          TEST(guests_are_woken_when_nothing_more_will_come),
          TEST(guests_are_woken_and_their_wants_stay_when_a_holder_of_the_mutex_died),
          TEST(the_last_slots_are_not_for_workers), TEST(a_guest_becomes_a_client_when_a_slot_is_free),
          TEST(a_copy_that_is_said_to_be_whole_is_the_record),
          TEST(what_a_guest_wants_comes_although_all_else_is_made_too),
          TEST(a_copy_is_whole_while_another_process_evicts))
