/* client.c - who is attached, who still lives, and what is done for the dead.
 *
 * A kill ...                                leaves ...                        repaired by
 *   after the byte, before ACTIVE           a free byte, a FREE slot          nothing to repair
 *   at any time when ACTIVE                 a free byte, an ACTIVE slot       shml_reap of anybody
 *   after leaving with pins                 the same, with pins alone         the same
 *   in shml_reap, at any store              the slot still ACTIVE             the next shml_reap does all again
 */
#include <errno.h>
#include <string.h>

#include "failpoint.h"
#include "layout.h"

int shml_clients_take(shml_client_t *clients, uint32_t max_clients, int lock_fd, const shml_env_t *env, uint32_t role,
                      int32_t owner, uint32_t owner_gen)
{
    for (uint32_t slot = 0; slot < max_clients; slot++) {
        shml_client_t *client = &clients[slot];
        if (client->state != SHML_CLIENT_FREE)
            continue;
        /* The byte of a free slot can only be held by a process that is just leaving or was never reaped. */
        if (env->hold(env->ctx, lock_fd, slot, 1) != 0)
            continue;
        SHML_FP("client.take.held");
        client->gen++;
        client->role = role;
        client->pid = env->pid(env->ctx);
        client->starttime = env->starttime(env->ctx);
        client->owner = owner;
        client->owner_gen = owner_gen;
        client->num_wants = 0;
        client->want_gen += client->want_gen & 1;
        SHML_FP("client.take.filled");
        atomic_store_explicit(&client->state, SHML_CLIENT_ACTIVE, memory_order_release);
        SHML_FP("client.take.active");
        return (int)slot;
    }
    return SHML_E_CLIENTS;
}

/* A client that has left with pins enters again: its slot and its byte are still its own. */
static int come_back(shml_seg_t *seg, uint32_t role, int32_t owner, uint32_t owner_gen)
{
    if (seg->pin_counts == NULL)
        return 0;
    pthread_mutex_lock(seg->pin_lock);
    uint32_t leaving = seg->leaving;
    if (leaving != 0) {
        shml_client_t *client = &shml_clients(seg->control)[leaving - 1];
        client->gen++;
        client->owner = owner;
        client->owner_gen = owner_gen;
        SHML_FP("client.back.filled");
        client->role = role;
        SHML_FP("client.back.role");
        seg->self = (int32_t)leaving - 1;
        seg->leaving = 0;
    }
    pthread_mutex_unlock(seg->pin_lock);
    return leaving != 0;
}

int shml_client_register(shml_seg_t *seg, uint32_t role, int32_t owner, uint32_t owner_gen)
{
    shml_control_t *c = seg->control;
    for (int attempt = 0;; attempt++) {
        int status = shml_lock(seg);
        if (status != SHML_OK)
            return status;
        if (come_back(seg, role, owner, owner_gen)) {
            shml_unlock(seg);
            return SHML_OK;
        }
        uint32_t max_slots = role == SHML_WORKER ? SHML_MAX_CLIENTS - SHML_KEPT_CLIENTS : SHML_MAX_CLIENTS;
        int slot = shml_clients_take(shml_clients(c), max_slots, seg->lock_fd, seg->env, role, owner, owner_gen);
        shml_unlock(seg);
        if (slot >= 0) {
            seg->self = slot;
            return SHML_OK;
        }
        /* Full: perhaps of dead ones. */
        if (attempt > 0)
            return slot;
        status = shml_reap(seg, 1);
        if (status < 0)
            return status;
    }
}

static int supervisor_lives(shml_seg_t *seg, const shml_client_t *client)
{
    if (client->owner >= (int32_t)SHML_MAX_CLIENTS)
        return 0;
    const shml_client_t *owner = &shml_clients(seg->control)[client->owner];
    return owner->state == SHML_CLIENT_ACTIVE && owner->gen == client->owner_gen &&
           seg->env->alive(seg->env->ctx, seg->lock_fd, (uint32_t)client->owner, owner);
}

/* Undo what the client in `slot` had under way, all but its pins. It is dead, or this process and leaving. */
static int clean_up(shml_seg_t *seg, uint32_t slot, int is_dead)
{
    const shml_client_t *client = &shml_clients(seg->control)[slot];
    /* A prefetcher that went down with its supervisor says nothing about what it was at. */
    int is_own_death = is_dead && (client->owner < 0 || supervisor_lives(seg, client));
    /* Which of the two it was that killed it nobody knows: the rows, which are tried alone then. A chunk that kills who
     * fetches it does so also when no rows are left to decode. */
    int had_rows = client->num_working > 0;
    int status = shml_claims_release(seg, slot, is_own_death);
    if (status != SHML_OK)
        return status;
    SHML_FP("client.clean.rows");
    shml_chunk_release(seg, slot, is_own_death && !had_rows);
    SHML_FP("client.clean.chunks");
    shml_orders_release(seg, slot);
    SHML_FP("client.clean.orders");
    shml_wants_end(seg, slot);
    SHML_FP("client.clean.wants");
    return SHML_OK;
}

/* Last: until here the next one finds the same dead client and does all of it again. */
static void free_slot(shml_seg_t *seg, uint32_t slot)
{
    atomic_store_explicit(&shml_clients(seg->control)[slot].state, SHML_CLIENT_FREE, memory_order_release);
    SHML_FP("client.clean.free");
}

void shml_client_unregister(shml_seg_t *seg)
{
    int status = shml_lock(seg), keeps = 0;
    int32_t slot = seg->self;
    if (slot >= 0 && status == SHML_OK)
        (void)clean_up(seg, (uint32_t)slot, 0); /* what it finds damaged poisons the segment */
    if (slot >= 0)
        keeps = shml_pins_keep(seg, (uint32_t)slot);
    seg->self = -1; /* under the mutex: another thread's call has either ended or will see it */
    if (keeps)
        shml_clients(seg->control)[slot].role = 0; /* counts as nobody's reader any more */
    else if (slot >= 0 && status == SHML_OK)
        free_slot(seg, (uint32_t)slot);
    if (status == SHML_OK)
        shml_unlock(seg);
    if (slot >= 0 && !keeps)
        seg->env->hold(seg->env->ctx, seg->lock_fd, (uint32_t)slot, 0);
}

uint32_t shml_client_gen(const shml_seg_t *seg, int32_t slot)
{
    return slot >= 0 && slot < (int32_t)SHML_MAX_CLIENTS ? shml_clients(seg->control)[slot].gen : 0;
}

int shml_reap(shml_seg_t *seg, int now)
{
    shml_control_t *c = seg->control;
    const shml_env_t *env = seg->env;
    uint64_t last = atomic_load_explicit(&c->reaped_at_ns, memory_order_relaxed), t = env->now_ns(env->ctx);
    if (!now && t - last < (uint64_t)SHML_TICK_MS * 1000000u)
        return 0;
    if (!atomic_compare_exchange_strong(&c->reaped_at_ns, &last, t) && !now)
        return 0; /* somebody else does it */
    /* Probe outside of the mutex (some 400 ns a client), confirm inside. */
    shml_client_t *clients = shml_clients(c);
    int num_reaped = 0;
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++) {
        shml_client_t *client = &clients[slot];
        if ((int32_t)slot == seg->self || client->state != SHML_CLIENT_ACTIVE)
            continue;
        uint32_t gen = client->gen;
        if (env->alive(env->ctx, seg->lock_fd, slot, client))
            continue;
        int status = shml_lock(seg);
        if (status != SHML_OK)
            return status;
        if (client->state == SHML_CLIENT_ACTIVE && client->gen == gen &&
            !env->alive(env->ctx, seg->lock_fd, slot, client)) {
            c->num_services_lost += client->role == SHML_SERVICE;
            c->num_reaped++;
            num_reaped++;
            status = clean_up(seg, slot, 1);
            if (status == SHML_OK) {
                shml_pins_clear(seg, slot);
                free_slot(seg, slot);
            }
        }
        shml_unlock(seg);
        if (status != SHML_OK)
            return status;
    }
    return num_reaped;
}

uint32_t shml_count_clients(const shml_seg_t *seg, uint32_t role)
{
    const shml_client_t *clients = shml_clients(seg->control);
    uint32_t count = 0;
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++)
        count += clients[slot].state == SHML_CLIENT_ACTIVE && clients[slot].role == role;
    return count;
}
