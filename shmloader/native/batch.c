/* batch.c - the batch ring: slots in which workers build batches for one training process (batch.h has the layout,
 * the life of a slot, and what a kill leaves).
 *
 * Labels of the atomics:
 *   SYNC(format)   magic is stored last; shml_batch_check acquires it.
 *   SYNC(batch)    send releases the batch's bytes, adopt acquires them.
 *   SYNC(reuse)    release and drop release what was read and written there; the next acquire sees it all done.
 *   SYNC(range)    the word that leaves NONE releases offset and capacity; whoever reads another state acquires.
 *                  They stay as they are until the word is NONE again, and each way there raises the generation:
 *                  a compare-and-swap that finds the same word finds the same range.
 */
#define _GNU_SOURCE
#include "batch.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>

#include "failpoint.h"
#include "memory.h"

/* Acquiring never waits for long: a mutex that was not had by then (its holder is frozen) means no slot (guessed). */
#define ACQUIRE_LOCK_MS 1000u

typedef shml_batch_slot_t slot_t;

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

static uint64_t load(const slot_t *slot) { return atomic_load_explicit(&slot->word, memory_order_acquire); }

static bool swap(slot_t *slot, uint64_t from, uint64_t to)
{
    return atomic_compare_exchange_strong_explicit(&slot->word, &from, to, memory_order_acq_rel, memory_order_acquire);
}

static uint64_t capacity_of(const slot_t *slot) { return atomic_load_explicit(&slot->capacity, memory_order_relaxed); }
static uint64_t offset_of(const slot_t *slot) { return atomic_load_explicit(&slot->offset, memory_order_relaxed); }

static uint32_t slot_end(const shml_batch_t *batch)
{
    uint32_t end = atomic_load_explicit(&batch->slot_end, memory_order_acquire);
    return end < SHML_MAX_SLOTS ? end : SHML_MAX_SLOTS;
}

static uint64_t unit_of(uint64_t capacity)
{
    return capacity >= SHML_HUGE_SLOT_BYTES ? SHML_HUGE_BYTES : SHML_BATCH_PAGE_BYTES;
}

/* Within this process's mapping, whatever the shared memory says. */
static bool range_is_good(const shml_bhandle_t *h, uint64_t offset, uint64_t capacity)
{
    uint64_t unit = unit_of(capacity);
    return offset >= SHML_BATCH_DATA_AT && offset <= h->map_bytes && capacity > 0 &&
           capacity <= h->map_bytes - offset && offset % unit == 0 && capacity % unit == 0;
}

static int poison(shml_batch_t *batch)
{
    atomic_store_explicit(&batch->is_poisoned, 1, memory_order_relaxed);
    return SHML_E_POISONED;
}

/* After a holder of the mutex died. Only slot_end is derived; a range that is no good cannot be repaired. */
static int repair(shml_bhandle_t *h)
{
    shml_batch_t *batch = h->batch;
    uint32_t end = 0;
    for (uint32_t i = 0; i < SHML_MAX_SLOTS; i++) {
        const slot_t *slot = &batch->slots[i];
        uint32_t state = shml_slot_state(load(slot));
        if (state == SHML_SLOT_NONE)
            continue;
        if (state > SHML_SLOT_HELD || !range_is_good(h, offset_of(slot), capacity_of(slot)))
            return poison(batch);
        end = i + 1;
    }
    atomic_store_explicit(&batch->slot_end, end, memory_order_release);
    SHML_FP("batch.repair.end");
    return SHML_OK;
}

/* *repaired goes to unlock. A mutex that was had from a dead owner is consistent only then, so that a kill in here
 * brings the next one to the same repair. */
static int lock(shml_bhandle_t *h, uint32_t timeout_ms, int *repaired)
{
    shml_batch_t *batch = h->batch;
    *repaired = 0;
    if (atomic_load_explicit(&batch->is_poisoned, memory_order_relaxed))
        return SHML_E_POISONED;
    int error = h->env->lock(h->env->ctx, &batch->mutex, timeout_ms);
    if (error == ENOTRECOVERABLE)
        return poison(batch);
    if (error != 0 && error != EOWNERDEAD)
        return error == ETIMEDOUT ? SHML_E_TIMEOUT : SHML_E_SYS;
    *repaired = error == EOWNERDEAD;
    int rc = *repaired ? repair(h) : SHML_OK;
    if (rc != SHML_OK)
        h->env->unlock(h->env->ctx, &batch->mutex, *repaired);
    return rc;
}

static void unlock(shml_bhandle_t *h, int repaired) { h->env->unlock(h->env->ctx, &h->batch->mutex, repaired); }

/* ---------------------------------------------------------------------------------------------------- *
 * Clients
 * ---------------------------------------------------------------------------------------------------- */

/* What worker `who` had under way is FREE; what the training process holds stays held. Under the mutex. */
static void sweep(shml_batch_t *batch, uint32_t who)
{
    for (uint32_t i = 0; i < slot_end(batch); i++) {
        slot_t *slot = &batch->slots[i];
        uint64_t word = load(slot);
        uint32_t state = shml_slot_state(word);
        if (shml_slot_owner(word) != who || (state != SHML_SLOT_FILLING && state != SHML_SLOT_SENT))
            continue;
        /* It may just be adopted: then it is HELD, and this fails as it should. */
        (void)swap(slot, word, shml_slot_word(shml_slot_gen(word), who, SHML_SLOT_FREE));
        SHML_FP("batch.sweep.slot");
    }
}

/* Give the clients' slots of dead processes back. Under the mutex. */
static void bury(shml_bhandle_t *h)
{
    for (uint32_t who = 0; who < SHML_MAX_CLIENTS; who++) {
        struct shml_client *client = &h->batch->clients[who];
        if (client->state != SHML_CLIENT_ACTIVE || h->env->alive(h->env->ctx, h->fd, who, client))
            continue;
        sweep(h->batch, who);
        SHML_FP("batch.bury.swept");
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
    int rc = lock(h, SHML_LOCK_TIMEOUT_MS, &repaired);
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
    unlock(h, repaired);
    return rc;
}

void shml_batch_unregister(shml_bhandle_t *h)
{
    int repaired;
    if (h->self < 0)
        return;
    /* What was sent can still be adopted: it is left as that of a dead worker is. */
    if (lock(h, SHML_LOCK_TIMEOUT_MS, &repaired) == SHML_OK) {
        atomic_store_explicit(&h->batch->clients[h->self].state, SHML_CLIENT_FREE, memory_order_release);
        SHML_FP("batch.unregister.free");
        (void)h->env->hold(h->env->ctx, h->fd, (uint32_t)h->self, 0);
        unlock(h, repaired);
    }
    h->self = -1;
}

/* ---------------------------------------------------------------------------------------------------- *
 * Acquiring
 * ---------------------------------------------------------------------------------------------------- */

/* Batches of slightly different sizes shall use the same slot: round up to an eighth of the power of two below. */
uint64_t shml_slot_capacity(uint64_t num_bytes)
{
    if (num_bytes == 0 || num_bytes > UINT64_C(1) << 56)
        return 0;
    uint64_t step = (UINT64_C(1) << (63 - __builtin_clzll(num_bytes))) / 8;
    uint64_t capacity = shml_round_up(num_bytes, step > SHML_BATCH_PAGE_BYTES ? step : SHML_BATCH_PAGE_BYTES);
    return shml_round_up(capacity, unit_of(capacity));
}

/* Make slot `index`, last seen as `word`, FILLING by this process: 1, 0 if another was first, or a status. */
static int take(shml_bhandle_t *h, uint32_t index, uint64_t word, shml_slot_t *taken)
{
    slot_t *slot = &h->batch->slots[index];
    *taken = (shml_slot_t){offset_of(slot), capacity_of(slot), index, shml_slot_gen(word) + 1};
    if (!range_is_good(h, taken->offset, taken->capacity))
        return poison(h->batch);
    /* SYNC(reuse) */
    return swap(slot, word, shml_slot_word(taken->gen, (uint32_t)h->self, SHML_SLOT_FILLING));
}

/* The smallest slot of its own that is free and large enough. Needs no mutex. NOTFOUND. */
static int take_own(shml_bhandle_t *h, uint64_t num_bytes, shml_slot_t *taken)
{
    shml_batch_t *batch = h->batch;
    for (;;) {
        uint64_t best = UINT64_MAX, best_word = 0;
        uint32_t best_index = 0;
        for (uint32_t i = 0; i < slot_end(batch); i++) {
            uint64_t word = load(&batch->slots[i]), capacity = capacity_of(&batch->slots[i]); /* SYNC(range) */
            if (shml_slot_state(word) == SHML_SLOT_FREE && shml_slot_owner(word) == (uint32_t)h->self &&
                capacity >= num_bytes && capacity < best) {
                best = capacity;
                best_word = word;
                best_index = i;
            }
        }
        if (best == UINT64_MAX)
            return SHML_E_NOTFOUND;
        int rc = take(h, best_index, best_word, taken); /* lost only to another thread of this process */
        if (rc != 0) {
            SHML_FP("batch.acquire.own");
            return rc < 0 ? rc : SHML_OK;
        }
    }
}

/* Whom this call has asked about: asking costs a system call. */
typedef struct deaths {
    enum { UNKNOWN = 0, ALIVE, DEAD } of[SHML_MAX_CLIENTS];
} deaths_t;

/* Does nobody use the pool of `who`? Under the mutex, so `who` cannot come back to life as another. */
static bool is_dead(shml_bhandle_t *h, deaths_t *deaths, uint32_t who)
{
    if (who >= SHML_MAX_CLIENTS)
        return true;
    const struct shml_client *client = &h->batch->clients[who];
    if (who == (uint32_t)h->self)
        return false;
    if (client->state != SHML_CLIENT_ACTIVE || client->role != SHML_WORKER)
        return true;
    if (deaths->of[who] == UNKNOWN)
        deaths->of[who] = h->env->alive(h->env->ctx, h->fd, who, client) ? ALIVE : DEAD;
    return deaths->of[who] == DEAD;
}

/* What there is, as seen under the mutex while others go on sending, adopting and releasing. */
typedef struct usage {
    uint64_t used_bytes;    /* all that counts against the budget */
    uint64_t idle_bytes;    /* of these, could be given back */
    uint32_t num_own, num_own_free;
    int64_t own, dead, fit; /* slots, -1: none. A free one of its own, one of a dead worker, one of these that fits */
    uint64_t own_word, dead_word, fit_word;
} usage_t;

static void survey(shml_bhandle_t *h, uint64_t num_bytes, deaths_t *deaths, usage_t *usage)
{
    uint64_t fit_capacity = UINT64_MAX;
    *usage = (usage_t){.own = -1, .dead = -1, .fit = -1};
    for (uint32_t i = 0; i < slot_end(h->batch); i++) {
        const slot_t *slot = &h->batch->slots[i];
        uint64_t word = load(slot), capacity = capacity_of(slot);
        uint32_t state = shml_slot_state(word), owner = shml_slot_owner(word);
        if (state == SHML_SLOT_NONE)
            continue;
        usage->used_bytes += capacity;
        if (owner == (uint32_t)h->self) {
            usage->num_own++;
            if (state == SHML_SLOT_FREE) {
                usage->num_own_free++;
                usage->idle_bytes += capacity;
                usage->own = i;
                usage->own_word = word;
            }
        } else if (state != SHML_SLOT_HELD && is_dead(h, deaths, owner)) {
            usage->idle_bytes += capacity;
            usage->dead = i;
            usage->dead_word = word;
            if (capacity >= num_bytes && capacity < fit_capacity) {
                fit_capacity = capacity;
                usage->fit = i;
                usage->fit_word = word;
            }
        }
    }
}

/* Take slot `index`, FILLING(self) or just claimed, out of use: its memory and its range are free. Under the mutex. */
static int discard(shml_bhandle_t *h, uint32_t index, uint32_t gen)
{
    slot_t *slot = &h->batch->slots[index];
    atomic_store_explicit(&slot->is_backed, 0, memory_order_release);
    SHML_FP("batch.discard.flag");
    while (fallocate(h->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset_of(slot),
                     (off_t)capacity_of(slot)) != 0) {
        if (errno == EINTR)
            continue;
        atomic_store_explicit(&slot->word, shml_slot_word(gen, (uint32_t)h->self, SHML_SLOT_FREE), memory_order_release);
        return SHML_E_SYS;
    }
    SHML_FP("batch.discard.punched");
    atomic_store_explicit(&slot->word, shml_slot_word(gen, 0, SHML_SLOT_NONE), memory_order_release);
    SHML_FP("batch.discard.none");
    return SHML_OK;
}

/* Claim slot `index`, last seen as `word`, and discard it. That another was first is no error. */
static int discard_idle(shml_bhandle_t *h, uint32_t index, uint64_t word)
{
    shml_slot_t claimed;
    int rc = take(h, index, word, &claimed);
    if (rc <= 0)
        return rc;
    SHML_FP("batch.discard.claimed");
    return discard(h, index, claimed.gen);
}

/* The lowest range of `capacity` bytes that no slot has; 0: none. Each step passes a slot for good, so it ends. */
static uint64_t find_range(const shml_bhandle_t *h, uint64_t capacity)
{
    uint64_t unit = unit_of(capacity), at = SHML_BATCH_DATA_AT;
    for (bool moved = true; moved;) {
        moved = false;
        if (at > h->map_bytes || capacity > h->map_bytes - at)
            return 0;
        for (uint32_t i = 0; i < slot_end(h->batch); i++) {
            const slot_t *slot = &h->batch->slots[i];
            if (shml_slot_state(load(slot)) == SHML_SLOT_NONE)
                continue;
            uint64_t from = offset_of(slot), size = capacity_of(slot);
            if (range_is_good(h, from, size) && from < at + capacity && at < from + size) {
                at = shml_round_up(from + size, unit);
                moved = true;
            }
        }
    }
    return at;
}

static int64_t find_index(const shml_batch_t *batch)
{
    uint32_t i = 0;
    while (i < SHML_MAX_SLOTS && shml_slot_state(load(&batch->slots[i])) != SHML_SLOT_NONE)
        i++;
    return i < SHML_MAX_SLOTS ? (int64_t)i : -1;
}

/* A new slot, FILLING(self), without memory. The budget was looked at. Under the mutex. FULL: no range or index. */
static int make(shml_bhandle_t *h, uint64_t capacity, shml_slot_t *made)
{
    shml_batch_t *batch = h->batch;
    uint64_t offset = find_range(h, capacity);
    int64_t index = find_index(batch);
    if (offset == 0 || index < 0)
        return SHML_E_FULL;
    slot_t *slot = &batch->slots[index];
    *made = (shml_slot_t){offset, capacity, (uint32_t)index, shml_slot_gen(load(slot)) + 1};
    atomic_store_explicit(&slot->offset, offset, memory_order_relaxed);
    SHML_FP("batch.make.offset");
    atomic_store_explicit(&slot->capacity, capacity, memory_order_relaxed);
    atomic_store_explicit(&slot->is_backed, 0, memory_order_relaxed);
    SHML_FP("batch.make.range");
    if (made->index >= slot_end(batch))
        atomic_store_explicit(&batch->slot_end, made->index + 1, memory_order_release);
    SHML_FP("batch.make.end");
    atomic_store_explicit(&slot->word, shml_slot_word(made->gen, (uint32_t)h->self, SHML_SLOT_FILLING),
                          memory_order_release); /* SYNC(range) */
    SHML_FP("batch.make.word");
    return SHML_OK;
}

/* Give one idle slot back that stands in the way: 1 if there was one. */
static int make_room(shml_bhandle_t *h, const usage_t *usage, bool must_be_own)
{
    bool is_dead_one = !must_be_own && usage->dead >= 0;
    int64_t index = is_dead_one ? usage->dead : usage->own;
    if (index < 0)
        return 0;
    int rc = discard_idle(h, (uint32_t)index, is_dead_one ? usage->dead_word : usage->own_word);
    return rc < 0 ? rc : 1;
}

/* Under the mutex, and no free slot of its own fits: so all of those are too small. */
static int take_or_make(shml_bhandle_t *h, uint64_t num_bytes, uint32_t max_slots, shml_slot_t *taken)
{
    deaths_t deaths = {{UNKNOWN}};
    uint64_t capacity = shml_slot_capacity(num_bytes), budget = h->batch->budget_bytes;
    /* Each round but the last discards a slot, or sees one of a dead worker being adopted at this moment. */
    for (uint32_t round = 0; round < 2 * SHML_MAX_SLOTS; round++) {
        usage_t usage;
        int rc = take_own(h, num_bytes, taken);
        if (rc != SHML_E_NOTFOUND)
            return rc;
        survey(h, num_bytes, &deaths, &usage);
        if (usage.num_own - usage.num_own_free >= max_slots)
            return SHML_E_FULL;
        bool has_too_many = usage.num_own >= max_slots;
        if (!has_too_many && usage.fit >= 0) {
            rc = take(h, (uint32_t)usage.fit, usage.fit_word, taken);
            SHML_FP("batch.acquire.inherited");
            if (rc != 0)
                return rc < 0 ? rc : SHML_OK;
            continue;
        }
        if (usage.fit < 0 && (capacity > budget || usage.used_bytes - usage.idle_bytes > budget - capacity))
            return SHML_E_FULL; /* before anything is given back in vain */
        if (!has_too_many && usage.used_bytes <= budget && capacity <= budget - usage.used_bytes) {
            rc = make(h, capacity, taken);
            if (rc != SHML_E_FULL)
                return rc;
        }
        rc = make_room(h, &usage, has_too_many);
        if (rc <= 0)
            return rc < 0 ? rc : SHML_E_FULL;
    }
    return SHML_E_FULL;
}

/* Give a FILLING slot memory. If there is none, it is discarded: FULL. */
static int back(shml_bhandle_t *h, const shml_slot_t *taken)
{
    int repaired;
    shml_memory_t memory;
    slot_t *slot = &h->batch->slots[taken->index];
    if (atomic_load_explicit(&slot->is_backed, memory_order_acquire))
        return SHML_OK;
    (void)shml_memory_read("", &memory);
    uint64_t end = taken->offset + taken->capacity;
    int rc = shml_back(h->fd, taken->offset, end, shml_memory_spare(&memory), "", &memory);
    SHML_FP("batch.back.memory");
    if (rc == SHML_OK) {
        if (taken->capacity >= SHML_HUGE_SLOT_BYTES)
            (void)shml_collapse((uint8_t *)h->batch + taken->offset, taken->capacity);
        atomic_store_explicit(&slot->is_backed, 1, memory_order_release);
        SHML_FP("batch.back.flag");
        return SHML_OK;
    }
    int cause = errno;
    if (lock(h, ACQUIRE_LOCK_MS, &repaired) == SHML_OK) { /* else it stays FILLING until this process ends */
        (void)discard(h, taken->index, taken->gen);
        unlock(h, repaired);
    }
    errno = cause;
    return rc == SHML_E_MEMORY ? SHML_E_FULL : rc;
}

static int acquire(shml_bhandle_t *h, uint64_t num_bytes, uint32_t max_slots, shml_slot_t *slot)
{
    int repaired;
    int rc = take_own(h, num_bytes, slot);
    if (rc == SHML_E_NOTFOUND) {
        rc = lock(h, ACQUIRE_LOCK_MS, &repaired);
        if (rc != SHML_OK)
            return rc == SHML_E_TIMEOUT ? SHML_E_FULL : rc;
        rc = take_or_make(h, num_bytes, max_slots, slot);
        unlock(h, repaired);
    }
    return rc == SHML_OK ? back(h, slot) : rc;
}

int shml_slot_acquire(shml_bhandle_t *h, uint64_t num_bytes, uint32_t max_slots, shml_slot_t *slot)
{
    shml_batch_t *batch = h->batch;
    if (h->self < 0 || num_bytes == 0)
        return SHML_E_INVAL;
    if (atomic_load_explicit(&batch->is_poisoned, memory_order_relaxed))
        return SHML_E_POISONED;
    int rc = shml_slot_capacity(num_bytes) == 0 ? SHML_E_FULL : acquire(h, num_bytes, max_slots, slot);
    if (rc == SHML_OK)
        atomic_fetch_add_explicit(&batch->num_acquired, 1, memory_order_relaxed);
    else if (rc == SHML_E_FULL)
        atomic_fetch_add_explicit(&batch->num_refused, 1, memory_order_relaxed);
    return rc;
}

/* ---------------------------------------------------------------------------------------------------- *
 * The rest of a slot's life: no mutex
 * ---------------------------------------------------------------------------------------------------- */

/* The slot of a token, and its word; NULL if the generation is another. */
static slot_t *find(shml_bhandle_t *h, const shml_slot_t *token, uint64_t *word)
{
    if (token->index >= SHML_MAX_SLOTS)
        return NULL;
    slot_t *slot = &h->batch->slots[token->index];
    *word = load(slot);
    return shml_slot_gen(*word) == token->gen ? slot : NULL;
}

/* From a state in the set `from` (bit s: state s) to `to`; with `own`, only a slot of this process's pool. */
static int change(shml_bhandle_t *h, const shml_slot_t *token, uint32_t from, uint32_t to, bool own)
{
    uint64_t word;
    slot_t *slot;
    while ((slot = find(h, token, &word)) != NULL) {
        uint32_t owner = shml_slot_owner(word), state = shml_slot_state(word);
        if (!(from >> (state & 31) & 1) || state > SHML_SLOT_HELD || (own && owner != (uint32_t)h->self))
            break;
        if (swap(slot, word, shml_slot_word(token->gen, owner, to)))
            return SHML_OK;
    }
    return SHML_E_STALE;
}

int shml_slot_send(shml_bhandle_t *h, const shml_slot_t *slot)
{
    int rc = change(h, slot, 1u << SHML_SLOT_FILLING, SHML_SLOT_SENT, true); /* SYNC(batch) */
    SHML_FP("batch.send.sent");
    return rc;
}

int shml_slot_drop(shml_bhandle_t *h, const shml_slot_t *slot)
{
    /* SYNC(reuse) */
    int rc = change(h, slot, 1u << SHML_SLOT_FILLING | 1u << SHML_SLOT_SENT, SHML_SLOT_FREE, true);
    SHML_FP("batch.drop.free");
    return rc;
}

int shml_slot_adopt(shml_bhandle_t *h, const shml_slot_t *token, uint32_t *held, uint32_t *total)
{
    uint64_t word;
    slot_t *slot = find(h, token, &word);
    /* The token came through a pipe: the caller will read where it says, so that must be where the slot is. */
    if (slot == NULL || shml_slot_state(word) != SHML_SLOT_SENT || offset_of(slot) != token->offset ||
        capacity_of(slot) != token->capacity)
        return SHML_E_STALE;
    if (!range_is_good(h, token->offset, token->capacity))
        return poison(h->batch);
    uint32_t owner = shml_slot_owner(word);
    if (!swap(slot, word, shml_slot_word(token->gen, owner, SHML_SLOT_HELD))) /* SYNC(batch) */
        return SHML_E_STALE;
    SHML_FP("batch.adopt.held");
    *held = *total = 0;
    for (uint32_t i = 0; i < slot_end(h->batch); i++) {
        uint64_t other = load(&h->batch->slots[i]);
        bool is_same = shml_slot_state(other) != SHML_SLOT_NONE && shml_slot_owner(other) == owner;
        *total += is_same;
        *held += is_same && shml_slot_state(other) == SHML_SLOT_HELD;
    }
    return SHML_OK;
}

int shml_slot_release(shml_bhandle_t *h, const shml_slot_t *slot)
{
    int rc = change(h, slot, 1u << SHML_SLOT_HELD, SHML_SLOT_FREE, false); /* SYNC(reuse) */
    SHML_FP("batch.release.free");
    return rc;
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
    for (uint32_t i = 0; i < slot_end(batch); i++) {
        uint32_t state = shml_slot_state(load(&batch->slots[i]));
        if (state == SHML_SLOT_NONE || state > SHML_SLOT_HELD)
            continue;
        counts[state]++;
        stats->num_slots++;
        stats->backed_bytes += capacity_of(&batch->slots[i]);
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
        const slot_t *slot = &batch->slots[i];
        uint64_t word = load(slot), from = offset_of(slot), size = capacity_of(slot);
        if (shml_slot_state(word) > SHML_SLOT_HELD)
            return "a slot's state is none of those there are";
        if (shml_slot_state(word) == SHML_SLOT_NONE)
            continue;
        if (i >= slot_end(batch))
            return "a slot lies at or above slot_end";
        if (shml_slot_owner(word) >= SHML_MAX_CLIENTS)
            return "a slot belongs to no client";
        if (!range_is_good(h, from, size))
            return "a slot's range is out of bounds or not aligned";
        used_bytes += size;
        for (uint32_t j = 0; j < i; j++) {
            const slot_t *other = &batch->slots[j];
            if (shml_slot_state(load(other)) != SHML_SLOT_NONE && offset_of(other) < from + size &&
                from < offset_of(other) + capacity_of(other))
                return "two slots overlap";
        }
    }
    return used_bytes > batch->budget_bytes ? "the slots exceed the budget" : NULL;
}

int shml_batch_verify(shml_bhandle_t *h, const char **what)
{
    int repaired;
    *what = NULL;
    int rc = lock(h, SHML_LOCK_TIMEOUT_MS, &repaired);
    if (rc != SHML_OK)
        return rc;
    *what = find_fault(h);
    unlock(h, repaired);
    return *what == NULL ? SHML_OK : SHML_E_CORRUPT;
}
