/* gather.c - from records in the ring to the tensors of a batch, in one pass.
 *
 * THE RECORDS ARE NOT TRUSTED. Another process can write to the ring while we read. So every number that comes from
 * there is copied to private memory once, behind a compiler barrier (else the compiler may fetch it again
 * between check and use), and checked against the record's length, which is checked against the ring's.
 * What a bad record can do is give wrong values in its own place of the batch, or SHML_E_CORRUPT. Copies are
 * by memcpy, so that no offset can make a misaligned access.
 *
 * THE ORDER OF THE LOOPS is records outside, ops inside: a record's head and its small fields then lie in one or
 * two cache lines that are fetched once, and those of the record PREFETCH_RECORDS further on are asked for in
 * the meantime. bench_gather.c in native_tests measures it.
 *
 * (Over the length that a file should have: reading records and filling places share each static function here.) */
#include <stdbool.h>
#include <string.h>

#include "copy.h"
#include "layout.h"

/* Ops that go through the records together. Their plans lie on the stack: 16 of them are 2 KiB. */
#define OPS_AT_ONCE 16u
/* How far ahead to fetch, measured: beyond 2 nothing is gained, nor by more than three lines of each record. */
#define PREFETCH_RECORDS 2u
#define PATTERN_BYTES    64u

typedef struct plan { /* what an op needs that is the same for all records */
    const shml_gather_t *op;
    uint64_t place_bytes;           /* of one sample in `out` */
    uint64_t row_bytes;             /* of one step of the first stored dimension */
    uint64_t plane_items;           /* NORMALIZE: items of one channel */
    uint8_t pattern[PATTERN_BYTES]; /* `pad`, repeated */
    bool is_memset;                 /* all bytes of `pad` are equal */
} plan_t;

typedef struct record { /* a record whose bounds and head were checked */
    const uint8_t *at;
    uint64_t num_bytes;
    uint64_t fields_end; /* where its table of fields ends */
    uint32_t num_fields;
    uint32_t source;
} record_t;

/* After this the compiler must not read again what it copied before. */
static inline void copied(void) { __asm__ volatile("" ::: "memory"); }

static inline bool multiply(uint64_t a, uint64_t b, uint64_t *out) { return !__builtin_mul_overflow(a, b, out); }

/* ---------------------------------------------------------------------------------------------------- *
 * Reading records
 * ---------------------------------------------------------------------------------------------------- */
static int open_record(const uint8_t *at, uint64_t num_bytes, record_t *record)
{
    shml_record_t head;
    if (num_bytes < sizeof head)
        return SHML_E_CORRUPT;
    memcpy(&head, at, sizeof head);
    copied();
    /* 2^32 fields of 40 bytes: no overflow in 64 bits. */
    uint64_t fields_end = sizeof head + (uint64_t)head.num_fields * sizeof(shml_field_t);
    if (fields_end > num_bytes)
        return SHML_E_CORRUPT;
    *record = (record_t){at, num_bytes, fields_end, head.num_fields, head.source};
    return SHML_OK;
}

static bool ref_fits(uint64_t ring_bytes, const shml_ref_t *ref)
{
    return ref->offset <= ring_bytes && ref->num_bytes <= ring_bytes - ref->offset && ref->offset % SHML_ALIGN == 0;
}

static int open_ref(const uint8_t *ring, uint64_t ring_bytes, const shml_ref_t *ref, record_t *record)
{
    if (ref->status != SHML_REF_READY)
        return SHML_E_INVAL;
    if (!ref_fits(ring_bytes, ref))
        return SHML_E_CORRUPT;
    return open_record(ring + ref->offset, ref->num_bytes, record);
}

/* An item has a byte at least, so a field of n bytes has n items at most. Which dimensions are used is not known
 * here: those that are not are 0, and so is one or more of an empty field. */
static bool dims_fit(const shml_field_t *field)
{
    uint64_t items = 1;
    if (field->num_bytes == 0)
        return true;
    for (uint32_t d = 0; d < SHML_MAX_RANK; d++)
        if (field->dims[d] != 0 && (!multiply(items, field->dims[d], &items) || items > field->num_bytes))
            return false;
    return true;
}

static int open_field(const record_t *record, uint32_t index, shml_field_t *field)
{
    if (index >= record->num_fields)
        return SHML_E_NOTFOUND;
    memcpy(field, record->at + sizeof(shml_record_t) + (uint64_t)index * sizeof *field, sizeof *field);
    copied();
    if (field->offset == 0)
        return SHML_E_NOTFOUND;
    if (field->offset < record->fields_end || field->offset > record->num_bytes ||
        field->num_bytes > record->num_bytes - field->offset || field->offset % SHML_ALIGN != 0 || !dims_fit(field))
        return SHML_E_CORRUPT;
    return SHML_OK;
}

int shml_record_field(const uint8_t *record, uint64_t num_bytes, uint32_t index, shml_field_t *field)
{
    record_t opened;
    int rc = open_record(record, num_bytes, &opened);
    return rc == SHML_OK ? open_field(&opened, index, field) : rc;
}

/* A bad ref is found when its turn comes; here it must only do no harm. */
static inline void prefetch(const uint8_t *ring, uint64_t ring_bytes, const shml_ref_t *refs, uint32_t n, uint32_t i)
{
    if (i < n && refs[i].offset < ring_bytes && ring_bytes - refs[i].offset >= 3 * SHML_ALIGN)
        for (uint32_t line = 0; line < 3; line++)
            __builtin_prefetch(ring + refs[i].offset + line * SHML_ALIGN);
}

static void measure_field(const shml_field_t *field, shml_measure_t *measure, bool is_first)
{
    for (uint32_t d = 0; d < SHML_MAX_RANK; d++) {
        uint32_t dim = field->dims[d];
        if (is_first || dim < measure->min_dims[d])
            measure->min_dims[d] = dim;
        if (is_first || dim > measure->max_dims[d])
            measure->max_dims[d] = dim;
    }
}

int shml_measure(const uint8_t *ring, uint64_t ring_bytes, const shml_ref_t *refs, uint32_t n, uint32_t num_fields,
                 shml_measure_t *measures)
{
    if (num_fields > 0)
        memset(measures, 0, num_fields * sizeof *measures);
    for (uint32_t i = 0; i < n; i++) {
        record_t record;
        prefetch(ring, ring_bytes, refs, n, i + PREFETCH_RECORDS);
        int rc = open_ref(ring, ring_bytes, &refs[i], &record);
        if (rc != SHML_OK)
            return rc;
        for (uint32_t f = 0; f < num_fields; f++) {
            shml_field_t field;
            rc = open_field(&record, f, &field);
            if (rc == SHML_OK)
                measure_field(&field, &measures[f], measures[f].num_absent == i);
            else if (rc == SHML_E_NOTFOUND)
                measures[f].num_absent++;
            else
                return rc;
        }
    }
    return SHML_OK;
}

/* ---------------------------------------------------------------------------------------------------- *
 * Filling and converting
 * ---------------------------------------------------------------------------------------------------- */

/* `num_bytes` is a multiple of the item's size, and a pattern's size of it: so the tail is whole items. */
static void fill(uint8_t *out, const uint8_t *pattern, bool is_memset, uint64_t num_bytes)
{
    if (is_memset) {
        memset(out, pattern[0], num_bytes);
        return;
    }
    for (; num_bytes >= PATTERN_BYTES; out += PATTERN_BYTES, num_bytes -= PATTERN_BYTES)
        memcpy(out, pattern, PATTERN_BYTES); /* of constant size: four or fewer vector stores */
    memcpy(out, pattern, num_bytes);
}

static void pad_tail(const plan_t *plan, uint8_t *out, uint64_t num_bytes)
{
    if (num_bytes > 0)
        fill(out, plan->pattern, plan->is_memset, num_bytes);
}

static inline __attribute__((always_inline)) void normalize_loop(float *restrict out, const uint8_t *restrict in,
                                                                 uint64_t n, float scale, float shift)
{
    for (uint64_t i = 0; i < n; i++)
        out[i] = (float)in[i] * scale + shift;
}

static void normalize_any(float *restrict out, const uint8_t *restrict in, uint64_t n, float scale, float shift)
{
    normalize_loop(out, in, n, scale, shift);
}

#if defined(__x86_64__) && defined(__GNUC__)
/* Not target_clones: that needs ifunc, which musl lacks and which runs before ASan is ready. Without the fma target
 * the product is rounded on its own, so that every machine gives the same bits, and NumPy's. */
__attribute__((target("avx2"))) static void normalize_avx2(float *restrict out, const uint8_t *restrict in, uint64_t n,
                                                           float scale, float shift)
{
    normalize_loop(out, in, n, scale, shift);
}

static void normalize(float *out, const uint8_t *in, uint64_t n, float scale, float shift)
{
    if (__builtin_cpu_supports("avx2"))
        normalize_avx2(out, in, n, scale, shift);
    else
        normalize_any(out, in, n, scale, shift);
}
#else
static void normalize(float *out, const uint8_t *in, uint64_t n, float scale, float shift)
{
    normalize_any(out, in, n, scale, shift);
}
#endif

/* ---------------------------------------------------------------------------------------------------- *
 * Ops
 * ---------------------------------------------------------------------------------------------------- */

/* Items of dims[from..rank), and the bytes of that many; false: more than 64 bits hold. */
static bool num_items(const uint32_t *dims, uint32_t from, uint32_t rank, uint64_t *items)
{
    *items = 1;
    for (uint32_t d = from; d < rank; d++)
        if (!multiply(*items, dims[d], items))
            return false;
    return true;
}

static void make_pattern(plan_t *plan, const uint8_t *item, uint32_t item_bytes)
{
    plan->is_memset = true;
    for (uint32_t i = 0; i < PATTERN_BYTES; i++) {
        plan->pattern[i] = item[i % item_bytes];
        plan->is_memset &= plan->pattern[i] == item[0];
    }
}

static int plan_copy(const shml_gather_t *op, plan_t *plan)
{
    uint32_t size = op->item_bytes;
    uint64_t items;
    if (size == 0 || size > 16 || (size & (size - 1)) != 0 || op->rank > SHML_MAX_RANK)
        return SHML_E_INVAL;
    if (!num_items(op->dims, 1, op->rank, &items) || !multiply(items, size, &plan->row_bytes) ||
        !multiply(plan->row_bytes, op->rank > 0 ? op->dims[0] : 1, &plan->place_bytes))
        return SHML_E_INVAL;
    make_pattern(plan, op->pad, size);
    return SHML_OK;
}

static int plan_normalize(const shml_gather_t *op, plan_t *plan)
{
    if (op->item_bytes != 1 || op->rank == 0 || op->rank > SHML_MAX_RANK || op->num_channels > SHML_MAX_CHANNELS ||
        op->num_channels != op->dims[0] || (uintptr_t)op->out % _Alignof(float) != 0)
        return SHML_E_INVAL;
    if (!num_items(op->dims, 1, op->rank, &plan->plane_items) ||
        !multiply(plan->plane_items, op->num_channels * (uint64_t)sizeof(float), &plan->place_bytes))
        return SHML_E_INVAL;
    plan->row_bytes = plan->plane_items;
    make_pattern(plan, op->pad, sizeof(float));
    return SHML_OK;
}

static int make_plan(const shml_gather_t *op, uint64_t num_places, plan_t *plan)
{
    const int64_t one = 1;
    int rc = SHML_OK;
    uint64_t bytes;
    plan->op = op;
    switch (op->op) {
    case SHML_COPY: rc = plan_copy(op, plan); break;
    case SHML_NORMALIZE: rc = plan_normalize(op, plan); break;
    case SHML_MASK:
        if (op->rank == 0 || op->rank > SHML_MAX_RANK)
            return SHML_E_INVAL;
        plan->place_bytes = (uint64_t)op->dims[0] * sizeof(int64_t);
        make_pattern(plan, (const uint8_t *)&one, sizeof one);
        break;
    case SHML_PRESENT: plan->place_bytes = 1; break;
    case SHML_SOURCE: plan->place_bytes = sizeof(int64_t); break;
    default: return SHML_E_INVAL;
    }
    if (rc != SHML_OK)
        return rc;
    if (!multiply(num_places, plan->place_bytes, &bytes) || bytes > op->out_bytes)
        return SHML_E_INVAL;
    return op->out == NULL && bytes > 0 ? SHML_E_INVAL : SHML_OK;
}

/* The first dimension in *first (1 for a scalar); false: the field is not what the op expects. */
static bool shape_agrees(const plan_t *plan, const shml_field_t *field, uint64_t *first)
{
    const shml_gather_t *op = plan->op;
    uint64_t bytes;
    *first = op->rank > 0 ? field->dims[0] : 1;
    if (op->rank > 0 && field->dims[0] > op->dims[0])
        return false;
    for (uint32_t d = 1; d < op->rank; d++)
        if (field->dims[d] != op->dims[d])
            return false;
    return multiply(*first, plan->row_bytes, &bytes) && bytes == field->num_bytes;
}

static int copy_field(const plan_t *plan, const record_t *record, const shml_field_t *field, uint8_t *out)
{
    uint64_t first;
    if (!shape_agrees(plan, field, &first))
        return SHML_E_CORRUPT;
    /* Not by non-temporal stores: tried with a reader of the batch, as pinning is, and they gained nothing. */
    if (field->num_bytes > 0)
        shml_copy(out, record->at + field->offset, field->num_bytes);
    pad_tail(plan, out + field->num_bytes, plan->place_bytes - field->num_bytes);
    return SHML_OK;
}

static int normalize_field(const plan_t *plan, const record_t *record, const shml_field_t *field, uint8_t *out)
{
    const shml_gather_t *op = plan->op;
    uint64_t first;
    if (!shape_agrees(plan, field, &first) || first != op->num_channels)
        return SHML_E_CORRUPT;
    for (uint64_t c = 0; c < first; c++)
        normalize((float *)(void *)out + c * plan->plane_items, record->at + field->offset + c * plan->plane_items,
                  plan->plane_items, op->scale[c], op->shift[c]);
    return SHML_OK;
}

static int mask_field(const plan_t *plan, const shml_field_t *field, uint8_t *out)
{
    uint64_t ones = (uint64_t)field->dims[0] * sizeof(int64_t);
    if (ones > plan->place_bytes)
        return SHML_E_CORRUPT;
    fill(out, plan->pattern, false, ones);
    memset(out + ones, 0, plan->place_bytes - ones);
    return SHML_OK;
}

static int fill_place(const plan_t *plan, const record_t *record, uint8_t *out)
{
    const shml_gather_t *op = plan->op;
    shml_field_t field;
    if (plan->place_bytes == 0)
        out = (uint8_t *)plan->pattern; /* `out` may be NULL, and nothing is written */
    if (op->op == SHML_SOURCE) {
        int64_t source = record->source;
        memcpy(out, &source, sizeof source);
        return SHML_OK;
    }
    int rc = open_field(record, op->field, &field);
    bool is_absent = rc == SHML_E_NOTFOUND;
    if (rc != SHML_OK && !is_absent)
        return rc;
    switch (op->op) {
    case SHML_PRESENT: *out = !is_absent; return SHML_OK;
    case SHML_MASK:
        if (!is_absent)
            return mask_field(plan, &field, out);
        memset(out, 0, plan->place_bytes);
        return SHML_OK;
    default:
        if (is_absent)
            pad_tail(plan, out, plan->place_bytes);
        else
            return op->op == SHML_COPY ? copy_field(plan, record, &field, out)
                                       : normalize_field(plan, record, &field, out);
        return SHML_OK;
    }
}

static int gather_some(const uint8_t *ring, uint64_t ring_bytes, const shml_ref_t *refs, uint32_t n,
                       const uint32_t *rows, const plan_t *plans, uint32_t num_plans)
{
    for (uint32_t i = 0; i < n; i++) {
        record_t record;
        prefetch(ring, ring_bytes, refs, n, i + PREFETCH_RECORDS);
        int rc = open_ref(ring, ring_bytes, &refs[i], &record);
        if (rc != SHML_OK)
            return rc;
        uint64_t place = rows != NULL ? rows[i] : i;
        for (uint32_t p = 0; p < num_plans; p++) {
            rc = fill_place(&plans[p], &record, plans[p].op->out + place * plans[p].place_bytes);
            if (rc != SHML_OK)
                return rc;
        }
    }
    return SHML_OK;
}

int shml_gather(const uint8_t *ring, uint64_t ring_bytes, const shml_ref_t *refs, uint32_t n, const uint32_t *rows,
                const shml_gather_t *ops, uint32_t num_ops)
{
    plan_t plans[OPS_AT_ONCE];
    uint64_t num_places = n;
    for (uint32_t i = 0; rows != NULL && i < n; i++)
        if (i == 0 || rows[i] >= num_places)
            num_places = (uint64_t)rows[i] + 1;
    for (uint32_t from = 0; from < num_ops; from += OPS_AT_ONCE) {
        uint32_t some = num_ops - from < OPS_AT_ONCE ? num_ops - from : OPS_AT_ONCE;
        for (uint32_t p = 0; p < some; p++) {
            int rc = make_plan(&ops[from + p], num_places, &plans[p]);
            if (rc != SHML_OK)
                return rc;
        }
        int rc = gather_some(ring, ring_bytes, refs, n, rows, plans, some);
        shml_copy_done();
        if (rc != SHML_OK)
            return rc;
    }
    return SHML_OK;
}
