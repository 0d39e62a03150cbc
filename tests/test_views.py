"""Samples: dicts over the ring that fill when somebody looks, read-only, valid for as long as they live."""

from __future__ import annotations

import collections.abc
import copy
import ctypes
import gc
import io
import json
import mmap
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import NUM_IMAGES, SIDE, opened, run_script
from torch.utils.data import default_convert

from shmloader import MultimodalConfig, ShmMultimodalDataset, decode_image
from shmloader.views import Sample

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(60)

KEYS = ["a", "b", "word", "task_type", "source"]


def make_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"a": row["x"], "b": np.arange(row["x"] % 5 + 1, dtype=np.float32), "word": f"wörd {row['x']}"}


@pytest.fixture(scope="module")
def dataset(rows_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened(rows_path, process=make_row) as made:
        yield made


@pytest.fixture
def sample(dataset: ShmMultimodalDataset) -> Sample:
    """An untouched sample, of row 7."""
    made = dataset[7]
    assert isinstance(made, Sample)
    assert made.is_untouched()
    return made


# -- a dict in all respects, when nobody has looked into it yet ------------------------------------------------

OPERATIONS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "len": (len, 5),
    "bool": (bool, True),
    "list": (list, KEYS),
    "tuple": (tuple, tuple(KEYS)),
    "set": (set, set(KEYS)),
    "keys": (lambda s: list(s.keys()), KEYS),
    "values": (lambda s: [v for v in s.values() if isinstance(v, str)][:2], ["wörd 7", "text"]),
    "items": (lambda s: [k for k, _ in s.items()], KEYS),
    "reversed": (lambda s: list(reversed(s)), KEYS[::-1]),
    "in": (lambda s: ("a" in s, "z" in s), (True, False)),
    "getitem": (lambda s: s["a"].item(), 7),
    "get": (lambda s: (s.get("a").item(), s.get("z", 1)), (7, 1)),
    "pop": (lambda s: (s.pop("word"), "word" in s, len(s)), ("wörd 7", False, 4)),
    "pop default": (lambda s: s.pop("z", 3), 3),
    "popitem": (lambda s: s.popitem()[0], "source"),
    "setdefault": (lambda s: (s.setdefault("word", 1), s.setdefault("z", 2)), ("wörd 7", 2)),
    "del": (lambda s: (s.__delitem__("b"), list(s))[1], ["a", "word", "task_type", "source"]),
    "set item": (lambda s: (s.__setitem__("a", 1), list(s), s["a"])[1:], (KEYS, 1)),
    "update": (lambda s: (s.update(z=1), list(s))[1], [*KEYS, "z"]),
    "clear": (lambda s: (s.clear(), list(s), len(s))[1:], ([], 0)),
    "copy": (lambda s: list(s.copy()), KEYS),
    "dict": (lambda s: list(dict(s)), KEYS),
    "**": (lambda s: list(dict(**s)), KEYS),
    "unpacked": (lambda s: list({**s}), KEYS),
    "call": (lambda s: (lambda **kw: list(kw))(**s), KEYS),
    "or": (lambda s: list(s | {"z": 1}), [*KEYS, "z"]),
    "ror": (lambda s: list({"z": 1} | s), ["z", *KEYS]),
    "ior": (lambda s: list(s.__ior__({"z": 1})), [*KEYS, "z"]),
    "update of": (lambda s: (d := {}, d.update(s), list(d))[2], KEYS),
    "ior of": (lambda s: list({}.__ior__(s)), KEYS),
    "fromkeys": (lambda s: list(dict.fromkeys(s)), KEYS),
    "repr": (lambda s: repr(s).startswith("{'a': tensor(7)"), True),
    "format_map": (lambda s: "{word}".format_map(s), "wörd 7"),
    "percent": (lambda s: "%(word)s" % s, "wörd 7"),  # noqa: UP031
    "json": (lambda s: list(json.loads(json.dumps(s, default=str))), KEYS),
    "json sorted": (lambda s: list(json.loads(json.dumps(s, default=str, sort_keys=True))), sorted(KEYS)),
    "json indented": (lambda s: list(json.loads(json.dumps(s, default=str, indent=1))), KEYS),
    "json of strings": (lambda s: json.dumps({k: v for k, v in s.items() if k == "word"}), '{"word": "w\\u00f6rd 7"}'),
    "is dict": (lambda s: isinstance(s, dict), True),
    "is Mapping": (lambda s: isinstance(s, collections.abc.Mapping), True),
    "is MutableMapping": (lambda s: isinstance(s, collections.abc.MutableMapping), True),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_untouched_sample_acts_as_the_dict_it_stands_for(sample: Sample, name: str) -> None:
    operation, expected = OPERATIONS[name]
    assert operation(sample) == expected


def test_untouched_sample_matches_a_mapping_pattern(sample: Sample) -> None:
    match sample:
        case {"word": str(word), **rest}:
            assert word == "wörd 7"
            assert list(rest) == ["a", "b", "task_type", "source"]
        case _:
            pytest.fail("no match")


def test_equal_samples_of_strings_compare_equal_untouched(dataset: ShmMultimodalDataset) -> None:
    """Neither side was looked into; tensors with more than one element cannot be compared by dicts at all."""
    left, right, other = dataset[0], dataset[0], dataset[5]
    assert len(dataset[0]["b"]) == len(dataset[5]["b"]) == 1
    assert left == right
    assert not left != right  # noqa: SIM202
    assert dataset[0] != other
    assert dict(dataset[0]) == dataset[0]
    assert dataset[0] == dict(dataset[0])


def test_made_sample_is_a_plain_dict_of_its_arguments() -> None:
    assert Sample({"a": 1}, b=2) == {"a": 1, "b": 2}
    assert not Sample()


def test_default_convert_keeps_the_values(sample: Sample) -> None:
    converted = default_convert(sample)
    assert list(converted) == KEYS
    assert converted["a"].item() == 7
    assert converted["word"] == "wörd 7"


def test_sample_that_cannot_be_filled_raises_each_time(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed first look does not leave an empty dict."""
    monkeypatch.setattr(Sample, "_fill", lambda self: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            len(sample)


def test_threads_that_open_one_sample_all_see_all_of_it(dataset: ShmMultimodalDataset) -> None:
    for row in range(50):
        shared, seen = dataset[row], []
        barrier = threading.Barrier(4)

        def look(shared: Any = shared, seen: Any = seen, barrier: Any = barrier) -> None:
            barrier.wait()
            seen.append(list(shared))

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [KEYS] * 4


# -- values ----------------------------------------------------------------------------------------------------


def test_text_of_process_comes_as_str(sample: Sample) -> None:
    assert sample["word"] == "wörd 7"
    assert type(sample["word"]) is str


def test_arrays_of_process_come_as_tensors(sample: Sample) -> None:
    assert torch.equal(sample["b"], torch.arange(3, dtype=torch.float32))
    assert sample["a"].shape == ()
    assert sample["a"].dtype == torch.int64


def test_float32_image_is_the_normalised_uint8_image(images_path: str, make_dataset: Any) -> None:
    as_float = make_dataset(images_path)
    as_bytes = make_dataset(images_path, config=MultimodalConfig(vision_dim=SIDE, image_dtype="uint8"))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for row in (0, 7, NUM_IMAGES - 1):
        stored = as_bytes[row]["image"]
        assert stored.dtype == torch.uint8
        assert stored.shape == (3, SIDE, SIDE)
        expected = (stored.float() / 255 - mean) / deviation
        torch.testing.assert_close(as_float[row]["image"], expected, rtol=0, atol=1e-5)


def test_uint8_image_is_the_decoded_image(images_path: str, make_dataset: Any) -> None:
    """Against `decode_image` of the same bytes, at the size they have."""
    import pyarrow.parquet as pq

    dataset = make_dataset(images_path, config=MultimodalConfig(vision_dim=SIDE, image_dtype="uint8"))
    jpeg = pq.read_table(images_path)["image"][3].as_py()["bytes"]
    assert np.array_equal(dataset[3]["image"].numpy(), decode_image(jpeg, SIDE).transpose(2, 0, 1))


# -- lifetime and protection -----------------------------------------------------------------------------------


def _maps_line(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            return line
    raise AssertionError(f"{address:#x} is not mapped")


def test_storage_of_a_view_lies_in_the_ring(dataset: ShmMultimodalDataset, sample: Sample) -> None:
    mapping = dataset._reader.attach().mapping
    assert mapping.holds(sample["b"].data_ptr())
    assert mapping.holds(sample["b"].data_ptr() + sample["b"].untyped_storage().nbytes() - 1)
    assert not mapping.holds(sample["b"].clone().data_ptr())


def test_view_is_mapped_shared_and_without_write_permission(sample: Sample) -> None:
    line = _maps_line(sample["b"].data_ptr())
    assert line.split()[1] == "r--s"
    assert "shmloader-ring" in line


def test_mprotect_cannot_make_a_view_writable(sample: Sample) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    page = sample["b"].data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    address, size, protection = ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mprotect(address, size, protection) == -1
    assert ctypes.get_errno() == 13  # EACCES


def test_views_stay_valid_after_close(rows_path: str) -> None:
    with opened(rows_path, process=make_row) as dataset:
        touched, untouched = dataset[4], dataset[9]
        view = touched["b"]
        dataset.close()
        assert torch.equal(view, torch.arange(5, dtype=torch.float32))
        assert untouched["word"] == "wörd 9"
        assert torch.equal(torch.utils.data.default_collate([touched, untouched])["a"], torch.tensor([4, 9]))


def test_views_stay_valid_after_the_dataset_is_gone(rows_path: str) -> None:
    with opened(rows_path, process=make_row) as dataset:
        mapping = dataset._reader.attach().mapping
        view = dataset[4]["b"]
        dataset.close()
    del dataset
    gc.collect()
    assert torch.equal(view, torch.arange(5, dtype=torch.float32))
    assert mapping.holds(view.data_ptr())


def test_ring_is_unmapped_with_the_last_view(rows_path: str) -> None:
    with opened(rows_path, process=make_row) as dataset:
        view = dataset[4]["b"]
        line = _maps_line(view.data_ptr()).split()
        dataset.close()
    del dataset
    gc.collect()
    assert line[0] in Path("/proc/self/maps").read_text()
    del view
    gc.collect()
    assert line[-1] not in Path("/proc/self/maps").read_text() or line[0] not in Path("/proc/self/maps").read_text()


def _saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), _saved],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_copies_are_private(dataset: ShmMultimodalDataset, sample: Sample, duplicate: Callable[[Any], Any]) -> None:
    made = duplicate(sample)
    assert list(made) == KEYS
    assert not dataset._reader.attach().mapping.holds(made["b"].data_ptr())
    made["b"].fill_(9)
    assert torch.equal(dataset[7]["b"], torch.arange(3, dtype=torch.float32))


def test_writable_gives_private_copies(rows_path: str, make_dataset: Any) -> None:
    dataset = make_dataset(rows_path, process=make_row, writable=True)
    first = dataset[4]
    first["b"].fill_(9)
    assert torch.equal(dataset[4]["b"], torch.arange(5, dtype=torch.float32))
    assert torch.equal(torch.utils.data.default_collate([first])["b"][0], torch.full((5,), 9.0))


def test_views_need_no_warning_of_torch(dataset: ShmMultimodalDataset, recwarn: pytest.WarningsRecorder) -> None:
    dataset[3]["b"]
    assert not recwarn.list


# -- an in-place write is told as what it is -------------------------------------------------------------------

_START = """
import faulthandler, os, signal, sys
import torch
from torch.utils.data import DataLoader
from shmloader import Options, ShmMultimodalDataset
def start():
    options = Options(ring_bytes="16MiB", prefetchers=1)
    return ShmMultimodalDataset(dataset_name=sys.argv[1], process=lambda row: {"b": [1.0, row["x"]]}, options=options)
"""


def _check_advice(stderr: str) -> None:
    for part in ("in-place write", "writable=True", "transform", "clone()"):
        assert part in stderr


def test_write_to_a_view_is_reported_and_ends_the_process(rows_path: str) -> None:
    done = run_script(_START + "start()[3]['b'].add_(1)", rows_path)
    assert done.returncode == -signal.SIGSEGV
    _check_advice(done.stderr)
    assert done.stderr.count("in-place write") == 1


def test_write_to_a_view_is_reported_beside_faulthandler(rows_path: str) -> None:
    done = run_script(_START + "faulthandler.enable()\nstart()[3]['b'].add_(1)", rows_path)
    assert done.returncode == -signal.SIGSEGV
    _check_advice(done.stderr)
    assert "Fatal Python error: Segmentation fault" in done.stderr


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_write_to_a_view_is_reported_in_a_worker(rows_path: str, method: str) -> None:
    """torch puts its own handler into each worker; ours comes after it, and torch still says its part."""
    script = f"""{_START}
class Writer(torch.utils.data.Dataset):
    def __init__(self, dataset): self.dataset = dataset
    def __len__(self): return len(self.dataset)
    def __getitem__(self, i): return self.dataset[i]["b"].add_(1)
if __name__ == "__main__":
    loader = DataLoader(Writer(start()), num_workers=1, multiprocessing_context={method!r})
    try:
        list(loader)
    except RuntimeError as error:
        print(error)
"""
    done = run_script(script, rows_path)
    assert done.returncode == 0, done.stderr
    _check_advice(done.stderr)
    assert "DataLoader worker" in done.stdout


def test_fault_elsewhere_is_none_of_ours(rows_path: str) -> None:
    done = run_script(_START + "dataset = start(); dataset[3]\nimport ctypes; ctypes.string_at(0)", rows_path)
    assert done.returncode == -signal.SIGSEGV
    assert "shmloader" not in done.stderr


def test_fault_elsewhere_goes_to_the_handler_before(rows_path: str) -> None:
    script = _START + "faulthandler.enable()\ndataset = start(); dataset[3]\nimport ctypes; ctypes.string_at(0)"
    done = run_script(script, rows_path)
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert "shmloader:" not in done.stderr


def test_read_only_memory_of_others_is_none_of_ours(rows_path: str) -> None:
    """An access fault as ours are, at an address that is not ours."""
    script = (
        _START
        + """
dataset = start(); dataset[3]
import ctypes, mmap
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4096), mmap.PROT_READ)
ctypes.memset(address, 1, 1)
"""
    )
    done = run_script(script, rows_path)
    assert done.returncode == -signal.SIGSEGV
    assert "shmloader" not in done.stderr


def test_view_of_the_parent_is_reported_in_a_forked_child(rows_path: str) -> None:
    script = (
        _START
        + """
view = start()[3]["b"]
pid = os.fork()
if pid == 0:
    view.sum().item()
    os._exit(0)
assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV
assert view.sum().item() == 4
"""
    )
    done = run_script(script, rows_path)
    assert done.returncode == 0, done.stderr
    assert "made before fork()" in done.stderr


def test_untouched_sample_of_the_parent_is_an_error_in_a_forked_child(rows_path: str) -> None:
    script = (
        _START
        + """
sample = start()[3]
pid = os.fork()
if pid == 0:
    try:
        len(sample)
    except RuntimeError as error:
        os._exit(7 if "fork" in str(error) else 8)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""
    )
    done = run_script(script, rows_path)
    assert done.returncode == 0, done.stderr
