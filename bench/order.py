"""How far apart do samples that are neighbours in the source come, beside a uniform shuffle?

Rows that lie side by side are often alike (one video, one class, one day), so an order should part them. For each
order of the rows of a source in chunks: how many positions apart neighbours come, over a third of the number of rows
(the mean of a uniform shuffle); the serial correlation of the rows; which share of neighbours meet in one batch; and
from how many chunks the rows of a batch come. Ours, uniform and windowed, beside `torch.randperm`, and beside what
streaming loaders do: a buffer of 1,000 rows of which a random one is taken and replaced by the next, over the source
as it lies or over its chunks in random sequence. Nothing is loaded and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.host import describe_host
from shmloader.options import parse_size
from shmloader.order import Chunks, Kind, Order

HELP = "how far apart neighbours of the source come, beside a uniform shuffle and a shuffle buffer"

QUANTILES = (0.05, 0.5, 0.95)
#: What a uniform shuffle of many rows gives: of two random places, |a - b| / N is below x with probability 2x - x².
THEORY = {share: 3 * (1 - math.sqrt(1 - share)) for share in QUANTILES}
BATCH_SIZE = 64
BUFFER_ROWS = 1000
REFERENCE, UNIFORM = "torch.randperm", "uniform"
_RESULTS = Path(__file__).resolve().parent / "results"

Shuffle = Callable[[int], np.ndarray]


@dataclass
class Measured:
    """One order, over several seeds. gaps: those of the first seed, sorted, over N / 3."""

    variant: str
    is_right: bool = True
    runs: list[dict[str, float]] = field(default_factory=list)
    gaps: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def median(self, name: str) -> float:
        """Of one figure, over the seeds."""
        return statistics.median(run[name] for run in self.runs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench order``."""
    parser.add_argument("--rows", type=int, default=200_000, help="of the source (default: %(default)s)")
    parser.add_argument("--chunk-rows", type=int, default=100, help="rows of a chunk (default: %(default)s)")
    parser.add_argument("--row-bytes", default="100KiB", help="encoded bytes of a row (default: %(default)s)")
    parser.add_argument(
        "--windows", default="128MiB,512MiB,2GiB", help="sizes of a window, with commas (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many of them (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=_RESULTS, help="folder of the JSON and PNG (default: bench/results)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print and save; 1 if an order is not one of all rows."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    results = []
    for variant, shuffle in _variants(args).items():
        console.print(f"measuring {variant}", style="dim")
        results.append(measure(variant, shuffle, args.rows, args.chunk_rows, args.seeds))
    console.print(_table(results))
    stem = Path(args.out) / f"order-{time.strftime('%Y%m%d-%H%M%S')}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(_report(results, args), indent=2) + "\n", encoding="utf-8")
    _save_plot(results, stem.with_suffix(".png"))
    for suffix in (".json", ".png"):
        console.print(f"written: {stem.with_suffix(suffix)}", style="dim", highlight=False, soft_wrap=True)
    return 0 if all(result.is_right for result in results) else 1


def measure(variant: str, shuffle: Shuffle, num_rows: int, chunk_rows: int, num_seeds: int) -> Measured:
    """The figures of ``shuffle``, which gives all rows in the order of a seed."""
    result = Measured(variant)
    for seed in range(num_seeds):
        rows = shuffle(seed)
        result.is_right &= np.array_equal(np.sort(rows), np.arange(num_rows))
        positions = np.empty(num_rows, np.int64)
        positions[rows] = np.arange(num_rows)
        gaps = np.abs(np.diff(positions)) / (num_rows / 3)
        batches = positions // BATCH_SIZE
        pairs = np.unique(batches * num_rows + np.arange(num_rows) // chunk_rows)  # of batch and chunk
        result.runs.append(
            {f"gap_{share:g}": float(np.quantile(gaps, share)) for share in QUANTILES}
            | {
                "serial_correlation": float(np.corrcoef(rows[:-1], rows[1:])[0, 1]),
                "neighbours_in_a_batch": float((batches[1:] == batches[:-1]).mean()),
                "chunks_in_a_batch": len(pairs) / (int(batches.max()) + 1),
            }
        )
        if not len(result.gaps):
            result.gaps = np.sort(gaps)
    return result


def _variants(args: argparse.Namespace) -> dict[str, Shuffle]:
    num_rows, chunk_rows = args.rows, args.chunk_rows
    row_bytes = parse_size(args.row_bytes, "--row-bytes").resolve(0)
    firsts = np.arange(0, num_rows, chunk_rows)
    sizes = np.diff(firsts, append=num_rows)
    chunks = Chunks(firsts, sizes, np.arange(len(firsts)), sizes * row_bytes)

    def ours(kind: Kind, window_bytes: int) -> Shuffle:
        def shuffle(seed: int) -> np.ndarray:
            order = Order(chunks, kind, seed=seed, window_bytes=window_bytes)
            return order.rows(0, len(order))

        return shuffle

    def randperm(seed: int) -> np.ndarray:
        return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).numpy()

    def shuffled_chunks(seed: int) -> np.ndarray:
        laid = np.random.default_rng((seed, 1)).permutation(len(firsts))
        return np.concatenate([np.arange(firsts[chunk], firsts[chunk] + sizes[chunk]) for chunk in laid])

    found: dict[str, Shuffle] = {REFERENCE: randperm, UNIFORM: ours(Kind.UNIFORM, 1)}
    for text in args.windows.split(","):
        window_bytes = parse_size(text, "--windows").resolve(0)
        found[f"windows of {text} ({window_bytes / row_bytes:,.0f} rows)"] = ours(Kind.WINDOWED, window_bytes)
    buffer = f"buffer of {BUFFER_ROWS:,}"
    found[buffer] = lambda seed: through_buffer(np.arange(num_rows), seed)
    found[f"{buffer} over shuffled chunks"] = lambda seed: through_buffer(shuffled_chunks(seed), seed)
    return found


def through_buffer(rows: np.ndarray, seed: int, size: int = BUFFER_ROWS) -> np.ndarray:
    """``rows`` through a shuffle buffer, as of `datasets.IterableDataset.shuffle`: it is filled, then each next row
    takes the place of a random one, which is given out; what is left in the end is shuffled."""
    random = np.random.default_rng((seed, 2))
    buffer = rows[:size].copy()
    out = np.empty_like(rows)
    places = random.integers(0, len(buffer), max(0, len(rows) - size)).tolist()
    for at, (place, row) in enumerate(zip(places, rows[size:].tolist(), strict=True)):
        out[at], buffer[place] = buffer[place], row
    out[len(places) :] = random.permutation(buffer)
    return out


def _table(results: Sequence[Measured]) -> Table:
    table = Table(
        title="positions between neighbours of the source, over N/3",
        title_justify="left",
        title_style="bold",
        caption=f"Medians over the seeds. Batches of {BATCH_SIZE}.",
        caption_justify="left",
    )
    table.add_column("order")
    names = (
        *(f"{share:.0%}" for share in QUANTILES),
        "serial correlation",
        "neighbours in a batch",
        "chunks in a batch",
    )
    for name in (*names, "data"):
        table.add_column(name, justify="right")
    table.add_row(
        "theory", *(f"{THEORY[share]:.4f}" for share in QUANTILES), "", "", "", "", style="dim", end_section=True
    )
    for result in results:
        table.add_row(
            result.variant,
            *(f"{result.median(f'gap_{share:g}'):.4f}" for share in QUANTILES),
            f"{result.median('serial_correlation'):+.4f}",
            f"{result.median('neighbours_in_a_batch'):.3%}",
            f"{result.median('chunks_in_a_batch'):.1f}",
            "right" if result.is_right else "[red]WRONG[/red]",
        )
    return table


def _report(results: Sequence[Measured], args: argparse.Namespace) -> dict[str, Any]:
    names = ("rows", "chunk_rows", "row_bytes", "windows", "seeds")
    return {
        "question": "order",
        "command": ["python", "-m", "bench", *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": describe_host(),
        "settings": {name: getattr(args, name) for name in names} | {"batch_size": BATCH_SIZE},
        "theory": {f"gap_{share:g}": value for share, value in THEORY.items()},
        "results": [
            {
                "variant": result.variant,
                "is_right": result.is_right,
                "median": {name: result.median(name) for name in result.runs[0]},
                "runs": result.runs,
            }
            for result in results
        ],
    }


def _save_plot(results: Sequence[Measured], file: Path) -> None:
    """The share of neighbours that come nearer than so many positions."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    for result in results:
        gaps = result.gaps[:: max(1, len(result.gaps) // 2000)]
        shares = np.linspace(0, 1, len(gaps))
        is_reference = result.variant == REFERENCE
        style: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 3} if is_reference else {}
        axis.plot(gaps, shares, label=result.variant, **style)
    axis.set_xscale("log")
    axis.set_xlabel("positions between neighbours of the source, over N/3")
    axis.set_ylabel("share of neighbours that are nearer")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
