"""`keys`: the names under which samples, batches and a `transform` see a dataset's fields."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import SIDE, opened, small_options, text_of
from support_batches import audio, image, tokens
from support_collate import WORKERS, Wrapper, first_batch
from torch.utils.data import DataLoader, default_collate

from shmloader import ShmMultimodalDataset, ShmMultimodalIterableDataset
from shmloader.errors import OptionError
from shmloader.keys import Keys
from shmloader.sample import Field, Schema

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(60)

ALL = Schema((*tokens(), image(), audio()), ("vision_text",), ("set",))


def names_of(keys: Any, schema: Schema = ALL) -> tuple[str, ...]:
    return Keys.parse(keys).face(schema).names


# -- of a schema -------------------------------------------------------------------------------------------


def test_by_default_all_fields_have_their_own_names() -> None:
    assert names_of("shmloader") == names_of({}) == ALL.names


def test_hf_gives_the_names_of_transformers_models_and_nothing_else() -> None:
    assert names_of("hf") == ("input_ids", "labels", "pixel_values", "input_values")


def test_hf_drops_what_a_process_made_beside_them() -> None:
    fields = (Field("text", "int64", (None,), pad=0), Field("word", "int64", (None,), pad=0))
    assert names_of("hf", Schema(fields, ("text",), ("set",))) == ("input_ids",)


def test_hf_drops_text_that_is_no_tokens() -> None:
    fields = (Field("text", "uint8", (None,), is_text=True), Field("labels", "int64", ()))
    assert names_of("hf", Schema(fields, ("text",), ("set",))) == ("labels",)


def test_hf_keeps_what_a_process_named_so_itself() -> None:
    fields = (Field("input_ids", "int64", (None,), pad=0), Field("attention_mask", "int64", (None,), pad=0))
    assert names_of("hf", Schema(fields, ("text",), ("set",))) == ("input_ids", "attention_mask")


def test_a_dict_renames_what_it_names_and_drops_what_is_none() -> None:
    keys = {"text": "ids", "audio": None, "source": "from", "task_type": None}
    assert names_of(keys) == ("ids", "labels", "image", "from")


def test_names_may_be_swapped() -> None:
    assert names_of({"text": "labels", "labels": "text"})[:2] == ("labels", "text")


def test_masks_follow_their_fields_unless_named() -> None:
    face = Keys.parse({"image": "pixels", "attention_mask": "mask"}).face(ALL)
    assert face.presence("pixels") == "pixels_mask"
    assert face.mask("text") == "mask"
    face = Keys.parse({"image_mask": "has_image", "text": "ids"}).face(ALL)
    assert face.presence("image") == "has_image"
    assert face.mask("ids") == "attention_mask"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("huggingface", "keys='huggingface' must be one of shmloader, hf, or a dict"),
        (None, "keys=None must be one of"),
        (["text"], "must be one of"),
        ({"text": 1}, "must map the name of a field to another, or to None, but got 'text': 1"),
        ({"text": ""}, "but got 'text': ''"),
        ({1: "text"}, "but got 1: 'text'"),
        (
            {"txt": "ids"},
            "'txt', which the dataset does not have: it has text, labels, image, audio, task_type, source, ",
        ),
        ({"text": "labels"}, "gives the name 'labels' to two"),
        ({"text": "attention_mask"}, "gives the name 'attention_mask' to two"),
        ({"attention_mask": "text"}, "gives the name 'text' to two"),
        ({"text": "x", "image": "x"}, "gives the name 'x' to two"),
        ({"text": "source"}, "gives the name 'source' to two"),
        ({"audio": "image_mask"}, "gives the name 'image_mask' to two"),
        ({"text": None, "attention_mask": "m"}, "names 'attention_mask', but drops 'text', whose mask it is"),
        (dict.fromkeys(("text", "labels", "image", "audio")), "leaves no field of the dataset, which has text, labels"),
    ],
)
def test_bad_keys_are_an_error_that_says_why(keys: Any, message: str) -> None:
    with pytest.raises(OptionError, match=r"keys") as caught:
        names_of(keys)
    assert message in str(caught.value)
    assert caught.value.name == "keys"


# -- of a dataset ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(texts_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened(texts_path, keys="hf") as made:
        yield made


@pytest.mark.parametrize("method", ["main", "fork", "spawn"])
def test_batches_of_hf_keys(texts: Any, method: str) -> None:
    """In every process the same."""
    kwargs = {} if method == "main" else {"num_workers": 1, "multiprocessing_context": method}
    batch = next(iter(DataLoader(texts, batch_size=100, **kwargs)))
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert bytes(batch["input_ids"][3][batch["attention_mask"][3].bool()].tolist()).decode() == text_of(3)
    assert batch["labels"].shape == batch["input_ids"].shape


def test_samples_of_hf_keys(texts: Any) -> None:
    assert list(texts[0]) == ["input_ids", "labels"]
    assert list(dict(texts[0])) == ["input_ids", "labels"]


def test_touched_samples_and_dicts_of_hf_keys(texts: Any) -> None:
    expected = default_collate(texts.__getitems__([3, 4]))
    changed = Wrapper(texts, lambda sample, i: sample.update(number=i))
    dicts = Wrapper(texts, lambda sample, i: {**sample, "number": i})
    for batch in (default_collate([changed[3], changed[4]]), texts.collate([dicts[3], dicts[4]])):
        assert batch.pop("number").tolist() == [3, 4]
        assert list(batch) == list(expected)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_keys_of_images_and_classes(images_path: str, make_dataset: Any) -> None:
    dataset = make_dataset(images_path, keys={"image": "pixels", "labels": "class", "task_type": None})
    batch = first_batch(dataset, 0)
    assert list(batch) == ["pixels", "class", "source"]
    assert batch["pixels"].shape == (4, 3, SIDE, SIDE)
    assert batch["class"].tolist() == [0, 1, 2, 3]


def test_transform_sees_the_new_names_and_may_make_others(texts_path: str, make_dataset: Any) -> None:
    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        assert list(sample) == ["ids", "labels", "task_type", "source"]
        return {"ids": sample["ids"][:3], "n": len(sample["ids"])}

    dataset = make_dataset(texts_path, keys={"text": "ids"}, transform=transform)
    batch = first_batch(dataset, 1)
    assert list(batch) == ["ids", "attention_mask", "n"]
    assert batch["ids"].shape == (4, 3)


def process(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": np.arange(row["x"] % 3 + 1), "word": row["word"], "image": np.zeros((3, 2, 2), np.float32)}


@WORKERS
def test_keys_of_a_process_that_tells_its_fields_late(rows_path: str, make_dataset: Any, num_workers: int) -> None:
    dataset = make_dataset(rows_path, process=process, keys="hf")
    batch = first_batch(dataset, num_workers)
    assert list(batch) == ["input_ids", "attention_mask", "pixel_values"]
    assert list(dataset[0]) == ["input_ids", "pixel_values"]


@WORKERS
def test_unknown_field_of_a_process_is_an_error_of_the_first_read(
    rows_path: str, make_dataset: Any, num_workers: int
) -> None:
    dataset = make_dataset(rows_path, process=process, keys={"words": "w"})
    with pytest.raises(OptionError, match="'words', which the dataset does not have: it has text, word, image, "):
        first_batch(dataset, num_workers)


def test_unknown_field_is_an_error_at_once_and_leaves_nothing(texts_path: str) -> None:
    with (
        pytest.raises(OptionError, match="'image', which the dataset does not have: it has text, labels"),
        opened(texts_path, keys={"image": "x"}),
    ):
        pass


def test_bad_keys_are_found_before_anything_is_started() -> None:
    with pytest.raises(OptionError, match="keys='HF'"):
        ShmMultimodalDataset(dataset_name="/does/not/exist", keys="HF", options=small_options())


@WORKERS
def test_keys_of_an_iterable_dataset(texts_path: str, make_dataset: Any, num_workers: int) -> None:
    dataset = make_dataset(texts_path, ShmMultimodalIterableDataset, keys="hf")
    batches = list(DataLoader(dataset, batch_size=50, num_workers=num_workers))
    assert [list(batch) for batch in batches] == [["input_ids", "attention_mask", "labels"]] * 2
    assert list(next(iter(dataset))) == ["input_ids", "labels"]
