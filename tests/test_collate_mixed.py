"""Batches of samples that are not alike: of several datasets, and of values that torch knows and does not."""

from __future__ import annotations

import copy
import enum
import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import SIDE as PIXELS
from conftest import text_of
from support_batches import PAD, SIDE, Records, audio, image, pixels, records, row, tokens
from support_collate import WORKERS, Wrapper, assert_same, first_batch
from torch.utils.data import ConcatDataset, DataLoader, Subset, default_collate

from shmloader import ShmloaderError
from shmloader.collate import PADDED, Lengths, collate_as
from shmloader.sample import Field

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(60)

LABEL = Field("labels", "int64", ())


def three(fields: Any, name: str, keys: Any = "shmloader") -> Any:
    return records(fields, [row(i, fields) for i in range(3)], keys, name)


@pytest.fixture(scope="module")
def vision() -> Iterator[Records]:
    with three((image(optional=False), LABEL), "vision") as made:
        yield made


@pytest.fixture(scope="module")
def sound() -> Iterator[Records]:
    with three((audio(), LABEL), "sound") as made:
        yield made


@pytest.fixture(scope="module")
def words() -> Iterator[Records]:
    with three(tokens(multiple_of=4)[:1], "words") as made:
        yield made


def as_dict(sample: Any, i: int) -> Any:
    return dict(sample)


def looked_into(sample: Any, i: int) -> None:
    len(sample)


# -- several datasets --------------------------------------------------------------------------------------


def assert_of_both(batch: Any) -> None:
    """Of samples 1 and 2 of the pictures, and 0 and 1 of the sounds."""
    assert batch["image"].shape == (4, 3, SIDE, SIDE)
    assert batch["image"][:, :, 0, 0].tolist() == [pixels(1), pixels(2), [0, 0, 0], [0, 0, 0]]
    assert batch["image_mask"].dtype == torch.bool
    assert batch["image_mask"].tolist() == [True, True, False, False]
    assert batch["audio"].tolist() == [[0] * 6] * 3 + [[1] * 6]
    assert batch["audio_mask"].tolist() == [False, False, True, True]
    assert batch["labels"].tolist() == [1, 2, 0, 1]
    assert batch["source"] == ["vision"] * 2 + ["sound"] * 2
    assert batch["task_type"] == ["vision_text"] * 4
    names = ["image", "image_mask", "labels", "task_type", "source", "audio", "audio_mask"]
    assert sorted(batch) == sorted(names)


@WORKERS
@pytest.mark.parametrize("change", [None, looked_into], ids=["untouched", "touched"])
def test_datasets_of_different_fields_share_a_batch(vision: Any, sound: Any, change: Any, num_workers: int) -> None:
    both = ConcatDataset([Subset(vision, [1, 2]), sound])
    wrapped = both if change is None else Wrapper(both, change)
    assert_of_both(first_batch(wrapped, num_workers))


def test_datasets_in_any_order_share_a_batch(vision: Any, sound: Any) -> None:
    batch = default_collate([sound[2], vision[1], sound[0], vision[0]])
    assert batch["image_mask"].tolist() == [False, True, False, True]
    assert batch["image"][:, :, 0, 0].tolist() == [[0] * 3, pixels(1), [0] * 3, pixels(0)]
    assert batch["audio"][:, 0].tolist() == [2, 0, 0, 0]
    assert batch["labels"].tolist() == [2, 1, 0, 0]
    assert batch["source"] == ["sound", "vision"] * 2


@pytest.mark.parametrize("of", ["vision", "sound"])
def test_dicts_of_several_datasets_are_told_apart_by_their_source(vision: Any, sound: Any, of: str) -> None:
    """Bound to either of them."""
    samples = [dict(sample) for sample in (vision[1], vision[2], sound[0], sound[1])]
    assert_of_both(collate_as({"vision": vision, "sound": sound}[of].face, PADDED, samples))


def test_untouched_touched_and_dicts_of_several_datasets(vision: Any, sound: Any) -> None:
    touched = sound[0]
    touched["labels"] = torch.tensor(0)
    assert_of_both(default_collate([vision[1], dict(vision[2]), touched, dict(sound[1])]))


@WORKERS
def test_tokens_of_a_dataset_among_pictures_are_padded(vision: Any, words: Any, num_workers: int) -> None:
    both = ConcatDataset([Subset(vision, [1]), words])
    for change in (None, looked_into):
        wrapped = both if change is None else Wrapper(both, change)
        batch = first_batch(wrapped, num_workers)
        assert batch["text"].tolist() == [[PAD] * 4, [0, PAD, PAD, PAD], [10, 11, PAD, PAD], [20, 21, 22, PAD]]
        assert batch["attention_mask"].sum(1).tolist() == [0, 1, 2, 3]
        assert batch["text_mask"].tolist() == [False, True, True, True]
        assert batch["image_mask"].tolist() == [True, False, False, False]
        assert batch["labels"].tolist() == [1, 0, 0, 0]
        assert batch["labels_mask"].tolist() == [True, False, False, False]


@WORKERS
def test_tokens_are_padded_as_their_own_dataset_says(words: Any, num_workers: int) -> None:
    with three((Field("text", "int64", (None,), pad=-3, mask="attention_mask", multiple_of=3),), "others") as others:
        both = ConcatDataset([Subset(words, [0]), Subset(others, [0])])
        for change in (None, looked_into):
            wrapped = both if change is None else Wrapper(both, change)
            batch = first_batch(wrapped, num_workers)
            assert batch["text"].tolist() == [[0, *[PAD] * 11], [0, *[-3] * 11]]  # 12: of 4 and of 3
            assert batch["attention_mask"].sum(1).tolist() == [1, 1]
            assert "text_mask" not in batch


def test_optional_field_of_one_dataset_is_required_in_another(sound: Any) -> None:
    fields = (image(), LABEL)
    with (
        records(fields, [row(1, fields), row(2, fields, ["image"])], name="pairs") as pairs,
        three((image(optional=False), LABEL), "vision") as pictures,
    ):
        for change in (lambda s, i: s, as_dict):
            samples = [change(s, 0) for s in (pictures[2], pairs[0], pairs[1], sound[0])]
            batch = collate_as(pairs.face, PADDED, samples)
            assert batch["image_mask"].tolist() == [True, True, False, False]
            assert batch["image"][:, :, 0, 0].tolist() == [pixels(2), pixels(1), [0] * 3, [0] * 3]


def test_a_field_that_a_wrapper_added_to_one_dataset_has_a_mask(vision: Any, sound: Any) -> None:
    samples = [{**vision[0], "depth": torch.ones(2), "score": 0.5, "note": "n"}, dict(sound[0])]
    batch = collate_as(vision.face, PADDED, samples)
    assert batch["depth"].tolist() == [[1, 1], [0, 0]]
    assert batch["depth_mask"].tolist() == [True, False]
    assert batch["score"].tolist() == [0.5, 0]
    assert batch["score"].dtype == torch.float64
    assert batch["score_mask"].tolist() == [True, False]
    assert batch["note"] == ["n", None]


def test_keys_of_several_datasets(vision: Any) -> None:
    with three((audio(), LABEL), "sound", {"labels": "word", "audio": "wave", "audio_mask": "has"}) as sound:
        batch = default_collate([vision[1], sound[2]])
        assert batch["has"].tolist() == [False, True]
        assert batch["labels_mask"].tolist() == [True, False]
        assert batch["word"].tolist() == [0, 2]


def test_hf_keys_cannot_tell_which_samples_of_several_datasets_have_what() -> None:
    with three((image(optional=False),), "a", "hf") as first, three((audio(),), "b", "hf") as second:
        for change in (lambda s, i: s, looked_into):
            samples = [change(s, 0) or s for s in (first[0], second[0])]
            with pytest.raises(ShmloaderError, match=r"lacks '(pixel|input)_values', and with keys='hf' no "):
                default_collate(samples)


def test_classes_and_tokens_of_one_name_are_an_error_that_says_what_to_do(vision: Any) -> None:
    with (
        three(tokens(), "words") as words,
        pytest.raises(ShmloaderError, match=r"'labels' cannot be made a batch: .*\[\].*\[2\].*keys=\{'labels': …\}"),
    ):
        default_collate([vision[0], words[1]])


def test_normalised_and_raw_images_are_an_error(vision: Any) -> None:
    with three((image(is_float=False, optional=False), LABEL), "raw") as raw:
        for samples in ([vision[0], raw[0]], [dict(vision[0]), dict(raw[0])]):
            with pytest.raises(ShmloaderError, match=r"'image' cannot .* as floats and as whole numbers.*image_dtype"):
                collate_as(vision.face, PADDED, samples)


def test_normalised_and_raw_images_of_one_name_are_an_error(vision: Any) -> None:
    """As of two datasets in memory; or a transform that does not treat all samples alike."""
    with three((image(is_float=False, optional=False), LABEL), "vision") as raw:
        for samples in ([dict(vision[0]), dict(raw[0])], [dict(raw[0]), dict(raw[1]), dict(vision[0])]):
            with pytest.raises(ShmloaderError, match=r"'image' cannot .* as floats and as whole numbers \(.*uint8\)"):
                collate_as(vision.face, PADDED, samples)
    scores = [{**vision[i], "score": torch.tensor(value)} for i, value in enumerate((1, 0.5))]
    assert collate_as(vision.face, PADDED, scores)["score"].tolist() == [1, 0.5]


@pytest.mark.parametrize("way", ["dicts", "a_sample", "others_first"])
def test_dicts_of_datasets_of_one_name_are_told_apart_by_their_fields(vision: Any, way: str) -> None:
    """As all that are in memory have, whose name is that of their type."""
    with three((audio(), LABEL), "vision") as sound:
        samples = [vision[1], vision[2], sound[0], sound[1]]
        samples = [s if way == "a_sample" and i == 2 else {**s, "x": i} for i, s in enumerate(samples)]
        if way == "a_sample":
            samples[2]["x"] = 2
        if way == "others_first":
            samples = [samples[2], samples[0], samples[3], samples[1]]
        batch = collate_as(vision.face, PADDED, samples)
        has_image = [False, True, False, True] if way == "others_first" else [True, True, False, False]
        assert batch["image_mask"].tolist() == has_image
        assert batch["audio_mask"].tolist() == [not has for has in has_image]
        assert batch["x"].tolist() == ([2, 0, 3, 1] if way == "others_first" else [0, 1, 2, 3])
        assert batch["labels"].tolist() == ([0, 1, 1, 2] if way == "others_first" else [1, 2, 0, 1])


def test_a_dict_that_only_lacks_a_field_is_of_no_other_dataset(vision: Any) -> None:
    for lacking in ("image", "x"):
        samples = [{**vision[i], "x": i} for i in range(3)]
        del samples[1][lacking]
        with pytest.raises(ShmloaderError, match=rf"sample 1 .* differs from sample 0 in {lacking}, .*'Dataset'"):
            collate_as(vision.face, PADDED, samples)


def test_a_field_that_one_sample_of_a_dataset_lacks_is_an_error(vision: Any, sound: Any) -> None:
    """Though another dataset's samples may lack it."""
    sample = vision[1]
    del sample["image"]
    with pytest.raises(ShmloaderError, match="sample 1 of the batch differs from sample 0 in image"):
        default_collate([vision[0], sample, sound[0]])
    with pytest.raises(ShmloaderError, match="differs from sample 0 in extra"):
        default_collate([vision[0], Wrapper(vision, lambda s, i: s.update(extra=1))[1], sound[0]])


def test_dicts_that_tell_no_dataset_must_have_the_same_fields(vision: Any) -> None:
    with pytest.raises(ShmloaderError, match="sample 1 of the batch differs from sample 0 in y"):
        collate_as(vision.face, PADDED, [{"x": 1, "y": 2}, {"x": 1}])
    with pytest.raises(ShmloaderError, match="different fields"):
        default_collate([vision[0], {"image": vision[1]["image"]}])


def test_samples_that_are_no_dicts_are_an_error(vision: Any) -> None:
    with pytest.raises(ShmloaderError, match="Sample 1 of the batch is a tuple, others are dicts"):
        default_collate([vision[0], (vision[1], 1)])


def test_texts_and_images_of_real_datasets_share_batches(texts_path: str, images_path: str, make_dataset: Any) -> None:
    texts = make_dataset(texts_path, keys={"labels": "tokens"})
    images = make_dataset(images_path)
    both = ConcatDataset([Subset(texts, range(10)), Subset(images, range(10))])
    order = [i // 2 + 10 * (i % 2) for i in range(20)]
    for num_workers in (0, 2):
        for b, batch in enumerate(DataLoader(both, batch_size=4, sampler=order, num_workers=num_workers)):
            rows = [i % 10 for i in order[4 * b : 4 * b + 4]]
            assert batch["text_mask"].tolist() == [True, False] * 2
            assert batch["image_mask"].tolist() == [False, True] * 2
            assert batch["labels"].tolist() == [0, rows[1] % 5, 0, rows[3] % 5]
            assert batch["image"].shape == (4, 3, PIXELS, PIXELS)
            assert torch.equal(batch["image"][1], images[rows[1]]["image"])
            assert bytes(batch["text"][2][batch["attention_mask"][2].bool()].tolist()).decode() == text_of(rows[2])
            assert batch["tokens"][1].eq(-100).all()


# -- values that torch knows and does not ------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


VALUES = {
    "int": [1, 2],
    "float": [0.5, 2.5],
    "bool": [True, False],
    "int_float": [1, 2.5],
    "str": ["a", "b"],
    "bytes": [b"a", b"b"],
    "np_scalar": [np.float32(1), np.float32(2)],
    "np_bool": [np.bool_(True), np.bool_(False)],
    "np_str": [np.str_("a"), np.str_("b")],
    "int_enum": [Number.ONE, Number.ONE],
    "array": [np.arange(3), np.arange(3)],
    "list": [[1, 2], [3, 4]],
    "tuple": [(1, "a"), (2, "b")],
    "list_of_tensors": [[torch.zeros(2)], [torch.ones(2)]],
    "dict": [{"a": 1, "b": {"c": "x"}}, {"a": 2, "b": {"c": "y"}}],
    "complex": [torch.tensor([1 + 2j]), torch.tensor([3j])],
}


@WORKERS
@pytest.mark.parametrize("kind", VALUES)
def test_values_of_wrappers_become_what_torch_makes_of_them(vision: Any, kind: str, num_workers: int) -> None:
    values = VALUES[kind]
    batch = first_batch(Wrapper(vision, lambda s, i: s.update(value=values[i])), num_workers, batch_size=2)
    expected = default_collate([{"value": value} for value in values])["value"]
    if isinstance(expected, list | dict):
        assert repr(batch["value"]) == repr(expected)
    else:
        assert_same({"value": batch["value"]}, {"value": expected})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, None], "'value' cannot be made a batch: sample 0 of the batch has None .*transform.*collate_fn"),
        ([1, None], "sample 1 of the batch has None"),
        ([None, torch.zeros(2)], "sample 0 of the batch has None, others have tensors"),
        ([Colour.RED, Colour.RED], "sample 0 of the batch has a Colour"),
        ([np.array(["a"]), np.array(["b"])], "sample 0 of the batch has an array of <U1"),
        ([np.array([None]), np.array([None])], "an array of object"),
        ([object(), object()], "sample 0 of the batch has a object"),
        ([1, "a"], "sample 1 of the batch has a str"),
        ([[1, 2], [3]], "'value' .*equal size"),
        ([{1, 2}, {1, 2}], "has a set"),
        ([{"a": 1}, {"b": 1}], "its dict of sample 1 of the batch differs from sample 0's in a, b"),
        ([{"a": {"b": None}}] * 2, "'value.a.b' cannot be made a batch"),
        ([torch.zeros(2), torch.zeros(3)], r"\[2\], sample 1 has \[3\].*collate_with\(ragged=\{'value': 'pad'\}\)"),
        ([torch.zeros(2), "a"], "sample 1 of the batch has a str, others have tensors"),
    ],
)
def test_values_that_make_no_batch_are_an_error_that_names_field_sample_and_type(
    vision: Any, values: list[Any], message: str
) -> None:
    samples = [{**vision[i], "value": value} for i, value in enumerate(values)]
    with pytest.raises(ShmloaderError, match=message) as caught:
        collate_as(vision.face, PADDED, samples)
    assert caught.value.field.startswith("value")


def test_numbers_among_tensors_are_tensors_too(vision: Any) -> None:
    values = [torch.tensor(1), 2, np.int64(3)]
    batch = collate_as(vision.face, PADDED, [{**vision[i], "value": value} for i, value in enumerate(values)])
    assert batch["value"].tolist() == [1, 2, 3]


def test_any_value_comes_as_a_list_if_asked_for(vision: Any) -> None:
    values = [None, Colour.RED, object()]
    lengths = Lengths.parse(None, {"value": "list"})
    batch = collate_as(vision.face, lengths, [{**vision[i], "value": value} for i, value in enumerate(values)])
    assert batch["value"] == values


def test_types_that_users_registered_are_collated_by_their_functions(
    vision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.data._utils.collate import default_collate_fn_map

    monkeypatch.setitem(default_collate_fn_map, Colour, lambda batch, *, collate_fn_map: len(batch))
    samples = [Wrapper(vision, lambda s, i: s.update(value=Colour.RED))[i] for i in range(2)]
    assert default_collate(samples)["value"] == 2
    assert collate_as(vision.face, PADDED, [dict(sample) for sample in samples])["value"] == 2


def test_tensors_within_lists_and_dicts_need_no_files_in_dev_shm(vision: Any) -> None:
    """They go through the pipe as bytes, from a worker."""
    values = {"boxes": [torch.ones(2), torch.zeros(3)], "nested": {"x": torch.ones(2), "y": (torch.ones(1), "s")}}
    batch = first_batch(Wrapper(vision, lambda s, i: s.update(values)), 1, batch_size=2)
    assert [box.tolist() for box in batch["boxes"]] == [[[1, 1]] * 2, [[0, 0, 0]] * 2]
    assert batch["nested"]["x"].tolist() == [[1, 1]] * 2
    assert batch["nested"]["y"][1] == ("s", "s")  # as torch makes it
    assert not any(t.is_shared() for t in (*batch["boxes"], batch["nested"]["x"], batch["nested"]["y"][0]))


# -- every way gives the same batch ------------------------------------------------------------------------

CHANGES = {"untouched": lambda s, i: s, "touched": lambda s, i: len(s) and s, "copied": lambda s, i: copy.copy(s)}
CHANGES |= {"dict": as_dict, "labelled": lambda s, i: s.update(labels=s["labels"].clone()) or s}


@pytest.mark.parametrize("seed", range(40))
def test_any_mix_of_ways_gives_the_same_batch(vision: Any, sound: Any, seed: int) -> None:
    """Gathered or by value; samples of one or two datasets, with and without what is optional."""
    random = np.random.default_rng(seed)
    fields = (*tokens(multiple_of=4), image(), audio(optional=True))
    lacking = [[name for name in ("image", "audio") if random.integers(2)] for _ in range(6)]
    with records(fields, [row(i, fields, lacking[i]) for i in range(6)], name="pairs") as pairs:
        others = [pairs, Records.renamed(vision, {"labels": "class"}), Records.renamed(sound, {"labels": "class"})]
        others = [others[i] for i in random.permutation(3)[: 1 + seed % 3]]
        picks = [(others[int(random.integers(len(others)))], int(random.integers(3))) for _ in range(5)]
        expected = collate_as(pairs.face, PADDED, [dataset[i] for dataset, i in picks])
        for _ in range(4):
            ways = [str(way) for way in random.choice(list(CHANGES)[: 5 if others == [pairs] else 4], len(picks))]
            samples = [CHANGES[way](dataset[i], i) for way, (dataset, i) in zip(ways, picks, strict=True)]
            assert_same(collate_as(pairs.face, PADDED, samples), expected)
