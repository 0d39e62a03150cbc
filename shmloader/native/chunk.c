/* chunk.c - which prefetcher reads what: chunks are taken by the number of rows that readers wait for.
 *
 * A chunk's `word` is changed by one store, so a kill leaves it either before or after a step; counters and the
 * cursor are derived (shml_rebuild counts again). A chunk whose claimant died is TODO again with one more death
 * on record; at SHML_MAX_ATTEMPTS it is set aside, so that a row that kills its decoder cannot do so for ever.
 */
#include "failpoint.h"
#include "layout.h"

static uint32_t word_state(uint32_t word) { return word & 0xff; }
static uint32_t word_deaths(uint32_t word) { return (word >> 8) & 0xff; }
static uint32_t word_slot(uint32_t word) { return word >> 16; }
static uint32_t make_word(uint32_t state, uint32_t deaths, uint32_t slot)
{
    return state | (deaths & 0xff) << 8 | slot << 16;
}

static uint32_t *counter(struct shml_control *c, uint32_t state)
{
    switch (state) {
    case SHML_CHUNK_TODO: return &c->chunks_todo;
    case SHML_CHUNK_CLAIMED: return &c->chunks_claimed;
    case SHML_CHUNK_DONE: return &c->chunks_done;
    default: return &c->chunks_broken;
    }
}

static void set_word(struct shml_control *c, uint32_t index, uint32_t state, uint32_t deaths, uint32_t slot)
{
    shml_chunk_t *chunk = &shml_chunks(c)[index];
    uint32_t before = word_state(chunk->word);
    shml_begin_change(c);
    SHML_FP("chunk.set.dirty");
    atomic_store_explicit(&chunk->word, make_word(state, deaths, slot), memory_order_release);
    SHML_FP("chunk.set.word");
    --*counter(c, before);
    SHML_FP("chunk.set.counted_out");
    ++*counter(c, state);
    if (state == SHML_CHUNK_TODO && index < c->chunk_cursor)
        c->chunk_cursor = index;
    SHML_FP("chunk.set.counted_in");
    shml_end_change(c);
    atomic_fetch_add_explicit(&c->progress, 1, memory_order_relaxed);
}

static int has_row(const shml_chunk_t *chunk, uint64_t id) { return id - chunk->first_row < chunk->num_rows; }

int32_t shml_chunk_of(struct shml_control *c, uint64_t id)
{
    const shml_chunk_t *chunks = shml_chunks(c);
    uint32_t low = 0, high = c->num_chunks;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (chunks[middle].first_row <= id)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0 || id - chunks[low - 1].first_row >= chunks[low - 1].num_rows)
        return -1;
    return (int32_t)(low - 1);
}

/* The TODO chunk with most wanted rows, -1: nobody wants any. */
static int32_t most_wanted(struct shml_control *c)
{
    shml_client_t *clients = shml_clients(c);
    shml_chunk_t *chunks = shml_chunks(c);
    int32_t best = -1;
    for (int pass = 0; pass < 2; pass++) { /* first zero the scratch counters, then count */
        for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++) {
            if (clients[slot].state != SHML_CLIENT_ACTIVE)
                continue;
            const uint64_t *wants = shml_wants(c, slot);
            int32_t index = -1;
            for (uint32_t i = 0; i < clients[slot].num_wants && i < SHML_MAX_WANTS; i++) {
                if (index < 0 || !has_row(&chunks[index], wants[i])) /* often the same chunk as the one before */
                    index = shml_chunk_of(c, wants[i]);
                if (index < 0 || word_state(chunks[index].word) != SHML_CHUNK_TODO)
                    continue;
                chunks[index].waiting = pass == 0 ? 0 : chunks[index].waiting + 1;
                if (pass == 1 && (best < 0 || chunks[index].waiting > chunks[best].waiting))
                    best = index;
            }
        }
    }
    return best;
}

static int32_t first_todo(struct shml_control *c)
{
    const shml_chunk_t *chunks = shml_chunks(c);
    while (c->chunk_cursor < c->num_chunks && word_state(chunks[c->chunk_cursor].word) != SHML_CHUNK_TODO)
        c->chunk_cursor++;
    return c->chunk_cursor < c->num_chunks ? (int32_t)c->chunk_cursor : -1;
}

int shml_chunk_claim(shml_seg_t *seg, uint32_t *chunk)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    struct shml_control *c = seg->control;
    int32_t index = -1;
    if (seg->self < 0)
        status = SHML_E_LEFT;
    else if (c->chunks_todo > 0 && !(c->is_sequential && c->chunks_claimed > 0)) {
        index = c->is_sequential ? -1 : most_wanted(c);
        if (index < 0)
            index = first_todo(c);
    }
    if (index >= 0) {
        set_word(c, (uint32_t)index, SHML_CHUNK_CLAIMED, word_deaths(shml_chunks(c)[index].word), (uint32_t)seg->self);
        *chunk = (uint32_t)index;
    } else if (status == SHML_OK) {
        status = SHML_E_NOTFOUND;
    }
    shml_unlock(seg);
    return status;
}

static void tell_services(shml_seg_t *seg)
{
    struct shml_control *c = seg->control;
    atomic_fetch_add_explicit(&c->work, 1, memory_order_release);
    seg->env->wake(seg->env->ctx, (uint32_t *)&c->work);
}

static int finish(shml_seg_t *seg, uint32_t index, uint32_t state)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    struct shml_control *c = seg->control;
    uint32_t word = index < c->num_chunks ? shml_chunks(c)[index].word : 0;
    if (index >= c->num_chunks)
        status = SHML_E_INVAL;
    else if (seg->self < 0)
        status = SHML_E_LEFT;
    else if (word_state(word) != SHML_CHUNK_CLAIMED || word_slot(word) != (uint32_t)seg->self)
        status = SHML_E_STALE;
    else {
        const shml_chunk_t *chunk = &shml_chunks(c)[index];
        set_word(c, index, state, word_deaths(word), 0);
        if (state == SHML_CHUNK_BROKEN)
            shml_wants_wake(seg, chunk->first_row, chunk->num_rows);
        if (c->chunks_todo == 0)
            tell_services(seg); /* those that wait for a chunk which will not come back */
    }
    shml_unlock(seg);
    return status;
}

int shml_chunk_done(shml_seg_t *seg, uint32_t chunk) { return finish(seg, chunk, SHML_CHUNK_DONE); }
int shml_chunk_broken(shml_seg_t *seg, uint32_t chunk) { return finish(seg, chunk, SHML_CHUNK_BROKEN); }

void shml_chunk_release(shml_seg_t *seg, uint32_t slot, int is_own_death)
{
    struct shml_control *c = seg->control;
    shml_chunk_t *chunks = shml_chunks(c);
    for (uint32_t i = 0; c->chunks_claimed > 0 && i < c->num_chunks; i++) {
        uint32_t word = chunks[i].word;
        if (word_state(word) != SHML_CHUNK_CLAIMED || word_slot(word) != slot)
            continue;
        uint32_t deaths = word_deaths(word) + (is_own_death ? 1 : 0);
        if (deaths >= SHML_MAX_ATTEMPTS) {
            set_word(c, i, SHML_CHUNK_BROKEN, deaths, 0);
            shml_wants_wake(seg, chunks[i].first_row, chunks[i].num_rows);
        } else {
            set_word(c, i, SHML_CHUNK_TODO, deaths, 0);
        }
        tell_services(seg);
    }
}

uint32_t shml_work_word(const shml_seg_t *seg)
{
    return atomic_load_explicit(&seg->control->work, memory_order_acquire);
}

void shml_work_wait(shml_seg_t *seg, uint32_t seen, uint32_t timeout_ms)
{
    seg->env->wait(seg->env->ctx, (uint32_t *)&seg->control->work, seen, timeout_ms);
}

void shml_touch(shml_seg_t *seg) { atomic_fetch_add_explicit(&seg->control->progress, 1, memory_order_relaxed); }
