/* crash_pairs.h - two deaths in two different operations, with nobody who repairs in between: the second part of the
 * crash suite, included by crash.c, whose segment, actors and survivor it uses.
 *
 * ACTOR is killed at a failpoint of one of crash.c's operations. Then FIRST does one of those below, in what ACTOR left
 * (perhaps with the mutex of a dead owner, which it repairs as any who locks it), and is killed there at a failpoint.
 * SECOND then has two dead to bury, and checks all that a survivor checks. These operations take whatever they find: a
 * row or chunk may be anybody's by then. Of all such pairs of failpoints (some half a million) a seeded share is tried,
 * and some of each pair of operations. */
#ifndef SHML_CRASH_PAIRS_H
#define SHML_CRASH_PAIRS_H

#if defined(__SANITIZE_ADDRESS__)
#define ONE_IN 12 /* of the first, and of the second failpoints: one in 144 pairs */
#else
#define ONE_IN 4
#endif

static uint64_t pair_random = 20261123, num_pairs;
static void (*second_act)(void);

static int is_drawn(void) { return test_random(&pair_random) % ONE_IN == 0; }

/* What can come of a call on a segment in which others are at work. */
static int went(int rc)
{
    CHECK(rc >= 0 || rc == SHML_E_NOTFOUND || rc == SHML_E_EXISTS || rc == SHML_E_FULL || rc == SHML_E_MEMORY ||
          rc == SHML_E_STALE);
    return rc == SHML_OK;
}

static void put_anyhow(shml_seg_t *seg, uint64_t id, int urgent)
{
    shml_ticket_t ticket;
    if (!went(shml_reserve(seg, id, record_bytes(id), NULL, urgent, &ticket)))
        return;
    write_record(seg, &ticket, id);
    CHECK_EQ(shml_commit(seg, &ticket, SHML_REF_READY), SHML_OK);
}

static void then_put(void)
{
    shml_seg_t seg = segment(FIRST);
    put_anyhow(&seg, 20, 0); /* resident */
    put_anyhow(&seg, 3, 0);  /* the hole, and the last of its chunk */
    put_anyhow(&seg, 19, 1); /* where others give way */
}
static void then_claim(void)
{
    const uint64_t ids[] = {16, 18, 3, 20};
    uint8_t got[4], one;
    shml_seg_t seg = segment(FIRST);
    if (!went(shml_claim_rows(&seg, ids, 4, got)))
        return;
    for (int i = 0; i < 4; i++)
        if (got[i] && i > 0)
            put_anyhow(&seg, ids[i], 1);
    (void)went(shml_claim_rows(&seg, (uint64_t[]){21}, 1, &one)); /* a suspect */
    CHECK_EQ(shml_unclaim_rows(&seg, (uint64_t[]){16, 21}, 2), SHML_OK);
}
static void then_give_up(void)
{
    shml_ticket_t low, high;
    shml_seg_t seg = segment(FIRST);
    int has_low = went(shml_reserve(&seg, 20, record_bytes(20), NULL, 0, &low));
    int has_high = went(shml_reserve(&seg, SHML_CHUNK_ERROR | 3, 64, NULL, 0, &high));
    if (has_low)
        CHECK_EQ(shml_abort(&seg, &low), SHML_OK);
    if (has_high)
        CHECK_EQ(shml_abort(&seg, &high), SHML_OK);
}
static void then_fetch(void)
{
    shml_seg_t seg = segment(FIRST);
    for (uint32_t chunk = 2; chunk < 4; chunk++) {
        if (!went(shml_chunk_claim(&seg, chunk)))
            continue;
        put_anyhow(&seg, SHML_RAW | chunk, 1);
        CHECK_EQ(shml_chunk_end(&seg, chunk, chunk == 2 ? SHML_FETCH_OK : SHML_FETCH_GIVEN_UP), SHML_OK);
    }
}
static void then_spill(void)
{
    uint64_t offset;
    shml_seg_t seg = segment(FIRST);
    if (!went(shml_chunk_claim(&seg, 2)))
        return;
    if (went(shml_spill_reserve(&seg, 2, 5000, &offset)))
        CHECK_EQ(shml_spill_commit(&seg, 2, offset, 5000), SHML_OK);
    CHECK_EQ(shml_chunk_end(&seg, 2, SHML_FETCH_GIVEN_UP), SHML_OK);
    (void)shml_spill_freeze(&seg);
}
static void then_break_a_chunk(void)
{
    shml_seg_t seg = segment(FIRST);
    if (went(shml_chunk_claim(&seg, 2)))
        CHECK_EQ(shml_chunk_end(&seg, 2, SHML_FETCH_BROKEN), SHML_OK);
}
static void then_pin(void)
{
    shml_ref_t refs[4];
    shml_found_t found;
    shml_seg_t seg = segment(FIRST);
    CHECK_EQ(shml_get_many(&seg, (uint64_t[]){9, 0, 14, SHML_RAW | 1}, 4, SHML_GET_TAKE, NULL, refs, &found), SHML_OK);
    CHECK_EQ(shml_unpin(&seg, refs, 4), SHML_OK);
}
static void then_wait(void)
{
    const uint64_t ids[] = {9, 11, 16, 15};
    const shml_place_t place = {.order = order.slot, .gen = order.gen, .begin = 2, .end = 6};
    shml_ref_t refs[4];
    shml_found_t found;
    shml_seg_t seg = segment(FIRST);
    for (int flags = SHML_GET_POST; flags <= (SHML_GET_POST | SHML_GET_TAKE); flags += SHML_GET_TAKE) {
        CHECK_EQ(shml_get_many(&seg, ids, 4, flags, &place, refs, &found), SHML_OK);
        if (found.num_missing == 0 || (flags & SHML_GET_TAKE) != 0)
            CHECK_EQ(shml_unpin(&seg, refs, 4), SHML_OK);
    }
    CHECK_EQ(shml_get_many(&seg, NULL, 0, SHML_GET_POST, NULL, refs, &found), SHML_OK);
}
static void then_read_as_a_guest(void)
{
    shml_ref_t refs[3];
    uint8_t valid[3];
    uint32_t num_missing;
    shml_seg_t guest = segment(-1);
    snapshot.actors[1] = -1;
    CHECK_EQ(shml_guest_get(&guest, (uint64_t[]){9, 16, 0}, 3, refs, &num_missing), SHML_OK);
    CHECK_EQ(shml_guest_check(&guest, refs, 3, valid), SHML_OK);
    CHECK_EQ(valid[2], 1);
}
static void then_read_in_an_order(void)
{
    shml_ref_t ref;
    shml_found_t found;
    shml_seg_t seg = segment(FIRST);
    shml_order_info_t mine = {.seed = 1, .num_positions = 10};
    if (!went(shml_order_begin(&seg, &mine)))
        return;
    shml_place_t place = {.order = mine.slot, .gen = mine.gen, .begin = 0, .end = 4};
    CHECK_EQ(shml_get_many(&seg, (uint64_t[]){0}, 1, 0, &place, &ref, &found), SHML_OK);
    CHECK_EQ(shml_order_end(&seg, mine.slot, mine.gen), SHML_OK);
}
static void then_look(void)
{
    uint8_t rows[3];
    shml_seg_t seg = segment(FIRST);
    shml_stamp_t stamp = {.order = order.slot, .gen = order.gen, .until = 50};
    CHECK_EQ(shml_look(&seg, (uint64_t[]){9, 12, 13}, 3, &stamp, rows), SHML_OK);
}
static void then_reap(void)
{
    shml_seg_t seg = segment(FIRST);
    CHECK(shml_reap(&seg, 1) >= 0);
}
static void then_enter_and_leave(void)
{
    shml_ref_t refs[1];
    shml_found_t found;
    shml_seg_t seg = segment(-1);
    int slot = 0;
    while (shml_clients(seg.control)[slot].state != SHML_CLIENT_FREE)
        slot++;
    snapshot.actors[1] = slot;
    CHECK_EQ(shml_client_register(&seg, SHML_SERVICE, -1, 0), SHML_OK);
    CHECK_EQ(seg.self, slot);
    CHECK_EQ(shml_get_many(&seg, (uint64_t[]){14}, 1, SHML_GET_TAKE, NULL, refs, &found), SHML_OK);
    shml_client_unregister(&seg);
    CHECK_EQ(shml_unpin(&seg, refs, 1), SHML_OK);
}
static void then_release_raw(void)
{
    static int fd = -1;
    shml_seg_t seg = segment(FIRST);
    if (fd < 0)
        fd = memfd_create("raw", MFD_CLOEXEC);
    CHECK(fd >= 0);
    (void)shml_raw_release(&seg, fd);
}
static void then_say(void)
{
    shml_seg_t seg = segment(FIRST);
    (void)went(shml_text_put(&seg, SHML_TEXT_SCHEMA, "actor", 6));
    (void)went(shml_text_put(&seg, SHML_TEXT_FATAL, "actor", 6));
}

static void (*const second_acts[])(void) = {then_put,
                                            then_claim,
                                            then_give_up,
                                            then_fetch,
                                            then_spill,
                                            then_break_a_chunk,
                                            then_pin,
                                            then_wait,
                                            then_read_as_a_guest,
                                            then_read_in_an_order,
                                            then_look,
                                            then_reap,
                                            then_enter_and_leave,
                                            then_release_raw,
                                            then_say};
#define NUM_SECOND_ACTS (sizeof second_acts / sizeof *second_acts)

/* At depth 1: ACTOR is dead, and FIRST knows nothing of it. At depth 2 so is FIRST. */
static void act_again(int depth, const char *point)
{
    if (!is_drawn())
        return;
    if (depth == 2) {
        num_pairs++;
        go_on(depth, point);
        return;
    }
    memset(&locals[FIRST], 0, sizeof locals[FIRST]);
    memset(&locals[NUM_CLIENTS + depth], 0, sizeof locals[FIRST]);
    snapshot.actors[depth] = FIRST;
    snapshot.is_armed[depth] = 1;
    second_act();
    snapshot.is_armed[depth] = 0;
}

static void (*const first_acts[])(void) = {put_into_resident,
                                           put_into_the_hole,
                                           put_a_claimed_row_into_the_hole,
                                           put_where_others_give_way,
                                           put_where_so_many_are_that_one_must_go,
                                           put_what_is_wanted,
                                           put_where_no_room_is_left,
                                           ask_for_room_in_vain,
                                           put_an_error,
                                           give_up_two,
                                           claim_and_unclaim,
                                           fetch_chunks,
                                           spill_chunks,
                                           break_a_chunk,
                                           pin_and_unpin,
                                           wait_for_a_batch,
                                           give_up_waiting,
                                           read_as_a_guest,
                                           put_what_guests_want,
                                           break_a_chunk_that_guests_want,
                                           begin_and_end_an_order,
                                           stamp_and_count,
                                           reap_the_dead,
                                           reap_the_third_dead,
                                           enter_and_leave,
                                           release_raw,
                                           repair,
                                           repair_a_chunk_that_is_complete,
                                           say};
#define NUM_FIRST_ACTS (sizeof first_acts / sizeof *first_acts)

/* Until some of a pair of operations is drawn. */
#define MOST_ATTEMPTS 60

static void killed_one_after_the_other(void)
{
    uint64_t num_operations = 0;
    for (size_t first = 0; first < NUM_FIRST_ACTS; first++) {
        for (size_t second = 0; second < NUM_SECOND_ACTS; second++) {
            uint64_t before = num_pairs, num_seen_pairs = 0;
            second_act = second_acts[second];
            for (int attempt = 0; attempt < MOST_ATTEMPTS && num_pairs == before; attempt++) {
                new_segment();
                snapshot_run(ACTOR, 2, first_acts[first], act_again);
                num_seen_pairs += snapshot.num_kills[1];
            }
            /* None to be had: a guest that dies leaves nobody to bury. */
            if (num_pairs == before && num_seen_pairs > 0)
                test_fail(__FILE__, __LINE__, "operations %zu and %zu were never killed in together", first, second);
            num_operations += num_pairs > before;
        }
    }
    printf("crash: %llu pairs of operations, %llu pairs of failpoints in them\n", (unsigned long long)num_operations,
           (unsigned long long)num_pairs);
    CHECK(num_operations >= NUM_FIRST_ACTS * (NUM_SECOND_ACTS - 1));
}
#endif
