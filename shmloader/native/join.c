/* join.c - joined orders: one iteration of a dataset, which several readers share out among themselves.
 *
 * Reader r reads the positions r, r + num_readers, ...; the first to come begins the order. It is owned by the client
 * that all of them read for, so that it outlives who came first, and lives as long as one of its readers has a mark: a
 * mark is a membership. Until all have joined its low-water mark is 0, since who is still to come begins at the front.
 *
 * Truth: the bits `joined` and the marks. The order is LIVE with both already stored, so that no joined order ever
 * lives without a mark but in the bracket that ends it.
 *
 * A kill ...                                leaves ...                               repaired by
 *   in beginning, before LIVE               a FREE order                             nothing to repair
 *   in joining, after the bit               a reader without a mark, as if it had    nobody: its process is dead, and
 *                                           joined and left                          who starts it anew joins another
 *   in joining, after the mark              a low-water mark too low, `dirty`        rebuild; reap takes the mark
 *   in leaving, after the mark              LIVE without marks, `dirty`              rebuild ends it
 *   in finishing, after num_positions       readers asleep, is_finished 0            their tick; a hint
 */
#include "failpoint.h"
#include "layout.h"

int shml_is_whole(const shml_order_t *order)
{
    uint32_t num_joined = 0;
    for (uint32_t i = 0; i < SHML_MAX_READERS / 64; i++)
        num_joined += (uint32_t)__builtin_popcountll(order->joined[i]);
    return num_joined >= order->num_readers;
}

int shml_has_marks(shml_control_t *c, uint32_t order)
{
    const uint64_t *marks = shml_marks(c, order);
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++)
        if (marks[slot] != 0 && shml_is_active(c, slot))
            return 1;
    return 0;
}

static int has_joined(const shml_order_t *order, uint32_t reader)
{
    return (int)(order->joined[reader / 64] >> (reader % 64) & 1);
}

static void set_joined(shml_order_t *order, uint32_t reader)
{
    order->joined[reader / 64] |= UINT64_C(1) << (reader % 64);
    SHML_FP("join.reader.set");
}

/* The order that lacks this reader; SHML_MAX_ORDERS: none. */
static uint32_t find_order(shml_control_t *c, const shml_join_t *join)
{
    uint32_t slot = 0;
    for (; slot < SHML_MAX_ORDERS; slot++) {
        const shml_order_t *order = &shml_order_table(c)[slot];
        if (order->state == SHML_ORDER_LIVE && order->num_readers == join->num_readers && order->key == join->key &&
            order->owner == join->owner && !has_joined(order, join->reader))
            break;
    }
    return slot;
}

static int begin(shml_seg_t *seg, const shml_join_t *join, const shml_order_info_t *info)
{
    int slot = shml_order_fill(seg, info, join->owner);
    if (slot < 0)
        return slot;
    shml_order_t *order = &shml_order_table(seg->control)[slot];
    order->num_readers = join->num_readers;
    order->key = join->key;
    set_joined(order, join->reader);
    shml_marks(seg->control, (uint32_t)slot)[seg->self] = 1 + (uint64_t)join->reader;
    SHML_FP("join.begin.mark");
    order->low_water = shml_low_water(seg->control, (uint32_t)slot); /* there may be no other reader */
    shml_order_start(seg, (uint32_t)slot);
    return slot;
}

static int join_locked(shml_seg_t *seg, const shml_join_t *join, const shml_order_info_t *info)
{
    shml_control_t *c = seg->control;
    if (seg->self < 0)
        return SHML_E_LEFT;
    if (join->owner < 0 || !shml_is_active(c, (uint32_t)join->owner) ||
        shml_clients(c)[join->owner].gen != join->owner_gen)
        return SHML_E_INVAL;
    uint32_t slot = find_order(c, join);
    if (slot == SHML_MAX_ORDERS)
        return begin(seg, join, info);
    if (shml_marks(c, slot)[seg->self] != 0)
        return SHML_E_INVAL;
    set_joined(&shml_order_table(c)[slot], join->reader);
    shml_mark_store(seg, slot, (uint32_t)seg->self, 1 + (uint64_t)join->reader);
    return (int)slot;
}

int shml_order_join(shml_seg_t *seg, const shml_join_t *join, shml_order_info_t *order)
{
    if (join->num_readers > SHML_MAX_READERS || join->reader >= join->num_readers)
        return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    uint32_t was = shml_begin_change(seg->control);
    SHML_FP("join.dirty");
    int slot = join_locked(seg, join, order);
    if (slot >= 0)
        shml_order_tell(seg->control, (uint32_t)slot, order);
    if (slot != SHML_E_POISONED)
        shml_end_change(seg->control, was);
    shml_unlock(seg);
    return slot >= 0 ? SHML_OK : slot;
}

int shml_order_leave(shml_seg_t *seg, uint32_t slot, uint32_t gen)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    const shml_order_t *order = shml_order_living(seg->control, slot, gen);
    if (seg->self < 0)
        status = SHML_E_LEFT;
    else if (order == NULL || order->num_readers == 0 || shml_marks(seg->control, slot)[seg->self] == 0)
        status = SHML_E_STALE;
    else
        shml_mark_store(seg, slot, (uint32_t)seg->self, 0);
    shml_unlock(seg);
    return status;
}

int shml_order_finish(shml_seg_t *seg, uint32_t slot, uint32_t gen, uint64_t num_positions)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    shml_order_t *order = shml_order_living(seg->control, slot, gen);
    if (order == NULL || order->num_readers == 0) {
        shml_unlock(seg);
        return SHML_E_STALE;
    }
    if (num_positions < order->num_positions)
        order->num_positions = num_positions;
    SHML_FP("join.finish.positions");
    order->is_finished = 1;
    SHML_FP("join.finish.set");
    uint64_t end = order->num_positions;
    if (!shml_is_open(seg->control))
        shml_wants_wake(seg, 0, UINT64_MAX); /* which rows its positions are, the core does not know */
    else if (end <= SHML_MAX_POSITION)
        shml_wants_wake(seg, shml_open_id(slot, gen, end), SHML_MAX_POSITION - end + 1);
    shml_touch(seg);
    shml_work_tell(seg);
    shml_unlock(seg);
    return SHML_OK;
}
