/* stats.c - what the segment holds and has done, in numbers. */
#include "layout.h"

static shml_region_stats_t region_stats(const shml_region_t *r)
{
    return (shml_region_stats_t){
        .bytes = r->end - r->begin,
        .backed_bytes = r->backed_end - r->begin,
        .used_bytes = r->used_bytes,
        .head_bytes = r->head - r->begin,
        .num_blocks = r->num_blocks,
        .frozen = r->frozen,
    };
}

int shml_get_stats(shml_seg_t *seg, shml_stats_t *stats)
{
    int status = shml_lock(seg);
    if (status != SHML_OK)
        return status;
    const shml_control_t *c = seg->control;
    *stats = (shml_stats_t){
        .resident = region_stats(&c->regions[SHML_RESIDENT]),
        .transit = region_stats(&c->regions[SHML_TRANSIT]),
        .raw = region_stats(&c->regions[SHML_RAW_REGION]),
        .num_records = c->num_records,
        .num_resident = c->num_resident,
        .most_resident = c->most_resident,
        .num_transit = c->num_transit,
        .most_transit = c->most_transit,
        .num_ready = c->num_ready,
        .num_errors = c->num_errors,
        .num_aside = c->num_aside,
        .num_reserved = c->num_reserved,
        .num_claimed = c->num_claimed,
        .num_suspect = c->num_suspect,
        .num_commits = c->num_commits,
        .commit_bytes = c->commit_bytes,
        .num_reads = c->num_reads,
        .num_guest_reads = c->num_guest_reads,
        .num_evicted = c->num_evicted,
        .num_starved = c->num_starved,
        .fetched_bytes = c->fetched_bytes,
        .decoding_ns = c->decoding_ns,
        .num_fetched = c->num_fetched,
        .spill_bytes = c->spill_bytes,
        .spill_used_bytes = c->spill_end,
        .spill_frozen = c->spill_frozen,
        .progress = c->progress,
        .chunks_todo = c->chunks_todo,
        .chunks_claimed = c->chunks_claimed,
        .chunks_done = c->chunks_done,
        .chunks_broken = c->chunks_broken,
        .num_owners = shml_count_clients(seg, SHML_OWNER),
        .num_workers = shml_count_clients(seg, SHML_WORKER),
        .num_services = shml_count_clients(seg, SHML_SERVICE),
        .num_reaped = c->num_reaped,
        .num_services_lost = c->num_services_lost,
        .num_rebuilds = c->num_rebuilds,
        .num_orders = c->num_orders,
        .state = c->state,
    };
    shml_unlock(seg);
    return SHML_OK;
}
