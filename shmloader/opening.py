"""Opening a set: its files, its services, its first owner; and how much memory it may take."""

from __future__ import annotations

import os
import warnings

from shmloader.files import RingFiles
from shmloader.log_pipe import LogPipe
from shmloader.options import DEFAULT_RING_SHARE, ByteSize, Options, parse_size
from shmloader.prefetch.launch import SetFiles, start_set
from shmloader.prefetch.payload import Work, write
from shmloader.reader import Reader
from shmloader.ring import memory_limits
from shmloader.spill_file import make_spill_file
from shmloader.tokens import open_batch_ring, trim_batch_ring

#: Bytes that the datasets of this process which took the default size need at most, by the set's uuid.
_default_rings: dict[str, int] = {}
#: Of those that took the default share of a disk: its device, and bytes that they may write there.
_default_spills: dict[str, tuple[int, int]] = {}


def open_set(work: Work, options: Options) -> Reader:
    """Make a set and its services; this process is its owner.

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
        "window_bytes": parse_size(options.window_bytes).resolve(limit),
        "num_prefetchers": options.num_prefetchers(),
        "log": options.log,
    }
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
        open_batch_ring()
        reader = Reader(files, plan, options.timeout_s)
        stats = reader.attach().segment.stats()
        # Where nothing is ever fetched again, a disk that cannot be had is not missed.
        if spill.fd is None and stats["transit_bytes"] and not plan.source.is_open:
            _warn_of_no_disk(options, spill.why_not)
    except BaseException:
        if reader is not None:
            reader.close()  # it may have entered the set
        else:
            for fd in (*ring_files.fds, *fds):
                os.close(fd)
            if pipe is not None:
                pipe.close()
        raise
    if options.ring_bytes is None:
        record_bytes = plan.schema.most_record_bytes() if plan.schema is not None else None
        # Where the samples' sizes are not known yet, leave as much to the datasets that come after.
        num_rows = plan.source.num_rows
        if num_rows is None:
            most = stats["transit_bytes"]
        else:
            most = size // 2 if record_bytes is None else record_bytes * num_rows
        _default_rings[ring_files.uuid] = most
    if options.spill_bytes is None:
        _default_spills[ring_files.uuid] = spill.device, stats["spill_bytes"]  # none where all fits the ring
    return reader


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
        size = max(whole - sum(_default_rings.values()), whole // 8)
    return max(4096, size // 4096 * 4096)


def close_set(reader: Reader, pid: int) -> None:
    """Leave the set, if this is the process (``pid``) that attached: a forked child does not close its parent's."""
    if os.getpid() == pid:
        _default_rings.pop(reader.files.ring.uuid, None)
        _default_spills.pop(reader.files.ring.uuid, None)
        reader.close()
        trim_batch_ring()
