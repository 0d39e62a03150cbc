"""Datasets of files that are not Parquet, and what ``datasets`` itself finds in them, undecoded."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
from PIL import Image

from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import SourcePlan, SourceRequest


def png(seed: int) -> bytes:
    """A small picture of one colour."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), seed % 256, np.uint8)).save(file, "PNG")
    return file.getvalue()


def wav(seed: int, num_samples: int = 100) -> bytes:
    """A short clip of a constant."""
    file = io.BytesIO()
    soundfile.write(file, np.full(num_samples, seed / 1000, np.float32), 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def write_tree(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """The files under ``root``, by their paths from there."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar archive of these members, in this sequence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read_rows(request: SourceRequest, plan: SourcePlan | None = None) -> list[dict[str, Any]]:
    """All rows of a plan (which is made if none is given), each chunk where it says that it is."""
    plan = make_plan(request) if plan is None else plan
    reader = open_reader(request, plan)
    row, batches = 0, []
    for chunk in plan.chunks:
        for first, batch in reader.read(chunk):
            assert first == row
            row += batch.num_rows
            batches.append(batch)
    reader.close()
    assert row == plan.num_rows
    return pa.Table.from_batches(batches, plan.schema).to_pylist()


def rows_of(name: Any, split: str = "train", **more: Any) -> list[dict[str, Any]]:
    """All rows of a dataset, every column."""
    return read_rows(SourceRequest(str(name) if isinstance(name, Path) else name, split, all_columns=True, **more))


def with_files(value: Any) -> Any:
    """What ``datasets`` gave, undecoded, with the bytes of local files in the place of their paths."""
    if isinstance(value, list):
        return [with_files(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"bytes", "path"}:
        if value["bytes"] is not None or value["path"] is None:
            return value
        return {"bytes": Path(value["path"]).read_bytes(), "path": Path(value["path"]).name}
    return {name: with_files(item) for name, item in value.items()}
