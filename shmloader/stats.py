"""What a dataset's set of processes is doing, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """A snapshot; every number is of the whole set, except where said.

    num_rows: samples of the dataset; None: nobody knows, it is a stream. samples_ready: of these in the ring,
        those on their way included. samples_kept: that stay there, or are about to: ``cache_size`` at most.
    samples_passing: that lie there, or are about to, until others need their place. most_passing: so many at most;
        None: as many as find room.
    samples_bad: that could not be made.
    commits: samples decoded so far; where all fit the ring, each is once.
    decoding_s: seconds that all prefetchers together have spent making samples.
    samples_read: handed to readers so far. guest_reads: of these to workers beyond the table of clients.
    fetched_bytes: encoded bytes taken from the source so far.
    ring_bytes: the ring's size. transit_bytes: of it for samples that give way to others; 0 where all fit.
    ring_backed_bytes: of the ring backed by memory. ring_used_bytes: in records. encoded_bytes: of encoded chunks that
        the services keep beside the ring. spill_bytes: those that they may keep on disk; 0 where SHMLOADER_SPILL_BYTES
        is 0, all samples fit, no folder on a disk was found, or the length of the stream is not known.
        spill_used_bytes: given out of these, whole pages; also what was never written, since a service was killed
        meanwhile or the disk refused.
    prefetchers: prefetch processes at work (0 once all is there). service_pids: supervisor and prefetchers.
    num_workers: attached DataLoader workers. restarts: services that died and were
        replaced.
    batches_in_slots, batches_copied, batches_inline: batches that this process received in place, copied out of
        their slot because too many were held, or as bytes through the worker's pipe.
    batch_bytes: the most that this process's batch ring takes (of all its datasets). batch_backed_bytes: what it takes.
    """

    num_rows: int | None
    samples_ready: int
    samples_kept: int
    samples_passing: int
    most_passing: int | None
    samples_bad: int
    commits: int
    decoding_s: float
    samples_read: int
    guest_reads: int
    fetched_bytes: int
    ring_bytes: int
    transit_bytes: int
    ring_backed_bytes: int
    ring_used_bytes: int
    encoded_bytes: int
    spill_bytes: int
    spill_used_bytes: int
    prefetchers: int
    service_pids: list[int]
    num_workers: int
    restarts: int
    batches_in_slots: int
    batches_copied: int
    batches_inline: int
    batch_bytes: int
    batch_backed_bytes: int

    @property
    def decodes_per_sample(self) -> float:
        """Samples decoded per sample of the dataset; 1.0 once all are there, where all fit the ring.

        Of a stream of unknown length, per sample that was read.
        """
        return self.commits / max(self.samples_read if self.num_rows is None else self.num_rows, 1)

    @property
    def hit_rate(self) -> float:
        """The share of reads so far that needed no decoding of their own."""
        return max(0.0, 1 - self.commits / self.samples_read) if self.samples_read else 0.0
