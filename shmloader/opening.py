"""Opening a set: its files, its services, its first owner; and how much memory it may take."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial

from shmloader.errors import PoisonedError
from shmloader.files import RingFiles, memory_limits
from shmloader.log_pipe import LogPipe
from shmloader.options import DEFAULT_RING_SHARE, ByteSize, Options, parse_size, size_text
from shmloader.prefetch.launch import SetFiles, start_set
from shmloader.prefetch.payload import Work, write
from shmloader.reader import Reader
from shmloader.spill_file import make_spill_file
from shmloader.tokens import batch_budget, batch_ring, open_batch_ring, trim_batch_ring

#: Of the datasets of this process which took the default size: bytes that they may come to take, by the set's uuid.
_default_rings: dict[str, Callable[[], int]] = {}
#: A dataset that does not fit takes so much of what is left of the default: those that come after (for validation,
#: say) find something, and all together no more than there is.
_SHARE_OF_LEFT = 7 / 8
#: But no less than this of all of it, which after some large ones is more than is left.
_LEAST_SHARE = 1 / 64
#: Of those that took the default share of a disk: its device, and bytes that they may write there.
_default_spills: dict[str, tuple[int, int]] = {}


def open_set(work: Work, options: Options, cache_size: int | None = None) -> Reader:
    """Make a set and its services; this process is its owner.

    cache_size: most samples that stay in the ring; None: as many as find room.

    Raises:
        OptionError: nothing can be kept in the folder that was asked for.
        ShmloaderError: what the planner found, or the services could not do; nothing is left of the set.
    """
    size = _ring_size(options)
    limit, _, _ = memory_limits()
    ring_files = RingFiles.create()
    head = {
        "uuid": ring_files.uuid,
        "ring_bytes": size,
        "in_flight": options.in_flight,
        "ahead": options.ahead,
        "cache_size": cache_size,
        "window_bytes": parse_size(options.window_bytes).resolve(limit),
        "num_prefetchers": options.num_prefetchers(),
        "verify": options.verify,
        "log": options.log,
    }
    if options.ring_bytes is None:
        _default_rings[ring_files.uuid] = lambda: size
    fds: list[int] = []
    pipe: LogPipe | None = None
    reader: Reader | None = None
    try:
        spill = make_spill_file(options, _given_bytes)
        if spill.fd is not None:
            fds.append(spill.fd)
        head |= {"spill_bytes": spill.num_bytes, "spill_dir": spill.folder, "why_no_spill": spill.why_not}
        fds.append(payload_fd := write(work, head))
        fds.append(plan_fd := os.memfd_create("shmloader-plan", os.MFD_CLOEXEC))
        pipe = LogPipe.make()
        files = SetFiles(ring_files, payload_fd, plan_fd, spill.fd, pipe)
        plan = start_set(files)
        _open_batch_ring(options)
        reader = Reader(files, plan, options.timeout_s, options.verify)
        stats = reader.attach().segment.stats()
        # Where nothing is ever fetched again, a disk that cannot be had is not missed.
        if spill.fd is None and stats["transit_bytes"] and not plan.source.is_open:
            _warn_of_no_disk(options, spill.why_not)
    except BaseException:
        _default_rings.pop(ring_files.uuid, None)
        if reader is not None:
            reader.close()  # it may have entered the set
        else:
            for fd in (*ring_files.fds, *fds):
                os.close(fd)
            if pipe is not None:
                pipe.close()
        raise
    if options.ring_bytes is None:
        _default_rings[ring_files.uuid] = partial(_may_take, reader, _most_bytes(reader, stats))
    if options.spill_bytes is None:
        _default_spills[ring_files.uuid] = spill.device, stats["spill_bytes"]  # none where all fits the ring
    return reader


def _open_batch_ring(options: Options) -> None:
    """Make this process's batch ring, unless it has one; say so if that one's size is not what is asked for."""
    asked = None if options.batch_bytes is None else batch_budget(parse_size(options.batch_bytes, "batch_bytes"))
    open_batch_ring(asked)
    ring = batch_ring()
    have = ring.ring.stats()["budget_bytes"] if ring is not None else asked
    if asked is not None and have is not None and asked != have:
        warnings.warn(
            f"batch_bytes={options.batch_bytes!r} ({size_text(asked)}) was asked for, but the batches of this process "
            f"have {size_text(have)}: they share one ring, which was made with its first dataset and cannot grow or "
            "shrink. Give the first dataset this option, or set SHMLOADER_BATCH_BYTES, which all of them follow.",
            stacklevel=5,  # who makes the dataset
        )


def _given_bytes(device: int) -> int:
    """Of the default share of this disk, what other datasets of this process have."""
    return sum(num_bytes for of, num_bytes in _default_spills.values() if of == device)


def _warn_of_no_disk(options: Options, why_not: str) -> None:
    """Say that what was asked for cannot be had; by default there is a disk where there is one."""
    if options.spill_bytes is None or options.spill_size().num_bytes == 0:
        return
    warnings.warn(
        f"spill_bytes={options.spill_bytes!r} was asked for, but encoded chunks are not kept on disk: {why_not}. Set "
        "SHMLOADER_SPILL_DIR (or Options.spill_dir) to a folder on a local disk that can be written to, or "
        "SHMLOADER_SPILL_BYTES=0 to do without.",
        stacklevel=5,  # who makes the dataset
    )


def _ring_size(options: Options) -> int:
    """Bytes of the ring: what was asked for, else what is left of a quarter of the smallest memory limit."""
    limit, _, _ = memory_limits()
    if options.ring_bytes is not None:
        size = parse_size(options.ring_bytes).resolve(limit)
    else:
        whole = ByteSize(share=DEFAULT_RING_SHARE).resolve(limit)
        left = whole - sum(may_take() for may_take in list(_default_rings.values()))
        size = max(int(left * _SHARE_OF_LEFT), int(whole * _LEAST_SHARE))
    return max(4096, size // 4096 * 4096)


def _most_bytes(reader: Reader, stats: dict[str, int]) -> int:
    """Bytes that the samples of a set take at most, as far as that is known when it is opened."""
    plan, most = reader.plan, stats["resident_bytes"] + stats["transit_bytes"]
    record_bytes = plan.schema.most_record_bytes() if plan.schema is not None else None
    if plan.source.num_rows is None or record_bytes is None:
        return most
    return min(most, record_bytes * plan.source.num_rows)


def _may_take(reader: Reader, most: int) -> int:
    """Bytes that the samples of a set may still come to take: when all are there for good, those that they have."""
    if reader.is_closed or os.getpid() != reader.owner_pid:  # a forked child does not enter its parent's sets for this
        return most
    try:
        stats = reader.attach().segment.stats()
    except PoisonedError:  # who reads from it is told; its memory is taken until it is closed
        return most
    if reader.plan.source.num_rows is None or stats["chunks_todo"] + stats["chunks_claimed"]:
        return most
    return min(most, stats["resident_backed_bytes"] + stats["transit_backed_bytes"])


def close_set(reader: Reader, pid: int) -> None:
    """Leave the set, if this is the process (``pid``) that attached: a forked child does not close its parent's."""
    if os.getpid() == pid:
        _default_rings.pop(reader.files.ring.uuid, None)
        _default_spills.pop(reader.files.ring.uuid, None)
        reader.close()
        trim_batch_ring()
