"""Every format, from every place, in every way: the rows are those of ``datasets``, and docs/formats.md says how."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
from conftest import opened
from formats_data import CLASSES, FORMATS, Format, media
from formats_matrix import Cell, Matrix, find, in_document, plain, table, with_bytes
from torch.utils.data import DataLoader

from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import SourceRequest


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return find(tmp_path_factory.mktemp("formats"))


def told(cells: dict[tuple[Format, str, str], Cell]) -> list[str]:
    return [f"{each.key}, {place}, {way}: {cell.error}" for (each, place, way), cell in cells.items()]


def test_rows_are_those_of_datasets_whatever_the_format_the_place_and_the_way(matrix):
    assert told({key: cell for key, cell in matrix.items() if not cell.error and not cell.is_equal}) == []


def test_nothing_cannot_be_read(matrix):
    assert told({key: cell for key, cell in matrix.items() if cell.error}) == []


def test_document_has_the_table_that_was_found(matrix):
    assert in_document() == table(matrix), "run: make formats"


def test_document_explains_each_mode_of_the_table(matrix):
    from formats_matrix import DOCUMENT

    modes = {cell.mode for cell in matrix.values() if cell.mode}
    explained = set(re.findall(r"^\| ([\w ]+) \|", DOCUMENT.read_text().split("## The modes")[1], re.MULTILINE))
    assert modes <= explained


OBJECTS = {
    "as it is": lambda rows: rows,
    "selected": lambda rows: rows.select([5, 1, 3]),
    "shuffled": lambda rows: rows.shuffle(seed=1),
    "with a format": lambda rows: rows.with_format("numpy"),
    "concatenated": lambda rows: datasets.concatenate_datasets([rows, rows.select([2])]),
    "iterable": lambda rows: rows.to_iterable_dataset(num_shards=2),
    "iterable, shuffled": lambda rows: rows.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=3),
}


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("change", OBJECTS)
def test_rows_of_datasets_objects_are_their_own(change, kind):
    rows = media(kind)
    expected = OBJECTS[change](rows.cast_column(kind, type(rows.features[kind])(decode=False)))
    request = SourceRequest(OBJECTS[change](rows), "train", all_columns=True)
    plan = make_plan(request)
    assert plan.mode == ("sequential" if change.startswith("iterable") else "loaded")
    reader = open_reader(request, plan)
    found = [row for chunk in plan.chunks for _, batch in reader.read(chunk) for row in batch.to_pylist()]
    assert [plain(row) for row in found] == [plain(row) for row in map(with_bytes, expected.with_format(None))]


WHOLE = [each for each in FORMATS if "images" in each.carries or "text" in each.carries]
WHOLE = list({each.name: each for each in reversed(WHOLE)}.values())


def size_and_label(row: dict[str, object]) -> dict[str, object]:
    """A `process`: how much there is in a row, and its class."""
    content = next(row[name] for name in ("image", "png", "audio", "wav", "text", "txt") if name in row)
    size = len(content["bytes"] if isinstance(content, dict) else content)
    return {"size": size, "label": int(row.get("label", row.get("cls", 0)))}


@pytest.mark.parametrize("each", WHOLE, ids=lambda each: each.key)
def test_whole_set_gives_a_loader_every_row(each, tmp_path: Path):
    each.write(tmp_path / "data")
    with opened(str(tmp_path / "data"), process=size_and_label) as dataset:
        batches = list(DataLoader(dataset, batch_size=5))
    sizes = [int(size) for batch in batches for size in batch["size"]]
    assert min(sizes) > 0
    assert len(sizes) == each.num_rows
    if "labels" in each.carries:
        labels = [int(label) for batch in batches for label in batch["label"]]
        assert sorted(labels) == sorted([i % len(CLASSES) for i in range(len(labels))])
