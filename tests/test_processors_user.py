from __future__ import annotations

import collections
import io
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from shmloader.errors import DecodeError, OptionError, ProcessError, SampleError
from shmloader.processors import build, schema_of
from shmloader.processors.image import decode_image
from shmloader.processors.user import UserProcessor, fields_of
from shmloader.sample import Field, RecordLayout, Schema
from shmloader.sources.base import Columns


def batch_of(**columns):
    return pa.RecordBatch.from_pydict(columns)


def samples_of(processor, batch):
    """Each row's fields as they lie in a record, or the error that it raised."""
    rows = processor.begin(batch)
    found = []
    for row in range(batch.num_rows):
        try:
            shapes = rows.shapes(row)
            layout = RecordLayout(schema_of([processor], "here"), shapes)
            out = layout.arrays(memoryview(bytearray(layout.num_bytes)))
            rows.write(row, out)
            found.append(out)
        except SampleError as error:
            found.append(error)
    return found


def results_of(*results, fields=None):
    """What a ``process`` that returns these, one a row, becomes."""
    processor = UserProcessor(lambda row: results[row["n"]], fields)
    return samples_of(processor, batch_of(n=list(range(len(results)))))


class FakeTensor:
    """What a torch tensor does, as far as it is used."""

    def __init__(self, array, detached=False):
        self.array, self.detached = np.asarray(array), detached

    def detach(self):
        return FakeTensor(self.array, True)

    def numpy(self):
        assert self.detached
        return self.array


def test_process_gets_the_row_as_stored():
    seen = []
    batch = batch_of(name=["a"], photo=[{"bytes": b"123", "path": "x.png"}], n=[None])
    samples_of(UserProcessor(lambda row: seen.append(row) or {"x": 1}), batch)
    assert seen == [{"name": "a", "photo": {"bytes": b"123", "path": "x.png"}, "n": None}]


def test_process_runs_once_per_row_in_shapes():
    calls = []
    rows = UserProcessor(lambda row: calls.append(row["n"]) or {"x": np.arange(3)}).begin(batch_of(n=[5, 6, 7]))
    assert calls == []
    assert rows.shapes(2) == {"x": (3,)}
    rows.write(2, {"x": np.empty(3, np.int64)})
    assert calls == [7]


@pytest.mark.parametrize(
    ("value", "dtype", "stored"),
    [
        (5, "int64", 5),
        (0.5, "float32", 0.5),
        (True, "bool", True),
        (np.float64(0.1), "float64", 0.1),
        (np.int8(5), "int8", 5),
        ([1, 2], "int64", [1, 2]),
        ((1, 2), "int64", [1, 2]),
        ([0.5, 1], "float32", [0.5, 1]),
        ([True, False], "bool", [True, False]),
        ([[1, 2], [3, 4]], "int64", [[1, 2], [3, 4]]),
        ([np.float64(0.1)], "float64", [0.1]),
        (np.array([0.1, 0.2]), "float64", [0.1, 0.2]),
        (np.array([1, 2], ">i4"), "int32", [1, 2]),
        (np.arange(6, dtype=np.uint8).reshape(2, 3).T, "uint8", [[0, 3], [1, 4], [2, 5]]),
        (np.float16(0.5), "float16", 0.5),
        (np.zeros((0, 4), np.float32), "float32", []),
        (FakeTensor([1.5]), "float64", [1.5]),
        (FakeTensor(np.float32(2)), "float32", 2),
    ],
)
def test_values_are_stored_with_the_dtype_that_they_have(value, dtype, stored):
    (sample,) = results_of({"x": value})
    assert sample["x"].dtype == dtype
    assert sample["x"].tolist() == stored


def test_str_is_stored_as_utf8_and_read_as_text():
    (sample,) = results_of({"title": "süß"})
    assert sample["title"].tobytes().decode() == "süß"
    (field,) = fields_of({"title": "süß"})
    assert field == Field("title", "uint8", (None,), pad=0, is_text=True)


def test_fields_keep_dtype_and_rank_and_leave_dimensions_open():
    fields = fields_of({"x": np.zeros((3, 4, 5)), "y": 1, "ids": [1, 2], "labels": [1, 2]})
    assert fields == (
        Field("x", "float64", (None, None, None), pad=0),
        Field("y", "int64", ()),
        Field("ids", "int64", (None,), pad=0),
        Field("labels", "int64", (None,), pad=-100),
    )


@pytest.mark.parametrize("labels", [np.zeros(3), 4, "abc"])
def test_only_token_labels_are_padded_with_the_ignored_index(labels):
    assert fields_of({"labels": labels})[0].pad in (0, None)


def test_token_text_gets_its_mask_unless_the_sample_has_one():
    assert fields_of({"text": [1, 2]})[0].mask == "attention_mask"
    assert fields_of({"text": [1, 2], "attention_mask": [1, 1]})[0].mask is None
    assert fields_of({"text": "abc"})[0].mask is None


def test_the_schema_survives_its_json_form():
    schema = Schema(fields_of({"x": np.zeros((2, 2)), "s": "a", "text": [1]}), ("text",), ("here",))
    assert Schema.from_json(schema.to_json()) == schema


def test_any_mapping_will_do():
    (sample,) = results_of(collections.UserDict(x=1))
    assert sample["x"] == 1


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (None, "dict of name → value, but got NoneType"),
        ([1], "but got list"),
        ({}, "empty dict"),
        ({3: 1}, "but got 3"),
        ({"": 1}, "non-empty str"),
        ({"source": "x"}, "'source' is a name that every sample has"),
        ({"x": None}, "'x' must be a numpy array.*but got NoneType"),
        ({"x": b"ab"}, "but got bytes"),
        ({"x": {"y": 1}}, "but got dict"),
        ({"x": np.array([None])}, "'x' has dtype object"),
        ({"x": np.array(["a"])}, "'x' has dtype <U1"),
        ({"x": ["a"]}, "'x' has dtype <U1"),
        ({"x": [1, None]}, "'x' has dtype object"),
        ({"x": 1j}, "but got complex"),
        ({"x": np.zeros(1, np.complex64)}, "'x' has dtype complex64"),
        ({"x": np.zeros(1, "M8[s]")}, "'x' has dtype datetime64"),
        ({"x": 2**70}, "'x' has dtype object"),
        ({"x": [[1], [2, 3]]}, "'x' must be.*cannot be made an array"),
        ({"x": np.zeros((1,) * 7)}, "'x' has 7 dimensions; there may be 6"),
        ({"x": []}, "'x' is an empty list"),
        ({"x": "\ud800"}, "'x' is a str that has no UTF-8 form"),
        ({"x": SimpleNamespace(numpy=lambda: 1 / 0)}, "'x' is a SimpleNamespace that has no numpy form: division"),
    ],
)
def test_what_cannot_be_stored_is_an_error_that_says_so(result, told):
    (error,) = results_of(result)
    assert isinstance(error, ProcessError)
    with pytest.raises(ProcessError, match=told):
        raise error
    if "'x'" in told:
        assert error.field == "x"


def test_an_exception_of_process_is_the_cause_and_its_message_is_kept():
    def process(row):
        raise KeyError("no such thing")

    (error,) = samples_of(UserProcessor(process), batch_of(n=[1]))
    assert isinstance(error, ProcessError)
    assert "KeyError: 'no such thing'" in str(error)
    assert isinstance(error.__cause__, KeyError)


def test_an_error_spoils_only_its_own_row():
    first, error, last = results_of({"x": 1}, None, {"x": 3})
    assert (first["x"], last["x"]) == (1, 3)
    assert isinstance(error, ProcessError)


def test_the_first_row_that_succeeds_sets_the_fields():
    error, good, other = results_of(None, {"x": 1}, {"y": 1})
    assert isinstance(error, ProcessError)
    assert good["x"] == 1
    assert "'x' is missing" in str(other)


@pytest.mark.parametrize(
    ("later", "told"),
    [
        ({"x": [0.5], "s": "a", "y": 1}, "'y' is not in the schema: every row must have the fields s, x"),
        ({"x": [0.5]}, "'s' is missing.*fields s, x, but this one has x"),
        (
            {"x": np.zeros(1), "s": "a"},
            r"'x' must be float32 \[any\] in every row, as in the first one, .*float64 \[1\]",
        ),
        ({"x": [[0.5]], "s": "a"}, r"'x' must be float32 \[any\].*float32 \[1, 1\]"),
        ({"x": 0.5, "s": "a"}, r"'x' must be float32 \[any\].*float32 \[\]"),
        ({"x": "a", "s": "a"}, r"'x' must be float32 \[any\].*got a str"),
        ({"x": [0.5], "s": np.zeros(1, np.uint8)}, r"'s' must be a str .*uint8 \[1\]"),
        ({"x": [True], "s": "a"}, r"'x' must be float32 \[any\].*bool \[1\]"),
    ],
)
def test_a_row_that_differs_from_the_schema_names_the_field_and_both(later, told):
    _, error = results_of({"x": [0.5], "s": "b"}, later)
    with pytest.raises(ProcessError, match=told):
        raise error


def test_python_numbers_take_the_dtype_of_the_schema_where_nothing_is_lost():
    _, ints, none = results_of({"x": [0.5]}, {"x": [1, 2]}, {"x": []})
    assert ints["x"].tolist() == [1, 2]
    assert (none["x"].dtype, none["x"].shape) == (np.float32, (0,))
    _, small, large = results_of({"x": np.uint8(1)}, {"x": 200}, {"x": 300})
    assert small["x"].dtype == np.uint8
    assert isinstance(large, ProcessError)


def test_a_python_float_for_an_int_field_is_an_error():
    _, error = results_of({"x": 1}, {"x": 0.5})
    assert "must be int64 [] in every row" in str(error)


def test_fields_found_by_another_prefetcher_hold_from_the_first_row_on():
    fields = fields_of({"x": 0.5})
    whole, error = results_of({"x": 1}, {"y": 1}, fields=fields)
    assert whole["x"].dtype == np.float32
    assert "'x' is missing" in str(error)


def test_a_row_in_flight_is_checked_against_adopted_fields():
    results = [{"x": [1]}, {"x": np.zeros(2)}]
    processor = UserProcessor(lambda row: results[row["n"]])
    rows = processor.begin(batch_of(n=[0, 1]))
    rows.shapes(0)
    processor.adopt(fields_of({"x": np.zeros(2)}))
    rows.shapes(1)
    out = {"x": np.empty(1)}
    rows.write(0, out)
    assert out["x"].tolist() == [1.0]
    processor.adopt(fields_of({"y": 1}))
    with pytest.raises(ProcessError, match=r"'x' is not in the schema|'y' is missing"):
        rows.write(1, {})


def test_a_process_that_cannot_be_called_is_refused():
    with pytest.raises(OptionError, match="process must be a function"):
        UserProcessor({"image": "photo"})


def test_process_takes_the_place_of_all_other_processors():
    (processor,) = build(Columns(text="a", image="b"), SimpleNamespace(vocab_size=1), None, lambda row: {"x": 1})
    assert isinstance(processor, UserProcessor)


@pytest.mark.parametrize(
    ("sample", "task_type"),
    [
        ({"image": np.zeros((3, 4, 4), np.uint8)}, "vision"),
        ({"image": np.zeros((3, 4, 4), np.uint8), "text": [1]}, "vision_text"),
        ({"image": np.zeros((3, 4, 4), np.uint8), "text": "a"}, "vision"),
        ({"audio": np.zeros(4, np.float32)}, "audio"),
        ({"x": 1}, "text"),
    ],
)
def test_the_task_type_follows_the_fields(sample, task_type):
    assert schema_of([UserProcessor(dict, fields_of(sample))], "here").task_types == (task_type,)


def test_process_may_use_decode_image_whose_errors_stay_what_they_are():
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (1, 2, 3)).save(file, "PNG")
    batch = batch_of(photo=[{"bytes": file.getvalue(), "path": None}, {"bytes": b"no", "path": None}])
    good, bad = samples_of(UserProcessor(lambda row: {"image": decode_image(row["photo"])}), batch)
    assert good["image"].shape == (7, 9, 3)
    assert isinstance(bad, DecodeError)


def test_a_real_tensor_is_taken_without_this_package_importing_torch():
    torch = pytest.importorskip("torch")
    tensor = torch.ones(2, requires_grad=True)
    (sample,) = results_of({"x": tensor})
    assert sample["x"].tolist() == [1, 1]
    (error,) = results_of({"x": torch.ones(2, dtype=torch.bfloat16)})
    assert "'x' is a Tensor that has no numpy form" in str(error)
    check = "import sys, shmloader.processors.user; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
