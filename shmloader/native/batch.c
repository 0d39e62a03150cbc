/* batch.c - the batch ring as a whole: making, locking and repairing it, its clients, and looking at it (batch.h has
 * the layout, the life of a slot, and what a kill leaves; slot.c is that life). */
#include "batch.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>

#include "failpoint.h"

/* ---------------------------------------------------------------------------------------------------- *
 * Format, mutex, repair
 * ---------------------------------------------------------------------------------------------------- */
static uint32_t abi(void)
{
    return (uint32_t)(sizeof(struct shml_batch) ^ offsetof(struct shml_batch, slots) << 8 ^
                      offsetof(struct shml_batch, clients) << 16 ^ sizeof(pthread_mutex_t) << 24);
}

int shml_batch_format(void *at, uint64_t map_bytes, uint64_t budget_bytes)
{
    shml_batch_t *batch = at;
    if (map_bytes < SHML_BATCH_DATA_AT || map_bytes > INT64_MAX)
        return SHML_E_INVAL;
    batch->version = SHML_BATCH_VERSION;
    batch->abi = abi();
    batch->map_bytes = map_bytes;
    batch->budget_bytes = budget_bytes;
    int rc = shml_mutex_init(&batch->mutex);
    if (rc == SHML_OK)
        atomic_store_explicit(&batch->magic, SHML_BATCH_MAGIC, memory_order_release); /* SYNC(format) */
    return rc;
}

int shml_batch_check(const void *at, uint64_t map_bytes)
{
    const shml_batch_t *batch = at;
    if (map_bytes < SHML_BATCH_DATA_AT ||
        atomic_load_explicit(&batch->magic, memory_order_acquire) != SHML_BATCH_MAGIC) /* SYNC(format) */
        return SHML_E_LAYOUT;
    bool is_ours = batch->version == SHML_BATCH_VERSION && batch->abi == abi() && batch->map_bytes <= map_bytes;
    return is_ours ? SHML_OK : SHML_E_LAYOUT;
}

/* After a holder of the mutex died. Only slot_end is derived; a range that is no good cannot be repaired. */
static int repair(shml_bhandle_t *h)
{
    shml_batch_t *batch = h->batch;
    uint32_t end = 0;
    for (uint32_t i = 0; i < SHML_MAX_SLOTS; i++) {
        const shml_batch_slot_t *slot = &batch->slots[i];
        uint32_t state = shml_slot_state(shml_slot_load(slot));
        if (state == SHML_SLOT_NONE)
            continue;
        if (state > SHML_SLOT_HELD || !shml_slot_range_is_good(h, shml_slot_at(slot), shml_slot_size(slot)))
            return shml_batch_poison(batch);
        end = i + 1;
    }
    atomic_store_explicit(&batch->slot_end, end, memory_order_release);
    SHML_FP("batch.repair.end");
    return SHML_OK;
}

/* *repaired goes to unlock. A mutex that was had from a dead owner is consistent only then, so that a kill in here
 * brings the next one to the same repair. */
int shml_batch_lock(shml_bhandle_t *h, uint32_t timeout_ms, int *repaired)
{
    shml_batch_t *batch = h->batch;
    *repaired = 0;
    if (atomic_load_explicit(&batch->is_poisoned, memory_order_relaxed))
        return SHML_E_POISONED;
    int error = h->env->lock(h->env->ctx, &batch->mutex, timeout_ms);
    if (error == ENOTRECOVERABLE)
        return shml_batch_poison(batch);
    if (error != 0 && error != EOWNERDEAD) {
        errno = error;
        return error == ETIMEDOUT ? SHML_E_TIMEOUT : SHML_E_SYS;
    }
    *repaired = error == EOWNERDEAD;
    int rc = *repaired ? repair(h) : SHML_OK;
    if (rc != SHML_OK)
        h->env->unlock(h->env->ctx, &batch->mutex, *repaired);
    return rc;
}

void shml_batch_unlock(shml_bhandle_t *h, int repaired) { h->env->unlock(h->env->ctx, &h->batch->mutex, repaired); }

/* ---------------------------------------------------------------------------------------------------- *
 * Clients
 * ---------------------------------------------------------------------------------------------------- */

/* What worker `who` had under way is FREE; what the training process holds stays held. Under the mutex. */
static void sweep(shml_batch_t *batch, uint32_t who)
{
    for (uint32_t i = 0; i < shml_slot_end(batch); i++) {
        shml_batch_slot_t *slot = &batch->slots[i];
        uint64_t word = shml_slot_load(slot);
        uint32_t state = shml_slot_state(word);
        if (shml_slot_owner(word) != who || (state != SHML_SLOT_FILLING && state != SHML_SLOT_SENT))
            continue;
        /* It may just be adopted: then it is HELD, and this fails as it should. */
        (void)shml_slot_swap(slot, word, shml_slot_word(shml_slot_gen(word), who, SHML_SLOT_FREE));
        SHML_FP("batch.sweep.slot");
    }
}

/* Give the clients' slots of dead processes back. What they had under way is anybody's already. Under the mutex. */
static void bury(shml_bhandle_t *h)
{
    for (uint32_t who = 0; who < SHML_MAX_CLIENTS; who++) {
        struct shml_client *client = &h->batch->clients[who];
        if (client->state != SHML_CLIENT_ACTIVE || h->env->alive(h->env->ctx, h->fd, who, client))
            continue;
        atomic_store_explicit(&client->state, SHML_CLIENT_FREE, memory_order_release);
        SHML_FP("batch.bury.free");
    }
}

int shml_batch_register(shml_bhandle_t *h, uint32_t role)
{
    int repaired;
    shml_batch_t *batch = h->batch;
    if (role != SHML_OWNER && role != SHML_WORKER)
        return SHML_E_INVAL;
    int rc = shml_batch_lock(h, SHML_LOCK_TIMEOUT_MS, &repaired);
    if (rc != SHML_OK)
        return rc;
    rc = shml_clients_take(batch->clients, SHML_MAX_CLIENTS, h->fd, h->env, role, -1, 0);
    if (rc == SHML_E_CLIENTS) {
        bury(h);
        rc = shml_clients_take(batch->clients, SHML_MAX_CLIENTS, h->fd, h->env, role, -1, 0);
    }
    if (rc >= 0) {
        SHML_FP("batch.register.taken");
        sweep(batch, (uint32_t)rc);
        SHML_FP("batch.register.swept");
        h->self = rc;
        rc = SHML_OK;
    }
    shml_batch_unlock(h, repaired);
    return rc;
}

void shml_batch_unregister(shml_bhandle_t *h)
{
    int repaired;
    if (h->self < 0)
        return;
    /* What was sent can still be adopted: it is left as that of a dead worker is. */
    if (shml_batch_lock(h, SHML_LOCK_TIMEOUT_MS, &repaired) == SHML_OK) {
        atomic_store_explicit(&h->batch->clients[h->self].state, SHML_CLIENT_FREE, memory_order_release);
        SHML_FP("batch.unregister.free");
        (void)h->env->hold(h->env->ctx, h->fd, (uint32_t)h->self, 0);
        shml_batch_unlock(h, repaired);
    }
    h->self = -1;
}

/* ---------------------------------------------------------------------------------------------------- *
 * Looking at it
 * ---------------------------------------------------------------------------------------------------- */
int shml_batch_get_stats(shml_bhandle_t *h, shml_batch_stats_t *stats)
{
    shml_batch_t *batch = h->batch;
    uint32_t counts[SHML_SLOT_HELD + 1] = {0};
    *stats = (shml_batch_stats_t){
        .budget_bytes = batch->budget_bytes,
        .num_acquired = atomic_load_explicit(&batch->num_acquired, memory_order_relaxed),
        .num_refused = atomic_load_explicit(&batch->num_refused, memory_order_relaxed),
    };
    for (uint32_t i = 0; i < shml_slot_end(batch); i++) {
        uint32_t state = shml_slot_state(shml_slot_load(&batch->slots[i]));
        if (state == SHML_SLOT_NONE || state > SHML_SLOT_HELD)
            continue;
        counts[state]++;
        stats->num_slots++;
        stats->backed_bytes += shml_slot_size(&batch->slots[i]);
    }
    stats->num_free = counts[SHML_SLOT_FREE];
    stats->num_filling = counts[SHML_SLOT_FILLING];
    stats->num_sent = counts[SHML_SLOT_SENT];
    stats->num_held = counts[SHML_SLOT_HELD];
    return atomic_load_explicit(&batch->is_poisoned, memory_order_relaxed) ? SHML_E_POISONED : SHML_OK;
}

/* What is wrong, or NULL. Under the mutex. */
static const char *find_fault(shml_bhandle_t *h)
{
    const shml_batch_t *batch = h->batch;
    uint64_t used_bytes = 0;
    for (uint32_t i = 0; i < SHML_MAX_SLOTS; i++) {
        const shml_batch_slot_t *slot = &batch->slots[i];
        uint64_t word = shml_slot_load(slot), from = shml_slot_at(slot), size = shml_slot_size(slot);
        if (shml_slot_state(word) > SHML_SLOT_HELD)
            return "a slot's state is none of those there are";
        if (shml_slot_state(word) == SHML_SLOT_NONE)
            continue;
        if (i >= shml_slot_end(batch))
            return "a slot lies at or above slot_end";
        if (shml_slot_owner(word) >= SHML_MAX_CLIENTS)
            return "a slot belongs to no client";
        if (!shml_slot_range_is_good(h, from, size))
            return "a slot's range is out of bounds or not aligned";
        used_bytes += size;
        for (uint32_t j = 0; j < i; j++) {
            const shml_batch_slot_t *other = &batch->slots[j];
            if (shml_slot_state(shml_slot_load(other)) != SHML_SLOT_NONE && shml_slot_at(other) < from + size &&
                from < shml_slot_at(other) + shml_slot_size(other))
                return "two slots overlap";
        }
    }
    return used_bytes > batch->budget_bytes ? "the slots exceed the budget" : NULL;
}

int shml_batch_verify(shml_bhandle_t *h, const char **what)
{
    int repaired;
    *what = NULL;
    int rc = shml_batch_lock(h, SHML_LOCK_TIMEOUT_MS, &repaired);
    if (rc != SHML_OK)
        return rc;
    *what = find_fault(h);
    shml_batch_unlock(h, repaired);
    return *what == NULL ? SHML_OK : SHML_E_CORRUPT;
}
