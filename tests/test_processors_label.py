from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from shmloader.errors import DecodeError
from shmloader.processors import schema_of
from shmloader.processors.label import LabelProcessor
from shmloader.sample import RecordLayout

NAMES = ("blight", "rust", "healthy")


def labels_of(values, kind=None, names=NAMES):
    """Each row's label as it lies in a record, or the error that it raised."""
    processor = LabelProcessor("class", names)
    rows = processor.begin(pa.RecordBatch.from_arrays([pa.array(values, kind)], ["class"]))
    found = []
    for row in range(len(values)):
        try:
            layout = RecordLayout(schema_of([processor], "here"), rows.shapes(row))
            out = layout.arrays(memoryview(bytearray(layout.num_bytes)))
            rows.write(row, out)
            assert (out["labels"].dtype, out["labels"].shape) == (np.int64, ())
            found.append(out["labels"].item())
        except DecodeError as error:
            found.append(error)
    return found


def test_labels_are_zero_dimensional_int64():
    (field,) = LabelProcessor("class", NAMES).fields
    assert (field.name, field.dtype, field.shape, field.pad) == ("labels", "int64", (), None)


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.uint8(), pa.float32()])
def test_integral_labels_are_stored(kind):
    assert labels_of([0, 2, 1], kind) == [0, 2, 1]


def test_booleans_are_zero_and_one():
    assert labels_of([True, False]) == [1, 0]


def test_minus_one_is_an_unknown_class():
    assert labels_of([-1]) == [-1]


def test_a_null_label_is_an_error_of_its_row_only():
    error, good = labels_of([None, 1])
    assert good == 1
    assert "'class' is null" in str(error)
    assert (error.field, error.column) == ("labels", "class")


@pytest.mark.parametrize("label", [3, -2])
def test_a_label_that_is_no_class_names_it_and_their_number(label):
    (error,) = labels_of([label])
    assert f"is {label}, but there are 3 classes" in str(error)


def test_without_class_names_any_integer_is_a_label():
    assert labels_of([10**12, -7], names=None) == [10**12, -7]


def test_a_label_beyond_int64_is_an_error():
    (error,) = labels_of([2**64 - 1], pa.uint64(), names=None)
    assert "does not fit int64" in str(error)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), "rust", [1]])
def test_a_label_that_is_no_integer_is_an_error(value):
    (error,) = labels_of([value])
    assert "no integer" in str(error)
