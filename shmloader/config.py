"""The sizes of a sample: what a model wants to be fed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MultimodalConfig:
    """Sizes and dtypes of samples. Anything with these attributes can be given in its place.

    vocab_size: token ids must be below it; None: not checked.
    vision_dim: images are [3, vision_dim, vision_dim].
    max_audio_length: samples of an audio clip at 16 kHz: a longer one is cut, a shorter one followed by zeros.
    max_text_length: longer token sequences are cut.
    pad_to_multiple_of: the length of padded tokens in a batch is rounded up to a multiple of this; None: it is not.
    image_dtype: "float32", normalised by ImageNet's mean and deviation (stored as uint8, converted as a batch is
        gathered), or "uint8", as decoded.
    """

    vocab_size: int | None = None
    vision_dim: int = 224
    max_audio_length: int = 16000
    max_text_length: int = 512
    pad_to_multiple_of: int | None = None
    image_dtype: str = "float32"
