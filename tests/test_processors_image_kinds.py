"""Pictures of every kind, and the right way up: what Pillow makes of them is the truth."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from shmloader.errors import DecodeError
from shmloader.processors.image import ImageProcessor, decode_image
from shmloader.processors.orientation import jpeg_orientation
from shmloader.sample import RecordLayout, Schema

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ORIENTATION = 0x0112
rng = np.random.default_rng(5)


def scene(height=40, width=60):
    """No two of its corners are alike, and it is smooth, so that resizing twice is resizing once."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 255 * (x + y) / (height + width)], 2).astype(np.uint8)


def encoded(image, kind, **settings):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **settings)
    return file.getvalue()


def exif_of(orientation, order="<"):
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return b"Exif\0\0" + head + struct.pack(order + "HHHIHHI", 1, ORIENTATION, 3, 1, orientation, 0, 0)


def upright(data):
    with Image.open(io.BytesIO(data)) as image:
        image = ImageOps.exif_transpose(image)
        # As convert("RGB") would, without its warning.
        return np.asarray((image.convert("RGBA") if image.mode == "P" else image).convert("RGB"))


def difference(one, other):
    assert one.shape == other.shape
    return np.abs(one.astype(int) - other.astype(int)).mean()


def image_of(value, size=32, **settings):
    """The image as it lies in a record, channels last; None if the sample has none."""
    processor = ImageProcessor("photo", size, **settings)
    rows = processor.begin(pa.RecordBatch.from_arrays([pa.array([value], STRUCT)], ["photo"]))
    layout = RecordLayout(Schema(processor.fields, ("vision",), ("here",)), rows.shapes(0))
    out = layout.arrays(memoryview(bytearray(layout.num_bytes)))
    rows.write(0, out)
    return out["image"].transpose(1, 2, 0) if "image" in out else None


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_picture_is_turned_as_its_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(scene(), kind, exif=exif)
    expected = upright(data)
    assert expected.shape == ((60, 40, 3) if 5 <= orientation <= 8 else (40, 60, 3))
    assert difference(decode_image(data), expected) == 0
    assert decode_image(data).flags.c_contiguous
    small = np.asarray(Image.fromarray(expected).resize((32, 32), Image.Resampling.BILINEAR))
    assert difference(decode_image(data, 32), small) < 0.5
    assert difference(image_of({"bytes": data, "path": None}), small) < 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_jpeg_that_is_decoded_at_a_part_of_its_size_is_turned(orientation):
    data = encoded(scene(801, 1203), "JPEG", exif=exif_of(orientation))
    expected = Image.fromarray(upright(data)).resize((32, 32), Image.Resampling.BILINEAR)
    assert difference(decode_image(data, 32), np.asarray(expected)) < 1


@pytest.mark.parametrize("kind", ["CMYK", "L"])
def test_a_jpeg_of_other_colours_is_turned(kind):
    data = encoded(Image.fromarray(scene()).convert(kind), "JPEG", exif=exif_of(6))
    assert difference(decode_image(data), upright(data)) == 0


XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>'


def with_segments(data, *segments, marker=0xE1):
    """A JPEG with these segments straight after its start."""
    made = b"".join(struct.pack(">BBH", 0xFF, marker, len(one) + 2) + one for one in segments)
    return data[:2] + made + data[2:]


JPEG = encoded(scene(), "JPEG")


@pytest.mark.parametrize(
    "segments",
    [
        [exif_of(6, ">")],
        [exif_of(6)[:20], b"Exif\0\0" + exif_of(6)[20:]],
        [b"something else", exif_of(3)],
        [XMP % 6],
        [b"http://ns.adobe.com/xap/1.0/\0<tiff:Orientation>8</tiff:Orientation>"],
        [exif_of(3), XMP % 6],
        [exif_of(0), XMP % 6],
        [XMP % 9],
        [b"Exif\0\0" + b"II*\0" + struct.pack("<IHHHII", 8, 1, ORIENTATION, 4, 1, 6) + bytes(4)],
    ],
    ids=[
        "big-endian",
        "two-parts",
        "behind-another",
        "xmp",
        "xmp-element",
        "exif-first",
        "zero",
        "none",
        "long",
    ],
)
def test_the_orientation_is_found_where_pillow_finds_it(segments):
    data = with_segments(JPEG, *segments)
    assert difference(decode_image(data), upright(data)) == 0


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0XX*\0" + bytes(20),
        exif_of(6)[:17],
        exif_of(6)[:22],
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0" + struct.pack("<IHHHI4s", 8, 1, ORIENTATION, 2, 4, b"abc\0"),
        b"Exif\0\0II*\0" + struct.pack("<IHHHIHH", 8, 1, ORIENTATION, 3, 0, 6, 0),
        b"Exif\0\0II*\0" + struct.pack("<IHHHIBBH", 8, 1, ORIENTATION, 1, 1, 6, 0, 0),
    ],
    ids=["empty", "no-order", "cut", "cut-entry", "far-away", "text", "none", "byte"],
)
def test_damaged_exif_turns_nothing(exif):
    data = with_segments(JPEG, exif)
    np.testing.assert_array_equal(decode_image(data), decode_image(JPEG))
    png = encoded(scene(), "PNG")
    chunk = struct.pack(">I4s", len(exif) - 6, b"eXIf") + exif[6:]
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    np.testing.assert_array_equal(decode_image(png[:33] + chunk + png[33:]), scene())


def test_bytes_that_end_in_the_middle_of_a_segment_have_no_orientation():
    data = with_segments(JPEG, exif_of(6))
    assert jpeg_orientation(data) == 6
    for end in range(2, 30):
        assert jpeg_orientation(data[:end]) == 1


def moving(kind, **settings):
    frames = [Image.fromarray(np.roll(scene(), 7 * i, axis=1)) for i in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=50, **settings)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "settings"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("AVIF", {})]
)
def test_of_a_moving_picture_it_is_the_first_frame(kind, settings):
    data = moving(kind, **settings)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert difference(decode_image(data), upright(data)) == 0
    assert difference(decode_image(data), scene()) < 8


def test_an_apng_whose_still_picture_is_not_one_of_its_frames_shows_that():
    still = Image.fromarray(scene()[::-1])
    file = io.BytesIO()
    still.save(file, "PNG", save_all=True, default_image=True, append_images=[Image.fromarray(scene())] * 2)
    np.testing.assert_array_equal(decode_image(file.getvalue()), scene()[::-1])


def ycck():
    """A CMYK JPEG whose Adobe marker says that it is YCCK."""
    data = bytearray(encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG"))
    at = data.index(b"Adobe")
    assert data[at + 11] == 0
    data[at + 11] = 2
    return bytes(data)


def png_of(bit_depth, colour_type, samples):
    """A PNG of raw ``samples`` (height, bytes of a row), for what Pillow does not write."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    height, row_bytes = samples.shape
    width = row_bytes * 8 // bit_depth // channels

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    raw = b"".join(b"\0" + row.tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def palette_with_transparency():
    image = Image.fromarray(scene()).quantize(16)
    return encoded(image, "PNG", transparency=bytes([0, 128] + [255] * 14))


def noise(height, row_bytes):
    return rng.integers(0, 256, (height, row_bytes), dtype=np.uint8)


KINDS = {
    "cmyk-jpeg": lambda: encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG"),
    "ycck-jpeg": ycck,
    "progressive-jpeg": lambda: encoded(scene(), "JPEG", progressive=True),
    "webp": lambda: encoded(scene(), "WEBP"),
    "webp-alpha": lambda: encoded(Image.fromarray(scene()).convert("RGBA"), "WEBP", lossless=True),
    "avif": lambda: encoded(scene(), "AVIF"),
    "gif": lambda: encoded(scene(), "GIF"),
    "gif-transparent": lambda: encoded(Image.fromarray(scene()).quantize(8), "GIF", transparency=3),
    "palette-transparent": palette_with_transparency,
    "1-bit": lambda: encoded(Image.fromarray(scene()).convert("1"), "PNG"),
    "1-bit-tiff": lambda: encoded(Image.fromarray(scene()).convert("1"), "TIFF", compression="group4"),
    "la": lambda: encoded(Image.fromarray(scene()).convert("LA"), "PNG"),
    "rgb16-png": lambda: png_of(16, 2, noise(8, 60)),
    "rgba16-png": lambda: png_of(16, 6, noise(8, 80)),
    "la16-png": lambda: png_of(16, 4, noise(8, 40)),
    "grey4-png": lambda: png_of(4, 0, noise(40, 10)),
    "tiff-lzw": lambda: encoded(scene(), "TIFF", compression="tiff_lzw"),
    "tiff-jpeg": lambda: encoded(scene(), "TIFF", compression="jpeg"),
    "bmp": lambda: encoded(scene(), "BMP"),
    "ppm": lambda: encoded(scene(), "PPM"),
    "tga": lambda: encoded(scene(), "TGA"),
    "ico": lambda: encoded(scene(), "ICO", sizes=[(32, 32)]),
    "jpeg2000": lambda: encoded(scene(), "JPEG2000"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_pillow_makes_of_it(kind):
    data = KINDS[kind]()
    expected = upright(data)
    assert difference(decode_image(data), expected) == 0
    small = Image.fromarray(expected).resize((16, 16), Image.Resampling.BILINEAR)
    assert difference(decode_image(data, 16), np.asarray(small)) < 0.5


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_its_upper_bits_the_right_way_up(kind):
    deep = (np.arange(600, dtype=np.uint16) * 109).reshape(20, 30)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    found = decode_image(encoded(deep, kind, exif=exif))
    np.testing.assert_array_equal(found, np.repeat(np.rot90(deep >> 8, -1)[:, :, None], 3, 2))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", [name for name in KINDS if name not in ("ppm", "tga")] + ["moving-webp", "apng"])
def test_a_truncated_picture_of_any_kind_is_an_error(kind, share):
    data = {"moving-webp": lambda: moving("WEBP"), "apng": lambda: moving("PNG")}.get(kind, KINDS.get(kind))()
    if kind == "apng":  # what follows the first frame is not looked at
        data = data[: data.index(b"fcTL", data.index(b"IDAT"))]
    with pytest.raises(DecodeError):
        decode_image(data[: int(len(data) * share)])
    with pytest.raises(DecodeError):
        decode_image(data[: int(len(data) * share)], 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_a_decompression_bomb_of_any_kind_is_an_error(kind, monkeypatch):
    data = encoded(scene(), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match="decompression bomb"):
        decode_image(data)


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}])
def test_an_optional_image_that_is_null_is_left_out(value):
    assert image_of(value, optional=True) is None
    assert image_of({"bytes": JPEG, "path": None}, optional=True).shape == (32, 32, 3)
    with pytest.raises(DecodeError, match="has no bytes"):
        image_of({"bytes": b"", "path": None}, optional=True)
    with pytest.raises(DecodeError, match="is null"):
        image_of(value)


def test_an_image_inside_a_struct_is_found_by_its_path():
    kind = pa.struct([("photo", STRUCT), ("n", pa.int64())])
    column = pa.array([None, {"photo": {"bytes": JPEG, "path": None}, "n": 1}, None], kind).slice(1)
    processor = ImageProcessor("meta.photo", 32, optional=True)
    rows = processor.begin(pa.RecordBatch.from_arrays([column], ["meta"]))
    assert [rows.shapes(row) for row in range(2)] == [{"image": (3, 32, 32)}, {}]
