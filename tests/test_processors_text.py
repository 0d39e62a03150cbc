from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from shmloader.errors import ColumnError, DecodeError, OptionError
from shmloader.processors import build, schema_of
from shmloader.processors.text import TextProcessor, check_tokenizer
from shmloader.sample import RecordLayout
from shmloader.sources.base import Columns

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture
def tokenizer():
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
    made.train_from_iterator([" ".join(WORDS)], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


@pytest.fixture
def bpe_tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    return made


class FakeTransformersTokenizer:
    """What a transformers tokenizer does, as far as it is used."""

    pad_token_id = 7

    def __init__(self):
        self.calls = []

    def encode(self, text):
        raise AssertionError("is called by the batch")

    def convert_tokens_to_ids(self, tokens):
        raise AssertionError("only tells what it is")

    def __call__(self, texts, add_special_tokens, truncation, max_length):
        assert add_special_tokens
        assert truncation
        self.calls.append(list(texts))
        if any("bad" in text for text in texts):
            raise ValueError("I do not like it")
        ids = [[*[1, *map(len, text.split())][: max_length - 1], 2] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def batch_of(texts, kind=None):
    return pa.RecordBatch.from_arrays([pa.array(texts, kind or pa.string())], ["story"])


def samples_of(processor, batch):
    """Each row's fields as they lie in a record, or the error that it raised."""
    rows = processor.begin(batch)
    schema = schema_of([processor], "here")
    found = []
    for row in range(batch.num_rows):
        try:
            layout = RecordLayout(schema, rows.shapes(row))
            out = layout.arrays(memoryview(bytearray(layout.num_bytes)))
            rows.write(row, out)
            found.append(out["text"].tolist())
            assert out["text"].dtype == np.int64
        except DecodeError as error:
            found.append(error)
    return found


def encoder(encode, **attributes):
    return SimpleNamespace(encode=encode, **attributes)


def test_text_without_a_tokenizer_is_its_utf8_bytes():
    assert samples_of(TextProcessor("story"), batch_of(["ab", "", "ü"])) == [[97, 98], [], [0xC3, 0xBC]]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_arrow_kinds_of_text_are_read(kind):
    assert samples_of(TextProcessor("story"), batch_of(["ab", "c"], kind)) == [[97, 98], [99]]


def test_a_slice_of_a_batch_yields_its_own_rows():
    assert samples_of(TextProcessor("story"), batch_of(["a", "b", "c"]).slice(1, 2)) == [[98], [99]]


def test_the_field_is_padded_int64_with_a_mask():
    (field,) = TextProcessor("story").fields
    assert (field.name, field.dtype, field.shape) == ("text", "int64", (None,))
    assert (field.pad, field.mask, field.same_as) == (0, "attention_mask", None)


def test_labels_of_a_causal_model_share_the_ids():
    processor = TextProcessor("story", labels_from_text=True)
    _, labels = processor.fields
    assert (labels.name, labels.dtype, labels.pad, labels.same_as) == ("labels", "int64", -100, "text")
    assert processor.begin(batch_of(["abc"])).shapes(0) == {"text": (3,), "labels": (3,)}
    assert samples_of(processor, batch_of(["abc"])) == [[97, 98, 99]]


def test_text_is_truncated():
    assert samples_of(TextProcessor("story", max_text_length=2), batch_of(["abcdef"])) == [[97, 98]]


def test_a_tokenizers_tokenizer_encodes_as_it_does_itself(bpe_tokenizer):
    texts = ["the quick fox", "", "ünknown wörds", "dog " * 30]
    expected = [bpe_tokenizer.encode(text).ids for text in texts]
    assert samples_of(TextProcessor("story", bpe_tokenizer, vocab_size=300), batch_of(texts)) == expected


def test_truncation_keeps_the_closing_special_token(tokenizer):
    ((*_, last),) = samples_of(TextProcessor("story", tokenizer, max_text_length=4), batch_of([" ".join(WORDS)]))
    assert last == tokenizer.token_to_id("[SEP]")


def test_a_length_below_the_special_tokens_is_kept_all_the_same(tokenizer):
    assert samples_of(TextProcessor("story", tokenizer, max_text_length=1), batch_of(["the dog"])) == [[1]]


def test_a_shorter_truncation_of_the_tokenizer_is_kept(tokenizer):
    tokenizer.enable_truncation(3)
    assert len(samples_of(TextProcessor("story", tokenizer), batch_of(["the lazy dog jumps"]))[0]) == 3


def test_padding_of_the_tokenizer_does_not_become_tokens(tokenizer):
    pad_id = tokenizer.token_to_id("[PAD]")
    tokenizer.enable_padding(pad_id=pad_id, pad_token="[PAD]")
    processor = TextProcessor("story", tokenizer)
    assert [len(ids) for ids in samples_of(processor, batch_of(["dog", "the lazy dog"]))] == [3, 5]
    assert processor.fields[0].pad == pad_id


def test_making_a_processor_leaves_the_tokenizer_as_it_was(tokenizer):
    tokenizer.enable_padding()
    before = tokenizer.to_str()
    TextProcessor("story", tokenizer, max_text_length=4)
    assert tokenizer.to_str() == before


def test_the_pad_id_is_that_of_the_pad_token(tokenizer):
    assert TextProcessor("story", tokenizer).fields[0].pad == 3


def test_a_tokenizer_without_encode_batch_fast_is_called_by_encode_batch(tokenizer):
    calls = []

    def encode_batch(texts):
        calls.append(texts)
        return tokenizer.encode_batch(texts)

    old = encoder(tokenizer.encode, encode_batch=encode_batch)
    assert samples_of(TextProcessor("story", old), batch_of(["dog", "a"])) == [
        tokenizer.encode("dog").ids,
        tokenizer.encode("a").ids,
    ]
    assert calls == [["dog", "a"]]


def test_a_transformers_tokenizer_is_called_once_for_all_rows():
    fake = FakeTransformersTokenizer()
    processor = TextProcessor("story", fake, max_text_length=4)
    assert samples_of(processor, batch_of(["the lazy dog here", None, "a"]))[::2] == [[1, 3, 4, 2], [1, 1, 2]]
    assert fake.calls == [["the lazy dog here", "a"]]
    assert processor.fields[0].pad == 7


def test_a_text_that_the_tokenizer_refuses_spoils_only_its_own_row():
    good, bad, also_good = samples_of(TextProcessor("story", FakeTransformersTokenizer()), batch_of(["a", "bad", "ab"]))
    assert (good, also_good) == ([1, 1, 2], [1, 2, 2])
    assert "ValueError: I do not like it" in str(bad)
    assert isinstance(bad.__cause__, ValueError)
    assert bad.field == "text"


def test_a_batch_call_that_loses_a_row_is_repeated_by_row():
    def encode_batch(texts):
        return [[len(text)] for text in texts if text != "lost"]

    lossy = encoder(None, encode_batch=encode_batch)
    lossy.encode = lambda text: [0]
    first, lost, last = samples_of(TextProcessor("story", lossy), batch_of(["a", "lost", "abc"]))
    assert (first, last) == ([1], [3])
    assert "made 0 rows of 1" in str(lost)


class FakeTensor:
    def tolist(self):
        return [4, 5]


@pytest.mark.parametrize(
    "value",
    [[4, 5], (4, 5), np.array([4, 5], np.int32), SimpleNamespace(ids=[4, 5]), FakeTensor()],
    ids=["list", "tuple", "numpy", "encoding", "tensor"],
)
def test_ids_may_come_in_any_form(value):
    assert samples_of(TextProcessor("story", encoder(lambda text: value)), batch_of(["x"])) == [[4, 5]]


@pytest.mark.parametrize("value", [[0.5], ["a"], [[1, 2]], [[1], [2, 3]], 5, None, [None], [2**70], [True]])
def test_ids_that_are_no_flat_list_of_ints_are_an_error(value):
    (error,) = samples_of(TextProcessor("story", encoder(lambda text: value)), batch_of(["x"]))
    assert isinstance(error, DecodeError)
    assert "flat list of ints" in str(error)


@pytest.mark.parametrize("bad", [100, -1])
def test_an_id_outside_the_vocabulary_names_id_size_and_column(bad):
    processor = TextProcessor("story", encoder(lambda text: [5, bad] if text == "x" else [99]), vocab_size=100)
    error, good = samples_of(processor, batch_of(["x", "y"]))
    assert good == [99]
    for part in (f"token id {bad}", "has 100", "'story'"):
        assert part in str(error)


def test_a_null_text_is_an_error_of_its_row_only():
    error, good = samples_of(TextProcessor("story"), batch_of([None, "a"]))
    assert good == [97]
    assert "'story' is null" in str(error)
    assert (error.field, error.column) == ("text", "story")


def test_invalid_utf8_is_an_error_of_its_row_only():
    raw = pa.array([b"\xff\xfe", b"ok"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    error, good = samples_of(TextProcessor("story"), pa.RecordBatch.from_arrays([broken], ["story"]))
    assert good == [111, 107]
    assert "not valid UTF-8" in str(error)


def test_a_column_that_is_not_text_is_named_with_its_kind():
    (error,) = samples_of(TextProcessor("story"), batch_of([3], pa.int32()))
    assert "holds int32, not text" in str(error)


@pytest.mark.parametrize("wrong", ["gpt2", 5, lambda text: [1], SimpleNamespace(encode=3), Tokenizer])
def test_what_is_no_tokenizer_is_refused(wrong):
    with pytest.raises(OptionError, match="encode") as caught:
        check_tokenizer(wrong)
    assert caught.value.name == "tokenizer"


def test_none_and_any_tokenizer_are_accepted(tokenizer):
    check_tokenizer(None)
    check_tokenizer(tokenizer)
    check_tokenizer(FakeTransformersTokenizer())


def test_no_length_is_refused():
    with pytest.raises(OptionError, match="max_text_length"):
        TextProcessor("story", max_text_length=0)


def test_a_copied_tokenizer_works_as_the_original(tokenizer):
    texts = ["the dog", "a fox"]
    there = samples_of(TextProcessor("story", copy.deepcopy(tokenizer)), batch_of(texts))
    assert there == [tokenizer.encode(text).ids for text in texts]


CONFIG = SimpleNamespace(vocab_size=300, vision_dim=32)


def test_text_alone_is_a_causal_model_s_dataset():
    schema = schema_of(build(Columns(text="story"), CONFIG), "tales")
    assert [field.name for field in schema.fields] == ["text", "labels"]
    assert (schema.task_types, schema.sources) == (("text",), ("tales",))


def test_text_with_a_class_is_no_causal_model_s():
    schema = schema_of(build(Columns(text="story", labels="genre", class_names=("a", "b")), CONFIG), "tales")
    assert [(field.name, field.same_as, field.shape) for field in schema.fields] == [
        ("text", None, (None,)),
        ("labels", None, ()),
    ]


def test_text_with_an_image_is_vision_and_text():
    schema = schema_of(build(Columns(text="story", image="photo"), CONFIG), "tales")
    assert [field.name for field in schema.fields] == ["text", "labels", "image"]
    assert schema.task_types == ("vision_text",)


def test_settings_of_the_config_reach_the_processor():
    config = SimpleNamespace(vocab_size=98, vision_dim=32, max_text_length=2)
    (processor,) = build(Columns(text="story"), config)
    good, bad = samples_of(processor, batch_of(["aaaa", "abc"]))
    assert good == [97, 97]
    assert "has 98" in str(bad)


def test_no_usable_column_is_an_error_that_names_the_settings():
    with pytest.raises(ColumnError, match="columns"):
        build(Columns(), CONFIG)


def test_text_needs_no_image_decoder_no_torch_and_no_datasets():
    check = (
        "import sys; from types import SimpleNamespace as S; from shmloader.processors import build, schema_of;"
        "columns = S(text='t', image=None, audio=None, labels='l', target=None, class_names=None);"
        "schema_of(build(columns, S(vocab_size=9, vision_dim=8)), 's');"
        "wrong = {'torch', 'datasets', 'PIL', 'simplejpeg', 'cykooz_resizer', 'soundfile', 'soxr', 'tokenizers',"
        "'shmloader.sources'};"
        "sys.exit(', '.join(wrong & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
