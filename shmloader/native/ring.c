/* ring.c - writing records: reserve, commit, abort; the resident region.
 *
 * In resident, records are laid one behind the other and none is ever taken away, so a reader needs no pin. A writer
 * that gives up or dies leaves a HOLE, which the next record of just that size takes; HOLEs that end where the free
 * space begins join it. So resident has no gaps. The blocks of transit and raw are region.c's.
 *
 * A kill ...                                   leaves ...                          repaired by
 *   in reserve, before the claim is dropped    CLAIMED, `dirty`                    rebuild, then reap: SUSPECT
 *   in reserve into a HOLE, the claim dropped  the HOLE; the row as if it were     rebuild
 *                                              nowhere, its deaths forgotten
 *   in reserve, before `state`                 CLAIMED or a FREE descriptor,       rebuild, reap
 *                                              what was evicted gone, perhaps `dirty`
 *   in reserve, after `state`                  RESERVED, perhaps in no list        rebuild, then reap: a HOLE
 *   while clearing STAYS                       the chunk STAYS or does not         the next row that finds no room
 *   while writing the bytes                    RESERVED                            reap: a HOLE; decoded again
 *   in commit, before `state`                  RESERVED, perhaps with a stamp      reap
 *   in commit, after `state`                   READY, counts or the chunk's        rebuild
 *                                              state perhaps wrong, `dirty`
 *   in commit, before the wake                 a reader sleeps on                  its tick (100 ms)
 *   while making a HOLE                        RESERVED, or a HOLE perhaps not     rebuild; the dead one's: reap
 *                                              in the list; its row's death is
 *                                              perhaps not counted
 *   while absorbing HOLEs at the top           some of them FREE, `dirty`          rebuild
 */
#include "failpoint.h"
#include "layout.h"

/* ------------------------------------------------ resident -------------------------------------------- */

/* HOLEs that now end where the free space begins join it. */
static void absorb_holes(shml_control_t *c)
{
    shml_desc_t *descs = shml_descs(c);
    shml_region_t *r = &c->regions[SHML_RESIDENT];
    uint32_t *at = &c->hole_list;
    for (uint32_t steps = 0; *at != 0 && *at <= c->num_descs && steps <= c->num_descs; steps++) {
        uint32_t index = *at - 1;
        if (descs[index].offset + descs[index].num_bytes != r->head) {
            at = &descs[index].next;
            continue;
        }
        *at = descs[index].next;
        SHML_FP("ring.absorb.out");
        shml_desc_set(c, &descs[index], SHML_DESC_FREE);
        r->head = descs[index].offset;
        SHML_FP("ring.absorb.head");
        shml_desc_give(c, index);
        at = &c->hole_list; /* one that was passed may be at the top now */
    }
}

/* Leave block `index` without a record. */
int shml_desc_hole(shml_seg_t *seg, uint32_t index)
{
    shml_control_t *c = seg->control;
    shml_desc_t *desc = &shml_descs(c)[index];
    shml_region_t *r = &c->regions[SHML_RESIDENT];
    int is_resident = shml_is_resident(c, desc->offset);
    int at_top = is_resident && desc->offset + desc->num_bytes == r->head;
    uint32_t was = shml_begin_change(c);
    SHML_FP("ring.hole.dirty");
    if (shml_unlink(c, index) != SHML_OK)
        return SHML_POISON(seg);
    shml_desc_set(c, desc, at_top ? SHML_DESC_FREE : SHML_DESC_HOLE);
    if (at_top) {
        r->head = desc->offset;
        SHML_FP("ring.hole.head");
        shml_desc_give(c, index);
        absorb_holes(c);
    } else if (is_resident) {
        desc->next = c->hole_list;
        SHML_FP("ring.hole.next");
        c->hole_list = index + 1;
    }
    SHML_FP("ring.hole.listed");
    shml_end_change(c, was);
    shml_work_tell(seg); /* it may be evicted */
    return SHML_OK;
}

/* Where the list of HOLEs says that there is one of just this size (the record's old place, when it is made again). */
static uint32_t *find_hole(shml_control_t *c, uint64_t num_bytes)
{
    shml_desc_t *descs = shml_descs(c);
    uint32_t *at = &c->hole_list;
    for (uint32_t steps = 0; *at != 0 && *at <= c->num_descs && steps <= c->num_descs; steps++) {
        if (descs[*at - 1].num_bytes == num_bytes)
            return at;
        at = &descs[*at - 1].next;
    }
    return NULL;
}

static int resident_spot(shml_control_t *c, uint64_t id, uint64_t num_bytes, shml_spot_t *spot)
{
    shml_region_t *r = &c->regions[SHML_RESIDENT];
    if (shml_is_sample(id) && shml_is_resident_full(c))
        return SHML_E_FULL;
    uint32_t *hole = find_hole(c, num_bytes);
    *spot = (shml_spot_t){.region = SHML_RESIDENT, .offset = r->head};
    if (hole != NULL) {
        spot->hole = 1;
        spot->hole_index = *hole - 1;
        spot->offset = shml_descs(c)[spot->hole_index].offset;
        return SHML_OK;
    }
    uint64_t limit = shml_limit(r);
    if (r->head > limit || num_bytes > limit - r->head) {
        r->searched |= num_bytes <= r->end - r->begin; /* so that no more of it is promised */
        return SHML_E_FULL;
    }
    return r->head + num_bytes > r->backed_end ? SHML_E_EXTEND : SHML_OK;
}

/* ------------------------------------------------ reserve --------------------------------------------- */

static uint64_t bytes_of(const shml_region_t *r) { return r->end - r->begin; }

/* FULL, or what says that waiting is no use: in transit or raw, and in no other region either. */
static int why_full(const shml_region_t *r, uint64_t num_bytes)
{
    if (num_bytes > bytes_of(r))
        return SHML_E_TOOBIG;
    return num_bytes > shml_limit(r) - r->begin ? SHML_E_MEMORY : SHML_E_FULL;
}

static int find_spot(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, int urgent, shml_search_t *search,
                     shml_spot_t *spot)
{
    shml_control_t *c = seg->control;
    const shml_region_t *transit = &c->regions[SHML_TRANSIT], *raw = &c->regions[SHML_RAW_REGION];
    int is_raw = !shml_is_sample(id) && id < SHML_CHUNK_ERROR, has_transit = bytes_of(transit) > 0;
    int32_t chunk = shml_chunk_of(c, id);
    /* Decided with the first of its rows where it was not when it was fetched: there may be room by now. */
    int stays = chunk >= 0 && shml_is_sample(id) && !search->is_begun && shml_chunk_stay(seg, (uint32_t)chunk);
    if (!is_raw && (stays || !has_transit || id >= SHML_CHUNK_ERROR) && !search->is_begun) {
        int status = resident_spot(c, id, num_bytes, spot);
        if (status != SHML_E_FULL)
            return status;
        if (stays)
            shml_chunk_unstay(seg, (uint32_t)chunk);
        if (!has_transit)
            return num_bytes > bytes_of(&c->regions[SHML_RESIDENT]) ? SHML_E_TOOBIG : SHML_E_FULL;
    }
    const shml_region_t *r = is_raw ? raw : transit;
    if (why_full(r, num_bytes) != SHML_E_FULL)
        return why_full(r, num_bytes);
    int status = !is_raw && shml_is_sample(id) ? shml_region_thin(seg, urgent, search) : SHML_OK;
    if (status != SHML_OK)
        return status;
    return shml_region_search(seg, is_raw ? SHML_RAW_REGION : SHML_TRANSIT, num_bytes, urgent, search, spot);
}

/* The descriptor for a block at `spot`: a HOLE's, the row's own, or a free one. */
static int64_t desc_for(shml_seg_t *seg, shml_desc_t *own, const shml_spot_t *spot, uint16_t *deaths)
{
    shml_control_t *c = seg->control;
    shml_desc_t *descs = shml_descs(c);
    *deaths = own != NULL ? own->deaths : 0;
    if (!spot->hole) {
        if (own == NULL)
            return shml_desc_take(seg);
        uint32_t index = (uint32_t)(own - descs);
        return shml_unlink(c, index) == SHML_OK ? (int64_t)index
                                                : SHML_POISON(seg); /* linked again when it is RESERVED */
    }
    if (own != NULL) {
        /* The HOLE has the place, so the claim's descriptor goes, and first: no row is ever there twice. */
        if (shml_unlink(c, (uint32_t)(own - descs)) != SHML_OK)
            return SHML_POISON(seg);
        shml_desc_set(c, own, SHML_DESC_FREE);
        shml_desc_give(c, (uint32_t)(own - descs));
    }
    uint32_t *at = find_hole(c, descs[spot->hole_index].num_bytes);
    int64_t index = at != NULL ? shml_pop(c, at) : -1;
    SHML_FP("ring.reserve.hole");
    return index >= 0 && descs[index].state == SHML_DESC_HOLE ? index : SHML_POISON(seg);
}

static int occupy(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, const shml_stamp_t *stamp, shml_desc_t *own,
                  const shml_spot_t *spot, shml_ticket_t *ticket)
{
    shml_control_t *c = seg->control;
    uint16_t deaths;
    int status = spot->region == SHML_RESIDENT ? SHML_OK : shml_region_evict(seg, spot, num_bytes);
    if (status != SHML_OK)
        return status;
    int64_t index = desc_for(seg, own, spot, &deaths);
    if (index < 0)
        return (int)index;
    SHML_FP("ring.reserve.index");
    shml_desc_t *desc = &shml_descs(c)[index];
    shml_desc_count(c, desc, -1); /* as what it was */
    if (!spot->hole) {            /* else it is where it was */
        desc->offset = spot->offset;
        desc->num_bytes = num_bytes;
    }
    SHML_FP("ring.reserve.placed");
    desc->id = id;
    desc->owner = (uint16_t)seg->self;
    desc->deaths = deaths;
    desc->want[0] = desc->want[1] = 0;
    desc->gen++;
    shml_desc_stamp(desc, stamp);
    SHML_FP("ring.reserve.filled");
    atomic_store_explicit(&desc->state, SHML_DESC_RESERVED, memory_order_release);
    SHML_FP("ring.reserve.state");
    shml_desc_count(c, desc, 1);
    SHML_FP("ring.reserve.counted");
    shml_link(c, (uint32_t)index);
    if (spot->region != SHML_RESIDENT)
        shml_region_insert(c, spot, (uint32_t)index);
    else if (!spot->hole)
        c->regions[SHML_RESIDENT].head += num_bytes;
    SHML_FP("ring.reserve.linked");
    *ticket = (shml_ticket_t){desc->offset, num_bytes, (uint32_t)index, desc->gen};
    return SHML_OK;
}

static int reserve_locked(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, const shml_stamp_t *stamp, int urgent,
                          shml_search_t *search, shml_ticket_t *ticket)
{
    shml_control_t *c = seg->control;
    shml_spot_t spot = {0};
    int status;
    shml_desc_t *own = shml_find(seg, id, &status);
    search->has_own = own != NULL;
    if (status != SHML_OK)
        return status;
    int is_claimed = own != NULL && own->state == SHML_DESC_CLAIMED && own->owner == (uint16_t)seg->self;
    if (own != NULL && !is_claimed && own->state != SHML_DESC_SUSPECT)
        return SHML_E_EXISTS;
    if (own == NULL && !shml_has_desc(c) && shml_region_spare(seg, urgent) < 0)
        return SHML_E_POISONED;
    status = find_spot(seg, id, num_bytes, urgent, search, &spot);
    if (status == SHML_E_EXTEND)
        *ticket = (shml_ticket_t){spot.offset, num_bytes, spot.region, 0};
    if (status == SHML_E_FULL && urgent) {
        c->num_starved++;
        shml_wants_press(seg);
    }
    if (status != SHML_OK)
        return status;
    const shml_region_t *r = &c->regions[spot.region];
    if (spot.offset < r->begin || spot.offset % SHML_ALIGN != 0 || spot.offset > r->end ||
        num_bytes > r->end - spot.offset)
        return SHML_POISON(seg); /* what it was derived from is damaged */
    /* Dirty from here: lists and chains change before the descriptor's state says so. */
    uint32_t was = shml_begin_change(c);
    SHML_FP("ring.reserve.dirty");
    status = occupy(seg, id, num_bytes, stamp, own, &spot, ticket);
    if (status == SHML_E_POISONED)
        return status;
    shml_end_change(c, was);
    return status;
}

int shml_reserve(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, const shml_stamp_t *stamp, int urgent,
                 shml_ticket_t *ticket)
{
    if (num_bytes == 0)
        return SHML_E_INVAL;
    if (num_bytes > seg->control->ring_bytes)
        return SHML_E_TOOBIG;
    shml_search_t search = {0};
    int status;
    do {
        status = shml_lock(seg);
        if (status != SHML_OK)
            return status;
        status = seg->self < 0 ? SHML_E_LEFT
                               : reserve_locked(seg, id, shml_align(num_bytes), stamp, urgent, &search, ticket);
        shml_unlock(seg);
    } while (status == SHML_SEARCH_ON);
    return status;
}

/* ------------------------------------------------ commit ---------------------------------------------- */

/* The descriptor of a ticket that is still good. */
static shml_desc_t *reserved(shml_seg_t *seg, const shml_ticket_t *ticket)
{
    shml_control_t *c = seg->control;
    if (ticket->desc >= c->num_descs || seg->self < 0)
        return NULL;
    shml_desc_t *desc = &shml_descs(c)[ticket->desc];
    if (desc->state != SHML_DESC_RESERVED || desc->gen != ticket->gen || desc->owner != (uint16_t)seg->self)
        return NULL;
    return desc;
}

static void commit_locked(shml_seg_t *seg, shml_desc_t *desc, uint32_t state)
{
    shml_control_t *c = seg->control;
    int is_sample = shml_is_sample(desc->id);
    uint32_t was = shml_begin_change(c);
    SHML_FP("ring.commit.dirty");
    c->num_commits += (uint64_t)is_sample;
    c->commit_bytes += is_sample ? desc->num_bytes : 0;
    if (!shml_is_resident(c, desc->offset))
        shml_wants_stamp(c, desc);
    SHML_FP("ring.commit.stamped");
    shml_desc_set(c, desc, state);
    desc->deaths = 0;
    SHML_FP("ring.commit.deaths");
    shml_chunk_settle(seg, desc->id);
    shml_end_change(c, was);
    if (!shml_is_resident(c, desc->offset) && shml_is_evictable(c, (uint32_t)(desc - shml_descs(c)), 0))
        shml_region_tell(seg);
    atomic_fetch_add_explicit(&c->progress, 1, memory_order_relaxed);
    shml_wants_met(seg, desc->id);
    SHML_FP("ring.commit.met");
}

int shml_commit(shml_seg_t *seg, const shml_ticket_t *ticket, uint32_t status_of_record)
{
    if (status_of_record != SHML_REF_READY && status_of_record != SHML_REF_ERROR)
        return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    shml_desc_t *desc = reserved(seg, ticket);
    if (desc != NULL)
        commit_locked(seg, desc, status_of_record == SHML_REF_READY ? SHML_DESC_READY : SHML_DESC_ERROR);
    shml_unlock(seg);
    return desc != NULL ? SHML_OK : SHML_E_STALE;
}

int shml_abort(shml_seg_t *seg, const shml_ticket_t *ticket)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    status = reserved(seg, ticket) != NULL ? shml_desc_lose(seg, ticket->desc, 0) : SHML_E_STALE;
    shml_unlock(seg);
    return status;
}
