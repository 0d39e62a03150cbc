"""Samples and batches as dicts whose tensors are made on first use.

A `Sample` is what ``dataset[i]`` gives: a dict that, untouched, is only a reference to a record in the ring, so that
the collate hook can gather it without a tensor ever being made. Touched, it fills with tensors over the ring
(read-only, no copy).

`WorkerBatch` is what the collate hook makes in a DataLoader worker: a dict over a slot of the batch ring, which
crosses the worker's queue as a token (tokens.py). The training process only ever sees plain dicts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from shmloader.reader import Attachment
from shmloader.ring import Refs
from shmloader.sample import Field

_TORCH_DTYPES: dict[str, torch.dtype] = {}


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The torch dtype of a numpy dtype."""
    found = _TORCH_DTYPES.get(dtype.str)
    if found is None:
        found = _TORCH_DTYPES[dtype.str] = torch.from_numpy(np.empty(0, dtype)).dtype
    return found


def tensor_over(exporter: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over the bytes of ``exporter`` (buffer protocol), which lives as long as the tensor's storage."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(exporter, dtype=dtype, count=count).view(shape)


class LazyDict(dict[str, Any]):
    """A dict that is filled by `_fill` when it is first looked into.

    Whatever reads or changes it fills it first, C callers included: they go by ``keys`` and ``__getitem__``
    for a dict subclass that has its own ``__iter__``.
    """

    __slots__ = ("_is_filled",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._is_filled = True
        super().__init__(*args, **kwargs)

    def _fill(self) -> None:
        raise NotImplementedError

    def _open(self) -> None:
        if not self._is_filled:
            self._is_filled = True
            self._fill()

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)


def _filling(name: str) -> Callable[..., Any]:
    plain = getattr(dict, name)

    def method(self: LazyDict, *args: Any, **kwargs: Any) -> Any:
        if not self._is_filled:
            self._open()
        return plain(self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = plain.__doc__
    return method


_FILLING = (
    "__contains__",
    "__delitem__",
    "__eq__",
    "__ge__",
    "__getitem__",
    "__gt__",
    "__ior__",
    "__iter__",
    "__le__",
    "__len__",
    "__lt__",
    "__ne__",
    "__repr__",
    "__reversed__",
    "__setitem__",
    "clear",
    "copy",
    "get",
    "items",
    "keys",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "values",
)
for _name in _FILLING:
    setattr(LazyDict, _name, _filling(_name))


class Sample(LazyDict):
    """One sample: field name → tensor, plus ``task_type`` and ``source``.

    Made by a dataset, its tensors lie in shared memory: they are read-only (an in-place write ends the process
    with a message that says so), and stay valid as long as one of them lives. ``copy.copy``, ``copy.deepcopy``
    and ``pickle`` give private copies.
    """

    __slots__ = ("_attachment", "_index", "_refs", "_views", "_writable")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attachment: Attachment | None = None
        self._refs: Refs | None = None
        self._index = 0
        self._views: dict[str, Any] | None = None
        self._writable = False

    @classmethod
    def over(cls, attachment: Attachment, refs: Refs, index: int, writable: bool = False) -> Sample:
        """The sample of the ``index``-th record of ``refs``; private copies with ``writable``."""
        self: Sample = cls.__new__(cls)
        self._is_filled = False
        self._attachment = attachment
        self._refs = refs
        self._index = index
        self._views = None
        self._writable = writable
        return self

    def _fill(self) -> None:
        assert self._attachment is not None
        assert self._refs is not None
        schema, ring = self._attachment.schema, self._attachment.ring
        offset, num_bytes = self._refs.place(self._index)
        entries = ring.segment.fields(offset, num_bytes, len(schema.fields))
        views: dict[str, Any] = {}
        for field, entry in zip(schema.fields, entries, strict=True):
            if entry is None:
                continue
            value, is_view = self._value(field, offset, entry)
            dict.__setitem__(self, field.name, value)
            if is_view:
                views[field.name] = value
        views["task_type"] = schema.task_type
        views["source"] = schema.sources[0]
        dict.__setitem__(self, "task_type", schema.task_type)
        dict.__setitem__(self, "source", schema.sources[0])
        self._views = views

    def _value(self, field: Field, offset: int, entry: tuple[int, int, tuple[int, ...]]) -> tuple[Any, bool]:
        """The field's value, and whether it is a view of the ring that can only be replaced, not changed."""
        assert self._attachment is not None
        at, num_bytes, dims = entry
        exporter = self._attachment.ring.mapping.view(offset + at, num_bytes)
        if field.is_text:
            return bytes(memoryview(exporter)).decode(), True
        value = tensor_over(exporter, torch_dtype(field.numpy_dtype), dims[: len(field.shape)])
        if field.scale is not None and field.shift is not None:
            ones = (-1,) + (1,) * (len(field.shape) - 1)
            scale, shift = (torch.tensor(v, dtype=torch.float32).view(ones) for v in (field.scale, field.shift))
            return value.to(torch.float32).mul_(scale).add_(shift), False
        return (value.clone(), False) if self._writable else (value, True)

    def untouched(self) -> bool:
        """Every field is still the record's: nothing was ever made of it."""
        return not self._is_filled

    def views(self) -> dict[str, Any] | None:
        """The views that were handed out; None if this sample is not of a record (any more)."""
        return self._views if self._refs is not None else None

    def __copy__(self) -> Sample:
        return Sample({key: _private(value) for key, value in self.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        return Sample({key: copy.deepcopy(_private(value), memo) for key, value in self.items()})

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (dict, ({key: _private(value) for key, value in self.items()},))


def _private(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class WorkerBatch(LazyDict):
    """A batch in a DataLoader worker: tensors over a slot of the batch ring, made when somebody looks.

    parts: name → (offset in the slot, dtype, shape). lease: the slot, given back when it was never sent.
    """

    __slots__ = ("lease", "made", "parts", "plain")

    def __init__(self, lease: Any, parts: dict[str, tuple[int, torch.dtype, tuple[int, ...]]], plain: dict[str, Any]):
        super().__init__()
        self._is_filled = False
        self.lease = lease
        self.parts = parts
        self.plain = plain
        self.made: dict[str, torch.Tensor] = {}

    def _fill(self) -> None:
        for name, (offset, dtype, shape) in self.parts.items():
            self.made[name] = tensor_over(self.lease.part(offset, math.prod(shape) * dtype.itemsize), dtype, shape)
            dict.__setitem__(self, name, self.made[name])
        for name, value in self.plain.items():
            dict.__setitem__(self, name, value)

    def in_slot(self) -> Iterator[str]:
        """The names of the fields that still are what lies in the slot."""
        for name in self.parts:
            if not self._is_filled or (name in self and self[name] is self.made[name]):
                yield name

    def extra(self) -> dict[str, Any]:
        """Everything else, as it is now."""
        if not self._is_filled:
            return self.plain
        kept = set(self.in_slot())
        return {name: value for name, value in self.items() if name not in kept}

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (dict, (dict(self),))
