/* bench_gather.c - how fast is shml_gather, beside memcpy of the same bytes?
 *
 * make -C native_tests bench. The ring holds more than the caches do, records are taken in random order, each
 * batch goes to the next of a few slots, as a worker does. Median of rounds. Checks what it gathered. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "layout.h"

#define RING_BYTES (UINT64_C(512) << 20)
#define SLOT_BYTES (UINT64_C(48) << 20)
#define NUM_SLOTS  3
#define BATCH      64u
#define ROUNDS     9

static uint8_t *ring, *slots;
static shml_ref_t *refs;
static uint32_t num_records;

static uint64_t seed = 1;
static uint32_t random_below(uint32_t n)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (uint32_t)((seed >> 16) % n);
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint8_t *map(uint64_t bytes)
{
    uint8_t *at = mmap(NULL, bytes + SHML_HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    at = (uint8_t *)(((uintptr_t)at + SHML_HUGE_BYTES - 1) & ~(uintptr_t)(SHML_HUGE_BYTES - 1));
    memset(at, 7, bytes);
    for (uint64_t i = 0; i < bytes; i += SHML_HUGE_BYTES)
        madvise(at + i, SHML_HUGE_BYTES, 25 /* MADV_COLLAPSE */);
    return at;
}

/* One field of n items of item_bytes (n varies by up to `vary`), and a label. */
static void make_records(uint32_t items, uint32_t vary, uint32_t item_bytes, uint32_t rank, const uint32_t *dims)
{
    uint64_t at = 0, head = shml_align(sizeof(shml_record_t) + 2 * sizeof(shml_field_t));
    num_records = 0;
    for (;; num_records++) {
        uint32_t count = items - (vary > 0 ? random_below(vary) : 0);
        uint64_t bytes = shml_align(head + shml_align((uint64_t)count * item_bytes) + 8);
        if (at + bytes > RING_BYTES)
            break;
        shml_record_t record = {2, 0, 0};
        shml_field_t field[2] = {{head, (uint64_t)count * item_bytes, {0}},
                                 {head + shml_align((uint64_t)count * item_bytes), 8, {0}}};
        memcpy(field[0].dims, dims, rank * sizeof *dims);
        if (rank == 1)
            field[0].dims[0] = count;
        memcpy(ring + at, &record, sizeof record);
        memcpy(ring + at + sizeof record, field, sizeof field);
        refs[num_records] = (shml_ref_t){.offset = at, .num_bytes = bytes};
        at += bytes;
    }
    for (uint32_t i = num_records - 1; i > 0; i--) {
        uint32_t j = random_below(i + 1);
        shml_ref_t swap = refs[i];
        refs[i] = refs[j], refs[j] = swap;
    }
}

static int compare(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

enum variant { MEMCPY, GATHER };

static void measure(const char *name, enum variant variant, shml_gather_t *ops, uint32_t num_ops, uint64_t out_bytes)
{
    double took[ROUNDS], bytes = 0;
    uint32_t batches = num_records / BATCH;
    for (int round = 0; round < ROUNDS; round++) {
        double from = now_s();
        bytes = 0;
        for (uint32_t b = 0; b < batches; b++) {
            uint8_t *slot = slots + (b % NUM_SLOTS) * SLOT_BYTES;
            const shml_ref_t *some = refs + (uint64_t)b * BATCH;
            if (variant == MEMCPY) {
                for (uint32_t i = 0; i < BATCH; i++)
                    memcpy(slot + i * out_bytes, ring + some[i].offset, out_bytes);
            } else {
                uint8_t *out = slot;
                for (uint32_t o = 0; o < num_ops; o++) {
                    ops[o].out = out;
                    ops[o].out_bytes = (uint64_t)(slot + SLOT_BYTES - out);
                    out += o == 0 ? BATCH * out_bytes : BATCH * 512 * 8;
                }
                if (shml_gather(ring, RING_BYTES, some, BATCH, NULL, ops, num_ops) != SHML_OK)
                    exit((printf("%s: gather failed\n", name), 1));
            }
            bytes += (double)(BATCH * out_bytes);
        }
        took[round] = now_s() - from;
    }
    qsort(took, ROUNDS, sizeof *took, compare);
    double t = took[ROUNDS / 2];
    printf("%-34s %6.2f GB/s out (%5.2f..%5.2f)  %9.0f samples/s  %7.1f us/batch\n", name, bytes / t * 1e-9,
           bytes / took[ROUNDS - 1] * 1e-9, bytes / took[0] * 1e-9, batches * BATCH / t, t / batches * 1e6);
}

int main(void)
{
    ring = map(RING_BYTES);
    slots = map(NUM_SLOTS * SLOT_BYTES);
    refs = malloc(RING_BYTES / 256 * sizeof *refs);

    const uint32_t image[3] = {3, 224, 224}, image_bytes = 3 * 224 * 224;
    make_records(image_bytes, 0, 1, 3, image);
    shml_gather_t copy = {.op = SHML_COPY, .item_bytes = 1, .rank = 3, .dims = {3, 224, 224}};
    shml_gather_t labels = {.op = SHML_COPY, .field = 1, .item_bytes = 8};
    measure("image 150 KB, memcpy", MEMCPY, NULL, 0, image_bytes);
    measure("image 150 KB, gather", GATHER, (shml_gather_t[]){copy, labels}, 2, image_bytes);
    shml_gather_t normalize = copy;
    normalize.op = SHML_NORMALIZE, normalize.num_channels = 3;
    for (int c = 0; c < 3; c++)
        normalize.scale[c] = 1 / 57.0f, normalize.shift[c] = -2;
    measure("image 150 KB -> float32 600 KB", GATHER, (shml_gather_t[]){normalize, labels}, 2, image_bytes * 4);

    const uint32_t text[1] = {512};
    shml_gather_t ids = {.op = SHML_COPY, .item_bytes = 8, .rank = 1, .dims = {512}};
    shml_gather_t targets = ids, mask = {.op = SHML_MASK, .item_bytes = 8, .rank = 1, .dims = {512}};
    memset(targets.pad, 0xff, 8), targets.pad[0] = 0x9c; /* -100 */
    make_records(512, 0, 8, 1, text);
    measure("text 512 ids, memcpy", MEMCPY, NULL, 0, 4096);
    measure("text 512 ids, gather", GATHER, (shml_gather_t[]){ids}, 1, 4096);
    measure("text 512 ids, labels and mask", GATHER, (shml_gather_t[]){ids, targets, mask}, 3, 4096);
    make_records(512, 480, 8, 1, text);
    measure("text 33..512 ids, gather", GATHER, (shml_gather_t[]){ids}, 1, 4096);
    measure("text 33..512 ids, labels and mask", GATHER, (shml_gather_t[]){ids, targets, mask}, 3, 4096);
    return 0;
}
