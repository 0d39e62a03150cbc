"""Streams of unknown length: several iterations of one stream, each read front to back, row by row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from shmloader.errors import ReadError, ShmloaderError
from shmloader.sources.answers import remedy, told_of
from shmloader.sources.base import Chunk, OnRow, SourcePlan, SourceRequest
from shmloader.sources.blame import why_failed
from shmloader.sources.media_files import MediaFiles
from shmloader.sources.resolve import has_secret, without_secrets
from shmloader.sources.rows import one_batch
from shmloader.sources.stream import open_planned, plain_rows, tell_reopened
from shmloader.sources.stream_rows import StreamTables

#: Which iteration of the stream a chunk is of.
Key = tuple[int, int]


@dataclass(frozen=True)
class _Failure:
    """Why an iteration ended before the stream did. row: which cannot be read. data: for that of the errors."""

    row: int
    why: str
    advice: str
    data: dict[str, Any]

    @classmethod
    def of(cls, row: int, error: Exception) -> _Failure:
        """What is to be told of ``error``, which itself would keep all that it was raised in."""
        return cls(row, why_failed(error), remedy(error, ""), told_of(error))


class _Iteration:
    """One iteration of the stream, as far as it was read."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self.tables = tables
        self.next_row = 0
        self.failed: _Failure | None = None


class OpenStreamReader:
    """Reads the chunks of an open plan. One prefetcher, one thread; see `OpenReader`.

    Each iteration is a stream of its own; a jump backwards opens it again. Rows are taken one by one, so that the first
    ones of a slow stream need not wait for the others of their chunk, and made plain together.
    """

    def __init__(self, request: SourceRequest, plan: SourcePlan, touch: Callable[[], None]) -> None:
        self._request, self._plan, self._touch = request, plan, touch
        self._files = MediaFiles(request, touch)
        self._schema = plan.schema
        self._stream: Any = None
        self._features: Any = None
        self._iterations: dict[Key, _Iteration] = {}

    def read(self, chunk: Chunk, on_row: OnRow) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``, in one batch; fewer, or none, where the stream ends. Rows before it are passed over.

        chunk: its piece is (the iteration's key, two numbers; its epoch).

        Raises:
            ReadError: the stream failed, in this chunk (after the rows that were given) or before; or it gives fewer
                rows than it did when it was read before.
        """
        found = self._iteration(chunk)
        if found.failed is not None:
            raise self._read_error(chunk, found.failed)  # not all of it again
        rows: list[pa.Table] = []
        failure: Exception | None = None
        try:
            if not self._take(found, chunk, rows, on_row):
                return
        except (ShmloaderError, MemoryError):
            del self._iterations[chunk.piece[0], chunk.piece[1]]
            raise
        except Exception as error:
            failure, row = error, found.next_row
        batch, unfit = self.plain(rows)
        if unfit is not None:  # before whatever came behind
            failure, row = unfit, chunk.first_row + (0 if batch is None else batch.num_rows)
        if failure is not None:
            found.failed = _Failure.of(row, failure)
        if batch is not None:
            yield chunk.first_row, batch
        if failure is not None and found.failed is not None:
            told = self._read_error(chunk, found.failed)
            if has_secret(self._request, str(failure)):
                raise told from None
            raise told from failure

    def plain(self, rows: Sequence[pa.Table]) -> tuple[pa.RecordBatch | None, Exception | None]:
        """The first of ``rows``, as many as are what the plan promises; and why the next one is not."""
        if not rows:
            return None, None
        try:
            return self._plain(pa.concat_tables(rows)), None
        except Exception:  # of which row it is is found below, where each is tried alone; that error is told
            good, unfit = [], None
        for row in rows:
            try:
                good.append(self._plain(row))
            except MemoryError:  # nothing is wrong with the row
                raise
            except Exception as error:
                unfit = error
                break
        return one_batch(pa.Table.from_batches(good)) if good else None, unfit

    def keep(self, keys: Collection[Key]) -> None:
        """Close all iterations but these."""
        for key in [key for key in self._iterations if key not in keys]:
            del self._iterations[key]

    def close(self) -> None:
        """Close the streams."""
        self._iterations = {}
        self._stream = None
        self._files.close()

    def _iteration(self, chunk: Chunk) -> _Iteration:
        """The one that ``chunk`` is of; another one if that was read beyond, but for one that failed before."""
        one, other, epoch = chunk.piece[:3]
        found = self._iterations.get((one, other))
        is_failed = found is not None and found.failed is not None and found.failed.row <= chunk.first_row
        if found is not None and (is_failed or found.next_row <= chunk.first_row):
            return found
        if found is not None or chunk.first_row:
            tell_reopened(self._plan, chunk.first_row, 0 if found is None else found.next_row)
        found = self._iterations[one, other] = _Iteration(self._tables(epoch))
        return found

    def _take(self, iteration: _Iteration, chunk: Chunk, rows: list[pa.Table], on_row: OnRow) -> bool:
        """Read on, to the end of ``chunk`` or of the stream; False: ``on_row`` said that it need not."""
        end = chunk.first_row + chunk.num_rows
        while iteration.next_row < end:
            table = next(iteration.tables, None)
            if table is None:
                if iteration.next_row < chunk.first_row:
                    raise self._too_few(chunk, iteration.next_row)
                break
            self._touch()
            is_before = iteration.next_row < chunk.first_row
            iteration.next_row += 1
            if not is_before:
                rows.append(table)
            if not on_row(None if is_before else table):
                return False
        return True

    def _plain(self, table: pa.Table) -> pa.RecordBatch:
        return plain_rows(table, self._schema, self._features, self._files)

    def _tables(self, epoch: int) -> Iterator[pa.Table]:
        """All rows, one by one; it is opened with the first."""
        if self._stream is None:
            self._stream, self._features = open_planned(self._request, self._plan)
        yield from StreamTables(self._stream, self._features, self._schema.names, 1, epoch)

    def _read_error(self, chunk: Chunk, failed: _Failure) -> ReadError:
        """Of ``chunk``'s rows from the one that failed on, or of all of them if that lies before."""
        first, end = max(failed.row, chunk.first_row), chunk.first_row + chunk.num_rows
        what = f"row {failed.row} of the stream, and none after it"
        if failed.row < chunk.first_row:
            what = f"rows {first} to {end - 1} of the stream, which failed at row {failed.row}"
        what = f"{what}: {without_secrets(self._request, failed.why)}"
        return self._error(f"{what}. {failed.advice}" if failed.advice else f"{what}.", first, end, **failed.data)

    def _too_few(self, chunk: Chunk, num_rows: int) -> ReadError:
        first, end = chunk.first_row, chunk.first_row + chunk.num_rows
        return self._error(
            f"rows {first} to {end - 1} of the stream: it gave {num_rows} rows now, and more before. "
            "Check that it gives the same rows each time it is read.",
            first,
            end,
        )

    def _error(self, what: str, first: int, end: int, **data: Any) -> ReadError:
        return ReadError(
            f"{self._plan.name}, split {self._plan.split!r}: cannot read {what}",
            dataset=self._plan.name,
            shard=self._plan.shards[0],
            first_row=first,
            num_rows=end - first,
            **data,
        )
