"""The contract between the services and where rows come from."""

from __future__ import annotations

import base64
import bisect
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from shmloader.catalog import DatasetConfig


@dataclass(frozen=True)
class SourceRequest:
    """What the user asked for, as it travels to the services (cloudpickled, never logged: it may hold a token).

    dataset: a Hub id, a local folder or file, or a loaded ``datasets`` object.
    split: name of the split, as ``datasets`` names it.
    columns: the user's ``columns=``: role ("text", "target", "image", "audio", "labels") → column, or path into one; of
        text several in a list; None: recognise them.
    all_columns: the user's ``process`` takes whole rows, so every column is read and none is chosen.
    load: passed on to ``datasets`` (name, revision, token, data_files, …); not in the repr.
    is_iterable: the rows are only iterated over, so nobody has to know how many they are.
    max_samples: of an iterable request, only so many rows; None: all.
    is_downloaded: what is on a Hub is to be had from local files, downloaded first.
    entry: what a short name stands for; ``dataset`` is that name then; None: ``dataset`` says where it lies.
    fallback: what is allowed where it cannot be read: "synthetic", "download" or "error".
    source_timeout_s: how long a server that does not answer is tried.
    """

    dataset: Any
    split: str
    columns: dict[str, Any] | None = None
    all_columns: bool = False
    load: dict[str, Any] = field(default_factory=dict, repr=False)
    is_iterable: bool = False
    max_samples: int | None = None
    is_downloaded: bool = False
    entry: DatasetConfig | None = None
    fallback: str = "synthetic"
    source_timeout_s: float = 30.0


@dataclass(frozen=True)
class Columns:
    """Which columns make a sample; None where the dataset has none for that role.

    A column inside another one is named by its path ("answers.text"); of ``text`` there may be several, in order.
    target: the answer to ``text``; "options[correct]" is the item of the list "options" whose number is in "correct".
    class_names: of ``labels``, if its feature is a ClassLabel.
    """

    text: str | tuple[str, ...] | None = None
    image: str | None = None
    audio: str | None = None
    labels: str | None = None
    target: str | None = None
    class_names: tuple[str, ...] | None = None


#: Encoded bytes of a row where nothing is known of them (guessed: between a page of text and a photograph).
GUESSED_ROW_BYTES = 64 << 10

#: Ends the name of a source, in messages and in every sample's ``source``, whose rows are made up.
SYNTHETIC = " (synthetic)"

#: Of the JSON of a plan: to be raised with every change of what it holds or of how chunks are cut.
PLAN_VERSION = 6


@dataclass(frozen=True)
class Chunk:
    """Contiguous rows that are read at once.

    first_row: index of its first row in the whole split; num_rows: how many follow on, itself included.
    shard: index into `SourcePlan.shards`. piece: what the reader needs to find the rows in the shard
    (for Parquet: the row group, the first row within it, the row group's rows, and its bytes once
    decompressed, needed columns only; of an open plan: the iteration's key, two numbers, and its epoch; of a plan
    that has parts: the part, the chunk in it, and how many of that one's rows come before).
    """

    first_row: int
    num_rows: int
    shard: int
    piece: tuple[int, ...] = ()


@dataclass(frozen=True)
class SourcePlan:
    """What a source holds and how it is cut; made once by the supervisor, JSON-able, without secrets.

    num_rows: None: nobody knows, perhaps there is no end. The plan is *open* then: it names no chunks, they are cut
    while they are read, each iteration's anew.
    name: as the user sees it in messages and in every sample's ``source``. mode: "streaming" (row groups
    over the network), "local", "downloaded" (local files that were fetched first), "loaded" (a ``datasets.Dataset``),
    "arrow" (Arrow files on this machine), "files" (loose files), "remote files" (the same on a Hub), "sequential" (one
    stream, read front to back; chunks can only be had in order) or "synthetic" (made-up rows). num_bytes: of the
    source's files, where known.
    arrow_schema: of the rows that a reader yields, serialised. revision: the commit, for a Hub dataset.
    root: the local folder that stands for a Hub dataset: its snapshot in the Hub's cache, where it is read offline.
    resolved: what of the request was found out, as arguments for ``dataclasses.replace``: where a short name lies, and
        under which split; of ``load`` what is to be added to it. What reads the plan's chunks goes by `resolve`.
    why: why it is not what was asked for, where it fell back ("synthetic", "downloaded").
    shard_bytes: size of each shard's file, where known. footer_bytes: of each Parquet file on a Hub, those of its
        footer. notices: one line each, for the user to see.
    warnings: the same, of what changes what is trained on, or where it is from.
    units: for each chunk the index of its unit's first chunk. The chunks of a unit lie one behind the other in
    something that can only be read front to back (a large row group, a stream): one reader, in order.
    chunk_bytes: encoded bytes of each chunk, as an Arrow IPC stream: an estimate; where nothing is known, the guess of
    `GUESSED_ROW_BYTES` a row.
    row_bytes: of an open plan, the same for one row.
    listing: of loose files, the rows without the files' bytes (listing.py). Not in the JSON: it travels beside it.
    parts: the plans that this one is put together of (several.py); then it only names their chunks, or pieces of these:
        who reads one asks the part's own reader. A part that is used twice is there twice.
    is_mixed: the parts are sources of their own, and so are what samples are of; else they are splits of one source.
    """

    name: str
    split: str
    mode: str
    num_rows: int | None
    shards: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    columns: Columns
    arrow_schema: bytes
    revision: str | None = None
    num_bytes: int | None = None
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    root: str | None = None
    resolved: dict[str, Any] = field(default_factory=dict)
    why: str | None = None
    shard_bytes: tuple[int, ...] = ()
    footer_bytes: tuple[int, ...] = ()
    units: tuple[int, ...] = ()
    chunk_bytes: tuple[int, ...] = ()
    row_bytes: int = GUESSED_ROW_BYTES
    listing: pa.Buffer | None = field(default=None, repr=False)
    parts: tuple[SourcePlan, ...] = ()
    is_mixed: bool = False

    def __post_init__(self) -> None:
        assert len(self.units) == len(self.chunk_bytes) == len(self.chunks)

    @property
    def is_open(self) -> bool:
        """Nobody knows how many rows there are."""
        return self.num_rows is None

    @property
    def source_rows(self) -> tuple[int | None, ...]:
        """How many rows of each of `sources` there are in the plan."""
        if not self.is_mixed:
            return (self.num_rows,)
        rows = [0] * len(self.parts)
        for chunk in self.chunks:
            rows[chunk.piece[0]] += chunk.num_rows
        return tuple(rows)

    def named(self, name: str) -> SourcePlan:
        """The same under another name, which its splits have as well."""
        if self.name == name and all(part.name == name for part in self.parts):
            return self
        return replace(self, name=name, parts=tuple(part.named(name) for part in self.parts))

    def resolve(self, request: SourceRequest) -> SourceRequest:
        """``request`` as what reads the plan's chunks goes by it: with what was found out, and its own token."""
        found = dict(self.resolved)
        if "load" in found:
            found["load"] = {**request.load, **found["load"]}
        return replace(request, **found)

    @property
    def is_sequential(self) -> bool:
        """Chunks can only be read one after the other."""
        return self.mode == "sequential"

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the rows that a reader yields; where there are parts, see `leaf`."""
        return self._schema

    @cached_property
    def _schema(self) -> pa.Schema:
        return pa.ipc.read_schema(pa.py_buffer(self.arrow_schema))

    @property
    def sources(self) -> tuple[SourcePlan, ...]:
        """What samples are of: the plan itself, or its parts."""
        return self.parts if self.is_mixed else (self,)

    @cached_property
    def _first_rows(self) -> list[int]:
        return [chunk.first_row for chunk in self.chunks]

    def chunk_at(self, row: int) -> int:
        """The chunk that ``row`` lies in."""
        return bisect.bisect_right(self._first_rows, row) - 1

    def source_of(self, chunk: int) -> int:
        """Which of `sources` a chunk is of."""
        return self.chunks[chunk].piece[0] if self.is_mixed else 0

    def leaf(self, chunk: int) -> SourcePlan:
        """The plan, itself without parts, that a chunk is read by."""
        if not self.parts:
            return self
        part, inner, _ = self.chunks[chunk].piece
        return self.parts[part].leaf(inner)

    def origin(self, row: int) -> tuple[SourcePlan, int]:
        """The plan, itself without parts, that ``row`` is of, and its number there."""
        if not self.parts:
            return self, row
        chunk = self.chunks[self.chunk_at(row)]
        part, inner, before = chunk.piece
        plan = self.parts[part]
        return plan.origin(plan.chunks[inner].first_row + before + row - chunk.first_row)

    def listings(self) -> list[pa.Buffer]:
        """The listings of the plan and its parts, each once, in the order in which `from_json` takes them."""
        found = {} if self.listing is None else {self.listing.address: self.listing}
        for part in self.parts:
            found |= {listing.address: listing for listing in part.listings()}
        return list(found.values())

    def to_json(self) -> str:
        """A text from which `from_json` makes an equal plan, given the same ``listings``."""
        return json.dumps(self._raw([listing.address for listing in self.listings()]))

    def _raw(self, listings: list[int]) -> dict[str, Any]:
        """What JSON can hold of it. listings: the address of each."""
        raw = {f.name: getattr(self, f.name) for f in fields(self)}
        raw["columns"] = asdict(self.columns)
        raw["arrow_schema"] = base64.b64encode(self.arrow_schema).decode()
        raw["chunks"] = [(c.first_row, c.num_rows, c.shard, c.piece) for c in self.chunks]
        raw["parts"] = [part._raw(listings) for part in self.parts]
        raw["listing"] = None if self.listing is None else listings.index(self.listing.address)
        return raw

    @classmethod
    def from_json(cls, text: str, listings: Sequence[pa.Buffer] = ()) -> SourcePlan:
        """The plan that `to_json` wrote. listings: see `listings`."""
        return cls._from_raw(json.loads(text), listings)

    @classmethod
    def _from_raw(cls, raw: dict[str, Any], listings: Sequence[pa.Buffer]) -> SourcePlan:
        columns: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.pop("columns").items()}
        chunks = tuple(Chunk(first, num, shard, tuple(piece)) for first, num, shard, piece in raw.pop("chunks"))
        schema = base64.b64decode(raw.pop("arrow_schema"))
        parts = tuple(cls._from_raw(part, listings) for part in raw.pop("parts"))
        at = raw.pop("listing")
        rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(
            columns=Columns(**columns),
            chunks=chunks,
            arrow_schema=schema,
            parts=parts,
            listing=None if at is None else listings[at],
            **rest,
        )

    def first(self, num_rows: int | None) -> SourcePlan:
        """The plan of the first ``num_rows`` rows alone; of all if there are no more, or if None."""
        if num_rows is None or self.num_rows is None or num_rows >= self.num_rows:
            return self
        told = zip(self.chunks, self.chunk_bytes, strict=True)
        kept = [(chunk, num_bytes) for chunk, num_bytes in told if chunk.first_row < num_rows]
        last, last_bytes = kept[-1]
        left = num_rows - last.first_row
        if left < last.num_rows:
            kept[-1] = replace(last, num_rows=left), -(-last_bytes * left // last.num_rows)
        chunks, chunk_bytes = zip(*kept, strict=True)
        units = self.units[: len(kept)]
        return replace(self, num_rows=num_rows, chunks=chunks, chunk_bytes=chunk_bytes, units=units)


class Reader(Protocol):
    """Reads the chunks of a plan. Built and used in one prefetcher, in one thread."""

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``, in order, as (index of the batch's first row in the split, batch).

        Only the needed columns, in few batches where that costs no copy. The next chunk of the same unit goes on
        where this one ended; any other chunk of a unit begins at its front again, and passes over what comes before.

        Raises:
            ReadError: with dataset, shard, first_row and num_rows.
        """
        ...

    def close(self) -> None:
        """Close its files."""
        ...


#: Told of each row of a stream as it came (one row, as the stream gave it; None: one that is passed over); False: no
#: more of them are needed.
OnRow = Callable[[pa.Table | None], bool]


@runtime_checkable
class OpenReader(Protocol):
    """Reads the chunks of an open plan, row by row. See `Reader`."""

    def read(self, chunk: Chunk, on_row: OnRow) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk`` in one batch, once all have come; one that is not full is the last of its iteration.

        None of them, or some, if ``on_row`` said that no more are needed.

        Raises:
            ReadError: the stream failed; after the rows before, if there are any.
        """
        ...

    def plain(self, rows: Sequence[pa.Table]) -> tuple[pa.RecordBatch | None, Exception | None]:
        """The first of ``rows``, as many as are what the plan promises; and why the next one is not. Any thread."""
        ...

    def close(self) -> None:
        """Close its streams."""
        ...

    def keep(self, keys: Collection[tuple[int, int]]) -> None:
        """Close all iterations but these."""
        ...
