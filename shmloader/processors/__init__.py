"""From rows to the fields of a sample.

::

    RecordBatch ─▶ Processor.begin ─▶ Rows ─▶ shapes(row)     how large a record to reserve
                                           └▶ write(row, out)  straight into the record

``text.py`` takes the columns of text, ``answer.py`` these and the answer to them, ``image.py``, ``audio.py`` and
``label.py`` one column each; ``either.py`` joins those of which a row may lack all but one. ``user.py`` takes whole
rows to the user's ``process``, in place of them all. Each is imported only when a dataset needs it, decoders included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shmloader.errors import ColumnError, OptionError
from shmloader.processors.base import Processor, Rows
from shmloader.sample import Field, Schema

if TYPE_CHECKING:
    from shmloader.sources.base import Columns

__all__ = ["Processor", "Rows", "build", "schema_of"]

IMAGE_DTYPES = ("float32", "uint8")


def build(
    columns: Columns,
    config: Any,
    tokenizer: Any = None,
    process: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    train_on_prompt: bool = False,
) -> list[Processor]:
    """The processors that make a sample of ``columns``, in the order of its fields: text, image, audio, labels.

    Beside text, images and audio are optional: a row without one is a sample without the field. Of images and audio
    without text, a row must have one of both.

    config: has ``vocab_size`` and ``vision_dim``, maybe ``max_text_length``, ``max_audio_length``,
        ``pad_to_multiple_of`` and ``image_dtype``.
    process: the user's own, which then does all.
    train_on_prompt: where there is a target, labels are the tokens of the prompt too.

    Raises:
        ColumnError: there is nothing to make a sample of, or a target without text.
        OptionError: the tokenizer, a size or ``image_dtype`` cannot be used.
    """
    if process is not None:
        from shmloader.processors.user import UserProcessor

        return [UserProcessor(process)]
    built: list[Processor] = []
    if columns.text is not None:
        built.append(_text(columns, config, tokenizer, train_on_prompt))
    elif columns.target is not None:
        raise ColumnError("a target is the answer to text, of which there is no column")
    built += _media(columns, config)
    if columns.labels is not None:
        from shmloader.processors.label import LabelProcessor

        built.append(LabelProcessor(columns.labels, columns.class_names))
    if not built:
        raise ColumnError(
            "no column of text, images, audio or labels was found; name them with `columns`, or give `process`"
        )
    return built


def _text(columns: Columns, config: Any, tokenizer: Any, train_on_prompt: bool) -> Processor:
    assert columns.text is not None
    sizes = {
        "max_text_length": _whole(config, "max_text_length", 512),
        "vocab_size": config.vocab_size,
        "multiple_of": 1
        if getattr(config, "pad_to_multiple_of", None) is None
        else _whole(config, "pad_to_multiple_of"),
    }
    if columns.target is not None:
        from shmloader.processors.answer import AnswerProcessor

        return AnswerProcessor(columns.text, columns.target, tokenizer, train_on_prompt=train_on_prompt, **sizes)
    from shmloader.processors.text import TextProcessor

    return TextProcessor(columns.text, tokenizer, labels_from_text=columns.labels is None, **sizes)


def _media(columns: Columns, config: Any) -> list[Processor]:
    """The processors of images and audio; one that joins them where there is no text."""
    is_optional = columns.text is not None or None not in (columns.image, columns.audio)
    built: list[Processor] = []
    if columns.image is not None:
        from shmloader.processors.image import ImageProcessor

        size, dtype = _whole(config, "vision_dim"), _image_dtype(config)
        built.append(ImageProcessor(columns.image, size, dtype, is_optional))
    if columns.audio is not None:
        from shmloader.processors.audio import AudioProcessor

        built.append(AudioProcessor(columns.audio, _whole(config, "max_audio_length", 16000), is_optional))
    if columns.text is None and len(built) > 1:
        from shmloader.processors.either import EitherProcessor

        return [EitherProcessor(built)]
    return built


def schema_of(processors: Sequence[Processor], source_name: str) -> Schema:
    """The schema of the samples that ``processors`` make together.

    With a user's ``process`` it is known only once a row has been processed (`UserProcessor.fields`).
    """
    fields = tuple(field for processor in processors for field in processor.fields)
    return Schema(fields, (_task_type(fields),), (source_name,))


def _task_type(fields: Sequence[Field]) -> str:
    by_name = {field.name: field for field in fields}
    has_tokens = "text" in by_name and by_name["text"].numpy_dtype.kind in "iu" and not by_name["text"].is_text
    for name, alone in (("image", "vision"), ("audio", "audio")):
        if name in by_name:
            return f"{alone}_text" if has_tokens else alone
    return "text"


def _whole(config: Any, name: str, default: int | None = None) -> int:
    """A size of ``config``: a whole number from 1 up."""
    value = getattr(config, name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        allowed = "a whole number from 1 up"
        raise OptionError(
            f"{name}={value!r} of the config must be {allowed}", name=name, value=str(value), allowed=allowed
        )
    return value


def _image_dtype(config: Any) -> str:
    dtype: str = getattr(config, "image_dtype", "float32")
    if dtype not in IMAGE_DTYPES:
        raise OptionError(
            f"image_dtype must be one of {', '.join(IMAGE_DTYPES)}, but got {dtype!r}",
            name="image_dtype",
            value=dtype,
            allowed=IMAGE_DTYPES,
        )
    return dtype
