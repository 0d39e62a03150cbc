/* Open sets: chunks of streams whose end is not known. One process stands in for all. */
#define _GNU_SOURCE
#include "transit.h"

#define PLACES  3u /* of an order */
#define UNKNOWN SHML_MAX_POSITION

static shml_seg_t *writer, *other, *owner, *reader;

static void new_cast_of(shape_t shape)
{
    chunks_per_order = PLACES;
    new_stage(shape);
    writer = enter(SHML_SERVICE);
    other = enter(SHML_SERVICE);
    owner = enter(SHML_OWNER);
    reader = enter_under(SHML_WORKER, owner);
}
static void new_cast(void) { new_cast_of(transit_shape); }

static shml_order_info_t join(shml_seg_t *seg, uint64_t key, uint32_t who, uint32_t num_readers)
{
    shml_join_t how = {key, who, num_readers, owner->self, shml_client_gen(owner, owner->self)};
    shml_order_info_t order = {.num_positions = UNKNOWN, .world_size = 1};
    CHECK_EQ(shml_order_join(seg, &how, &order), SHML_OK);
    return order;
}

static uint64_t id_of(const shml_order_info_t *order, uint64_t position)
{
    return shml_open_id(order->slot, order->gen, position);
}

static int claim_open(shml_seg_t *seg, const shml_order_info_t *order, uint64_t number, uint32_t *chunk)
{
    return shml_chunk_claim_open(seg, order->slot, order->gen, number, chunk);
}

/* Claimed by `seg`; returns its place. */
static uint32_t take(shml_seg_t *seg, const shml_order_info_t *order, uint64_t number)
{
    uint32_t chunk;
    CHECK_EQ(claim_open(seg, order, number, &chunk), SHML_OK);
    CHECK_EQ(chunk, order->slot * PLACES + number % PLACES);
    return chunk;
}

/* Fetched by `seg`: its raw record is there. */
static uint32_t fetch(shml_seg_t *seg, const shml_order_info_t *order, uint64_t number)
{
    uint32_t chunk = take(seg, order, number);
    (void)put(seg, SHML_RAW | chunk, 64);
    CHECK_EQ(shml_chunk_end(seg, chunk, SHML_FETCH_OK), SHML_OK);
    return chunk;
}

static uint64_t first_of(uint32_t chunk)
{
    uint64_t first = 0;
    CHECK_EQ(shml_chunk_first(writer, chunk, &first), SHML_OK);
    return first;
}

static uint32_t chunk_of(shml_seg_t *seg, uint64_t id)
{
    uint32_t chunk = 0;
    CHECK_EQ(shml_row_chunks(seg, &id, 1, &chunk), SHML_OK);
    return chunk;
}

static uint32_t status_of(shml_seg_t *seg, uint64_t id)
{
    shml_ref_t ref;
    uint32_t num_missing = get(seg, &id, 1, 0, &ref);
    CHECK_EQ(num_missing, ref.status == SHML_REF_MISSING);
    if (ref.status <= SHML_REF_ERROR)
        unpin(seg, &ref);
    return ref.status;
}

/* All below `end` is consumed, by the only reader of an order. */
static void consume_to(shml_seg_t *seg, const shml_order_info_t *order, uint64_t end)
{
    shml_marks(stage.control, order->slot)[seg->self] = end; /* one before, so that the place moves it */
    shml_place_t place = {order->slot, order->gen, end - 1, end};
    shml_found_t found;
    CHECK_EQ(shml_get_many(seg, NULL, 0, 0, &place, NULL, &found), SHML_OK);
    CHECK_EQ(low_water(writer, order), end);
}

/* A service dies over what it has claimed. */
static void die_over_row(uint64_t id)
{
    shml_seg_t *victim = enter(SHML_SERVICE);
    CHECK_EQ(claim_row(victim, id), 1);
    bury(writer, victim);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Places
 * ---------------------------------------------------------------------------------------------------- */
static void an_open_set_is_made_as_told_or_refused(void)
{
    new_cast();
    shml_config_t config = stage.config;
    CHECK_EQ(stage.control->num_chunks, SHML_MAX_ORDERS * PLACES);
    CHECK_EQ(stats_of(writer).chunks_todo, SHML_MAX_ORDERS * PLACES);
    CHECK_EQ(shml_control_check(stage.control, stage.control_bytes, config.boot_id, config.pid_namespace), SHML_OK);
    check_stage(writer);
    CHECK(shml_control_bytes(&config) > 0);
    config.num_chunks++;
    CHECK_EQ(shml_control_bytes(&config), 0);
    config.num_chunks = SHML_MAX_ORDERS;
    CHECK_EQ(shml_control_bytes(&config), 0);
    config = stage.config;
    config.resident_bytes = 4096;
    CHECK_EQ(shml_control_bytes(&config), 0);
    config = stage.config;
    config.transit_bytes = 0;
    CHECK_EQ(shml_control_bytes(&config), 0);
    stage.control->chunks_per_order++;
    CHECK_EQ(shml_control_check(stage.control, stage.control_bytes, config.boot_id, config.pid_namespace),
             SHML_E_LAYOUT);
}

/* What a chunk claims in one of the calls that a closed set has is refused in an open one, and the other way round. */
static void each_kind_of_set_has_its_own_claim(void)
{
    uint32_t chunk;
    new_cast();
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_E_INVAL);
    chunks_per_order = 0;
    new_stage(transit_shape);
    writer = enter(SHML_SERVICE);
    shml_order_info_t order = begin_order(writer, 10);
    CHECK_EQ(claim_open(writer, &order, 0, &chunk), SHML_E_INVAL);
    CHECK_EQ(chunk, UINT32_MAX);
    CHECK_EQ(chunk_of(writer, 6), 1);
    CHECK_EQ(chunk_of(writer, NUM_CHUNKS * ROWS), UINT32_MAX);
    check_stage(writer);
}

/* An id tells the order, its generation and the position; its chunk is the one that has the place. */
static void ids_tell_their_chunks(void)
{
    new_cast();
    (void)join(reader, 1, 0, 1);
    shml_order_info_t order = join(reader, 2, 0, 1);
    CHECK_EQ(id_of(&order, 5), (uint64_t)order.gen << 46 | (uint64_t)order.slot << 40 | 5);
    CHECK_EQ(chunk_of(writer, id_of(&order, 5)), UINT32_MAX);
    uint32_t chunk = take(writer, &order, 1);
    const uint64_t ids[] = {id_of(&order, 3),
                            id_of(&order, 4),
                            id_of(&order, 7),
                            id_of(&order, 8),
                            id_of(&order, 4 + ROWS * PLACES),
                            shml_open_id(order.slot, order.gen + 1, 4),
                            shml_open_id(order.slot + 1, order.gen, 4),
                            SHML_RAW | chunk,
                            SHML_CHUNK_ERROR | chunk,
                            shml_open_id(SHML_MAX_ORDERS - 1, 0xffff, SHML_MAX_POSITION)};
    uint32_t chunks[10];
    CHECK_EQ(shml_row_chunks(writer, ids, 10, chunks), SHML_OK);
    for (int i = 0; i < 10; i++)
        CHECK_EQ(chunks[i], i == 1 || i == 2 ? chunk : UINT32_MAX);
    CHECK_EQ(first_of(chunk), id_of(&order, 4));
    CHECK_EQ(first_of(chunk + 1), UINT64_MAX);
    uint64_t first;
    CHECK_EQ(shml_chunk_first(writer, stage.control->num_chunks, &first), SHML_E_INVAL);
    check_stage(writer);
}

/* A place is another chunk's once all of what had it is consumed, and not before. */
static void places_are_used_again_behind_the_readers(void)
{
    new_cast();
    uint32_t chunk;
    shml_order_info_t order = join(reader, 1, 0, 1);
    for (uint64_t number = 0; number < PLACES; number++)
        (void)fetch(writer, &order, number);
    CHECK_EQ(claim_open(writer, &order, PLACES, &chunk), SHML_E_FULL);
    consume_to(reader, &order, ROWS - 1);
    CHECK_EQ(claim_open(writer, &order, PLACES, &chunk), SHML_E_FULL);
    consume_to(reader, &order, ROWS);
    CHECK_EQ(first_of(0), id_of(&order, 0));
    CHECK_EQ(take(writer, &order, PLACES), 0);
    CHECK_EQ(first_of(0), id_of(&order, PLACES * ROWS));
    CHECK_EQ(claim_open(writer, &order, PLACES + 1, &chunk), SHML_E_FULL);
    CHECK_EQ(claim_open(writer, &order, 0, &chunk), SHML_E_NOTFOUND); /* consumed: it takes nobody's place */
    CHECK_EQ(first_of(0), id_of(&order, PLACES * ROWS));
    check_stage(writer);
}

/* The place of a chunk that nobody has fetched yet waits for it: else a chunk further on would have it, and wait for
 * rows that never come. */
static void a_chunk_ahead_does_not_take_a_place_that_is_needed_before(void)
{
    new_cast();
    uint32_t chunk;
    shml_order_info_t order = join(reader, 1, 0, 1);
    CHECK_EQ(claim_open(writer, &order, PLACES, &chunk), SHML_E_FULL);
    consume_to(reader, &order, ROWS + 1);
    (void)fetch(writer, &order, PLACES);
    CHECK_EQ(claim_open(writer, &order, PLACES + 1, &chunk), SHML_E_FULL);
    (void)fetch(writer, &order, 1);
    check_stage(writer);
}

static void what_belonged_to_a_chunk_goes_with_it(void)
{
    new_cast();
    shml_order_info_t order = join(reader, 1, 0, 1);
    uint32_t chunk = take(writer, &order, 0);
    die_over_row(id_of(&order, 0));
    for (int i = 0; i < SHML_MAX_ATTEMPTS; i++)
        die_over_row(id_of(&order, 1));
    (void)put(writer, id_of(&order, 2), 64);
    (void)put(writer, SHML_RAW | chunk, 64);
    (void)put(writer, SHML_CHUNK_ERROR | chunk, 64);
    CHECK_EQ(shml_chunk_end(writer, chunk, SHML_FETCH_BROKEN), SHML_OK);
    CHECK(stats_of(writer).num_suspect == 1 && stats_of(writer).num_aside == 1);
    check_stage(writer);
    consume_to(reader, &order, ROWS);
    CHECK_EQ(take(writer, &order, PLACES), chunk);
    CHECK_EQ(chunk_state(writer, chunk), SHML_CHUNK_CLAIMED);
    CHECK(stats_of(writer).num_suspect == 0 && stats_of(writer).num_aside == 0);
    CHECK_EQ(status_of(writer, SHML_CHUNK_ERROR | chunk), SHML_REF_MISSING);
    CHECK_EQ(status_of(writer, SHML_RAW | chunk), SHML_REF_MISSING);
    CHECK_EQ(status_of(reader, id_of(&order, 2)), SHML_REF_READY); /* as any other sample, until it is evicted */
    CHECK_EQ(chunk_of(reader, id_of(&order, 2)), UINT32_MAX);
    check_stage(writer);
}

/* Who fetches a chunk, reads its encoded rows or writes them has its place. */
static void a_place_in_use_is_not_given_away(void)
{
    new_cast();
    uint32_t got, chunk;
    shml_order_info_t order = join(reader, 1, 0, 1);
    chunk = take(writer, &order, 0);
    consume_to(reader, &order, ROWS);
    CHECK_EQ(claim_open(writer, &order, PLACES, &got), SHML_E_FULL); /* claimed */
    shml_ticket_t ticket = reserve(writer, SHML_RAW | chunk, 64);
    CHECK_EQ(shml_chunk_end(writer, chunk, SHML_FETCH_GIVEN_UP), SHML_OK);
    CHECK_EQ(claim_open(writer, &order, PLACES, &got), SHML_E_FULL); /* being written */
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
    shml_ref_t raw = pin(other, SHML_RAW | chunk);
    CHECK_EQ(claim_open(writer, &order, PLACES, &got), SHML_E_FULL); /* read */
    CHECK_EQ(first_of(chunk), id_of(&order, 0));
    check_bytes(&raw, SHML_RAW | chunk, 0);
    unpin(other, &raw);
    (void)put(writer, SHML_CHUNK_ERROR | chunk, 64);
    shml_ref_t error = pin(reader, SHML_CHUNK_ERROR | chunk);
    CHECK_EQ(claim_open(writer, &order, PLACES, &got), SHML_E_FULL);
    check_stage(writer);
    unpin(reader, &error);
    CHECK_EQ(take(writer, &order, PLACES), chunk);
    check_stage(writer);
}

static void claims_of_open_chunks_are_told_as_those_of_closed_ones(void)
{
    new_cast();
    uint32_t chunk;
    shml_order_info_t order = join(reader, 1, 0, 1);
    (void)take(writer, &order, 0);
    CHECK_EQ(claim_open(writer, &order, 0, &chunk), SHML_E_STALE);
    CHECK_EQ(claim_open(other, &order, 0, &chunk), SHML_E_STALE);
    (void)put(writer, SHML_RAW | 0, 64);
    CHECK_EQ(shml_chunk_end(writer, 0, SHML_FETCH_OK), SHML_OK);
    CHECK_EQ(claim_open(writer, &order, 0, &chunk), SHML_E_EXISTS);
    CHECK_EQ(chunk, 0);
    (void)take(writer, &order, 1);
    CHECK_EQ(shml_chunk_end(writer, 1, SHML_FETCH_BROKEN), SHML_OK);
    CHECK_EQ(claim_open(writer, &order, 1, &chunk), SHML_E_NOTFOUND);
    CHECK_EQ(claim_open(writer, &order, UINT64_MAX, &chunk), SHML_E_NOTFOUND);
    CHECK_EQ(claim_open(writer, &order, (SHML_MAX_POSITION + 1) / ROWS, &chunk), SHML_E_NOTFOUND);
    CHECK_EQ(shml_chunk_claim_open(writer, order.slot, order.gen + 1, 0, &chunk), SHML_E_STALE);
    CHECK_EQ(shml_chunk_claim_open(writer, SHML_MAX_ORDERS, 1, 0, &chunk), SHML_E_STALE);
    CHECK_EQ(shml_order_finish(writer, order.slot, order.gen, 2 * ROWS), SHML_OK);
    CHECK_EQ(claim_open(writer, &order, 2, &chunk), SHML_E_NOTFOUND);
    CHECK_EQ(shml_order_leave(reader, order.slot, order.gen), SHML_OK);
    CHECK_EQ(claim_open(writer, &order, 2, &chunk), SHML_E_STALE);
    shml_client_unregister(other);
    CHECK_EQ(claim_open(other, &order, 2, &chunk), SHML_E_LEFT);
    check_stage(writer);
}

/* One client reads a stream, until it dies or the iteration ends. */
static void an_iteration_has_one_client_that_reads_its_stream(void)
{
    new_cast();
    uint32_t chunk;
    shml_order_info_t order = join(reader, 1, 0, 1), second = join(reader, 2, 0, 1);
    (void)fetch(writer, &order, 0);
    CHECK_EQ(claim_open(other, &order, 1, &chunk), SHML_E_STALE);
    CHECK_EQ(first_of(1), UINT64_MAX); /* who was refused has given nothing away */
    (void)fetch(other, &second, 0);
    shml_seg_t *victim = enter(SHML_SERVICE);
    shml_order_info_t third = join(reader, 3, 0, 1);
    (void)take(victim, &third, 0);
    CHECK_EQ(claim_open(other, &third, 1, &chunk), SHML_E_STALE);
    bury(writer, victim);
    (void)take(other, &third, 1);
    CHECK_EQ(shml_order_leave(reader, order.slot, order.gen), SHML_OK);
    order = join(reader, 4, 0, 1);
    CHECK_EQ(order.slot, 0);
    (void)fetch(other, &order, 0); /* another stream, in the same slot */
    CHECK_EQ(claim_open(writer, &order, 1, &chunk), SHML_E_STALE);
    check_stage(writer);
}

/* The next iteration in a slot is not held up by what is left of the one before. */
static void a_new_iteration_takes_the_places_of_the_last(void)
{
    new_cast();
    shml_order_info_t order = join(reader, 1, 0, 1);
    for (uint64_t number = 0; number < PLACES; number++)
        (void)fetch(writer, &order, number);
    (void)put(writer, id_of(&order, 1), 64);
    CHECK_EQ(shml_order_leave(reader, order.slot, order.gen), SHML_OK);
    shml_order_info_t next = join(reader, 2, 0, 1);
    CHECK(next.slot == order.slot && next.gen != order.gen);
    CHECK_EQ(chunk_of(reader, id_of(&next, 0)), UINT32_MAX);
    for (uint64_t number = 0; number < PLACES; number++)
        (void)fetch(writer, &next, number);
    CHECK_EQ(status_of(reader, id_of(&next, 1)), SHML_REF_MISSING);
    CHECK_EQ(status_of(reader, id_of(&order, 1)), SHML_REF_MISSING);
    check_stage(writer);
}

/* Nor by who still reads the stream of one that was left, as long as there is another slot. */
static void a_new_iteration_keeps_clear_of_claimed_places(void)
{
    new_cast();
    shml_order_info_t order = join(reader, 1, 0, 1);
    uint32_t chunk;
    (void)take(writer, &order, PLACES - 1);
    CHECK_EQ(shml_order_leave(reader, order.slot, order.gen), SHML_OK);
    shml_order_info_t next = join(reader, 2, 0, 1);
    CHECK(next.slot != order.slot);
    (void)take(other, &next, PLACES - 1);
    /* All other slots live: there is no choice. */
    for (uint64_t i = 2; i < SHML_MAX_ORDERS; i++)
        CHECK(join(owner, 1 + i, 0, 1).slot != order.slot);
    shml_order_info_t last = join(reader, 100, 0, 1);
    CHECK(last.slot == order.slot && last.gen != order.gen);
    CHECK_EQ(claim_open(other, &last, PLACES - 1, &chunk), SHML_E_FULL);
    CHECK_EQ(shml_order_leave(reader, last.slot, last.gen), SHML_OK);
    check_stage(writer);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Rows
 * ---------------------------------------------------------------------------------------------------- */

/* Beyond the end there is nothing: not missing, not wanted, not to be made. */
static void there_is_nothing_beyond_the_end(void)
{
    new_cast();
    shml_order_info_t order = join(reader, 1, 0, 1);
    (void)fetch(writer, &order, 0);
    (void)put(writer, id_of(&order, 0), 64);
    (void)put(writer, id_of(&order, 3), 64);
    const uint64_t ids[] = {id_of(&order, 0), id_of(&order, 2), id_of(&order, 3), id_of(&order, 9)};
    shml_ref_t refs[4];
    uint64_t wanted[4];
    CHECK_EQ(get(reader, ids, 4, SHML_GET_POST, refs), 2);
    CHECK_EQ(shml_wanted(writer, wanted, 4), 2);
    CHECK_EQ(shml_order_finish(writer, order.slot, order.gen, 3), SHML_OK);
    CHECK_EQ(shml_wanted(writer, wanted, 4), 1);
    CHECK_EQ(wanted[0], ids[1]);
    CHECK_EQ(get(reader, ids, 4, 0, refs), 1);
    CHECK(refs[1].status == SHML_REF_MISSING && refs[2].status == SHML_REF_END && refs[3].status == SHML_REF_END);
    CHECK_EQ(refs[2].chunk, UINT32_MAX);
    CHECK(row_of(writer, ids[2]) == SHML_ROW_FINAL && row_of(writer, ids[3]) == SHML_ROW_FINAL);
    CHECK(row_of(writer, ids[0]) == SHML_ROW_TRANSIT && row_of(writer, ids[1]) == SHML_ROW_MISSING);
    uint8_t got[3];
    CHECK_EQ(shml_claim_rows(writer, ids + 1, 3, got), SHML_OK);
    CHECK(got[0] == 1 && got[1] == 0 && got[2] == 0);
    (void)put(writer, ids[1], 64);
    CHECK_EQ(get(reader, ids, 4, 0, refs), 0); /* complete */
    CHECK(refs[0].chunk == 1 && refs[1].chunk == 1);
    CHECK_EQ(shml_unpin(reader, refs, 4), SHML_OK);
    check_stage(writer);
}

/* Nor is its chunk to be fetched. */
static void a_chunk_beyond_the_end_is_not_wanted(void)
{
    new_cast();
    uint32_t chunks[4], counts[4];
    shml_order_info_t order = join(reader, 1, 0, 1);
    CHECK_EQ(shml_chunk_end(writer, take(writer, &order, 0), SHML_FETCH_GIVEN_UP), SHML_OK);
    CHECK_EQ(get(reader, (uint64_t[]){id_of(&order, 1), id_of(&order, 2)}, 2, SHML_GET_POST, NULL), 2);
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, 4), 1);
    CHECK_EQ(counts[0], 2);
    CHECK_EQ(shml_order_finish(writer, order.slot, order.gen, 2), SHML_OK);
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, 4), 1);
    CHECK_EQ(counts[0], 1);
    CHECK_EQ(shml_order_finish(writer, order.slot, order.gen, 0), SHML_OK);
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, 4), 0);
    check_stage(writer);
}

/* Rows of an order that has ended are missing for ever, whatever is still there, and nobody makes them. */
static void rows_of_ended_orders_are_nobodys_work(void)
{
    new_cast();
    shml_order_info_t order = join(reader, 1, 0, 1);
    uint32_t chunk = take(writer, &order, 0), chunks[4], counts[4];
    CHECK_EQ(shml_chunk_end(writer, chunk, SHML_FETCH_GIVEN_UP), SHML_OK);
    const uint64_t ids[] = {id_of(&order, 0), id_of(&order, 1)};
    (void)put(writer, ids[0], 64);
    CHECK_EQ(get(owner, ids, 2, SHML_GET_POST, NULL), 1);
    uint64_t wanted[4];
    CHECK_EQ(shml_wanted(writer, wanted, 4), 1);
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, 4), 1);
    CHECK_EQ(shml_order_leave(reader, order.slot, order.gen), SHML_OK);
    CHECK_EQ(get(owner, ids, 2, SHML_GET_POST, NULL), 2);
    CHECK_EQ(shml_wanted(writer, wanted, 4), 0);
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, 4), 0);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(row_of(writer, ids[i]), SHML_ROW_FINAL);
        CHECK_EQ(claim_row(writer, ids[i]), 0);
    }
    withdraw(owner);
    check_stage(writer);
}

/* The end wakes those who wait at or beyond it, and nobody else. */
static void the_end_wakes_who_waits_beyond_it(void)
{
    new_cast();
    shml_seg_t *seats[3] = {reader, enter_under(SHML_WORKER, owner), enter_under(SHML_WORKER, owner)};
    shml_order_info_t order = join(seats[0], 1, 0, 3);
    (void)join(seats[1], 1, 1, 3);
    (void)join(seats[2], 1, 2, 3);
    shml_order_info_t another = join(owner, 2, 0, 1);
    uint32_t seen[4];
    for (uint64_t i = 0; i < 3; i++)
        CHECK_EQ(get(seats[i], (uint64_t[]){id_of(&order, 10 + i)}, 1, SHML_GET_POST, NULL), 1);
    CHECK_EQ(get(owner, (uint64_t[]){id_of(&another, 50)}, 1, SHML_GET_POST, NULL), 1);
    for (int i = 0; i < 3; i++)
        seen[i] = shml_wake_word(seats[i]);
    seen[3] = shml_wake_word(owner);
    CHECK_EQ(shml_order_finish(writer, order.slot, order.gen, 11), SHML_OK);
    CHECK_EQ(shml_wake_word(seats[0]), seen[0]);
    CHECK(shml_wake_word(seats[1]) != seen[1] && shml_wake_word(seats[2]) != seen[2]);
    CHECK_EQ(shml_wake_word(owner), seen[3]);
    check_stage(writer);
}

/* A chunk that cannot be read is told to its readers, and only to them. */
static void a_broken_chunk_is_told_to_its_readers(void)
{
    new_cast();
    shml_order_info_t order = join(reader, 1, 0, 1);
    CHECK_EQ(get(reader, (uint64_t[]){id_of(&order, 5)}, 1, SHML_GET_POST, NULL), 1);
    uint32_t seen = shml_wake_word(reader);
    for (int death = 1; death <= SHML_MAX_ATTEMPTS; death++) {
        shml_seg_t *victim = enter(SHML_SERVICE);
        CHECK_EQ(shml_wake_word(reader), seen);
        (void)take(victim, &order, 1);
        bury(writer, victim);
        check_stage(writer);
    }
    CHECK(shml_wake_word(reader) != seen);
    CHECK_EQ(status_of(reader, id_of(&order, 5)), SHML_REF_BROKEN);
    CHECK_EQ(status_of(reader, id_of(&order, 3)), SHML_REF_MISSING);
    CHECK_EQ(status_of(reader, id_of(&order, 5 + ROWS * PLACES)), SHML_REF_MISSING);
    CHECK_EQ(claim_row(writer, id_of(&order, 5)), 0);
    CHECK_EQ(row_of(writer, id_of(&order, 5)), SHML_ROW_FINAL);
    consume_to(reader, &order, 2 * ROWS);
    CHECK_EQ(take(writer, &order, 1 + PLACES), 1); /* its deaths were the old chunk's */
    CHECK_EQ(shml_word_deaths(shml_chunks(stage.control)[1].word), 0);
    check_stage(writer);
}

/* The death over a row is remembered as long as its chunk has its place. */
static void deaths_over_rows_are_forgotten_with_their_chunk(void)
{
    new_cast();
    shml_order_info_t order = join(reader, 1, 0, 1);
    (void)fetch(writer, &order, 0);
    shml_seg_t *claims = enter(SHML_SERVICE), *writes = enter(SHML_SERVICE);
    die_over_row(id_of(&order, 2));
    CHECK_EQ(row_of(writer, id_of(&order, 2)), SHML_ROW_SUSPECT);
    CHECK_EQ(claim_row(other, id_of(&order, 2)), 1); /* with a death on its record */
    CHECK_EQ(claim_row(claims, id_of(&order, 0)), 1);
    (void)reserve(writes, id_of(&order, 1), 64);
    consume_to(reader, &order, ROWS);
    (void)fetch(writer, &order, PLACES);
    bury(writer, claims);
    bury(writer, writes);
    CHECK_EQ(shml_unclaim_rows(other, (uint64_t[]){id_of(&order, 2)}, 1), SHML_OK);
    shml_stats_t stats = stats_of(writer);
    CHECK(stats.num_suspect == 0 && stats.num_aside == 0 && stats.num_claimed == 0 && stats.num_reserved == 0);
    check_stage(writer);
}

/* Rows of an open set do not stay, so a chunk is only done when none of them can be made. */
static void a_chunk_is_done_only_when_all_rows_are_aside(void)
{
    new_cast();
    shml_order_info_t order = join(reader, 1, 0, 1);
    uint32_t chunk = fetch(writer, &order, 0);
    for (uint64_t i = 0; i < ROWS; i++)
        (void)put(writer, id_of(&order, i), 64);
    CHECK_EQ(chunk_state(writer, chunk) & 0xf, SHML_CHUNK_TODO);
    chunk = fetch(writer, &order, 1);
    for (uint64_t i = 0; i < ROWS; i++) {
        CHECK_EQ(chunk_state(writer, chunk) & 0xf, SHML_CHUNK_TODO);
        for (int death = 0; death < SHML_MAX_ATTEMPTS; death++)
            die_over_row(id_of(&order, ROWS + i));
        CHECK_EQ(status_of(reader, id_of(&order, ROWS + i)), SHML_REF_ASIDE);
    }
    CHECK_EQ(chunk_state(writer, chunk) & 0xf, SHML_CHUNK_DONE);
    check_stage(writer);
    CHECK_EQ(shml_order_leave(reader, order.slot, order.gen), SHML_OK);
    order = join(reader, 2, 0, 1);
    (void)take(writer, &order, 1);
    CHECK_EQ(stats_of(writer).num_aside, 0);
    check_stage(writer);
}

/* Why a chunk broke is kept as long as somebody may ask. */
static void the_error_of_a_consumed_chunk_gives_way(void)
{
    new_cast();
    shml_order_info_t order = join(reader, 1, 0, 1);
    uint32_t chunk = take(writer, &order, 0);
    (void)put(writer, SHML_CHUNK_ERROR | chunk, 8 * KIB); /* all of transit */
    CHECK_EQ(shml_chunk_end(writer, chunk, SHML_FETCH_BROKEN), SHML_OK);
    CHECK_EQ(try_reserve(writer, id_of(&order, ROWS), 64, 1), SHML_E_FULL);
    consume_to(reader, &order, ROWS);
    shml_ref_t ref = pin(reader, SHML_CHUNK_ERROR | chunk);
    CHECK_EQ(try_reserve(writer, id_of(&order, ROWS), 64, 1), SHML_E_FULL);
    unpin(reader, &ref);
    (void)put(writer, id_of(&order, ROWS), 64);
    check_stage(writer);
}

/* The raw region of streams is needed as long as the set lives. */
static void raw_memory_is_never_given_back(void)
{
    new_cast();
    shml_control_t *c = stage.control;
    shml_order_info_t order = join(reader, 1, 0, 1);
    (void)fetch(writer, &order, 0);
    for (uint32_t i = 0; i < c->num_chunks; i++)
        shml_chunks(c)[i].word = SHML_CHUNK_BROKEN;
    c->chunks_broken = c->num_chunks;
    c->chunks_todo = 0;
    CHECK_EQ(shml_raw_release(writer, stage.ring_fd), 0);
    CHECK_EQ(region(SHML_RAW_REGION)->num_blocks, 1);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Descriptors
 * ---------------------------------------------------------------------------------------------------- */

/* Small rows until no descriptor is left, the first ones stamped by `order` for positions below `until`. */
static uint64_t use_up_descriptors(const shml_order_info_t *order, uint64_t num_stamped)
{
    uint64_t position = 0;
    for (; shml_has_desc(stage.control); position++) {
        shml_stamp_t stamp = until(order, position + 1);
        (void)put_for(writer, id_of(order, position), 64, position < num_stamped ? stamp : no_stamp);
    }
    return position;
}

static void without_descriptors_what_nobody_needs_gives_way(void)
{
    new_cast_of((shape_t){0, 512 * KIB, 4 * KIB, 1});
    shml_order_info_t order = join(reader, 1, 0, 1);
    uint64_t n = use_up_descriptors(&order, 10);
    CHECK_EQ(claim_row(writer, id_of(&order, n)), 1);
    CHECK(stats_of(writer).num_evicted > 0);
    for (uint64_t i = 0; i < 10; i++) /* the order has not come to these yet */
        CHECK_EQ(row_of(writer, id_of(&order, i)), SHML_ROW_TRANSIT);
    check_stage(writer);
}

/* Encoded rows need a descriptor, and none of the raw region gives one. */
static void without_descriptors_rows_give_way_to_encoded_ones(void)
{
    new_cast_of((shape_t){0, 512 * KIB, 4 * KIB, 1});
    shml_order_info_t order = join(reader, 1, 0, 1);
    (void)use_up_descriptors(&order, 0);
    (void)fetch(writer, &order, 0);
    check_stage(writer);
}

/* What an order will read gives way to what somebody waits for, and to nothing else. */
static void without_descriptors_what_is_ahead_gives_way_to_what_is_awaited(void)
{
    new_cast_of((shape_t){0, 512 * KIB, 4 * KIB, 1});
    uint8_t got;
    shml_order_info_t order = join(reader, 1, 0, 1), second = join(owner, 2, 0, 1);
    (void)use_up_descriptors(&order, UINT64_MAX);
    uint64_t id = id_of(&second, 0), evicted = stats_of(writer).num_evicted;
    CHECK_EQ(shml_claim_rows(writer, &id, 1, &got), SHML_E_FULL);
    CHECK_EQ(got, 0);
    check_stage(writer);
    CHECK_EQ(get(owner, &id, 1, SHML_GET_POST, NULL), 1);
    CHECK_EQ(claim_row(writer, id), 1);
    CHECK_EQ(stats_of(writer).num_evicted, evicted + 1);
    check_stage(writer);
    CHECK_EQ(try_reserve(writer, SHML_RAW | 0, 64, 0), SHML_E_FULL);
    CHECK_EQ(try_reserve(writer, SHML_RAW | 0, 64, 1), SHML_OK);
}

/* When everything is pinned there is nothing to evict. */
static void without_descriptors_pinned_rows_stay(void)
{
    new_cast_of((shape_t){0, 512 * KIB, 4 * KIB, 1});
    shml_order_info_t order = join(reader, 1, 0, 1);
    uint64_t n = use_up_descriptors(&order, 0), id = id_of(&order, n);
    shml_ref_t *refs = calloc(n, sizeof *refs);
    uint64_t *ids = calloc(n, sizeof *ids);
    uint8_t got;
    for (uint64_t i = 0; i < n; i++)
        ids[i] = id_of(&order, i);
    CHECK_EQ(get(reader, ids, (uint32_t)n, 0, refs), 0);
    CHECK_EQ(get(owner, &id, 1, SHML_GET_POST, NULL), 1);
    CHECK_EQ(shml_claim_rows(writer, &id, 1, &got), SHML_E_FULL);
    CHECK_EQ(try_reserve(writer, SHML_RAW | 0, 64, 1), SHML_E_FULL);
    CHECK_EQ(shml_unpin(reader, refs, (uint32_t)n), SHML_OK);
    CHECK_EQ(claim_row(writer, id), 1);
    check_stage(writer);
    free(refs), free(ids);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Generations, rebuilding, damage
 * ---------------------------------------------------------------------------------------------------- */

/* An id has 16 bits of generation: what is left from 65536 orders ago is not taken for the new order's. */
static void generations_come_again_without_their_rows(void)
{
    new_cast();
    shml_order_info_t old = join(reader, 1, 0, 1);
    (void)fetch(writer, &old, 0);
    (void)fetch(writer, &old, 1);
    die_over_row(id_of(&old, 1));
    (void)put(writer, id_of(&old, 0), 64);
    (void)put(writer, id_of(&old, 77), 64);
    CHECK_EQ(shml_order_leave(reader, old.slot, old.gen), SHML_OK);
    shml_order_table(stage.control)[old.slot].gen = old.gen + 0xffff;
    shml_order_info_t order = join(reader, 2, 0, 1);
    CHECK_EQ(order.gen, old.gen + 0x10000);
    CHECK_EQ(id_of(&order, 0), id_of(&old, 0));
    CHECK_EQ(status_of(reader, id_of(&order, 0)), SHML_REF_MISSING);
    CHECK_EQ(status_of(reader, id_of(&order, 77)), SHML_REF_MISSING);
    CHECK_EQ(chunk_of(reader, id_of(&order, 0)), UINT32_MAX);
    CHECK_EQ(row_of(writer, id_of(&order, 1)), SHML_ROW_MISSING);
    CHECK_EQ(status_of(writer, SHML_RAW | 0), SHML_REF_MISSING);
    check_stage(writer);
}

/* What is still in use keeps its ids to itself: the new order has the next generation. */
static void generations_in_use_are_passed_over(void)
{
    new_cast();
    shml_order_info_t old = join(reader, 1, 0, 1);
    (void)put(writer, id_of(&old, 0), 64);
    shml_ref_t ref = pin(owner, id_of(&old, 0));
    CHECK_EQ(shml_order_leave(reader, old.slot, old.gen), SHML_OK);
    shml_order_table(stage.control)[old.slot].gen = old.gen + 0xffff;
    shml_order_info_t order = join(reader, 2, 0, 1);
    CHECK_EQ(order.gen, old.gen + 0x10001);
    CHECK_EQ(status_of(reader, id_of(&order, 0)), SHML_REF_MISSING);
    check_bytes(&ref, id_of(&old, 0), 0);
    unpin(owner, &ref);
    check_stage(writer);
}

/* The ids of one position in many iterations are not all in one chain of the index. */
static void ids_of_many_iterations_are_spread(void)
{
    new_cast();
    uint32_t longest = 0;
    for (uint32_t gen = 1; gen <= 32; gen++)
        (void)put(writer, shml_open_id(gen % 8, gen, 3), 64);
    for (uint32_t b = 0; b < stage.control->num_buckets; b++) {
        uint32_t num_linked = 0;
        for (uint32_t at = shml_buckets(stage.control)[b]; at != 0; at = shml_descs(stage.control)[at - 1].next)
            num_linked++;
        longest = num_linked > longest ? num_linked : longest;
    }
    CHECK(longest <= 4);
    check_stage(writer);
}

static void a_rebuild_finds_open_sets_again(void)
{
    new_cast();
    shml_order_info_t order = join(reader, 1, 0, 1);
    (void)fetch(writer, &order, 0);
    (void)take(writer, &order, 1);
    die_over_row(id_of(&order, 1));
    for (int i = 0; i < SHML_MAX_ATTEMPTS; i++)
        die_over_row(id_of(&order, 2));
    (void)put(writer, id_of(&order, 0), 64);
    CHECK_EQ(shml_order_finish(writer, order.slot, order.gen, 6), SHML_OK);
    break_mutex();
    check_stage(writer);
    CHECK_EQ(status_of(reader, id_of(&order, 0)), SHML_REF_READY);
    CHECK_EQ(row_of(writer, id_of(&order, 1)), SHML_ROW_SUSPECT);
    CHECK_EQ(status_of(reader, id_of(&order, 2)), SHML_REF_ASIDE);
    CHECK_EQ(status_of(reader, id_of(&order, 6)), SHML_REF_END);
    CHECK_EQ(stats_of(writer).chunks_claimed, 1);
}

static void damage_of_places_is_found(void)
{
    new_cast();
    const char *what = "";
    shml_order_info_t order = join(reader, 1, 0, 1);
    (void)fetch(writer, &order, 0);
    shml_chunk_t *place = &shml_chunks(stage.control)[0], good = *place;
    const uint64_t bad[] = {id_of(&order, 1), id_of(&order, ROWS), shml_open_id(1, 1, 0), SHML_RAW, UINT64_MAX};
    for (int i = 0; i < 5; i++) {
        test_note("first row %d", i);
        place->first_row = bad[i]; /* the last: nobody's, with a raw record */
        CHECK_EQ(shml_check(writer, NULL, &what), SHML_E_CORRUPT);
    }
    *place = good;
    place->num_rows++;
    CHECK_EQ(shml_check(writer, NULL, &what), SHML_E_CORRUPT);
    *place = good;
    place[1].word = SHML_CHUNK_BROKEN; /* nobody's */
    CHECK_EQ(shml_check(writer, NULL, &what), SHML_E_CORRUPT);
    place[1].word = SHML_CHUNK_TODO;
    check_stage(writer);
    die_over_row(id_of(&order, 1));
    shml_find(writer, id_of(&order, 1), &(int){0})->id = id_of(&order, 1) + ROWS * stage.control->num_buckets;
    CHECK_EQ(shml_check(writer, NULL, &what), SHML_E_CORRUPT);
    CHECK_TEXT(what, "a row is suspect without its chunk");
}

TEST_MAIN(TEST(an_open_set_is_made_as_told_or_refused), TEST(each_kind_of_set_has_its_own_claim),
          TEST(ids_tell_their_chunks), TEST(places_are_used_again_behind_the_readers),
          TEST(a_chunk_ahead_does_not_take_a_place_that_is_needed_before), TEST(what_belonged_to_a_chunk_goes_with_it),
          TEST(a_place_in_use_is_not_given_away), TEST(claims_of_open_chunks_are_told_as_those_of_closed_ones),
          TEST(an_iteration_has_one_client_that_reads_its_stream), TEST(a_new_iteration_takes_the_places_of_the_last),
          TEST(a_new_iteration_keeps_clear_of_claimed_places), TEST(there_is_nothing_beyond_the_end),
          TEST(a_chunk_beyond_the_end_is_not_wanted), TEST(rows_of_ended_orders_are_nobodys_work),
          TEST(the_end_wakes_who_waits_beyond_it), TEST(a_broken_chunk_is_told_to_its_readers),
          TEST(deaths_over_rows_are_forgotten_with_their_chunk), TEST(a_chunk_is_done_only_when_all_rows_are_aside),
          TEST(the_error_of_a_consumed_chunk_gives_way), TEST(raw_memory_is_never_given_back),
          TEST(without_descriptors_what_nobody_needs_gives_way),
          TEST(without_descriptors_rows_give_way_to_encoded_ones),
          TEST(without_descriptors_what_is_ahead_gives_way_to_what_is_awaited),
          TEST(without_descriptors_pinned_rows_stay), TEST(generations_come_again_without_their_rows),
          TEST(generations_in_use_are_passed_over), TEST(ids_of_many_iterations_are_spread),
          TEST(a_rebuild_finds_open_sets_again), TEST(damage_of_places_is_found))
