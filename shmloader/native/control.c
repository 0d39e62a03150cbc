/* control.c - making, checking and locking a segment's control memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include "failpoint.h"
#include "layout.h"

#ifdef SHML_FAILPOINTS
void (*shml_failpoint)(const char *name) = NULL;
#endif

/* Anything of another size or at another offset is another ABI: such a segment is refused. */
static uint32_t abi_hash(void)
{
    const uint64_t facts[] = {
        sizeof(struct shml_control),
        sizeof(shml_desc_t),
        sizeof(struct shml_client),
        sizeof(shml_chunk_t),
        sizeof(shml_order_t),
        sizeof(shml_region_t),
        sizeof(shml_shared_text_t),
        sizeof(pthread_mutex_t),
        offsetof(struct shml_control, mutex),
        offsetof(struct shml_control, regions),
        offsetof(struct shml_control, num_reaped),
        offsetof(struct shml_control, num_ready),
        offsetof(struct shml_control, progress),
        offsetof(struct shml_control, num_orders),
        offsetof(struct shml_control, spill_bytes),
        offsetof(struct shml_control, most_resident),
        offsetof(struct shml_control, most_transit),
        offsetof(struct shml_control, num_resident),
        offsetof(struct shml_control, num_stored),
        offsetof(struct shml_control, num_transit),
        offsetof(struct shml_control, spill_end),
        offsetof(struct shml_chunk, spilled),
        offsetof(struct shml_control, guest_wants),
        (uint64_t)sysconf(_SC_PAGESIZE),
        SHML_MAX_CLIENTS,
        SHML_MAX_WANTS,
        SHML_MAX_ORDERS,
        SHML_PIN_WORDS,
        SHML_TEXT_BYTES,
        SHML_NUM_TEXTS,
        SHML_ALIGN,
    };
    uint64_t hash = UINT64_C(14695981039346656037); /* FNV-1a, 64 bit: isthe.com/chongo/tech/comp/fnv */
    for (size_t i = 0; i < sizeof facts / sizeof *facts; i++)
        for (int byte = 0; byte < 8; byte++)
            hash = (hash ^ ((facts[i] >> (8 * byte)) & 0xff)) * UINT64_C(1099511628211);
    return (uint32_t)(hash ^ (hash >> 32));
}

/* The regions of the ring, one behind the other, without memory yet; 0: their sizes are bad. */
static int lay_out_ring(const shml_config_t *config, shml_control_t *c)
{
    const uint64_t bytes[SHML_NUM_REGIONS] = {config->resident_bytes, config->transit_bytes, config->raw_bytes};
    c->ring_bytes = 0;
    for (uint32_t i = 0; i < SHML_NUM_REGIONS; i++) {
        if (bytes[i] % 4096 != 0 || bytes[i] > INT64_MAX - c->ring_bytes)
            return 0;
        c->regions[i].begin = c->regions[i].backed_end = c->regions[i].head = c->ring_bytes;
        c->ring_bytes += bytes[i];
        c->regions[i].end = c->ring_bytes;
    }
    return c->ring_bytes > 0;
}

/* Is it a closed set, or one that an open set can be (shml.h)? */
static int is_kind_good(const shml_config_t *config)
{
    if (config->rows_per_chunk == 0)
        return 1;
    return config->num_chunks % SHML_MAX_ORDERS == 0 && config->num_chunks >= 2 * SHML_MAX_ORDERS &&
           config->resident_bytes == 0 && config->transit_bytes > 0 && config->rows_per_chunk <= 1u << 20;
}

/* Offsets of all parts of the control memory for `config`; returns the whole size, 0 if it does not fit. */
static uint64_t lay_out(const shml_config_t *config, shml_control_t *c)
{
    if (!lay_out_ring(config, c))
        return 0;
    if (config->num_records == 0 || config->num_records > UINT32_MAX / 4 || config->num_chunks > UINT32_MAX / 8)
        return 0;
    if (!is_kind_good(config))
        return 0;
    /* Beside the rows: a raw and an error record a chunk, and holes that nothing fits into yet. */
    c->num_descs = (uint32_t)(config->num_records + 2 * (uint64_t)config->num_chunks + 4096);
    c->num_records = config->num_records;
    c->num_buckets = (uint32_t)config->num_records;
    c->rows_per_chunk = config->rows_per_chunk;
    c->chunks_per_order = c->rows_per_chunk > 0 ? config->num_chunks / SHML_MAX_ORDERS : 0;
    /* Odd: the ids of one position in many orders differ in their upper bits, and must not all be in one chain. */
    if (c->rows_per_chunk > 0 && c->num_buckets > 1)
        c->num_buckets -= c->num_buckets % 2 == 0;
    c->num_chunks = config->num_chunks;
    c->max_clients = SHML_MAX_CLIENTS;
    uint64_t at = shml_align(sizeof *c);
    const struct {
        uint64_t *offset;
        uint64_t bytes;
    } parts[] = {
        {&c->clients_at, (uint64_t)SHML_MAX_CLIENTS * sizeof(struct shml_client)},
        {&c->wants_at, (uint64_t)SHML_MAX_CLIENTS * SHML_MAX_WANTS * sizeof(uint64_t)},
        {&c->orders_at, (uint64_t)SHML_MAX_ORDERS * sizeof(shml_order_t)},
        {&c->marks_at, (uint64_t)SHML_MAX_ORDERS * SHML_MAX_CLIENTS * sizeof(uint64_t)},
        {&c->read_at, (uint64_t)SHML_MAX_ORDERS * SHML_READ_POSITIONS / 8},
        {&c->texts_at, (uint64_t)SHML_NUM_TEXTS * sizeof(shml_shared_text_t)},
        {&c->chunks_at, (uint64_t)c->num_chunks * sizeof(shml_chunk_t)},
        {&c->descs_at, (uint64_t)c->num_descs * sizeof(shml_desc_t)},
        {&c->pins_at, (uint64_t)c->num_descs * SHML_PIN_WORDS * sizeof(uint64_t)},
        {&c->buckets_at, (uint64_t)c->num_buckets * sizeof(uint32_t)},
        {&c->reads_at, c->num_records * sizeof(uint32_t)},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].offset = at;
        at += shml_align(parts[i].bytes);
    }
    return (at + 4095) & ~UINT64_C(4095);
}

uint64_t shml_control_bytes(const shml_config_t *config)
{
    shml_control_t c = {0};
    return lay_out(config, &c);
}

int shml_mutex_init(pthread_mutex_t *mutex)
{
    pthread_mutexattr_t attr;
    int error = pthread_mutexattr_init(&attr);
    if (error == 0) {
        error = pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
        if (error == 0)
            error = pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
        if (error == 0)
            error = pthread_mutex_init(mutex, &attr);
        pthread_mutexattr_destroy(&attr);
    }
    errno = error;
    return error == 0 ? SHML_OK : SHML_E_SYS;
}

static int format_chunks(shml_control_t *c, const uint64_t *first_rows, const uint32_t *num_rows, const uint32_t *units)
{
    shml_chunk_t *chunks = shml_chunks(c);
    uint64_t next = 0;
    for (uint32_t i = 0; i < c->num_chunks; i++) {
        if (first_rows[i] != next || num_rows[i] == 0)
            return SHML_E_INVAL;
        if (units[i] > i || (units[i] < i && units[i] != chunks[i - 1].unit))
            return SHML_E_INVAL;
        chunks[i].first_row = first_rows[i];
        chunks[i].num_rows = num_rows[i];
        chunks[i].unit = units[i];
        next += num_rows[i];
    }
    return next <= c->num_records ? SHML_OK : SHML_E_INVAL;
}

/* Of an open set: nobody has them yet, and one client reads an order's stream. */
static int format_places(shml_control_t *c)
{
    shml_chunk_t *chunks = shml_chunks(c);
    for (uint32_t i = 0; i < c->num_chunks; i++) {
        chunks[i].first_row = UINT64_MAX;
        chunks[i].num_rows = c->rows_per_chunk;
        chunks[i].unit = i - i % c->chunks_per_order;
    }
    return SHML_OK;
}

int shml_control_format(void *control, uint64_t bytes, const shml_config_t *config, const uint64_t *first_rows,
                        const uint32_t *num_rows, const uint32_t *units)
{
    shml_control_t *c = control;
    uint64_t need = lay_out(config, c);
    if (need == 0 || bytes < need)
        return SHML_E_INVAL;
    if (config->spill_bytes % SHML_SPILL_PAGE != 0 || config->spill_bytes > SHML_MAX_SPILL_BYTES)
        return SHML_E_INVAL;
    if (config->most_resident > 0 && config->transit_bytes == 0) /* where would the others go? */
        return SHML_E_INVAL;
    if (config->spill_bytes > 0 && config->rows_per_chunk > 0) /* of a stream's places each is another chunk's soon */
        return SHML_E_INVAL;
    c->version = SHML_VERSION;
    c->abi = abi_hash();
    memcpy(c->uuid, config->uuid, sizeof c->uuid);
    memcpy(c->boot_id, config->boot_id, sizeof c->boot_id);
    c->pid_namespace = config->pid_namespace;
    c->record_bytes = config->record_bytes;
    c->raw_budget_bytes = config->raw_budget_bytes;
    c->spill_bytes = config->spill_bytes;
    c->most_resident = config->most_resident;
    c->most_transit = config->most_transit;
    c->control_bytes = need;
    if (shml_mutex_init(&c->mutex) != SHML_OK)
        return SHML_E_SYS;
    int status = shml_is_open(c) ? format_places(c) : format_chunks(c, first_rows, num_rows, units);
    if (status != SHML_OK)
        return status;
    c->chunks_todo = config->num_chunks;
    c->state = SHML_SEG_READY;
    /* SYNC(format): pairs with the acquire in shml_control_check. */
    atomic_store_explicit(&c->magic, SHML_MAGIC, memory_order_release);
    return SHML_OK;
}

/* clients_at to reads_at: they lie one behind the other. */
#define SIZE_OF_OFFSETS (offsetof(struct shml_control, reads_at) + 8 - offsetof(struct shml_control, clients_at))

int shml_control_check(const void *control, uint64_t bytes, const uint8_t boot_id[16], uint64_t pid_namespace)
{
    const shml_control_t *c = control;
    if (bytes < sizeof *c || atomic_load_explicit(&c->magic, memory_order_acquire) != SHML_MAGIC) /* SYNC(format) */
        return SHML_E_LAYOUT;
    if (c->version != SHML_VERSION || c->abi != abi_hash() || c->control_bytes > bytes)
        return SHML_E_LAYOUT;
    if (memcmp(c->boot_id, boot_id, sizeof c->boot_id) != 0)
        return SHML_E_LAYOUT;
    shml_config_t config = {.resident_bytes = c->regions[SHML_RESIDENT].end,
                            .transit_bytes = c->regions[SHML_TRANSIT].end - c->regions[SHML_TRANSIT].begin,
                            .raw_bytes = c->regions[SHML_RAW_REGION].end - c->regions[SHML_RAW_REGION].begin,
                            .num_records = c->num_records,
                            .num_chunks = c->num_chunks,
                            .rows_per_chunk = c->rows_per_chunk};
    shml_control_t expected = {0};
    uint64_t need = lay_out(&config, &expected);
    if (need == 0 || need != c->control_bytes || expected.ring_bytes != c->ring_bytes ||
        expected.num_descs != c->num_descs || expected.num_buckets != c->num_buckets ||
        expected.chunks_per_order != c->chunks_per_order || c->max_clients != SHML_MAX_CLIENTS ||
        memcmp(&expected.clients_at, &c->clients_at, SIZE_OF_OFFSETS) != 0)
        return SHML_E_LAYOUT;
    for (uint32_t i = 0; i < SHML_NUM_REGIONS; i++)
        if (expected.regions[i].begin != c->regions[i].begin || expected.regions[i].end != c->regions[i].end)
            return SHML_E_LAYOUT;
    /* Equal thread ids in two namespaces could mark a living holder of the mutex as dead. */
    return c->pid_namespace == pid_namespace ? SHML_OK : SHML_E_NAMESPACE;
}

int32_t shml_mutex_holder(const shml_control_t *control)
{
    /* The futex word of a robust mutex is the holder's thread id and two flag bits (robust-futex-ABI). */
    return (int32_t)((uint32_t)control->mutex.__data.__lock & 0x3fffffffu);
}

int shml_poison(shml_seg_t *seg, uint32_t line)
{
    shml_control_t *c = seg->control;
    c->poison_line = line;
    atomic_store_explicit(&c->state, SHML_SEG_POISONED, memory_order_release);
    shml_client_t *clients = shml_clients(c);
    for (uint32_t i = 0; i < SHML_MAX_CLIENTS; i++) {
        atomic_fetch_add_explicit(&clients[i].wake, 1, memory_order_release);
        seg->env->wake(seg->env->ctx, (uint32_t *)&clients[i].wake);
    }
    shml_guests_wake(seg);
    atomic_fetch_add_explicit(&c->work, 1, memory_order_release);
    seg->env->wake(seg->env->ctx, (uint32_t *)&c->work);
    return SHML_E_POISONED;
}

int shml_lock(shml_seg_t *seg)
{
    shml_control_t *c = seg->control;
    if (atomic_load_explicit(&c->state, memory_order_acquire) != SHML_SEG_READY)
        return SHML_E_POISONED;
    int error = seg->env->lock(seg->env->ctx, &c->mutex, SHML_LOCK_TIMEOUT_MS);
    if (error == EOWNERDEAD) {
        /* Unlocked with the mutex made consistent only after the repair: a kill in here brings the next to this
         * very place. */
        int status = SHML_OK;
        if (atomic_load_explicit(&c->dirty, memory_order_relaxed))
            status = shml_rebuild(seg);
        SHML_FP("control.lock.repaired");
        /* Its last wakes may have been lost with the dead holder: everybody looks again. */
        shml_wants_wake(seg, 0, UINT64_MAX);
        shml_guests_wake(seg);
        atomic_fetch_add_explicit(&c->work, 1, memory_order_release);
        seg->env->wake(seg->env->ctx, (uint32_t *)&c->work);
        if (status != SHML_OK) {
            seg->env->unlock(seg->env->ctx, &c->mutex, 1);
            return status;
        }
        seg->env->unlock(seg->env->ctx, &c->mutex, 1);
        return shml_lock(seg);
    }
    if (error == ENOTRECOVERABLE)
        return SHML_POISON(seg);
    if (error != 0) {
        errno = error;
        return error == ETIMEDOUT ? SHML_E_TIMEOUT : SHML_E_SYS;
    }
    if (atomic_load_explicit(&c->state, memory_order_acquire) != SHML_SEG_READY) {
        seg->env->unlock(seg->env->ctx, &c->mutex, 0);
        return SHML_E_POISONED;
    }
    return SHML_OK;
}

void shml_unlock(shml_seg_t *seg) { seg->env->unlock(seg->env->ctx, &seg->control->mutex, 0); }

int shml_text_put(shml_seg_t *seg, uint32_t which, const void *text, uint32_t num_bytes)
{
    if (which >= SHML_NUM_TEXTS || num_bytes == 0 || num_bytes > SHML_TEXT_BYTES)
        return SHML_E_INVAL;
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    shml_shared_text_t *t = &shml_texts(seg->control)[which];
    if (t->num_bytes != 0) {
        shml_unlock(seg);
        return SHML_E_EXISTS;
    }
    SHML_FP("control.text.begin");
    memcpy(t->text, text, num_bytes);
    SHML_FP("control.text.copied");
    /* SYNC(text): pairs with the acquire in shml_text_get. */
    atomic_store_explicit(&t->num_bytes, num_bytes, memory_order_release);
    SHML_FP("control.text.done");
    if (which == SHML_TEXT_FATAL) {
        shml_wants_wake(seg, 0, UINT64_MAX);
        shml_guests_wake(seg);
    }
    shml_unlock(seg);
    return SHML_OK;
}

int shml_text_get(shml_seg_t *seg, uint32_t which, void *text)
{
    if (which >= SHML_NUM_TEXTS)
        return SHML_E_INVAL;
    const shml_shared_text_t *t = &shml_texts(seg->control)[which];
    uint32_t num_bytes = atomic_load_explicit(&t->num_bytes, memory_order_acquire); /* SYNC(text) */
    if (num_bytes == 0)
        return SHML_E_NOTFOUND;
    if (num_bytes > SHML_TEXT_BYTES)
        return SHML_E_CORRUPT;
    memcpy(text, t->text, num_bytes);
    return (int)num_bytes;
}

void shml_epoch_set(shml_seg_t *seg, uint64_t epoch)
{
    atomic_store_explicit(&seg->control->epoch, epoch, memory_order_release);
}

uint64_t shml_epoch_get(const shml_seg_t *seg)
{
    return atomic_load_explicit(&seg->control->epoch, memory_order_acquire);
}
