"""One small dataset in each format that is read, with each kind of data that the format can carry."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
from PIL import Image

#: More than a chunk of lines; few pictures and sounds, of which each is a request.
NUM_LINES, NUM_FILES = 130, 8
CLASSES = ("cat", "dog")


@dataclass(frozen=True)
class Format:
    """A format with what it carries here. files: so many are in it. write: makes the dataset in a folder."""

    name: str
    carries: str
    files: str
    write: Callable[[Path], None]

    @property
    def key(self) -> str:
        """A name for folders."""
        return "-".join(f"{self.name} {self.carries}".replace(".", " ").replace(",", " ").split())

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        is_lines = self.carries.startswith("text") and self.name != "WebDataset"
        return NUM_LINES if is_lines else NUM_FILES


def picture(seed: int) -> bytes:
    """A PNG."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), seed, np.uint8)).save(file, "PNG")
    return file.getvalue()


def sound(seed: int) -> bytes:
    """A tenth of a second of WAV."""
    file = io.BytesIO()
    wave = np.sin(np.arange(800) * (seed + 1) / 20).astype(np.float32) / 2
    soundfile.write(file, wave, 8000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def lines() -> list[dict[str, Any]]:
    """Rows of text and labels."""
    return [{"text": f"row {i} of many, with \u00fc", "label": i % 2} for i in range(NUM_LINES)]


def media(kind: str) -> datasets.Dataset:
    """Rows of a picture or a sound, and labels."""
    make, ending = (picture, "png") if kind == "image" else (sound, "wav")
    feature = datasets.Image() if kind == "image" else datasets.Audio()
    rows = [{"bytes": make(i), "path": f"{i}.{ending}"} for i in range(NUM_FILES)]
    # The bytes as they are: an Audio feature would encode them, for which it needs torchcodec.
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    labels = datasets.ClassLabel(names=list(CLASSES))
    made = datasets.Dataset.from_dict(
        {kind: rows, "label": [i % 2 for i in range(NUM_FILES)]},
        features=datasets.Features({kind: plain, "label": labels}),
    )
    return made.cast(datasets.Features({kind: feature, "label": labels}))


def _texts() -> datasets.Dataset:
    return datasets.Dataset.from_list(lines())


def _parquet(make: Callable[[], datasets.Dataset]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        rows = make()
        half = len(rows) // 2
        for i, part in enumerate((range(half), range(half, len(rows)))):
            path = folder / "data" / f"train-0000{i}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.select(part).to_parquet(path, batch_size=16)

    return write


def _arrow(make: Callable[[], datasets.Dataset]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        made = folder.parent / f".{folder.name}"
        made.mkdir(parents=True)
        make().save_to_disk(made)
        folder.mkdir(parents=True)
        (made / "data-00000-of-00001.arrow").rename(folder / "train.arrow")

    return write


def _text_file(name: str, text: Callable[[], str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        data = text().encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

    return write


def _json_lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in lines())


def _csv() -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "label"])
    writer.writeheader()
    writer.writerows(lines())
    return file.getvalue()


def _tar(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        for part in range(2):
            with tarfile.open(folder / f"train-{part}.tar", "w") as tar:
                for i in range(part * NUM_FILES // 2, (part + 1) * NUM_FILES // 2):
                    content = {"text": f"row {i}".encode(), "image": picture(i), "audio": sound(i)}[kind]
                    ending = {"text": "txt", "image": "png", "audio": "wav"}[kind]
                    for name, data in ((f"{i:03}.{ending}", content), (f"{i:03}.cls", str(i % 2).encode())):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))

    return write


def _files(kind: str, is_captioned: bool) -> Callable[[Path], None]:
    make, ending = (picture, "png") if kind == "image" else (sound, "wav")

    def write(folder: Path) -> None:
        for i in range(NUM_FILES):
            name = f"{i}.{ending}" if is_captioned else f"{CLASSES[i % 2]}/{i}.{ending}"
            path = folder / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make(i))
        if is_captioned:
            rows = [{"file_name": f"{i}.{ending}", "text": f"file {i}"} for i in range(NUM_FILES)]
            (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


#: In the order of the table.
FORMATS = (
    Format("Parquet", "text, labels", ".parquet", _parquet(_texts)),
    Format("Parquet", "images, labels", ".parquet", _parquet(lambda: media("image"))),
    Format("Parquet", "audio, labels", ".parquet", _parquet(lambda: media("audio"))),
    Format("Arrow", "text, labels", ".arrow", _arrow(_texts)),
    Format("Arrow", "images, labels", ".arrow", _arrow(lambda: media("image"))),
    Format("Arrow", "audio, labels", ".arrow", _arrow(lambda: media("audio"))),
    Format("JSON", "text, labels", ".json", _text_file("train.json", lambda: json.dumps(lines()))),
    Format("JSON lines", "text, labels", ".jsonl", _text_file("train.jsonl", _json_lines)),
    Format("JSON lines, compressed", "text, labels", ".jsonl.gz", _text_file("train.jsonl.gz", _json_lines)),
    Format("CSV", "text, labels", ".csv", _text_file("train.csv", _csv)),
    Format("text", "text", ".txt", _text_file("train.txt", lambda: "".join(f"{r['text']}\n" for r in lines()))),
    Format("WebDataset", "text, labels", ".tar of .txt and .cls", _tar("text")),
    Format("WebDataset", "images, labels", ".tar of .png and .cls", _tar("image")),
    Format("WebDataset", "audio, labels", ".tar of .wav and .cls", _tar("audio")),
    Format("folders of images", "images, labels", "cat/1.png", _files("image", False)),
    Format("folders of images", "images, text", "1.png, metadata.jsonl", _files("image", True)),
    Format("folders of audio", "audio, labels", "cat/1.wav", _files("audio", False)),
    Format("folders of audio", "audio, text", "1.wav, metadata.jsonl", _files("audio", True)),
)
