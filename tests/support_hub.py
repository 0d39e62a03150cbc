"""Datasets on a loopback Hub, planned and read in fresh interpreters: only there the clients see its address."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from hub import Hub
from support_parquet import read_file, run

#: Plans a request, reads all of it, and writes both; or the error.
_PLAN_AND_READ = """
import json, logging, os, sys
logging.basicConfig(level=logging.WARNING)
logging.getLogger("shmloader").setLevel("INFO")
from shmloader.errors import ShmloaderError, to_wire
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest
import pyarrow as pa
dataset, asked, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
exec(os.environ.get("BEFORE", ""))
request = SourceRequest(dataset, **asked)
try:
    plan = make_plan(request)
    text = plan.to_json()
    chunks = plan.chunks
    reader = open_reader(request, plan)
    if plan.is_open:
        chunks = [Chunk(0, 10**6, 0, (0, 0, 0))]
        parts = list(reader.read(chunks[0], lambda row: True))
    else:
        parts = [part for chunk in chunks for part in reader.read(chunk)]
    with pa.OSFile(out + ".arrow", "wb") as sink, pa.ipc.new_stream(sink, plan.schema) as writer:
        for first, batch in parts:
            writer.write_batch(batch)
except ShmloaderError as error:
    text = json.dumps({"error": to_wire(error)})
open(out + ".json", "w").write(text)
sys.stdout.flush()
os._exit(0)  # as a prefetcher ends: pyarrow's threads can abort an interpreter's exit
"""

#: Not to wait for a Hub that is not there.
IMPATIENT = 'asked.setdefault("source_timeout_s", 0.5)'


@dataclass
class Found:
    """What came of a request: its plan (as JSON) and rows, or its error (as `to_wire` makes it)."""

    plan: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        """The plan's mode."""
        assert not self.error, self.error["message"]
        return str(self.plan["mode"])

    @property
    def message(self) -> str:
        """The error's message."""
        assert self.error, self.plan
        return str(self.error["message"])

    def told(self, kind: str = "notices") -> str:
        """All notices, or warnings."""
        assert not self.error, self.error["message"]
        return "\n".join(self.plan[kind])


def ask(hub: Hub, name: str, tmp_path: Path, *, before: str = "", env: Any = None, **asked: Any) -> Found:
    """Plan and read ``name`` from ``hub``, with the caches of ``tmp_path``. asked: of the `SourceRequest`."""
    out = tmp_path / "found"
    for ending in (".json", ".arrow"):
        out.with_suffix(ending).unlink(missing_ok=True)
    more = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "BEFORE": before, **(env or {})}
    run(_PLAN_AND_READ, [name, json.dumps({"split": "train", **asked}), out], tmp_path, **more)
    told = json.loads(out.with_suffix(".json").read_text())
    if "error" in told:
        return Found(error=told["error"])
    table: pa.Table = read_file(out.with_suffix(".arrow"))
    return Found(plan=told, rows=table.to_pylist())


def ask_offline(hub: Hub, name: str, tmp_path: Path, **asked: Any) -> Found:
    """The same in offline mode; makes sure that nothing is requested."""
    hub.reset()
    found = ask(hub, name, tmp_path, env={"HF_HUB_OFFLINE": "1"}, **asked)
    assert hub.requests == []
    return found


def fill_cache(hub: Hub, name: str, tmp_path: Path, **arguments: Any) -> None:
    """What ``hf download`` does."""
    asked = {"repo_id": name, "repo_type": "dataset", **arguments}
    script = "import json, sys; from huggingface_hub import snapshot_download as get; get(**json.loads(sys.argv[1]))"
    run(script, [json.dumps(asked)], tmp_path, HF_ENDPOINT=hub.endpoint)


def write_json(path: Path, first: int, num: int) -> None:
    """Lines of JSON: ``text`` and ``label``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in json_rows(first, num)))


def json_rows(first: int, num: int) -> list[dict[str, Any]]:
    """The rows of `write_json`."""
    return [{"text": f"text {i}", "label": i} for i in range(first, first + num)]
