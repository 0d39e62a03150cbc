"""Plans put together of others: several sources in one set, slices of splits, and splits one behind the other.

::

    part 0   ├──chunk──┼──chunk──┼──chunk──┤            its rows, from 0
    part 1   ├────chunk────┼────chunk────┤              its own, from 0
    whole         ├────┼──chunk──┼───┼────chunk────┤    a piece of each part, one behind the other, from 0

The whole names chunks of its parts, or pieces of them, and has no reader of its own: who reads one has the part's
reader read that part's chunk, and keeps the piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import pyarrow as pa

from shmloader.errors import SourceError
from shmloader.sources.base import Chunk, OpenReader, Reader, SourcePlan, SourceRequest

#: As `shmloader.sources.open_reader`, which this module cannot import.
OpenOne = Callable[[SourceRequest | Sequence[SourceRequest], SourcePlan, Callable[[], None]], Reader | OpenReader]


@dataclass(frozen=True)
class Piece:
    """Rows ``first`` to ``stop - 1`` of a plan."""

    plan: SourcePlan
    first: int
    stop: int


def joined(pieces: Sequence[Piece], like: SourcePlan) -> SourcePlan:
    """The plan of ``pieces``, one behind the other. like: the same, as far as it is not about rows and chunks."""
    chunks: list[Chunk] = []
    units: list[int] = []
    chunk_bytes: list[int] = []
    shards: list[str] = []
    row = 0
    for part, piece in enumerate(pieces):
        first_of: dict[int, int] = {}  # the first chunk of each unit of the part
        for at, chunk in enumerate(piece.plan.chunks):
            start, stop = max(chunk.first_row, piece.first), min(chunk.first_row + chunk.num_rows, piece.stop)
            if start >= stop:
                continue
            units.append(first_of.setdefault(piece.plan.units[at], len(chunks)))
            place = (part, at, start - chunk.first_row)
            chunks.append(Chunk(row, stop - start, len(shards) + chunk.shard, place))
            chunk_bytes.append(-(-piece.plan.chunk_bytes[at] * (stop - start) // chunk.num_rows))
            row += stop - start
        shards += piece.plan.shards
    plans = [piece.plan for piece in pieces]
    sizes = [plan.num_bytes for plan in plans if plan.num_bytes is not None]
    return replace(
        like,
        mode=" + ".join(dict.fromkeys(plan.mode for plan in plans)),
        num_rows=row,
        shards=tuple(shards),
        chunks=tuple(chunks),
        units=tuple(units),
        chunk_bytes=tuple(chunk_bytes),
        num_bytes=sum(sizes) if len(sizes) == len(plans) else None,
        notices=_each_once(plan.notices for plan in plans),
        warnings=_each_once(plan.warnings for plan in plans),
        shard_bytes=(),
        footer_bytes=(),
        listing=None,
        parts=tuple(plans),
    )


def mixed(plans: Sequence[SourcePlan]) -> SourcePlan:
    """The plan of several sources: all rows of the first, then all of the second, …; sources of one name are numbered.

    Raises:
        SourceError: nobody knows how many rows one of them has.
    """
    _check_lengths(plans)
    plans = _told_apart(plans)
    like = replace(
        plans[0],
        name=" + ".join(plan.name for plan in plans),
        split=" + ".join(dict.fromkeys(plan.split for plan in plans)),
        arrow_schema=b"",
        revision=None,
        root=None,
        resolved={},
        why=None,
        is_mixed=True,
    )
    return joined([Piece(plan, 0, plan.num_rows or 0) for plan in plans], like)


class PartsReader:
    """Reads the chunks of a plan with parts. Built and used in one prefetcher, in one thread.

    A part's reader is opened when its first chunk is read. requests: one for each source of the plan.
    """

    def __init__(
        self,
        requests: Sequence[SourceRequest],
        plan: SourcePlan,
        open_one: OpenOne,
        touch: Callable[[], None] = lambda: None,
    ) -> None:
        assert len(requests) == len(plan.sources)
        whole = plan.resolve(requests[0])
        self._requests = tuple(requests) if plan.is_mixed else (whole,) * len(plan.parts)
        self._plan, self._open_one, self._touch = plan, open_one, touch
        self._readers: dict[int, Reader] = {}

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``; see `Reader.read`."""
        part, at, before = chunk.piece
        inner = self._plan.parts[part].chunks[at]
        wanted = inner.first_row + before
        for first, batch in self._reader(part).read(inner):
            start, stop = max(wanted - first, 0), min(wanted + chunk.num_rows - first, batch.num_rows)
            if start < stop:
                yield chunk.first_row + first + start - wanted, batch.slice(start, stop - start)

    def close(self) -> None:
        """Close what the parts' readers have open."""
        for reader in self._readers.values():
            reader.close()
        self._readers = {}

    def _reader(self, part: int) -> Reader:
        found = self._readers.get(part)
        if found is None:
            opened = self._open_one(self._requests[part], self._plan.parts[part], self._touch)
            assert not isinstance(opened, OpenReader)  # a part's length is known
            found = self._readers[part] = opened
        return found


def _check_lengths(plans: Sequence[SourcePlan]) -> None:
    for plan in plans:
        if plan.is_open:
            others = ", ".join(repr(other.name) for other in plans if other is not plan)
            raise SourceError(
                f"Nobody knows how many rows {plan.name!r} has, so it cannot be one of several datasets (here beside "
                f"{others}). Have it counted, by use_streaming=False (it is downloaded) or by ShmMultimodalDataset; or "
                "iterate over it alone.",
                dataset=plan.name,
            )


def _told_apart(plans: Sequence[SourcePlan]) -> list[SourcePlan]:
    """The plans, each under a name of its own: "Dataset", "Dataset (2)", …"""
    names = Counter(plan.name for plan in plans)
    taken: set[str] = set()
    found = []
    for plan in plans:
        name = plan.name
        if name in taken:
            name = next(new for n in count(2) if (new := f"{plan.name} ({n})") not in taken and new not in names)
        taken.add(name)
        found.append(plan.named(name))
    return found


def _each_once(texts: Iterator[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for some in texts for text in some))
