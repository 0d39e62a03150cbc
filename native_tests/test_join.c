/* Joined orders: one iteration that several readers share out among themselves. One process stands in for all. */
#define _GNU_SOURCE
#include "transit.h"

static shml_seg_t *writer, *owner, *readers[3];

/* A service, an owner and its three workers. Rows 0 to 15 are there. */
static void new_cast(void)
{
    new_stage(transit_shape);
    writer = enter(SHML_SERVICE);
    owner = enter(SHML_OWNER);
    for (int i = 0; i < 3; i++)
        readers[i] = enter_under(SHML_WORKER, owner);
    for (uint64_t id = 0; id < 16; id++)
        (void)put(writer, id, 64);
}

static shml_join_t join_of(uint64_t key, uint32_t reader, uint32_t num_readers)
{
    return (shml_join_t){.key = key,
                         .reader = reader,
                         .num_readers = num_readers,
                         .owner = owner->self,
                         .owner_gen = shml_client_gen(owner, owner->self)};
}

static shml_order_info_t join(shml_seg_t *seg, uint64_t key, uint32_t reader, uint32_t num_readers)
{
    shml_join_t how = join_of(key, reader, num_readers);
    shml_order_info_t order = {.seed = 1, .num_positions = 100, .world_size = 1};
    CHECK_EQ(shml_order_join(seg, &how, &order), SHML_OK);
    return order;
}

static shml_order_info_t told(const shml_order_info_t *order)
{
    shml_order_info_t orders[SHML_MAX_ORDERS];
    int n = shml_orders(writer, orders, SHML_MAX_ORDERS);
    for (int i = 0; i < n; i++)
        if (orders[i].slot == order->slot && orders[i].gen == order->gen)
            return orders[i];
    test_fail(__FILE__, __LINE__, "the order does not live");
}

static int lives(const shml_order_info_t *order)
{
    const shml_order_t *o = &shml_order_table(stage.control)[order->slot];
    return o->state == SHML_ORDER_LIVE && o->gen == order->gen;
}

/* `seg` has read its share of the positions below `end`, beginning with `begin`. */
static void read_share(shml_seg_t *seg, const shml_order_info_t *order, uint64_t begin, uint64_t end)
{
    shml_place_t place = {order->slot, order->gen, begin, end};
    shml_ref_t ref;
    shml_found_t found;
    CHECK_EQ(shml_get_many(seg, (uint64_t[]){0}, 1, 0, &place, &ref, &found), SHML_OK);
    CHECK_EQ(found.num_missing, 0);
    CHECK_EQ(shml_unpin(seg, &ref, 1), SHML_OK);
}

/* The first to come decides what the order is; the others are told. */
static void readers_of_one_key_share_an_order(void)
{
    new_cast();
    shml_join_t how = join_of(7, 2, 3);
    shml_order_info_t first = {.seed = 5, .epoch = 3, .num_positions = 50, .kind = 1, .world_size = 1},
                      second = {.seed = 9};
    CHECK_EQ(shml_order_join(readers[2], &how, &first), SHML_OK);
    how.reader = 0;
    CHECK_EQ(shml_order_join(readers[0], &how, &second), SHML_OK);
    CHECK(second.slot == first.slot && second.gen == first.gen);
    CHECK(second.seed == 5 && second.epoch == 3 && second.num_positions == 50 && second.kind == 1);
    CHECK_EQ(second.num_readers, 3);
    CHECK_EQ(shml_num_orders(writer), 1);
    shml_order_info_t known = told(&first);
    CHECK(known.num_readers == 3 && known.is_finished == 0 && known.rank == 0 && known.world_size == 1);
    check_stage(writer);
}

/* Another key, another number of readers, another owner, or a reader that is there already: another order. */
static void other_iterations_are_other_orders(void)
{
    new_cast();
    shml_order_info_t orders[5];
    orders[0] = join(readers[0], 7, 0, 2);
    orders[1] = join(readers[0], 8, 0, 2);
    orders[2] = join(readers[0], 7, 0, 3);
    orders[3] = join(readers[1], 7, 0, 2); /* the first one has its reader 0 */
    shml_seg_t *stranger = enter(SHML_OWNER);
    shml_join_t how = join_of(7, 1, 2);
    how.owner = stranger->self;
    how.owner_gen = shml_client_gen(stranger, stranger->self);
    orders[4] = (shml_order_info_t){.num_positions = 1};
    CHECK_EQ(shml_order_join(stranger, &how, &orders[4]), SHML_OK);
    for (int i = 0; i < 5; i++)
        for (int k = 0; k < i; k++)
            CHECK(orders[i].slot != orders[k].slot);
    CHECK_EQ(join(readers[2], 7, 1, 2).slot, orders[0].slot);
    check_stage(writer);
}

/* What cannot be joined changes nothing. */
static void bad_joins_are_refused(void)
{
    new_cast();
    shml_order_info_t order = {.num_positions = 1};
    shml_join_t how = join_of(7, 3, 3);
    CHECK_EQ(shml_order_join(readers[0], &how, &order), SHML_E_INVAL);
    how = join_of(7, 0, 0);
    CHECK_EQ(shml_order_join(readers[0], &how, &order), SHML_E_INVAL);
    how = join_of(7, 0, SHML_MAX_READERS + 1);
    CHECK_EQ(shml_order_join(readers[0], &how, &order), SHML_E_INVAL);
    how = join_of(7, 0, 3);
    how.owner_gen++;
    CHECK_EQ(shml_order_join(readers[0], &how, &order), SHML_E_INVAL);
    const int32_t none[] = {-1, 200, SHML_MAX_CLIENTS, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 5; i++) {
        how.owner = none[i];
        how.owner_gen = shml_client_gen(owner, none[i]);
        CHECK_EQ(shml_order_join(readers[0], &how, &order), SHML_E_INVAL);
    }
    CHECK_EQ(shml_num_orders(writer), 0);
    (void)join(readers[0], 7, 0, 3);
    how = join_of(7, 1, 3);
    CHECK_EQ(shml_order_join(readers[0], &how, &order), SHML_E_INVAL); /* it is another reader of the same */
    CHECK_EQ(shml_num_orders(writer), 1);
    shml_client_unregister(readers[1]);
    CHECK_EQ(shml_order_join(readers[1], &how, &order), SHML_E_LEFT);
    check_stage(writer);
}

static void so_many_orders_can_be_joined_at_most(void)
{
    new_cast();
    for (uint64_t key = 0; key < SHML_MAX_ORDERS; key++)
        (void)join(readers[0], key, 0, 2);
    shml_join_t how = join_of(SHML_MAX_ORDERS, 0, 2);
    shml_order_info_t order = {.num_positions = 1};
    CHECK_EQ(shml_order_join(readers[1], &how, &order), SHML_E_FULL);
    CHECK_EQ(join(readers[1], 33, 1, 2).slot, 33); /* to one that lives there is room */
    check_stage(writer);
}

/* Who is still to come begins at the front. */
static void low_water_waits_for_all_readers(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 3);
    read_share(readers[0], &order, 0, 12);
    CHECK_EQ(low_water(writer, &order), 0);
    (void)join(readers[2], 7, 2, 3);
    read_share(readers[2], &order, 2, 8);
    CHECK_EQ(low_water(writer, &order), 0);
    (void)join(readers[1], 7, 1, 3);
    CHECK_EQ(low_water(writer, &order), 1); /* reader 1 has to read position 1 */
    read_share(readers[1], &order, 1, 10);
    CHECK_EQ(low_water(writer, &order), 8);
    check_stage(writer);
}

/* A reader that left without the others having come does not let the order move on. */
static void low_water_waits_for_readers_although_one_left(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 3);
    (void)join(readers[1], 7, 1, 3);
    read_share(readers[0], &order, 0, 12);
    read_share(readers[1], &order, 1, 13);
    CHECK_EQ(shml_order_leave(readers[0], order.slot, order.gen), SHML_OK);
    CHECK_EQ(low_water(writer, &order), 0);
    (void)join(readers[2], 7, 2, 3);
    CHECK_EQ(low_water(writer, &order), 2);
    read_share(readers[2], &order, 2, 20);
    CHECK_EQ(low_water(writer, &order), 13); /* reader 1 is still there */
    check_stage(writer);
}

/* A mark only goes on, and who has left has none. */
static void marks_of_joined_orders_never_go_back(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 1);
    read_share(readers[0], &order, 0, 10);
    read_share(readers[0], &order, 2, 5);
    CHECK_EQ(low_water(writer, &order), 10);
    read_share(readers[1], &order, 0, 3); /* is no reader of it */
    CHECK_EQ(low_water(writer, &order), 10);
    CHECK_EQ(shml_marks(stage.control, order.slot)[readers[1]->self], 0);
    check_stage(writer);
}

/* Of [begin, end) a reader has read every num_readers-th position, and only those are not made again. */
static void only_its_own_positions_are_told_as_read(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 3);
    read_share(readers[0], &order, 0, 9); /* 0, 3, 6 */
    const uint64_t ids[] = {20, 21, 22, 23, 24, 25, 26, 27, 28, 29};
    uint8_t rows[10];
    shml_stamp_t stamp = {order.slot, order.gen, 1};
    CHECK_EQ(shml_look(writer, ids, 10, &stamp, rows), SHML_OK);
    for (int i = 0; i < 10; i++)
        CHECK_EQ(rows[i], i % 3 == 0 && i < 9 ? SHML_ROW_FINAL : SHML_ROW_MISSING);
    check_stage(writer);
}

/* It lives as long as one of its readers has a mark. */
static void an_order_ends_when_its_last_reader_leaves(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 2);
    (void)join(readers[1], 7, 1, 2);
    uint32_t seen = shml_work_word(writer);
    CHECK_EQ(shml_order_leave(readers[0], order.slot, order.gen), SHML_OK);
    CHECK_EQ(shml_order_leave(readers[0], order.slot, order.gen), SHML_E_STALE);
    CHECK_EQ(shml_order_leave(readers[2], order.slot, order.gen), SHML_E_STALE);
    CHECK(lives(&order));
    check_stage(writer);
    CHECK_EQ(shml_order_leave(readers[1], order.slot, order.gen), SHML_OK);
    CHECK(!lives(&order));
    CHECK(shml_work_word(writer) != seen);
    CHECK_EQ(shml_num_orders(writer), 0);
    CHECK_EQ(shml_order_leave(readers[1], order.slot, order.gen), SHML_E_STALE);
    shml_order_info_t next = join(readers[0], 7, 0, 2); /* the same key, begun anew */
    CHECK(next.gen != order.gen || next.slot != order.slot);
    CHECK_EQ(next.low_water, 0);
    check_stage(writer);
}

/* An order whose only reader so far leaves ends, although others have not come yet. */
static void an_order_ends_before_all_have_come(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 3);
    CHECK_EQ(shml_order_leave(readers[0], order.slot, order.gen), SHML_OK);
    CHECK(!lives(&order));
    check_stage(writer);
}

static void readers_that_die_or_unregister_leave(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 3);
    (void)join(readers[1], 7, 1, 3);
    bury(writer, readers[0]);
    CHECK(lives(&order));
    check_stage(writer);
    shml_client_unregister(readers[1]);
    CHECK(!lives(&order));
    check_stage(writer);
}

/* It ends with who it is read for, and not with who came first. */
static void a_joined_order_ends_with_its_owner(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 2);
    (void)join(readers[1], 7, 1, 2);
    bury(writer, readers[0]);
    CHECK(lives(&order));
    bury(writer, owner);
    CHECK(!lives(&order));
    CHECK_EQ(shml_order_leave(readers[1], order.slot, order.gen), SHML_E_STALE);
    check_stage(writer);
}

/* An owner that reads for itself is counted down once. */
static void an_owner_that_reads_ends_its_order_once(void)
{
    new_cast();
    shml_order_info_t order = join(owner, 7, 0, 1), other = begin_order(readers[0], 5);
    bury(writer, owner);
    CHECK(!lives(&order) && lives(&other));
    CHECK_EQ(shml_num_orders(writer), 1);
    check_stage(writer);
}

static void finishing_only_shortens(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 2), sampled = begin_order(readers[1], 5);
    uint32_t seen = shml_work_word(writer);
    CHECK_EQ(shml_order_finish(writer, order.slot, order.gen, 40), SHML_OK);
    CHECK(shml_work_word(writer) != seen);
    CHECK(told(&order).num_positions == 40 && told(&order).is_finished == 1);
    CHECK_EQ(shml_order_finish(writer, order.slot, order.gen, 60), SHML_OK);
    CHECK_EQ(told(&order).num_positions, 40);
    CHECK_EQ(join(readers[1], 7, 1, 2).num_positions, 40); /* who comes late is told */
    CHECK_EQ(shml_order_finish(writer, order.slot, order.gen + 1, 1), SHML_E_STALE);
    CHECK_EQ(shml_order_finish(writer, SHML_MAX_ORDERS, 1, 1), SHML_E_STALE);
    CHECK_EQ(shml_order_finish(writer, sampled.slot, sampled.gen, 1), SHML_E_STALE);
    CHECK_EQ(told(&sampled).num_positions, 5);
    check_stage(writer);
}

/* Who waits in a joined order of a closed set looks again when it is finished. */
static void finishing_wakes_who_waits(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 1);
    CHECK_EQ(get(readers[0], (uint64_t[]){30}, 1, SHML_GET_POST, NULL), 1);
    uint32_t seen = shml_wake_word(readers[0]);
    CHECK_EQ(shml_order_finish(writer, order.slot, order.gen, 3), SHML_OK);
    CHECK(shml_wake_word(readers[0]) != seen);
    withdraw(readers[0]);
    check_stage(writer);
}

/* There is room for readers up to the last bit. */
static void all_readers_can_join(void)
{
    new_cast();
    shml_order_info_t order = {0};
    uint32_t n = SHML_MAX_CLIENTS - SHML_KEPT_CLIENTS - 5; /* the cast has five more, workers may have no other */
    for (uint32_t i = 0; i < n; i++) {
        shml_seg_t *seg = enter_under(SHML_WORKER, owner);
        order = join(seg, 7, i, n);
        CHECK_EQ(order.slot, 0);
        CHECK_EQ(told(&order).low_water, 0);
    }
    CHECK_EQ(shml_num_orders(writer), 1);
    read_share(&stage.seats[5].seg, &order, 0, n);
    CHECK_EQ(low_water(writer, &order), 1);
    shml_order_info_t other = join(readers[0], 9, SHML_MAX_READERS - 1, SHML_MAX_READERS);
    CHECK(other.slot != order.slot);
    check_stage(writer);
}

/* What is derived of joined orders is built again from marks and bits. */
static void a_rebuild_finds_joined_orders_again(void)
{
    new_cast();
    shml_order_info_t whole = join(readers[0], 7, 0, 2), partial = join(readers[0], 8, 0, 2),
                      left = join(readers[2], 9, 0, 1);
    (void)join(readers[1], 7, 1, 2);
    read_share(readers[0], &whole, 0, 8);
    read_share(readers[1], &whole, 1, 5);
    read_share(readers[0], &partial, 0, 8);
    shml_marks(stage.control, left.slot)[readers[2]->self] = 0; /* killed when it had left and not yet ended it */
    break_mutex();
    check_stage(writer);
    CHECK_EQ(low_water(writer, &whole), 5);
    CHECK_EQ(low_water(writer, &partial), 0);
    CHECK(!lives(&left));
    CHECK_EQ(shml_num_orders(writer), 2);
}

/* shml_check tells what joined orders cannot be like. */
static void damage_of_joined_orders_is_found(void)
{
    new_cast();
    shml_order_info_t order = join(readers[0], 7, 0, 2);
    shml_order_t *o = &shml_order_table(stage.control)[order.slot];
    const char *what = "";
    o->joined[0] = 4; /* reader 2 of 2 */
    CHECK_EQ(shml_check(writer, NULL, &what), SHML_E_CORRUPT);
    o->joined[0] = 0; /* a mark of one that did not join */
    CHECK_EQ(shml_check(writer, NULL, &what), SHML_E_CORRUPT);
    o->joined[0] = 1;
    o->num_readers = SHML_MAX_READERS + 1;
    CHECK_EQ(shml_check(writer, NULL, &what), SHML_E_CORRUPT);
    o->num_readers = 2;
    o->low_water = 1;
    CHECK_EQ(shml_check(writer, NULL, &what), SHML_E_CORRUPT);
    o->low_water = 0;
    uint64_t *mark = &shml_marks(stage.control, order.slot)[readers[0]->self];
    *mark = 0;
    CHECK_EQ(shml_check(writer, NULL, &what), SHML_E_CORRUPT);
    *mark = 1;
    check_stage(writer);
}

TEST_MAIN(TEST(readers_of_one_key_share_an_order), TEST(other_iterations_are_other_orders), TEST(bad_joins_are_refused),
          TEST(so_many_orders_can_be_joined_at_most), TEST(low_water_waits_for_all_readers),
          TEST(low_water_waits_for_readers_although_one_left), TEST(marks_of_joined_orders_never_go_back),
          TEST(only_its_own_positions_are_told_as_read), TEST(an_order_ends_when_its_last_reader_leaves),
          TEST(an_order_ends_before_all_have_come), TEST(readers_that_die_or_unregister_leave),
          TEST(a_joined_order_ends_with_its_owner), TEST(an_owner_that_reads_ends_its_order_once),
          TEST(finishing_only_shortens), TEST(finishing_wakes_who_waits), TEST(all_readers_can_join),
          TEST(a_rebuild_finds_joined_orders_again), TEST(damage_of_joined_orders_is_found))
