"""A prompt and its answer: one text, of whose tokens those of the answer are learnt.

The text is the prompt, a line's end unless it has one already, and the answer. Which tokens are the answer's is told by

- without a tokenizer: the bytes;
- a tokenizer that tells where in the text its tokens lie (tokenizers, the fast ones of transformers): a token is the
  answer's if it ends behind the prompt. One that has a bit of both is the answer's: what it says of the answer can be
  learnt nowhere else. What ends a text (a token with no place in it, behind the answer) is learnt too;
- any other: the prompt is tokenised once more, alone, and its tokens are those that the whole text begins with too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from shmloader.errors import DecodeError
from shmloader.processors.base import column_at
from shmloader.processors.text import IGNORED_LABEL, Ids, TextProcessor, batch_encoder, limit

log = logging.getLogger("shmloader.processors")

#: Prompt (with the line's end), and prompt and answer.
_Pair = tuple[str, str]


@dataclass(frozen=True)
class _Answered:
    """The ids of a text, and the number of the first that is the answer's (behind the last: none is)."""

    ids: Any
    start: int


class AnswerProcessor(TextProcessor):
    """Yields "text", int64 [length]: prompt and answer; and "labels", int64 [length]: -100 up to the answer.

    column: of the prompt, as `TextProcessor` takes it; conversations too are made a string. target: of the answer:
        strings, or lists of strings; a path. What is cut off at ``max_text_length`` is the end, so of a prompt that
        long all labels are -100; that is said once.
    train_on_prompt: labels are all tokens; they are the bytes of "text" then.
    tokenizer, max_text_length, vocab_size, multiple_of: as `TextProcessor`.
    """

    def __init__(
        self,
        column: str | tuple[str, ...],
        target: str,
        tokenizer: Any = None,
        max_text_length: int = 512,
        vocab_size: int | None = None,
        multiple_of: int = 1,
        train_on_prompt: bool = False,
    ) -> None:
        super().__init__(column, tokenizer, max_text_length, vocab_size, labels_from_text=True, multiple_of=multiple_of)
        text, labels = self.fields
        self.prompt_columns, self.target = self.columns, target
        self.columns = (*self.columns, target)
        self.train_on_prompt = train_on_prompt
        self.fields = (text, labels if train_on_prompt else replace(labels, same_as=None))
        self._encode_pairs: Callable[[list[_Pair]], Sequence[_Answered]] | None = None
        self._is_told = False

    def begin(self, batch: pa.RecordBatch) -> _AnswerRows:
        """Tokenise the rows of ``batch`` in one call, or one by one where that fails."""
        if self._encode_pairs is None:
            self._encode_pairs = _pair_encoder(self._tokenizer, self.max_text_length)
        columns = [column_at(batch, column) for column in self.columns]
        pairs: list[_Pair] = []
        positions: list[int] = []
        rows: list[_Answered | DecodeError] = []
        for position in range(batch.num_rows):
            pair = self._pair_of([column[position] for column in columns])
            if isinstance(pair, DecodeError):
                rows.append(pair)
                continue
            positions.append(position)
            pairs.append(pair)
            rows.append(_Answered(np.empty(0, np.int64), 0))
        answered = self._encode_all(self._encode_pairs, pairs, self._answered)
        for position, made in zip(positions, answered, strict=True):
            rows[position] = made
        return _AnswerRows(self, rows)

    def _pair_of(self, scalars: Sequence[Any]) -> _Pair | DecodeError:
        prompt = self._text_of(self.prompt_columns, scalars[:-1])
        answer = self._text_of((self.target,), scalars[-1:])
        for text in (prompt, answer):
            if isinstance(text, DecodeError):
                return text
        assert isinstance(prompt, str)
        assert isinstance(answer, str)
        if prompt and not prompt.endswith("\n"):
            prompt += "\n"
        return prompt, prompt + answer

    def _answered(self, made: _Answered) -> _Answered | DecodeError:
        ids = self._checked(made.ids)
        if isinstance(ids, DecodeError):
            return ids
        if made.start >= len(ids) == self.max_text_length and not self.train_on_prompt and not self._is_told:
            self._is_told = True
            log.warning(
                "a prompt fills max_text_length=%d, so that nothing is left of its answer and all its labels are %d; "
                "raise max_text_length of the config, or shorten prompts (told once by each prefetcher)",
                self.max_text_length,
                IGNORED_LABEL,
            )
        return _Answered(ids, made.start)


class _AnswerRows:
    def __init__(self, processor: AnswerProcessor, rows: list[_Answered | DecodeError]) -> None:
        self._processor = processor
        self._rows = rows

    def shapes(self, row: int) -> Mapping[str, tuple[int, ...]]:
        return {field.name: self._answered(row).ids.shape for field in self._processor.fields}

    def write(self, row: int, out: Mapping[str, Ids]) -> None:
        made = self._answered(row)
        np.copyto(out["text"], made.ids)
        if not self._processor.train_on_prompt:
            np.copyto(out["labels"], made.ids)
            out["labels"][: made.start] = IGNORED_LABEL

    def _answered(self, row: int) -> _Answered:
        made = self._rows[row]
        if isinstance(made, DecodeError):
            raise made
        return made


def _pair_encoder(tokenizer: Any, max_length: int) -> Callable[[list[_Pair]], Sequence[_Answered]]:
    """What tokenises pairs, in the most exact way that ``tokenizer`` has."""
    if tokenizer is None:
        return lambda pairs: [
            _Answered(np.frombuffer(whole.encode(), np.uint8), len(prompt.encode())) for prompt, whole in pairs
        ]
    if hasattr(tokenizer, "encode_batch") and hasattr(tokenizer, "enable_truncation"):  # a tokenizers.Tokenizer
        limit(tokenizer, max_length)

        def encode(pairs: list[_Pair]) -> Sequence[_Answered]:
            made = tokenizer.encode_batch([whole for _, whole in pairs])
            told = zip(made, pairs, strict=True)
            return [_placed(one.ids, one.offsets, prompt, max_length) for one, (prompt, _) in told]

        return encode
    if callable(tokenizer) and getattr(tokenizer, "is_fast", False):

        def encode_fast(pairs: list[_Pair]) -> Sequence[_Answered]:
            made = tokenizer(
                [whole for _, whole in pairs],
                add_special_tokens=True,
                truncation=True,
                max_length=max_length,
                return_offsets_mapping=True,
            )
            told = zip(made["input_ids"], made["offset_mapping"], pairs, strict=True)
            return [_placed(ids, offsets, prompt, max_length) for ids, offsets, (prompt, _) in told]

        return encode_fast
    return _by_prefix(batch_encoder(tokenizer, max_length))


def _placed(ids: Sequence[int], offsets: Sequence[tuple[int, int]], prompt: str, most: int) -> _Answered:
    """offsets: in characters; (0, 0) of tokens that are not in the text. most: ids of a text that may be cut."""
    behind = (i for i, (begin, end) in enumerate(offsets) if end > len(prompt) and end > begin)
    start = next(behind, len(ids))
    if start == len(ids) < most:  # the answer is empty, or the tokenizer drops what it is; what ends the text is not
        start = 1 + max((i for i, (begin, end) in enumerate(offsets) if end > begin), default=-1)
    return _Answered(ids, start)


def _by_prefix(encode: Callable[[list[str]], Sequence[Any]]) -> Callable[[list[_Pair]], Sequence[_Answered]]:
    def encode_twice(pairs: list[_Pair]) -> Sequence[_Answered]:
        made = encode([text for prompt, whole in pairs for text in (whole, prompt)])
        if len(made) != 2 * len(pairs):
            raise ValueError(f"the tokenizer made {len(made)} rows of {2 * len(pairs)}")
        return [_Answered(whole, _num_alike(whole, alone)) for whole, alone in zip(made[::2], made[1::2], strict=True)]

    return encode_twice


def _num_alike(whole: Any, alone: Any) -> int:
    """How many ids both begin with; what is wrong with them is told later."""
    first, second = (np.asarray(getattr(ids, "ids", ids)).reshape(-1) for ids in (whole, alone))
    num = min(len(first), len(second))
    differing = np.flatnonzero(first[:num] != second[:num])
    return int(differing[0]) if len(differing) else num
