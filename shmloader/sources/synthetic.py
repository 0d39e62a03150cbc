"""Made-up rows in the place of a dataset that cannot be reached: its own columns, and nothing of its content.

Each value is a pure function of (dataset, split, row, column), so every process, run and machine makes the same. They
go through the same processors as real rows: images are JPEGs, clips are WAVs, of classes all occur. That a sample is
made up is in its ``source``, and in every text.

The planner imports ``datasets`` only for a slice of a split; the reader needs neither that nor a network.
"""

from __future__ import annotations

import hashlib
import io
import re
import wave
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from shmloader.column_path import choice_of
from shmloader.errors import EmptyDatasetError, SplitNotFoundError
from shmloader.sources.base import SYNTHETIC, Chunk, Columns, SourcePlan, SourceRequest
from shmloader.sources.rows import BATCH_ROWS, MEDIA_TYPE, stream_bytes
from shmloader.sources.splits import ALL

#: Rows of a split (guessed: some batches for each of many workers, made in a few seconds); more where a dataset has
#: more classes than that.
NUM_ROWS = 1000

#: Sides of a picture in pixels, as (width, height): no square, as photographs are none.
_PICTURE = (320, 240)
_SAMPLE_RATE = 16_000
_LEAST_S, _MOST_S = 0.5, 1.5
_NUM_CHOICES = 4
#: Of labels whose classes nobody named.
_NUM_CLASSES = 2
_WORDS = (
    *("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jasper", "kelp", "lagoon"),
    *("maple", "north", "ocean", "pebble", "quartz", "river", "slate", "tundra", "umber", "valley", "willow", "zephyr"),
)

#: What is in a column: of each role the kind of its values.
_KINDS = {"text": "text", "target": "text", "image": "image", "audio": "audio", "labels": "label"}

#: Column, or name inside a struct → kind of its values, or what is inside of it.
_Tree = dict[str, Any]


@dataclass(frozen=True)
class _Maker:
    """What values are made from."""

    dataset: str
    num_classes: int

    def random(self, split: str, row: int, path: str) -> np.random.Generator:
        """The random numbers of one value."""
        named = "\0".join((self.dataset, split, str(row), path)).encode()
        digest = hashlib.blake2b(named, digest_size=16, person=b"shmloader synth").digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))


def can_make(request: SourceRequest) -> bool:
    """Whether the columns that are read of the requested dataset are known, so that rows like its own can be made.

    Not where a ``process`` takes whole rows: the catalog names only the columns that it uses itself.
    """
    return _columns_of(request) is not None and not request.all_columns


def plan_synthetic(request: SourceRequest) -> SourcePlan:
    """The plan of made-up rows for a dataset that `can_make` knows the columns of.

    Each split has `NUM_ROWS` rows, of which a slice (``train[:10%]``) has its part.

    Raises:
        OptionError: the split is no split and no slice or sum of such. EmptyDatasetError: it has no rows.
        SplitNotFoundError: the catalog tells the dataset's splits, and it is none of these.
    """
    chosen = _columns_of(request)
    assert chosen is not None
    schema = pa.schema([(name, _type_of(kind)) for name, kind in _tree(chosen).items()])
    name, num_classes = str(request.dataset), _num_classes(request, chosen)
    shards, chunks = _cut(request, max(NUM_ROWS, num_classes))
    columns = _as_columns(request, chosen)
    plan = SourcePlan(
        name=f"{name}{SYNTHETIC}",
        split=request.split,
        mode="synthetic",
        num_rows=sum(chunk.num_rows for chunk in chunks),
        shards=shards,
        chunks=chunks,
        columns=columns,
        arrow_schema=schema.serialize().to_pybytes(),
        units=tuple(range(len(chunks))),
        chunk_bytes=(0,) * len(chunks),
    )
    reader, more = SyntheticReader(request, plan), stream_bytes(schema)
    row_bytes = reader.rows(chunks[0], 4).nbytes // 4
    sizes = tuple(chunk.num_rows * row_bytes + more for chunk in chunks)
    return replace(plan, chunk_bytes=sizes, num_bytes=sum(sizes))


class SyntheticReader:
    """Makes the chunks of a synthetic plan. Built and used in one prefetcher, in one thread."""

    def __init__(self, request: SourceRequest, plan: SourcePlan, touch: Callable[[], None] = lambda: None) -> None:
        chosen = _columns_of(request)
        assert chosen is not None
        self._plan, self._touch, self._schema = plan, touch, plan.schema
        self._tree = _tree(chosen)
        self._maker = _Maker(str(request.dataset), _num_classes(request, chosen))

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``; see `Reader.read`."""
        yield chunk.first_row, self.rows(chunk, chunk.num_rows)

    def rows(self, chunk: Chunk, most: int) -> pa.RecordBatch:
        """The first ``most`` rows of ``chunk``."""
        split, first = self._plan.shards[chunk.shard], chunk.piece[0]
        rows = []
        for row in range(first, first + min(most, chunk.num_rows)):
            rows.append({name: _value(self._maker, split, row, name, kind) for name, kind in self._tree.items()})
            self._touch()
        return pa.RecordBatch.from_pylist(rows, schema=self._schema)

    def close(self) -> None:
        """There is nothing to close."""


# ---- columns ---------------------------------------------------------------------------------------------


def _columns_of(request: SourceRequest) -> Mapping[str, Any] | None:
    """Role → column, or several of text: what the user said, else the catalog; None: nobody knows."""
    if request.entry is None:
        return None
    chosen = request.entry.columns if request.columns is None else request.columns
    return chosen if chosen and set(chosen) <= _KINDS.keys() else None


def _as_columns(request: SourceRequest, chosen: Mapping[str, Any]) -> Columns:
    entry = request.entry
    assert entry is not None
    named = entry.class_names if chosen.get("labels") == entry.columns.get("labels") else ()
    told: dict[str, Any] = {role: tuple(path) if isinstance(path, list) else path for role, path in chosen.items()}
    return Columns(**told, class_names=tuple(named) or None if "labels" in chosen else None)


def _num_classes(request: SourceRequest, chosen: Mapping[str, Any]) -> int:
    return len(_as_columns(request, chosen).class_names or ()) or _NUM_CLASSES


def _tree(chosen: Mapping[str, Any]) -> _Tree:
    """The columns, with what is in each of them."""
    tree: _Tree = {}
    for role, paths in chosen.items():
        for path in paths if isinstance(paths, list | tuple) else (paths,):
            found = choice_of(path)
            if found is None:
                _plant(tree, path, _KINDS[role])
            else:
                choices, choice = found
                _plant(tree, choices, "choices")
                _plant(tree, choice, "choice")
    return tree


def _plant(tree: _Tree, path: str, kind: str) -> None:
    *outer, name = path.split(".")
    for part in outer:
        inside = tree.setdefault(part, {})
        if not isinstance(inside, dict):  # this column is used as a whole, too
            return
        tree = inside
    if kind == "choices" or name not in tree:  # a list can be read as text, too
        tree[name] = kind


def _type_of(kind: Any) -> pa.DataType:
    if isinstance(kind, dict):
        return pa.struct([(name, _type_of(inner)) for name, inner in kind.items()])
    if kind in ("image", "audio"):
        return MEDIA_TYPE
    if kind in ("label", "choice"):
        return pa.int64()
    return pa.list_(pa.string()) if kind == "choices" else pa.string()


# ---- splits ----------------------------------------------------------------------------------------------


def _cut(request: SourceRequest, num_rows: int) -> tuple[tuple[str, ...], tuple[Chunk, ...]]:
    """The splits that are read, and the chunks: each names the row of its split that it begins with."""
    parts = _parts(request, num_rows)
    splits = tuple(dict.fromkeys(split for split, _, _ in parts))
    chunks: list[Chunk] = []
    at = 0
    for split, first, end in parts:
        for start in range(first, end, BATCH_ROWS):
            chunks.append(Chunk(at, min(BATCH_ROWS, end - start), splits.index(split), (start,)))
            at += chunks[-1].num_rows
    if not chunks:
        raise EmptyDatasetError(
            f"{request.dataset}, split {request.split!r}, has no rows of the {num_rows} that are made up for a split. "
            "Check the slice.",
            dataset=str(request.dataset),
            split=request.split,
        )
    return splits, tuple(chunks)


def _parts(request: SourceRequest, num_rows: int) -> list[tuple[str, int, int]]:
    """(split, first row, end) of each part of the split that is asked for."""
    if request.split == ALL and (every := _every_split(request)):
        parts = [(split, 0, num_rows) for split in every]
    elif re.fullmatch(r"\w+(\.\w+)*", request.split):
        parts = [(request.split, 0, num_rows)]
    else:
        from shmloader.sources.splits import ranges

        parts = ranges(request, lambda name: num_rows)
    _check_known(request, {split for split, _, _ in parts})
    return parts


def _every_split(request: SourceRequest) -> list[str]:
    """The splits that the catalog tells, of the first of its places; [] if it tells none."""
    assert request.entry is not None
    return list(request.entry.repos[0].has)


def _check_known(request: SourceRequest, splits: set[str]) -> None:
    """Raise if the catalog knows the dataset's splits, and one is none of them: made-up rows would hide the mistake."""
    assert request.entry is not None
    repos = request.entry.repos
    if not all(repo.has for repo in repos):
        return
    known = dict.fromkeys(name for repo in repos for name in (*repo.has, *repo.splits))
    for split in sorted(splits - known.keys()):
        raise SplitNotFoundError(
            f"{request.dataset} has no split {split!r}; it has {', '.join(map(repr, known))}. Choose one of these with "
            "split=.",
            dataset=str(request.dataset),
            split=split,
            available=list(known),
        )


# ---- values ----------------------------------------------------------------------------------------------


def _value(maker: _Maker, split: str, row: int, path: str, kind: Any) -> Any:
    """The value of a column, or of what is inside of it, in ``row`` of ``split``."""
    if isinstance(kind, dict):
        return {name: _value(maker, split, row, f"{path}.{name}", inner) for name, inner in kind.items()}
    if kind == "label":  # one after the other, so that all occur
        return row % maker.num_classes
    if kind == "choice":
        return row % _NUM_CHOICES
    random = maker.random(split, row, path)
    if kind == "image":
        return {"bytes": _jpeg(random), "path": f"synthetic-{split}-{row}.jpg"}
    if kind == "audio":
        return {"bytes": _wav(random), "path": f"synthetic-{split}-{row}.wav"}
    told = f"synthetic {path} {row} of {maker.dataset}"
    if kind == "choices":
        return [f"{told}, choice {i}: {_words(random, 1, 6)}" for i in range(_NUM_CHOICES)]
    return f"{told}: {_words(random, 4, 40)}"


def _words(random: np.random.Generator, least: int, most: int) -> str:
    return " ".join(_WORDS[i] for i in random.integers(0, len(_WORDS), random.integers(least, most + 1)))


def _jpeg(random: np.random.Generator) -> bytes:
    """A picture of soft colours, RGB, 320 × 240."""
    from PIL import Image

    file = io.BytesIO()
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    coarse.resize(_PICTURE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _wav(random: np.random.Generator) -> bytes:
    """A clip of two tones and some noise, mono, 16 bits, at 16 kHz."""
    num = int(_SAMPLE_RATE * random.uniform(_LEAST_S, _MOST_S))
    seconds = np.arange(num) / _SAMPLE_RATE
    tones = sum(np.sin(2 * np.pi * random.uniform(100, 2000) * seconds) for _ in range(2))
    samples = 0.25 * tones + 0.02 * random.standard_normal(num)
    file = io.BytesIO()
    with wave.open(file, "wb") as clip:
        clip.setnchannels(1)
        clip.setsampwidth(2)
        clip.setframerate(_SAMPLE_RATE)
        clip.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()
