"""The contract between a prefetcher and what turns rows into the fields of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shmloader.column_path import choice_of
from shmloader.sample import Field


class Rows(Protocol):
    """A few rows on their way into the ring; made by `Processor.begin`, used once per row, in any order.

    Both methods raise `SampleError` (usually `DecodeError` or `ProcessError`) for a row that cannot be
    used, with ``field`` set; the prefetcher adds source, shard and row. Other rows are not affected.
    """

    def shapes(self, row: int) -> Mapping[str, tuple[int, ...]]:
        """The shape of each field of row ``row`` (0-based within these rows); called once, before `write`."""
        ...

    def write(self, row: int, out: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Fill ``out[name]`` (stored dtype, the shapes told) for this processor's fields; they lie in the ring."""
        ...


class Processor(Protocol):
    """Turns the rows of a chunk into fields. Built and used in one prefetcher, in one thread.

    fields: what it yields, in order; ``shape`` has None for a dimension that differs between samples.
    columns: the columns of the source that it reads; a path ("answers.text") for one inside another.
    """

    fields: tuple[Field, ...]
    columns: tuple[str, ...]

    def begin(self, batch: pa.RecordBatch) -> Rows:
        """Take the rows of ``batch`` (columns as the source stores them; at most a few hundred rows).

        Work that is cheaper for many rows at once (tokenising) is done here. It does not raise for a bad
        row: that is told by `Rows.shapes` or `Rows.write` of that row.
        """
        ...


def column_at(batch: pa.RecordBatch, path: str) -> pa.Array:
    """The values of column ``path`` of ``batch``, or of what lies at this path inside a column ("answers.text").

    A column whose name has the dots comes first. Through a list the values are lists; what is inside of null is null.
    Of "options[correct]" it is struct<items, number> of both, for `chosen_item`.

    Raises:
        KeyError: there is no such column, or nothing of that name in it.
    """
    if path in batch.schema.names:
        return batch.column(path)
    choice = choice_of(path)
    if choice is not None:
        return pa.StructArray.from_arrays([column_at(batch, part) for part in choice], names=["items", "number"])
    name, *inner = path.split(".")
    return _inside(batch.column(name), inner)


def chosen_item(value: Mapping[str, Any]) -> Any:
    """The item of a row's list that its number says: an integer from 0, its digits, or a letter from A; None: null.

    Raises:
        IndexError: there is no such item.
    """
    items, number = value["items"], value["number"]
    if items is None or number is None:
        return None
    place = number
    if isinstance(number, str):
        word = number.strip()
        is_letter = len(word) == 1 and "A" <= word.upper() <= "Z"
        if not is_letter and not (word.isascii() and word.isdigit()):
            raise IndexError(f"there is no item {number!r:.40}, which is neither a number nor a letter")
        place = ord(word.upper()) - ord("A") if is_letter else int(word)
    if not 0 <= place < len(items):
        raise IndexError(f"there is no item {number!r}: it has {len(items)}")
    return items[place]


def _inside(array: pa.Array, path: Sequence[str]) -> pa.Array:
    if not path:
        return array
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_struct(kind):
        if kind.get_field_index(path[0]) < 0:
            raise KeyError(f"{kind} has no field {path[0]!r}")
        return _inside(pc.struct_field(array, path[0]), path[1:])
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise KeyError(f"{kind} has no field {path[0]!r}")
    inner = _inside(array.flatten(), path)  # the values of this very slice, those of null lists left out
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int64())
    mask = array.is_null() if array.null_count else None
    return pa.LargeListArray.from_arrays(offsets, inner, mask=mask)
