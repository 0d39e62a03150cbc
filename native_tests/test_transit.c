/* Transit and raw: whose bytes are taken for a new record, and whose never. One process stands in for all. */
#define _GNU_SOURCE
#include "transit.h"

/* Two services and two readers; other clients enter where a test needs them. */
static shml_seg_t *writer, *other, *reader, *holder;

static void new_cast(shape_t shape)
{
    new_stage(shape);
    writer = enter(SHML_SERVICE);
    other = enter(SHML_SERVICE);
    reader = enter(SHML_WORKER);
    holder = enter(SHML_WORKER);
}
static void new_transit(void) { new_cast(transit_shape); }

/* Pins of `holder`. */
static shml_ref_t held[8];
static void hold(uint64_t id) { held[id] = pin(holder, id); }
static void let_go(uint64_t id) { unpin(holder, &held[id]); }

/* ---------------------------------------------------------------------------------------------------- *
 * Where a record goes
 * ---------------------------------------------------------------------------------------------------- */
/* Rows of a chunk that was not taken as one that stays lie in transit, one behind the other. */
static void rows_of_chunks_that_do_not_stay_go_to_transit(void)
{
    new_transit();
    CHECK_EQ(put(writer, 3, 100), 0);
    CHECK_EQ(put(writer, 9, 64), 128); /* a block is a multiple of 64 bytes */
    CHECK_EQ(put(writer, 40, 1), 192);
    CHECK_EQ(row_of(writer, 3), SHML_ROW_TRANSIT);
    shml_stats_t stats = stats_of(writer);
    CHECK_EQ(stats.transit.used_bytes, 256);
    CHECK_EQ(stats.transit.num_blocks, 3);
    CHECK_EQ(stats.resident.used_bytes + stats.raw.used_bytes, 0);
    check_stage(writer);
}

/* Rows of a chunk that stays go to the resident region, where a look-up pins nothing. */
static void rows_of_chunks_that_stay_are_resident(void)
{
    new_cast(small_shape);
    CHECK_EQ(shml_chunk_claim(writer, 2), SHML_OK);
    CHECK(chunk_state(writer, 2) & SHML_CHUNK_STAYS);
    shml_ticket_t ticket = reserve(writer, 8, 512);
    CHECK(ticket.offset >= region(SHML_RESIDENT)->begin && ticket.offset < region(SHML_RESIDENT)->end);
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
    CHECK_EQ(row_of(reader, 8), SHML_ROW_FINAL);
    shml_ref_t ref = look(reader, 8);
    CHECK_EQ(ref.chunk, 0);
    check_bytes(&ref, 8, 0);
    CHECK_EQ(reader->pinned_bytes, 0);
    check_stage(writer);
}

/* What finds no room in the resident region goes to transit although its chunk stays. */
static void what_finds_no_room_among_the_resident_goes_to_transit(void)
{
    new_cast(small_shape);
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    CHECK(chunk_state(writer, 0) & SHML_CHUNK_STAYS);
    (void)put(writer, 0, 3 * KIB);
    CHECK_EQ(put(writer, 1, 2 * KIB), 0);
    CHECK_EQ(row_of(writer, 0), SHML_ROW_FINAL);
    CHECK_EQ(row_of(writer, 1), SHML_ROW_TRANSIT);
    check_stage(writer);
}

/* A chunk that found resident promised away when it was fetched stays after all if rows turn out to be smaller: the rows
 * from then on. */
static void a_chunk_stays_after_all_when_rows_turn_out_smaller(void)
{
    new_cast(small_shape);
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    (void)put(writer, 0, 1 * KIB); /* a quarter of resident: with four such rows in a chunk it has no room for more */
    CHECK_EQ(shml_chunk_claim(writer, 1), SHML_OK);
    CHECK_EQ(chunk_state(writer, 1) & SHML_CHUNK_STAYS, 0);
    (void)put(writer, ROWS, 64);
    CHECK_EQ(row_of(writer, ROWS), SHML_ROW_TRANSIT);
    for (uint64_t row = 1; row < ROWS; row++)
        (void)put(writer, row, 64);
    (void)put(writer, ROWS + 1, 64);
    CHECK_EQ(row_of(writer, ROWS + 1), SHML_ROW_FINAL);
    CHECK(chunk_state(writer, 1) & SHML_CHUNK_STAYS);
    check_stage(writer);
}

/* A resident region that memory was refused to is only full. */
static void a_frozen_resident_region_is_only_full(void)
{
    new_cast(small_shape);
    region(SHML_RESIDENT)->backed_end = region(SHML_RESIDENT)->begin;
    region(SHML_RESIDENT)->frozen = 1;
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    CHECK_EQ(put(writer, 0, KIB), 0);
    CHECK_EQ(row_of(writer, 0), SHML_ROW_TRANSIT);
    check_stage(writer);
}

/* Encoded chunks lie in the raw region and take no room of samples. */
static void encoded_chunks_go_to_the_raw_region(void)
{
    new_transit();
    uint32_t n = fill_transit(writer, 0, KIB);
    shml_ticket_t ticket = reserve(writer, SHML_RAW | 5, 3 * KIB);
    CHECK_EQ(ticket.offset, region(SHML_RAW_REGION)->begin);
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
    CHECK_EQ(in_transit(writer, 0, n), 0xff);
    shml_stats_t stats = stats_of(writer);
    CHECK_EQ(stats.raw.used_bytes, 3 * KIB);
    CHECK_EQ(stats.num_ready, n); /* of samples */
    check_stage(writer);
}

/* A record as large as its region fits, a larger one never will. */
static void what_is_larger_than_its_region_is_too_big(void)
{
    new_transit();
    CHECK_EQ(try_reserve(writer, 0, 8 * KIB + 1, 0), SHML_E_TOOBIG);
    CHECK_EQ(try_reserve(writer, 0, UINT64_MAX, 0), SHML_E_TOOBIG);
    CHECK_EQ(try_reserve(writer, SHML_RAW | 0, 4 * KIB + 1, 0), SHML_E_TOOBIG);
    CHECK_EQ(try_reserve(writer, 0, 0, 0), SHML_E_INVAL);
    CHECK_EQ(put(writer, 0, 8 * KIB), 0);
    CHECK_EQ(put(writer, SHML_RAW | 0, 4 * KIB), 0);
    check_stage(writer);
}

/* Without a transit region what does not fit is refused, at once and without harm to what is there. */
static void without_transit_what_does_not_fit_is_refused(void)
{
    new_cast((shape_t){4 * KIB, 0, 4 * KIB, 1});
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    (void)put(writer, 0, 4 * KIB);
    int rc = try_reserve(writer, 1, KIB, 0);
    CHECK(rc == SHML_E_FULL || rc == SHML_E_TOOBIG);
    rc = try_reserve(writer, 1, KIB, 1);
    CHECK(rc == SHML_E_FULL || rc == SHML_E_TOOBIG);
    CHECK_EQ(row_of(writer, 0), SHML_ROW_FINAL);
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Eviction
 * ---------------------------------------------------------------------------------------------------- */
/* As many records give way as the new one needs the bytes of, from the region's beginning on. */
static void only_as_much_as_is_needed_is_evicted(void)
{
    new_transit();
    CHECK_EQ(fill_transit(writer, 0, KIB), 8);
    CHECK_EQ(put(writer, 20, KIB + 1), 0);
    CHECK_EQ(in_transit(writer, 0, 8), 0xfc);
    CHECK_EQ(put(writer, 21, 512), KIB + 64); /* the rest of what was taken */
    CHECK_EQ(in_transit(writer, 0, 8), 0xfc);
    shml_stats_t stats = stats_of(writer);
    CHECK_EQ(stats.num_evicted, 2);
    CHECK_EQ(stats.num_ready, 8);
    CHECK_EQ(stats.transit.used_bytes, 6 * KIB + KIB + 64 + 512);
    check_stage(writer);
}

/* A record of just the size of one that is not needed takes its place, whatever lies around it. */
static void consumed_space_is_taken_again_first_fit(void)
{
    new_transit();
    CHECK_EQ(fill_transit(writer, 0, KIB), 8);
    for (uint64_t id = 0; id < 8; id++)
        hold(id);
    let_go(5);
    CHECK_EQ(put(writer, 20, KIB), 5 * KIB);
    shml_ref_t ref = pin(holder, 20);
    let_go(6);
    let_go(2);
    CHECK_EQ(put(writer, 21, KIB), 2 * KIB); /* the first, although the search last ended before 6 */
    CHECK_EQ(in_transit(writer, 0, 8), 0xdb);
    unpin(holder, &ref);
    check_stage(writer);
}

/* A run may be made of free bytes, holes and evictable records that lie beside each other. */
static void a_run_is_made_of_free_bytes_holes_and_records(void)
{
    new_transit();
    (void)put(writer, 0, KIB);
    (void)put(writer, 1, KIB);
    shml_ticket_t hole = reserve(writer, 2, KIB);
    for (uint64_t id = 3; id < 7; id++)
        (void)put(writer, id, KIB);
    hold(0);
    hold(4);
    hold(5);
    hold(6);
    CHECK_EQ(shml_abort(writer, &hole), SHML_OK);
    /* Evictable 1, hole 2 and evictable 3; and 1 KiB that was never used at the end, which is too small. */
    CHECK_EQ(put(writer, 20, 3 * KIB), KIB);
    CHECK_EQ(in_transit(writer, 0, 7), 0x71);
    check_stage(writer);
}

/* A run that a pinned record would cut is looked for behind it, and what is before it stays. */
static void islands_are_jumped(void)
{
    new_transit();
    CHECK_EQ(fill_transit(writer, 0, KIB), 8);
    hold(3);
    CHECK_EQ(put(writer, 20, 4 * KIB), 4 * KIB);
    CHECK_EQ(in_transit(writer, 0, 8), 0x0f);
    shml_ref_t ref = held[3];
    check_bytes(&ref, 3, 0);
    let_go(3);
    check_stage(writer);
}

/* Where no run is long enough nothing is lost, however often it is tried. */
static void nothing_is_evicted_when_the_run_does_not_fit(void)
{
    new_transit();
    CHECK_EQ(fill_transit(writer, 0, KIB), 8);
    hold(2);
    hold(5);
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(try_reserve(writer, 20, 2 * KIB + 1, i % 2), SHML_E_FULL);
        CHECK_EQ(in_transit(writer, 0, 8), 0xff);
    }
    CHECK_EQ(stats_of(writer).num_evicted, 0);
    CHECK_EQ(row_of(writer, 20), SHML_ROW_MISSING);
    CHECK_EQ(put(writer, 20, 2 * KIB), 0); /* this fits */
    CHECK_EQ(in_transit(writer, 0, 8), 0xfc);
    check_stage(writer);
}

/* A record that is being written is an island, urgent or not. */
static void what_is_being_written_is_not_evicted(void)
{
    new_transit();
    shml_ticket_t ticket = reserve(other, 0, 8 * KIB);
    CHECK_EQ(try_reserve(writer, 1, 64, 0), SHML_E_FULL);
    CHECK_EQ(try_reserve(writer, 1, 64, 1), SHML_E_FULL);
    CHECK_EQ(shml_commit(other, &ticket, SHML_REF_READY), SHML_OK);
    shml_ref_t ref = pin(reader, 0);
    unpin(reader, &ref);
    CHECK_EQ(put(writer, 1, 64), 0);
    CHECK_EQ(row_of(writer, 0), SHML_ROW_MISSING);
    check_stage(writer);
}

/* That a sample cannot be made is a record like others: it gives way, too. */
static void an_error_gives_way_like_a_sample(void)
{
    new_transit();
    shml_ticket_t ticket = reserve(writer, 0, 8 * KIB);
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_ERROR), SHML_OK);
    CHECK_EQ(stats_of(writer).num_errors, 1);
    shml_ref_t ref = look(reader, 0);
    CHECK_EQ(ref.status, SHML_REF_ERROR);
    CHECK_EQ(ref.chunk, 1);
    CHECK_EQ(try_reserve(writer, 1, 64, 0), SHML_E_FULL);
    unpin(reader, &ref);
    CHECK_EQ(put(writer, 1, 64), 0);
    CHECK_EQ(stats_of(writer).num_errors, 0);
    check_stage(writer);
}

/* What was evicted is missing, of its chunk, and can be made again. */
static void what_was_evicted_can_be_made_again(void)
{
    new_transit();
    (void)put(writer, 9, 8 * KIB);
    (void)put(writer, 10, 8 * KIB);
    shml_ref_t ref;
    CHECK_EQ(get(reader, (uint64_t[]){9}, 1, 0, &ref), 1);
    CHECK_EQ(ref.status, SHML_REF_MISSING);
    CHECK_EQ(ref.chunk, 2);
    CHECK_EQ(claim_row(writer, 9), 1);
    (void)put(writer, 9, 4 * KIB);
    ref = pin(reader, 9);
    CHECK_EQ(stats_of(writer).num_commits, 3);
    CHECK_EQ(row_of(writer, 10), SHML_ROW_MISSING);
    check_stage(writer);
}

/* A reservation that is refused for its id costs nobody its bytes. */
static void an_id_that_exists_evicts_nobody(void)
{
    new_transit();
    CHECK_EQ(fill_transit(writer, 0, KIB), 8);
    CHECK_EQ(try_reserve(other, 7, KIB, 1), SHML_E_EXISTS);
    hold(0);
    CHECK_EQ(shml_abort(writer, &(shml_ticket_t){.desc = held[0].desc, .gen = held[0].gen}), SHML_E_STALE);
    CHECK_EQ(in_transit(writer, 0, 8), 0xff);
    shml_ticket_t ticket = reserve(writer, 20, KIB);
    CHECK_EQ(try_reserve(other, 20, KIB, 1), SHML_E_EXISTS);
    CHECK_EQ(try_reserve(writer, 20, KIB, 1), SHML_E_EXISTS);
    CHECK_EQ(claim_row(writer, 30), 1);
    CHECK_EQ(try_reserve(other, 30, KIB, 1), SHML_E_EXISTS);
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
    CHECK_EQ(stats_of(writer).num_evicted, 1);
    check_stage(writer);
}

/* A ticket of an evicted record is stale, also when another record has its descriptor. */
static void tickets_of_evicted_records_are_stale(void)
{
    new_transit();
    shml_ticket_t first = reserve(writer, 0, 8 * KIB);
    CHECK_EQ(shml_commit(writer, &first, SHML_REF_READY), SHML_OK);
    shml_ticket_t second = reserve(writer, 1, 8 * KIB);
    CHECK_EQ(shml_commit(writer, &first, SHML_REF_READY), SHML_E_STALE);
    CHECK_EQ(shml_abort(writer, &first), SHML_E_STALE);
    CHECK_EQ(shml_commit(writer, &second, SHML_REF_READY), SHML_OK);
    check_stage(writer);
}

/* The reason why a chunk is broken outlives all samples. */
static void the_reason_of_a_broken_chunk_is_never_evicted(void)
{
    new_transit();
    CHECK_EQ(shml_chunk_claim(writer, 3), SHML_OK);
    shml_ticket_t ticket = reserve(writer, SHML_CHUNK_ERROR | 3, 64);
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
    CHECK_EQ(shml_chunk_end(writer, 3, SHML_FETCH_BROKEN), SHML_OK);
    for (uint64_t id = 20; id < 60; id++)
        (void)put(writer, id, (1 + id % 7) * KIB);
    (void)try_reserve(writer, 0, 8 * KIB, 1); /* which may be refused: not at the reason's cost */
    shml_ref_t ref = look(reader, SHML_CHUNK_ERROR | 3);
    CHECK_EQ(ref.status, SHML_REF_READY);
    check_bytes(&ref, SHML_CHUNK_ERROR | 3, 0);
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Growth
 * ---------------------------------------------------------------------------------------------------- */
/* While there is memory to be had, the region grows before anything is evicted. */
static void a_region_grows_before_it_evicts(void)
{
    new_transit();
    region(SHML_TRANSIT)->backed_end = region(SHML_TRANSIT)->begin + 4 * KIB;
    for (uint64_t id = 0; id < 4; id++)
        (void)put(writer, id, KIB);
    shml_ticket_t ticket;
    for (int urgent = 0; urgent < 2; urgent++) {
        CHECK_EQ(shml_reserve(writer, 4, KIB, &no_stamp, urgent, &ticket), SHML_E_EXTEND);
        CHECK_EQ(ticket.desc, SHML_TRANSIT);
        CHECK_EQ(ticket.offset + ticket.num_bytes, region(SHML_TRANSIT)->begin + 5 * KIB);
        CHECK_EQ(in_transit(writer, 0, 4), 0xf);
        CHECK_EQ(row_of(writer, 4), SHML_ROW_MISSING);
    }
    region(SHML_TRANSIT)->backed_end = region(SHML_TRANSIT)->end;
    CHECK_EQ(put(writer, 4, KIB), 4 * KIB);
    CHECK_EQ(in_transit(writer, 0, 5), 0x1f);
    check_stage(writer);
}

/* Room in transit that was never used is taken before anything is evicted, wherever the search begins. */
static void room_that_is_free_is_taken_before_anything_is_evicted(void)
{
    new_transit();
    for (uint64_t id = 0; id < 7; id++) {
        CHECK_EQ(put(writer, id, KIB), id * KIB);
        hold(id);
        let_go(id); /* moves the work word */
    }
    CHECK_EQ(in_transit(writer, 0, 7), 0x7f);
    CHECK_EQ(put(writer, 7, KIB + 64), 0); /* for which it is too small */
    CHECK_EQ(stats_of(writer).num_evicted, 2);
    check_stage(writer);
}

/* Each region asks for memory of its own, which shml_ring_back gives it. */
static void each_region_is_backed_as_it_asks(void)
{
    new_bare_stage(small_shape);
    writer = enter(SHML_SERVICE);
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    const uint64_t ids[] = {0, 30, SHML_RAW | 0}; /* one of each region */
    for (uint32_t i = 0; i < 3; i++) {
        test_note("region %u", i);
        shml_ticket_t ticket;
        shml_memory_t memory;
        CHECK_EQ(shml_reserve(writer, ids[i], KIB, &no_stamp, 0, &ticket), SHML_E_EXTEND);
        CHECK_EQ(ticket.desc, i);
        uint64_t need_end = ticket.offset + ticket.num_bytes;
        CHECK_EQ(need_end, region(i)->begin + KIB);
        CHECK_EQ(shml_ring_back(writer, stage.ring_fd, i, need_end, &memory), SHML_OK);
        CHECK(region(i)->backed_end >= need_end && region(i)->backed_end <= region(i)->end);
        CHECK_EQ(put(writer, ids[i], KIB), 0);
    }
    check_stage(writer);
}

/* A region that memory was refused to evicts within what it has. */
static void a_frozen_region_evicts_instead_of_growing(void)
{
    new_transit();
    region(SHML_TRANSIT)->backed_end = region(SHML_TRANSIT)->begin + 4 * KIB;
    region(SHML_TRANSIT)->frozen = 1;
    for (uint64_t id = 0; id < 4; id++)
        (void)put(writer, id, KIB);
    CHECK_EQ(put(writer, 4, KIB), 0);
    CHECK_EQ(in_transit(writer, 0, 5), 0x1e);
    for (uint64_t id = 1; id < 5; id++)
        hold(id);
    CHECK_EQ(try_reserve(writer, 5, KIB, 0), SHML_E_FULL);
    check_stage(writer);
}

/* What is larger than all that a frozen region has is an error, not something to wait for. */
static void a_frozen_region_says_what_can_never_fit(void)
{
    new_transit();
    region(SHML_TRANSIT)->backed_end = region(SHML_TRANSIT)->begin + 4 * KIB;
    region(SHML_TRANSIT)->frozen = 1;
    (void)put(writer, 0, KIB);
    int rc = try_reserve(writer, 1, 4 * KIB + 1, 0);
    CHECK(rc == SHML_E_MEMORY || rc == SHML_E_TOOBIG);
    CHECK(is_in_transit(writer, 0));
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Holes
 * ---------------------------------------------------------------------------------------------------- */
/* The place of a reservation that was given up is taken by what fits, before any record gives way. */
static void the_hole_of_an_aborted_writer_is_used(void)
{
    new_transit();
    shml_ticket_t tickets[8];
    for (uint64_t id = 0; id < 8; id++)
        tickets[id] = reserve(writer, id, KIB);
    for (uint64_t id = 0; id < 8; id++)
        if (id != 4)
            CHECK_EQ(shml_commit(writer, &tickets[id], SHML_REF_READY), SHML_OK);
    for (uint64_t id = 0; id < 8; id++)
        if (id != 4)
            hold(id);
    CHECK_EQ(try_reserve(writer, 20, KIB, 0), SHML_E_FULL);
    CHECK_EQ(shml_abort(writer, &tickets[4]), SHML_OK);
    CHECK_EQ(stats_of(writer).transit.used_bytes, 7 * KIB);
    CHECK_EQ(put(writer, 20, 512), 4 * KIB);
    CHECK_EQ(put(writer, 21, 512), 4 * KIB + 512);
    CHECK_EQ(stats_of(writer).num_evicted, 0);
    check_stage(writer);
}

/* What a writer had reserved when it was killed is room again once it is buried. */
static void the_hole_of_a_dead_writer_is_used(void)
{
    new_transit();
    shml_ticket_t first = reserve(other, 0, 3 * KIB), second = reserve(other, SHML_RAW | 7, 4 * KIB);
    (void)put(writer, 1, 5 * KIB);
    hold(1);
    CHECK_EQ(try_reserve(writer, 2, KIB, 0), SHML_E_FULL);
    CHECK_EQ(try_reserve(writer, SHML_RAW | 8, KIB, 0), SHML_E_FULL);
    bury(writer, other);
    CHECK_EQ(put(writer, 2, 3 * KIB), 0);
    CHECK_EQ(put(writer, SHML_RAW | 8, 4 * KIB), 0);
    CHECK_EQ(shml_commit(writer, &first, SHML_REF_READY), SHML_E_STALE);
    CHECK_EQ(shml_commit(writer, &second, SHML_REF_READY), SHML_E_STALE);
    CHECK_EQ(stats_of(writer).num_evicted, 0);
    check_stage(writer);
}

/* Many a reservation is given up: neither bytes nor descriptors are lost by it. */
static void giving_up_loses_nothing(void)
{
    new_transit();
    for (uint32_t i = 0; i < 4 * stage.control->num_descs; i++) {
        test_note("round %u", i);
        shml_ticket_t ticket = reserve(writer, i % NUM_RECORDS, 64 * (1 + i % 5));
        CHECK_EQ(shml_abort(writer, &ticket), SHML_OK);
        CHECK_EQ(shml_unclaim_rows(writer, &(uint64_t){i % NUM_RECORDS}, 1), SHML_OK);
    }
    CHECK_EQ(put(writer, 0, 8 * KIB), 0);
    CHECK_EQ(stats_of(writer).num_evicted, 0);
    check_stage(writer);
}

/* The same where there is so much room that no hole need be taken again, and where the holes are larger than what comes. */
static void giving_up_loses_nothing_in_a_large_region(void)
{
    new_cast((shape_t){0, 4096 * KIB, 4 * KIB, 1});
    for (uint32_t i = 0; i < 3 * stage.control->num_descs; i++) {
        test_note("round %u", i);
        uint64_t num_bytes = i < stage.control->num_descs ? 192 : 64;
        shml_ticket_t ticket = reserve(writer, i % NUM_RECORDS, num_bytes);
        CHECK_EQ(shml_abort(writer, &ticket), SHML_OK);
    }
    check_stage(writer);
}

/* Out of descriptors, with holes that are larger than what comes: each hole makes room for a record, though gaps lie
 * before it. */
static void holes_give_their_descriptors_back(void)
{
    new_cast((shape_t){0, 4096 * KIB, 4 * KIB, 1});
    shml_order_info_t order = begin_order(reader, 10);
    for (uint64_t id = 1000; stage.control->desc_end + 1 < stage.control->num_descs; id += 2) {
        shml_ticket_t hole = reserve(writer, id, 128);
        (void)put_for(writer, id + 1, 64, until(&order, 5)); /* lies above it, so that no other hole joins it */
        CHECK_EQ(shml_abort(writer, &hole), SHML_OK);
    }
    for (uint32_t i = 0; i < 1000; i++) {
        test_note("record %u", i);
        (void)put_for(writer, 100000 + i, 64, until(&order, 5));
    }
    check_stage(writer);
}

/* A region full of the smallest records has a descriptor for each of them. */
static void the_smallest_records_fill_a_region(void)
{
    new_transit();
    for (uint32_t round = 0; round < 3; round++)
        for (uint64_t id = 0; id < NUM_RECORDS; id++)
            (void)put(writer, (round * NUM_RECORDS + id) | UINT64_C(1) << 40, 64);
    CHECK_EQ(stats_of(writer).transit.used_bytes, 8 * KIB);
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * What keeps a record
 * ---------------------------------------------------------------------------------------------------- */
/* What an order has yet to come to gives way only to what somebody waits for. */
static void an_order_stamp_holds_unless_it_is_urgent(void)
{
    new_transit();
    shml_order_info_t order = begin_order(reader, 100);
    (void)put_for(writer, 0, 4 * KIB, until(&order, 5));
    (void)put_for(writer, 1, 4 * KIB, until(&order, 6));
    CHECK_EQ(try_reserve(writer, 20, KIB, 0), SHML_E_FULL);
    CHECK_EQ(in_transit(writer, 0, 2), 3);
    CHECK_EQ(try_reserve(writer, 20, KIB, 1), SHML_OK);
    CHECK_EQ(in_transit(writer, 0, 2), 2);
    check_stage(writer);
}

/* A stamp ends when the order's low water passes it, not before. */
static void an_order_stamp_ends_when_the_order_is_past_it(void)
{
    new_transit();
    shml_order_info_t order = begin_order(reader, 100);
    (void)put_for(writer, 0, 4 * KIB, until(&order, 5));
    (void)put_for(writer, 1, 4 * KIB, until(&order, 6));
    read_to(reader, &order, 0, 4);
    CHECK_EQ(try_reserve(writer, 20, KIB, 0), SHML_E_FULL);
    read_to(reader, &order, 0, 5);
    CHECK_EQ(put(writer, 20, 4 * KIB), 0);
    CHECK_EQ(in_transit(writer, 0, 2), 2);
    check_stage(writer);
}

/* Stamps of an order that has ended, or of another generation of its slot, hold nothing. */
static void an_order_that_ended_holds_nothing(void)
{
    new_transit();
    shml_order_info_t order = begin_order(reader, 100);
    (void)put_for(writer, 0, 8 * KIB, until(&order, 50));
    CHECK_EQ(try_reserve(writer, 20, KIB, 0), SHML_E_FULL);
    CHECK_EQ(shml_order_end(reader, order.slot, order.gen), SHML_OK);
    shml_order_info_t next = begin_order(reader, 100);
    CHECK(next.slot != order.slot || next.gen != order.gen);
    CHECK_EQ(put(writer, 20, 8 * KIB), 0);
    CHECK_EQ(row_of(writer, 0), SHML_ROW_MISSING);
    check_stage(writer);
}

/* What is there of an unfinished look-up stays until it ends, urgent or not. */
static void what_is_wanted_stays_until_the_look_up_ends(void)
{
    new_transit();
    (void)put(writer, 0, 4 * KIB);
    (void)put(writer, 1, 4 * KIB);
    CHECK_EQ(get(reader, (uint64_t[]){1, 9}, 2, SHML_GET_POST, NULL), 1);
    CHECK_EQ(reader->pinned_bytes, 0);
    CHECK_EQ(try_reserve(writer, 20, 4 * KIB + 1, 1), SHML_E_FULL);
    CHECK_EQ(in_transit(writer, 0, 2), 3);
    CHECK_EQ(put(writer, 9, 4 * KIB), 0); /* over 0: what it waited for */
    shml_ref_t refs[2];
    CHECK_EQ(get(reader, (uint64_t[]){1, 9}, 2, SHML_GET_POST, refs), 0);
    CHECK(refs[0].chunk == 1 && refs[1].chunk == 1);
    CHECK_EQ(try_reserve(writer, 20, KIB, 1), SHML_E_FULL); /* pinned now */
    CHECK_EQ(shml_unpin(reader, refs, 2), SHML_OK);
    CHECK_EQ(put(writer, 20, 8 * KIB), 0);
    check_stage(writer);
}

/* A row that somebody waits for is kept for him from its commit on, without a pin or an order. */
static void what_was_waited_for_stays_when_it_comes(void)
{
    new_transit();
    CHECK_EQ(get(reader, (uint64_t[]){0, 1}, 2, SHML_GET_POST, NULL), 2);
    (void)put(writer, 0, 4 * KIB);
    (void)put(writer, 1, 4 * KIB); /* the last: the reader is awake, but has not looked yet */
    CHECK_EQ(try_reserve(writer, 20, KIB, 1), SHML_E_FULL);
    CHECK_EQ(in_transit(writer, 0, 2), 3);
    shml_ref_t refs[2];
    CHECK_EQ(get(reader, (uint64_t[]){0, 1}, 2, SHML_GET_POST, refs), 0);
    CHECK_EQ(shml_unpin(reader, refs, 2), SHML_OK);
    CHECK_EQ(put(writer, 20, KIB), 0);
    check_stage(writer);
}

/* Withdrawing wants, and asking for something else, end what the former look-up kept. */
static void what_is_wanted_no_more_gives_way(void)
{
    new_transit();
    (void)put(writer, 0, 4 * KIB);
    (void)put(writer, 1, 4 * KIB);
    CHECK_EQ(get(reader, (uint64_t[]){0, 1, 9}, 3, SHML_GET_POST, NULL), 1);
    CHECK_EQ(try_reserve(writer, 20, KIB, 1), SHML_E_FULL);
    CHECK_EQ(get(reader, (uint64_t[]){1, 9}, 2, SHML_GET_POST, NULL), 1);
    CHECK_EQ(put(writer, 20, 4 * KIB), 0);
    shml_ref_t ref = pin(holder, 20);
    CHECK_EQ(try_reserve(writer, 21, KIB, 1), SHML_E_FULL);
    withdraw(reader);
    CHECK_EQ(put(writer, 21, KIB), 4 * KIB);
    unpin(holder, &ref);
    check_stage(writer);
}

/* Two readers want the same record: that the second goes away is no reason to take it from the first, or the reverse. */
static void a_record_that_two_want_stays_until_both_are_done(void)
{
    for (int first = 0; first < 2; first++) {
        test_note("reader %d ends first", first);
        new_transit();
        (void)put(writer, 0, 8 * KIB);
        CHECK_EQ(get(reader, (uint64_t[]){0, 9}, 2, SHML_GET_POST, NULL), 1);
        CHECK_EQ(get(holder, (uint64_t[]){0, 10}, 2, SHML_GET_POST, NULL), 1);
        withdraw(first == 0 ? reader : holder);
        CHECK_EQ(try_reserve(writer, 20, KIB, 1), SHML_E_FULL);
        withdraw(first == 0 ? holder : reader);
        CHECK_EQ(put(writer, 20, KIB), 0);
    }
}

/* A look-up that posts nothing leaves the stamps of the one before: another thread may be waiting with them. */
static void only_a_look_up_that_posts_ends_the_one_before(void)
{
    new_transit();
    (void)put(writer, 0, 4 * KIB);
    (void)put(writer, 1, 4 * KIB);
    CHECK_EQ(get(reader, (uint64_t[]){0, 9}, 2, SHML_GET_POST, NULL), 1);
    shml_ref_t ref = pin(reader, 1);
    unpin(reader, &ref);
    CHECK_EQ(try_reserve(writer, 20, 8 * KIB, 0), SHML_E_FULL);
    CHECK_EQ(get(reader, NULL, 0, SHML_GET_POST, NULL), 0);
    CHECK_EQ(put(writer, 20, 8 * KIB), 0);
    check_stage(writer);
}

/* Who holds stamps in the way of what is urgent is woken to copy; what is not urgent wakes nobody. */
static void readers_in_the_way_of_the_urgent_are_told(void)
{
    new_transit();
    (void)put(writer, 0, 8 * KIB);
    CHECK_EQ(get(reader, (uint64_t[]){0, 9}, 2, SHML_GET_POST, NULL), 1);
    uint32_t seen = shml_wake_word(reader), seen_other = shml_wake_word(holder);
    CHECK_EQ(try_reserve(writer, 9, KIB, 0), SHML_E_FULL);
    CHECK_EQ(shml_wake_word(reader), seen);
    CHECK_EQ(stats_of(writer).num_starved, 0);
    CHECK_EQ(try_reserve(writer, 9, KIB, 1), SHML_E_FULL);
    CHECK(shml_wake_word(reader) != seen);
    CHECK_EQ(shml_wake_word(holder), seen_other); /* holds no stamps */
    CHECK_EQ(stats_of(writer).num_starved, 1);
    /* It copies what is there, and then there is room for what it waits for. */
    shml_ref_t refs[2];
    CHECK_EQ(get(reader, (uint64_t[]){0, 9}, 2, SHML_GET_POST | SHML_GET_TAKE, refs), 1);
    CHECK_EQ(refs[0].chunk, 1);
    check_bytes(&refs[0], 0, 0);
    CHECK_EQ(shml_unpin(reader, refs, 2), SHML_OK);
    CHECK_EQ(get(reader, (uint64_t[]){9}, 1, SHML_GET_POST, NULL), 1);
    CHECK_EQ(try_reserve(writer, 9, KIB, 1), SHML_OK);
    check_stage(writer);
}

/* Each thing that makes a record evictable tells the services, and the reservation that found no room finds it. */
static void what_becomes_evictable_tells_the_services(void)
{
    enum { UNPINNED, PINNER_DIES, ABORTED, WRITER_DIES, COMMITTED, ORDER_ENDS, ORDER_OWNER_DIES, ORDER_MOVES };
    enum { SLOW_READER_DIES = ORDER_MOVES + 1, SLOW_READER_LEAVES, WITHDRAWN, WANT_COMPLETE, WANT_CHANGED };
    enum { WANTER_DIES = WANT_CHANGED + 1, WANTER_LEAVES, NUM_CAUSES };
    for (int cause = 0; cause < NUM_CAUSES; cause++) {
        test_note("cause %d", cause);
        new_transit();
        shml_seg_t *one = enter(SHML_WORKER), *two = enter(SHML_WORKER), *service = enter(SHML_SERVICE);
        shml_order_info_t order = begin_order(two, 10);
        int is_reserved = cause == ABORTED || cause == WRITER_DIES || cause == COMMITTED;
        int is_stamped = cause >= ORDER_ENDS && cause <= SLOW_READER_LEAVES;
        int is_wanted = cause >= WITHDRAWN;
        shml_ticket_t ticket = reserve_for(service, 0, KIB, is_stamped ? until(&order, 5) : no_stamp);
        if (!is_reserved)
            CHECK_EQ(shml_commit(service, &ticket, SHML_REF_READY), SHML_OK);
        for (uint64_t id = 1; id < 8; id++) {
            (void)put(writer, id, KIB);
            hold(id);
        }
        shml_ref_t ref = {0};
        if (cause == UNPINNED || cause == PINNER_DIES)
            ref = pin(one, 0);
        if (cause >= ORDER_MOVES && is_stamped) {
            read_to(reader, &order, 1, 9);
            read_to(one, &order, 1, 3);
        }
        if (is_wanted) /* complete once 0 alone is asked for */
            CHECK_EQ(get(one, (uint64_t[]){0, 9}, 2, SHML_GET_POST, NULL), 1);
        for (int i = 0; i < 3; i++)
            CHECK_EQ(try_reserve(writer, 20, KIB, 0), SHML_E_FULL);
        uint32_t seen = shml_work_word(writer);
        switch (cause) {
        case UNPINNED: unpin(one, &ref); break;
        case PINNER_DIES:
        case SLOW_READER_DIES:
        case WANTER_DIES: bury(writer, one); break;
        case ABORTED: CHECK_EQ(shml_abort(service, &ticket), SHML_OK); break;
        case WRITER_DIES: bury(writer, service); break;
        case COMMITTED: CHECK_EQ(shml_commit(service, &ticket, SHML_REF_READY), SHML_OK); break;
        case ORDER_ENDS: CHECK_EQ(shml_order_end(two, order.slot, order.gen), SHML_OK); break;
        case ORDER_OWNER_DIES: bury(writer, two); break;
        case ORDER_MOVES: read_to(one, &order, 1, 5); break;
        case SLOW_READER_LEAVES:
        case WANTER_LEAVES: shml_client_unregister(one); break;
        case WITHDRAWN: withdraw(one); break;
        case WANT_CHANGED: CHECK_EQ(get(one, (uint64_t[]){9}, 1, SHML_GET_POST, NULL), 1); break;
        default: CHECK_EQ(get(one, (uint64_t[]){0}, 1, SHML_GET_POST, &ref), 0); unpin(one, &ref);
        }
        if (shml_work_word(writer) == seen)
            test_fail(__FILE__, __LINE__, "the services were not told");
        CHECK_EQ(put(writer, 20, KIB), 0);
        check_stage(writer);
    }
}

/* Raw chunks give way, but for those whose rows are to stay and are not all there. */
static void encoded_chunks_that_stay_are_kept_until_they_are_done(void)
{
    new_cast(small_shape);
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    CHECK(chunk_state(writer, 0) & SHML_CHUNK_STAYS);
    CHECK_EQ(put(writer, SHML_RAW | 0, 3 * KIB), 0);
    CHECK_EQ(shml_chunk_end(writer, 0, SHML_FETCH_OK), SHML_OK);
    CHECK_EQ(put(writer, SHML_RAW | 7, KIB), 3 * KIB); /* of a chunk that does not */
    CHECK_EQ(try_reserve(writer, SHML_RAW | 8, 2 * KIB, 1), SHML_E_FULL);
    CHECK(is_in_transit(writer, SHML_RAW | 7));
    CHECK_EQ(put(writer, SHML_RAW | 8, KIB), 3 * KIB);
    CHECK_EQ(row_of(writer, SHML_RAW | 7), SHML_ROW_MISSING);
    uint32_t seen = 0;
    for (uint64_t row = 0; row < ROWS; row++) {
        CHECK_EQ(try_reserve(writer, SHML_RAW | 9, 4 * KIB, 1), SHML_E_FULL);
        CHECK(chunk_state(writer, 0) & SHML_CHUNK_HAS_RAW);
        seen = shml_work_word(writer);
        (void)put(writer, row, 64);
    }
    CHECK_EQ(chunk_state(writer, 0) & 0xf, SHML_CHUNK_DONE);
    CHECK(shml_work_word(writer) != seen); /* there is room for raw */
    CHECK_EQ(put(writer, SHML_RAW | 9, 4 * KIB), 0);
    CHECK(!(chunk_state(writer, 0) & SHML_CHUNK_HAS_RAW));
    check_stage(writer);
}

/* Who decodes an encoded chunk has it pinned. */
static void an_encoded_chunk_that_is_pinned_stays(void)
{
    new_transit();
    (void)put(writer, SHML_RAW | 1, 4 * KIB);
    shml_ref_t ref = pin(other, SHML_RAW | 1);
    CHECK_EQ(try_reserve(writer, SHML_RAW | 2, KIB, 1), SHML_E_FULL);
    check_bytes(&ref, SHML_RAW | 1, 0);
    unpin(other, &ref);
    CHECK_EQ(put(writer, SHML_RAW | 2, KIB), 0);
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Many blocks: a search takes several critical sections
 * ---------------------------------------------------------------------------------------------------- */
#define MANY_BLOCKS 3000u
static shml_ref_t many_refs[MANY_BLOCKS];
static uint64_t many_ids[MANY_BLOCKS];

/* Transit is full of the smallest records, all of them pinned by `holder`. */
static void new_many(void)
{
    new_cast((shape_t){0, 188 * KIB, 4 * KIB, 1});
    CHECK_EQ(stage.config.transit_bytes, (MANY_BLOCKS + 8) * 64);
    (void)put(writer, 0, 8 * 64);
    (void)pin(holder, 0);
    for (uint32_t i = 0; i < MANY_BLOCKS; i++) {
        many_ids[i] = 100 + i;
        (void)put(writer, many_ids[i], 64);
    }
    CHECK_EQ(get(holder, many_ids, MANY_BLOCKS, 0, many_refs), 0);
}
static uint64_t many_at(uint32_t i) { return (i + 8) * 64; }

/* However far off the only room is, it is found, and the mutex is given to others in between. */
static void room_far_off_is_found_in_several_sections(void)
{
    const uint32_t places[] = {2999, 0, 1023, 1024, 1025, 2047, 2999, 5};
    new_many();
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        test_note("place %u", places[i]);
        CHECK_EQ(try_reserve(writer, 20, 64, 0), SHML_E_FULL);
        unpin(holder, &many_refs[places[i]]);
        uint32_t num_locks = stage.num_locks;
        uint64_t id = 20000 + i;
        CHECK_EQ(put(writer, id, 64), many_at(places[i]));
        CHECK(places[i] < 2047 || stage.num_locks > num_locks + 2);
        CHECK_EQ(get(holder, &id, 1, 0, &many_refs[places[i]]), 0);
        check_stage(writer);
    }
}

/* The same where no more samples may be there: the one that goes is looked for first. */
static void one_that_may_go_is_found_far_off(void)
{
    const uint32_t places[] = {2999, 0, 1023, 1024, 1025, 2047, 2999, 5};
    new_many();
    stage.control->most_transit = MANY_BLOCKS + 1;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        test_note("place %u", places[i]);
        uint32_t num_locks = stage.num_locks;
        CHECK_EQ(try_reserve(writer, 20, 64, 1), SHML_E_FULL);
        CHECK(stage.num_locks > num_locks + 2);
        unpin(holder, &many_refs[places[i]]);
        uint64_t id = 20000 + i;
        CHECK_EQ(put(writer, id, 64), many_at(places[i]));
        CHECK_EQ(get(holder, &id, 1, 0, &many_refs[places[i]]), 0);
        check_stage(writer);
    }
}

/* While it is looked for, another goes for what others write, and then a third: nobody has more than may be there. */
static void take_one_more(void)
{
    static uint64_t id = 60000;
    stage.on_unlock = NULL;
    unpin(holder, &many_refs[id % 2 == 0 ? 2000 : 2001]);
    (void)put(other, id++, 64);
    CHECK(stats_of(other).num_transit <= stage.control->most_transit);
    stage.on_unlock = id < 60002 ? take_one_more : NULL;
}
static void others_may_take_the_place_of_the_one_that_goes(void)
{
    new_many();
    stage.control->most_transit = MANY_BLOCKS + 1;
    stage.on_unlock = take_one_more;
    uint32_t seen = shml_work_word(writer);
    int rc = try_reserve(writer, 20, 64, 0);
    CHECK(stage.on_unlock == NULL);
    CHECK(rc == SHML_OK || (rc == SHML_E_FULL && shml_work_word(writer) != seen));
    CHECK(stats_of(writer).num_transit <= stage.control->most_transit);
    CHECK_EQ(try_reserve(writer, 21, 64, 0), SHML_OK); /* what others wrote may go */
    check_stage(writer);
}

/* What happens while the search has given the mutex away: records around the place where it stopped give way. */
static void replace_where_the_search_is(void)
{
    stage.on_unlock = NULL;
    CHECK_EQ(shml_unpin(holder, many_refs + 900, 300), SHML_OK);
    uint64_t at = put(other, 50000, 200 * 64);
    CHECK(at >= many_at(900) && at <= many_at(1000));
    (void)pin(holder, 50000);
}

/* A search whose place was taken from under it still finds room, or says FULL with the work word moved. */
static void a_search_survives_that_its_place_is_taken(void)
{
    for (int is_free = 0; is_free < 2; is_free++) {
        test_note("room at the end: %d", is_free);
        new_many();
        if (is_free)
            unpin(holder, &many_refs[2500]);
        uint32_t seen = shml_work_word(writer);
        stage.on_unlock = replace_where_the_search_is;
        shml_ticket_t ticket;
        int rc = shml_reserve(writer, 20, 64, &no_stamp, 0, &ticket);
        CHECK(stage.on_unlock == NULL); /* it was given away */
        CHECK(rc == SHML_OK || (!is_free && rc == SHML_E_FULL && shml_work_word(writer) != seen));
        check_stage(writer);
        if (rc == SHML_OK)
            CHECK_EQ(shml_abort(writer, &ticket), SHML_OK);
        CHECK_EQ(try_reserve(writer, 21, 64, 0), SHML_OK);
        check_stage(writer);
    }
}

/* A client that dies while a search has given the mutex away leaves nothing odd to it. */
static void bury_the_holder(void)
{
    stage.on_unlock = NULL;
    break_mutex();
    bury(other, holder);
}
static void a_search_survives_a_repair(void)
{
    new_many();
    stage.on_unlock = bury_the_holder;
    int rc = try_reserve(writer, 20, 64, 0);
    CHECK(stage.on_unlock == NULL);
    CHECK(rc == SHML_OK || rc == SHML_E_FULL);
    (void)put(writer, 21, 100 * 64);
    CHECK_EQ(stats_of(writer).num_rebuilds, 1);
    check_stage(writer);
}

/* A look over many ids stamps each by its place, however many critical sections that takes. */
static void a_long_look_stamps_each_by_its_place(void)
{
    static uint8_t rows[MANY_BLOCKS];
    new_many();
    shml_order_info_t order = begin_order(reader, 10000);
    shml_stamp_t stamp = until(&order, 1);
    CHECK_EQ(shml_look(writer, many_ids, MANY_BLOCKS, &stamp, rows), SHML_OK); /* 1 to 3000 */
    CHECK_EQ(shml_unpin(holder, many_refs, MANY_BLOCKS), SHML_OK);
    CHECK_EQ(try_reserve(writer, 20, 64, 0), SHML_E_FULL);
    for (uint32_t low = 1000; low <= 3000; low += 500) {
        read_to(reader, &order, 0, low);
        CHECK_EQ(try_reserve(writer, 20, (low + 1) * 64, 0), SHML_E_FULL);
        shml_ticket_t ticket = reserve(writer, 20, low * 64);
        CHECK_EQ(ticket.offset - region(SHML_TRANSIT)->begin, many_at(0));
        CHECK_EQ(shml_abort(writer, &ticket), SHML_OK);
    }
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Repair and damage
 * ---------------------------------------------------------------------------------------------------- */
/* A list of blocks that makes no sense is an error for all, never a hang or a record in a wrong place. */
static void damaged_block_lists_poison_and_do_not_hang(void)
{
    for (int damage = 0; damage < 6; damage++) {
        test_note("damage %d", damage);
        new_transit();
        (void)fill_transit(writer, 0, KIB);
        hold(1);
        hold(2);
        shml_desc_t *descs = shml_descs(stage.control);
        shml_region_t *r = region(SHML_TRANSIT);
        switch (damage) {
        case 0: r->first = 0x7fffffff; break;
        case 1: descs[held[1].desc].after = 0x7fffffff; break;
        case 2: descs[held[1].desc].after = held[1].desc + 1; break;
        case 3: descs[held[2].desc].after = held[1].desc + 1; break;
        case 4: r->cursor = 0x7fffffff; break;
        default: descs[held[2].desc].after = r->first;
        }
        int is_poisoned = 0;
        for (uint64_t id = 20; id < 40 && !is_poisoned; id++) {
            shml_ticket_t ticket;
            int rc = shml_reserve(writer, id, 3 * KIB, &no_stamp, 0, &ticket);
            CHECK(rc == SHML_OK || rc == SHML_E_FULL || rc == SHML_E_POISONED);
            CHECK(rc != SHML_OK || (ticket.offset >= r->begin && ticket.offset + ticket.num_bytes <= r->end));
            is_poisoned = rc == SHML_E_POISONED;
            if (rc == SHML_OK)
                (void)shml_commit(writer, &ticket, SHML_REF_READY);
        }
        check_bytes(&held[1], 1, 0);
        check_bytes(&held[2], 2, 0);
        CHECK(!stage.is_held);
    }
}

/* Repair keeps every block where it is, and what keeps it. */
static void repair_keeps_blocks_and_what_holds_them(void)
{
    new_transit();
    shml_order_info_t order = begin_order(reader, 10);
    CHECK_EQ(put_for(writer, 0, KIB, until(&order, 5)), 0);
    CHECK_EQ(put(writer, 1, KIB), KIB);
    CHECK_EQ(put(writer, 2, KIB), 2 * KIB);
    shml_ticket_t open = reserve(other, 3, KIB), hole = reserve(other, 4, KIB);
    CHECK_EQ(put(writer, 5, 3 * KIB), 5 * KIB);
    hold(1);
    CHECK_EQ(get(reader, (uint64_t[]){2, 9}, 2, SHML_GET_POST, NULL), 1);
    CHECK_EQ(shml_abort(other, &hole), SHML_OK);
    break_mutex();
    CHECK_EQ(in_transit(writer, 0, 6), 0x27);
    CHECK_EQ(stats_of(writer).num_rebuilds, 1);
    check_stage(writer);
    CHECK_EQ(put(writer, 20, 4 * KIB), 4 * KIB); /* the hole, and 5 */
    CHECK_EQ(in_transit(writer, 0, 6), 0x07);
    shml_ref_t ref = pin(holder, 20);
    CHECK_EQ(try_reserve(writer, 21, 64, 0), SHML_E_FULL);
    CHECK_EQ(shml_commit(other, &open, SHML_REF_READY), SHML_OK);
    CHECK_EQ(put(writer, 21, KIB), 3 * KIB);
    check_bytes(&held[1], 1, 0);
    check_bytes(&ref, 20, 0);
    check_stage(writer);
}

TEST_MAIN(TEST(rows_of_chunks_that_do_not_stay_go_to_transit), TEST(rows_of_chunks_that_stay_are_resident),
          TEST(a_chunk_stays_after_all_when_rows_turn_out_smaller),
          TEST(what_finds_no_room_among_the_resident_goes_to_transit), TEST(a_frozen_resident_region_is_only_full),
          TEST(encoded_chunks_go_to_the_raw_region), TEST(what_is_larger_than_its_region_is_too_big),
          TEST(without_transit_what_does_not_fit_is_refused), TEST(only_as_much_as_is_needed_is_evicted),
          TEST(consumed_space_is_taken_again_first_fit), TEST(a_run_is_made_of_free_bytes_holes_and_records),
          TEST(islands_are_jumped), TEST(nothing_is_evicted_when_the_run_does_not_fit),
          TEST(what_is_being_written_is_not_evicted), TEST(an_error_gives_way_like_a_sample),
          TEST(what_was_evicted_can_be_made_again), TEST(an_id_that_exists_evicts_nobody),
          TEST(tickets_of_evicted_records_are_stale), TEST(the_reason_of_a_broken_chunk_is_never_evicted),
          TEST(a_region_grows_before_it_evicts), TEST(room_that_is_free_is_taken_before_anything_is_evicted),
          TEST(each_region_is_backed_as_it_asks), TEST(a_frozen_region_evicts_instead_of_growing),
          TEST(a_frozen_region_says_what_can_never_fit), TEST(the_hole_of_an_aborted_writer_is_used),
          TEST(the_hole_of_a_dead_writer_is_used), TEST(giving_up_loses_nothing),
          TEST(giving_up_loses_nothing_in_a_large_region), TEST(holes_give_their_descriptors_back),
          TEST(the_smallest_records_fill_a_region), TEST(an_order_stamp_holds_unless_it_is_urgent),
          TEST(an_order_stamp_ends_when_the_order_is_past_it), TEST(an_order_that_ended_holds_nothing),
          TEST(what_is_wanted_stays_until_the_look_up_ends), TEST(what_was_waited_for_stays_when_it_comes),
          TEST(what_is_wanted_no_more_gives_way), TEST(a_record_that_two_want_stays_until_both_are_done),
          TEST(only_a_look_up_that_posts_ends_the_one_before), TEST(readers_in_the_way_of_the_urgent_are_told),
          TEST(what_becomes_evictable_tells_the_services), TEST(encoded_chunks_that_stay_are_kept_until_they_are_done),
          TEST(an_encoded_chunk_that_is_pinned_stays), TEST(room_far_off_is_found_in_several_sections),
          TEST(one_that_may_go_is_found_far_off), TEST(others_may_take_the_place_of_the_one_that_goes),
          TEST(a_search_survives_that_its_place_is_taken), TEST(a_search_survives_a_repair),
          TEST(a_long_look_stamps_each_by_its_place), TEST(damaged_block_lists_poison_and_do_not_hang),
          TEST(repair_keeps_blocks_and_what_holds_them))
