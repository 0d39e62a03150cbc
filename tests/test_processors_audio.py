"""Clips become mono samples at 16 kHz."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr

from shmloader import MultimodalConfig
from shmloader.errors import DecodeError, OptionError
from shmloader.processors import build, schema_of
from shmloader.processors.audio import AudioProcessor, decode_audio
from shmloader.sample import RecordLayout
from shmloader.sources.base import Columns

DATA = Path(__file__).parents[1].parent / "shared/data"
DIGITS = DATA / "Jakobovski/free-spoken-digit-dataset/data"
LUMA = DATA / "bezirganyan/LUMA"
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
DECODED = pa.struct([("array", pa.list_(pa.float32())), ("sampling_rate", pa.int64())])
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


@pytest.mark.parametrize("value", [None, stored(None), stored(b"")])
def test_a_row_without_audio_is_an_error_of_its_own(value):
    error, good = clips_of([value, stored(encoded(sound()))])
    assert isinstance(good, np.ndarray)
    assert "'clip': the audio" in str(error)
    assert (error.field, error.column) == ("audio", "clip")


@pytest.mark.parametrize("value", [None, stored(None)])
def test_an_optional_clip_that_is_null_is_left_out(value):
    absent, present = clips_of([value, stored(encoded(sound()))], optional=True)
    assert absent is None
    assert isinstance(present, np.ndarray)


def test_an_optional_clip_that_is_damaged_is_an_error_all_the_same():
    (error,) = clips_of([stored(b"")], optional=True)
    assert "has no bytes" in str(error)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"\0\0\0\x20ftypM4A ", "M4A"),
        (b"\x1aE\xdf\xa3\x01\0", "WebM"),
        (b"\xff\xf1\x50\x80", "AAC"),
        (b"ADIF", "AAC"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA"),
        (b"#!AMR\n", "AMR"),
    ],
)
def test_a_kind_that_libsndfile_cannot_read_is_named_with_a_way_out(start, said):
    (error,) = clips_of([stored(start + bytes(200))])
    assert f"looks like {said}" in str(error)
    assert f"libsndfile {soundfile.__libsndfile_version__}" in str(error)
    assert "process=" in str(error)


@pytest.mark.parametrize("data", [b"no audio at all", bytes(500), b"RIFF", b"\xff\xfb\x90\x00", b"OggS", b"fLaC"])
def test_bytes_of_no_audio_are_an_error(data):
    (error,) = clips_of([stored(data)])
    assert isinstance(error, DecodeError)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
@pytest.mark.parametrize(
    ("kind", "subtype"),
    [pair for pair in KINDS if pair != ("WAV", "IMA_ADPCM")] + [("RF64", "PCM_16"), ("VOC", "PCM_16")],
)
def test_a_truncated_clip_is_an_error(kind, subtype, share, tmp_path):
    data = encoded(sound(3), 16000, kind, subtype)
    cut = data[: int(len(data) * share)]
    with pytest.raises(DecodeError):
        decode_audio(cut)
    (tmp_path / "cut").write_bytes(cut)
    with pytest.raises(DecodeError):
        decode_audio({"bytes": None, "path": str(tmp_path / "cut")})


def test_a_truncated_wav_says_what_its_header_tells():
    data = encoded(sound(1))
    with pytest.raises(DecodeError, match="truncated: its header tells 32000 bytes, 31000 are there"):
        decode_audio(data[:-1000])


def test_a_wav_whose_size_was_not_known_when_it_was_begun_is_read():
    data = bytearray(encoded(sound(1)))
    at = data.index(b"data")
    data[4:8] = data[at + 4 : at + 8] = struct.pack("<I", 0xFFFFFFFF)
    np.testing.assert_array_equal(decode_audio(bytes(data)), reference(bytes(data)))
    assert len(decode_audio(bytes(data))) == 16000


def test_stray_bytes_behind_a_wav_and_a_missing_pad_byte_do_no_harm():
    data = bytearray(encoded(sound(0.1)[:-1], subtype="PCM_U8"))
    assert len(decode_audio(data + b"LIST stray")) == 1599
    at = data.index(b"data")
    data[at + 4 : at + 8] = struct.pack("<I", 1600)
    assert len(decode_audio(data[: at + 8 + 1599])) == 1599


def test_an_mp3_without_a_header_of_its_length_and_one_behind_a_picture_are_read():
    data = encoded(sound(2), kind="MP3", bitrate_mode="CONSTANT", compression_level=0.5)
    bare = data[data.index(data[:2], 10) :]
    tag = b"ID3\x03\0\0" + bytes([0, 0, 40, 0]) + bytes(40 << 7)
    for one in (bare, tag + bare, tag + data, data + b"TAG" + bytes(125)):
        np.testing.assert_array_equal(decode_audio(one), reference(one))
    with pytest.raises(DecodeError, match=r"truncated or damaged: its header tells \d+ frames"):
        decode_audio(tag + data[: len(data) // 2])


@pytest.mark.parametrize("rate", [16000, 44100])
def test_an_mp3_whose_length_was_guessed_too_short_is_an_error_unless_what_is_asked_for_is_there(rate, tmp_path):
    data = encoded(sound(4, rate), rate, "MP3", bitrate_mode="VARIABLE", compression_level=0.3)
    bare = data[data.index(data[:2], 10) :]
    tagged = b"ID3\x03\0\0" + bytes([0, 0, 40, 0]) + bytes(40 << 7) + bare + b"TAG" + bytes(125)
    assert len(reference(bare)) < 50000
    (tmp_path / "clip").write_bytes(bare)
    for value in (bare, tagged, {"path": str(tmp_path / "clip")}):
        for num_samples in (None, 70000):
            with pytest.raises(DecodeError, match=r"MP3 whose header does not tell its length.*bytes are left: encode"):
                decode_audio(value, num_samples=num_samples)
        np.testing.assert_array_equal(decode_audio(value, num_samples=2000), reference(bare, 2000))


def test_an_mp3_whose_header_leaves_out_how_many_frames_there_are_is_read_as_one_without():
    data = bytearray(encoded(sound(2), kind="MP3", bitrate_mode="VARIABLE", compression_level=0.3))
    data[data.index(b"Xing") + 7] &= 0xFE
    with pytest.raises(DecodeError, match="does not tell its length"):
        decode_audio(bytes(data))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_damaged_page_in_the_middle_is_an_error(subtype, share):
    data = bytearray(encoded(sound(20), kind="OGG", subtype=subtype))
    at = int(len(data) * share)
    data[at : at + 300] = rng.bytes(300)
    with pytest.raises(DecodeError, match=r"truncated or damaged: its header tells 320000 frames"):
        decode_audio(bytes(data))


def test_a_clip_without_samples_is_an_error():
    for data in (encoded(sound(0)), encoded(sound(1, 2), 192000)):
        (error,) = clips_of([stored(data)])
        assert "has no samples" in str(error)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_an_error(bad):
    frames = sound()
    frames[500] = bad
    (error,) = clips_of([stored(encoded(frames, subtype="FLOAT"))])
    assert "NaN or infinite" in str(error)


def test_samples_beyond_full_scale_stay_as_they_are():
    frames = sound() * 100
    np.testing.assert_array_equal(clips_of([stored(encoded(frames, subtype="FLOAT"))])[0], frames[:4000, 0])


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_are_never_more_than_an_error(seed, capfd):
    """Whatever flipped bits make of a file, no samples are lost in silence and no callback prints a traceback."""
    flips = np.random.default_rng(seed)
    for kind in ("WAV", "FLAC", "OGG", "MP3", "AIFF"):
        for most, num_samples in ((200, 1000), (None, None)):
            data = bytearray(encoded(sound(0.5, channels=2), kind=kind))
            for at in flips.integers(0, most or len(data), 3):
                data[at] ^= 1 << flips.integers(0, 8)
            with contextlib.suppress(DecodeError):
                samples = decode_audio(bytes(data), num_samples=num_samples)
                np.testing.assert_array_equal(samples, reference(bytes(data), num_samples))
    assert "Traceback" not in capfd.readouterr().err


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


def test_a_flac_whose_header_does_not_tell_its_length_says_why_and_what_to_do():
    data = bytearray(encoded(sound(1), kind="FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # the frames of STREAMINFO, as `flac -` leaves them
    with pytest.raises(
        DecodeError, match=r"a FLAC whose header does not tell its length.*pipe.*encode it anew"
    ) as caught:
        decode_audio(bytes(data))
    assert caught.value.format == "FLAC"


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "ULAW"])
def test_a_truncated_sphere_file_is_an_error(subtype, channels):
    data = encoded(sound(1, channels=channels), kind="NIST", subtype=subtype)
    np.testing.assert_array_equal(decode_audio(data), reference(data))
    with pytest.raises(DecodeError, match="truncated: its header tells 16000 frames, 15"):
        decode_audio(data[:-100])


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
    assert schema.task_type == "audio"
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
        "columns = S(text=None, image=None, audio='a', labels=None, class_names=None);"
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
