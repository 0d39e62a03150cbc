"""What the datasets of this package share: a set that is opened, told about, and closed."""

from __future__ import annotations

import logging
import operator
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import shmloader._native as native
from shmloader import log_pipe
from shmloader.collate import PADDED, Lengths, collate_as
from shmloader.config import MultimodalConfig
from shmloader.errors import ClosedError, OptionError
from shmloader.keys import Keys
from shmloader.made_up import made_up
from shmloader.opening import close_set, open_set
from shmloader.options import Options
from shmloader.policy import BadRows, check_fallback
from shmloader.prefetch.payload import Work
from shmloader.processors.text import check_tokenizer
from shmloader.reader import Attachment
from shmloader.ring import Refs
from shmloader.seeding import seeded
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.stats import Stats
from shmloader.tokens import batch_ring, join, known_files
from shmloader.views import Sample
from shmloader.worker_errors import carried

log = logging.getLogger("shmloader")

#: As services write to stderr where nobody reads their records.
_LOG_FORMAT = "%(asctime)s %(processName)s %(process)d %(levelname)s %(name)s: %(message)s"
#: More than any source has.
MOST_SAMPLES = 1 << 40

#: A `transform`, or a `process`.
Function = Callable[[dict[str, Any]], Mapping[str, Any]]


class SharedDataset:
    """One process's face of a set. The arguments are told at `ShmMultimodalDataset`."""

    def _open(
        self,
        config: Any,
        tokenizer: Any,
        requests: tuple[SourceRequest, ...],
        *,
        transform: Function | None,
        process: Function | None,
        options: Options | None,
        cache_size: int | None,
        keys: str | Mapping[str, str | None],
        writable: bool,
        seed: int,
        on_error: str,
        max_bad: float,
        train_on_prompt: bool,
    ) -> None:
        """Check the arguments and open the set; once, in the constructor."""
        _check_columns(requests[0].columns)
        check_fallback(requests[0].fallback)
        policy = BadRows(on_error, max_bad)
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        for name, function in (("transform", transform), ("process", process)):
            if function is not None and not callable(function):
                raise OptionError(
                    f"{name}= must be callable, but got {type(function).__name__}",
                    name=name,
                    value=repr(function),
                    allowed="a callable",
                )
        names = Keys.parse(keys)
        cache_size = _checked_size(cache_size)
        options = Options.from_env() if options is None else options
        requests = tuple(replace(request, source_timeout_s=options.source_timeout_s) for request in requests)
        work = Work(requests, MultimodalConfig() if config is None else config, tokenizer, process, train_on_prompt)
        self.transform = transform
        self.writable = writable
        self.seed = operator.index(seed)
        _show_log(options.log)
        self._reader = open_set(work, options, cache_size)
        try:
            self._reader.name_fields(names)
            self._reader.set_policy(policy)
        except BaseException:
            close_set(self._reader, os.getpid())
            raise
        self._closer = weakref.finalize(self, close_set, self._reader, os.getpid())
        self._closer.atexit = False  # the process's end is noticed without us
        for notice in self._reader.plan.source.notices:
            log.info("%s", notice)
        for warning in self._reader.plan.source.warnings:
            warnings.warn(warning, stacklevel=3)  # of whoever calls the constructor

    # -- around it -------------------------------------------------------------------------------------

    def collate(self, samples: Sequence[Any]) -> Any:
        """The batch of ``samples``, for ``DataLoader(collate_fn=dataset.collate)``, spawned workers included.

        As what a DataLoader does by itself with this dataset's samples, but also for plain dicts that a wrapper has
        made of them, as ``{**sample, "x": 1}``: these are padded and have masks too. They may be in tuples or lists,
        which are collated as torch does.

        A batch with samples of several datasets has the fields of those in it, and masks of those that some lack. So
        which keys it has depends on whose samples are in it: look with ``batch.get("image_mask")``.

        Raises:
            ShmloaderError: the samples have different fields, or the values of one cannot be laid side by side.
        """
        return collate_as(self._reader.face(), PADDED, samples)

    def collate_with(
        self,
        *,
        pad_to_multiple_of: int | Mapping[str, int] | None = None,
        ragged: Mapping[str, str] | None = None,
    ) -> Callable[[Sequence[Any]], Any]:
        """A `collate` that lays values of different lengths side by side in another way.

        pad_to_multiple_of: the padded length of tokens (what has an ``attention_mask``, and their labels) is rounded up
            to a multiple of this; a dict: of these fields; None: as the config says.
        ragged: field → "pad": filled up to the longest, also if a wrapper has added the field (with 0); "nested": a
            jagged ``torch.nested`` tensor [B, j, …]; "list": each sample's value as it is, whatever it is, None where
            it is lacking. Only "pad" makes an ``attention_mask``. Of what is in a dict: "field.key". Lists of numbers,
            of any depth, are made tensors for "pad" and "nested".

        Raises:
            OptionError: a bad argument, or there is nothing that it is for. What that depends on samples is raised from
                the batch: that none of them has a field that ``ragged`` names.
        """
        lengths = Lengths.parse(pad_to_multiple_of, ragged)
        if (face := self._reader.face()) is not None:
            lengths.check_multiples(face)
        return partial(self._collate, lengths)

    def _collate(self, lengths: Lengths, samples: Sequence[Any]) -> Any:
        return collate_as(self._reader.face(), lengths, samples)

    @property
    def name(self) -> str:
        """The dataset's name, as in every sample's ``source``; of several "a + b"."""
        return self._reader.plan.source.name

    @property
    def columns(self) -> dict[str, Any]:
        """Which columns were chosen: {"text": …, "image": …, "labels": …} and ``class_names``.

        Of several datasets, by the name of each.
        """
        source = self._reader.plan.source
        if source.is_mixed:
            return {part.name: _chosen(part) for part in source.sources}
        return _chosen(source)

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Of each source, in the order of their rows.

        ``name``: as samples have it. ``dataset``: what was read under it, a Hub id say. ``split``: with what was taken
        of it. ``mode``: "streaming", "downloaded", "local", "synthetic", … (`shmloader.sources`). ``rows``: None: not
        known. ``revision``: the commit. ``columns``: see `columns`. ``why``: why it is not what was asked for; None: it
        is. ``notices``, ``warnings``: what there was to say of it.
        """
        plan = self._reader.plan.source
        return [
            {
                "name": source.name,
                "dataset": str(source.resolved.get("dataset", source.name)),
                "split": source.split,
                "mode": source.mode,
                "rows": num_rows,
                "revision": source.revision,
                "columns": _chosen(source),
                "why": source.why,
                "notices": list(source.notices),
                "warnings": list(source.warnings),
            }
            for source, num_rows in zip(plan.sources, plan.source_rows, strict=True)
        ]

    @property
    def quarantine(self) -> list[dict[str, Any]]:
        """The bad rows of the set that any process knows of, by row: those that cannot become a sample, or be read.

        Each a dict: source, shard, row, num_rows (more than 1: of a chunk that cannot be read, from ``row`` on), field,
        error (the name of its class) and message. Rows are known once they were decoded or, where their shard cannot
        be read, asked for. What `max_bad` counts are those that were asked for; of a chunk that cannot be read it
        counts all rows as soon as one was. Of a stream without a length ``row`` is the position, and each iteration
        has its own. The first 32,768 are listed.
        """
        return self._reader.quarantine()

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch for ``transform``'s seeds, in all workers, persistent ones included.

        Without it the seed counts how often each sample was read, by anybody. Call it before iterating: workers
        that run ahead take it up with the next sample that they read.
        """
        epoch = operator.index(epoch)
        if not 0 <= epoch < 1 << 63:
            raise OptionError(
                f"epoch={epoch} is not valid: it must be 0 or more", name="epoch", value=str(epoch), allowed="0 or more"
            )
        self._reader.attach().segment.epoch(epoch + 1)  # 0: nobody has named one

    def stats(self) -> Stats:
        """What the set is doing, now."""
        ring = self._reader.attach()
        log_pipe.show()
        ring.segment.reap(False)
        raw = ring.segment.stats()
        services = [pid for _, pid, role in ring.segment.clients() if role == native.SERVICE]
        batches = batch_ring()
        counters, slots = (batches.counters, batches.ring.stats()) if batches is not None else (None, {})
        return Stats(
            num_rows=self._reader.plan.source.num_rows,
            samples_ready=raw["num_ready"],
            samples_kept=raw["num_resident"],
            samples_passing=raw["num_transit"],
            most_passing=raw["most_transit"] or None,
            samples_bad=raw["num_errors"] + raw["num_aside"],
            commits=raw["num_commits"],
            decoding_s=raw["decoding_ns"] / 1e9,
            samples_read=raw["num_reads"],
            guest_reads=raw["num_guest_reads"],
            fetched_bytes=raw["fetched_bytes"],
            ring_bytes=raw["resident_bytes"] + raw["transit_bytes"],
            ring_backed_bytes=raw["resident_backed_bytes"] + raw["transit_backed_bytes"],
            ring_used_bytes=raw["resident_used_bytes"] + raw["transit_used_bytes"],
            transit_bytes=raw["transit_bytes"],
            encoded_bytes=raw["raw_used_bytes"],
            spill_bytes=raw["spill_bytes"],
            spill_used_bytes=raw["spill_used_bytes"],
            prefetchers=max(0, len(services) - 1),
            service_pids=services,
            num_workers=raw["num_workers"],
            restarts=raw["num_services_lost"],
            batches_in_slots=counters.in_slots if counters else 0,
            batches_copied=counters.copied if counters else 0,
            batches_inline=counters.inline if counters else 0,
            batch_bytes=slots.get("budget_bytes", 0),
            batch_backed_bytes=slots.get("backed_bytes", 0),
        )

    def close(self) -> None:
        """End this process's use: the prefetch processes end with the last owner. Samples and batches stay valid.

        Raises nothing when called again; reading then raises `ClosedError`.
        """
        self._closer()

    def __enter__(self) -> Self:
        if self._reader.is_closed:
            raise ClosedError(f"The dataset {self.name!r} was closed", dataset=self.name)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        source, state = self._reader.plan.source, ", closed" if self._reader.is_closed else ""
        rows = "unknown" if source.num_rows is None else source.num_rows
        return f"{type(self).__name__}({self.name!r}, split={source.split!r}, rows={rows}{state})"

    def __getstate__(self) -> dict[str, Any]:
        """On the way to a spawned worker: the set's files and, by cloudpickle, the transform."""
        self._reader.check_can_travel()
        try:
            import cloudpickle

            transform = cloudpickle.dumps(self.transform)
        except Exception as error:
            raise OptionError(
                f"transform= cannot be sent to a worker that is spawned: {type(error).__name__}: {error}. It must be "
                "picklable by cloudpickle: leave open files, locks, connections and generators out of it, or make "
                "them on first use.",
                name="transform",
                value=type(self.transform).__name__,
                allowed="a picklable function",
            ) from error
        state = {k: v for k, v in self.__dict__.items() if k not in ("_closer", "transform")}
        return state | {"transform": transform, "batch_ring": known_files()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import pickle

        join(state.pop("batch_ring"))
        self.transform = pickle.loads(state.pop("transform"))
        self.__dict__.update(state)
        self._closer = weakref.finalize(self, close_set, self._reader, os.getpid())
        self._closer.atexit = False

    def _sample(self, attachment: Attachment, refs: Refs, i: int, asked: int, writable: bool) -> Sample:
        """The sample of the i-th record; one made up in its likeness where it stands in for the id ``asked``."""
        sample = Sample.over(attachment, refs, i, writable)
        if self._reader.policy.on_error != "synthetic" or refs.ids[i] == asked:
            return sample
        return made_up(sample, self._reader.plan, asked)

    def _transformed(self, sample: Sample, row: int, epoch: int) -> Sample:
        with carried():
            result = self._result(sample, row, epoch)
        made = Sample(result)
        made._attachment = sample._attachment  # for the padding that the schema says
        return made

    def _result(self, sample: Sample, row: int, epoch: int) -> Mapping[str, Any]:
        assert self.transform is not None
        with seeded(self.seed, epoch, row):
            try:
                result = self.transform(dict(sample))
            except Exception as error:
                error.add_note(f"in transform= for sample {row} of {self.name!r}")
                raise
        if not isinstance(result, Mapping):
            raise OptionError(
                f"transform= must return a dict, but got {type(result).__name__} (sample {row} of {self.name!r})",
                name="transform",
                value=type(result).__name__,
                allowed="a function from dict to dict",
            )
        return result


def _chosen(source: SourcePlan) -> dict[str, Any]:
    return {role: column for role, column in vars(source.columns).items() if column is not None}


def _check_columns(columns: Any) -> None:
    """Raise an OptionError unless ``columns`` is None or a dict, of which the planner says whether it fits."""
    if columns is None or isinstance(columns, Mapping):
        return
    allowed = "a dict of role to column, or None"
    names = list(columns) if isinstance(columns, list | tuple) else columns
    text = names[0] if isinstance(names, list) and len(names) == 1 else names
    example = {"text": text if isinstance(text, str) or (isinstance(text, list) and text) else "text"}
    raise OptionError(
        f"columns={columns!r} is not valid: it must be {allowed}, for example columns={example!r}",
        name="columns",
        value=repr(columns),
        allowed=allowed,
    )


def _checked_size(cache_size: Any) -> int | None:
    """``cache_size``, if it is a number of samples."""
    if cache_size is None:
        return None
    try:
        size = None if isinstance(cache_size, bool) else operator.index(cache_size)
    except TypeError:
        size = None
    if size is None or not 1 <= size <= MOST_SAMPLES:
        allowed = f"None (as many samples as find room), or a whole number of samples from 1 to {MOST_SAMPLES:,}"
        raise OptionError(
            f"cache_size={cache_size!r} is not valid: it must be {allowed}",
            name="cache_size",
            value=str(cache_size),
            allowed=allowed,
        )
    return size


def _show_log(level: str) -> None:
    """Have this process show what the services show (``SHMLOADER_LOG``), unless the program set up its logging."""
    if logging.getLevelName(level) < logging.WARNING:
        logger = logging.getLogger("shmloader")
        logger.setLevel(level)
        if not logger.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter(_LOG_FORMAT))
            logger.addHandler(handler)
