/* Real processes and real SIGKILLs at random moments, over streams of unknown length: services that fetch and decode,
 * and readers that share iteration after iteration out among themselves. Every position is read once by its reader,
 * with the bytes that are its, and nobody waits for ever. */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <time.h>

#include "failpoint.h"
#include "layout.h"
#include "test.h"

#define ROWS           16u
#define PLACES         4u
#define NUM_RECORDS    400u
#define NUM_DESCS      (NUM_RECORDS + 2 * SHML_MAX_ORDERS * PLACES + 4096)
#define TRANSIT_BYTES  (UINT64_C(128) << 10) /* less than the rows that an order has places for */
#define RAW_BYTES      (UINT64_C(32) << 10)
#define RING_BYTES     (TRANSIT_BYTES + RAW_BYTES)
#define NUM_SERVICES   3
#define NUM_READERS    3
#define NUM_ITERATIONS 8
#define NUM_ROUNDS     6

typedef struct sums { /* shared by all processes */
    _Atomic uint64_t num_read, num_bad;
} sums_t;

static shml_seg_t seg;
static uint16_t pin_counts[NUM_DESCS];
static pthread_mutex_t pin_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t control_bytes;
static sums_t *sums;

static uint64_t record_bytes(uint64_t id) { return 64 * (1 + id % 40); }
/* How many rows an iteration has: none, few, or more than an order has places for. */
static uint64_t rows_of(uint64_t key) { return key % 4 == 0 ? key % 3 : 40 + key * 37 % 200; }

static void new_segment(void)
{
    shml_config_t config = {.transit_bytes = TRANSIT_BYTES,
                            .raw_bytes = RAW_BYTES,
                            .raw_budget_bytes = RAW_BYTES,
                            .num_records = NUM_RECORDS,
                            .num_chunks = SHML_MAX_ORDERS * PLACES,
                            .rows_per_chunk = ROWS};
    control_bytes = shml_control_bytes(&config);
    if (seg.control != NULL) {
        munmap(seg.control, control_bytes + RING_BYTES);
        close(seg.lock_fd);
    }
    void *memory = mmap(NULL, control_bytes + RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    CHECK_EQ(shml_control_format(memory, control_bytes, &config, NULL, NULL, NULL), SHML_OK);
    int lock_fd = memfd_create("shml_open_fire_test", MFD_CLOEXEC);
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

static void write_bytes(const shml_ticket_t *ticket, uint64_t id)
{
    for (uint64_t i = 0; i < ticket->num_bytes; i += 8) /* slowly: so that kills hit */
        *(volatile uint64_t *)(void *)(seg.ring + ticket->offset + i) = id * 1000003 + i;
}

static void check_bytes(const shml_ref_t *ref, uint64_t id)
{
    CHECK_EQ(ref->num_bytes, record_bytes(id));
    for (uint64_t i = 0; i < ref->num_bytes; i += 8)
        CHECK_EQ(*(const uint64_t *)(const void *)(seg.ring + ref->offset + i), id * 1000003 + i);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Services
 * ---------------------------------------------------------------------------------------------------- */

/* Encoded rows are as many bytes, and the bytes, of the chunk's first row. */
static void fetch(const shml_order_info_t *order, uint64_t number)
{
    uint32_t chunk;
    uint64_t first = shml_open_id(order->slot, order->gen, number * ROWS);
    shml_stamp_t stamp = {order->slot, order->gen, (number + 1) * ROWS};
    shml_ticket_t ticket;
    if (shml_chunk_claim_open(&seg, order->slot, order->gen, number, &chunk) != SHML_OK)
        return;
    if ((number + 1) * ROWS > order->seed) {
        int rc = shml_order_finish(&seg, order->slot, order->gen, order->seed);
        CHECK(rc == SHML_OK || rc == SHML_E_STALE);
    }
    int rc = number * ROWS < order->seed ? shml_reserve(&seg, SHML_RAW | chunk, record_bytes(first), &stamp, 0, &ticket)
                                         : SHML_E_FULL;
    CHECK(rc == SHML_OK || rc == SHML_E_FULL);
    if (rc == SHML_OK) {
        write_bytes(&ticket, first);
        CHECK_EQ(shml_commit(&seg, &ticket, SHML_REF_READY), SHML_OK);
    }
    CHECK_EQ(shml_chunk_end(&seg, chunk, rc == SHML_OK ? SHML_FETCH_OK : SHML_FETCH_GIVEN_UP), SHML_OK);
}

static int make_row(uint64_t id, const shml_stamp_t *stamp, int urgent)
{
    shml_ticket_t ticket;
    uint8_t got;
    int rc = shml_claim_rows(&seg, &id, 1, &got);
    CHECK(rc == SHML_OK || rc == SHML_E_FULL);
    if (!got)
        return 0;
    rc = shml_reserve(&seg, id, record_bytes(id), stamp, urgent, &ticket);
    CHECK(rc == SHML_OK || rc == SHML_E_FULL);
    if (rc != SHML_OK) {
        CHECK_EQ(shml_unclaim_rows(&seg, &id, 1), SHML_OK);
        return 0;
    }
    write_bytes(&ticket, id);
    CHECK_EQ(shml_commit(&seg, &ticket, SHML_REF_READY), SHML_OK);
    return 1;
}

/* From encoded rows that were pinned, and then were those of the row's chunk. 1: it was made. */
static int decode(const shml_order_info_t *order, uint64_t position, int urgent)
{
    uint64_t id = shml_open_id(order->slot, order->gen, position), first;
    shml_stamp_t stamp = {order->slot, order->gen, position + 1};
    uint32_t chunk;
    uint8_t row;
    shml_ref_t raw;
    shml_found_t found;
    int num_made = 0;
    CHECK_EQ(shml_look(&seg, &id, 1, &stamp, &row), SHML_OK);
    CHECK_EQ(shml_row_chunks(&seg, &id, 1, &chunk), SHML_OK);
    if (row > SHML_ROW_SUSPECT || chunk == UINT32_MAX)
        return 0;
    CHECK_EQ(shml_get_many(&seg, (uint64_t[]){SHML_RAW | chunk}, 1, 0, NULL, &raw, &found), SHML_OK);
    if (raw.status != SHML_REF_READY)
        return 0;
    CHECK_EQ(shml_chunk_first(&seg, chunk, &first), SHML_OK);
    if (first == id - position % ROWS) {
        check_bytes(&raw, first);
        num_made = make_row(id, &stamp, urgent);
        check_bytes(&raw, first);
    }
    CHECK_EQ(shml_unpin(&seg, &raw, 1), SHML_OK);
    return num_made;
}

static void service(void)
{
    for (;;) {
        shml_order_info_t orders[SHML_MAX_ORDERS];
        uint64_t wanted[64];
        uint32_t seen = shml_work_word(&seg);
        int num_made = 0, n = shml_orders(&seg, orders, SHML_MAX_ORDERS);
        CHECK(n >= 0 && shml_reap(&seg, 0) >= 0);
        int num_wanted = shml_wanted(&seg, wanted, 64);
        CHECK(num_wanted >= 0);
        for (int i = 0; i < n; i++) {
            for (uint64_t number = orders[i].low_water / ROWS; number < orders[i].low_water / ROWS + PLACES; number++)
                fetch(&orders[i], number);
            for (int k = 0; k < num_wanted; k++)
                if (wanted[k] >> SHML_POSITION_BITS ==
                    shml_open_id(orders[i].slot, orders[i].gen, 0) >> SHML_POSITION_BITS)
                    num_made += decode(&orders[i], wanted[k] & SHML_MAX_POSITION, 1);
            for (uint64_t k = 0; k < PLACES * ROWS; k++)
                num_made += decode(&orders[i], orders[i].low_water + k, 0);
        }
        if (num_made == 0)
            shml_work_wait(&seg, seen, 10);
    }
}

/* ---------------------------------------------------------------------------------------------------- *
 * Readers
 * ---------------------------------------------------------------------------------------------------- */

/* 1: it was read, or told to be bad. 0: the end. */
static int read_one(const shml_order_info_t *order, uint64_t position)
{
    uint64_t id = shml_open_id(order->slot, order->gen, position);
    shml_place_t place = {order->slot, order->gen, position, position + NUM_READERS};
    shml_ref_t ref;
    shml_found_t found;
    for (;;) {
        uint32_t seen = shml_wake_word(&seg);
        CHECK_EQ(shml_get_many(&seg, &id, 1, SHML_GET_POST, &place, &ref, &found), SHML_OK);
        if (found.num_missing == 0)
            break;
        shml_wait(&seg, seen, SHML_TICK_MS);
        CHECK(shml_reap(&seg, 0) >= 0);
    }
    if (ref.status == SHML_REF_END)
        return 0;
    if (ref.status == SHML_REF_READY) {
        check_bytes(&ref, id);
        CHECK_EQ(shml_unpin(&seg, &ref, 1), SHML_OK);
    } else {
        CHECK(ref.status == SHML_REF_BROKEN || ref.status == SHML_REF_ASIDE);
        sums->num_bad++;
    }
    sums->num_read++;
    return 1;
}

/* Each keeps its membership until it has joined the next iteration: else who is late would begin this one again. */
static void read_iterations(uint32_t reader, int32_t owner, uint32_t owner_gen)
{
    shml_order_info_t last = {0};
    for (uint64_t key = 1; key <= NUM_ITERATIONS; key++) {
        shml_join_t join = {key, reader, NUM_READERS, owner, owner_gen};
        shml_order_info_t order = {.seed = rows_of(key), .num_positions = SHML_MAX_POSITION, .world_size = 1};
        CHECK_EQ(shml_order_join(&seg, &join, &order), SHML_OK);
        CHECK_EQ(order.seed, rows_of(key));
        if (key > 1)
            CHECK_EQ(shml_order_leave(&seg, last.slot, last.gen), SHML_OK);
        uint64_t position = reader;
        while (read_one(&order, position))
            position += NUM_READERS;
        CHECK(position >= rows_of(key) && (position < NUM_READERS || position - NUM_READERS < rows_of(key)));
        last = order;
    }
    CHECK_EQ(shml_order_leave(&seg, last.slot, last.gen), SHML_OK);
    shml_client_unregister(&seg);
}

/* ---------------------------------------------------------------------------------------------------- *
 * The parent
 * ---------------------------------------------------------------------------------------------------- */

/* Kills from outside rarely hit the short critical sections: so a service now and then kills itself at a failpoint. */
static uint64_t suicide_seed;
static void kill_oneself(const char *name)
{
    (void)name;
    if (test_random(&suicide_seed) % 6000 == 0)
        kill(getpid(), SIGKILL);
}

static pid_t start(int reader, uint64_t seed)
{
    int32_t owner = seg.self;
    uint32_t owner_gen = shml_client_gen(&seg, owner);
    pid_t pid = test_child();
    CHECK(pid >= 0);
    if (pid == 0) {
        (void)shml_die_with_parent(getppid()); /* should a check fail there */
        seg.self = -1;                         /* the parent's */
        if (reader < 0) {
            suicide_seed = seed;
            shml_failpoint = kill_oneself;
            CHECK_EQ(shml_client_register(&seg, SHML_SERVICE, -1, 0), SHML_OK);
            service();
        }
        CHECK_EQ(shml_client_register(&seg, SHML_WORKER, owner, owner_gen), SHML_OK);
        read_iterations((uint32_t)reader, owner, owner_gen);
        _exit(0);
    }
    return pid;
}

static void end_service(pid_t pid)
{
    int status;
    CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        test_fail(__FILE__, __LINE__, "a service ended by itself: status %d", status);
}

static int has_ended(pid_t pid)
{
    siginfo_t info = {.si_pid = 0};
    CHECK_EQ(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT), 0);
    return info.si_pid != 0;
}

/* All iterations of one segment; services are killed until its readers are through. Returns how many kills. */
static uint64_t read_under_fire(uint64_t *seed)
{
    pid_t services[NUM_SERVICES], readers[NUM_READERS];
    uint64_t num_kills = 0;
    int num_reading = NUM_READERS;
    new_segment();
    CHECK_EQ(shml_client_register(&seg, SHML_OWNER, -1, 0), SHML_OK);
    for (int i = 0; i < NUM_SERVICES; i++)
        services[i] = start(-1, test_random(seed));
    for (int i = 0; i < NUM_READERS; i++)
        readers[i] = start(i, 0);
    while (num_reading > 0) {
        usleep((useconds_t)(test_random(seed) % 4000)); /* when to kill is random; nothing is waited for */
        int victim = (int)(test_random(seed) % NUM_SERVICES);
        for (int i = 0; i < NUM_SERVICES; i++) {
            if (i != victim && !has_ended(services[i]))
                continue;
            end_service(services[i]);
            num_kills++;
            services[i] = start(-1, test_random(seed));
        }
        for (int i = 0; i < NUM_READERS; i++) {
            int status;
            if (readers[i] == 0 || !has_ended(readers[i]))
                continue;
            CHECK_EQ(waitpid(readers[i], &status, 0), readers[i]);
            CHECK_EQ(status, 0);
            readers[i] = 0;
            num_reading--;
        }
        test_note("kill %llu, %llu rows read", (unsigned long long)num_kills, (unsigned long long)sums->num_read);
    }
    for (int i = 0; i < NUM_SERVICES; i++)
        end_service(services[i]);
    CHECK(shml_reap(&seg, 1) >= 0);
    return num_kills;
}

static void check_all(void)
{
    const char *what = "";
    shml_stats_t stats;
    int rc = shml_check(&seg, NULL, &what);
    if (rc != SHML_OK)
        test_fail(__FILE__, __LINE__, "shml_check: %d %s", rc, what);
    CHECK_EQ(shml_get_stats(&seg, &stats), SHML_OK);
    CHECK_EQ(stats.num_reserved + stats.num_claimed + stats.chunks_claimed, 0);
    CHECK_EQ(stats.num_services + stats.num_workers + stats.num_orders, 0);
    for (uint32_t i = 0; i < seg.control->num_descs * SHML_PIN_WORDS; i++)
        CHECK_EQ(shml_pins(seg.control, 0)[i], 0);
    shml_client_unregister(&seg);
}

static void streams_are_read_under_fire(void)
{
    uint64_t seed = 23, num_kills = 0, num_rows = 0, num_rebuilds = 0;
    sums = mmap(NULL, sizeof *sums, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(sums != MAP_FAILED);
    for (uint64_t key = 1; key <= NUM_ITERATIONS; key++)
        num_rows += rows_of(key);
    for (int round = 0; round < NUM_ROUNDS; round++) {
        num_kills += read_under_fire(&seed);
        num_rebuilds += seg.control->num_rebuilds;
        check_all();
        CHECK_EQ(sums->num_read, num_rows * (uint64_t)(round + 1));
    }
    printf("test_open_fire: %llu kills, %llu rebuilds, %llu rows read, %llu of them told as bad\n",
           (unsigned long long)num_kills, (unsigned long long)num_rebuilds, (unsigned long long)sums->num_read,
           (unsigned long long)sums->num_bad);
    CHECK(num_kills > 10);
}

TEST_MAIN(TEST(streams_are_read_under_fire))
