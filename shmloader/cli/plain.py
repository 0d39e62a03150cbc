"""The same data without shmloader: `datasets`, Pillow, soundfile and soxr; decoded again at every read.

It is what the demo and the benchmarks compare with, and the direct decode that they check batches against. It
shares with the loader which columns it reads, and nothing of how they are decoded.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from shmloader.sources.base import Columns
from shmloader.sources.columns import choose_columns

Tensors = dict[str, torch.Tensor]

#: Largest mean difference of an image to Pillow's BILINEAR, of 255 (what the loader promises).
MAX_IMAGE_DIFFERENCE = 2.0

#: Source: torchvision, "Models and pre-trained weights": normalisation of RGB in [0, 1].
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
#: Source: torch.nn.CrossEntropyLoss, default of ``ignore_index``.
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class PlainConfig:
    """What of a config matters here: the image's side, its dtype, the most ids of a text, and the samples of a clip."""

    image_size: int = 224
    image_dtype: str = "float32"
    max_text_length: int = 512
    max_audio_length: int = 16000

    @classmethod
    def of(cls, config: Any) -> PlainConfig:
        """The same settings as those of a `MultimodalConfig`."""
        return cls(
            image_size=config.vision_dim,
            image_dtype=getattr(config, "image_dtype", cls.image_dtype),
            max_text_length=getattr(config, "max_text_length", cls.max_text_length),
            max_audio_length=getattr(config, "max_audio_length", cls.max_audio_length),
        )


class PlainDataset(Dataset[Tensors]):
    """Map-style: ``[i]`` reads and decodes row i and keeps nothing. Text becomes its UTF-8 bytes.

    rows: a ``datasets.Dataset``.
    """

    def __init__(self, rows: Any, columns: Columns, config: PlainConfig) -> None:
        roles = (columns.text, columns.image, columns.audio, columns.labels)
        self.rows = rows.select_columns([name for name in roles if name is not None])
        self.columns = columns
        self.config = config
        text = ("text", "attention_mask", "labels") if columns.text is not None else ()
        image = ("image",) if columns.image is not None else ()
        audio = ("audio",) if columns.audio is not None else ()
        labels = ("labels",) if columns.labels is not None else ()
        #: What `collate_plain` puts into a batch.
        self.fields = frozenset((*text, *image, *audio, *labels))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensors:
        row = self.rows[index]
        sample: Tensors = {}
        if self.columns.text is not None:
            ids = list(_text(row[self.columns.text]).encode()[: self.config.max_text_length])
            sample["text"] = sample["labels"] = torch.tensor(ids, dtype=torch.int64)
        if self.columns.image is not None:
            sample["image"] = self._image(row[self.columns.image])
        if self.columns.audio is not None:
            sample["audio"] = self._audio(row[self.columns.audio])
        if self.columns.labels is not None:
            sample["labels"] = torch.tensor(row[self.columns.labels])
        return sample

    def _image(self, image: Image.Image) -> torch.Tensor:
        size = self.config.image_size
        small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(small).transpose(2, 0, 1)
        if self.config.image_dtype == "uint8":
            return torch.from_numpy(np.ascontiguousarray(pixels))
        normalised = (pixels / np.float32(255) - _MEAN[:, None, None]) / _STD[:, None, None]
        return torch.from_numpy(np.ascontiguousarray(normalised))

    def _audio(self, clip: dict[str, Any]) -> torch.Tensor:
        import soundfile
        import soxr

        if "array" in clip:
            samples, rate = np.asarray(clip["array"], np.float32), clip["sampling_rate"]
        else:
            file = clip["path"] if clip["bytes"] is None else io.BytesIO(clip["bytes"])
            frames, rate = soundfile.read(file, dtype="float32", always_2d=True)
            samples = frames.mean(axis=1)
        whole = soxr.resample(samples, rate, 16000) if rate != 16000 else samples
        num_samples = self.config.max_audio_length
        return torch.from_numpy(np.pad(whole[:num_samples], (0, max(0, num_samples - len(whole)))))


def _text(value: Any) -> str:
    """A string, the strings of a list, or the messages of a conversation."""
    if isinstance(value, str):
        return value
    lines = []
    for item in value:
        if isinstance(item, dict):
            sender = item.get("role") or {"human": "user", "gpt": "assistant"}.get(item["from"], item["from"])
            lines.append(f"{sender}: {item['content'] if 'content' in item else item['value']}")
        elif item is not None:
            lines.append(_text(item))
    return "\n".join(lines)


def open_plain(dataset: str, split: str, config: PlainConfig) -> PlainDataset:
    """Download or find ``dataset`` with ``datasets.load_dataset``, and read the columns that the loader reads."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(dataset, split=split)
    finally:
        if shown:
            datasets.enable_progress_bars()
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Audio):  # whose own decoding wants torchcodec
            rows = rows.cast_column(name, datasets.Audio(decode=False))
    columns, _, _ = choose_columns(rows.features, dataset=dataset)
    return PlainDataset(rows, columns, config)


def collate_plain(samples: Sequence[Tensors]) -> Tensors:
    """A batch of what `PlainDataset` gives, padded as the loader pads; for use as ``collate_fn``."""
    batch: Tensors = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name == "text" or (name == "labels" and values[0].ndim == 1):
            batch[name] = pad_sequence(values, True, _IGNORED_LABEL if name == "labels" else 0)
        else:
            batch[name] = torch.stack(values)
    if "text" in batch:
        lengths = torch.tensor([len(sample["text"]) for sample in samples])
        batch["attention_mask"] = (torch.arange(batch["text"].shape[1]) < lengths[:, None]).long()
    return batch


def differences(batch: Mapping[str, Any], indices: Sequence[int], plain: PlainDataset) -> list[str]:
    """What of ``batch``, which should hold the rows ``indices``, differs from a direct decode: one text each."""
    expected = collate_plain([plain[index] for index in indices])
    missing = [name for name in expected if name not in batch]
    if missing:
        return [f"the batch lacks {', '.join(missing)}; it has {', '.join(batch)}"]
    found = []
    for name, right in expected.items():
        given = batch[name]
        if given.shape != right.shape or given.dtype != right.dtype:
            found.append(f"{name} is {_kind(given)}, but should be {_kind(right)}")
        else:
            found += [f"row {row}: {what}" for row, what in _differing_rows(name, given, right, indices)]
    return found


def _differing_rows(
    name: str, given: torch.Tensor, right: torch.Tensor, indices: Sequence[int]
) -> list[tuple[int, str]]:
    if name == "image":
        means = _image_differences(given, right)
        return [
            (index, f"image differs from Pillow's BILINEAR by {mean:.2f} of 255 (at most {MAX_IMAGE_DIFFERENCE:g})")
            for index, mean in zip(indices, means, strict=True)
            if not mean <= MAX_IMAGE_DIFFERENCE
        ]
    found = []
    for index, a, b in zip(indices, given, right, strict=True):
        if not torch.equal(a, b):
            at = int((a != b).reshape(-1).nonzero()[0])
            values = a.reshape(-1)[at].item(), b.reshape(-1)[at].item()
            found.append((index, f"{name} is {values[0]} at position {at}, but should be {values[1]}"))
    return found


def _image_differences(given: torch.Tensor, right: torch.Tensor) -> list[float]:
    """Mean absolute difference of each image, of 255."""
    apart = (given.float() - right.float()).abs()
    if given.dtype == torch.float32:
        apart = apart * torch.from_numpy(_STD * 255)[None, :, None, None]
    return [float(mean) for mean in apart.mean(dim=(1, 2, 3))]


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
