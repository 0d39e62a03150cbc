/* read.c - looking up: what there is of each id, and where.
 *
 * A look-up of a whole batch is one critical section, so a batch that is complete is pinned as a whole or not at all.
 * What a kill in here leaves is told where it is stored: pin.c, want.c and order.c.
 */
#include "failpoint.h"
#include "layout.h"

int shml_look_up(shml_seg_t *seg, uint64_t id, shml_ref_t *ref)
{
    shml_control_t *c = seg->control;
    int status;
    *ref = (shml_ref_t){.status = SHML_REF_MISSING, .chunk = UINT32_MAX};
    int comes = shml_row_comes(c, id);
    if (comes != SHML_ROW_COMES) {
        ref->status = comes == SHML_ROW_AT_END ? SHML_REF_END : SHML_REF_MISSING;
        return SHML_OK;
    }
    const shml_desc_t *desc = shml_find(seg, id, &status);
    if (status != SHML_OK)
        return status;
    uint32_t state = desc != NULL ? desc->state : SHML_DESC_FREE;
    if (shml_is_there(state)) {
        if (desc->offset > c->ring_bytes || desc->num_bytes > c->ring_bytes - desc->offset)
            return SHML_POISON(seg);
        *ref = (shml_ref_t){.offset = desc->offset,
                            .num_bytes = desc->num_bytes,
                            .desc = (uint32_t)(desc - shml_descs(c)),
                            .gen = desc->gen,
                            .status = state == SHML_DESC_READY ? SHML_REF_READY : SHML_REF_ERROR};
        return SHML_OK;
    }
    int32_t chunk = shml_chunk_of(c, id);
    if (chunk >= 0) {
        ref->chunk = (uint32_t)chunk;
        if (shml_word_state(shml_chunks(c)[chunk].word) == SHML_CHUNK_BROKEN)
            ref->status = SHML_REF_BROKEN;
    }
    if (state == SHML_DESC_ASIDE)
        ref->status = SHML_REF_ASIDE;
    return SHML_OK;
}

/* Ask for what looking up and pinning will touch, all at once: else each record costs three cache misses, one after the
 * other, under the mutex. */
static void prefetch(shml_control_t *c, const uint64_t *ids, uint32_t n)
{
    const uint32_t *buckets = shml_buckets(c);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t next = buckets[ids[i] % c->num_buckets];
        if (next == 0 || next > c->num_descs)
            continue;
        __builtin_prefetch(&shml_descs(c)[next - 1]);
        __builtin_prefetch((const void *)shml_pins(c, next - 1), 1);
    }
}

static int get_locked(shml_seg_t *seg, const uint64_t *ids, uint32_t n, int flags, const shml_place_t *place,
                      shml_ref_t *refs, uint32_t *num_missing)
{
    int32_t slot = seg->self;
    if (slot < 0)
        return SHML_E_LEFT;
    uint32_t missing = 0;
    prefetch(seg->control, ids, n);
    for (uint32_t i = 0; i < n; i++) {
        int status = shml_look_up(seg, ids[i], &refs[i]);
        if (status != SHML_OK)
            return status;
        missing += refs[i].status == SHML_REF_MISSING;
    }
    *num_missing = missing;
    int is_take = missing == 0 || (flags & SHML_GET_TAKE) != 0;
    if (is_take) {
        int status = shml_pin_refs(seg, (uint32_t)slot, refs, n);
        if (status != SHML_OK)
            return status;
    }
    if (flags & SHML_GET_POST)
        shml_wants_post(seg, (uint32_t)slot, ids, n, refs, missing, is_take);
    if (place != NULL && missing == 0)
        shml_mark_set(seg, (uint32_t)slot, place, place->end);
    else if (place != NULL && (flags & SHML_GET_POST))
        shml_mark_set(seg, (uint32_t)slot, place, place->begin);
    return SHML_OK;
}

int shml_get_many(shml_seg_t *seg, const uint64_t *ids, uint32_t n, int flags, const shml_place_t *place,
                  shml_ref_t *refs, shml_found_t *found)
{
    *found = (shml_found_t){0};
    for (uint32_t i = 0; i < n; i++)
        __builtin_prefetch(&shml_buckets(seg->control)[ids[i] % seg->control->num_buckets]);
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    status = get_locked(seg, ids, n, flags, place, refs, &found->num_missing);
    shml_unlock(seg);
    if (status != SHML_OK)
        return status;
    uint32_t num_pinned = 0, num_samples = 0, is_taken = found->num_missing == 0 || (flags & SHML_GET_TAKE) != 0;
    for (uint32_t i = 0; i < n; i++) {
        int is_pinned = refs[i].status <= SHML_REF_ERROR && refs[i].chunk == 1;
        num_pinned += (uint32_t)is_pinned;
        /* Of a look-up that is not complete the caller takes what there is with TAKE, and asks for the rest again. */
        num_samples += shml_is_sample(ids[i]) && refs[i].status <= SHML_REF_ERROR && is_taken;
    }
    if (num_samples > 0)
        atomic_fetch_add_explicit(&seg->control->num_reads, num_samples, memory_order_relaxed);
    if (num_pinned > 0) {
        pthread_mutex_lock(seg->pin_lock);
        uint64_t pinned_bytes = seg->pinned_bytes, num_samples_pinned = seg->num_pinned;
        pthread_mutex_unlock(seg->pin_lock);
        found->over_quota = pinned_bytes > shml_pin_quota(seg) || num_samples_pinned > shml_pin_quota_samples(seg);
    }
    return SHML_OK;
}

static int look(shml_seg_t *seg, uint64_t id, const shml_stamp_t *stamp, uint8_t *row)
{
    shml_control_t *c = seg->control;
    if (shml_row_comes(c, id) != SHML_ROW_COMES) {
        *row = SHML_ROW_FINAL;
        return SHML_OK;
    }
    int status;
    shml_desc_t *desc = shml_find(seg, id, &status);
    uint32_t state = desc != NULL ? desc->state : SHML_DESC_FREE;
    int is_kept = shml_is_there(state) && shml_is_resident(c, desc->offset);
    if (stamp != NULL && !is_kept && shml_is_read(c, stamp)) {
        *row = SHML_ROW_FINAL; /* for this order */
        return status;
    }
    switch (state) {
    case SHML_DESC_CLAIMED:
    case SHML_DESC_RESERVED: *row = SHML_ROW_WORK; return status;
    case SHML_DESC_ASIDE: *row = SHML_ROW_FINAL; return status;
    case SHML_DESC_READY:
    case SHML_DESC_ERROR:
        *row = shml_is_resident(c, desc->offset) ? SHML_ROW_FINAL : SHML_ROW_TRANSIT;
        if (*row == SHML_ROW_TRANSIT && stamp != NULL && !shml_is_ordered(c, desc))
            shml_desc_stamp(desc, stamp);
        return status;
    default: break;
    }
    int32_t chunk = shml_chunk_of(c, id);
    int is_broken = chunk >= 0 && shml_word_state(shml_chunks(c)[chunk].word) == SHML_CHUNK_BROKEN;
    *row = is_broken ? SHML_ROW_FINAL : state == SHML_DESC_SUSPECT ? SHML_ROW_SUSPECT : SHML_ROW_MISSING;
    return status;
}

/* So many ids are looked up in one critical section: some 3 us. */
#define LOOK_STEP 1024u

int shml_row_chunks(shml_seg_t *seg, const uint64_t *ids, uint32_t n, uint32_t *chunks)
{
    for (uint32_t i = 0; i < n;) {
        int status = shml_lock(seg);
        if (status != SHML_OK)
            return status;
        for (uint32_t end = n - i < LOOK_STEP ? n : i + LOOK_STEP; i < end; i++)
            chunks[i] = (uint32_t)shml_chunk_of(seg->control, ids[i]); /* -1: UINT32_MAX */
        shml_unlock(seg);
    }
    return SHML_OK;
}

int shml_look(shml_seg_t *seg, const uint64_t *ids, uint32_t n, const shml_stamp_t *stamp, uint8_t *rows)
{
    int status = SHML_OK;
    if (stamp != NULL && stamp->order >= SHML_MAX_ORDERS)
        stamp = NULL;
    for (uint32_t i = 0; i < n && status == SHML_OK;) {
        status = shml_lock(seg);
        if (status != SHML_OK)
            return status;
        for (uint32_t end = n - i < LOOK_STEP ? n : i + LOOK_STEP; i < end && status == SHML_OK; i++) {
            shml_stamp_t one = stamp != NULL ? *stamp : (shml_stamp_t){0};
            one.until += i;
            status = look(seg, ids[i], stamp != NULL ? &one : NULL, &rows[i]);
        }
        SHML_FP("read.look.done");
        shml_unlock(seg);
    }
    return status;
}

int shml_count_reads(shml_seg_t *seg, const uint64_t *ids, uint32_t n, uint32_t *reads)
{
    shml_control_t *c = seg->control;
    _Atomic uint32_t *all = shml_reads(c);
    for (uint32_t i = 0; i < n; i++)
        reads[i] = atomic_fetch_add_explicit(&all[ids[i] % c->num_records], 1, memory_order_relaxed);
    return SHML_OK;
}
