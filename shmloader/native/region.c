/* region.c - the blocks of transit and raw: finding room, evicting what is in the way.
 *
 * The blocks of a region are in a list by offset, free space is the gaps between them. A search goes along the list and
 * extends a run over gaps and evictable blocks until it is long enough; behind a block that must stay the run begins
 * anew. Only what the found run covers is evicted. The search goes on where the last one ended (`cursor`), but from the
 * region's beginning whenever the work word has moved, that is, when something may be evictable again: so it is
 * first-fit from the lowest offset. That re-uses the space of what was just consumed and lets the rest keep its old
 * records, which hits best when each epoch is another random order.
 *
 * What comes first: in transit the free space at the top, growing up to the region's end, since old records there may
 * be read again; then evicting. In raw evicting, since a chunk is consumed once; then growing.
 *
 * Where only so many samples may be in transit (most_transit) and they are there, a lap before that takes the first one
 * out that may go (thin), and the search for room begins where it lay. So what is small leaves no more behind than what is
 * large, and the memory that is there is used again before more is asked for.
 *
 * A critical section looks at SEARCH_STEP blocks or little more; a longer search goes on in the next one, at a block
 * that it finds again by index and generation.
 *
 * A kill ...                                leaves ...                                   repaired by
 *   while evicting                          some of the run's blocks FREE, `dirty`       rebuild
 *   after evicting, before RESERVED         a gap, `dirty`                               rebuild
 *   after a sample was taken out            one fewer than there may be                  nothing to repair
 *   while inserting, after RESERVED         RESERVED, not in the list                    rebuild, then reap: a HOLE
 *   in shml_region_clear, _spare            some of the blocks FREE, `dirty`             rebuild
 */
#include "failpoint.h"
#include "layout.h"

/* Some 50 us with two cache misses a block (derived, not measured). */
#define SEARCH_STEP 1024

int shml_is_pinned(shml_control_t *c, uint32_t index)
{
#ifdef SHML_BREAK_PINS /* defined by a negative control of the tests: the suites must then fail */
    (void)c, (void)index;
    return 0;
#else
    const _Atomic uint64_t *mask = shml_pins(c, index);
    uint64_t any = 0;
    for (uint32_t i = 0; i < SHML_PIN_WORDS; i++)
        any |= atomic_load_explicit(&mask[i], memory_order_acquire); /* SYNC(unpin): pairs with the release there */
    return any != 0;
#endif
}

/* In an open set chunks go, and nobody asks any more why they broke. */
static int is_error_spent(shml_control_t *c, uint64_t id)
{
    return id - SHML_CHUNK_ERROR < c->num_chunks && shml_open_is_spent(c, (uint32_t)(id - SHML_CHUNK_ERROR));
}

int shml_is_evictable(shml_control_t *c, uint32_t index, int urgent)
{
    const shml_desc_t *desc = &shml_descs(c)[index];
    if (desc->state == SHML_DESC_HOLE)
        return 1;
    if (!shml_is_there(desc->state))
        return 0;
    if (desc->id >= SHML_CHUNK_ERROR && !(shml_is_open(c) && is_error_spent(c, desc->id)))
        return 0;
    if (!shml_is_sample(desc->id) && desc->id < SHML_CHUNK_ERROR) {
        uint64_t chunk = desc->id - SHML_RAW;
        uint32_t word = chunk < c->num_chunks ? shml_chunks(c)[chunk].word : 0;
        if ((word & SHML_CHUNK_STAYS) && shml_word_state(word) <= SHML_CHUNK_CLAIMED)
            return 0;
    }
    return !shml_is_pinned(c, index) && !shml_is_wanted(c, desc) && (urgent || !shml_is_ordered(c, desc));
}

/* Can the search still go on behind this block, or was it evicted meanwhile? */
static int is_still_there(shml_control_t *c, const shml_region_t *r, const shml_search_t *search)
{
    const shml_desc_t *desc = &shml_descs(c)[search->before - 1];
    return desc->gen == search->before_gen && shml_has_block(desc->state) && desc->offset >= r->begin &&
           desc->offset < r->end;
}

static void stop_at(shml_control_t *c, shml_search_t *search, uint32_t before)
{
    search->before = before;
    search->before_gen = before != 0 ? shml_descs(c)[before - 1].gen : 0;
}

static int begin_lap(shml_seg_t *seg, shml_region_t *r, shml_search_t *search)
{
    shml_control_t *c = seg->control;
    uint32_t work = atomic_load_explicit(&c->work, memory_order_relaxed);
    if (work != r->searched) {
        r->searched = work;
        r->cursor = 0;
    }
    if (r->num_blocks > c->num_descs || r->cursor > c->num_descs)
        return SHML_POISON(seg);
    search->is_begun = 1;
    stop_at(c, search, r->cursor);
    /* The end of the list counts as a block, and from the middle the run across `before` is looked at twice. */
    search->left = (int64_t)r->num_blocks + 1 + (r->cursor != 0);
    return SHML_OK;
}

/* Look for a run below `limit`. OK: *spot is set. FULL: a lap without any. ON: not yet. */
static int walk(shml_seg_t *seg, shml_region_t *r, uint64_t num_bytes, uint64_t limit, int urgent,
                shml_search_t *search, shml_spot_t *spot)
{
    shml_control_t *c = seg->control;
    const shml_desc_t *descs = shml_descs(c);
    int has_desc = search->has_own || shml_has_desc(c);
    if (!search->is_begun && begin_lap(seg, r, search) != SHML_OK)
        return SHML_E_POISONED;
    if (search->before != 0 && !is_still_there(c, r, search))
        search->before = 0;
    uint32_t before = search->before;
    int64_t stop = search->left - SEARCH_STEP;
    for (;;) {
        if (before > c->num_descs)
            return SHML_POISON(seg);
        uint64_t begin = before != 0 ? descs[before - 1].offset + descs[before - 1].num_bytes : r->begin;
        uint32_t at = before != 0 ? descs[before - 1].after : r->first, first = at;
        for (; at != 0; at = descs[at - 1].after) {
            if (at > c->num_descs || search->left < -(int64_t)c->num_descs)
                return SHML_POISON(seg);
            if (descs[at - 1].offset >= begin + num_bytes || !shml_is_evictable(c, at - 1, urgent))
                break;
            search->left--;
        }
        uint64_t end = at != 0 && descs[at - 1].offset < limit ? descs[at - 1].offset : limit;
        /* Without a free descriptor some block must go for its own. */
        if (begin < end && num_bytes <= end - begin && (has_desc || at != first)) {
            *spot = (shml_spot_t){.offset = begin, .before = before};
            return SHML_OK;
        }
        search->left--;
        before = at;
        if (search->left <= 0)
            return SHML_E_FULL;
        if (at != 0 && search->left <= stop) {
            stop_at(c, search, at);
            return SHML_SEARCH_ON;
        }
    }
}

/* In two laps: raw evicts before it grows; where a sample was taken out of transit for this one, more of what an order
 * needs goes only if all that is free and all that nobody needs does not do. */
static int walk_twice(shml_seg_t *seg, uint32_t region, uint64_t num_bytes, int urgent, shml_search_t *search,
                      shml_spot_t *spot)
{
    shml_region_t *r = &seg->control->regions[region];
    int status = SHML_E_FULL, is_raw = region == SHML_RAW_REGION;
    for (; search->num_laps < 2 && status == SHML_E_FULL; search->num_laps += status == SHML_E_FULL) {
        uint64_t limit = is_raw && search->num_laps == 0 ? r->backed_end : shml_limit(r);
        status = walk(seg, r, num_bytes, limit, urgent && (is_raw || search->num_laps > 0), search, spot);
        search->is_begun = status == SHML_SEARCH_ON;
    }
    return status;
}

int shml_region_search(shml_seg_t *seg, uint32_t region, uint64_t num_bytes, int urgent, shml_search_t *search,
                       shml_spot_t *spot)
{
    shml_control_t *c = seg->control;
    shml_region_t *r = &c->regions[region];
    uint64_t limit = shml_limit(r), grown = region == SHML_TRANSIT ? limit : r->begin + c->raw_budget_bytes;
    int status = SHML_E_FULL, has_desc = search->has_own || shml_has_desc(c);
    int is_thinned = region == SHML_TRANSIT && search->is_thinned; /* what was taken out has left room */
    grown = grown < limit ? grown : limit;
    /* Without a descriptor something must give way: HOLEs, if many were left. */
    if (has_desc && !is_thinned && r->head <= grown && num_bytes <= grown - r->head) {
        *spot = (shml_spot_t){.offset = r->head, .before = r->last};
        status = SHML_OK;
    } else if (region == SHML_TRANSIT && !is_thinned) {
        status = walk(seg, r, num_bytes, limit, urgent, search, spot);
    } else {
        status = walk_twice(seg, region, num_bytes, urgent, search, spot);
    }
    spot->region = region;
    if (status == SHML_OK && spot->before > c->num_descs)
        return SHML_POISON(seg);
    if (status == SHML_OK && spot->offset + num_bytes > r->backed_end)
        return SHML_E_EXTEND;
    return status;
}

/* Take the block `index`, already out of the list, away. */
static int evict(shml_seg_t *seg, uint32_t index)
{
    shml_control_t *c = seg->control;
    shml_desc_t *desc = &shml_descs(c)[index];
    if (desc->state != SHML_DESC_HOLE) {
        if (shml_unlink(c, index) != SHML_OK)
            return SHML_POISON(seg);
        c->num_evicted += (uint64_t)shml_is_sample(desc->id);
    }
    SHML_FP("region.evict.out");
    shml_desc_set(c, desc, SHML_DESC_FREE);
    shml_desc_give(c, index);
    SHML_FP("region.evict.given");
    return SHML_OK;
}

static uint64_t end_of(shml_control_t *c, const shml_region_t *r, uint32_t last)
{
    return last != 0 ? shml_descs(c)[last - 1].offset + shml_descs(c)[last - 1].num_bytes : r->begin;
}

int shml_region_evict(shml_seg_t *seg, const shml_spot_t *spot, uint64_t num_bytes)
{
    shml_control_t *c = seg->control;
    shml_region_t *r = &c->regions[spot->region];
    shml_desc_t *descs = shml_descs(c);
    uint32_t *link = spot->before != 0 ? &descs[spot->before - 1].after : &r->first;
    for (uint32_t at; (at = *link) != 0;) {
        if (at > c->num_descs)
            return SHML_POISON(seg);
        if (descs[at - 1].offset >= spot->offset + num_bytes)
            break;
        *link = descs[at - 1].after;
        SHML_FP("region.evict.unlisted");
        if (*link == 0) {
            r->last = spot->before;
            r->head = end_of(c, r, spot->before);
        }
        if (r->cursor == at)
            r->cursor = spot->before;
        SHML_FP("region.evict.ends");
        int status = evict(seg, at - 1);
        if (status != SHML_OK)
            return status;
    }
    return SHML_OK;
}

/* Take the sample behind block `before` (index + 1) out of transit; the next search begins where it lay. */
static int take_out(shml_seg_t *seg, uint32_t at, uint32_t before)
{
    shml_control_t *c = seg->control;
    const shml_desc_t *desc = &shml_descs(c)[at - 1];
    shml_spot_t spot = {.offset = desc->offset, .region = SHML_TRANSIT, .before = before};
    uint32_t was = shml_begin_change(c);
    SHML_FP("region.thin.dirty");
    int status = shml_region_evict(seg, &spot, desc->num_bytes);
    if (status != SHML_OK)
        return status;
    c->regions[SHML_TRANSIT].cursor = before;
    SHML_FP("region.thin.out");
    shml_end_change(c, was);
    return SHML_OK;
}

int shml_region_thin(shml_seg_t *seg, int urgent, shml_search_t *search)
{
    shml_control_t *c = seg->control;
    shml_region_t *r = &c->regions[SHML_TRANSIT];
    const shml_desc_t *descs = shml_descs(c);
    int is_full = shml_is_transit_full(c);
    if (search->is_thinning != is_full) /* another client had what was taken out for this one, or took one out itself */
        search->is_begun = 0;
    search->is_thinning = is_full;
    if (!is_full)
        return SHML_OK;
    if (!search->is_begun && begin_lap(seg, r, search) != SHML_OK)
        return SHML_E_POISONED;
    if (search->before != 0 && !is_still_there(c, r, search))
        search->before = 0;
    uint32_t before = search->before;
    for (int64_t stop = search->left - SEARCH_STEP; search->left > 0;) {
        uint32_t at = before != 0 ? descs[before - 1].after : r->first;
        if (at > c->num_descs)
            return SHML_POISON(seg);
        search->left--;
        if (at != 0 && descs[at - 1].state != SHML_DESC_HOLE && shml_is_sample(descs[at - 1].id) &&
            shml_is_evictable(c, at - 1, urgent)) {
            search->is_begun = search->is_thinning = search->num_laps = 0;
            search->is_thinned = 1;
            return take_out(seg, at, before);
        }
        before = at;
        if (at != 0 && search->left <= stop) {
            stop_at(c, search, at);
            return SHML_SEARCH_ON;
        }
    }
    return SHML_E_FULL;
}

/* Evict up to `max` blocks of transit, from the cursor on, behind which the oldest are. */
static int evict_some(shml_seg_t *seg, uint32_t max, int urgent)
{
    shml_control_t *c = seg->control;
    shml_region_t *r = &c->regions[SHML_TRANSIT];
    const shml_desc_t *descs = shml_descs(c);
    uint32_t steps = 0;
    shml_search_t search = {0};
    if (r->cursor > c->num_descs)
        return SHML_POISON(seg);
    stop_at(c, &search, r->cursor);
    uint32_t before = search.before != 0 && is_still_there(c, r, &search) ? search.before : 0;
    for (int lap = 0; lap < 2; lap++, before = 0) {
        while (max > 0) {
            uint32_t at = before != 0 ? descs[before - 1].after : r->first;
            if (at == 0)
                break;
            if (at > c->num_descs || steps++ > 2 * c->num_descs)
                return SHML_POISON(seg);
            if (!shml_is_evictable(c, at - 1, urgent)) {
                before = at;
                continue;
            }
            shml_spot_t spot = {.offset = descs[at - 1].offset, .region = SHML_TRANSIT, .before = before};
            int status = shml_region_evict(seg, &spot, descs[at - 1].num_bytes);
            if (status != SHML_OK)
                return status;
            max--;
        }
    }
    return SHML_OK;
}

/* So many of those that nobody needs are evicted at once, since looking for one may pass all blocks (guessed). */
#define SPARE_BLOCKS 64

int shml_region_spare(shml_seg_t *seg, int urgent)
{
    shml_control_t *c = seg->control;
    uint32_t was = shml_begin_change(c);
    SHML_FP("region.spare.dirty");
    int status = evict_some(seg, SPARE_BLOCKS, 0);
    if (status == SHML_OK && urgent && !shml_has_desc(c))
        status = evict_some(seg, 1, 1);
    if (status == SHML_E_POISONED)
        return status;
    shml_end_change(c, was);
    return shml_has_desc(c);
}

void shml_region_insert(shml_control_t *c, const shml_spot_t *spot, uint32_t index)
{
    shml_region_t *r = &c->regions[spot->region];
    shml_desc_t *descs = shml_descs(c), *desc = &descs[index];
    uint32_t *link = spot->before != 0 ? &descs[spot->before - 1].after : &r->first;
    desc->after = *link;
    SHML_FP("region.insert.after");
    *link = index + 1;
    SHML_FP("region.insert.linked");
    if (desc->after == 0) {
        r->last = index + 1;
        r->head = desc->offset + desc->num_bytes;
    }
    r->cursor = index + 1;
    SHML_FP("region.insert.ends");
}

/* This is no reason to search from the beginning again: else the next record would take the place of this one. */
void shml_region_tell(shml_seg_t *seg)
{
    shml_control_t *c = seg->control;
    uint32_t work = atomic_load_explicit(&c->work, memory_order_relaxed);
    shml_work_tell(seg);
    for (uint32_t i = SHML_TRANSIT; i < SHML_NUM_REGIONS; i++)
        if (c->regions[i].searched == work)
            c->regions[i].searched = work + 1;
}

int shml_region_clear(shml_seg_t *seg, uint32_t region)
{
    shml_control_t *c = seg->control;
    shml_region_t *r = &c->regions[region];
    const shml_desc_t *descs = shml_descs(c);
    uint32_t steps = 0;
    for (uint32_t at = r->first; at != 0; at = descs[at - 1].after)
        if (at > c->num_descs || ++steps > c->num_descs)
            return SHML_POISON(seg);
        else if (!shml_is_evictable(c, at - 1, 1))
            return 0;
    uint32_t was = shml_begin_change(c);
    shml_spot_t all = {.offset = r->begin, .region = region};
    int status = shml_region_evict(seg, &all, r->end - r->begin);
    shml_end_change(c, was);
    return status == SHML_OK ? 1 : status;
}
