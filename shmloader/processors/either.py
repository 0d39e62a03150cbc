"""Several processors whose fields are all optional, of which each row must have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from shmloader.errors import DecodeError
from shmloader.processors.base import Processor, Rows
from shmloader.sample import Field


class EitherProcessor:
    """Yields the fields of ``parts``, whichever of them a row has."""

    def __init__(self, parts: Sequence[Processor]) -> None:
        self._parts = parts
        self.fields: tuple[Field, ...] = tuple(field for part in parts for field in part.fields)
        self.columns: tuple[str, ...] = tuple(column for part in parts for column in part.columns)

    def begin(self, batch: pa.RecordBatch) -> _EitherRows:
        """Have all parts take the rows of ``batch``."""
        return _EitherRows(self, [part.begin(batch) for part in self._parts])


class _EitherRows:
    def __init__(self, processor: EitherProcessor, parts: Sequence[Rows]) -> None:
        self._processor = processor
        self._parts = parts

    def shapes(self, row: int) -> Mapping[str, tuple[int, ...]]:
        found = {name: shape for part in self._parts for name, shape in part.shapes(row).items()}
        if not found:
            columns = self._processor.columns
            raise DecodeError(
                f"the columns {', '.join(map(repr, columns))} are all null",
                field=self._processor.fields[0].name,
                column=columns,
            )
        return found

    def write(self, row: int, out: Mapping[str, np.ndarray[Any, Any]]) -> None:
        for part in self._parts:
            part.write(row, out)
