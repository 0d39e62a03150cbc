"""Prompt and answer: one text, of whose tokens those of the answer are labels."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support_named import samples_in
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from shmloader import MultimodalConfig
from shmloader.errors import ColumnError, DecodeError
from shmloader.processors import build
from shmloader.processors.answer import AnswerProcessor
from shmloader.sources.base import Columns

PAIRS = [("add one to it", "x + 1"), ("say it in Greek: é", "Ω, 1"), ("", "all of it")]


def batch_of(**columns: list[Any]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


def made(pairs: list[tuple[Any, Any]], tokenizer: Any = None, **settings: Any) -> list[Any]:
    """(text, labels) of each pair, or its error."""
    processor = AnswerProcessor("q", "a", tokenizer, **settings)
    found = samples_in([processor], batch_of(q=[q for q, _ in pairs], a=[a for _, a in pairs]))
    return [s if isinstance(s, Exception) else (s["text"].tolist(), s["labels"].tolist()) for s in found]


@pytest.fixture
def bpe() -> Tokenizer:
    """Of bytes, with a token before and one behind each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    tokenizer.train_from_iterator(["add one to it", "say it in Greek, x + 1"] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def test_bytes_of_the_prompt_are_ignored_and_those_of_the_answer_learnt():
    for (prompt, answer), (text, labels) in zip(PAIRS, made(PAIRS), strict=True):
        head = (prompt + "\n").encode() if prompt else b""
        assert bytes(text) == head + answer.encode()
        assert labels == [-100] * len(head) + list(answer.encode())


def test_no_line_end_is_added_to_a_prompt_that_has_one():
    ((text, labels),) = made([("def f():\n", "    pass")])
    assert bytes(text) == b"def f():\n    pass"
    assert labels[:9] == [-100] * 9
    assert bytes(labels[9:]) == b"    pass"


def test_tokens_with_places_are_told_apart_by_them(bpe):
    for (prompt, answer), (text, labels) in zip(PAIRS, made(PAIRS, bpe), strict=True):
        head = f"{prompt}\n" if prompt else ""
        assert text == bpe.encode(head + answer).ids
        num = sum(label == -100 for label in labels)
        assert labels == [-100] * num + text[num:]
        assert bpe.decode(text[1:num]) == head
        assert labels[-1] == 1  # the end of the text is learnt
        assert bpe.decode(labels[num:-1]) == answer


def test_token_that_has_a_bit_of_both_is_the_answers():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "\nx": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\nx", "isolated")
    ((text, labels),) = made([("a", "x")], tokenizer)
    assert (text, labels) == ([0, 3], [-100, 3])


class Plain:
    """Words as their lengths, with an end; tells no places."""

    def encode(self, text: str) -> list[int]:
        return [*map(len, text.split()), 99]


def test_tokenizer_without_places_is_asked_for_the_prompt_alone():
    assert made([("one three", "four")], Plain()) == [([3, 5, 4, 99], [-100, -100, 4, 99])]
    assert made([("", "four")], Plain()) == [([4, 99], [4, 99])]
    assert made([("one", "")], Plain()) == [([3, 99], [-100, -100])]


class Slow(Plain):
    """As the tokenizers of transformers that are written in Python."""

    is_fast = False

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        raise AssertionError("only tells what it is")

    def __call__(self, texts: list[str], add_special_tokens: bool, truncation: bool, max_length: int) -> dict[str, Any]:
        return {"input_ids": [self.encode(text)[:max_length] for text in texts]}


class Fast(Slow):
    """As those written in Rust."""

    is_fast = True

    def __call__(self, texts: list[str], return_offsets_mapping: bool = False, **asked: Any) -> dict[str, Any]:
        assert return_offsets_mapping
        offsets = []
        for text in texts:
            at, found = 0, []
            for word in text.split():
                at = text.index(word, at)
                found.append((at, at + len(word)))
                at += len(word)
            offsets.append([*found, (0, 0)][: asked["max_length"]])
        return {**super().__call__(texts, **asked), "offset_mapping": offsets}


@pytest.mark.parametrize("tokenizer", [Slow(), Fast()], ids=["slow", "fast"])
def test_tokenizers_of_transformers_are_called_by_the_batch(tokenizer):
    assert made([("one three", "four six"), ("a", "b c")], tokenizer) == [
        ([3, 5, 4, 3, 99], [-100, -100, 4, 3, 99]),
        ([1, 1, 1, 99], [-100, 1, 1, 99]),
    ]


@pytest.mark.parametrize("name", [None, "bpe"])
def test_training_on_the_prompt_makes_labels_of_all_tokens_without_storing_them(name, request):
    tokenizer = name and request.getfixturevalue(name)
    for text, labels in made(PAIRS, tokenizer, train_on_prompt=True):
        assert labels == text
    assert AnswerProcessor("q", "a", train_on_prompt=True).fields[1].same_as == "text"
    assert AnswerProcessor("q", "a").fields[1].same_as is None


def test_labels_are_padded_with_ignored_ones_and_as_long_as_text():
    text, labels = AnswerProcessor("q", "a", max_text_length=9, multiple_of=4).fields
    assert (labels.name, labels.dtype, labels.shape, labels.pad, labels.mask) == (
        "labels",
        "int64",
        (None,),
        -100,
        None,
    )
    assert (labels.most, labels.multiple_of) == (text.most, text.multiple_of) == ((9,), 4)


def test_what_is_too_long_is_cut_at_the_end_and_a_prompt_that_fills_all_is_told_once(caplog):
    with caplog.at_level(logging.WARNING, "shmloader"):
        found = made([("abc", "def"), ("abcdef", "g"), ("abcdefgh", "i"), ("abcdefgh", "i")], max_text_length=5)
    assert [bytes(text) for text, _ in found] == [b"abc\nd", b"abcde", b"abcde", b"abcde"]
    assert [labels for _, labels in found] == [[-100] * 4 + [ord("d")]] + [[-100] * 5] * 3
    (record,) = caplog.records
    assert "a prompt fills max_text_length=5" in record.getMessage()


def test_closing_token_of_a_text_that_is_cut_in_its_prompt_is_not_learnt(bpe):
    ((text, labels),) = made([("add one to it, and one more", "x")], bpe, max_text_length=4)
    assert text[-1] == 1
    assert labels == [-100] * 4


@pytest.mark.parametrize(
    ("pair", "said"),
    [(("q", None), "column 'a' is null"), ((None, "a"), "column 'q' is null")],
)
def test_null_prompt_or_answer_is_an_error_of_its_row_alone(pair, said):
    bad, good = made([pair, ("x", "y")])
    assert isinstance(bad, DecodeError)
    assert said in str(bad)
    assert bytes(good[0]) == b"x\ny"


def test_row_that_cannot_be_tokenised_is_lost_alone():
    def encode(text: str) -> list[int]:
        if "bad" in text:
            raise ValueError("I do not like it")
        return list(text.encode())

    bad, good = made([("bad", "a"), ("ok", "a")], SimpleNamespace(encode=encode))
    assert "I do not like it" in str(bad)
    assert good[1] == [-100] * 3 + [97]


def samples(columns: Columns, **data: list[Any]) -> list[Any]:
    return samples_in(build(columns, MultimodalConfig()), batch_of(**data))


@pytest.mark.parametrize(("number", "item"), [(2, "c"), ("0", "a"), ("B", "b"), ("c", "c"), (" 1 ", "b")], ids=repr)
def test_item_of_a_list_is_chosen_by_its_number_or_letter(number, item):
    columns = Columns(text=("q", "options"), target="options[right]")
    (sample,) = samples(columns, q=["which"], options=[["a", "b", "c"]], right=[number])
    assert bytes(sample["text"].astype(np.uint8)).decode() == f"which\na\nb\nc\n{item}"
    assert sample["labels"].tolist() == [-100] * 12 + [ord(item)]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (3, "there is no item 3: it has 3"),
        (-1, "there is no item -1"),
        ("xy", "neither a number nor a letter"),
        (None, "null"),
    ],
    ids=repr,
)
def test_number_of_no_item_is_an_error_of_its_row_alone(number, said):
    columns = Columns(text="q", target="options[right]")
    numbers = [number, "a" if isinstance(number, str) else 0]
    bad, good = samples(columns, q=["w", "w"], options=[["a", "b", "c"]] * 2, right=numbers)
    assert isinstance(bad, DecodeError)
    assert said in str(bad)
    assert good["labels"].tolist() == [-100, -100, ord("a")]


def test_choice_may_be_the_text_itself_and_lie_inside_columns():
    columns = Columns(text="mc.choices[mc.gold]")
    (sample,) = samples(columns, mc=[{"choices": ["yes", "no"], "gold": 1}])
    assert bytes(sample["text"].astype(np.uint8)) == b"no"


def test_answer_may_be_lines_and_the_prompt_a_conversation():
    chat = [[{"role": "user", "content": "hi"}]]
    (sample,) = samples(Columns(text="chat", target="lines"), chat=chat, lines=[["one", "two"]])
    assert bytes(sample["text"].astype(np.uint8)) == b"user: hi\none\ntwo"
    assert sample["labels"].tolist()[:9] == [-100] * 9


def test_target_without_text_is_an_error():
    with pytest.raises(ColumnError, match="a target is the answer to text"):
        build(Columns(image="i", target="a"), MultimodalConfig())
