"""What a dataset's set of processes is doing, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """A snapshot; every number is of the whole set, except where said.

    num_rows: samples of the dataset. samples_ready: of these in the ring. samples_bad: that could not be made.
    commits: records written so far; equals ``samples_ready`` if none was ever decoded twice.
    ring_bytes: the ring's size. ring_backed_bytes: of it backed by memory. ring_used_bytes: in records.
    prefetchers: prefetch processes at work (0 once all is there). service_pids: supervisor and prefetchers.
    num_workers: attached DataLoader workers. restarts: services that died and were
        replaced.
    batches_in_slots, batches_copied, batches_inline: batches that this process received in place, copied out of
        their slot because too many were held, or as bytes through the worker's pipe.
    batch_backed_bytes: memory of this process's batch ring (of all its datasets).
    """

    num_rows: int
    samples_ready: int
    samples_bad: int
    commits: int
    ring_bytes: int
    ring_backed_bytes: int
    ring_used_bytes: int
    prefetchers: int
    service_pids: list[int]
    num_workers: int
    restarts: int
    batches_in_slots: int
    batches_copied: int
    batches_inline: int
    batch_backed_bytes: int

    @property
    def decodes_per_sample(self) -> float:
        """Records written per sample that is there; 1.0 is the promise."""
        there = self.samples_ready + self.samples_bad
        return self.commits / there if there else 0.0
