/* The crash suite: whatever a client does, killed at any failpoint, the others go on, and a second kill in their
 * recovery changes nothing. Built with -DSHML_BREAK_REBUILD it must fail (the Makefile sees to that). */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "segment.h"
#include "snapshot.h"

/* ACTOR is killed; FIRST and SECOND survive the first and the second kill; READER waits; OTHER lives and has
 * something reserved; DEAD died before. */
enum { ACTOR, FIRST, SECOND, READER, OTHER, DEAD, NUM_CLIENTS };
#define OTHERS_ID    23u
#define DEATHS(word) ((word) >> 8 & 0xff)
#define STATE(word)  ((word) & 0xff)

static shml_seg_t segment(int self) { return segment_of(world()->memory, self, &snapshot_env); }

/* Ids 0, 1, 2 and 4 ready, 3 a hole, 5 in error, 23 reserved by OTHER; chunk 1 done, chunk 5 OTHER's. */
static void new_segment(void)
{
    snapshot_reset();
    for (int d = 0; d < SNAPSHOT_DEPTHS; d++) {
        if (snapshot.worlds[d].memory != NULL)
            munmap(snapshot.worlds[d].memory, segment_bytes());
        snapshot.worlds[d].memory =
            mmap(NULL, segment_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(snapshot.worlds[d].memory != MAP_FAILED);
    }
    format_segment(world()->memory, 0);
    shml_control_t *c = segment(0).control;
    /* All but the wants of clients there are none, the later bytes of texts, and the pins. */
    const uint64_t regions[][2] = {
        {0, c->wants_at},
        {c->wants_at, 8 * SHML_MAX_WANTS * sizeof(uint64_t)},
        {c->texts_at, 256},
        {c->texts_at + sizeof(shml_shared_text_t), 256},
        {c->chunks_at, c->pins_at - c->chunks_at},
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
    shml_seg_t other = segment(OTHER);
    shml_ticket_t hole, error, reserved;
    CHECK_EQ(put_record(&other, 0), SHML_OK);
    CHECK_EQ(put_record(&other, 1), SHML_OK);
    CHECK_EQ(put_record(&other, 2), SHML_OK);
    CHECK_EQ(shml_reserve(&other, 3, record_bytes(3), &hole), SHML_OK);
    CHECK_EQ(put_record(&other, 4), SHML_OK);
    CHECK_EQ(shml_abort(&other, &hole), SHML_OK);
    CHECK_EQ(shml_reserve(&other, 5, 64, &error), SHML_OK);
    CHECK_EQ(shml_commit(&other, &error, SHML_REF_ERROR), SHML_OK);
    uint32_t chunk;
    for (uint32_t i = 0; i < NUM_CHUNKS; i++)
        CHECK_EQ(shml_chunk_claim(&other, &chunk), SHML_OK);
    for (uint32_t i = 0; i < NUM_CHUNKS - 1; i++) { /* only the API's way to make a claimed chunk TODO is a death */
        shml_chunk_t *c_i = &shml_chunks(c)[i];
        if (i != 1) {
            c_i->word = SHML_CHUNK_TODO;
            c->chunks_claimed--, c->chunks_todo++;
        }
    }
    c->chunk_cursor = 0;
    CHECK_EQ(shml_chunk_done(&other, 1), SHML_OK);
    CHECK_EQ(shml_reserve(&other, OTHERS_ID, record_bytes(OTHERS_ID), &reserved), SHML_OK);
    check_segment(&other);
}

/* ---------------------------------------------------------------------------------------------------- *
 * The survivor
 * ---------------------------------------------------------------------------------------------------- */

/* What was published when the kill came is still there. */
static void check_published(shml_seg_t *seg, world_t *before)
{
    shml_control_t *c = (shml_control_t *)(void *)before->memory;
    const shml_desc_t *descs = shml_descs(c);
    for (uint32_t i = 0; i < c->num_descs; i++) {
        if (descs[i].state == SHML_DESC_READY)
            check_record(seg, descs[i].id);
        else if (descs[i].state == SHML_DESC_ERROR)
            CHECK_EQ(look(seg, descs[i].id).status, SHML_REF_ERROR);
    }
}

static void check_chunks(shml_seg_t *seg, int depth)
{
    for (uint32_t i = 0; i < NUM_CHUNKS; i++) {
        uint32_t word = shml_chunks(seg->control)[i].word;
        CHECK(DEATHS(word) <= (uint32_t)depth + 1); /* one for each who died holding it, DEAD included */
    }
}

/* Whatever the dead did not finish can be done: all chunks, all records. */
static void finish_work(shml_seg_t *seg)
{
    uint32_t chunk;
    while (shml_chunk_claim(seg, &chunk) == SHML_OK)
        CHECK_EQ(shml_chunk_done(seg, chunk), SHML_OK);
    shml_stats_t stats = stats_of(seg);
    CHECK_EQ(stats.chunks_todo, 0);
    CHECK_EQ(stats.chunks_claimed, 1); /* OTHER's */
    for (uint64_t id = 0; id < NUM_RECORDS; id++) {
        uint32_t status = look(seg, id).status;
        int is_there = status == SHML_REF_READY || status == SHML_REF_ERROR || id == OTHERS_ID;
        CHECK_EQ(put_record(seg, id), is_there ? SHML_E_EXISTS : SHML_OK);
    }
    shml_seg_t reader = segment(READER);
    for (uint64_t id = 0; id < NUM_RECORDS; id++)
        if (id == OTHERS_ID)
            CHECK_EQ(look(&reader, id).status, SHML_REF_MISSING);
        else if (look(&reader, id).status != SHML_REF_ERROR)
            check_record(&reader, id);
}

static void check_texts(shml_seg_t *seg)
{
    char text[SHML_TEXT_BYTES];
    for (uint32_t which = 0; which < SHML_NUM_TEXTS; which++) {
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
    check_chunks(&seg, depth);
    finish_work(&seg);
    check_texts(&seg);
    shml_seg_t newcomer = segment(-1);
    CHECK_EQ(shml_client_register(&newcomer, SHML_WORKER, -1, 0), SHML_OK);
    check_segment(&seg);
}

/* ---------------------------------------------------------------------------------------------------- *
 * What the actor does
 * ---------------------------------------------------------------------------------------------------- */
static void put_fresh(void)
{
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(put_record(&seg, 8), SHML_OK);
    CHECK_EQ(put_record(&seg, 9), SHML_OK);
}
static void put_into_the_hole(void)
{
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(put_record(&seg, 3), SHML_OK);
}
static void put_what_is_wanted(void)
{
    const uint64_t ids[] = {8, 12};
    shml_ref_t refs[2];
    uint32_t missing;
    shml_seg_t seg = segment(ACTOR), reader = segment(READER);
    CHECK_EQ(shml_get_many(&reader, ids, 2, 1, refs, &missing), SHML_OK);
    CHECK_EQ(put_record(&seg, 8), SHML_OK);
    CHECK_EQ(put_record(&seg, 12), SHML_OK);
}
static void put_an_error(void)
{
    shml_ticket_t ticket;
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_reserve(&seg, SHML_CHUNK_ERROR | 2, 100, &ticket), SHML_OK);
    CHECK_EQ(shml_commit(&seg, &ticket, SHML_REF_ERROR), SHML_OK);
}
static void give_up_two(void)
{
    shml_ticket_t low, high;
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_reserve(&seg, 8, record_bytes(8), &low), SHML_OK);
    CHECK_EQ(shml_reserve(&seg, 9, record_bytes(9), &high), SHML_OK);
    CHECK_EQ(shml_abort(&seg, &low), SHML_OK);  /* a hole */
    CHECK_EQ(shml_abort(&seg, &high), SHML_OK); /* free space */
    CHECK_EQ(put_record(&seg, 10), SHML_OK);    /* in a descriptor of the free list */
}
static void read_chunks(void)
{
    uint32_t chunk;
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_chunk_claim(&seg, &chunk), SHML_OK);
    for (uint64_t id = chunk * ROWS; id < (chunk + 1) * ROWS; id++)
        (void)put_record(&seg, id);
    CHECK_EQ(shml_chunk_done(&seg, chunk), SHML_OK);
    CHECK_EQ(shml_chunk_claim(&seg, &chunk), SHML_OK);
    CHECK_EQ(shml_chunk_broken(&seg, chunk), SHML_OK);
}
static void want(void)
{
    const uint64_t ids[] = {8, 12, 0};
    shml_ref_t refs[3];
    uint32_t missing;
    shml_seg_t seg = segment(ACTOR);
    CHECK_EQ(shml_get_many(&seg, ids, 3, 1, refs, &missing), SHML_OK);
    CHECK_EQ(missing, 2);
}
static void reap_the_dead(void)
{
    uint32_t chunk;
    shml_ticket_t ticket;
    shml_seg_t seg = segment(ACTOR), dead = segment(DEAD);
    snapshot.is_armed[0] = 0;
    CHECK_EQ(shml_chunk_claim(&dead, &chunk), SHML_OK);
    for (uint64_t id = 8; id < 11; id++)
        CHECK_EQ(shml_reserve(&dead, id, record_bytes(id), &ticket), SHML_OK);
    world()->is_dead[DEAD] = 1;
    snapshot.is_armed[0] = 1;
    CHECK_EQ(shml_reap(&seg, 1), 1);
}
static void enter_and_leave(void)
{
    uint32_t chunk;
    shml_ticket_t ticket;
    shml_seg_t seg = segment(-1);
    snapshot.actors[0] = NUM_CLIENTS;
    CHECK_EQ(shml_client_register(&seg, SHML_SERVICE, -1, 0), SHML_OK);
    CHECK_EQ(seg.self, NUM_CLIENTS);
    CHECK_EQ(shml_reserve(&seg, 8, record_bytes(8), &ticket), SHML_OK);
    CHECK_EQ(shml_chunk_claim(&seg, &chunk), SHML_OK);
    shml_client_unregister(&seg);
}
static void repair(void)
{
    shml_seg_t seg = segment(ACTOR);
    world()->owner_died = 1;
    seg.control->dirty = 1;
    (void)stats_of(&seg);
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

static void killed_in_reserve_or_commit(void) { act(put_fresh); }
static void killed_while_reusing_a_hole(void) { act(put_into_the_hole); }
static void killed_while_meeting_wants(void) { act(put_what_is_wanted); }
static void killed_in_an_error_record(void) { act(put_an_error); }
static void killed_in_abort(void) { act(give_up_two); }
static void killed_with_a_chunk(void) { act(read_chunks); }
static void killed_while_posting_wants(void) { act(want); }
static void killed_in_reap(void) { act(reap_the_dead); }
static void killed_in_register_or_unregister(void) { act(enter_and_leave); }
static void killed_in_rebuild(void) { act(repair); }
static void killed_in_text_put(void) { act(say); }

static void every_failpoint_was_passed(void)
{
    const char *files[] = {"control.c", "client.c", "table.c", "ring.c", "chunk.c"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        snapshot_check_coverage(files[i], "");
    printf("crash: %llu kills, %llu pairs\n", (unsigned long long)kills, (unsigned long long)pairs);
}

TEST_MAIN(TEST(killed_in_reserve_or_commit), TEST(killed_while_reusing_a_hole), TEST(killed_while_meeting_wants),
          TEST(killed_in_an_error_record), TEST(killed_in_abort), TEST(killed_with_a_chunk),
          TEST(killed_while_posting_wants), TEST(killed_in_reap), TEST(killed_in_register_or_unregister),
          TEST(killed_in_rebuild), TEST(killed_in_text_put), TEST(every_failpoint_was_passed))
