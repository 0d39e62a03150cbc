"""Lengths that differ in a batch: rounded up to a multiple, padded in dicts of wrappers, nested, listed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import opened, text_of
from support_batches import PAD, Records, records, row, tokens
from support_collate import WORKERS, Wrapper, first_batch, ragged
from torch.utils.data import DataLoader, Subset, default_collate

from shmloader import ShmloaderError, ShmMultimodalDataset
from shmloader.collate import PADDED, Lengths, collate_as
from shmloader.errors import OptionError
from shmloader.sample import Field
from shmloader.tokens import batch_ring

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def texts(texts_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened(texts_path) as made:
        yield made


@pytest.fixture(scope="module")
def eights() -> Iterator[Records]:
    """Texts of 1 to 20 tokens, whose batches are to be of 8, 16, … tokens."""
    fields = tokens(multiple_of=8)
    with records(fields, [row(i, fields) for i in range(20)]) as made:
        yield made


def longer(sample: Any, i: int) -> None:
    sample["text"] = torch.cat([sample["text"], torch.tensor([5])])


def as_dict(sample: Any, i: int) -> Any:
    return {**sample, "number": i}


def with_boxes(sample: Any, i: int) -> Any:
    """A field that no schema knows, of i rows."""
    return {**sample, "boxes": torch.full((i, 4), float(i))}


def assert_texts(batch: Any, rows: list[int], width: int) -> None:
    """Of `texts_path`, as bytes."""
    lengths = [len(text_of(i)) for i in rows]
    assert batch["text"].shape == batch["labels"].shape == batch["attention_mask"].shape == (len(rows), width)
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (width - n) for n in lengths]
    assert [bytes(text[:n].tolist()).decode() for text, n in zip(batch["text"], lengths, strict=True)] == [
        text_of(i) for i in rows
    ]
    assert all((label[n:] == -100).all() for label, n in zip(batch["labels"], lengths, strict=True))


# -- rounded up --------------------------------------------------------------------------------------------


@WORKERS
@pytest.mark.parametrize(("rows", "width"), [([0, 4], 8), ([7], 8), ([8, 0], 16), ([19], 24)])
def test_padded_length_is_the_next_multiple(eights: Any, rows: list[int], width: int, num_workers: int) -> None:
    batch = first_batch(Subset(eights, rows), num_workers, batch_size=len(rows))
    for name in ("text", "labels", "attention_mask"):
        assert batch[name].shape == (len(rows), width)
    assert batch["attention_mask"].sum(1).tolist() == [i + 1 for i in rows]
    n = rows[0] + 1
    assert batch["text"][0].tolist() == [*range(10 * rows[0], 10 * rows[0] + n), *[PAD] * (width - n)]
    assert batch["labels"][0, n:].eq(-100).all()


@WORKERS
def test_values_are_padded_to_the_multiple_too(eights: Any, num_workers: int) -> None:
    batch = first_batch(Wrapper(Subset(eights, [7, 0]), longer), num_workers, batch_size=2)
    assert batch["text"].shape == batch["attention_mask"].shape == (2, 16)
    assert batch["labels"].shape == (2, 8)  # still the records'
    assert batch["text"][1].tolist() == [0, 5, *[PAD] * 14]


def test_only_padded_dimensions_are_rounded_up() -> None:
    fields = (
        Field("fixed", "int64", (3,), pad=0, multiple_of=8),
        Field("same", "int64", (None,), multiple_of=8),
        Field("matrix", "int64", (None, 3), pad=0, multiple_of=8),
    )
    values = {"fixed": np.arange(3), "same": np.arange(5), "matrix": np.ones((2, 3), np.int64)}
    with records(fields, [values, values]) as made:
        for batch in (default_collate(made.__getitems__([0, 1])), collate_as(made.face, PADDED, [dict(made[0])] * 2)):
            assert [batch[name].shape for name in ("fixed", "same", "matrix")] == [(2, 3), (2, 5), (2, 8, 3)]


@WORKERS
@pytest.mark.parametrize("change", [lambda sample, i: None, longer, as_dict], ids=["gathered", "longer", "dicts"])
def test_collate_with_another_multiple(eights: Any, change: Any, num_workers: int) -> None:
    """Whether the samples are the dataset's or dicts made of them."""
    function = partial(collate_as, eights.face, Lengths.parse(32, None))
    batch = first_batch(Wrapper(eights, change), num_workers, batch_size=4, collate_fn=function)
    assert {batch[name].shape[1] for name in ("text", "labels", "attention_mask")} == {32}
    batch = collate_as(eights.face, Lengths.parse(1, None), eights.__getitems__([0, 2]))
    assert batch["text"].shape == (2, 3)


# -- what wrappers made ------------------------------------------------------------------------------------


def test_collate_of_a_dataset_pads_and_masks_dicts_that_a_wrapper_made(texts: Any) -> None:
    rows = [3, 1, 0, 8]
    wrapped = Wrapper(texts, as_dict)
    batch = texts.collate([wrapped[i] for i in rows])
    assert_texts(batch, rows, max(len(text_of(i)) for i in rows))
    assert batch["number"].tolist() == rows
    assert batch["source"] == [texts.name] * 4


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_collate_of_a_dataset_travels_to_workers(texts: Any, method: str) -> None:
    """Beside the dataset, in whatever wraps it; batches come in slots."""
    ring = batch_ring()
    assert ring is not None
    before = ring.counters.inline
    kwargs = {"batch_size": 4, "num_workers": 1, "multiprocessing_context": method}
    for batch in DataLoader(Wrapper(Subset(texts, range(4)), as_dict), collate_fn=texts.collate, **kwargs):
        assert_texts(batch, [0, 1, 2, 3], max(len(text_of(i)) for i in range(4)))
    function = texts.collate_with(pad_to_multiple_of=16, ragged={"boxes": "nested"})
    for batch in DataLoader(Wrapper(Subset(texts, range(4)), with_boxes), collate_fn=function, **kwargs):
        assert_texts(batch, [0, 1, 2, 3], 32)
        assert [len(boxes) for boxes in batch["boxes"].unbind()] == [0, 1, 2, 3]
    assert ring.counters.inline == before


def test_collate_of_a_dataset_is_the_default_one_for_its_samples(texts: Any) -> None:
    samples = texts.__getitems__([2, 5])
    assert_texts(texts.collate(samples), [2, 5], max(len(text_of(i)) for i in (2, 5)))
    assert all(sample.is_untouched() for sample in samples)


def test_collate_of_a_dataset_takes_samples_and_dicts_at_once(texts: Any) -> None:
    sample = texts[2]
    batch = texts.collate([dict(texts[0]), texts[1], sample, texts[3]])
    assert_texts(batch, [0, 1, 2, 3], max(len(text_of(i)) for i in range(4)))


def test_samples_may_lie_in_tuples_and_lists(texts: Any) -> None:
    samples, numbers = texts.collate([({**texts[i], "x": 1}, i) for i in (0, 1)])
    assert_texts(samples, [0, 1], max(len(text_of(i)) for i in (0, 1)))
    assert numbers.tolist() == [0, 1]


def test_a_dict_within_a_sample_is_not_a_sample(texts: Any) -> None:
    """Its "text" is none of the dataset's."""
    with pytest.raises(ShmloaderError, match=r"'meta.text' cannot be made a batch: .* shape \[1\].* \[2\]"):
        texts.collate([{**texts[i], "meta": {"text": torch.zeros(i + 1)}} for i in range(2)])


def test_collate_works_before_a_process_told_the_schema_and_after_the_end(rows_path: str, make_dataset: Any) -> None:
    dataset = make_dataset(rows_path, process=ragged)
    samples = [{**dataset[i], "n": i} for i in range(3)]
    dataset.collate(samples)
    dataset.close()
    batch = dataset.collate(samples)
    assert batch["labels"].tolist() == [[-100, -100], [0, -100], [0, 1]]
    assert batch["attention_mask"].sum(1).tolist() == [1, 2, 3]


# -- nested and listed -------------------------------------------------------------------------------------


@WORKERS
def test_nested_fields_are_jagged_tensors_without_padding(texts: Any, num_workers: int) -> None:
    function = texts.collate_with(ragged={"text": "nested", "labels": "nested"})
    batch = first_batch(texts, num_workers, collate_fn=function)
    assert batch["text"].is_nested
    assert batch["text"].layout == torch.jagged
    assert [bytes(text.tolist()).decode() for text in batch["text"].unbind()] == [text_of(i) for i in range(4)]
    assert torch.equal(batch["labels"].values(), batch["text"].values())
    assert list(batch) == ["text", "labels", "task_type", "source"]


def test_nested_batches_come_in_slots_and_outlive_them(texts: Any) -> None:
    ring = batch_ring()
    assert ring is not None
    before = ring.counters.inline
    function = texts.collate_with(ragged={"text": "nested"})
    batches = list(DataLoader(texts, batch_size=10, num_workers=2, collate_fn=function))
    assert ring.counters.inline == before
    assert ring.counters.copied > 0  # more than a worker's slots
    found = [bytes(text.tolist()).decode() for batch in batches for text in batch["text"].unbind()]
    assert found == [text_of(i) for i in range(100)]
    batches[0]["text"].values().zero_()  # they may be written to


def test_nested_fields_of_bytes_go_through_the_pipe(texts: Any) -> None:
    """What a collate function makes of them after is pickled by value."""
    function = texts.collate_with(ragged={"boxes": "nested", "text": "list"})
    batch = first_batch(Wrapper(texts, with_boxes), 1, collate_fn=partial(_renamed, function))
    assert [boxes[:, 0].tolist() for boxes in batch["b"].unbind()] == [[], [1.0], [2.0] * 2, [3.0] * 3]
    assert [len(text) for text in batch["t"]] == [len(text_of(i)) for i in range(4)]


def _renamed(function: Any, samples: Any) -> Any:
    batch = function(samples)
    batch["b"], batch["t"] = batch.pop("boxes").clone(), batch.pop("text")
    return batch


@WORKERS
def test_lists_keep_the_values_as_they_are(texts: Any, num_workers: int) -> None:
    def with_objects(sample: Any, i: int) -> Any:
        return {**sample, "thing": None if i % 2 else {"box": torch.ones(i, 2)}}

    function = texts.collate_with(ragged={"thing": "list", "text": "list"})
    batch = first_batch(Wrapper(texts, with_objects), num_workers, collate_fn=function)
    assert [bytes(text.tolist()).decode() for text in batch["text"]] == [text_of(i) for i in range(4)]
    assert [None if thing is None else thing["box"].shape for thing in batch["thing"]] == [(0, 2), None, (2, 2), None]


def test_fields_that_a_wrapper_added_are_padded_if_asked_for(texts: Any) -> None:
    function = texts.collate_with(ragged={"boxes": "pad", "meta.points": "pad"})
    wrapped = Wrapper(texts, lambda s, i: {**with_boxes(s, i), "meta": {"points": torch.ones(3 - i)}})
    batch = function([wrapped[i] for i in range(3)])
    assert batch["boxes"].shape == (3, 2, 4)
    assert batch["boxes"][:, :, 0].tolist() == [[0, 0], [1, 0], [2, 2]]
    assert batch["meta"]["points"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_modes_are_for_what_is_in_dicts_too(texts: Any) -> None:
    """Of whatever kind, and in dicts in dicts."""
    function = texts.collate_with(ragged={"m.list": "list", "m.ids": "nested", "m.in.boxes": "list", "m.in.n": "pad"})
    deep = [{"boxes": torch.ones(i, 4), "n": np.arange(i)} for i in range(3)]
    found = function([{**texts[i], "m": {"list": [i] * i, "ids": [7] * i, "in": deep[i]}} for i in range(3)])["m"]
    assert found["list"] == [[], [1], [2, 2]]
    assert [ids.tolist() for ids in found["ids"].unbind()] == [[], [7], [7, 7]]
    assert [len(boxes) for boxes in found["in"]["boxes"]] == [0, 1, 2]
    assert found["in"]["n"].tolist() == [[0, 0], [0, 0], [0, 1]]


def test_mode_for_what_is_in_no_dict_is_an_error(texts: Any) -> None:
    function = texts.collate_with(ragged={"boxes.x": "list"})
    with pytest.raises(OptionError, match=r"names 'boxes\.x', but 'boxes' is not a plain dict"):
        function([with_boxes(texts[i], i) for i in range(2)])
    batch = function([{**texts[i], "boxes": 1, "boxes.x": torch.ones(i)} for i in range(2)])  # a name with a dot
    assert [len(x) for x in batch["boxes.x"]] == [0, 1]


@WORKERS
def test_lists_of_numbers_are_padded_as_tensors_are(texts: Any, num_workers: int) -> None:
    """Token ids that a tokenizer gave, boxes of a row's annotations; empty ones are as the others."""

    def with_lists(sample: Any, i: int) -> Any:
        boxes = [[float(i)] * 4] * i
        return {**sample, "text": [5] * (i + 1), "ids": [i] * i, "boxes": boxes, "b": boxes, "none": ()}

    function = texts.collate_with(ragged={"ids": "pad", "boxes": "pad", "b": "nested", "none": "pad"})
    batch = first_batch(Wrapper(texts, with_lists), num_workers, batch_size=3, collate_fn=function)
    assert batch["ids"].dtype == torch.int64
    assert batch["ids"].tolist() == [[0, 0], [1, 0], [2, 2]]
    assert batch["boxes"].dtype == torch.float32
    assert batch["boxes"][:, :, 3].tolist() == [[0, 0], [1, 0], [2, 2]]
    assert [boxes.shape for boxes in batch["b"].unbind()] == [(0, 4), (1, 4), (2, 4)]
    assert batch["none"].shape == (3, 0)
    assert batch["text"].tolist() == [[5, 0, 0], [5, 5, 0], [5, 5, 5]]  # as the schema says
    assert batch["attention_mask"].sum(1).tolist() == [1, 2, 3]


@pytest.mark.parametrize(("value", "message"), [([[1], [2, 3]], "list of sample 1"), ([1, "a"], "sample 1 .* a list")])
def test_lists_that_are_no_tensors_are_an_error(texts: Any, value: Any, message: str) -> None:
    with pytest.raises(ShmloaderError, match=rf"'ids' cannot be made a batch: .*{message}"):
        texts.collate_with(ragged={"ids": "pad"})([{**texts[0], "ids": [1]}, {**texts[1], "ids": value}])


def test_what_cannot_be_jagged_is_an_error_that_says_so(texts: Any) -> None:
    function = texts.collate_with(ragged={"x": "nested"})
    with pytest.raises(
        ShmloaderError, match=r"'x' cannot be made a batch: .*\[2, 1\].*\[2, 2\].*ragged=\{'x': 'list'\}"
    ):
        function([{**texts[i], "x": torch.zeros(2, i + 1)} for i in range(2)])


def test_values_that_are_nested_already_come_as_a_list(texts: Any) -> None:
    value = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    batch = texts.collate([{**texts[i], "x": value} for i in range(2)])
    assert [len(x.unbind()) for x in batch["x"]] == [2, 2]


def process(row: dict[str, Any]) -> dict[str, Any]:
    """Tokens that have no mask of ours, and a picture, whose channels are not to be rounded up."""
    n = row["x"] % 4 + 1
    return {"input_ids": np.arange(n), "pixels": np.zeros((3, 2, 2), np.float32), "labels": np.arange(n)}


def test_only_tokens_and_named_fields_are_rounded_up(rows_path: str, make_dataset: Any) -> None:
    dataset = make_dataset(rows_path, process=process)
    samples = [dataset[i] for i in range(3)]
    batch = dataset.collate_with(pad_to_multiple_of=8)(samples)
    assert [batch[name].shape[1] for name in ("input_ids", "pixels", "labels")] == [3, 3, 8]
    function = dataset.collate_with(pad_to_multiple_of={"input_ids": 4, "boxes": 5}, ragged={"boxes": "pad"})
    batch = function([{**sample, "boxes": torch.ones(1)} for sample in samples])
    assert [batch[name].shape[1] for name in ("input_ids", "pixels", "labels", "boxes")] == [4, 3, 3, 5]


# -- bad arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [0, -8, 1.5, True, "8", {"text": 0}])
def test_multiple_must_be_a_whole_number_from_1_up(texts: Any, multiple: Any) -> None:
    with pytest.raises(OptionError, match="pad_to_multiple_of"):
        texts.collate_with(pad_to_multiple_of=multiple)


def test_multiple_of_what_is_not_padded_is_an_error(texts: Any, images_path: str, make_dataset: Any) -> None:
    with pytest.raises(OptionError, match=r"names 'source', which is not padded\. The dataset has text, labels"):
        texts.collate_with(pad_to_multiple_of={"source": 8})
    with pytest.raises(OptionError, match=r"names 'boxes', which is not padded.*ragged=\{'boxes': 'pad'\}"):
        texts.collate_with(pad_to_multiple_of={"boxes": 8})
    with pytest.raises(OptionError, match=r"names 'text', which is not padded, since ragged=\{'text': 'nested'\}$"):
        texts.collate_with(pad_to_multiple_of={"text": 8}, ragged={"text": "nested"})
    both = {"text": "list", "labels": "nested"}
    with pytest.raises(OptionError, match=r"but with ragged=.* none are padded: the dataset's are text, labels"):
        texts.collate_with(pad_to_multiple_of=8, ragged=both)
    images = make_dataset(images_path)
    with pytest.raises(OptionError, match="of all tokens was asked for, but the dataset has none, only image, labels"):
        images.collate_with(pad_to_multiple_of=8)
    for modes in (None, {"image": "pad"}):
        with pytest.raises(OptionError, match=r"names 'image', which is not padded: its shape is \[3, .*\], and only"):
            images.collate_with(pad_to_multiple_of={"image": 8}, ragged=modes)


@pytest.mark.parametrize("asked", ["nested", {"text": "jagged"}, {"text": None}, [("text", "pad")]])
def test_ragged_must_map_fields_to_modes(texts: Any, asked: Any) -> None:
    with pytest.raises(OptionError, match=r"ragged= must (be a dict|give 'text' one of pad, nested, list)"):
        texts.collate_with(ragged=asked)


def test_ragged_field_that_no_sample_has_is_an_error(texts: Any) -> None:
    function = texts.collate_with(ragged={"boxs": "pad"})
    with pytest.raises(OptionError, match=r"'boxs', which no sample of a batch has: there are text, labels"):
        function([with_boxes(texts[i], i) for i in range(2)])
