"""Is the memory of the services bounded, however much data passes through them?

A source is read once, of a few rows, of a given size and of a larger one, in chunks that are as large in both:

parquet  a file with large row groups, of which each is cut into pieces; its samples all stay, so every byte passes once
jsonl    lines, which can only be read front to back; each iteration reads them as a stream
tar      an archive with two members a row, read so, too, and made into rows by Python functions

The samples are of a few bytes (`process` counts letters), so that what is measured is what the services need for the
source. Of each service the private memory (its own pages that are no file's: "Anonymous" of smaps_rollup, proc(5)) is
looked at every few milliseconds, and the pages that the set has in shared memory. Windows of encoded chunks are as
small as they can be, of one chunk, so that the smaller source fills them, too. Of P prefetchers and chunks of c bytes,
whatever the size of the source:

private, of a prefetcher, beyond what it has for a few rows
    2·c            its fetcher's: a chunk that waits for room, and one that somebody waits for (fetcher.py)
    + READ_BYTES   what is read ahead of a chunk, by Arrow or `datasets`
    + KEPT_BYTES   free memory that its allocator keeps (spawn.py), since decoders need it again at once
shared, of the set
    K·c, with K = 2·N + 1, where N chunks cannot make way for another one:
        budget/c   those that are kept for an order: two windows and the one that is read (sizes.raw_budget); of a
                   stream twice what is fetched ahead (sizes.OPEN_AHEAD_BYTES)
        + fill/c   those that are fetched to fill the ring (fetch_schedule.FILL_BYTES); none of a stream
        + 2·P      of each prefetcher the one that it writes, and one more for who waits for it (held.py)
      Chunks differ in size, so that before each of these may be a gap into which another one just does not fit.
    + 3 extents    memory comes in extents (shml.h): what the last one of each region has too much

Both bounds are checked; and, since they are far off where little is kept, what the larger source takes more than the
smaller one. Peaks are of moments: of each prefetcher one chunk may wait for room or not, and one be put beyond the
budget or not. So it may be 2·c of private memory and `MOST_NOISE_BYTES`, and 2·P·c and an extent of shared memory. How
many gaps there are is chance as well: so each source is read several times, and its largest peaks count. A source that
is smaller than what may be kept of it grows into that, so both should be larger.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from bench.host import describe_host
from shmloader import Options, ShmMultimodalIterableDataset
from shmloader.options import parse_size
from shmloader.prefetch import spawn
from shmloader.prefetch.fetch_schedule import FILL_BYTES
from shmloader.sizes import OPEN_AHEAD_BYTES, raw_budget
from shmloader.sources.parquet import STREAM_BATCH_BYTES, STREAM_BUFFER_BYTES
from shmloader.sources.rows import BATCH_ROWS

HELP = "private and shared memory of the services, by the size of the source that passes through them"

_RESULTS = Path(__file__).resolve().parent / "results"
MIB = 1 << 20
#: Letters of a row; so many of these are one row group.
ROW_BYTES, GROUP_BYTES = 64 << 10, 256 * MIB
SOURCES = ("parquet", "jsonl", "tar")
#: Chunks that a fetcher holds at most; and the most that a prefetcher has at one moment, and may not have at another.
HELD_CHUNKS = 2
#: Ahead of a chunk: a column's buffer and two batches of Parquet; of lines a block of 10 MiB, as bytes and as a table.
READ_BYTES = max(STREAM_BUFFER_BYTES + 2 * STREAM_BATCH_BYTES, 2 * (10 << 20))
#: Free memory that glibc does not give back.
KEPT_BYTES = int(spawn.ENVIRONMENT["MALLOC_TRIM_THRESHOLD_"])
#: Of which the ring's memory is: SHML_EXTENT_BYTES in native/shml.h.
EXTENT_BYTES = 64 * MIB
#: And the allocators of a process keep what they had, which differs from run to run by so much (measured).
MOST_NOISE_BYTES = 32 * MIB
#: Of the source of a few rows, by which it is known what a prefetcher takes without any.
FEW_BYTES = 16 * ROW_BYTES
WINDOW_BYTES = MIB
_SAMPLE_S = 0.005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench memory``."""
    parser.add_argument("--sources", default=",".join(SOURCES), help="which, with commas (default: %(default)s)")
    parser.add_argument("--sizes", default="2GiB,6GiB", help="of the sources, two of them (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of each size, in turn (default: %(default)s)")
    parser.add_argument("--group", default=f"{GROUP_BYTES >> 20}MiB", help="of a row group (default: %(default)s)")
    parser.add_argument("--prefetchers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the data is made, and removed (default: TMPDIR)"
    )
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder of the JSON (default: bench/results)")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save; 1 if a sample was wrong or memory grew with the source."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    asked = args.sources.split(",")
    if unknown := set(asked) - set(SOURCES):
        raise SystemExit(f"--sources: {', '.join(sorted(unknown))} is not one of {', '.join(SOURCES)}")
    sizes = [parse_size(text, "--sizes").resolve(0) for text in args.sizes.split(",")]
    if len(sizes) != 2 or not 0 < sizes[0] < sizes[1]:
        raise SystemExit("--sizes: two of them, the smaller one first")
    if args.runs < 1:
        raise SystemExit("--runs: one at least")
    results = []
    for source in asked:
        for size in (FEW_BYTES, *sizes):
            console.print(f"measuring: {source}, {size / MIB:,.0f} MiB", style="dim", highlight=False)
            with tempfile.TemporaryDirectory(prefix="shmloader-bench-", dir=args.folder) as folder:
                num_rows = _WRITERS[source](Path(folder) / f"data.{source}", size, parse_size(args.group).resolve(0))
                runs = [_measure(folder, num_rows, args.prefetchers) for _ in range(args.runs)]
                results.append({"source": source, "bytes": size, **_largest(runs)})
    verdicts = [_verdict(*(result for result in results if result["source"] == source)) for source in asked]
    _print(results, verdicts, console)
    report = {
        "question": "memory",
        "command": ["python", "-m", "bench", *sys.argv[1:]],
        "host": describe_host(),
        "results": results,
        "verdicts": verdicts,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"memory-{time.strftime('%Y%m%d-%H%M%S')}.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"written: {file}", style="dim", highlight=False, soft_wrap=True)
    return 0 if all(r["is_right"] for r in results) and all(v["is_bounded"] for v in verdicts) else 1


# ---- data ------------------------------------------------------------------------------------------------


def _rows(num_rows: int) -> Iterator[tuple[int, str]]:
    """(number, text): no two neighbours have the same letters, nor the same length."""
    letters = [random.Random(seed).randbytes(ROW_BYTES // 2).hex() for seed in range(16)]
    for row in range(num_rows):
        yield row, letters[row % 16][: ROW_BYTES - row % 1000]


def _length(row: int) -> int:
    return ROW_BYTES - row % 1000


def _write_parquet(file: Path, num_bytes: int, group_bytes: int) -> int:
    num_rows, group = max(num_bytes // ROW_BYTES, 1), max(group_bytes // ROW_BYTES, 1)
    schema = pa.schema([("number", pa.int64()), ("text", pa.string())])
    rows = _rows(num_rows)
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for first in range(0, num_rows, group):
            numbers, texts = zip(*(next(rows) for _ in range(min(group, num_rows - first))), strict=True)
            writer.write_table(pa.table({"number": numbers, "text": texts}, schema=schema), row_group_size=group)
    return num_rows


def _write_jsonl(file: Path, num_bytes: int, group_bytes: int) -> int:
    del group_bytes  # lines have none
    num_rows = max(num_bytes // ROW_BYTES, 1)
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"number": row, "text": text}) + "\n" for row, text in _rows(num_rows))
    return num_rows


def _write_tar(file: Path, num_bytes: int, group_bytes: int) -> int:
    del group_bytes
    num_rows = max(num_bytes // ROW_BYTES, 1)
    with tarfile.open(file, "w") as archive:
        for row, text in _rows(num_rows):
            for kind, content in (("index", str(row)), ("text", text)):
                member = tarfile.TarInfo(f"{row:08d}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content.encode()))
    return num_rows


_WRITERS: dict[str, Callable[[Path, int, int], int]] = {
    "parquet": _write_parquet,
    "jsonl": _write_jsonl,
    "tar": _write_tar,
}


class CountLetters:
    """The `process`: next to nothing stays of a row. Waits until ``gate`` is open, a FIFO without a writer before."""

    def __init__(self, gate: Path) -> None:
        self._gate = str(gate)

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        os.close(os.open(self._gate, os.O_RDONLY))
        number = row["index"] if "index" in row else row["number"]  # as a WebDataset has it, whose names tell the types
        return {"number": number, "length": len(row["text"])}


# ---- measuring -------------------------------------------------------------------------------------------


class Watch:
    """Looks at the services of a dataset until it is closed; a thread of its own.

    Opens ``gate`` once it has seen ``num_services`` of them: of few rows they would be done before.

    private: pid → the most bytes. shared: the most bytes of the set's memfd.
    """

    def __init__(self, dataset: Any, num_services: int, gate: Path) -> None:
        self._dataset, self._num_services, self._gate = dataset, num_services, gate
        self._gate_fd: int | None = None
        self._fd = dataset._reader.files.ring.ring_fd
        self.private: dict[int, int] = {}
        self.shared = self.num_looks = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._is_over.set()
        self._thread.join()
        self._open_gate()
        os.close(self._gate_fd)

    def _open_gate(self) -> None:
        if self._gate_fd is None:
            self._gate_fd = os.open(self._gate, os.O_RDWR)

    def _run(self) -> None:
        while not self._is_over.is_set():
            if self.num_looks % 20 == 0 or len(self.private) < self._num_services:
                pids = self._dataset.stats().service_pids
            for pid in pids:
                private = private_bytes(pid)
                if private:
                    self.private[pid] = max(self.private.get(pid, 0), private)
            self.shared = max(self.shared, os.fstat(self._fd).st_blocks * 512)
            self.num_looks += 1
            if len(self.private) >= self._num_services:
                self._open_gate()
            self._is_over.wait(_SAMPLE_S)


def private_bytes(pid: int) -> int:
    """Pages of process ``pid`` that are its own and no file's; 0: it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kib = next((line.split()[1] for line in text.splitlines() if line.startswith("Anonymous:")), "0")
    return int(kib) * 1024


def _measure(folder: str, num_rows: int, num_prefetchers: int) -> dict[str, Any]:
    """Read the source once; what its services took at most, and whether every row came as it was written."""
    options = Options(ring_bytes="256MiB", prefetchers=num_prefetchers, spill_bytes=0, window_bytes=WINDOW_BYTES)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the services: nothing of it is asked for
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="shmloader-gate-") as beside:
        os.mkfifo(gate := Path(beside) / "gate")
        process = CountLetters(gate)
        with ShmMultimodalIterableDataset(dataset_name=folder, process=process, options=options) as dataset:
            source = dataset._reader.plan.source
            chunk_bytes = max(source.chunk_bytes, default=0) or BATCH_ROWS * ROW_BYTES
            watch = Watch(dataset, num_prefetchers + 1, gate)
            try:
                lengths = {int(sample["number"]): int(sample["length"]) for sample in dataset}
            finally:
                watch.close()
    most = sorted(watch.private.values())
    return {
        "rows": num_rows,
        "prefetchers": num_prefetchers,
        "mode": source.mode,
        "is_open": source.is_open,
        "seconds": time.perf_counter() - began,
        "is_right": lengths == {row: _length(row) for row in range(num_rows)},
        "chunk_bytes": chunk_bytes,
        "supervisor_bytes": most[0],
        "prefetcher_bytes": most[-1],
        "services_bytes": sum(most),
        "shared_bytes": watch.shared,
        "looks": watch.num_looks,
    }


def _largest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What several runs of the same source tell: the largest peaks, and the peaks of each run."""
    peaks = ("prefetcher_bytes", "services_bytes", "shared_bytes")
    largest = {name: max(run[name] for run in runs) for name in peaks}
    return {
        **runs[0],
        **largest,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "is_right": all(run["is_right"] for run in runs),
        "peaks": [{name: run[name] for name in peaks} for run in runs],
    }


def most_private_bytes(result: dict[str, Any]) -> int:
    """Of a prefetcher, beyond what it has for a few rows; see the module."""
    return int(HELD_CHUNKS * result["chunk_bytes"]) + READ_BYTES + KEPT_BYTES


def most_shared_bytes(result: dict[str, Any]) -> int:
    """Of the set; see the module."""
    chunk_bytes, num_prefetchers = int(result["chunk_bytes"]), result["prefetchers"]
    if result["is_open"]:
        kept = 2 * OPEN_AHEAD_BYTES
    else:
        budget = raw_budget([chunk_bytes], WINDOW_BYTES)
        kept = budget + min(FILL_BYTES, budget)
    num_kept = -(-kept // chunk_bytes) + 2 * num_prefetchers
    return (2 * num_kept + 1) * chunk_bytes + 3 * EXTENT_BYTES


def _verdict(few: dict[str, Any], small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    """What the larger source takes beside what it may, and how much more than the smaller one that is."""
    chunk_bytes, names = large["chunk_bytes"], ("prefetcher", "shared")
    taken = {
        "prefetcher": large["prefetcher_bytes"] - few["prefetcher_bytes"],
        "shared": large["shared_bytes"],
    }
    most = {"prefetcher": most_private_bytes(large), "shared": most_shared_bytes(large)}
    growth = {name: large[f"{name}_bytes"] - small[f"{name}_bytes"] for name in names}
    most_growth = {
        "prefetcher": HELD_CHUNKS * chunk_bytes + MOST_NOISE_BYTES,
        "shared": 2 * large["prefetchers"] * chunk_bytes + EXTENT_BYTES,
    }
    return {
        "source": large["source"],
        "taken_bytes": taken,
        "most_bytes": most,
        "growth_bytes": growth,
        "most_growth_bytes": most_growth,
        "is_bounded": all(taken[name] <= most[name] and growth[name] <= most_growth[name] for name in names),
    }


def _print(results: list[dict[str, Any]], verdicts: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        title="memory of the services, MiB",
        title_justify="left",
        title_style="bold",
        caption="Private: the largest prefetcher's peak, and all services'. Shared: samples and encoded chunks.\n"
        "Chunks: the prefetcher's private memory beyond what it has for a few rows, and all shared memory.",
        caption_justify="left",
    )
    for name in ("source", "mode"):
        table.add_column(name)
    for name in ("MiB", "chunk", "prefetcher", "services", "shared", "chunks", "seconds", "data"):
        table.add_column(name, justify="right")
    bases = {row["source"]: row["prefetcher_bytes"] for row in results if row["bytes"] == FEW_BYTES}
    for row in results:
        chunk_bytes, beyond = row["chunk_bytes"], row["prefetcher_bytes"] - bases[row["source"]]
        chunks = f"{beyond / chunk_bytes:.1f} + {row['shared_bytes'] / chunk_bytes:.1f}"
        table.add_row(
            row["source"],
            row["mode"],
            *(f"{row[f'{name}'] / MIB:,.0f}" for name in ("bytes", "chunk_bytes")),
            *(f"{row[f'{name}_bytes'] / MIB:,.0f}" for name in ("prefetcher", "services", "shared")),
            "" if row["bytes"] == FEW_BYTES else chunks,
            f"{row['seconds']:.1f}",
            "right" if row["is_right"] else "[red]WRONG[/red]",
        )
    console.print(table)
    for verdict in verdicts:
        told = "[green]bounded[/green]" if verdict["is_bounded"] else "[red]GROWS[/red]  "
        for name in ("prefetcher", "shared"):
            taken, most = verdict["taken_bytes"][name] / MIB, verdict["most_bytes"][name] / MIB
            growth, most_growth = verdict["growth_bytes"][name] / MIB, verdict["most_growth_bytes"][name] / MIB
            console.print(
                f"{told}  {verdict['source']}, {name}: {taken:,.0f} of {most:,.0f} MiB; {growth:+,.0f} MiB from the "
                f"smaller source to the larger one, where {most_growth:,.0f} are no growth",
                highlight=False,
            )
