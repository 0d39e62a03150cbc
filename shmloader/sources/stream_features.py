"""The features of a stream that does not know its own, from its first rows; and whether it can be read here at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from shmloader.errors import SourceError
from shmloader.sources.base import SourceRequest
from shmloader.sources.resolve import empty_dataset, source_name
from shmloader.sources.stream_rows import misfit, noted
from shmloader.sources.undecoded import undecoded_stream

#: Rows from which they are inferred.
_INFER_ROWS = 64
#: Formats whose library a service does not have.
_FOREIGN = ("torch", "tensorflow", "jax")


def features_of(request: SourceRequest, stream: Any) -> Any:
    """The stream's features, inferred if it has none.

    Raises:
        EmptyDatasetError: it has no rows. SourceError: they do not go together.
    """
    if stream.features is not None:
        return stream.features
    from datasets import Dataset, Features

    stream = undecoded_stream(stream)
    if stream._ex_iterable.iter_arrow:
        files: list[str] = []
        first_rows = noted(stream, files.append).take(_INFER_ROWS).with_format("arrow")
        try:
            tables = list(first_rows.iter(_INFER_ROWS))
        except pa.ArrowInvalid as error:
            if not files or not str(error).startswith("Schema at index"):
                raise
            raise misfit(source_name(request), files[-1], error) from error
        if not sum(table.num_rows for table in tables):
            raise empty_dataset(request)
        return Features.from_arrow_schema(tables[0].schema)
    rows = list(stream.with_format(None).take(_INFER_ROWS))
    if not rows:
        raise empty_dataset(request)
    names = dict.fromkeys(name for row in rows for name in row)  # from_list would take those of the first row alone
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}).features
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SourceError(
            f"{source_name(request)}: its columns cannot be told from its first {len(rows)} rows: {_misfit(rows)}"
            f"{error}. "
            'Give the features: IterableDataset.cast, features= of map or from_generator, or load={"features": …}.',
            dataset=source_name(request),
        ) from error


def check_formats(request: SourceRequest, stream: Any) -> None:
    """Raise if functions of ``stream`` are to get tensors of a library that services do not have.

    A format at the end does not matter: it is not applied.
    """
    for step in _steps(stream._ex_iterable):
        kind = getattr(getattr(step, "formatting", None), "format_type", None)
        if kind in _FOREIGN:
            raise SourceError(
                f"{source_name(request)}: map or filter comes after with_format({kind!r}), and {kind} is not loaded by "
                "the prefetch processes, which run them. Call with_format after them or not at all (samples are torch "
                "tensors anyway), or give them with_format('numpy').",
                dataset=source_name(request),
            )


def _steps(step: Any) -> Iterator[Any]:
    yield step
    if hasattr(step, "ex_iterable"):
        yield from _steps(step.ex_iterable)
    for before in getattr(step, "ex_iterables", ()):
        yield from _steps(before)


def _misfit(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first row and column that does not go together with the rows before."""
    for end in range(1, len(rows) + 1):
        for name, value in rows[end - 1].items():
            try:
                pa.array([row.get(name) for row in rows[:end]])
            except (pa.ArrowException, TypeError, ValueError):
                return f"row {end - 1} does not go together with those before in column {name!r} ({value!r:.80}): "
    return ""
