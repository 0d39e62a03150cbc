"""Fields of a batch that are collated from the samples' values: what users set, added, or took as copies."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import _utils

from shmloader.collate.gather import pad_of, presence_name, rounded
from shmloader.collate.lengths import Lengths
from shmloader.collate.origins import Origins
from shmloader.errors import ShmloaderError
from shmloader.packed import is_plain
from shmloader.sample import Field
from shmloader.views import torch_dtype

#: torch's, by type of a sample's value: what a user may have registered his own types in.
CollateMap = dict[Any, Callable[..., Any]]

#: Stands for the value of a sample that lacks the field.
_LACKING: Any = object()


def collate_map() -> CollateMap:
    """The functions that torch's ``default_collate`` goes by."""
    found: CollateMap = _utils.collate.default_collate_fn_map
    return found


class Values:
    """One batch's samples, to be collated field by field at torch's speed."""

    def __init__(self, origins: Origins, lengths: Lengths, functions: CollateMap | None) -> None:
        self._origins = origins
        self._lengths = lengths
        self._functions = functions or collate_map()

    def collate(self, name: str) -> dict[str, Any]:
        """The batch's field ``name``, and its masks; padded where the schema says that lengths may differ.

        Raises:
            ShmloaderError: the values cannot be made a batch.
        """
        origins = self._origins
        fields = self._fields(name)
        field = next((field for field in fields if field is not None), None)
        mode = self._lengths.mode(name, field)
        values = _as_tensors(name, [sample.get(name, _LACKING) for sample in origins.samples], mode)
        present = [value for value in values if value is not _LACKING]
        if len(present) < len(values) and all(isinstance(value, np.generic) for value in present):
            values = [value if value is _LACKING else _number(value) for value in values]
        is_told = mode == "list" and any(face.is_strict for face in origins.in_batch)  # by None in its place
        presence = None if is_told else presence_name(origins.in_batch, name, len(present) < len(values))
        if not present and field is not None and not field.is_text and mode != "list":
            batch = self._tensors(name, values, fields, mode)
        else:
            batch = self._laid(name, values, fields, mode)
        if presence is not None and presence not in origins.names:
            batch[presence] = torch.tensor([value is not _LACKING for value in values])
        return batch

    def _fields(self, name: str) -> list[Field | None]:
        """What each sample's dataset says of the field; of a sample of an unknown one, what the first known says."""
        known = next((field for face in self._origins.known if (field := face.field(name)) is not None), None)
        return [known if face is None or face.field(name) is None else face.field(name) for face in self._origins.faces]

    def _laid(self, name: str, values: list[Any], fields: list[Field | None], mode: str | None) -> dict[str, Any]:
        """Values of samples, or of dicts in them, side by side as ``mode`` says."""
        if mode == "list":
            return {name: [None if value is _LACKING else value for value in values]}
        if not all(type(value) is dict for value in values):
            self._lengths.check_no_dict(name, self._origins.names)
        if any(map(_is_tensor, values)):
            return self._tensors(name, values, fields, mode)
        return {name: self._others(name, values)}

    # -- tensors ---------------------------------------------------------------------------------------

    def _tensors(self, name: str, values: list[Any], fields: list[Field | None], mode: str | None) -> dict[str, Any]:
        present = [_number(value) for value in values if value is not _LACKING]
        odd = next((i for i, v in enumerate(values) if v is not _LACKING and not _is_tensor(_number(v))), None)
        if odd is not None:
            raise _no_batch(name, f"sample {odd} of the batch has {_describe(values[odd])}, others have tensors")
        if any(value.is_nested for value in present):
            return {name: [None if value is _LACKING else value for value in values]}
        _check_dtypes(name, values, self._origins.datasets)
        blank = _blank(fields, present)
        if mode == "nested":
            return {name: _jagged(name, [blank[:0] if v is _LACKING else _number(v) for v in values])}
        if mode == "pad" and _can_be_padded([blank, *present]):
            rows = [blank[:0] if v is _LACKING else _number(v) for v in values]
            return self._padded(name, rows, fields)
        rows = [blank if v is _LACKING else _number(v) for v in values]
        other = next((i for i, row in enumerate(rows) if row.shape != rows[0].shape), None)
        if other is not None:
            raise _no_batch(
                name,
                f"sample 0 of the batch has shape {list(rows[0].shape)}, sample {other} has {list(rows[other].shape)}. "
                "Only the first dimension of a field of the dataset is padded; of a field that you have added, with "
                f"collate_fn=dataset.collate_with(ragged={{{name!r}: 'pad'}}) (or 'nested', or 'list'). A field that "
                f"stands for another thing in each dataset can have another name: keys={{{name!r}: …}}",
            )
        if all(is_plain(row) for row in rows):
            return {name: torch.stack(rows)}  # torch's own, in a worker, makes a file in /dev/shm
        return {name: self._others(name, rows)}

    def _padded(self, name: str, rows: Sequence[torch.Tensor], fields: Sequence[Field | None]) -> dict[str, Any]:
        """Rows filled up to the longest, each with what its dataset pads with; and the mask of what is not filled."""
        longest = max(len(row) for row in rows)
        known = [field for field in fields if field is not None]
        multiple = math.lcm(*(rounded(field, 1) for field in known)) if known else self._lengths.multiple(name)
        longest = -(-longest // multiple) * multiple
        dtype = functools.reduce(torch.promote_types, (row.dtype for row in rows))
        whole = torch.empty((len(rows), longest, *rows[0].shape[1:]), dtype=dtype)
        for place, row, field in zip(whole, rows, fields, strict=True):
            place[: len(row)] = row
            place[len(row) :] = 0 if field is None or field.pad is None else field.pad
        batch = {name: whole}
        mask = next((face.mask(name) for face in self._origins.known if name in face.index), None)
        if mask is not None and mask not in self._origins.names:
            lengths = torch.tensor([len(row) for row in rows])
            batch[mask] = (torch.arange(longest) < lengths[:, None]).to(torch.int64)
        return batch

    # -- everything else -------------------------------------------------------------------------------

    def _others(self, name: str, values: list[Any]) -> Any:
        """As torch collates it: numbers to a tensor, strings to a list, dicts and lists by their items."""
        present = [value for value in values if value is not _LACKING]
        if not present or all(isinstance(value, str | bytes) for value in present):
            return [None if value is _LACKING else value for value in values]
        if len(present) < len(values):
            if not all(isinstance(value, int | float) for value in present):
                raise _no_batch(name, f"samples that have {_describe(present[0])} are in a batch with samples without")
            zero = 0.0 if isinstance(present[0], float) else 0
            values = [zero if value is _LACKING else value for value in values]
        if all(type(value) is dict for value in values):
            return self._dicts(name, values)
        try:
            return _utils.collate.collate(values, collate_fn_map=self._functions)
        except (TypeError, ValueError, RuntimeError) as error:
            kinds = [type(value) for value in values]
            row = next((i for i, kind in enumerate(kinds) if kind is not kinds[0]), 0)
            raise _no_batch(name, f"sample {row} of the batch has {_describe(values[row])} ({error})") from error

    def _dicts(self, name: str, values: list[dict[Any, Any]]) -> dict[Any, Any]:
        for row, value in enumerate(values):
            if value.keys() != values[0].keys():
                odd = ", ".join(sorted(map(str, value.keys() ^ values[0].keys())))
                raise _no_batch(name, f"its dict of sample {row} of the batch differs from sample 0's in {odd}")
        self._lengths.check(values[0], within=f"{name}.")
        inner: dict[Any, Any] = {}
        for key in values[0]:
            path = f"{name}.{key}"
            mode = self._lengths.mode(path, None)
            items = _as_tensors(path, [value[key] for value in values], mode)
            inner[key] = self._laid(path, items, [None] * len(items), mode)[path]
        return inner


def _as_tensors(name: str, values: Sequence[Any], mode: str | None) -> list[Any]:
    """Arrays of numbers as tensors; lists of numbers too (token ids), where lengths may differ.

    Else these are torch's to collate, by their items.
    """
    made = [torch.as_tensor(value) if _is_numeric_array(value) else value for value in values]
    if mode not in ("pad", "nested") or not any(isinstance(value, list | tuple) for value in made):
        return made
    for row, value in enumerate(made):
        if isinstance(value, list | tuple) and value and _is_numbers(value):
            try:
                made[row] = torch.tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise _no_batch(name, f"the list of sample {row} of the batch is no tensor ({error})") from error
    if any(isinstance(value, list | tuple) and value for value in made):
        return made  # of strings, say
    # An empty list tells neither dtype nor shape. Whole numbers give way to any others that it is concatenated with.
    like = next((value[:0] for value in made if _is_tensor(value) and value.ndim), torch.zeros(0, dtype=torch.int64))
    return [like if isinstance(value, list | tuple) else value for value in made]


def _is_numeric_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"


def _is_numbers(value: Any) -> bool:
    """A number, or a list of such, of any depth."""
    if isinstance(value, list | tuple):
        return all(map(_is_numbers, value))
    return isinstance(value, bool | int | float | np.number | np.bool_)


def _number(value: Any) -> Any:
    """A Python or numpy number as a tensor, for one that is among tensors."""
    return torch.as_tensor(value) if isinstance(value, bool | int | float | np.number | np.bool_) else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _check_dtypes(name: str, values: Sequence[Any], origins: Sequence[object]) -> None:
    """Not uint8 images beside normalised ones, and of several datasets no whole numbers beside floats.

    The numbers do not mean the same.
    """
    rows = [row for row, value in enumerate(values) if _is_tensor(value) and origins[row] is not None]
    floats = [row for row in rows if values[row].is_floating_point()]
    whole = [row for row in rows if not values[row].is_floating_point()]
    if not floats or not whole:
        return
    odd = next((row for row in whole if values[row].dtype == torch.uint8), None)
    if odd is None and len({origins[row] for row in rows}) > 1:
        odd = whole[0]
    if odd is not None:
        raise _no_batch(
            name,
            f"samples of the batch have it as floats and as whole numbers ({floats[0]}: {values[floats[0]].dtype}, "
            f"{odd}: {values[odd].dtype}). Give their datasets the same config (image_dtype), or another name: "
            f"keys={{{name!r}: …}}",
        )


def _blank(fields: Sequence[Field | None], present: Sequence[torch.Tensor]) -> torch.Tensor:
    """What stands for a sample without the field: zeros, as the others have it, else as the schema says.

    A number, though, is what its dataset pads with (a class that there is none of: -100), as the core fills it.
    """
    if present:
        blank = torch.zeros_like(present[0], requires_grad=False)
    else:
        field = next(field for field in fields if field is not None)
        dtype = torch.float32 if field.scale is not None else torch_dtype(field.numpy_dtype)
        blank = torch.zeros(tuple(n or 0 for n in field.shape), dtype=dtype)
    pad = pad_of(fields)
    return blank if blank.ndim or pad is None else torch.full_like(blank, pad)


def _can_be_padded(values: Sequence[torch.Tensor]) -> bool:
    return all(value.ndim and value.shape[1:] == values[0].shape[1:] for value in values)


def _jagged(name: str, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """One jagged nested tensor [B, j, …] of rows [n, …]."""
    if not _can_be_padded(rows):
        odd = next((i for i, row in enumerate(rows) if not row.ndim or row.shape[1:] != rows[0].shape[1:]), 0)
        raise _no_batch(
            name,
            f"sample 0 of the batch has shape {list(rows[0].shape)}, sample {odd} has {list(rows[odd].shape)}, and "
            f"only the first dimension of a jagged tensor may differ: use ragged={{{name!r}: 'list'}}",
        )
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(torch.cat(list(rows)), ends)


def _describe(value: Any) -> str:
    if _is_tensor(value):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"


def _no_batch(name: str, why: str) -> ShmloaderError:
    return ShmloaderError(
        f"Field {name!r} cannot be made a batch: {why}. Make it alike in all samples with `transform` or `process`, "
        "leave it out, or give the DataLoader a collate_fn.",
        field=name,
    )
