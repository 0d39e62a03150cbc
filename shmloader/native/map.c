/* map.c - mapping the segment's memfds, and what becomes of the mappings in a forked child.
 *
 * A child that fork() made shares no mapping of ours: MADV_DONTFORK leaves them out (which also spares the copy of
 * their page tables), and a reservation without access takes their place, so that a view which the child
 * inherited faults (fault.c says so) instead of reading whatever is mapped there next. The child maps afresh.
 *
 * The table of mappings is read by the fault handler, hence lock-free: an entry's `num_bytes` is stored last.
 */
#define _GNU_SOURCE
#include "map.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#include "shml.h"

static shml_mapping_t mappings[SHML_MAX_MAPPINGS];
static pthread_mutex_t mappings_mutex = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint64_t forks;
static int atfork_done;

uint64_t shml_forks(void) { return atomic_load_explicit(&forks, memory_order_acquire); }

const shml_mapping_t *shml_mapping_at(uintptr_t address)
{
    for (int i = 0; i < SHML_MAX_MAPPINGS; i++) {
        uint64_t num_bytes = atomic_load_explicit(&mappings[i].num_bytes, memory_order_acquire);
        if (num_bytes != 0 && address - mappings[i].at < num_bytes)
            return &mappings[i];
    }
    return NULL;
}

/* Only async-signal-safe calls: the parent may have had other threads, holding any lock. */
static void in_child(void)
{
    for (int i = 0; i < SHML_MAX_MAPPINGS; i++) {
        uint64_t num_bytes = mappings[i].num_bytes;
        if (num_bytes == 0 || mappings[i].is_inherited)
            continue;
        mmap((void *)mappings[i].at, num_bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        mappings[i].is_inherited = 1;
    }
    mappings_mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    atomic_fetch_add_explicit(&forks, 1, memory_order_release);
}

void *shml_map(int fd, uint64_t num_bytes, int writable, const char *name)
{
    /* Huge pages need the mapping to begin at a multiple of their size: reserve more and map inside. */
    uint64_t reserved = num_bytes + SHML_HUGE_BYTES;
    uint8_t *base = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    uintptr_t at = ((uintptr_t)base + SHML_HUGE_BYTES - 1) & ~(uintptr_t)(SHML_HUGE_BYTES - 1);
    int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    if (mmap((void *)at, num_bytes, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        munmap(base, reserved);
        return NULL;
    }
    uintptr_t end = (at + num_bytes + 4095) & ~(uintptr_t)4095;
    if (at > (uintptr_t)base)
        munmap(base, at - (uintptr_t)base);
    if ((uintptr_t)base + reserved > end)
        munmap((void *)end, (uintptr_t)base + reserved - end);
    madvise((void *)at, num_bytes, MADV_DONTFORK);

    pthread_mutex_lock(&mappings_mutex);
    if (!atfork_done)
        atfork_done = pthread_atfork(NULL, NULL, in_child) == 0;
    int i = 0;
    while (i < SHML_MAX_MAPPINGS && mappings[i].num_bytes != 0)
        i++;
    if (i < SHML_MAX_MAPPINGS) {
        mappings[i].at = at;
        mappings[i].is_inherited = 0;
        strncpy(mappings[i].name, name, sizeof mappings[i].name - 1);
        atomic_store_explicit(&mappings[i].num_bytes, num_bytes, memory_order_release);
    }
    pthread_mutex_unlock(&mappings_mutex);
    if (i == SHML_MAX_MAPPINGS) {
        munmap((void *)at, num_bytes);
        errno = ENFILE;
        return NULL;
    }
    return (void *)at;
}

void shml_unmap(void *at, uint64_t num_bytes)
{
    pthread_mutex_lock(&mappings_mutex);
    for (int i = 0; i < SHML_MAX_MAPPINGS; i++)
        if (mappings[i].num_bytes != 0 && mappings[i].at == (uintptr_t)at)
            atomic_store_explicit(&mappings[i].num_bytes, 0, memory_order_release);
    pthread_mutex_unlock(&mappings_mutex);
    munmap(at, num_bytes);
}
