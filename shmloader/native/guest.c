/* guest.c - reading without a slot in the table of clients: by copy, and a check that the copy is whole.
 *
 * A guest is a reader that came when all slots were taken. It has no bit in the masks of pins, no want-list or stamps of
 * its own, no marks in orders and no byte by which others see that it lives. So nothing is kept for it and nothing of it
 * is ever cleaned up: it copies what it finds and asks again for what gave way meanwhile. It may find what it wants
 * evicted any number of times, but it holds up nobody, and each time somebody else got on.
 *
 * THE COPY is a seqlock's read, with a descriptor's (state, gen) as the sequence and the mutex in place of its fences:
 *   get    under the mutex: the record is there (state), in generation gen. The unlock of its commit came before our
 *          lock, so all that its writer stored is seen.
 *   copy   without the mutex.
 *   check  under the mutex: it is still there, in the same generation. Bytes of the ring are given to a writer only by a
 *          reservation, which in the same section first evicts what lies there (its state goes); and a descriptor comes
 *          to a record again only by a reservation, which bumps gen. So if both are as they were, no section between
 *          get and check gave the bytes away. A later one locks the mutex after our unlock, and its writer stores after
 *          that. The loads of the copy may be carried out as late as in the section of the check (its lock, an acquire,
 *          lets them sink into it), but not behind its unlock (a release): they come before any store of a next writer.
 * Where the check fails, the loads may have raced with stores: what they gave is thrown away.
 *
 * THE WANTS of all guests are one list. An id leaves it when it is met or will never come, or when SHML_MAX_WANTS newer
 * ones were listed. Each is one store, and nothing counts them. Services read it as they read the clients' lists.
 *
 * A kill ...                                leaves ...                               repaired by
 *   while listing, before guest_next        an id that the next one overwrites       need not be: it was the dead one's
 *   while listing, after it                 some of its ids                          need not be: made once, then out
 *   of a guest that waits                   its ids                                  the same
 *   of a committer, before an id is out     an id whose row is there                 services pass over it; once its row
 *                                                                                    is evicted: made once, then out
 *   of who wakes, before it does            sleepers                                 repair wakes them; else their tick
 */
#include "failpoint.h"
#include "layout.h"

uint32_t shml_guest_num_wants(const shml_control_t *c)
{
    return c->guest_next < SHML_MAX_WANTS ? (uint32_t)c->guest_next : SHML_MAX_WANTS;
}

void shml_guests_wake(shml_seg_t *seg)
{
    shml_control_t *c = seg->control;
    atomic_fetch_add_explicit(&c->guest_wake, 1, memory_order_release);
    SHML_FP("guest.wake.counted");
    seg->env->wake(seg->env->ctx, (uint32_t *)&c->guest_wake);
}

void shml_guests_met(shml_seg_t *seg, uint64_t first, uint64_t n)
{
    shml_control_t *c = seg->control;
    uint32_t num_met = 0, num_wants = shml_guest_num_wants(c);
    for (uint32_t i = 0; i < num_wants; i++) {
        if (c->guest_wants[i] - first >= n)
            continue;
        c->guest_wants[i] = SHML_NO_WANT;
        SHML_FP("guest.met.out");
        num_met++;
    }
    if (num_met > 0)
        shml_guests_wake(seg);
}

/* List the row `id`; 0: it is listed already. */
static int list_want(shml_control_t *c, uint64_t id)
{
    uint32_t num_wants = shml_guest_num_wants(c);
    for (uint32_t i = 0; i < num_wants; i++)
        if (c->guest_wants[i] == id)
            return 0;
    c->guest_wants[c->guest_next % SHML_MAX_WANTS] = id;
    SHML_FP("guest.want.listed");
    c->guest_next++;
    SHML_FP("guest.want.next");
    return 1;
}

static void count_reads(shml_control_t *c, uint32_t num_samples)
{
    if (num_samples == 0)
        return;
    atomic_fetch_add_explicit(&c->num_reads, num_samples, memory_order_relaxed);
    atomic_fetch_add_explicit(&c->num_guest_reads, num_samples, memory_order_relaxed);
}

int shml_guest_get(shml_seg_t *seg, const uint64_t *ids, uint32_t n, shml_ref_t *refs, uint32_t *num_missing)
{
    shml_control_t *c = seg->control;
    uint32_t num_listed = 0, num_new = 0, num_resident = 0;
    *num_missing = 0;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    for (uint32_t i = 0; i < n; i++) {
        status = shml_look_up(seg, ids[i], &refs[i]);
        if (status != SHML_OK)
            break;
        if (refs[i].status <= SHML_REF_ERROR) {
            refs[i].chunk = !shml_is_resident(c, refs[i].offset);
            num_resident += refs[i].chunk == 0 && shml_is_sample(ids[i]);
        } else if (refs[i].status == SHML_REF_MISSING) {
            ++*num_missing;
            if (ids[i] < c->num_records && num_listed++ < SHML_MAX_WANTS)
                num_new += (uint32_t)list_want(c, ids[i]);
        }
    }
    if (num_new > 0)
        shml_work_tell(seg);
    shml_unlock(seg);
    if (status == SHML_OK)
        count_reads(c, num_resident);
    return status;
}

static int is_as_it_was(shml_control_t *c, const shml_ref_t *ref)
{
    int was_there = ref->status == SHML_REF_READY || ref->status == SHML_REF_ERROR;
#ifdef SHML_BREAK_GUEST /* defined by a negative control of the tests: the suites must then fail */
    (void)c;
    return was_there;
#else
    const shml_desc_t *desc = &shml_descs(c)[ref->desc];
    return was_there && shml_is_there(desc->state) && desc->gen == ref->gen;
#endif
}

int shml_guest_check(shml_seg_t *seg, const shml_ref_t *refs, uint32_t n, uint8_t *valid)
{
    shml_control_t *c = seg->control;
    uint32_t num_copied = 0;
    for (uint32_t i = 0; i < n; i++)
        if (refs[i].desc >= c->num_descs)
            return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    for (uint32_t i = 0; i < n; i++) {
        valid[i] = (uint8_t)is_as_it_was(c, &refs[i]);
        num_copied += valid[i] && refs[i].chunk == 1 && shml_is_sample(shml_descs(c)[refs[i].desc].id);
    }
    shml_unlock(seg);
    count_reads(c, num_copied);
    return SHML_OK;
}

uint32_t shml_guest_word(const shml_seg_t *seg)
{
    return atomic_load_explicit(&seg->control->guest_wake, memory_order_acquire);
}

void shml_guest_wait(shml_seg_t *seg, uint32_t seen, uint32_t timeout_ms)
{
    uint32_t *word = (uint32_t *)&seg->control->guest_wake;
    seg->env->wait(seg->env->ctx, word, seen, timeout_ms < SHML_TICK_MS ? timeout_ms : SHML_TICK_MS);
}
