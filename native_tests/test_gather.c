/* Records to tensors: right values, and no bad record makes an access out of bounds (ASan watches the edges: ring and
 * outputs are allocations of exactly their size). */
#include "layout.h"
#include "test.h"

#define NUM_FIELDS  4 /* text int64 [L], image uint8 [3, 5, 7], label int64 [], wide 16-byte items [n] */
#define IMAGE_BYTES (3 * 5 * 7)
#define HEAD_BYTES  192 /* 16 + 4 * 40, to the next 64 */

typedef struct batch_of_records {
    uint8_t *ring;
    uint64_t ring_bytes;
    shml_ref_t refs[64];
    uint32_t n;
} records_t;

static uint64_t put_field(uint8_t *record, uint32_t index, uint64_t at, uint64_t num_bytes, uint32_t rank,
                          const uint32_t *dims)
{
    shml_field_t field = {at, num_bytes, {0}};
    for (uint32_t d = 0; d < rank; d++)
        field.dims[d] = dims[d];
    memcpy(record + sizeof(shml_record_t) + index * sizeof field, &field, sizeof field);
    return at + shml_align(num_bytes);
}

/* Record i has i % 6 text items; every fifth has no image; wide has i % 3 items. Values tell where they come from. */
static records_t make_records(uint32_t n)
{
    records_t r = {NULL, 0, {{0}}, n};
    r.ring_bytes = (uint64_t)n * 1024;
    r.ring = aligned_alloc(64, r.ring_bytes);
    memset(r.ring, 0xee, r.ring_bytes);
    for (uint32_t i = 0; i < n; i++) {
        uint8_t *record = r.ring + (uint64_t)i * 1024;
        shml_record_t head = {NUM_FIELDS, 10 + i, 0};
        memcpy(record, &head, sizeof head);
        uint64_t at = HEAD_BYTES;
        uint32_t length = i % 6, wide = i % 3;
        for (uint32_t k = 0; k < length; k++)
            memcpy(record + at + 8 * k, &(int64_t){100 * i + k}, 8);
        at = put_field(record, 0, at, length * 8, 1, &length);
        if (i % 5 == 4) {
            put_field(record, 1, 0, 0, 0, NULL);
        } else {
            for (uint32_t k = 0; k < IMAGE_BYTES; k++)
                record[at + k] = (uint8_t)(i + k);
            at = put_field(record, 1, at, IMAGE_BYTES, 3, (uint32_t[]){3, 5, 7});
        }
        memcpy(record + at, &(int64_t){-(int64_t)i}, 8);
        at = put_field(record, 2, at, 8, 0, NULL);
        memset(record + at, (int)i, wide * 16);
        at = put_field(record, 3, at, wide * 16, 1, &wide);
        r.refs[i] = (shml_ref_t){.offset = (uint64_t)i * 1024, .num_bytes = at};
    }
    return r;
}

static int gather(const records_t *r, const uint32_t *rows, const shml_gather_t *ops, uint32_t num_ops)
{
    return shml_gather(r->ring, r->ring_bytes, r->refs, r->n, rows, ops, num_ops);
}

static void *new_out(shml_gather_t *op, uint64_t bytes)
{
    op->out = malloc(bytes);
    op->out_bytes = bytes;
    memset(op->out, 0xcd, bytes);
    return op->out;
}

static shml_gather_t text_op(void) { return (shml_gather_t){.op = SHML_COPY, .item_bytes = 8, .rank = 1, .dims = {5}}; }
static shml_gather_t image_op(void)
{
    return (shml_gather_t){.op = SHML_COPY, .field = 1, .item_bytes = 1, .rank = 3, .dims = {3, 5, 7}};
}

static void copy_pads_shorter_rows(void)
{
    records_t r = make_records(13);
    shml_gather_t op = text_op();
    memcpy(op.pad, &(int64_t){-100}, 8);
    int64_t *out = new_out(&op, 13 * 5 * 8);
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_OK);
    for (uint32_t i = 0; i < 13; i++)
        for (uint32_t k = 0; k < 5; k++)
            CHECK_EQ(out[i * 5 + k], k < i % 6 ? (int64_t)(100 * i + k) : -100);
    free(op.out), free(r.ring);
}

static void rows_place_records_anywhere(void)
{
    records_t r = make_records(4);
    shml_gather_t op = {.op = SHML_COPY, .field = 2, .item_bytes = 8};
    int64_t *out = new_out(&op, 6 * 8);
    CHECK_EQ(gather(&r, (uint32_t[]){5, 0, 3, 1}, &op, 1), SHML_OK);
    CHECK_EQ(out[5], 0);
    CHECK_EQ(out[0], -1);
    CHECK_EQ(out[3], -2);
    CHECK_EQ(out[1], -3);
    CHECK_EQ((uint64_t)out[2], UINT64_C(0xcdcdcdcdcdcdcdcd)); /* a place that no record went to stays as it was */
    CHECK_EQ(gather(&r, (uint32_t[]){5, 6, 0, 0}, &op, 1), SHML_E_INVAL);
    CHECK_EQ(gather(&r, (uint32_t[]){5, UINT32_MAX, 0, 0}, &op, 1), SHML_E_INVAL);
    free(op.out), free(r.ring);
}

static void normalize_gives_the_bits_of_float_arithmetic(void)
{
    records_t r = make_records(10);
    shml_gather_t op = image_op();
    op.op = SHML_NORMALIZE, op.num_channels = 3;
    for (int c = 0; c < 3; c++)
        op.scale[c] = 1.0f / (57.0f + (float)c), op.shift[c] = -2.1f + (float)c;
    float *out = new_out(&op, 10 * IMAGE_BYTES * 4);
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_OK);
    for (uint32_t i = 0; i < 10; i++)
        for (uint32_t k = 0; k < IMAGE_BYTES; k++) {
            volatile float product = (float)(uint8_t)(i + k) * op.scale[k / 35];
            float want = i % 5 == 4 ? 0.0f : product + op.shift[k / 35]; /* an absent sample: the pad */
            CHECK(memcmp(&out[i * IMAGE_BYTES + k], &want, 4) == 0);
        }
    free(op.out), free(r.ring);
}

static void masks_presence_and_source(void)
{
    records_t r = make_records(12);
    shml_gather_t ops[4] = {{.op = SHML_MASK, .rank = 1, .dims = {7}},
                            {.op = SHML_PRESENT, .field = 1},
                            {.op = SHML_SOURCE, .field = 99},
                            {.op = SHML_MASK, .field = 1, .rank = 3, .dims = {3, 5, 7}}};
    int64_t *mask = new_out(&ops[0], 12 * 7 * 8), *source = new_out(&ops[2], 12 * 8);
    uint8_t *present = new_out(&ops[1], 12);
    int64_t *image_mask = new_out(&ops[3], 12 * 3 * 8);
    CHECK_EQ(gather(&r, NULL, ops, 4), SHML_OK);
    for (uint32_t i = 0; i < 12; i++) {
        for (uint32_t k = 0; k < 7; k++)
            CHECK_EQ(mask[i * 7 + k], k < i % 6);
        CHECK_EQ(present[i], i % 5 != 4);
        CHECK_EQ(source[i], 10 + i);
        for (uint32_t k = 0; k < 3; k++)
            CHECK_EQ(image_mask[i * 3 + k], i % 5 != 4);
    }
    for (int o = 0; o < 4; o++)
        free(ops[o].out);
    free(r.ring);
}

static void every_item_size_is_padded_with_its_own_pattern(void)
{
    for (uint32_t size = 1; size <= 16; size *= 2)
        for (uint32_t have = 0; have <= 70; have++) {
            uint64_t ring_bytes = shml_align(64 + (uint64_t)have * size);
            uint8_t *ring = aligned_alloc(64, ring_bytes);
            shml_record_t head = {1, 0, 0};
            memcpy(ring, &head, sizeof head);
            memset(ring + 64, 0x55, ring_bytes - 64);
            put_field(ring, 0, 64, (uint64_t)have * size, 1, &have);
            shml_gather_t op = {.op = SHML_COPY, .item_bytes = size, .rank = 1, .dims = {70}};
            for (uint32_t b = 0; b < 16; b++)
                op.pad[b] = (uint8_t)(b + 1);
            new_out(&op, 70 * size);
            shml_ref_t ref = {.num_bytes = ring_bytes};
            CHECK_EQ(shml_gather(ring, ring_bytes, &ref, 1, NULL, &op, 1), SHML_OK);
            for (uint32_t b = 0; b < 70 * size; b++)
                CHECK_EQ(op.out[b], b < have * size ? 0x55 : b % size + 1);
            free(op.out), free(ring);
        }
}

static void more_ops_than_go_at_once(void)
{
    enum { NUM_OPS = 37 };
    records_t r = make_records(3);
    shml_gather_t ops[NUM_OPS];
    for (int o = 0; o < NUM_OPS; o++) {
        ops[o] = (shml_gather_t){.op = SHML_COPY, .field = 2, .item_bytes = 8};
        new_out(&ops[o], 3 * 8);
    }
    CHECK_EQ(gather(&r, NULL, ops, NUM_OPS), SHML_OK);
    for (int o = 0; o < NUM_OPS; o++) {
        CHECK_EQ(((int64_t *)(void *)ops[o].out)[2], -2);
        free(ops[o].out);
    }
    free(r.ring);
}

static void an_output_too_small_is_refused(void)
{
    records_t r = make_records(3);
    shml_gather_t op = text_op(), image = image_op();
    new_out(&op, 3 * 5 * 8);
    op.out_bytes--;
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_E_INVAL);
    op.out_bytes++;
    const uint32_t huge[3] = {UINT32_MAX, UINT32_MAX, UINT32_MAX}; /* the product wraps round 64 bits */
    op.rank = 3;
    memcpy(op.dims, huge, sizeof huge);
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_E_INVAL);
    image.out = op.out, image.out_bytes = op.out_bytes;
    for (uint32_t size = 0; size < 40; size++) {
        image.item_bytes = size;
        if (size != 1 && size != 2 && size != 4 && size != 8 && size != 16)
            CHECK_EQ(gather(&r, NULL, &image, 1), SHML_E_INVAL);
    }
    image.item_bytes = 1, image.rank = SHML_MAX_RANK + 1;
    CHECK_EQ(gather(&r, NULL, &image, 1), SHML_E_INVAL);
    image.op = 77, image.rank = 3;
    CHECK_EQ(gather(&r, NULL, &image, 1), SHML_E_INVAL);
    image.op = SHML_NORMALIZE, image.num_channels = 2;
    CHECK_EQ(gather(&r, NULL, &image, 1), SHML_E_INVAL);
    image.num_channels = 17, image.dims[0] = 17;
    CHECK_EQ(gather(&r, NULL, &image, 1), SHML_E_INVAL);
    free(op.out), free(r.ring);
}

static void nothing_to_gather_is_fine(void)
{
    records_t r = make_records(2);
    shml_gather_t op = text_op();
    r.n = 0;
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_OK);
    r.n = 2;
    op.dims[0] = 0; /* no bytes wanted: no output needed, but record 1 has an item too many */
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_E_CORRUPT);
    r.n = 1;
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_OK);
    op.op = SHML_MASK;
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_OK);
    free(r.ring);
}

static void another_shape_is_corrupt(void)
{
    records_t r = make_records(4);
    shml_gather_t op = image_op();
    new_out(&op, 4 * 2 * IMAGE_BYTES);
    op.dims[2] = 6;
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_E_CORRUPT);
    op.dims[2] = 7, op.dims[0] = 2; /* a longer first dimension than there is place for */
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_E_CORRUPT);
    op.dims[0] = 4; /* a shorter one is padded */
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_OK);
    op.op = SHML_NORMALIZE, op.num_channels = 4, op.out_bytes = 0;
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_E_INVAL);
    free(op.out);
    new_out(&op, 4 * 4 * 35 * 4);
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_E_CORRUPT); /* but not of channels */
    op.op = SHML_COPY, op.item_bytes = 2;
    CHECK_EQ(gather(&r, NULL, &op, 1), SHML_E_CORRUPT);
    free(op.out), free(r.ring);
}

static void measure_finds_the_extent_of_each_field(void)
{
    records_t r = make_records(11);
    shml_measure_t m[NUM_FIELDS + 2];
    CHECK_EQ(shml_measure(r.ring, r.ring_bytes, r.refs, r.n, NUM_FIELDS + 2, m), SHML_OK);
    CHECK_EQ(m[0].min_dims[0], 0);
    CHECK_EQ(m[0].max_dims[0], 5);
    CHECK_EQ(m[0].num_absent, 0);
    CHECK_EQ(m[1].min_dims[2], 7);
    CHECK_EQ(m[1].max_dims[0], 3);
    CHECK_EQ(m[1].num_absent, 2);
    CHECK_EQ(m[2].max_dims[0], 0);
    CHECK_EQ(m[NUM_FIELDS].num_absent, 11); /* fields that the records do not have at all */
    CHECK_EQ(m[NUM_FIELDS + 1].max_dims[0], 0);
    free(r.ring);
}

static void a_field_is_found_by_its_index(void)
{
    records_t r = make_records(5);
    shml_field_t field;
    const uint8_t *record = r.ring + 4 * 1024;
    CHECK_EQ(shml_record_field(record, r.refs[4].num_bytes, 0, &field), SHML_OK);
    CHECK_EQ(field.dims[0], 4);
    CHECK_EQ(field.num_bytes, 32);
    CHECK_EQ(shml_record_field(record, r.refs[4].num_bytes, 1, &field), SHML_E_NOTFOUND);
    CHECK_EQ(shml_record_field(record, r.refs[4].num_bytes, NUM_FIELDS, &field), SHML_E_NOTFOUND);
    CHECK_EQ(shml_record_field(record, r.refs[4].num_bytes, UINT32_MAX, &field), SHML_E_NOTFOUND);
    CHECK_EQ(shml_record_field(record, 15, 0, &field), SHML_E_CORRUPT);
    CHECK_EQ(shml_record_field(record, 0, 0, &field), SHML_E_CORRUPT);
    CHECK_EQ(shml_record_field(record, HEAD_BYTES - 64, 0, &field), SHML_E_CORRUPT); /* cut inside the table */
    free(r.ring);
}

static void a_record_of_a_bad_ref_is_not_read(void)
{
    records_t r = make_records(2);
    shml_gather_t op = text_op();
    shml_measure_t measure;
    const struct {
        uint64_t offset, num_bytes;
        uint32_t status;
        int want;
    } bad[] = {
        {2048, 64, 0, SHML_E_CORRUPT},
        {1024, 1088, 0, SHML_E_CORRUPT},
        {UINT64_MAX, 64, 0, SHML_E_CORRUPT},
        {64, UINT64_MAX, 0, SHML_E_CORRUPT},
        {UINT64_MAX - 63, 128, 0, SHML_E_CORRUPT},
        {8, 512, 0, SHML_E_CORRUPT},
        {2048, 0, 0, SHML_E_CORRUPT},
        {0, 0, 0, SHML_E_CORRUPT},
        {0, 1024, SHML_REF_ERROR, SHML_E_INVAL},
        {0, 1024, SHML_REF_MISSING, SHML_E_INVAL},
    };
    new_out(&op, 2 * 5 * 8);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        shml_ref_t refs[2] = {{.offset = bad[i].offset, .num_bytes = bad[i].num_bytes, .status = bad[i].status},
                              {.offset = bad[i].offset, .num_bytes = bad[i].num_bytes, .status = bad[i].status}};
        test_note("case %zu", i);
        CHECK_EQ(shml_gather(r.ring, r.ring_bytes, refs, 2, NULL, &op, 1), bad[i].want);
        CHECK_EQ(shml_measure(r.ring, r.ring_bytes, refs, 2, 1, &measure), bad[i].want);
    }
    free(op.out), free(r.ring);
}

/* Any byte of the head, any value; then many at once. What comes back is OK or CORRUPT; ASan and UBSan do the rest. */
static void no_byte_of_a_head_can_do_harm(void)
{
    static const uint8_t values[] = {0, 1, 2, 7, 0x3f, 0x40, 0x7f, 0x80, 0xc0, 0xff};
    uint64_t seed = 1;
    records_t r = make_records(3);
    uint8_t clean[HEAD_BYTES];
    uint32_t num_ok = 0, num_corrupt = 0;
    shml_gather_t ops[6] = {text_op(),
                            image_op(),
                            {.op = SHML_COPY, .field = 2, .item_bytes = 8},
                            {.op = SHML_MASK, .rank = 1, .dims = {5}},
                            image_op(),
                            {.op = SHML_COPY, .field = 3, .item_bytes = 16, .rank = 1, .dims = {2}}};
    ops[4].op = SHML_NORMALIZE, ops[4].num_channels = 3;
    const uint64_t place_bytes[6] = {40, IMAGE_BYTES, 8, 40, IMAGE_BYTES * 4, 32};
    for (int o = 0; o < 6; o++)
        new_out(&ops[o], 3 * place_bytes[o]);
    memcpy(clean, r.ring + 2048, sizeof clean); /* the last record: beyond it the ring ends */
    r.refs[2].num_bytes = 1024;
    for (uint32_t round = 0; round < sizeof clean * sizeof values + 20000; round++) {
        uint8_t *head = r.ring + 2048;
        if (round < sizeof clean * sizeof values) {
            head[round / sizeof values] = values[round % sizeof values];
        } else {
            for (uint64_t k = test_random(&seed) % 6 + 1; k > 0; k--)
                head[test_random(&seed) % sizeof clean] = values[test_random(&seed) % sizeof values];
        }
        test_note("round %u", round);
        shml_measure_t measures[NUM_FIELDS];
        shml_field_t field;
        int rc = shml_measure(r.ring, r.ring_bytes, r.refs, 3, NUM_FIELDS, measures);
        CHECK(rc == SHML_OK || rc == SHML_E_CORRUPT);
        for (uint32_t f = 0; f < NUM_FIELDS; f++)
            if (shml_record_field(head, 1024, f, &field) == SHML_OK)
                CHECK(field.offset <= 1024 && field.num_bytes <= 1024 - field.offset && field.offset % 64 == 0);
        rc = gather(&r, NULL, ops, 6);
        CHECK(rc == SHML_OK || rc == SHML_E_CORRUPT);
        num_ok += rc == SHML_OK;
        num_corrupt += rc == SHML_E_CORRUPT;
        memcpy(head, clean, sizeof clean);
    }
    CHECK(num_ok > 100 && num_corrupt > 100);
    for (int o = 0; o < 6; o++)
        free(ops[o].out);
    free(r.ring);
}

/* All sizes of a row: the vector loop's heads and tails. */
static void normalize_of_any_length(void)
{
    for (uint32_t length = 0; length < 100; length++) {
        uint64_t ring_bytes = 64 + shml_align(2 * length);
        uint8_t *ring = aligned_alloc(64, ring_bytes);
        shml_record_t head = {1, 0, 0};
        memcpy(ring, &head, sizeof head);
        put_field(ring, 0, 64, 2 * length, 2, (uint32_t[]){2, length});
        for (uint32_t k = 0; k < 2 * length; k++)
            ring[64 + k] = (uint8_t)(255 - k);
        shml_gather_t op = {.op = SHML_NORMALIZE,
                            .item_bytes = 1,
                            .rank = 2,
                            .dims = {2, length},
                            .num_channels = 2,
                            .scale = {2, 4},
                            .shift = {1, -1}};
        float *out = new_out(&op, 2 * length * 4);
        shml_ref_t ref = {.num_bytes = ring_bytes};
        CHECK_EQ(shml_gather(ring, ring_bytes, &ref, 1, NULL, &op, 1), SHML_OK);
        for (uint32_t k = 0; k < 2 * length; k++)
            CHECK(out[k] == (float)(uint8_t)(255 - k) * (k < length ? 2 : 4) + (k < length ? 1 : -1));
        free(op.out), free(ring);
    }
}

TEST_MAIN(TEST(copy_pads_shorter_rows), TEST(rows_place_records_anywhere),
          TEST(normalize_gives_the_bits_of_float_arithmetic), TEST(normalize_of_any_length),
          TEST(masks_presence_and_source), TEST(every_item_size_is_padded_with_its_own_pattern),
          TEST(more_ops_than_go_at_once), TEST(an_output_too_small_is_refused), TEST(nothing_to_gather_is_fine),
          TEST(another_shape_is_corrupt), TEST(measure_finds_the_extent_of_each_field),
          TEST(a_field_is_found_by_its_index), TEST(a_record_of_a_bad_ref_is_not_read),
          TEST(no_byte_of_a_head_can_do_harm))
