"""What does a dataset on a Hub cost: how many bytes, and how long when the Hub does not answer?

bytes   three Parquet shards of images, read for several epochs by a DataLoader of 0, 2, … workers: the bytes of them
        that the Hub sent, over their size; beside `datasets`, streaming, in the same DataLoader.
dead    nothing listens where the Hub should be: how long until the first batch of synthetic samples, and until the
        error of ``fallback="error"``, beside ``SHMLOADER_SOURCE_TIMEOUT_S``?

The Hub is that of the tests (tests/hub.py), on the loopback, with the unmodified clients. Each run is a fresh process
with an empty cache.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.host import describe_host

HELP = "bytes fetched of a Hub by the number of workers, and how long a Hub that is dead is waited for"

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "bench" / "results"
REPO = "org/images"
NUM_SHARDS, GROUP_ROWS, SIDE = 3, 100, 64
BATCH_SIZE = 32
#: A child that takes longer hangs.
_CHILD_S = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench hub``."""
    parser.add_argument("--workers", default="0,2,4,8", help="of the DataLoader, with commas (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1500, help="of the dataset, 12 KB each (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="that are read (default: %(default)s)")
    parser.add_argument(
        "--timeouts", default="5,30", help="SHMLOADER_SOURCE_TIMEOUT_S, with commas (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder of the JSON (default: bench/results)")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save; 1 if rows were missing or the dead Hub was not noticed."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    with tempfile.TemporaryDirectory(prefix="shmloader-bench-") as made:
        folder = Path(made)
        console.print("making the data", style="dim")
        num_bytes = make_shards(folder / "hub" / REPO, args.rows)
        fetched = [
            fetch(folder, variant, workers, args.epochs, args.rows) | {"num_bytes": num_bytes}
            for workers in map(int, args.workers.split(","))
            for variant in ("shmloader", "datasets")
        ]
        console.print("waiting for a Hub that is dead", style="dim")
        dead = [wait(folder, float(timeout)) for timeout in args.timeouts.split(",")]
    title = f"{args.epochs} epochs of {args.rows:,} rows, {num_bytes / 1e6:.1f} MB on the Hub"
    _print(console, title, fetched, dead)
    report = {
        "question": "hub",
        "command": ["python", "-m", "bench", *sys.argv[1:]],
        "host": describe_host(),
        "bytes": fetched,
        "dead": dead,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"hub-{time.strftime('%Y%m%d-%H%M%S')}.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"written: {file}", style="dim", highlight=False, soft_wrap=True)
    is_right = all(one["num_rows"] == args.rows * args.epochs for one in fetched)
    return 0 if is_right and all(one["error"] == "SourceError" and one["is_synthetic"] for one in dead) else 1


def make_shards(folder: Path, num_rows: int) -> int:
    """Images that do not compress, as ``push_to_hub`` lays them out; their bytes."""
    import numpy as np
    from datasets import Dataset, Features, Image, disable_progress_bars
    from PIL import Image as Pillow

    disable_progress_bars()
    rng = np.random.default_rng(0)

    def png() -> dict[str, Any]:
        file = io.BytesIO()
        Pillow.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    folder.mkdir(parents=True)
    for shard in range(NUM_SHARDS):
        num = num_rows * (shard + 1) // NUM_SHARDS - num_rows * shard // NUM_SHARDS
        rows = Dataset.from_dict({"image": [png() for _ in range(num)]}, features=Features(image=Image()))
        rows.to_parquet(folder / f"train-{shard:05}-of-{NUM_SHARDS:05}.parquet", batch_size=GROUP_ROWS)
    return sum(file.stat().st_size for file in folder.iterdir())


def fetch(folder: Path, variant: str, workers: int, epochs: int, num_rows: int) -> dict[str, Any]:
    """What the Hub under ``folder`` sent for these epochs."""
    sys.path.append(str(_ROOT / "tests"))
    try:
        serve = importlib.import_module("hub").serve
    finally:
        sys.path.remove(str(_ROOT / "tests"))
    with serve(folder / "hub") as hub:
        order = {"variant": variant, "workers": workers, "epochs": epochs}
        told = _child(order, hub.endpoint)
        return {**order, **told, "sent_bytes": hub.num_bytes_of(".parquet")}


def wait(folder: Path, timeout_s: float) -> dict[str, Any]:
    """How long a Hub that is dead was waited for."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens, and nobody else gets the port
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        return {"timeout_s": timeout_s, **_child({"timeout_s": timeout_s}, endpoint)}


def _child(order: dict[str, Any], endpoint: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="shmloader-bench-") as home:
        done = subprocess.run(
            [sys.executable, "-m", "bench.hub", json.dumps(order)],
            env={**_own_environ(), "HF_ENDPOINT": endpoint, "HF_HOME": home, "XDG_CACHE_HOME": home},
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=_CHILD_S,
        )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _own_environ() -> dict[str, str]:
    """Without what would have the clients look elsewhere: the user's caches, offline mode."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}


def _print(console: Console, title: str, fetched: list[dict[str, Any]], dead: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for head in ("workers", "variant", "rows read", "sent, MB", "over their size"):
        table.add_column(head, justify="left" if head == "variant" else "right")
    for one in fetched:
        sent, size = one["sent_bytes"], one["num_bytes"]
        row = (one["workers"], one["variant"], f"{one['num_rows']:,}", f"{sent / 1e6:.1f}", f"{sent / size:.4f}")
        table.add_row(*map(str, row))
    console.print(table)
    table = Table(title="nothing listens where the Hub should be")
    for head in ("timeout, s", "first synthetic batch after, s", "error after, s"):
        table.add_column(head, justify="right")
    for one in dead:
        table.add_row(f"{one['timeout_s']:g}", f"{one['batch_s']:.1f}", f"{one['error_s']:.1f}")
    console.print(table)


# -- in the child --------------------------------------------------------------------------------------------------


def _read(variant: str, workers: int, epochs: int) -> dict[str, Any]:
    from torch.utils.data import DataLoader

    with _opened(variant) as dataset:
        num_rows = 0
        for _ in range(epochs):
            loader: DataLoader[Any] = DataLoader(dataset, BATCH_SIZE, num_workers=workers, collate_fn=len)
            num_rows += sum(loader)
    return {"num_rows": num_rows}


@contextmanager
def _opened(variant: str) -> Iterator[Any]:
    if variant == "datasets":
        import datasets

        datasets.logging.set_verbosity_error()  # it tells of workers that have no shard
        yield datasets.load_dataset(REPO, split="train", streaming=True)
        return
    from shmloader import MultimodalConfig, ShmMultimodalDataset

    config = MultimodalConfig(vision_dim=SIDE, image_dtype="uint8")
    with ShmMultimodalDataset(config, dataset_name=REPO, fallback="error") as dataset:
        yield dataset


def _wait(timeout_s: float) -> dict[str, Any]:
    from torch.utils.data import DataLoader

    from shmloader import Options, ShmloaderError, ShmMultimodalDataset

    options = Options(source_timeout_s=timeout_s)
    began = time.monotonic()
    with ShmMultimodalDataset(dataset_name="beans", options=options) as dataset:
        batch = next(iter(DataLoader(dataset, BATCH_SIZE)))
        batch_s = time.monotonic() - began
    began, error = time.monotonic(), None
    try:
        ShmMultimodalDataset(dataset_name="beans", fallback="error", options=options)
    except ShmloaderError as raised:
        error = type(raised).__name__
    is_synthetic = all(source.endswith("(synthetic)") for source in batch["source"])
    return {"batch_s": batch_s, "error_s": time.monotonic() - began, "error": error, "is_synthetic": is_synthetic}


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # more workers than cores, and that the data is synthetic
    asked = json.loads(sys.argv[1])
    print(json.dumps(_read(**asked) if "variant" in asked else _wait(**asked)))
