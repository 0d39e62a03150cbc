"""The demo's own data: two datasets of real files, laid out as the Hub lays them out, made on first use.

::

    <cache>/shmloader/demo/<DATA_VERSION>/
      demo-images/  README.md   data/train-00000-of-00003.parquet …   data/validation-00000-of-00001.parquet
      demo-text/    README.md   data/train-00000-of-00002.parquet …   data/validation-00000-of-00001.parquet

``<cache>`` is XDG_CACHE_HOME, or ~/.cache. The folder of a version appears at once, complete; any number of
processes may ask for it at the same time, and one of them makes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shmloader.cli.demo_pictures import CLASS_NAMES, draw_jpeg
from shmloader.cli.demo_text import write_text

#: Part of the folder's name: raise it whenever other files would be made.
DATA_VERSION = "1"
IMAGES, TEXT = "demo-images", "demo-text"

_SEED = 20_240
_BUILDING = ".building-"
_ROW_GROUP_ROWS = 100


@dataclass(frozen=True)
class DemoFolders:
    """Where the two datasets lie; each can be given to ``datasets.load_dataset``."""

    images: Path
    text: Path


@dataclass(frozen=True)
class DemoSizes:
    """Rows of each split, and the shards that the train split is cut into."""

    train_images: int = 600
    validation_images: int = 60
    image_shards: int = 3
    train_texts: int = 2400
    validation_texts: int = 200
    text_shards: int = 2


def default_cache() -> Path:
    """The folder that holds every version: ``$XDG_CACHE_HOME/shmloader/demo``, or the same in ~/.cache.

    Source: XDG Base Directory Specification 0.8; a relative XDG_CACHE_HOME is to be ignored.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "shmloader" / "demo"


def demo_folders(
    cache: Path | None = None, notice: Callable[[str], None] = lambda text: None, sizes: DemoSizes | None = None
) -> DemoFolders:
    """The embedded datasets, made now (about ten seconds on two cores) unless ``cache`` has them already.

    cache: `default_cache`, unless given. notice: told where the data is made, before the work starts.

    Raises:
        OSError: the cache cannot be written.
    """
    cache = cache or default_cache()
    target = cache / DATA_VERSION
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with _sole_builder(cache):
            if not target.is_dir():
                notice(f"making the demo's data in {target} (once)")
                _build(target, sizes or DemoSizes())
    return DemoFolders(images=target / IMAGES, text=target / TEXT)


@contextmanager
def _sole_builder(cache: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, and removes what a killed builder left."""
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in cache.glob(f"{_BUILDING}*"):
            shutil.rmtree(leftover)
        yield


def _build(target: Path, sizes: DemoSizes) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=target.parent))
    try:
        scratch.chmod(0o755)
        _build_images(scratch / IMAGES, sizes)
        _build_text(scratch / TEXT, sizes)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _build_images(folder: Path, sizes: DemoSizes) -> None:
    labels = np.random.default_rng(_SEED).integers(len(CLASS_NAMES), size=sizes.train_images + sizes.validation_images)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy and Pillow let go of the GIL while they work
        files = list(
            pool.map(lambda i: draw_jpeg(int(labels[i]), np.random.default_rng([_SEED, i])), range(len(labels)))
        )
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(CLASS_NAMES), "_type": "ClassLabel"},
    }
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata=_hub_metadata(features),
    )
    rows = [
        {"image": {"bytes": file, "path": f"{CLASS_NAMES[label]}_{i:04}.jpg"}, "label": int(label)}
        for i, (file, label) in enumerate(zip(files, labels, strict=True))
    ]
    split_bytes = {
        "train": _write_shards(folder, "train", rows[: sizes.train_images], schema, sizes.image_shards),
        "validation": _write_shards(folder, "validation", rows[sizes.train_images :], schema, 1),
    }
    names = "".join(f"          '{i}': {name}\n" for i, name in enumerate(CLASS_NAMES))
    features_yaml = (
        f"  - name: image\n    dtype: image\n  - name: label\n    dtype:\n      class_label:\n        names:\n{names}"
    )
    _write_card(
        folder,
        features_yaml,
        {"train": sizes.train_images, "validation": sizes.validation_images},
        split_bytes,
        "Drawn pictures of five kinds of scene, as JPEG files of the size that photographs have on the web.",
    )


def _build_text(folder: Path, sizes: DemoSizes) -> None:
    rng = random.Random(_SEED)
    rows = [{"text": write_text(rng)} for _ in range(sizes.train_texts + sizes.validation_texts)]
    schema = pa.schema([("text", pa.string())], metadata=_hub_metadata({"text": {"dtype": "string", "_type": "Value"}}))
    split_bytes = {
        "train": _write_shards(folder, "train", rows[: sizes.train_texts], schema, sizes.text_shards),
        "validation": _write_shards(folder, "validation", rows[sizes.train_texts :], schema, 1),
    }
    _write_card(
        folder,
        "  - name: text\n    dtype: string\n",
        {"train": sizes.train_texts, "validation": sizes.validation_texts},
        split_bytes,
        "Instructions with their answers, from a small seeded grammar.",
    )


def _hub_metadata(features: dict[str, Any]) -> dict[str, str]:
    """Schema metadata by which `datasets` knows the features of a Parquet file."""
    return {"huggingface": json.dumps({"info": {"features": features}})}


def _write_shards(
    folder: Path, split: str, rows: Sequence[dict[str, Any]], schema: pa.Schema, num_shards: int
) -> tuple[int, int]:
    """Write ``rows`` as Parquet files; returns their bytes in memory and on disk."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    memory_bytes = disk_bytes = 0
    for shard in range(num_shards):
        part = rows[len(rows) * shard // num_shards : len(rows) * (shard + 1) // num_shards]
        table = pa.Table.from_pylist(part, schema=schema)
        file = folder / "data" / f"{split}-{shard:05}-of-{num_shards:05}.parquet"
        pq.write_table(table, file, row_group_size=_ROW_GROUP_ROWS)
        memory_bytes += table.nbytes
        disk_bytes += file.stat().st_size
    return memory_bytes, disk_bytes


def _write_card(
    folder: Path, features: str, num_rows: dict[str, int], num_bytes: dict[str, tuple[int, int]], about: str
) -> None:
    splits = "".join(
        f"  - name: {split}\n    num_bytes: {num_bytes[split][0]}\n    num_examples: {rows}\n"
        for split, rows in num_rows.items()
    )
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in num_rows)
    memory_bytes, disk_bytes = (sum(sizes) for sizes in zip(*num_bytes.values(), strict=True))
    card = (
        f"---\nlicense: apache-2.0\ndataset_info:\n  features:\n{features}  splits:\n{splits}"
        f"  download_size: {disk_bytes}\n  dataset_size: {memory_bytes}\n"
        f"configs:\n- config_name: default\n  data_files:\n{files}---\n\n# {folder.name}\n\n{about}\n"
        "Made by `shmloader demo`; delete it whenever you like.\n"
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
