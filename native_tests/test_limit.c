/* A set that keeps only so many samples: just as many stay, and never more, whoever writes, gives up or dies. And one that
 * has only so many in transit: one of them goes for each that comes, whatever room there is. */
#define _GNU_SOURCE
#include "transit.h"

static shml_seg_t *writer, *other;

/* Room for all in resident by bytes, so that only the number limits. */
static void new_cast(uint64_t most)
{
    most_resident = most;
    new_stage((shape_t){32 * KIB, 8 * KIB, 4 * KIB, 1});
    writer = enter(SHML_SERVICE);
    other = enter(SHML_SERVICE);
}

static uint64_t num_resident(void) { return stats_of(writer).num_resident; }
static int is_resident(uint64_t id) { return row_of(writer, id) == SHML_ROW_FINAL; }
static void write_all(void)
{
    for (uint64_t id = 0; id < NUM_RECORDS; id++)
        (void)put(writer, id, 64);
}

static void just_as_many_stay_as_may(void)
{
    for (uint64_t most = 1; most <= NUM_RECORDS; most++) {
        test_note("at most %llu", (unsigned long long)most);
        new_cast(most);
        CHECK_EQ(stats_of(writer).most_resident, most);
        write_all();
        CHECK_EQ(num_resident(), most);
        for (uint64_t id = 0; id < NUM_RECORDS; id++)
            CHECK_EQ(is_resident(id), id < most); /* the first that came */
        check_stage(writer);
    }
}

static void without_a_limit_all_stay_that_find_room(void)
{
    new_cast(0);
    write_all();
    CHECK_EQ(num_resident(), NUM_RECORDS);
    check_stage(writer);
}

/* A chunk is done, and not fetched again, only if all of its rows stay. */
static void a_chunk_that_stays_in_part_is_not_done(void)
{
    new_cast(ROWS + 1);
    write_all();
    CHECK_EQ(chunk_state(writer, 0) & 0xf, SHML_CHUNK_DONE);
    CHECK_EQ(chunk_state(writer, 1) & 0xf, SHML_CHUNK_TODO);
    CHECK_EQ(chunk_state(writer, 1) & SHML_CHUNK_STAYS, 0);
    check_stage(writer);
}

/* Chunks are told to stay, and their encoded rows kept, as far as samples may; over-promised by one. */
static void no_more_chunks_are_promised_room_than_may_stay(void)
{
    new_cast(2 * ROWS + 1);
    for (uint32_t chunk = 0; chunk < NUM_CHUNKS; chunk++) {
        CHECK_EQ(shml_chunk_claim(writer, chunk), SHML_OK);
        CHECK_EQ((chunk_state(writer, chunk) & SHML_CHUNK_STAYS) != 0, chunk < 3);
    }
    check_stage(writer);
}

static void what_is_being_written_counts(void)
{
    new_cast(1);
    shml_ticket_t first = reserve(writer, 0, 64);
    CHECK_EQ(num_resident(), 1);
    shml_ticket_t second = reserve(other, 1, 64);
    CHECK(first.offset < region(SHML_RESIDENT)->end && second.offset >= region(SHML_TRANSIT)->begin);
    CHECK_EQ(shml_commit(other, &second, SHML_REF_READY), SHML_OK);
    CHECK_EQ(shml_commit(writer, &first, SHML_REF_READY), SHML_OK);
    CHECK(is_resident(0) && is_in_transit(writer, 1));
    check_stage(writer);
}

static void who_gives_up_or_dies_leaves_the_place_to_another(void)
{
    for (int dies = 0; dies < 2; dies++) {
        new_cast(2);
        shml_ticket_t ticket = reserve(other, 0, 64);
        (void)put(writer, 1, 64);
        CHECK_EQ(num_resident(), 2);
        if (dies)
            bury(writer, other);
        else
            CHECK_EQ(shml_abort(other, &ticket), SHML_OK);
        CHECK_EQ(num_resident(), 1); /* a HOLE is no sample */
        (void)put(writer, 2, 128);
        (void)put(writer, 3, 128);
        CHECK(is_resident(2) && is_in_transit(writer, 3));
        CHECK_EQ(num_resident(), 2);
        check_stage(writer);
    }
}

/* The reason why a row cannot be had is kept as the row would be; that of a chunk is no sample. */
static void errors_of_rows_count_and_those_of_chunks_do_not(void)
{
    new_cast(1);
    shml_ticket_t chunk = reserve(writer, SHML_CHUNK_ERROR | 9, 64), row = reserve(writer, 0, 64);
    CHECK_EQ(shml_commit(writer, &chunk, SHML_REF_ERROR), SHML_OK);
    CHECK_EQ(num_resident(), 1);
    CHECK_EQ(shml_commit(writer, &row, SHML_REF_ERROR), SHML_OK);
    (void)put(writer, 1, 64);
    CHECK(is_resident(0) && is_in_transit(writer, 1));
    chunk = reserve(writer, SHML_CHUNK_ERROR | 8, 64);
    CHECK(chunk.offset < region(SHML_RESIDENT)->end);
    CHECK_EQ(shml_commit(writer, &chunk, SHML_REF_ERROR), SHML_OK);
    CHECK_EQ(num_resident(), 1);
    check_stage(writer);
}

/* A writer, and what it is writing. */
typedef struct {
    shml_seg_t *seg;
    shml_ticket_t open[8];
    int num_open;
} hand_t;

/* It reserves, commits, gives up or dies (op: 0 to 7), or the mutex and everything derived is found wrong. */
static void hand_step(hand_t *hand, uint64_t op, uint64_t id, uint64_t num_bytes, int urgent)
{
    switch (op) {
    case 0:
        bury(writer, hand->seg); /* with all that it was writing */
        *hand = (hand_t){.seg = enter(SHML_SERVICE)};
        break;
    case 1: break_mutex(); break;
    case 2:
    case 3:
        if (hand->num_open > 0)
            CHECK_EQ(shml_commit(hand->seg, &hand->open[--hand->num_open], (uint32_t)(id % 5 == 0)), SHML_OK);
        break;
    case 4:
        if (hand->num_open > 0)
            CHECK_EQ(shml_abort(hand->seg, &hand->open[--hand->num_open]), SHML_OK);
        break;
    default:
        if (hand->num_open < 8 &&
            shml_reserve(hand->seg, id % NUM_RECORDS, num_bytes, NULL, urgent, &hand->open[hand->num_open]) == SHML_OK)
            hand->num_open++;
    }
}

/* Writers that reserve, commit, give up and die at random, some of them with the mutex and everything derived wrong. */
static void never_more_stay_whatever_happens(void)
{
    for (uint64_t seed = 0; seed < 200; seed++) {
        uint64_t random = seed, most = 1 + test_random(&random) % (NUM_RECORDS / 2);
        test_note("seed %llu", (unsigned long long)seed);
        new_cast(most);
        hand_t hand = {.seg = enter(SHML_SERVICE)};
        for (int step = 0; step < 150; step++) {
            uint64_t draw = test_random(&random), id = draw >> 32;
            hand_step(&hand, draw % 8, id, 64 + id % 128, 0);
            CHECK(num_resident() <= most);
        }
        check_stage(writer);
    }
}

/* ---------------------------------------------------------------------------------------------------- *
 * In transit
 * ---------------------------------------------------------------------------------------------------- */
static shml_seg_t *reader;

/* No sample stays, and transit has room for 128 of the smallest. */
static void new_passage(uint64_t most)
{
    most_resident = 0;
    most_transit = most;
    new_stage(transit_shape);
    most_transit = 0;
    writer = enter(SHML_SERVICE);
    other = enter(SHML_SERVICE);
    reader = enter(SHML_OWNER);
}

static uint64_t num_passing(void) { return stats_of(writer).num_transit; }

static void just_as_many_pass_as_may(void)
{
    for (uint64_t most = 1; most <= NUM_RECORDS; most++) {
        test_note("at most %llu", (unsigned long long)most);
        new_passage(most);
        CHECK_EQ(stats_of(writer).most_transit, most);
        for (uint64_t id = 0; id < NUM_RECORDS; id++) {
            (void)put(writer, id, 64);
            CHECK_EQ(num_passing(), id < most ? id + 1 : most);
            CHECK(is_in_transit(writer, id));
        }
        check_stage(writer);
    }
}

/* What comes lies where what went has lain, so that no more memory is used than for so many. */
static void who_comes_takes_the_place_of_who_goes(void)
{
    new_passage(5);
    for (uint64_t id = 0; id < NUM_RECORDS; id++)
        CHECK(put(writer, id, 128) < 5 * 128);
    new_passage(5);
    uint64_t end = 0;
    for (uint64_t i = 0; i < 40 * NUM_RECORDS; i++) { /* of all sizes: little more than so many of the largest */
        uint64_t num_bytes = 64 * (1 + i * 7 % 8), at = put(writer, i % NUM_RECORDS, num_bytes);
        end = at + num_bytes > end ? at + num_bytes : end;
    }
    CHECK(end <= 2 * 5 * 512);
    check_stage(writer);
}

/* One for which there is neither a gap nor room below takes it above, and what an order needs does not go in vain. */
static void a_large_one_goes_where_nobody_needs_anything(void)
{
    new_passage(4);
    shml_order_info_t order = begin_order(reader, 10);
    for (uint64_t id = 0; id < 4; id++)
        (void)put_for(writer, id, 64, until(&order, id + 1));
    shml_ticket_t ticket;
    CHECK_EQ(try_reserve(writer, 9, KIB, 0), SHML_E_FULL);
    CHECK_EQ(in_transit(writer, 0, 4), 0xf);
    CHECK_EQ(shml_reserve(writer, 9, KIB, &no_stamp, 1, &ticket), SHML_OK); /* somebody waits for it */
    CHECK_EQ(ticket.offset, 4 * 64);
    CHECK_EQ(in_transit(writer, 0, 4), 0xe);
    CHECK_EQ(num_passing(), 4);
    check_stage(writer);
}

static void what_somebody_reads_or_waits_for_does_not_go(void)
{
    new_passage(3);
    for (uint64_t id = 0; id < 3; id++)
        (void)put(writer, id, 64);
    shml_ref_t read = pin(reader, 0);
    CHECK_EQ(get(reader, (uint64_t[]){1, 40}, 2, SHML_GET_POST, NULL), 1); /* 1 is wanted until 40 comes */
    (void)put(writer, 3, 64);
    CHECK_EQ(in_transit(writer, 0, 4), 0xb);
    shml_ref_t three = pin(reader, 3);
    uint64_t starved = stats_of(writer).num_starved;
    CHECK_EQ(try_reserve(writer, 4, 64, 0), SHML_E_FULL);
    CHECK_EQ(try_reserve(writer, 4, 64, 1), SHML_E_FULL);
    CHECK_EQ(stats_of(writer).num_starved, starved + 1); /* who waits is told to copy what it has */
    unpin(reader, &read);
    (void)put(writer, 4, 64);
    CHECK_EQ(in_transit(writer, 0, 5), 0x1a);
    unpin(reader, &three);
    check_stage(writer);
}

/* Half of the number too is shared by the readers, so that who hoards views of small samples holds up nobody. */
static void small_ones_that_are_pinned_are_counted_too(void)
{
    new_passage(8);
    CHECK_EQ(shml_pin_quota_samples(reader), 4);
    shml_seg_t *worker = enter_under(SHML_WORKER, reader);
    CHECK_EQ(shml_pin_quota_samples(reader), 2);
    shml_ref_t refs[4];
    shml_found_t found;
    for (uint64_t id = 0; id < 4; id++) {
        (void)put(writer, id, 64);
        CHECK_EQ(shml_get_many(worker, &id, 1, 0, NULL, &refs[id], &found), SHML_OK);
        CHECK_EQ(found.over_quota, id >= 2);
    }
    CHECK_EQ(shml_unpin(worker, refs, 4), SHML_OK);
    CHECK_EQ(worker->num_pinned, 0);
    new_passage(0);
    CHECK_EQ(shml_pin_quota_samples(reader), UINT64_MAX);
}

/* What is no sample is not counted, and goes with none; nor is a row that is claimed. */
static void chunks_and_claims_do_not_count(void)
{
    new_passage(1);
    (void)put(writer, SHML_RAW | 3, KIB);
    shml_ticket_t error = reserve(writer, SHML_CHUNK_ERROR | 5, 64);
    CHECK_EQ(shml_commit(writer, &error, SHML_REF_ERROR), SHML_OK);
    CHECK_EQ(claim_row(writer, 7), 1);
    CHECK_EQ(num_passing(), 0);
    (void)put(writer, 0, 64);
    CHECK_EQ(try_reserve(writer, SHML_CHUNK_ERROR | 6, 64, 0), SHML_OK);
    CHECK(is_in_transit(writer, 0) && num_passing() == 1);
    check_stage(writer);
}

static void who_gives_up_or_dies_leaves_room_for_one(void)
{
    for (int dies = 0; dies < 2; dies++) {
        new_passage(1);
        shml_ticket_t ticket = reserve(other, 0, 64);
        CHECK_EQ(try_reserve(writer, 1, 64, 1), SHML_E_FULL); /* what is being written counts, and stays */
        if (dies)
            bury(writer, other);
        else
            CHECK_EQ(shml_abort(other, &ticket), SHML_OK);
        CHECK_EQ(num_passing(), 0);
        (void)put(writer, 1, 64);
        CHECK_EQ(num_passing(), 1);
        check_stage(writer);
    }
}

/* As above, with pins, orders, urgent ones, and records of all sizes. */
static void never_more_pass_whatever_happens(void)
{
    for (uint64_t seed = 0; seed < 200; seed++) {
        uint64_t random = seed, most = 1 + test_random(&random) % 20;
        test_note("seed %llu", (unsigned long long)seed);
        new_passage(most);
        hand_t hand = {.seg = enter(SHML_SERVICE)};
        for (int step = 0; step < 150; step++) {
            uint64_t draw = test_random(&random), id = draw >> 32;
            if (draw % 9 == 8)
                (void)get(reader, (uint64_t[]){id % NUM_RECORDS, NUM_RECORDS - 1}, 2, SHML_GET_POST, NULL);
            else
                hand_step(&hand, draw % 9, id, 64 + id % 900, (int)(id % 2));
            CHECK(num_passing() <= most);
        }
        check_stage(writer);
    }
}

static void a_limit_without_a_place_for_the_others_is_refused(void)
{
    new_cast(5);
    shml_config_t config = stage.config;
    uint64_t first_rows[NUM_CHUNKS];
    uint32_t num_rows[NUM_CHUNKS], units[NUM_CHUNKS];
    for (uint32_t i = 0; i < NUM_CHUNKS; i++)
        first_rows[i] = i * ROWS, num_rows[i] = ROWS, units[i] = i;
    config.transit_bytes = 0;
    memset(stage.control, 0, stage.control_bytes);
    CHECK_EQ(shml_control_format(stage.control, stage.control_bytes, &config, first_rows, num_rows, units),
             SHML_E_INVAL);
}

TEST_MAIN(TEST(just_as_many_stay_as_may), TEST(without_a_limit_all_stay_that_find_room),
          TEST(a_chunk_that_stays_in_part_is_not_done), TEST(no_more_chunks_are_promised_room_than_may_stay),
          TEST(what_is_being_written_counts), TEST(who_gives_up_or_dies_leaves_the_place_to_another),
          TEST(errors_of_rows_count_and_those_of_chunks_do_not), TEST(never_more_stay_whatever_happens),
          TEST(just_as_many_pass_as_may), TEST(who_comes_takes_the_place_of_who_goes),
          TEST(a_large_one_goes_where_nobody_needs_anything), TEST(what_somebody_reads_or_waits_for_does_not_go),
          TEST(small_ones_that_are_pinned_are_counted_too), TEST(chunks_and_claims_do_not_count),
          TEST(who_gives_up_or_dies_leaves_room_for_one), TEST(never_more_pass_whatever_happens),
          TEST(a_limit_without_a_place_for_the_others_is_refused))
