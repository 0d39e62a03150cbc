/* Random iterations over streams of an open set: readers that come, read, leave and die, services that fetch, decode
 * and die, several streams at once. Every position of a stream is delivered to its reader once, with the bytes that
 * were written for it. One process stands in for all. */
#define _GNU_SOURCE
#include "transit.h"

#define PLACES       3u
#define NUM_STREAMS  4  /* at once */
#define MAX_ROWS     70 /* of a stream */
#define NUM_SERVICES 3
#define NUM_READERS  16 /* enough for all streams: a stream waits for all of its readers */
#define MAX_DEATHS   100

typedef struct stream {
    int is_live;
    shml_order_info_t order;
    uint64_t key, num_rows;
    uint32_t num_readers, num_joined;
    shml_seg_t *readers[NUM_READERS]; /* NULL: has not come, or has left */
    uint64_t next[NUM_READERS];       /* the first position that each has to read */
    uint8_t has_ended[NUM_READERS];
    uint8_t delivered[MAX_ROWS + NUM_READERS]; /* 1: once; 2: told that it will not come */
} stream_t;

static struct {
    shml_seg_t *undertaker, *owner, *services[NUM_SERVICES], *readers[NUM_READERS];
    stream_t streams[NUM_STREAMS];
    uint64_t seed, num_keys;
    uint32_t num_deaths, num_delivered, num_complete, num_cut, num_reused, num_bad;
} model;

static uint64_t dice(uint64_t n) { return test_random(&model.seed) % n; }

static uint64_t id_of(const stream_t *s, uint64_t position)
{
    return shml_open_id(s->order.slot, s->order.gen, position);
}

static int lives(const stream_t *s) { return shml_order_living(stage.control, s->order.slot, s->order.gen) != NULL; }

/* ------------------------------------------------ readers ---------------------------------------------- */

static int is_busy(const shml_seg_t *seg)
{
    for (int i = 0; i < NUM_STREAMS; i++)
        for (int r = 0; r < NUM_READERS; r++)
            if (model.streams[i].is_live && model.streams[i].readers[r] == seg)
                return 1;
    return 0;
}

static void begin_stream(stream_t *s)
{
    *s = (stream_t){.is_live = 1, .key = ++model.num_keys, .num_rows = dice(MAX_ROWS + 1)};
    s->num_readers = 1 + (uint32_t)dice(4);
    for (uint32_t r = 0; r < s->num_readers; r++)
        s->next[r] = r;
}

/* One more of its readers comes, if a client has time. */
static void join_stream(stream_t *s)
{
    shml_seg_t *seg = model.readers[dice(NUM_READERS)];
    uint32_t r = s->num_joined;
    if (r == s->num_readers || is_busy(seg) || (r > 0 && !lives(s)))
        return;
    shml_join_t how = {s->key, r, s->num_readers, model.owner->self, shml_client_gen(seg, model.owner->self)};
    shml_order_info_t order = {.num_positions = SHML_MAX_POSITION, .world_size = 1};
    CHECK_EQ(shml_order_join(seg, &how, &order), SHML_OK);
    CHECK(r == 0 || (order.slot == s->order.slot && order.gen == s->order.gen));
    s->order = order;
    s->readers[r] = seg;
    s->num_joined++;
}

static void leave_stream(stream_t *s, uint32_t r)
{
    CHECK_EQ(shml_order_leave(s->readers[r], s->order.slot, s->order.gen), SHML_OK);
    withdraw(s->readers[r]);
    s->readers[r] = NULL;
}

/* The low-water mark is the least of what its readers have still to read, once all have come. */
static void check_low_water(const stream_t *s)
{
    uint64_t least = UINT64_MAX;
    for (uint32_t r = 0; r < s->num_readers; r++)
        if (s->readers[r] != NULL && s->next[r] < least)
            least = s->next[r];
    if (lives(s))
        CHECK_EQ(low_water(model.undertaker, &s->order), s->num_joined < s->num_readers ? 0 : least);
}

static void read_stream(stream_t *s)
{
    uint32_t r = (uint32_t)dice(s->num_readers);
    shml_seg_t *seg = s->readers[r];
    if (seg == NULL)
        return;
    uint64_t position = s->next[r], id = id_of(s, position);
    shml_place_t place = {s->order.slot, s->order.gen, position, position + s->num_readers};
    shml_ref_t ref;
    shml_found_t found;
    CHECK_EQ(shml_get_many(seg, &id, 1, SHML_GET_POST, &place, &ref, &found), SHML_OK);
    CHECK_EQ(found.num_missing, ref.status == SHML_REF_MISSING);
    if (ref.status == SHML_REF_MISSING)
        return;
    if (ref.status == SHML_REF_END) {
        CHECK(position >= s->num_rows);
        s->has_ended[r] = 1;
        s->next[r] += s->num_readers;
        if (dice(2) == 0)
            leave_stream(s, r);
        return;
    }
    CHECK(position < s->num_rows && s->delivered[position] == 0);
    s->delivered[position] = ref.status <= SHML_REF_ERROR ? 1 : 2;
    s->next[r] += s->num_readers;
    model.num_delivered++;
    if (ref.status > SHML_REF_ERROR) {
        CHECK(ref.status == SHML_REF_BROKEN || ref.status == SHML_REF_ASIDE);
        model.num_bad++;
        return;
    }
    CHECK_EQ(ref.chunk, 1);
    check_bytes(&ref, id, (uint32_t)s->key);
    CHECK_EQ(shml_unpin(seg, &ref, 1), SHML_OK);
}

/* All its readers have come and gone: those who came to the end have had all that is theirs. */
static void end_stream(stream_t *s)
{
    if (s->num_joined == 0)
        return;
    for (uint32_t r = 0; r < s->num_joined; r++)
        if (s->readers[r] != NULL)
            return;
    CHECK(!lives(s));
    for (uint64_t position = 0; position < s->num_rows; position++) {
        uint32_t r = (uint32_t)(position % s->num_readers);
        if (s->has_ended[r])
            CHECK(s->delivered[position] != 0);
    }
    int is_complete = s->num_joined == s->num_readers;
    for (uint32_t r = 0; r < s->num_readers; r++)
        is_complete &= s->has_ended[r];
    model.num_complete += (uint32_t)is_complete;
    model.num_cut += (uint32_t)!is_complete;
    s->is_live = 0;
}

/* ------------------------------------------------ services --------------------------------------------- */

static shml_seg_t *kill_client(shml_seg_t *seg, uint32_t role)
{
    model.num_deaths++;
    bury(model.undertaker, seg);
    return role == SHML_WORKER ? enter_under(role, model.owner) : enter(role);
}

/* 1: the service that was at work is dead. */
static int dies(int service)
{
    if (dice(200) != 0 || model.num_deaths >= MAX_DEATHS)
        return 0;
    model.services[service] = kill_client(model.services[service], SHML_SERVICE);
    return 1;
}

static int try_put(shml_seg_t *seg, uint64_t id, uint64_t num_bytes, shml_stamp_t stamp, uint32_t version, int service)
{
    shml_ticket_t ticket;
    int rc = shml_reserve(seg, id, num_bytes, &stamp, dice(4) == 0, &ticket);
    if (rc != SHML_OK) {
        CHECK_EQ(rc, SHML_E_FULL);
        return 0;
    }
    fill(&ticket, id, version);
    if (dies(service))
        return -1;
    CHECK_EQ(shml_commit(seg, &ticket, SHML_REF_READY), SHML_OK);
    return 1;
}

/* The chunk that a service may claim is the one that the order needs there and nobody is at. */
static void fetch_chunk(const stream_t *s, int service)
{
    shml_seg_t *seg = model.services[service];
    uint64_t low = low_water(model.undertaker, &s->order), number = low / ROWS + dice(PLACES + 1), first;
    uint32_t chunk;
    shml_stamp_t stamp = {s->order.slot, s->order.gen, (number + 1) * ROWS};
    int rc = shml_chunk_claim_open(seg, s->order.slot, s->order.gen, number, &chunk);
    if (rc == SHML_E_FULL || rc == SHML_E_STALE || rc == SHML_E_EXISTS || rc == SHML_E_NOTFOUND)
        return;
    CHECK_EQ(rc, SHML_OK);
    model.num_reused += number >= PLACES; /* for the first time, or again after it was given up */
    CHECK_EQ(shml_chunk_first(seg, chunk, &first), SHML_OK);
    CHECK_EQ(first, id_of(s, number * ROWS));
    if (dies(service))
        return;
    if ((number + 1) * ROWS > s->num_rows)
        CHECK_EQ(shml_order_finish(seg, s->order.slot, s->order.gen, s->num_rows), SHML_OK);
    int is_put = number * ROWS < s->num_rows
                     ? try_put(seg, SHML_RAW | chunk, 64 + dice(400), stamp, (uint32_t)number, service)
                     : 0;
    if (is_put >= 0)
        CHECK_EQ(shml_chunk_end(seg, chunk, is_put ? SHML_FETCH_OK : SHML_FETCH_GIVEN_UP), SHML_OK);
}

/* Rows are decoded from what was pinned, and only if it is what they are in. */
static void decode_row(const stream_t *s, int service)
{
    shml_seg_t *seg = model.services[service];
    uint64_t low = low_water(model.undertaker, &s->order), position = low + dice(PLACES * ROWS), first;
    uint64_t id = id_of(s, position);
    uint32_t chunk;
    uint8_t row;
    shml_ref_t raw;
    shml_found_t found;
    CHECK_EQ(shml_row_chunks(seg, &id, 1, &chunk), SHML_OK);
    if (chunk == UINT32_MAX)
        return;
    CHECK_EQ(shml_get_many(seg, (uint64_t[]){SHML_RAW | chunk}, 1, 0, NULL, &raw, &found), SHML_OK);
    if (raw.status != SHML_REF_READY)
        return;
    CHECK_EQ(shml_chunk_first(seg, chunk, &first), SHML_OK);
    CHECK_EQ(first, id - position % ROWS);
    check_bytes(&raw, SHML_RAW | chunk, (uint32_t)(position / ROWS));
    shml_stamp_t stamp = {s->order.slot, s->order.gen, position + 1};
    CHECK_EQ(shml_look(seg, &id, 1, &stamp, &row), SHML_OK);
    if (row <= SHML_ROW_SUSPECT && claim_row(seg, id)) {
        int is_put = dies(service) ? -1 : try_put(seg, id, 64 + dice(700), stamp, (uint32_t)s->key, service);
        if (is_put < 0)
            return; /* its pins are gone with it */
        if (is_put == 0)
            CHECK_EQ(shml_unclaim_rows(seg, &id, 1), SHML_OK);
    }
    CHECK_EQ(shml_unpin(seg, &raw, 1), SHML_OK);
}

/* ------------------------------------------------ the run ---------------------------------------------- */

/* A reader is killed, or closes its iterator. */
static void cut_short(stream_t *s)
{
    uint32_t r = (uint32_t)dice(s->num_readers);
    if (s->readers[r] == NULL)
        return;
    if (dice(2) == 0 || model.num_deaths >= MAX_DEATHS) {
        leave_stream(s, r);
        return;
    }
    for (int i = 0; i < NUM_READERS; i++)
        if (model.readers[i] == s->readers[r])
            model.readers[i] = kill_client(s->readers[r], SHML_WORKER);
    s->readers[r] = NULL;
}

static void step(int is_last)
{
    stream_t *s = &model.streams[dice(NUM_STREAMS)];
    int service = (int)dice(NUM_SERVICES);
    if (!s->is_live) {
        if (!is_last)
            begin_stream(s);
        return;
    }
    if (s->num_joined == 0 || dice(8) == 0)
        join_stream(s);
    if (s->num_joined > 0 && lives(s)) {
        fetch_chunk(s, service);
        for (int i = 0; i < 8 && lives(s); i++)
            decode_row(s, (int)dice(NUM_SERVICES));
        for (int i = 0; i < 8 && lives(s); i++)
            read_stream(s);
        check_low_water(s);
        if (dice(2500) == 0)
            cut_short(s);
        for (uint32_t r = 0; r < s->num_readers; r++) /* who came to the end leaves some time */
            if (s->readers[r] != NULL && s->has_ended[r] && dice(20) == 0)
                leave_stream(s, r);
    }
    end_stream(s);
}

static int has_live(void)
{
    int num_live = 0;
    for (int i = 0; i < NUM_STREAMS; i++)
        num_live += model.streams[i].is_live && model.streams[i].num_joined > 0;
    return num_live;
}

static void run(uint64_t seed)
{
    memset(&model, 0, sizeof model);
    model.seed = seed;
    chunks_per_order = PLACES;
    new_stage(transit_shape);
    stage.control->raw_budget_bytes = transit_shape.raw_bytes;
    model.undertaker = enter(SHML_SERVICE);
    model.owner = enter(SHML_OWNER);
    for (int i = 0; i < NUM_SERVICES; i++)
        model.services[i] = enter(SHML_SERVICE);
    for (int i = 0; i < NUM_READERS; i++)
        model.readers[i] = enter_under(SHML_WORKER, model.owner);
    for (int i = 0; i < 6000; i++) {
        test_note("seed %llu, step %d", (unsigned long long)seed, i);
        step(0);
        if (i % 50 == 0)
            check_stage(model.undertaker);
        if (dice(500) == 0)
            break_mutex();
    }
    for (int i = 0; has_live(); i++) { /* all that have begun come to their end; the watchdog knows when they do not */
        test_note("seed %llu, last step %d", (unsigned long long)seed, i);
        step(1);
    }
    check_stage(model.undertaker);
    shml_stats_t stats = stats_of(model.undertaker);
    CHECK_EQ(stats.num_orders, 0);
    CHECK_EQ(stats.chunks_claimed, 0);
    CHECK(stats.num_claimed == 0 && stats.num_reserved == 0);
}

/* Each position once, to the reader whose it is, whatever else happens. */
static void streams_are_delivered_once(void)
{
    uint32_t num_delivered = 0, num_complete = 0, num_cut = 0, num_reused = 0, num_deaths = 0, num_bad = 0;
    for (uint64_t seed = 1; seed <= 12; seed++) {
        run(7000 + seed);
        num_delivered += model.num_delivered;
        num_complete += model.num_complete;
        num_cut += model.num_cut;
        num_reused += model.num_reused;
        num_deaths += model.num_deaths;
        num_bad += model.num_bad;
    }
    printf("test_open_model: %u rows delivered, %u of them as bad; %u streams complete, %u cut short; %u places used "
           "again; %u deaths\n",
           num_delivered, num_bad, num_complete, num_cut, num_reused, num_deaths);
    CHECK(num_delivered > 2000 && num_complete > 50 && num_cut > 20 && num_reused > 500 && num_deaths > 100);
    CHECK(num_bad < num_delivered / 10);
}

TEST_MAIN(TEST(streams_are_delivered_once))
