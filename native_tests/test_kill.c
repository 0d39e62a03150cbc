/* Real processes and real SIGKILLs at random moments: prefetchers that fill a segment, readers that wait for it, and a
 * parent that kills either. No record is lost, torn or made twice, nobody waits for ever. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <time.h>

#include "failpoint.h"
#include "layout.h"
#include "test.h"

#define NUM_RECORDS  600u
#define ROWS         20u
#define NUM_CHUNKS   (NUM_RECORDS / ROWS)
#define RING_BYTES   (UINT64_C(4) << 20)
#define NUM_SERVICES 3
#define NUM_READERS  2
#define MIN_ROUNDS   3
#define SECONDS      4

static shml_seg_t seg;

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t record_bytes(uint64_t id) { return 64 * (1 + id % 40); }

static void new_segment(void)
{
    uint64_t first_rows[NUM_CHUNKS];
    uint32_t num_rows[NUM_CHUNKS];
    shml_config_t config = {
        .ring_bytes = RING_BYTES, .resident_bytes = RING_BYTES, .num_records = NUM_RECORDS, .num_chunks = NUM_CHUNKS};
    uint64_t bytes = shml_control_bytes(&config);
    if (seg.control != NULL) {
        munmap(seg.control, bytes + RING_BYTES);
        close(seg.lock_fd);
    }
    for (uint32_t i = 0; i < NUM_CHUNKS; i++)
        first_rows[i] = i * ROWS, num_rows[i] = ROWS;
    void *memory = mmap(NULL, bytes + RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    CHECK_EQ(shml_control_format(memory, bytes, &config, first_rows, num_rows), SHML_OK);
    int lock_fd = memfd_create("shml_kill_test", MFD_CLOEXEC);
    CHECK(lock_fd >= 0);
    seg = (shml_seg_t){memory, (uint8_t *)memory + bytes, RING_BYTES, lock_fd, -1, &shml_env_linux};
    seg.control->backed_end = RING_BYTES;
}

/* Reap like any client in a slow path does, and tell of the segment's end. */
static int look_after(void)
{
    int rc = shml_reap(&seg, 0);
    CHECK(rc >= 0);
    return rc;
}

static void put(uint64_t id)
{
    shml_ticket_t ticket;
    int rc = shml_reserve(&seg, id, record_bytes(id), &ticket);
    if (rc == SHML_E_EXISTS)
        return; /* ready, or reserved by one of whom we do not know yet that it is dead */
    CHECK_EQ(rc, SHML_OK);
    for (uint64_t i = 0; i < ticket.num_bytes; i += 8) /* slowly: so that kills hit */
        *(volatile uint64_t *)(void *)(seg.ring + ticket.offset + i) = id * 1000003 + i;
    CHECK_EQ(shml_commit(&seg, &ticket, SHML_REF_READY), SHML_OK);
}

static void service(void)
{
    uint8_t have[(ROWS + 7) / 8];
    for (;;) {
        uint32_t chunk, seen = shml_work_word(&seg);
        look_after();
        int rc = shml_chunk_claim(&seg, &chunk);
        if (rc == SHML_E_NOTFOUND) {
            shml_work_wait(&seg, seen, SHML_TICK_MS);
            continue;
        }
        CHECK_EQ(rc, SHML_OK);
        for (int left = ROWS; left > 0;) {
            left = 0;
            CHECK_EQ(shml_have(&seg, (uint64_t)chunk * ROWS, ROWS, have), SHML_OK);
            for (uint32_t row = 0; row < ROWS; row++)
                if (!(have[row / 8] >> (row % 8) & 1)) {
                    put((uint64_t)chunk * ROWS + row);
                    left++;
                }
            if (left > 0)
                CHECK(shml_reap(&seg, 1) >= 0);
        }
        CHECK_EQ(shml_chunk_done(&seg, chunk), SHML_OK);
    }
}

static void check_record(const shml_ref_t *ref, uint64_t id)
{
    CHECK_EQ(ref->num_bytes, record_bytes(id));
    CHECK(ref->offset <= RING_BYTES - ref->num_bytes);
    for (uint64_t i = 0; i < ref->num_bytes; i += 8)
        CHECK_EQ(*(const uint64_t *)(const void *)(seg.ring + ref->offset + i), id * 1000003 + i);
}

static void reader(uint64_t seed)
{
    for (;;) {
        uint64_t ids[16];
        shml_ref_t refs[16];
        uint32_t missing;
        for (int i = 0; i < 16; i++)
            ids[i] = test_random(&seed) % NUM_RECORDS;
        do {
            uint32_t seen = shml_wake_word(&seg);
            CHECK_EQ(shml_get_many(&seg, ids, 16, 1, refs, &missing), SHML_OK);
            if (missing > 0) {
                shml_wait(&seg, seen, SHML_TICK_MS);
                look_after();
            }
        } while (missing > 0);
        for (int i = 0; i < 16; i++)
            if (refs[i].status == SHML_REF_READY)
                check_record(&refs[i], ids[i]);
    }
}

/* Kills from outside rarely hit the short critical sections: so a client now and then kills itself at a failpoint. */
static uint64_t suicide_seed;
static void kill_oneself(const char *name)
{
    (void)name;
    if (test_random(&suicide_seed) % 2000 == 0)
        kill(getpid(), SIGKILL);
}

static pid_t start(int is_service, uint64_t seed)
{
    pid_t pid = test_child();
    CHECK(pid >= 0);
    if (pid == 0) {
        suicide_seed = seed;
        shml_failpoint = kill_oneself;
        CHECK_EQ(shml_client_register(&seg, is_service ? SHML_SERVICE : SHML_WORKER, -1, 0), SHML_OK);
        if (is_service)
            service();
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

/* One segment, filled under fire. Returns the kills. */
static int fill_under_fire(uint64_t *seed)
{
    pid_t pids[NUM_SERVICES + NUM_READERS];
    int num_kills = 0;
    new_segment();
    for (int i = 0; i < NUM_SERVICES + NUM_READERS; i++)
        pids[i] = start(i < NUM_SERVICES, test_random(seed));
    CHECK_EQ(shml_client_register(&seg, SHML_OWNER, -1, 0), SHML_OK);
    for (;;) {
        shml_stats_t stats;
        CHECK_EQ(shml_get_stats(&seg, &stats), SHML_OK);
        if (stats.chunks_done + stats.chunks_broken == NUM_CHUNKS)
            break;
        usleep((useconds_t)(test_random(seed) % 2000));
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
        test_note("kill %d, %u chunks done", num_kills, stats.chunks_done);
    }
    for (int i = 0; i < NUM_SERVICES + NUM_READERS; i++)
        end(pids[i]);
    CHECK(shml_reap(&seg, 1) >= 0);
    return num_kills;
}

static void check_all(uint64_t *num_rebuilds, uint64_t *num_broken)
{
    const char *what = "";
    static uint8_t scratch[1 << 20];
    int rc = shml_check(&seg, scratch, &what);
    if (rc != SHML_OK)
        test_fail(__FILE__, __LINE__, "shml_check: %d %s", rc, what);
    for (uint64_t id = 0; id < NUM_RECORDS; id++) {
        shml_ref_t ref;
        uint32_t missing;
        CHECK_EQ(shml_get_many(&seg, &id, 1, 0, &ref, &missing), SHML_OK);
        uint32_t word = shml_chunks(seg.control)[id / ROWS].word;
        if ((word & 0xff) == SHML_CHUNK_DONE)
            CHECK_EQ(ref.status, SHML_REF_READY);
        else
            CHECK_EQ(word >> 8 & 0xff, SHML_MAX_ATTEMPTS); /* only three deaths set one aside */
        if (ref.status == SHML_REF_READY)
            check_record(&ref, id);
    }
    shml_stats_t stats;
    CHECK_EQ(shml_get_stats(&seg, &stats), SHML_OK);
    CHECK_EQ(stats.num_reserved, 0);
    CHECK_EQ(stats.num_services + stats.num_workers, 0);
    *num_rebuilds += stats.num_rebuilds;
    *num_broken += stats.chunks_broken;
    shml_client_unregister(&seg);
}

static void a_segment_is_filled_under_fire(void)
{
    uint64_t seed = 17, num_rebuilds = 0, num_broken = 0;
    int num_rounds = 0, num_kills = 0;
    for (double until = now_s() + SECONDS; num_rounds < MIN_ROUNDS || now_s() < until; num_rounds++) {
        num_kills += fill_under_fire(&seed);
        check_all(&num_rebuilds, &num_broken);
    }
    CHECK(num_kills > 10 && num_rebuilds > 0);
    printf("kill: %d rounds, %d kills, %llu rebuilds, %llu chunks set aside\n", num_rounds, num_kills,
           (unsigned long long)num_rebuilds, (unsigned long long)num_broken);
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

TEST_MAIN(TEST(a_killed_holder_is_noticed), TEST(a_segment_is_filled_under_fire))
