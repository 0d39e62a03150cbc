"""Whole sets of clips and texts, through a stock DataLoader."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr
import torch
from conftest import opened
from torch.utils.data import DataLoader

from shmloader import MultimodalConfig, decode_audio
from shmloader.errors import DecodeError

NUM_ROWS = 48
NULL_ROWS = (5, 17)
DAMAGED_ROW = 30
NUM_SAMPLES = 2000
CONFIG = MultimodalConfig(max_audio_length=NUM_SAMPLES, max_text_length=64)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
DIGITS = Path(__file__).parents[1].parent / "shared/data/Jakobovski/free-spoken-digit-dataset"


def clip_of(row: int) -> bytes:
    """A clip whose kind, rate, channels and length differ from row to row."""
    rng = np.random.default_rng(row)
    rate, kind = (8000, 16000, 44100)[row % 3], ("WAV", "FLAC", "OGG")[row // 3 % 3]
    frames = rng.standard_normal((rate * (5 + row % 4) // 50, 1 + row % 2)) * 0.1
    file = io.BytesIO()
    soundfile.write(file, frames, rate, format=kind)
    return file.getvalue()


def reference(data: bytes) -> np.ndarray:
    frames, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    samples = frames.mean(axis=1)
    samples = samples if rate == 16000 else soxr.resample(samples, rate, 16000)
    return np.pad(samples, (0, NUM_SAMPLES))[:NUM_SAMPLES]


@pytest.fixture(scope="module")
def speech_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`NUM_ROWS` clips with transcripts in parts, some without a clip, one damaged."""
    clips = [None if row in NULL_ROWS else {"bytes": clip_of(row), "path": f"{row}"} for row in range(NUM_ROWS)]
    clips[DAMAGED_ROW] = {"bytes": clip_of(DAMAGED_ROW)[:60], "path": "damaged"}
    said = [{"title": f"t{row}", "lines": [f"line {row}", "end"]} for row in range(NUM_ROWS)]
    audio, text = {"_type": "Audio"}, {"dtype": "string", "_type": "Value"}
    features = {"clip": audio, "said": {"title": text, "lines": {"feature": text, "_type": "List"}}}
    table = pa.table({"clip": pa.array(clips, STRUCT), "said": pa.array(said)})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder = tmp_path_factory.mktemp("speech")
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=16)
    return str(folder)


def test_clips_and_transcripts_come_through_a_dataloader_as_the_reference_makes_them(speech_path):
    columns = {"audio": "clip", "text": ["said.title", "said.lines"]}
    whole = [row for row in range(NUM_ROWS) if row not in (*NULL_ROWS, DAMAGED_ROW)]
    with opened(speech_path, config=CONFIG, columns=columns) as dataset:
        assert dataset.columns == {"text": ("said.title", "said.lines"), "audio": "clip"}
        seen = []
        loader = DataLoader(torch.utils.data.Subset(dataset, whole), batch_size=8, num_workers=2)
        for batch in loader:
            assert batch["audio"].dtype == torch.float32
            assert batch["task_type"] == ["audio_text"] * len(batch["audio"])
            for clip, ids, mask in zip(batch["audio"], batch["text"], batch["attention_mask"], strict=True):
                row = whole[len(seen)]
                np.testing.assert_array_equal(clip.numpy(), reference(clip_of(row)))
                assert bytes(ids[mask.bool()].tolist()).decode() == f"t{row}\nline {row}\nend"
                seen.append(row)
        assert seen == whole
        for row in NULL_ROWS:
            assert "audio" not in dataset[row]
            assert bytes(dataset[row]["text"].tolist()).decode().startswith(f"t{row}\n")
        with pytest.raises(DecodeError, match=f"row {DAMAGED_ROW} of .*column 'clip': the audio") as caught:
            dataset[DAMAGED_ROW]
        assert (caught.value.field, caught.value.row) == ("audio", DAMAGED_ROW)


@pytest.mark.skipif(not DIGITS.is_dir(), reason=f"no recordings in {DIGITS}")
def test_spoken_digits_are_recognised_and_a_process_decodes_them_as_well(tmp_path):
    table = pa.concat_tables([pq.read_table(path) for path in sorted((DIGITS / "data").glob("*.parquet"))])
    clips = table.column("audio").to_pylist()
    with opened(str(DIGITS), config=CONFIG) as dataset:
        assert {name: dataset.columns[name] for name in ("audio", "labels")} == {"audio": "audio", "labels": "label"}
        assert dataset[0]["task_type"] == "audio"
        for row in range(0, len(dataset), 7):
            np.testing.assert_array_equal(dataset[row]["audio"].numpy(), reference(clips[row]["bytes"]))
            assert dataset[row]["labels"] == table.column("label")[row].as_py()
    with opened(str(DIGITS), process=lambda row: {"wave": decode_audio(row["audio"], 8000, 100)}) as dataset:
        samples = soundfile.read(io.BytesIO(clips[3]["bytes"]), dtype="float32")[0][:100]
        np.testing.assert_array_equal(dataset[3]["wave"].numpy(), samples)
