"""Where rows come from: ``make_plan`` says what there is and how it is cut, ``open_reader`` reads it.

::

    SourceRequests ──make_plan──▶ SourcePlan ──open_reader──▶ Reader.read(chunk) ──▶ Arrow batches
                    (planner)                 (prefetchers)

    make_plan                    several sources → one plan, whose parts are theirs        several.py
      └─▶ planning.plan_source   a slice or a sum of splits → a plan of theirs, likewise   splits.py
            └─▶ one split of one source, as the table says

============  ======================================  =================================
mode          rows come from                          chunks
============  ======================================  =================================
local         Parquet files on this machine           row groups, any order
downloaded    the same, fetched from the Hub first    row groups, any order
streaming     Parquet files on the Hub                row groups, any order
files         loose files on this machine             64 files and 64 MiB, any order
remote files  loose files on the Hub                  the same
arrow         Arrow files on this machine             64 rows, any order
loaded        a ``datasets.Dataset``, prepared Arrow  64 rows, any order
sequential    a stream, or files of another format    64 rows, front to back
synthetic     nowhere: they are made up               64 rows, any order
============  ======================================  =================================

A stream whose length nobody tells is counted, or for an iterable request taken as it is: the plan is *open* then, and
names no chunks.

A row group of more than 64 MiB is cut into several chunks, which are read front to back.

Importing this package imports neither ``datasets`` nor ``huggingface_hub``; nothing here opens a connection
before ``make_plan`` or ``open_reader`` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shmloader.sources.base import OpenReader, Reader, SourcePlan, SourceRequest

__all__ = ["make_plan", "open_reader"]


def make_plan(*requests: SourceRequest) -> SourcePlan:
    """What the requested datasets hold, and how they are cut into chunks. Planner only.

    Of several the rows are numbered one dataset after the other. ``max_samples`` of the first is that of all together.

    Imports ``datasets``, unless an earlier run has planned the same local files (plan_cache.py).

    Raises:
        DatasetNotFoundError, SplitNotFoundError, EmptyDatasetError, ColumnError: as their names say.
        ReadError: a file cannot be read. SourceError: the Hub cannot be reached, or the card contradicts
            the data; of several, that one has no known length. None of them shows a token.
    """
    plans = [_plan_one(request) for request in requests]
    if len(plans) == 1:
        plan = plans[0].named(plans[0].name)
    else:
        from shmloader.sources.several import mixed

        plan = mixed(plans)
    return plan.first(requests[0].max_samples)


def _plan_one(request: SourceRequest) -> SourcePlan:
    from shmloader.sources import plan_cache

    plan = plan_cache.load(request)
    if plan is None:
        from shmloader.sources.fallback import plan_with_fallback

        plan = plan_with_fallback(request)
        plan_cache.store(request, plan)
    return plan


def open_reader(
    request: SourceRequest | Sequence[SourceRequest], plan: SourcePlan, touch: Callable[[], None] = lambda: None
) -> Reader | OpenReader:
    """A reader of the plan's chunks; of an open plan an `OpenReader`. Prefetcher only.

    Imports ``datasets`` only for what is loaded or sequential.

    request: what the plan was made for; the same number of them.
    touch: called whenever something was read, also of what nobody asked for and is only passed over.
    """
    requests = (request,) if isinstance(request, SourceRequest) else tuple(request)
    if plan.parts:
        from shmloader.sources.several import PartsReader

        return PartsReader(requests, plan, open_reader, touch)
    (request,) = requests
    request = plan.resolve(request)
    if plan.mode == "synthetic":
        from shmloader.sources.synthetic import SyntheticReader

        return SyntheticReader(request, plan, touch)
    if plan.listing is not None:
        from shmloader.sources.listing import ListingReader

        return ListingReader(request, plan, touch)
    if plan.mode in ("local", "downloaded", "streaming"):
        from shmloader.sources.parquet import ParquetReader

        return ParquetReader(request, plan, touch)
    if plan.mode == "arrow":
        from shmloader.sources.arrow import ArrowReader

        return ArrowReader(request, plan, touch)
    if plan.mode == "loaded":
        from shmloader.sources.loaded import LoadedReader

        return LoadedReader(request, plan, touch)
    if plan.is_open:
        from shmloader.sources.open_stream import OpenStreamReader

        return OpenStreamReader(request, plan, touch)
    from shmloader.sources.stream import StreamReader

    return StreamReader(request, plan, touch)
