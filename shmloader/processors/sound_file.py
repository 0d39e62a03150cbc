"""Sound files, read by libsndfile, and whether they are whole, which it often does not say."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from shmloader.errors import DecodeError
from shmloader.processors.encoded import Encoded, unreadable

_BLOCK_VALUES = 1 << 22
"""Most samples, of all channels, that are read at once: room is not made for what a damaged header tells."""

_XING_FRAMES = re.compile(rb"(?:Xing|Info)...[\x01\x03\x05\x07\x09\x0b\x0d\x0f]", re.DOTALL)
"""In the first frame of an MP3: the header that tells how many there are. Source: LAME, VbrTag.h, FRAMES_FLAG."""

_MP3_FRAME = re.compile(rb"\xff[\xe2-\xff][\0-\xef]")
"""How a frame begins. Source: ISO 11172-3, section 2.4.1.3."""

_SPHERE_FRAMES = re.compile(rb"^sample_count -i (\d{1,18})\s*$", re.MULTILINE)
"""In the header of NIST SPHERE: frames, of all channels the same number. Source: NIST, "SPHERE 2.6a"."""

_UNKNOWN_FRAMES = (1 << 63) - 1
"""For libsndfile, that a header does not tell them. Source: sndfile.h, SF_COUNT_MAX."""

_HEAD_BYTES = 4096
_MOST_PAGE_BYTES = 27 + 255 + 255 * 255
"""Of a page of OGG. Source: RFC 3533, section 6."""

_TOLD_BYTES = re.compile(r"^\s*(?:data|SSND|Data Size|BODY|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""In libsndfile's log: the bytes of samples that a header tells, and those that are there; "riff" and "Riff size" are
those of W64 and RF64, of which it tells nothing else."""
_UNTOLD_BYTES = 0x7FFF_0000
"""From here on a header does not tell the size: it was written before that was known (ffmpeg and sox, into a pipe)."""


def read_sound(
    data: Encoded | None, path: str | None, needed: Callable[[int], int | None]
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], int]:
    """The frames of a sound file, (frames, channels) float32 in [-1, 1], and its rate in Hz.

    data: the file's bytes; None: they are in the file ``path``.
    needed: how many frames from the front suffice, by the rate; None: all. What comes behind is not looked at.

    Raises:
        DecodeError: there is none, it is truncated, damaged or empty, or libsndfile does not know its kind.
    """
    with _opened(data, path) as file:
        head = file.read(_HEAD_BYTES)
        if not head:
            raise DecodeError("the audio has no bytes")
        _refuse_foreign(head)
        _check_last_page(head, file)
        header = _mp3_header(head, file)
        file.seek(0)
        try:
            with soundfile.SoundFile(file if data is not None else file.fileno(), closefd=False) as sound:
                _check_told(sound.extra_info)
                _check_frames(sound, head)
                is_guess = sound.format == "MP3" and not _XING_FRAMES.search(header)
                wanted = needed(sound.samplerate)
                frames = _frames(sound, wanted, not is_guess)
                if is_guess and (wanted is None or len(frames) < wanted):
                    _check_rest(file, header, sound.frames, len(frames))
                return frames, sound.samplerate
        except DecodeError:
            raise
        except soundfile.LibsndfileError as error:
            if error.code == 1:
                version = soundfile.__libsndfile_version__
                raise DecodeError(
                    f"the audio cannot be decoded: it is of no kind that libsndfile {version} knows"
                ) from error
            raise DecodeError(f"the audio cannot be decoded: {error.error_string.rstrip('.')}") from error
        except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, OSError) as error:
            raise DecodeError(f"the audio cannot be decoded: {type(error).__name__}: {error}") from error


class _Memory:
    """A file over a buffer, without a copy. Its methods never raise: what libsndfile's callbacks raise is printed."""

    def __init__(self, data: Encoded) -> None:
        self._data = memoryview(data)
        self._at = 0

    def read(self, num_bytes: int) -> bytes:
        start = self._at
        self._at = min(start + num_bytes, len(self._data))
        return bytes(self._data[start : self._at])

    def readinto(self, out: Any) -> int:
        count = max(0, min(len(out), len(self._data) - self._at))
        out[:count] = self._data[self._at : self._at + count]
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._at, len(self._data))[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at


@contextmanager
def _opened(data: Encoded | None, path: str | None) -> Iterator[Any]:
    """The bytes as a file: in memory, or on disk without a buffer, so that libsndfile goes on where we are."""
    if data is not None:
        yield _Memory(data)
        return
    if path is None:
        raise DecodeError("the audio is null")
    try:
        file = Path(path).open("rb", buffering=0)  # noqa: SIM115 - closed below
    except (OSError, ValueError) as error:
        raise unreadable(path, "audio", error) from error
    with file:
        yield file


def _frames(
    sound: soundfile.SoundFile, needed: int | None, tells_frames: bool
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The first ``needed`` frames; all of them if there are fewer and the header tells no more."""
    if sound.seekable():
        sound.seek(0)  # as soundfile.read does: an MP3's decoder begins anew, and differs by a last bit else
    told: int = sound.frames
    wanted = told if needed is None else min(told, needed)
    block = max(1, _BLOCK_VALUES // sound.channels)
    parts: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    have = 0
    while have < wanted:
        asked = min(block, wanted - have)
        parts.append(sound.read(asked, dtype="float32", always_2d=True))
        have += len(parts[-1])
        if len(parts[-1]) < asked:  # what is read behind a damaged part is from elsewhere in the clip
            break
    if have < wanted and tells_frames:
        raise DecodeError(f"the audio is truncated or damaged: its header tells {told} frames, {have} are there")
    if not have:
        raise DecodeError("the audio has no samples")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _mp3_header(head: bytes, file: Any) -> bytes:
    """The first frame of an MP3, or a part of it; of another kind of file some bytes."""
    start = 0
    while head[:3] == b"ID3" and len(head) >= 10:  # as long as it says, in 7 bits a byte; a picture may be in it
        start += 10 + sum((byte & 0x7F) << 7 * i for i, byte in enumerate(reversed(head[6:10])))
        file.seek(start)
        head = file.read(_HEAD_BYTES)
    return head[:256]


def _check_rest(file: Any, header: bytes, told: int, have: int) -> None:
    """Raise if frames of an MP3 are left that were not decoded: libsndfile reads no more than it guessed there are.

    header: its first frame, which has the version, layer and rate of all. What is left may also be tags.
    """
    rest = b"".join(iter(lambda: file.read(1 << 20), b""))
    frames = (rest[found.start() : found.end()] for found in _MP3_FRAME.finditer(rest))
    if any(frame[:2] == header[:2] and (frame[2] ^ header[2]) & 0x0C == 0 for frame in frames):
        raise DecodeError(
            f"the audio is an MP3 whose header does not tell its length: libsndfile guessed {told} frames, of which "
            f"{have} were decoded, but {len(rest)} bytes are left: encode it anew (with a Xing header, as ffmpeg and "
            "lame write by themselves), or decode it with process=",
            format="MP3",
        )


def _check_told(log: str) -> None:
    """Raise if a header tells more bytes of samples than there are; one more may be the padding of an odd number."""
    for found in _TOLD_BYTES.finditer(log):
        told, have = int(found[1]), int(found[2])
        if have + 1 < told < _UNTOLD_BYTES:
            raise DecodeError(f"the audio is truncated: its header tells {told} bytes, {have} are there")
    if "Seems to be a truncated file" in log:  # VOC
        raise DecodeError("the audio is truncated: its header tells more samples than there are")


def _check_frames(sound: soundfile.SoundFile, head: bytes) -> None:
    """Raise if there is no number of frames, or if a NIST SPHERE header tells more than there are."""
    if sound.frames >= _UNKNOWN_FRAMES:
        raise DecodeError(
            f"the audio is a {sound.format} whose header does not tell its length, as encoders leave it where they "
            "write into a pipe, and libsndfile cannot read it: encode it anew, into a file, or decode it with process=",
            format=sound.format,
        )
    found = _SPHERE_FRAMES.search(head) if sound.format == "NIST" else None
    if found and int(found[1]) > sound.frames:
        raise DecodeError(f"the audio is truncated: its header tells {int(found[1])} frames, {sound.frames} are there")


def _check_last_page(head: bytes, file: BinaryIO) -> None:
    """Raise if the last page of an OGG file is not whole: libsndfile only gives what comes before it.

    Source: RFC 3533, section 6 (the page header).
    """
    if head[:4] != b"OggS":
        return
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _MOST_PAGE_BYTES))
    tail = file.read(_MOST_PAGE_BYTES)
    page = tail.rfind(b"OggS")
    if page < 0:
        return
    num_segments = tail[page + 26] if page + 26 < len(tail) else 255
    lengths = tail[page + 27 : page + 27 + num_segments]
    if len(lengths) < num_segments or page + 27 + num_segments + sum(lengths) > len(tail):
        raise DecodeError("the audio is truncated: its last page is not whole")


def _refuse_foreign(head: bytes) -> None:
    """Raise for the kinds of audio that libsndfile cannot read, by their first bytes."""
    kind = None
    if head[4:8] == b"ftyp":
        kind = "M4A (MP4, mostly AAC)"
    elif head[:4] == b"\x1aE\xdf\xa3":
        kind = "WebM or Matroska"
    elif len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # MP3 has a layer where AAC has 0
        kind = "AAC (ADTS)"
    elif head[:4] == b"ADIF":
        kind = "AAC (ADIF)"
    elif head[:8] == b"\x30\x26\xb2\x75\x8e\x66\xcf\x11":
        kind = "WMA (ASF)"
    elif head[:5] == b"#!AMR":
        kind = "AMR"
    if kind is not None:
        raise DecodeError(
            f"the audio looks like {kind}, which soundfile (libsndfile {soundfile.__libsndfile_version__}) cannot "
            "read: convert it to WAV, FLAC, OGG or MP3, or decode it with process=",
            format=kind,
        )
