"""The rows of a stream as Arrow tables: nothing decoded, and of the types that its features promise.

What ``datasets`` reads as Arrow is taken so. What Python functions make (a generator, ``map``, the members of a tar) is
converted here, since the library takes the types of each row from that row alone: a row that lacks a value then does
not go together with the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from shmloader.errors import SourceError
from shmloader.sources.blame import why_failed
from shmloader.sources.rows import conform, plain_schema
from shmloader.sources.undecoded import undecoded, undecoded_stream

#: What tells of a row where it is from, in a WebDataset.
_PLACE = ("__key__", "__url__")
#: What builders call the files that they read.
_FILES = ("base_files", "files")


class StreamTables:
    """An iterator over a stream's rows in tables of ``num_rows``, but for the last one; one iteration of it.

    columns: those that are wanted. epoch: which one, of a shuffled stream.
    """

    def __init__(self, stream: Any, features: Any, columns: Sequence[str], num_rows: int, epoch: int = 0) -> None:
        stream = undecoded_stream(stream)
        if stream.features is not None:
            # This undoes the decoding step that `datasets` adds to media of a Hub only if it is the last step.
            stream = stream.decode(False)
        self._features, self._schema = features, plain_schema(features.arrow_schema, columns)
        # What features leave out, `datasets` drops; where they are only inferred, nobody asked for that.
        self._known = None if stream.features is not None else frozenset(features)
        self._num_rows = num_rows
        self._num_taken = 0
        self._last: Mapping[str, Any] = {}
        self._file: str | None = None
        if stream._ex_iterable.iter_arrow:
            stream = noted(stream, self._begin)
            typed = stream if stream.features is not None else stream.cast(undecoded(features))
            typed = _at_epoch(typed.select_columns(list(columns)).with_format("arrow"), epoch)
            self._tables: Iterator[pa.Table] = iter(typed.iter(num_rows))
        else:
            self._encoders = {name: f for name, f in undecoded(features).items() if _is_encoded(f)}
            self._tables = self._converted(iter(_at_epoch(_raw(stream), epoch)))

    def __iter__(self) -> StreamTables:
        return self

    def __next__(self) -> pa.Table:
        return next(self._tables)

    def told(self, error: BaseException) -> str:
        """Why this failed: at which row, after which sample or in which file, as far as that is known."""
        why = why_failed(error)
        if self._file is not None:
            return why if self._file in why else f"in {self._file}: {why}"
        if not self._num_taken:
            return why
        after = " of ".join(repr(self._last[name]) for name in _PLACE if name in self._last)
        return f"row {self._num_taken}{f', after {after}' if after else ''}: {why}"

    def _begin(self, file: str) -> None:
        self._file = file

    def _converted(self, rows: Iterator[Mapping[str, Any]]) -> Iterator[pa.Table]:
        while True:
            first, some = self._num_taken, []
            for row in islice(rows, self._num_rows):
                some.append(row)
                self._num_taken, self._last = self._num_taken + 1, row
            if not some:
                return
            try:
                table = self._table(some)
            except Exception:
                self._find(some, first)
                raise
            yield table

    def _find(self, rows: Sequence[Mapping[str, Any]], first: int) -> None:
        """Leave off at the row that cannot be converted, for `told`."""
        for i, row in enumerate(rows):
            try:
                self._table([row])
            except Exception:
                self._num_taken, self._last = first + i, rows[i - 1] if i else {}
                return

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
        if self._known is not None:
            unknown = next((name for row in rows for name in row if name not in self._known), None)
            if unknown is not None:
                raise ValueError(
                    f"the column {unknown!r} is in none of the first rows, from which the columns are told. Give the "
                    "features (IterableDataset.cast, features= of map or from_generator), or select_columns without it"
                )
        return pa.Table.from_arrays([self._array(rows, field) for field in self._schema], schema=self._schema)

    def _array(self, rows: Sequence[Mapping[str, Any]], field: pa.Field) -> pa.Array:
        from datasets.features.features import cast_to_python_objects, encode_nested_example
        from datasets.table import cast_array_to_feature

        values = [row.get(field.name) for row in rows]
        encoder = self._encoders.get(field.name)
        try:
            if encoder is not None:
                values = [
                    None if v is None else encode_nested_example(encoder, cast_to_python_objects(v)) for v in values
                ]
            try:
                return pa.array(values, field.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
                # Numbers that become text, text that holds numbers, tensors, …: whatever `datasets` would convert.
                array = pa.array(cast_to_python_objects(values, only_1d_for_numpy=True))
                array = cast_array_to_feature(array, self._features[field.name])
                return conform(pa.RecordBatch.from_arrays([array], [field.name]), pa.schema([field]), {}).column(0)
        except Exception as error:
            error.add_note(f"in column {field.name!r}")
            raise


def count_rows(stream: Any, features: Any, column: str) -> int:
    """The rows of a stream, by one pass over ``column`` alone."""
    if not stream._ex_iterable.iter_arrow:
        stream = undecoded_stream(stream)
        return sum(1 for _ in _raw(stream if stream.features is None else stream.decode(False)))
    return sum(table.num_rows for table in StreamTables(stream, features, [column], 1024))


def noted(stream: Any, on_file: Callable[[str], None]) -> Any:
    """``stream``; if its builder reads it as Arrow, ``on_file`` is called with each file that it begins."""
    step = stream._ex_iterable
    generate = getattr(step, "generate_tables_fn", None)
    if generate is None:
        return stream

    def noting(**found: Any) -> Iterator[Any]:
        files = next((found[name] for name in _FILES if name in found), None)
        if isinstance(files, list) and len(files) == 1:  # one at a time, as a stream calls it
            on_file(str(files[0]))
        yield from generate(**found)

    noting_stream = copy.copy(stream)
    noting_stream._ex_iterable = copy.copy(step)
    noting_stream._ex_iterable.generate_tables_fn = noting
    return noting_stream


def misfit(name: str, file: str, error: pa.ArrowInvalid) -> SourceError:
    """The error for a file whose columns are not those of the files before."""
    return SourceError(
        f"{name}: the columns of {file} are not those of the files before it: {error}. Mend it, leave it out with "
        'data_files= in load=, or say what all are with load={"features": …}.',
        dataset=name,
        shard=file,
    )


def _raw(stream: Any) -> Any:
    """The stream without its last step, which encodes and decodes the rows: they come as the step before made them."""
    found = copy.copy(stream.with_format(None))
    found._info = found._info.copy()
    found._info.features = None
    return found


def _at_epoch(stream: Any, epoch: int) -> Any:
    if hasattr(stream, "set_epoch"):
        stream.set_epoch(epoch)  # another order, if it is shuffled
    return stream


def _is_encoded(feature: Any) -> bool:
    """Whether values of a feature are not stored as they come: media, names of classes, …"""
    if isinstance(feature, Mapping):
        return any(_is_encoded(inner) for inner in feature.values())
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None:
        return _is_encoded(inner)
    return type(feature).__name__ != "Value"
