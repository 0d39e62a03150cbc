"""Fields that a sample may lack: zeros in the batch, and a mask that tells, whatever was done to the samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support_batches import PAD, SIDE, Records, audio, image, pixels, records, row, tokens
from support_collate import WORKERS, Wrapper, assert_same, first_batch
from torch.utils.data import DataLoader, Subset, default_collate

from shmloader import ShmloaderError
from shmloader.collate import PADDED, Lengths, collate_as
from shmloader.sample import Field
from shmloader.views import Sample

NUM = 8
#: Rows 1, 2, 3 and 6 have no image.
IMAGES = [True, False, False, False, True, True, False, True]


@pytest.fixture(scope="module")
def pairs() -> Iterator[Records]:
    """Texts with or without a normalised image."""
    fields = (*tokens(), image())
    with records(fields, [row(i, fields, () if IMAGES[i] else ("image",)) for i in range(NUM)]) as made:
        yield made


def assert_pairs(batch: Any, rows: list[int], has_image: list[bool] | None = None) -> None:
    has_image = [IMAGES[i] for i in rows] if has_image is None else has_image
    assert list(batch)[:5] == ["text", "attention_mask", "labels", "image", "image_mask"]
    assert batch["image"].dtype == torch.float32
    assert batch["image"].shape == (len(rows), 3, SIDE, SIDE)
    assert batch["image_mask"].dtype == torch.bool
    assert batch["image_mask"].tolist() == has_image
    for i, picture, has in zip(rows, batch["image"], has_image, strict=True):
        assert picture[:, 0, 0].tolist() == (pixels(i) if has else [0, 0, 0])
        assert (picture == picture[:, :1, :1]).all()
    assert batch["attention_mask"].sum(1).tolist() == [i + 1 for i in rows]


# -- samples -----------------------------------------------------------------------------------------------


def test_a_sample_has_no_key_for_what_its_row_lacks(pairs: Any) -> None:
    assert list(pairs[0]) == ["text", "labels", "image", "task_type", "source"]
    assert list(pairs[1]) == ["text", "labels", "task_type", "source"]
    assert pairs[1].get("image") is None


# -- batches of untouched samples --------------------------------------------------------------------------


@WORKERS
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 4], [1, 2]], ids=["some", "all", "none"])
def test_batch_has_zeros_and_a_mask_for_what_samples_lack(pairs: Any, rows: list[int], num_workers: int) -> None:
    """The same keys, shapes and dtypes whether some have it, all, or none."""
    assert_pairs(first_batch(Subset(pairs, rows), num_workers, batch_size=len(rows)), rows)


def test_absent_samples_of_several_look_ups(pairs: Any) -> None:
    assert_pairs(default_collate([pairs[i] for i in (1, 0, 6, 4)]), [1, 0, 6, 4])


def test_absent_samples_in_several_memories(pairs: Any) -> None:
    """As of a guest, which has copies: those of one memory all lack it, and their least and largest shape is none."""
    elsewhere = pairs.renamed({})._ring.get_many([0, 4], 30)
    others = [Sample.over(pairs._attachment, elsewhere, i) for i in range(2)]
    here = pairs.__getitems__([1, 2])
    assert_pairs(default_collate([here[0], others[0], here[1], others[1]]), [1, 0, 2, 4])
    boxes = Field("boxes", "float32", (None, 4), pad=0, optional=True)
    fields = (Field("x", "int64", ()), boxes)
    with records(fields, [row(2, fields), row(1, fields, ["boxes"])]) as made:
        far = Sample.over(made._attachment, made.renamed({})._ring.get_many([1], 30), 0)
        assert default_collate([made[0], far])["boxes"].shape == (2, 3, 4)


def test_uint8_images_that_lack_are_zeros() -> None:
    fields = (image(is_float=False), Field("labels", "int64", ()))
    with records(fields, [row(1, fields), row(2, fields, ["image"])]) as made:
        batch = default_collate(made.__getitems__([0, 1]))
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].amax((1, 2, 3)).tolist() == [1, 0]
        assert batch["labels"].tolist() == [1, 2]


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 2], [0]], ids=["some", "none", "all"])
def test_ragged_field_that_lacks_is_padding_alone(rows: list[int]) -> None:
    """And a mask of samples beside that of tokens."""
    caption = Field("caption", "int64", (None,), pad=PAD, mask="caption_tokens", optional=True)
    boxes = Field("boxes", "float32", (None, 4), pad=0, optional=True)
    fields = (Field("x", "int64", ()), caption, boxes)
    with records(fields, [row(2, fields), *(row(i, fields, ["caption", "boxes"]) for i in (1, 2))]) as made:
        has = [i == 0 for i in rows]
        longest = 3 if any(has) else 0
        for batch in (default_collate(made.__getitems__(rows)), default_collate([touched(made[i]) for i in rows])):
            assert batch["caption"].tolist() == [[2] * longest if h else [PAD] * longest for h in has]
            assert batch["caption_tokens"].tolist() == [[int(h)] * longest for h in has]
            assert batch["boxes"].shape == (len(rows), longest, 4)
            assert batch["caption_mask"].tolist() == batch["boxes_mask"].tolist() == has


def test_text_that_lacks_is_none_beside_a_mask() -> None:
    fields = (Field("x", "int64", ()), Field("word", "uint8", (None,), is_text=True, optional=True))
    word = {"x": np.array(1), "word": np.frombuffer(b"word", np.uint8)}
    with records(fields, [word, {"x": np.array(2)}]) as made:
        batch = default_collate(made.__getitems__([0, 1]))
        assert batch["word"] == ["word", None]
        assert batch["word_mask"].tolist() == [True, False]
        assert default_collate([made[1]])["word"] == [None]


def test_several_optional_fields_have_a_mask_each() -> None:
    fields = (image(), audio(optional=True))
    lacking = [(), ("image",), ("audio",)]
    with records(fields, [row(i, fields, names) for i, names in enumerate(lacking)]) as made:
        batch = default_collate(made.__getitems__([0, 1, 2]))
        assert batch["image_mask"].tolist() == [True, False, True]
        assert batch["audio_mask"].tolist() == [True, True, False]
        assert batch["audio"][:, 0].tolist() == [0, 1, 0]


def test_more_masks_and_fields_than_the_core_gathers_at_once() -> None:
    fields = [Field(f"f{i}", "int64", (), optional=True) for i in range(40)]
    with records(fields, [row(1, fields), row(2, fields, ["f0", "f39"])]) as made:
        batch = default_collate(made.__getitems__([0, 1]))
        assert len(batch) == 82
        assert [batch[name].tolist() for name in ("f0", "f1", "f39")] == [[1, 0], [1, 2], [1, 0]]
        assert [batch[f"{name}_mask"].tolist() for name in ("f1", "f39")] == [[True, True], [True, False]]


# -- samples that somebody touched -------------------------------------------------------------------------


def touched(sample: Any, i: int = 0) -> Any:
    len(sample)
    return sample


def dict_of(sample: Any, i: int) -> Any:
    return {**sample, "number": i}


def copied(sample: Any, i: int) -> Any:
    return copy.copy(sample)


def every_second_touched(sample: Any, i: int) -> Any:
    return touched(sample) if i % 2 else sample


def own_text(sample: Any, i: int) -> None:
    sample["text"] = sample["text"].clone()


@WORKERS
@pytest.mark.parametrize("rows", [[0, 1, 2, 4], [0, 4], [1, 2]], ids=["some", "all", "none"])
@pytest.mark.parametrize("change", [touched, every_second_touched, own_text], ids=lambda change: change.__name__)
def test_touched_samples_make_the_same_batch(pairs: Any, change: Any, rows: list[int], num_workers: int) -> None:
    wrapped = Subset(Wrapper(pairs, change), rows)
    assert_pairs(first_batch(wrapped, num_workers, batch_size=len(rows)), rows)


@pytest.mark.parametrize("rows", [[0, 1, 2, 4], [0, 4], [1, 2]], ids=["some", "all", "none"])
@pytest.mark.parametrize("change", [dict_of, copied], ids=lambda change: change.__name__)
def test_dicts_of_a_dataset_make_the_same_batch_by_its_collate(pairs: Any, change: Any, rows: list[int]) -> None:
    wrapped = Wrapper(pairs, change)
    assert_pairs(collate_as(pairs.face, PADDED, [wrapped[i] for i in rows]), rows)


def test_what_a_wrapper_removed_of_an_optional_field_counts_as_lacking(pairs: Any) -> None:
    """As in dropping a modality at random: the batch's keys follow the schema."""

    def drop(sample: Any, i: int) -> None:
        if i != 4:
            sample.pop("image", None)

    wrapped = Wrapper(pairs, drop)
    assert_pairs(default_collate([wrapped[i] for i in (0, 1, 4)]), [0, 1, 4], [False, False, True])
    assert_pairs(default_collate([wrapped[i] for i in (0, 1)]), [0, 1], [False, False])


def test_what_a_wrapper_set_in_its_place_counts_as_there(pairs: Any) -> None:
    def fill(sample: Any, i: int) -> None:
        sample.setdefault("image", torch.ones(3, SIDE, SIDE))

    wrapped = Wrapper(pairs, fill)
    batch = default_collate([wrapped[i] for i in (0, 1)])
    assert batch["image_mask"].tolist() == [True, True]
    assert batch["image"][1].eq(1).all()


def test_dicts_that_are_no_samples_any_more_have_only_their_own_fields(pairs: Any) -> None:
    batch = collate_as(pairs.face, PADDED, [{"x": 1}, {"x": 2}])
    assert_same(batch, {"x": torch.tensor([1, 2])})


def test_required_field_that_a_sample_lacks_is_an_error(pairs: Any) -> None:
    sample = pairs[0]
    del sample["labels"]
    with pytest.raises(ShmloaderError, match="sample 0 in labels, which no schema calls optional"):
        default_collate([pairs[1], sample])


# -- names and lengths -------------------------------------------------------------------------------------


def test_masks_have_the_names_that_were_asked_for() -> None:
    fields = (*tokens(), image())
    rows = [row(0, fields), row(1, fields, ["image"])]
    with records(fields, rows, {"image": "pixel_values"}) as made:
        assert "pixel_values_mask" in default_collate(made.__getitems__([0, 1]))
    with records(fields, rows, {"image": "x", "image_mask": "has_x"}) as made:
        assert default_collate(made.__getitems__([0, 1]))["has_x"].tolist() == [True, False]
    with records(fields, rows, {"image_mask": None}) as made:
        batch = default_collate(made.__getitems__([0, 1]))
        assert list(batch) == ["text", "attention_mask", "labels", "image", "task_type", "source"]


@pytest.mark.parametrize("change", [lambda s, i: s, touched, dict_of], ids=["gathered", "touched", "dicts"])
def test_hf_keys_have_no_mask_so_a_lacking_image_is_an_error(change: Any) -> None:
    fields = (*tokens(), image())
    with records(fields, [row(0, fields), row(1, fields, ["image"]), row(2, fields)], "hf") as made:
        samples = [change(made[i], i) for i in range(3)]
        batch = collate_as(made.face, PADDED, [samples[0], samples[2]])
        assert {"input_ids", "attention_mask", "labels", "pixel_values"} == set(batch) - {"number"}
        assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
        with pytest.raises(ShmloaderError, match=r"lacks 'pixel_values', and with keys='hf' .* keys=\{'text'"):
            collate_as(made.face, PADDED, samples)
        with pytest.raises(ShmloaderError, match="lacks 'pixel_values'"):
            collate_as(made.face, PADDED, samples[1:2])
        batch = collate_as(made.face, Lengths.parse(None, {"pixel_values": "list"}), samples)
        assert [picture is None for picture in batch["pixel_values"]] == [False, True, False]
        assert "pixel_values_mask" not in batch


def test_nested_and_listed_fields_that_lack(pairs: Any) -> None:
    lengths = Lengths.parse(None, {"image": "list", "text": "nested"})
    batch = collate_as(pairs.face, lengths, pairs.__getitems__([0, 1]))
    assert batch["image"][0].shape == (3, SIDE, SIDE)
    assert batch["image"][1] is None
    assert batch["image_mask"].tolist() == [True, False]
    assert [t.tolist() for t in batch["text"].unbind()] == [[0], [10, 11]]
    assert "attention_mask" not in batch


def test_batches_that_lack_come_in_slots(pairs: Any) -> None:
    """Masks and all: nothing goes through the pipe but names."""
    from shmloader.tokens import batch_ring

    ring = batch_ring()
    assert ring is not None
    before = ring.counters.inline
    assert len(list(DataLoader(pairs, batch_size=4, num_workers=1))) == 2
    assert ring.counters.inline == before
