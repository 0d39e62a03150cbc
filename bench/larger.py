"""What does data that is larger than the ring cost?

Three questions, each in fresh processes over the images workload (JPEG → uint8 [3, 224, 224]):

half    the ring holds half of the data: which share of the reads of epochs 2 to 4 needs no decoding, and how many bytes
        are taken from the source, beside the first epoch? The optimum is 50 %; of a ring that is 50 times the samples
        on their way (transit: twice what readers work on and what is decoded ahead of them) 49 % can be had.
tenth   the ring holds a tenth of the data: how many samples a second, beside decoding in the workers, and which share
        of the prefetchers' time is decoding?
tight   8 workers, and a ring with the batches in flight and nothing more: how long is the longest wait for a batch?
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from bench.host import describe_host
from bench.loaders import DECODE, open_loader
from bench.workload import IMAGE_SIDE, Workload, make_workload
from shmloader import MultimodalConfig, Options, ShmMultimodalDataset, Stats

HELP = "hits, speed and waits where the ring holds a half, a tenth or only the batches in flight"

_RESULTS = Path(__file__).resolve().parent / "results"
#: A record: pixels, label and header, at multiples of 64 bytes.
RECORD_BYTES = 3 * IMAGE_SIDE * IMAGE_SIDE + 192
QUESTIONS = ("half", "tenth", "tight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench larger``."""
    parser.add_argument("--questions", default=",".join(QUESTIONS), help="which, with commas (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=6400, help="of the data (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="of the question `tight` (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder of the JSON (default: bench/results)")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save; 1 if a sample was wrong."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    asked = args.questions.split(",")
    if unknown := set(asked) - set(QUESTIONS):
        raise SystemExit(f"--questions: {', '.join(sorted(unknown))} is not one of {', '.join(QUESTIONS)}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="shmloader-bench-") as folder:
        console.print("making the data", style="dim")
        workload = make_workload("images", Path(folder) / "images", args.samples)
        for question in asked:
            console.print(f"measuring: {question}", style="dim")
            results[question] = {"half": _half, "tenth": _tenth, "tight": _tight}[question](workload, args)
    _print(results, console)
    report = {
        "question": "larger",
        "command": ["python", "-m", "bench", *sys.argv[1:]],
        "host": describe_host(),
        "samples": args.samples,
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"larger-{time.strftime('%Y%m%d-%H%M%S')}.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"written: {file}", style="dim", highlight=False, soft_wrap=True)
    return 0 if all(result["is_right"] for result in results.values()) else 1


@contextmanager
def _open(workload: Workload, num_samples: int, **options: Any) -> Iterator[ShmMultimodalDataset]:
    """The dataset with a ring for ``num_samples``."""
    config = MultimodalConfig(vision_dim=IMAGE_SIDE, image_dtype="uint8")
    chosen = Options(ring_bytes=num_samples * RECORD_BYTES + 4096, **options)
    with ShmMultimodalDataset(config, dataset_name=str(workload.folder), options=chosen) as dataset:
        yield dataset


def _epoch(loader: DataLoader[Any], pixels: Any, labels: Any, rows: list[int]) -> tuple[bool, float]:
    """One epoch, a part of each sample compared; whether all were right, and the longest wait for a batch in s."""
    is_right, longest, at = True, 0.0, 0
    last = time.perf_counter()
    for batch in loader:
        longest = max(longest, time.perf_counter() - last)
        wanted = rows[at : at + len(batch["labels"])]
        at += len(wanted)
        is_right &= bool((batch["labels"].numpy() == labels[wanted]).all())
        is_right &= bool((batch["image"][:, 1, 100].numpy() == pixels[wanted, 1, 100]).all())
        last = time.perf_counter()
    return is_right and at == len(rows), longest


def _run_epochs(
    dataset: ShmMultimodalDataset, workload: Workload, num_epochs: int, workers: int, batch_size: int
) -> list[dict[str, Any]]:
    """Epochs in our order, by persistent workers; of each what it read, decoded and took from the source."""
    sampler = dataset.sampler(seed=1)
    loader = DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=workers, persistent_workers=True, prefetch_factor=2
    )
    pixels, labels = workload.array("image", "r"), workload.array("labels")
    found = []
    for epoch in range(num_epochs):
        rows = sampler.order(epoch).rows(0, len(sampler)).tolist()
        before, began = dataset.stats(), time.perf_counter()
        is_right, longest = _epoch(loader, pixels, labels, rows)
        found.append(
            _difference(before, dataset.stats(), time.perf_counter() - began)
            | {
                "is_right": is_right,
                "longest_wait_s": longest,
                "first_epoch": epoch == 0,
            }
        )
    return found


def _difference(before: Stats, after: Stats, seconds: float) -> dict[str, Any]:
    reads = after.samples_read - before.samples_read
    decodes = after.commits - before.commits
    return {
        "seconds": seconds,
        "reads": reads,
        "hits": 1 - decodes / reads,
        "fetched_bytes": after.fetched_bytes - before.fetched_bytes,
        "samples_per_s": reads / seconds,
        "decoding": (after.decoding_s - before.decoding_s) / (seconds * max(1, after.prefetchers)),
    }


def _half(workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    workers, batch = 2, 8
    ring = workload.num_samples // 2
    with _open(workload, ring, in_flight=workers * batch, ahead=8, prefetchers=2, window_bytes="4MiB") as dataset:
        in_transit = dataset.stats().transit_bytes // RECORD_BYTES
        epochs = _run_epochs(dataset, workload, 4, workers, batch)
    return {
        "ring_samples": ring,
        "ring_per_transit": ring / in_transit,
        "hits": [epoch["hits"] for epoch in epochs[1:]],
        "fetched": [epoch["fetched_bytes"] / epochs[0]["fetched_bytes"] for epoch in epochs[1:]],
        "is_right": all(epoch["is_right"] for epoch in epochs),
        "epochs": epochs,
    }


def _tenth(workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    workers, batch = 2, 32
    with _open(workload, workload.num_samples // 10, in_flight=workers * batch, ahead=32, prefetchers=2) as dataset:
        epochs = _run_epochs(dataset, workload, 3, workers, batch)
    plain = open_loader(DECODE, workload, workers)
    rates = []
    for _ in range(2):
        began = time.perf_counter()
        num_read = sum(len(plain.first(batch)) for batch in plain.epoch())
        rates.append(num_read / (time.perf_counter() - began))
    plain.close()
    ours = [epoch["samples_per_s"] for epoch in epochs[1:]]
    return {
        "samples_per_s": ours,
        "peer_samples_per_s": rates,
        "ratio": float(np.median(ours) / np.median(rates)),
        "decoding": [epoch["decoding"] for epoch in epochs[1:]],
        "hits": [epoch["hits"] for epoch in epochs[1:]],
        "is_right": all(epoch["is_right"] for epoch in epochs),
        "epochs": epochs,
    }


def _tight(workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    workers, batch = 8, 8
    part = Workload(workload.name, workload.folder, workload.num_samples)
    ahead = 8
    with _open(part, 2 * (workers * batch + ahead), in_flight=workers * batch, ahead=ahead, prefetchers=2) as dataset:
        epochs = _run_epochs(dataset, part, args.epochs, workers, batch)
    return {
        "longest_wait_s": [epoch["longest_wait_s"] for epoch in epochs],
        "is_right": all(epoch["is_right"] for epoch in epochs),
        "epochs": epochs,
    }


def _print(results: dict[str, Any], console: Console) -> None:
    table = Table("question", "what", "target", "measured", "data")
    verdict = {True: "right", False: "[red]WRONG[/red]"}
    if half := results.get("half"):
        data = verdict[half["is_right"]]
        ring = f"ring {half['ring_per_transit']:.0f} × the samples on their way"
        table.add_row("half", f"reads without a decode, epochs 2–4; {ring}", "≥ 49 %", _percents(half["hits"]), data)
        table.add_row("", "bytes from the source, of the first epoch's", "≤ 51 %", _percents(half["fetched"]), data)
    if tenth := results.get("tenth"):
        data = verdict[tenth["is_right"]]
        table.add_row("tenth", "of the prefetchers' time is decoding", "≥ 95 %", _percents(tenth["decoding"]), data)
        rates = f"{np.median(tenth['samples_per_s']):,.0f}/s beside {np.median(tenth['peer_samples_per_s']):,.0f}/s"
        table.add_row("", f"samples/s, beside {DECODE}", "", f"{tenth['ratio']:.2f} × ({rates})", data)
    if tight := results.get("tight"):
        longest = max(tight["longest_wait_s"][1:])
        first = f"{longest:.2f} s (first epoch, start included: {tight['longest_wait_s'][0]:.2f} s)"
        table.add_row("tight", "longest wait for a batch", "≤ 1 s", first, verdict[tight["is_right"]])
    console.print(table)


def _percents(shares: list[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)
