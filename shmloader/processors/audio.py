"""Audio columns: an encoded clip becomes float32 [num_samples], mono, at 16 kHz.

libsndfile decodes (WAV, FLAC, OGG with Vorbis or Opus, MP3, AIFF and more), soxr resamples in its quality "HQ". What
comes out is, bit for bit, ::

    frames, rate = soundfile.read(file, dtype="float32", always_2d=True)
    samples = soxr.resample(frames.mean(axis=1), rate, 16000)

cut, or followed by zeros. Of a long clip only as much is decoded as decides its first samples.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import soxr

from shmloader.errors import DecodeError, OptionError
from shmloader.processors.base import column_at
from shmloader.processors.encoded import Encoded, stored_in, stored_of
from shmloader.processors.sound_file import read_sound
from shmloader.sample import Field

SAMPLE_RATE = 16_000
"""Of every audio field, in Hz."""

_REACH = 4096
"""Frames behind the last one that is needed which have a say in it, of each ratio of rates from 1 up. Measured: with a
third of it (1365 a ratio; soxr works in blocks of powers of two) the first samples are bit-equal to those of the whole
clip, for ratios of 0.02 to 96, whatever its length."""

Samples = np.ndarray[Any, np.dtype[np.float32]]


class AudioProcessor:
    """Yields "audio", float32 [num_samples] at 16 kHz: the clip's beginning, followed by zeros where it is shorter.

    column: struct<bytes, path> as `datasets` stores it, encoded audio as binary, or decoded audio as a struct of
    ``array`` (a list of floats; a list of such lists, one a channel) and ``sampling_rate``.
    optional: a null value is no error; the sample then has no audio.
    """

    def __init__(self, column: str, num_samples: int = SAMPLE_RATE, optional: bool = False) -> None:
        self.columns: tuple[str, ...] = (column,)
        self.num_samples = num_samples
        self.optional = optional
        self.fields: tuple[Field, ...] = (Field("audio", "float32", (num_samples,), optional=optional),)

    def begin(self, batch: pa.RecordBatch) -> _AudioRows:
        """Take the clips of ``batch``; they are decoded one by one, straight before they are written."""
        return _AudioRows(self, column_at(batch, self.columns[0]))


class _AudioRows:
    def __init__(self, processor: AudioProcessor, column: pa.Array) -> None:
        self._processor = processor
        self._column = column

    def shapes(self, row: int) -> Mapping[str, tuple[int, ...]]:
        if self._processor.optional and _is_null(self._column[row]):
            return {}
        return {"audio": (self._processor.num_samples,)}

    def write(self, row: int, out: Mapping[str, np.ndarray[Any, Any]]) -> None:
        if "audio" not in out:
            return
        column, num_samples = self._processor.columns[0], self._processor.num_samples
        try:
            samples = _decode_scalar(self._column[row], num_samples)
        except DecodeError as error:
            raise DecodeError(f"column {column!r}: {error}", field="audio", column=column, **error.data) from error
        out["audio"][: len(samples)] = samples
        out["audio"][len(samples) :] = 0


def decode_audio(
    value: Mapping[str, Any] | Encoded, sample_rate: int = SAMPLE_RATE, num_samples: int | None = None
) -> Samples:
    """The clip in ``value``, (n,) float32, mono, at ``sample_rate`` Hz, its own memory; for a ``process`` of the user.

    value: encoded bytes; {"bytes": …, "path": …} as a row holds it (the file is read if there are no bytes); or decoded
        audio, {"array": floats, "sampling_rate": Hz}, where two dimensions are (channels, frames).
    num_samples: cut to so many, or followed by zeros up to so many; None: as long as it is.

    Channels are averaged. Samples that the file holds beyond [-1, 1] stay so.

    Raises:
        DecodeError: there is no audio, or it is truncated, damaged, empty, of an unknown kind, or has NaN or infinity.
        OptionError: ``sample_rate`` or ``num_samples`` is no whole number from 1 up.
    """
    sample_rate = _checked("sample_rate", sample_rate)
    num_samples = None if num_samples is None else _checked("num_samples", num_samples)
    if isinstance(value, Mapping) and "array" in value:
        samples = _resampled(*_of_array(value["array"], value.get("sampling_rate")), sample_rate, num_samples)
    else:
        samples = _decode(*stored_of(value, "audio"), sample_rate, num_samples)
    if num_samples is not None and len(samples) < num_samples:
        samples = np.pad(samples, (0, num_samples - len(samples)))
    return samples if samples.flags.owndata and samples.flags.writeable else samples.copy()


def _checked(name: str, number: Any) -> int:
    found = _whole(number)
    if found is None:
        allowed = "a whole number from 1 up"
        raise OptionError(f"{name}={number!r} must be {allowed}", name=name, value=str(number), allowed=allowed)
    return found


def _whole(number: Any) -> int | None:
    """``number``, of any type of numbers, if it is a whole one from 1 up."""
    if isinstance(number, float | np.floating) and float(number).is_integer():
        number = int(number)
    try:
        found = 0 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return None
    return found if found >= 1 else None


def _decode_scalar(scalar: Any, num_samples: int) -> Samples:
    """At most ``num_samples`` of the clip in an Arrow scalar."""
    if not _is_decoded(scalar.type):
        if pa.types.is_list(scalar.type) or pa.types.is_large_list(scalar.type):
            raise DecodeError(
                f"holds {scalar.type}, which does not tell its sampling rate: give a struct of `array` and "
                "`sampling_rate`, or use process= with decode_audio"
            )
        return _decode(*stored_in(scalar, "audio"), SAMPLE_RATE, num_samples)
    if _is_null(scalar):
        raise DecodeError("the audio is null")
    values = scalar["array"].values
    is_nested = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    array = values.to_pylist() if is_nested else values.to_numpy(zero_copy_only=False)
    return _resampled(*_of_array(array, scalar["sampling_rate"].as_py()), SAMPLE_RATE, num_samples)


def _is_decoded(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {"array", "sampling_rate"} <= {field.name for field in kind}


def _is_null(scalar: Any) -> bool:
    if _is_decoded(scalar.type):
        return not scalar.is_valid or not scalar["array"].is_valid
    return stored_in(scalar, "audio") == (None, None)


def _decode(data: Encoded | None, path: str | None, sample_rate: int, num_samples: int | None) -> Samples:
    def needed(rate: int) -> int | None:
        if num_samples is None or rate == sample_rate:
            return num_samples
        return -(-num_samples * rate // sample_rate) + int(_REACH * max(1, rate / sample_rate))

    return _resampled(*read_sound(data, path, needed), sample_rate, num_samples)


def _of_array(array: Any, rate: Any) -> tuple[Samples, int]:
    """(frames, channels) float32, and the rate, of decoded audio."""
    whole_rate = _whole(rate)
    if whole_rate is None:
        raise DecodeError(f"the audio's sampling_rate must be a whole number from 1 up, but is {rate!r}")
    if array is None:
        raise DecodeError("the audio is null")
    try:
        frames = np.asarray(array) if len(array) else np.empty(0, np.float32)
    except (ValueError, TypeError) as error:
        raise DecodeError(f"the audio's array is none of floats: {error}") from error
    if frames.dtype.kind != "f" or frames.ndim not in (1, 2):
        remedy = ""
        if frames.dtype.kind == "i":
            full_scale = -int(np.iinfo(frames.dtype).min)
            remedy = f": divide by what is full scale ({full_scale} where all bits of {frames.dtype} are used)"
        raise DecodeError(
            "the audio's array must hold floats in one dimension, or two (channels, frames), but holds "
            f"{frames.dtype} of shape {list(frames.shape)}{remedy}"
        )
    frames = frames.astype(np.float32, copy=False)
    if not frames.size:
        raise DecodeError("the audio has no samples")
    return (frames[:, None] if frames.ndim == 1 else frames.T), whole_rate


def _resampled(frames: Samples, rate: int, sample_rate: int, num_samples: int | None) -> Samples:
    """The first ``num_samples`` of (frames, channels), mono, at ``sample_rate``."""
    mono: Samples = frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1)
    # Resampling would smear one over its neighbours, and training would spread it over all weights.
    if not np.isfinite(mono).all():
        raise DecodeError("the audio has samples that are NaN or infinite")
    if rate != sample_rate:
        try:
            mono = soxr.resample(mono, rate, sample_rate)
        except (ValueError, RuntimeError) as error:
            raise DecodeError(f"the audio cannot be resampled from {rate} Hz: {error}", rate=rate) from error
        if not len(mono):
            raise DecodeError(f"the audio has no samples: at {rate} Hz it lasts less than one at {sample_rate} Hz")
    return mono[:num_samples]
