"""Parquet datasets on disk, their plans and rows."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage

from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import SourcePlan, SourceRequest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SHMLOADER_TEST_DATA") or ROOT.parent / "shared" / "data")
FEATURES = Features(image=Image(), note=Value("string"), labels=ClassLabel(names=["x", "y"]))
TIMEOUT_S = 100


def jpeg(seed: int, side: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def rows(num: int, side: int = 16, first: int = 0) -> dict[str, list[object]]:
    return {
        "image": [{"bytes": jpeg(i, side), "path": f"{i}.jpg"} for i in range(first, first + num)],
        "note": [f"note {i} " * 30 for i in range(first, first + num)],
        "labels": [i % 2 for i in range(first, first + num)],
    }


def write_images(folder: Path, sizes: dict[str, int], side: int = 16, row_group: int | None = None) -> Path:
    """A Parquet dataset as ``push_to_hub`` lays it out, without a card; ``sizes``: rows of each file."""
    first = 0
    for name, num in sizes.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows(num, side, first), features=FEATURES).to_parquet(path, batch_size=row_group)
        first += num
    return folder


def write_card(folder: Path, num_examples: int) -> None:
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n"
        f"    num_bytes: 1\n    num_examples: {num_examples}\n  download_size: 1\n  dataset_size: 1\n"
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )


def write_texts(folder: Path, texts: list[str], row_group: int = 1000, name: str = "train-00000.parquet") -> Path:
    path = folder / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=row_group)
    return folder


def read_all(request: SourceRequest, plan: SourcePlan) -> pa.Table:
    reader = open_reader(request, plan)
    parts = [part for chunk in plan.chunks for part in reader.read(chunk)]
    reader.close()
    firsts = [first for first, _ in parts]
    assert firsts == list(np.cumsum([0] + [batch.num_rows for _, batch in parts[:-1]]))
    return pa.Table.from_batches([batch for _, batch in parts], plan.schema)


def plan_and_read(dataset: object, split: str = "train", **more: object) -> tuple[SourcePlan, pa.Table]:
    request = SourceRequest(str(dataset), split, **more)
    plan = make_plan(request)
    return plan, read_all(request, plan)


def read_file(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def run(script: str, arguments: list[object], tmp_path: Path, **env: str) -> None:
    """Run ``script`` in a fresh interpreter with an empty Hub cache; it must succeed."""
    home = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "USE_TORCH": "0"}
    base = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=base | home | env, check=True, timeout=TIMEOUT_S
    )
