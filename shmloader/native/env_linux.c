/* env_linux.c - the operating system as the core sees it: Linux 5.3, glibc 2.30 or newer. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "layout.h"

static int env_lock(void *ctx, pthread_mutex_t *mutex, uint32_t timeout_ms)
{
    (void)ctx;
    int error = pthread_mutex_trylock(mutex);
    if (error != EBUSY)
        return error;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    return pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until);
}

static void env_unlock(void *ctx, pthread_mutex_t *mutex, int repaired)
{
    (void)ctx;
    if (repaired)
        pthread_mutex_consistent(mutex);
    pthread_mutex_unlock(mutex);
}

/* State and start time of a process: proc(5), /proc/pid/stat, fields 3 and 22. Returns 0 if there is none. */
static int read_stat(int32_t pid, char *state, uint64_t *starttime)
{
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return 0;
    text[n] = 0;
    /* The name, field 2, may hold spaces and parentheses: the last ')' ends it. */
    char *at = strrchr(text, ')');
    if (at == NULL || at[1] == 0)
        return 0;
    *state = at[2];
    at += 2;
    for (int field = 3; field < 22; field++) {
        at = strchr(at, ' ');
        if (at == NULL)
            return 0;
        at++;
    }
    *starttime = strtoull(at, NULL, 10);
    return 1;
}

static struct flock byte_lock(short type, uint64_t offset)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)offset, .l_len = 1};
}

int32_t shml_byte_holder(int lock_fd, uint64_t offset)
{
    struct flock lock = byte_lock(F_WRLCK, offset);
    if (fcntl(lock_fd, F_GETLK, &lock) != 0)
        return -1; /* we cannot ask any more: take nobody for dead */
    if (lock.l_type == F_UNLCK)
        return 0;
    return lock.l_pid > 0 ? (int32_t)lock.l_pid : -1;
}

/* Has process `pid` any memory of ours mapped? Its memfds' names begin so, see RingFiles.create. */
static int has_mapping(int32_t pid)
{
    static const char name[] = "/memfd:shmloader-";
    char path[32], text[4096 + sizeof name];
    size_t kept = 0;
    snprintf(path, sizeof path, "/proc/%d/maps", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC), found = 0;
    if (fd < 0)
        return 0;
    for (ssize_t n; !found && (n = read(fd, text + kept, 4096)) > 0;) {
        size_t length = kept + (size_t)n;
        found = memmem(text, length, name, sizeof name - 1) != NULL;
        kept = length < sizeof name ? length : sizeof name; /* the name may lie across two reads */
        memmove(text, text + length - kept, kept);
    }
    close(fd);
    return found;
}

/* Dead means: the byte is free (the kernel frees it after the process's memory is gone, so nothing can be stored
 * any more), and it is not a living process that merely closed the descriptor, as closefrom() does. One that called
 * execve() has the same pid and start time, but nothing of ours mapped. */
static int env_alive(void *ctx, int lock_fd, uint32_t slot, const shml_client_t *client)
{
    (void)ctx;
    /* GETLK does not see one's own locks, so for this process only the second test speaks. */
    if (shml_byte_holder(lock_fd, slot) != 0)
        return 1;
    char state;
    uint64_t starttime;
    if (!read_stat(client->pid, &state, &starttime))
        return 0;
    return starttime == client->starttime && state != 'Z' && state != 'X' && has_mapping(client->pid);
}

static int env_hold(void *ctx, int lock_fd, uint32_t slot, int take)
{
    (void)ctx;
    struct flock lock = byte_lock(take ? F_WRLCK : F_UNLCK, slot);
    return fcntl(lock_fd, F_SETLK, &lock) == 0 ? 0 : errno;
}

static uint64_t env_now_ns(void *ctx)
{
    (void)ctx;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

static void env_wait(void *ctx, uint32_t *word, uint32_t seen, uint32_t timeout_ms)
{
    (void)ctx;
    struct timespec timeout = {.tv_sec = timeout_ms / 1000, .tv_nsec = (long)(timeout_ms % 1000) * 1000000L};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &timeout, NULL, 0); /* not PRIVATE: the word is shared */
}

static void env_wake(void *ctx, uint32_t *word)
{
    (void)ctx;
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static int32_t env_pid(void *ctx)
{
    (void)ctx;
    return (int32_t)getpid();
}

static uint64_t env_starttime(void *ctx)
{
    (void)ctx;
    char state;
    uint64_t starttime = 0;
    return read_stat((int32_t)getpid(), &state, &starttime) ? starttime : 0;
}

int shml_die_with_parent(int32_t parent)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
        return SHML_E_SYS;
    return getppid() == parent; /* it may have died before the call above */
}

const shml_env_t shml_env_linux = {
    .ctx = NULL,
    .lock = env_lock,
    .unlock = env_unlock,
    .alive = env_alive,
    .hold = env_hold,
    .now_ns = env_now_ns,
    .wait = env_wait,
    .wake = env_wake,
    .pid = env_pid,
    .starttime = env_starttime,
};
