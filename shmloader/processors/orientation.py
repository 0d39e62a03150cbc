"""Which way up a picture is: the orientation that a camera notes beside the pixels.

Source: EXIF 2.32 (CIPA DC-008), tag 0x0112, and for what both of them say the ways of Pillow's
``ImageOps.exif_transpose``: EXIF comes before XMP. What cannot be understood turns nothing: the pixels are whole.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
from PIL import Image

from shmloader.processors.encoded import Encoded

_ORIENTATION_TAG = 0x0112
_TYPES = {3: "H", 4: "I"}
"""What it may be stored as: SHORT, as it should, or LONG."""

_EXIF_START = b"Exif\x00\x00"
_XMP_START = b"http://ns.adobe.com/xap/1.0/\x00"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')

_APP1, _START_OF_SCAN, _END_OF_IMAGE = 0xE1, 0xDA, 0xD9


def turned(pixels: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """A view of ``pixels``, (H, W, 3), upright; as they are where ``orientation`` is not from 2 to 8."""
    if not 2 <= orientation <= 8:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def pillow_orientation(image: Image.Image) -> int:
    """The orientation of an image that Pillow has loaded (a TIFF it has turned itself by then); 1: as it is."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except MemoryError:
        raise
    except Exception:  # SyntaxError, struct.error, OSError and more, of damaged EXIF beside whole pixels
        return 1
    return value if isinstance(value, int) else 1


def jpeg_orientation(data: Encoded) -> int:
    """The orientation in the head of a JPEG that has been decoded without it; 1: as it is."""
    exif, xmp = b"", b""
    at, end = 2, len(data)
    while at + 4 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            break
        size = (data[at + 2] << 8) + data[at + 3]
        if marker == _APP1:
            segment = bytes(data[at + 4 : at + 2 + size])
            if segment.startswith(_EXIF_START):
                exif += segment[len(_EXIF_START) :]  # one that is too long for a segment goes on in the next
            elif segment.startswith(_XMP_START):
                xmp = segment
        at += 2 + size
    found = _in_exif(exif) if exif else None
    if found is None and xmp:
        match = _XMP_ORIENTATION.search(xmp)
        found = int(match[1]) if match else None
    return 1 if found is None else found


def _in_exif(exif: bytes) -> int | None:
    """The orientation in a TIFF header and its first directory; None: there is none, or it is damaged."""
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(exif[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (num_entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", exif, entry)
            if tag == _ORIENTATION_TAG:
                if kind not in _TYPES or count != 1:
                    return None
                return int(struct.unpack_from(order + _TYPES[kind], exif, entry + 8)[0])
    except struct.error:  # it ends early
        return None
    return None
