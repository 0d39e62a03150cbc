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
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import shmloader._native as native
from shmloader.errors import PoisonedError
from shmloader.reader import Attachment
from shmloader.ring import Refs
from shmloader.sample import Field

if TYPE_CHECKING:
    from shmloader.tokens import Lease

#: Where a tensor lies in a slot: (offset in bytes, dtype, shape).
Part = tuple[int, torch.dtype, tuple[int, ...]]
#: Where a jagged nested tensor lies: its values, and the offsets of its rows in them.
JaggedPart = tuple[Part, Part]

_TORCH_DTYPES: dict[str, torch.dtype] = {}
_NUMPY_DTYPES = {getattr(torch, name): np.dtype(name) for name in ("uint8", "int64", "float32", "bool")}


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The torch dtype of a numpy dtype."""
    found = _TORCH_DTYPES.get(dtype.str)
    if found is None:
        found = _TORCH_DTYPES[dtype.str] = torch.from_numpy(np.empty(0, dtype)).dtype
    return found


def tensor_over(exporter: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over the bytes of ``exporter`` (buffer protocol), which lives as long as the tensor's storage."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    plain = _NUMPY_DTYPES.get(dtype)
    if plain is not None:  # 1 us, where frombuffer and view take 2.5 (measured)
        return torch.from_numpy(np.ndarray(shape, plain, exporter))
    return torch.frombuffer(exporter, dtype=dtype, count=math.prod(shape)).view(shape)


def tensor_in(memory: Callable[[int, int], Any], part: Part | JaggedPart, is_copied: bool = False) -> torch.Tensor:
    """The tensor at ``part``; memory: gives an exporter of n bytes from an offset on. is_copied: it is private."""
    if isinstance(part[0], tuple):
        values, offsets = (tensor_in(memory, of, is_copied) for of in part)
        return torch.nested.nested_tensor_from_jagged(values, offsets)
    offset, dtype, shape = part
    tensor = tensor_over(memory(offset, math.prod(shape) * dtype.itemsize), dtype, shape)
    return tensor.clone() if is_copied else tensor


#: Lies in a dict that is not filled yet: json's C encoder asks how many items there are before it asks for them.
_PLACEHOLDER = ("", None)


class LazyDict(dict[str, Any]):
    """A dict that gets its items from `_items` when it is first looked into.

    Whatever reads or changes it fills it first, C callers included: they go by ``keys``, ``items`` and
    ``__getitem__`` for a dict subclass that has its own ``__iter__``.
    """

    __slots__ = ("_is_filled",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._is_filled = True
        super().__init__(*args, **kwargs)

    def _items(self) -> dict[str, Any]:
        raise NotImplementedError

    def _fill(self) -> None:
        with _filling_lock:
            if not self._is_filled:
                items = self._items()
                dict.clear(self)
                dict.update(self, items)
                self._is_filled = True

    def __eq__(self, other: object) -> bool:
        return dict(self) == (dict(other) if isinstance(other, LazyDict) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)


def _filling(name: str) -> Callable[..., Any]:
    plain = getattr(dict, name)

    def method(self: LazyDict, *args: Any, **kwargs: Any) -> Any:
        if not self._is_filled:
            self._fill()
        return plain(self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = plain.__doc__
    return method


_FILLING = (
    "__contains__",
    "__delitem__",
    "__getitem__",
    "__ior__",
    "__iter__",
    "__len__",
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

# Threads may open the same sample. One lock for all: it is held for microseconds, and not worth a slot in each.
_filling_lock = threading.RLock()
# Another thread of the parent may have held it when this process was forked.
os.register_at_fork(after_in_child=lambda: globals().update(_filling_lock=threading.RLock()))


#: Stands for what is not there.
_ABSENT: Any = object()
#: Stands in a sample's views for a value of the record that the user has a private copy of.
_NOT_THE_RECORD_S: Any = object()


class Sample(LazyDict):
    """One sample: field name → tensor, plus ``task_type`` and ``source``; without what its row lacks.

    Made by a dataset, its tensors lie in shared memory: they are read-only (an in-place write ends the process
    with a message that says so), and stay valid as long as one of them lives, also when the dataset is closed.
    Valid in this process only, not in one that it forks. ``copy.copy``, ``copy.deepcopy`` and ``pickle`` give
    private copies; ``dict(sample)`` and ``sample.copy()`` give a dict of the same views.
    """

    __slots__ = ("_attachment", "_index", "_refs", "_views", "_writable")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attachment: Attachment | None = None
        self._refs: Refs | None = None
        self._index = 0
        self._views: dict[str, Any] = {}
        self._writable = False

    @classmethod
    def over(cls, attachment: Attachment, refs: Refs, index: int, writable: bool = False) -> Sample:
        """The sample of the ``index``-th record of ``refs``; private copies with ``writable``."""
        self: Sample = cls.__new__(cls)
        self._is_filled = False
        dict.__setitem__(self, *_PLACEHOLDER)
        self._attachment = attachment
        self._refs = refs
        self._index = index
        self._writable = writable
        return self

    def _items(self) -> dict[str, Any]:
        assert self._attachment is not None
        assert self._refs is not None
        face, ring = self._attachment.face, self._attachment.ring
        base = self._refs.base
        offset, num_bytes = self._refs.place(self._index)
        entries = ring.segment.fields(offset, num_bytes, len(face.fields), base)
        pin = self._refs.pin(self._index)  # of this record alone: a view may outlive its batch
        items: dict[str, Any] = {}
        views: dict[str, Any] = {}
        for field, is_shown, entry in zip(face.fields, face.is_shown, entries, strict=True):
            if entry is None or not is_shown:
                continue
            at, size, dims = entry
            exporter = base.view(offset + at, size, pin)
            value, is_view = _value(field, exporter, dims[: len(field.shape)], self._writable)
            items[field.name], views[field.name] = value, value if is_view else _NOT_THE_RECORD_S
        values = face.values[self._source() if len(face.values) > 1 else 0]
        views |= values
        items |= values
        self._views = views
        return items

    def _source(self) -> int:
        """The index of its source, as its record has it."""
        assert self._attachment is not None
        assert self._refs is not None
        (source,) = sources_in(self._attachment, self._refs.one(self._index), 1, self._refs.base)
        return int(source)

    def is_untouched(self) -> bool:
        """Nobody has looked into it: every field is the record's."""
        return not self._is_filled

    def is_view(self, name: str) -> bool:
        """Whether field ``name`` still is the view of the record that was made for it, so has the record's value.

        False for a private copy, which may have been written to, and for what the user has set. True also for what
        neither the record nor the sample has.
        """
        return not self._is_filled or self.get(name, _ABSENT) is self._views.get(name, _ABSENT)

    def __copy__(self) -> Sample:
        return Sample({key: _private(value) for key, value in self.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        return Sample({key: copy.deepcopy(_private(value), memo) for key, value in self.items()})

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (dict, ({key: _private(value) for key, value in self.items()},))


#: The op that tells the source of a record, without what stands behind it: where its field would be, and of what kind.
_SOURCE_OP = (native.SOURCE, 0, 8, b"", b"", b"", b"")


def sources_in(attachment: Attachment, packed: bytes, num: int, base: native.Mapping) -> list[int]:
    """The indices of the sources of ``num`` records, whose references are ``packed``.

    Raises:
        PoisonedError: a record names one that there is not.
    """
    found = np.empty(num, np.int64)
    attachment.ring.segment.gather(packed, None, [(*_SOURCE_OP, found.view(np.uint8))], base)
    if num and not 0 <= found.min() <= found.max() < len(attachment.face.sources):
        raise PoisonedError(
            f"a record names the source {found.max()}, of {len(attachment.face.sources)}", reason="source"
        )
    return found.tolist()


def _value(field: Field, exporter: Any, shape: tuple[int, ...], writable: bool) -> tuple[Any, bool]:
    """The field's value, and whether it is a view of the ring: one that can be replaced, but not changed."""
    if field.is_text:
        return bytes(memoryview(exporter)).decode(), True
    value = tensor_over(exporter, torch_dtype(field.numpy_dtype), shape)
    if field.scale is not None and field.shift is not None:
        ones = (-1,) + (1,) * (len(field.shape) - 1)
        scale, shift = (torch.tensor(v, dtype=torch.float32).view(ones) for v in (field.scale, field.shift))
        return value.to(torch.float32).mul_(scale).add_(shift), False
    return (value.clone(), False) if writable else (value, True)


def _private(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class WorkerBatch(LazyDict):
    """A batch in a DataLoader worker: tensors over a slot of the batch ring, made when somebody looks.

    They may be written to. parts: where each lies in the slot, by name. plain: the other fields.
    order: the names of both. lease: the slot, given back when it was never sent.
    """

    __slots__ = ("_made", "lease", "order", "parts", "plain")

    def __init__(
        self, lease: Lease, parts: dict[str, Part | JaggedPart], plain: dict[str, Any], order: list[str]
    ) -> None:
        self._is_filled = False
        dict.__setitem__(self, *_PLACEHOLDER)
        self.lease = lease
        self.parts = parts
        self.plain = plain
        self.order = order
        self._made: dict[str, torch.Tensor] = {}

    def _items(self) -> dict[str, Any]:
        self._made = {name: tensor_in(self.lease.part, part) for name, part in self.parts.items()}
        return {name: self._made[name] if name in self._made else self.plain[name] for name in self.order}

    def names(self) -> list[str]:
        """The names of its fields, in order."""
        return list(self) if self._is_filled else self.order

    def in_slot(self) -> dict[str, Part | JaggedPart]:
        """The fields that still are what lies in the slot."""
        if not self._is_filled:
            return self.parts
        return {name: part for name, part in self.parts.items() if self.get(name) is self._made[name]}

    def extra(self) -> dict[str, Any]:
        """All other fields, as they are now."""
        if not self._is_filled:
            return self.plain
        in_slot = self.in_slot()
        return {name: value for name, value in self.items() if name not in in_slot}

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (dict, (dict(self),))
