/* want.c - what clients wait for: want-lists, want stamps, futex words.
 *
 * A reader posts the ids it misses and sleeps on its own futex word; the commit of the last of them wakes it. What it
 * has found in transit meanwhile gets its want stamp, so that it stays until the rest is there. The stamp holds while
 * the client's want_gen is the stamp's, so that all stamps of a look-up end with one store.
 *
 * A kill ...                                leaves ...                               repaired by
 *   while posting                           a list without or with its length,      reap drops it and ends the
 *                                           some of the stamps                      stamps
 *   while stamping a record                 it without a stamp, or with one         the look-up's end
 *   while meeting wants                     an id twice or still in the list        the reader's tick: it looks again
 *   before a wake                           a sleeper                               its tick (100 ms; services 1 s)
 */
#include "failpoint.h"
#include "layout.h"

void shml_wake_client(shml_seg_t *seg, shml_client_t *client)
{
    atomic_fetch_add_explicit(&client->wake, 1, memory_order_release);
    SHML_FP("want.wake.counted");
    seg->env->wake(seg->env->ctx, (uint32_t *)&client->wake);
}

static uint32_t num_wants(const shml_client_t *client)
{
    return client->num_wants < SHML_MAX_WANTS ? client->num_wants : SHML_MAX_WANTS;
}

static int may_want(const shml_client_t *client, uint64_t id)
{
    return client->num_wants > 0 && id >= client->least_want && id <= client->most_want &&
           client->state == SHML_CLIENT_ACTIVE;
}

void shml_wants_met(shml_seg_t *seg, uint64_t id)
{
    shml_control_t *c = seg->control;
    shml_guests_met(seg, id, 1);
    shml_client_t *clients = shml_clients(c);
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++) {
        shml_client_t *client = &clients[slot];
        if (!may_want(client, id))
            continue;
        uint64_t *wants = shml_wants(c, slot);
        uint32_t n = num_wants(client), left = 0;
        for (uint32_t i = 0; i < n; i++) /* the rest keeps its order: shml_wants_post compares */
            if (wants[i] != id)
                wants[left++] = wants[i];
        if (left == n)
            continue;
        SHML_FP("want.met.out");
        client->num_wants = left;
        SHML_FP("want.met.counted");
        if (left == 0)
            shml_wake_client(seg, client);
    }
}

void shml_wants_wake(shml_seg_t *seg, uint64_t first, uint64_t n)
{
    shml_control_t *c = seg->control;
    shml_client_t *clients = shml_clients(c);
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++) {
        if (clients[slot].state != SHML_CLIENT_ACTIVE)
            continue;
        const uint64_t *wants = shml_wants(c, slot);
        for (uint32_t i = 0; i < num_wants(&clients[slot]); i++) {
            if (wants[i] - first < n) {
                shml_wake_client(seg, &clients[slot]);
                break;
            }
        }
    }
}

void shml_wants_press(shml_seg_t *seg)
{
    shml_client_t *clients = shml_clients(seg->control);
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++)
        if (clients[slot].state == SHML_CLIENT_ACTIVE && (clients[slot].num_wants > 0 || (clients[slot].want_gen & 1)))
            shml_wake_client(seg, &clients[slot]);
}

int shml_is_awaited(shml_control_t *c, uint64_t id)
{
    for (uint32_t list = 0; list < SHML_NUM_WANT_LISTS; list++) {
        uint32_t n;
        const uint64_t *wants = shml_want_list(c, list, &n);
        if (list < SHML_MAX_CLIENTS && !may_want(&shml_clients(c)[list], id))
            continue;
        for (uint32_t i = 0; i < n; i++)
            if (wants[i] == id)
                return 1;
    }
    return 0;
}

/* Stamp as wanted by the client in `slot`, in the place of a stamp that holds no longer, if there is one. */
static void stamp(shml_control_t *c, shml_desc_t *desc, uint32_t slot)
{
    shml_client_t *client = &shml_clients(c)[slot];
    for (int i = 0; i < 2; i++)
        if (desc->want[i] == slot + 1 && shml_want_holds(c, desc, i) && (client->want_gen & 1) != 0)
            return;
    int i = shml_want_holds(c, desc, 0);
    if (i == 1 && shml_want_holds(c, desc, 1))
        return;
    client->want_gen += ~client->want_gen & 1;
    SHML_FP("want.stamp.begun");
    desc->want[i] = 0; /* a kill leaves no mixture of two stamps */
    SHML_FP("want.stamp.none");
    desc->want_gen[i] = (uint16_t)client->want_gen;
    atomic_signal_fence(memory_order_seq_cst);
    SHML_FP("want.stamp.gen");
    desc->want[i] = (uint16_t)(slot + 1);
}

void shml_wants_stamp(shml_control_t *c, shml_desc_t *desc)
{
    const shml_client_t *clients = shml_clients(c);
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS && !shml_want_holds(c, desc, 1); slot++) {
        if (!may_want(&clients[slot], desc->id))
            continue;
        const uint64_t *wants = shml_wants(c, slot);
        for (uint32_t i = 0; i < num_wants(&clients[slot]); i++) {
            if (wants[i] == desc->id) {
                stamp(c, desc, slot);
                break;
            }
        }
    }
}

/* End its stamps; 1: there may have been some, and what had them may be evicted now. */
static int end_stamps(shml_client_t *client)
{
    if ((client->want_gen & 1) == 0)
        return 0;
    client->want_gen++;
    SHML_FP("want.end.stamps");
    return 1;
}

static int end_look_up(shml_client_t *client)
{
    client->num_wants = 0;
    SHML_FP("want.end.list");
    return end_stamps(client);
}

void shml_wants_end(shml_seg_t *seg, uint32_t slot)
{
    if (end_look_up(&shml_clients(seg->control)[slot]))
        shml_work_tell(seg);
}

void shml_wants_post(shml_seg_t *seg, uint32_t slot, const uint64_t *ids, uint32_t n, const shml_ref_t *refs,
                     uint32_t num_missing, int is_take)
{
    shml_control_t *c = seg->control;
    shml_client_t *client = &shml_clients(c)[slot];
    uint64_t *wants = shml_wants(c, slot);
    uint32_t num_old = num_wants(client), old = 0, posted = 0;
    int is_ended = end_look_up(client), is_new = 0;
    client->least_want = UINT64_MAX;
    client->most_want = 0;
    for (uint32_t i = 0; i < n && num_missing > 0; i++) {
        if (refs[i].status == SHML_REF_MISSING && posted < SHML_MAX_WANTS) {
            /* New unless in the old list behind the one before. What was met is out, the order is the caller's. */
            while (!is_new && old < num_old && wants[old] != ids[i])
                old++;
            is_new |= old++ >= num_old;
            wants[posted++] = ids[i];
            client->least_want = ids[i] < client->least_want ? ids[i] : client->least_want;
            client->most_want = ids[i] > client->most_want ? ids[i] : client->most_want;
        } else if (!is_take && refs[i].status <= SHML_REF_ERROR && !shml_is_resident(c, refs[i].offset)) {
            stamp(c, &shml_descs(c)[refs[i].desc], slot);
        }
    }
    SHML_FP("want.post.listed");
    client->num_wants = posted;
    SHML_FP("want.post.posted");
    if (is_new || is_ended)
        shml_work_tell(seg);
}

const uint64_t *shml_want_list(shml_control_t *c, uint32_t list, uint32_t *n)
{
    if (list == SHML_MAX_CLIENTS) {
        *n = shml_guest_num_wants(c);
        return c->guest_wants;
    }
    const shml_client_t *client = &shml_clients(c)[list];
    *n = client->state == SHML_CLIENT_ACTIVE ? num_wants(client) : 0;
    return shml_wants(c, list);
}

int shml_wanted(shml_seg_t *seg, uint64_t *ids, uint32_t max)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    shml_control_t *c = seg->control;
    const shml_chunk_t *chunk = NULL;
    uint32_t found = 0;
    for (uint32_t list = 0; list < SHML_NUM_WANT_LISTS && found < max && status == SHML_OK; list++) {
        uint32_t n;
        const uint64_t *wants = shml_want_list(c, list, &n);
        for (uint32_t i = 0; i < n && found < max && status == SHML_OK; i++) {
            const shml_desc_t *desc = shml_find(seg, wants[i], &status);
            if (status != SHML_OK || !shml_is_sample(wants[i]) || (desc != NULL && desc->state != SHML_DESC_SUSPECT) ||
                shml_row_comes(c, wants[i]) != SHML_ROW_COMES)
                continue;
            if (chunk == NULL || wants[i] - chunk->first_row >= chunk->num_rows) { /* often that of the one before */
                int32_t index = shml_chunk_of(c, wants[i]);
                chunk = index >= 0 ? &shml_chunks(c)[index] : NULL;
            }
            if (chunk == NULL || shml_word_state(chunk->word) != SHML_CHUNK_BROKEN)
                ids[found++] = wants[i];
        }
    }
    shml_unlock(seg);
    return status == SHML_OK ? (int)found : status;
}

/* ------------------------------------------------ waiting --------------------------------------------- */

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

uint32_t shml_work_word(const shml_seg_t *seg)
{
    return atomic_load_explicit(&seg->control->work, memory_order_acquire);
}

void shml_work_wait(shml_seg_t *seg, uint32_t seen, uint32_t timeout_ms)
{
    shml_control_t *c = seg->control;
    atomic_fetch_add(&c->sleepers, 1); /* SYNC(sleepers): before the kernel compares the word, which also orders */
    SHML_FP("want.work.counted");
    seg->env->wait(seg->env->ctx, (uint32_t *)&c->work, seen, timeout_ms);
    atomic_fetch_sub(&c->sleepers, 1);
    SHML_FP("want.work.awake");
}

void shml_work_tell(shml_seg_t *seg)
{
    shml_control_t *c = seg->control;
    atomic_fetch_add(&c->work, 1);
    SHML_FP("want.tell.counted");
    if (atomic_load(&c->sleepers) > 0) /* SYNC(sleepers): who is not counted yet will see the word's new value */
        seg->env->wake(seg->env->ctx, (uint32_t *)&c->work);
}

void shml_touch(shml_seg_t *seg) { atomic_fetch_add_explicit(&seg->control->progress, 1, memory_order_relaxed); }

void shml_count_fetched(shml_seg_t *seg, uint64_t num_bytes)
{
    atomic_fetch_add_explicit(&seg->control->fetched_bytes, num_bytes, memory_order_relaxed);
}

void shml_count_decoding(shml_seg_t *seg, uint64_t ns)
{
    atomic_fetch_add_explicit(&seg->control->decoding_ns, ns, memory_order_relaxed);
}
