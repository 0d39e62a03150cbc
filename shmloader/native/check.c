/* check.c - every invariant of the control memory, for tests and diagnosis. */
#include <string.h>

#include "layout.h"

#define MUST(condition, text)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            *what = (text);                                                                                            \
            return SHML_E_CORRUPT;                                                                                     \
        }                                                                                                              \
    } while (0)

typedef struct sums {                       /* what the descriptors and chunks come to */
    uint64_t num_live, num_holes, num_free; /* in the index; resident holes; FREE ones below desc_end */
    uint64_t used[SHML_NUM_REGIONS], head[SHML_NUM_REGIONS], resident_bytes;
    uint64_t num_resident, num_transit; /* samples in resident; in transit */
    uint32_t blocks[SHML_NUM_REGIONS], states[SHML_DESC_ASIDE + 1], working[SHML_MAX_CLIENTS];
} sums_t;

static int is_link(const shml_control_t *c, uint32_t next) { return next != 0 && next <= c->num_descs; }

static int check_block(shml_control_t *c, const shml_desc_t *desc, sums_t *sums, const char **what)
{
    uint32_t i = 0;
    while (i < SHML_NUM_REGIONS && desc->offset >= c->regions[i].end)
        i++;
    MUST(i < SHML_NUM_REGIONS, "a block lies outside of the ring");
    const shml_region_t *r = &c->regions[i];
    MUST(desc->num_bytes > 0 && desc->offset % SHML_ALIGN == 0 && desc->num_bytes % SHML_ALIGN == 0,
         "a block is not aligned");
    MUST(desc->num_bytes <= r->end - desc->offset, "a block lies across the end of its region");
    MUST(desc->offset + desc->num_bytes <= r->backed_end, "a block lies in memory that is not backed");
    MUST((i == SHML_RAW_REGION) == (desc->id >= SHML_RAW && desc->id < SHML_CHUNK_ERROR) ||
             desc->state == SHML_DESC_HOLE,
         "a record is in the wrong region");
    if (desc->offset + desc->num_bytes > sums->head[i])
        sums->head[i] = desc->offset + desc->num_bytes;
    sums->blocks[i]++;
    sums->used[i] += desc->state == SHML_DESC_HOLE ? 0 : desc->num_bytes;
    sums->num_holes += i == SHML_RESIDENT && desc->state == SHML_DESC_HOLE;
    sums->resident_bytes += i == SHML_RESIDENT ? desc->num_bytes : 0;
    int is_sample = desc->state != SHML_DESC_HOLE && shml_is_sample(desc->id);
    sums->num_resident += i == SHML_RESIDENT && is_sample;
    sums->num_transit += i == SHML_TRANSIT && is_sample;
    return SHML_OK;
}

static int check_pins(shml_control_t *c, uint32_t index, const char **what)
{
    const shml_desc_t *desc = &shml_descs(c)[index];
    for (uint32_t word = 0; word < SHML_PIN_WORDS; word++) {
        uint64_t mask = shml_pins(c, index)[word];
        if (mask == 0)
            continue;
        MUST(shml_is_there(desc->state) && !shml_is_resident(c, desc->offset), "a pin on what is no record of transit");
        for (uint32_t bit = 0; bit < 64; bit++)
            MUST((mask >> bit & 1) == 0 || shml_is_active(c, word * 64 + bit), "a pin of nobody");
    }
    return SHML_OK;
}

/* Open sets: has the chunk that a record belongs to its place? */
static int is_placed(shml_control_t *c, uint64_t id)
{
    if (shml_is_sample(id))
        return shml_chunk_of(c, id) >= 0;
    uint64_t chunk = id & ~(SHML_RAW | SHML_CHUNK_ERROR);
    return chunk < c->num_chunks && shml_chunks(c)[chunk].first_row != UINT64_MAX;
}

static int check_desc(shml_seg_t *seg, uint32_t index, sums_t *sums, const char **what)
{
    shml_control_t *c = seg->control;
    const shml_desc_t *desc = &shml_descs(c)[index];
    uint32_t state = desc->state;
    int status;
    if (state == SHML_DESC_FREE) {
        sums->num_free += index < c->desc_end;
        return check_pins(c, index, what);
    }
    MUST(state <= SHML_DESC_ASIDE, "a descriptor's state is unknown");
    MUST(index < c->desc_end, "a used descriptor lies above desc_end");
    if (shml_has_block(state))
        status = check_block(c, desc, sums, what);
    else {
        MUST(desc->num_bytes == 0, "a row without a block has bytes");
        MUST(shml_is_sample(desc->id), "what is no row is claimed, suspect or aside");
        status = SHML_OK;
    }
    if (status == SHML_OK)
        status = check_pins(c, index, what);
    if (status != SHML_OK || state == SHML_DESC_HOLE)
        return status;
    sums->num_live++;
    sums->states[state] += (uint32_t)shml_is_sample(desc->id);
    MUST(shml_find(seg, desc->id, &status) == desc, "a record is not found by its id");
    if (state == SHML_DESC_RESERVED || state == SHML_DESC_CLAIMED) {
        MUST(shml_is_active(c, desc->owner), "a claim or reservation has no living owner");
        sums->working[desc->owner]++;
    }
    MUST(state != SHML_DESC_SUSPECT || (desc->deaths > 0 && desc->deaths < SHML_MAX_ATTEMPTS),
         "a suspect's deaths are wrong");
    int has_chunk = !shml_is_open(c) || is_placed(c, desc->id);
    MUST(has_chunk || (state != SHML_DESC_SUSPECT && state != SHML_DESC_ASIDE), "a row is suspect without its chunk");
    MUST(has_chunk || shml_is_sample(desc->id), "encoded rows or an error of no chunk");
    MUST(state != SHML_DESC_ASIDE || desc->deaths >= SHML_MAX_ATTEMPTS, "a row is aside without its deaths");
    return SHML_OK;
}

static int check_lists(shml_control_t *c, const sums_t *sums, const char **what)
{
    const shml_desc_t *descs = shml_descs(c);
    uint64_t linked = 0, listed = 0;
    for (uint32_t b = 0; b < c->num_buckets; b++)
        for (uint32_t next = shml_buckets(c)[b]; is_link(c, next) && linked <= c->num_descs;
             next = descs[next - 1].next)
            linked++;
    MUST(linked == sums->num_live, "a chain has more or fewer records than there are");
    for (uint32_t next = c->hole_list; is_link(c, next) && listed <= c->num_descs; next = descs[next - 1].next)
        listed++;
    MUST(listed == sums->num_holes, "the list of holes is wrong");
    listed = 0;
    for (uint32_t next = c->free_list; is_link(c, next) && listed <= c->num_descs; next = descs[next - 1].next)
        listed++;
    MUST(listed == sums->num_free, "the list of free descriptors is wrong");
    return SHML_OK;
}

static int check_region(shml_control_t *c, uint32_t i, const sums_t *sums, const char **what)
{
    const shml_desc_t *descs = shml_descs(c);
    const shml_region_t *r = &c->regions[i];
    uint64_t head = sums->blocks[i] > 0 ? sums->head[i] : r->begin;
    MUST(r->backed_end >= r->begin && r->backed_end <= r->end, "the backed end lies outside of its region");
    MUST(r->used_bytes == sums->used[i], "used_bytes is wrong");
    MUST(r->num_blocks == sums->blocks[i], "a number of blocks is wrong");
    MUST(r->head == head, "a head is not the end of the highest block");
    if (i == SHML_RESIDENT) {
        MUST(sums->resident_bytes == head - r->begin, "there is a gap in resident");
        return SHML_OK;
    }
    uint64_t end = r->begin;
    uint32_t listed = 0, last = 0, has_cursor = r->cursor == 0;
    for (uint32_t at = r->first; at != 0; at = descs[at - 1].after) {
        MUST(is_link(c, at) && listed <= r->num_blocks, "a list of blocks is damaged");
        MUST(shml_has_block(descs[at - 1].state), "a list has what is no block");
        MUST(descs[at - 1].offset >= end && descs[at - 1].offset < r->end, "blocks overlap or are out of order");
        end = descs[at - 1].offset + descs[at - 1].num_bytes;
        has_cursor |= r->cursor == at;
        listed++;
        last = at;
    }
    MUST(listed == r->num_blocks, "a list lacks blocks");
    MUST(last == r->last, "a list's last block is another");
    MUST(has_cursor, "a cursor is at no block");
    return SHML_OK;
}

/* No two blocks of resident share a byte: mark each 64-byte unit of [0, head) in a bitmap. */
static int check_overlap(shml_control_t *c, uint8_t *bitmap, const char **what)
{
    const shml_desc_t *descs = shml_descs(c);
    uint64_t head = c->regions[SHML_RESIDENT].head, size = head / SHML_ALIGN / 8 + 1;
    if (size > c->control_bytes)
        return SHML_OK; /* small rows, much memory: `scratch` does not do */
    memset(bitmap, 0, size);
    for (uint32_t i = 0; i < c->desc_end; i++) {
        if (!shml_has_block(descs[i].state) || descs[i].offset >= head)
            continue;
        for (uint64_t unit = descs[i].offset / SHML_ALIGN; unit < (descs[i].offset + descs[i].num_bytes) / SHML_ALIGN;
             unit++) {
            MUST(!(bitmap[unit / 8] >> (unit % 8) & 1), "two records overlap");
            bitmap[unit / 8] |= (uint8_t)(1u << (unit % 8));
        }
    }
    return SHML_OK;
}

static int check_counts(shml_control_t *c, const sums_t *sums, const char **what)
{
    const uint32_t *states = sums->states;
    MUST(states[SHML_DESC_READY] == c->num_ready && states[SHML_DESC_ERROR] == c->num_errors &&
             states[SHML_DESC_RESERVED] == c->num_reserved && states[SHML_DESC_CLAIMED] == c->num_claimed &&
             states[SHML_DESC_SUSPECT] == c->num_suspect && states[SHML_DESC_ASIDE] == c->num_aside,
         "a count of records is wrong");
    MUST(sums->num_resident == c->num_resident, "the count of resident samples is wrong");
    MUST(c->most_resident == 0 || c->num_resident <= c->most_resident, "more samples are resident than may be");
    MUST(sums->num_transit == c->num_transit, "the count of samples in transit is wrong");
    MUST(c->most_transit == 0 || c->num_transit <= c->most_transit, "more samples are in transit than may be");
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++) {
        const shml_client_t *client = &shml_clients(c)[slot];
        MUST(client->num_working == sums->working[slot], "a client's count of rows is wrong");
        MUST(client->num_wants <= SHML_MAX_WANTS, "a want-list is too long");
        MUST(client->state == SHML_CLIENT_ACTIVE || (client->num_wants == 0 && (client->want_gen & 1) == 0),
             "nobody waits for something");
    }
    return SHML_OK;
}

/* What is final of a chunk, counted again. */
static void count_rows(shml_seg_t *seg, const shml_chunk_t *chunk, uint32_t *num_final, uint32_t *num_stored,
                       uint64_t *num_bytes)
{
    shml_control_t *c = seg->control;
    *num_final = *num_stored = 0;
    *num_bytes = 0;
    for (uint32_t i = 0; i < chunk->num_rows && chunk->first_row != UINT64_MAX; i++) {
        int status;
        const shml_desc_t *desc = shml_find(seg, chunk->first_row + i, &status);
        if (desc == NULL)
            continue;
        int is_stored = shml_is_there(desc->state) && shml_is_resident(c, desc->offset);
        *num_final += is_stored || desc->state == SHML_DESC_ASIDE;
        *num_stored += (uint32_t)is_stored;
        *num_bytes += is_stored ? desc->num_bytes : 0;
    }
}

static int check_chunks(shml_seg_t *seg, const char **what)
{
    shml_control_t *c = seg->control;
    uint32_t counts[4] = {0}, num_final, num_stored;
    uint64_t num_bytes, promised = 0, stored = 0;
    for (uint32_t i = 0; i < c->num_chunks; i++) {
        const shml_chunk_t *chunk = &shml_chunks(c)[i];
        uint32_t word = chunk->word, state = shml_word_state(word);
        MUST(state <= SHML_CHUNK_BROKEN, "a chunk's state is unknown");
        counts[state]++;
        MUST(state != SHML_CHUNK_CLAIMED || shml_is_active(c, shml_word_slot(word)), "a chunk is claimed by nobody");
        MUST(chunk->unit <= i, "a chunk's unit begins behind it");
        MUST(!shml_is_open(c) || shml_open_place_is_good(c, i),
             "a place has a chunk of another place, or what is no chunk");
        count_rows(seg, chunk, &num_final, &num_stored, &num_bytes);
        MUST(num_final == chunk->num_final && num_stored == chunk->num_stored && num_bytes == chunk->resident_bytes,
             "a chunk's count of rows is wrong");
        MUST((num_final == chunk->num_rows) == (state == SHML_CHUNK_DONE) || state == SHML_CHUNK_BROKEN,
             "a chunk is done with rows missing, or complete and not done");
        promised += shml_chunk_promise(chunk);
        stored += num_stored;
    }
    MUST(counts[SHML_CHUNK_TODO] == c->chunks_todo && counts[SHML_CHUNK_CLAIMED] == c->chunks_claimed &&
             counts[SHML_CHUNK_DONE] == c->chunks_done && counts[SHML_CHUNK_BROKEN] == c->chunks_broken,
         "a count of chunks is wrong");
    MUST(promised == c->promised_rows, "promised_bytes is wrong");
    MUST(stored == c->num_stored, "the count of stored samples is wrong");
    return SHML_OK;
}

/* What is spilled lies in what was given out; with `bitmap` no two share a page, else only their sum is looked at. A
 * chunk is in the raw region or spilled, never both. */
static int check_spill(shml_seg_t *seg, uint8_t *bitmap, const char **what)
{
    shml_control_t *c = seg->control;
    uint64_t sum = 0, end = c->spill_end, size = end / SHML_SPILL_PAGE / 8 + 1;
    int status;
    MUST(end <= c->spill_bytes && end % SHML_SPILL_PAGE == 0, "more of the disk is given out than there is");
    if (bitmap != NULL && size > c->control_bytes)
        bitmap = NULL;
    if (bitmap != NULL)
        memset(bitmap, 0, size);
    for (uint32_t i = 0; i < c->num_chunks; i++) {
        uint64_t spilled = shml_chunks(c)[i].spilled, at = shml_spilled_offset(spilled);
        uint64_t bytes = shml_spill_pages(shml_spilled_bytes(spilled));
        if (spilled == 0)
            continue;
        MUST(bytes > 0 && at <= end && bytes <= end - at, "a chunk is spilled outside of what was given out");
        MUST((sum += bytes) <= end, "more is spilled than was given out");
        const shml_desc_t *desc = shml_find(seg, SHML_RAW | i, &status);
        MUST(status == SHML_OK && (desc == NULL || desc->state != SHML_DESC_READY), "a chunk is in raw and spilled");
        for (uint64_t page = at / SHML_SPILL_PAGE; bitmap != NULL && page < (at + bytes) / SHML_SPILL_PAGE; page++) {
            MUST(!(bitmap[page / 8] >> (page % 8) & 1), "two spilled chunks overlap");
            bitmap[page / 8] |= (uint8_t)(1u << (page % 8));
        }
    }
    return SHML_OK;
}

static int check_joined(shml_control_t *c, uint32_t index, const char **what)
{
    const shml_order_t *order = &shml_order_table(c)[index];
    uint32_t num_joined = 0, num_marks = 0;
    MUST(order->num_readers <= SHML_MAX_READERS, "an order has too many readers");
    for (uint32_t reader = 0; reader < SHML_MAX_READERS; reader++) {
        uint32_t has_joined = order->joined[reader / 64] >> (reader % 64) & 1;
        MUST(!has_joined || reader < order->num_readers, "a reader has joined that there is none of");
        num_joined += has_joined;
    }
    for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++)
        num_marks += shml_marks(c, index)[slot] != 0;
    MUST(order->num_readers == 0 || num_marks > 0, "a joined order lives without readers");
    MUST(order->num_readers == 0 || num_marks <= num_joined, "a client reads in an order that it has not joined");
    return SHML_OK;
}

static int check_orders(shml_control_t *c, const char **what)
{
    uint32_t num_orders = 0;
    for (uint32_t i = 0; i < SHML_MAX_ORDERS; i++) {
        const shml_order_t *order = &shml_order_table(c)[i];
        MUST(order->state <= SHML_ORDER_LIVE, "an order's state is unknown");
        if (order->state == SHML_ORDER_FREE)
            continue;
        num_orders++;
        MUST(shml_is_active(c, (uint32_t)order->owner), "an order has no living owner");
        MUST(order->low_water == shml_low_water(c, i), "a low-water mark is wrong");
        for (uint32_t slot = 0; slot < SHML_MAX_CLIENTS; slot++)
            MUST(shml_marks(c, i)[slot] == 0 || shml_is_active(c, slot), "a mark of nobody");
        int status = check_joined(c, i, what);
        if (status != SHML_OK)
            return status;
    }
    MUST(num_orders == c->num_orders, "the number of orders is wrong");
    return SHML_OK;
}

static int check_guests(const shml_control_t *c, const char **what)
{
    uint32_t n = shml_guest_num_wants(c);
    for (uint32_t i = 0; i < n; i++) {
        if (c->guest_wants[i] == SHML_NO_WANT)
            continue;
        MUST(c->guest_wants[i] < c->num_records, "a guest wants what is no row");
        for (uint32_t k = 0; k < i; k++)
            MUST(c->guest_wants[k] != c->guest_wants[i], "a row is listed twice for the guests");
    }
    return SHML_OK;
}

static int check_locked(shml_seg_t *seg, void *scratch, const char **what)
{
    shml_control_t *c = seg->control;
    sums_t sums = {0};
    int status = SHML_OK;
    MUST(!c->dirty, "derived state is marked dirty");
    MUST(c->desc_end <= c->num_descs, "desc_end lies behind the table");
    for (uint32_t i = 0; i < c->num_descs && status == SHML_OK; i++)
        status = check_desc(seg, i, &sums, what);
    if (status == SHML_OK)
        status = check_lists(c, &sums, what);
    for (uint32_t i = 0; i < SHML_NUM_REGIONS && status == SHML_OK; i++)
        status = check_region(c, i, &sums, what);
    if (status == SHML_OK)
        status = check_counts(c, &sums, what);
    if (status == SHML_OK)
        status = check_chunks(seg, what);
    if (status == SHML_OK)
        status = check_spill(seg, scratch, what);
    if (status == SHML_OK)
        status = check_orders(c, what);
    if (status == SHML_OK)
        status = check_guests(c, what);
    return status == SHML_OK && scratch != NULL ? check_overlap(c, scratch, what) : status;
}

int shml_check(shml_seg_t *seg, void *scratch, const char **what)
{
    *what = "";
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    status = check_locked(seg, scratch, what);
    shml_unlock(seg);
    return status;
}
