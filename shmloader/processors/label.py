"""Class labels: an integer column becomes one int64 per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from shmloader.errors import DecodeError
from shmloader.processors.base import column_at
from shmloader.sample import Field

UNKNOWN_LABEL = -1
"""What `datasets` stores for a row without a known class. Source: datasets, ``ClassLabel``, test splits."""

_INT64 = np.iinfo(np.int64)


class LabelProcessor:
    """Yields "labels", int64 [].

    class_names: the classes that the labels count, -1 being allowed for an unknown one; None: any integer.
    """

    def __init__(self, column: str, class_names: tuple[str, ...] | None = None) -> None:
        self.columns: tuple[str, ...] = (column,)
        self.class_names = class_names
        self.fields: tuple[Field, ...] = (Field("labels", "int64", ()),)

    def begin(self, batch: pa.RecordBatch) -> _LabelRows:
        """Take the labels of ``batch``."""
        return _LabelRows(self, column_at(batch, self.columns[0]).to_pylist())

    def label_of(self, value: Any) -> int:
        """The label that a row's ``value`` stands for.

        Raises:
            DecodeError: it is null, no integer, or no class.
        """
        if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
            label = int(value)
        elif value is None:
            raise self._error("is null")
        else:
            raise self._error(f"is {value!r:.80}, which is no integer; name another column or give `process`")
        if self.class_names is not None and not UNKNOWN_LABEL <= label < len(self.class_names):
            raise self._error(f"is {label}, but there are {len(self.class_names)} classes (and -1 for unknown)")
        if not _INT64.min <= label <= _INT64.max:
            raise self._error(f"is {label}, which does not fit int64")
        return label

    def _error(self, what: str) -> DecodeError:
        column = self.columns[0]
        return DecodeError(f"label of column {column!r} {what}", field="labels", column=column)


class _LabelRows:
    def __init__(self, processor: LabelProcessor, values: list[Any]) -> None:
        self._processor = processor
        self._values = values

    def shapes(self, row: int) -> Mapping[str, tuple[int, ...]]:
        self._processor.label_of(self._values[row])
        return {"labels": ()}

    def write(self, row: int, out: Mapping[str, np.ndarray[Any, Any]]) -> None:
        out["labels"][...] = self._processor.label_of(self._values[row])
