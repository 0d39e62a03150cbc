/* table.c - the index id -> descriptor, and what a descriptor's state counts for.
 *
 * Buckets are `id mod num_buckets` with chains through the descriptors: the dense ids of a map-style dataset never
 * collide, and an insertion is one store. Every walk is bounded by the number of descriptors, so that a damaged
 * chain is an error and not a hang.
 *
 * Every change of a descriptor's state goes through shml_desc_set, which takes out what the old state counted for,
 * stores the new one (the truth) and counts that. A kill in between leaves wrong counts, `dirty`: rebuild.c counts all
 * again with the same function.
 */
#include "failpoint.h"
#include "layout.h"

static uint32_t *bucket_of(shml_control_t *c, uint64_t id) { return &shml_buckets(c)[id % c->num_buckets]; }

shml_desc_t *shml_find(shml_seg_t *seg, uint64_t id, int *status)
{
    shml_control_t *c = seg->control;
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

void shml_link(shml_control_t *c, uint32_t index)
{
    shml_desc_t *desc = &shml_descs(c)[index];
    uint32_t *bucket = bucket_of(c, desc->id);
    desc->next = *bucket;
    SHML_FP("table.link.next");
    *bucket = index + 1;
}

int shml_unlink(shml_control_t *c, uint32_t index)
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

int64_t shml_pop(shml_control_t *c, uint32_t *list)
{
    if (*list == 0 || *list > c->num_descs)
        return -1;
    uint32_t index = *list - 1;
    *list = shml_descs(c)[index].next;
    return index;
}

int shml_has_desc(const shml_control_t *c) { return c->free_list != 0 || c->desc_end < c->num_descs; }

int64_t shml_desc_take(shml_seg_t *seg)
{
    shml_control_t *c = seg->control;
    if (c->free_list == 0)
        return c->desc_end < c->num_descs ? (int64_t)c->desc_end++ : SHML_E_FULL;
    int64_t index = shml_pop(c, &c->free_list);
    SHML_FP("table.take.popped");
    return index >= 0 && shml_descs(c)[index].state == SHML_DESC_FREE ? index : SHML_POISON(seg);
}

void shml_desc_give(shml_control_t *c, uint32_t index)
{
    shml_descs(c)[index].next = c->free_list;
    SHML_FP("table.give.next");
    c->free_list = index + 1;
}

static uint32_t region_of(const shml_control_t *c, uint64_t offset)
{
    return offset < c->regions[SHML_RESIDENT].end  ? SHML_RESIDENT
           : offset < c->regions[SHML_TRANSIT].end ? SHML_TRANSIT
                                                   : SHML_RAW_REGION;
}

/* A row that is final, in or out of its chunk. */
static void count_final(shml_control_t *c, const shml_desc_t *desc, int is_stored, int sign)
{
    int32_t index = shml_chunk_of(c, desc->id);
    if (index < 0)
        return;
    shml_chunk_t *chunk = &shml_chunks(c)[index];
    c->promised_rows -= shml_chunk_promise(chunk);
    chunk->num_final += (uint32_t)sign;
    if (is_stored) {
        c->num_stored += (uint64_t)(int64_t)sign;
        chunk->num_stored += (uint32_t)sign;
        chunk->resident_bytes += (uint64_t)(int64_t)sign * desc->num_bytes;
    }
    c->promised_rows += shml_chunk_promise(chunk);
}

static void count_block(shml_control_t *c, const shml_desc_t *desc, int sign)
{
    shml_region_t *region = &c->regions[region_of(c, desc->offset)];
    region->num_blocks += (uint32_t)sign;
    if (desc->state != SHML_DESC_HOLE)
        region->used_bytes += (uint64_t)(int64_t)sign * desc->num_bytes;
}

void shml_desc_count(shml_control_t *c, const shml_desc_t *desc, int sign)
{
    uint32_t n = (uint32_t)sign, state = desc->state, is_sample = (uint32_t)shml_is_sample(desc->id);
    if (shml_has_block(state))
        count_block(c, desc, sign);
    if ((state == SHML_DESC_CLAIMED || state == SHML_DESC_RESERVED) && desc->owner < SHML_MAX_CLIENTS)
        shml_clients(c)[desc->owner].num_working += n;
    if (!is_sample)
        return;
    if (shml_has_block(state) && state != SHML_DESC_HOLE)
        *(shml_is_resident(c, desc->offset) ? &c->num_resident : &c->num_transit) += (uint64_t)(int64_t)sign;
    switch (state) {
    case SHML_DESC_RESERVED: c->num_reserved += n; break;
    case SHML_DESC_READY: c->num_ready += n; break;
    case SHML_DESC_ERROR: c->num_errors += n; break;
    case SHML_DESC_CLAIMED: c->num_claimed += n; break;
    case SHML_DESC_SUSPECT: c->num_suspect += n; break;
    case SHML_DESC_ASIDE: c->num_aside += n; break;
    default: break;
    }
    if (state == SHML_DESC_ASIDE || (shml_is_there(state) && shml_is_resident(c, desc->offset)))
        count_final(c, desc, state != SHML_DESC_ASIDE, sign);
}

void shml_desc_set(shml_control_t *c, shml_desc_t *desc, uint32_t state)
{
    shml_desc_count(c, desc, -1);
    SHML_FP("table.set.counted_out");
    /* SYNC(publish): the mutex orders a record's bytes before this for every reader. */
    atomic_store_explicit(&desc->state, state, memory_order_release);
    SHML_FP("table.set.state");
    shml_desc_count(c, desc, 1);
    SHML_FP("table.set.counted_in");
}

void shml_desc_stamp(shml_desc_t *desc, const shml_stamp_t *stamp)
{
    /* Without an order while the rest of the stamp is stored: a kill leaves a record that nobody is known to need. */
    desc->order = 0;
    SHML_FP("table.stamp.none");
    if (stamp == NULL || stamp->order >= SHML_MAX_ORDERS)
        return;
    desc->until = stamp->until;
    desc->order_gen = (uint16_t)stamp->gen;
    atomic_signal_fence(memory_order_seq_cst);
    SHML_FP("table.stamp.filled");
    desc->order = (uint16_t)(stamp->order + 1);
}
