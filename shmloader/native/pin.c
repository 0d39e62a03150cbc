/* pin.c - pins: a bit for each client in a record's mask, and this process's own counts.
 *
 * A bit is set under the mutex, in the section that looked the record up, when the process's count goes from 0 to 1.
 * It is cleared when the count comes back to 0, without the mutex. The process's lock spans the change of the count
 * and that of the bit: else the unpin of one thread could clear what another has just set.
 *
 * A client that leaves with pins (views that are still alive) keeps its slot and its byte until the last of them is
 * given back: seg->leaving.
 *
 * A kill ...                                leaves ...                               repaired by
 *   while pinning                           some of the bits                         reap clears them
 *   in unpin, between count and bit         the bit                                  reap clears it
 *   in unpin, before the wake               a service that waits for room            its own bound
 *   after the last unpin of one that left   an ACTIVE slot, a free byte              reap
 */
#include "failpoint.h"
#include "layout.h"

#ifdef SHML_BREAK_RELEASE /* defined by a negative control of the tests: ThreadSanitizer must then see a race */
#define UNPIN_ORDER memory_order_relaxed
#else
#define UNPIN_ORDER memory_order_release
#endif

static uint64_t bit_of(uint32_t slot) { return UINT64_C(1) << slot % 64; }

static int is_pinnable(const shml_ref_t *ref) { return ref->status == SHML_REF_READY || ref->status == SHML_REF_ERROR; }

/* One less; 1: its bit was cleared. Under pin_lock. */
static int unpin_one(shml_seg_t *seg, uint32_t slot, const shml_ref_t *ref)
{
    shml_control_t *c = seg->control;
    if (ref->desc >= c->num_descs || seg->pin_counts[ref->desc] == 0)
        return SHML_E_INVAL;
    if (shml_descs(c)[ref->desc].gen != ref->gen)
        return SHML_E_STALE;
    if (--seg->pin_counts[ref->desc] > 0)
        return 0;
    seg->pinned_bytes -= ref->num_bytes;
    seg->num_pinned--;
    SHML_FP("pin.unpin.counted");
#ifndef SHML_BREAK_UNPIN /* defined by a negative control of the tests: the suites must then fail */
    /* SYNC(unpin): all that was read of the record is before this; pairs with the acquire of who evicts it. */
    atomic_fetch_and_explicit(&shml_pins(c, ref->desc)[slot / 64], ~bit_of(slot), UNPIN_ORDER);
#else
    (void)slot;
#endif
    SHML_FP("pin.unpin.cleared");
    return 1;
}

static int pin_one(shml_seg_t *seg, uint32_t slot, const shml_ref_t *ref)
{
    if (seg->pin_counts[ref->desc] == UINT16_MAX)
        return SHML_E_FULL;
    if (seg->pin_counts[ref->desc]++ > 0)
        return SHML_OK;
    seg->pinned_bytes += ref->num_bytes;
    seg->num_pinned++;
    /* Relaxed: who evicts has the mutex. */
    atomic_fetch_or_explicit(&shml_pins(seg->control, ref->desc)[slot / 64], bit_of(slot), memory_order_relaxed);
    SHML_FP("pin.pin.set");
    return SHML_OK;
}

int shml_pin_refs(shml_seg_t *seg, uint32_t slot, shml_ref_t *refs, uint32_t n)
{
    int status = SHML_OK;
    uint32_t i = 0;
    while (i < n && (!is_pinnable(&refs[i]) || shml_is_resident(seg->control, refs[i].offset)))
        i++;
    if (i == n)
        return SHML_OK;
    if (seg->pin_counts == NULL)
        return SHML_E_INVAL;
    pthread_mutex_lock(seg->pin_lock);
    for (; i < n && status == SHML_OK; i++) {
        if (!is_pinnable(&refs[i]) || shml_is_resident(seg->control, refs[i].offset))
            continue;
        status = pin_one(seg, slot, &refs[i]);
        refs[i].chunk = status == SHML_OK;
    }
    while (status != SHML_OK && i-- > 0) /* all or none */
        if (is_pinnable(&refs[i]) && refs[i].chunk == 1) {
            (void)unpin_one(seg, slot, &refs[i]);
            refs[i].chunk = 0;
        }
    pthread_mutex_unlock(seg->pin_lock);
    return status;
}

/* The slot of a client that has left, and has given back its last pin. */
static void free_slot(shml_seg_t *seg, uint32_t slot)
{
    if (shml_lock(seg) == SHML_OK) {
        atomic_store_explicit(&shml_clients(seg->control)[slot].state, SHML_CLIENT_FREE, memory_order_release);
        SHML_FP("pin.left.free");
        shml_unlock(seg);
    }
    seg->env->hold(seg->env->ctx, seg->lock_fd, slot, 0);
}

int shml_unpin(shml_seg_t *seg, const shml_ref_t *refs, uint32_t n)
{
    int status = SHML_OK, num_cleared = 0;
    uint32_t left = 0;
    if (seg->pin_counts == NULL)
        return n == 0 ? SHML_OK : SHML_E_INVAL;
    pthread_mutex_lock(seg->pin_lock);
    int32_t slot = seg->self >= 0 ? seg->self : (int32_t)seg->leaving - 1;
    for (uint32_t i = 0; i < n; i++) {
        if (refs[i].chunk != 1 || !is_pinnable(&refs[i]))
            continue;
        int one = slot >= 0 ? unpin_one(seg, (uint32_t)slot, &refs[i]) : SHML_E_INVAL;
        status = one < 0 ? one : status;
        num_cleared += one > 0;
    }
    if (seg->leaving != 0 && seg->pinned_bytes == 0) {
        left = seg->leaving;
        seg->leaving = 0;
    }
    pthread_mutex_unlock(seg->pin_lock);
    if (num_cleared > 0)
        shml_work_tell(seg);
    if (left != 0)
        free_slot(seg, left - 1);
    return status;
}

int shml_pin_again(shml_seg_t *seg, const shml_ref_t *ref)
{
    if (seg->pin_counts == NULL || ref->desc >= seg->control->num_descs)
        return SHML_E_INVAL;
    int status = SHML_OK;
    pthread_mutex_lock(seg->pin_lock);
    uint16_t *count = &seg->pin_counts[ref->desc];
    if (*count == 0)
        status = SHML_E_INVAL;
    else if (*count == UINT16_MAX)
        status = SHML_E_FULL;
    else
        ++*count;
    pthread_mutex_unlock(seg->pin_lock);
    return status;
}

/* One reader's share of half of `all`. */
static uint64_t quota(const shml_seg_t *seg, uint64_t all)
{
    uint64_t num_readers = shml_count_clients(seg, SHML_OWNER) + shml_count_clients(seg, SHML_WORKER);
    return all / 2 / (num_readers > 0 ? num_readers : 1);
}

uint64_t shml_pin_quota(const shml_seg_t *seg)
{
    const shml_region_t *transit = &seg->control->regions[SHML_TRANSIT];
    return quota(seg, shml_limit(transit) - transit->begin);
}

uint64_t shml_pin_quota_samples(const shml_seg_t *seg)
{
    uint64_t most = seg->control->most_transit;
    return most > 0 ? quota(seg, most) : UINT64_MAX;
}

int shml_pins_keep(shml_seg_t *seg, uint32_t slot)
{
    if (seg->pin_counts == NULL)
        return 0;
    pthread_mutex_lock(seg->pin_lock);
    int has_pins = seg->pinned_bytes > 0;
    seg->leaving = has_pins ? slot + 1 : 0;
    seg->self = -1; /* in the same section, so that an unpin finds its slot in one or the other */
    pthread_mutex_unlock(seg->pin_lock);
    return has_pins;
}

void shml_pins_clear(shml_seg_t *seg, uint32_t slot)
{
    shml_control_t *c = seg->control;
    int num_cleared = 0;
#ifndef SHML_BREAK_REAP /* defined by a negative control of the tests: the crash suite must then fail */
    const shml_desc_t *descs = shml_descs(c);
    for (uint32_t region = SHML_TRANSIT; region < SHML_NUM_REGIONS; region++) {
        uint32_t steps = 0;
        for (uint32_t at = c->regions[region].first; at != 0 && at <= c->num_descs && steps++ <= c->num_descs;
             at = descs[at - 1].after) {
            _Atomic uint64_t *mask = &shml_pins(c, at - 1)[slot / 64];
            if ((atomic_load_explicit(mask, memory_order_relaxed) & bit_of(slot)) == 0)
                continue;
            atomic_fetch_and_explicit(mask, ~bit_of(slot), memory_order_release);
            SHML_FP("pin.clear.bit");
            num_cleared++;
        }
    }
#else
    (void)slot, (void)c;
#endif
    if (num_cleared > 0)
        shml_work_tell(seg);
}
