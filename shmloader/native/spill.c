/* spill.c - encoded chunks that were written to a file on local disk: room in it, and where each of them lies.
 *
 * The file is only added to: room is given out from its beginning to its end, whole pages at a time, and nothing is ever
 * removed. So a chunk that is there stays there, needs no pin, and is read without the mutex. Whoever has claimed a
 * chunk reserves room, writes the bytes (the file is not the core's, which never sees its bytes), and commits.
 * What cannot be written gives its blocks back to the disk; its room in the file is lost. A chunk is either in the raw region or spilled, never both: only its claimant writes either, and what is
 * there of one or the other cannot be claimed.
 *
 * field            written by                                                         kind
 *   spill_bytes      format                                                           0: nothing is ever spilled
 *   spill_end        who reserves, under the mutex                                    truth; only grows
 *   spill_frozen     who could not write, under the mutex                             truth; only ever to 1
 *   chunk.spilled    its claimant, under the mutex; read by anybody without it        truth; stored last, once
 *
 * Nothing is derived, so there is nothing to rebuild.
 *
 * A kill ...                                leaves ...                                  repaired by
 *   in reserve, before spill_end              nothing                                     -
 *   in reserve, after it, or while writing    room that is lost; the chunk CLAIMED        reap: TODO; the room by nobody
 *   in commit, before `spilled`               the same                                    the same
 *   in commit, after it                       the chunk spilled and CLAIMED               reap: TODO, not to be claimed
 *   in give_back                              blocks taken that nobody uses               the end of the file
 *   in freeze                                 frozen or not                               the next that cannot write
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>

#include "failpoint.h"
#include "layout.h"

/* `spilled`: the page where it begins in the upper half, its bytes / SHML_ALIGN in the lower one, which is never 0. */
static uint64_t make_place(uint64_t offset, uint64_t num_bytes)
{
    return offset / SHML_SPILL_PAGE << 32 | shml_align(num_bytes) / SHML_ALIGN;
}

/* Has this client claimed the chunk? */
static int check_claim(const shml_seg_t *seg, uint32_t chunk)
{
    uint32_t word = shml_chunks(seg->control)[chunk].word;
    if (seg->self < 0)
        return SHML_E_LEFT;
    return shml_word_state(word) == SHML_CHUNK_CLAIMED && shml_word_slot(word) == (uint32_t)seg->self ? SHML_OK
                                                                                                      : SHML_E_STALE;
}

static int reserve_locked(shml_seg_t *seg, uint32_t chunk, uint64_t num_bytes, uint64_t *offset)
{
    shml_control_t *c = seg->control;
    int status = check_claim(seg, chunk);
    if (status != SHML_OK)
        return status;
    uint64_t end = c->spill_end;
    if (end > c->spill_bytes || end % SHML_SPILL_PAGE != 0)
        return SHML_POISON(seg);
    if (c->spill_frozen || num_bytes > c->spill_bytes - end)
        return SHML_E_FULL;
    *offset = end;
    SHML_FP("spill.reserve.begin");
    /* SYNC(spill): who finds a chunk that lies there has acquired `spilled`, which is stored after this. */
    atomic_store_explicit(&c->spill_end, end + shml_spill_pages(num_bytes), memory_order_release);
    SHML_FP("spill.reserve.stored");
    return SHML_OK;
}

int shml_spill_reserve(shml_seg_t *seg, uint32_t chunk, uint64_t num_bytes, uint64_t *offset)
{
    if (chunk >= seg->control->num_chunks || num_bytes == 0 || num_bytes > SHML_MAX_SPILLED_BYTES)
        return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    status = reserve_locked(seg, chunk, num_bytes, offset);
    shml_unlock(seg);
    return status;
}

int shml_spill_commit(shml_seg_t *seg, uint32_t chunk, uint64_t offset, uint64_t num_bytes)
{
    if (chunk >= seg->control->num_chunks || num_bytes == 0 || num_bytes > SHML_MAX_SPILLED_BYTES ||
        offset % SHML_SPILL_PAGE != 0)
        return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    shml_control_t *c = seg->control;
    shml_chunk_t *one = &shml_chunks(c)[chunk];
    status = check_claim(seg, chunk);
    if (status == SHML_OK && (offset > c->spill_end || num_bytes > c->spill_end - offset))
        status = SHML_E_INVAL;
    if (status == SHML_OK && one->spilled != 0)
        status = SHML_E_EXISTS;
    if (status == SHML_OK) {
        SHML_FP("spill.commit.begin");
        /* SYNC(spill): pairs with the acquire in shml_spill_find. */
        atomic_store_explicit(&one->spilled, make_place(offset, num_bytes), memory_order_release);
        SHML_FP("spill.commit.stored");
    }
    shml_unlock(seg);
    return status;
}

/* Room is given out once, so what is not committed is nobody else's, whether the claim has ended meanwhile or not. */
int shml_spill_give_back(const shml_seg_t *seg, int fd, uint64_t offset, uint64_t num_bytes)
{
    uint64_t end = atomic_load_explicit(&seg->control->spill_end, memory_order_acquire);
    if (num_bytes == 0 || offset % SHML_SPILL_PAGE != 0 || offset > end || num_bytes > end - offset)
        return SHML_E_INVAL;
    while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                     (off_t)shml_spill_pages(num_bytes)) != 0)
        if (errno != EINTR)
            return SHML_E_SYS;
    return SHML_OK;
}

int shml_spill_freeze(shml_seg_t *seg)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    int is_first = !seg->control->spill_frozen;
    SHML_FP("spill.freeze.begin");
    seg->control->spill_frozen = 1;
    SHML_FP("spill.freeze.stored");
    shml_unlock(seg);
    return is_first;
}

int shml_spill_find(const shml_seg_t *seg, uint32_t chunk, uint64_t *offset, uint64_t *num_bytes)
{
    shml_control_t *c = seg->control;
    if (chunk >= c->num_chunks)
        return SHML_E_INVAL;
    uint64_t place = atomic_load_explicit(&shml_chunks(c)[chunk].spilled, memory_order_acquire); /* SYNC(spill) */
    if (place == 0)
        return SHML_E_NOTFOUND;
    uint64_t end = atomic_load_explicit(&c->spill_end, memory_order_acquire);
    uint64_t at = shml_spilled_offset(place), bytes = shml_spilled_bytes(place);
    if (end > c->spill_bytes || bytes == 0 || at > end || bytes > end - at)
        return SHML_E_CORRUPT;
    *offset = at;
    *num_bytes = bytes;
    return SHML_OK;
}
