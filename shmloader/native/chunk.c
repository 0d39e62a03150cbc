/* chunk.c - chunks: who fetches which, and whether its rows STAY.
 *
 * A chunk's `word` is changed by one store, so a kill leaves it either before or after a step; counts and the promise
 * are derived. A chunk whose fetcher died is TODO again with one more death on record; at SHML_MAX_ATTEMPTS it is
 * set aside, so that bytes that kill who reads them cannot do so for ever. It is DONE in the step that makes its last
 * row final, whoever has claimed it by then.
 *
 * Resident is promised to chunks before their rows are decoded, by the mean size of the samples so far, and
 * over-promised by one chunk: what then finds no room takes its chunk's STAYS away (shml_chunk_unstay), and is not
 * promised again. It is decided when the chunk is fetched, and again with each row that is made of it, since the mean
 * changes. Where only so many samples may stay (most_resident), these are promised in the same way, and over-promised by
 * one chunk: so just as many stay, the last of them perhaps a part of their chunk.
 *
 * A kill ...                                leaves ...                               repaired by
 *   in claim, before the word               its unit's reader dead                   whoever claims there next
 *   in claim, after the word                CLAIMED, counts wrong, `dirty`           rebuild, then reap: TODO
 *   while fetching                          CLAIMED                                  reap: TODO, one more death
 *   in end                                  CLAIMED, or its end; counts wrong        rebuild, reap
 *   in settle, before the word              all rows final, `dirty`                  rebuild: DONE
 */
#include "failpoint.h"
#include "layout.h"

static uint32_t make_word(uint32_t state, uint32_t stays, uint32_t deaths, uint32_t slot)
{
    return state | (stays & SHML_CHUNK_STAYS) | (deaths & 0xff) << 8 | slot << 16;
}

static uint32_t *counter(shml_control_t *c, uint32_t state)
{
    switch (state) {
    case SHML_CHUNK_TODO: return &c->chunks_todo;
    case SHML_CHUNK_CLAIMED: return &c->chunks_claimed;
    case SHML_CHUNK_DONE: return &c->chunks_done;
    default: return &c->chunks_broken;
    }
}

uint64_t shml_chunk_promise(const shml_chunk_t *chunk)
{
    uint32_t word = chunk->word;
    return (word & SHML_CHUNK_STAYS) && shml_word_state(word) <= SHML_CHUNK_CLAIMED
               ? chunk->num_rows - chunk->num_stored
               : 0;
}

static void set_word(shml_control_t *c, uint32_t index, uint32_t word)
{
    shml_chunk_t *chunk = &shml_chunks(c)[index];
    uint32_t was = shml_begin_change(c);
    SHML_FP("chunk.set.dirty");
    --*counter(c, shml_word_state(chunk->word));
    c->promised_rows -= shml_chunk_promise(chunk);
    SHML_FP("chunk.set.counted_out");
    atomic_store_explicit(&chunk->word, word, memory_order_release);
    SHML_FP("chunk.set.word");
    c->promised_rows += shml_chunk_promise(chunk);
    ++*counter(c, shml_word_state(word));
    SHML_FP("chunk.set.counted_in");
    shml_end_change(c, was);
    atomic_fetch_add_explicit(&c->progress, 1, memory_order_relaxed);
}

int32_t shml_chunk_of(shml_control_t *c, uint64_t id)
{
    if (shml_is_open(c))
        return shml_open_chunk_of(c, id);
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

void shml_chunk_settle(shml_seg_t *seg, uint64_t id)
{
    shml_control_t *c = seg->control;
    int32_t index = shml_chunk_of(c, id);
    if (index < 0)
        return;
    const shml_chunk_t *chunk = &shml_chunks(c)[index];
    uint32_t word = chunk->word;
    if (chunk->num_final != chunk->num_rows || shml_word_state(word) > SHML_CHUNK_CLAIMED)
        return;
    set_word(c, (uint32_t)index, make_word(SHML_CHUNK_DONE, word, shml_word_deaths(word), 0));
    shml_work_tell(seg); /* its raw record may be evicted */
}

void shml_chunk_renew(shml_seg_t *seg, uint32_t chunk)
{
    set_word(seg->control, chunk, make_word(SHML_CHUNK_TODO, 0, 0, 0));
}

void shml_chunk_unstay(shml_seg_t *seg, uint32_t chunk)
{
    set_word(seg->control, chunk, shml_chunks(seg->control)[chunk].word & ~SHML_CHUNK_STAYS);
    shml_work_tell(seg); /* its raw record may be evicted */
}

/* So many chunks may STAY before anything is known of their samples' size (guessed). */
#define UNKNOWN_CHUNKS 8u

/* Is there resident room that is promised to nobody, by the mean size of the samples so far? Before anything is known of
 * their size, for some few chunks that are fetched, and for what is already being made. */
static int may_stay(const shml_control_t *c, const shml_chunk_t *chunk, int is_fetched)
{
    const shml_region_t *resident = &c->regions[SHML_RESIDENT];
    uint64_t limit = shml_limit(resident) - resident->begin;
    if (resident->searched || limit == 0 || shml_word_state(chunk->word) > SHML_CHUNK_CLAIMED)
        return 0;
    if (shml_is_resident_full(c) || (c->most_resident > 0 && c->num_stored + c->promised_rows >= c->most_resident))
        return 0;
    uint64_t mean = c->num_commits > 0 ? c->commit_bytes / c->num_commits : c->record_bytes;
    if (mean == 0)
        return is_fetched || c->promised_rows < UNKNOWN_CHUNKS * (uint64_t)chunk->num_rows;
    return resident->used_bytes + c->promised_rows * mean < limit;
}

int shml_chunk_stay(shml_seg_t *seg, uint32_t index)
{
    shml_control_t *c = seg->control;
    const shml_chunk_t *chunk = &shml_chunks(c)[index];
    if (!(chunk->word & SHML_CHUNK_STAYS) && may_stay(c, chunk, 1))
        set_word(c, index, chunk->word | SHML_CHUNK_STAYS);
    return (chunk->word & SHML_CHUNK_STAYS) != 0;
}

/* Are its encoded rows at hand, in the raw region or spilled? */
static int has_raw(shml_seg_t *seg, uint32_t chunk, int *status)
{
    *status = SHML_OK;
    if (shml_chunks(seg->control)[chunk].spilled != 0)
        return 1;
    const shml_desc_t *desc = shml_find(seg, SHML_RAW | chunk, status);
    return desc != NULL && desc->state == SHML_DESC_READY;
}

int shml_chunk_look(shml_seg_t *seg, const uint32_t *chunks, uint32_t n, uint8_t *states)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    shml_control_t *c = seg->control;
    for (uint32_t i = 0; i < n && status == SHML_OK; i++) {
        if (chunks[i] >= c->num_chunks) {
            status = SHML_E_INVAL;
            break;
        }
        states[i] = (uint8_t)(shml_chunks(c)[chunks[i]].word & (0xf | SHML_CHUNK_STAYS));
        states[i] |= has_raw(seg, chunks[i], &status) ? SHML_CHUNK_HAS_RAW : 0;
    }
    shml_unlock(seg);
    return status;
}

/* ------------------------------------------------ fetching -------------------------------------------- */

/* Does a living client other than `slot` read the chunk's unit? A chunk alone in its unit needs no one reader. */
int shml_chunk_unit_is_taken(shml_control_t *c, uint32_t index, uint32_t slot)
{
    const shml_chunk_t *chunk = &shml_chunks(c)[index],
                       *first = chunk->unit <= index ? chunk - (index - chunk->unit) : chunk;
    return first->reader != 0 && first->reader - 1 != slot && shml_is_active(c, first->reader - 1) &&
           shml_clients(c)[first->reader - 1].gen == first->reader_gen;
}

int shml_chunk_take(shml_seg_t *seg, uint32_t index)
{
    shml_control_t *c = seg->control;
    shml_chunk_t *chunks = shml_chunks(c), *chunk = &chunks[index];
    uint32_t word = chunk->word, slot = (uint32_t)seg->self;
    shml_chunk_t *unit = chunk->unit <= index ? &chunks[chunk->unit] : chunk;
    int status, is_alone = unit == chunk && (index + 1 == c->num_chunks || chunks[index + 1].unit != chunk->unit);
    if (shml_word_state(word) > SHML_CHUNK_CLAIMED)
        return SHML_E_NOTFOUND;
    if (shml_word_state(word) == SHML_CHUNK_CLAIMED)
        return SHML_E_STALE;
    if (has_raw(seg, index, &status) || status != SHML_OK)
        return status == SHML_OK ? SHML_E_EXISTS : status;
    if (!is_alone && shml_chunk_unit_is_taken(c, index, slot))
        return SHML_E_STALE;
    uint32_t stays = (word & SHML_CHUNK_STAYS) || may_stay(c, chunk, 0) ? SHML_CHUNK_STAYS : 0;
    if (!is_alone && (unit->reader != slot + 1 || unit->reader_gen != shml_clients(c)[slot].gen)) {
        unit->reader = 0; /* a kill leaves no slot with another's generation */
        SHML_FP("chunk.claim.no_reader");
        unit->reader_gen = shml_clients(c)[slot].gen;
        SHML_FP("chunk.claim.reader_gen");
        unit->reader = slot + 1;
        SHML_FP("chunk.claim.reader");
    }
    set_word(c, index, make_word(SHML_CHUNK_CLAIMED, stays, shml_word_deaths(word), slot));
    return SHML_OK;
}

int shml_chunk_claim(shml_seg_t *seg, uint32_t chunk)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    if (seg->self < 0)
        status = SHML_E_LEFT;
    else
        status = chunk < seg->control->num_chunks && !shml_is_open(seg->control) ? shml_chunk_take(seg, chunk)
                                                                                 : SHML_E_INVAL;
    shml_unlock(seg);
    return status;
}

/* It will not be read: its rows that are not there are final. */
static void set_broken(shml_seg_t *seg, uint32_t index, uint32_t deaths)
{
    const shml_chunk_t *chunk = &shml_chunks(seg->control)[index];
    set_word(seg->control, index, make_word(SHML_CHUNK_BROKEN, chunk->word, deaths, 0));
    shml_wants_wake(seg, chunk->first_row, chunk->num_rows);
    shml_guests_met(seg, chunk->first_row, chunk->num_rows);
}

int shml_chunk_end(shml_seg_t *seg, uint32_t chunk, int outcome)
{
    if (chunk >= seg->control->num_chunks || outcome < SHML_FETCH_GIVEN_UP || outcome > SHML_FETCH_BROKEN)
        return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    shml_control_t *c = seg->control;
    uint32_t word = shml_chunks(c)[chunk].word, deaths = shml_word_deaths(word);
    if (seg->self < 0)
        status = SHML_E_LEFT;
    else if (shml_word_state(word) != SHML_CHUNK_CLAIMED || shml_word_slot(word) != (uint32_t)seg->self)
        status = SHML_E_STALE;
    else if (outcome == SHML_FETCH_BROKEN)
        set_broken(seg, chunk, deaths);
    else {
        c->num_fetched += outcome == SHML_FETCH_OK;
        SHML_FP("chunk.end.counted");
        set_word(c, chunk, make_word(SHML_CHUNK_TODO, word, outcome == SHML_FETCH_OK ? 0 : deaths, 0));
    }
    if (status == SHML_OK)
        shml_work_tell(seg);
    shml_unlock(seg);
    return status;
}

void shml_chunk_release(shml_seg_t *seg, uint32_t slot, int is_own_death)
{
    shml_control_t *c = seg->control;
    const shml_chunk_t *chunks = shml_chunks(c);
    for (uint32_t i = 0; c->chunks_claimed > 0 && i < c->num_chunks; i++) {
        uint32_t word = chunks[i].word;
        if (shml_word_state(word) != SHML_CHUNK_CLAIMED || shml_word_slot(word) != slot)
            continue;
        uint32_t deaths = shml_word_deaths(word) + (is_own_death ? 1 : 0);
        if (deaths >= SHML_MAX_ATTEMPTS)
            set_broken(seg, i, deaths);
        else
            set_word(c, i, make_word(SHML_CHUNK_TODO, word, deaths, 0));
        shml_work_tell(seg);
    }
}

/* ------------------------------------------------ wanted ---------------------------------------------- */

/* The chunk of a wanted id if somebody could fetch it, else NULL. *last: that of the want before, often the same. */
static shml_chunk_t *to_fetch(shml_control_t *c, uint64_t id, int32_t *last)
{
    shml_chunk_t *chunks = shml_chunks(c);
    if (*last < 0 || id - chunks[*last].first_row >= chunks[*last].num_rows)
        *last = shml_chunk_of(c, id);
    if (*last < 0 || shml_row_comes(c, id) != SHML_ROW_COMES)
        return NULL;
    return shml_word_state(chunks[*last].word) == SHML_CHUNK_TODO ? &chunks[*last] : NULL;
}

enum { ZERO, COUNT, COLLECT };

int shml_chunks_wanted(shml_seg_t *seg, uint32_t *chunks, uint32_t *counts, uint32_t max)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    shml_control_t *c = seg->control;
    uint32_t found = 0;
    for (int pass = ZERO; pass <= COLLECT; pass++) {
        for (uint32_t list = 0; list < SHML_NUM_WANT_LISTS; list++) {
            uint32_t n;
            const uint64_t *wants = shml_want_list(c, list, &n);
            int32_t last = -1;
            for (uint32_t i = 0; i < n; i++) {
                shml_chunk_t *chunk = to_fetch(c, wants[i], &last);
                if (chunk == NULL)
                    continue;
                if (pass == COLLECT && chunk->waiting > 0 && found < max && !has_raw(seg, (uint32_t)last, &status)) {
                    chunks[found] = (uint32_t)last;
                    counts[found++] = chunk->waiting;
                }
                chunk->waiting = pass == COUNT ? chunk->waiting + 1 : 0; /* COLLECT: each once */
            }
        }
    }
    shml_unlock(seg);
    return status < 0 ? status : (int)found;
}
