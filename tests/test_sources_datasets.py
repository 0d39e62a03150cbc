"""Loaded ``datasets`` objects of every make, and files that it streams: the rows are those it gives itself."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import soundfile
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_dataset_builder,
)
from support_files import json_lines, png, rows_of, wav, with_files, write_tree

from shmloader.errors import ColumnError, ReadError, SourceError
from shmloader.sources import make_plan
from shmloader.sources.base import SourceRequest
from shmloader.sources.undecoded import UndecodedAudio, encode_undecoded, undecoded

FEATURES = Features(
    text=Value("string"),
    label=Value("int64"),
    nested={"a": Value("int64"), "b": List(Value("int64"))},
    image=Image(decode=False),
)


def base(num: int = 150, first: int = 0) -> Dataset:
    numbers = range(first, first + num)
    columns = {
        "text": [f"text {i}" for i in numbers],
        "label": [i * 7 % 10 for i in numbers],
        "nested": [{"a": i, "b": [i] * (i % 3)} for i in numbers],
        "image": [{"bytes": png(i), "path": None} for i in numbers],
    }
    return Dataset.from_dict(columns, features=FEATURES)


def stream(num: int = 150, first: int = 0, num_shards: int = 3) -> IterableDataset:
    return base(num, first).to_iterable_dataset(num_shards=num_shards)


def plain(value: Any) -> Any:
    """Arrays as lists."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def given(dataset: Any, **more: Any) -> list[dict[str, Any]]:
    """The rows that a service reads of ``dataset``, which it gets pickled."""
    return rows_of(pickle.loads(cloudpickle.dumps(dataset)), **more)


LOADED = {
    "selected": lambda d: d.select([5, 3, 100, 7]),
    "selected range": lambda d: d.select(range(10, 90)),
    "shuffled": lambda d: d.shuffle(seed=1),
    "filtered": lambda d: d.filter(lambda row: row["label"] > 3),
    "concatenated": lambda d: concatenate_datasets([d, base(80, 1000).shuffle(seed=2)]),
    "side by side": lambda d: concatenate_datasets([d.select_columns(["text"]), d.select_columns(["label"])], axis=1),
    "interleaved": lambda d: interleave_datasets([d, base(80, 1000)], probabilities=[0.5, 0.5], seed=3),
    "sharded": lambda d: d.shard(4, 1),
    "flattened": lambda d: d.flatten(),
    "flat indices": lambda d: d.shuffle(seed=1).flatten_indices(),
    "in memory": lambda d: Dataset.from_list([{"text": "a"}, {"text": None}, {"text": "c"}]),
    "mapped": lambda d: d.map(lambda row: {"text": row["text"] * 2}),
    "cast": lambda d: d.cast_column("label", ClassLabel(names=[str(i) for i in range(10)])),
    "repeated": lambda d: d.repeat(2),
    "renamed": lambda d: d.rename_column("text", "question").remove_columns(["image"]),
    "large strings": lambda d: d.cast_column("text", Value("large_string")),
    "categories": lambda d: Dataset.from_pandas(pd.DataFrame({"text": pd.Categorical(["a", "b", "a"])})),
    "numpy format": lambda d: d.with_format("numpy"),
}


@pytest.mark.parametrize("kind", LOADED)
def test_rows_of_a_loaded_dataset_are_its_own(kind):
    dataset = LOADED[kind](base())
    assert given(dataset) == list(dataset.with_format(None))


def test_rows_of_a_sorted_dataset_are_its_own():
    with pytest.warns(FutureWarning, match="null_placement"):  # of pyarrow, to datasets
        dataset = base().sort("label")
    assert given(dataset) == list(dataset)


def test_splits_of_a_dataset_are_chosen_by_their_names():
    splits = base().train_test_split(test_size=0.3, seed=1)
    assert given(splits, split="test") == list(splits["test"])
    streams = IterableDatasetDict(train=stream(), test=stream(20, 500))
    assert given(streams, split="test") == list(streams["test"])
    assert given(DatasetDict(validation=base(3)), split="validation") == list(base(3))


def test_columns_that_the_format_leaves_out_are_not_there():
    dataset = base().with_format("numpy", columns=["text"])
    request = SourceRequest(dataset, "train")
    assert any("leaves out the columns 'image', 'label', 'nested'" in notice for notice in make_plan(request).notices)
    assert given(dataset) == [{"text": text} for text in base()["text"]]
    with pytest.raises(ColumnError, match="no column 'label'"):
        make_plan(SourceRequest(dataset, "train", columns={"text": "text", "labels": "label"}))
    shown = base().with_format("numpy", columns=["text"], output_all_columns=True)
    assert given(shown) == list(base())


def test_a_transform_of_the_dataset_is_not_applied_with_a_warning():
    dataset = base().with_transform(lambda rows: {"text": ["x"] * len(rows["text"])})
    plan = make_plan(SourceRequest(dataset, "train"))
    assert ["transform" in warning and "process=" in warning for warning in plan.warnings] == [True]
    assert given(dataset) == list(base())


# ---- streams -------------------------------------------------------------------------------------------


def sparse(shards: list[int]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for i in range(40):
            yield {"text": f"{shard}-{i}"} if i % 2 else {"text": None, "n": i}


STREAMS = {
    "mapped": lambda s: s.map(lambda row: {"text": row["text"] * 2}),
    "mapped to null": lambda s: s.map(lambda row: {"text": None if row["label"] == 3 else row["text"]}),
    "filtered": lambda s: s.filter(lambda row: row["label"] > 3),
    "shuffled": lambda s: s.shuffle(seed=1, buffer_size=10),
    "taken": lambda s: s.skip(3).take(50),
    "batched": lambda s: s.batch(4),
    "interleaved": lambda s: interleave_datasets([s, stream(80, 1000)]),
    "interleaved to the end": lambda s: interleave_datasets([s, stream(80, 1000)], stopping_strategy="all_exhausted"),
    "concatenated": lambda s: concatenate_datasets([s, stream(80, 1000)]),
    "side by side": lambda s: concatenate_datasets([s.select_columns(["text"]), s.select_columns(["label"])], axis=1),
    "renamed": lambda s: s.rename_column("text", "question").remove_columns(["image"]),
    "cast": lambda s: s.cast_column("label", Value("string")),
    "sharded": lambda s: s.shard(3, 1),
    "repeated": lambda s: s.repeat(2),
    "numpy format": lambda s: s.with_format("numpy"),
    "mapped in numpy": lambda s: s.with_format("numpy").map(lambda row: {"more": row["label"] + np.arange(2)}),
    "mapped in arrow": lambda s: s.with_format("arrow").map(lambda table: table, batched=True),
    "other rows": lambda s: s.map(
        lambda rows: {"z": [text for text in rows["text"] for _ in range(2)]},
        batched=True,
        remove_columns=["text", "label", "nested", "image"],
    ),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_rows_of_a_stream_are_its_own(kind):
    made = STREAMS[kind](stream())
    assert given(made) == plain(list(made.with_format(None)))


def test_rows_of_a_generator_may_lack_values_and_columns():
    rows = given(IterableDataset.from_generator(sparse, gen_kwargs={"shards": [0, 1, 2]}))
    assert len(rows) == 120
    assert rows[:2] == [{"text": None, "n": 0}, {"text": "0-1", "n": None}]


def test_a_column_that_the_first_row_of_a_generator_lacks_is_there():
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": f"t{i}"} | ({"label": i} if i else {}) for i in range(70))

    found = given(IterableDataset.from_generator(rows))
    assert found == [{"text": f"t{i}", "label": i or None} for i in range(70)]


def test_a_column_that_comes_after_the_first_rows_is_an_error_unless_features_leave_it_out():
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": f"t{i}"} | ({"late": i} if i >= 90 else {}) for i in range(100))

    with pytest.raises(ReadError, match=r"rows 64 to 99 of the stream: row 90: .*'late' .*Give the features"):
        given(IterableDataset.from_generator(rows))
    told = IterableDataset.from_generator(rows, features=Features(text=Value("string")))
    assert given(told) == list(told)
    chosen = IterableDataset.from_generator(rows).select_columns(["text"])
    assert given(chosen) == list(told)


def test_a_later_row_of_another_type_is_an_error_that_names_row_and_column():
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": "a", "n": i if i != 100 else [i]} for i in range(150))

    with pytest.raises(ReadError, match=r"rows 64 to 127 of the stream: row 100: .*in column 'n'"):
        given(IterableDataset.from_generator(rows))


def test_first_rows_that_do_not_go_together_are_an_error_that_names_row_and_column():
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": "a", "n": i if i != 3 else "x"} for i in range(10))

    with pytest.raises(SourceError, match=r"row 3 does not go together with those before in column 'n' \('x'\)"):
        given(IterableDataset.from_generator(rows))


def test_functions_behind_a_format_of_torch_are_an_error_that_says_what_to_do():
    made = stream().with_format("torch").map(lambda row: row)
    with pytest.raises(SourceError, match=r"with_format\('torch'\).*Call with_format after them"):
        make_plan(SourceRequest(made, "train"))
    assert make_plan(SourceRequest(stream().with_format("torch"), "train")).num_rows == 150


# ---- audio without torchcodec --------------------------------------------------------------------------


def clips(path: str) -> Iterator[dict[str, Any]]:
    array = np.linspace(-1, 1, 50, dtype=np.float32)
    yield {"audio": path, "n": 0}
    yield {"audio": {"bytes": wav(1), "path": None}, "n": 1}
    yield {"audio": wav(2), "n": 2}
    yield {"audio": {"array": array, "sampling_rate": 8000}, "n": 3}
    yield {"audio": None, "n": 4}


@pytest.mark.parametrize("step", ["none", "map", "filter"])
def test_audio_of_a_generator_is_encoded_by_itself(tmp_path, step):
    (tmp_path / "0.wav").write_bytes(wav(0))
    features = Features(audio=Audio(decode=step == "none"), n=Value("int64"))
    made = IterableDataset.from_generator(clips, features=features, gen_kwargs={"path": str(tmp_path / "0.wav")})
    if step == "map":
        made = made.map(lambda row: {"n": row["n"] + 1}, features=features)
    if step == "filter":
        made = made.filter(lambda row: row["n"] >= 0)
    rows = [row["audio"] for row in given(made)]
    assert with_files(rows[0])["bytes"] == wav(0)
    assert [row["bytes"] for row in rows[1:3]] == [wav(1), wav(2)]
    samples, rate = soundfile.read(io.BytesIO(rows[3]["bytes"]), dtype="float32")
    assert (samples.tolist(), rate) == (np.linspace(-1, 1, 50, dtype=np.float32).tolist(), 8000)
    assert rows[4] is None
    assert type(made.features["audio"]) is Audio  # the user's object is as it was


def test_audio_that_a_function_wants_decoded_is_an_error_that_says_how_to_do_without():
    features = Features(audio=Audio(), n=Value("int64"))
    made = IterableDataset.from_generator(clips, features=features, gen_kwargs={"path": "x.wav"}).map(lambda row: row)
    with pytest.raises(SourceError, match=r"torchcodec.*Audio\(decode=False\)"):
        make_plan(SourceRequest(made, "train", all_columns=True))


def test_a_builder_prepares_audio_without_torchcodec(tmp_path):
    folder = write_tree(tmp_path / "d", {f"train/{c}/{i}.wav": wav(i) for i in range(3) for c in "ab"})
    builder = encode_undecoded(load_dataset_builder(str(folder), cache_dir=str(tmp_path / "cache")))
    builder.download_and_prepare()
    rows = builder.as_dataset(split="train").cast_column("audio", Audio(decode=False))
    assert [with_files(row) for row in rows] == rows_of(folder)


def test_features_are_replaced_wherever_they_hold_audio():
    found = undecoded(Features(a=Audio(sampling_rate=8000), b=List(Audio(decode=False)), c={"d": Audio()}, e=Image()))
    kinds = (type(found["a"]), type(found["b"].feature), type(found["c"]["d"]), type(found["e"]))
    assert kinds == (UndecodedAudio, UndecodedAudio, UndecodedAudio, Image)
    assert (found["a"].sampling_rate, found["b"].feature.decode) == (8000, False)
    assert undecoded(None) is None
    with pytest.raises(ValueError, match="neither 'bytes' nor 'path'"):
        found["a"].encode_example({"bytes": None, "path": None})


# ---- text, CSV and JSON --------------------------------------------------------------------------------

FILES: dict[str, tuple[dict[str, bytes | str], dict[str, Any]]] = {
    "nested json": ({"train.jsonl": json_lines({"t": "a", "m": {"x": [i], "y": None}} for i in range(3))}, {}),
    "null column": ({"train.jsonl": json_lines({"t": f"{i}", "n": None} for i in range(3))}, {}),
    "json that lacks a column": (
        {"0.jsonl": json_lines([{"t": "a", "n": 1}]), "1.jsonl": json_lines([{"t": "b"}])},
        {},
    ),
    "empty json": ({"0.jsonl": "", "1.jsonl": json_lines([{"t": "b"}])}, {}),
    "json without newline": ({"0.jsonl": '{"t": "a"}\n{"t": "b"}'}, {}),
    "json with a mark": ({"0.jsonl": b'\xef\xbb\xbf{"t": "a"}\n'}, {}),
    "json in an array": ({"0.json": '[{"t": "a"}, {"t": "b"}]'}, {}),
    "json in a field": ({"0.json": '{"rows": [{"t": "a"}]}'}, {"field": "rows"}),
    "csv with nulls": ({"0.csv": "t,n\na,1\nb,\n"}, {}),
    "csv without newline": ({"0.csv": "t,n\na,1\nb,2"}, {}),
    "csv with a mark": ({"0.csv": b"\xef\xbb\xbft,n\na,1\n"}, {}),
    "csv over lines": ({"0.csv": 't,n\n"a\nb",1\n'}, {}),
    "csv with semicolons": ({"0.csv": "t;n\na;1\n"}, {"sep": ";"}),
    "text": ({"0.txt": "a\nb\n\nc", "1.txt": "d\r\n"}, {}),
    "empty text": ({"0.txt": "", "1.txt": "z"}, {}),
    "text by paragraphs": ({"0.txt": "a\nb\n\nc"}, {"sample_by": "paragraph"}),
    "text by documents": ({"0.txt": "a\nb\n\nc", "1.txt": "z"}, {"sample_by": "document"}),
    "text of another encoding": ({"0.txt": b"caf\xe9\n"}, {"encoding": "latin-1"}),
}


@pytest.mark.parametrize("kind", FILES)
def test_rows_of_files_are_those_of_datasets(tmp_path, kind):
    files, load = FILES[kind]
    folder = write_tree(tmp_path / "d", files)
    rows = rows_of(folder, load=load)
    assert rows == list(load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"), **load))
    assert rows


@pytest.mark.parametrize("second", ["t,n\na,x\n", "t\na\n", "t,n,m\na,1,2\n"])
def test_a_csv_whose_columns_differ_is_an_error_that_names_it(tmp_path, second):
    folder = write_tree(tmp_path / "d", {"0.csv": "t,n\na,1\n", "1.csv": second})
    with pytest.raises(SourceError, match=r"the columns of .*1\.csv are not those of the files before") as caught:
        make_plan(SourceRequest(str(folder), "train", all_columns=True))
    assert caught.value.shard == str(folder / "1.csv")
