/* Open sets and joined orders: whatever a client does there, killed at any failpoint, the others go on, and a second
 * kill in their recovery changes nothing. What closed sets have as well is in crash.c. */
#define _GNU_SOURCE
#include <sys/mman.h>

#define RESIDENT_BYTES   UINT64_C(0)
#define TRANSIT_BYTES    UINT64_C(8192)
#define RAW_BYTES        UINT64_C(4096)
#define CHUNKS_PER_ORDER 2u
#include "segment.h"
#include "snapshot.h"

/* ACTOR is killed; FIRST and SECOND survive the first and the second kill; OWNER is what all read for; READER waits;
 * OTHER lives and has something of everything; DEAD died before. */
enum { ACTOR, FIRST, SECOND, OWNER, READER, OTHER, DEAD, NUM_CLIENTS };
#define UNKNOWN    SHML_MAX_POSITION
#define NUM_DESCS  96u /* more are never used */
#define NUM_ORDERS 8u  /* likewise */

static local_t locals[NUM_CLIENTS + SNAPSHOT_DEPTHS];
static shml_seg_t segment_with(int self, int local)
{
    return segment_of(world()->memory, self, &locals[local], &snapshot_env);
}
static shml_seg_t segment(int self) { return segment_with(self, self >= 0 ? self : NUM_CLIENTS + snapshot.depth); }

static shml_order_info_t stream, others; /* READER's and OTHER's; OTHER's alone */
static shml_ref_t kept;                  /* the encoded rows of chunk 1 of `stream`, which OTHER has pinned */

static uint64_t id_of(const shml_order_info_t *order, uint64_t position)
{
    return shml_open_id(order->slot, order->gen, position);
}

static void put(int client, uint64_t id)
{
    shml_seg_t seg = segment(client);
    CHECK_EQ(put_record(&seg, id), SHML_OK);
}

static int claim_open(int client, const shml_order_info_t *order, uint64_t number)
{
    uint32_t chunk;
    shml_seg_t seg = segment(client);
    return shml_chunk_claim_open(&seg, order->slot, order->gen, number, &chunk);
}

static int join_as(int client, uint64_t key, uint32_t reader, uint32_t num_readers, shml_order_info_t *order)
{
    shml_seg_t seg = segment(client);
    shml_join_t how = {key, reader, num_readers, OWNER, shml_client_gen(&seg, OWNER)};
    *order = (shml_order_info_t){.num_positions = UNKNOWN, .world_size = 1};
    return shml_order_join(&seg, &how, order);
}
static shml_order_info_t join(int client, uint64_t key, uint32_t reader, uint32_t num_readers)
{
    shml_order_info_t order;
    CHECK_EQ(join_as(client, key, reader, num_readers, &order), SHML_OK);
    return order;
}

static uint32_t get(int client, const uint64_t *ids, uint32_t n, int flags, const shml_order_info_t *order,
                    uint64_t begin, uint64_t end, shml_ref_t *refs)
{
    shml_found_t found;
    shml_seg_t seg = segment(client);
    shml_place_t place = {order->slot, order->gen, begin, end};
    CHECK_EQ(shml_get_many(&seg, ids, n, flags, &place, refs, &found), SHML_OK);
    return found.num_missing;
}

static void die(shml_seg_t *dying)
{
    shml_seg_t other = segment(OTHER);
    world()->is_dead[dying->self] = 1;
    CHECK_EQ(shml_reap(&other, 1), 1);
}

/* A service that will die, or leave. */
static shml_seg_t passing(void)
{
    shml_seg_t seg = segment(-1);
    CHECK_EQ(shml_client_register(&seg, SHML_SERVICE, -1, 0), SHML_OK);
    return seg;
}

static void die_over(uint64_t id)
{
    uint8_t got;
    shml_seg_t dying = passing();
    CHECK_EQ(shml_claim_rows(&dying, &id, 1, &got), SHML_OK);
    CHECK_EQ(got, 1);
    die(&dying);
}

static void fetch(shml_seg_t *seg, const shml_order_info_t *order, uint64_t number)
{
    uint32_t chunk;
    CHECK_EQ(shml_chunk_claim_open(seg, order->slot, order->gen, number, &chunk), SHML_OK);
    CHECK_EQ(put_record(seg, SHML_RAW | chunk), SHML_OK);
    CHECK_EQ(shml_chunk_end(seg, chunk, SHML_FETCH_OK), SHML_OK);
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
    const uint64_t regions[][2] = {
        {0, c->wants_at},
        {c->wants_at, (NUM_CLIENTS + 1) * SHML_MAX_WANTS * sizeof(uint64_t)},
        {c->orders_at, c->marks_at - c->orders_at + NUM_ORDERS * SHML_MAX_CLIENTS * sizeof(uint64_t)},
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
        uint32_t role = client == OWNER ? SHML_OWNER : client == READER ? SHML_WORKER : SHML_SERVICE;
        CHECK_EQ(shml_client_register(&seg, role, -1, 0), SHML_OK);
        CHECK_EQ(seg.self, client);
    }
}

/* `stream` is consumed below position 4. Its chunk 0, which nobody needs any more, has encoded rows, an error, a row
 * that is there, one over which somebody died and one that is aside. Chunk 1 has encoded rows, which OTHER has pinned,
 * and row 4, which READER has found; it waits for 5. OTHER fetches chunk 0 of a stream of its own. */
static void new_segment(void)
{
    new_worlds();
    shml_seg_t seg = segment(OTHER), fetcher = passing();
    shml_ref_t refs[2];
    shml_found_t found;
    stream = join(READER, 1, 0, 2);
    CHECK_EQ(join(OTHER, 1, 1, 2).slot, stream.slot);
    others = join(OTHER, 2, 0, 1);
    fetch(&fetcher, &stream, 0);
    fetch(&fetcher, &stream, 1);
    shml_client_unregister(&fetcher);
    put(OTHER, SHML_CHUNK_ERROR | 0);
    put(OTHER, id_of(&stream, 0));
    die_over(id_of(&stream, 1));
    for (int i = 0; i < SHML_MAX_ATTEMPTS; i++)
        die_over(id_of(&stream, 2));
    put(OTHER, id_of(&stream, 4));
    CHECK_EQ(claim_open(OTHER, &others, 0), SHML_OK);
    CHECK_EQ(get(READER, (uint64_t[]){id_of(&stream, 4), id_of(&stream, 5)}, 2, SHML_GET_POST, &stream, 4, 6, refs), 1);
    CHECK_EQ(get(OTHER, NULL, 0, 0, &stream, 1, 5, NULL), 0);
    CHECK_EQ(shml_order_table(seg.control)[stream.slot].low_water, 4);
    CHECK_EQ(shml_get_many(&seg, (uint64_t[]){SHML_RAW | 1}, 1, 0, NULL, &kept, &found), SHML_OK);
    CHECK_EQ(kept.chunk, 1);
    check_segment(&seg);
}

/* ---------------------------------------------------------------------------------------------------- *
 * The survivor
 * ---------------------------------------------------------------------------------------------------- */

/* What was published when the kill came is still there, if anybody may ask for it. */
static void check_published(shml_seg_t *seg, world_t *before)
{
    shml_control_t *c = (shml_control_t *)(void *)before->memory;
    const shml_desc_t *descs = shml_descs(c);
    CHECK(c->desc_end <= NUM_DESCS);
    for (uint32_t i = 0; i < c->desc_end; i++) {
        if (descs[i].state != SHML_DESC_READY)
            continue;
        int comes = shml_row_comes(seg->control, descs[i].id);
        if (comes == SHML_ROW_COMES)
            check_record(seg, descs[i].id);
        else
            CHECK_EQ(look(seg, descs[i].id).status, comes == SHML_ROW_AT_END ? SHML_REF_END : SHML_REF_MISSING);
    }
}

/* Chunk 2 of the stream gets chunk 0's place, whoever was at it; chunk 3 does not get chunk 1's. */
static void finish_stream(int self)
{
    shml_seg_t seg = segment(self);
    uint32_t chunk;
    uint64_t first;
    int rc = shml_chunk_claim_open(&seg, stream.slot, stream.gen, 2, &chunk);
    if (shml_order_table(seg.control)[stream.slot].num_positions <= 2 * ROWS) {
        CHECK_EQ(rc, SHML_E_NOTFOUND);
        return;
    }
    CHECK(rc == SHML_OK || rc == SHML_E_EXISTS);
    CHECK_EQ(chunk, 0);
    CHECK_EQ(shml_chunk_first(&seg, 0, &first), SHML_OK);
    CHECK_EQ(first, id_of(&stream, 2 * ROWS));
    if (rc == SHML_OK) {
        put(self, SHML_RAW | 0);
        CHECK_EQ(shml_chunk_end(&seg, 0, SHML_FETCH_OK), SHML_OK);
    }
    check_record(&seg, SHML_RAW | 0);
    CHECK_EQ(look(&seg, SHML_CHUNK_ERROR | 0).status, SHML_REF_MISSING);
    CHECK_EQ(claim_open(self, &stream, 3), SHML_E_FULL);
    for (uint64_t position = 1; position <= 2; position++) { /* they were suspect and aside */
        uint8_t row;
        CHECK_EQ(shml_look(&seg, (uint64_t[]){id_of(&stream, position)}, 1, NULL, &row), SHML_OK);
        CHECK_EQ(row, SHML_ROW_MISSING);
    }
}

/* What living clients keep was not taken for all that. */
static void check_kept(shml_seg_t *seg)
{
    const shml_desc_t *desc = &shml_descs(seg->control)[kept.desc];
    uint32_t chunk;
    CHECK(desc->id == (SHML_RAW | 1) && desc->gen == kept.gen && desc->offset == kept.offset);
    check_bytes(seg, &kept, SHML_RAW | 1);
    CHECK_EQ(shml_row_chunks(seg, (uint64_t[]){id_of(&stream, 4)}, 1, &chunk), SHML_OK);
    CHECK_EQ(chunk, 1);
    check_record(seg, id_of(&stream, 4));                  /* READER waits, and has found it */
    CHECK_EQ(claim_open(OTHER, &others, 0), SHML_E_STALE); /* it still has it */
}

/* A new iteration from its beginning to its end. */
static void iterate(int self)
{
    shml_ref_t ref;
    shml_seg_t seg = segment(self);
    uint32_t num_orders = shml_num_orders(&seg);
    shml_order_info_t order = join(self, 99, 0, 1);
    fetch(&seg, &order, 0);
    for (uint64_t position = 0; position < 3; position++) {
        uint8_t got;
        uint64_t id = id_of(&order, position);
        CHECK_EQ(shml_claim_rows(&seg, &id, 1, &got), SHML_OK);
        CHECK_EQ(got, 1);
        put(self, id);
        CHECK_EQ(get(self, &id, 1, SHML_GET_POST, &order, position, position + 1, &ref), 0);
        CHECK_EQ(ref.status, SHML_REF_READY);
        check_bytes(&seg, &ref, id);
        CHECK_EQ(shml_unpin(&seg, &ref, 1), SHML_OK);
    }
    CHECK_EQ(shml_order_finish(&seg, order.slot, order.gen, 3), SHML_OK);
    CHECK_EQ(get(self, (uint64_t[]){id_of(&order, 3)}, 1, SHML_GET_POST, &order, 3, 4, &ref), 0);
    CHECK_EQ(ref.status, SHML_REF_END);
    CHECK_EQ(shml_order_leave(&seg, order.slot, order.gen), SHML_OK);
    CHECK_EQ(shml_num_orders(&seg), num_orders);
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
    check_segment(&seg);
    check_published(&seg, &snapshot.worlds[depth - 1]);
    CHECK(shml_order_living(seg.control, stream.slot, stream.gen) != NULL);
    CHECK(shml_order_living(seg.control, others.slot, others.gen) != NULL);
    CHECK_EQ(shml_order_table(seg.control)[stream.slot].low_water, 4);
    check_kept(&seg);
    finish_stream(self);
    check_kept(&seg);
    iterate(self);
    check_segment(&seg);
}

/* ---------------------------------------------------------------------------------------------------- *
 * What the actor does
 * ---------------------------------------------------------------------------------------------------- */
static void take_a_place(void)
{
    shml_seg_t seg = segment(ACTOR);
    fetch(&seg, &stream, 2);
    CHECK_EQ(claim_open(ACTOR, &stream, 3), SHML_E_FULL);
}

static void iterate_alone(void)
{
    shml_seg_t seg = segment(ACTOR);
    shml_order_info_t order = join(ACTOR, 3, 0, 1);
    CHECK_EQ(get(ACTOR, NULL, 0, 0, &order, 0, 2, NULL), 0);
    CHECK_EQ(shml_order_leave(&seg, order.slot, order.gen), SHML_OK);
}

/* In an order that OTHER has begun, which OTHER leaves first. */
static void share_and_leave(void)
{
    shml_seg_t seg = segment(ACTOR), other = segment(OTHER);
    snapshot.is_armed[0] = 0;
    shml_order_info_t order = join(OTHER, 3, 1, 2);
    CHECK_EQ(get(OTHER, NULL, 0, 0, &order, 1, 9, NULL), 0);
    snapshot.is_armed[0] = 1;
    CHECK_EQ(join(ACTOR, 3, 0, 2).slot, order.slot);
    CHECK_EQ(get(ACTOR, NULL, 0, 0, &order, 0, 4, NULL), 0);
    snapshot.is_armed[0] = 0;
    CHECK_EQ(shml_order_leave(&other, order.slot, order.gen), SHML_OK);
    snapshot.is_armed[0] = 1;
    CHECK_EQ(shml_order_leave(&seg, order.slot, order.gen), SHML_OK);
    CHECK(shml_order_living(seg.control, order.slot, order.gen) == NULL);
}

/* READER waits for 5, which is the end now. */
static void finish(void)
{
    shml_ref_t refs[2];
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_order_finish(&seg, stream.slot, stream.gen, 5), SHML_OK);
    CHECK_EQ(get(ACTOR, (uint64_t[]){id_of(&stream, 5)}, 1, 0, &stream, 5, 6, refs), 0);
    CHECK_EQ(refs[0].status, SHML_REF_END);
}

/* There are no more descriptors than are used, and rows that nobody needs. */
static void claim_without_descriptors(void)
{
    shml_seg_t seg = segment(ACTOR);
    shml_control_t *c = seg.control;
    uint64_t position = 100;
    uint8_t got;
    snapshot.is_armed[0] = 0;
    c->num_descs = 40; /* enough for what follows as well: what nobody needs gives way */
    for (; shml_has_desc(c); position += 4)
        put(OTHER, id_of(&others, position));
    check_segment(&seg);
    snapshot.is_armed[0] = 1;
    CHECK_EQ(shml_claim_rows(&seg, (uint64_t[]){id_of(&others, 0)}, 1, &got), SHML_OK);
    CHECK_EQ(got, 1);
    CHECK(stats_of(&seg).num_evicted > 0);
}

/* DEAD is a stream's only reader, fetches it and decodes it, also a row without a chunk; and reads in another's. */
static void reap_the_dead(void)
{
    shml_seg_t seg = segment(ACTOR), dead = segment(DEAD);
    uint8_t got[2];
    snapshot.is_armed[0] = 0;
    shml_order_info_t order = join(DEAD, 3, 0, 2), shared = join(OTHER, 4, 0, 2);
    (void)join(DEAD, 4, 1, 2);
    CHECK_EQ(get(OTHER, NULL, 0, 0, &shared, 0, 8, NULL), 0);
    CHECK_EQ(claim_open(DEAD, &order, 0), SHML_OK);
    CHECK_EQ(shml_claim_rows(&dead, (uint64_t[]){id_of(&order, 1), id_of(&order, 7)}, 2, got), SHML_OK);
    CHECK(got[0] == 1 && got[1] == 1);
    world()->is_dead[DEAD] = 1;
    snapshot.is_armed[0] = 1;
    CHECK_EQ(shml_reap(&seg, 1), 1);
    CHECK(shml_order_living(seg.control, order.slot, order.gen) == NULL);
    CHECK_EQ(shml_order_table(seg.control)[shared.slot].low_water, 8);
    CHECK_EQ(stats_of(&seg).num_suspect, 2); /* that of the stream, and row 1: row 7 has no chunk */
}

/* An order whose ids there were 65536 orders ago. */
static void begin_a_generation_again(void)
{
    shml_seg_t seg = segment(ACTOR), other = segment(OTHER);
    snapshot.is_armed[0] = 0;
    shml_order_info_t old = join(OTHER, 3, 0, 1);
    shml_seg_t fetcher = passing();
    fetch(&fetcher, &old, 0);
    shml_client_unregister(&fetcher);
    put(OTHER, id_of(&old, 1));
    put(OTHER, id_of(&old, 50));
    die_over(id_of(&old, 2));
    CHECK_EQ(shml_order_leave(&other, old.slot, old.gen), SHML_OK);
    shml_order_table(seg.control)[old.slot].gen += 0xffff;
    snapshot.is_armed[0] = 1;
    shml_order_info_t order = join(ACTOR, 4, 0, 1);
    CHECK_EQ(id_of(&order, 0), id_of(&old, 0));
    CHECK_EQ(look(&seg, id_of(&order, 50)).status, SHML_REF_MISSING);
}

static void repair(void)
{
    shml_seg_t seg = segment(ACTOR);
    world()->owner_died = 1;
    seg.control->dirty = 1;
    (void)stats_of(&seg);
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

static void killed_while_taking_a_place(void) { act(take_a_place); }
static void killed_while_iterating_alone(void) { act(iterate_alone); }
static void killed_while_sharing_an_order(void) { act(share_and_leave); }
static void killed_while_finishing_a_stream(void) { act(finish); }
static void killed_while_descriptors_run_out(void) { act(claim_without_descriptors); }
static void killed_while_reaping_a_reader(void) { act(reap_the_dead); }
static void killed_while_a_generation_begins_again(void) { act(begin_a_generation_again); }
static void killed_while_repairing_an_open_set(void) { act(repair); }

static void every_failpoint_was_passed(void)
{
    snapshot_check_coverage("open.c", "");
    snapshot_check_coverage("join.c", "");
    snapshot_check_coverage("order.c", "order.begin.dirty"); /* of an order that a sampler begins: crash.c */
    CHECK(num_seen > 0);
    const char *others_need[] = {"region.spare.dirty", "rebuild.orders.ended"};
    for (int k = 0; k < 2; k++) {
        int is_seen = 0;
        for (int i = 0; i < num_seen; i++)
            is_seen |= strcmp(seen_names[i], others_need[k]) == 0;
        CHECK(is_seen);
    }
    printf("test_open_kill: %llu kills, %llu pairs\n", (unsigned long long)kills, (unsigned long long)pairs);
}

TEST_MAIN(TEST(killed_while_taking_a_place), TEST(killed_while_iterating_alone), TEST(killed_while_sharing_an_order),
          TEST(killed_while_finishing_a_stream), TEST(killed_while_descriptors_run_out),
          TEST(killed_while_reaping_a_reader), TEST(killed_while_a_generation_begins_again),
          TEST(killed_while_repairing_an_open_set), TEST(every_failpoint_was_passed))
