/* Random operations on records, and on chunks, beside models that know what each must come to. One process stands in for
 * all.
 *
 * The model of records does not foresee where a record goes: it takes the place that was found, and asks whether what lay there could
 * be had. Where nothing was found it looks for room itself. */
#define _GNU_SOURCE
#include "transit.h"

#define MODEL_ROWS    40u
#define MODEL_RAWS    6u
#define MODEL_IDS     (MODEL_ROWS + MODEL_RAWS)
#define MODEL_CLIENTS 6 /* 0 sees to the dead and does not die, 1 and 2 are services, the others readers */
#define MODEL_ORDERS  3
#define MODEL_HELD    64

typedef struct item {
    enum { NONE, CLAIMED, RESERVED, READY, ERROR, SUSPECT, ASIDE } state;
    int owner; /* of CLAIMED and RESERVED */
    shml_ticket_t ticket;
    uint32_t version, deaths;
    shml_stamp_t stamp;
    uint32_t pins[MODEL_CLIENTS];
    /* Wants: 1: it is kept for this client; 2: perhaps (want). */
    uint8_t wants[MODEL_CLIENTS];
} item_t;

typedef struct model_order {
    int is_live, owner;
    shml_order_info_t info;
    uint64_t marks[MODEL_CLIENTS]; /* 0: none, else 1 + mark */
    uint64_t next[MODEL_CLIENTS];  /* where each goes on */
    uint64_t low_water;
} model_order_t;

static struct {
    item_t items[MODEL_IDS];
    shml_seg_t *clients[MODEL_CLIENTS];
    model_order_t orders[MODEL_ORDERS];
    struct {
        shml_ref_t ref;
        uint32_t item;
    } held[MODEL_CLIENTS][MODEL_HELD];
    int num_held[MODEL_CLIENTS];
    uint64_t seed, num_evicted;
    uint32_t num_full, num_ok;
} model;

static uint64_t dice(uint64_t n) { return test_random(&model.seed) % n; }
static uint64_t model_id(uint32_t u) { return u < MODEL_ROWS ? u : SHML_RAW | (u - MODEL_ROWS); }
static int is_there(const item_t *item) { return item->state == READY || item->state == ERROR; }
static int has_block(const item_t *item) { return item->state == RESERVED || is_there(item); }
static int region_of(const item_t *item)
{
    for (int i = 0; i < SHML_NUM_REGIONS; i++)
        if (item->ticket.offset >= region((uint32_t)i)->begin && item->ticket.offset < region((uint32_t)i)->end)
            return i;
    test_fail(__FILE__, __LINE__, "a block in no region");
}

static void set_mark(model_order_t *order, int client, uint64_t value)
{
    uint64_t low = UINT64_MAX;
    order->marks[client] = value;
    for (int c = 0; c < MODEL_CLIENTS; c++)
        if (order->marks[c] != 0 && order->marks[c] - 1 < low)
            low = order->marks[c] - 1;
    order->low_water = low != UINT64_MAX ? low : order->low_water; /* while nobody reads it stays where it was */
}

static int is_stamped(const item_t *item)
{
    for (int k = 0; k < MODEL_ORDERS; k++) {
        const model_order_t *order = &model.orders[k];
        if (order->is_live && order->info.slot == item->stamp.order && order->info.gen == item->stamp.gen)
            return order->low_water < item->stamp.until;
    }
    return 0;
}

/* 1: it must not be evicted; 0: it may be; -1: it depends on more than was promised. */
static int is_kept(uint32_t u, int urgent)
{
    const item_t *item = &model.items[u];
    int kept = 0;
    if (item->state == RESERVED || (!urgent && is_stamped(item)))
        return 1;
    if (u >= MODEL_ROWS) {
        uint8_t state = chunk_state(model.clients[0], u - MODEL_ROWS);
        if ((state & SHML_CHUNK_STAYS) && (state & 0xf) != SHML_CHUNK_DONE)
            return 1;
    }
    for (int c = 0; c < MODEL_CLIENTS; c++) {
        if (item->pins[c] > 0 || item->wants[c] == 1)
            return 1;
        if (item->wants[c] == 2)
            kept = -1;
    }
    return kept;
}

/* The longest run of bytes of a region that is free or certainly evictable. */
static uint64_t longest_run(int of_region, int urgent)
{
    static uint8_t taken[8 * 1024 / SHML_ALIGN];
    const shml_region_t *r = region((uint32_t)of_region);
    uint64_t n = (r->end - r->begin) / SHML_ALIGN, run = 0, longest = 0;
    memset(taken, 0, sizeof taken);
    for (uint32_t u = 0; u < MODEL_IDS; u++) {
        const item_t *item = &model.items[u];
        if (has_block(item) && region_of(item) == of_region && is_kept(u, urgent) != 0)
            memset(taken + (item->ticket.offset - r->begin) / SHML_ALIGN, 1, item->ticket.num_bytes / SHML_ALIGN);
    }
    for (uint64_t i = 0; i < n; i++) {
        run = taken[i] ? 0 : run + SHML_ALIGN;
        longest = run > longest ? run : longest;
    }
    return longest;
}

static uint8_t expected_row(uint32_t u)
{
    switch (model.items[u].state) {
    case NONE: return SHML_ROW_MISSING;
    case SUSPECT: return SHML_ROW_SUSPECT;
    case CLAIMED:
    case RESERVED: return SHML_ROW_WORK;
    case ASIDE: return SHML_ROW_FINAL;
    default: return region_of(&model.items[u]) == SHML_RESIDENT ? SHML_ROW_FINAL : SHML_ROW_TRANSIT;
    }
}

static int is_passing(uint32_t u)
{
    return u < MODEL_ROWS && has_block(&model.items[u]) && region_of(&model.items[u]) == SHML_TRANSIT;
}

/* Are there as many samples in transit as may be? */
static int is_transit_full(void)
{
    uint64_t num = 0;
    for (uint32_t u = 0; u < MODEL_ROWS; u++)
        num += (uint64_t)is_passing(u);
    return most_transit > 0 && num >= most_transit;
}

static int can_one_go(int urgent)
{
    for (uint32_t u = 0; u < MODEL_ROWS; u++)
        if (is_passing(u) && is_kept(u, urgent) == 0)
            return 1;
    return 0;
}

/* What went away for the new block of item `by` (MODEL_IDS: no room was found) lay in its place, and nothing kept it; or it
 * is the one sample that had to go where there were as many as may be (`num_more`). */
static void see_evictions(uint32_t by, int urgent, int num_more)
{
    const item_t *new = by < MODEL_IDS ? &model.items[by] : NULL;
    uint64_t end = new != NULL ? new->ticket.offset + new->ticket.num_bytes : 0;
    for (uint32_t u = 0; u < MODEL_IDS; u++) {
        item_t *item = &model.items[u];
        if (u == by || !has_block(item))
            continue;
        int overlaps = new != NULL && item->ticket.offset < end &&
                       new->ticket.offset < item->ticket.offset + item->ticket.num_bytes;
        int is_gone = is_there(item) && row_of(model.clients[0], model_id(u)) == SHML_ROW_MISSING;
        int is_taken_out = is_gone && !overlaps && num_more > 0 && is_passing(u);
        num_more -= is_taken_out;
        if (is_gone != overlaps && !is_taken_out)
            test_fail(__FILE__, __LINE__,
                      overlaps ? "item %u is there, and item %u in its place" : "item %u is gone, and not for item %u",
                      u, by);
        if (is_gone && is_kept(u, urgent) == 1)
            test_fail(__FILE__, __LINE__, "item %u was kept, and is gone for %u", u, by);
        if (is_gone) {
            item->state = NONE;
            item->deaths = 0;
            model.num_evicted += u < MODEL_ROWS;
        }
    }
}

/* After each step: what the segment says of every item is what the model says. */
static void see_all(void)
{
    uint64_t ids[MODEL_IDS];
    uint8_t rows[MODEL_IDS];
    uint32_t counts[ASIDE + 1] = {0};
    for (uint32_t u = 0; u < MODEL_IDS; u++)
        ids[u] = model_id(u);
    CHECK_EQ(shml_look(model.clients[0], ids, MODEL_IDS, NULL, rows), SHML_OK);
    for (uint32_t u = 0; u < MODEL_IDS; u++) {
        if (rows[u] != expected_row(u))
            test_fail(__FILE__, __LINE__, "item %u is %u, not %u", u, rows[u], expected_row(u));
        counts[model.items[u].state] += u < MODEL_ROWS;
    }
    shml_stats_t stats = stats_of(model.clients[0]);
    CHECK_EQ(stats.num_ready, counts[READY]);
    CHECK_EQ(stats.num_errors, counts[ERROR]);
    CHECK_EQ(stats.num_reserved, counts[RESERVED]);
    CHECK_EQ(stats.num_claimed, counts[CLAIMED]);
    CHECK_EQ(stats.num_suspect, counts[SUSPECT]);
    CHECK_EQ(stats.num_aside, counts[ASIDE]);
    CHECK_EQ(stats.num_evicted, model.num_evicted);
    for (int c = 0; c < MODEL_CLIENTS; c++)
        for (int i = 0; i < model.num_held[c]; i++)
            check_bytes(&model.held[c][i].ref, model_id(model.held[c][i].item),
                        model.items[model.held[c][i].item].version);
    for (int k = 0; k < MODEL_ORDERS; k++)
        if (model.orders[k].is_live)
            CHECK_EQ(low_water(model.clients[0], &model.orders[k].info), model.orders[k].low_water);
    check_stage(model.clients[0]);
}

/* `client` wants item u: a descriptor has room for two stamps, so that of three clients each may be left out. */
static void want(int client, uint32_t u, uint8_t how)
{
    item_t *item = &model.items[u];
    int num_clients = 0;
    item->wants[client] = how;
    for (int c = 0; c < MODEL_CLIENTS; c++)
        num_clients += item->wants[c] != 0;
    for (int c = 0; c < MODEL_CLIENTS && num_clients > 2; c++)
        item->wants[c] = item->wants[c] != 0 ? 2 : 0;
}
static void unwant_all(int client)
{
    for (uint32_t u = 0; u < MODEL_IDS; u++)
        model.items[u].wants[client] = 0;
}

/* Its work as a service is undone; `is_death` counts against the rows. */
static void undo_work(int client, int is_death)
{
    for (uint32_t u = 0; u < MODEL_IDS; u++) {
        item_t *item = &model.items[u];
        if ((item->state != CLAIMED && item->state != RESERVED) || item->owner != client)
            continue;
        if (u >= MODEL_ROWS) {
            item->state = NONE;
            continue;
        }
        item->deaths += (uint32_t)is_death;
        item->state = item->deaths >= SHML_MAX_ATTEMPTS ? ASIDE : item->deaths > 0 ? SUSPECT : NONE;
    }
}

static void step_reserve(int client)
{
    uint32_t u = (uint32_t)dice(MODEL_IDS);
    item_t *item = &model.items[u];
    if (item->state == SUSPECT || item->state == ASIDE)
        return;
    uint64_t num_bytes = 1 + dice(dice(4) == 0 ? 3000 : 700);
    int urgent = dice(4) == 0;
    shml_stamp_t stamp = no_stamp;
    const model_order_t *order = &model.orders[dice(MODEL_ORDERS)];
    if (dice(2) == 0 && order->info.gen != 0)
        stamp = until(&order->info, order->low_water + dice(6));
    shml_ticket_t ticket;
    int was_full = u < MODEL_ROWS && is_transit_full(), could_go = can_one_go(urgent);
    int rc = shml_reserve(model.clients[client], model_id(u), num_bytes, &stamp, urgent, &ticket);
    int is_ours = item->state == NONE || (item->state == CLAIMED && item->owner == client);
    if (!is_ours) {
        CHECK_EQ(rc, SHML_E_EXISTS);
        return;
    }
    if (rc == SHML_E_FULL) {
        model.num_full++;
        see_evictions(MODEL_IDS, urgent, was_full);
        uint64_t run = longest_run(u < MODEL_ROWS ? SHML_TRANSIT : SHML_RAW_REGION, urgent);
        if (run >= num_bytes && (!was_full || could_go))
            test_fail(__FILE__, __LINE__, "FULL for %llu bytes, and %llu could be had", (unsigned long long)num_bytes,
                      (unsigned long long)run);
        return;
    }
    CHECK_EQ(rc, SHML_OK);
    model.num_ok++;
    CHECK(ticket.num_bytes >= num_bytes);
    item->state = RESERVED, item->owner = client, item->ticket = ticket, item->stamp = stamp, item->version++;
    CHECK_EQ(region_of(item) == SHML_RAW_REGION, u >= MODEL_ROWS);
    if (region_of(item) == SHML_RESIDENT)
        CHECK(chunk_state(model.clients[0], u / ROWS) & SHML_CHUNK_STAYS);
    fill(&ticket, model_id(u), item->version);
    see_evictions(u, urgent, was_full && region_of(item) == SHML_TRANSIT);
    CHECK(most_transit == 0 || stats_of(model.clients[0]).num_transit <= most_transit);
}

static void step_end_write(int client)
{
    uint32_t u = (uint32_t)dice(MODEL_IDS);
    for (uint32_t i = 0; i < MODEL_IDS && model.items[u].state != RESERVED; i++)
        u = (u + 1) % MODEL_IDS;
    item_t *item = &model.items[u];
    if (item->state != RESERVED)
        return;
    int is_commit = dice(5) != 0, is_error = dice(5) == 0 && u < MODEL_ROWS;
    if (dice(10) != 0)
        client = item->owner;
    shml_seg_t *seg = model.clients[client];
    int rc = is_commit ? shml_commit(seg, &item->ticket, is_error ? SHML_REF_ERROR : SHML_REF_READY)
                       : shml_abort(seg, &item->ticket);
    if (client != item->owner) {
        CHECK_EQ(rc, SHML_E_STALE);
        return;
    }
    CHECK_EQ(rc, SHML_OK);
    if (is_commit) {
        item->state = is_error ? ERROR : READY;
        item->deaths = 0;
        return;
    }
    uint64_t id = model_id(u);
    CHECK_EQ(shml_unclaim_rows(seg, &id, 1), SHML_OK);
    item->state = item->deaths > 0 ? SUSPECT : NONE;
}

static void step_claim(int client)
{
    uint64_t ids[8];
    uint8_t got[8];
    uint32_t n = 1 + (uint32_t)dice(dice(2) == 0 ? 1 : 8);
    for (uint32_t i = 0; i < n; i++)
        ids[i] = dice(MODEL_ROWS);
    CHECK_EQ(shml_claim_rows(model.clients[client], ids, n, got), SHML_OK);
    for (uint32_t i = 0; i < n; i++) {
        item_t *item = &model.items[ids[i]];
        int is_free = item->state == NONE || (item->state == SUSPECT && n == 1);
        CHECK_EQ(got[i], is_free);
        if (is_free)
            item->state = CLAIMED, item->owner = client;
    }
    if (dice(3) != 0)
        return;
    CHECK_EQ(shml_unclaim_rows(model.clients[client], ids, n), SHML_OK);
    for (uint32_t i = 0; i < n; i++) {
        item_t *item = &model.items[ids[i]];
        if (item->state == CLAIMED && item->owner == client)
            item->state = item->deaths > 0 ? SUSPECT : NONE;
    }
}

static void step_get(int client)
{
    uint32_t n = (uint32_t)dice(6), us[6], missing = 0, pinned = 0;
    uint64_t ids[6];
    shml_ref_t refs[6];
    shml_found_t found;
    int flags = (int)dice(4) & (SHML_GET_POST | (dice(2) == 0 ? SHML_GET_TAKE : 0));
    if (flags == SHML_GET_TAKE)
        flags |= SHML_GET_POST;
    if (model.num_held[client] + 6 > MODEL_HELD)
        return;
    for (uint32_t i = 0; i < n; i++) {
        us[i] = (uint32_t)dice(MODEL_IDS);
        if (dice(2) == 0) /* more often one that is there */
            for (uint32_t j = 0; j < MODEL_IDS && !is_there(&model.items[us[i]]); j++)
                us[i] = (us[i] + 1) % MODEL_IDS;
        ids[i] = model_id(us[i]);
        missing += !is_there(&model.items[us[i]]) && model.items[us[i]].state != ASIDE;
    }
    model_order_t *order = &model.orders[dice(MODEL_ORDERS)];
    int has_place = n > 0 && order->is_live;
    shml_place_t place = {order->info.slot, order->info.gen, order->next[client], order->next[client] + dice(3)};
    shml_seg_t *seg = model.clients[client];
    CHECK_EQ(shml_get_many(seg, ids, n, flags, has_place ? &place : NULL, refs, &found), SHML_OK);
    CHECK_EQ(found.num_missing, missing);
    int is_complete = missing == 0;
    if (flags & SHML_GET_POST)
        unwant_all(client);
    if (has_place && is_complete)
        set_mark(order, client, 1 + place.end), order->next[client] = place.end;
    else if (has_place && (flags & SHML_GET_POST))
        set_mark(order, client, 1 + place.begin);
    for (uint32_t i = 0; i < n; i++) {
        item_t *item = &model.items[us[i]];
        uint32_t expected = item->state == READY   ? SHML_REF_READY
                            : item->state == ERROR ? SHML_REF_ERROR
                            : item->state == ASIDE ? SHML_REF_ASIDE
                                                   : SHML_REF_MISSING;
        CHECK_EQ(refs[i].status, expected);
        if (is_there(item)) {
            int is_resident = region_of(item) == SHML_RESIDENT;
            int is_pinned = !is_resident && (is_complete || (flags & SHML_GET_TAKE));
            if (is_resident)
                CHECK_EQ(refs[i].chunk, 0);
            else
                CHECK_EQ(refs[i].chunk == 1, is_pinned);
            CHECK_EQ(refs[i].offset, item->ticket.offset);
            check_bytes(&refs[i], ids[i], item->version);
            if (is_pinned) {
                pinned++;
                item->pins[client]++;
                model.held[client][model.num_held[client]].ref = refs[i];
                model.held[client][model.num_held[client]++].item = us[i];
            }
        }
        if (!is_complete && (flags & SHML_GET_POST) && item->state != ASIDE)
            want(client, us[i], is_there(item) && (flags & SHML_GET_TAKE) ? 2 : 1);
    }
    uint64_t pinned_bytes = 0, num_pinned = 0;
    for (uint32_t u = 0; u < MODEL_IDS; u++) {
        pinned_bytes += model.items[u].pins[client] > 0 ? model.items[u].ticket.num_bytes : 0;
        num_pinned += model.items[u].pins[client] > 0;
    }
    CHECK_EQ(seg->pinned_bytes, pinned_bytes);
    CHECK_EQ(seg->num_pinned, num_pinned);
    if (pinned > 0)
        CHECK_EQ(found.over_quota, pinned_bytes > shml_pin_quota(seg) || num_pinned > shml_pin_quota_samples(seg));
}

static void step_unpin(int client)
{
    shml_ref_t refs[MODEL_HELD];
    uint32_t n = 0;
    int most = 1 + (int)dice(MODEL_HELD);
    while (model.num_held[client] > 0 && (int)n < most) {
        int i = (int)dice((uint64_t)model.num_held[client]);
        refs[n++] = model.held[client][i].ref;
        model.items[model.held[client][i].item].pins[client]--;
        model.held[client][i] = model.held[client][--model.num_held[client]];
    }
    CHECK_EQ(shml_unpin(model.clients[client], refs, n), SHML_OK);
}

static void forget_client(int client, int is_death)
{
    undo_work(client, is_death);
    unwant_all(client);
    for (uint32_t u = 0; u < MODEL_IDS; u++)
        model.items[u].pins[client] = 0;
    model.num_held[client] = 0;
    for (int k = 0; k < MODEL_ORDERS; k++) {
        model_order_t *order = &model.orders[k];
        if (order->marks[client] != 0)
            set_mark(order, client, 0);
        if (order->is_live && order->owner == client)
            order->is_live = 0;
    }
}

/* A client is killed, or leaves, and another process takes its part. */
static void step_change_client(int client)
{
    shml_seg_t *seg = model.clients[client];
    if (dice(3) == 0) {
        while (model.num_held[client] > 0)
            step_unpin(client);
        shml_client_unregister(seg);
        forget_client(client, 0);
    } else {
        if (dice(2) == 0)
            break_mutex();
        bury(model.clients[0], seg);
        forget_client(client, 1);
    }
    memset(seg->pin_counts, 0, stage.control->num_descs * sizeof *seg->pin_counts);
    seg->pinned_bytes = seg->num_pinned = 0;
    seg->self = -1;
    CHECK_EQ(shml_client_register(seg, client < 3 ? SHML_SERVICE : SHML_WORKER, -1, 0), SHML_OK);
}

static void step_order(int client)
{
    model_order_t *order = &model.orders[dice(MODEL_ORDERS)];
    if (order->is_live) {
        CHECK_EQ(shml_order_end(model.clients[order->owner], order->info.slot, order->info.gen), SHML_OK);
        order->is_live = 0;
    } else {
        *order = (model_order_t){.is_live = 1, .owner = client, .info = begin_order(model.clients[client], 100)};
    }
}

static void new_model(uint64_t seed)
{
    memset(&model, 0, sizeof model);
    model.seed = seed;
    new_stage(small_shape);
    for (int c = 0; c < MODEL_CLIENTS; c++)
        model.clients[c] = enter(c < 3 ? SHML_SERVICE : SHML_WORKER);
    CHECK_EQ(shml_chunk_claim(model.clients[0], 0), SHML_OK);
    CHECK_EQ(shml_chunk_claim(model.clients[0], 1), SHML_OK);
}

/* When nobody needs anything any more, all of transit can be had. */
static void see_that_nothing_is_lost(void)
{
    for (int c = 1; c < MODEL_CLIENTS; c++)
        shml_client_unregister(model.clients[c]);
    CHECK_EQ(try_reserve(model.clients[0], 60, 8 * KIB, 0), SHML_OK);
    check_stage(model.clients[0]);
}

/* Thousands of random steps of six clients: what is kept is never gone, what is read is what was written, FULL is said
 * only where the model finds no room either. */
static void see_a_model_of_records(void)
{
    uint32_t num_full = 0, num_ok = 0;
    uint64_t num_evicted = 0;
    for (uint64_t round = 0; round < 40; round++) {
        new_model(1000 + round);
        for (int step = 0; step < 1000; step++) {
            int client = (int)dice(MODEL_CLIENTS), service = (int)dice(3), not_first = 1 + (int)dice(MODEL_CLIENTS - 1);
            test_note("round %d, step %d", (int)round, step);
            switch (dice(20)) {
            case 0:
            case 1:
            case 2:
            case 3:
            case 4:
            case 5: step_reserve(service); break;
            case 6:
            case 7:
            case 8:
            case 9: step_end_write(service); break;
            case 10: step_claim(service); break;
            case 11:
            case 12:
            case 13:
            case 14: step_get(client); break;
            case 15:
            case 16:
            case 17: step_unpin(client); break;
            case 18:
                if (dice(3) == 0)
                    step_change_client(not_first);
                else if (dice(4) == 0)
                    break_mutex();
                break;
            default: step_order(client);
            }
            see_all();
        }
        num_full += model.num_full, num_ok += model.num_ok, num_evicted += model.num_evicted;
        test_note("round %d, its end", (int)round);
        for (int c = 0; c < MODEL_CLIENTS; c++)
            while (model.num_held[c] > 0)
                step_unpin(c);
        unwant_all(0);
        withdraw(model.clients[0]);
        for (uint32_t u = 0; u < MODEL_IDS; u++)
            if (model.items[u].state == RESERVED)
                CHECK_EQ(shml_abort(model.clients[model.items[u].owner], &model.items[u].ticket), SHML_OK);
        for (int k = 0; k < MODEL_ORDERS; k++)
            if (model.orders[k].is_live)
                CHECK_EQ(shml_order_end(model.clients[model.orders[k].owner], model.orders[k].info.slot,
                                        model.orders[k].info.gen),
                         SHML_OK);
        see_that_nothing_is_lost();
    }
    /* The dice are worth it only if all of this happened often. */
    CHECK(num_full > 100 && num_ok > 2000 && num_evicted > 1000);
}

static void a_model_of_records_agrees(void) { see_a_model_of_records(); }

static void a_model_of_a_limited_number_of_records_agrees(void)
{
    const uint64_t limits[] = {2, 5, 9}; /* some 20 find room */
    for (int i = 0; i < 3; i++) {
        most_transit = limits[i];
        see_a_model_of_records();
    }
    most_transit = 0;
}

/* ---------------------------------------------------------------------------------------------------- *
 * Chunks
 * ---------------------------------------------------------------------------------------------------- */
#define FETCHERS 4 /* beside client 0, which sees to the dead; 3 and 4 are children of supervisors of their own */

static struct {
    struct {
        uint32_t state, deaths;
        int owner, has_raw;
    } chunks[NUM_CHUNKS];
    int readers[NUM_CHUNKS]; /* of a unit, at its first chunk; -1: none that lives */
    shml_seg_t *clients[FETCHERS + 1], *supervisors[FETCHERS + 1];
    uint64_t seed;
    uint32_t num_broken, num_refused;
} fetch;

static uint64_t fetch_dice(uint64_t n) { return test_random(&fetch.seed) % n; }

static void enter_fetcher(int client)
{
    shml_seg_t **seg = &fetch.clients[client];
    fetch.supervisors[client] = client > 2 ? enter(SHML_SERVICE) : NULL;
    *seg = enter_under(SHML_SERVICE, fetch.supervisors[client]);
}

static void see_chunks(int may_evict)
{
    uint32_t counts[4] = {0};
    for (uint32_t i = 0; i < NUM_CHUNKS; i++) {
        uint8_t state = chunk_state(fetch.clients[0], i);
        CHECK_EQ(state & 0xf, fetch.chunks[i].state);
        if (may_evict && !(state & SHML_CHUNK_HAS_RAW))
            fetch.chunks[i].has_raw = 0;
        CHECK_EQ((state & SHML_CHUNK_HAS_RAW) != 0, fetch.chunks[i].has_raw);
        if (fetch.chunks[i].state <= SHML_CHUNK_CLAIMED)
            CHECK_EQ(shml_chunks(stage.control)[i].word >> 8 & 0xff, fetch.chunks[i].deaths);
        counts[fetch.chunks[i].state]++;
    }
    shml_stats_t stats = stats_of(fetch.clients[0]);
    CHECK_EQ(stats.chunks_todo, counts[SHML_CHUNK_TODO]);
    CHECK_EQ(stats.chunks_claimed, counts[SHML_CHUNK_CLAIMED]);
    CHECK_EQ(stats.chunks_broken, counts[SHML_CHUNK_BROKEN]);
    check_stage(fetch.clients[0]);
}

static void step_fetch(int client)
{
    uint32_t i = (uint32_t)fetch_dice(NUM_CHUNKS), unit = i - i % 2;
    int rc = shml_chunk_claim(fetch.clients[client], i);
    int is_read = fetch.readers[unit] >= 0 && fetch.readers[unit] != client;
    fetch.num_refused += is_read;
    if (fetch.chunks[i].state == SHML_CHUNK_BROKEN) {
        CHECK_EQ(rc, SHML_E_NOTFOUND);
    } else if (fetch.chunks[i].state == SHML_CHUNK_CLAIMED) {
        CHECK_EQ(rc, SHML_E_STALE);
    } else if (fetch.chunks[i].has_raw) {
        CHECK(rc == SHML_E_EXISTS || (is_read && rc == SHML_E_STALE));
    } else if (is_read) {
        CHECK_EQ(rc, SHML_E_STALE);
    } else {
        CHECK_EQ(rc, SHML_OK);
        fetch.chunks[i].state = SHML_CHUNK_CLAIMED, fetch.chunks[i].owner = client;
        fetch.readers[unit] = client;
    }
}

static void step_end_fetch(int client)
{
    uint32_t i = (uint32_t)fetch_dice(NUM_CHUNKS);
    int is_ours = fetch.chunks[i].state == SHML_CHUNK_CLAIMED && fetch.chunks[i].owner == client;
    int outcome = fetch_dice(12) == 0 ? SHML_FETCH_BROKEN : (int)fetch_dice(2);
    if (is_ours && outcome == SHML_FETCH_OK) {
        (void)put(fetch.clients[client], SHML_RAW | i, 700);
        fetch.chunks[i].has_raw = 1;
        see_chunks(1);
    }
    int rc = shml_chunk_end(fetch.clients[client], i, outcome);
    CHECK_EQ(rc, is_ours ? SHML_OK : SHML_E_STALE);
    if (!is_ours)
        return;
    fetch.chunks[i].state = outcome == SHML_FETCH_BROKEN ? SHML_CHUNK_BROKEN : SHML_CHUNK_TODO;
    fetch.chunks[i].deaths = outcome == SHML_FETCH_OK ? 0 : fetch.chunks[i].deaths;
}

/* Dies, dies with its supervisor, or leaves. */
static void step_lose_fetcher(int client)
{
    shml_seg_t *seg = fetch.clients[client], *supervisor = fetch.supervisors[client];
    int leaves = fetch_dice(3) == 0, with_supervisor = !leaves && supervisor != NULL && fetch_dice(2) == 0;
    if (fetch_dice(2) == 0)
        break_mutex();
    if (leaves) {
        shml_client_unregister(seg);
    } else {
        stage.is_dead[seg->self] = 1;
        if (with_supervisor)
            stage.is_dead[supervisor->self] = 1;
        CHECK_EQ(shml_reap(fetch.clients[0], 1), 1 + with_supervisor);
    }
    for (uint32_t i = 0; i < NUM_CHUNKS; i++) {
        if (fetch.readers[i] == client)
            fetch.readers[i] = -1;
        if (fetch.chunks[i].state != SHML_CHUNK_CLAIMED || fetch.chunks[i].owner != client)
            continue;
        fetch.chunks[i].deaths += !leaves && !with_supervisor;
        int is_last = fetch.chunks[i].deaths >= SHML_MAX_ATTEMPTS;
        fetch.chunks[i].state = is_last ? SHML_CHUNK_BROKEN : SHML_CHUNK_TODO;
        fetch.num_broken += (uint32_t)is_last;
    }
    if (supervisor != NULL && !with_supervisor)
        shml_client_unregister(supervisor);
    enter_fetcher(client);
}

/* Four prefetchers claim, fetch, give up, die and leave: every chunk is in the state that the rules give, the chunks of a
 * unit are never two clients'. */
static void a_model_of_chunks_agrees(void)
{
    uint32_t num_broken = 0, num_refused = 0;
    for (uint64_t round = 0; round < 40; round++) {
        memset(&fetch, 0, sizeof fetch);
        fetch.seed = 7000 + round;
        new_stage((shape_t){0, 4 * KIB, 4 * KIB, 2});
        for (uint32_t i = 0; i < NUM_CHUNKS; i++)
            fetch.readers[i] = -1;
        for (int client = 0; client <= FETCHERS; client++)
            enter_fetcher(client);
        for (int step = 0, num_lost = 0; step < 500; step++) {
            int client = 1 + (int)fetch_dice(FETCHERS);
            test_note("round %d, step %d", (int)round, step);
            uint64_t what = fetch_dice(20);
            if (what == 0 && num_lost < 100)
                step_lose_fetcher(client), num_lost++;
            else if (what == 1)
                break_mutex();
            else if (what < 11)
                step_fetch(client);
            else
                step_end_fetch(client);
            see_chunks(0);
        }
        num_broken += fetch.num_broken, num_refused += fetch.num_refused;
    }
    CHECK(num_broken > 20 && num_refused > 100);
}

TEST_MAIN(TEST(a_model_of_records_agrees), TEST(a_model_of_a_limited_number_of_records_agrees),
          TEST(a_model_of_chunks_agrees))
