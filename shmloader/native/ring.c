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
        if (n == 0 || n > SHML_MAX_WANTS || id < client->least_want || id > client->most_want ||
            client->state != SHML_CLIENT_ACTIVE)
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
    int32_t slot = seg->self;
    return slot < 0 ? 0 : atomic_load_explicit(&shml_clients(seg->control)[slot].wake, memory_order_acquire);
}

void shml_wait(shml_seg_t *seg, uint32_t seen, uint32_t timeout_ms)
{
    int32_t slot = seg->self;
    if (slot < 0)
        return;
    uint32_t *word = (uint32_t *)&shml_clients(seg->control)[slot].wake;
    seg->env->wait(seg->env->ctx, word, seen, timeout_ms < SHML_TICK_MS ? timeout_ms : SHML_TICK_MS);
}

/* ------------------------------------------------ writing ---------------------------------------------- */

/* Take the first of a list out; -1: what the list says is no descriptor. */
static int64_t pop(struct shml_control *c, uint32_t *list)
{
    if (*list == 0 || *list > c->num_descs)
        return -1;
    uint32_t index = *list - 1;
    *list = shml_descs(c)[index].next;
    return index;
}

/* HOLEs that now end where the free space begins join it. */
static void absorb_holes(struct shml_control *c)
{
    shml_desc_t *descs = shml_descs(c);
    uint32_t *at = &c->hole_list;
    for (uint32_t steps = 0; *at != 0 && *at <= c->num_descs && steps <= c->num_descs; steps++) {
        uint32_t index = *at - 1;
        if (descs[index].offset + descs[index].num_bytes != c->head) {
            at = &descs[index].next;
            continue;
        }
        *at = descs[index].next;
        SHML_FP("ring.absorb.out");
        atomic_store_explicit(&descs[index].state, SHML_DESC_FREE, memory_order_release);
        SHML_FP("ring.absorb.free");
        c->head = descs[index].offset;
        descs[index].next = c->free_list;
        c->free_list = index + 1;
        at = &c->hole_list; /* one that was passed may be at the top now */
    }
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
    if (at_top)
        absorb_holes(c);
    shml_end_change(c);
    return SHML_OK;
}

/* The hole of just this size (the record's old place, when its chunk is read again), out of its list; -1: none. */
static int64_t take_hole(struct shml_control *c, uint64_t num_bytes)
{
    shml_desc_t *descs = shml_descs(c);
    uint32_t *at = &c->hole_list;
    for (uint32_t steps = 0; *at != 0 && *at <= c->num_descs && steps <= c->num_descs; steps++) {
        if (descs[*at - 1].num_bytes == num_bytes)
            return pop(c, at);
        at = &descs[*at - 1].next;
    }
    return -1;
}

/* Where a record of `num_bytes` goes: the descriptor's index (a HOLE has its place, any other goes to the head). */
static int64_t place(shml_seg_t *seg, uint64_t num_bytes)
{
    struct shml_control *c = seg->control;
    int64_t hole = take_hole(c, num_bytes);
    if (hole >= 0)
        return hole;
    if (c->head > c->resident_bytes || num_bytes > c->resident_bytes - c->head)
        return SHML_E_FULL;
    if (c->head + num_bytes > c->backed_end)
        return c->frozen ? SHML_E_MEMORY : SHML_E_EXTEND;
    if (c->free_list != 0) {
        int64_t index = pop(c, &c->free_list);
        return index >= 0 ? index : SHML_POISON(seg);
    }
    return c->desc_end < c->num_descs ? (int64_t)c->desc_end++ : SHML_E_FULL;
}

static int reserve_locked(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, shml_ticket_t *ticket)
{
    struct shml_control *c = seg->control;
    int status;
    if (shml_find(seg, id, &status) != NULL)
        return SHML_E_EXISTS;
    if (status != SHML_OK)
        return status;
    /* Dirty from here: lists, head and chains change before the descriptor's state says so. */
    shml_begin_change(c);
    SHML_FP("ring.reserve.dirty");
    int64_t index = place(seg, num_bytes);
    if (index < 0) {
        shml_end_change(c);
        return (int)index;
    }
    SHML_FP("ring.reserve.index");
    shml_desc_t *desc = &shml_descs(c)[index];
    if (desc->state != SHML_DESC_HOLE) {
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
    shml_link(c, (uint32_t)index);
    SHML_FP("ring.reserve.linked");
    c->used_bytes += num_bytes;
    c->num_reserved++;
    SHML_FP("ring.reserve.counted");
    shml_end_change(c);
    *ticket =
        (shml_ticket_t){.offset = desc->offset, .num_bytes = num_bytes, .desc = (uint32_t)index, .gen = desc->gen};
    return SHML_OK;
}

int shml_reserve(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, shml_ticket_t *ticket)
{
    if (num_bytes == 0)
        return SHML_E_INVAL;
    if (num_bytes > seg->control->resident_bytes)
        return SHML_E_TOOBIG;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    status = seg->self < 0 ? SHML_E_LEFT : reserve_locked(seg, id, shml_align(num_bytes), ticket);
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
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    int32_t slot = seg->self;
    if (slot < 0) {
        shml_unlock(seg);
        return SHML_E_LEFT;
    }
    struct shml_control *c = seg->control;
    shml_client_t *self = &shml_clients(c)[slot];
    uint64_t *wants = shml_wants(c, (uint32_t)slot);
    uint32_t missing = 0, posted = 0;
    if (post) {
        self->num_wants = 0;
        self->least_want = UINT64_MAX;
        self->most_want = 0;
    }
    for (uint32_t i = 0; i < n && status == SHML_OK; i++) {
        status = look_up(seg, ids[i], &refs[i]);
        if (status != SHML_OK || refs[i].status != SHML_REF_MISSING)
            continue;
        missing++;
        if (post && posted < SHML_MAX_WANTS) {
            wants[posted++] = ids[i];
            self->least_want = ids[i] < self->least_want ? ids[i] : self->least_want;
            self->most_want = ids[i] > self->most_want ? ids[i] : self->most_want;
        }
    }
    if (post && posted > 0) {
        SHML_FP("ring.get.listed");
        self->num_wants = posted;
        SHML_FP("ring.get.posted");
    }
    *num_missing = missing;
    shml_unlock(seg);
    return status;
}

/* So many ids are looked up in one critical section: some 3 us. */
#define HAVE_STEP 1024u

int shml_have(shml_seg_t *seg, uint64_t first, uint32_t n, uint8_t *bits)
{
    memset(bits, 0, ((size_t)n + 7) / 8);
    int status = SHML_OK;
    for (uint32_t i = 0; i < n && status == SHML_OK;) {
        status = shml_lock(seg);
        if (status != SHML_OK)
            return status;
        for (uint32_t end = n - i < HAVE_STEP ? n : i + HAVE_STEP; i < end && status == SHML_OK; i++) {
            const shml_desc_t *desc = shml_find(seg, first + i, &status);
            if (desc != NULL && (desc->state == SHML_DESC_READY || desc->state == SHML_DESC_ERROR))
                bits[i / 8] |= (uint8_t)(1u << (i % 8));
        }
        shml_unlock(seg);
    }
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
