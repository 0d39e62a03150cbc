"""Image columns: encoded bytes become uint8 [3, size, size], RGB, upright.

JPEG goes through simplejpeg (libjpeg-turbo), everything else through Pillow; a JPEG that simplejpeg refuses
(CMYK, odd subsampling, stray bytes) goes through Pillow as well. Resizing is antialiased bilinear over the
whole image, the aspect not kept, as ``torchvision.transforms.Resize((size, size))`` on a PIL image; done by
cykooz.resizer, which is six times as fast as Pillow and within 0.2 of 255 of it on photographs. A picture is turned
as its EXIF (or XMP) orientation says; of a moving one it is the first frame.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import cykooz_resizer
import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image, UnidentifiedImageError

from shmloader.errors import DecodeError
from shmloader.processors.base import column_at
from shmloader.processors.encoded import Encoded, bytes_of, stored_in, stored_of
from shmloader.processors.orientation import jpeg_orientation, pillow_orientation, turned
from shmloader.sample import Field

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of RGB in [0, 1]. Source: torchvision, "Models and pre-trained weights", normalisation of the inputs."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""As `IMAGENET_MEAN`."""

_JPEG_START = b"\xff\xd8\xff"

_OVERSAMPLING = 3
"""A JPEG is decoded at a half, quarter or eighth only if that is still so many times the target size. Measured:
12 Mpixel → 224 takes 23 ms instead of 85; seeded noise then differs by 0.8 of 255 from the full way, at 2 by 1.6."""

_DAMAGE = ("premature end", "bad huffman", "bad arithmetic", "instead of rst")
"""In a warning of libjpeg: pixels were made up, although Pillow passes over most of these.
Source: libjpeg, jerror.h, JWRN_HIT_MARKER, JWRN_JPEG_EOF, JWRN_HUFF_BAD_CODE, JWRN_ARITH_BAD_CODE, JWRN_MUST_RESYNC."""

_BILINEAR = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear)

Pixels = np.ndarray[Any, Any]


class ImageProcessor:
    """Yields "image", uint8 [3, size, size]; with ``image_dtype="float32"`` the reader gets it normalised.

    column: struct<bytes: binary, path: string> as `datasets` stores it, or the encoded images as binary.
    optional: a null value is no error; the sample then has no image.
    """

    def __init__(self, column: str, size: int = 224, image_dtype: str = "uint8", optional: bool = False) -> None:
        self.columns: tuple[str, ...] = (column,)
        self.size = size
        self.optional = optional
        scale = shift = None
        if image_dtype == "float32":
            scale = tuple(1 / (255 * std) for std in IMAGENET_STD)
            shift = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
        field = Field("image", "uint8", (3, size, size), scale=scale, shift=shift, optional=optional)
        self.fields: tuple[Field, ...] = (field,)

    def begin(self, batch: pa.RecordBatch) -> _ImageRows:
        """Take the encoded images of ``batch``; they are decoded one by one, straight before they are written."""
        return _ImageRows(self, column_at(batch, self.columns[0]))


class _ImageRows:
    def __init__(self, processor: ImageProcessor, column: pa.Array) -> None:
        self._processor = processor
        self._column = column

    def shapes(self, row: int) -> Mapping[str, tuple[int, ...]]:
        if self._processor.optional and stored_in(self._column[row], "image") == (None, None):
            return {}
        return {"image": (3, self._processor.size, self._processor.size)}

    def write(self, row: int, out: Mapping[str, Pixels]) -> None:
        if "image" not in out:
            return
        try:
            data = bytes_of(*stored_in(self._column[row], "image"), "image")
            pixels = _decode(data, self._processor.size)
        except DecodeError as error:
            column = self._processor.columns[0]
            raise DecodeError(f"column {column!r}: {error}", field="image", column=column, **error.data) from error
        np.copyto(out["image"], pixels.transpose(2, 0, 1))


def decode_image(value: Mapping[str, Any] | Encoded, size: int | None = None) -> Pixels:
    """The image in ``value``, (H, W, 3) uint8 RGB, its own memory; for use in a ``process`` of the user.

    value: encoded bytes, or {"bytes": …, "path": …} as a row holds it (the file is read if there are no bytes).
    size: resized to (size, size, 3), the aspect not kept; None: as it is.

    Transparency is dropped, not composited: as Pillow's ``convert("RGB")``, the colours behind it show.
    16-bit grey keeps its upper 8 bits.

    Raises:
        DecodeError: there is no image, or it is truncated, damaged, of an unknown kind, of 32-bit pixels (modes I and F
            of Pillow, whose range is not known), or has more than twice ``PIL.Image.MAX_IMAGE_PIXELS``; from once on
            Pillow warns (``DecompressionBombWarning``).
    """
    pixels = _decode(bytes_of(*stored_of(value, "image"), "image"), size)
    return pixels if pixels.flags.writeable and pixels.flags.c_contiguous else pixels.copy()


def _decode(data: Encoded, size: int | None) -> Pixels:
    """(H, W, 3) uint8, or (size, size, 3); maybe read-only, maybe in other strides."""
    pixels, refusal = None, ""
    if bytes(data[:3]) == _JPEG_START:
        try:
            pixels = _decode_jpeg(data, size)
        except (ValueError, KeyError) as error:  # KeyError: of a subsampling that it does not know
            refusal = str(error)
    if pixels is not None:
        orientation = jpeg_orientation(data)
    else:
        pixels, orientation = _decode_by_pillow(data)
        if any(word in refusal.lower() for word in _DAMAGE):
            raise DecodeError(f"the image is damaged: {refusal}")
        if size is not None:
            pixels = resize(pixels, size)
    # Squeezing a picture into a square and turning it can be swapped: what is turned last is small.
    return turned(pixels, orientation)


def _decode_jpeg(data: Encoded, size: int | None) -> Pixels | None:
    """As `_decode`, of a JPEG; None where Pillow must see to it.

    Raises:
        ValueError, KeyError: libjpeg has an objection, be it a warning.
    """
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    limit = Image.MAX_IMAGE_PIXELS
    if colours in ("CMYK", "YCCK") or (limit is not None and height * width > limit):
        return None
    factor = 1
    while size is not None and factor < 8 and min(height, width) >= 2 * factor * _OVERSAMPLING * size:
        factor *= 2
    pixels: Pixels = simplejpeg.decode_jpeg(
        data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor), strict=True
    )
    # The last block may reach beyond the image by less than one pixel, which is not part of the picture.
    return pixels if size is None else resize(pixels, size, (height / factor, width / factor))


def _decode_by_pillow(data: Encoded) -> tuple[Pixels, int]:
    """The picture, and its orientation."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            orientation = pillow_orientation(image)
            # Of a PGM "I" is scaled to 16 bits.
            is_grey_16 = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
            if image.mode in ("I", "F") and not is_grey_16:
                raise DecodeError(f"the image has 32-bit pixels (mode {image.mode}), whose range is not known")
            if is_grey_16:  # convert() would clip it to white
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2), orientation
            image.info.pop("transparency", None)  # dropped in any case; of a palette's, convert() would warn
            return np.asarray(image.convert("RGB")), orientation
    except (DecodeError, MemoryError):  # for want of memory nothing is wrong with the image: it is tried again
        raise
    except Exception as error:  # its plug-ins raise OSError, SyntaxError, ValueError, struct.error and more
        raise DecodeError(f"the image cannot be decoded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is of no kind that Pillow knows"
    return str(error) or type(error).__name__


def resize(pixels: Pixels, size: int, extent: tuple[float, float] | None = None) -> Pixels:
    """``pixels``, (H, W, 3) uint8, as (size, size, 3); antialiased bilinear; may be read-only or ``pixels`` itself.

    extent: the height and width that count, from the upper left corner; None: all.

    Source: Pillow's ``Image.resize(..., BILINEAR)``, a triangle filter as wide as the scale.
    """
    height, width, _ = pixels.shape
    if height == width == size:
        return pixels
    kind = cykooz_resizer.PixelType.U8x3
    target = cykooz_resizer.ImageData(size, size, kind)
    source = cykooz_resizer.ImageData(width, height, kind, pixels.tobytes())
    used_height, used_width = extent or (height, width)
    options = cykooz_resizer.ResizeOptions(_BILINEAR, crop_box=cykooz_resizer.CropBox(0, 0, used_width, used_height))
    cykooz_resizer.Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)
