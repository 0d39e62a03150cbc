/* slot.c - the life of a slot: acquire, send or drop, adopt, release (batch.h has the layout and what a kill leaves).
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
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>

#include "batch.h"
#include "failpoint.h"
#include "memory.h"

/* Acquiring never waits for long: a mutex that was not had by then (its holder is frozen) means no slot (guessed). */
#define ACQUIRE_LOCK_MS 1000u

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
    return shml_round_up(capacity, shml_slot_unit(capacity));
}

/* Make slot `index`, last seen as `word`, FILLING by this process: 1, 0 if another was first, or a status. */
static int take(shml_bhandle_t *h, uint32_t index, uint64_t word, shml_slot_t *taken)
{
    shml_batch_slot_t *slot = &h->batch->slots[index];
    *taken = (shml_slot_t){shml_slot_at(slot), shml_slot_size(slot), index, shml_slot_gen(word) + 1};
    if (!shml_slot_range_is_good(h, taken->offset, taken->capacity))
        return shml_batch_poison(h->batch);
    /* SYNC(reuse) */
    return shml_slot_swap(slot, word, shml_slot_word(taken->gen, (uint32_t)h->self, SHML_SLOT_FILLING));
}

/* The smallest slot of its own that is free and large enough. Needs no mutex. NOTFOUND. */
static int take_own(shml_bhandle_t *h, uint64_t num_bytes, shml_slot_t *taken)
{
    shml_batch_t *batch = h->batch;
    for (;;) {
        uint64_t best = UINT64_MAX, best_word = 0;
        uint32_t best_index = 0;
        for (uint32_t i = 0; i < shml_slot_end(batch); i++) {
            uint64_t word = shml_slot_load(&batch->slots[i]); /* SYNC(range) */
            uint64_t capacity = shml_slot_size(&batch->slots[i]);
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
    uint64_t used_bytes; /* all that counts against the budget */
    uint64_t idle_bytes; /* of these, could be given back */
    uint32_t num_own, num_own_free;
    int64_t own, dead, fit; /* slots, -1: none. A free one of its own, one of a dead worker, one of these that fits */
    uint64_t own_word, dead_word, fit_word;
} usage_t;

static void survey(shml_bhandle_t *h, uint64_t num_bytes, deaths_t *deaths, usage_t *usage)
{
    uint64_t fit_capacity = UINT64_MAX;
    *usage = (usage_t){.own = -1, .dead = -1, .fit = -1};
    for (uint32_t i = 0; i < shml_slot_end(h->batch); i++) {
        const shml_batch_slot_t *slot = &h->batch->slots[i];
        uint64_t word = shml_slot_load(slot), capacity = shml_slot_size(slot);
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
    shml_batch_slot_t *slot = &h->batch->slots[index];
    atomic_store_explicit(&slot->is_backed, 0, memory_order_release);
    SHML_FP("batch.discard.flag");
    while (fallocate(h->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)shml_slot_at(slot),
                     (off_t)shml_slot_size(slot)) != 0) {
        if (errno == EINTR)
            continue;
        atomic_store_explicit(&slot->word, shml_slot_word(gen, (uint32_t)h->self, SHML_SLOT_FREE),
                              memory_order_release);
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
    uint64_t unit = shml_slot_unit(capacity), at = SHML_BATCH_DATA_AT;
    for (bool moved = true; moved;) {
        moved = false;
        if (at > h->map_bytes || capacity > h->map_bytes - at)
            return 0;
        for (uint32_t i = 0; i < shml_slot_end(h->batch); i++) {
            const shml_batch_slot_t *slot = &h->batch->slots[i];
            if (shml_slot_state(shml_slot_load(slot)) == SHML_SLOT_NONE)
                continue;
            uint64_t from = shml_slot_at(slot), size = shml_slot_size(slot);
            if (shml_slot_range_is_good(h, from, size) && from < at + capacity && at < from + size) {
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
    while (i < SHML_MAX_SLOTS && shml_slot_state(shml_slot_load(&batch->slots[i])) != SHML_SLOT_NONE)
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
    shml_batch_slot_t *slot = &batch->slots[index];
    *made = (shml_slot_t){offset, capacity, (uint32_t)index, shml_slot_gen(shml_slot_load(slot)) + 1};
    atomic_store_explicit(&slot->offset, offset, memory_order_relaxed);
    SHML_FP("batch.make.offset");
    atomic_store_explicit(&slot->capacity, capacity, memory_order_relaxed); /* is_backed is 0 in state NONE */
    SHML_FP("batch.make.range");
    if (made->index >= shml_slot_end(batch))
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

int shml_batch_trim(shml_bhandle_t *h)
{
    int repaired, num_trimmed = 0;
    deaths_t deaths = {{UNKNOWN}};
    if (h->self < 0)
        return SHML_E_INVAL;
    int rc = shml_batch_lock(h, ACQUIRE_LOCK_MS, &repaired);
    if (rc != SHML_OK)
        return rc;
    for (uint32_t i = 0; i < shml_slot_end(h->batch) && rc >= 0; i++) {
        uint64_t word = shml_slot_load(&h->batch->slots[i]);
        uint32_t state = shml_slot_state(word);
        bool is_idle = state == SHML_SLOT_FREE || ((state == SHML_SLOT_FILLING || state == SHML_SLOT_SENT) &&
                                                   is_dead(h, &deaths, shml_slot_owner(word)));
        if (is_idle)
            rc = discard_idle(h, i, word);
        num_trimmed += is_idle && rc >= 0;
    }
    shml_batch_unlock(h, repaired);
    return rc < 0 ? rc : num_trimmed;
}

/* Give a FILLING slot memory. If there is none, it is discarded: FULL. */
static int back(shml_bhandle_t *h, const shml_slot_t *taken)
{
    int repaired;
    shml_memory_t memory;
    shml_batch_slot_t *slot = &h->batch->slots[taken->index];
    if (atomic_load_explicit(&slot->is_backed, memory_order_acquire))
        return SHML_OK;
    (void)shml_memory_read("", &memory);
    uint64_t end = taken->offset + taken->capacity;
    void *at = taken->capacity >= SHML_HUGE_SLOT_BYTES ? (uint8_t *)h->batch + taken->offset : NULL;
    int rc = shml_back(h->fd, taken->offset, end, at, shml_memory_spare(&memory), "", &memory);
    SHML_FP("batch.back.memory");
    if (rc == SHML_OK) {
        atomic_store_explicit(&slot->is_backed, 1, memory_order_release);
        SHML_FP("batch.back.flag");
        return SHML_OK;
    }
    int cause = errno;
    if (shml_batch_lock(h, ACQUIRE_LOCK_MS, &repaired) == SHML_OK) { /* else it stays FILLING until this process ends */
        (void)discard(h, taken->index, taken->gen);
        shml_batch_unlock(h, repaired);
    }
    errno = cause;
    return rc == SHML_E_MEMORY ? SHML_E_FULL : rc;
}

static int acquire(shml_bhandle_t *h, uint64_t num_bytes, uint32_t max_slots, shml_slot_t *slot)
{
    int repaired;
    int rc = take_own(h, num_bytes, slot);
    if (rc == SHML_E_NOTFOUND) {
        rc = shml_batch_lock(h, ACQUIRE_LOCK_MS, &repaired);
        if (rc != SHML_OK)
            return rc == SHML_E_TIMEOUT ? SHML_E_FULL : rc;
        rc = take_or_make(h, num_bytes, max_slots, slot);
        shml_batch_unlock(h, repaired);
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
static shml_batch_slot_t *find(shml_bhandle_t *h, const shml_slot_t *token, uint64_t *word)
{
    if (token->index >= SHML_MAX_SLOTS)
        return NULL;
    shml_batch_slot_t *slot = &h->batch->slots[token->index];
    *word = shml_slot_load(slot);
    return shml_slot_gen(*word) == token->gen ? slot : NULL;
}

/* From a state in the set `from` (bit s: state s) to `to`; with `own`, only a slot of this process's pool. */
static int change(shml_bhandle_t *h, const shml_slot_t *token, uint32_t from, uint32_t to, bool own)
{
    uint64_t word;
    shml_batch_slot_t *slot;
    while ((slot = find(h, token, &word)) != NULL) {
        uint32_t owner = shml_slot_owner(word), state = shml_slot_state(word);
        if (!(from >> (state & 31) & 1) || state > SHML_SLOT_HELD || (own && owner != (uint32_t)h->self))
            break;
        if (shml_slot_swap(slot, word, shml_slot_word(token->gen, owner, to)))
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
    shml_batch_slot_t *slot = find(h, token, &word);
    /* The token came through a pipe: the caller will read where it says, so that must be where the slot is. */
    if (slot == NULL || shml_slot_state(word) != SHML_SLOT_SENT || shml_slot_at(slot) != token->offset ||
        shml_slot_size(slot) != token->capacity)
        return SHML_E_STALE;
    if (!shml_slot_range_is_good(h, token->offset, token->capacity))
        return shml_batch_poison(h->batch);
    uint32_t owner = shml_slot_owner(word);
    if (!shml_slot_swap(slot, word, shml_slot_word(token->gen, owner, SHML_SLOT_HELD))) /* SYNC(batch) */
        return SHML_E_STALE;
    SHML_FP("batch.adopt.held");
    *held = *total = 0;
    for (uint32_t i = 0; i < shml_slot_end(h->batch); i++) {
        uint64_t other = shml_slot_load(&h->batch->slots[i]);
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
