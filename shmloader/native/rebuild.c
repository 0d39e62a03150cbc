/* rebuild.c - all derived state from the truth, after somebody died with the mutex in the middle of a change.
 *
 * Nothing here depends on derived state, so that a kill in here leaves what the next one repairs from the start. Truth
 * that makes no sense poisons the segment: a state that is unknown, a block outside of its region, blocks that overlap.
 */
#include <string.h>

#include "failpoint.h"
#include "layout.h"

/* In one region, which it lies in as a whole. */
static int in_bounds(const shml_control_t *c, const shml_desc_t *desc)
{
    if (desc->offset % SHML_ALIGN != 0 || desc->num_bytes % SHML_ALIGN != 0 || desc->num_bytes == 0)
        return 0;
    for (uint32_t i = 0; i < SHML_NUM_REGIONS; i++) {
        const shml_region_t *r = &c->regions[i];
        if (desc->offset >= r->begin && desc->offset < r->end)
            return desc->num_bytes <= r->end - desc->offset;
    }
    return 0;
}

#ifndef SHML_BREAK_REBUILD /* defined by a negative control of the tests: the crash suite must then fail */

static uint32_t merge(shml_desc_t *descs, uint32_t a, uint32_t b)
{
    uint32_t first = 0, *at = &first;
    while (a != 0 && b != 0) {
        uint32_t *lower = descs[a - 1].offset <= descs[b - 1].offset ? &a : &b;
        *at = *lower;
        at = &descs[*lower - 1].after;
        *lower = *at;
    }
    *at = a != 0 ? a : b;
    return first;
}

/* Merge sort of the list that begins with `first`, by offset: bins[i] is a sorted list of 2^i blocks. */
static uint32_t sort(shml_desc_t *descs, uint32_t first)
{
    uint32_t bins[32] = {0};
    while (first != 0) {
        uint32_t one = first, i = 0;
        first = descs[one - 1].after;
        descs[one - 1].after = 0;
        for (; i < 31 && bins[i] != 0; i++) {
            one = merge(descs, bins[i], one);
            bins[i] = 0;
        }
        bins[i] = merge(descs, bins[i], one);
    }
    uint32_t sorted = 0;
    for (uint32_t i = 0; i < 32; i++)
        sorted = merge(descs, bins[i], sorted);
    return sorted;
}

/* Sort the blocks that were put into its list, and find its end. */
static int rebuild_list(shml_control_t *c, shml_region_t *region)
{
    const shml_desc_t *descs = shml_descs(c);
    region->first = sort(shml_descs(c), region->first);
    SHML_FP("rebuild.list.sorted");
    region->head = region->begin;
    for (uint32_t at = region->first; at != 0; at = descs[at - 1].after) {
        if (descs[at - 1].offset < region->head)
            return SHML_E_CORRUPT;
        region->head = descs[at - 1].offset + descs[at - 1].num_bytes;
        region->last = at;
    }
    SHML_FP("rebuild.list.end");
    return SHML_OK;
}

static void zero(shml_control_t *c)
{
    memset(shml_buckets(c), 0, (size_t)c->num_buckets * sizeof(uint32_t));
    SHML_FP("rebuild.zero.buckets");
    for (uint32_t i = 0; i < SHML_NUM_REGIONS; i++) {
        shml_region_t *r = &c->regions[i];
        r->head = r->begin;
        r->used_bytes = 0;
        r->num_blocks = r->first = r->cursor = r->last = 0;
    }
    SHML_FP("rebuild.zero.regions");
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++)
        shml_clients(c)[slot].num_working = 0;
    c->num_ready = c->num_errors = c->num_reserved = c->num_claimed = c->num_suspect = c->num_aside = 0;
    c->free_list = c->hole_list = 0;
    c->promised_rows = c->num_resident = c->num_stored = c->num_transit = 0;
    for (uint32_t i = 0; i < c->num_chunks; i++) {
        shml_chunk_t *chunk = &shml_chunks(c)[i];
        chunk->num_final = chunk->num_stored = 0;
        chunk->resident_bytes = 0;
        c->promised_rows += shml_chunk_promise(chunk);
    }
    SHML_FP("rebuild.zero.counts");
}

static int rebuild_desc(shml_control_t *c, uint32_t index)
{
    shml_desc_t *desc = &shml_descs(c)[index];
    uint32_t state = desc->state;
    if (state == SHML_DESC_FREE) {
        desc->next = c->free_list;
        c->free_list = index + 1;
        return SHML_OK;
    }
    int has_block = shml_has_block(state), is_owned = state == SHML_DESC_CLAIMED || state == SHML_DESC_RESERVED;
    if (state > SHML_DESC_ASIDE || (has_block && !in_bounds(c, desc)) || (is_owned && desc->owner >= SHML_MAX_CLIENTS))
        return SHML_E_CORRUPT;
    if (!has_block)
        desc->num_bytes = 0; /* left from before, or of a reservation that did not come to its state */
    if (shml_is_there(state))
        desc->deaths = 0;
    shml_desc_count(c, desc, 1);
    SHML_FP("rebuild.desc.counted");
    if (has_block && !shml_is_resident(c, desc->offset)) {
        shml_region_t *r = &c->regions[desc->offset < c->regions[SHML_TRANSIT].end ? SHML_TRANSIT : SHML_RAW_REGION];
        desc->after = r->first;
        r->first = index + 1;
    } else if (has_block) {
        shml_region_t *r = &c->regions[SHML_RESIDENT];
        if (desc->offset + desc->num_bytes > r->head)
            r->head = desc->offset + desc->num_bytes;
        if (state == SHML_DESC_HOLE) {
            desc->next = c->hole_list;
            c->hole_list = index + 1;
        }
    }
    if (state != SHML_DESC_HOLE)
        shml_link(c, index);
    return SHML_OK;
}

/* After the rows: those that are complete are done, which the dead one had no time to say. */
static int rebuild_chunks(shml_control_t *c)
{
    uint32_t counts[4] = {0};
    for (uint32_t i = 0; i < c->num_chunks; i++) {
        shml_chunk_t *chunk = &shml_chunks(c)[i];
        uint32_t word = chunk->word, state = shml_word_state(word);
        if (state > SHML_CHUNK_BROKEN)
            return SHML_E_CORRUPT;
        if (state <= SHML_CHUNK_CLAIMED && chunk->num_final == chunk->num_rows) {
            state = SHML_CHUNK_DONE;
            c->promised_rows -= shml_chunk_promise(chunk);
            atomic_store_explicit(&chunk->word, (word & 0xff10u) | state, memory_order_release);
            SHML_FP("rebuild.chunks.done");
            c->promised_rows += shml_chunk_promise(chunk);
        }
        counts[state]++;
    }
    SHML_FP("rebuild.chunks.counted");
    c->chunks_todo = counts[SHML_CHUNK_TODO];
    c->chunks_claimed = counts[SHML_CHUNK_CLAIMED];
    c->chunks_done = counts[SHML_CHUNK_DONE];
    c->chunks_broken = counts[SHML_CHUNK_BROKEN];
    return SHML_OK;
}

static void rebuild_orders(shml_control_t *c)
{
    uint32_t num_orders = 0;
    for (uint32_t i = 0; i < SHML_MAX_ORDERS; i++) {
        shml_order_t *order = &shml_order_table(c)[i];
        if (order->state != SHML_ORDER_LIVE)
            continue;
        if (order->num_readers > 0 && !shml_has_marks(c, i)) { /* the last of them had left */
            atomic_store_explicit(&order->state, SHML_ORDER_FREE, memory_order_release);
            SHML_FP("rebuild.orders.ended");
            continue;
        }
        num_orders++;
        order->low_water = shml_low_water(c, i);
        SHML_FP("rebuild.orders.low_water");
    }
    atomic_store_explicit(&c->num_orders, num_orders, memory_order_relaxed);
}

static int rebuild_all(shml_control_t *c)
{
    if (c->desc_end > c->num_descs)
        return SHML_E_CORRUPT;
    zero(c);
    int status = SHML_OK;
    for (uint32_t i = c->desc_end; i-- > 0 && status == SHML_OK;) /* from the top: the lists begin with the lowest */
        status = rebuild_desc(c, i);
    for (uint32_t i = SHML_TRANSIT; i < SHML_NUM_REGIONS && status == SHML_OK; i++)
        status = rebuild_list(c, &c->regions[i]);
    if (status == SHML_OK)
        status = rebuild_chunks(c);
    if (status == SHML_OK)
        rebuild_orders(c);
    return status;
}
#else
static int rebuild_all(shml_control_t *c)
{
    (void)c, (void)in_bounds;
    return SHML_OK;
}
#endif

int shml_rebuild(shml_seg_t *seg)
{
    shml_control_t *c = seg->control;
    (void)shml_begin_change(c);
    SHML_FP("rebuild.begin");
    if (rebuild_all(c) != SHML_OK)
        return SHML_POISON(seg);
    c->num_rebuilds++;
    SHML_FP("rebuild.end");
    shml_end_change(c, 0); /* nothing of a dead one's is open any more */
    return SHML_OK;
}
