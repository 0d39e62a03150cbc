from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shmloader.errors import DecodeError, OptionError
from shmloader.processors import build, schema_of
from shmloader.processors.image import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor, decode_image, resize
from shmloader.sample import RecordLayout
from shmloader.sources.base import Columns

BEANS = Path(__file__).parents[1].parent / "shared/data/AI-Lab-Makerere/beans/data"
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
rng = np.random.default_rng(7)


def gradient(height, width):
    """Smooth in both directions, another way in each channel."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 127 + 127 * np.sin((x + y) / 40)], 2).astype(np.uint8)


def noise(height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def scene(height, width):
    """Like a photograph: a gradient, a few hard edges, a little noise."""
    picture = gradient(height, width).astype(int) // 2
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        picture[top : top + height // 5, left : left + width // 5] += rng.integers(0, 120, 3)
    return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


def encoded(pixels, kind="PNG", mode=None, **settings):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **settings)
    return file.getvalue()


def by_pillow(data, size=None):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image if size is None else image.resize((size, size), Image.Resampling.BILINEAR))


def difference(one, other):
    return np.abs(one.astype(int) - other.astype(int)).mean()


def images_of(values, kind=STRUCT, size=32, processor=None):
    """Each row's image as it lies in a record, or the error that it raised."""
    processor = processor or ImageProcessor("photo", size)
    column = values if isinstance(values, pa.Array) else pa.array(values, kind)
    rows = processor.begin(pa.RecordBatch.from_arrays([column], ["photo"]))
    found = []
    for row in range(len(column)):
        try:
            layout = RecordLayout(schema_of([processor], "here"), rows.shapes(row))
            out = layout.arrays(memoryview(bytearray(layout.num_bytes)))
            rows.write(row, out)
            found.append(out["image"])
        except DecodeError as error:
            found.append(error)
    return found


PICTURES = {"gradient": gradient, "noise": noise, "scene": scene}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (224, 224), (97, 61), (1, 1), (3, 700), (2001, 1503)])
def test_resizing_is_pillow_s_antialiased_bilinear(picture, shape):
    pixels = PICTURES[picture](*shape)
    expected = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR))
    assert difference(resize(pixels, 224), expected) <= 0.5


@pytest.mark.parametrize("size", [1, 7, 64, 600])
def test_any_size_can_be_asked_for(size):
    pixels = scene(211, 307)
    expected = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
    assert difference(resize(pixels, size), expected) <= 0.5


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("shape", [(300, 400), (701, 999), (1400, 1501), (2999, 2777)])
@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}], ids=["420", "progressive", "444"])
def test_a_jpeg_of_any_size_is_what_pillow_makes_of_it(picture, shape, settings):
    data = encoded(PICTURES[picture](*shape), "JPEG", quality=92, **settings)
    (image,) = images_of([{"bytes": data, "path": None}], size=112)
    assert difference(image.transpose(1, 2, 0), by_pillow(data, 112)) <= 2


def test_the_record_holds_channels_first_rgb():
    red = np.zeros((50, 60, 3), np.uint8)
    red[..., 0] = 200
    for kind in ("PNG", "JPEG"):
        (image,) = images_of([{"bytes": encoded(red, kind), "path": "x"}])
        assert image.shape == (3, 32, 32)
        assert image.dtype == np.uint8
        np.testing.assert_allclose(image.mean((1, 2)), [200, 0, 0], atol=2)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP"])
def test_other_kinds_are_decoded_by_pillow(kind):
    data = encoded(scene(60, 80), kind)
    assert difference(decode_image(data), by_pillow(data)) == 0


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_what_convert_rgb_makes_of_it(mode):
    data = encoded(scene(60, 80), "TIFF", mode)
    assert difference(decode_image(data), by_pillow(data)) == 0


def test_transparency_is_dropped_and_the_colour_behind_it_shows():
    clear = np.full((8, 8, 4), (10, 20, 30, 0), np.uint8)
    assert decode_image(encoded(clear, "PNG"))[4, 4].tolist() == [10, 20, 30]


def test_a_grey_jpeg_has_three_equal_channels():
    data = encoded(scene(60, 80), "JPEG", "L")
    pixels = decode_image(data)
    assert difference(pixels, by_pillow(data)) == 0
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_a_cmyk_jpeg_has_pillow_s_colours():
    data = encoded(scene(60, 80), "JPEG", "CMYK")
    assert difference(decode_image(data), by_pillow(data)) == 0


def test_sixteen_bit_grey_keeps_its_upper_bits():
    ramp = (np.arange(256, dtype=np.uint16) * 256 + 5).reshape(16, 16)
    assert decode_image(encoded(ramp, "PNG"))[..., 0].ravel().tolist() == list(range(256))


@pytest.mark.parametrize("most", [65535, 1023])
def test_sixteen_bit_grey_of_a_pgm_is_scaled_by_the_maximum_it_tells(most):
    ramp = np.linspace(0, most, 256).round().astype(">u2")
    pixels = decode_image(b"P5\n16 16\n%d\n" % most + ramp.tobytes())
    expected = (ramp.astype(np.float64) / most * 65535).round().astype(np.uint16) >> 8
    np.testing.assert_array_equal(pixels.reshape(256, 3), np.repeat(expected[:, None], 3, axis=1))


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_pixels_without_a_known_range_are_an_error(mode, dtype):
    with pytest.raises(DecodeError, match=f"mode {mode}"):
        decode_image(encoded(np.ones((4, 4), dtype), "TIFF"))


def test_plain_binary_columns_are_read():
    pixels = scene(32, 32)
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        (image,) = images_of([encoded(pixels)], kind)
        np.testing.assert_array_equal(image.transpose(1, 2, 0), pixels)


def test_a_slice_of_a_batch_yields_its_own_rows():
    pixels = [scene(32, 32) for _ in range(3)]
    column = pa.array([{"bytes": encoded(p), "path": None} for p in pixels], STRUCT).slice(1)
    for image, expected in zip(images_of(column), pixels[1:], strict=True):
        np.testing.assert_array_equal(image.transpose(1, 2, 0), expected)


def test_a_row_without_bytes_is_read_from_its_file(tmp_path):
    pixels = scene(32, 32)
    (tmp_path / "a.png").write_bytes(encoded(pixels))
    (image,) = images_of([{"bytes": None, "path": str(tmp_path / "a.png")}])
    np.testing.assert_array_equal(image.transpose(1, 2, 0), pixels)


def test_a_missing_file_is_named(tmp_path):
    (error,) = images_of([{"bytes": None, "path": str(tmp_path / "no.png")}])
    assert "no.png" in str(error)
    assert isinstance(error.__cause__.__cause__, FileNotFoundError)


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}])
def test_a_row_without_an_image_is_an_error_of_its_own(value):
    error, good = images_of([value, {"bytes": encoded(scene(9, 9)), "path": None}])
    assert isinstance(good, np.ndarray)
    assert "'photo': the image" in str(error)
    assert (error.field, error.column) == ("image", "photo")


def test_a_column_of_another_kind_is_named():
    (error,) = images_of([5], pa.int64())
    assert "holds int64, not encoded images" in str(error)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_an_error(kind, share):
    data = encoded(scene(400, 300), kind)
    (error,) = images_of([{"bytes": data[: int(len(data) * share)], "path": None}])
    assert isinstance(error, DecodeError)
    assert "cannot be decoded" in str(error)


def test_a_jpeg_that_lacks_its_last_bytes_is_an_error():
    data = encoded(scene(400, 300), "JPEG")
    with pytest.raises(DecodeError, match="truncated"):
        decode_image(data[:-2])


def test_a_jpeg_that_ends_early_is_never_grey_below():
    """An end marker in the middle: Pillow fills the rest with grey and says nothing."""
    data = encoded(scene(400, 300), "JPEG")
    early = data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 :]
    with pytest.raises(DecodeError, match=r"damaged.*premature end"):
        decode_image(early)
    with pytest.raises(DecodeError, match=r"damaged.*premature end"):
        decode_image(early, 32)


def test_stray_bytes_at_the_end_of_a_jpeg_do_no_harm():
    data = encoded(scene(64, 64), "JPEG")
    stray = data[:-2] + b"\x00\x00\x00" + data[-2:]
    np.testing.assert_array_equal(decode_image(stray), decode_image(data))


def test_bytes_of_no_image_are_an_error():
    for data in (b"no image at all", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", bytes(100)):
        with pytest.raises(DecodeError, match="cannot be decoded"):
            decode_image(data)


def test_a_decompression_bomb_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in ("PNG", "JPEG"):
        with pytest.raises(DecodeError, match="decompression bomb"):
            decode_image(encoded(scene(100, 100), kind))


def test_without_pillow_s_guard_any_size_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(encoded(scene(100, 100), "JPEG")).shape == (100, 100, 3)


def test_decode_image_takes_what_a_row_holds_and_gives_writable_memory(tmp_path):
    pixels = scene(20, 30)
    data = encoded(pixels)
    (tmp_path / "a.png").write_bytes(data)
    for value in (data, bytearray(data), memoryview(data), {"bytes": data}, {"path": str(tmp_path / "a.png")}):
        found = decode_image(value)
        np.testing.assert_array_equal(found, pixels)
        found[:] = 0
    assert decode_image(data, 8).shape == (8, 8, 3)
    decode_image(data, 8)[:] = 0
    decode_image(encoded(pixels, "JPEG"))[:] = 0


def test_decode_image_refuses_what_is_not_encoded():
    with pytest.raises(DecodeError, match="but got ndarray"):
        decode_image(scene(4, 4))


def test_a_float_image_is_normalised_by_scale_and_shift():
    config = SimpleNamespace(vocab_size=10, vision_dim=16, image_dtype="float32")
    (field,) = schema_of(build(Columns(image="photo"), config), "here").fields
    assert (field.name, field.dtype, field.shape) == ("image", "uint8", (3, 16, 16))
    value = rng.integers(0, 256, (3, 16, 16)).astype(np.float32)
    per_channel = (slice(None), None, None)
    got = value * np.array(field.scale)[per_channel] + np.array(field.shift)[per_channel]
    expected = (value / 255 - np.array(IMAGENET_MEAN)[per_channel]) / np.array(IMAGENET_STD)[per_channel]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_image_as_stored_has_no_scale():
    config = SimpleNamespace(vocab_size=10, vision_dim=16, image_dtype="uint8")
    schema = schema_of(build(Columns(image="photo", labels="kind", class_names=("a",)), config), "here")
    assert (schema.fields[0].scale, schema.fields[0].shift) == (None, None)
    assert [field.name for field in schema.fields] == ["image", "labels"]
    assert schema.task_types == ("vision",)
    assert schema.record_bytes() is not None


def test_another_image_dtype_is_refused():
    with pytest.raises(OptionError, match="image_dtype"):
        build(Columns(image="photo"), SimpleNamespace(vocab_size=10, vision_dim=16, image_dtype="float16"))


@pytest.mark.skipif(not BEANS.is_dir(), reason=f"no photographs in {BEANS}")
@pytest.mark.parametrize("size", [224, 64])
def test_photographs_are_what_pillow_makes_of_them(size):
    column = pq.read_table(BEANS / "validation-00000-of-00001.parquet", columns=["image"]).column(0)
    for chunk in column.chunks:
        for image, value in zip(images_of(chunk, size=size), chunk.to_pylist(), strict=True):
            assert difference(image.transpose(1, 2, 0), by_pillow(value["bytes"], size)) <= 1


@pytest.mark.parametrize("vision_dim", [0, -1, "224", 2.0, True])
def test_a_size_that_is_none_is_an_error_that_names_it(vision_dim):
    from shmloader.config import MultimodalConfig
    from shmloader.errors import OptionError
    from shmloader.processors import build
    from shmloader.sources.base import Columns

    with pytest.raises(OptionError, match="vision_dim"):
        build(Columns(image="image"), MultimodalConfig(vision_dim=vision_dim))
