"""The old names do what they did, by way of the shared set."""

from __future__ import annotations

import logging
import threading
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import NUM_ROWS, SIDE, no_leaks, small_options, text_of
from torch.utils.data import DataLoader

from shmloader import DatasetConfig, MultimodalConfig, Repo, register_dataset
from shmloader.compat import MultimodalDataset, StreamingDatasetWrapper, collate_fn, create_multimodal_dataloaders
from shmloader.errors import OptionError, SplitNotFoundError


def wrapped(rows: Any, **arguments: Any) -> Any:
    return StreamingDatasetWrapper(rows, **arguments)


@pytest.fixture(scope="module")
def numbers() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": list(range(NUM_ROWS)), "word": [f"w{i}" for i in range(NUM_ROWS)]})


def test_the_old_dataset_is_the_new_one_and_its_loading_methods_say_that_they_do_nothing(
    texts_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        no_leaks() as watch,
        MultimodalDataset(None, None, "train", texts_path, options=small_options()) as dataset,
        caplog.at_level(logging.WARNING, "shmloader.compat"),
    ):
        watch(dataset)
        assert bytes(dataset[3]["text"].tolist()).decode() == text_of(3)
        for method, result in (("_load_data", []), ("_ensure_local_dataset", None), ("_load_single_dataset", [])):
            with pytest.warns(DeprecationWarning, match=method):
                assert getattr(dataset, method)() == result
            assert method in caplog.text


def test_the_wrapper_yields_each_row_of_a_dataset_as_it_is_again_and_again(numbers: datasets.Dataset) -> None:
    with wrapped(numbers, max_cache_size=50) as rows:
        assert len(rows) == NUM_ROWS
        for _ in range(2):
            assert list(rows) == list(numbers)


def test_the_wrapper_of_a_stream_yields_it_and_has_no_length(numbers: datasets.Dataset) -> None:
    stream = numbers.to_iterable_dataset(num_shards=2).map(lambda row: {"x": row["x"] * 2})
    with wrapped(stream) as rows:
        assert [row["x"] for row in rows] == [2 * i for i in range(NUM_ROWS)]
        with pytest.raises(TypeError, match="length"):
            len(rows)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_yield_each_row_of_the_wrapper_once(numbers: datasets.Dataset, context: str) -> None:
    with wrapped(numbers) as rows:
        loader = DataLoader(rows, batch_size=None, num_workers=2, multiprocessing_context=context)
        assert sorted(row["x"] for row in loader) == list(range(NUM_ROWS))


def test_threads_iterate_over_one_wrapper_at_once(numbers: datasets.Dataset) -> None:
    found: dict[int, list[int]] = {}
    with wrapped(numbers) as rows:

        def read(number: int) -> None:
            found[number] = [row["x"] for row in rows]

        threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {number: list(range(NUM_ROWS)) for number in range(3)}


def test_the_wrapper_decodes_images_and_clips(images_path: str) -> None:
    images = datasets.load_dataset(images_path, split="train")
    wave = np.sin(np.arange(800) / 20).astype(np.float32)
    clips = datasets.Dataset.from_dict({"clip": [_wav(wave)] * 3}).cast_column("clip", datasets.Audio())
    with wrapped(images) as rows:
        for row, expected in zip(rows, images, strict=True):
            assert row["label"] == expected["label"]
            assert np.array_equal(np.asarray(row["image"]), np.asarray(expected["image"]))
    with wrapped(clips) as rows:
        for row in rows:
            assert row["clip"]["sampling_rate"] == 8000
            assert np.array_equal(row["clip"]["array"], wave)


def _wav(samples: Any) -> bytes:
    import io

    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, 8000, "FLOAT", format="WAV")
    return file.getvalue()


def test_the_wrapper_leaves_nothing_behind(numbers: datasets.Dataset) -> None:
    with no_leaks() as watch:
        rows = wrapped(numbers)
        watch(rows._samples)
        next(iter(rows))
        rows.cleanup()
        rows.close()


@pytest.mark.parametrize("bad", ["a/name", 5, None])
def test_the_wrapper_refuses_what_is_no_datasets_object(bad: Any) -> None:
    with pytest.raises(OptionError, match="Dataset or IterableDataset"):
        wrapped(bad)


def test_a_cache_size_that_is_none_is_refused(numbers: datasets.Dataset) -> None:
    with pytest.raises(OptionError, match="max_cache_size"):
        wrapped(numbers, max_cache_size=0)


def test_collate_fn_pads_samples_and_plain_dicts_alike(texts_path: str) -> None:
    with MultimodalDataset(dataset_name=texts_path, options=small_options()) as dataset:
        samples = [dataset[i] for i in (1, 2, 9)]
        batch = collate_fn(samples)
    assert batch["text"].shape == (3, max(len(text_of(i)) for i in (1, 2, 9)))
    assert batch["attention_mask"].sum(1).tolist() == [len(text_of(i)) for i in (1, 2, 9)]
    plain = collate_fn([{"label": torch.tensor(1)}, {"label": torch.tensor(2)}])
    assert plain["label"].tolist() == [1, 2]


def test_two_loaders_are_made_and_the_first_is_shuffled(tmp_path: Any) -> None:
    for split, num in (("train", 40), ("validation", 10)):
        rows = {"text": [f"{split} {i:02}" for i in range(num)]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / f"{split}.parquet")
    train, validation = create_multimodal_dataloaders(
        MultimodalConfig(vision_dim=SIDE), None, 8, str(tmp_path), num_workers=2, options=small_options()
    )
    texts = [
        [bytes(row.tolist()).decode() for batch in loader for row in batch["text"]] for loader in (train, validation)
    ]
    assert texts[1] == [f"validation {i:02}" for i in range(10)]
    assert sorted(texts[0]) == [f"train {i:02}" for i in range(40)] != texts[0]
    for loader in (train, validation):
        loader.dataset.close()


def test_training_has_no_row_of_a_validation_split_that_is_a_part_of_it(tmp_path: Any) -> None:
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "{i:03}"}}\n' for i in range(100)))
    entry = DatasetConfig("mine_alone", Repo(str(tmp_path), splits={"validation": "train[95%:]"}), {"text": "text"})
    register_dataset(entry, replace=True)
    loaders = create_multimodal_dataloaders(None, None, 10, "mine_alone", num_workers=0, options=small_options())
    rows = [{int(bytes(row.tolist())) for batch in loader for row in batch["text"]} for loader in loaders]
    assert rows == [set(range(95)), set(range(95, 100))]
    for loader in loaders:
        loader.dataset.close()


def test_splits_may_be_named(tmp_path: Any) -> None:
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(8)))
    loaders = create_multimodal_dataloaders(
        None, None, 4, str(tmp_path), splits=("train[:6]", "train[6:]"), num_workers=0, options=small_options()
    )
    assert [len(loader.dataset) for loader in loaders] == [6, 2]
    for loader in loaders:
        loader.dataset.close()


def test_nested_images_are_decoded(images_path: str) -> None:
    images = datasets.load_dataset(images_path, split="train")[:3]["image"]
    features = datasets.Features(pages=datasets.List(datasets.Image()), cover={"front": datasets.Image()})
    rows = datasets.Dataset.from_dict(
        {"pages": [[image, image] for image in images], "cover": [{"front": image} for image in images]},
        features=features,
    )
    with wrapped(rows) as found:
        for row, expected in zip(found, rows, strict=True):
            assert len(row["pages"]) == 2
            for one, other in (
                (row["pages"][1], expected["pages"][1]),
                (row["cover"]["front"], expected["cover"]["front"]),
            ):
                assert np.array_equal(np.asarray(one), np.asarray(other))


def test_loaders_that_cannot_be_made_leave_no_set_behind(tmp_path: Any) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n' * 4)
    with no_leaks(), pytest.raises(ValueError, match="batch_size"):
        create_multimodal_dataloaders(
            None, None, 0, str(tmp_path), splits=("train", "train[:1]"), num_workers=0, options=small_options()
        )


def test_a_missing_split_leaves_no_set_behind(texts_path: str) -> None:
    with no_leaks(), pytest.raises(SplitNotFoundError):
        create_multimodal_dataloaders(dataset_name=texts_path, options=small_options())


def test_named_dataset_that_has_one_split_for_both_is_refused(tmp_path: Any) -> None:
    (tmp_path / "test.jsonl").write_text("".join(f'{{"text": "{i:03}"}}\n' for i in range(100)))
    splits = {"train": "test", "validation": "test"}
    register_dataset(DatasetConfig("mine_twice", Repo(str(tmp_path), splits=splits), {"text": "text"}), replace=True)
    with pytest.raises(OptionError, match=r"'train' and 'validation' are the same one here, 'test'.*splits="):
        create_multimodal_dataloaders(None, None, 10, "mine_twice", num_workers=0, options=small_options())
