"""Text columns: a string becomes token ids, by the user's tokenizer or as its UTF-8 bytes.

What else can be text (lists of strings, several columns, conversations) is made a string first (text_value.py); a
conversation is left to the tokenizer's chat template where it has one.

Nothing of `tokenizers` or `transformers` is imported: what an object can do tells what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from shmloader.column_path import choice_of
from shmloader.errors import DecodeError, OptionError
from shmloader.processors.base import Rows, chosen_item, column_at
from shmloader.processors.text_value import Chat, chat_of, join_texts, text_of
from shmloader.sample import Field

IGNORED_LABEL = -100
"""Pads token labels. Source: torch.nn.CrossEntropyLoss, default of ``ignore_index``."""

_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<PAD>")

Ids = np.ndarray[Any, Any]
Encode = Callable[[list[str]], Sequence[Any]]
_Text = TypeVar("_Text")
_Made = TypeVar("_Made")


class TextProcessor:
    """Yields "text", int64 [length], and "labels" with the same ids where ``labels_from_text`` (a causal LM).

    column: of strings, lists of strings, or conversations; a path ("answers.text") for what is inside another column.
        Of several columns the texts are joined by a line's end, in order; null and empty ones are left out.
    tokenizer: None: the ids are the UTF-8 bytes; else see `check_tokenizer`. In the first `begin` a
        `tokenizers.Tokenizer` has its truncation set and its padding switched off: it is this process's own copy.
    max_text_length: most ids of a sample; what follows is cut off.
    vocab_size: ids that are not below it are errors; None: not checked.
    multiple_of: the padded length of a batch is rounded up to a multiple of it.

    Raises:
        OptionError: the tokenizer cannot be used, or ``max_text_length`` is not positive.
    """

    def __init__(
        self,
        column: str | tuple[str, ...],
        tokenizer: Any = None,
        max_text_length: int = 512,
        vocab_size: int | None = None,
        labels_from_text: bool = False,
        multiple_of: int = 1,
    ) -> None:
        check_tokenizer(tokenizer)
        if max_text_length < 1:
            raise OptionError(
                f"max_text_length must be 1 or more, but got {max_text_length}",
                name="max_text_length",
                value=max_text_length,
                allowed="1 or more",
            )
        self.columns: tuple[str, ...] = (column,) if isinstance(column, str) else column
        self.max_text_length = max_text_length
        self.vocab_size = vocab_size
        pad, most = pad_id_of(tokenizer), (max_text_length,)
        self._tokenizer = tokenizer
        self._encode: Encode | None = None
        text = Field("text", "int64", (None,), pad=pad, mask="attention_mask", most=most, multiple_of=multiple_of)
        self.fields: tuple[Field, ...] = (text,)
        if labels_from_text:
            self.fields += (replace(text, name="labels", pad=IGNORED_LABEL, mask=None, same_as="text"),)

    def begin(self, batch: pa.RecordBatch) -> Rows:
        """Tokenise the rows of ``batch`` in one call, or one by one where that fails."""
        if self._encode is None:
            self._encode = batch_encoder(self._tokenizer, self.max_text_length)
        columns = [column_at(batch, column) for column in self.columns]
        texts: list[str] = []
        positions: list[int] = []
        rows: list[Ids | DecodeError] = []
        for position in range(batch.num_rows):
            text = self._text_of(self.columns, [column[position] for column in columns], _has_template(self._tokenizer))
            if isinstance(text, str):
                positions.append(position)
                texts.append(text)
                rows.append(np.empty(0, np.int64))
            elif isinstance(text, DecodeError):
                rows.append(text)
            else:
                rows.append(self._chat_ids(text))
        for position, ids in zip(positions, self._encode_all(self._encode, texts, self._checked), strict=True):
            rows[position] = ids
        return _TextRows(self.fields, rows)

    def _text_of(
        self, columns: Sequence[str], scalars: Sequence[Any], is_chat_kept: bool = False
    ) -> str | Chat | DecodeError:
        """The text of these columns of a row. is_chat_kept: a conversation is left as it is, for a template."""
        texts: list[str | None] = []
        for column, scalar in zip(columns, scalars, strict=True):
            try:
                value = scalar.as_py()
                if isinstance(value, str):
                    texts.append(value)
                    continue
                if isinstance(value, dict) and choice_of(column) is not None:
                    value = chosen_item(value)
                chat = chat_of(value) if len(scalars) == 1 and is_chat_kept else None
                if chat is not None:
                    return chat
                texts.append(text_of(value))
            except UnicodeDecodeError as error:
                return self._error(f"is not valid UTF-8: {error}", column)
            except IndexError as error:
                return self._error(f"cannot be had: {error}", column, error)
            except TypeError as error:
                return self._error(
                    f"holds {scalar.type}, not text; name another column or give `process`", column, error
                )
        joined = join_texts(texts)
        if joined is None:
            return self._error("is null" if len(texts) == 1 else "are all null", columns)
        return joined

    def _chat_ids(self, chat: Chat) -> Ids | DecodeError:
        """The ids of a conversation, by the tokenizer's own template."""
        try:
            ids = self._tokenizer.apply_chat_template(
                chat, tokenize=True, return_dict=False, truncation=True, max_length=self.max_text_length
            )
        except Exception as error:
            return self._error(f"cannot be laid out by the tokenizer's chat template: {_told(error)}", None, error)
        return self._checked(ids)

    def _encode_all(
        self, encode: Callable[[list[_Text]], Sequence[Any]], texts: list[_Text], checked: Callable[[Any], _Made]
    ) -> list[_Made | DecodeError]:
        """What ``checked`` makes of the ids of each text; all at once, or one by one where that fails.

        So only the bad row is lost.
        """
        if not texts:
            return []
        try:
            encoded = encode(texts)
            if len(encoded) != len(texts):
                raise ValueError(f"the tokenizer made {len(encoded)} rows of {len(texts)}")
        except MemoryError:  # nothing is wrong with the texts: another process tries again
            raise
        except Exception as error:
            if len(texts) > 1:
                return [ids for text in texts for ids in self._encode_all(encode, [text], checked)]
            return [self._error(f"cannot be tokenised: {_told(error)}", None, error)]
        return [checked(value) for value in encoded]

    def _checked(self, value: Any) -> Ids | DecodeError:
        """The ids in ``value``, cut to size, or why they cannot be used."""
        value = getattr(value, "ids", value)
        if hasattr(value, "tolist") and not isinstance(value, np.ndarray):
            value = value.tolist()
        try:
            ids = np.asarray(value)[: self.max_text_length]
        except (ValueError, IndexError, OverflowError) as error:
            return self._error(f"has token ids that are not a flat list of ints: {error}")
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            return self._error(
                f"has token ids that are not a flat list of ints: "
                f"the tokenizer returned {ids.dtype} of shape {list(ids.shape)}"
            )
        if not ids.size:
            return np.empty(0, np.int64)
        lowest, highest = int(ids.min()), int(ids.max())
        limit = 2**63 if self.vocab_size is None else self.vocab_size
        if lowest < 0 or highest >= limit:
            worst = lowest if lowest < 0 else highest
            have = "" if self.vocab_size is None else f"; the vocabulary has {self.vocab_size} (config.vocab_size)"
            remedy = "Give the tokenizer that the model was made for, or set vocab_size of the config to its size"
            return self._error(
                f"has token id {worst}, which is out of range{have}. {remedy}", id=worst, vocab_size=self.vocab_size
            )
        return ids

    def _error(
        self, what: str, column: str | Sequence[str] | None = None, cause: Exception | None = None, **data: Any
    ) -> DecodeError:
        """Why a row has no ids. column: at fault, or several; None: all."""
        columns = self.columns if column is None else (column,) if isinstance(column, str) else tuple(column)
        noun = "column" if len(columns) == 1 else "columns"
        error = DecodeError(
            f"text of {noun} {', '.join(map(repr, columns))} {what}",
            field="text",
            column=columns[0] if len(columns) == 1 else columns,
            **data,
        )
        error.__cause__ = cause
        return error


class _TextRows:
    def __init__(self, fields: tuple[Field, ...], rows: list[Ids | DecodeError]) -> None:
        self._fields = fields
        self._rows = rows

    def shapes(self, row: int) -> Mapping[str, tuple[int, ...]]:
        return {field.name: self._ids(row).shape for field in self._fields}

    def write(self, row: int, out: Mapping[str, Ids]) -> None:
        np.copyto(out["text"], self._ids(row))

    def _ids(self, row: int) -> Ids:
        ids = self._rows[row]
        if isinstance(ids, DecodeError):
            raise ids
        return ids


def _has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer lays out conversations itself."""
    return bool(getattr(tokenizer, "chat_template", None)) and callable(getattr(tokenizer, "apply_chat_template", None))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def check_tokenizer(tokenizer: Any) -> None:
    """Accept None, or what has ``encode(text)`` → ids: a list, an array, a tensor or something with ``.ids``.

    Used in the training process, before any row is read; imports nothing.

    Raises:
        OptionError: it has no such method.
    """
    has_encode = callable(getattr(tokenizer, "encode", None))
    if tokenizer is None or (has_encode and not isinstance(tokenizer, str | type)):
        return
    kind = f"the class {tokenizer.__name__}" if isinstance(tokenizer, type) else type(tokenizer).__name__
    raise OptionError(
        f"tokenizer must have a method encode(text), as those of tokenizers and transformers, "
        f"or be None for UTF-8 bytes; but got {kind}",
        name="tokenizer",
        value=kind,
        allowed="None, or an object with encode(text)",
    )


def pad_id_of(tokenizer: Any) -> int:
    """The id that ``tokenizer`` pads with, or 0 where it has none."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        padding = getattr(tokenizer, "padding", None)
        pad = padding.get("pad_id") if isinstance(padding, dict) else None
    find = getattr(tokenizer, "token_to_id", None)
    if pad is None and callable(find):
        pad = next((found for found in map(find, _PAD_TOKENS) if found is not None), None)
    return pad if isinstance(pad, int) else 0


def batch_encoder(tokenizer: Any, max_length: int) -> Encode:
    """What turns texts into something with the ids of each, in the fastest way that ``tokenizer`` has."""
    if tokenizer is None:
        return lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts]
    encode_batch: Encode | None = getattr(tokenizer, "encode_batch_fast", None) or getattr(
        tokenizer, "encode_batch", None
    )
    if encode_batch is not None:
        limit(tokenizer, max_length)
        return encode_batch
    if callable(tokenizer) and hasattr(tokenizer, "convert_tokens_to_ids"):  # a transformers tokenizer

        def encode(texts: list[str]) -> Sequence[Any]:
            encoded = tokenizer(texts, add_special_tokens=True, truncation=True, max_length=max_length)
            ids: Sequence[Any] = encoded["input_ids"]
            return ids

        return encode
    return lambda texts: [tokenizer.encode(text) for text in texts]


def limit(tokenizer: Any, max_length: int) -> None:
    """Have a `tokenizers.Tokenizer` cut by itself, so that a closing special token survives, and not pad."""
    if not (hasattr(tokenizer, "enable_truncation") and hasattr(tokenizer, "no_padding")):
        return
    tokenizer.no_padding()
    given = tokenizer.truncation or {}
    length = min(max_length, given.get("max_length", max_length))
    if length > tokenizer.num_special_tokens_to_add(False):
        tokenizer.enable_truncation(**{**given, "max_length": length})
