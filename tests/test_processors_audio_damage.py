"""Clips that are damaged, cut short, or of a kind that cannot be read: an error of the row, never other samples."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
import soundfile
from support_audio import KINDS, clips_of, encoded, reference, rng, sound, stored

from shmloader.errors import DecodeError
from shmloader.processors.audio import decode_audio


@pytest.mark.parametrize("value", [None, stored(None), stored(b"")])
def test_a_row_without_audio_is_an_error_of_its_own(value):
    error, good = clips_of([value, stored(encoded(sound()))])
    assert isinstance(good, np.ndarray)
    assert "'clip': the audio" in str(error)
    assert (error.field, error.column) == ("audio", "clip")


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
