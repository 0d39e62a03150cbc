/* segment.h - a small segment of 24 records in 6 chunks, for the tests of the control memory.
 *
 * Control and ring lie in one piece of memory, so that a snapshot has both. Record `id` has record_bytes(id) bytes, all
 * of them (uint8_t)(id + 1). Everything that is made here goes through the API; what a test wants otherwise it sets. */
#ifndef SHML_TEST_SEGMENT_H
#define SHML_TEST_SEGMENT_H

#include "layout.h"
#include "test.h"

#define NUM_RECORDS 24u
#define ROWS        4u /* of a chunk */
/* A test of open sets says before it includes this how many places an order has. */
#ifdef CHUNKS_PER_ORDER
#define NUM_CHUNKS (SHML_MAX_ORDERS * CHUNKS_PER_ORDER)
#else
#define CHUNKS_PER_ORDER 0u
#define NUM_CHUNKS       6u
#endif
/* Of the regions; a test that wants more than resident says so before it includes this. */
#ifndef RESIDENT_BYTES
#define RESIDENT_BYTES UINT64_C(16384)
#define TRANSIT_BYTES  UINT64_C(0)
#define RAW_BYTES      UINT64_C(0)
#endif
#define RING_BYTES (RESIDENT_BYTES + TRANSIT_BYTES + RAW_BYTES)
#ifndef SPILL_BYTES
#define SPILL_BYTES UINT64_C(0) /* of the file on disk, of which the core sees nothing */
#endif

static const uint8_t test_boot_id[16] = "a test's boot id";

static shml_config_t small_config(void)
{
    shml_config_t config = {.resident_bytes = RESIDENT_BYTES,
                            .transit_bytes = TRANSIT_BYTES,
                            .raw_bytes = RAW_BYTES,
                            .num_records = NUM_RECORDS,
                            .num_chunks = NUM_CHUNKS,
                            .spill_bytes = CHUNKS_PER_ORDER > 0 ? 0 : SPILL_BYTES,
                            .rows_per_chunk = CHUNKS_PER_ORDER > 0 ? ROWS : 0,
                            .pid_namespace = 4026531836};
    memcpy(config.boot_id, test_boot_id, sizeof config.boot_id);
    return config;
}

TEST_UNUSED static uint64_t segment_bytes(void)
{
    shml_config_t config = small_config();
    return shml_control_bytes(&config) + RING_BYTES;
}

/* `memory` is zeroed. Backed from the start, unless a test says otherwise. Chunks 2 and 3 are one unit, 4 and 5
 * another. */
TEST_UNUSED static void format_segment(void *memory)
{
    uint64_t first_rows[NUM_CHUNKS];
    uint32_t num_rows[NUM_CHUNKS], units[NUM_CHUNKS];
    shml_config_t config = small_config();
    for (uint32_t i = 0; i < NUM_CHUNKS; i++)
        first_rows[i] = i * ROWS, num_rows[i] = ROWS, units[i] = i < 2 ? i : i / 2 * 2;
    CHECK_EQ(shml_control_format(memory, shml_control_bytes(&config), &config, first_rows, num_rows, units), SHML_OK);
    shml_region_t *regions = ((shml_control_t *)memory)->regions;
    for (int i = 0; i < SHML_NUM_REGIONS; i++)
        regions[i].backed_end = regions[i].end;
}

/* The pins of a client that is a process of its own. */
typedef struct local {
    uint16_t counts[NUM_RECORDS + 2 * NUM_CHUNKS + 4096];
    pthread_mutex_t lock;
} local_t;

/* A process's handle; without `local` it never pins. */
TEST_UNUSED static shml_seg_t segment_of(void *memory, int self, local_t *local, const shml_env_t *env)
{
    shml_config_t config = small_config();
    shml_seg_t seg = {.control = memory, .ring_bytes = RING_BYTES, .lock_fd = -1, .env = env};
    seg.ring = (uint8_t *)memory + shml_control_bytes(&config);
    seg.pin_counts = local != NULL ? local->counts : NULL;
    seg.pin_lock = local != NULL ? &local->lock : NULL;
    seg.self = self;
    return seg;
}

static uint64_t record_bytes(uint64_t id) { return 64 * (1 + id % 4); }

static void write_record(const shml_seg_t *seg, const shml_ticket_t *ticket, uint64_t id)
{
    CHECK(ticket->num_bytes >= record_bytes(id) && ticket->offset <= RING_BYTES - ticket->num_bytes);
    memset(seg->ring + ticket->offset, (int)(id + 1) & 0xff, ticket->num_bytes);
}

TEST_UNUSED static int put_record(shml_seg_t *seg, uint64_t id)
{
    shml_ticket_t ticket;
    int rc = shml_reserve(seg, id, record_bytes(id), NULL, 0, &ticket);
    if (rc != SHML_OK)
        return rc;
    write_record(seg, &ticket, id);
    return shml_commit(seg, &ticket, SHML_REF_READY);
}

/* Look up one record; it is pinned no longer when this returns. */
TEST_UNUSED static shml_ref_t look(shml_seg_t *seg, uint64_t id)
{
    shml_ref_t ref;
    shml_found_t found;
    CHECK_EQ(shml_get_many(seg, &id, 1, 0, NULL, &ref, &found), SHML_OK);
    CHECK_EQ(found.num_missing, ref.status == SHML_REF_MISSING);
    if (ref.status <= SHML_REF_ERROR && ref.chunk == 1)
        CHECK_EQ(shml_unpin(seg, &ref, 1), SHML_OK);
    return ref;
}

TEST_UNUSED static void check_bytes(const shml_seg_t *seg, const shml_ref_t *ref, uint64_t id)
{
    CHECK_EQ(ref->num_bytes, record_bytes(id));
    for (uint64_t i = 0; i < ref->num_bytes; i++)
        CHECK_EQ(seg->ring[ref->offset + i], (uint8_t)(id + 1));
}

/* Ready, and its bytes are those of `id`. */
TEST_UNUSED static void check_record(shml_seg_t *seg, uint64_t id)
{
    shml_ref_t ref = look(seg, id);
    if (ref.status != SHML_REF_READY)
        test_fail(__FILE__, __LINE__, "record %llu has status %u", (unsigned long long)id, ref.status);
    check_bytes(seg, &ref, id);
}

TEST_UNUSED static void check_segment(shml_seg_t *seg)
{
    static uint8_t scratch[4096];
    const char *what = "";
    int rc = shml_check(seg, scratch, &what);
    if (rc != SHML_OK)
        test_fail(__FILE__, __LINE__, "shml_check: %d %s", rc, what);
}

TEST_UNUSED static shml_stats_t stats_of(shml_seg_t *seg)
{
    shml_stats_t stats;
    CHECK_EQ(shml_get_stats(seg, &stats), SHML_OK);
    return stats;
}
#endif
