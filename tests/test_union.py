"""The schema of several sources: the fields of all, and what cannot be brought together."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from shmloader.errors import ColumnError, OptionError
from shmloader.keys import Keys
from shmloader.processors import build, schema_of
from shmloader.sample import RecordLayout, Schema
from shmloader.sources.base import Columns
from shmloader.union import union

CONFIG = SimpleNamespace(vocab_size=300, vision_dim=8, max_audio_length=100, max_text_length=16)


def schema(name: str, config: Any = CONFIG, **columns: Any) -> Schema:
    return schema_of(build(Columns(**columns), config), name)


TEXT = schema("text", text="t")
VISION = schema("vision", image="i", labels="l", class_names=("a", "b"))
SPEECH = schema("speech", text="t", audio="a")
BARE = schema("bare", image="i")


def test_one_source_keeps_its_schema():
    assert union([TEXT]) is TEXT


def test_a_field_that_a_source_lacks_is_optional_and_each_source_has_its_own_type():
    found = union([VISION, TEXT, SPEECH])
    assert found.sources == ("vision", "text", "speech")
    assert found.task_types == ("vision", "text", "audio_text")
    assert {field.name: field.optional for field in found.fields} == {
        "text": True, "image": True, "audio": True, "labels": False,
    }  # fmt: skip
    assert [[field.name for field in found.fields_of(i)] for i in range(3)] == [
        ["image", "labels"], ["text", "labels"], ["text", "labels", "audio"],
    ]  # fmt: skip
    assert Schema.from_json(found.to_json()) == found


def test_a_class_beside_labels_of_tokens_is_one_label_and_padded_as_they_are():
    labels = next(field for field in union([VISION, TEXT]).fields if field.name == "labels")
    assert (labels.shape, labels.pad, labels.most, labels.same_as) == ((None,), -100, (16,), None)


def test_a_class_that_other_samples_lack_is_filled_with_what_losses_ignore():
    labels = next(field for field in union([VISION, BARE]).fields if field.name == "labels")
    assert (labels.shape, labels.pad, labels.optional) == ((), -100, True)
    assert union([VISION, VISION]).fields == VISION.fields


def test_no_record_is_larger_than_the_largest_of_a_source_and_labels_share_their_bytes_where_they_may():
    found = union([VISION, TEXT])
    shapes = {"text": (16,), "labels": (16,)}
    shared = RecordLayout(found, shapes, source=1)
    (text,) = [entry for entry in shared.entries if entry[0].name == "text"]
    (labels,) = [entry for entry in shared.entries if entry[0].name == "labels"]
    assert text[1] == labels[1]
    sizes = [RecordLayout(found, {"image": (3, 8, 8), "labels": (1,)}, source=0).num_bytes, shared.num_bytes]
    assert found.most_record_bytes() == max(sizes)
    assert found.record_bytes() is None
    assert union([VISION, VISION]).record_bytes() == VISION.record_bytes()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (schema("b", SimpleNamespace(**{**vars(CONFIG), "vision_dim": 9}), image="i"), "have other shapes"),
        (
            schema("b", SimpleNamespace(**{**vars(CONFIG), "image_dtype": "uint8"}), image="i"),
            "are not normalised alike",
        ),
        (replace(BARE, fields=(replace(BARE.fields[0], dtype="float32"),)), "are of other types"),
        (replace(BARE, fields=(replace(BARE.fields[0], shape=(3, 8)),)), "have another number of dimensions"),
    ],
)
def test_what_cannot_lie_in_one_batch_is_an_error_that_names_both(other, told):
    with pytest.raises(ColumnError, match=told) as caught:
        union([replace(BARE, sources=("a",)), replace(other, sources=("b",))])
    assert caught.value.sources == ["a", "b"]


def test_without_masks_a_field_that_a_source_lacks_is_an_error_at_once():
    with pytest.raises(OptionError, match=r"have 'input_ids': those of 'vision' have none"):
        Keys.parse("hf").face(union([VISION, TEXT]))
    assert Keys.parse("hf").face(union([TEXT, TEXT])).is_strict
