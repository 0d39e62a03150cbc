/* Records, wants, chunks, clients and texts of a segment, one process standing in for all. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "segment.h"
#include "snapshot.h"

static shml_seg_t segment(int self) { return segment_of(world()->memory, self, NULL, &snapshot_env); }

/* Clients 0 and 1 are services, 2 and 3 workers. */
static void new_segment(void)
{
    snapshot_reset();
    shml_failpoint = NULL;
    if (world()->memory != NULL)
        munmap(world()->memory, segment_bytes());
    world()->memory = mmap(NULL, segment_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(world()->memory != MAP_FAILED);
    format_segment(world()->memory);
    for (int client = 0; client < 4; client++) {
        shml_seg_t seg = segment(-1);
        CHECK_EQ(shml_client_register(&seg, client < 2 ? SHML_SERVICE : SHML_WORKER, -1, 0), SHML_OK);
        CHECK_EQ(seg.self, client);
    }
}

static shml_ticket_t reserve(int client, uint64_t id)
{
    shml_ticket_t ticket;
    shml_seg_t seg = segment(client);
    CHECK_EQ(shml_reserve(&seg, id, record_bytes(id), NULL, 0, &ticket), SHML_OK);
    return ticket;
}

/* ---------------------------------------------------------------------------------------------------- *
 * Format and attach
 * ---------------------------------------------------------------------------------------------------- */
static int check_control(uint64_t bytes)
{
    return shml_control_check(world()->memory, bytes, test_boot_id, small_config().pid_namespace);
}

static void only_a_whole_segment_of_this_kind_is_attached(void)
{
    new_segment();
    shml_config_t config = small_config();
    uint64_t bytes = shml_control_bytes(&config);
    shml_control_t *c = segment(0).control;
    CHECK_EQ(check_control(bytes), SHML_OK);
    CHECK_EQ(check_control(bytes - 1), SHML_E_LAYOUT);
    CHECK_EQ(check_control(16), SHML_E_LAYOUT);
    CHECK_EQ(shml_control_check(c, bytes, (const uint8_t *)"another boot's id", config.pid_namespace), SHML_E_LAYOUT);
    CHECK_EQ(shml_control_check(c, bytes, test_boot_id, 1), SHML_E_NAMESPACE);
    uint32_t *words[] = {&c->version,
                         &c->abi,
                         &c->max_clients,
                         &c->num_chunks,
                         &c->num_descs,
                         &c->num_buckets,
                         (uint32_t *)&c->magic,
                         (uint32_t *)&c->control_bytes,
                         (uint32_t *)&c->ring_bytes,
                         (uint32_t *)&c->num_records,
                         (uint32_t *)&c->clients_at,
                         (uint32_t *)&c->wants_at,
                         (uint32_t *)&c->orders_at,
                         (uint32_t *)&c->marks_at,
                         (uint32_t *)&c->read_at,
                         (uint32_t *)&c->texts_at,
                         (uint32_t *)&c->chunks_at,
                         (uint32_t *)&c->descs_at,
                         (uint32_t *)&c->pins_at,
                         (uint32_t *)&c->buckets_at,
                         (uint32_t *)&c->reads_at,
                         (uint32_t *)&c->regions[SHML_RESIDENT].begin,
                         (uint32_t *)&c->regions[SHML_RESIDENT].end + 1,
                         (uint32_t *)&c->regions[SHML_TRANSIT].begin,
                         (uint32_t *)&c->regions[SHML_RAW_REGION].end};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        test_note("field %zu", i);
        ++*words[i];
        CHECK_EQ(check_control(bytes), SHML_E_LAYOUT);
        --*words[i];
    }
    CHECK_EQ(check_control(bytes), SHML_OK);
}

static void impossible_configurations_are_refused(void)
{
    shml_config_t good = small_config(), bad;
    CHECK(shml_control_bytes(&good) > 0);
    bad = good, bad.resident_bytes = 0; /* no region at all */
    CHECK_EQ(shml_control_bytes(&bad), 0);
    bad = good, bad.resident_bytes = 4097;
    CHECK_EQ(shml_control_bytes(&bad), 0);
    bad = good, bad.raw_bytes = 64;
    CHECK_EQ(shml_control_bytes(&bad), 0);
    bad = good, bad.transit_bytes = UINT64_MAX - 4095;
    CHECK_EQ(shml_control_bytes(&bad), 0);
    bad = good, bad.num_records = 0;
    CHECK_EQ(shml_control_bytes(&bad), 0);
    bad = good, bad.num_records = UINT64_C(1) << 40;
    CHECK_EQ(shml_control_bytes(&bad), 0);
    uint8_t *memory = calloc(1, shml_control_bytes(&good));
    const uint64_t gap[NUM_CHUNKS] = {0, 4, 9};
    const uint64_t right[NUM_CHUNKS] = {0, 4, 8, 12, 16, 20};
    const uint32_t rows[NUM_CHUNKS] = {4, 4, 4, 4, 4, 4}, units[NUM_CHUNKS] = {0, 0, 0, 3, 4, 4};
    const uint32_t ahead[NUM_CHUNKS] = {0, 2, 2, 3, 4, 4}, torn[NUM_CHUNKS] = {0, 0, 2, 0, 4, 4};
    uint64_t bytes = shml_control_bytes(&good);
    CHECK_EQ(shml_control_format(memory, bytes, &good, gap, rows, units), SHML_E_INVAL);
    CHECK_EQ(shml_control_format(memory, bytes, &good, right, rows, ahead), SHML_E_INVAL);
    CHECK_EQ(shml_control_format(memory, bytes, &good, right, rows, torn), SHML_E_INVAL);
    CHECK_EQ(shml_control_format(memory, bytes - 1, &good, right, rows, units), SHML_E_INVAL);
    CHECK_EQ(((shml_control_t *)(void *)memory)->magic, 0);
    free(memory);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Records
 * ---------------------------------------------------------------------------------------------------- */
static void a_record_is_there_once_it_is_committed(void)
{
    new_segment();
    shml_seg_t writer = segment(0), reader = segment(2);
    CHECK_EQ(look(&reader, 7).status, SHML_REF_MISSING);
    CHECK_EQ(look(&reader, 7).chunk, 1);
    CHECK_EQ(look(&reader, 1000).chunk, UINT32_MAX); /* of no chunk */
    shml_ticket_t ticket = reserve(0, 7);
    CHECK_EQ(look(&reader, 7).status, SHML_REF_MISSING);
    write_record(&writer, &ticket, 7);
    CHECK_EQ(shml_commit(&writer, &ticket, SHML_REF_READY), SHML_OK);
    check_record(&reader, 7);
    CHECK_EQ(shml_commit(&writer, &ticket, SHML_REF_READY), SHML_E_STALE);
    CHECK_EQ(shml_abort(&writer, &ticket), SHML_E_STALE);
    check_segment(&reader);
}

static void a_ticket_is_good_for_its_client_and_generation_only(void)
{
    new_segment();
    shml_seg_t writer = segment(0), other = segment(1), nobody = segment(-1);
    shml_ticket_t ticket = reserve(0, 7), bad = ticket;
    CHECK_EQ(shml_commit(&other, &ticket, SHML_REF_READY), SHML_E_STALE);
    CHECK_EQ(shml_abort(&other, &ticket), SHML_E_STALE);
    bad.gen++;
    CHECK_EQ(shml_commit(&writer, &bad, SHML_REF_READY), SHML_E_STALE);
    bad = ticket, bad.desc = UINT32_MAX;
    CHECK_EQ(shml_commit(&writer, &bad, SHML_REF_READY), SHML_E_STALE);
    CHECK_EQ(shml_commit(&writer, &ticket, SHML_REF_MISSING), SHML_E_INVAL);
    CHECK_EQ(shml_reserve(&nobody, 8, 64, NULL, 0, &bad), SHML_E_LEFT);
    CHECK_EQ(shml_reserve(&writer, 8, 0, NULL, 0, &bad), SHML_E_INVAL);
    CHECK_EQ(shml_commit(&writer, &ticket, SHML_REF_READY), SHML_OK);
}

static void an_id_is_reserved_once(void)
{
    shml_ticket_t ticket;
    new_segment();
    shml_seg_t other = segment(1);
    (void)reserve(0, 7);
    CHECK_EQ(shml_reserve(&other, 7, 64, NULL, 0, &ticket), SHML_E_EXISTS);
    CHECK_EQ(put_record(&other, 8), SHML_OK);
    CHECK_EQ(shml_reserve(&other, 8, 64, NULL, 0, &ticket), SHML_E_EXISTS);
    check_segment(&other);
}

static void ids_that_collide_are_told_apart(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    const uint64_t ids[] = {3,
                            3 + NUM_RECORDS,
                            3 + 2 * NUM_RECORDS,
                            UINT64_C(1) << 40,
                            UINT64_MAX - 1,
                            SHML_CHUNK_ERROR,
                            SHML_CHUNK_ERROR | 3};
    const size_t n = sizeof ids / sizeof *ids;
    shml_ticket_t tickets[7];
    for (size_t i = 0; i < n; i++) {
        tickets[i] = reserve(0, ids[i]);
        write_record(&seg, &tickets[i], ids[i]);
    }
    CHECK_EQ(shml_abort(&seg, &tickets[1]), SHML_OK); /* out of the middle of a chain */
    for (size_t i = 0; i < n; i++)
        if (i != 1)
            CHECK_EQ(shml_commit(&seg, &tickets[i], SHML_REF_READY), SHML_OK);
    for (size_t i = 0; i < n; i++)
        if (i != 1)
            check_record(&seg, ids[i]);
    CHECK_EQ(look(&seg, ids[1]).status, SHML_REF_MISSING);
    check_segment(&seg);
}

static void many_ids_are_looked_up_at_once(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    const uint64_t ids[] = {5, 1, 20, 5, 2};
    shml_ref_t refs[5];
    shml_found_t found;
    uint8_t rows[5];
    CHECK_EQ(put_record(&seg, 1), SHML_OK);
    CHECK_EQ(put_record(&seg, 5), SHML_OK);
    shml_ticket_t ticket = reserve(0, 2);
    CHECK_EQ(shml_get_many(&seg, ids, 5, 0, NULL, refs, &found), SHML_OK);
    CHECK_EQ(found.num_missing, 2);
    CHECK_EQ(refs[0].offset, refs[3].offset);
    CHECK_EQ(refs[2].status, SHML_REF_MISSING);
    CHECK_EQ(shml_get_many(&seg, ids, 0, 0, NULL, refs, &found), SHML_OK);
    CHECK_EQ(found.num_missing, 0);
    CHECK_EQ(shml_look(&seg, ids, 5, NULL, rows), SHML_OK);
    CHECK_EQ(rows[4], SHML_ROW_WORK);
    CHECK_EQ(shml_commit(&seg, &ticket, SHML_REF_ERROR), SHML_OK);
    CHECK_EQ(look(&seg, 2).status, SHML_REF_ERROR);
    CHECK_EQ(shml_look(&seg, ids, 5, NULL, rows), SHML_OK);
    CHECK(rows[0] == SHML_ROW_FINAL && rows[1] == SHML_ROW_FINAL && rows[3] == SHML_ROW_FINAL);
    CHECK_EQ(rows[2], SHML_ROW_MISSING);
    CHECK_EQ(rows[4], SHML_ROW_FINAL);
}

static void a_hole_is_used_by_what_fits_it(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    shml_ticket_t low = reserve(0, 2), high = reserve(0, 3);
    CHECK_EQ(shml_abort(&seg, &low), SHML_OK);
    CHECK_EQ(segment(0).control->regions[SHML_RESIDENT].head, high.offset + high.num_bytes);
    shml_ticket_t other = reserve(0, 1); /* smaller: not into the hole */
    CHECK(other.offset >= high.offset + high.num_bytes);
    shml_ticket_t again = reserve(0, 2);
    CHECK_EQ(again.offset, low.offset);
    CHECK(again.gen != low.gen);
    CHECK_EQ(shml_commit(&seg, &low, SHML_REF_READY), SHML_E_STALE);
    write_record(&seg, &again, 2);
    CHECK_EQ(shml_commit(&seg, &again, SHML_REF_READY), SHML_OK);
    CHECK_EQ(shml_abort(&seg, &high), SHML_OK);
    CHECK_EQ(shml_abort(&seg, &other), SHML_OK); /* the top: free space again, and the hole below it too */
    CHECK_EQ(segment(0).control->regions[SHML_RESIDENT].head, high.offset);
    check_segment(&seg);
}

static void a_full_ring_says_so(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    shml_ticket_t ticket;
    CHECK_EQ(shml_reserve(&seg, 0, RING_BYTES + 1, NULL, 0, &ticket), SHML_E_TOOBIG);
    CHECK_EQ(shml_reserve(&seg, 0, UINT64_MAX, NULL, 0, &ticket), SHML_E_TOOBIG);
    CHECK_EQ(shml_reserve(&seg, 0, RING_BYTES - 64, NULL, 0, &ticket), SHML_OK);
    CHECK_EQ(shml_reserve(&seg, 1, 65, NULL, 0, &ticket), SHML_E_FULL);
    CHECK_EQ(shml_reserve(&seg, 1, 1, NULL, 0, &ticket), SHML_OK);
    CHECK_EQ(ticket.num_bytes, 64);
    CHECK_EQ(shml_reserve(&seg, 2, 1, NULL, 0, &ticket), SHML_E_FULL);
    CHECK_EQ(stats_of(&seg).resident.used_bytes, RING_BYTES);
    check_segment(&seg);
}

static void descriptors_run_out_and_come_back(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    shml_control_t *c = seg.control;
    /* 4096 more than records and chunks: give the ring more room than it has memory for. */
    for (int i = 0; i < SHML_NUM_REGIONS; i++) {
        c->regions[i].end = c->regions[i].backed_end = c->ring_bytes = 64 * 8192;
        c->regions[i].begin = c->regions[i].head = i == SHML_RESIDENT ? 0 : c->ring_bytes;
    }
    shml_ticket_t ticket, last = {0, 0, 0, 0};
    uint64_t n = 0;
    while (shml_reserve(&seg, n, 1, NULL, 0, &ticket) == SHML_OK)
        last = ticket, n++;
    CHECK_EQ(n, c->num_descs);
    CHECK_EQ(shml_reserve(&seg, n, 1, NULL, 0, &ticket), SHML_E_FULL);
    CHECK_EQ(shml_abort(&seg, &last), SHML_OK);
    CHECK_EQ(shml_reserve(&seg, n, 1, NULL, 0, &ticket), SHML_OK);
    CHECK_EQ(ticket.desc, last.desc);
    check_segment(&seg);
}

static void a_ring_without_memory_asks_for_it(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    shml_ticket_t ticket;
    shml_region_t *resident = &seg.control->regions[SHML_RESIDENT];
    resident->backed_end = 4096;
    CHECK_EQ(shml_reserve(&seg, 0, 4097, NULL, 0, &ticket), SHML_E_EXTEND);
    CHECK_EQ(ticket.desc, SHML_RESIDENT);
    CHECK_EQ(ticket.offset + ticket.num_bytes, 4160);
    CHECK_EQ(shml_reserve(&seg, 0, 4096, NULL, 0, &ticket), SHML_OK);
    CHECK_EQ(shml_reserve(&seg, 1, 1, NULL, 0, &ticket), SHML_E_EXTEND);
    resident->frozen = 1;
    CHECK_EQ(shml_reserve(&seg, 1, 1, NULL, 0, &ticket), SHML_E_FULL);
    check_segment(&seg);
    resident->frozen = 0;
    resident->backed_end = 8192;
    CHECK_EQ(shml_reserve(&seg, 1, 1, NULL, 0, &ticket), SHML_OK);
}

static void reads_are_counted_by_row(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    uint32_t reads[3];
    CHECK_EQ(shml_count_reads(&seg, (uint64_t[]){1, 2, 1}, 3, reads), SHML_OK);
    CHECK(reads[0] == 0 && reads[1] == 0 && reads[2] == 1);
    CHECK_EQ(shml_count_reads(&seg, (uint64_t[]){1, 2}, 2, reads), SHML_OK);
    CHECK(reads[0] == 2 && reads[1] == 1);
    CHECK_EQ(shml_count_reads(&seg, (uint64_t[]){UINT64_MAX}, 1, reads), SHML_OK); /* counts somewhere */
    CHECK_EQ(put_record(&seg, 1), SHML_OK);
    (void)look(&seg, 1);
    (void)look(&seg, 2); /* is not there */
    CHECK_EQ(stats_of(&seg).num_reads, 1);
}

static uint32_t post(int client, const uint64_t *ids, uint32_t n)
{
    shml_ref_t refs[SHML_MAX_WANTS + 8];
    shml_found_t found;
    shml_seg_t seg = segment(client);
    CHECK_EQ(shml_get_many(&seg, ids, n, SHML_GET_POST, NULL, refs, &found), SHML_OK);
    return found.num_missing;
}

static void the_last_want_wakes_the_reader(void)
{
    new_segment();
    shml_seg_t writer = segment(0), reader = segment(2), other = segment(3);
    uint32_t seen = shml_wake_word(&reader), seen_other = shml_wake_word(&other), work = shml_work_word(&writer);
    CHECK_EQ(post(2, (uint64_t[]){4, 9, 4}, 3), 3);
    CHECK(shml_work_word(&writer) != work); /* a row to decode */
    work = shml_work_word(&writer);
    CHECK_EQ(post(2, (uint64_t[]){4, 9, 4}, 3), 3);
    CHECK_EQ(post(2, (uint64_t[]){4, 4}, 2), 2);
    CHECK_EQ(shml_work_word(&writer), work); /* nothing that was not known */
    CHECK_EQ(post(2, (uint64_t[]){4, 9, 4}, 3), 3);
    CHECK(shml_work_word(&writer) != work);
    CHECK_EQ(post(3, (uint64_t[]){4, 10}, 2), 2);
    CHECK_EQ(put_record(&writer, 4), SHML_OK);
    CHECK_EQ(shml_wake_word(&reader), seen); /* not yet: 9 */
    CHECK_EQ(put_record(&writer, 11), SHML_OK);
    CHECK_EQ(shml_wake_word(&reader), seen);
    CHECK_EQ(put_record(&writer, 9), SHML_OK);
    CHECK(shml_wake_word(&reader) != seen);
    CHECK_EQ(shml_wake_word(&other), seen_other);
    CHECK_EQ(post(2, (uint64_t[]){4, 9}, 2), 0); /* an empty list replaces the former */
    CHECK_EQ(shml_clients(writer.control)[2].num_wants, 0);
}

static void what_is_wanted_and_not_worked_at_is_found(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    uint64_t ids[8];
    uint8_t got[1];
    (void)post(2, (uint64_t[]){4, 9}, 2);
    (void)post(3, (uint64_t[]){5, 20}, 2);
    CHECK_EQ(shml_wanted(&seg, ids, 8), 4);
    CHECK_EQ(shml_wanted(&seg, ids, 3), 3);
    CHECK_EQ(shml_claim_rows(&seg, (uint64_t[]){9}, 1, got), SHML_OK);
    (void)reserve(0, 20);
    CHECK_EQ(shml_wanted(&seg, ids, 8), 2);
    CHECK(ids[0] + ids[1] == 9); /* 4 and 5 */
    shml_seg_t leaving = segment(3);
    shml_client_unregister(&leaving);
    CHECK_EQ(shml_wanted(&seg, ids, 8), 1);
}

static void more_wants_than_there_is_room_for(void)
{
    uint64_t ids[SHML_MAX_WANTS + 8];
    new_segment();
    for (uint32_t i = 0; i < SHML_MAX_WANTS + 8; i++)
        ids[i] = i;
    CHECK_EQ(post(2, ids, SHML_MAX_WANTS + 8), SHML_MAX_WANTS + 8);
    CHECK_EQ(shml_clients(segment(0).control)[2].num_wants, SHML_MAX_WANTS);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Chunks
 * ---------------------------------------------------------------------------------------------------- */
static int claim(int client, uint32_t chunk)
{
    shml_seg_t seg = segment(client);
    return shml_chunk_claim(&seg, chunk);
}
static uint32_t chunk_word(uint32_t chunk) { return shml_chunks(segment(0).control)[chunk].word; }

/* Write all its rows. */
static void fill_chunk(int client, uint32_t chunk)
{
    shml_seg_t seg = segment(client);
    for (uint64_t id = (uint64_t)chunk * ROWS; id < (uint64_t)(chunk + 1) * ROWS; id++)
        CHECK_EQ(put_record(&seg, id), SHML_OK);
}

static void chunks_are_wanted_by_waiting_rows(void)
{
    uint32_t chunks[NUM_CHUNKS], counts[NUM_CHUNKS];
    new_segment();
    shml_seg_t seg = segment(0);
    (void)post(2, (uint64_t[]){17, 9}, 2);        /* of chunks 4 and 2 */
    (void)post(3, (uint64_t[]){8, 10, 21, 1}, 4); /* of chunks 2, 5 and 0 */
    CHECK_EQ(claim(0, 0), SHML_OK);
    CHECK_EQ(shml_chunks_wanted(&seg, chunks, counts, NUM_CHUNKS), 3);
    uint32_t by_chunk[NUM_CHUNKS] = {0};
    for (int i = 0; i < 3; i++)
        by_chunk[chunks[i]] = counts[i];
    CHECK(by_chunk[2] == 3 && by_chunk[4] == 1 && by_chunk[5] == 1);
    CHECK_EQ(shml_chunks_wanted(&seg, chunks, counts, 2), 2);
    CHECK_EQ(put_record(&seg, 17), SHML_OK); /* is wanted no more */
    CHECK_EQ(shml_chunks_wanted(&seg, chunks, counts, NUM_CHUNKS), 2);
    check_segment(&seg);
}

/* Chunks 4 and 5 are one unit. */
static void one_client_reads_a_unit(void)
{
    new_segment();
    shml_seg_t seg = segment(0), leaving = segment(1);
    CHECK_EQ(claim(1, 4), SHML_OK);
    CHECK_EQ(claim(0, 5), SHML_E_STALE);
    CHECK_EQ(claim(0, 4), SHML_E_STALE);
    CHECK_EQ(claim(0, 1), SHML_OK); /* alone in its unit */
    CHECK_EQ(shml_chunk_end(&leaving, 4, SHML_FETCH_OK), SHML_OK);
    CHECK_EQ(claim(0, 5), SHML_E_STALE); /* 1 goes on with it */
    CHECK_EQ(claim(1, 5), SHML_OK);
    shml_client_unregister(&leaving);
    CHECK_EQ(claim(0, 5), SHML_OK);
    CHECK_EQ(claim(0, 4), SHML_OK);
    check_segment(&seg);
}

static void a_chunk_is_done_with_its_last_row(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    uint32_t work = shml_work_word(&seg);
    CHECK_EQ(claim(0, 1), SHML_OK);
    CHECK_EQ(shml_chunk_end(&seg, 1, SHML_FETCH_OK), SHML_OK);
    CHECK(shml_work_word(&seg) != work);
    fill_chunk(0, 1);
    CHECK_EQ(chunk_word(1) & 0xf, SHML_CHUNK_DONE);
    CHECK_EQ(claim(0, 1), SHML_E_NOTFOUND);
    CHECK_EQ(claim(0, 2), SHML_OK);
    fill_chunk(1, 2); /* another's rows: the claim ends with the last of them */
    CHECK_EQ(shml_chunk_end(&seg, 2, SHML_FETCH_OK), SHML_E_STALE);
    shml_stats_t stats = stats_of(&seg);
    CHECK_EQ(stats.chunks_done, 2);
    CHECK_EQ(stats.num_fetched, 1);
    check_segment(&seg);
}

/* Resident is promised by the mean size of the rows so far. */
static void chunks_stay_until_resident_is_promised_away(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    shml_ticket_t ticket;
    uint32_t staying = 0;
    CHECK_EQ(claim(0, 0), SHML_OK);
    CHECK_EQ(shml_reserve(&seg, 0, RESIDENT_BYTES / 16, NULL, 0, &ticket), SHML_OK);
    CHECK_EQ(shml_commit(&seg, &ticket, SHML_REF_READY), SHML_OK);
    for (uint32_t i = 1; i < NUM_CHUNKS; i++) {
        CHECK_EQ(claim(0, i), SHML_OK);
        staying += (chunk_word(i) & SHML_CHUNK_STAYS) != 0;
    }
    CHECK_EQ(staying, 3);                               /* with chunk 0, a quarter each */
    CHECK_EQ(seg.control->promised_rows, 4 * ROWS - 1); /* one is there */
    check_segment(&seg);
}

static void only_its_claimant_ends_a_fetch(void)
{
    new_segment();
    shml_seg_t seg = segment(0), other = segment(1);
    CHECK_EQ(claim(0, 0), SHML_OK);
    CHECK_EQ(claim(0, 0), SHML_E_STALE);
    CHECK_EQ(claim(1, 0), SHML_E_STALE);
    CHECK_EQ(shml_chunk_end(&other, 0, SHML_FETCH_OK), SHML_E_STALE);
    CHECK_EQ(shml_chunk_end(&seg, 1, SHML_FETCH_OK), SHML_E_STALE);
    CHECK_EQ(shml_chunk_end(&seg, NUM_CHUNKS, SHML_FETCH_OK), SHML_E_INVAL);
    CHECK_EQ(shml_chunk_end(&seg, 0, 3), SHML_E_INVAL);
    CHECK_EQ(claim(0, NUM_CHUNKS), SHML_E_INVAL);
    CHECK_EQ(shml_chunk_end(&seg, 0, SHML_FETCH_GIVEN_UP), SHML_OK);
    CHECK_EQ(shml_chunk_end(&seg, 0, SHML_FETCH_OK), SHML_E_STALE);
    shml_stats_t stats = stats_of(&seg);
    CHECK_EQ(stats.chunks_claimed, 0);
    CHECK_EQ(stats.chunks_todo, NUM_CHUNKS);
}

static void a_broken_chunk_wakes_who_waits_for_it(void)
{
    new_segment();
    shml_seg_t seg = segment(0), reader = segment(2), other = segment(3);
    (void)post(2, (uint64_t[]){1, 9}, 2);
    (void)post(3, (uint64_t[]){9}, 1);
    CHECK_EQ(claim(0, 2), SHML_OK);
    CHECK_EQ(claim(0, 0), SHML_OK);
    uint32_t seen = shml_wake_word(&reader), seen_other = shml_wake_word(&other);
    CHECK_EQ(shml_chunk_end(&seg, 0, SHML_FETCH_BROKEN), SHML_OK);
    CHECK(shml_wake_word(&reader) != seen);
    CHECK_EQ(shml_wake_word(&other), seen_other);
    CHECK_EQ(look(&reader, 1).status, SHML_REF_BROKEN);
    CHECK_EQ(look(&reader, 9).status, SHML_REF_MISSING);
    CHECK_EQ(put_record(&seg, 2), SHML_OK); /* a row that came before it broke is good */
    check_record(&reader, 2);
    check_segment(&seg);
}

static void three_deaths_set_a_chunk_aside(void)
{
    new_segment();
    shml_seg_t reader = segment(2);
    (void)post(2, (uint64_t[]){0}, 1);
    for (int death = 1; death <= SHML_MAX_ATTEMPTS; death++) {
        uint32_t seen = shml_wake_word(&reader);
        shml_seg_t service = segment(-1);
        CHECK_EQ(shml_client_register(&service, SHML_SERVICE, -1, 0), SHML_OK);
        CHECK_EQ(claim(service.self, 0), SHML_OK);
        world()->is_dead[service.self] = 1;
        CHECK_EQ(shml_reap(&reader, 1), 1);
        int is_last = death == SHML_MAX_ATTEMPTS;
        CHECK_EQ(chunk_word(0) & 0xf, is_last ? SHML_CHUNK_BROKEN : SHML_CHUNK_TODO);
        CHECK_EQ(chunk_word(0) >> 8 & 0xff, death);
        CHECK_EQ(shml_wake_word(&reader) != seen, is_last);
        CHECK_EQ(look(&reader, 0).status, is_last ? SHML_REF_BROKEN : SHML_REF_MISSING);
        check_segment(&reader);
    }
    CHECK_EQ(claim(0, 0), SHML_E_NOTFOUND);
}

static void who_has_left_is_told_so(void)
{
    new_segment();
    shml_seg_t seg = segment(-1);
    CHECK_EQ(shml_client_register(&seg, SHML_WORKER, -1, 0), SHML_OK);
    shml_client_unregister(&seg);
    shml_client_unregister(&seg); /* again: nothing */
    shml_ref_t ref;
    shml_found_t found;
    uint8_t got;
    shml_order_info_t order = {0};
    CHECK_EQ(shml_get_many(&seg, (uint64_t[]){1}, 1, SHML_GET_POST, NULL, &ref, &found), SHML_E_LEFT);
    CHECK_EQ(shml_chunk_claim(&seg, 0), SHML_E_LEFT);
    CHECK_EQ(shml_chunk_end(&seg, 0, SHML_FETCH_OK), SHML_E_LEFT);
    CHECK_EQ(shml_claim_rows(&seg, (uint64_t[]){1}, 1, &got), SHML_E_LEFT);
    CHECK_EQ(shml_order_begin(&seg, &order), SHML_E_LEFT);
}

static void damaged_lists_poison_and_do_not_hang(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    shml_ticket_t low = reserve(0, 2), high = reserve(0, 3), ticket;
    CHECK_EQ(shml_abort(&seg, &low), SHML_OK); /* a hole */
    shml_descs(seg.control)[low.desc].next = low.desc + 1;
    CHECK_EQ(shml_reserve(&seg, 9, 4 * 64, NULL, 0, &ticket), SHML_OK); /* of another size: the walk ends */
    seg.control->free_list = 0x7fffffff;
    CHECK_EQ(shml_reserve(&seg, 10, 8 * 64, NULL, 0, &ticket), SHML_E_POISONED);
    (void)high;
}

static void leaving_with_a_chunk_is_no_death(void)
{
    new_segment();
    shml_seg_t service = segment(-1);
    CHECK_EQ(shml_client_register(&service, SHML_SERVICE, -1, 0), SHML_OK);
    CHECK_EQ(claim(service.self, 0), SHML_OK);
    shml_client_unregister(&service);
    CHECK_EQ(chunk_word(0) & 0xf, SHML_CHUNK_TODO);
    CHECK_EQ(chunk_word(0) >> 8 & 0xff, 0);
}

static void going_down_with_the_supervisor_is_no_death_of_its_own(void)
{
    new_segment();
    shml_seg_t reader = segment(2), supervisor = segment(-1), service = segment(-1);
    CHECK_EQ(shml_client_register(&supervisor, SHML_SERVICE, -1, 0), SHML_OK);
    uint32_t gen = shml_client_gen(&supervisor, supervisor.self);
    CHECK_EQ(shml_client_register(&service, SHML_SERVICE, supervisor.self, gen), SHML_OK);
    CHECK_EQ(claim(service.self, 0), SHML_OK);
    world()->is_dead[supervisor.self] = world()->is_dead[service.self] = 1;
    CHECK_EQ(shml_reap(&reader, 1), 2);
    CHECK_EQ(chunk_word(0) & 0xf, SHML_CHUNK_TODO);
    CHECK_EQ(chunk_word(0) >> 8 & 0xff, 0);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Clients
 * ---------------------------------------------------------------------------------------------------- */
static void the_dead_are_cleaned_up_after_once(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    shml_ticket_t tickets[3] = {reserve(1, 4), reserve(1, 5), reserve(0, 6)};
    (void)post(1, (uint64_t[]){20}, 1);
    CHECK_EQ(claim(1, 5), SHML_OK);
    uint64_t ids[4];
    CHECK_EQ(shml_reap(&seg, 1), 0);
    world()->is_dead[1] = 1;
    CHECK_EQ(shml_reap(&seg, 1), 1);
    CHECK_EQ(shml_reap(&seg, 1), 0);
    CHECK_EQ(shml_wanted(&seg, ids, 4), 0);
    shml_stats_t stats = stats_of(&seg);
    CHECK_EQ(stats.num_reserved, 1);
    CHECK_EQ(stats.num_reaped, 1);
    CHECK_EQ(stats.num_services, 1);
    CHECK_EQ(stats.chunks_claimed, 0);
    check_segment(&seg);
    shml_seg_t again = segment(-1);
    uint32_t gen = shml_client_gen(&seg, 1);
    CHECK_EQ(shml_client_register(&again, SHML_SERVICE, -1, 0), SHML_OK);
    CHECK_EQ(again.self, 1);
    CHECK_EQ(shml_client_gen(&seg, 1), gen + 1);
    CHECK_EQ(shml_commit(&again, &tickets[0], SHML_REF_READY), SHML_E_STALE); /* its predecessor's */
    CHECK_EQ(stats.num_suspect, 2);
    CHECK_EQ(put_record(&again, 4), SHML_OK);
    CHECK_EQ(shml_commit(&seg, &tickets[2], SHML_REF_READY), SHML_OK);
    CHECK_EQ(stats_of(&seg).num_suspect, 1);
    check_segment(&seg);
}

static uint64_t frozen_now(void *ctx)
{
    (void)ctx;
    return snapshot.now_ns;
}

static void reaping_is_rate_limited_among_all(void)
{
    new_segment();
    shml_env_t env = snapshot_env;
    env.now_ns = frozen_now;
    shml_seg_t seg = segment(0);
    seg.env = &env;
    snapshot.now_ns += UINT64_C(1000000000);
    CHECK_EQ(shml_reap(&seg, 0), 0);
    world()->is_dead[2] = 1;
    uint32_t asked = snapshot.num_alive;
    CHECK_EQ(shml_reap(&seg, 0), 0);
    CHECK_EQ(snapshot.num_alive, asked);
    snapshot.now_ns += UINT64_C(99000000);
    CHECK_EQ(shml_reap(&seg, 0), 0);
    snapshot.now_ns += UINT64_C(2000000);
    CHECK_EQ(shml_reap(&seg, 0), 1);
}

static void a_full_table_of_clients_buries_its_dead(void)
{
    new_segment();
    shml_seg_t seg = segment(-1);
    for (uint32_t i = 4; i < SHML_MAX_CLIENTS; i++)
        CHECK_EQ(shml_client_register(&seg, SHML_SERVICE, -1, 0), SHML_OK);
    CHECK_EQ(shml_client_register(&seg, SHML_OWNER, -1, 0), SHML_E_CLIENTS);
    world()->is_dead[100] = 1;
    CHECK_EQ(shml_client_register(&seg, SHML_OWNER, -1, 0), SHML_OK);
    CHECK_EQ(seg.self, 100);
    CHECK_EQ(shml_count_clients(&seg, SHML_OWNER), 1);
    CHECK_EQ(shml_client_gen(&seg, -1), 0);
    CHECK_EQ(shml_client_gen(&seg, SHML_MAX_CLIENTS), 0);
    shml_client_unregister(&seg);
    CHECK_EQ(seg.self, -1);
    shml_client_unregister(&seg);
}

static void who_leaves_gives_back_what_it_had(void)
{
    new_segment();
    shml_seg_t seg = segment(0), leaving = segment(1);
    (void)reserve(1, 4);
    CHECK_EQ(claim(1, 0), SHML_OK);
    shml_client_unregister(&leaving);
    CHECK_EQ(put_record(&seg, 4), SHML_OK);
    CHECK_EQ(claim(0, 0), SHML_OK);
    check_segment(&seg);
}

/* ---------------------------------------------------------------------------------------------------- *
 * The rest
 * ---------------------------------------------------------------------------------------------------- */
static void the_first_text_wins(void)
{
    char text[SHML_TEXT_BYTES], large[SHML_TEXT_BYTES + 1];
    memset(large, 'x', sizeof large);
    new_segment();
    shml_seg_t seg = segment(0), other = segment(2);
    CHECK_EQ(shml_text_get(&seg, SHML_TEXT_SCHEMA, text), SHML_E_NOTFOUND);
    CHECK_EQ(shml_text_put(&seg, SHML_TEXT_SCHEMA, large, sizeof large), SHML_E_INVAL);
    CHECK_EQ(shml_text_put(&seg, SHML_TEXT_SCHEMA, large, 0), SHML_E_INVAL);
    CHECK_EQ(shml_text_put(&seg, SHML_NUM_TEXTS, large, 1), SHML_E_INVAL);
    CHECK_EQ(shml_text_get(&seg, SHML_NUM_TEXTS, text), SHML_E_INVAL);
    CHECK_EQ(shml_text_put(&seg, SHML_TEXT_SCHEMA, large, SHML_TEXT_BYTES), SHML_OK);
    CHECK_EQ(shml_text_put(&other, SHML_TEXT_SCHEMA, "second", 6), SHML_E_EXISTS);
    CHECK_EQ(shml_text_get(&other, SHML_TEXT_SCHEMA, text), SHML_TEXT_BYTES);
    CHECK(memcmp(text, large, SHML_TEXT_BYTES) == 0);
    (void)post(2, (uint64_t[]){4}, 1);
    uint32_t seen = shml_wake_word(&other);
    CHECK_EQ(shml_text_put(&seg, SHML_TEXT_FATAL, "no", 2), SHML_OK);
    CHECK(shml_wake_word(&other) != seen); /* a fatal error ends all waiting */
    shml_texts(seg.control)[SHML_TEXT_FATAL].num_bytes = SHML_TEXT_BYTES + 1;
    CHECK_EQ(shml_text_get(&seg, SHML_TEXT_FATAL, text), SHML_E_CORRUPT);
}

static void stats_add_up(void)
{
    new_segment();
    shml_seg_t seg = segment(0);
    CHECK_EQ(put_record(&seg, 1), SHML_OK);
    CHECK_EQ(put_record(&seg, 3), SHML_OK);
    shml_ticket_t error = reserve(0, 5), open = reserve(0, 6);
    CHECK_EQ(shml_commit(&seg, &error, SHML_REF_ERROR), SHML_OK);
    shml_stats_t stats = stats_of(&seg);
    CHECK_EQ(stats.num_ready, 2);
    CHECK_EQ(stats.num_errors, 1);
    CHECK_EQ(stats.num_reserved, 1);
    CHECK_EQ(stats.num_commits, 3);
    CHECK_EQ(stats.resident.used_bytes, record_bytes(1) + record_bytes(3) + record_bytes(5) + open.num_bytes);
    CHECK_EQ(stats.commit_bytes, record_bytes(1) + record_bytes(3) + record_bytes(5));
    CHECK_EQ(stats.resident.bytes, RESIDENT_BYTES);
    CHECK_EQ(stats.resident.num_blocks, 4);
    CHECK_EQ(stats.resident.head_bytes, stats.resident.used_bytes);
    CHECK_EQ(stats.num_records, NUM_RECORDS);
    CHECK_EQ(stats.num_services, 2);
    CHECK_EQ(stats.num_workers, 2);
    uint64_t progress = stats.progress;
    shml_touch(&seg);
    CHECK(stats_of(&seg).progress > progress);
    shml_epoch_set(&seg, 5);
    CHECK_EQ(shml_epoch_get(&seg), 5);
}

/* A damaged table is an error for all, never a hang or an access out of bounds. */
static void damage_poisons_the_segment(void)
{
    new_segment();
    shml_seg_t seg = segment(0), reader = segment(2);
    CHECK_EQ(put_record(&seg, 1), SHML_OK);
    uint32_t seen = shml_wake_word(&reader), index = look(&seg, 1).desc;
    shml_desc_t *desc = &shml_descs(seg.control)[index];
    desc->next = index + 1; /* a ring */
    shml_ref_t ref;
    shml_found_t found;
    CHECK_EQ(shml_get_many(&seg, &(uint64_t){1 + NUM_RECORDS}, 1, 0, NULL, &ref, &found), SHML_E_POISONED);
    CHECK_EQ(put_record(&seg, 2), SHML_E_POISONED);
    CHECK(shml_wake_word(&reader) != seen);
    CHECK(!world()->is_held);
    new_segment();
    seg = segment(0);
    CHECK_EQ(put_record(&seg, 1), SHML_OK);
    shml_descs(seg.control)[0].offset = RING_BYTES;
    CHECK_EQ(shml_get_many(&seg, &(uint64_t){1}, 1, 0, NULL, &ref, &found), SHML_E_POISONED);
    new_segment();
    seg = segment(0);
    CHECK_EQ(put_record(&seg, 1), SHML_OK);
    shml_descs(seg.control)[0].num_bytes = 1;
    seg.control->dirty = 1;
    world()->owner_died = 1;
    CHECK_EQ(put_record(&seg, 2), SHML_E_POISONED);
    CHECK(!world()->is_held);
}

/* Random operations of four clients beside a model. */
static void a_model_agrees(void)
{
    uint64_t seed = 5;
    for (int round = 0; round < 20; round++) {
        enum { NONE, RESERVED, READY, ASIDE } model[NUM_RECORDS] = {NONE};
        int owner[NUM_RECORDS] = {0}, deaths[NUM_RECORDS] = {0};
        shml_ticket_t tickets[NUM_RECORDS];
        new_segment();
        for (int step = 0; step < 400; step++) {
            uint64_t id = test_random(&seed) % NUM_RECORDS;
            int client = (int)(test_random(&seed) % 4);
            shml_seg_t seg = segment(client);
            test_note("round %d, step %d", round, step);
            switch (test_random(&seed) % 8) {
            case 0:
            case 1:
            case 2: {
                shml_ticket_t ticket;
                int rc = shml_reserve(&seg, id, record_bytes(id), NULL, 0, &ticket);
                CHECK_EQ(rc, model[id] == NONE ? SHML_OK : SHML_E_EXISTS);
                if (rc == SHML_OK) {
                    write_record(&seg, &ticket, id);
                    model[id] = RESERVED, owner[id] = client, tickets[id] = ticket;
                }
                break;
            }
            case 3:
            case 4:
                if (model[id] == RESERVED) {
                    CHECK_EQ(shml_commit(&seg, &tickets[id], SHML_REF_READY),
                             owner[id] == client ? SHML_OK : SHML_E_STALE);
                    model[id] = owner[id] == client ? READY : RESERVED;
                    deaths[id] = owner[id] == client ? 0 : deaths[id];
                }
                break;
            case 5:
                if (model[id] == RESERVED) {
                    CHECK_EQ(shml_abort(&seg, &tickets[id]), owner[id] == client ? SHML_OK : SHML_E_STALE);
                    model[id] = owner[id] == client ? NONE : RESERVED;
                }
                break;
            case 6:
                if (test_random(&seed) % 4 == 0) { /* a client dies, in the mutex or not, and its place is taken */
                    shml_seg_t other = segment((client + 1) % 4), new = segment(-1);
                    world()->is_dead[client] = 1;
                    world()->owner_died = (int)(test_random(&seed) % 2);
                    seg.control->dirty = (uint32_t)world()->owner_died;
                    CHECK_EQ(shml_reap(&other, 1), 1);
                    for (uint64_t i = 0; i < NUM_RECORDS; i++)
                        if (model[i] == RESERVED && owner[i] == client)
                            model[i] = ++deaths[i] == SHML_MAX_ATTEMPTS ? ASIDE : NONE;
                    CHECK_EQ(shml_client_register(&new, SHML_WORKER, -1, 0), SHML_OK);
                    CHECK_EQ(new.self, client);
                }
                break;
            default:
                if (model[id] == READY)
                    check_record(&seg, id);
                else
                    CHECK_EQ(look(&seg, id).status, model[id] == ASIDE ? SHML_REF_ASIDE : SHML_REF_MISSING);
            }
            check_segment(&seg);
        }
    }
}

TEST_MAIN(TEST(only_a_whole_segment_of_this_kind_is_attached), TEST(impossible_configurations_are_refused),
          TEST(a_record_is_there_once_it_is_committed), TEST(a_ticket_is_good_for_its_client_and_generation_only),
          TEST(an_id_is_reserved_once), TEST(ids_that_collide_are_told_apart), TEST(many_ids_are_looked_up_at_once),
          TEST(a_hole_is_used_by_what_fits_it), TEST(a_full_ring_says_so), TEST(descriptors_run_out_and_come_back),
          TEST(a_ring_without_memory_asks_for_it), TEST(reads_are_counted_by_row), TEST(the_last_want_wakes_the_reader),
          TEST(what_is_wanted_and_not_worked_at_is_found), TEST(more_wants_than_there_is_room_for),
          TEST(chunks_are_wanted_by_waiting_rows), TEST(one_client_reads_a_unit),
          TEST(a_chunk_is_done_with_its_last_row), TEST(chunks_stay_until_resident_is_promised_away),
          TEST(only_its_claimant_ends_a_fetch), TEST(a_broken_chunk_wakes_who_waits_for_it),
          TEST(three_deaths_set_a_chunk_aside), TEST(who_has_left_is_told_so),
          TEST(damaged_lists_poison_and_do_not_hang), TEST(leaving_with_a_chunk_is_no_death),
          TEST(going_down_with_the_supervisor_is_no_death_of_its_own), TEST(the_dead_are_cleaned_up_after_once),
          TEST(reaping_is_rate_limited_among_all), TEST(a_full_table_of_clients_buries_its_dead),
          TEST(who_leaves_gives_back_what_it_had), TEST(the_first_text_wins), TEST(stats_add_up),
          TEST(damage_poisons_the_segment), TEST(a_model_agrees))
