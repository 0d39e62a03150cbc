"""Makes samples: encoded rows in the raw region become records in the ring, by way of the processors.

Every row of a task ends as a sample, as the reason why there is none, or is given back. Nothing is kept in between:
killed at any point, the rows that were claimed are claimed by another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TypeVar

import pyarrow as pa

import shmloader._native as native
from shmloader import checksum
from shmloader.deaths import Deaths
from shmloader.errors import ChecksumError, ProcessError, RecordTooLargeError, RingError, SampleError, ShmloaderError
from shmloader.prefetch.plan import SetPlan, describe_fields
from shmloader.prefetch.recipes import Recipe, schema_of
from shmloader.prefetch.schedule import DecodeSchedule, Task
from shmloader.prefetch.store import Pinned, RawStore, batches_of
from shmloader.prefetch.want_of_memory import end_process, is_want_of_memory
from shmloader.processors.base import Rows
from shmloader.processors.user import UserProcessor
from shmloader.quarantine import Quarantine
from shmloader.ring import Ring
from shmloader.sample import RecordLayout, Schema
from shmloader.writer import NoRoom, Stamp, Ticket, Writer

log = logging.getLogger("shmloader.prefetcher")

#: What a task takes: long beside choosing and claiming it, short for somebody who begins to wait (guessed).
TASK_S = 0.02
#: Rows of a task before it is known how long one takes, and the most.
FIRST_ROWS, MOST_ROWS = 8, 256
#: How long room for a row that somebody waits for is waited for with the task in hand, until it is given back.
ROOM_S = 0.5
#: Shapes whose layout is kept.
_MOST_LAYOUTS = 4096

_Result = TypeVar("_Result")
_Shapes = dict[str, tuple[int, ...]]
#: Rows that the processors of a source have taken, or why they could not.
_Begun = Sequence[Rows] | Exception


class Decoder:
    """Does the tasks of one prefetcher, in one thread.

    recipes: of each source, the processors that make its samples. verify: samples are sealed with a checksum.
    """

    def __init__(
        self,
        ring: Ring,
        writer: Writer,
        plan: SetPlan,
        recipes: Sequence[Recipe],
        store: RawStore,
        schedule: DecodeSchedule,
        verify: bool = False,
    ) -> None:
        self._is_sealing = verify
        self._segment, self._writer, self._store, self._schedule = ring.segment, writer, store, schedule
        self._plan, self._recipes = plan, recipes
        self._quarantine = Quarantine(ring.files.quarantine_fd)
        self._ring, self._deaths, self._is_noted = ring, Deaths(ring.files.deaths_fd), False
        self._layouts: dict[tuple[int, tuple[tuple[str, tuple[int, ...]], ...]], tuple[RecordLayout, bytes]] = {}
        self._row_s = 0.0
        self.num_rows = 0
        """Rows of which there is a record now, by this process."""
        self.busy_s = self._waited_s = 0.0
        """Time spent in tasks, and of the present one waiting for room."""
        self.schema = plan.schema
        if self.schema is None and self._segment.text_get(native.TEXT_SCHEMA) is not None:
            self._adopt()

    @property
    def most_rows(self) -> int:
        """Rows of a task that takes about `TASK_S`."""
        return min(max(int(TASK_S / self._row_s), 1), MOST_ROWS) if self._row_s else FIRST_ROWS

    def do(self, task: Task) -> None:
        """Decode the rows of ``task``; those that cannot be now are given back.

        Raises:
            NoRoom: there was none; wait for the work word.
            RingError: nothing more can be done, by anybody.
        """
        began, left = time.monotonic(), {row for _, row in task.rows}
        self._note(task)
        self._waited_s = 0.0
        pinned = self._store.pin(sorted({chunk for chunk, _ in task.rows}))
        num_rows = 0
        try:
            for row in self._put_failures(task, pinned):
                left.discard(row)
                num_rows += 1
            for source, row, i, begun in self._all_begun(task, pinned):
                elapsed = time.monotonic() - began
                # Of slow rows others may take their part.
                if num_rows and not task.urgent and (elapsed > 5 * TASK_S or self._schedule.has_wanted()):
                    break
                stamp = task.stamps.get(row)
                self._put(source, row, i, begun, stamp, task.urgent and stamp is None)
                left.discard(row)
                num_rows += 1
        finally:
            pinned.release()
            self._schedule.give_back(task, sorted(left))
            self._note(None)
            self.num_rows += num_rows
            elapsed = time.monotonic() - began - self._waited_s
            self.busy_s += elapsed
            self._segment.count_decoding(int(elapsed * 1e9))
            if num_rows:
                mean = elapsed / num_rows
                self._row_s = mean if not self._row_s else 0.7 * self._row_s + 0.3 * mean

    def _note(self, task: Task | None) -> None:
        """Write down the row, if it is one alone, should this process die over it; None: it did not."""
        row = task.rows[0][1] if task is not None and len(task.rows) == 1 else None
        if row is not None or self._is_noted:
            self._deaths.note_row(self._ring.slot, row)
            self._is_noted = row is not None

    def _put_failures(self, task: Task, pinned: Pinned) -> Iterator[int]:
        """The rows that cannot be read, of each of which it is told why."""
        for chunk, row in task.rows:
            failure = pinned.failure(chunk, row)
            if failure is not None:
                if isinstance(failure, ChecksumError):
                    failure = self._placed(failure, row)
                stamp = task.stamps.get(row)
                self._put_error(row, failure, stamp, task.urgent and stamp is None)
                yield row

    def _all_begun(self, task: Task, pinned: Pinned) -> Iterator[tuple[int, int, int, _Begun]]:
        """(source, row, its place in the begun rows, these) of the rows of ``task`` that are there."""
        there = [item for item in task.rows if pinned.holds(*item)]
        plan = self._plan.source
        if not plan.parts:
            for found in self._begun(self._recipes[0], batches_of(there, pinned)):
                yield 0, *found
            return
        # Chunks of a part follow one another. Their columns are those of no other one, or of other types.
        for (source, _), some in groupby(there, lambda item: (plan.source_of(item[0]), id(plan.leaf(item[0])))):
            for found in self._begun(self._recipes[source], batches_of(list(some), pinned)):
                yield source, *found

    def _begun(
        self, recipe: Recipe, batches: Iterator[tuple[list[int], pa.RecordBatch]]
    ) -> Iterator[tuple[int, int, _Begun]]:
        """(row, its place in the begun rows, these or why they cannot be had)."""
        for rows, batch in batches:
            begun: _Begun
            try:
                begun = [processor.begin(batch) for processor in recipe]
            except Exception as error:
                if len(rows) > 1:  # only the bad row is to be lost
                    yield from self._begun(recipe, (([row], batch.slice(i, 1)) for i, row in enumerate(rows)))
                    continue
                begun = error
            for i, row in enumerate(rows):
                yield row, i, begun

    def _put(self, source: int, row: int, i: int, begun: _Begun, stamp: Stamp | None, urgent: bool) -> None:
        try:
            if isinstance(begun, Exception):
                raise begun
            self._make(source, row, i, begun, stamp, urgent)
        except RecordTooLargeError as error:  # of this row alone
            self._put_error(row, self._placed(error, row), stamp, urgent)
        except (NoRoom, RingError):
            raise
        except Exception as error:
            if is_want_of_memory(error):  # here: the task is to be given back by our death
                end_process(self._ring, error)
            self._put_error(row, self._placed(error, row), stamp, urgent)

    def _make(self, source: int, row: int, i: int, begun: Sequence[Rows], stamp: Stamp | None, urgent: bool) -> None:
        shapes: _Shapes = {}
        for rows in begun:
            shapes.update(rows.shapes(i))
        if self.schema is None and self._agree():
            for rows in begun:  # what another prefetcher found first is what every row must have
                shapes.update(rows.shapes(i))
        layout, header = self._layout(source, shapes)
        ticket = self._reserve(row, layout.num_bytes, stamp, urgent)
        if ticket is None:
            return  # it is there
        try:
            record = self._writer.record_of(ticket)
            record[: len(header)] = header
            arrays = layout.arrays(record)
            for rows in begun:
                rows.write(i, arrays)
            if self._is_sealing:
                checksum.seal(record, checksum.RECORD_AT)
        except BaseException as error:
            if not is_want_of_memory(error):  # else our death gives it back, and counts
                self._writer.abort(ticket)
            raise
        self._writer.commit(ticket)

    def _layout(self, source: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[RecordLayout, bytes]:
        """Where the fields lie, and the head of the record; kept, since many samples have the same shapes."""
        assert self.schema is not None
        key = source, tuple(shapes.items())
        found = self._layouts.get(key)
        if found is None:
            stored = {name: shape or self._promoted[source].get(name, ()) for name, shape in shapes.items()}
            layout, header = RecordLayout(self.schema, stored, source), bytearray(self.schema.header_bytes)
            layout.write_header(memoryview(header))
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            found = self._layouts[key] = (layout, bytes(header))
        return found

    def _reserve(self, row: int, num_bytes: int, stamp: Stamp | None, urgent: bool) -> Ticket | None:
        return self._when_there_is_room(lambda: self._writer.reserve(row, num_bytes, stamp, urgent), urgent)

    def _put_error(self, row: int, error: ShmloaderError, stamp: Stamp | None, urgent: bool) -> None:
        self._when_there_is_room(lambda: self._writer.put_error(row, error, stamp, urgent), urgent)
        if isinstance(error, SampleError | RecordTooLargeError):
            self._quarantine.add(row, 1, error, is_met=False)

    def _when_there_is_room(self, work: Callable[[], _Result], urgent: bool) -> _Result:
        """Do ``work``, which raises NoRoom; for what somebody waits for again and again, for a while."""
        until = time.monotonic() + ROOM_S if urgent else 0.0
        while True:
            seen = self._segment.work_word()
            try:
                return work()
            except NoRoom:
                began = time.monotonic()
                if began >= until:
                    raise
                self._segment.work_wait(seen, native.TICK_MS)
                self._segment.reap(False)
                self._waited_s += time.monotonic() - began

    def _placed(self, error: Exception, row: int) -> ShmloaderError:
        """The same error with source, shard and row, in its data and its message."""
        kind: type[ShmloaderError] = SampleError
        text, data = f"{type(error).__name__}: {error}", {}
        if isinstance(error, SampleError | RecordTooLargeError | ChecksumError):
            kind, text, data = type(error), str(error), error.data
        plan = self._plan
        data = {**data, **plan.origin(row)}
        placed = kind(f"{plan.describe(row)}: {text}", **data)
        placed.__cause__ = error
        return placed

    def _agree(self) -> bool:
        """Have a schema; the first prefetcher that has processed a row decides it. False: it was this one."""
        schema = schema_of(self._recipes, self._plan.source)
        text = schema.to_json().encode()
        if len(text) > native.TEXT_BYTES:
            raise ProcessError(f"process returns {len(schema.fields)} fields: too many to describe in 32 KiB")
        if self._segment.text_put(native.TEXT_SCHEMA, text) != native.EXISTS:
            log.debug("fields of a sample, as the first row has them: %s", describe_fields(schema))
        return self._adopt() != schema

    def _adopt(self) -> Schema:
        text = self._segment.text_get(native.TEXT_SCHEMA)
        assert text is not None
        self.schema = Schema.from_json(text.decode())
        for processor in self._recipes[0]:
            if isinstance(processor, UserProcessor):
                processor.adopt(self.schema.fields)
        return self.schema

    @cached_property
    def _promoted(self) -> list[dict[str, tuple[int, ...]]]:
        """Of each source, the shape of what its processors make as a number and the schema has as [1] (union.py)."""
        assert self.schema is not None
        owns = [self.schema.fields_of(source) for source in range(len(self._recipes))]
        return [{field.name: (1,) for field in own if field.shape == (1,)} for own in owns]
