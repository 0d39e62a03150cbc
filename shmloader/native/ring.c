/* ring.c - records: reserve, write, commit; look up, want, wait.
 *
 * Only the resident part is used so far: records are laid one behind the other from offset 0, and none is ever
 * taken away, so a reader needs no pin.
 *
 * A kill ...                                   leaves ...                      repaired by
 *   in reserve, before `state`                 a FREE descriptor, dirty        rebuild
 *   in reserve, after `state`                  RESERVED, perhaps not linked    rebuild, then reap: a HOLE
 *   while writing the bytes                    RESERVED                        reap: a HOLE; the chunk is read again
 *   in commit, before `state`                  RESERVED                        reap
 *   in commit, after `state`                   READY, perhaps counted wrong    rebuild
 *   in commit, before the wake                 a reader sleeps on              its tick (100 ms)
 */
#include <string.h>

#include "failpoint.h"
#include "layout.h"

/* ------------------------------------------------ wants ------------------------------------------------ */

static void wake_client(shml_seg_t *seg, shml_client_t *client)
{
    atomic_fetch_add_explicit(&client->wake, 1, memory_order_release);
    SHML_FP("ring.wake.counted");
    seg->env->wake(seg->env->ctx, (uint32_t *)&client->wake);
}

void shml_wants_met(shml_seg_t *seg, uint64_t id)
{
    struct shml_control *c = seg->control;
    shml_client_t *clients = shml_clients(c);
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++) {
        shml_client_t *client = &clients[slot];
        uint32_t n = client->num_wants;
        if (n == 0 || n > SHML_MAX_WANTS || client->state != SHML_CLIENT_ACTIVE)
            continue;
        uint64_t *wants = shml_wants(c, slot);
        for (uint32_t i = 0; i < n;) {
            if (wants[i] == id)
                wants[i] = wants[--n];
            else
                i++;
        }
        if (n == client->num_wants)
            continue;
        client->num_wants = n;
        SHML_FP("ring.wants.met");
        if (n == 0)
            wake_client(seg, client);
    }
}

void shml_wants_wake(shml_seg_t *seg, uint64_t first, uint64_t n)
{
    struct shml_control *c = seg->control;
    shml_client_t *clients = shml_clients(c);
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++) {
        if (clients[slot].state != SHML_CLIENT_ACTIVE)
            continue;
        const uint64_t *wants = shml_wants(c, slot);
        for (uint32_t i = 0; i < clients[slot].num_wants && i < SHML_MAX_WANTS; i++) {
            if (wants[i] - first < n) {
                wake_client(seg, &clients[slot]);
                break;
            }
        }
    }
}

int shml_wanted(shml_seg_t *seg, uint64_t first, uint32_t n, uint64_t *ids, uint32_t max)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    struct shml_control *c = seg->control;
    const shml_client_t *clients = shml_clients(c);
    uint32_t found = 0;
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS && found < max; slot++) {
        if (clients[slot].state != SHML_CLIENT_ACTIVE)
            continue;
        const uint64_t *wants = shml_wants(c, slot);
        for (uint32_t i = 0; i < clients[slot].num_wants && i < SHML_MAX_WANTS && found < max; i++)
            if (wants[i] - first < n)
                ids[found++] = wants[i];
    }
    shml_unlock(seg);
    return (int)found;
}

uint32_t shml_wake_word(const shml_seg_t *seg)
{
    return seg->self < 0 ? 0 : atomic_load_explicit(&shml_clients(seg->control)[seg->self].wake, memory_order_acquire);
}

void shml_wait(shml_seg_t *seg, uint32_t seen, uint32_t timeout_ms)
{
    if (seg->self < 0)
        return;
    uint32_t *word = (uint32_t *)&shml_clients(seg->control)[seg->self].wake;
    seg->env->wait(seg->env->ctx, word, seen, timeout_ms < SHML_TICK_MS ? timeout_ms : SHML_TICK_MS);
}

/* ------------------------------------------------ writing ---------------------------------------------- */

static uint32_t pop(struct shml_control *c, uint32_t *list)
{
    uint32_t index = *list - 1;
    *list = shml_descs(c)[index].next;
    return index;
}

/* Leave block `index` without a record. Its bytes are free again if nothing lies above them, else a HOLE. */
int shml_desc_hole(shml_seg_t *seg, uint32_t index)
{
    struct shml_control *c = seg->control;
    shml_desc_t *desc = &shml_descs(c)[index];
    int at_top = desc->offset + desc->num_bytes == c->head;
    shml_begin_change(c);
    SHML_FP("ring.hole.dirty");
    if (shml_unlink(c, index) != SHML_OK)
        return SHML_POISON(seg);
    c->used_bytes -= desc->num_bytes;
    c->num_reserved--;
    SHML_FP("ring.hole.counted");
    atomic_store_explicit(&desc->state, at_top ? SHML_DESC_FREE : SHML_DESC_HOLE, memory_order_release);
    SHML_FP("ring.hole.state");
    if (at_top)
        c->head = desc->offset;
    uint32_t *list = at_top ? &c->free_list : &c->hole_list;
    desc->next = *list;
    SHML_FP("ring.hole.next");
    *list = index + 1;
    SHML_FP("ring.hole.listed");
    shml_end_change(c);
    return SHML_OK;
}

/* The hole that fits: the record's old place, when its chunk is read again. Taken out of the list; -1: none. */
static int64_t take_hole(struct shml_control *c, uint64_t num_bytes)
{
    shml_desc_t *descs = shml_descs(c);
    for (uint32_t *at = &c->hole_list; *at != 0; at = &descs[*at - 1].next) {
        if (descs[*at - 1].num_bytes == num_bytes)
            return pop(c, at);
    }
    return -1;
}

static int place(shml_seg_t *seg, uint64_t num_bytes, int64_t *hole)
{
    struct shml_control *c = seg->control;
    *hole = take_hole(c, num_bytes);
    if (*hole >= 0)
        return SHML_OK;
    if (num_bytes > c->resident_bytes - c->head)
        return SHML_E_FULL;
    if (c->head + num_bytes > c->backed_end)
        return c->frozen ? SHML_E_MEMORY : SHML_E_EXTEND;
    return c->free_list == 0 && c->desc_end == c->num_descs ? SHML_E_FULL : SHML_OK;
}

static int reserve_locked(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, shml_ticket_t *ticket)
{
    struct shml_control *c = seg->control;
    int status;
    if (shml_find(seg, id, &status) != NULL)
        return SHML_E_EXISTS;
    if (status != SHML_OK)
        return status;
    int64_t hole;
    /* Dirty from here: lists, head and chains change before the descriptor's state says so. */
    shml_begin_change(c);
    SHML_FP("ring.reserve.dirty");
    status = place(seg, num_bytes, &hole);
    if (status != SHML_OK) {
        shml_end_change(c);
        return status;
    }
    uint32_t index = hole >= 0 ? (uint32_t)hole : c->free_list != 0 ? pop(c, &c->free_list) : c->desc_end++;
    SHML_FP("ring.reserve.index");
    shml_desc_t *desc = &shml_descs(c)[index];
    if (hole < 0) {
        desc->offset = c->head;
        desc->num_bytes = num_bytes;
        c->head += num_bytes;
    }
    SHML_FP("ring.reserve.placed");
    desc->id = id;
    desc->version = 0;
    desc->owner = (uint32_t)seg->self;
    desc->gen++;
    desc->reads = 0;
    SHML_FP("ring.reserve.filled");
    atomic_store_explicit(&desc->state, SHML_DESC_RESERVED, memory_order_release);
    SHML_FP("ring.reserve.state");
    shml_link(c, index);
    SHML_FP("ring.reserve.linked");
    c->used_bytes += num_bytes;
    c->num_reserved++;
    SHML_FP("ring.reserve.counted");
    shml_end_change(c);
    *ticket = (shml_ticket_t){.offset = desc->offset, .num_bytes = num_bytes, .desc = index, .gen = desc->gen};
    return SHML_OK;
}

int shml_reserve(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, shml_ticket_t *ticket)
{
    if (seg->self < 0 || num_bytes == 0)
        return SHML_E_INVAL;
    if (num_bytes > seg->control->resident_bytes)
        return SHML_E_TOOBIG;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    status = reserve_locked(seg, id, shml_align(num_bytes), ticket);
    shml_unlock(seg);
    return status;
}

/* The descriptor of a ticket that is still good. */
static shml_desc_t *reserved(shml_seg_t *seg, const shml_ticket_t *ticket)
{
    struct shml_control *c = seg->control;
    if (ticket->desc >= c->num_descs)
        return NULL;
    shml_desc_t *desc = &shml_descs(c)[ticket->desc];
    if (desc->state != SHML_DESC_RESERVED || desc->gen != ticket->gen || desc->owner != (uint32_t)seg->self)
        return NULL;
    return desc;
}

int shml_commit(shml_seg_t *seg, const shml_ticket_t *ticket, uint32_t status_of_record)
{
    if (status_of_record != SHML_REF_READY && status_of_record != SHML_REF_ERROR)
        return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    struct shml_control *c = seg->control;
    shml_desc_t *desc = reserved(seg, ticket);
    if (desc == NULL) {
        shml_unlock(seg);
        return SHML_E_STALE;
    }
    int is_ready = status_of_record == SHML_REF_READY;
    shml_begin_change(c);
    SHML_FP("ring.commit.dirty");
    c->num_commits++;
    /* SYNC(publish): the mutex orders the record's bytes before this for every reader. */
    atomic_store_explicit(&desc->state, is_ready ? SHML_DESC_READY : SHML_DESC_ERROR, memory_order_release);
    SHML_FP("ring.commit.state");
    c->num_reserved--;
    c->num_ready += (uint32_t)is_ready;
    c->num_errors += (uint32_t)!is_ready;
    SHML_FP("ring.commit.counted");
    shml_end_change(c);
    atomic_fetch_add_explicit(&c->progress, 1, memory_order_relaxed);
    shml_wants_met(seg, desc->id);
    SHML_FP("ring.commit.met");
    shml_unlock(seg);
    return SHML_OK;
}

int shml_abort(shml_seg_t *seg, const shml_ticket_t *ticket)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    if (reserved(seg, ticket) != NULL)
        status = shml_desc_hole(seg, ticket->desc);
    else
        status = SHML_E_STALE;
    shml_unlock(seg);
    return status;
}

/* ------------------------------------------------ reading ---------------------------------------------- */

static int look_up(shml_seg_t *seg, uint64_t id, shml_ref_t *ref)
{
    struct shml_control *c = seg->control;
    int status;
    const shml_desc_t *desc = shml_find(seg, id, &status);
    if (status != SHML_OK)
        return status;
    *ref = (shml_ref_t){.status = SHML_REF_MISSING, .chunk = UINT32_MAX};
    if (desc != NULL && (desc->state == SHML_DESC_READY || desc->state == SHML_DESC_ERROR)) {
        if (desc->offset > c->ring_bytes || desc->num_bytes > c->ring_bytes - desc->offset)
            return SHML_POISON(seg);
        ref->offset = desc->offset;
        ref->num_bytes = desc->num_bytes;
        ref->desc = (uint32_t)(desc - shml_descs(c));
        ref->gen = desc->gen;
        ref->status = desc->state == SHML_DESC_READY ? SHML_REF_READY : SHML_REF_ERROR;
        return SHML_OK;
    }
    int32_t chunk = shml_chunk_of(c, id);
    if (chunk >= 0) {
        ref->chunk = (uint32_t)chunk;
        if ((shml_chunks(c)[chunk].word & 0xff) == SHML_CHUNK_BROKEN)
            ref->status = SHML_REF_BROKEN;
    }
    return SHML_OK;
}

int shml_get_many(shml_seg_t *seg, const uint64_t *ids, uint32_t n, int post, shml_ref_t *refs, uint32_t *num_missing)
{
    if (seg->self < 0)
        return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    struct shml_control *c = seg->control;
    shml_client_t *self = &shml_clients(c)[seg->self];
    uint64_t *wants = shml_wants(c, (uint32_t)seg->self);
    uint32_t missing = 0, posted = 0;
    if (post)
        self->num_wants = 0;
    for (uint32_t i = 0; i < n && status == SHML_OK; i++) {
        status = look_up(seg, ids[i], &refs[i]);
        if (status != SHML_OK || refs[i].status != SHML_REF_MISSING)
            continue;
        missing++;
        if (post && posted < SHML_MAX_WANTS)
            wants[posted++] = ids[i];
    }
    if (post && posted > 0) {
        SHML_FP("ring.get.listed");
        self->num_wants = posted;
        SHML_FP("ring.get.posted");
        atomic_fetch_add_explicit(&c->work, 1, memory_order_release);
        seg->env->wake(seg->env->ctx, (uint32_t *)&c->work);
    }
    *num_missing = missing;
    shml_unlock(seg);
    return status;
}

int shml_have(shml_seg_t *seg, uint64_t first, uint32_t n, uint8_t *bits)
{
    memset(bits, 0, ((size_t)n + 7) / 8);
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    for (uint32_t i = 0; i < n && status == SHML_OK; i++) {
        const shml_desc_t *desc = shml_find(seg, first + i, &status);
        if (desc != NULL && (desc->state == SHML_DESC_READY || desc->state == SHML_DESC_ERROR))
            bits[i / 8] |= (uint8_t)(1u << (i % 8));
    }
    shml_unlock(seg);
    return status;
}

int shml_count_reads(shml_seg_t *seg, const shml_ref_t *refs, uint32_t n, uint32_t *reads)
{
    struct shml_control *c = seg->control;
    for (uint32_t i = 0; i < n; i++) {
        if (refs[i].desc >= c->num_descs)
            return SHML_E_INVAL;
        reads[i] = atomic_fetch_add_explicit(&shml_descs(c)[refs[i].desc].reads, 1, memory_order_relaxed);
    }
    return SHML_OK;
}
