"""What the constructor refuses: data, a ring that is too small, arguments."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from support_sets import number, run_script, write_numbers, write_pictures, write_table

from shmloader import MultimodalConfig, Options, ShmMultimodalDataset, ShmMultimodalIterableDataset
from shmloader.errors import (
    ColumnError,
    DatasetNotFoundError,
    EmptyDatasetError,
    OptionError,
    RecordTooLargeError,
    RingTooSmallError,
    SourceError,
    SplitNotFoundError,
)

OPTIONS = Options(ring_bytes="8MiB", prefetchers=1, timeout_s=30)
PICTURE = MultimodalConfig(vision_dim=16)


def make(name: str, **kwargs: Any) -> ShmMultimodalDataset:
    return ShmMultimodalDataset(dataset_name=name, **{"options": OPTIONS, **kwargs})


# ---- the data ----------------------------------------------------------------------------------------------


def test_an_unknown_dataset_is_named_with_the_places_searched(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"no-such-folder.*no local folder or file"):
        make(str(tmp_path / "no-such-folder"))


def test_an_unknown_split_is_an_error_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(SplitNotFoundError, match=r"no split 'nope'; it has 'train'") as caught:
        make(write_numbers(tmp_path / "d", 8), split="nope", process=number)
    assert caught.value.available == ["train"]


def test_an_empty_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError, match="no rows"):
        make(write_numbers(tmp_path / "d", 0), process=number)


def test_columns_that_cannot_be_told_are_an_error_that_lists_them(tmp_path: Path) -> None:
    with pytest.raises(ColumnError, match="number"):
        make(write_numbers(tmp_path / "d", 8))


@pytest.mark.parametrize(
    ("columns", "example"),
    [
        ("text", {"text": "text"}),
        (["caption"], {"text": "caption"}),
        (["a", "b"], {"text": ["a", "b"]}),
        (5, {"text": "text"}),
        ([], {"text": "text"}),
    ],
)
def test_columns_that_are_no_dict_are_an_error_that_shows_one(columns: Any, example: dict[str, Any]) -> None:
    for kind in (ShmMultimodalDataset, ShmMultimodalIterableDataset):
        with pytest.raises(OptionError) as caught:
            kind(dataset_name="org/nowhere", columns=columns)
        assert f"columns={example!r}" in str(caught.value)
        assert (caught.value.name, caught.value.value) == ("columns", repr(columns))
        assert caught.value.allowed == "a dict of role to column, or None"


def test_an_error_of_the_constructor_has_the_traceback_of_the_service(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        make(str(tmp_path / "missing"))
    assert "planner.py" in str(caught.value.__cause__)


# ---- a ring that is too small ------------------------------------------------------------------------------

#: Of a picture that `PICTURE` asks for, with its label: less than this many bytes, more than half of it.
RECORD_BYTES = 1024


def make_pictures(folder: Path, ring_bytes: int | str, **changes: Any) -> ShmMultimodalDataset:
    options = Options(**{"ring_bytes": ring_bytes, "prefetchers": 1, "timeout_s": 30, **changes})
    return make(write_pictures(folder, 64), config=PICTURE, options=options)


def test_a_ring_too_small_for_what_is_in_flight_is_an_error_with_all_figures(tmp_path: Path) -> None:
    with pytest.raises(RingTooSmallError, match=r"twice 36 samples.*SHMLOADER_RING_BYTES=1MiB") as caught:
        make_pictures(tmp_path / "d", "32KiB", in_flight=32, ahead=4)
    error = caught.value
    assert (error.have_bytes, error.samples, error.variable) == (32 << 10, 36, "SHMLOADER_RING_BYTES")
    assert RECORD_BYTES / 2 < error.record_bytes <= RECORD_BYTES
    assert error.needed_bytes >= 2 * 36 * error.record_bytes
    assert all(f"SHMLOADER_{name}" in str(error) for name in ("IN_FLIGHT", "AHEAD"))


def test_the_ring_that_the_error_names_is_large_enough(tmp_path: Path) -> None:
    with pytest.raises(RingTooSmallError) as caught:
        make_pictures(tmp_path / "d", "32KiB", in_flight=24, ahead=4)
    with make_pictures(tmp_path / "e", caught.value.needed_bytes, in_flight=24, ahead=4) as dataset:
        assert len(dataset.__getitems__(range(24))) == 24
        assert dataset.stats().transit_bytes == caught.value.needed_bytes


def test_what_is_in_flight_does_not_matter_where_all_fits(tmp_path: Path) -> None:
    with make_pictures(tmp_path / "d", 64 * RECORD_BYTES, in_flight=10_000) as dataset:
        assert dataset.stats().transit_bytes == 0
        assert len(dataset.__getitems__(range(64))) == 64


def test_a_sample_larger_than_the_ring_is_an_error_that_names_sizes_and_variable(tmp_path: Path) -> None:
    with pytest.raises(RecordTooLargeError, match=r"12,\d+ bytes.*4,096.*SHMLOADER_RING_BYTES") as caught:
        make(
            write_pictures(tmp_path / "d", 64),
            config=MultimodalConfig(vision_dim=64),
            options=Options(ring_bytes=4096, prefetchers=1),
        )
    assert caught.value.needed_bytes > caught.value.have_bytes == 4096


# ---- arguments ---------------------------------------------------------------------------------------------


def test_a_tokenizer_without_encode_is_an_error_that_names_the_argument(tmp_path: Path) -> None:
    name = write_table(tmp_path / "d", {"text": ["a"] * 8})
    with pytest.raises(OptionError, match="tokenizer") as caught:
        make(name, tokenizer=object())
    assert "encode" in str(caught.value)


def test_an_unpicklable_process_is_an_error_that_names_the_argument(tmp_path: Path) -> None:
    lock = threading.Lock()
    with pytest.raises(OptionError, match=r"process= cannot be sent.*lock") as caught:
        make(write_numbers(tmp_path / "d", 8), process=lambda row: lock.locked())
    assert caught.value.name == "process"


def test_a_process_that_cannot_be_called_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="process= must be callable"):
        make(write_numbers(tmp_path / "d", 8), process=3)


SENT = """
import sys, types
from shmloader import Options, ShmMultimodalDataset
module = types.ModuleType("gone")
exec("def process(row): return {'number': row['number']}", module.__dict__)
module.process.__module__ = "gone"
sys.modules["gone"] = module
try:
    ShmMultimodalDataset(dataset_name=sys.argv[1], process=module.process, options=Options(ring_bytes="1MiB"))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_what_the_services_cannot_import_is_an_error_that_names_argument_and_module(tmp_path: Path) -> None:
    status, out, err = run_script(tmp_path, SENT, write_numbers(tmp_path / "d", 8))
    assert status == 0, err
    assert out.startswith("OptionError process= cannot be loaded in the prefetch processes: ModuleNotFoundError")
    assert "'gone'" in out


def test_a_ring_beyond_the_address_space_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="from 1 to 64 TiB"):
        make(write_numbers(tmp_path / "d", 8), process=number, options=Options(ring_bytes="65TiB"))


def test_a_ring_far_larger_than_memory_takes_only_what_is_used(tmp_path: Path) -> None:
    options = Options(ring_bytes="32TiB", prefetchers=1, timeout_s=30)
    with make(write_numbers(tmp_path / "d", 8), process=number, options=options) as dataset:
        assert int(dataset[7]["number"]) == 7
        assert dataset.stats().ring_backed_bytes <= 64 << 20
