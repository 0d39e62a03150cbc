"""Pictures for the demo: drawn, not photographed, but with the detail and the file size of photographs.

Five kinds of scene, told apart at a glance; everything about a picture follows from its random generator.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

#: The classes, in the order of their labels.
CLASS_NAMES = ("sunset", "mountains", "city", "flowers", "fruit")

#: Gives 30 to 130 KB for these sizes and this grain, like a photograph from the web (measured).
_QUALITY = 88
#: Scenes are drawn this much smaller and then enlarged: soft like a lens, and in half the time.
_DRAWN_SCALE = 0.65
_ASPECTS = (4 / 3, 4 / 3, 3 / 2, 1.0, 3 / 4)

_Rng = np.random.Generator
_Pixels = np.ndarray[Any, np.dtype[np.float32]]
_Colour = tuple[float, float, float]


def draw_jpeg(label: int, rng: _Rng) -> bytes:
    """A JPEG file that shows a scene of class ``label``: RGB, 420 to 620 pixels at its longer side."""
    longer = int(rng.integers(420, 620))
    aspect = _ASPECTS[int(rng.integers(len(_ASPECTS)))]
    width, height = (longer, round(longer / aspect)) if aspect >= 1 else (round(longer * aspect), longer)
    scene = _SCENES[label](rng, int(height * _DRAWN_SCALE), int(width * _DRAWN_SCALE))
    scene = np.clip(scene * np.float32(rng.uniform(0.85, 1.1)), 0, 255).astype(np.uint8)
    smooth = Image.fromarray(scene).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth, np.int16) + _grain(rng, height, width)[..., None]
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _sunset(rng: _Rng, height: int, width: int) -> _Pixels:
    horizon = int(height * rng.uniform(0.5, 0.7))
    top, low = _vary(rng, (60, 50, 110)), _vary(rng, (250, 150, 70))
    pixels = np.empty((height, width, 3), np.float32)
    clouds = _fractal(rng, horizon, width, 4, 12)
    pixels[:horizon] = _gradient(horizon, top, low) + clouds[..., None] * _rgb(30, 18, 14)
    sea = _gradient(height - horizon, _scaled(low, 0.7), (20, 25, 50))
    waves = _smooth_noise(rng, height - horizon, width, max(4, (height - horizon) // 3), 14)
    pixels[horizon:] = sea + waves[..., None] * _rgb(26, 20, 18)
    x, y, radius = rng.uniform(0.2, 0.8) * width, horizon - height * rng.uniform(0.02, 0.2), height * 0.07
    distance = _distance(height, width, x, y)
    glow = np.exp(-distance / (radius * 2.5))
    glow[horizon:] *= 0.6
    pixels += glow[..., None] * _rgb(150, 110, 40)
    pixels[:horizon][distance[:horizon] < radius] = (255, 240, 190)
    glitter = np.exp(-(((np.arange(width) - x) / (radius * 1.3)) ** 2)).astype(np.float32) * np.maximum(waves, 0)
    pixels[horizon:] += glitter[..., None] * _rgb(160, 130, 70)
    return pixels


def _mountains(rng: _Rng, height: int, width: int) -> _Pixels:
    pixels = _gradient(height, _vary(rng, (90, 150, 220)), (225, 235, 245)) * np.ones((1, width, 1), np.float32)
    clouds = np.maximum(_fractal(rng, height, width, 3, 5), 0)
    pixels += clouds[..., None] * 60
    rows = np.arange(height, dtype=np.float32)[:, None]
    num_ridges = int(rng.integers(3, 5))
    rock = _fractal(rng, height, width, 24, 30)
    for index in range(num_ridges):
        near = index / (num_ridges - 1)
        base = height * (0.35 + 0.4 * near)
        ridge = base - _fractal(rng, 1, width, 1, 5)[0] * height * (0.13 - 0.05 * near)
        ground = _rgb(*_mix(_vary(rng, (150, 165, 190)), _vary(rng, (50, 75, 45)), near))
        top = max(0, int(ridge.min()))
        surface = ground + rock[top:, :, None] * np.float32(8 + 22 * near)
        if index == 0:
            snow = rows[top:] < ridge + height * 0.09 + rock[top:] * 8
            surface[snow] = 240 + rock[top:][snow][:, None] * 8
        np.copyto(pixels[top:], surface, where=(rows[top:] > ridge)[..., None])
    return pixels


def _city(rng: _Rng, height: int, width: int) -> _Pixels:
    pixels = _gradient(height, (12, 14, 40), _vary(rng, (90, 60, 100))) * np.ones((1, width, 1), np.float32)
    pixels += _fractal(rng, height, width, 3, 4)[..., None] * 8
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for depth in (0.5, 1.0):
        left = -int(rng.integers(0, 20))
        while left < width:
            wide = int(width * rng.uniform(0.08, 0.17))
            top = int(height * rng.uniform(0.1, 0.55) * (0.6 + 0.6 * depth))
            _building(draw, rng, (left, top, left + wide, height), depth)
            left += wide + int(rng.integers(0, 8))
    street = int(height * 0.94)
    draw.rectangle((0, street, width, height), fill=(30, 30, 36))
    for x in range(0, width, 24):
        draw.line((x, (street + height) // 2, x + 12, (street + height) // 2), fill=(200, 190, 120), width=2)
    pixels = np.asarray(image, np.float32)
    return pixels * (1 + np.float32(0.07) * _fractal(rng, height, width, 20, 30)[..., None])


def _building(draw: ImageDraw.ImageDraw, rng: _Rng, box: tuple[int, int, int, int], depth: float) -> None:
    left, top, right, bottom = box
    shade = int(25 + 45 * depth + rng.integers(-8, 9))
    draw.rectangle(box, fill=(shade, shade + 2, shade + 12))
    step_x, step_y = int(rng.integers(7, 11)), int(rng.integers(8, 12))
    lit_share = rng.uniform(0.3, 0.7)
    for y in range(top + 4, bottom - 6, step_y):
        for x in range(left + 3, right - 5, step_x):
            if rng.random() < lit_share:
                light = int(rng.integers(150, 256))
                draw.rectangle((x, y, x + step_x // 2, y + step_y // 2), fill=(light, light - 30, light // 2))


def _flowers(rng: _Rng, height: int, width: int) -> _Pixels:
    leaves = _fractal(rng, height, width, 10, 14)
    pixels = _rgb(50, 100, 40) + leaves[..., None] * _rgb(25, 40, 18)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(60, 90))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        green = int(rng.integers(70, 170))
        end = (x + rng.uniform(-60, 60), y - rng.uniform(20, 90))
        draw.line((x, y, *end), fill=(green // 2, green, green // 3), width=2)
    colour = _vary(rng, ((230, 60, 90), (240, 200, 40), (235, 235, 240), (170, 90, 220))[int(rng.integers(4))])
    for _ in range(int(rng.integers(5, 10))):
        radius = height * rng.uniform(0.07, 0.16)
        _flower(draw, rng, (rng.uniform(0, width), rng.uniform(0.1, 1) * height), radius, colour)
    blurred: _Pixels = np.asarray(image.filter(ImageFilter.BoxBlur(0.7)), np.float32)
    return blurred * (1 + np.float32(0.08) * _smooth_noise(rng, height, width, height // 5, width // 5)[..., None])


def _flower(draw: ImageDraw.ImageDraw, rng: _Rng, centre: tuple[float, float], radius: float, colour: _Colour) -> None:
    num_petals = int(rng.integers(6, 11))
    turn = rng.uniform(0, np.pi)
    for petal in range(num_petals):
        angle = turn + 2 * np.pi * petal / num_petals
        x, y = centre[0] + np.cos(angle) * radius * 0.6, centre[1] + np.sin(angle) * radius * 0.6
        _disc(draw, x, y, radius * 0.42, _scaled(colour, rng.uniform(0.75, 1.05)))
        _disc(draw, x, y, radius * 0.2, _scaled(colour, rng.uniform(0.6, 0.8)))
    _disc(draw, *centre, radius * 0.3, (190, 130, 30))
    for _ in range(30):
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0, radius * 0.27)
        x, y = centre[0] + np.cos(angle) * reach, centre[1] + np.sin(angle) * reach
        _disc(draw, x, y, 1, (110, 70, 20))


def _fruit(rng: _Rng, height: int, width: int) -> _Pixels:
    fine, coarse = _smooth_noise(rng, height, width, 40, 3), _smooth_noise(rng, height, width, height // 4, 6)
    grain: _Pixels = coarse + fine * np.float32(0.5)
    pixels: _Pixels = _rgb(*_vary(rng, (150, 105, 65))) + grain[..., None] * _rgb(18, 14, 10)
    wall = int(height * rng.uniform(0.2, 0.35))
    pixels[:wall] = _rgb(*_vary(rng, (190, 195, 185))) + _fractal(rng, wall, width, 12, 20)[..., None] * 7
    skin = _smooth_noise(rng, height, width, height // 3, width // 3)
    kinds = ((235, 130, 30), (200, 40, 40), (110, 170, 50), (240, 210, 70))
    centres = [(rng.uniform(0.1, 0.9) * width, rng.uniform(0.35, 0.85) * height) for _ in range(rng.integers(4, 8))]
    for x, y in sorted(centres, key=lambda centre: centre[1]):
        colour = _vary(rng, kinds[int(rng.integers(len(kinds)))])
        _ball(pixels, skin, (x, y), height * rng.uniform(0.11, 0.18), colour)
    return pixels


def _ball(pixels: _Pixels, skin: _Pixels, centre: tuple[float, float], radius: float, colour: _Colour) -> None:
    """Draw a shaded ball with its shadow into ``pixels``, within its surroundings only."""
    height, width = pixels.shape[:2]
    left, right = max(0, int(centre[0] - 1.5 * radius)), min(width, int(centre[0] + 1.8 * radius))
    top, bottom = max(0, int(centre[1] - 1.5 * radius)), min(height, int(centre[1] + 1.8 * radius))
    part = pixels[top:bottom, left:right]
    rows, columns = part.shape[:2]
    x, y = centre[0] - left, centre[1] - top
    shadow = _distance(rows, columns, x + radius * 0.3, y + radius * 0.5) / radius
    part *= np.clip(shadow - 0.1, 0.45, 1)[..., None]
    lit = _distance(rows, columns, x - radius * 0.35, y - radius * 0.4) / radius
    shade = 1.15 - 0.55 * lit + 0.05 * skin[top:bottom, left:right]
    ball = shade[..., None] * _rgb(*colour) + np.exp(-(lit**2) * 18)[..., None] * 110
    inside = _distance(rows, columns, x, y) < radius
    part[inside] = ball[inside]


_SCENES: tuple[Callable[[_Rng, int, int], _Pixels], ...] = (_sunset, _mountains, _city, _flowers, _fruit)


def _smooth_noise(rng: _Rng, height: int, width: int, rows: int, columns: int) -> _Pixels:
    """Smooth noise of about unit deviation, float32 [height, width], with that many bumps."""
    coarse = rng.standard_normal((max(rows, 2), max(columns, 2)), np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def _fractal(rng: _Rng, height: int, width: int, rows: int, columns: int) -> _Pixels:
    """Noise with detail at three scales, float32 [height, width]."""
    noise = _smooth_noise(rng, height, width, rows, columns).copy()
    for octave in (1, 2):
        scale = 3**octave
        noise += _smooth_noise(rng, height, width, rows * scale, columns * scale) * np.float32(0.45**octave)
    return noise


@functools.cache
def _noise_table() -> _Pixels:
    return np.random.default_rng(0).standard_normal(2**21, np.float32)


def _grain(rng: _Rng, height: int, width: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """What a sensor adds: noise of its own for each pixel, int16 [height, width]."""
    table = _noise_table()
    start = int(rng.integers(table.size - height * width))
    noise = table[start : start + height * width].reshape(height, width)
    return (noise * np.float32(rng.uniform(4, 7))).astype(np.int16)


def _gradient(height: int, top: _Colour, bottom: _Colour) -> _Pixels:
    """From one colour down to the other, float32 [height, 1, 3]."""
    share = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    return _rgb(*top) * (1 - share) + _rgb(*bottom) * share


def _rgb(red: float, green: float, blue: float) -> _Pixels:
    return np.array([red, green, blue], np.float32)


def _distance(height: int, width: int, x: float, y: float) -> _Pixels:
    """How far each pixel is from (x, y), float32 [height, width]."""
    rows = (np.arange(height, dtype=np.float32) - np.float32(y)) ** 2
    columns = (np.arange(width, dtype=np.float32) - np.float32(x)) ** 2
    return np.sqrt(rows[:, None] + columns)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: _Colour) -> None:
    red, green, blue = (int(min(255, max(0, value))) for value in colour)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(red, green, blue))


def _vary(rng: _Rng, colour: _Colour) -> _Colour:
    red, green, blue = (value + float(change) for value, change in zip(colour, rng.normal(0, 12, 3), strict=True))
    return red, green, blue


def _scaled(colour: _Colour, factor: float) -> _Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _mix(first: _Colour, second: _Colour, share: float) -> _Colour:
    red, green, blue = (a * (1 - share) + b * share for a, b in zip(first, second, strict=True))
    return red, green, blue
