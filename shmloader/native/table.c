/* table.c - the index id -> descriptor, and its repair.
 *
 * Buckets are `id mod num_buckets` with chains through the descriptors: the dense ids of a map-style dataset never
 * collide, and an insertion is one store. Every walk is bounded by the number of descriptors, so that a damaged
 * chain is an error and not a hang.
 */
#include <string.h>

#include "failpoint.h"
#include "layout.h"

static uint32_t *bucket_of(struct shml_control *c, uint64_t id) { return &shml_buckets(c)[id % c->num_buckets]; }

shml_desc_t *shml_find(shml_seg_t *seg, uint64_t id, int *status)
{
    struct shml_control *c = seg->control;
    shml_desc_t *descs = shml_descs(c);
    uint32_t next = *bucket_of(c, id), steps = 0;
    *status = SHML_OK;
    while (next != 0) {
        if (next > c->num_descs || ++steps > c->num_descs) {
            *status = SHML_POISON(seg);
            return NULL;
        }
        shml_desc_t *desc = &descs[next - 1];
        if (desc->id == id)
            return desc;
        next = desc->next;
    }
    return NULL;
}

void shml_link(struct shml_control *c, uint32_t index)
{
    shml_desc_t *desc = &shml_descs(c)[index];
    uint32_t *bucket = bucket_of(c, desc->id);
    desc->next = *bucket;
    SHML_FP("table.link.next");
    *bucket = index + 1;
}

int shml_unlink(struct shml_control *c, uint32_t index)
{
    shml_desc_t *descs = shml_descs(c);
    uint32_t *at = bucket_of(c, descs[index].id);
    for (uint32_t steps = 0; *at != 0 && steps <= c->num_descs; steps++) {
        if (*at > c->num_descs)
            return SHML_E_CORRUPT;
        if (*at == index + 1) {
            *at = descs[index].next;
            SHML_FP("table.unlink.out");
            return SHML_OK;
        }
        at = &descs[*at - 1].next;
    }
    return SHML_E_CORRUPT;
}

static int is_live(uint32_t state)
{
    return state == SHML_DESC_RESERVED || state == SHML_DESC_READY || state == SHML_DESC_ERROR;
}

static int in_bounds(const struct shml_control *c, const shml_desc_t *desc)
{
    return desc->offset % SHML_ALIGN == 0 && desc->num_bytes % SHML_ALIGN == 0 && desc->num_bytes > 0 &&
           desc->offset <= c->ring_bytes && desc->num_bytes <= c->ring_bytes - desc->offset;
}

int shml_rebuild(shml_seg_t *seg)
{
    struct shml_control *c = seg->control;
    shml_desc_t *descs = shml_descs(c);
    shml_begin_change(c);
#ifndef SHML_BREAK_REBUILD /* defined by the tests' negative control: the crash suite must then fail */
    SHML_FP("table.rebuild.begin");
    memset(shml_buckets(c), 0, (size_t)c->num_buckets * sizeof(uint32_t));
    SHML_FP("table.rebuild.buckets");
    c->head = c->used_bytes = 0;
    c->num_ready = c->num_errors = c->num_reserved = 0;
    c->free_list = c->hole_list = 0;
    SHML_FP("table.rebuild.zeroed");
    if (c->desc_end > c->num_descs)
        return SHML_POISON(seg);
    for (uint32_t i = c->desc_end; i-- > 0;) { /* from the top: the lists begin with the lowest index */
        shml_desc_t *desc = &descs[i];
        uint32_t state = desc->state;
        if (state == SHML_DESC_FREE) {
            desc->next = c->free_list;
            c->free_list = i + 1;
            continue;
        }
        if (state > SHML_DESC_HOLE || !in_bounds(c, desc))
            return SHML_POISON(seg);
        if (desc->offset + desc->num_bytes > c->head)
            c->head = desc->offset + desc->num_bytes;
        if (state == SHML_DESC_HOLE) {
            desc->next = c->hole_list;
            c->hole_list = i + 1;
            continue;
        }
        c->used_bytes += desc->num_bytes;
        c->num_ready += state == SHML_DESC_READY;
        c->num_errors += state == SHML_DESC_ERROR;
        c->num_reserved += state == SHML_DESC_RESERVED;
        SHML_FP("table.rebuild.desc");
        shml_link(c, i);
    }
    uint32_t counts[4] = {0};
    const shml_chunk_t *chunks = shml_chunks(c);
    for (uint32_t i = 0; i < c->num_chunks; i++) {
        uint32_t state = chunks[i].word & 0xff;
        if (state > SHML_CHUNK_BROKEN)
            return SHML_POISON(seg);
        counts[state]++;
    }
    c->chunks_todo = counts[SHML_CHUNK_TODO];
    c->chunks_claimed = counts[SHML_CHUNK_CLAIMED];
    SHML_FP("table.rebuild.chunks");
    c->chunks_done = counts[SHML_CHUNK_DONE];
    c->chunks_broken = counts[SHML_CHUNK_BROKEN];
    c->chunk_cursor = 0;
#endif
    c->num_rebuilds++;
    SHML_FP("table.rebuild.end");
    shml_end_change(c);
    return SHML_OK;
}

#define MUST(condition, text)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            *what = (text);                                                                                            \
            return SHML_E_CORRUPT;                                                                                     \
        }                                                                                                              \
    } while (0)

/* No two blocks share a byte: mark each 64-byte unit of [0, head) in a bitmap. */
static int check_overlap(struct shml_control *c, uint8_t *bitmap, const char **what)
{
    const shml_desc_t *descs = shml_descs(c);
    memset(bitmap, 0, c->head / SHML_ALIGN / 8 + 1);
    for (uint32_t i = 0; i < c->desc_end; i++) {
        if (descs[i].state == SHML_DESC_FREE)
            continue;
        for (uint64_t unit = descs[i].offset / SHML_ALIGN; unit < (descs[i].offset + descs[i].num_bytes) / SHML_ALIGN;
             unit++) {
            MUST(!(bitmap[unit / 8] >> (unit % 8) & 1), "two records overlap");
            bitmap[unit / 8] |= (uint8_t)(1u << (unit % 8));
        }
    }
    return SHML_OK;
}

static int is_link(const struct shml_control *c, uint32_t next) { return next != 0 && next <= c->num_descs; }

static int is_client(struct shml_control *c, uint32_t slot)
{
    return slot < SHML_MAX_CLIENTS && shml_clients(c)[slot].state == SHML_CLIENT_ACTIVE;
}

static int check_locked(shml_seg_t *seg, void *scratch, const char **what)
{
    struct shml_control *c = seg->control;
    const shml_desc_t *descs = shml_descs(c);
    uint64_t used = 0, head = 0, linked = 0, listed = 0;
    uint32_t ready = 0, errors = 0, reserved = 0, holes = 0, free_below = 0;
    MUST(!c->dirty, "derived state is marked dirty");
    for (uint32_t i = 0; i < c->num_descs; i++) {
        const shml_desc_t *desc = &descs[i];
        if (desc->state == SHML_DESC_FREE) {
            free_below += i < c->desc_end;
            continue;
        }
        MUST(desc->state <= SHML_DESC_HOLE, "a descriptor's state is unknown");
        MUST(i < c->desc_end, "a used descriptor lies above desc_end");
        MUST(in_bounds(c, desc), "a record lies outside of the ring");
        MUST(desc->offset + desc->num_bytes <= c->backed_end, "a record lies in memory that is not backed");
        if (desc->offset + desc->num_bytes > head)
            head = desc->offset + desc->num_bytes;
        ready += desc->state == SHML_DESC_READY;
        errors += desc->state == SHML_DESC_ERROR;
        reserved += desc->state == SHML_DESC_RESERVED;
        holes += desc->state == SHML_DESC_HOLE;
        if (!is_live(desc->state))
            continue;
        used += desc->num_bytes;
        int status;
        MUST(shml_find(seg, desc->id, &status) == desc, "a record is not found by its id");
        MUST(desc->state != SHML_DESC_RESERVED || is_client(c, desc->owner), "a reservation has no living owner");
    }
    MUST(head <= c->head, "the head is below a record");
    MUST(used == c->used_bytes, "used_bytes is wrong");
    MUST(ready == c->num_ready && errors == c->num_errors && reserved == c->num_reserved,
         "a count of records is wrong");
    for (uint32_t b = 0; b < c->num_buckets; b++)
        for (uint32_t next = shml_buckets(c)[b]; is_link(c, next) && linked <= c->num_descs;
             next = descs[next - 1].next)
            linked++;
    MUST(linked == (uint64_t)ready + errors + reserved, "a chain has more or fewer records than there are");
    for (uint32_t next = c->hole_list; is_link(c, next) && listed <= c->num_descs; next = descs[next - 1].next)
        listed++;
    MUST(listed == holes, "the list of holes is wrong");
    listed = 0;
    for (uint32_t next = c->free_list; is_link(c, next) && listed <= c->num_descs; next = descs[next - 1].next)
        listed++;
    MUST(listed == free_below, "the list of free descriptors is wrong");
    uint32_t counts[4] = {0};
    for (uint32_t i = 0; i < c->num_chunks; i++) {
        uint32_t word = shml_chunks(c)[i].word;
        MUST((word & 0xff) <= SHML_CHUNK_BROKEN, "a chunk's state is unknown");
        counts[word & 0xff]++;
        MUST((word & 0xff) != SHML_CHUNK_CLAIMED || is_client(c, word >> 16), "a chunk is claimed by nobody");
        MUST((word & 0xff) != SHML_CHUNK_TODO || i >= c->chunk_cursor, "a chunk below the cursor is to do");
    }
    MUST(counts[0] == c->chunks_todo && counts[1] == c->chunks_claimed && counts[2] == c->chunks_done &&
             counts[3] == c->chunks_broken,
         "a count of chunks is wrong");
    return scratch != NULL ? check_overlap(c, scratch, what) : SHML_OK;
}

int shml_check(shml_seg_t *seg, void *scratch, const char **what)
{
    *what = "";
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    status = check_locked(seg, scratch, what);
    shml_unlock(seg);
    return status;
}
