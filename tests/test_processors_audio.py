"""Clips become mono samples at 16 kHz."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr
from support_audio import KINDS, STRUCT, clips_of, encoded, reference, rng, sound, stored

from shmloader import MultimodalConfig
from shmloader.errors import DecodeError, OptionError
from shmloader.processors import build, schema_of
from shmloader.processors.audio import decode_audio
from shmloader.sources.base import Columns

DATA = Path(__file__).parents[1].parent / "shared/data"
DIGITS = DATA / "Jakobovski/free-spoken-digit-dataset/data"
LUMA = DATA / "bezirganyan/LUMA"
DECODED = pa.struct([("array", pa.list_(pa.float32())), ("sampling_rate", pa.int64())])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16000, 48000])
@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_every_kind_is_bit_for_bit_what_soundfile_and_soxr_make_of_it(kind, subtype, rate, channels):
    data = encoded(sound(0.3, rate, channels), rate, kind, subtype)
    short, long = (clips_of([stored(data)], num_samples=n)[0] for n in (1500, 9000))
    assert short.dtype == np.float32
    np.testing.assert_array_equal(short, reference(data, 1500))
    np.testing.assert_array_equal(long, reference(data, 9000))
    np.testing.assert_array_equal(decode_audio(data), reference(data))


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 22050, 24000, 44100, 44056, 96000, 192000, 384000])
def test_the_beginning_of_a_long_clip_is_that_of_the_whole_resampled_clip(rate):
    """Only a part of it is decoded: whatever follows must not have a say, down to the last bit."""
    frames = rng.standard_normal(rate * 6).astype(np.float32)
    data = encoded(frames, rate, "WAV", "FLOAT")
    whole = soxr.resample(frames, rate, 16000)
    for num_samples in (1, 300, 16000, 47777):
        (clip,) = clips_of([stored(data)], num_samples=num_samples)
        np.testing.assert_array_equal(clip, whole[:num_samples])


@pytest.mark.parametrize("rate", [16000, 8000])
def test_of_a_long_clip_only_the_beginning_is_decoded(rate, monkeypatch):
    data = encoded(sound(20, rate), rate)
    counts = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda file, frames, **how: counts.append(frames) or read(file, frames, **how)
    )
    clips_of([stored(data)], num_samples=1000)
    assert sum(counts) < rate


def test_samples_behind_the_clip_are_zero():
    data = encoded(sound(0.1))
    (clip,) = clips_of([stored(data)], num_samples=5000)
    np.testing.assert_array_equal(clip[:1600], reference(data))
    assert not clip[1600:].any()


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_plain_binary_columns_are_read(kind):
    data = encoded(sound())
    np.testing.assert_array_equal(clips_of([data], kind)[0], reference(data, 4000))


def test_a_slice_of_a_batch_yields_its_own_rows():
    clips = [encoded(sound()) for _ in range(3)]
    found = clips_of(pa.array([stored(data) for data in clips], STRUCT).slice(1))
    for clip, data in zip(found, clips[1:], strict=True):
        np.testing.assert_array_equal(clip, reference(data, 4000))


@pytest.mark.parametrize("name", ["a.wav", "a.raw", "no suffix"])
def test_a_row_without_bytes_is_read_from_its_file(tmp_path, name):
    data = encoded(sound(rate=44100), 44100)
    (tmp_path / name).write_bytes(data)
    (clip,) = clips_of([stored(None, str(tmp_path / name))])
    np.testing.assert_array_equal(clip, reference(data, 4000))


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_file_of_any_kind_is_read_as_its_bytes_are(tmp_path, kind):
    data = encoded(sound(2, channels=2), kind=kind)
    (tmp_path / "clip").write_bytes(data)
    np.testing.assert_array_equal(decode_audio({"path": str(tmp_path / "clip")}), decode_audio(data))


def test_a_missing_file_is_named(tmp_path):
    (error,) = clips_of([stored(None, str(tmp_path / "no.wav"))])
    assert "no.wav" in str(error)
    assert error.path == str(tmp_path / "no.wav")
    assert isinstance(error.__cause__.__cause__, FileNotFoundError)


@pytest.mark.parametrize("value", [None, stored(None)])
def test_an_optional_clip_that_is_null_is_left_out(value):
    absent, present = clips_of([value, stored(encoded(sound()))], optional=True)
    assert absent is None
    assert isinstance(present, np.ndarray)


def test_samples_beyond_full_scale_stay_as_they_are():
    frames = sound() * 100
    np.testing.assert_array_equal(clips_of([stored(encoded(frames, subtype="FLOAT"))])[0], frames[:4000, 0])


def test_decoded_audio_is_resampled_and_cut():
    frames = sound(0.5, 8000)[:, 0]
    expected = soxr.resample(frames, 8000, 16000)
    (clip,) = clips_of([{"array": frames.tolist(), "sampling_rate": 8000}], DECODED)
    np.testing.assert_array_equal(clip, expected[:4000])


def test_decoded_channels_are_averaged():
    left, right = sound(0.3, channels=2).T
    kind = pa.struct([("array", pa.list_(pa.list_(pa.float32()))), ("sampling_rate", pa.int64())])
    (clip,) = clips_of([{"array": [left.tolist(), right.tolist()], "sampling_rate": 16000}], kind)
    np.testing.assert_array_equal(clip, np.stack([left, right], 1).mean(axis=1)[:4000])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"array": [0.5], "sampling_rate": 0}, "sampling_rate"),
        ({"array": [0.5], "sampling_rate": None}, "sampling_rate"),
        ({"array": [], "sampling_rate": 16000}, "no samples"),
        ({"array": None, "sampling_rate": 16000}, "is null"),
        ({"array": [0.5, None], "sampling_rate": 16000}, "NaN"),
        (None, "is null"),
    ],
)
def test_decoded_audio_that_cannot_be_used_says_why(value, said):
    (error,) = clips_of([value], DECODED)
    assert said in str(error)


def test_decoded_audio_that_is_null_may_be_absent():
    assert clips_of([None, {"array": None, "sampling_rate": 5}], DECODED, optional=True) == [None, None]


def test_a_bare_list_of_samples_does_not_tell_its_rate():
    (error,) = clips_of([[0.5]], pa.list_(pa.float32()))
    assert "does not tell its sampling rate" in str(error)
    (error,) = clips_of([5], pa.int64())
    assert "holds int64, not encoded audio" in str(error)


def test_decode_audio_takes_what_a_row_holds_and_gives_writable_memory():
    frames = sound(0.2)
    data = encoded(frames, subtype="FLOAT")
    decoded = {"array": frames[:, 0], "sampling_rate": 16000}
    for value in (data, bytearray(data), memoryview(data), {"bytes": data}, decoded, {**decoded, "path": None}):
        found = decode_audio(value)
        np.testing.assert_array_equal(found, frames[:, 0])
        found[:] = 0
    assert frames.any()
    assert decode_audio(data, num_samples=10).shape == (10,)
    assert decode_audio(data, num_samples=10**4).shape == (10**4,)
    np.testing.assert_array_equal(decode_audio(data, 8000), soxr.resample(frames[:, 0], 16000, 8000))


@pytest.mark.parametrize("rate", [16000.0, np.int32(16000), np.float32(16000), np.array(16000)])
def test_a_rate_may_be_a_whole_number_of_any_type(rate):
    frames = sound(0.1)[:, 0]
    np.testing.assert_array_equal(decode_audio({"array": frames, "sampling_rate": rate}, rate), frames)


@pytest.mark.parametrize("rate", [16000.5, float("nan"), float("inf"), True, "16000", np.True_])
def test_a_rate_that_is_no_whole_number_is_an_error(rate):
    with pytest.raises(DecodeError, match="sampling_rate must be a whole number"):
        decode_audio({"array": sound(0.1)[:, 0], "sampling_rate": rate})
    with pytest.raises(OptionError, match="sample_rate"):
        decode_audio(encoded(sound(0.1)), rate)


def test_decode_audio_refuses_what_is_not_audio():
    with pytest.raises(DecodeError, match="but got ndarray"):
        decode_audio(np.zeros(4))
    with pytest.raises(DecodeError, match=r"must hold floats.* int16 of shape \[4\]: divide by.*\(32768 where"):
        decode_audio({"array": np.zeros(4, np.int16), "sampling_rate": 16000})
    for name in ("sample_rate", "num_samples"):
        with pytest.raises(OptionError, match=name):
            decode_audio(b"", **{name: 0})


def test_the_config_says_how_long_clips_are_and_beside_text_they_are_optional():
    config = MultimodalConfig(max_audio_length=800)
    schema = schema_of(build(Columns(audio="clip"), config), "here")
    assert [(f.name, f.dtype, f.shape, f.optional) for f in schema.fields] == [("audio", "float32", (800,), False)]
    assert schema.task_types == ("audio",)
    assert schema.record_bytes() == schema.most_record_bytes()
    schema = schema_of(build(Columns(audio="clip", text="said", image="photo"), config), "here")
    assert [(f.name, f.optional) for f in schema.fields] == [
        ("text", False),
        ("labels", False),
        ("image", True),
        ("audio", True),
    ]
    assert schema.record_bytes() is None
    for bad in (0, -5, "1", True):
        with pytest.raises(OptionError, match="max_audio_length"):
            build(Columns(audio="clip"), MultimodalConfig(max_audio_length=bad))


def test_of_image_and_audio_without_text_a_row_needs_one():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    picture, clip = stored(file.getvalue()), stored(encoded(sound()))
    (processor,) = build(Columns(image="photo", audio="clip"), MultimodalConfig(vision_dim=8))
    columns = [pa.array([picture, None, picture, None], STRUCT), pa.array([clip, clip, None, None], STRUCT)]
    rows = processor.begin(pa.RecordBatch.from_arrays(columns, ["photo", "clip"]))
    assert [set(rows.shapes(row)) for row in range(3)] == [{"image", "audio"}, {"audio"}, {"image"}]
    with pytest.raises(DecodeError, match="'photo', 'clip' are all null"):
        rows.shapes(3)


def test_audio_needs_no_image_decoder_no_torch_and_no_datasets():
    check = (
        "import sys; from types import SimpleNamespace as S; from shmloader.processors import build;"
        "columns = S(text=None, image=None, audio='a', labels=None, target=None, class_names=None);"
        "build(columns, S(vocab_size=9, vision_dim=8, max_audio_length=5));"
        "wrong = {'torch', 'datasets', 'PIL', 'simplejpeg', 'cykooz_resizer', 'shmloader.sources'};"
        "sys.exit(', '.join(wrong & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not DIGITS.is_dir(), reason=f"no recordings in {DIGITS}")
def test_spoken_digits_are_what_the_reference_makes_of_them():
    column = pq.read_table(DIGITS / "train-00000-of-00002.parquet", columns=["audio"]).column(0)
    for chunk in column.chunks:
        for clip, value in zip(clips_of(chunk, num_samples=8000), chunk.to_pylist(), strict=True):
            np.testing.assert_array_equal(clip, reference(value["bytes"], 8000))


@pytest.mark.skipif(not LUMA.is_dir(), reason=f"no recordings in {LUMA}")
def test_loose_recordings_are_what_the_reference_makes_of_them():
    paths = sorted(map(str, LUMA.rglob("*.wav")))[:200]
    assert paths
    for clip, path in zip(clips_of([stored(None, path) for path in paths]), paths, strict=True):
        np.testing.assert_array_equal(clip, reference(path, 4000))
