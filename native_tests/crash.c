/* The crash suite: whatever a client or a guest does, killed at any failpoint, the others go on, and a second kill in their
 * recovery changes nothing; nor do two deaths one after the other (crash_pairs.h). Built with -DSHML_BREAK_REBUILD, _PINS, _REAP or _UNPIN it must fail (the Makefile sees to
 * that). */
#define _GNU_SOURCE
#include <sys/mman.h>

#define RESIDENT_BYTES UINT64_C(4096)
#define TRANSIT_BYTES  UINT64_C(4096)
#define RAW_BYTES      UINT64_C(4096)
#define SPILL_BYTES    UINT64_C(65536)
#include "segment.h"
#include "snapshot.h"

/* ACTOR is killed; FIRST and SECOND survive the first and the second kill; READER waits; OTHER lives and has
 * something of everything; DEAD died before. */
enum { ACTOR, FIRST, SECOND, READER, OTHER, DEAD, NUM_CLIENTS };
#define DEATHS(word) ((word) >> 8 & 0xff)
#define NUM_DESCS    128u /* more are never used */

/* The pins of each; NUM_CLIENTS + depth: of one that enters at that depth. */
static local_t locals[NUM_CLIENTS + SNAPSHOT_DEPTHS];
static shml_seg_t segment_with(int self, int local)
{
    return segment_of(world()->memory, self, &locals[local], &snapshot_env);
}
static shml_seg_t segment(int self) { return segment_with(self, self >= 0 ? self : NUM_CLIENTS + snapshot.depth); }

static shml_region_t *region(uint32_t index) { return &segment(OTHER).control->regions[index]; }

static shml_ref_t kept[2];   /* what OTHER has pinned */
static uint64_t kept_ids[2]; /* 13 in transit, SHML_RAW | 3 */
static int num_kept;
static shml_order_info_t order; /* OTHER's */

static void put(int client, uint64_t id)
{
    shml_seg_t seg = segment(client);
    CHECK_EQ(put_record(&seg, id), SHML_OK);
}

/* Somebody dies over row `id`. */
static void die_over(uint64_t id)
{
    uint8_t got;
    shml_seg_t dying = segment(-1), other = segment(OTHER);
    CHECK_EQ(shml_client_register(&dying, SHML_SERVICE, -1, 0), SHML_OK);
    CHECK_EQ(shml_claim_rows(&dying, &id, 1, &got), SHML_OK);
    CHECK_EQ(got, 1);
    world()->is_dead[dying.self] = 1;
    CHECK_EQ(shml_reap(&other, 1), 1);
}

static void new_worlds(void)
{
    snapshot_reset();
    memset(locals, 0, sizeof locals);
    for (int d = 0; d < SNAPSHOT_DEPTHS; d++) {
        if (snapshot.worlds[d].memory != NULL)
            munmap(snapshot.worlds[d].memory, segment_bytes());
        snapshot.worlds[d].memory =
            mmap(NULL, segment_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(snapshot.worlds[d].memory != MAP_FAILED);
    }
    format_segment(world()->memory);
    shml_control_t *c = segment(0).control;
    /* All but what nobody uses: wants of clients there are none, marks in other orders, the later bytes of texts. */
    const uint64_t regions[][2] = {
        {0, c->wants_at},
        {c->wants_at, 8 * SHML_MAX_WANTS * sizeof(uint64_t)},
        {c->orders_at, c->marks_at - c->orders_at + 2 * SHML_MAX_CLIENTS * sizeof(uint64_t)},
        {c->texts_at, 256},
        {c->texts_at + sizeof(shml_shared_text_t), 256},
        {c->chunks_at, c->descs_at - c->chunks_at + NUM_DESCS * sizeof(shml_desc_t)},
        {c->pins_at, NUM_DESCS * SHML_PIN_WORDS * sizeof(uint64_t)},
        {c->buckets_at, segment_bytes() - c->buckets_at},
    };
    snapshot.num_regions = sizeof regions / sizeof *regions;
    for (int i = 0; i < snapshot.num_regions; i++) {
        snapshot.regions[i].offset = regions[i][0];
        snapshot.regions[i].bytes = regions[i][1];
    }
    for (int client = 0; client < NUM_CLIENTS; client++) {
        shml_seg_t seg = segment(-1);
        CHECK_EQ(shml_client_register(&seg, client == READER ? SHML_WORKER : SHML_SERVICE, -1, 0), SHML_OK);
        CHECK_EQ(seg.self, client);
    }
}

/* Chunk 0 stays and has 0, 1, 2 and a HOLE where 3 was; 1 stays and is DONE, row 5 in error; 5 stays and is OTHER's,
 * who has 22 claimed and 23 reserved; over 21 somebody died. */
static void fill_resident(void)
{
    shml_ticket_t hole, error, reserved;
    uint8_t got;
    shml_seg_t other = segment(OTHER);
    CHECK_EQ(shml_chunk_claim(&other, 0), SHML_OK);
    for (uint64_t id = 0; id < 3; id++)
        put(OTHER, id);
    CHECK_EQ(shml_reserve(&other, 3, record_bytes(3), NULL, 0, &hole), SHML_OK);
    CHECK_EQ(shml_chunk_end(&other, 0, SHML_FETCH_OK), SHML_OK);
    CHECK_EQ(shml_chunk_claim(&other, 1), SHML_OK);
    put(OTHER, 4), put(OTHER, 6);
    CHECK_EQ(shml_reserve(&other, 5, 64, NULL, 0, &error), SHML_OK);
    CHECK_EQ(shml_commit(&other, &error, SHML_REF_ERROR), SHML_OK);
    CHECK_EQ(shml_abort(&other, &hole), SHML_OK);
    CHECK_EQ(shml_chunk_end(&other, 1, SHML_FETCH_OK), SHML_OK);
    put(OTHER, 7);
    CHECK_EQ(shml_chunk_claim(&other, 5), SHML_OK);
    CHECK_EQ(shml_claim_rows(&other, (uint64_t[]){22}, 1, &got), SHML_OK);
    CHECK_EQ(shml_reserve(&other, 23, record_bytes(23), NULL, 0, &reserved), SHML_OK);
    die_over(21);
}

static void fetch(uint32_t chunk) { put(OTHER, SHML_RAW | chunk); }

/* Of transit and raw is only so much backed as they hold. READER wants 11 and has found 8; 12 is stamped for positions
 * below 5 of OTHER's order, in which READER is at 3; OTHER has 13 pinned, and the encoded rows of chunk 3. */
static void fill_transit(void)
{
    shml_seg_t other = segment(OTHER), reader = segment(READER);
    shml_ref_t refs[2];
    shml_found_t found;
    shml_ticket_t stamped;
    region(SHML_RESIDENT)->searched = 1; /* no more of it is promised: what follows goes to transit */
    order = (shml_order_info_t){.num_positions = 100};
    CHECK_EQ(shml_order_begin(&other, &order), SHML_OK);
    shml_stamp_t stamp = {.order = order.slot, .gen = order.gen, .until = 5};
    shml_place_t place = {.order = order.slot, .gen = order.gen, .begin = 3, .end = 5};
    put(OTHER, 8), put(OTHER, 9), put(OTHER, 10);
    CHECK_EQ(shml_reserve(&other, 12, record_bytes(12), &stamp, 0, &stamped), SHML_OK);
    write_record(&other, &stamped, 12);
    CHECK_EQ(shml_commit(&other, &stamped, SHML_REF_READY), SHML_OK);
    put(OTHER, 13), put(OTHER, 14), put(OTHER, 15);
    fetch(0), fetch(4), fetch(1), fetch(3);
    for (uint32_t i = SHML_TRANSIT; i < SHML_NUM_REGIONS; i++) {
        region(i)->backed_end = region(i)->head;
        region(i)->frozen = 1;
    }
    CHECK_EQ(region(SHML_TRANSIT)->backed_end - region(SHML_TRANSIT)->begin, 1024);
    CHECK_EQ(region(SHML_RAW_REGION)->backed_end - region(SHML_RAW_REGION)->begin, 512);
    CHECK_EQ(shml_get_many(&reader, (uint64_t[]){8, 11}, 2, SHML_GET_POST, &place, refs, &found), SHML_OK);
    CHECK_EQ(found.num_missing, 1);
    kept_ids[0] = 13, kept_ids[1] = SHML_RAW | 3;
    CHECK_EQ(shml_get_many(&other, kept_ids, 2, 0, NULL, kept, &found), SHML_OK);
    CHECK(kept[0].chunk == 1 && kept[1].chunk == 1);
    num_kept = 2;
}

static void new_segment(void)
{
    new_worlds();
    fill_resident();
    fill_transit();
    shml_seg_t seg = segment(OTHER);
    check_segment(&seg);
}

/* ---------------------------------------------------------------------------------------------------- *
 * The survivor
 * ---------------------------------------------------------------------------------------------------- */

/* What was published when the kill came is still there. */
static void check_published(shml_seg_t *seg, world_t *before)
{
    shml_control_t *c = (shml_control_t *)(void *)before->memory;
    const shml_desc_t *descs = shml_descs(c);
    CHECK(c->desc_end < NUM_DESCS);
    for (uint32_t i = 0; i < c->desc_end; i++) {
        if (descs[i].state == SHML_DESC_READY)
            check_record(seg, descs[i].id);
        else if (descs[i].state == SHML_DESC_ERROR)
            CHECK_EQ(look(seg, descs[i].id).status, SHML_REF_ERROR);
        else if (descs[i].state == SHML_DESC_ASIDE)
            CHECK_EQ(look(seg, descs[i].id).status, SHML_REF_ASIDE);
    }
}

/* What was spilled when the kill came is still there, and at hand. */
static void check_spilled(shml_seg_t *seg, world_t *before)
{
    shml_control_t *c = (shml_control_t *)(void *)before->memory;
    CHECK(seg->control->spill_end >= c->spill_end && seg->control->spill_frozen >= c->spill_frozen);
    for (uint32_t i = 0; i < NUM_CHUNKS; i++) {
        uint64_t offset, num_bytes, spilled = shml_chunks(c)[i].spilled;
        int rc = shml_spill_find(seg, i, &offset, &num_bytes);
        CHECK_EQ(rc, spilled != 0 ? SHML_OK : SHML_E_NOTFOUND);
        if (spilled == 0)
            continue;
        CHECK(offset == shml_spilled_offset(spilled) && num_bytes == shml_spilled_bytes(spilled));
        uint8_t state;
        CHECK_EQ(shml_chunk_look(seg, &i, 1, &state), SHML_OK);
        CHECK(state & SHML_CHUNK_HAS_RAW);
    }
}

static void check_chunks(shml_seg_t *seg, int depth)
{
    for (uint32_t i = 0; i < NUM_CHUNKS; i++) {
        uint32_t word = shml_chunks(seg->control)[i].word;
        CHECK(DEATHS(word) <= (uint32_t)depth + 1); /* one for each who died holding it, DEAD included */
    }
}

static void finish_chunk(shml_seg_t *seg, uint32_t chunk)
{
    int rc = shml_chunk_claim(seg, chunk);
    if (rc != SHML_OK) {
        uint8_t state;
        CHECK_EQ(shml_chunk_look(seg, &chunk, 1, &state), SHML_OK);
        CHECK(rc != SHML_E_NOTFOUND || (state & 0xf) >= SHML_CHUNK_DONE);
        CHECK(rc != SHML_E_EXISTS || (state & SHML_CHUNK_HAS_RAW) != 0);
        CHECK(rc != SHML_E_STALE || chunk >= 4); /* OTHER's unit */
        return;
    }
    uint64_t offset;
    if (chunk == 2 && shml_spill_reserve(seg, chunk, 5000, &offset) == SHML_OK) {
        CHECK_EQ(shml_spill_commit(seg, chunk, offset, 5000), SHML_OK);
        CHECK_EQ(shml_chunk_end(seg, chunk, SHML_FETCH_OK), SHML_OK);
        return;
    }
    shml_ticket_t ticket;
    rc = shml_reserve(seg, SHML_RAW | chunk, record_bytes(chunk), NULL, 1, &ticket);
    CHECK(rc == SHML_OK || rc == SHML_E_FULL || rc == SHML_E_MEMORY); /* MEMORY: after a release */
    if (rc == SHML_OK) {
        write_record(seg, &ticket, SHML_RAW | chunk);
        CHECK_EQ(shml_commit(seg, &ticket, SHML_REF_READY), SHML_OK);
    }
    CHECK_EQ(shml_chunk_end(seg, chunk, rc == SHML_OK ? SHML_FETCH_OK : SHML_FETCH_GIVEN_UP), SHML_OK);
}

/* Whatever the dead did not finish can be done: all chunks, all rows. */
static void finish_work(shml_seg_t *seg)
{
    for (uint32_t chunk = 0; chunk < NUM_CHUNKS; chunk++)
        finish_chunk(seg, chunk);
    for (uint64_t id = 0; id < NUM_RECORDS; id++) {
        uint8_t got, row;
        if (look(seg, id).status != SHML_REF_MISSING)
            continue;
        CHECK_EQ(shml_look(seg, &id, 1, NULL, &row), SHML_OK);
        CHECK_EQ(shml_claim_rows(seg, &id, 1, &got), SHML_OK);
        CHECK_EQ(got, row == SHML_ROW_MISSING || row == SHML_ROW_SUSPECT);
        CHECK(got || id >= 22); /* OTHER's */
        if (!got)
            continue;
        shml_ticket_t ticket;
        CHECK_EQ(shml_reserve(seg, id, record_bytes(id), NULL, 1, &ticket), SHML_OK);
        write_record(seg, &ticket, id);
        CHECK_EQ(shml_commit(seg, &ticket, SHML_REF_READY), SHML_OK);
        check_record(seg, id);
    }
}

/* What living clients keep was not taken for all that. */
static void check_kept(shml_seg_t *seg)
{
    for (int i = 0; i < num_kept; i++) {
        const shml_desc_t *desc = &shml_descs(seg->control)[kept[i].desc];
        CHECK(desc->id == kept_ids[i] && desc->gen == kept[i].gen && desc->offset == kept[i].offset);
        check_bytes(seg, &kept[i], kept_ids[i]);
    }
    check_record(seg, 8); /* READER waits, and has found it */
}

/* A guest that comes now gets its rows, whatever was listed when the kill came. */
static void check_guests(void)
{
    const uint64_t ids[] = {9, 17};
    shml_seg_t guest = segment(-1), seg = segment(OTHER);
    for (int i = 0; i < 2; i++) {
        shml_ref_t ref;
        uint32_t num_missing;
        uint8_t is_valid;
        CHECK_EQ(shml_guest_get(&guest, &ids[i], 1, &ref, &num_missing), SHML_OK);
        if (ref.status == SHML_REF_BROKEN)
            continue;
        if (num_missing > 0) {
            uint64_t wanted[SHML_MAX_WANTS];
            int n = shml_wanted(&seg, wanted, SHML_MAX_WANTS), is_listed = 0;
            for (int k = 0; k < n; k++)
                is_listed |= wanted[k] == ids[i];
            CHECK(is_listed);
            shml_ticket_t ticket;
            CHECK_EQ(shml_reserve(&seg, ids[i], record_bytes(ids[i]), NULL, 1, &ticket), SHML_OK);
            write_record(&seg, &ticket, ids[i]);
            CHECK_EQ(shml_commit(&seg, &ticket, SHML_REF_READY), SHML_OK);
            CHECK_EQ(shml_guest_get(&guest, &ids[i], 1, &ref, &num_missing), SHML_OK);
        }
        CHECK_EQ(num_missing, 0);
        check_bytes(&guest, &ref, ids[i]);
        CHECK_EQ(shml_guest_check(&guest, &ref, 1, &is_valid), SHML_OK);
        CHECK_EQ(is_valid, 1);
    }
}

static void check_texts(shml_seg_t *seg)
{
    char text[SHML_TEXT_BYTES];
    for (uint32_t which = 0; which < 2; which++) {
        int rc = shml_text_put(seg, which, "survivor", 9);
        CHECK(rc == SHML_OK || rc == SHML_E_EXISTS);
        CHECK_EQ(shml_text_get(seg, which, text), rc == SHML_OK ? 9 : 6);
        CHECK_TEXT(text, rc == SHML_OK ? "survivor" : "actor");
    }
}

static void go_on(int depth, const char *point)
{
    (void)point;
    int self = depth == 1 ? FIRST : SECOND;
    memset(&locals[self], 0, sizeof locals[self]);
    memset(&locals[NUM_CLIENTS + depth], 0, sizeof locals[self]);
    shml_seg_t seg = segment(self);
    snapshot.actors[depth] = self;
    snapshot.is_armed[depth] = 1;
    CHECK(shml_reap(&seg, 1) >= 0);
    shml_stats_t stats = stats_of(&seg); /* locks, even when there was nobody to reap */
    snapshot.is_armed[depth] = 0;
    CHECK_EQ(stats.state, SHML_SEG_READY);
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++)
        CHECK(!world()->is_dead[slot] || shml_clients(seg.control)[slot].state == SHML_CLIENT_FREE);
    check_segment(&seg);
    check_published(&seg, &snapshot.worlds[depth - 1]);
    check_spilled(&seg, &snapshot.worlds[depth - 1]);
    check_chunks(&seg, depth);
    finish_work(&seg);
    check_kept(&seg);
    check_guests();
    check_texts(&seg);
    shml_seg_t newcomer = segment(-1);
    CHECK_EQ(shml_client_register(&newcomer, SHML_WORKER, -1, 0), SHML_OK);
    check_segment(&seg);
}

/* ---------------------------------------------------------------------------------------------------- *
 * What the actor does
 * ---------------------------------------------------------------------------------------------------- */
static uint32_t get(int client, const uint64_t *ids, uint32_t n, int flags, const shml_place_t *place, shml_ref_t *refs)
{
    shml_found_t found;
    shml_seg_t seg = segment(client);
    CHECK_EQ(shml_get_many(&seg, ids, n, flags, place, refs, &found), SHML_OK);
    return found.num_missing;
}

/* What another than the actor does, who is not killed. */
static void put_unarmed(int client, uint64_t id)
{
    snapshot.is_armed[0] = 0;
    put(client, id);
    snapshot.is_armed[0] = 1;
}

static uint32_t claim(int client, const uint64_t *ids, uint32_t n)
{
    uint8_t got[8];
    uint32_t num_got = 0;
    shml_seg_t seg = segment(client);
    CHECK_EQ(shml_claim_rows(&seg, ids, n, got), SHML_OK);
    for (uint32_t i = 0; i < n; i++)
        num_got += got[i];
    return num_got;
}

static void put_into_resident(void) { put(ACTOR, 20); }
static void put_into_the_hole(void)
{
    put(ACTOR, 3); /* the last of chunk 0, which is DONE with it */
    CHECK_EQ(shml_chunks(segment(ACTOR).control)[0].word & 0xf, SHML_CHUNK_DONE);
}
static void put_a_claimed_row_into_the_hole(void)
{
    CHECK_EQ(claim(ACTOR, (uint64_t[]){3}, 1), 1);
    put(ACTOR, 3);
}
static void put_where_others_give_way(void)
{
    put(ACTOR, 19); /* where 9 and 10 are */
    put(ACTOR, 17);
}
static void put_where_so_many_are_that_one_must_go(void)
{
    shml_control_t *c = segment(ACTOR).control;
    c->most_transit = c->num_transit;
    put(ACTOR, 17); /* 9 goes, and it lies there */
    put(ACTOR, 19); /* 10 goes, and is not enough */
}
static void put_what_is_wanted(void) { put(ACTOR, 11); }
static void put_where_no_room_is_left(void)
{
    snapshot.is_armed[0] = 0;
    region(SHML_RESIDENT)->backed_end = region(SHML_RESIDENT)->head;
    region(SHML_RESIDENT)->frozen = 1;
    snapshot.is_armed[0] = 1;
    put(ACTOR, 20); /* chunk 5 stays no more */
}
static void ask_for_room_in_vain(void)
{
    shml_ref_t refs[4];
    shml_ticket_t ticket;
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(get(ACTOR, (uint64_t[]){9, 10, 14, 15}, 4, 0, NULL, refs), 0);
    CHECK_EQ(shml_reserve(&seg, 19, 256, NULL, 1, &ticket), SHML_E_FULL);
}
static void put_an_error(void)
{
    shml_ticket_t ticket;
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_reserve(&seg, SHML_CHUNK_ERROR | 2, 100, NULL, 0, &ticket), SHML_OK);
    CHECK_EQ(shml_commit(&seg, &ticket, SHML_REF_ERROR), SHML_OK);
}
static void give_up_two(void)
{
    shml_ticket_t low, high, transit;
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_reserve(&seg, 20, record_bytes(20), NULL, 0, &low), SHML_OK);
    CHECK_EQ(shml_reserve(&seg, SHML_CHUNK_ERROR | 2, 64, NULL, 0, &high), SHML_OK);
    CHECK_EQ(shml_abort(&seg, &low), SHML_OK);  /* a hole */
    CHECK_EQ(shml_abort(&seg, &high), SHML_OK); /* free space */
    CHECK_EQ(shml_reserve(&seg, 18, record_bytes(18), NULL, 0, &transit), SHML_OK);
    CHECK_EQ(shml_abort(&seg, &transit), SHML_OK);
    put(ACTOR, 17); /* in a descriptor of the free list */
}
static void claim_and_unclaim(void)
{
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(claim(ACTOR, (uint64_t[]){16, 17, 18, 21, 22}, 5), 3);
    CHECK_EQ(claim(ACTOR, (uint64_t[]){21}, 1), 1);
    put(ACTOR, 17);
    CHECK_EQ(shml_unclaim_rows(&seg, (uint64_t[]){16, 17, 21, 22}, 4), SHML_OK);
    put(ACTOR, 18);
}
static void fetch_chunks(void)
{
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_chunk_claim(&seg, 2), SHML_OK);
    put(ACTOR, SHML_RAW | 2); /* where 4 and 1 are */
    CHECK_EQ(shml_chunk_end(&seg, 2, SHML_FETCH_OK), SHML_OK);
    CHECK_EQ(shml_chunk_claim(&seg, 3), SHML_E_EXISTS);
    CHECK_EQ(shml_chunk_claim(&seg, 4), SHML_E_STALE);
}
static void spill_chunks(void)
{
    uint64_t offset;
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_chunk_claim(&seg, 2), SHML_OK);
    CHECK_EQ(shml_spill_reserve(&seg, 2, 5000, &offset), SHML_OK);
    CHECK_EQ(shml_chunk_end(&seg, 2, SHML_FETCH_GIVEN_UP), SHML_OK); /* that room is lost */
    CHECK_EQ(shml_chunk_claim(&seg, 2), SHML_OK);
    CHECK_EQ(shml_spill_reserve(&seg, 2, 5000, &offset), SHML_OK);
    CHECK_EQ(offset, 8192);
    CHECK_EQ(shml_spill_commit(&seg, 2, offset, 5000), SHML_OK);
    CHECK_EQ(shml_chunk_end(&seg, 2, SHML_FETCH_OK), SHML_OK);
    CHECK_EQ(shml_chunk_claim(&seg, 2), SHML_E_EXISTS);
    CHECK_EQ(shml_spill_freeze(&seg), 1);
}
static void break_a_chunk(void)
{
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_chunk_claim(&seg, 2), SHML_OK);
    CHECK_EQ(shml_chunk_end(&seg, 2, SHML_FETCH_GIVEN_UP), SHML_OK);
    CHECK_EQ(shml_chunk_claim(&seg, 2), SHML_OK);
    CHECK_EQ(shml_chunk_end(&seg, 2, SHML_FETCH_BROKEN), SHML_OK); /* 11 is wanted */
}
static void pin_and_unpin(void)
{
    shml_ref_t refs[4];
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(get(ACTOR, (uint64_t[]){9, 0, 9, SHML_RAW | 1}, 4, 0, NULL, refs), 0);
    CHECK_EQ(shml_pin_again(&seg, &refs[0]), SHML_OK);
    CHECK_EQ(shml_unpin(&seg, refs, 4), SHML_OK);
    CHECK_EQ(shml_unpin(&seg, refs, 1), SHML_OK);
}
static void wait_for_a_batch(void)
{
    const uint64_t ids[] = {9, 10, 16, 0};
    const shml_place_t place = {.order = order.slot, .gen = order.gen, .begin = 6, .end = 9};
    shml_ref_t refs[4];
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(get(ACTOR, ids, 4, SHML_GET_POST, &place, refs), 1);
    CHECK_EQ(get(ACTOR, ids, 4, SHML_GET_POST | SHML_GET_TAKE, &place, refs), 1);
    CHECK_EQ(shml_unpin(&seg, refs, 4), SHML_OK);
    CHECK_EQ(get(ACTOR, ids + 2, 1, SHML_GET_POST, &place, refs), 1);
    put_unarmed(OTHER, 16);
    CHECK_EQ(get(ACTOR, ids + 2, 1, SHML_GET_POST, &place, refs), 0);
    CHECK_EQ(shml_unpin(&seg, refs, 1), SHML_OK);
}
static void give_up_waiting(void)
{
    shml_ref_t refs[3];
    CHECK_EQ(get(ACTOR, (uint64_t[]){9, 16, 17}, 3, SHML_GET_POST, NULL, refs), 2);
    CHECK_EQ(get(ACTOR, NULL, 0, SHML_GET_POST, NULL, refs), 0);
}
static uint32_t get_as_guest(const uint64_t *ids, uint32_t n, shml_ref_t *refs)
{
    shml_seg_t guest = segment(-1);
    uint32_t num_missing;
    CHECK_EQ(shml_guest_get(&guest, ids, n, refs, &num_missing), SHML_OK);
    return num_missing;
}
static void read_as_a_guest(void)
{
    const uint64_t ids[] = {9, 16, 17, 0};
    shml_ref_t refs[4];
    uint8_t valid[4];
    shml_seg_t guest = segment(-1);
    snapshot.actors[0] = -1;
    CHECK_EQ(get_as_guest(ids, 4, refs), 2);
    CHECK_EQ(shml_guest_check(&guest, refs, 4, valid), SHML_OK);
    CHECK(valid[0] == 1 && valid[1] == 0 && valid[2] == 0 && valid[3] == 1);
    shml_guest_wait(&guest, shml_guest_word(&guest), 1);
    put_unarmed(OTHER, 16); /* where 9 was */
    CHECK_EQ(shml_guest_check(&guest, refs, 4, valid), SHML_OK);
    CHECK(valid[0] == 0 && valid[3] == 1);
    CHECK_EQ(get_as_guest(ids, 4, refs), 2);
}
static void put_what_guests_want(void)
{
    shml_ref_t refs[3];
    snapshot.is_armed[0] = 0;
    CHECK_EQ(get_as_guest((uint64_t[]){16, 9, 20}, 3, refs), 2);
    snapshot.is_armed[0] = 1;
    put(ACTOR, 20);
    put(ACTOR, 16);
}
static void break_a_chunk_that_guests_want(void)
{
    shml_ref_t refs[3];
    shml_seg_t seg = segment(ACTOR);
    snapshot.is_armed[0] = 0;
    CHECK_EQ(get_as_guest((uint64_t[]){11, 18, 20}, 3, refs), 3);
    snapshot.is_armed[0] = 1;
    CHECK_EQ(shml_chunk_claim(&seg, 2), SHML_OK);
    CHECK_EQ(shml_chunk_end(&seg, 2, SHML_FETCH_BROKEN), SHML_OK);
}
static void begin_and_end_an_order(void)
{
    shml_ref_t ref;
    shml_seg_t seg = segment(ACTOR);
    shml_order_info_t mine = {.seed = 1, .num_positions = 10};
    CHECK_EQ(shml_order_begin(&seg, &mine), SHML_OK);
    shml_place_t place = {.order = mine.slot, .gen = mine.gen, .begin = 0, .end = 4};
    CHECK_EQ(get(ACTOR, (uint64_t[]){0}, 1, 0, &place, &ref), 0);
    place.end = 8;
    CHECK_EQ(get(ACTOR, (uint64_t[]){0}, 1, 0, &place, &ref), 0);
    snapshot.is_armed[0] = 0;
    CHECK_EQ(get(OTHER, (uint64_t[]){0}, 1, 0, &place, &ref), 0); /* another's mark */
    snapshot.is_armed[0] = 1;
    CHECK_EQ(shml_order_end(&seg, mine.slot, mine.gen), SHML_OK);
}
static void stamp_and_count(void)
{
    uint32_t reads[2];
    uint8_t rows[3];
    shml_seg_t seg = segment(ACTOR);
    shml_stamp_t stamp = {.order = order.slot, .gen = order.gen, .until = 50};
    CHECK_EQ(shml_look(&seg, (uint64_t[]){9, 12, 13}, 3, &stamp, rows), SHML_OK);
    CHECK_EQ(shml_count_reads(&seg, (uint64_t[]){1, 2}, 2, reads), SHML_OK);
    shml_work_wait(&seg, shml_work_word(&seg), 1);
}

/* DEAD has all that one can have, and is dead. */
static void reap_the_dead(void)
{
    shml_ref_t refs[4];
    shml_ticket_t ticket;
    shml_seg_t seg = segment(ACTOR), dead = segment(DEAD);
    shml_order_info_t its = {.num_positions = 10};
    snapshot.is_armed[0] = 0;
    CHECK_EQ(shml_chunk_claim(&dead, 2), SHML_OK);
    CHECK_EQ(shml_reserve(&dead, 20, record_bytes(20), NULL, 0, &ticket), SHML_OK); /* resident, at the top */
    CHECK_EQ(claim(DEAD, (uint64_t[]){16, 18}, 2), 2);
    CHECK_EQ(claim(DEAD, (uint64_t[]){21}, 1), 1);
    CHECK_EQ(shml_reserve(&dead, 18, record_bytes(18), NULL, 0, &ticket), SHML_OK); /* over 9 and 10 */
    CHECK_EQ(shml_order_begin(&dead, &its), SHML_OK);
    shml_place_t place = {.order = order.slot, .gen = order.gen, .begin = 1, .end = 2};
    CHECK_EQ(get(DEAD, (uint64_t[]){14, SHML_RAW | 1, 0}, 3, 0, &place, refs), 0);
    CHECK_EQ(get(DEAD, (uint64_t[]){15, 17}, 2, SHML_GET_POST, NULL, refs), 1);
    world()->is_dead[DEAD] = 1;
    snapshot.is_armed[0] = 1;
    CHECK_EQ(shml_reap(&seg, 1), 1);
}

/* Rows 3 and 18 have killed two, and now DEAD, who had claimed the one and was writing the other. */
static void reap_the_third_dead(void)
{
    shml_ticket_t ticket;
    shml_seg_t seg = segment(ACTOR), dead = segment(DEAD);
    snapshot.is_armed[0] = 0;
    for (int i = 0; i < 2; i++)
        die_over(3), die_over(18);
    CHECK_EQ(claim(DEAD, (uint64_t[]){3}, 1), 1);
    CHECK_EQ(claim(DEAD, (uint64_t[]){18}, 1), 1);
    CHECK_EQ(shml_reserve(&dead, 18, record_bytes(18), NULL, 0, &ticket), SHML_OK);
    world()->is_dead[DEAD] = 1;
    snapshot.is_armed[0] = 1;
    CHECK_EQ(shml_reap(&seg, 1), 1);
    CHECK_EQ(stats_of(&seg).num_aside, 2);
    CHECK_EQ(shml_chunks(seg.control)[0].word & 0xf, SHML_CHUNK_DONE); /* row 3 was the last */
}

static void enter_and_leave(void)
{
    shml_ref_t refs[2];
    shml_found_t found;
    shml_ticket_t ticket;
    shml_seg_t seg = segment(-1);
    snapshot.actors[0] = NUM_CLIENTS;
    CHECK_EQ(shml_client_register(&seg, SHML_SERVICE, -1, 0), SHML_OK);
    CHECK_EQ(seg.self, NUM_CLIENTS);
    CHECK_EQ(shml_reserve(&seg, 18, record_bytes(18), NULL, 0, &ticket), SHML_OK);
    CHECK_EQ(shml_chunk_claim(&seg, 2), SHML_OK);
    shml_client_unregister(&seg);
    CHECK_EQ(shml_client_register(&seg, SHML_SERVICE, -1, 0), SHML_OK);
    CHECK_EQ(shml_get_many(&seg, (uint64_t[]){14, 15}, 2, 0, NULL, refs, &found), SHML_OK);
    shml_client_unregister(&seg); /* keeps its slot */
    CHECK_EQ(shml_client_register(&seg, SHML_WORKER, -1, 0), SHML_OK);
    CHECK_EQ(seg.self, NUM_CLIENTS);
    CHECK_EQ(shml_unpin(&seg, refs, 1), SHML_OK);
    shml_client_unregister(&seg);
    CHECK_EQ(shml_unpin(&seg, refs + 1, 1), SHML_OK); /* gives it back */
    CHECK_EQ(shml_clients(seg.control)[NUM_CLIENTS].state, SHML_CLIENT_FREE);
}

/* All chunks done or broken, and no encoded rows in use. */
static void release_raw(void)
{
    static int fd = -1;
    shml_seg_t seg = segment(ACTOR), other = segment(OTHER);
    snapshot.is_armed[0] = 0;
    if (fd < 0)
        fd = memfd_create("raw", MFD_CLOEXEC);
    CHECK(fd >= 0);
    put(OTHER, 3);
    CHECK_EQ(shml_chunk_end(&other, 5, SHML_FETCH_BROKEN), SHML_OK);
    put(OTHER, SHML_RAW | 2); /* over 4 and 1 */
    CHECK_EQ(shml_unpin(&other, &kept[1], 1), SHML_OK);
    num_kept = 1;
    put(OTHER, SHML_RAW | 5);
    const uint32_t broken[] = {4, 2, 3};
    for (int i = 0; i < 3; i++) {
        shml_chunk_t *chunk = &shml_chunks(seg.control)[broken[i]];
        chunk->word = SHML_CHUNK_BROKEN;
        seg.control->chunks_todo--;
        seg.control->chunks_broken++;
    }
    check_segment(&seg);
    snapshot.is_armed[0] = 1;
    CHECK_EQ(shml_raw_release(&seg, fd), 1);
}

static void repair(void)
{
    shml_seg_t seg = segment(ACTOR);
    world()->owner_died = 1;
    seg.control->dirty = 1;
    (void)stats_of(&seg);
}

/* What a kill in the commit of a chunk's last row leaves, in the worst case. */
static void repair_a_chunk_that_is_complete(void)
{
    shml_seg_t seg = segment(ACTOR);
    snapshot.is_armed[0] = 0;
    put(ACTOR, 3);
    shml_chunks(seg.control)[0].word = SHML_CHUNK_TODO | SHML_CHUNK_STAYS;
    snapshot.is_armed[0] = 1;
    repair();
    CHECK_EQ(shml_chunks(seg.control)[0].word & 0xf, SHML_CHUNK_DONE);
}

static void say(void)
{
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_text_put(&seg, SHML_TEXT_SCHEMA, "actor", 6), SHML_OK);
    CHECK_EQ(shml_text_put(&seg, SHML_TEXT_FATAL, "actor", 6), SHML_OK);
}

static uint64_t kills, pairs;

static void act(void (*what)(void))
{
    new_segment();
    snapshot_run(ACTOR, 2, what, go_on);
    CHECK(snapshot.num_kills[0] > 0 && snapshot.num_kills[1] > 0);
    kills += snapshot.num_kills[0];
    pairs += snapshot.num_kills[1];
    shml_seg_t seg = segment(FIRST);
    check_segment(&seg); /* and without a kill */
}

static void killed_in_reserve_or_commit(void) { act(put_into_resident); }
static void killed_while_reusing_a_hole(void) { act(put_into_the_hole); }
static void killed_while_a_claim_moves_to_a_hole(void) { act(put_a_claimed_row_into_the_hole); }
static void killed_while_evicting(void) { act(put_where_others_give_way); }
static void killed_while_making_way(void) { act(put_where_so_many_are_that_one_must_go); }
static void killed_while_meeting_wants(void) { act(put_what_is_wanted); }
static void killed_while_a_chunk_stays_no_more(void) { act(put_where_no_room_is_left); }
static void killed_while_pressing_readers(void) { act(ask_for_room_in_vain); }
static void killed_in_an_error_record(void) { act(put_an_error); }
static void killed_in_abort(void) { act(give_up_two); }
static void killed_while_claiming_rows(void) { act(claim_and_unclaim); }
static void killed_while_fetching(void) { act(fetch_chunks); }
static void killed_while_spilling(void) { act(spill_chunks); }
static void killed_while_breaking_a_chunk(void) { act(break_a_chunk); }
static void killed_while_pinning(void) { act(pin_and_unpin); }
static void killed_while_waiting_for_a_batch(void) { act(wait_for_a_batch); }
static void killed_while_withdrawing_wants(void) { act(give_up_waiting); }
static void killed_while_reading_as_a_guest(void) { act(read_as_a_guest); }
static void killed_while_meeting_guests_wants(void) { act(put_what_guests_want); }
static void killed_while_breaking_what_guests_want(void) { act(break_a_chunk_that_guests_want); }
static void killed_in_an_order(void) { act(begin_and_end_an_order); }
static void killed_while_stamping(void) { act(stamp_and_count); }
static void killed_in_reap(void) { act(reap_the_dead); }
static void killed_while_setting_rows_aside(void) { act(reap_the_third_dead); }
static void killed_in_register_or_unregister(void) { act(enter_and_leave); }
static void killed_while_releasing_raw(void) { act(release_raw); }
static void killed_in_rebuild(void) { act(repair); }
static void killed_while_rebuilding_a_chunk(void) { act(repair_a_chunk_that_is_complete); }
static void killed_in_text_put(void) { act(say); }

#include "crash_pairs.h"

static void every_failpoint_was_passed(void)
{
    const char *files[] = {"control.c", "client.c", "table.c", "rebuild.c", "region.c", "ring.c",  "claim.c",
                           "chunk.c",   "read.c",   "pin.c",   "want.c",    "order.c",  "spill.c", "guest.c"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        snapshot_check_coverage(files[i], "region.spare.dirty rebuild.orders.ended"); /* test_open_kill */
    snapshot_check_coverage("memory.c", "memory.ring_back.locked memory.ring_back.backed memory.ring_back.stored");
    printf("crash: %llu kills, %llu pairs\n", (unsigned long long)kills, (unsigned long long)pairs);
}

TEST_MAIN(TEST(killed_in_reserve_or_commit), TEST(killed_while_reusing_a_hole),
          TEST(killed_while_a_claim_moves_to_a_hole), TEST(killed_while_evicting), TEST(killed_while_making_way),
          TEST(killed_while_meeting_wants), TEST(killed_while_a_chunk_stays_no_more),
          TEST(killed_while_pressing_readers), TEST(killed_in_an_error_record), TEST(killed_in_abort),
          TEST(killed_while_claiming_rows), TEST(killed_while_fetching), TEST(killed_while_spilling),
          TEST(killed_while_breaking_a_chunk), TEST(killed_while_pinning), TEST(killed_while_waiting_for_a_batch),
          TEST(killed_while_withdrawing_wants), TEST(killed_while_reading_as_a_guest),
          TEST(killed_while_meeting_guests_wants), TEST(killed_while_breaking_what_guests_want),
          TEST(killed_in_an_order), TEST(killed_while_stamping), TEST(killed_in_reap),
          TEST(killed_while_setting_rows_aside), TEST(killed_in_register_or_unregister),
          TEST(killed_while_releasing_raw), TEST(killed_in_rebuild), TEST(killed_while_rebuilding_a_chunk),
          TEST(killed_in_text_put), TEST(killed_one_after_the_other), TEST(every_failpoint_was_passed))
