"""Streams of unknown length: several iterations of one stream, each read front to back, row by row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import pyarrow as pa

from shmloader.errors import ReadError, ShmloaderError
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest
from shmloader.sources.resolve import has_secret, without_secrets
from shmloader.sources.stream import as_arrow, open_planned, plain_rows

#: Which iteration of the stream a chunk is of.
Key = tuple[int, int]


class _Iteration:
    """One iteration of the stream, as far as it was read. failed: from which row on it cannot be read, and why."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self.tables = tables
        self.next_row = 0
        self.failed: tuple[int, str] | None = None


class OpenStreamReader:
    """Reads the chunks of an open plan. One prefetcher, one thread.

    Each iteration is a stream of its own; a jump backwards opens it again. Rows come one by one, so that the first ones
    of a slow stream need not wait for the others of their chunk (measured: 5 µs a row more than 64 at once).
    """

    def __init__(self, request: SourceRequest, plan: SourcePlan, touch: Callable[[], None]) -> None:
        self._request, self._plan, self._touch = request, plan, touch
        self._schema = plan.schema
        self._stream: Any = None
        self._features: Any = None
        self._iterations: dict[Key, _Iteration] = {}

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``, one by one; fewer, or none, where the stream ends.

        chunk: its piece is (the iteration's key, two numbers; its epoch). Rows before it that were not read yet are
        skipped over.

        Raises:
            ReadError: the stream failed, in this chunk (after the rows that were given) or before; or it gives fewer
                rows than it did when it was read before.
        """
        one, other, epoch = chunk.piece[:3]
        found = self._iterations.get((one, other))
        if found is not None and found.failed is not None and chunk.first_row >= found.failed[0]:
            # Not all of it again.
            raise self._read_error(chunk, chunk.first_row, f"it ended before them: {found.failed[1]}")
        try:
            if found is None or found.next_row > chunk.first_row:
                found = None
                found = self._iterations[one, other] = _Iteration(self._open(epoch))
            yield from self._rows(found, chunk)
        except (ShmloaderError, MemoryError):
            self._iterations.pop((one, other), None)
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            if found is None:  # it could not be opened
                found = self._iterations[one, other] = _Iteration(iter(()))
            first = max(chunk.first_row, found.next_row)
            found.failed = (first, why)
            failure = self._read_error(chunk, first, why)
            if has_secret(self._request, str(error)):
                raise failure from None
            raise failure from error

    def keep(self, keys: Collection[Key]) -> None:
        """Close all iterations but these."""
        for key in [key for key in self._iterations if key not in keys]:
            del self._iterations[key]

    def close(self) -> None:
        """Close the streams."""
        self._iterations = {}
        self._stream = None

    def _rows(self, iteration: _Iteration, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        end = chunk.first_row + chunk.num_rows
        while iteration.next_row < end:
            table = next(iteration.tables, None)
            if table is None:
                if iteration.next_row < chunk.first_row:
                    why = f"it gave {iteration.next_row} rows now, and more before"
                    raise self._read_error(chunk, chunk.first_row, why)
                return
            self._touch()
            row = iteration.next_row
            iteration.next_row += 1
            if row >= chunk.first_row:
                yield row, plain_rows(table, self._schema, self._features, self._request)

    def _open(self, epoch: int) -> Iterator[pa.Table]:
        if self._stream is None:
            self._stream, self._features = open_planned(self._request, self._plan)
        stream = as_arrow(self._stream, self._features, self._schema.names)
        if hasattr(stream, "set_epoch"):
            stream.set_epoch(epoch)  # another order, if it is shuffled
        return iter(stream.iter(1))

    def _read_error(self, chunk: Chunk, first: int, why: str) -> ReadError:
        """Of ``chunk``'s rows from ``first`` on."""
        end = chunk.first_row + chunk.num_rows
        return ReadError(
            f"{self._plan.name}, split {self._plan.split!r}: cannot read rows {first} to {end - 1} of the stream: "
            f"{without_secrets(self._request, why)}. "
            "Check that it gives the same rows each time it is read, and all of them the same columns.",
            dataset=self._plan.name,
            shard=self._plan.shards[0],
            first_row=first,
            num_rows=end - first,
        )
