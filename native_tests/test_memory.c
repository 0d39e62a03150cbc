/* How much memory there is, under every kind of cgroup (folders stand in for /proc and /sys), and taking it. */
#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>

#include "failpoint.h"
#include "layout.h"
#include "test.h"

#define MIB (UINT64_C(1) << 20)
#define GIB (UINT64_C(1) << 30)

static char root[64];

static void put(const char *path, const char *text)
{
    char full[512];
    snprintf(full, sizeof full, "%s%s", root, path);
    for (char *at = full + strlen(root) + 1; (at = strchr(at, '/')) != NULL; *at++ = '/') {
        *at = '\0';
        mkdir(full, 0700);
    }
    FILE *file = fopen(full, "w");
    CHECK(file != NULL);
    fputs(text, file);
    fclose(file);
}

static void put_bytes(const char *path, uint64_t bytes)
{
    char text[32];
    snprintf(text, sizeof text, "%llu\n", (unsigned long long)bytes);
    put(path, text);
}

/* A machine with 16 GiB, of which 8 are available. */
static void new_root(const char *cgroup)
{
    strcpy(root, "/tmp/shml_test_XXXXXX");
    CHECK(mkdtemp(root) != NULL);
    put("/proc/meminfo", "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n");
    put("/proc/self/cgroup", cgroup);
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *at)
{
    (void)info, (void)kind, (void)at;
    return remove(path);
}
static void remove_root(void) { nftw(root, remove_one, 8, FTW_DEPTH | FTW_PHYS); }

static shml_memory_t read_memory(void)
{
    shml_memory_t memory;
    CHECK_EQ(shml_memory_read(root, &memory), SHML_OK);
    return memory;
}

static void check_memory(uint64_t total, uint64_t available, const char *limited_by)
{
    shml_memory_t memory = read_memory();
    CHECK_EQ(memory.total_bytes, total);
    CHECK_EQ(memory.available_bytes, available);
    CHECK_TEXT(memory.limited_by, limited_by);
}

static void without_cgroups_the_machine_is_the_limit(void)
{
    new_root("");
    check_memory(16 * GIB, 8 * GIB, "MemAvailable");
    remove_root();
}

static void without_proc_there_is_still_an_answer(void)
{
    strcpy(root, "/nonexistent");
    shml_memory_t memory = read_memory();
    CHECK(memory.total_bytes > 0 && memory.available_bytes > 0 && memory.available_bytes <= memory.total_bytes);
}

static void the_real_machine_gives_sane_numbers(void)
{
    root[0] = '\0';
    shml_memory_t memory = read_memory();
    CHECK(memory.total_bytes >= 64 * MIB && memory.total_bytes < UINT64_C(1) << 50);
    CHECK(memory.available_bytes > 0 && memory.limited_by[0] != '\0');
}

static void v2_limit_of_the_own_cgroup(void)
{
    new_root("0::/user/job\n");
    put_bytes("/sys/fs/cgroup/user/job/memory.max", 4 * GIB);
    put_bytes("/sys/fs/cgroup/user/job/memory.current", 3 * GIB);
    put("/sys/fs/cgroup/user/job/memory.stat", "anon 5\nfile 1\nactive_file 1073741824\ninactive_file 1073741824\n");
    check_memory(4 * GIB, 2 * GIB, "/sys/fs/cgroup/user/job");
    remove_root();
}

static void v2_limit_of_an_ancestor(void)
{
    new_root("0::/a/b/c\n");
    put("/sys/fs/cgroup/a/b/c/memory.max", "max\n");
    put_bytes("/sys/fs/cgroup/a/b/c/memory.current", 1 * GIB);
    put_bytes("/sys/fs/cgroup/a/memory.max", 2 * GIB);
    put_bytes("/sys/fs/cgroup/a/memory.current", 1536 * MIB);
    put_bytes("/sys/fs/cgroup/memory.max", 3 * GIB); /* more than its child has left */
    put_bytes("/sys/fs/cgroup/memory.current", 1 * GIB);
    check_memory(2 * GIB, 512 * MIB, "/sys/fs/cgroup/a");
    remove_root();
}

static void v2_high_counts_as_a_limit(void)
{
    new_root("0::/a\n");
    put("/sys/fs/cgroup/a/memory.max", "max\n");
    put_bytes("/sys/fs/cgroup/a/memory.high", 1 * GIB);
    put_bytes("/sys/fs/cgroup/a/memory.current", 256 * MIB);
    check_memory(1 * GIB, 768 * MIB, "/sys/fs/cgroup/a");
    remove_root();
}

static void over_the_limit_nothing_is_available(void)
{
    new_root("0::/a\n");
    put_bytes("/sys/fs/cgroup/a/memory.max", 1 * GIB);
    put_bytes("/sys/fs/cgroup/a/memory.current", 2 * GIB);
    put("/sys/fs/cgroup/a/memory.stat", "inactive_file 4096\n");
    check_memory(1 * GIB, 0, "/sys/fs/cgroup/a");
    put("/sys/fs/cgroup/a/memory.stat", "inactive_file 99999999999999\n"); /* more than is used: does not wrap */
    check_memory(1 * GIB, 1 * GIB, "/sys/fs/cgroup/a");
    remove_root();
}

static void v1_limit_and_that_of_hidden_ancestors(void)
{
    new_root("7:cpu,cpuacct:/job\n4:memory:/job\n1:name=memoryish:/x\n");
    put_bytes("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", 6 * GIB);
    put_bytes("/sys/fs/cgroup/memory/job/memory.usage_in_bytes", 2 * GIB);
    put("/sys/fs/cgroup/memory/job/memory.stat", "inactive_file 1\ntotal_inactive_file 1073741824\n");
    put_bytes("/sys/fs/cgroup/memory/memory.limit_in_bytes", UINT64_C(9223372036854771712)); /* none */
    put_bytes("/sys/fs/cgroup/memory/memory.usage_in_bytes", 20 * GIB);
    check_memory(6 * GIB, 5 * GIB, "/sys/fs/cgroup/memory/job");
    put("/sys/fs/cgroup/memory/job/memory.stat", "hierarchical_memory_limit 3221225472\ntotal_inactive_file 0\n");
    check_memory(3 * GIB, 1 * GIB, "/sys/fs/cgroup/memory/job");
    remove_root();
}

static void hybrid_reads_both_versions(void)
{
    new_root("4:memory:/v1\n0::/v2\n");
    put_bytes("/sys/fs/cgroup/memory/v1/memory.limit_in_bytes", 3 * GIB);
    put_bytes("/sys/fs/cgroup/memory/v1/memory.usage_in_bytes", 1 * GIB);
    put_bytes("/sys/fs/cgroup/unified/v2/memory.max", 2 * GIB);
    put_bytes("/sys/fs/cgroup/unified/v2/memory.current", 1 * GIB);
    check_memory(2 * GIB, 1 * GIB, "/sys/fs/cgroup/unified/v2");
    remove_root();
}

static void in_a_container_the_mount_is_the_own_cgroup(void)
{
    const char *paths[] = {"4:memory:/docker/0123abcd\n", "4:memory:/../other\n"};
    for (int i = 0; i < 2; i++) {
        new_root(paths[i]);
        put_bytes("/sys/fs/cgroup/memory/memory.limit_in_bytes", 1 * GIB);
        put_bytes("/sys/fs/cgroup/memory/memory.usage_in_bytes", 256 * MIB);
        /* Of a container in this container, not an ancestor of ours. */
        put_bytes("/sys/fs/cgroup/memory/docker/memory.limit_in_bytes", 1 * MIB);
        put_bytes("/sys/fs/cgroup/memory/docker/memory.usage_in_bytes", 1 * MIB);
        check_memory(1 * GIB, 768 * MIB, "/sys/fs/cgroup/memory");
        remove_root();
    }
}

static void damaged_files_limit_nothing(void)
{
    const char *damaged[] = {"", "\n", "max", "-1\n", "x", "99999999999999999999999999\n"};
    for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++) {
        test_note("\"%s\"", damaged[i]);
        new_root("nonsense\n0\n:::\n0::/a\n4:memory\n");
        put("/sys/fs/cgroup/a/memory.max", damaged[i]);
        put("/sys/fs/cgroup/a/memory.current", damaged[i]);
        put("/sys/fs/cgroup/a/memory.stat", damaged[i]);
        check_memory(16 * GIB, 8 * GIB, "MemAvailable");
        remove_root();
    }
}

static void a_long_path_keeps_its_end(void)
{
    char line[400] = "0::", path[500] = "/sys/fs/cgroup", file[600];
    for (int i = 0; i < 20; i++)
        strcat(line, "/a-long-component"), strcat(path, "/a-long-component");
    strcat(line, "\n");
    new_root(line);
    snprintf(file, sizeof file, "%s/memory.max", path);
    put_bytes(file, 1 * GIB);
    snprintf(file, sizeof file, "%s/memory.current", path);
    put_bytes(file, 0);
    shml_memory_t memory = read_memory();
    CHECK_EQ(strlen(memory.limited_by), sizeof memory.limited_by - 1);
    CHECK(strncmp(memory.limited_by, ".../", 3) == 0);
    CHECK_TEXT(memory.limited_by + strlen(memory.limited_by) - 17, "/a-long-component");
    remove_root();
}

static int new_memfd(uint64_t bytes)
{
    int fd = memfd_create("shml_test", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    return fd;
}

static uint64_t backed(int fd)
{
    struct stat info;
    CHECK(fstat(fd, &info) == 0);
    return (uint64_t)info.st_blocks * 512;
}

static void back_takes_what_is_asked_for(void)
{
    shml_memory_t memory;
    int fd = new_memfd(64 * MIB);
    new_root("");
    CHECK_EQ(shml_back(fd, 4096, 5 * MIB + 4096, NULL, 0, root, &memory), SHML_OK);
    CHECK_EQ(backed(fd), 5 * MIB);
    CHECK_EQ(shml_back(fd, 4096, 5 * MIB + 4096, NULL, 0, root, &memory), SHML_OK); /* again: the same */
    CHECK_EQ(backed(fd), 5 * MIB);
    CHECK_EQ(shml_back(fd, 4096, 4096, NULL, 0, root, &memory), SHML_OK);
    CHECK_EQ(shml_back(fd, 4096, 0, NULL, 0, root, &memory), SHML_E_INVAL);
    CHECK_EQ(shml_back(fd, 0, UINT64_MAX, NULL, 0, root, &memory), SHML_E_INVAL);
    close(fd);
    CHECK_EQ(shml_back(fd, 0, 4096, NULL, 0, root, &memory), SHML_E_SYS);
    CHECK_EQ(errno, EBADF);
    remove_root();
}

static void back_leaves_the_spare(void)
{
    shml_memory_t memory;
    int fd = new_memfd(16 * GIB);
    new_root("0::/a\n");
    put_bytes("/sys/fs/cgroup/a/memory.max", 64 * MIB);
    put_bytes("/sys/fs/cgroup/a/memory.current", 32 * MIB);
    CHECK_EQ(shml_back(fd, 0, 16 * MIB + 1, NULL, 16 * MIB, root, &memory), SHML_E_MEMORY);
    CHECK_EQ(shml_back(fd, 0, 4096, NULL, UINT64_MAX, root, &memory), SHML_E_MEMORY);
    CHECK_TEXT(memory.limited_by, "/sys/fs/cgroup/a");
    CHECK_EQ(backed(fd), 0);
    CHECK_EQ(shml_back(fd, 0, 16 * MIB, NULL, 16 * MIB, root, &memory), SHML_OK);
    close(fd);
    remove_root();
}

static volatile sig_atomic_t num_signals;
static void count_signal(int number)
{
    (void)number;
    num_signals++;
}

static void back_gets_done_under_a_storm_of_signals(void)
{
    shml_memory_t memory;
    struct sigaction action = {.sa_handler = count_signal};
    struct itimerval often = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    int fd = new_memfd(128 * MIB);
    new_root("");
    sigaction(SIGVTALRM, &action, NULL);
    setitimer(ITIMER_VIRTUAL, &often, NULL);
    struct sigaction real = {.sa_handler = count_signal};
    sigaction(SIGPROF, &real, NULL);
    setitimer(ITIMER_PROF, &often, NULL); /* counts system time: hits inside of fallocate */
    CHECK_EQ(shml_back(fd, 0, 128 * MIB, NULL, 0, root, &memory), SHML_OK);
    setitimer(ITIMER_VIRTUAL, &never, NULL);
    setitimer(ITIMER_PROF, &never, NULL);
    CHECK_EQ(backed(fd), 128 * MIB);
    close(fd);
    remove_root();
}

static void backing_a_mapping_keeps_what_is_there_and_zeroes_the_rest(void)
{
    shml_memory_t memory;
    int fd = new_memfd(16 * MIB);
    new_root("");
    uint8_t *at = shml_map(fd, 16 * MIB, 1, "test");
    CHECK(at != NULL && (uintptr_t)at % SHML_HUGE_BYTES == 0);
    CHECK_EQ(shml_back(fd, 0, 6 * MIB, at, 0, root, &memory), SHML_OK);
    for (uint64_t i = 0; i < 6 * MIB; i += 4096)
        at[i] = (uint8_t)(1 + (i >> 12) % 255);
    /* From the middle of a huge page to the middle of another, over what is backed already. */
    CHECK_EQ(shml_back(fd, 5 * MIB, 13 * MIB + 4096, at + 5 * MIB, 0, root, &memory), SHML_OK);
    for (uint64_t i = 0; i < 13 * MIB; i += 4096)
        CHECK_EQ(at[i], i < 6 * MIB ? (uint8_t)(1 + (i >> 12) % 255) : 0);
    struct stat status;
    CHECK_EQ(fstat(fd, &status), 0);
    CHECK((uint64_t)status.st_blocks * 512 >= 13 * MIB + 4096);
    shml_unmap(at, 16 * MIB);
    close(fd);
    remove_root();
}

/* ---------------------------------------------------------------------------------------------------- *
 * The ring's extents
 * ---------------------------------------------------------------------------------------------------- */
static shml_seg_t seg;
static int ring_fd;

static void new_segment_of(uint64_t resident_bytes, uint64_t raw_bytes)
{
    shml_config_t config = {.resident_bytes = resident_bytes, .raw_bytes = raw_bytes, .num_records = 16};
    uint64_t bytes = shml_control_bytes(&config), ring_bytes = resident_bytes + raw_bytes;
    void *control = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(control != MAP_FAILED);
    CHECK_EQ(shml_control_format(control, bytes, &config, NULL, NULL, NULL), SHML_OK);
    ring_fd = new_memfd(ring_bytes);
    seg = (shml_seg_t){.control = control, .ring_bytes = ring_bytes, .lock_fd = ring_fd, .env = &shml_env_linux};
    seg.self = -1;
    seg.ring = shml_map(ring_fd, ring_bytes, 1, "ring");
    CHECK(seg.ring != NULL);
}
static void new_segment(uint64_t ring_bytes) { new_segment_of(ring_bytes, 0); }

static void free_segment(void)
{
    shml_unmap(seg.ring, seg.ring_bytes);
    munmap(seg.control, seg.control->control_bytes);
    close(ring_fd);
}

static void the_ring_grows_by_extents(void)
{
    shml_memory_t memory;
    new_root("");
    new_segment(100 * MIB);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 1, root, &memory), SHML_OK);
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].backed_end, 64 * MIB);
    CHECK_EQ(backed(ring_fd), 64 * MIB);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 64 * MIB, root, &memory), SHML_OK);
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].backed_end, 64 * MIB);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 64 * MIB + 1, root, &memory), SHML_OK);
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].backed_end, 100 * MIB); /* the ring's end, not the extent's */
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 100 * MIB + 1, root, &memory), SHML_E_INVAL);
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].frozen, 0);
    free_segment();
    remove_root();
}

static void little_memory_backs_what_is_needed_then_freezes(void)
{
    shml_memory_t memory;
    new_root("0::/a\n");
    put_bytes("/sys/fs/cgroup/a/memory.max", 200 * MIB); /* the spare is 10 MiB */
    put_bytes("/sys/fs/cgroup/a/memory.current", 170 * MIB);
    new_segment(256 * MIB);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 3 * MIB, root, &memory), SHML_OK);
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].backed_end, 4 * MIB);
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].frozen, 0);
    put_bytes("/sys/fs/cgroup/a/memory.current", 189 * MIB);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 5 * MIB, root, &memory), SHML_E_MEMORY);
    CHECK_TEXT(memory.limited_by, "/sys/fs/cgroup/a");
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].backed_end, 4 * MIB);
    CHECK_EQ(backed(ring_fd), 4 * MIB);
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].frozen, 1);
    put_bytes("/sys/fs/cgroup/a/memory.current", 0); /* frozen is final */
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 5 * MIB, root, &memory), SHML_E_MEMORY);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 4 * MIB, root, &memory),
             SHML_OK); /* but what is there, is there */
    free_segment();
    remove_root();
}

static const char *at_point;
/* Is this where something is to happen? Once. */
static int at_point_is(const char *name)
{
    if (at_point == NULL || strcmp(name, at_point) != 0)
        return 0;
    at_point = NULL;
    return 1;
}

/* Each region grows, and is frozen, for itself; raw gives its memory back. */
static void regions_grow_apart(void)
{
    shml_memory_t memory;
    new_root("0::/a\n");
    put_bytes("/sys/fs/cgroup/a/memory.max", 200 * MIB);
    put_bytes("/sys/fs/cgroup/a/memory.current", 0);
    new_segment_of(96 * MIB, 80 * MIB);
    shml_region_t *regions = seg.control->regions;
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 96 * MIB + 1, root, &memory), SHML_E_INVAL);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_NUM_REGIONS, 1, root, &memory), SHML_E_INVAL);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RAW_REGION, 96 * MIB + 1, root, &memory), SHML_OK);
    CHECK_EQ(regions[SHML_RAW_REGION].backed_end, 128 * MIB); /* extents lie where the ring's bytes do */
    CHECK_EQ(regions[SHML_RESIDENT].backed_end, 0);
    CHECK_EQ(backed(ring_fd), 32 * MIB);
    put_bytes("/sys/fs/cgroup/a/memory.current", 200 * MIB);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RAW_REGION, 128 * MIB + 1, root, &memory), SHML_E_MEMORY);
    CHECK(regions[SHML_RAW_REGION].frozen && !regions[SHML_RESIDENT].frozen);
    CHECK_EQ(shml_raw_release(&seg, ring_fd), 1); /* no chunk is left to do */
    CHECK_EQ(regions[SHML_RAW_REGION].backed_end, 96 * MIB);
    CHECK_EQ(backed(ring_fd), 0);
    CHECK_EQ(shml_raw_release(&seg, ring_fd), 0);
    free_segment();
    remove_root();
}

static void release_raw(const char *name)
{
    if (at_point_is(name))
        CHECK_EQ(shml_raw_release(&seg, ring_fd), 1);
}

/* What was released while another backed on top of it is not taken for backed. */
static void raw_is_released_while_another_backs_it(void)
{
    shml_memory_t memory;
    new_root("");
    new_segment_of(0, 192 * MIB);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RAW_REGION, 1, root, &memory), SHML_OK);
    shml_failpoint = release_raw;
    at_point = "memory.ring_back.backed";
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RAW_REGION, 65 * MIB, root, &memory), SHML_OK);
    shml_failpoint = NULL;
    CHECK_EQ(seg.control->regions[SHML_RAW_REGION].backed_end, 0);
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RAW_REGION, 65 * MIB, root, &memory), SHML_OK);
    CHECK_EQ(backed(ring_fd), 128 * MIB);
    free_segment();
    remove_root();
}

/* At each failpoint of one client's growth another grows, too: neither takes anything from the other. */
static void grow_another(const char *name)
{
    shml_memory_t memory;
    if (!at_point_is(name))
        return;
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 100 * MIB, root, &memory), SHML_OK);
    put_bytes("/sys/fs/cgroup/a/memory.current", 300 * MIB);
}

static void two_clients_grow_the_ring_at_once(void)
{
    shml_memory_t memory;
    new_root("0::/a\n");
    put_bytes("/sys/fs/cgroup/a/memory.max", 300 * MIB);
    put_bytes("/sys/fs/cgroup/a/memory.current", 0);
    new_segment(256 * MIB);
    shml_failpoint = grow_another;
    at_point = "memory.ring_back.backed"; /* outside of the mutex */
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 1, root, &memory), SHML_OK);
    shml_failpoint = NULL;
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].backed_end, 128 * MIB);
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].frozen, 0);
    free_segment();
    remove_root();
}

static void grow_when_refused(const char *name)
{
    if (at_point != NULL && strcmp(name, at_point) == 0)
        put_bytes("/sys/fs/cgroup/a/memory.current", 0);
    grow_another(name);
}

static void who_is_refused_uses_what_another_got(void)
{
    shml_memory_t memory;
    new_root("0::/a\n");
    put_bytes("/sys/fs/cgroup/a/memory.max", 300 * MIB);
    put_bytes("/sys/fs/cgroup/a/memory.current", 300 * MIB);
    new_segment(256 * MIB);
    shml_failpoint = grow_when_refused;
    at_point = "memory.ring_back.backed";
    CHECK_EQ(shml_ring_back_in(&seg, ring_fd, SHML_RESIDENT, 1, root, &memory), SHML_OK);
    shml_failpoint = NULL;
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].backed_end, 128 * MIB);
    CHECK_EQ(seg.control->regions[SHML_RESIDENT].frozen, 0);
    free_segment();
    remove_root();
}

static void spare_is_a_share_with_a_most(void)
{
    shml_memory_t memory = {.total_bytes = 1 * GIB};
    CHECK_EQ(shml_memory_spare(&memory), GIB / 20);
    memory.total_bytes = 100 * GIB;
    CHECK_EQ(shml_memory_spare(&memory), 512 * MIB);
    CHECK_EQ(shml_round_up(UINT64_MAX - 1, 1), UINT64_MAX - 1);
    CHECK_EQ(shml_round_up(3, 2), 4);
    CHECK_EQ(shml_round_up(4, 2), 4);
}

TEST_MAIN(TEST(without_cgroups_the_machine_is_the_limit), TEST(without_proc_there_is_still_an_answer),
          TEST(the_real_machine_gives_sane_numbers), TEST(v2_limit_of_the_own_cgroup), TEST(v2_limit_of_an_ancestor),
          TEST(v2_high_counts_as_a_limit), TEST(over_the_limit_nothing_is_available),
          TEST(v1_limit_and_that_of_hidden_ancestors), TEST(hybrid_reads_both_versions),
          TEST(in_a_container_the_mount_is_the_own_cgroup), TEST(damaged_files_limit_nothing),
          TEST(a_long_path_keeps_its_end), TEST(back_takes_what_is_asked_for), TEST(back_leaves_the_spare),
          TEST(back_gets_done_under_a_storm_of_signals),
          TEST(backing_a_mapping_keeps_what_is_there_and_zeroes_the_rest), TEST(the_ring_grows_by_extents),
          TEST(little_memory_backs_what_is_needed_then_freezes), TEST(regions_grow_apart),
          TEST(raw_is_released_while_another_backs_it), TEST(two_clients_grow_the_ring_at_once),
          TEST(who_is_refused_uses_what_another_got), TEST(spare_is_a_share_with_a_most))
