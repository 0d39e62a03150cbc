"""Several datasets of different kinds, whose rows are known, in one set."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from support_sets import png, write_pictures

from shmloader import MultimodalConfig

CONFIG = MultimodalConfig(vision_dim=8, max_audio_length=200, max_text_length=32)
MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_rows(path: Path, columns: dict[str, Any], features: dict[str, Any], rows_per_chunk: int = 16) -> str:
    """A Parquet dataset with these columns, that says what they are."""
    info = {"huggingface": json.dumps({"info": {"features": features}})}
    path.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns).replace_schema_metadata(info)
    pq.write_table(table, path / "train-00000-of-00001.parquet", row_group_size=rows_per_chunk)
    return str(path)


def story(row: int) -> str:
    return f"story {'x' * (row % 7)} {row}"


def write_stories(path: Path, num_rows: int) -> str:
    """``text`` alone."""
    return write_rows(
        path, {"text": [story(row) for row in range(num_rows)]}, {"text": {"dtype": "string", "_type": "Value"}}
    )


def tone(row: int) -> np.ndarray:
    return (np.full(100 + row, row + 1, np.float32) / 64).astype(np.float32)


def write_clips(path: Path, num_rows: int) -> str:
    """``audio`` and ``text``, of a clip of a constant."""
    clips = []
    for row in range(num_rows):
        file = io.BytesIO()
        soundfile.write(file, tone(row), 16000, format="WAV", subtype="FLOAT")
        clips.append({"bytes": file.getvalue(), "path": f"{row}.wav"})
    return write_rows(
        path,
        {"audio": pa.array(clips, MEDIA), "text": [f"clip {row}" for row in range(num_rows)]},
        {"audio": {"_type": "Audio"}, "text": {"dtype": "string", "_type": "Value"}},
    )


def write_classes(path: Path, num_rows: int) -> str:
    """``image`` and ``label``, as `support_sets.write_pictures` makes them."""
    return write_pictures(path, num_rows)


def expected(kind: str, row: int, source: str) -> dict[str, Any]:
    """What a sample of ``kind`` ("stories", "clips" or "classes") holds: text as a str, and arrays."""
    if kind == "stories":
        return {"text": story(row), "labels": list(story(row).encode()), "task_type": "text", "source": source}
    if kind == "clips":
        audio = np.zeros(CONFIG.max_audio_length, np.float32)
        audio[: len(tone(row))] = tone(row)
        text = f"clip {row}"
        labels = list(text.encode())
        return {"text": text, "audio": audio, "labels": labels, "task_type": "audio_text", "source": source}
    return {"image": picture(row), "labels": [row], "task_type": "vision", "source": source}


def picture(row: int) -> np.ndarray:
    """The normalised picture of `support_sets.png`, [3, 8, 8]."""
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(png(row))), np.float32).transpose(2, 0, 1) / 255
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((pixels - mean[:, None, None]) / deviation[:, None, None]).astype(np.float32)


def bytes_of(ids: Any) -> str:
    return bytes(ids.tolist()).decode()


def check_sample(sample: Any, kind: str, row: int, source: str) -> None:
    """It has exactly what its row holds."""
    want = expected(kind, row, source)
    assert set(sample) == set(want)
    for name, value in want.items():
        if name == "text":
            assert bytes_of(sample[name]) == value
        elif isinstance(value, np.ndarray):
            np.testing.assert_allclose(sample[name].numpy(), value, atol=2e-6)
        elif name == "labels":
            assert sample[name].tolist() == value
        else:
            assert sample[name] == value


def check_batch(batch: Any, wanted: list[tuple[str, int, str]]) -> None:
    """It has what its rows hold; padded, with masks, and nothing where a row has none. wanted: kind, row and source."""
    fields = {"text", "attention_mask", "text_mask", "image", "image_mask", "audio", "audio_mask", "labels"}
    assert set(batch) == fields | {"task_type", "source"}
    rows = [expected(*of) for of in wanted]
    longest = max(len(row["labels"]) for row in rows)
    for i, row in enumerate(rows):
        num = len(row.get("text", ""))
        assert bytes_of(batch["text"][i][:num]) == row.get("text", "")
        assert not batch["text"][i][num:].any()
        assert batch["attention_mask"][i].tolist() == [1] * num + [0] * (batch["text"].shape[1] - num)
        assert batch["labels"][i].tolist() == row["labels"] + [-100] * (longest - len(row["labels"]))
        for name in ("image", "audio"):
            assert bool(batch[f"{name}_mask"][i]) == (name in row)
            np.testing.assert_allclose(batch[name][i].numpy(), row.get(name, 0.0), atol=2e-6)
        assert bool(batch["text_mask"][i]) == ("text" in row)
    assert batch["source"] == [row["source"] for row in rows]
    assert batch["task_type"] == [row["task_type"] for row in rows]
