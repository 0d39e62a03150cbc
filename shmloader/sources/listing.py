"""The listing of a dataset of loose files: its rows without the files' bytes, and the reader that adds these.

The planner writes it once, as an Arrow IPC file; every prefetcher maps it in place and reads any chunk. Neither opens a
file before it is needed, nor imports ``datasets``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from shmloader.errors import ReadError, ShmloaderError
from shmloader.sources.answers import remedy, told_of
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest
from shmloader.sources.media_files import FileFailure, MediaFiles, paths_of, with_bytes
from shmloader.sources.resolve import has_secret, without_secrets
from shmloader.sources.rows import one_batch

_MEDIA = b"media"
_ELSEWHERE = "Check the connection, or have them here before: use_streaming=False."


def write_listing(batches: Sequence[pa.RecordBatch], schema: pa.Schema, media: Sequence[str]) -> pa.Buffer:
    """The listing of these rows. media: the columns whose files are to be read, as far as they hold no bytes."""
    schema = schema.with_metadata({_MEDIA: json.dumps(list(media))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as file:
        for batch in batches:
            file.write_batch(batch.replace_schema_metadata(schema.metadata))
    return sink.getvalue()


class Listing:
    """The rows of a listing, read in place. media: the columns whose files are to be read."""

    def __init__(self, buffer: pa.Buffer) -> None:
        table = pa.ipc.open_file(buffer).read_all()
        self.media: tuple[str, ...] = tuple(json.loads(table.schema.metadata[_MEDIA]))
        self._table = table.replace_schema_metadata(None)

    def rows(self, first_row: int, num_rows: int) -> pa.RecordBatch:
        """So many rows, without the files' bytes."""
        return one_batch(self._table.slice(first_row, num_rows).combine_chunks())

    def paths(self, row: int) -> list[str]:
        """The files of a row."""
        batch = self.rows(row, 1)
        columns = self.media or batch.schema.names
        return [path for name in columns for path in paths_of(batch.column(name))[0]]


def path_of(buffer: pa.Buffer, row: int) -> str | None:
    """The (first) file of a row, for messages; None: it names none."""
    found = Listing(buffer).paths(row)
    return found[0] if found else None


class ListingReader:
    """Reads the chunks of loose files. Built and used in one prefetcher, in one thread.

    A row whose file cannot be read keeps its path and has no bytes: whoever decodes it says why, and the other rows of
    its chunk are not lost.
    """

    def __init__(self, request: SourceRequest, plan: SourcePlan, touch: Callable[[], None] = lambda: None) -> None:
        assert plan.listing is not None
        self._request, self._plan = request, plan
        self._listing = Listing(plan.listing)
        self._files = MediaFiles(request, touch)

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``; see `Reader.read`."""
        batch = self._listing.rows(chunk.first_row, chunk.num_rows)
        try:
            for name in self._listing.media:
                index = batch.schema.get_field_index(name)
                batch = batch.set_column(index, batch.schema.field(index), with_bytes(batch.column(index), self._files))
        except (ShmloaderError, MemoryError):
            raise
        except Exception as error:
            path, cause = (error.path, error.__cause__ or error) if isinstance(error, FileFailure) else (None, error)
            failure = self._read_error(chunk, path, cause)
            if has_secret(self._request, str(cause)):
                raise failure from None
            raise failure from cause
        yield chunk.first_row, batch

    def close(self) -> None:
        """End its threads."""
        self._files.close()

    def _read_error(self, chunk: Chunk, path: str | None, error: BaseException) -> ReadError:
        """path: the file that was not read; None: it is not about one."""
        last = chunk.first_row + chunk.num_rows - 1
        file = path or (self._listing.paths(chunk.first_row) or ["?"])[0]
        where = f"from {file} on" if path is None else f"among them {file}"
        file, where = (without_secrets(self._request, text) for text in (file, where))
        why = without_secrets(self._request, f"{type(error).__name__}: {error}")
        return ReadError(
            f"{self._plan.name}, split {self._plan.split!r}: cannot read the files of rows {chunk.first_row} to "
            f"{last}, {where}: {why}. {remedy(error, _ELSEWHERE)}",
            dataset=self._plan.name,
            shard=file,
            first_row=chunk.first_row,
            num_rows=chunk.num_rows,
            **told_of(error),
        )
