"""Fields of a batch that the core gathers from the ring: which, from where, and into what."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

import shmloader._native as native
from shmloader.collate.lengths import Lengths
from shmloader.errors import ShmloaderError
from shmloader.keys import Face
from shmloader.reader import Attachment
from shmloader.sample import Field
from shmloader.views import Sample, sources_in, tensor_over, torch_dtype

#: Records of one batch that lie in the same memory: their references, their rows in the batch (None: 0, 1, …), and the
#: memory: the ring, or copies of this process.
Group = tuple[bytes, bytes | None, native.Mapping]

#: What the core does for one field: native op, index of the field, and the constants that the binding takes.
Op = tuple[int, int, int, bytes, bytes, bytes, bytes]

#: The shape that one sample's value takes in a batch; None: the values do not fit side by side, or are not shown.
Place = tuple[int, ...] | None


class Output(NamedTuple):
    """One tensor of a batch: [B, *shape]. ops: for each lot; None: ``fill`` stands for its samples."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    ops: tuple[Op | None, ...]
    fill: float


@dataclass(frozen=True)
class Lot:
    """The records of one dataset in a batch."""

    attachment: Attachment
    face: Face
    groups: tuple[Group, ...]

    def sources(self) -> list[tuple[int, int]]:
        """Of each of its records, the row in the batch and the index of its source."""
        found: list[tuple[int, int]] = []
        for packed, rows, base in self.groups:
            num = len(packed) // native.REF_BYTES
            is_one = len(self.face.sources) == 1
            of = [0] * num if is_one else sources_in(self.attachment, packed, num, base)
            found += zip(range(num) if rows is None else memoryview(rows).cast("I"), of, strict=True)
        return found

    def places(self, kept: tuple[str, ...]) -> tuple[Place, ...]:
        """The place that each field's value takes.

        Raises:
            ShmloaderError: a sample lacks one of the fields ``kept``, and nothing in the batch would tell.
        """
        face = self.face
        if face.places is not None:
            return face.places
        segment = self.attachment.ring.segment
        measured = [
            (len(packed) // native.REF_BYTES, segment.measure(packed, len(face.fields), base))
            for packed, _, base in self.groups
        ]
        places: list[Place] = []
        for index, (field, is_shown) in enumerate(zip(face.fields, face.is_shown, strict=True)):
            of_field = [(n, *measures[index]) for n, measures in measured]
            num_absent = sum(absent for _, _, _, absent in of_field)
            if num_absent and face.is_strict and field.optional and field.name in kept:
                raise untold(field.name)
            seen = [(low, high) for n, low, high, absent in of_field if absent < n]
            places.append(_place(field, seen) if is_shown and (field.optional or not num_absent) else None)
        return tuple(places)


def untold(name: str) -> ShmloaderError:
    """For a batch that lacks a field in some sample, without a mask that could tell."""
    return ShmloaderError(
        f"A sample of the batch lacks {name!r}, and with keys='hf' no field of a batch can tell which ones have it. "
        "Give the dataset a dict, as keys={'text': 'input_ids', 'image': 'pixel_values', …}: then "
        f"'{name}_mask' tells.",
        field=name,
    )


def lots_of(samples: Sequence[Any], lengths: Lengths) -> tuple[Lot, ...]:
    """The records that all of ``samples`` are, by their datasets; none if one of them is something else."""
    first = samples[0]
    refs = first._refs if type(first) is Sample else None
    if refs is None:
        return ()
    if len(refs) == len(samples) and all(
        type(s) is Sample and s._refs is refs and s._index == i for i, s in enumerate(samples)
    ):  # mostly: those of one look-up at once
        return (Lot(first._attachment, lengths.of(first._attachment.face), ((refs.packed, None, refs.base),)),)
    found: dict[int, tuple[Attachment, dict[int, tuple[native.Mapping, list[bytes], list[int]]]]] = {}
    for row, sample in enumerate(samples):
        if type(sample) is not Sample or sample._refs is None or sample._attachment is None:
            return ()
        _, groups = found.setdefault(id(sample._attachment), (sample._attachment, {}))
        base = sample._refs.base
        _, packed, rows = groups.setdefault(id(base), (base, [], []))
        packed.append(sample._refs.one(sample._index))
        rows.append(row)
    return tuple(
        Lot(
            attachment,
            lengths.of(attachment.face),
            tuple((b"".join(packed), array("I", rows).tobytes(), base) for base, packed, rows in groups.values()),
        )
        for attachment, groups in found.values()
    )


@dataclass(frozen=True)
class Gathering:
    """What the core is to gather: the records, and the tensors to make of them."""

    lots: tuple[Lot, ...]
    outputs: tuple[Output, ...]

    @classmethod
    def of(
        cls, lots: tuple[Lot, ...], touched: Sequence[Sample], names: tuple[str, ...], lengths: Lengths
    ) -> Gathering:
        """All fields that still are the records' and fit side by side; their masks, unless the user has some."""
        if not lots:
            return cls((), ())
        faces = tuple(lot.face for lot in lots)
        kept = _kept(faces, lengths)
        if touched:
            kept = tuple(name for name in kept if all(sample.is_view(name) for sample in touched))
        return cls(lots, _outputs(faces, tuple(lot.places(kept) for lot in lots), kept, names))

    @cached_property
    def names(self) -> set[str]:
        """The fields' and masks' names."""
        return {output.name for output in self.outputs}

    def run(self, outs: Sequence[Any]) -> None:
        """Fill ``outs``: writable bytes, one for each output."""
        if len(self.lots) > 1:
            self._fill(outs)
        for i, lot in enumerate(self.lots):
            ops = [(*op, out) for output, out in zip(self.outputs, outs, strict=True) if (op := output.ops[i])]
            for first in range(0, len(ops), native.MAX_FIELDS):
                some = ops[first : first + native.MAX_FIELDS]  # a field may have masks beside it
                for packed, rows, base in lot.groups:
                    lot.attachment.ring.segment.gather(packed, rows, some, base)

    def _fill(self, outs: Sequence[Any]) -> None:
        for output, out in zip(self.outputs, outs, strict=True):
            if None in output.ops and len(flat := memoryview(out)):
                tensor_over(flat, output.dtype, (len(flat) // output.dtype.itemsize,)).fill_(output.fill)


def _place(field: Field, seen: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Place:
    """Where values fit whose least and largest dimensions are in ``seen``; as the schema says if there are none."""
    if not seen:
        return tuple(n or 0 for n in field.shape)
    rank = len(field.shape)
    low = tuple(map(min, zip(*(low[:rank] for low, _ in seen), strict=True)))
    high = tuple(map(max, zip(*(high[:rank] for _, high in seen), strict=True)))
    return high if low == high or (low[1:] == high[1:] and field.pad is not None) else None


def rounded(field: Field, length: int) -> int:
    """The padded length of a batch whose longest value has ``length``."""
    is_ragged = field.pad is not None and field.shape[:1] == (None,)
    return -(-length // field.multiple_of) * field.multiple_of if is_ragged else length


@lru_cache(maxsize=256)
def _kept(faces: tuple[Face, ...], lengths: Lengths) -> tuple[str, ...]:
    """The fields of untouched samples that are tensors, and that the core can lay side by side."""
    names = dict.fromkeys(name for face in faces for name in face.index)
    fields = {name: [field for face in faces if (field := face.field(name))] for name in names}
    return tuple(n for n in names if lengths.is_gathered(n) and not any(field.is_text for field in fields[n]))


@lru_cache(maxsize=1024)
def _outputs(
    faces: tuple[Face, ...], places: tuple[tuple[Place, ...], ...], kept: tuple[str, ...], names: tuple[str, ...]
) -> tuple[Output, ...]:
    """names: the keys of the samples, which a mask does not take the place of."""
    outputs: list[Output] = []
    for name in kept:
        at = [(face, face.index.get(name)) for face in faces]
        fields = [None if index is None else face.fields[index] for face, index in at]
        have = [field for field in fields if field is not None]
        in_lots = [of_lot[index] for (_, index), of_lot in zip(at, places, strict=True) if index is not None]
        shape = _common_place(have, in_lots)
        dtypes = {_dtype(field) for field in have}
        masks = {face.masks[index] for face, index in at if index is not None}
        if shape is None or len(dtypes) > 1 or len(masks) > 1:
            continue
        indices = [index for _, index in at]
        ops = _ops(native.COPY, indices, fields, shape)
        outputs.append(Output(name, dtypes.pop(), shape, ops, _fill_of(have)))
        if (mask := masks.pop()) is not None and mask not in names:
            outputs.append(Output(mask, torch.int64, shape[:1], _ops(native.MASK, indices, fields, shape[:1]), 0))
        presence = presence_name(faces, name, is_lacking=len(have) < len(faces))
        if presence is not None and presence not in names:
            outputs.append(Output(presence, torch.bool, (), _ops(native.PRESENT, indices, fields, ()), 0))
    return tuple(outputs)


def presence_name(faces: Sequence[Face], name: str, is_lacking: bool) -> str | None:
    """The name of the bool [B] of the field ``name``; None: there is none. is_lacking: some samples lack the field.

    Raises:
        ShmloaderError: some do, and `Face.is_strict`.
    """
    of_field = [face for face in faces if name in face.index]
    if not is_lacking and not any(name in face.optional for face in of_field):
        return None
    if is_lacking and any(face.is_strict for face in of_field):
        raise untold(name)
    return of_field[0].presence(name) if of_field else f"{name}_mask"


def _common_place(fields: Sequence[Field], places: Sequence[Place]) -> Place:
    first = places[0]
    if first is None:
        return None
    for place in places[1:]:
        if place is None or len(place) != len(first) or place[1:] != first[1:]:
            return None
    longest = tuple(max(place[:1] for place in places if place is not None))
    if any(place != (*longest, *first[1:]) for place in places) and any(field.pad is None for field in fields):
        return None
    if not longest:
        return first
    multiple = math.lcm(*(rounded(field, 1) for field in fields))
    return (-(-longest[0] // multiple) * multiple, *first[1:])


def _dtype(field: Field) -> torch.dtype:
    return torch.float32 if field.scale is not None else torch_dtype(field.numpy_dtype)


def _fill_of(fields: Sequence[Field]) -> float:
    pad = pad_of(fields)
    return 0.0 if pad is None else pad


def pad_of(fields: Iterable[Field | None]) -> float | None:
    """What stands in a batch where a field has no value, by the first dataset that says so; None: none does."""
    told = (field.pad for field in fields if field is not None and field.scale is None)
    return next((pad for pad in told if pad is not None), None)


def _ops(
    op: int, indices: Sequence[int | None], fields: Sequence[Field | None], shape: tuple[int, ...]
) -> tuple[Op | None, ...]:
    """The op of each lot; a COPY of what is normalised is NORMALIZE."""
    return tuple(
        None if index is None or field is None else (_op(op, field), index, *_op_constants(field, shape))
        for index, field in zip(indices, fields, strict=True)
    )


def _op(op: int, field: Field) -> int:
    return native.NORMALIZE if op == native.COPY and field.scale is not None else op


@lru_cache(maxsize=1024)
def _op_constants(field: Field, shape: tuple[int, ...]) -> tuple[int, bytes, bytes, bytes, bytes]:
    """item_bytes, dims, pad, scale, shift: packed as the binding takes them. pad: an item of what comes out."""
    dtype = np.dtype(np.float32) if field.scale is not None else field.numpy_dtype
    pad = np.array(_fill_of([field])).astype(dtype).tobytes()
    scale, shift = (struct.pack(f"{len(v or ())}f", *(v or ())) for v in (field.scale, field.shift))
    return field.numpy_dtype.itemsize, struct.pack(f"{len(shape)}I", *shape), pad, scale, shift
