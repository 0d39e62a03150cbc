/* memory.c - how much memory there is, taking it, and huge pages.
 *
 * A memory cgroup does not refuse memory, it kills. So before memory is taken, we look at what the machine and each
 * cgroup above us have left. Between look and use others may take it: the spare is for that.
 *
 * Sources: proc_meminfo(5); Documentation/admin-guide/cgroup-v2.rst "Memory"; cgroup-v1/memory.rst; cgroups(7) for
 * /proc/self/cgroup; madvise(2) for MADV_COLLAPSE.
 */
#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "failpoint.h"
#include "layout.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

/* The largest files read here, memory.stat and /proc/meminfo, have 2 to 4 KiB. */
#define FILE_BYTES 16384u
/* fallocate starts again from nothing when a signal comes: pieces that take half a millisecond get done even under
 * a profiler's timer. */
#define PIECE_BYTES     SHML_HUGE_BYTES
#define SPARE_MAX_BYTES (UINT64_C(512) << 20)

/* The names of the same things in the two versions. */
typedef struct cgroup_files {
    const char *limits[2]; /* any of them */
    const char *usage;
    const char *reclaimable;  /* in memory.stat: page cache that nobody used lately */
    const char *hidden_limit; /* in memory.stat: the least limit of all ancestors, those outside a container too */
} cgroup_files_t;

/* memory.high does not kill, but what exceeds it is slowed until it is reclaimed, and our memory cannot be. */
static const cgroup_files_t cgroup_v2 = {{"memory.max", "memory.high"}, "memory.current", "inactive_file", NULL};
static const cgroup_files_t cgroup_v1 = {
    {"memory.limit_in_bytes", NULL}, "memory.usage_in_bytes", "total_inactive_file", "hierarchical_memory_limit"};

/* ---------------------------------------------------------------------------------------------------- *
 * Small files
 * ---------------------------------------------------------------------------------------------------- */

/* The file's text, cut at FILE_BYTES - 1; false: it cannot be read. */
static bool read_text(const char *path, char text[FILE_BYTES])
{
    size_t have = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    while (have < FILE_BYTES - 1) {
        ssize_t got = read(fd, text + have, FILE_BYTES - 1 - have);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        have += (size_t)got;
    }
    close(fd);
    text[have] = '\0';
    return have > 0;
}

static bool join(char path[PATH_MAX], const char *a, const char *b, const char *c)
{
    int length = snprintf(path, PATH_MAX, "%s%s%s", a, b, c);
    return length >= 0 && length < PATH_MAX;
}

static bool parse_number(const char *text, uint64_t *number)
{
    char *end;
    if (*text < '0' || *text > '9') /* strtoull would take "-1" */
        return false;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    *number = errno == ERANGE ? UINT64_MAX : value;
    return true;
}

/* The number after `name` at the start of a line. */
static bool find_number(const char *text, const char *name, uint64_t *number)
{
    size_t length = strlen(name);
    for (const char *line = text; line != NULL; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, name, length) == 0 && (line[length] == ' ' || line[length] == ':')) {
            line += length;
            return parse_number(line + strspn(line, ": \t"), number);
        }
    }
    return false;
}

/* ---------------------------------------------------------------------------------------------------- *
 * What there is
 * ---------------------------------------------------------------------------------------------------- */

/* The end of a long path says more than its beginning. */
static void set_name(shml_memory_t *memory, const char *name)
{
    size_t length = strlen(name), room = sizeof memory->limited_by - 1;
    memset(memory->limited_by, 0, sizeof memory->limited_by);
    if (length <= room) {
        memcpy(memory->limited_by, name, length);
    } else {
        memcpy(memory->limited_by, "...", 3);
        memcpy(memory->limited_by + 3, name + length - (room - 3), room - 3);
    }
}

static void machine_memory(const char *root, shml_memory_t *memory, char text[FILE_BYTES])
{
    char path[PATH_MAX];
    uint64_t total_kib, available_kib;
    set_name(memory, "MemAvailable");
    if (join(path, root, "/proc/meminfo", "") && read_text(path, text) && find_number(text, "MemTotal", &total_kib) &&
        find_number(text, "MemAvailable", &available_kib)) {
        memory->total_bytes = total_kib * 1024;
        memory->available_bytes = available_kib * 1024;
        return;
    }
    struct sysinfo info; /* no /proc: page cache does not count as free here, so this is on the safe side */
    sysinfo(&info);
    memory->total_bytes = (uint64_t)info.totalram * info.mem_unit;
    memory->available_bytes = ((uint64_t)info.freeram + info.bufferram) * info.mem_unit;
}

/* What the cgroup in folder `path` limits. What cannot be read limits nothing. `name` is the path to report. */
static void cgroup_memory(const char *path, const char *name, const cgroup_files_t *files, shml_memory_t *memory,
                          char text[FILE_BYTES])
{
    char file[PATH_MAX];
    uint64_t limit = UINT64_MAX, usage, number, reclaimable = 0;
    for (int i = 0; i < 2 && files->limits[i] != NULL; i++) /* "max" is no number */
        if (join(file, path, "/", files->limits[i]) && read_text(file, text) && parse_number(text, &number) &&
            number < limit)
            limit = number;
    if (join(file, path, "/", "memory.stat") && read_text(file, text)) {
        if (files->hidden_limit != NULL && find_number(text, files->hidden_limit, &number) && number < limit)
            limit = number;
        (void)find_number(text, files->reclaimable, &reclaimable);
    }
    if (limit < memory->total_bytes)
        memory->total_bytes = limit;
    if (limit == UINT64_MAX || !join(file, path, "/", files->usage) || !read_text(file, text) ||
        !parse_number(text, &usage))
        return;
    usage -= reclaimable < usage ? reclaimable : usage;
    uint64_t available = usage < limit ? limit - usage : 0;
    if (available < memory->available_bytes) {
        memory->available_bytes = available;
        set_name(memory, name);
    }
}

static bool is_folder(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

/* From our cgroup up to the mount. A container sees its own cgroup as the mount's root, while /proc/self/cgroup may
 * tell its path on the host (or one with "..", from another cgroup namespace): then the root is ours. */
static void cgroup_ancestors(const char *root, const char *mount, const char *ours, const cgroup_files_t *files,
                             shml_memory_t *memory, char text[FILE_BYTES])
{
    char path[PATH_MAX];
    size_t root_length = strlen(root), mount_end = root_length + strlen(mount);
    if (strstr(ours, "/..") != NULL || !join(path, root, mount, ours) || !is_folder(path))
        if (!join(path, root, mount, ""))
            return;
    for (size_t end = strlen(path);; end--) {
        while (end > mount_end && path[end - 1] == '/')
            end--;
        path[end] = '\0';
        cgroup_memory(path, path + root_length, files, memory, text);
        while (end > mount_end && path[end - 1] != '/')
            end--;
        if (end <= mount_end)
            return;
    }
}

/* Does the list of controllers ("cpu,memory") name memory? */
static bool has_memory(const char *controllers)
{
    for (const char *at = controllers; (at = strstr(at, "memory")) != NULL; at += 6)
        if ((at == controllers || at[-1] == ',') && (at[6] == ',' || at[6] == '\0'))
            return true;
    return false;
}

int shml_memory_read(const char *root, shml_memory_t *memory)
{
    char path[PATH_MAX], text[FILE_BYTES], membership[FILE_BYTES];
    memset(memory, 0, sizeof *memory);
    machine_memory(root, memory, text);
    if (!join(path, root, "/proc/self/cgroup", "") || !read_text(path, membership))
        return SHML_OK;
    /* A line is "id:controllers:path"; "0::path" is version 2's. */
    for (char *line = membership, *next; line != NULL && *line != '\0'; line = next) {
        next = strchr(line, '\n');
        if (next != NULL)
            *next++ = '\0';
        char *controllers = strchr(line, ':');
        char *ours = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (ours == NULL)
            continue;
        *ours++ = '\0';
        *controllers++ = '\0';
        if (strcmp(line, "0") == 0 && *controllers == '\0') {
            cgroup_ancestors(root, "/sys/fs/cgroup", ours, &cgroup_v2, memory, text);
            cgroup_ancestors(root, "/sys/fs/cgroup/unified", ours, &cgroup_v2, memory, text);
        } else if (has_memory(controllers)) {
            cgroup_ancestors(root, "/sys/fs/cgroup/memory", ours, &cgroup_v1, memory, text);
        }
    }
    return SHML_OK;
}

uint64_t shml_memory_spare(const shml_memory_t *memory)
{
    uint64_t share = memory->total_bytes / 20;
    return share < SPARE_MAX_BYTES ? share : SPARE_MAX_BYTES;
}

/* ---------------------------------------------------------------------------------------------------- *
 * Taking it
 * ---------------------------------------------------------------------------------------------------- */
/* Back the whole 2 MiB pages of [from, to), mapped at `at`, with huge pages: one small page first, since the kernel
 * makes no huge page of nothing, then the rest by collapsing. The other way round (all small pages, then the
 * collapse, which copies them) takes 55 ms for 64 MiB where this takes 5 (measured). */
static void back_huge(int fd, uint64_t from, uint64_t to, uint8_t *at)
{
    uint64_t skip = (0 - (uint64_t)(uintptr_t)at) % SHML_HUGE_BYTES;
    if (to - from < skip)
        return;
    /* One page a call: a call that fails has said which page, and a signal interrupts only one. */
    for (uint64_t page = from + skip; to - page >= SHML_HUGE_BYTES; page += SHML_HUGE_BYTES) {
        if (fallocate(fd, 0, (off_t)page, 4096) != 0)
            break;
        if (madvise(at + (page - from), SHML_HUGE_BYTES, MADV_COLLAPSE) != 0 && errno == EINVAL)
            break; /* the kernel does not know it, or has no huge pages for this mapping */
    }
}

int shml_back(int fd, uint64_t from, uint64_t to, void *at, uint64_t spare_bytes, const char *root,
              shml_memory_t *memory)
{
    if (to > INT64_MAX || from > to)
        return SHML_E_INVAL;
    (void)shml_memory_read(root, memory);
    if (spare_bytes > memory->available_bytes || to - from > memory->available_bytes - spare_bytes)
        return SHML_E_MEMORY;
    if (at != NULL)
        back_huge(fd, from, to, at);
    /* Pieces that have memory when a later one is refused keep it: another process may have begun to write there. */
    for (uint64_t byte = from, piece; byte < to; byte += piece) {
        piece = to - byte < PIECE_BYTES ? to - byte : PIECE_BYTES;
        while (fallocate(fd, 0, (off_t)byte, (off_t)piece) != 0)
            if (errno != EINTR)
                return errno == ENOSPC || errno == ENOMEM ? SHML_E_MEMORY : SHML_E_SYS;
    }
    return SHML_OK;
}

static uint64_t at_most(uint64_t n, uint64_t most) { return n < most ? n : most; }

/* Set what the backing of [from, to) came to. A kill between two stores here leaves memory that is not used, or a
 * region that may grow: nothing to repair. */
static int region_backed(shml_seg_t *seg, uint32_t region, int rc, uint64_t from, uint64_t to, uint64_t need_end)
{
    int locked = shml_lock(seg);
    if (locked != SHML_OK)
        return locked;
    shml_region_t *r = &seg->control->regions[region];
    SHML_FP("memory.ring_back.locked");
    /* Less than `from`: shml_raw_release was there meanwhile, below us is no memory any more. */
    if (rc == SHML_OK && to > r->backed_end && r->backed_end >= from)
        r->backed_end = to;
    if (rc == SHML_E_MEMORY && need_end <= r->backed_end)
        rc = SHML_OK; /* another client got there first */
    else if (rc == SHML_E_MEMORY)
        r->frozen = 1;
    SHML_FP("memory.ring_back.stored");
    shml_unlock(seg);
    return rc;
}

int shml_ring_back_in(shml_seg_t *seg, int fd, uint32_t region, uint64_t need_end, const char *root,
                      shml_memory_t *memory)
{
    if (region >= SHML_NUM_REGIONS)
        return SHML_E_INVAL;
    const shml_region_t *r = &seg->control->regions[region];
    int rc = shml_lock(seg);
    if (rc != SHML_OK)
        return rc;
    uint64_t from = r->backed_end, end = r->end;
    uint32_t frozen = r->frozen;
    shml_unlock(seg);

    (void)shml_memory_read(root, memory);
    if (need_end > end)
        return SHML_E_INVAL;
    if (need_end <= from)
        return SHML_OK;
    if (frozen)
        return SHML_E_MEMORY;
    uint64_t spare = shml_memory_spare(memory);
    uint64_t to = at_most(shml_round_up(need_end, SHML_EXTENT_BYTES), end);
    uint8_t *at = seg->ring != NULL && to <= seg->ring_bytes ? seg->ring + from : NULL;
    rc = shml_back(fd, from, to, at, spare, root, memory);
    if (rc == SHML_E_MEMORY) {
        to = at_most(shml_round_up(need_end, SHML_HUGE_BYTES), end);
        rc = shml_back(fd, from, to, at, spare, root, memory);
    }
    SHML_FP("memory.ring_back.backed");
    if (rc == SHML_OK || rc == SHML_E_MEMORY)
        rc = region_backed(seg, region, rc, from, to, need_end);
    return rc;
}

int shml_ring_back(shml_seg_t *seg, int fd, uint32_t region, uint64_t need_end, shml_memory_t *memory)
{
    return shml_ring_back_in(seg, fd, region, need_end, "", memory);
}

/* A kill before backed_end is stored leaves some of the raw records evicted, and who releases next does the rest. A
 * kill after it leaves memory that nobody uses until the region grows over it again. */
int shml_raw_release(shml_seg_t *seg, int fd)
{
    int rc = shml_lock(seg);
    if (rc != SHML_OK)
        return rc;
    shml_control_t *c = seg->control;
    shml_region_t *r = &c->regions[SHML_RAW_REGION];
    uint64_t backed_end = r->backed_end;
    if (c->chunks_done + c->chunks_broken == c->num_chunks && backed_end > r->begin && !shml_is_open(c))
        rc = shml_region_clear(seg, SHML_RAW_REGION);
    if (rc == 1) {
        SHML_FP("memory.release.cleared");
        r->backed_end = r->begin;
        SHML_FP("memory.release.stored");
        /* Under the mutex: nobody may begin to write there before it is done. */
        if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)r->begin,
                      (off_t)(backed_end - r->begin)) != 0)
            rc = SHML_E_SYS;
        SHML_FP("memory.release.punched");
    }
    shml_unlock(seg);
    return rc;
}
