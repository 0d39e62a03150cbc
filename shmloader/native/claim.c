/* claim.c - rows: who decodes which, and what becomes of a row over which a client died.
 *
 * A kill ...                                   leaves ...                            repaired by
 *   in claim_rows, before `state`              a FREE descriptor, `dirty`            rebuild
 *   in claim_rows, after `state`               CLAIMED, perhaps not linked           rebuild, then reap: SUSPECT
 *   while decoding                             CLAIMED                               reap: SUSPECT, one more death
 *   in unclaim_rows                            CLAIMED, SUSPECT or FREE, `dirty`     rebuild; reap
 *   in reaping a CLAIMED row                   CLAIMED, or SUSPECT with its deaths   rebuild; the next reap
 *   in reaping a RESERVED row, before the      a HOLE; the row as if it were         rebuild
 *   SUSPECT's `state`                          nowhere, its deaths forgotten
 *   in setting it ASIDE, before its chunk is   ASIDE, `dirty`                        rebuild: the chunk is DONE
 *   DONE
 */
#include "failpoint.h"
#include "layout.h"

/* Make the row of `id`, which is nowhere, one without a block. */
static int new_row(shml_seg_t *seg, uint64_t id, uint32_t state, uint16_t deaths)
{
    shml_control_t *c = seg->control;
    int64_t index = shml_desc_take(seg);
    if (index < 0)
        return (int)index;
    SHML_FP("claim.new.taken");
    shml_desc_t *desc = &shml_descs(c)[index];
    desc->id = id;
    desc->offset = desc->num_bytes = 0;
    desc->owner = (uint16_t)seg->self;
    desc->deaths = deaths;
    desc->order = desc->want[0] = desc->want[1] = 0;
    SHML_FP("claim.new.filled");
    shml_desc_set(c, desc, state);
    shml_link(c, (uint32_t)index);
    SHML_FP("claim.new.linked");
    return SHML_OK;
}

/* One more row of its chunk is final, and will not come. */
static void set_aside(shml_seg_t *seg, uint64_t id)
{
    shml_chunk_settle(seg, id);
    SHML_FP("claim.aside.settled");
    shml_wants_wake(seg, id, 1);
    shml_guests_met(seg, id, 1);
}

static int is_broken(shml_control_t *c, uint64_t id)
{
    int32_t chunk = shml_chunk_of(c, id);
    return chunk >= 0 && shml_word_state(shml_chunks(c)[chunk].word) == SHML_CHUNK_BROKEN;
}

static int claim_row(shml_seg_t *seg, uint64_t id, int is_alone, uint8_t *got)
{
    shml_control_t *c = seg->control;
    int status;
    shml_desc_t *desc = shml_find(seg, id, &status);
    if (status != SHML_OK || is_broken(c, id) || shml_row_comes(c, id) != SHML_ROW_COMES)
        return status;
    if (desc == NULL) {
        /* For a row that somebody waits for, what a living order has not come to yet gives way as well. */
        if (!shml_has_desc(c) && shml_region_spare(seg, shml_is_awaited(c, id)) < 0)
            return SHML_E_POISONED;
        status = new_row(seg, id, SHML_DESC_CLAIMED, 0);
        *got = status == SHML_OK;
    } else if (desc->state == SHML_DESC_SUSPECT && is_alone) {
        desc->owner = (uint16_t)seg->self;
        SHML_FP("claim.suspect.owner");
        shml_desc_set(c, desc, SHML_DESC_CLAIMED);
        *got = 1;
    }
    return status;
}

int shml_claim_rows(shml_seg_t *seg, const uint64_t *ids, uint32_t n, uint8_t *got)
{
    for (uint32_t i = 0; i < n; i++) {
        got[i] = 0;
        if (!shml_is_sample(ids[i]))
            return SHML_E_INVAL;
    }
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    if (seg->self < 0)
        status = SHML_E_LEFT;
    uint32_t was = shml_begin_change(seg->control);
    SHML_FP("claim.rows.dirty");
    for (uint32_t i = 0; i < n && status == SHML_OK; i++)
        status = claim_row(seg, ids[i], n == 1, &got[i]);
    if (status != SHML_E_POISONED)
        shml_end_change(seg->control, was);
    shml_unlock(seg);
    return status;
}

int shml_row_forget(shml_seg_t *seg, uint32_t index)
{
    shml_control_t *c = seg->control;
    if (shml_unlink(c, index) != SHML_OK)
        return SHML_POISON(seg);
    SHML_FP("claim.forget.unlinked");
    shml_desc_set(c, &shml_descs(c)[index], SHML_DESC_FREE);
    shml_desc_give(c, index);
    return SHML_OK;
}

static int lose_claim(shml_seg_t *seg, uint32_t index, uint16_t deaths)
{
    shml_control_t *c = seg->control;
    shml_desc_t *desc = &shml_descs(c)[index];
    if (deaths == 0)
        return shml_row_forget(seg, index);
    int is_aside = deaths >= SHML_MAX_ATTEMPTS;
    desc->deaths = deaths;
    SHML_FP("claim.lose.deaths");
    shml_desc_set(c, desc, is_aside ? SHML_DESC_ASIDE : SHML_DESC_SUSPECT);
    if (is_aside)
        set_aside(seg, desc->id);
    return SHML_OK;
}

static int lose_reservation(shml_seg_t *seg, uint32_t index, uint16_t deaths)
{
    uint64_t id = shml_descs(seg->control)[index].id;
    int status = shml_desc_hole(seg, index), is_aside = deaths >= SHML_MAX_ATTEMPTS;
    if (status != SHML_OK || deaths == 0)
        return status;
    SHML_FP("claim.lose.hole");
    status = new_row(seg, id, is_aside ? SHML_DESC_ASIDE : SHML_DESC_SUSPECT, deaths);
    if (status == SHML_OK && is_aside)
        set_aside(seg, id);
    return status == SHML_E_FULL ? SHML_OK : status; /* without a descriptor its deaths are forgotten */
}

int shml_desc_lose(shml_seg_t *seg, uint32_t index, int is_own_death)
{
    shml_control_t *c = seg->control;
    const shml_desc_t *desc = &shml_descs(c)[index];
    /* Of a row whose chunk has lost its place nobody will ask any more, and nobody would clean up after it. */
    int is_row = shml_is_sample(desc->id) && (!shml_is_open(c) || shml_chunk_of(c, desc->id) >= 0);
    uint32_t deaths = is_row ? desc->deaths + (is_own_death ? 1u : 0u) : 0;
    uint32_t was = shml_begin_change(c);
    int status = desc->state == SHML_DESC_CLAIMED ? lose_claim(seg, index, (uint16_t)deaths)
                                                  : lose_reservation(seg, index, (uint16_t)deaths);
    if (status != SHML_E_POISONED)
        shml_end_change(c, was);
    return status;
}

int shml_unclaim_rows(shml_seg_t *seg, const uint64_t *ids, uint32_t n)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    if (seg->self < 0)
        status = SHML_E_LEFT;
    for (uint32_t i = 0; i < n && status == SHML_OK; i++) {
        const shml_desc_t *desc = shml_find(seg, ids[i], &status);
        if (desc != NULL && desc->state == SHML_DESC_CLAIMED && desc->owner == (uint16_t)seg->self)
            status = shml_desc_lose(seg, (uint32_t)(desc - shml_descs(seg->control)), 0);
    }
    shml_unlock(seg);
    return status;
}

int shml_claims_release(shml_seg_t *seg, uint32_t slot, int is_own_death)
{
    shml_control_t *c = seg->control;
    const shml_desc_t *descs = shml_descs(c);
    int status = SHML_OK, num_lost = 0;
    uint32_t end = c->desc_end < c->num_descs ? c->desc_end : c->num_descs;
    for (uint32_t i = 0; shml_clients(c)[slot].num_working > 0 && i < end && status == SHML_OK; i++) {
        if ((descs[i].state != SHML_DESC_RESERVED && descs[i].state != SHML_DESC_CLAIMED) || descs[i].owner != slot)
            continue;
        status = shml_desc_lose(seg, i, is_own_death);
        SHML_FP("claim.release.row");
        num_lost++;
    }
    if (num_lost > 0)
        shml_work_tell(seg);
    return status;
}
