/* The batch ring: a slot's life, who may have it, what the dead leave, and kills at every point. */
#define _GNU_SOURCE
#include "batch.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "memory.h"
#include "snapshot.h"
#include "test.h"

#define KIB          UINT64_C(1024)
#define MIB          (UINT64_C(1) << 20)
#define MAP_BYTES    (256 * MIB)
#define HEADER_BYTES ((sizeof(struct shml_batch) + 4095) / 4096 * 4096)

/* The clients of most tests, by slot. */
enum { A = 0, B = 1, C = 2, OWNER = 3, D = 4 };

static void new_world(world_t *w, uint64_t map_bytes)
{
    if (w->memory != NULL) {
        shml_unmap(w->memory, MAP_BYTES);
        close(w->fd);
    }
    w->fd = memfd_create("shml_batch_test", MFD_CLOEXEC);
    CHECK(w->fd >= 0 && ftruncate(w->fd, (off_t)map_bytes) == 0);
    w->memory = shml_map(w->fd, map_bytes, 1, "batch"); /* at a huge page's boundary, as in real life */
    CHECK(w->memory != NULL);
}

static shml_bhandle_t handle(int client)
{
    return (shml_bhandle_t){(shml_batch_t *)(void *)world()->memory, MAP_BYTES, world()->fd, client, &snapshot_env};
}

/* A, B, C are workers, OWNER owns, D is a worker that tests let die. */
static void new_batch(uint64_t budget_bytes)
{
    snapshot_reset();
    for (int d = 0; d < SNAPSHOT_DEPTHS; d++)
        new_world(&snapshot.worlds[d], MAP_BYTES);
    snapshot.num_regions = 1;
    snapshot.regions[0].offset = 0;
    snapshot.regions[0].bytes = HEADER_BYTES;
    shml_bhandle_t h = handle(-1);
    CHECK(fallocate(h.fd, 0, 0, HEADER_BYTES) == 0); /* so that its memory is a known number */
    CHECK_EQ(shml_batch_format(h.batch, MAP_BYTES, budget_bytes), SHML_OK);
    for (int client = A; client <= D; client++) {
        h.self = -1;
        CHECK_EQ(shml_batch_register(&h, client == OWNER ? SHML_OWNER : SHML_WORKER), SHML_OK);
        CHECK_EQ(h.self, client);
    }
}

static void verify(void)
{
    const char *what;
    shml_bhandle_t h = handle(B);
    int rc = shml_batch_verify(&h, &what);
    if (rc != SHML_OK)
        test_fail(__FILE__, __LINE__, "verify: %d %s", rc, what != NULL ? what : "");
}

static shml_slot_t acquire(int client, uint64_t bytes)
{
    shml_slot_t slot;
    shml_bhandle_t h = handle(client);
    CHECK_EQ(shml_slot_acquire(&h, bytes, 1000, &slot), SHML_OK);
    CHECK(slot.capacity >= bytes && slot.offset >= SHML_BATCH_DATA_AT && slot.offset + slot.capacity <= MAP_BYTES);
    return slot;
}
static int try_acquire(int client, uint64_t bytes, uint32_t max_slots)
{
    shml_slot_t slot;
    shml_bhandle_t h = handle(client);
    return shml_slot_acquire(&h, bytes, max_slots, &slot);
}
static int sent(int client, const shml_slot_t *slot)
{
    shml_bhandle_t h = handle(client);
    return shml_slot_send(&h, slot);
}
static int dropped(int client, const shml_slot_t *slot)
{
    shml_bhandle_t h = handle(client);
    return shml_slot_drop(&h, slot);
}
static int adopted(const shml_slot_t *slot)
{
    uint32_t held, total;
    shml_bhandle_t h = handle(OWNER);
    return shml_slot_adopt(&h, slot, &held, &total);
}
static int released(const shml_slot_t *slot)
{
    shml_bhandle_t h = handle(OWNER);
    return shml_slot_release(&h, slot);
}
static shml_batch_stats_t get_stats(void)
{
    shml_batch_stats_t stats;
    shml_bhandle_t h = handle(OWNER);
    (void)shml_batch_get_stats(&h, &stats);
    return stats;
}
static uint64_t backed(int fd)
{
    struct stat info;
    CHECK(fstat(fd, &info) == 0);
    return (uint64_t)info.st_blocks * 512;
}

/* ---------------------------------------------------------------------------------------------------- */

static void only_a_batch_ring_is_taken_for_one(void)
{
    new_batch(MIB);
    shml_batch_t *batch = handle(A).batch;
    CHECK_EQ(shml_batch_check(batch, MAP_BYTES), SHML_OK);
    CHECK_EQ(shml_batch_check(batch, MAP_BYTES - 1), SHML_E_LAYOUT);
    CHECK_EQ(shml_batch_check(batch, 100), SHML_E_LAYOUT);
    CHECK_EQ(shml_batch_format(batch, SHML_BATCH_DATA_AT - 1, MIB), SHML_E_INVAL);
    batch->version++;
    CHECK_EQ(shml_batch_check(batch, MAP_BYTES), SHML_E_LAYOUT);
    batch->version--;
    batch->abi++;
    CHECK_EQ(shml_batch_check(batch, MAP_BYTES), SHML_E_LAYOUT);
    batch->abi--;
    batch->magic = 0;
    CHECK_EQ(shml_batch_check(batch, MAP_BYTES), SHML_E_LAYOUT);
}

static void a_slot_goes_round(void)
{
    new_batch(MIB);
    uint32_t held, total;
    shml_bhandle_t owner = handle(OWNER);
    shml_slot_t first = acquire(A, 100 * KIB);
    CHECK_EQ(first.capacity, 104 * KIB);
    memset(world()->memory + first.offset, 1, first.capacity);
    CHECK_EQ(sent(A, &first), SHML_OK);
    CHECK_EQ(shml_slot_adopt(&owner, &first, &held, &total), SHML_OK);
    CHECK_EQ(held, 1);
    CHECK_EQ(total, 1);
    shml_slot_t second = acquire(A, 97 * KIB);
    CHECK(second.index != first.index);
    CHECK_EQ(sent(A, &second), SHML_OK);
    CHECK_EQ(shml_slot_adopt(&owner, &second, &held, &total), SHML_OK);
    CHECK_EQ(held, 2);
    CHECK_EQ(released(&first), SHML_OK);
    shml_slot_t again = acquire(A, 98 * KIB); /* a slightly different size */
    CHECK_EQ(again.index, first.index);
    CHECK_EQ(again.gen, first.gen + 1);
    CHECK_EQ(dropped(A, &again), SHML_OK);
    shml_batch_stats_t stats = get_stats();
    CHECK_EQ(stats.num_slots, 2);
    CHECK_EQ(stats.num_free, 1);
    CHECK_EQ(stats.num_held, 1);
    CHECK_EQ(stats.num_acquired, 3);
    CHECK_EQ(stats.backed_bytes, 208 * KIB);
    verify();
}

static void own_free_slots_need_no_mutex_and_no_questions(void)
{
    new_batch(MIB);
    shml_slot_t slot = acquire(A, KIB);
    CHECK_EQ(dropped(A, &slot), SHML_OK);
    uint32_t locks = snapshot.num_locks, alive = snapshot.num_alive;
    for (int i = 0; i < 10; i++) {
        slot = acquire(A, KIB);
        CHECK_EQ(sent(A, &slot), SHML_OK);
        CHECK_EQ(adopted(&slot), SHML_OK);
        CHECK_EQ(released(&slot), SHML_OK);
    }
    CHECK_EQ(snapshot.num_locks, locks);
    CHECK_EQ(snapshot.num_alive, alive);
}

static void a_stale_token_changes_nothing(void)
{
    new_batch(MIB);
    shml_slot_t slot = acquire(A, KIB), old = slot;
    CHECK_EQ(dropped(A, &slot), SHML_OK);
    CHECK_EQ(dropped(A, &slot), SHML_E_STALE); /* it is FREE */
    CHECK_EQ(sent(A, &slot), SHML_E_STALE);
    slot = acquire(A, KIB);
    CHECK_EQ(slot.index, old.index);
    CHECK_EQ(sent(A, &old), SHML_E_STALE); /* FILLING, but of a later generation */
    CHECK_EQ(dropped(A, &old), SHML_E_STALE);
    CHECK_EQ(sent(B, &slot), SHML_E_STALE); /* another's */
    CHECK_EQ(adopted(&slot), SHML_E_STALE); /* not sent */
    CHECK_EQ(released(&slot), SHML_E_STALE);
    CHECK_EQ(sent(A, &slot), SHML_OK);
    CHECK_EQ(adopted(&old), SHML_E_STALE);
    shml_slot_t moved = slot;
    moved.offset += 4096; /* a token that was tampered with points nowhere else */
    CHECK_EQ(adopted(&moved), SHML_E_STALE);
    moved = slot, moved.capacity *= 2;
    CHECK_EQ(adopted(&moved), SHML_E_STALE);
    moved = slot, moved.index = SHML_MAX_SLOTS;
    CHECK_EQ(adopted(&moved), SHML_E_STALE);
    moved.index = UINT32_MAX;
    CHECK_EQ(released(&moved), SHML_E_STALE);
    CHECK_EQ(adopted(&slot), SHML_OK);
    CHECK_EQ(adopted(&slot), SHML_E_STALE); /* once */
    CHECK_EQ(dropped(A, &slot), SHML_E_STALE);
    CHECK_EQ(released(&old), SHML_E_STALE);
    CHECK_EQ(released(&slot), SHML_OK);
    CHECK_EQ(released(&slot), SHML_E_STALE);
    CHECK_EQ(get_stats().num_free, 1);
}

static void generations_wrap_round(void)
{
    new_batch(MIB);
    shml_slot_t slot = acquire(A, KIB);
    shml_batch_slot_t *shared = &handle(A).batch->slots[slot.index];
    shared->word = shml_slot_word(UINT32_MAX, A, SHML_SLOT_FREE);
    slot = acquire(A, KIB);
    CHECK_EQ(slot.gen, 0);
    CHECK_EQ(sent(A, &slot), SHML_OK);
    CHECK_EQ(adopted(&slot), SHML_OK);
}

static void the_smallest_that_fits_is_taken(void)
{
    new_batch(MIB);
    shml_slot_t large = acquire(A, 64 * KIB), small = acquire(A, 8 * KIB), middle = acquire(A, 32 * KIB);
    CHECK_EQ(dropped(A, &large), SHML_OK);
    CHECK_EQ(dropped(A, &small), SHML_OK);
    CHECK_EQ(dropped(A, &middle), SHML_OK);
    CHECK_EQ(acquire(A, 9 * KIB).index, middle.index);
    CHECK_EQ(acquire(A, 8 * KIB).index, small.index);
    CHECK_EQ(acquire(A, 8 * KIB).index, large.index);
}

static void capacities_are_rounded_so_that_sizes_share(void)
{
    CHECK_EQ(shml_slot_capacity(0), 0);
    CHECK_EQ(shml_slot_capacity(UINT64_MAX), 0);
    CHECK_EQ(shml_slot_capacity(1), 4096);
    CHECK_EQ(shml_slot_capacity(4097), 8192);
    CHECK_EQ(shml_slot_capacity(MIB - 1), 2 * MIB);
    CHECK_EQ(shml_slot_capacity(MIB), 2 * MIB);
    CHECK_EQ(shml_slot_capacity(64 * 150528), 10 * MIB);
    for (uint64_t n = 1; n < UINT64_C(1) << 40; n = n * 3 / 2 + 1) {
        uint64_t capacity = shml_slot_capacity(n);
        CHECK(capacity >= n && capacity <= (n < MIB / 2 ? n + n / 8 + 4096 : n + n / 8 + 2 * MIB));
        CHECK(capacity % (capacity >= MIB ? 2 * MIB : 4096) == 0);
        CHECK_EQ(shml_slot_capacity(capacity), capacity);
    }
}

static void large_slots_begin_at_huge_pages(void)
{
    new_batch(64 * MIB);
    shml_slot_t small = acquire(A, 5 * KIB), large = acquire(A, 9 * MIB), other = acquire(A, 3 * KIB);
    CHECK_EQ(large.offset % SHML_HUGE_BYTES, 0);
    CHECK(small.offset < SHML_BATCH_DATA_AT + SHML_HUGE_BYTES && other.offset < SHML_BATCH_DATA_AT + SHML_HUGE_BYTES);
    memset(world()->memory + large.offset, 5, large.capacity);
    CHECK_EQ(backed(world()->fd), HEADER_BYTES + small.capacity + large.capacity + other.capacity);
    verify();
}

static void max_slots_and_budget_bound_a_worker(void)
{
    new_batch(160 * KIB);
    shml_slot_t slots[5];
    for (int i = 0; i < 2; i++)
        slots[i] = acquire(A, 32 * KIB);
    CHECK_EQ(try_acquire(A, 32 * KIB, 2), SHML_E_FULL);
    CHECK_EQ(try_acquire(A, 32 * KIB, 0), SHML_E_FULL);
    CHECK_EQ(try_acquire(B, 200 * KIB, 9), SHML_E_FULL); /* larger than all of the budget */
    CHECK_EQ(try_acquire(B, UINT64_MAX, 9), SHML_E_FULL);
    CHECK_EQ(try_acquire(B, 0, 9), SHML_E_INVAL);
    for (int i = 2; i < 5; i++)
        slots[i] = acquire(B, 32 * KIB);
    CHECK_EQ(try_acquire(B, KIB, 9), SHML_E_FULL); /* the budget is spent */
    CHECK_EQ(try_acquire(A, KIB, 9), SHML_E_FULL);
    CHECK_EQ(get_stats().num_refused, 6);
    CHECK_EQ(dropped(A, &slots[0]), SHML_OK);
    CHECK_EQ(try_acquire(B, KIB, 9), SHML_E_FULL); /* a living worker's free slot stays its own */
    CHECK_EQ(get_stats().backed_bytes, 160 * KIB);
    verify();
}

static void growing_batches_give_small_slots_back(void)
{
    new_batch(128 * KIB);
    shml_slot_t slots[4];
    for (int i = 0; i < 4; i++)
        slots[i] = acquire(A, 32 * KIB);
    for (int i = 0; i < 4; i++)
        CHECK_EQ(dropped(A, &slots[i]), SHML_OK);
    shml_slot_t large = acquire(A, 96 * KIB); /* takes the place of three */
    CHECK_EQ(get_stats().num_slots, 2);
    CHECK_EQ(get_stats().backed_bytes, 128 * KIB);
    CHECK_EQ(backed(world()->fd), HEADER_BYTES + 128 * KIB);
    for (int i = 0; i < 4; i++)
        CHECK_EQ(sent(A, &slots[i]), SHML_E_STALE);
    CHECK_EQ(dropped(A, &large), SHML_OK);
    CHECK_EQ(acquire(A, 90 * KIB).index, large.index);
    verify();
}

static void too_many_small_slots_make_way_for_one_that_fits(void)
{
    new_batch(MIB);
    shml_slot_t small[3];
    for (int i = 0; i < 3; i++)
        small[i] = acquire(A, 4 * KIB);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(dropped(A, &small[i]), SHML_OK);
    CHECK_EQ(try_acquire(A, 64 * KIB, 3), SHML_OK);
    CHECK_EQ(get_stats().num_slots, 3);
    CHECK_EQ(try_acquire(A, 64 * KIB, 3), SHML_OK);
    CHECK_EQ(try_acquire(A, 64 * KIB, 3), SHML_OK);
    CHECK_EQ(try_acquire(A, 64 * KIB, 3), SHML_E_FULL); /* all three are filling */
    verify();
}

static void nothing_is_given_back_in_vain(void)
{
    new_batch(128 * KIB);
    shml_slot_t small = acquire(A, 32 * KIB), busy = acquire(B, 64 * KIB);
    CHECK_EQ(dropped(A, &small), SHML_OK);
    CHECK_EQ(try_acquire(A, 96 * KIB, 9), SHML_E_FULL);
    CHECK_EQ(get_stats().num_slots, 2);
    CHECK_EQ(dropped(B, &busy), SHML_OK);
}

static void what_a_dead_worker_left_is_free_for_others(void)
{
    new_batch(160 * KIB);
    shml_slot_t filling = acquire(D, 32 * KIB), is_sent = acquire(D, 32 * KIB), is_held = acquire(D, 32 * KIB),
                is_free = acquire(D, 32 * KIB);
    CHECK_EQ(sent(D, &is_sent), SHML_OK);
    CHECK_EQ(sent(D, &is_held), SHML_OK);
    CHECK_EQ(adopted(&is_held), SHML_OK);
    CHECK_EQ(dropped(D, &is_free), SHML_OK);
    acquire(A, 32 * KIB);                               /* the rest of the budget */
    CHECK_EQ(try_acquire(A, 32 * KIB, 9), SHML_E_FULL); /* D lives */
    world()->is_dead[D] = 1;
    uint32_t asked = snapshot.num_alive;
    for (int i = 0; i < 3; i++)
        acquire(A, 32 * KIB);
    CHECK(snapshot.num_alive <= asked + 9); /* each call asks once about each other worker */
    CHECK_EQ(try_acquire(A, 32 * KIB, 9), SHML_E_FULL);
    CHECK_EQ(adopted(&is_sent), SHML_E_STALE);
    CHECK_EQ(sent(D, &filling), SHML_E_STALE);
    CHECK_EQ(released(&is_held), SHML_OK); /* then it is a dead worker's free one */
    acquire(B, 32 * KIB);
    verify();
}

static void trimming_gives_back_what_nobody_uses(void)
{
    new_batch(640 * KIB);
    shml_bhandle_t owner = handle(OWNER);
    shml_slot_t held = acquire(A, 32 * KIB), is_free = acquire(A, 32 * KIB);
    CHECK_EQ(sent(A, &held), SHML_OK);
    CHECK_EQ(adopted(&held), SHML_OK);
    CHECK_EQ(dropped(A, &is_free), SHML_OK);
    shml_slot_t filling = acquire(A, 64 * KIB);
    shml_slot_t of_the_dead = acquire(D, 32 * KIB);
    CHECK_EQ(sent(D, &of_the_dead), SHML_OK);
    CHECK_EQ(shml_batch_trim(&owner), 1); /* D lives: what it sent may yet be adopted */
    world()->is_dead[D] = 1;
    CHECK_EQ(shml_batch_trim(&owner), 1);
    CHECK_EQ(adopted(&of_the_dead), SHML_E_STALE);
    CHECK_EQ(shml_batch_trim(&owner), 0);
    CHECK_EQ(sent(A, &filling), SHML_OK);
    CHECK_EQ(released(&held), SHML_OK);
    CHECK_EQ(shml_batch_trim(&owner), 1);
    verify();
}

static void a_dead_workers_sent_slot_can_still_be_adopted(void)
{
    new_batch(160 * KIB);
    shml_slot_t slot = acquire(D, 32 * KIB);
    CHECK_EQ(sent(D, &slot), SHML_OK);
    world()->is_dead[D] = 1;
    acquire(A, 100 * KIB); /* the budget has room: not needed */
    CHECK_EQ(adopted(&slot), SHML_OK);
}

static void what_a_worker_left_that_unregistered_is_free_for_others(void)
{
    new_batch(64 * KIB);
    shml_slot_t slots[2] = {acquire(D, 32 * KIB), acquire(D, 32 * KIB)};
    CHECK_EQ(sent(D, &slots[0]), SHML_OK);
    shml_bhandle_t h = handle(D);
    shml_batch_unregister(&h); /* its process lives on */
    acquire(A, 32 * KIB);
    acquire(A, 32 * KIB);
    CHECK_EQ(adopted(&slots[0]), SHML_E_STALE);
}

static void smaller_ones_of_the_dead_make_room(void)
{
    new_batch(128 * KIB);
    for (int i = 0; i < 4; i++)
        acquire(D, 32 * KIB);
    world()->is_dead[D] = 1;
    acquire(A, 128 * KIB);
    CHECK_EQ(get_stats().num_slots, 1);
    CHECK_EQ(backed(world()->fd), HEADER_BYTES + 128 * KIB);
    verify();
}

static void a_slot_of_the_dead_that_lacks_memory_gets_it(void)
{
    new_batch(MIB);
    shml_slot_t slot = acquire(D, 32 * KIB);
    handle(A).batch->slots[slot.index].is_backed = 0; /* killed between making it and backing it */
    CHECK(fallocate(world()->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)slot.offset,
                    (off_t)slot.capacity) == 0);
    world()->is_dead[D] = 1;
    CHECK_EQ(acquire(A, 32 * KIB).index, slot.index);
    CHECK_EQ(backed(world()->fd), HEADER_BYTES + 32 * KIB);
}

static void a_newcomer_inherits_a_clean_pool(void)
{
    new_batch(MIB);
    shml_slot_t filling = acquire(D, 32 * KIB), is_sent = acquire(D, 32 * KIB);
    CHECK_EQ(sent(D, &is_sent), SHML_OK);
    shml_bhandle_t old = handle(D), new = handle(-1);
    shml_batch_unregister(&old);
    CHECK_EQ(old.self, -1);
    shml_batch_unregister(&old); /* once more does nothing */
    CHECK_EQ(shml_slot_acquire(&old, KIB, 9, &is_sent), SHML_E_INVAL);
    CHECK_EQ(shml_batch_register(&new, SHML_WORKER), SHML_OK);
    CHECK_EQ(new.self, D);
    CHECK_EQ(get_stats().num_free, 2);
    CHECK_EQ(sent(D, &filling), SHML_E_STALE);
    CHECK_EQ(adopted(&is_sent), SHML_E_STALE);
    CHECK(acquire(D, 32 * KIB).index <= is_sent.index);
    CHECK_EQ(shml_batch_register(&old, SHML_SERVICE), SHML_E_INVAL);
}

/* All places of clients taken; those above D are dead if `dead`. */
static void fill_clients(int dead)
{
    shml_bhandle_t h = handle(-1);
    for (uint32_t i = D + 1; i < SHML_MAX_CLIENTS; i++) {
        CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_OK);
        CHECK_EQ(h.self, i);
        world()->is_dead[i] = (uint8_t)dead;
    }
}

static void places_of_dead_clients_are_given_again(void)
{
    shml_bhandle_t h = handle(-1);
    new_batch(MIB);
    h = handle(-1);
    fill_clients(0);
    CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_E_CLIENTS);
    new_batch(MIB);
    h = handle(-1);
    fill_clients(1);
    CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_OK);
    CHECK_EQ(h.self, D + 1);
    CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_OK);
    CHECK_EQ(h.self, D + 2);
}

static void refused_memory_means_no_slot(void)
{
    shml_memory_t memory;
    CHECK_EQ(shml_memory_read("", &memory), SHML_OK);
    new_batch(MIB);
    uint64_t bytes = 2 * memory.total_bytes + 64 * MIB;
    shml_bhandle_t h = handle(A);
    CHECK(ftruncate(h.fd, (off_t)(bytes * 2)) == 0);
    h.map_bytes = h.batch->map_bytes = bytes * 2; /* never touched beyond MAP_BYTES: it is refused */
    h.batch->budget_bytes = bytes * 2;
    shml_slot_t slot;
    CHECK_EQ(shml_slot_acquire(&h, bytes, 9, &slot), SHML_E_FULL);
    CHECK_EQ(get_stats().num_refused, 1);
    CHECK_EQ(get_stats().num_slots, 0);
    CHECK_EQ(backed(h.fd), HEADER_BYTES);
    CHECK_EQ(shml_slot_acquire(&h, KIB, 9, &slot), SHML_OK);
}

static void freed_ranges_are_used_again_without_overlap(void)
{
    enum { WORKERS = 3, LIVE = 24 };
    new_batch(6 * MIB);
    uint64_t seed = 7;
    struct {
        shml_slot_t slot;
        int worker, state;
    } live[LIVE] = {0};
    uint32_t refused = 0, huge = 0;
    for (int step = 0; step < 20000; step++) {
        int k = (int)(test_random(&seed) % LIVE), worker = (int)(test_random(&seed) % WORKERS);
        test_note("step %d", step);
        switch (live[k].state) {
        case SHML_SLOT_NONE: {
            uint64_t bytes = UINT64_C(1) << (test_random(&seed) % 22);
            shml_bhandle_t h = handle(worker);
            bytes += test_random(&seed) % bytes;
            int rc = shml_slot_acquire(&h, bytes, 10, &live[k].slot);
            CHECK(rc == SHML_OK || rc == SHML_E_FULL);
            refused += rc == SHML_E_FULL;
            if (rc == SHML_OK) {
                huge += live[k].slot.capacity >= MIB;
                CHECK(live[k].slot.capacity >= bytes);
                live[k].worker = worker;
                live[k].state = SHML_SLOT_FILLING;
                world()->memory[live[k].slot.offset] = (uint8_t)k;
                world()->memory[live[k].slot.offset + live[k].slot.capacity - 1] = (uint8_t)k;
            }
            break;
        }
        case SHML_SLOT_FILLING: {
            int drop = test_random(&seed) % 8 == 0;
            CHECK_EQ((drop ? dropped : sent)(live[k].worker, &live[k].slot), SHML_OK);
            live[k].state = drop ? SHML_SLOT_NONE : SHML_SLOT_SENT;
            break;
        }
        case SHML_SLOT_SENT:
            CHECK_EQ(adopted(&live[k].slot), SHML_OK);
            live[k].state = SHML_SLOT_HELD;
            break;
        default:
            CHECK_EQ(world()->memory[live[k].slot.offset], k);
            CHECK_EQ(world()->memory[live[k].slot.offset + live[k].slot.capacity - 1], k);
            CHECK_EQ(released(&live[k].slot), SHML_OK);
            live[k].state = SHML_SLOT_NONE;
        }
        if (step % 64 == 0) {
            verify();
            CHECK_EQ(backed(world()->fd), HEADER_BYTES + get_stats().backed_bytes);
        }
    }
    CHECK(refused > 50 && huge > 50);
}

static int lock_times_out(void *ctx, pthread_mutex_t *mutex, uint32_t timeout_ms)
{
    (void)ctx, (void)mutex;
    return timeout_ms <= 2000 ? ETIMEDOUT : EIO;
}
static int lock_is_lost(void *ctx, pthread_mutex_t *mutex, uint32_t timeout_ms)
{
    (void)ctx, (void)mutex, (void)timeout_ms;
    return ENOTRECOVERABLE;
}

static void a_frozen_holder_of_the_mutex_means_no_slot(void)
{
    new_batch(MIB);
    shml_env_t env = snapshot_env;
    shml_bhandle_t h = handle(A);
    shml_slot_t slot;
    env.lock = lock_times_out;
    h.env = &env;
    CHECK_EQ(shml_slot_acquire(&h, KIB, 9, &slot), SHML_E_FULL);
    CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_E_SYS);
    env.lock = lock_is_lost;
    CHECK_EQ(shml_slot_acquire(&h, KIB, 9, &slot), SHML_E_POISONED);
    CHECK_EQ(try_acquire(B, KIB, 9), SHML_E_POISONED); /* for all, from now on */
}

static void a_dead_holder_is_repaired_after(void)
{
    new_batch(MIB);
    shml_slot_t slot = acquire(A, KIB);
    handle(A).batch->slot_end = 0;
    world()->owner_died = 1;
    acquire(B, KIB);
    CHECK_EQ(handle(A).batch->slot_end, 2);
    CHECK_EQ(sent(A, &slot), SHML_OK);
    verify();
    handle(A).batch->slots[slot.index].offset = MAP_BYTES; /* not a kill's doing: nothing can be trusted any more */
    world()->owner_died = 1;
    CHECK_EQ(try_acquire(B, KIB, 9), SHML_E_POISONED);
    CHECK_EQ(try_acquire(A, KIB, 9), SHML_E_POISONED);
    shml_batch_stats_t stats;
    shml_bhandle_t h = handle(OWNER);
    CHECK_EQ(shml_batch_get_stats(&h, &stats), SHML_E_POISONED);
    CHECK(!world()->is_held);
}

/* Whatever stands in the table: what is given out lies within the mapping. */
static void no_value_in_the_table_can_do_harm(void)
{
    uint64_t seed = 3;
    for (int round = 0; round < 3000; round++) {
        if (round % 500 == 0)
            new_batch(MIB);
        shml_batch_t *batch = handle(A).batch;
        shml_slot_t slot;
        shml_bhandle_t h = handle(A);
        uint32_t held, total;
        test_note("round %d", round);
        batch->is_poisoned = 0;
        for (int k = 0; k < 4; k++) {
            uint64_t value = test_random(&seed) >> (test_random(&seed) % 64);
            shml_batch_slot_t *s = &batch->slots[test_random(&seed) % 8];
            switch (test_random(&seed) % 6) {
            case 0: s->word = value; break;
            case 1:
                s->word = shml_slot_word((uint32_t)value, (uint32_t)(value >> 32) % 5, (uint32_t)(value >> 40) % 6);
                break;
            case 2: s->offset = value; break;
            case 3: s->capacity = value; break;
            case 4: s->is_backed = (uint32_t)value; break;
            default: batch->slot_end = (uint32_t)value;
            }
        }
        world()->owner_died = round % 3 == 0;
        int rc = shml_slot_acquire(&h, 1 + test_random(&seed) % (3 * MIB), 9, &slot);
        if (rc == SHML_OK) {
            CHECK(slot.offset >= SHML_BATCH_DATA_AT && slot.capacity <= MAP_BYTES - slot.offset);
            world()->memory[slot.offset + slot.capacity - 1] = 1;
            (void)sent(A, &slot);
        }
        for (uint32_t i = 0; i < 8; i++) {
            const shml_batch_slot_t *s = &batch->slots[i];
            shml_slot_t token = {s->offset, s->capacity, i, shml_slot_gen(s->word)};
            if (shml_slot_adopt(&h, &token, &held, &total) == SHML_OK)
                CHECK(token.offset >= SHML_BATCH_DATA_AT && token.capacity <= MAP_BYTES - token.offset);
        }
        const char *what;
        world()->owner_died = 0;
        (void)shml_batch_verify(&h, &what);
        shml_batch_unregister(&h);
        batch->is_poisoned = 0;
        batch->clients[A].state = SHML_CLIENT_ACTIVE;
        CHECK(!world()->is_held);
    }
    new_batch(MIB);
}

/* ---------------------------------------------------------------------------------------------------- *
 * Kills at every failpoint, and pairs
 * ---------------------------------------------------------------------------------------------------- */
#define UNIT   (64 * KIB)
#define BUDGET (8 * UNIT)

/* Bytes of slots that `who` must leave alone: held, of other living workers, or in use by itself. */
static uint64_t others_bytes(int who)
{
    uint64_t bytes = 0;
    const shml_batch_t *batch = handle(who).batch;
    for (uint32_t i = 0; i < SHML_MAX_SLOTS; i++) {
        uint64_t word = batch->slots[i].word;
        uint32_t owner = shml_slot_owner(word), state = shml_slot_state(word);
        if (state == SHML_SLOT_HELD || (owner == (uint32_t)who && state != SHML_SLOT_NONE && state != SHML_SLOT_FREE))
            bytes += batch->slots[i].capacity;
        else if (state != SHML_SLOT_NONE && owner != (uint32_t)who && !world()->is_dead[owner] &&
                 batch->clients[owner].state == SHML_CLIENT_ACTIVE)
            bytes += batch->slots[i].capacity;
    }
    return bytes;
}

/* The worker of this depth goes on after a kill: all that the dead had is there again, and all works. */
static void go_on(int depth, const char *point)
{
    (void)point;
    int self = depth == 1 ? B : C;
    world_t *before = &snapshot.worlds[depth - 1];
    shml_batch_stats_t stats = get_stats();
    if (depth == 1) { /* deeper worlds' files are not copied */
        uint64_t sure_bytes = 0;
        for (uint32_t i = 0; i < SHML_MAX_SLOTS; i++)
            sure_bytes += handle(self).batch->slots[i].is_backed ? handle(self).batch->slots[i].capacity : 0;
        CHECK(backed(before->fd) <= HEADER_BYTES + stats.backed_bytes); /* only slots have memory, at any moment */
        CHECK(backed(before->fd) >= HEADER_BYTES + sure_bytes);         /* and those that say so do */
    }
    CHECK(fallocate(world()->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, SHML_BATCH_DATA_AT,
                    (off_t)(MAP_BYTES - SHML_BATCH_DATA_AT)) == 0);
    snapshot.actors[depth] = self;
    snapshot.is_armed[depth] = 1;
    verify();
    shml_slot_t slots[16];
    shml_bhandle_t h = handle(self);
    uint32_t n = 0;
    while (n < 16 && shml_slot_acquire(&h, UNIT, 1000, &slots[n]) == SHML_OK)
        n++;
    snapshot.is_armed[depth] = 0;
    CHECK(n >= (BUDGET - others_bytes(self)) / UNIT);
    verify();
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t j = 0; j < i; j++)
            CHECK(slots[i].offset >= slots[j].offset + slots[j].capacity ||
                  slots[j].offset >= slots[i].offset + slots[i].capacity);
        CHECK_EQ(sent(self, &slots[i]), SHML_OK);
        CHECK_EQ(adopted(&slots[i]), SHML_OK);
        CHECK_EQ(released(&slots[i]), SHML_OK);
    }
    verify();
}

static void fill_and_send(void)
{
    shml_slot_t first = acquire(A, UNIT), second = acquire(A, UNIT);
    CHECK_EQ(sent(A, &first), SHML_OK);
    CHECK_EQ(dropped(A, &second), SHML_OK);
    second = acquire(A, UNIT);
    CHECK_EQ(sent(A, &second), SHML_OK);
}
static void adopt_and_release(void)
{
    shml_slot_t first = acquire(A, UNIT), second = acquire(A, UNIT);
    CHECK_EQ(sent(A, &first), SHML_OK);
    CHECK_EQ(sent(A, &second), SHML_OK);
    CHECK_EQ(adopted(&first), SHML_OK);
    CHECK_EQ(adopted(&second), SHML_OK);
    CHECK_EQ(released(&first), SHML_OK);
}
static void inherit_and_discard(void)
{
    for (int i = 0; i < 3; i++)
        acquire(A, UNIT); /* of D, who died */
    shml_slot_t small = acquire(A, 4 * KIB);
    CHECK_EQ(dropped(A, &small), SHML_OK);
    acquire(A, 3 * UNIT); /* in the place of several */
}
static void enter_and_leave(void)
{
    shml_bhandle_t h = handle(-1);
    snapshot.actors[0] = D + 1;
    CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_OK);
    CHECK_EQ(h.self, D + 1);
    shml_slot_t slot = acquire(h.self, UNIT);
    CHECK_EQ(sent(h.self, &slot), SHML_OK);
    acquire(h.self, UNIT);
    shml_batch_unregister(&h);
    CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_OK); /* sweeps what it left itself */
    CHECK_EQ(h.self, D + 1);
}
static void enter_a_full_ring(void)
{
    shml_bhandle_t h = handle(-1);
    snapshot.actors[0] = -1;
    CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_OK);
}
static void repair_after_a_kill(void)
{
    world()->owner_died = 1;
    acquire(A, UNIT);
}

static void a_kill_at_any_point_loses_nothing(void)
{
    uint64_t kills = 0, pairs = 0;
    void (*const acts[])(void) = {fill_and_send,   adopt_and_release, inherit_and_discard,
                                  enter_and_leave, enter_a_full_ring, repair_after_a_kill};
    for (size_t i = 0; i < sizeof acts / sizeof *acts; i++) {
        new_batch(BUDGET);
        shml_slot_t slot = acquire(C, UNIT); /* somebody else's, busy */
        if (acts[i] == inherit_and_discard) {
            for (int k = 0; k < 5; k++) {
                slot = acquire(D, k == 4 ? 8 * KIB : UNIT);
                if (k == 1 || k == 4)
                    CHECK_EQ(sent(D, &slot), SHML_OK);
                if (k == 2)
                    CHECK_EQ(dropped(D, &slot), SHML_OK);
            }
            world()->is_dead[D] = 1;
        }
        if (acts[i] == enter_a_full_ring) {
            fill_clients(0);
            slot = acquire(D + 5, UNIT);
            slot = acquire(D + 5, UNIT);
            CHECK_EQ(sent(D + 5, &slot), SHML_OK);
            for (int k = D + 1; k < D + 8; k++)
                world()->is_dead[k] = 1;
        }
        snapshot_run(acts[i] == adopt_and_release ? OWNER : A, 2, acts[i], go_on);
        CHECK(snapshot.num_kills[0] > 0);
        kills += snapshot.num_kills[0];
        pairs += snapshot.num_kills[1];
    }
    CHECK(kills > 50 && pairs > 1000);
    printf("batch: %llu kills, %llu pairs\n", (unsigned long long)kills, (unsigned long long)pairs);
}

static void every_failpoint_was_passed(void)
{
    snapshot_check_coverage("batch.c", "");
    snapshot_check_coverage("slot.c", "");
}

/* ---------------------------------------------------------------------------------------------------- *
 * Real processes, real kills
 * ---------------------------------------------------------------------------------------------------- */
#define NUM_WORKERS 4
#define NUM_KILLS   60
#define MAX_HELD    6

typedef struct message {
    shml_slot_t slot;
    uint64_t stamp;
} message_t;

static shml_bhandle_t real_handle(void)
{
    return (shml_bhandle_t){(shml_batch_t *)(void *)snapshot.worlds[0].memory, MAP_BYTES, snapshot.worlds[0].fd, -1,
                            &shml_env_linux};
}

static void worker(int out, uint64_t seed)
{
    shml_bhandle_t h = real_handle();
    CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_OK);
    for (;;) {
        message_t message = {.stamp = test_random(&seed)};
        uint64_t bytes = (1 + test_random(&seed) % 12) * 4 * KIB;
        int rc = shml_slot_acquire(&h, bytes, 3, &message.slot);
        if (rc == SHML_E_FULL) {
            usleep(200);
            continue;
        }
        CHECK_EQ(rc, SHML_OK);
        uint64_t *words = (uint64_t *)(void *)((uint8_t *)h.batch + message.slot.offset);
        for (uint64_t i = 0; i < message.slot.capacity / 8; i++)
            words[i] = message.stamp + i;
        if (test_random(&seed) % 8 == 0) {
            CHECK_EQ(shml_slot_drop(&h, &message.slot), SHML_OK);
            continue;
        }
        CHECK_EQ(shml_slot_send(&h, &message.slot), SHML_OK);
        CHECK_EQ(write(out, &message, sizeof message), sizeof message);
    }
}

static void check_stamp(const message_t *message)
{
    const uint64_t *words = (const uint64_t *)(const void *)(snapshot.worlds[0].memory + message->slot.offset);
    for (uint64_t i = 0; i < message->slot.capacity / 8; i++)
        CHECK_EQ(words[i], message->stamp + i);
}

static pid_t start_worker(int pipe_fds[2], uint64_t seed)
{
    pid_t pid = test_child();
    CHECK(pid >= 0);
    if (pid == 0) {
        close(pipe_fds[0]);
        worker(pipe_fds[1], seed);
        _exit(0);
    }
    return pid;
}

static void killed_workers_leave_nothing_broken(void)
{
    int pipe_fds[2], num_kills = 0;
    uint64_t seed = 11, num_adopted = 0, num_stale = 0;
    pid_t pids[NUM_WORKERS];
    message_t held[MAX_HELD];
    int num_held = 0;
    shml_failpoint = NULL;
    if (snapshot.worlds[0].memory != NULL) {
        shml_unmap(snapshot.worlds[0].memory, MAP_BYTES);
        close(snapshot.worlds[0].fd);
    }
    int fd = memfd_create("shml_batch_test", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)MAP_BYTES) == 0);
    /* Not shml_map: the children shall have it, too. */
    void *memory = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(memory != MAP_FAILED && pipe(pipe_fds) == 0);
    snapshot.worlds[0] = (world_t){.memory = memory, .fd = fd};
    shml_bhandle_t owner = real_handle();
    CHECK(fallocate(fd, 0, 0, HEADER_BYTES) == 0);
    CHECK_EQ(shml_batch_format(memory, MAP_BYTES, 400 * KIB), SHML_OK);
    CHECK_EQ(shml_batch_register(&owner, SHML_OWNER), SHML_OK);
    for (int i = 0; i < NUM_WORKERS; i++)
        pids[i] = start_worker(pipe_fds, test_random(&seed));
    while (num_kills < NUM_KILLS) {
        message_t message;
        struct pollfd ready = {.fd = pipe_fds[0], .events = POLLIN};
        test_note("kill %d", num_kills);
        if (poll(&ready, 1, 20) > 0) {
            uint32_t num, total;
            CHECK_EQ(read(pipe_fds[0], &message, sizeof message), sizeof message);
            int rc = shml_slot_adopt(&owner, &message.slot, &num, &total);
            CHECK(rc == SHML_OK || rc == SHML_E_STALE);
            num_adopted += rc == SHML_OK;
            num_stale += rc == SHML_E_STALE;
            if (rc == SHML_OK) {
                check_stamp(&message);
                if (num_held == MAX_HELD) {
                    int k = (int)(test_random(&seed) % MAX_HELD);
                    check_stamp(&held[k]); /* untouched as long as it was held */
                    CHECK_EQ(shml_slot_release(&owner, &held[k].slot), SHML_OK);
                    held[k] = held[--num_held];
                }
                held[num_held++] = message;
            }
        }
        if (test_random(&seed) % 16 == 0) {
            int status, k = (int)(test_random(&seed) % NUM_WORKERS);
            usleep((useconds_t)(test_random(&seed) % 3000));
            CHECK(kill(pids[k], SIGKILL) == 0 && waitpid(pids[k], &status, 0) == pids[k]);
            CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL); /* not 99: its checks held */
            pids[k] = start_worker(pipe_fds, test_random(&seed));
            num_kills++;
            const char *what;
            int rc = shml_batch_verify(&owner, &what);
            if (rc != SHML_OK)
                test_fail(__FILE__, __LINE__, "verify: %d %s", rc, what != NULL ? what : "");
        }
    }
    for (int i = 0; i < NUM_WORKERS; i++)
        CHECK(kill(pids[i], SIGKILL) == 0 && waitpid(pids[i], NULL, 0) == pids[i]);
    CHECK(num_adopted > 20);
    for (int k = 0; k < num_held; k++) {
        check_stamp(&held[k]);
        CHECK_EQ(shml_slot_release(&owner, &held[k].slot), SHML_OK);
    }
    /* One last worker gets the whole budget. */
    pid_t last = test_child();
    if (last == 0) {
        shml_bhandle_t h = real_handle();
        shml_slot_t slot;
        CHECK_EQ(shml_batch_register(&h, SHML_WORKER), SHML_OK);
        CHECK_EQ(shml_slot_acquire(&h, 384 * KIB, 1, &slot), SHML_OK);
        _exit(0);
    }
    int status;
    CHECK(waitpid(last, &status, 0) == last && status == 0);
    shml_batch_stats_t stats;
    CHECK_EQ(shml_batch_get_stats(&owner, &stats), SHML_OK);
    CHECK_EQ(backed(fd), HEADER_BYTES + stats.backed_bytes);
    printf("batch: %d kills, %llu adopted, %llu stale\n", num_kills, (unsigned long long)num_adopted,
           (unsigned long long)num_stale);
    close(pipe_fds[0]), close(pipe_fds[1]);
}

TEST_MAIN(TEST(only_a_batch_ring_is_taken_for_one), TEST(a_slot_goes_round),
          TEST(own_free_slots_need_no_mutex_and_no_questions), TEST(a_stale_token_changes_nothing),
          TEST(generations_wrap_round), TEST(the_smallest_that_fits_is_taken),
          TEST(capacities_are_rounded_so_that_sizes_share), TEST(large_slots_begin_at_huge_pages),
          TEST(max_slots_and_budget_bound_a_worker), TEST(growing_batches_give_small_slots_back),
          TEST(too_many_small_slots_make_way_for_one_that_fits), TEST(nothing_is_given_back_in_vain),
          TEST(what_a_dead_worker_left_is_free_for_others), TEST(trimming_gives_back_what_nobody_uses),
          TEST(a_dead_workers_sent_slot_can_still_be_adopted),
          TEST(what_a_worker_left_that_unregistered_is_free_for_others), TEST(smaller_ones_of_the_dead_make_room),
          TEST(a_slot_of_the_dead_that_lacks_memory_gets_it), TEST(a_newcomer_inherits_a_clean_pool),
          TEST(places_of_dead_clients_are_given_again), TEST(refused_memory_means_no_slot),
          TEST(freed_ranges_are_used_again_without_overlap), TEST(a_frozen_holder_of_the_mutex_means_no_slot),
          TEST(a_dead_holder_is_repaired_after), TEST(no_value_in_the_table_can_do_harm),
          TEST(a_kill_at_any_point_loses_nothing), TEST(every_failpoint_was_passed),
          TEST(killed_workers_leave_nothing_broken))
