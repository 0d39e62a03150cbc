/* Encoded chunks on disk: who gets room, what is found, what a death leaves, and that damage is noticed. The file itself
 * is not the core's, and there is none here. */
#define _GNU_SOURCE
#include "transit.h"

#include <sys/mman.h>
#include <sys/stat.h>

#define SPILL_BYTES (64 * KIB)
#define PAGE        (4 * KIB)

static shml_seg_t *writer, *other, *reader;

/* Nothing is promised to stay; of the spill there are so many bytes. */
static void new_spill(uint64_t spill_bytes)
{
    new_stage(transit_shape);
    stage.control->spill_bytes = spill_bytes;
    writer = enter(SHML_SERVICE);
    other = enter(SHML_SERVICE);
    reader = enter(SHML_OWNER);
}

static uint64_t room_for(shml_seg_t *seg, uint32_t chunk, uint64_t num_bytes)
{
    uint64_t offset = UINT64_MAX;
    CHECK_EQ(shml_spill_reserve(seg, chunk, num_bytes, &offset), SHML_OK);
    return offset;
}

/* Claim it, spill it, end the claim; returns where it lies. */
static uint64_t spill(shml_seg_t *seg, uint32_t chunk, uint64_t num_bytes)
{
    CHECK_EQ(shml_chunk_claim(seg, chunk), SHML_OK);
    uint64_t offset = room_for(seg, chunk, num_bytes);
    CHECK_EQ(shml_spill_commit(seg, chunk, offset, num_bytes), SHML_OK);
    CHECK_EQ(shml_chunk_end(seg, chunk, SHML_FETCH_OK), SHML_OK);
    return offset;
}

static int is_spilled(uint32_t chunk)
{
    uint64_t offset, num_bytes;
    int rc = shml_spill_find(other, chunk, &offset, &num_bytes);
    CHECK(rc == SHML_OK || rc == SHML_E_NOTFOUND);
    return rc == SHML_OK;
}

/* A set is laid out with the spill that was asked for, of whole pages, and no larger than its places can tell. */
static void a_spill_is_of_whole_pages(void)
{
    const uint64_t good[] = {0, PAGE, SHML_MAX_SPILL_BYTES}, bad[] = {1, PAGE + 64, SHML_MAX_SPILL_BYTES + PAGE};
    new_bare_stage(transit_shape);
    uint64_t first_rows[NUM_CHUNKS];
    uint32_t num_rows[NUM_CHUNKS], units[NUM_CHUNKS];
    for (uint32_t i = 0; i < NUM_CHUNKS; i++)
        first_rows[i] = i * ROWS, num_rows[i] = ROWS, units[i] = i;
    for (int i = 0; i < 3; i++) {
        memset(stage.control, 0, stage.control_bytes);
        stage.config.spill_bytes = bad[i];
        CHECK_EQ(shml_control_format(stage.control, stage.control_bytes, &stage.config, first_rows, num_rows, units),
                 SHML_E_INVAL);
        CHECK_EQ(stage.control->magic, 0);
        memset(stage.control, 0, stage.control_bytes);
        stage.config.spill_bytes = good[i];
        CHECK_EQ(shml_control_format(stage.control, stage.control_bytes, &stage.config, first_rows, num_rows, units),
                 SHML_OK);
        writer = enter(SHML_SERVICE);
        CHECK_EQ(stats_of(writer).spill_bytes, good[i]);
        CHECK_EQ(stats_of(writer).spill_used_bytes, 0);
        CHECK_EQ(stats_of(writer).spill_frozen, 0);
    }
}

static void a_set_without_a_spill_never_spills(void)
{
    uint64_t offset;
    new_spill(0);
    CHECK_EQ(shml_chunk_claim(writer, 3), SHML_OK);
    CHECK_EQ(shml_spill_reserve(writer, 3, 1, &offset), SHML_E_FULL);
    CHECK(!is_spilled(3));
    check_stage(writer);
}

/* What is spilled is found where it was put, by everybody, and is at hand for good: nobody fetches it again. */
static void a_spilled_chunk_is_at_hand_for_good(void)
{
    new_spill(SPILL_BYTES);
    uint64_t offset, num_bytes;
    CHECK_EQ(spill(writer, 3, 5000), 0);
    CHECK_EQ(spill(other, 7, 64), 2 * PAGE);
    CHECK_EQ(shml_spill_find(reader, 3, &offset, &num_bytes), SHML_OK);
    CHECK_EQ(offset, 0);
    CHECK_EQ(num_bytes, 5056); /* a multiple of 64 */
    CHECK_EQ(shml_spill_find(reader, 7, &offset, &num_bytes), SHML_OK);
    CHECK_EQ(offset, 2 * PAGE);
    CHECK_EQ(num_bytes, 64);
    CHECK_EQ(chunk_state(writer, 3), SHML_CHUNK_TODO | SHML_CHUNK_HAS_RAW);
    CHECK_EQ(shml_chunk_claim(other, 3), SHML_E_EXISTS);
    CHECK(!is_spilled(4));
    CHECK_EQ(stats_of(writer).spill_used_bytes, 3 * PAGE);
    CHECK_EQ(stats_of(writer).num_fetched, 2);
    for (uint64_t id = 0; id < 8; id++) /* whatever goes through the raw region */
        if (id != 3 && id != 7)
            (void)put(writer, SHML_RAW | id, 4 * KIB);
    CHECK_EQ(shml_chunk_claim(writer, 7), SHML_E_EXISTS);
    check_stage(writer);
}

/* Readers that wait for rows of a spilled chunk have it decoded, not fetched. */
static void a_spilled_chunk_is_not_wanted(void)
{
    uint32_t chunks[4], counts[4];
    new_spill(SPILL_BYTES);
    spill(writer, 2, 100);
    CHECK_EQ(get(reader, (uint64_t[]){2 * ROWS, 2 * ROWS + 1, 5 * ROWS}, 3, SHML_GET_POST, NULL), 3);
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, 4), 1);
    CHECK_EQ(chunks[0], 5);
    withdraw(reader);
}

static void only_who_has_claimed_a_chunk_spills_it(void)
{
    uint64_t offset;
    new_spill(SPILL_BYTES);
    CHECK_EQ(shml_spill_reserve(writer, 3, 100, &offset), SHML_E_STALE);
    CHECK_EQ(shml_chunk_claim(other, 3), SHML_OK);
    CHECK_EQ(shml_spill_reserve(writer, 3, 100, &offset), SHML_E_STALE);
    CHECK_EQ(stats_of(writer).spill_used_bytes, 0);
    offset = room_for(other, 3, 100);
    CHECK_EQ(shml_spill_commit(writer, 3, offset, 100), SHML_E_STALE);
    CHECK_EQ(shml_chunk_end(other, 3, SHML_FETCH_GIVEN_UP), SHML_OK);
    CHECK_EQ(shml_spill_commit(other, 3, offset, 100), SHML_E_STALE);
    CHECK(!is_spilled(3));
    shml_client_unregister(other);
    CHECK_EQ(shml_spill_reserve(other, 3, 100, &offset), SHML_E_LEFT);
    CHECK_EQ(shml_spill_reserve(writer, NUM_CHUNKS, 100, &offset), SHML_E_INVAL);
    CHECK_EQ(shml_spill_reserve(writer, 0, 0, &offset), SHML_E_INVAL);
    CHECK_EQ(shml_spill_find(writer, NUM_CHUNKS, &offset, &offset), SHML_E_INVAL);
    check_stage(writer);
}

/* A place that was not given out is refused, and a second one for the same chunk. */
static void a_place_is_committed_once_and_inside(void)
{
    new_spill(SPILL_BYTES);
    CHECK_EQ(shml_chunk_claim(writer, 3), SHML_OK);
    CHECK_EQ(room_for(writer, 3, PAGE), 0);
    CHECK_EQ(shml_spill_commit(writer, 3, 0, PAGE + 1), SHML_E_INVAL);
    CHECK_EQ(shml_spill_commit(writer, 3, 2 * PAGE, 1), SHML_E_INVAL);
    CHECK_EQ(shml_spill_commit(writer, 3, 64, 1), SHML_E_INVAL);
    CHECK_EQ(shml_spill_commit(writer, NUM_CHUNKS, 0, 1), SHML_E_INVAL);
    CHECK(!is_spilled(3));
    CHECK_EQ(shml_spill_commit(writer, 3, 0, PAGE), SHML_OK);
    CHECK_EQ(shml_spill_commit(writer, 3, 0, 1), SHML_E_EXISTS);
    check_stage(writer);
}

/* What does not fit is refused and goes elsewhere; what is smaller may still fit. */
static void a_spill_is_filled_to_its_last_page(void)
{
    uint64_t offset;
    new_spill(4 * PAGE);
    spill(writer, 0, 3 * PAGE);
    CHECK_EQ(shml_chunk_claim(writer, 1), SHML_OK);
    CHECK_EQ(shml_spill_reserve(writer, 1, PAGE + 1, &offset), SHML_E_FULL);
    CHECK_EQ(room_for(writer, 1, PAGE), 3 * PAGE);
    CHECK_EQ(shml_spill_reserve(writer, 1, 1, &offset), SHML_E_FULL);
    CHECK_EQ(stats_of(writer).spill_used_bytes, 4 * PAGE);
    check_stage(writer);
}

/* When the disk refuses, what is there stays, and what was begun may end. */
static void a_frozen_spill_gives_out_no_more(void)
{
    uint64_t offset;
    new_spill(SPILL_BYTES);
    spill(writer, 0, 100);
    CHECK_EQ(shml_chunk_claim(other, 1), SHML_OK);
    offset = room_for(other, 1, 100);
    CHECK_EQ(shml_spill_freeze(writer), 1);
    CHECK_EQ(shml_spill_freeze(other), 0);
    CHECK_EQ(stats_of(writer).spill_frozen, 1);
    CHECK_EQ(shml_spill_commit(other, 1, offset, 100), SHML_OK);
    CHECK(is_spilled(0) && is_spilled(1));
    CHECK_EQ(shml_chunk_claim(writer, 2), SHML_OK);
    CHECK_EQ(shml_spill_reserve(writer, 2, 100, &offset), SHML_E_FULL);
    check_stage(writer);
}

/* A death while it writes costs the room; one after the commit nothing. */
static void what_the_dead_had_reserved_is_lost_room(void)
{
    new_spill(SPILL_BYTES);
    CHECK_EQ(shml_chunk_claim(other, 3), SHML_OK);
    CHECK_EQ(room_for(other, 3, 100), 0);
    bury(writer, other);
    other = reader;
    CHECK(!is_spilled(3));
    CHECK_EQ(spill(writer, 3, 100), PAGE);
    shml_seg_t *third = enter(SHML_SERVICE);
    CHECK_EQ(shml_chunk_claim(third, 4), SHML_OK);
    CHECK_EQ(shml_spill_commit(third, 4, room_for(third, 4, 100), 100), SHML_OK);
    bury(writer, third);
    CHECK_EQ(chunk_state(writer, 4), SHML_CHUNK_TODO | SHML_CHUNK_HAS_RAW);
    CHECK_EQ(shml_chunk_claim(writer, 4), SHML_E_EXISTS);
    CHECK_EQ(stats_of(writer).spill_used_bytes, 3 * PAGE);
    check_stage(writer);
}

/* Places that are wrong are noticed, and no one is ever told of a place that was not given out. */
static void damage_is_noticed(void)
{
    const struct {
        uint64_t place;
        const char *what;
    } bad[] = {
        {UINT64_C(3) << 32 | 1, "a chunk is spilled outside of what was given out"},
        {1000, "a chunk is spilled outside of what was given out"},
        {UINT64_C(2) << 32, "a chunk is spilled outside of what was given out"},
        {65, "two spilled chunks overlap"},
        {UINT64_C(1) << 32 | 128, "more is spilled than was given out"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint64_t offset, num_bytes;
        const char *what = "";
        test_note("%zu", i);
        new_spill(SPILL_BYTES);
        spill(writer, 0, PAGE);
        spill(writer, 1, PAGE);
        CHECK_EQ(shml_chunk_claim(writer, 2), SHML_OK);
        CHECK_EQ(room_for(writer, 2, PAGE), 2 * PAGE);
        check_stage(writer);
        shml_chunks(stage.control)[1].spilled = bad[i].place;
        if (i < 3)
            CHECK_EQ(shml_spill_find(other, 1, &offset, &num_bytes), SHML_E_CORRUPT);
        if (i == 4)
            shml_chunks(stage.control)[2].spilled = UINT64_C(1) << 32 | 64;
        CHECK_EQ(shml_check(writer, stage.scratch, &what), SHML_E_CORRUPT);
        CHECK_TEXT(what, bad[i].what);
    }
    const char *what = "";
    new_spill(SPILL_BYTES);
    (void)put(writer, SHML_RAW | 5, KIB);
    stage.control->spill_end = PAGE;
    shml_chunks(stage.control)[5].spilled = 1;
    CHECK_EQ(shml_check(writer, stage.scratch, &what), SHML_E_CORRUPT);
    CHECK_TEXT(what, "a chunk is in raw and spilled");
    new_spill(SPILL_BYTES);
    stage.control->spill_end = SPILL_BYTES + PAGE;
    CHECK_EQ(shml_check(writer, NULL, &what), SHML_E_CORRUPT);
    CHECK_TEXT(what, "more of the disk is given out than there is");
    CHECK_EQ(shml_chunk_claim(writer, 2), SHML_OK);
    uint64_t offset;
    CHECK_EQ(shml_spill_reserve(writer, 2, PAGE, &offset), SHML_E_POISONED);
}

/* Of the file only what was given out, whole pages; what lies beside it stays, and the room is not given out again. */
static void what_was_not_written_gives_its_blocks_back(void)
{
    char bytes[3 * PAGE], expected[3 * PAGE];
    struct stat found;
    new_spill(SPILL_BYTES);
    int fd = memfd_create("spill", MFD_CLOEXEC);
    CHECK(fd >= 0);
    memset(bytes, 'x', sizeof bytes);
    memset(expected, 'x', sizeof expected);
    memset(expected + PAGE, 0, PAGE);
    CHECK_EQ(pwrite(fd, bytes, sizeof bytes, 0), (ssize_t)sizeof bytes);
    CHECK_EQ(spill(writer, 1, PAGE), 0);
    CHECK_EQ(shml_chunk_claim(writer, 2), SHML_OK);
    uint64_t offset = room_for(writer, 2, 100);
    CHECK_EQ(offset, PAGE);
    CHECK_EQ(shml_spill_give_back(writer, fd, offset, 0), SHML_E_INVAL);
    CHECK_EQ(shml_spill_give_back(writer, fd, offset + 1, 10), SHML_E_INVAL);
    CHECK_EQ(shml_spill_give_back(writer, fd, offset, PAGE + 1), SHML_E_INVAL);
    CHECK_EQ(shml_spill_give_back(writer, fd, 3 * PAGE, 1), SHML_E_INVAL);
    CHECK_EQ(shml_spill_give_back(writer, fd, offset, 100), SHML_OK);
    CHECK_EQ(pread(fd, bytes, sizeof bytes, 0), (ssize_t)sizeof bytes);
    CHECK(memcmp(bytes, expected, sizeof bytes) == 0);
    CHECK(fstat(fd, &found) == 0 && found.st_blocks * 512 == 2 * (off_t)PAGE && found.st_size == 3 * (off_t)PAGE);
    CHECK_EQ(room_for(writer, 2, 100), 2 * PAGE);
    close(fd);
    CHECK_EQ(shml_spill_give_back(writer, fd, offset, 100), SHML_E_SYS);
    check_stage(writer);
}

TEST_MAIN(TEST(a_spill_is_of_whole_pages), TEST(a_set_without_a_spill_never_spills),
          TEST(a_spilled_chunk_is_at_hand_for_good), TEST(a_spilled_chunk_is_not_wanted),
          TEST(only_who_has_claimed_a_chunk_spills_it), TEST(a_place_is_committed_once_and_inside),
          TEST(a_spill_is_filled_to_its_last_page), TEST(a_frozen_spill_gives_out_no_more),
          TEST(what_was_not_written_gives_its_blocks_back), TEST(what_the_dead_had_reserved_is_lost_room),
          TEST(damage_is_noticed))
