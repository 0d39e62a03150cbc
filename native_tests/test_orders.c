/* Orders, claims of rows, and chunks: what will be read, who makes it, and what becomes of the work of the dead. One
 * process stands in for all. */
#define _GNU_SOURCE
#include <sys/stat.h>

#include "transit.h"

static shml_seg_t *writer, *other, *reader, *slow;

/* Two services, an owner and a worker. */
static void new_cast(shape_t shape)
{
    new_stage(shape);
    writer = enter(SHML_SERVICE);
    other = enter(SHML_SERVICE);
    reader = enter(SHML_OWNER);
    slow = enter(SHML_WORKER);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Orders
 * ---------------------------------------------------------------------------------------------------- */
/* What an order was begun with is told to everybody. */
static void orders_are_told_as_they_were_begun(void)
{
    new_cast(transit_shape);
    CHECK_EQ(shml_num_orders(writer), 0);
    shml_order_info_t orders[4], order = {.seed = 7,
                                          .epoch = 3,
                                          .num_positions = UINT64_C(1) << 33,
                                          .kind = 2,
                                          .rank = 5,
                                          .world_size = 8,
                                          .drop_last = 1};
    CHECK_EQ(shml_orders(writer, orders, 4), 0);
    CHECK_EQ(shml_order_begin(reader, &order), SHML_OK);
    shml_order_info_t second = begin_order(slow, 10);
    CHECK(order.slot != second.slot);
    CHECK_EQ(shml_num_orders(writer), 2);
    CHECK_EQ(shml_orders(writer, orders, 1), 1);
    CHECK_EQ(shml_orders(writer, orders, 4), 2);
    const shml_order_info_t *told = orders[0].slot == order.slot ? &orders[0] : &orders[1];
    CHECK_EQ(told->gen, order.gen);
    CHECK_EQ(told->seed, 7);
    CHECK_EQ(told->epoch, 3);
    CHECK_EQ(told->num_positions, UINT64_C(1) << 33);
    CHECK(told->kind == 2 && told->rank == 5 && told->world_size == 8 && told->drop_last == 1);
    CHECK_EQ(told->low_water, 0);
    CHECK_EQ(stats_of(writer).num_orders, 2);
    check_stage(writer);
}

/* An order ends once; its slot is given away with another generation. */
static void an_order_ends_once(void)
{
    new_cast(transit_shape);
    shml_order_info_t first = begin_order(reader, 10);
    CHECK_EQ(shml_order_end(reader, first.slot, first.gen + 1), SHML_E_STALE);
    CHECK_EQ(shml_order_end(reader, first.slot, first.gen), SHML_OK);
    CHECK_EQ(shml_num_orders(writer), 0);
    CHECK_EQ(shml_order_end(reader, first.slot, first.gen), SHML_E_STALE);
    shml_order_info_t next = begin_order(reader, 10);
    CHECK(next.slot != first.slot || next.gen != first.gen);
    CHECK_EQ(shml_order_end(reader, first.slot, first.gen), SHML_E_STALE);
    CHECK(shml_order_end(reader, SHML_MAX_ORDERS, 1) < 0);
    CHECK_EQ(shml_num_orders(writer), 1);
    check_stage(writer);
}

/* There is room for so many orders, and again when one ends. */
static void so_many_orders_live_at_most(void)
{
    new_cast(transit_shape);
    shml_order_info_t orders[SHML_MAX_ORDERS], one_more = {.num_positions = 1}, told[SHML_MAX_ORDERS];
    for (uint32_t i = 0; i < SHML_MAX_ORDERS; i++)
        orders[i] = begin_order(i % 2 == 0 ? reader : slow, i);
    CHECK_EQ(shml_order_begin(reader, &one_more), SHML_E_FULL);
    CHECK_EQ(shml_orders(writer, told, SHML_MAX_ORDERS), SHML_MAX_ORDERS);
    CHECK_EQ(shml_order_end(slow, orders[33].slot, orders[33].gen), SHML_OK);
    CHECK_EQ(shml_order_begin(reader, &one_more), SHML_OK);
    CHECK_EQ(one_more.slot, orders[33].slot);
    CHECK(one_more.gen != orders[33].gen);
    CHECK_EQ(shml_num_orders(writer), SHML_MAX_ORDERS);
    check_stage(writer);
}

/* An order lives no longer than who began it. */
static void an_order_ends_with_its_owner(void)
{
    new_cast(transit_shape);
    shml_order_info_t dies = begin_order(slow, 10), stays = begin_order(reader, 10);
    bury(writer, slow);
    CHECK_EQ(shml_num_orders(writer), 1);
    CHECK_EQ(shml_order_end(reader, dies.slot, dies.gen), SHML_E_STALE);
    CHECK_EQ(low_water(writer, &stays), 0);
    shml_client_unregister(reader);
    CHECK_EQ(shml_num_orders(writer), 0);
    check_stage(writer);
}

/* The services are told when an order begins, moves or ends. */
static void the_services_are_told_of_orders(void)
{
    new_cast(transit_shape);
    (void)put(writer, 0, KIB);
    uint32_t seen = shml_work_word(writer);
    shml_order_info_t order = begin_order(reader, 10);
    CHECK(shml_work_word(writer) != seen);
    seen = shml_work_word(writer);
    shml_place_t place = {order.slot, order.gen, 2, 3};
    shml_ref_t refs[2];
    shml_found_t found;
    CHECK_EQ(shml_get_many(reader, (uint64_t[]){0}, 1, 0, &place, refs, &found), SHML_OK);
    CHECK(shml_work_word(writer) != seen); /* pinned still: it is the order that told them */
    seen = shml_work_word(writer);
    CHECK_EQ(shml_order_end(reader, order.slot, order.gen), SHML_OK);
    CHECK(shml_work_word(writer) != seen);
    CHECK_EQ(shml_unpin(reader, refs, 1), SHML_OK);
}

/* A reader's mark is where its look-up begins while it waits, and where it ends once it is complete. */
static void marks_follow_the_look_ups(void)
{
    new_cast(transit_shape);
    (void)put(writer, 0, KIB);
    shml_order_info_t order = begin_order(reader, 100);
    shml_place_t place = {order.slot, order.gen, 8, 16};
    shml_ref_t refs[2];
    shml_found_t found;
    CHECK_EQ(shml_get_many(reader, (uint64_t[]){0, 9}, 2, 0, &place, refs, &found), SHML_OK);
    CHECK_EQ(low_water(writer, &order), 0); /* nothing is changed */
    CHECK_EQ(shml_get_many(reader, (uint64_t[]){0, 9}, 2, SHML_GET_POST, &place, refs, &found), SHML_OK);
    CHECK_EQ(low_water(writer, &order), 8);
    (void)put(writer, 9, KIB);
    CHECK_EQ(low_water(writer, &order), 8);
    CHECK_EQ(shml_get_many(reader, (uint64_t[]){0, 9}, 2, SHML_GET_POST, &place, refs, &found), SHML_OK);
    CHECK_EQ(low_water(writer, &order), 16);
    CHECK_EQ(shml_unpin(reader, refs, 2), SHML_OK);
    CHECK_EQ(low_water(writer, &order), 16);
    check_stage(writer);
}

/* What was read is final for its order, though it is evicted and low water waits for a slower reader. */
static void what_was_read_is_not_made_again(void)
{
    new_cast(transit_shape);
    for (uint64_t id = 0; id < 4; id++)
        (void)put(writer, id, KIB);
    shml_order_info_t order = begin_order(reader, 100);
    shml_stamp_t stamp = {order.slot, order.gen, 1};
    shml_place_t first = {order.slot, order.gen, 0, 2}, second = {order.slot, order.gen, 2, 4};
    shml_ref_t refs[2];
    shml_found_t found;
    uint8_t rows[6];
    CHECK_EQ(shml_get_many(slow, (uint64_t[]){0, 9}, 2, SHML_GET_POST, &first, refs, &found), SHML_OK);
    CHECK_EQ(shml_get_many(reader, (uint64_t[]){2, 3}, 2, 0, &second, refs, &found), SHML_OK);
    CHECK_EQ(shml_unpin(reader, refs, 2), SHML_OK);
    CHECK_EQ(low_water(writer, &order), 0);
    for (uint64_t id = 20; id < 27; id++) /* four fill the region, three take the places of 1, 2 and 3 */
        (void)put(writer, id, KIB);
    CHECK_EQ(row_of(writer, 2), SHML_ROW_MISSING); /* by itself */
    CHECK_EQ(shml_look(writer, (uint64_t[]){0, 1, 2, 3, 4, 5}, 6, &stamp, rows), SHML_OK);
    CHECK(rows[0] == SHML_ROW_TRANSIT && rows[2] == SHML_ROW_FINAL && rows[3] == SHML_ROW_FINAL);
    CHECK(rows[4] == SHML_ROW_MISSING && rows[5] == SHML_ROW_MISSING);
    CHECK_EQ(shml_order_end(reader, order.slot, order.gen), SHML_OK);
    order = begin_order(reader, 100);
    stamp = (shml_stamp_t){order.slot, order.gen, 1};
    CHECK_EQ(shml_look(writer, (uint64_t[]){0, 1, 2, 3}, 4, &stamp, rows), SHML_OK);
    CHECK_EQ(rows[2], SHML_ROW_MISSING); /* another order has read nothing */
    check_stage(writer);
}

/* Low water is the least mark of those who read in the order, whoever began it. */
static void low_water_is_the_least_mark(void)
{
    new_cast(transit_shape);
    (void)put(writer, 0, KIB);
    shml_order_info_t order = begin_order(reader, 100), another = begin_order(reader, 100);
    read_to(slow, &order, 0, 10);
    CHECK_EQ(low_water(writer, &order), 10); /* the reader who began it has not read in it */
    read_to(reader, &order, 0, 20);
    CHECK_EQ(low_water(writer, &order), 10);
    read_to(slow, &order, 0, 30);
    CHECK_EQ(low_water(writer, &order), 20);
    CHECK_EQ(low_water(writer, &another), 0);
    break_mutex();
    CHECK_EQ(low_water(writer, &order), 20);
    CHECK_EQ(stats_of(writer).num_rebuilds, 1);
    check_stage(writer);
}

/* A slow reader that dies, or leaves, holds low water back no longer; when the last is gone it stays where it was. */
static void the_gone_hold_low_water_no_longer(void)
{
    new_cast(transit_shape);
    (void)put(writer, 0, KIB);
    shml_order_info_t order = begin_order(reader, 100);
    shml_seg_t *slower = enter(SHML_WORKER), *late = enter(SHML_WORKER);
    read_to(slower, &order, 0, 3);
    read_to(slow, &order, 0, 5);
    read_to(late, &order, 0, 50);
    CHECK_EQ(low_water(writer, &order), 3);
    bury(writer, slower);
    CHECK_EQ(low_water(writer, &order), 5);
    shml_client_unregister(slow);
    CHECK_EQ(low_water(writer, &order), 50);
    shml_seg_t *next = enter(SHML_WORKER); /* in the slot of one of them */
    CHECK_EQ(low_water(writer, &order), 50);
    read_to(next, &order, 0, 40);
    CHECK_EQ(low_water(writer, &order), 40);
    bury(writer, next);
    bury(writer, late);
    CHECK_EQ(low_water(writer, &order), 50);
    break_mutex();
    CHECK_EQ(low_water(writer, &order), 50);
    read_to(reader, &order, 0, 30); /* resumed */
    CHECK_EQ(low_water(writer, &order), 30);
    check_stage(writer);
}

/* A place in an order that has ended moves no other order, and is no error: the samples are there. */
static void a_stale_place_moves_nothing(void)
{
    new_cast(transit_shape);
    (void)put(writer, 0, KIB);
    shml_order_info_t order = begin_order(reader, 100);
    CHECK_EQ(shml_order_end(reader, order.slot, order.gen), SHML_OK);
    shml_order_info_t next = begin_order(reader, 100);
    read_to(reader, &order, 0, 50);
    order.slot = 5000;
    read_to(reader, &order, 0, 50);
    CHECK_EQ(low_water(writer, &next), 0);
    read_to(reader, &next, 0, 1);
    CHECK_EQ(low_water(writer, &next), 1);
    check_stage(writer);
}

/* A new order begins without the marks of the one that had its slot. */
static void an_order_begins_without_marks(void)
{
    new_cast(transit_shape);
    (void)put(writer, 0, KIB);
    shml_order_info_t order = begin_order(reader, 100);
    read_to(slow, &order, 0, 50);
    CHECK_EQ(shml_order_end(reader, order.slot, order.gen), SHML_OK);
    shml_order_info_t next = begin_order(reader, 100);
    CHECK_EQ(low_water(writer, &next), 0);
    (void)put_for(writer, 1, 7 * KIB, until(&next, 20));
    read_to(reader, &next, 1, 10);
    CHECK_EQ(low_water(writer, &next), 10);
    CHECK_EQ(try_reserve(writer, 2, 4 * KIB, 0), SHML_E_FULL);
    check_stage(writer);
}

/* A look stamps anew what no order needs any more, each by its place, and leaves other stamps alone. */
static void a_look_stamps_what_nobody_needs(void)
{
    new_cast(transit_shape);
    shml_order_info_t first = begin_order(reader, 100), second = begin_order(reader, 100);
    (void)put_for(writer, 0, 2 * KIB, until(&first, 5)); /* consumed below */
    (void)put_for(writer, 1, 2 * KIB, until(&first, 90));
    (void)put(writer, 2, 2 * KIB);
    (void)put_for(writer, 3, 2 * KIB, until(&first, 91));
    read_to(reader, &first, 1, 10);
    read_to(slow, &second, 1, 7);
    uint8_t rows[4];
    shml_stamp_t stamp = until(&second, 8);
    CHECK_EQ(shml_look(writer, (uint64_t[]){0, 1, 2, 30}, 4, &stamp, rows), SHML_OK); /* 8, 9, 10, 11 */
    CHECK(rows[0] == SHML_ROW_TRANSIT && rows[1] == SHML_ROW_TRANSIT && rows[2] == SHML_ROW_TRANSIT);
    CHECK_EQ(rows[3], SHML_ROW_MISSING);
    CHECK_EQ(try_reserve(writer, 20, 64, 0), SHML_E_FULL);
    read_to(slow, &second, 1, 9);
    CHECK_EQ(put(writer, 20, 2 * KIB), 0); /* whose 8 is passed */
    shml_ref_t ref = pin(reader, 20);
    CHECK_EQ(try_reserve(writer, 21, 64, 0), SHML_E_FULL);
    read_to(slow, &second, 1, 10);
    CHECK_EQ(put(writer, 21, 2 * KIB), 4 * KIB); /* 2's place */
    CHECK_EQ(in_transit(writer, 0, 4), 0xa);
    unpin(reader, &ref);
    check_stage(writer);
}

/* A look without a stamp changes nothing. */
static void a_look_without_a_stamp_changes_nothing(void)
{
    new_cast(transit_shape);
    shml_order_info_t order = begin_order(reader, 100);
    (void)put(writer, 0, 8 * KIB);
    CHECK(is_in_transit(writer, 0));
    shml_stamp_t stamp = until(&order, 5);
    uint8_t row;
    CHECK_EQ(shml_look(writer, (uint64_t[]){0}, 1, &stamp, &row), SHML_OK);
    CHECK_EQ(try_reserve(writer, 1, 64, 0), SHML_E_FULL);
    CHECK_EQ(shml_order_end(reader, order.slot, order.gen), SHML_OK);
    CHECK(is_in_transit(writer, 0));
    CHECK_EQ(try_reserve(writer, 1, 64, 0), SHML_OK);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Claims of rows
 * ---------------------------------------------------------------------------------------------------- */
/* Of several who ask for a row one has it, until it gives it back. */
static void rows_are_had_once(void)
{
    new_cast(transit_shape);
    uint8_t got[4];
    CHECK_EQ(shml_claim_rows(writer, (uint64_t[]){1, 2, 2}, 3, got), SHML_OK);
    CHECK(got[0] == 1 && got[1] == 1 && got[2] == 0);
    CHECK_EQ(shml_claim_rows(other, (uint64_t[]){2, 3, 1, 4}, 4, got), SHML_OK);
    CHECK(got[0] == 0 && got[1] == 1 && got[2] == 0 && got[3] == 1);
    CHECK_EQ(claim_row(writer, 1), 0); /* its own: it has it already */
    CHECK_EQ(row_of(reader, 1), SHML_ROW_WORK);
    CHECK_EQ(stats_of(writer).num_claimed, 4);
    CHECK_EQ(shml_unclaim_rows(other, (uint64_t[]){1, 3, 50}, 3), SHML_OK); /* 3 alone is its own */
    CHECK_EQ(claim_row(other, 1), 0);
    CHECK_EQ(row_of(reader, 3), SHML_ROW_MISSING);
    CHECK_EQ(claim_row(writer, 3), 1);
    check_stage(writer);
}

/* What is there is not to be had; what was evicted is. */
static void what_is_there_cannot_be_claimed(void)
{
    new_cast(transit_shape);
    CHECK_EQ(claim_row(writer, 1), 1);
    (void)put(writer, 1, 8 * KIB); /* ends the claim */
    CHECK_EQ(stats_of(writer).num_claimed, 0);
    CHECK_EQ(claim_row(writer, 1), 0);
    CHECK_EQ(claim_row(other, 1), 0);
    shml_ticket_t ticket = reserve(other, 2, 8 * KIB);
    CHECK_EQ(claim_row(writer, 2), 0);
    CHECK_EQ(claim_row(writer, 1), 1); /* gave way */
    CHECK_EQ(shml_commit(other, &ticket, SHML_REF_ERROR), SHML_OK);
    CHECK_EQ(claim_row(writer, 2), 0);
    check_stage(writer);
}

/* Who gave a row up, reserved or not, leaves it to others, without a record of a death. */
static void a_row_given_up_is_for_others(void)
{
    new_cast(transit_shape);
    CHECK_EQ(claim_row(writer, 1), 1);
    shml_ticket_t ticket = reserve(writer, 1, KIB);
    CHECK_EQ(shml_abort(writer, &ticket), SHML_OK);
    CHECK_EQ(shml_unclaim_rows(writer, (uint64_t[]){1}, 1), SHML_OK);
    CHECK_EQ(row_of(writer, 1), SHML_ROW_MISSING);
    CHECK_EQ(claim_row(other, 1), 1);
    (void)put(other, 1, KIB);
    check_stage(writer);
}

/* A row over which a client died is had by nobody together with others. */
static void a_suspect_is_had_alone(void)
{
    new_cast(transit_shape);
    CHECK_EQ(claim_row(other, 1), 1);
    CHECK_EQ(claim_row(other, 2), 1);
    (void)reserve(other, 2, KIB);
    bury(writer, other);
    for (uint64_t id = 1; id < 3; id++) {
        test_note("row %d", (int)id);
        CHECK_EQ(row_of(writer, id), SHML_ROW_SUSPECT);
        shml_ref_t ref;
        CHECK_EQ(get(reader, &id, 1, 0, &ref), 1);
        CHECK_EQ(ref.status, SHML_REF_MISSING);
        uint8_t got[2];
        CHECK_EQ(shml_claim_rows(writer, (uint64_t[]){id, 9}, 2, got), SHML_OK);
        CHECK(got[0] == 0 && got[1] == 1);
        CHECK_EQ(shml_unclaim_rows(writer, (uint64_t[]){9}, 1), SHML_OK);
        CHECK_EQ(claim_row(writer, id), 1);
        CHECK_EQ(row_of(writer, id), SHML_ROW_WORK);
        CHECK_EQ(shml_unclaim_rows(writer, &id, 1), SHML_OK);
        CHECK_EQ(row_of(writer, id), SHML_ROW_SUSPECT); /* no commit has cleared it */
    }
    CHECK_EQ(stats_of(writer).num_suspect, 2);
    CHECK_EQ(claim_row(writer, 2), 1);
    (void)put(writer, 2, KIB);
    CHECK_EQ(stats_of(writer).num_suspect, 1);
    check_stage(writer);
}

/* After three deaths a row will not come, and whoever asks is told so. */
static void three_deaths_set_a_row_aside(void)
{
    new_cast(transit_shape);
    for (int death = 1; death <= SHML_MAX_ATTEMPTS; death++) {
        shml_seg_t *victim = enter(SHML_SERVICE);
        CHECK_EQ(claim_row(victim, 5), 1);
        if (death == 2)
            (void)reserve(victim, 5, KIB);
        bury(writer, victim);
        CHECK_EQ(row_of(writer, 5), death < SHML_MAX_ATTEMPTS ? SHML_ROW_SUSPECT : SHML_ROW_FINAL);
        check_stage(writer);
    }
    CHECK_EQ(claim_row(writer, 5), 0);
    CHECK(try_reserve(writer, 5, KIB, 1) < 0);
    CHECK_EQ(stats_of(writer).num_aside, 1);
    shml_ref_t refs[2];
    CHECK_EQ(get(reader, (uint64_t[]){5, 6}, 2, SHML_GET_POST, refs), 1);
    CHECK_EQ(refs[0].status, SHML_REF_ASIDE);
    CHECK_EQ(refs[0].chunk, 1);
    uint64_t wanted[4];
    CHECK_EQ(shml_wanted(writer, wanted, 4), 1);
    CHECK_EQ(wanted[0], 6);
    break_mutex();
    CHECK_EQ(row_of(writer, 5), SHML_ROW_FINAL);
    check_stage(writer);
}

/* A row that came after two deaths has none on record when it must be made again. */
static void a_commit_forgets_the_deaths(void)
{
    new_cast(transit_shape);
    for (int death = 1; death <= 2 * (SHML_MAX_ATTEMPTS - 1); death++) {
        shml_seg_t *victim = enter(SHML_SERVICE);
        CHECK_EQ(claim_row(victim, 5), 1);
        bury(writer, victim);
        CHECK_EQ(row_of(writer, 5), SHML_ROW_SUSPECT);
        if (death % (SHML_MAX_ATTEMPTS - 1) != 0)
            continue;
        CHECK_EQ(claim_row(writer, 5), 1);
        shml_ticket_t ticket = reserve(writer, 5, 8 * KIB);
        CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
        CHECK_EQ(shml_descs(stage.control)[ticket.desc].deaths, 0);
        (void)put(writer, 6 + (uint64_t)death, 8 * KIB); /* evicts it */
        CHECK_EQ(row_of(writer, 5), SHML_ROW_MISSING);
    }
    check_stage(writer);
}

/* A prefetcher that went down with its supervisor, or that left, says nothing about its rows. */
static void only_a_death_of_its_own_counts_against_a_row(void)
{
    new_cast(transit_shape);
    shml_seg_t *supervisor = enter(SHML_SERVICE), *child = enter_under(SHML_SERVICE, supervisor);
    shml_seg_t *leaver = enter(SHML_SERVICE);
    CHECK_EQ(claim_row(child, 1), 1);
    CHECK_EQ(claim_row(child, 2), 1);
    (void)reserve(child, 2, KIB);
    CHECK_EQ(claim_row(leaver, 3), 1);
    CHECK_EQ(claim_row(leaver, 4), 1);
    (void)reserve(leaver, 4, KIB);
    stage.is_dead[supervisor->self] = stage.is_dead[child->self] = 1;
    CHECK_EQ(shml_reap(writer, 1), 2);
    shml_client_unregister(leaver);
    for (uint64_t id = 1; id <= 4; id++)
        CHECK_EQ(row_of(writer, id), SHML_ROW_MISSING);
    uint8_t got[4];
    CHECK_EQ(shml_claim_rows(writer, (uint64_t[]){1, 2, 3, 4}, 4, got), SHML_OK);
    CHECK(got[0] == 1 && got[1] == 1 && got[2] == 1 && got[3] == 1);
    check_stage(writer);
}

static uint32_t chunk_deaths(uint32_t chunk) { return shml_chunks(stage.control)[chunk].word >> 8 & 0xff; }

/* A prefetcher that dies under a supervisor that lives does count. Had it rows in hand as well as a chunk, the rows are
 * suspected, which are tried alone then, and the chunk is not. */
static void a_death_under_a_living_supervisor_counts(void)
{
    new_cast(transit_shape);
    shml_seg_t *child = enter_under(SHML_SERVICE, other);
    CHECK_EQ(claim_row(child, 1), 1);
    CHECK_EQ(shml_chunk_claim(child, 0), SHML_OK);
    bury(writer, child);
    CHECK_EQ(row_of(writer, 1), SHML_ROW_SUSPECT);
    CHECK_EQ(chunk_deaths(0), 0);
    child = enter_under(SHML_SERVICE, other);
    CHECK_EQ(shml_chunk_claim(child, 0), SHML_OK);
    bury(writer, child);
    CHECK_EQ(chunk_deaths(0), 1);
    check_stage(writer);
}

/* Services are told what readers wait for and nobody makes. */
static void wanted_are_those_that_nobody_makes(void)
{
    new_cast(transit_shape);
    CHECK_EQ(claim_row(other, 2), 1);
    CHECK_EQ(claim_row(other, 3), 1);
    bury(writer, other); /* 2 and 3 are suspects */
    CHECK_EQ(claim_row(writer, 4), 1);
    (void)put(writer, 5, KIB);
    uint32_t seen = shml_work_word(writer);
    CHECK_EQ(get(reader, (uint64_t[]){1, 2, 4, 5}, 4, SHML_GET_POST, NULL), 3);
    CHECK(shml_work_word(writer) != seen);
    uint64_t wanted[8];
    CHECK_EQ(shml_wanted(writer, wanted, 8), 2);
    CHECK(wanted[0] + wanted[1] == 3); /* 1 and 2 */
    CHECK_EQ(shml_wanted(writer, wanted, 1), 1);
    CHECK_EQ(shml_unclaim_rows(writer, (uint64_t[]){4}, 1), SHML_OK);
    CHECK_EQ(shml_wanted(writer, wanted, 8), 3);
    (void)put(writer, 1, KIB);
    CHECK_EQ(shml_wanted(writer, wanted, 8), 2);
    withdraw(reader);
    CHECK_EQ(shml_wanted(writer, wanted, 8), 0);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Chunks
 * ---------------------------------------------------------------------------------------------------- */
static uint8_t bare_state(uint32_t chunk) { return chunk_state(writer, chunk) & 0xf; }

/* One client fetches a chunk; when its encoded rows are there nobody need. */
static void a_chunk_is_fetched_once(void)
{
    new_cast(transit_shape);
    CHECK_EQ(chunk_state(writer, 3), SHML_CHUNK_TODO);
    CHECK_EQ(shml_chunk_claim(writer, 3), SHML_OK);
    CHECK_EQ(bare_state(3), SHML_CHUNK_CLAIMED);
    CHECK_EQ(shml_chunk_claim(other, 3), SHML_E_STALE);
    CHECK_EQ(stats_of(writer).chunks_claimed, 1);
    (void)put(writer, SHML_RAW | 3, KIB);
    uint32_t seen = shml_work_word(writer);
    CHECK(shml_chunk_end(other, 3, SHML_FETCH_OK) < 0); /* it is not its own */
    CHECK_EQ(shml_chunk_end(writer, 3, SHML_FETCH_OK), SHML_OK);
    CHECK(shml_work_word(writer) != seen);
    CHECK(chunk_state(writer, 3) & SHML_CHUNK_HAS_RAW);
    CHECK_EQ(shml_chunk_claim(other, 3), SHML_E_EXISTS);
    CHECK_EQ(shml_chunk_claim(writer, 3), SHML_E_EXISTS);
    CHECK_EQ(stats_of(writer).chunks_claimed, 0);
    CHECK_EQ(stats_of(writer).num_fetched, 1);
    CHECK(shml_chunk_end(writer, 3, SHML_FETCH_OK) < 0); /* it ended */
    check_stage(writer);
}

/* Chunks that are none are refused. */
static void chunks_that_are_none_are_refused(void)
{
    new_cast(transit_shape);
    uint8_t state;
    CHECK(shml_chunk_claim(writer, NUM_CHUNKS) < 0);
    CHECK(shml_chunk_end(writer, NUM_CHUNKS, SHML_FETCH_OK) < 0);
    CHECK(shml_chunk_look(writer, (uint32_t[]){NUM_CHUNKS}, 1, &state) < 0);
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    CHECK(shml_chunk_end(writer, 0, 3) < 0);
    CHECK_EQ(bare_state(0), SHML_CHUNK_CLAIMED);
    check_stage(writer);
}

/* What was given up, or whose encoded rows gave way, is fetched again, by whoever comes. */
static void a_chunk_that_is_not_there_any_more_is_fetched_again(void)
{
    new_cast(transit_shape);
    CHECK_EQ(shml_chunk_claim(writer, 3), SHML_OK);
    uint32_t seen = shml_work_word(writer);
    CHECK_EQ(shml_chunk_end(writer, 3, SHML_FETCH_GIVEN_UP), SHML_OK);
    CHECK(shml_work_word(writer) != seen);
    CHECK_EQ(bare_state(3), SHML_CHUNK_TODO);
    CHECK_EQ(shml_chunk_claim(other, 3), SHML_OK);
    (void)put(other, SHML_RAW | 3, KIB);
    CHECK_EQ(shml_chunk_end(other, 3, SHML_FETCH_OK), SHML_OK);
    CHECK_EQ(shml_chunk_claim(writer, 3), SHML_E_EXISTS);
    (void)put(writer, SHML_RAW | 4, 4 * KIB);
    CHECK(!(chunk_state(writer, 3) & SHML_CHUNK_HAS_RAW));
    CHECK_EQ(shml_chunk_claim(writer, 3), SHML_OK);
    check_stage(writer);
}

/* The chunks of a unit are one client's as long as it lives. */
static void a_unit_has_one_reader(void)
{
    shape_t shape = transit_shape;
    shape.unit_chunks = 4;
    for (int dies = 0; dies < 2; dies++) {
        test_note("its reader %s", dies ? "dies" : "leaves");
        new_cast(shape);
        CHECK_EQ(shml_chunk_claim(other, 4), SHML_OK);
        CHECK_EQ(shml_chunk_claim(writer, 5), SHML_E_STALE);
        (void)put(other, SHML_RAW | 4, KIB);
        CHECK_EQ(shml_chunk_end(other, 4, SHML_FETCH_OK), SHML_OK);
        CHECK_EQ(shml_chunk_claim(writer, 5), SHML_E_STALE);
        CHECK_EQ(shml_chunk_claim(other, 5), SHML_OK);
        CHECK_EQ(shml_chunk_claim(writer, 8), SHML_OK); /* of another unit */
        CHECK_EQ(shml_chunk_claim(other, 9), SHML_E_STALE);
        if (dies)
            bury(writer, other);
        else
            shml_client_unregister(other);
        shml_seg_t *next = enter(SHML_SERVICE); /* in the same slot: it is not the unit's reader by that */
        CHECK_EQ(shml_chunk_claim(writer, 5), SHML_OK);
        CHECK_EQ(shml_chunk_claim(next, 6), SHML_E_STALE);
        check_stage(writer);
    }
}

/* Chunks stay while the resident region is not promised away, and none after that. */
static void chunks_stay_while_there_is_room(void)
{
    new_cast(small_shape); /* 4 KiB for 16 chunks of 1 KiB */
    uint32_t num_stay = 0, last = 0;
    for (uint32_t chunk = 0; chunk < NUM_CHUNKS; chunk++) {
        test_note("chunk %u", chunk);
        CHECK_EQ(shml_chunk_claim(writer, chunk), SHML_OK);
        int stays = (chunk_state(writer, chunk) & SHML_CHUNK_STAYS) != 0;
        for (uint64_t row = chunk * ROWS; row < (chunk + 1) * ROWS; row++) {
            (void)put(writer, row, 256);
            CHECK(stays || row_of(writer, row) == SHML_ROW_TRANSIT);
        }
        if (stays)
            num_stay++, last = chunk;
        check_stage(writer);
    }
    CHECK(num_stay >= 1); /* of an empty region */
    CHECK(last < NUM_CHUNKS - 1);
    shml_stats_t stats = stats_of(writer);
    CHECK(stats.resident.used_bytes >= 2 * KIB && stats.resident.used_bytes <= 4 * KIB);
    CHECK(stats.chunks_done >= 2 && stats.chunks_done <= 4);
}

/* Before the first sample is there, room is promised by the size that samples are said to have. */
static void chunks_stay_by_the_size_that_was_told(void)
{
    new_cast(small_shape);
    stage.control->record_bytes = KIB; /* so that one chunk of four rows fills resident */
    CHECK_EQ(shml_chunk_claim(writer, 5), SHML_OK);
    CHECK_EQ(shml_chunk_claim(other, 6), SHML_OK);
    CHECK(chunk_state(writer, 5) & SHML_CHUNK_STAYS);
    CHECK(!(chunk_state(writer, 6) & SHML_CHUNK_STAYS));
    check_stage(writer);
}

/* Without a resident region nothing stays. */
static void without_a_resident_region_nothing_stays(void)
{
    new_cast(transit_shape);
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    CHECK(!(chunk_state(writer, 0) & SHML_CHUNK_STAYS));
    for (uint64_t row = 0; row < ROWS; row++)
        (void)put(writer, row, 64);
    CHECK_EQ(bare_state(0), SHML_CHUNK_CLAIMED); /* never done: its rows may give way */
}

/* A chunk is done by itself with the last of its rows, an error or one that was set aside among them. */
static void a_chunk_is_done_by_its_last_row(void)
{
    new_cast(small_shape);
    CHECK_EQ(shml_chunk_claim(writer, 1), SHML_OK);
    CHECK(chunk_state(writer, 1) & SHML_CHUNK_STAYS);
    (void)put(writer, SHML_RAW | 1, KIB);
    CHECK_EQ(shml_chunk_end(writer, 1, SHML_FETCH_OK), SHML_OK);
    (void)put(writer, 4, 64);
    shml_ticket_t ticket = reserve(writer, 5, 64);
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_ERROR), SHML_OK);
    for (int death = 0; death < SHML_MAX_ATTEMPTS; death++) {
        shml_seg_t *victim = enter(SHML_SERVICE);
        CHECK_EQ(claim_row(victim, 6), 1);
        bury(writer, victim);
    }
    CHECK_EQ(bare_state(1), SHML_CHUNK_TODO);
    ticket = reserve(writer, 7, 64);
    CHECK_EQ(bare_state(1), SHML_CHUNK_TODO);
    CHECK_EQ(shml_commit(writer, &ticket, SHML_REF_READY), SHML_OK);
    CHECK_EQ(bare_state(1), SHML_CHUNK_DONE);
    CHECK_EQ(stats_of(writer).chunks_done, 1);
    CHECK_EQ(shml_chunk_claim(other, 1), SHML_E_NOTFOUND);
    check_stage(writer);
    break_mutex();
    CHECK_EQ(bare_state(1), SHML_CHUNK_DONE);
    check_stage(writer);
}

/* It is done as well when the last of its rows to be decided is the one that is set aside. */
static void a_chunk_is_done_by_a_last_row_that_is_set_aside(void)
{
    new_cast(small_shape);
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    (void)put(writer, SHML_RAW | 0, KIB);
    CHECK_EQ(shml_chunk_end(writer, 0, SHML_FETCH_OK), SHML_OK);
    for (uint64_t row = 0; row < ROWS - 1; row++)
        (void)put(writer, row, 64);
    for (int death = 0; death < SHML_MAX_ATTEMPTS; death++) {
        CHECK_EQ(bare_state(0), SHML_CHUNK_TODO);
        shml_seg_t *victim = enter(SHML_SERVICE);
        CHECK_EQ(claim_row(victim, ROWS - 1), 1);
        bury(writer, victim);
    }
    CHECK_EQ(bare_state(0), SHML_CHUNK_DONE);
    check_stage(writer);
}

/* A chunk that cannot be read is broken: its readers are woken, its rows are final. */
static void a_broken_chunk_is_final(void)
{
    new_cast(transit_shape);
    CHECK_EQ(get(reader, (uint64_t[]){1, 9}, 2, SHML_GET_POST, NULL), 2);
    CHECK_EQ(get(slow, (uint64_t[]){9}, 1, SHML_GET_POST, NULL), 1);
    (void)put(writer, 2, 64); /* came before it broke */
    uint32_t seen = shml_wake_word(reader), seen_slow = shml_wake_word(slow);
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    CHECK_EQ(shml_chunk_end(writer, 0, SHML_FETCH_BROKEN), SHML_OK);
    CHECK(shml_wake_word(reader) != seen);
    CHECK_EQ(shml_wake_word(slow), seen_slow);
    CHECK_EQ(bare_state(0), SHML_CHUNK_BROKEN);
    CHECK_EQ(shml_chunk_claim(other, 0), SHML_E_NOTFOUND);
    CHECK_EQ(row_of(writer, 1), SHML_ROW_FINAL);
    shml_ref_t refs[3];
    CHECK_EQ(get(reader, (uint64_t[]){1, 2, 9}, 3, SHML_GET_POST, refs), 1);
    CHECK_EQ(refs[0].status, SHML_REF_BROKEN);
    CHECK_EQ(refs[0].chunk, 0);
    CHECK_EQ(refs[1].status, SHML_REF_READY);
    CHECK_EQ(refs[2].status, SHML_REF_MISSING);
    uint64_t wanted[4];
    CHECK_EQ(shml_wanted(writer, wanted, 4), 2); /* 9, of both readers */
    CHECK(wanted[0] == 9 && wanted[1] == 9);
    check_stage(writer);
}

/* A chunk over whose fetching three clients died is set aside. */
static void three_deaths_break_a_chunk(void)
{
    new_cast(transit_shape);
    CHECK_EQ(get(reader, (uint64_t[]){0}, 1, SHML_GET_POST, NULL), 1);
    for (int death = 1; death <= SHML_MAX_ATTEMPTS; death++) {
        test_note("death %d", death);
        uint32_t seen = shml_wake_word(reader);
        shml_seg_t *victim = enter(SHML_SERVICE);
        CHECK_EQ(shml_chunk_claim(victim, 0), SHML_OK);
        bury(writer, victim);
        int is_last = death == SHML_MAX_ATTEMPTS;
        CHECK_EQ(bare_state(0), is_last ? SHML_CHUNK_BROKEN : SHML_CHUNK_TODO);
        CHECK_EQ(shml_wake_word(reader) != seen, is_last);
        shml_ref_t ref;
        CHECK_EQ(get(reader, (uint64_t[]){0}, 1, 0, &ref), !is_last);
        CHECK_EQ(ref.status, is_last ? SHML_REF_BROKEN : SHML_REF_MISSING);
        check_stage(writer);
    }
    CHECK_EQ(stats_of(writer).chunks_broken, 1);
}

/* Leaving with a chunk, or going down with the supervisor, is no death on the chunk's record. */
static void only_a_death_of_its_own_counts_against_a_chunk(void)
{
    new_cast(transit_shape);
    for (int i = 0; i < SHML_MAX_ATTEMPTS; i++) {
        shml_seg_t *leaver = enter(SHML_SERVICE);
        CHECK_EQ(shml_chunk_claim(leaver, 0), SHML_OK);
        shml_client_unregister(leaver);
        shml_seg_t *supervisor = enter(SHML_SERVICE), *child = enter_under(SHML_SERVICE, supervisor);
        CHECK_EQ(shml_chunk_claim(child, 0), SHML_OK);
        stage.is_dead[supervisor->self] = stage.is_dead[child->self] = 1;
        CHECK_EQ(shml_reap(writer, 1), 2);
        CHECK_EQ(bare_state(0), SHML_CHUNK_TODO);
        CHECK_EQ(shml_chunks(stage.control)[0].word >> 8 & 0xff, 0);
    }
    check_stage(writer);
}

/* A chunk that stays stays so when its fetcher died, and its raw record is kept from eviction. */
static void a_chunk_that_stays_stays_after_a_death(void)
{
    new_cast(small_shape);
    CHECK_EQ(shml_chunk_claim(other, 0), SHML_OK);
    CHECK(chunk_state(writer, 0) & SHML_CHUNK_STAYS);
    bury(writer, other);
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    CHECK(chunk_state(writer, 0) & SHML_CHUNK_STAYS);
    (void)put(writer, 0, 64);
    CHECK_EQ(row_of(writer, 0), SHML_ROW_FINAL);
    check_stage(writer);
}

/* Chunks are counted by the rows that readers wait for, as long as somebody has to fetch them. */
static void wanted_chunks_are_counted_by_rows(void)
{
    new_cast(transit_shape);
    uint32_t chunks[NUM_CHUNKS], counts[NUM_CHUNKS], by_chunk[NUM_CHUNKS] = {0};
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, NUM_CHUNKS), 0);
    CHECK_EQ(get(reader, (uint64_t[]){17, 9, 8, 40, 44, 48, 52}, 7, SHML_GET_POST, NULL), 7);
    CHECK_EQ(get(slow, (uint64_t[]){10, 21, 1}, 3, SHML_GET_POST, NULL), 3);
    CHECK_EQ(shml_chunk_claim(writer, 10), SHML_OK); /* of 40: claimed */
    CHECK_EQ(shml_chunk_claim(writer, 11), SHML_OK); /* of 44: fetched */
    (void)put(writer, SHML_RAW | 11, 64);
    CHECK_EQ(shml_chunk_end(writer, 11, SHML_FETCH_OK), SHML_OK);
    CHECK_EQ(shml_chunk_claim(writer, 12), SHML_OK); /* of 48: broken */
    CHECK_EQ(shml_chunk_end(writer, 12, SHML_FETCH_BROKEN), SHML_OK);
    (void)put(writer, 52, 64); /* of 13: it is there */
    int n = shml_chunks_wanted(writer, chunks, counts, NUM_CHUNKS);
    CHECK_EQ(n, 4);
    for (int i = 0; i < n; i++)
        by_chunk[chunks[i]] += counts[i];
    CHECK(by_chunk[4] == 1 && by_chunk[2] == 3 && by_chunk[5] == 1 && by_chunk[0] == 1);
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, 2), 2);
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, NUM_CHUNKS), 4); /* counted from nothing each time */
    for (int i = 0; i < 4; i++)
        CHECK_EQ(counts[i], chunks[i] == 2 ? 3 : 1);
    withdraw(reader);
    withdraw(slow);
    CHECK_EQ(shml_chunks_wanted(writer, chunks, counts, NUM_CHUNKS), 0);
}

/* Chunk 0 stays and is done, its encoded rows are still there; all others are broken. */
static void finish_all_chunks(void)
{
    CHECK_EQ(shml_chunk_claim(writer, 0), SHML_OK);
    (void)put(writer, SHML_RAW | 0, 4 * KIB);
    CHECK_EQ(shml_chunk_end(writer, 0, SHML_FETCH_OK), SHML_OK);
    for (uint64_t row = 0; row < ROWS; row++)
        (void)put(writer, row, 64);
    CHECK_EQ(bare_state(0), SHML_CHUNK_DONE);
    for (uint32_t chunk = 1; chunk < NUM_CHUNKS; chunk++) {
        CHECK_EQ(shml_raw_release(writer, stage.ring_fd), 0);
        CHECK_EQ(shml_chunk_claim(writer, chunk), SHML_OK);
        CHECK_EQ(shml_raw_release(writer, stage.ring_fd), 0);
        CHECK_EQ(shml_chunk_end(writer, chunk, SHML_FETCH_BROKEN), SHML_OK);
    }
}

/* The raw region's memory is given back when nothing will be fetched any more, and not before. */
static void raw_memory_is_given_back_when_all_is_done(void)
{
    new_cast(small_shape);
    finish_all_chunks();
    struct stat before, after;
    CHECK(fstat(stage.ring_fd, &before) == 0);
    CHECK_EQ(shml_raw_release(writer, stage.ring_fd), 1);
    CHECK(fstat(stage.ring_fd, &after) == 0);
    CHECK(after.st_blocks < before.st_blocks);
    CHECK_EQ(region(SHML_RAW_REGION)->backed_end, region(SHML_RAW_REGION)->begin);
    CHECK_EQ(stats_of(writer).raw.used_bytes, 0);
    shml_ref_t ref = look(reader, 0);
    check_bytes(&ref, 0, 0); /* what stays is not touched */
    check_stage(writer);
}

/* Encoded rows that somebody still reads are not taken from under him. */
static void raw_memory_in_use_is_not_given_back(void)
{
    new_cast(small_shape);
    finish_all_chunks();
    shml_ref_t ref = pin(other, SHML_RAW | 0);
    CHECK_EQ(shml_raw_release(writer, stage.ring_fd), 0);
    check_bytes(&ref, SHML_RAW | 0, 0);
    unpin(other, &ref);
    CHECK_EQ(shml_raw_release(writer, stage.ring_fd), 1);
    check_stage(writer);
}

/* Every read of a row is counted, whether its record is new or was there before. */
static void reads_are_counted_by_row(void)
{
    new_cast(transit_shape);
    uint32_t reads[3];
    CHECK_EQ(shml_count_reads(reader, (uint64_t[]){1, 2, 1}, 3, reads), SHML_OK);
    CHECK(reads[0] == 0 && reads[1] == 0 && reads[2] == 1);
    (void)put(writer, 1, 8 * KIB);
    (void)put(writer, 2, 8 * KIB); /* evicts 1, whose count goes on */
    CHECK_EQ(shml_count_reads(slow, (uint64_t[]){2, 1}, 2, reads), SHML_OK);
    CHECK(reads[0] == 1 && reads[1] == 2);
    check_stage(writer);
}

TEST_MAIN(TEST(orders_are_told_as_they_were_begun), TEST(an_order_ends_once), TEST(so_many_orders_live_at_most),
          TEST(an_order_ends_with_its_owner), TEST(the_services_are_told_of_orders), TEST(marks_follow_the_look_ups),
          TEST(what_was_read_is_not_made_again), TEST(low_water_is_the_least_mark),
          TEST(the_gone_hold_low_water_no_longer), TEST(a_stale_place_moves_nothing),
          TEST(an_order_begins_without_marks), TEST(a_look_stamps_what_nobody_needs),
          TEST(a_look_without_a_stamp_changes_nothing), TEST(rows_are_had_once), TEST(what_is_there_cannot_be_claimed),
          TEST(a_row_given_up_is_for_others), TEST(a_suspect_is_had_alone), TEST(three_deaths_set_a_row_aside),
          TEST(a_commit_forgets_the_deaths), TEST(only_a_death_of_its_own_counts_against_a_row),
          TEST(a_death_under_a_living_supervisor_counts), TEST(wanted_are_those_that_nobody_makes),
          TEST(a_chunk_is_fetched_once), TEST(chunks_that_are_none_are_refused),
          TEST(a_chunk_that_is_not_there_any_more_is_fetched_again), TEST(a_unit_has_one_reader),
          TEST(chunks_stay_while_there_is_room), TEST(chunks_stay_by_the_size_that_was_told),
          TEST(without_a_resident_region_nothing_stays), TEST(a_chunk_is_done_by_its_last_row),
          TEST(a_chunk_is_done_by_a_last_row_that_is_set_aside), TEST(a_broken_chunk_is_final),
          TEST(three_deaths_break_a_chunk), TEST(only_a_death_of_its_own_counts_against_a_chunk),
          TEST(a_chunk_that_stays_stays_after_a_death), TEST(wanted_chunks_are_counted_by_rows),
          TEST(raw_memory_is_given_back_when_all_is_done), TEST(raw_memory_in_use_is_not_given_back),
          TEST(reads_are_counted_by_row))
