"""For tests of audio: clips made by soundfile, and what the processor makes of them beside the plain way."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import soundfile
import soxr

from shmloader.errors import DecodeError
from shmloader.processors import schema_of
from shmloader.processors.audio import AudioProcessor
from shmloader.sample import RecordLayout

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
#: What libsndfile reads and writes: format, and how its samples are stored.
KINDS = [
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "ALAC_16"),
    ("W64", "PCM_16"),
]
rng = np.random.default_rng(11)


def sound(seconds=0.3, rate=16000, channels=1):
    return (rng.standard_normal((int(seconds * rate), channels)) * 0.2).astype(np.float32)


def encoded(frames, rate=16000, kind="WAV", subtype=None, **settings):
    file = io.BytesIO()
    soundfile.write(file, frames, rate, format=kind, subtype=subtype, **settings)
    return file.getvalue()


def reference(data, num_samples=None, rate=16000):
    file = data if isinstance(data, str) else io.BytesIO(data)
    frames, own_rate = soundfile.read(file, dtype="float32", always_2d=True)
    samples = frames.mean(axis=1)
    if own_rate != rate:
        samples = soxr.resample(samples, own_rate, rate)
    return samples if num_samples is None else np.pad(samples, (0, num_samples))[:num_samples]


def clips_of(values, kind=STRUCT, num_samples=4000, **settings):
    """Each row's clip as it lies in a record whose memory was used before, or the error that it raised."""
    processor = AudioProcessor("clip", num_samples, **settings)
    column = values if isinstance(values, pa.Array) else pa.array(values, kind)
    rows = processor.begin(pa.RecordBatch.from_arrays([column], ["clip"]))
    found = []
    for row in range(len(column)):
        try:
            layout = RecordLayout(schema_of([processor], "here"), rows.shapes(row))
            out = layout.arrays(memoryview(bytearray(b"\x55" * layout.num_bytes)))
            rows.write(row, out)
            found.append(out.get("audio"))
        except DecodeError as error:
            found.append(error)
    return found


def stored(data, path=None):
    return {"bytes": data, "path": path}
