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
        sizeof(pthread_mutex_t),
        offsetof(struct shml_control, mutex),
        offsetof(struct shml_control, backed_end),
        offsetof(struct shml_control, head),
        offsetof(struct shml_control, progress),
        (uint64_t)sysconf(_SC_PAGESIZE),
        SHML_MAX_WANTS,
        SHML_TEXT_BYTES,
    };
    uint64_t hash = UINT64_C(14695981039346656037); /* FNV-1a, 64 bit: isthe.com/chongo/tech/comp/fnv */
    for (size_t i = 0; i < sizeof facts / sizeof *facts; i++)
        for (int byte = 0; byte < 8; byte++)
            hash = (hash ^ ((facts[i] >> (8 * byte)) & 0xff)) * UINT64_C(1099511628211);
    return (uint32_t)(hash ^ (hash >> 32));
}

/* Offsets of all regions for `config`; returns the whole size, 0 if it does not fit. */
static uint64_t lay_out(const shml_config_t *config, struct shml_control *c)
{
    if (config->ring_bytes == 0 || config->ring_bytes % 4096 != 0 || config->resident_bytes > config->ring_bytes)
        return 0;
    if (config->num_records == 0 || config->num_records > UINT32_MAX / 4 || config->num_chunks > UINT32_MAX / 4)
        return 0;
    /* Beside the samples: one error record a chunk, and holes that nothing fits into yet. */
    c->num_descs = (uint32_t)(config->num_records + config->num_chunks + 1024);
    c->num_buckets = (uint32_t)config->num_records;
    c->num_chunks = config->num_chunks;
    c->max_clients = SHML_MAX_CLIENTS;
    uint64_t at = shml_align(sizeof *c);
    const struct {
        uint64_t *offset;
        uint64_t bytes;
    } regions[] = {
        {&c->clients_at, (uint64_t)SHML_MAX_CLIENTS * sizeof(struct shml_client)},
        {&c->wants_at, (uint64_t)SHML_MAX_CLIENTS * SHML_MAX_WANTS * sizeof(uint64_t)},
        {&c->orders_at, (uint64_t)SHML_MAX_ORDERS * sizeof(shml_order_t)},
        {&c->texts_at, (uint64_t)SHML_NUM_TEXTS * sizeof(shml_shared_text_t)},
        {&c->chunks_at, (uint64_t)c->num_chunks * sizeof(shml_chunk_t)},
        {&c->descs_at, (uint64_t)c->num_descs * sizeof(shml_desc_t)},
        {&c->pins_at, (uint64_t)c->num_descs * SHML_PIN_WORDS * sizeof(uint64_t)},
        {&c->buckets_at, (uint64_t)c->num_buckets * sizeof(uint32_t)},
    };
    for (size_t i = 0; i < sizeof regions / sizeof *regions; i++) {
        *regions[i].offset = at;
        at += shml_align(regions[i].bytes);
    }
    return (at + 4095) & ~UINT64_C(4095);
}

uint64_t shml_control_bytes(const shml_config_t *config)
{
    struct shml_control c = {0};
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

int shml_control_format(void *control, uint64_t bytes, const shml_config_t *config, const uint64_t *first_rows,
                        const uint32_t *num_rows)
{
    struct shml_control *c = control;
    uint64_t need = lay_out(config, c);
    if (need == 0 || bytes < need)
        return SHML_E_INVAL;
    c->version = SHML_VERSION;
    c->abi = abi_hash();
    memcpy(c->uuid, config->uuid, sizeof c->uuid);
    memcpy(c->boot_id, config->boot_id, sizeof c->boot_id);
    c->pid_namespace = config->pid_namespace;
    c->control_bytes = need;
    c->ring_bytes = config->ring_bytes;
    c->resident_bytes = config->resident_bytes;
    c->is_sequential = config->is_sequential;
    if (shml_mutex_init(&c->mutex) != SHML_OK)
        return SHML_E_SYS;
    shml_chunk_t *chunks = shml_chunks(c);
    uint64_t next = 0;
    for (uint32_t i = 0; i < config->num_chunks; i++) {
        if (first_rows[i] != next || num_rows[i] == 0)
            return SHML_E_INVAL;
        chunks[i].first_row = first_rows[i];
        chunks[i].num_rows = num_rows[i];
        next += num_rows[i];
    }
    if (next > config->num_records)
        return SHML_E_INVAL;
    c->chunks_todo = config->num_chunks;
    c->state = SHML_SEG_READY;
    /* SYNC(format): pairs with the acquire in shml_control_check. */
    atomic_store_explicit(&c->magic, SHML_MAGIC, memory_order_release);
    return SHML_OK;
}

int shml_control_check(const void *control, uint64_t bytes, const uint8_t boot_id[16], uint64_t pid_namespace)
{
    const struct shml_control *c = control;
    if (bytes < sizeof *c || atomic_load_explicit(&c->magic, memory_order_acquire) != SHML_MAGIC) /* SYNC(format) */
        return SHML_E_LAYOUT;
    if (c->version != SHML_VERSION || c->abi != abi_hash() || c->control_bytes > bytes)
        return SHML_E_LAYOUT;
    if (memcmp(c->boot_id, boot_id, sizeof c->boot_id) != 0)
        return SHML_E_LAYOUT;
    shml_config_t config = {.ring_bytes = c->ring_bytes,
                            .resident_bytes = c->resident_bytes,
                            .num_records = c->num_buckets,
                            .num_chunks = c->num_chunks};
    struct shml_control expected = {0};
    uint64_t need = lay_out(&config, &expected);
    if (need == 0 || need != c->control_bytes || expected.buckets_at != c->buckets_at ||
        expected.descs_at != c->descs_at || expected.chunks_at != c->chunks_at || expected.wants_at != c->wants_at ||
        expected.clients_at != c->clients_at || expected.texts_at != c->texts_at ||
        expected.num_descs != c->num_descs || c->max_clients != SHML_MAX_CLIENTS)
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
    struct shml_control *c = seg->control;
    c->poison_line = line;
    atomic_store_explicit(&c->state, SHML_SEG_POISONED, memory_order_release);
    shml_client_t *clients = shml_clients(c);
    for (uint32_t i = 0; i < SHML_MAX_CLIENTS; i++) {
        atomic_fetch_add_explicit(&clients[i].wake, 1, memory_order_release);
        seg->env->wake(seg->env->ctx, (uint32_t *)&clients[i].wake);
    }
    atomic_fetch_add_explicit(&c->work, 1, memory_order_release);
    seg->env->wake(seg->env->ctx, (uint32_t *)&c->work);
    return SHML_E_POISONED;
}

int shml_lock(shml_seg_t *seg)
{
    struct shml_control *c = seg->control;
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
    if (which == SHML_TEXT_FATAL)
        shml_wants_wake(seg, 0, UINT64_MAX);
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

int shml_get_stats(shml_seg_t *seg, shml_stats_t *stats)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    struct shml_control *c = seg->control;
    *stats = (shml_stats_t){
        .ring_bytes = c->ring_bytes,
        .resident_bytes = c->resident_bytes,
        .backed_bytes = c->backed_end,
        .head_bytes = c->head,
        .used_bytes = c->used_bytes,
        .num_records = c->num_buckets,
        .num_ready = c->num_ready,
        .num_errors = c->num_errors,
        .num_reserved = c->num_reserved,
        .num_commits = c->num_commits,
        .progress = c->progress,
        .chunks_todo = c->chunks_todo,
        .chunks_claimed = c->chunks_claimed,
        .chunks_done = c->chunks_done,
        .chunks_broken = c->chunks_broken,
        .num_reaped = c->num_reaped,
        .num_services_lost = c->num_services_lost,
        .num_rebuilds = c->num_rebuilds,
        .state = c->state,
        .frozen = c->frozen,
        .num_owners = shml_count_clients(seg, SHML_OWNER),
        .num_workers = shml_count_clients(seg, SHML_WORKER),
        .num_services = shml_count_clients(seg, SHML_SERVICE),
    };
    shml_unlock(seg);
    return SHML_OK;
}
