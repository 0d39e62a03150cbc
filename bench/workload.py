"""The data of a benchmark: seeded, as files that every variant reads.

A folder holds ``data/train-00000-of-00001.parquet`` (JPEGs with labels, or texts) for who decodes, and each field of
the decoded samples as ``<field>.npy`` for who gets them decoded: `TensorDataset`, np.memmap and the plain gather. The
latter are also the reference that every variant's output is checked against.
"""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

BATCH_SIZE = 64
IMAGE_SIDE = 224
NUM_CLASSES = 10
TEXT_LENGTH = 512
_JPEG_SIZE = (400, 300)
_JPEG_QUALITY = 85
_ROW_GROUP_ROWS = 100
_SEED = 20_240

#: The default number of samples: 300 MB of pixels and 245 MB of ids, mask and labels; more than any cache holds.
DEFAULT_SAMPLES = {"images": 2_000, "text": 20_000}

#: What the samples of a workload hold; the first is the one that the measured loop touches.
FIELDS = {"images": ("image", "labels"), "text": ("text", "attention_mask", "labels")}


@dataclass(frozen=True)
class Workload:
    """One kind of samples, and the folder with its files."""

    name: str
    folder: Path
    num_samples: int

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of a sample's fields, as a batch has them."""
        return FIELDS[self.name]

    def array(self, field: str, mode: Any = None) -> np.ndarray[Any, Any]:
        """The field of all samples, [num_samples, …]; ``mode`` maps the file, as in `numpy.load`."""
        array: np.ndarray[Any, Any] = np.load(self.folder / f"{field}.npy", mmap_mode=mode)
        return array

    @property
    def touched(self) -> tuple[Any, ...]:
        """The one element of each sample's first field that the measured loop reads, as an index into a batch."""
        if self.name == "images":
            return (slice(None), 1, IMAGE_SIDE // 2, IMAGE_SIDE // 2)
        return (slice(None), TEXT_LENGTH // 2)


def make_workload(name: str, folder: Path, num_samples: int) -> Workload:
    """Write the files of workload ``name`` into ``folder``."""
    (folder / "data").mkdir(parents=True)
    workload = Workload(name, folder, num_samples)
    {"images": _make_images, "text": _make_text}[name](workload)
    return workload


def _make_images(workload: Workload) -> None:
    from shmloader import decode_image

    labels = np.random.default_rng(_SEED).integers(NUM_CLASSES, size=workload.num_samples)
    shape = (workload.num_samples, 3, IMAGE_SIDE, IMAGE_SIDE)
    pixels = np.lib.format.open_memmap(workload.folder / "image.npy", "w+", np.uint8, shape)

    def make(row: int) -> bytes:
        jpeg = _jpeg(np.random.default_rng([_SEED, row]))
        pixels[row] = decode_image(jpeg, IMAGE_SIDE).transpose(2, 0, 1)
        return jpeg

    with ThreadPoolExecutor() as pool:
        jpegs = list(pool.map(make, range(workload.num_samples)))
    pixels.flush()
    np.save(workload.folder / "labels.npy", labels)
    features = {
        "image": {"_type": "Image"},
        "label": {"names": [str(i) for i in range(NUM_CLASSES)], "_type": "ClassLabel"},
    }
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    rows = [
        {"image": {"bytes": jpeg, "path": f"{row}.jpg"}, "label": int(label)}
        for row, (jpeg, label) in enumerate(zip(jpegs, labels, strict=True))
    ]
    _write(workload, rows, schema, features)


def _jpeg(rng: np.random.Generator) -> bytes:
    """Soft shapes with some grain: about as many bytes as a photograph of the size."""
    soft = Image.fromarray(rng.integers(256, size=(9, 12, 3), dtype=np.uint8))
    picture = np.asarray(soft.resize(_JPEG_SIZE, Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-16, 17, size=picture.shape[:2], dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray((picture + grain[..., None]).clip(0, 255).astype(np.uint8)).save(
        file, "jpeg", quality=_JPEG_QUALITY
    )
    return file.getvalue()


def _make_text(workload: Workload) -> None:
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     ", np.uint8)
    shape = (workload.num_samples, TEXT_LENGTH)
    # A little longer than a sample, so that every one of them is cut to the same length.
    codes = letters[np.random.default_rng(_SEED).integers(len(letters), size=(shape[0], TEXT_LENGTH + 40))]
    ids = codes[:, :TEXT_LENGTH].astype(np.int64)
    np.save(workload.folder / "text.npy", ids)
    np.save(workload.folder / "labels.npy", ids)
    np.save(workload.folder / "attention_mask.npy", np.ones(shape, np.int64))
    rows = [{"text": row.tobytes().decode()} for row in codes]
    _write(workload, rows, pa.schema([("text", pa.string())]), {"text": {"dtype": "string", "_type": "Value"}})


def _write(workload: Workload, rows: list[dict[str, Any]], schema: pa.Schema, features: dict[str, Any]) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata(metadata))
    pq.write_table(table, workload.folder / "data" / "train-00000-of-00001.parquet", row_group_size=_ROW_GROUP_ROWS)
