"""What can be text beside a string: lists, conversations, several columns, and what is inside of columns."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from shmloader import MultimodalConfig
from shmloader.errors import DecodeError, OptionError
from shmloader.processors import build
from shmloader.processors.base import column_at
from shmloader.processors.label import LabelProcessor
from shmloader.processors.text import TextProcessor
from shmloader.processors.text_value import chat_of, text_of
from shmloader.sources.base import Columns

STRINGS = pa.list_(pa.string())
CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())]))
SHAREGPT = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


def texts_of(columns, names=None, tokenizer=None, **settings):
    """Each row's text as its bytes say, its ids where a tokenizer made them, or the error that it raised."""
    batch = columns if isinstance(columns, pa.RecordBatch) else pa.record_batch(columns)
    processor = TextProcessor(names or tuple(columns), tokenizer, **settings)
    rows = processor.begin(batch)
    found = []
    for row in range(batch.num_rows):
        try:
            out = {"text": np.empty(rows.shapes(row)["text"], np.int64)}
            rows.write(row, out)
            found.append(out["text"].tolist() if tokenizer else bytes(out["text"].astype(np.uint8)).decode())
        except DecodeError as error:
            found.append(error)
    return found


def test_a_list_of_strings_is_joined_by_lines_however_nested():
    column = pa.array([["a", "b"], [], ["c", None, ""], [None], None], STRINGS)
    *good, nulls, null = texts_of({"it": column})
    assert good == ["a\nb", "", "c\n"]
    assert "'it' is null" in str(nulls)
    assert "'it' is null" in str(null)
    assert texts_of({"it": pa.array([[["a"], ["b", "c"]], [None, ["d"]]], pa.list_(STRINGS))}) == ["a\nb\nc", "d"]


def test_several_columns_are_joined_in_the_order_given_without_null_and_empty_ones():
    columns = {
        "say": pa.array(["x", "x", "x", None, None, ""]),
        "more": pa.array(["y", "", None, "y", None, ""]),
        "list": pa.array([["z", "z"], ["z"], [], None, None, None], STRINGS),
    }
    *good, null, empty = texts_of(columns, ("more", "say", "list"))
    assert good == ["y\nx\nz\nz", "x\nz", "x", "y"]
    assert "text of columns 'more', 'say', 'list' are all null" in str(null)
    assert null.column == ("more", "say", "list")
    assert empty == ""


def test_the_column_at_fault_is_named_among_several():
    (error,) = texts_of({"a": pa.array(["x"]), "b": pa.array([3])})
    assert "column 'b' holds int64, not text" in str(error)
    assert error.column == "b"


@pytest.mark.parametrize(
    "column",
    [pa.array([[1]]), pa.array([["a"], [1.5]][1:]), pa.array([{"x": "a"}]), pa.array([[{"x": "a"}]]), pa.array([True])],
    ids=["ints", "floats", "struct", "structs", "bool"],
)
def test_what_is_no_text_is_an_error_that_says_what_it_is(column):
    (error,) = texts_of({"it": column})
    assert f"holds {column.type}, not text" in str(error)


def test_a_conversation_without_a_template_becomes_lines_of_role_and_content():
    turns = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello\nyou"}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    assert texts_of({"it": pa.array(turns, CHAT)}) == ["user: hi\nassistant: hello\nyou", "assistant: ", ""]
    shared = [[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}, {"from": "tool", "value": "5"}]]
    assert texts_of({"it": pa.array(shared, SHAREGPT)}) == ["user: hi\nassistant: yo\ntool: 5"]


def test_a_conversation_of_lists_side_by_side_is_one():
    side_by_side = pa.array([{"role": ["user", "assistant"], "content": ["a", "b"]}])
    assert texts_of({"it": side_by_side}) == ["user: a\nassistant: b"]


def test_a_conversation_beside_another_column_is_joined_as_text():
    turns = pa.array([[{"role": "user", "content": "hi"}]], CHAT)
    assert texts_of({"system": pa.array(["be kind"]), "turns": turns}) == ["be kind\nuser: hi"]


def test_the_text_of_a_message_in_parts_is_that_of_its_parts():
    parts = [{"type": "text", "text": "look"}, {"type": "image", "text": None}, {"type": "text", "text": "here"}]
    assert text_of([{"role": "user", "content": parts}]) == "user: look\nhere"
    with pytest.raises(TypeError):
        text_of([{"role": "user", "content": 5}])


def test_messages_lack_what_is_null_in_them():
    (chat,) = pa.array([[{"role": "user", "content": "hi", "name": None}]], CHAT).to_pylist()
    assert chat_of(chat) == [{"role": "user", "content": "hi"}]
    for other in (None, [], "text", ["text"], [{"role": "user"}], [{"role": 5, "content": "x"}], {"a": 1}, {}):
        assert chat_of(other) is None


class Templated:
    """A tokenizer with a chat template, as those of transformers are called."""

    chat_template = "{{ messages }}"
    pad_token_id = 0

    def __init__(self):
        self.chats = []

    def encode(self, text):
        return [len(text)]

    def apply_chat_template(self, messages, *, tokenize, return_dict, truncation, max_length):
        assert tokenize
        assert truncation
        assert not return_dict
        if messages[0]["role"] != "user":
            raise ValueError("must begin with the user")
        self.chats.append(messages)
        return [100 + len(message["content"]) for message in messages][:max_length]


def test_a_conversation_goes_through_the_tokenizer_s_template():
    tokenizer = Templated()
    turns = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        [{"role": "assistant", "content": "no"}],
        None,
    ]
    good, refused, null = texts_of({"it": pa.array(turns, CHAT)}, tokenizer=tokenizer)
    assert good == [102, 105]
    assert tokenizer.chats == [turns[0]]
    assert "chat template: ValueError: must begin with the user" in str(refused)
    assert isinstance(refused.__cause__, ValueError)
    assert "is null" in str(null)
    assert texts_of({"it": pa.array(["plain"])}, tokenizer=tokenizer) == [[5]]
    (short,) = texts_of({"it": pa.array(turns[:1], CHAT)}, tokenizer=tokenizer, max_text_length=1)
    assert short == [102]


def test_ids_of_a_template_are_checked_as_all_others():
    (error,) = texts_of(
        {"it": pa.array([[{"role": "user", "content": "hi"}]], CHAT)}, tokenizer=Templated(), vocab_size=50
    )
    assert "token id 102" in str(error)


def test_a_tokenizer_whose_template_is_not_set_takes_the_lines():
    tokenizer = Templated()
    tokenizer.chat_template = None
    turns = pa.array([[{"role": "user", "content": "hi"}]], CHAT)
    assert texts_of({"it": turns}, tokenizer=tokenizer) == [[len("user: hi")]]


def test_an_id_outside_the_vocabulary_tells_both_numbers_and_what_to_do():
    (error,) = texts_of({"it": pa.array(["a"])}, tokenizer=SimpleNamespace(encode=lambda text: [5, 70]), vocab_size=64)
    assert (error.id, error.vocab_size, error.column) == (70, 64, "it")
    assert "token id 70, which is out of range; the vocabulary has 64 (config.vocab_size)" in str(error)
    assert "Give the tokenizer that the model was made for, or set vocab_size" in str(error)


NESTED = pa.struct([("text", STRINGS), ("deep", pa.struct([("n", pa.int64())]))])


def test_text_inside_a_struct_is_found_by_its_path():
    answers = pa.array([None, {"text": ["a", "b"], "deep": None}, {"text": None}, None], NESTED).slice(1)
    good, *nulls = texts_of(pa.record_batch({"answers": answers}), "answers.text")
    assert good == "a\nb"
    assert all("'answers.text' is null" in str(null) for null in nulls)


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda inner: pa.list_(inner, 2)])
def test_text_inside_lists_of_structs_is_found_by_its_path(kind):
    of = pa.struct([("said", pa.string()), ("n", pa.int64())])
    rows = [[{"said": "x"}, {"said": "y"}], None, [{"said": "a"}, None], [{"said": "b"}, {"said": "c"}]]
    column = pa.array(rows, kind(of)).slice(1)
    null, *good = texts_of(pa.record_batch({"turns": column}), "turns.said")
    assert good == ["a", "b\nc"]
    assert "is null" in str(null)


def test_text_inside_lists_in_lists_is_found_by_its_path():
    column = pa.array([[[{"said": "a"}], [{"said": "b"}, {"said": "c"}]], [[], [{"said": "d"}]]])
    assert texts_of(pa.record_batch({"all": column}), "all.said") == ["a\nb\nc", "d"]


def test_a_column_whose_name_has_the_dots_comes_first():
    batch = pa.record_batch({"a": pa.array([{"b": "inner"}]), "a.b": pa.array(["own"])})
    assert column_at(batch, "a.b").to_pylist() == ["own"]
    for path in ("a.c", "c", "a.b.c"):
        with pytest.raises(KeyError):
            column_at(batch, path)


def test_a_label_inside_a_struct_is_found_by_its_path():
    rows = LabelProcessor("it.deep.n").begin(pa.record_batch({"it": pa.array([{"deep": {"n": 7}}, None], NESTED)}))
    out = {"labels": np.empty((), np.int64)}
    rows.write(0, out)
    assert out["labels"] == 7
    with pytest.raises(DecodeError, match=r"'it\.deep\.n' is null"):
        rows.shapes(1)


def test_padded_lengths_are_rounded_as_the_config_says():
    text, labels = build(Columns(text="it"), MultimodalConfig(pad_to_multiple_of=8))[0].fields
    assert (text.multiple_of, labels.multiple_of) == (8, 8)
    assert (labels.pad, labels.mask, labels.same_as) == (-100, None, "text")
    assert build(Columns(text="it"), MultimodalConfig())[0].fields[0].multiple_of == 1
    assert build(Columns(text="it"), SimpleNamespace(vocab_size=None))[0].fields[0].multiple_of == 1
    for bad in (0, -8, 2.0, True):
        with pytest.raises(OptionError, match="pad_to_multiple_of"):
            build(Columns(text="it"), MultimodalConfig(pad_to_multiple_of=bad))
