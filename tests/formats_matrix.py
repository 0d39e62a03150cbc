"""What is read of each format, from each place, in each way, compared with what ``datasets`` gives; and a table of it.

``python tests/formats_matrix.py`` writes the table into docs/formats.md. Each place is asked in a fresh interpreter,
since the clients of the Hub take its address from the environment once.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats_data import FORMATS, Format
from hub import Hub, serve

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "formats.md"
BEGIN, END = "<!-- table: made by `make formats` -->", "<!-- end of the table -->"
PLACES = ("local", "Hub", "offline")
#: How a request asks: of `SourceRequest`.
WAYS: dict[str, dict[str, bool]] = {
    "map-style": {},
    "iterable": {"is_iterable": True},
    "`use_streaming=False`": {"is_downloaded": True},
}
TIMEOUT_S = 200

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """What came of one request. mode: of its plan; error: why there is none. is_counted: len() is known."""

    mode: str = ""
    is_counted: bool = False
    is_equal: bool = False
    error: str = ""

    @property
    def text(self) -> str:
        """As it stands in the table."""
        if self.error:
            return "—"
        return f"{self.mode}{'' if self.is_counted else ', open'}"


Matrix = dict[tuple[Format, str, str], Cell]


def find(folder: Path) -> Matrix:
    """All cells; ``folder`` is for data and caches."""
    for each in FORMATS:
        each.write(folder / "hub" / "org" / each.key)
    expected = {each.key: reference(folder, each) for each in FORMATS}
    found: dict[str, dict[str, Any]] = {}
    with serve(folder / "hub") as hub:
        _run("fill", folder, hub, "offline")
        for place in PLACES:
            hub.reset()
            found[place] = _run("read", folder, hub, place)
            assert place == "Hub" or not hub.requests, f"{place}: {hub.requests[:3]}"
    return {
        (each, place, way): _cell(found[place][each.key][way], expected[each.key])
        for each in FORMATS
        for place in PLACES
        for way in WAYS
    }


def reference(folder: Path, each: Format) -> Rows:
    """The rows of ``datasets`` itself."""
    import datasets

    with _plain_audio():
        rows = datasets.load_dataset(
            str(folder / "hub" / "org" / each.key), split="train", cache_dir=str(folder / "reference")
        )
    for name, feature in rows.features.items():
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return [plain(with_bytes(row)) for row in rows]


def with_bytes(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ``datasets``, with the content of the files that it names."""
    media = {name: value for name, value in row.items() if _is_media(value) and value["bytes"] is None}
    return row | {name: value | {"bytes": Path(value["path"]).read_bytes()} for name, value in media.items()}


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row for comparison: of files their names and content; not the archive's path, which depends on the place."""
    return {name: _plain_value(value) for name, value in row.items() if name != "__url__"}


def table(matrix: Matrix) -> str:
    """The cells as Markdown."""
    heads = [f"{place}, {way}" for place in PLACES for way in WAYS]
    rows = [["format", "files", "carries", *heads]]
    rows += [
        [each.name, f"`{each.files}`", each.carries, *(matrix[each, p, w].text for p in PLACES for w in WAYS)]
        for each in FORMATS
    ]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def in_document() -> str:
    """The table as it stands in docs/formats.md."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip() + "\n"


def write_document(matrix: Matrix) -> None:
    """Put the table into docs/formats.md."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table(matrix)}\n{END}{rest.split(END)[1]}")


def _is_media(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def _plain_value(value: Any) -> Any:
    if _is_media(value):
        path = value["path"]
        return [Path(path).name if path else None, hashlib.sha1(value["bytes"]).hexdigest()]
    return value


def _cell(told: dict[str, Any], expected: Rows) -> Cell:
    if "error" in told:
        return Cell(error=told["error"])
    return Cell(told["mode"], told["is_counted"], told["rows"] == expected)


@contextmanager
def _plain_audio() -> Iterator[None]:
    """Audio that is encoded without torchcodec, in the reference."""
    from datasets import Audio

    encode: Callable[..., Any] = Audio.encode_example
    Audio.encode_example = lambda _, value: value if isinstance(value, dict) else {"bytes": None, "path": value}
    try:
        yield
    finally:
        Audio.encode_example = encode


# ---- in the other interpreter --------------------------------------------------------------------------


def _run(task: str, folder: Path, hub: Hub, place: str) -> dict[str, Any]:
    base = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {
        "HF_HOME": str(folder / f"home-{place}"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "USE_TORCH": "0",
    }
    if place == "offline" and task == "read":
        env["HF_HUB_OFFLINE"] = "1"
    out = folder / f"{task}-{place}.json"
    arguments = [sys.executable, __file__, task, place, str(folder), str(out)]
    subprocess.run(arguments, env=base | env, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def _fill() -> dict[str, Any]:
    from huggingface_hub import snapshot_download

    for each in FORMATS:
        snapshot_download(f"org/{each.key}", repo_type="dataset")
    return {}


def _read(folder: Path, place: str) -> dict[str, Any]:
    """Of each format and way: mode and rows, or why there are none. Nothing is prepared before the last way."""
    found: dict[str, dict[str, Any]] = {each.key: {} for each in FORMATS}
    for way, asked in WAYS.items():
        for each in FORMATS:
            name = str(folder / "hub" / "org" / each.key) if place == "local" else f"org/{each.key}"
            found[each.key][way] = _ask(name, asked, folder / f"prepared-{place}-{way.strip('`')}")
    return found


def _ask(name: str, asked: dict[str, bool], prepared: Path) -> dict[str, Any]:
    import datasets

    from shmloader.errors import ShmloaderError
    from shmloader.sources import make_plan, open_reader
    from shmloader.sources.base import Chunk, SourceRequest

    datasets.config.HF_DATASETS_CACHE = prepared
    request = SourceRequest(name, "train", all_columns=True, **asked)
    try:
        plan = make_plan(request)
        reader: Any = open_reader(request, plan)
        if plan.is_open:
            parts = reader.read(Chunk(0, 10_000, 0, (0, 0, 0)), lambda row: True)
        else:
            parts = (part for chunk in plan.chunks for part in reader.read(chunk))
        rows = [row for _, batch in parts for row in batch.to_pylist()]
    except ShmloaderError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if any(_is_media(value) and value["bytes"] is None for row in rows for value in row.values()):
        return {"error": "files are named, and not read"}
    return {"mode": plan.mode, "is_counted": not plan.is_open, "rows": [plain(row) for row in rows]}


def _main(arguments: list[str]) -> None:
    if not arguments:
        with tempfile.TemporaryDirectory() as made:
            matrix = find(Path(made))
        write_document(matrix)
        for (each, place, way), cell in matrix.items():
            if cell.error or not cell.is_equal:
                print(f"{each.name} ({each.carries}), {place}, {way}: {cell.error or 'other rows'}", file=sys.stderr)
        return
    task, place, folder, out = arguments
    result = _fill() if task == "fill" else _read(Path(folder), place)
    Path(out).write_text(json.dumps(result))
    os._exit(0)  # as a prefetcher ends: pyarrow's threads can abort an interpreter's exit


if __name__ == "__main__":
    _main(sys.argv[1:])
