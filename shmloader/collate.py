"""Samples → batch: the hook by which a stock DataLoader gathers a batch in one pass over the ring.

`Sample` is registered in torch's ``default_collate_fn_map``, so ``default_collate`` brings a list of samples here.
Fields that are still the records' are gathered by the core, straight into a slot of the batch ring (in a worker) or
into fresh tensors; fields that the user changed, added or took as copies are collated from their values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import _utils, get_worker_info

import shmloader._native as native
from shmloader.errors import ShmloaderError
from shmloader.reader import Attachment
from shmloader.sample import ALIGNMENT, Field, Schema
from shmloader.tokens import InlineBatch, batch_ring
from shmloader.views import Sample, WorkerBatch, torch_dtype

#: One tensor of a batch: name, native op, index of the field, the field, dtype, shape of one sample's place.
Output = tuple[str, int, int, Field, torch.dtype, tuple[int, ...]]


def collate(samples: Sequence[Sample], *, collate_fn_map: Any = None) -> dict[str, Any]:
    """The batch of ``samples``: for each field a tensor [B, …] (padded where lengths differ), lists for strings.

    In a DataLoader worker the result is made to cross its queue as a token; elsewhere it is a plain dict.
    """
    first = samples[0]
    if not all(type(s) is Sample and s._refs is not None and s._attachment is first._attachment for s in samples):
        return _from_values(samples, collate_fn_map)
    attachment = first._attachment
    assert attachment is not None
    changed = _changed_fields(samples)
    if changed is None:
        return _from_values(samples, collate_fn_map)
    kept = tuple(field.name for field in attachment.schema.fields if field.name not in changed)
    plain: dict[str, Any] = {}
    schema = attachment.schema
    for name, value in (("task_type", schema.task_type), ("source", schema.sources[0])):
        if name not in changed:
            plain[name] = [value] * len(samples)
    for name in changed:
        values = [sample[name] for sample in samples]
        plain.update(_collate_field(name, values, _field(schema, name), collate_fn_map))
    return _gather(attachment, samples, kept, plain)


def _changed_fields(samples: Sequence[Sample]) -> list[str] | None:
    """Names of fields to be collated from values; None where the samples' keys differ, so all have to be."""
    touched = [sample for sample in samples if not sample.untouched()]
    if not touched:
        return []
    names: list[str] | None = None
    changed: dict[str, None] = {}
    for sample in touched:
        if names is None:
            names = list(sample)
            removed = [name for name in sample.views() or {} if name not in sample]
        elif list(sample) != names:
            return None
        views = sample.views() or {}
        changed.update((name, None) for name in sample if views.get(name, sample) is not sample[name])
    if removed or len(touched) < len(samples):
        # Some were never looked at: compare keys with theirs.
        for sample in samples:
            if list(sample) != names:
                return None
        if removed:
            return None
    return list(changed)


def _field(schema: Schema, name: str) -> Field | None:
    return next((field for field in schema.fields if field.name == name), None)


# -- gathered from the ring --------------------------------------------------------------------------------


def _gather(
    attachment: Attachment, samples: Sequence[Sample], kept: tuple[str, ...], plain: dict[str, Any]
) -> dict[str, Any]:
    packed = _packed(samples)
    schema, segment = attachment.schema, attachment.ring.segment
    dims = _dims(schema, segment, packed, kept)
    if dims is None:
        return _from_values(samples, None)
    texts = [field for field in schema.fields if field.is_text and field.name in kept]
    for field in texts:
        plain[field.name] = [sample[field.name] for sample in samples]
    outputs = _outputs(schema, kept, dims)
    sizes = [len(samples) * math.prod(shape) * dtype.itemsize for *_, dtype, shape in outputs]
    offsets, total = _offsets(sizes)
    in_worker = get_worker_info() is not None
    ring = batch_ring() if in_worker else None
    lease = ring.lease(total) if ring is not None and total else None
    tensors: dict[str, torch.Tensor] = {}
    ops, parts = [], {}
    for (name, op, index, field, dtype, shape), offset, size in zip(outputs, offsets, sizes, strict=True):
        whole = (len(samples), *shape)
        if lease is not None:
            parts[name] = (offset, dtype, whole)
            out: Any = lease.part(offset, size)
        else:
            tensors[name] = torch.empty(whole, dtype=dtype)
            out = tensors[name].view(-1).view(torch.uint8).numpy() if size else bytearray()
        ops.append((op, index, *_op_constants(field, shape), out))
    if ops:
        segment.gather(packed, None, ops)
    if lease is not None:
        return WorkerBatch(lease, parts, plain)
    return InlineBatch(tensors | plain) if in_worker else tensors | plain


def _packed(samples: Sequence[Sample]) -> bytes:
    """The samples' references in a row: those of one look-up at once, if that is what they are."""
    refs = samples[0]._refs
    assert refs is not None
    if len(refs) == len(samples) and all(s._refs is refs and s._index == i for i, s in enumerate(samples)):
        return refs.packed
    return b"".join(s._refs.one(s._index) for s in samples if s._refs is not None)


def _dims(schema: Schema, segment: Any, packed: bytes, kept: tuple[str, ...]) -> tuple[tuple[int, ...], ...] | None:
    """The place that each field's value takes in the batch; None where they cannot be laid side by side."""
    if all(None not in field.shape for field in schema.fields):
        return tuple(tuple(n for n in field.shape if n is not None) for field in schema.fields)
    result = []
    for field, (least, most, absent) in zip(schema.fields, segment.measure(packed, len(schema.fields)), strict=True):
        rank = len(field.shape)
        low, high = least[:rank], most[:rank]
        is_gathered = field.name in kept and not field.is_text
        if is_gathered and (absent or low[1:] != high[1:] or (rank and low[0] != high[0] and field.pad is None)):
            return None
        result.append(tuple(high))
    return tuple(result)


@lru_cache(maxsize=256)
def _outputs(schema: Schema, kept: tuple[str, ...], dims: tuple[tuple[int, ...], ...]) -> tuple[Output, ...]:
    outputs: list[Output] = []
    for index, (field, shape) in enumerate(zip(schema.fields, dims, strict=True)):
        if field.name not in kept or field.is_text:
            continue
        if field.scale is not None:
            outputs.append((field.name, native.NORMALIZE, index, field, torch.float32, shape))
        else:
            outputs.append((field.name, native.COPY, index, field, torch_dtype(field.numpy_dtype), shape))
        if field.mask is not None:
            outputs.append((field.mask, native.MASK, index, field, torch.int64, shape[:1]))
    return tuple(outputs)


@lru_cache(maxsize=1024)
def _op_constants(field: Field, shape: tuple[int, ...]) -> tuple[int, bytes, bytes, bytes, bytes]:
    """item_bytes, dims, pad, scale, shift: packed as the binding takes them."""
    pad = np.array(field.pad if field.pad is not None else 0).astype(field.numpy_dtype).tobytes()
    scale, shift = (struct.pack(f"{len(v or ())}f", *(v or ())) for v in (field.scale, field.shift))
    return field.numpy_dtype.itemsize, struct.pack(f"{len(shape)}I", *shape), pad, scale, shift


def _offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


# -- collated from values ----------------------------------------------------------------------------------


def _from_values(samples: Sequence[dict[str, Any]], collate_fn_map: Any) -> dict[str, Any]:
    """The general way: any dicts with the same keys, at torch's speed."""
    keys = list(samples[0])
    for i, sample in enumerate(samples):
        if set(sample) != set(keys):
            odd = sorted(set(sample) ^ set(keys))
            raise ShmloaderError(
                f"Samples of one batch have different fields: sample {i} differs from sample 0 in {', '.join(odd)}. "
                "A `transform` or wrapper must give every sample the same fields."
            )
    schema = next((s._attachment.schema for s in samples if isinstance(s, Sample) and s._attachment), None)
    batch: dict[str, Any] = {}
    for key in keys:
        field = _field(schema, key) if schema is not None else None
        batch.update(_collate_field(key, [sample[key] for sample in samples], field, collate_fn_map))
    return InlineBatch(batch) if get_worker_info() is not None else batch


def _collate_field(name: str, values: list[Any], field: Field | None, collate_fn_map: Any) -> dict[str, Any]:
    """One field's batch, and its mask's; padded where the schema says that lengths may differ."""
    if field is None or field.pad is None or not all(isinstance(v, torch.Tensor) and v.ndim for v in values):
        return {name: _utils.collate.collate(values, collate_fn_map=collate_fn_map or _collate_fn_map())}
    longest = max(len(value) for value in values)
    whole = values[0].new_full((len(values), longest, *values[0].shape[1:]), field.pad)
    for row, value in zip(whole, values, strict=True):
        row[: len(value)] = value
    batch = {name: whole}
    if field.mask is not None:
        lengths = torch.tensor([len(value) for value in values])
        batch[field.mask] = (torch.arange(longest) < lengths[:, None]).to(torch.int64)
    return batch


def _collate_fn_map() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = _utils.collate.default_collate_fn_map
    return found


def install() -> None:
    """Have torch's ``default_collate`` call `collate` for samples."""
    _collate_fn_map()[Sample] = collate


install()
