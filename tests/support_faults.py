"""A Hub that fails and those who ask it, in one fresh interpreter: `ask` runs a function of a test in one.

Only an interpreter that has the Hub's address from its start on asks it; and many faults cost one such start.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from hub import Hub, serve

TESTS = Path(__file__).parent
NAME = "org/texts"
#: Of each request, in seconds; a third of it is how long a stall is waited for.
TIMEOUT_S = 1.5
_SCRIPT = """
import importlib, json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support_faults import World
module, name, out = sys.argv[2:5]
with World.made(sys.argv[5]) as world:
    told = getattr(importlib.import_module(module), name)(world)
    Path(out).write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)  # as a prefetcher ends: pyarrow's threads can abort an interpreter's exit
"""


def ask(function: Callable[[World], Any], tmp_path: Path) -> Any:
    """What ``function``, of a test's module, returns (JSON) when it is called with a `World` in a fresh interpreter."""
    from support_parquet import run

    out, module = tmp_path / "told.json", inspect.getmodule(function)
    assert module is not None
    run(_SCRIPT, [TESTS, module.__name__, function.__name__, out, tmp_path], tmp_path)
    return json.loads(out.read_text())


@dataclass
class Outcome:
    """What came of a request: the rows' texts, or an error; and how long it took."""

    texts: list[str] | None
    error: dict[str, Any] | None
    took_s: float
    mode: str = ""

    @property
    def data(self) -> dict[str, Any]:
        """Of the error."""
        assert self.error is not None, self
        return dict(self.error["data"])


@dataclass
class World:
    """A Hub with one dataset, and what asks it in this process."""

    hub: Hub
    folder: Path
    texts: tuple[str, ...] = tuple(f"text {i} {os.urandom(30).hex()}" for i in range(200))

    @classmethod
    def made(cls, folder: str) -> Any:
        """One in an interpreter that has imported none of the libraries yet, as a context manager."""
        from contextlib import contextmanager

        @contextmanager
        def making() -> Any:
            with serve(Path(folder) / "hub") as hub:
                os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
                from support_parquet import write_card, write_texts  # now they may see it

                world = cls(hub, Path(folder))
                write_card(write_texts(hub.root / NAME, list(world.texts), row_group=50), len(world.texts))
                yield world

        return making()

    def forget(self) -> None:
        """As if nothing had been asked before: empty caches, a Hub without faults."""
        from huggingface_hub import HfFileSystem

        from shmloader.sources import patience

        self.hub.faults.clear()
        self.hub.reset()
        shutil.rmtree(self.folder / "home", ignore_errors=True)
        HfFileSystem.clear_instance_cache()
        if patience._patience is not None:
            patience._patience._hosts.clear()

    def request(self, **asked: Any) -> Any:
        """A request of the dataset."""
        from shmloader.sources.base import SourceRequest

        return SourceRequest(NAME, "train", **({"source_timeout_s": TIMEOUT_S} | asked))

    def plan(self, **asked: Any) -> Any:
        """The dataset's plan. Raises as `make_plan`."""
        from shmloader.sources import make_plan

        return make_plan(self.request(**asked))

    def read(self, plan: Any, **asked: Any) -> list[str]:
        """The texts of all its rows. Raises as `Reader.read`."""
        from shmloader.sources import open_reader

        reader = open_reader(self.request(**asked), plan)
        parts = [part for chunk in plan.chunks for _, part in reader.read(chunk)]
        reader.close()
        return list(pa.Table.from_batches(parts, plan.schema).column("text").to_pylist())

    def outcome(self, plan: Any = None, **asked: Any) -> Outcome:
        """What comes of planning (unless there is a plan) and reading."""
        from shmloader.errors import ShmloaderError, to_wire

        began, mode = time.monotonic(), ""
        texts, error = None, None
        try:
            plan = self.plan(**asked) if plan is None else plan
            mode = plan.mode
            texts = self.read(plan, **asked)
        except ShmloaderError as failure:
            error = to_wire(failure)
        return Outcome(texts, error, time.monotonic() - began, mode)
