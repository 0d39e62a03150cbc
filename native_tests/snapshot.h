/* snapshot.h - kills at every failpoint, in one process: thousands a second, and pairs of them.
 *
 * A process that is killed leaves shared memory as its stores so far made it. So at each failpoint of the actor we copy
 * that memory to another WORLD. There the actor is dead: alive() says so, and if it held the mutex, the next lock
 * says EOWNERDEAD. `survive` then acts in that world as another client, and checks what it finds. What it does
 * there passes failpoints as well, at each of which the world is copied once more, to the next depth: the second
 * kill. At max_depth there are no more kills.
 *
 *   depth 0: the actor, client actors[0]        depth 1: the survivor of the first kill       depth 2: of the second
 *
 * The environment (snapshot_env) belongs to the world that acts at the moment. It fails the test where real life would
 * hang or fall silent: locking a mutex that one holds, unlocking one that one does not, leaving a mutex
 * inconsistent. Needs a program with -DSHML_FAILPOINTS; includes test.h; for one test at a time.
 */
#ifndef SHML_SNAPSHOT_H
#define SHML_SNAPSHOT_H

#include <errno.h>

#include "failpoint.h"
#include "layout.h"
#include "test.h"

#define SNAPSHOT_DEPTHS    3
#define SNAPSHOT_MAX_NAMES 256

typedef struct world {
    uint8_t *memory;
    int fd;         /* for those whose memory is a file's */
    int is_held;    /* the mutex, by the one who acts here */
    int owner_died; /* the next to lock it gets EOWNERDEAD */
    int is_repair;  /* the present holder got EOWNERDEAD */
    uint8_t is_dead[SHML_MAX_CLIENTS];
} world_t;

typedef struct snapshot {
    world_t worlds[SNAPSHOT_DEPTHS + 1];
    int depth, max_depth;
    int is_armed[SNAPSHOT_DEPTHS + 1]; /* do failpoints kill at this depth? */
    int actors[SNAPSHOT_DEPTHS + 1];   /* the client that acts at this depth, and dies there; -1: none */
    struct {
        uint64_t offset, bytes;
    } regions[12]; /* what of the memory is copied */
    int num_regions;
    void (*survive)(int depth, const char *point);
    uint64_t num_kills[SNAPSHOT_DEPTHS + 1]; /* by depth of the killed */
    const char *path[SNAPSHOT_DEPTHS + 1];   /* where they were killed, for the report */
    uint64_t now_ns;
    uint32_t num_locks, num_wakes, num_alive;
} snapshot_t;

static snapshot_t snapshot;

static const char *seen_names[SNAPSHOT_MAX_NAMES];
static int num_seen;

static void snapshot_see(const char *name)
{
    for (int i = 0; i < num_seen; i++)
        if (seen_names[i] == name || strcmp(seen_names[i], name) == 0)
            return;
    CHECK(num_seen < SNAPSHOT_MAX_NAMES);
    seen_names[num_seen++] = name;
}

static world_t *world(void) { return &snapshot.worlds[snapshot.depth]; }

/* The failpoint's hook. */
static void snapshot_hook(const char *name)
{
    int depth = snapshot.depth;
    snapshot_see(name);
    if (depth >= snapshot.max_depth || !snapshot.is_armed[depth])
        return;
    world_t *from = &snapshot.worlds[depth], *to = &snapshot.worlds[depth + 1];
    for (int i = 0; i < snapshot.num_regions; i++)
        memcpy(to->memory + snapshot.regions[i].offset, from->memory + snapshot.regions[i].offset,
               snapshot.regions[i].bytes);
    to->is_held = to->is_repair = 0;
    to->owner_died = from->is_held || from->owner_died;
    memcpy(to->is_dead, from->is_dead, sizeof to->is_dead);
    if (snapshot.actors[depth] >= 0)
        to->is_dead[snapshot.actors[depth]] = 1;
    snapshot.path[depth] = name;
    snapshot.num_kills[depth]++;
    if (depth == 0)
        test_note("%s", name);
    else
        test_note("%s, then %s", snapshot.path[0], name);
    snapshot.depth = depth + 1;
    snapshot.is_armed[depth + 1] = 0; /* survive arms what it wants to be killed in */
    snapshot.survive(depth + 1, name);
    if (world()->is_held)
        test_fail(__FILE__, __LINE__, "the survivor left the mutex locked");
    snapshot.depth = depth;
    test_note("%s", depth > 0 ? snapshot.path[0] : "");
}

static int snapshot_lock(void *ctx, pthread_mutex_t *mutex, uint32_t timeout_ms)
{
    (void)ctx, (void)mutex, (void)timeout_ms;
    world_t *w = world();
    snapshot.num_locks++;
    if (w->is_held)
        test_fail(__FILE__, __LINE__, "the mutex is locked twice: a deadlock");
    w->is_held = 1;
    w->is_repair = w->owner_died;
    w->owner_died = 0;
    return w->is_repair ? EOWNERDEAD : 0;
}

static void snapshot_unlock(void *ctx, pthread_mutex_t *mutex, int repaired)
{
    (void)ctx, (void)mutex;
    world_t *w = world();
    if (!w->is_held)
        test_fail(__FILE__, __LINE__, "a mutex is unlocked that is not held");
    if (w->is_repair && !repaired)
        test_fail(__FILE__, __LINE__, "the mutex of a dead owner is unlocked inconsistent");
    w->is_held = w->is_repair = 0;
}

static int snapshot_alive(void *ctx, int lock_fd, uint32_t slot, const shml_client_t *client)
{
    (void)ctx, (void)lock_fd, (void)client;
    snapshot.num_alive++;
    return !world()->is_dead[slot];
}

static int snapshot_hold(void *ctx, int lock_fd, uint32_t slot, int take)
{
    (void)ctx, (void)lock_fd;
    if (take)
        world()->is_dead[slot] = 0;
    return 0;
}

/* A second further each time: nothing is ever "less than 100 ms ago". */
static uint64_t snapshot_now_ns(void *ctx)
{
    (void)ctx;
    return snapshot.now_ns += UINT64_C(1000000000);
}
static void snapshot_wait(void *ctx, uint32_t *word, uint32_t seen, uint32_t timeout_ms)
{
    (void)ctx, (void)word, (void)seen, (void)timeout_ms;
}
static void snapshot_wake(void *ctx, uint32_t *word)
{
    (void)ctx, (void)word;
    snapshot.num_wakes++;
}
static int32_t snapshot_pid(void *ctx)
{
    (void)ctx;
    return 4711;
}
static uint64_t snapshot_starttime(void *ctx)
{
    (void)ctx;
    return 1;
}

static const shml_env_t snapshot_env = {
    .lock = snapshot_lock,
    .unlock = snapshot_unlock,
    .alive = snapshot_alive,
    .hold = snapshot_hold,
    .now_ns = snapshot_now_ns,
    .wait = snapshot_wait,
    .wake = snapshot_wake,
    .pid = snapshot_pid,
    .starttime = snapshot_starttime,
};

/* Begin with the memory of worlds[0] as it is, nobody dead; the worlds' memory and fds are the caller's. */
static void snapshot_reset(void)
{
    for (int d = 0; d <= SNAPSHOT_DEPTHS; d++) {
        world_t *w = &snapshot.worlds[d];
        w->is_held = w->owner_died = w->is_repair = 0;
        memset(w->is_dead, 0, sizeof w->is_dead);
        snapshot.is_armed[d] = 0;
        snapshot.num_kills[d] = 0;
    }
    snapshot.depth = snapshot.max_depth = 0;
    shml_failpoint = snapshot_hook;
}

/* Act as client `actor` at depth 0, killed at each failpoint and, where survive arms, a second time. */
TEST_UNUSED static void snapshot_run(int actor, int max_depth, void (*act)(void),
                                     void (*survive)(int depth, const char *point))
{
    CHECK(max_depth < SNAPSHOT_DEPTHS);
    snapshot.actors[0] = actor;
    snapshot.survive = survive;
    snapshot.depth = 0;
    snapshot.max_depth = max_depth;
    snapshot.is_armed[0] = 1;
    act();
    snapshot.is_armed[0] = 0;
    snapshot.max_depth = 0;
    CHECK(!world()->is_held);
}

/* Fails unless every failpoint that `file` of the core names was passed by some test of this program. `except` names
 * some that are another program's, separated by spaces. */
TEST_UNUSED static void snapshot_check_coverage(const char *file, const char *except)
{
    char path[256], line[1024];
    snprintf(path, sizeof path, "%s/%s", SHML_NATIVE_DIR, file);
    FILE *source = fopen(path, "r");
    CHECK(source != NULL);
    int num_names = 0, num_missed = 0;
    while (fgets(line, sizeof line, source) != NULL) {
        for (char *at = line; (at = strstr(at, "SHML_FP(\"")) != NULL; at++) {
            char name[128];
            int is_seen = 0;
            if (sscanf(at, "SHML_FP(\"%127[^\"]\")", name) != 1)
                continue;
            num_names++;
            for (int i = 0; i < num_seen; i++)
                is_seen |= strcmp(seen_names[i], name) == 0;
            if (!is_seen && strstr(except, name) == NULL) {
                printf("%s: failpoint %s was never passed\n", file, name);
                num_missed++;
            }
        }
    }
    fclose(source);
    CHECK(num_names > 0);
    CHECK_EQ(num_missed, 0);
}
#endif
