"""Audio columns that ``datasets`` encodes without torchcodec, which it asks for even to store a path.

A service neither needs nor imports torch, so the features that rows are encoded with are replaced by these. Nothing of
the library is patched: the features of a stream's steps, and of one builder, are those of objects of this process.
"""

from __future__ import annotations

import copy
import os
import struct
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.features.features import _visit


class UndecodedAudio(datasets.Audio):  # type: ignore[misc]  # datasets has no types
    """A ``datasets.Audio`` that encodes paths, bytes and arrays by itself; only decoding takes torchcodec."""

    def encode_example(self, value: Any) -> dict[str, Any]:
        """{"bytes", "path"} of a path, bytes, a dict of both, or {"array", "sampling_rate"}: that becomes a float WAV.

        array: float, (samples,) or (channels, samples), as ``datasets`` takes it; kept without rounding.

        Raises:
            TypeError: it is nothing of these. ValueError: there are neither bytes nor a path.
        """
        if isinstance(value, str | os.PathLike):
            return {"bytes": None, "path": os.fspath(value)}
        if isinstance(value, bytes | bytearray | memoryview):
            return {"bytes": bytes(value), "path": None}
        if not isinstance(value, Mapping):
            return _encoded_by_library(self, value)
        if value.get("array") is not None:
            return {"bytes": _wav(value["array"], value["sampling_rate"]), "path": None}
        path, data = value.get("path"), value.get("bytes")
        if path is None and data is None:
            raise ValueError(f"an audio sample has neither 'bytes' nor 'path' nor 'array': {value!r}")
        if path is not None and str(path).endswith("pcm"):
            return _encoded_by_library(self, value)
        is_local = path is not None and Path(path).is_file()  # then its bytes are not stored, as the library does
        return {"bytes": None if is_local else data, "path": path}

    def cast_storage(self, storage: pa.Array) -> pa.StructArray:
        """As ``datasets.Audio``; struct<array, sampling_rate> is encoded here."""
        if pa.types.is_struct(storage.type) and storage.type.get_field_index("array") >= 0:
            rows = [None if value is None else self.encode_example(value) for value in storage.to_pylist()]
            return pa.array(rows, self.pa_type)
        return super().cast_storage(storage)

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Any:
        """As ``datasets.Audio``.

        Raises:
            ImportError: there is no torchcodec; says how to do without.
        """
        try:
            return super().decode_example(value, token_per_repo_id)
        except ImportError as error:
            raise ImportError(
                f"{error} Functions of map and filter get decoded audio. Without it, put "
                "cast_column(…, Audio(decode=False)) before them: then they get {'bytes', 'path'}."
            ) from error


def undecoded(features: Any) -> Any:
    """``features`` whose Audio encodes without torchcodec; None stays None."""
    if features is None:
        return None
    return _visit(copy.deepcopy(features), _replaced)


def undecoded_stream(stream: Any) -> Any:
    """An ``IterableDataset`` that yields what ``stream`` does; all its steps encode audio without torchcodec."""
    info = stream.info.copy()
    info.features = undecoded(info.features)
    # Its parts are shared with ``stream``, which must not change: the user's object, where this is not a service.
    found = copy.copy(stream)
    found._info = info
    found._ex_iterable = _undecoded_step(stream._ex_iterable)
    return found


def encode_undecoded(builder: Any) -> Any:
    """``builder``, which will prepare (``download_and_prepare``) and stream audio without torchcodec.

    Some builders know their features only once they have looked for their splits, so that is where they are replaced.
    """
    find_splits = builder._split_generators

    def find_and_replace(*arguments: Any, **options: Any) -> Any:
        found = find_splits(*arguments, **options)
        builder.info.features = undecoded(builder.info.features)
        return found

    builder._split_generators = find_and_replace
    return builder


def _replaced(feature: Any) -> Any:
    if type(feature) is not datasets.Audio:
        return feature
    return UndecodedAudio(**{field.name: getattr(feature, field.name) for field in fields(feature) if field.init})


def _undecoded_step(step: Any) -> Any:
    """A step of a stream, with the steps before it."""
    found = copy.copy(step)
    if getattr(step, "_features", None) is not None:
        found._features = undecoded(step._features)
    if hasattr(step, "ex_iterable"):
        found.ex_iterable = _undecoded_step(step.ex_iterable)
    if hasattr(step, "ex_iterables"):
        found.ex_iterables = [_undecoded_step(before) for before in step.ex_iterables]
    return found


def _encoded_by_library(feature: UndecodedAudio, value: Any) -> dict[str, Any]:
    """Decoders of torchcodec, which is there then, and PCM without a header, which hardly anybody has."""
    found: dict[str, Any] = datasets.Audio.encode_example(feature, value)
    return found


def _wav(samples: Any, rate: int) -> bytes:
    """A WAV of 32-bit floats; written here, since libsndfile adds the time to it: a row must be the same each time.

    Source: Multimedia Programming Interface and Data Specifications 1.0 (RIFF, "fmt ", "data"), and its New Multimedia
    Data Types and Data Techniques 3.0 (WAVE_FORMAT_IEEE_FLOAT, "fact").
    """
    array = np.atleast_2d(np.asarray(samples, "<f4"))
    channels, num = array.shape
    data = np.ascontiguousarray(array.T).tobytes()
    form = struct.pack("<HHIIHHH", 3, channels, int(rate), int(rate) * channels * 4, channels * 4, 32, 0)
    parts = ((b"fmt ", form), (b"fact", struct.pack("<I", num)), (b"data", data))
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(part)) + part for name, part in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body
