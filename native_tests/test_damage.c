/* Damage: whatever shared memory says, every call ends, with a status, and tells of no place outside of the ring. One
 * process stands in for all. */
#define _GNU_SOURCE
#include "transit.h"

#define NUM_CLIENTS 4

static shml_seg_t *clients[NUM_CLIENTS];
static uint64_t seed;
static uint64_t dice(uint64_t n) { return test_random(&seed) % n; }

static uint64_t any_id(void)
{
    uint64_t id = dice(16);
    if (chunks_per_order > 0 && dice(4) != 0)
        return shml_open_id((uint32_t)dice(3), 1 + (uint32_t)dice(3), dice(40));
    return dice(4) == 0 ? SHML_RAW | id : dice(30) == 0 ? SHML_CHUNK_ERROR | id : id * 3;
}

static void check_status(int64_t status)
{
    if (status < SHML_E_LEFT || status > (int64_t)SHML_MAX_CLIENTS * SHML_MAX_WANTS)
        test_fail(__FILE__, __LINE__, "%lld is no status", (long long)status);
    if (stage.is_held)
        test_fail(__FILE__, __LINE__, "the mutex is held");
}
static void check_place(uint64_t offset, uint64_t num_bytes)
{
    if (offset > stage.ring_bytes || num_bytes > stage.ring_bytes - offset)
        test_fail(__FILE__, __LINE__, "%llu bytes at %llu are not in the ring", (unsigned long long)num_bytes,
                  (unsigned long long)offset);
}

static void write_any(shml_seg_t *seg)
{
    shml_ticket_t ticket;
    shml_stamp_t stamp = {(uint32_t)dice(3), 1 + (uint32_t)dice(2), dice(20)};
    int rc = shml_reserve(seg, any_id(), 1 + dice(1500), &stamp, (int)dice(2), &ticket);
    check_status(rc);
    if (rc != SHML_OK)
        return;
    check_place(ticket.offset, ticket.num_bytes);
    if (dice(6) != 0)
        check_status(shml_commit(seg, &ticket, dice(8) == 0 ? SHML_REF_ERROR : SHML_REF_READY));
    else if (dice(2) == 0)
        check_status(shml_abort(seg, &ticket));
}

static void read_any(shml_seg_t *seg)
{
    uint64_t ids[4];
    shml_ref_t refs[4];
    shml_found_t found;
    shml_place_t place = {(uint32_t)dice(3), 1, dice(10), 10 + dice(10)};
    uint32_t n = (uint32_t)dice(5);
    for (uint32_t i = 0; i < n; i++)
        ids[i] = any_id();
    int rc = shml_get_many(seg, ids, n, (int)dice(4), dice(2) == 0 ? &place : NULL, refs, &found);
    check_status(rc);
    for (uint32_t i = 0; i < n && rc == SHML_OK; i++)
        if (refs[i].status <= SHML_REF_ERROR)
            check_place(refs[i].offset, refs[i].num_bytes);
    if (rc == SHML_OK && dice(5) != 0)
        check_status(shml_unpin(seg, refs, n));
}

static void ask_any(shml_seg_t *seg)
{
    uint64_t ids[8];
    uint32_t chunks[NUM_CHUNKS], counts[NUM_CHUNKS], reads[8];
    uint64_t first;
    uint8_t bytes[8];
    shml_order_info_t orders[4];
    shml_stats_t stats;
    shml_stamp_t stamp = {(uint32_t)dice(3), 1, dice(20)};
    const char *what;
    for (int i = 0; i < 8; i++)
        ids[i] = any_id(), chunks[i] = (uint32_t)dice(NUM_CHUNKS + 1);
    switch (dice(15)) {
    case 0: check_status(shml_look(seg, ids, 8, dice(2) == 0 ? &stamp : NULL, bytes)); break;
    case 1: check_status(shml_wanted(seg, ids, 8)); break;
    case 2: check_status(shml_chunk_look(seg, chunks, 8, bytes)); break;
    case 3: {
        int n = shml_chunks_wanted(seg, chunks, counts, NUM_CHUNKS);
        check_status(n);
        for (int i = 0; i < n; i++)
            CHECK(chunks[i] < stage.control->num_chunks);
        break;
    }
    case 4: check_status(shml_orders(seg, orders, 4)); break;
    case 5: check_status(shml_get_stats(seg, &stats)); break;
    case 6: check_status(shml_check(seg, dice(2) == 0 ? stage.scratch : NULL, &what)); break;
    case 7: check_status(shml_claim_rows(seg, ids, 1 + (uint32_t)dice(2), bytes)); break;
    case 8: check_status(shml_unclaim_rows(seg, ids, 8)); break;
    case 9: check_status(shml_count_reads(seg, ids, 8, reads)); break;
    case 10: check_status(shml_raw_release(seg, stage.ring_fd)); break;
    case 11: {
        shml_ref_t refs[8];
        uint32_t num_missing;
        int rc = shml_guest_get(seg, ids, 8, refs, &num_missing);
        check_status(rc);
        for (int i = 0; i < 8 && rc == SHML_OK; i++)
            if (refs[i].status <= SHML_REF_ERROR)
                check_place(refs[i].offset, refs[i].num_bytes);
        if (rc == SHML_OK)
            check_status(shml_guest_check(seg, refs, 8, bytes));
        break;
    }
    case 12: check_status(shml_chunk_first(seg, (uint32_t)dice(2 * NUM_CHUNKS), &first)); break;
    case 13: {
        int rc = shml_row_chunks(seg, ids, 8, chunks);
        check_status(rc);
        for (int i = 0; i < 8 && rc == SHML_OK; i++)
            CHECK(chunks[i] < stage.control->num_chunks || chunks[i] == UINT32_MAX);
        break;
    }
    default: (void)shml_pin_quota(seg);
    }
}

static void change_any(shml_seg_t *seg)
{
    shml_order_info_t order = {.num_positions = 100};
    shml_join_t join = {dice(3), (uint32_t)dice(3), 1 + (uint32_t)dice(3), (int32_t)dice(3), 1};
    uint32_t chunk;
    switch (dice(chunks_per_order > 0 ? 14 : 8)) {
    case 5: check_status(shml_order_join(seg, &join, &order)); break;
    case 6: check_status(shml_order_leave(seg, (uint32_t)dice(3), 1 + (uint32_t)dice(3))); break;
    case 7: check_status(shml_order_finish(seg, (uint32_t)dice(3), 1 + (uint32_t)dice(3), dice(60))); break;
    case 8:
    case 9:
    case 10:
    case 11: check_status(shml_chunk_claim_open(seg, (uint32_t)dice(3), 1 + (uint32_t)dice(3), dice(8), &chunk)); break;
    case 0: check_status(shml_chunk_claim(seg, (uint32_t)dice(NUM_CHUNKS))); break;
    case 1: check_status(shml_chunk_end(seg, (uint32_t)dice(NUM_CHUNKS), (int)dice(3))); break;
    case 2: check_status(shml_order_begin(seg, &order)); break;
    case 3: check_status(shml_order_end(seg, (uint32_t)dice(3), 1)); break;
    default:
        if (seg->self >= 0 && dice(2) == 0) {
            stage.is_dead[seg->self] = 1;
            seg->self = -1;
            check_status(shml_reap(clients[0], 1));
        } else if (seg->self < 0) {
            memset(seg->pin_counts, 0, stage.control->num_descs * sizeof *seg->pin_counts);
            seg->pinned_bytes = seg->num_pinned = 0;
            check_status(shml_client_register(seg, SHML_SERVICE, (int32_t)dice(3) - 1, 1));
        }
    }
}

static void step(void)
{
    shml_seg_t *seg = clients[dice(NUM_CLIENTS)];
    switch (dice(8)) {
    case 0:
    case 1:
    case 2: write_any(seg); break;
    case 3:
    case 4: read_any(seg); break;
    case 5:
    case 6: ask_any(seg); break;
    default: change_any(clients[1 + dice(NUM_CLIENTS - 1)]);
    }
}

/* A word somewhere in what is written after the segment was made; the mutex, and what format alone wrote, stay. */
static void damage_a_word(void)
{
    shml_control_t *c = stage.control;
    const uint64_t head_bytes = offsetof(shml_control_t, guest_wants) + 64 - offsetof(shml_control_t, num_reaped);
    const struct {
        uint64_t at, bytes;
    } parts[] = {
        {(uint64_t)((uint8_t *)&c->dirty - (uint8_t *)c), 4},
        {(uint64_t)((uint8_t *)&c->num_reaped - (uint8_t *)c), head_bytes},
        {(uint64_t)((uint8_t *)&c->num_reaped - (uint8_t *)c), head_bytes},
        {c->clients_at, 6 * sizeof(shml_client_t)},
        {c->clients_at, 6 * sizeof(shml_client_t)},
        {c->wants_at, 64},
        {c->orders_at, 3 * sizeof(shml_order_t)},
        {c->marks_at, 64},
        {c->descs_at, 40 * sizeof(shml_desc_t)},
        {c->descs_at, 40 * sizeof(shml_desc_t)},
        {c->descs_at, 40 * sizeof(shml_desc_t)},
        {c->pins_at, 40 * SHML_PIN_WORDS * 8},
        {c->buckets_at, NUM_RECORDS * 4},
    };
    uint64_t kind = dice(sizeof parts / sizeof *parts + 2), offset;
    if (kind < sizeof parts / sizeof *parts) {
        offset = parts[kind].at + dice(parts[kind].bytes / 4) * 4;
    } else if (kind == sizeof parts / sizeof *parts) { /* of a region, but for its bounds */
        offset = (uint64_t)((uint8_t *)region((uint32_t)dice(3)) - (uint8_t *)c) + 16 + dice(12) * 4;
    } else { /* of a chunk: its word, its unit's reader, what is derived */
        offset = c->chunks_at + dice(NUM_CHUNKS) * sizeof(shml_chunk_t);
        offset += dice(2) == 0 ? offsetof(shml_chunk_t, word) : 20 + dice(9) * 4;
        if (chunks_per_order > 0 && dice(3) == 0) /* or which chunk has the place */
            offset = c->chunks_at + dice(NUM_CHUNKS) * sizeof(shml_chunk_t) + dice(2) * 4;
    }
    uint32_t *word = (uint32_t *)((uint8_t *)c + offset);
    switch (dice(4)) {
    case 0: *word = (uint32_t)test_random(&seed); break;
    case 1: *word ^= 1u << dice(32); break;
    case 2: *word += (uint32_t)dice(5) - 2; break;
    default: *word = (uint32_t)dice(64);
    }
    test_note("seed %llu, word at %llu", (unsigned long long)seed, (unsigned long long)offset);
}

static void report_fault(int signal_number)
{
    (void)signal_number;
    if (write(1, "\na fault at ", 12) < 0 || write(1, test_context, strlen(test_context)) < 0)
        _exit(98);
    _exit(97);
}

/* Words of a working segment are damaged, now and then in a change of a dead process: no call hangs, faults, leaves the
 * mutex locked, or hands out a place that is not in the ring. */
static void damage(shape_t shape, uint64_t first_seed)
{
    uint32_t num_poisoned = 0;
#ifndef __SANITIZE_ADDRESS__
    signal(SIGSEGV, report_fault);
    signal(SIGBUS, report_fault);
#else
    (void)report_fault;
#endif
    for (uint64_t round = 0; round < 1500; round++) {
        seed = first_seed + round;
        test_note("seed %llu", (unsigned long long)seed);
        new_stage(shape);
        for (int i = 0; i < NUM_CLIENTS; i++)
            clients[i] = enter(i < 2 ? SHML_SERVICE : SHML_WORKER);
        for (int i = 0; i < 60; i++)
            step();
        CHECK(stage.control->state == SHML_SEG_READY);
        for (int i = 0; i < 60; i++) {
            if (i % 20 == 0)
                damage_a_word();
            if (dice(30) == 0)
                break_mutex();
            step();
        }
        num_poisoned += stage.control->state != SHML_SEG_READY;
    }
    CHECK(num_poisoned > 100);
}

static void damage_is_an_error_and_nothing_else(void) { damage(small_shape, 391000); }

static void damage_of_an_open_set_is_an_error_and_nothing_else(void)
{
    chunks_per_order = 3;
    damage(transit_shape, 401000);
    chunks_per_order = 0;
}

TEST_MAIN(TEST(damage_is_an_error_and_nothing_else), TEST(damage_of_an_open_set_is_an_error_and_nothing_else))
