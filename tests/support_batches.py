"""Datasets of any schema, without services: their records are written by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from support_sets import ring_files
from torch.utils.data import Dataset

import shmloader._native as native
from shmloader.files import RingFiles
from shmloader.keys import Keys
from shmloader.reader import Attachment
from shmloader.ring import Ring
from shmloader.sample import Field, RecordLayout, Schema
from shmloader.tokens import open_batch_ring
from shmloader.views import Sample
from shmloader.writer import Writer

PAD = 7
SIDE = 4

#: Of an image [3, 4, 4]: numbers that float32 has exactly.
SCALE, SHIFT = (0.5, 0.25, 2.0), (-1.0, 0.0, 1.0)

Row = Mapping[str, np.ndarray[Any, Any]]


def tokens(multiple_of: int = 1) -> tuple[Field, Field]:
    """``text`` with its mask, and the ``labels`` that share its bytes."""
    text = Field("text", "int64", (None,), pad=PAD, mask="attention_mask", multiple_of=multiple_of)
    return text, Field("labels", "int64", (None,), pad=-100, same_as="text", multiple_of=multiple_of)


def image(is_float: bool = True, optional: bool = True) -> Field:
    """``image`` [3, 4, 4], uint8 or normalised."""
    scale = {"scale": SCALE, "shift": SHIFT} if is_float else {}
    return Field("image", "uint8", (3, SIDE, SIDE), optional=optional, **scale)


def audio(optional: bool = False) -> Field:
    """``audio`` float32 [6]."""
    return Field("audio", "float32", (6,), optional=optional)


def row(i: int, fields: Sequence[Field], lacking: Sequence[str] = ()) -> dict[str, np.ndarray[Any, Any]]:
    """Known values for each of ``fields``: i + 1 tokens, pixels of i, …"""
    made: dict[str, np.ndarray[Any, Any]] = {}
    for field in fields:
        shape = tuple(i + 1 if n is None else n for n in field.shape)
        if field.name not in lacking:
            made[field.name] = (
                np.full(shape, i, field.numpy_dtype) if field.name != "text" else np.arange(i + 1) + 10 * i
            )
    return made


def pixels(i: int) -> list[float]:
    """What the three channels of a normalised ``image`` of row i hold."""
    return [i * scale + shift for scale, shift in zip(SCALE, SHIFT, strict=True)]


class Records(Dataset[Any]):
    """Samples of records that lie in a ring; made anew in each process, as a dataset's are."""

    def __init__(self, files: RingFiles, schema: Schema, keys: Any, num_rows: int) -> None:
        self.files, self.schema, self.num_rows = files, schema, num_rows
        self.face = Keys.parse(keys).face(schema)
        self._pid = os.getpid()
        self._ring = Ring(files, native.OWNER)
        self._owner = self._ring.slot, self._ring.gen
        self._attachment = Attachment(self._ring, self.face)

    def renamed(self, keys: Any) -> Records:
        """The same records under other names."""
        return Records(self.files, self.schema, keys, self.num_rows)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        if not self._ring.is_home:
            self._ring = Ring(self.files, native.WORKER, self._owner)
            self._attachment = Attachment(self._ring, self.face)
        refs = self._ring.get_many(list(rows), 30)
        return [Sample.over(self._attachment, refs, i) for i in range(len(rows))]


@contextmanager
def records(
    fields: Sequence[Field], rows: Sequence[Row], keys: Any = "shmloader", name: str = "set"
) -> Iterator[Records]:
    """A dataset ``name`` whose samples have ``rows`` as they are stored."""
    schema = Schema(tuple(fields), ("vision_text",), (name,))
    open_batch_ring()
    with ring_files(num_rows=len(rows), rows_per_chunk=len(rows)) as files:
        writer = Writer(Ring(files, native.SERVICE))
        for number, values in enumerate(rows):
            shapes = {field.name: values[field.name].shape for field in fields if field.name in values}
            layout = RecordLayout(schema, shapes)
            ticket = writer.reserve(number, layout.num_bytes)
            assert ticket is not None
            record = writer.record_of(ticket)
            layout.write_header(record)
            for field_name, array in layout.arrays(record).items():
                array[...] = values[field_name]
            del record, array
            writer.commit(ticket)
        yield Records(files, schema, keys, len(rows))
