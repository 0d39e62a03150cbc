/* A set that keeps only so many samples: just as many stay, and never more, whoever writes, gives up or dies. */
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

/* Writers that reserve, commit, give up and die at random, some of them with the mutex and everything derived wrong. */
static void never_more_stay_whatever_happens(void)
{
    for (uint64_t seed = 0; seed < 200; seed++) {
        uint64_t random = seed, most = 1 + test_random(&random) % (NUM_RECORDS / 2);
        test_note("seed %llu", (unsigned long long)seed);
        new_cast(most);
        shml_ticket_t open[8];
        int num_open = 0;
        shml_seg_t *hand = enter(SHML_SERVICE);
        for (int step = 0; step < 150; step++) {
            uint64_t draw = test_random(&random), id = draw >> 32;
            switch (draw % 8) {
            case 0:
                bury(writer, hand); /* with all that it was writing */
                hand = enter(SHML_SERVICE);
                num_open = 0;
                break;
            case 1: break_mutex(); break;
            case 2:
            case 3:
                if (num_open > 0)
                    CHECK_EQ(shml_commit(hand, &open[--num_open], (uint32_t)(id % 5 == 0)), SHML_OK);
                break;
            case 4:
                if (num_open > 0)
                    CHECK_EQ(shml_abort(hand, &open[--num_open]), SHML_OK);
                break;
            default:
                if (num_open < 8 &&
                    shml_reserve(hand, id % NUM_RECORDS, 64 + id % 128, NULL, 0, &open[num_open]) == SHML_OK)
                    num_open++;
            }
            CHECK(num_resident() <= most);
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
          TEST(a_limit_without_a_place_for_the_others_is_refused))
