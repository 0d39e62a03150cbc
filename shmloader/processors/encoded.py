"""Encoded media in a column: struct<bytes, path>, as `datasets` stores images and audio, or bare binary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from shmloader.errors import DecodeError

Encoded = bytes | bytearray | memoryview


def stored_in(scalar: Any, noun: str) -> tuple[Encoded | None, str | None]:
    """The encoded bytes in an Arrow scalar, without a copy, and the path that it names; None each where it is null.

    noun: what it is, for messages ("image").

    Raises:
        DecodeError: the column holds something else.
    """
    if pa.types.is_null(scalar.type):
        return None, None
    if pa.types.is_struct(scalar.type):
        names = {scalar.type.field(i).name for i in range(scalar.type.num_fields)}
        if names & {"bytes", "path"}:
            if not scalar.is_valid:
                return None, None
            data = scalar["bytes"].as_buffer() if "bytes" in names else None
            path = scalar["path"].as_py() if "path" in names else None
            # pyarrow's buffers are of signed bytes, which decoders refuse.
            return (None if data is None else memoryview(data).cast("B")), path or None
    elif _is_bytes(scalar.type):
        data = scalar.as_buffer()
        return (None if data is None else memoryview(data).cast("B")), None
    plural = "images" if noun == "image" else noun
    raise DecodeError(f"holds {scalar.type}, not encoded {plural}; name another column or give `process`")


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def stored_of(value: Mapping[str, Any] | Encoded, noun: str) -> tuple[Encoded | None, str | None]:
    """As `stored_in`, of what a row holds as a Python object: encoded bytes, or {"bytes": …, "path": …}.

    Raises:
        DecodeError: it is something else.
    """
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if data is not None and not isinstance(data, bytes | bytearray | memoryview):
        raise DecodeError(f"the {noun} must be encoded bytes, but got {type(data).__name__}")
    return data, path or None


def bytes_of(data: Encoded | None, path: str | None, noun: str) -> Encoded:
    """``data``, or what is in the file ``path`` where there is none.

    Raises:
        DecodeError: there is neither, there are no bytes, or the file cannot be read.
    """
    if data is None and path is not None:
        try:
            data = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            raise unreadable(path, noun, error) from error
    if data is None:
        raise DecodeError(f"the {noun} is null")
    if not len(data):
        raise DecodeError(f"the {noun} has no bytes")
    return data


def unreadable(path: str, noun: str, error: Exception) -> DecodeError:
    """The error for a file that cannot be opened or read."""
    return DecodeError(f"the {noun}'s file cannot be read: {error}", path=path)
