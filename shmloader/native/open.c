/* open.c - open sets: chunks of streams whose end is not known, in a fixed number of places.
 *
 * In a closed set each row of the source has its number, and each chunk its rows, for ever. Here a row is a position of
 * one iteration: its id is made of the order's slot and generation and the position. Each order slot has
 * chunks_per_order places; chunk `number` of the order's stream (rows_per_chunk positions) has place number %
 * chunks_per_order, as long as that place's `first_row` is the id of its first row. So an id tells the place, and the
 * place whether it is still, or already, that chunk's. All else (the word, the raw record SHML_RAW | place, the error
 * record) is as in a closed set.
 *
 * shml_chunk_claim_open gives a place away, in the section that claims it. What must not go is told at vacate().
 *
 * A generation has 16 bits in an id, so ids come again after 65536 orders in one slot: then what is left of the old one
 * is taken out before the order begins (shml_open_renew).
 *
 * SUSPECT and ASIDE rows have no block that somebody else could take: they are only where their chunk has its place, go
 * with it (vacate), and are not made without (shml_desc_lose). Other rows of a chunk that has lost its place are
 * evicted as any others, no living order being in need of them.
 *
 * A kill ...                                leaves ...                                     repaired by
 *   in vacating, after the word             the old chunk, to do again; nobody reads it    whoever claims there next
 *   in vacating, some records gone          the same without them, `dirty`                 rebuild; who claims next
 *   in vacating, after first_row            nobody's place                                 who claims next
 *   after the new first_row                 the new chunk, TODO                            who claims next
 *   in renewing an order's slot             some of the old generation gone, `dirty`       rebuild; who begins next
 */
#include "failpoint.h"
#include "layout.h"

#define NOBODYS UINT64_MAX
_Static_assert(SHML_MAX_ORDERS == 1u << 6, "an id has 6 bits of slot");

/* Of which order an id is: its slot and the low bits of its generation. */
static uint64_t order_part(uint64_t id) { return id >> SHML_POSITION_BITS; }

int32_t shml_open_chunk_of(shml_control_t *c, uint64_t id)
{
    if (!shml_is_sample(id))
        return -1;
    uint64_t position = id & SHML_MAX_POSITION;
    uint32_t slot = (uint32_t)order_part(id) % SHML_MAX_ORDERS;
    uint32_t index = slot * c->chunks_per_order + (uint32_t)(position / c->rows_per_chunk % c->chunks_per_order);
    return shml_chunks(c)[index].first_row == id - position % c->rows_per_chunk ? (int32_t)index : -1;
}

int shml_row_comes(shml_control_t *c, uint64_t id)
{
    if (!shml_is_open(c) || !shml_is_sample(id))
        return SHML_ROW_COMES;
    const shml_order_t *order = &shml_order_table(c)[order_part(id) % SHML_MAX_ORDERS];
    if (order->state != SHML_ORDER_LIVE || (order->gen & 0xffffu) != id >> (SHML_POSITION_BITS + 6))
        return SHML_ROW_GONE;
    return (id & SHML_MAX_POSITION) < order->num_positions ? SHML_ROW_COMES : SHML_ROW_AT_END;
}

int shml_open_place_is_good(shml_control_t *c, uint32_t index)
{
    const shml_chunk_t *place = &shml_chunks(c)[index];
    uint64_t position = place->first_row & SHML_MAX_POSITION;
    if (place->num_rows != c->rows_per_chunk || place->unit != index - index % c->chunks_per_order)
        return 0;
    if (place->first_row == NOBODYS)
        return place->word == SHML_CHUNK_TODO && place->num_final == 0;
    return shml_is_sample(place->first_row) && position % c->rows_per_chunk == 0 &&
           shml_open_chunk_of(c, place->first_row) == (int32_t)index;
}

/* ------------------------------------------------ places ---------------------------------------------- */

int shml_open_is_spent(shml_control_t *c, uint32_t index)
{
    uint64_t first = shml_chunks(c)[index].first_row;
    if (first == NOBODYS || shml_row_comes(c, first) != SHML_ROW_COMES)
        return 1;
    return (first & SHML_MAX_POSITION) + c->rows_per_chunk <=
           shml_order_table(c)[order_part(first) % SHML_MAX_ORDERS].low_water;
}

static int is_in_use(shml_control_t *c, const shml_desc_t *desc)
{
    return desc != NULL && (desc->state == SHML_DESC_RESERVED || shml_is_pinned(c, (uint32_t)(desc - shml_descs(c))));
}

/* The rows of a place's chunk that have no block and are nobody's work. */
static int forget_rows(shml_seg_t *seg, const shml_chunk_t *place)
{
    shml_control_t *c = seg->control;
    int status = SHML_OK;
    for (uint32_t i = 0; i < c->rows_per_chunk && status == SHML_OK; i++) {
        const shml_desc_t *desc = shml_find(seg, place->first_row + i, &status);
        if (desc != NULL && (desc->state == SHML_DESC_SUSPECT || desc->state == SHML_DESC_ASIDE))
            status = shml_row_forget(seg, (uint32_t)(desc - shml_descs(c)));
    }
    SHML_FP("open.vacate.rows");
    return status;
}

/* Make a place nobody's; what belonged to its chunk goes. FULL: somebody fetches the chunk, reads its encoded rows or
 * writes them. Whether the chunk itself is still needed the caller knows. In a bracket. */
static int vacate(shml_seg_t *seg, uint32_t index)
{
    shml_control_t *c = seg->control;
    shml_chunk_t *place = &shml_chunks(c)[index];
    if (place->first_row == NOBODYS)
        return SHML_OK;
    int status, status_of_error;
    const shml_desc_t *raw = shml_find(seg, SHML_RAW | index, &status);
    const shml_desc_t *error = shml_find(seg, SHML_CHUNK_ERROR | index, &status_of_error);
    if (status != SHML_OK || status_of_error != SHML_OK)
        return SHML_E_POISONED;
    if (shml_word_state(place->word) == SHML_CHUNK_CLAIMED || is_in_use(c, raw) || is_in_use(c, error))
        return SHML_E_FULL;
    shml_chunk_renew(seg, index); /* first: DONE means that all rows are there */
    SHML_FP("open.vacate.renewed");
    if (raw != NULL)
        status = shml_desc_hole(seg, (uint32_t)(raw - shml_descs(c)));
    if (status == SHML_OK && error != NULL)
        status = shml_desc_hole(seg, (uint32_t)(error - shml_descs(c)));
    SHML_FP("open.vacate.records");
    if (status == SHML_OK)
        status = forget_rows(seg, place);
    if (status != SHML_OK)
        return status;
    place->first_row = NOBODYS;
    SHML_FP("open.vacate.nobodys");
    return SHML_OK;
}

/* Give the place to the chunk that begins with row `first`. */
static int give_place(shml_seg_t *seg, uint32_t index, uint64_t first)
{
    shml_control_t *c = seg->control;
    shml_chunk_t *place = &shml_chunks(c)[index];
    if (shml_chunk_unit_is_taken(c, index, (uint32_t)seg->self))
        return SHML_E_STALE;
    if (!shml_open_is_spent(c, index))
        return SHML_E_FULL;
    uint32_t was = shml_begin_change(c);
    SHML_FP("open.give.dirty");
    int status = vacate(seg, index);
    if (status == SHML_OK) {
        place->first_row = first;
        SHML_FP("open.give.first_row");
    }
    if (status != SHML_E_POISONED)
        shml_end_change(c, was);
    return status;
}

static int claim_locked(shml_seg_t *seg, uint32_t slot, uint32_t gen, uint64_t number, uint32_t *chunk)
{
    shml_control_t *c = seg->control;
    const shml_order_t *order = shml_order_living(c, slot, gen);
    if (seg->self < 0)
        return SHML_E_LEFT;
    if (order == NULL)
        return SHML_E_STALE;
    uint64_t rows = c->rows_per_chunk, begin = number * rows;
    *chunk = slot * c->chunks_per_order + (uint32_t)(number % c->chunks_per_order);
    if (number > SHML_MAX_POSITION / rows || begin + rows > SHML_MAX_POSITION + 1 || begin >= order->num_positions ||
        begin + rows <= order->low_water)
        return SHML_E_NOTFOUND;
    /* The place is for one that is read before, fetched or not: else it would never have any. */
    if (number >= order->low_water / rows + c->chunks_per_order)
        return SHML_E_FULL;
    uint64_t first = shml_open_id(slot, gen, begin);
    int status = SHML_OK;
    if (shml_chunks(c)[*chunk].first_row != first)
        status = give_place(seg, *chunk, first);
    return status == SHML_OK ? shml_chunk_take(seg, *chunk) : status;
}

int shml_chunk_claim_open(shml_seg_t *seg, uint32_t slot, uint32_t gen, uint64_t number, uint32_t *chunk)
{
    *chunk = UINT32_MAX;
    if (!shml_is_open(seg->control))
        return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    status = claim_locked(seg, slot, gen, number, chunk);
    shml_unlock(seg);
    return status;
}

int shml_chunk_first(shml_seg_t *seg, uint32_t chunk, uint64_t *first_row)
{
    if (chunk >= seg->control->num_chunks)
        return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    *first_row = shml_chunks(seg->control)[chunk].first_row;
    shml_unlock(seg);
    return SHML_OK;
}

/* ------------------------------------------------ orders ---------------------------------------------- */

/* Take out what is left of an order that had the same slot and the same low bits of the generation, 65536 orders ago.
 * FULL: something of it is in use. */
static int take_out_old(shml_seg_t *seg, uint32_t slot, uint64_t part)
{
    shml_control_t *c = seg->control;
    const shml_desc_t *descs = shml_descs(c);
    int status = SHML_OK;
    for (uint32_t i = 0; i < c->chunks_per_order && status == SHML_OK; i++) {
        uint32_t index = slot * c->chunks_per_order + i;
        if (order_part(shml_chunks(c)[index].first_row) == part)
            status = vacate(seg, index);
    }
    for (uint32_t i = 0; i < c->desc_end && i < c->num_descs && status == SHML_OK; i++) {
        if (descs[i].state == SHML_DESC_FREE || descs[i].state == SHML_DESC_HOLE || order_part(descs[i].id) != part)
            continue;
        status = shml_is_evictable(c, i, 1) ? shml_desc_hole(seg, i) : SHML_E_FULL;
        SHML_FP("open.renew.row");
    }
    return status;
}

int shml_open_has_claimed(shml_control_t *c, uint32_t slot)
{
    if (!shml_is_open(c))
        return 0;
    const shml_chunk_t *places = &shml_chunks(c)[slot * c->chunks_per_order];
    for (uint32_t i = 0; i < c->chunks_per_order; i++)
        if (shml_word_state(places[i].word) == SHML_CHUNK_CLAIMED)
            return 1;
    return 0;
}

int shml_open_renew(shml_seg_t *seg, uint32_t slot, uint32_t gen)
{
    shml_control_t *c = seg->control;
    if (!shml_is_open(c))
        return SHML_OK;
    /* Another stream: whoever comes first may read it. */
    shml_chunks(c)[slot * c->chunks_per_order].reader = 0;
    SHML_FP("open.renew.reader");
    return gen > 0xffff ? take_out_old(seg, slot, order_part(shml_open_id(slot, gen, 0))) : SHML_OK;
}
