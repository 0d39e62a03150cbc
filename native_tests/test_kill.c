/* Real processes and real SIGKILLs at random moments: services that fetch chunks and decode rows into a segment that
 * holds part of them, readers that wait for what they need and read it while it is pinned, and a parent that kills
 * either. No record is torn, nobody waits for ever, nothing of the dead stays. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include "failpoint.h"
#include "layout.h"
#include "test.h"

#define NUM_RECORDS    600u
#define ROWS           20u
#define NUM_CHUNKS     (NUM_RECORDS / ROWS)
#define RESIDENT_BYTES (UINT64_C(256) << 10) /* a third of the rows */
#define TRANSIT_BYTES  (UINT64_C(128) << 10) /* a quarter of the others, and a few batches */
#define RAW_BYTES      (UINT64_C(32) << 10)
#define RING_BYTES     (RESIDENT_BYTES + TRANSIT_BYTES + RAW_BYTES)
#define RAW_RECORD     UINT64_C(4096)
#define BATCH          16u
#define NUM_SERVICES   3
#define NUM_READERS    2
#define MIN_ROUNDS     3
#define MIN_KILLS      30 /* of a round */
#define MIN_READS      4000
#define SECONDS        4

static shml_seg_t seg;
static uint16_t pin_counts[NUM_RECORDS + 2 * NUM_CHUNKS + 4096];
static pthread_mutex_t pin_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t control_bytes;
static shml_order_info_t order;

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t record_bytes(uint64_t id) { return id >= SHML_RAW ? RAW_RECORD : 64 * (1 + id % 40); }

static void new_segment(void)
{
    uint64_t first_rows[NUM_CHUNKS];
    uint32_t num_rows[NUM_CHUNKS], units[NUM_CHUNKS];
    shml_config_t config = {.resident_bytes = RESIDENT_BYTES,
                            .transit_bytes = TRANSIT_BYTES,
                            .raw_bytes = RAW_BYTES,
                            .num_records = NUM_RECORDS,
                            .num_chunks = NUM_CHUNKS};
    control_bytes = shml_control_bytes(&config);
    if (seg.control != NULL) {
        munmap(seg.control, control_bytes + RING_BYTES);
        close(seg.lock_fd);
    }
    for (uint32_t i = 0; i < NUM_CHUNKS; i++)
        first_rows[i] = i * ROWS, num_rows[i] = ROWS, units[i] = i;
    void *memory = mmap(NULL, control_bytes + RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    CHECK_EQ(shml_control_format(memory, control_bytes, &config, first_rows, num_rows, units), SHML_OK);
    int lock_fd = memfd_create("shml_kill_test", MFD_CLOEXEC);
    CHECK(lock_fd >= 0);
    memset(pin_counts, 0, sizeof pin_counts);
    seg = (shml_seg_t){.control = memory,
                       .ring = (uint8_t *)memory + control_bytes,
                       .ring_bytes = RING_BYTES,
                       .lock_fd = lock_fd,
                       .pin_counts = pin_counts,
                       .pin_lock = &pin_lock,
                       .env = &shml_env_linux};
    seg.self = -1;
    for (int i = 0; i < SHML_NUM_REGIONS; i++)
        seg.control->regions[i].backed_end = seg.control->regions[i].end;
}

/* Reap like any client in a slow path does. */
static void look_after(void) { CHECK(shml_reap(&seg, 0) >= 0); }

static void check_bytes(const shml_ref_t *ref, uint64_t id)
{
    CHECK_EQ(ref->num_bytes, record_bytes(id));
    CHECK(ref->offset <= RING_BYTES - ref->num_bytes);
    for (uint64_t i = 0; i < ref->num_bytes; i += 8)
        CHECK_EQ(*(const uint64_t *)(const void *)(seg.ring + ref->offset + i), id * 1000003 + i);
}

static void write_bytes(const shml_ticket_t *ticket, uint64_t id)
{
    for (uint64_t i = 0; i < ticket->num_bytes; i += 8) /* slowly: so that kills hit */
        *(volatile uint64_t *)(void *)(seg.ring + ticket->offset + i) = id * 1000003 + i;
}

/* ---------------------------------------------------------------------------------------------------- *
 * Services
 * ---------------------------------------------------------------------------------------------------- */

/* Pin the encoded chunk, fetching it if it is not there; 0: not now. */
static int pin_raw(uint32_t chunk, shml_ref_t *ref)
{
    uint64_t id = SHML_RAW | chunk;
    shml_found_t found;
    shml_ticket_t ticket;
    CHECK_EQ(shml_get_many(&seg, &id, 1, 0, NULL, ref, &found), SHML_OK);
    if (found.num_missing == 0)
        return 1;
    int rc = shml_chunk_claim(&seg, chunk);
    if (rc != SHML_OK) {
        CHECK(rc == SHML_E_STALE || rc == SHML_E_NOTFOUND || rc == SHML_E_EXISTS);
        return 0;
    }
    rc = shml_reserve(&seg, id, record_bytes(id), NULL, 1, &ticket);
    CHECK(rc == SHML_OK || rc == SHML_E_FULL);
    if (rc == SHML_OK) {
        write_bytes(&ticket, id);
        CHECK_EQ(shml_commit(&seg, &ticket, SHML_REF_READY), SHML_OK);
    }
    rc = shml_chunk_end(&seg, chunk, rc == SHML_OK ? SHML_FETCH_OK : SHML_FETCH_GIVEN_UP);
    CHECK(rc == SHML_OK || rc == SHML_E_STALE);
    CHECK_EQ(shml_get_many(&seg, &id, 1, 0, NULL, ref, &found), SHML_OK);
    return found.num_missing == 0;
}

/* Decode a row; 0: nothing was to be done, or not now. */
static int serve(uint64_t id, int urgent)
{
    shml_ref_t raw;
    shml_ticket_t ticket;
    shml_stamp_t stamp = {.order = order.slot, .gen = order.gen, .until = id % 7 == 0 ? 4000 : 0};
    uint8_t got;
    if (!pin_raw((uint32_t)(id / ROWS), &raw))
        return 0;
    CHECK_EQ(shml_claim_rows(&seg, &id, 1, &got), SHML_OK);
    if (got) {
        check_bytes(&raw, SHML_RAW | id / ROWS);
        int rc = shml_reserve(&seg, id, record_bytes(id), &stamp, urgent, &ticket);
        CHECK(rc == SHML_OK || rc == SHML_E_FULL);
        if (rc == SHML_OK) {
            write_bytes(&ticket, id);
            CHECK_EQ(shml_commit(&seg, &ticket, SHML_REF_READY), SHML_OK);
        } else {
            CHECK_EQ(shml_unclaim_rows(&seg, &id, 1), SHML_OK);
            got = 0;
        }
        check_bytes(&raw, SHML_RAW | id / ROWS);
    }
    CHECK_EQ(shml_unpin(&seg, &raw, 1), SHML_OK);
    return got;
}

/* Decode all of one chunk that STAYS: until it is done, its encoded rows are in the way of others. */
static int finish_a_chunk(uint64_t *seed)
{
    uint32_t chunks[NUM_CHUNKS], first = (uint32_t)(test_random(seed) % NUM_CHUNKS);
    uint8_t states[NUM_CHUNKS];
    int num_served = 0;
    for (uint32_t i = 0; i < NUM_CHUNKS; i++)
        chunks[i] = (first + i) % NUM_CHUNKS;
    CHECK_EQ(shml_chunk_look(&seg, chunks, NUM_CHUNKS, states), SHML_OK);
    for (uint32_t i = 0; i < NUM_CHUNKS; i++)
        if (states[i] == (SHML_CHUNK_TODO | SHML_CHUNK_STAYS | SHML_CHUNK_HAS_RAW)) {
            for (uint64_t id = chunks[i] * ROWS; id < (chunks[i] + 1) * ROWS; id++)
                num_served += serve(id, 0);
            break;
        }
    return num_served;
}

static void service(uint64_t seed)
{
    uint64_t ids[64];
    for (;;) {
        uint32_t seen = shml_work_word(&seg);
        look_after();
        int n = shml_wanted(&seg, ids, 64), num_served = 0;
        CHECK(n >= 0);
        for (int i = 0; i < n; i++) {
            uint64_t id = ids[test_random(&seed) % (uint64_t)n];
            num_served += serve(id, 1);
        }
        num_served += finish_a_chunk(&seed);
        if (test_random(&seed) % 4 == 0) /* ahead of the readers */
            num_served += serve(test_random(&seed) % NUM_RECORDS, 0);
        if (num_served == 0)
            shml_work_wait(&seg, seen, 10);
    }
}

/* ---------------------------------------------------------------------------------------------------- *
 * Readers
 * ---------------------------------------------------------------------------------------------------- */
static void read_pinned(const shml_ref_t *refs, const uint64_t *ids, uint32_t n)
{
    for (int twice = 0; twice < 2; twice++) {
        for (uint32_t i = 0; i < n; i++)
            if (refs[i].status == SHML_REF_READY)
                check_bytes(&refs[i], ids[i]);
        sched_yield();
    }
}

/* One batch by the protocol: pinned as a whole, or from the second look on what is there is taken out. */
static void read_batch(uint64_t *ids, uint32_t n, const shml_place_t *place)
{
    shml_ref_t refs[BATCH];
    shml_found_t found;
    CHECK_EQ(shml_get_many(&seg, ids, n, 0, place, refs, &found), SHML_OK);
    for (int flags = SHML_GET_POST; found.num_missing > 0; flags |= SHML_GET_TAKE) {
        uint32_t seen = shml_wake_word(&seg), left = 0;
        CHECK_EQ(shml_get_many(&seg, ids, n, flags, place, refs, &found), SHML_OK);
        if (found.num_missing == 0)
            break;
        if (flags & SHML_GET_TAKE) {
            read_pinned(refs, ids, n);
            CHECK_EQ(shml_unpin(&seg, refs, n), SHML_OK);
            for (uint32_t i = 0; i < n; i++)
                if (refs[i].status == SHML_REF_MISSING)
                    ids[left++] = ids[i];
            n = left;
        }
        shml_wait(&seg, seen, SHML_TICK_MS);
        look_after();
    }
    read_pinned(refs, ids, n);
    CHECK_EQ(shml_unpin(&seg, refs, n), SHML_OK);
}

static void reader(uint64_t seed)
{
    for (uint64_t at = 0;; at += BATCH) {
        uint64_t ids[BATCH];
        uint32_t reads[BATCH];
        shml_place_t place = {.order = order.slot, .gen = order.gen, .begin = at, .end = at + BATCH};
        for (uint32_t i = 0; i < BATCH; i++)
            ids[i] = test_random(&seed) % NUM_RECORDS;
        read_batch(ids, BATCH, &place);
        CHECK_EQ(shml_count_reads(&seg, ids, BATCH, reads), SHML_OK);
    }
}

/* Kills from outside rarely hit the short critical sections: so a client now and then kills itself at a failpoint. */
static uint64_t suicide_seed;
static void kill_oneself(const char *name)
{
    (void)name;
    if (test_random(&suicide_seed) % 4000 == 0)
        kill(getpid(), SIGKILL);
}

static pid_t start(int is_service, uint64_t seed)
{
    pid_t pid = test_child();
    CHECK(pid >= 0);
    if (pid == 0) {
        (void)shml_die_with_parent(getppid()); /* should a check fail there */
        seg.self = -1;                         /* the parent's */
        suicide_seed = seed;
        shml_failpoint = kill_oneself;
        CHECK_EQ(shml_client_register(&seg, is_service ? SHML_SERVICE : SHML_WORKER, -1, 0), SHML_OK);
        if (is_service)
            service(seed);
        reader(seed);
    }
    return pid;
}

static void end(pid_t pid)
{
    int status;
    CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        test_fail(__FILE__, __LINE__, "a child ended by itself: status %d", status);
}

typedef struct sums {
    uint64_t num_rounds, num_kills, num_reads, num_evicted, num_starved, num_rebuilds, num_aside, chunks_broken;
} sums_t;

/* One segment under fire. */
static void read_under_fire(uint64_t *seed, sums_t *sums)
{
    pid_t pids[NUM_SERVICES + NUM_READERS];
    uint64_t num_kills = 0;
    shml_stats_t stats;
    new_segment();
    CHECK_EQ(shml_client_register(&seg, SHML_OWNER, -1, 0), SHML_OK);
    order = (shml_order_info_t){.num_positions = 1 << 20};
    CHECK_EQ(shml_order_begin(&seg, &order), SHML_OK);
    for (int i = 0; i < NUM_SERVICES + NUM_READERS; i++)
        pids[i] = start(i < NUM_SERVICES, test_random(seed));
    for (;;) {
        CHECK_EQ(shml_get_stats(&seg, &stats), SHML_OK);
        if (num_kills >= MIN_KILLS && stats.num_reads >= MIN_READS)
            break;
        usleep((useconds_t)(test_random(seed) % 4000));
        int victim = (int)(test_random(seed) % (NUM_SERVICES + NUM_READERS));
        for (int i = 0; i < NUM_SERVICES + NUM_READERS; i++) {
            siginfo_t info = {.si_pid = 0};
            CHECK_EQ(waitid(P_PID, (id_t)pids[i], &info, WEXITED | WNOHANG | WNOWAIT), 0);
            if (i != victim && info.si_pid == 0)
                continue;
            end(pids[i]);
            num_kills++;
            pids[i] = start(i < NUM_SERVICES, test_random(seed));
        }
        test_note("kill %llu, %llu reads", (unsigned long long)num_kills, (unsigned long long)stats.num_reads);
    }
    for (int i = 0; i < NUM_SERVICES + NUM_READERS; i++)
        end(pids[i]);
    CHECK(shml_reap(&seg, 1) >= 0);
    sums->num_kills += num_kills;
}

static void check_all(sums_t *sums)
{
    const char *what = "";
    static uint8_t scratch[1 << 20];
    int rc = shml_check(&seg, scratch, &what);
    if (rc != SHML_OK)
        test_fail(__FILE__, __LINE__, "shml_check: %d %s", rc, what);
    for (uint64_t id = 0; id < NUM_RECORDS; id++) {
        shml_ref_t ref;
        shml_found_t found;
        CHECK_EQ(shml_get_many(&seg, &id, 1, 0, NULL, &ref, &found), SHML_OK);
        if (ref.status == SHML_REF_READY) {
            check_bytes(&ref, id);
            CHECK_EQ(shml_unpin(&seg, &ref, 1), SHML_OK);
        } else if (ref.status == SHML_REF_BROKEN) {
            CHECK_EQ(shml_word_deaths(shml_chunks(seg.control)[id / ROWS].word), SHML_MAX_ATTEMPTS);
        }
    }
    for (uint32_t i = 0; i < seg.control->num_descs * SHML_PIN_WORDS; i++)
        CHECK_EQ(shml_pins(seg.control, 0)[i], 0);
    shml_stats_t stats;
    CHECK_EQ(shml_get_stats(&seg, &stats), SHML_OK);
    CHECK_EQ(stats.num_reserved + stats.num_claimed + stats.chunks_claimed, 0);
    CHECK_EQ(stats.num_services + stats.num_workers, 0);
    sums->num_rounds++;
    sums->num_reads += stats.num_reads;
    sums->num_evicted += stats.num_evicted;
    sums->num_starved += stats.num_starved;
    sums->num_rebuilds += stats.num_rebuilds;
    sums->num_aside += stats.num_aside;
    sums->chunks_broken += stats.chunks_broken;
    shml_client_unregister(&seg);
}

static void records_are_read_under_fire(void)
{
    uint64_t seed = 17;
    sums_t sums = {0};
    for (double until = now_s() + SECONDS; sums.num_rounds < MIN_ROUNDS || now_s() < until;) {
        read_under_fire(&seed, &sums);
        check_all(&sums);
    }
    printf("kill: %llu rounds, %llu kills, %llu rebuilds, %llu reads, %llu evicted, %llu starved, %llu rows and %llu "
           "chunks set aside\n",
           (unsigned long long)sums.num_rounds, (unsigned long long)sums.num_kills,
           (unsigned long long)sums.num_rebuilds, (unsigned long long)sums.num_reads,
           (unsigned long long)sums.num_evicted, (unsigned long long)sums.num_starved,
           (unsigned long long)sums.num_aside, (unsigned long long)sums.chunks_broken);
    CHECK(sums.num_kills > 10 && sums.num_rebuilds > 0 && sums.num_evicted > 0);
}

/* What the design stands on: a killed holder of the mutex leaves EOWNERDEAD, and its byte is free then. */
static void a_killed_holder_is_noticed(void)
{
    int pipe_fds[2];
    char byte;
    new_segment();
    CHECK(pipe(pipe_fds) == 0);
    pid_t pid = test_child();
    if (pid == 0) {
        CHECK_EQ(shml_client_register(&seg, SHML_SERVICE, -1, 0), SHML_OK);
        CHECK_EQ(shml_lock(&seg), SHML_OK);
        seg.control->dirty = 1;
        CHECK_EQ(write(pipe_fds[1], "x", 1), 1);
        pause();
    }
    CHECK_EQ(read(pipe_fds[0], &byte, 1), 1);
    CHECK_EQ(shml_mutex_holder(seg.control), pid);
    CHECK_EQ(shml_byte_holder(seg.lock_fd, 0), pid);
    CHECK(seg.env->alive(seg.env->ctx, seg.lock_fd, 0, shml_clients(seg.control)));
    CHECK_EQ(seg.env->lock(seg.env->ctx, &seg.control->mutex, 50), ETIMEDOUT);
    CHECK_EQ(kill(pid, SIGSTOP), 0); /* frozen is not dead */
    CHECK(seg.env->alive(seg.env->ctx, seg.lock_fd, 0, shml_clients(seg.control)));
    CHECK_EQ(kill(pid, SIGKILL), 0);
    shml_stats_t stats;
    CHECK_EQ(shml_get_stats(&seg, &stats), SHML_OK); /* waits for the kernel to hand the mutex on */
    CHECK_EQ(stats.num_rebuilds, 1);
    CHECK_EQ(waitpid(pid, NULL, 0), pid); /* only now: a zombie is dead enough */
    CHECK_EQ(shml_byte_holder(seg.lock_fd, 0), 0);
    CHECK_EQ(shml_reap(&seg, 1), 1);
    close(pipe_fds[0]), close(pipe_fds[1]);
}

TEST_MAIN(TEST(a_killed_holder_is_noticed), TEST(records_are_read_under_fire))
