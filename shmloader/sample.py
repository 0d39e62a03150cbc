"""What a sample is: its fields, and how they lie in a record of the ring.

A record is one contiguous, 64-byte-aligned block (little-endian, native sizes; the C core reads the same
structure, ``shml_record_t`` in ``native/shml.h``)::

    offset 0   u32 num_fields   u32 source   u64 seal
    offset 16  per field, 40 bytes: u64 offset, u64 num_bytes, u32 dims[6]
    then       the fields' bytes, each 64-byte aligned

``seal`` is 0, or with ``SHMLOADER_VERIFY`` the record's checksum (checksum.py). ``offset`` counts from the start of the
record, 0 says that the sample lacks the field; two fields may
share their bytes (``Field.same_as``). Fields come in the schema's order.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

MAX_RANK = 6
ALIGNMENT = 64
_HEADER = struct.Struct("<IIQ")
_ENTRY = struct.Struct("<QQ6I")


@dataclass(frozen=True)
class Field:
    """One named tensor of a sample.

    dtype: numpy name of what the ring stores ("int64", "uint8", "float32", …).
    shape: the stored shape; None for a dimension that differs from sample to sample.
    pad: what fills a shorter sample's tail in a batch; None: the shapes of a batch must agree.
    most: the largest shape that a value can have; None: not known (or as ``shape`` says).
    mask: name of the batch's int64 [B, Lmax] field that is 1 where this one holds a value.
    same_as: name of the field whose bytes it shares (nothing is stored twice).
    scale, shift: per channel (first dimension); the reader gets ``float32(stored) * scale + shift``.
    is_text: the stored uint8 [n] are UTF-8; the reader gets a str.
    optional: a sample may lack it; a batch then has zeros in its place, and a mask of its samples (`presence`).
    multiple_of: the padded length of a batch is rounded up to a multiple of this.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    pad: float | None = None
    mask: str | None = None
    same_as: str | None = None
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    is_text: bool = False
    most: tuple[int, ...] | None = None
    optional: bool = False
    multiple_of: int = 1

    @property
    def presence(self) -> str | None:
        """Name of the batch's bool [B] field that tells which samples have this one; None: all do."""
        return f"{self.name}_mask" if self.optional else None

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return np.dtype(self.dtype)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Fields and schemas are keys of caches that every batch looks into; hashing their items takes microseconds.
        return hash((self.name, self.dtype, self.shape))

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of one sample's value of ``shape``."""
        return math.prod(shape) * self.numpy_dtype.itemsize


@dataclass(frozen=True)
class Schema:
    """The fields of every sample of a dataset, in order, and what all samples of a source share.

    task_types: of each source, "text", "vision", "audio", "vision_text" or "audio_text".
    sources: names of the sources; a record holds the index of its own.
    own: of each source the fields that its samples may have, of ``fields``, with what holds for them alone: a shape
        that is the same for all, or that they share their bytes with another; empty: they are ``fields``.
    """

    fields: tuple[Field, ...]
    task_types: tuple[str, ...]
    sources: tuple[str, ...]
    own: tuple[tuple[Field, ...], ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.fields, self.task_types, self.sources))

    def fields_of(self, source: int) -> tuple[Field, ...]:
        """The fields that samples of a source may have."""
        return self.own[source] if self.own else self.fields

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The keys of a sample that has all fields, in order."""
        return (*(field.name for field in self.fields), "task_type", "source")

    def to_json(self) -> str:
        """A text from which `from_json` makes an equal schema."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """The schema that `to_json` wrote."""
        raw = json.loads(text)
        fields, *own = (tuple(Field(**_with_tuples(field)) for field in some) for some in (raw["fields"], *raw["own"]))
        return cls(fields, tuple(raw["task_types"]), tuple(raw["sources"]), tuple(own))

    @cached_property
    def header_bytes(self) -> int:
        """Bytes before the first field's."""
        return _align(_HEADER.size + len(self.fields) * _ENTRY.size)

    def record_bytes(self) -> int | None:
        """Size of every record in bytes, or None where a field's shape differs, or the field may be absent."""
        sizes: set[int] = set()
        for source in range(len(self.sources)):
            shapes: dict[str, tuple[int, ...]] = {}
            for field in self.fields_of(source):
                known = tuple(n for n in field.shape if n is not None)
                if field.optional or len(known) != len(field.shape):
                    return None
                shapes[field.name] = known
            sizes.add(RecordLayout(self, shapes, source).num_bytes)
        return sizes.pop() if len(sizes) == 1 else None

    def most_record_bytes(self) -> int | None:
        """No record is larger, in bytes; None where some field may have any shape."""
        most = 0
        for source in range(len(self.sources)):
            shapes: dict[str, tuple[int, ...]] = {}
            for field in self.fields_of(source):
                shape = field.shape if field.most is None else field.most
                known = tuple(n for n in shape if n is not None)
                if len(known) != len(shape):
                    return None
                shapes[field.name] = known
            most = max(most, RecordLayout(self, shapes, source).num_bytes)
        return most


#: Stands in a layout for a field that the sample's source lacks.
_NOTHING = Field("", "uint8", ())


class RecordLayout:
    """Where the fields of one sample lie in its record.

    shapes: the shape of each field by name; a field that is missing here is absent from the sample.
    source: the index of the sample's source.
    """

    def __init__(self, schema: Schema, shapes: Mapping[str, Sequence[int]], source: int = 0) -> None:
        self.schema = schema
        self.source = source
        self.entries: list[tuple[Field, int, int, tuple[int, ...]]] = []
        offsets: dict[str, int] = {}
        end = schema.header_bytes
        own = {field.name: field for field in schema.fields_of(source)}
        for name in (field.name for field in schema.fields):
            field = own.get(name, _NOTHING)
            if name not in shapes:
                self.entries.append((field, 0, 0, ()))
                continue
            shape = tuple(shapes[field.name])
            size = field.num_bytes(shape)
            if field.same_as is not None:
                offset = offsets[field.same_as]
            else:
                offset, end = end, _align(end + size)
            offsets[field.name] = offset
            self.entries.append((field, offset, size, shape))
        self.num_bytes = end

    def write_header(self, record: memoryview) -> None:
        """Fill the head of ``record`` (writable bytes, at least `num_bytes` long)."""
        _HEADER.pack_into(record, 0, len(self.entries), self.source, 0)
        at = _HEADER.size
        for _, offset, size, shape in self.entries:
            dims = shape + (0,) * (MAX_RANK - len(shape))
            _ENTRY.pack_into(record, at, offset, size, *dims)
            at += _ENTRY.size

    def arrays(self, record: memoryview) -> dict[str, np.ndarray[Any, Any]]:
        """Writable arrays over the stored fields of ``record``; valid as long as ``record`` is."""
        return {
            field.name: np.frombuffer(record, field.numpy_dtype, math.prod(shape), offset).reshape(shape)
            for field, offset, _, shape in self.entries
            if offset and field.same_as is None
        }


def _with_tuples(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
