/* order.c - the living orders, and how far their readers are.
 *
 * A reader's mark in an order is the position before which it has read all that is its. The least mark of the living
 * readers is the order's low-water mark: what is stamped with a position below it is consumed.
 *
 * A kill ...                                leaves ...                               repaired by
 *   in begin, before LIVE                   a FREE order                             nothing to repair
 *   in begin, after LIVE; in end            num_orders wrong, `dirty`                rebuild; reap ends the dead one's
 *   in moving a mark                        a low-water mark too low, `dirty`        rebuild
 *                                           what was read told wrong                 nobody: see layout.h
 *   in releasing a dead client's            some of them, `dirty`                    rebuild; the next reap
 *   in joining, leaving, finishing          see join.c
 */
#include <string.h>

#include "failpoint.h"
#include "layout.h"

shml_order_t *shml_order_living(shml_control_t *c, uint32_t slot, uint32_t gen)
{
    if (slot >= SHML_MAX_ORDERS)
        return NULL;
    shml_order_t *order = &shml_order_table(c)[slot];
    return order->state == SHML_ORDER_LIVE && order->gen == gen ? order : NULL;
}

uint64_t shml_low_water(shml_control_t *c, uint32_t order)
{
    const uint64_t *marks = shml_marks(c, order);
    uint64_t least = UINT64_MAX;
    if (!shml_is_whole(&shml_order_table(c)[order]))
        return 0;
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++)
        if (marks[slot] != 0 && marks[slot] - 1 < least && shml_is_active(c, slot))
            least = marks[slot] - 1;
    /* Nobody has one: what the readers that there were have consumed stays so. */
    return least != UINT64_MAX ? least : shml_order_table(c)[order].low_water;
}

/* Every `step`-th of the positions [begin, end) was read (1), or is below the low-water mark now (0; all of them). */
static void set_read(shml_control_t *c, uint32_t index, uint64_t begin, uint64_t end, uint64_t step, int is_read)
{
    uint64_t *bits = shml_read_bits(c, index);
    if (end - begin > SHML_READ_POSITIONS && !is_read)
        begin = end - SHML_READ_POSITIONS;
    for (uint64_t position = begin; position < end; position += step) {
        uint64_t at = position % SHML_READ_POSITIONS, bit = UINT64_C(1) << (at % 64);
        bits[at / 64] = is_read ? bits[at / 64] | bit : bits[at / 64] & ~bit;
    }
    SHML_FP("order.read.set");
}

int shml_is_read(shml_control_t *c, const shml_stamp_t *stamp)
{
    const shml_order_t *order = shml_order_living(c, stamp->order, stamp->gen);
    if (order == NULL || stamp->until == 0)
        return 0;
    uint64_t position = stamp->until - 1, at = position % SHML_READ_POSITIONS;
    if (position < order->low_water || position - order->low_water >= SHML_READ_POSITIONS)
        return 0;
    return (int)(shml_read_bits(c, stamp->order)[at / 64] >> (at % 64) & 1);
}

void shml_mark_store(shml_seg_t *seg, uint32_t index, uint32_t slot, uint64_t value)
{
    shml_control_t *c = seg->control;
    uint64_t *mark = &shml_marks(c, index)[slot];
    if (*mark == value)
        return;
    shml_order_t *order = &shml_order_table(c)[index];
    uint32_t was = shml_begin_change(c);
    SHML_FP("order.mark.dirty");
    *mark = value;
    SHML_FP("order.mark.set");
    uint64_t low_water = shml_low_water(c, index), before = order->low_water;
    order->low_water = low_water;
    SHML_FP("order.mark.low_water");
    if (low_water > before)
        set_read(c, index, before, low_water, 1, 0);
    if (value == 0 && order->num_readers > 0 && !shml_has_marks(c, index))
        shml_order_stop(seg, index);
    shml_end_change(c, was);
    if (low_water > before)
        shml_work_tell(seg); /* what it passed may be evicted, and the services may go on */
}

void shml_mark_set(shml_seg_t *seg, uint32_t slot, const shml_place_t *place, uint64_t mark)
{
    shml_control_t *c = seg->control;
    const shml_order_t *order = shml_order_living(c, place->order, place->gen);
    if (mark >= UINT64_MAX - 1 || order == NULL)
        return;
    uint64_t before = shml_marks(c, place->order)[slot];
    if (order->num_readers > 0 && (before == 0 || mark + 1 < before))
        return; /* it has left, or was further: what it has passed may be gone */
    if (mark == place->end && place->begin >= order->low_water && place->begin < place->end &&
        place->end - order->low_water <= SHML_READ_POSITIONS)
        set_read(c, place->order, place->begin, place->end, order->num_readers > 0 ? order->num_readers : 1, 1);
    shml_mark_store(seg, place->order, slot, mark + 1);
}

/* The slot for the next order, SHML_MAX_ORDERS: none. In an open set one none of whose places is CLAIMED, if there is
 * any: who reads a stream that was left, and blocks in it, keeps the place, for ever perhaps, and another service that
 * has nothing to do could not read the new stream's chunk there. */
static uint32_t free_slot(shml_control_t *c)
{
    uint32_t first = SHML_MAX_ORDERS;
    for (uint32_t slot = 0; slot < SHML_MAX_ORDERS; slot++) {
        if (shml_order_table(c)[slot].state != SHML_ORDER_FREE)
            continue;
        if (!shml_open_has_claimed(c, slot))
            return slot;
        first = first < slot ? first : slot;
    }
    return first;
}

int shml_order_fill(shml_seg_t *seg, const shml_order_info_t *order, int32_t owner)
{
    shml_control_t *c = seg->control;
    uint32_t slot = free_slot(c);
    if (slot == SHML_MAX_ORDERS)
        return SHML_E_FULL;
    shml_order_t *o = &shml_order_table(c)[slot];
    uint32_t gen = o->gen;
    int status;
    do /* of a generation whose low bits come again something may still be in use: by one client or another */
        status = shml_open_renew(seg, slot, ++gen);
    while (status == SHML_E_FULL && gen - o->gen < SHML_MAX_CLIENTS);
    if (status != SHML_OK)
        return status;
    memset(shml_marks(c, slot), 0, SHML_MAX_CLIENTS * sizeof(uint64_t));
    memset(shml_read_bits(c, slot), 0, SHML_READ_POSITIONS / 8);
    SHML_FP("order.begin.marks");
    o->gen = gen;
    o->kind = order->kind;
    o->rank = order->rank;
    o->world_size = order->world_size;
    o->drop_last = order->drop_last;
    o->owner = owner;
    o->num_readers = o->is_finished = 0;
    o->key = 0;
    memset(o->joined, 0, sizeof o->joined);
    o->seed = order->seed;
    o->epoch = order->epoch;
    o->num_positions = order->num_positions;
    o->low_water = 0;
    SHML_FP("order.begin.filled");
    return (int)slot;
}

void shml_order_start(shml_seg_t *seg, uint32_t slot)
{
    shml_control_t *c = seg->control;
    atomic_store_explicit(&shml_order_table(c)[slot].state, SHML_ORDER_LIVE, memory_order_release);
    SHML_FP("order.begin.live");
    atomic_fetch_add_explicit(&c->num_orders, 1, memory_order_relaxed);
    SHML_FP("order.begin.counted");
    shml_work_tell(seg);
}

int shml_order_begin(shml_seg_t *seg, shml_order_info_t *order)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    shml_control_t *c = seg->control;
    if (seg->self < 0) {
        shml_unlock(seg);
        return SHML_E_LEFT;
    }
    uint32_t was = shml_begin_change(c);
    SHML_FP("order.begin.dirty");
    int slot = shml_order_fill(seg, order, seg->self);
    if (slot >= 0) {
        shml_order_start(seg, (uint32_t)slot);
        shml_order_tell(c, (uint32_t)slot, order);
    }
    if (slot != SHML_E_POISONED)
        shml_end_change(c, was);
    shml_unlock(seg);
    return slot >= 0 ? SHML_OK : slot;
}

void shml_order_stop(shml_seg_t *seg, uint32_t slot)
{
    shml_control_t *c = seg->control;
    uint32_t was = shml_begin_change(c);
    SHML_FP("order.end.dirty");
    atomic_store_explicit(&shml_order_table(c)[slot].state, SHML_ORDER_FREE, memory_order_release);
    SHML_FP("order.end.free");
    atomic_fetch_sub_explicit(&c->num_orders, 1, memory_order_relaxed);
    SHML_FP("order.end.counted");
    shml_end_change(c, was);
    shml_work_tell(seg);
}

int shml_order_end(shml_seg_t *seg, uint32_t slot, uint32_t gen)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    const shml_order_t *order = shml_order_living(seg->control, slot, gen);
    if (order != NULL)
        shml_order_stop(seg, slot);
    shml_unlock(seg);
    return order != NULL ? SHML_OK : SHML_E_STALE;
}

void shml_order_tell(const shml_control_t *c, uint32_t slot, shml_order_info_t *order)
{
    const shml_order_t *o = (const shml_order_t *)((const uint8_t *)c + c->orders_at) + slot;
    *order = (shml_order_info_t){
        .seed = o->seed,
        .epoch = o->epoch,
        .num_positions = o->num_positions,
        .kind = o->kind,
        .rank = o->rank,
        .world_size = o->world_size,
        .drop_last = o->drop_last,
        .slot = slot,
        .gen = o->gen,
        .low_water = o->low_water,
        .num_readers = o->num_readers,
        .is_finished = o->is_finished,
    };
}

int shml_orders(shml_seg_t *seg, shml_order_info_t *orders, uint32_t max)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    uint32_t found = 0;
    for (uint32_t slot = 0; slot < SHML_MAX_ORDERS && found < max; slot++)
        if (shml_order_table(seg->control)[slot].state == SHML_ORDER_LIVE)
            shml_order_tell(seg->control, slot, &orders[found++]);
    shml_unlock(seg);
    return (int)found;
}

uint32_t shml_num_orders(const shml_seg_t *seg)
{
    return atomic_load_explicit(&seg->control->num_orders, memory_order_relaxed);
}

void shml_orders_release(shml_seg_t *seg, uint32_t slot)
{
    shml_control_t *c = seg->control;
    for (uint32_t i = 0; i < SHML_MAX_ORDERS; i++) {
        const shml_order_t *order = &shml_order_table(c)[i];
        if (order->state != SHML_ORDER_LIVE)
            continue;
        shml_mark_store(seg, i, slot, 0);
        if (order->state == SHML_ORDER_LIVE && order->owner == (int32_t)slot)
            shml_order_stop(seg, i);
    }
}
