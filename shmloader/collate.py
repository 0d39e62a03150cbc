"""Samples → batch: the hook by which a stock DataLoader gathers a batch in one pass over the ring.

`Sample` is registered in torch's ``default_collate_fn_map``, so ``default_collate`` brings a list of samples here.
Fields that still are the records' are gathered by the core, straight into a slot of the batch ring (in a worker) or
into fresh tensors. Fields that the user changed, added or took as copies are collated from their values and, in a
worker, copied into the slot beside the others.
"""

from __future__ import annotations

import functools
import math
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import _utils, get_worker_info

import shmloader._native as native
from shmloader.errors import ShmloaderError
from shmloader.reader import Attachment
from shmloader.sample import ALIGNMENT, Field, Schema
from shmloader.tokens import InlineBatch, batch_ring, is_plain
from shmloader.views import Part, Sample, WorkerBatch, tensor_over, torch_dtype

#: One tensor of a batch: name, native op, index of the field, the field, dtype, shape of one sample's place.
Output = tuple[str, int, int, Field, torch.dtype, tuple[int, ...]]

#: Records of one batch that lie in the same memory: their references, their rows in the batch (None: 0, 1, …), and the
#: memory: the ring, or copies of this process.
Group = tuple[bytes, bytes | None, native.Mapping]

#: What every sample has beside its fields, the same in all of a dataset.
_STRINGS = ("task_type", "source")


def collate(samples: Sequence[dict[str, Any]], *, collate_fn_map: Any = None) -> dict[str, Any]:
    """The batch of ``samples``: for each field a tensor [B, …] (padded where lengths differ), lists for strings.

    In a DataLoader worker the result is made to cross its queue as a token; elsewhere it is a plain dict.

    Raises:
        ShmloaderError: the samples have different fields, or the shapes of one cannot be laid side by side.
    """
    records = _records(samples)
    touched = [sample for sample in records if not sample.is_untouched()]
    if records:
        attachment = records[0]._attachment
        assert attachment is not None
        schema: Schema | None = attachment.schema
        names = _common_names(samples, attachment.schema) if touched else attachment.schema.names
        gathering = _gathering(attachment, records, touched, names)
    else:
        schema = next((s._attachment.schema for s in samples if isinstance(s, Sample) and s._attachment), None)
        names = _common_names(samples, None)
        gathering = _Gathering(None, (), ())
    gathered = {field.name for _, _, _, field, _, _ in gathering.outputs}
    batch: dict[str, Any] = {}
    for name in names:
        if name in gathered:
            continue
        if records and schema is not None and name in _STRINGS and all(sample.is_view(name) for sample in touched):
            batch[name] = [schema.task_type if name == "task_type" else schema.sources[0]] * len(samples)
        else:
            batch.update(_collate_values(name, samples, names, schema, collate_fn_map))
    masks = {} if schema is None else {field.name: field.mask for field in schema.fields if field.mask is not None}
    order = dict.fromkeys(key for name in names for key in (name, masks.get(name, name)))
    return _build(gathering, batch, len(samples), list(order))


def _records(samples: Sequence[dict[str, Any]]) -> list[Sample]:
    """The samples, if all are of records of the same set; else nothing."""
    first = samples[0]._attachment if type(samples[0]) is Sample else None
    records = [s for s in samples if type(s) is Sample and s._refs is not None and s._attachment is first]
    return records if len(records) == len(samples) else []


def _common_names(samples: Sequence[dict[str, Any]], schema: Schema | None) -> tuple[str, ...]:
    """The keys that all samples must have; schema: of records, none of which is looked into only for its keys."""
    names: tuple[str, ...] | None = None
    for i, sample in enumerate(samples):
        if schema is not None and isinstance(sample, Sample) and sample.is_untouched():
            others = schema.names
        else:
            others = tuple(sample)
        if names is None:
            names = others
        elif others is not names and set(others) != set(names):
            odd = ", ".join(sorted(map(str, set(names).symmetric_difference(others))))
            raise ShmloaderError(
                f"Samples of one batch have different fields: sample {i} of the batch differs from sample 0 in {odd}. "
                "A `transform`, a wrapper or the datasets of a ConcatDataset must give every sample the same fields."
            )
    return names or ()


# -- gathered from the ring --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gathering:
    """What the core is to gather: the records, by the memory that they lie in, and the tensors to make of them."""

    attachment: Attachment | None
    groups: tuple[Group, ...]
    outputs: tuple[Output, ...]

    def run(self, outs: Sequence[Any]) -> None:
        """Fill ``outs``: writable bytes, one for each output."""
        if self.attachment is not None and self.outputs:
            ops = [
                (op, index, *_op_constants(field, shape), out)
                for (_, op, index, field, _, shape), out in zip(self.outputs, outs, strict=True)
            ]
            for packed, rows, base in self.groups:
                self.attachment.ring.segment.gather(packed, rows, ops, base)


def _gathering(
    attachment: Attachment, records: Sequence[Sample], touched: Sequence[Sample], names: tuple[str, ...]
) -> _Gathering:
    """All fields that still are the records' and fit side by side; their masks, unless the user has some."""
    schema, groups = attachment.schema, _groups(records)
    kept = tuple(
        field.name
        for field in schema.fields
        if field.name in names and not field.is_text and all(sample.is_view(field.name) for sample in touched)
    )
    places = _places(schema, attachment.ring.segment, groups)
    return _Gathering(attachment, groups, _outputs(schema, kept, places, names))


def _groups(records: Sequence[Sample]) -> tuple[Group, ...]:
    """The records by the memory that they lie in; mostly those of one look-up at once, which are one group."""
    refs = records[0]._refs
    assert refs is not None
    if len(refs) == len(records) and all(s._refs is refs and s._index == i for i, s in enumerate(records)):
        return ((refs.packed, None, refs.base),)
    found: dict[int, tuple[native.Mapping, list[bytes], list[int]]] = {}
    for row, sample in enumerate(records):
        assert sample._refs is not None
        base = sample._refs.base
        _, packed, rows = found.setdefault(id(base), (base, [], []))
        packed.append(sample._refs.one(sample._index))
        rows.append(row)
    return tuple((b"".join(packed), array("I", rows).tobytes(), base) for base, packed, rows in found.values())


def _places(schema: Schema, segment: Any, groups: Sequence[Group]) -> tuple[tuple[int, ...] | None, ...]:
    """The place that each field's value takes in the batch; None for one whose values do not fit side by side."""
    if all(None not in field.shape for field in schema.fields):
        return tuple(tuple(n for n in field.shape if n is not None) for field in schema.fields)
    measured = [segment.measure(packed, len(schema.fields), base) for packed, _, base in groups]
    places: list[tuple[int, ...] | None] = []
    for index, field in enumerate(schema.fields):
        rank = len(field.shape)
        low = tuple(map(min, zip(*(group[index][0][:rank] for group in measured), strict=True)))
        high = tuple(map(max, zip(*(group[index][1][:rank] for group in measured), strict=True)))
        fits = low == high or (low[1:] == high[1:] and field.pad is not None)
        places.append(high if fits and not any(group[index][2] for group in measured) else None)
    return tuple(places)


@lru_cache(maxsize=256)
def _outputs(
    schema: Schema, kept: tuple[str, ...], places: tuple[tuple[int, ...] | None, ...], names: tuple[str, ...]
) -> tuple[Output, ...]:
    outputs: list[Output] = []
    for index, (field, shape) in enumerate(zip(schema.fields, places, strict=True)):
        if field.name not in kept or shape is None:
            continue
        if field.scale is not None:
            outputs.append((field.name, native.NORMALIZE, index, field, torch.float32, shape))
        else:
            outputs.append((field.name, native.COPY, index, field, torch_dtype(field.numpy_dtype), shape))
        if field.mask is not None and field.mask not in names:
            outputs.append((field.mask, native.MASK, index, field, torch.int64, shape[:1]))
    return tuple(outputs)


@lru_cache(maxsize=1024)
def _op_constants(field: Field, shape: tuple[int, ...]) -> tuple[int, bytes, bytes, bytes, bytes]:
    """item_bytes, dims, pad, scale, shift: packed as the binding takes them."""
    pad = np.array(field.pad if field.pad is not None else 0).astype(field.numpy_dtype).tobytes()
    scale, shift = (struct.pack(f"{len(v or ())}f", *(v or ())) for v in (field.scale, field.shift))
    return field.numpy_dtype.itemsize, struct.pack(f"{len(shape)}I", *shape), pad, scale, shift


# -- collated from values ----------------------------------------------------------------------------------


def _collate_values(
    name: str, samples: Sequence[dict[str, Any]], names: tuple[str, ...], schema: Schema | None, collate_fn_map: Any
) -> dict[str, Any]:
    """One field's batch, at torch's speed, and its mask's; padded where the schema says that lengths may differ."""
    values = [_as_tensor(sample[name]) for sample in samples]
    field = None if schema is None else next((field for field in schema.fields if field.name == name), None)
    if all(isinstance(value, torch.Tensor) for value in values):
        if field is not None and field.pad is not None and _can_be_padded(values):
            return _padded(field, values, names)
        odd = next((i for i, value in enumerate(values) if value.shape != values[0].shape), None)
        if odd is not None:
            raise ShmloaderError(
                f"Field {name!r} cannot be made a batch: sample 0 of the batch has shape {list(values[0].shape)}, "
                f"sample {odd} has {list(values[odd].shape)}. Only the first dimension of a field of the dataset is "
                "padded; give all samples the same shape in `process` or `transform`, or give the DataLoader a "
                "collate_fn.",
                field=name,
            )
        if all(is_plain(value) for value in values):
            return {name: torch.stack(values)}  # torch's own, in a worker, makes a file in /dev/shm
    return {name: _utils.collate.collate(values, collate_fn_map=collate_fn_map or _collate_fn_map())}


def _as_tensor(value: Any) -> Any:
    is_numeric = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    return torch.as_tensor(value) if is_numeric else value


def _can_be_padded(values: Sequence[torch.Tensor]) -> bool:
    return all(value.ndim and value.shape[1:] == values[0].shape[1:] for value in values)


def _padded(field: Field, values: Sequence[torch.Tensor], names: tuple[str, ...]) -> dict[str, Any]:
    longest = max(len(value) for value in values)
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))
    whole = torch.full((len(values), longest, *values[0].shape[1:]), field.pad or 0, dtype=dtype)
    for row, value in zip(whole, values, strict=True):
        row[: len(value)] = value
    batch = {field.name: whole}
    if field.mask is not None and field.mask not in names:
        lengths = torch.tensor([len(value) for value in values])
        batch[field.mask] = (torch.arange(longest) < lengths[:, None]).to(torch.int64)
    return batch


# -- where the batch lies ----------------------------------------------------------------------------------


def _build(gathering: _Gathering, values: dict[str, Any], num_samples: int, order: list[str]) -> dict[str, Any]:
    """The batch of what is to be gathered and of ``values``: in a slot, in a worker that has a free one.

    order: the fields' names; the same wherever the batch lies.
    """
    in_worker = get_worker_info() is not None
    specs = {name: (dtype, (num_samples, *shape)) for name, _, _, _, dtype, shape in gathering.outputs}
    num_gathered = len(specs)
    if in_worker:
        specs.update((name, (v.dtype, tuple(v.shape))) for name, v in values.items() if is_plain(v))
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in specs.values()]
    offsets, total = _offsets(sizes)
    ring = batch_ring() if in_worker and total else None
    lease = None if ring is None else ring.lease(total)
    if lease is None:
        made = {name: torch.empty(specs[name][1], dtype=specs[name][0]) for name in list(specs)[:num_gathered]}
        gathering.run([tensor.view(-1).view(torch.uint8).numpy() for tensor in made.values()])
        found = made | values
        batch = {name: found[name] for name in order if name in found}
        return InlineBatch(batch) if in_worker else batch
    outs = [lease.part(offset, size) for offset, size in zip(offsets, sizes, strict=True)]
    gathering.run(outs[:num_gathered])
    parts: dict[str, Part] = {}
    for (name, (dtype, shape)), offset, out in zip(specs.items(), offsets, outs, strict=True):
        parts[name] = (offset, dtype, shape)
        if name in values:
            tensor_over(out, dtype, shape).copy_(values.pop(name))
    return WorkerBatch(lease, parts, values, [name for name in order if name in parts or name in values])


def _offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _collate_fn_map() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = _utils.collate.default_collate_fn_map
    return found


def install() -> None:
    """Have torch's ``default_collate`` call `collate` for samples."""
    _collate_fn_map()[Sample] = collate


install()
