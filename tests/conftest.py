"""Small datasets on disk, sets that are closed and looked after, and scripts that run in a process of their own."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shmloader import MultimodalConfig, Options, ShmMultimodalDataset

# Warnings are errors in the services as well, and in all other programs that tests start.
os.environ["PYTHONWARNINGS"] = "error"
# A shell that runs the tests in the background has them ignore it, and all programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Pixels of a side of the test images: small, so that decoding costs nothing.
SIDE = 16
#: How long a condition may take to come true; only a broken one takes that long.
PATIENCE_S = 30.0

NUM_IMAGES = 60
NUM_TEXTS = 100
NUM_ROWS = 200


#: Most tests at a time, if nobody says how many: each may have a handful of processes.
MOST_WORKERS = 4


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many ``-n auto`` are: one a core that we may use, `MOST_WORKERS` at most."""
    del config
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    """Caches (plans, the demo's data, a Hub's files) are of this run, its workers' together, and gone with it."""
    if hasattr(config, "workerinput"):  # it has the environment of the process that started it
        return
    cache = tempfile.mkdtemp(prefix="shmloader-tests-cache-")
    os.environ["XDG_CACHE_HOME"] = cache
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What tests hand to services travels by value: else each service imports the test's module, and torch with it.

    That takes two seconds of a core, for each of several processes of a test.
    """
    import cloudpickle

    del session
    here = Path(__file__).parent
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).parent == here:
            cloudpickle.register_pickle_by_value(module)


def text_of(i: int) -> str:
    """The text of row ``i``; lengths differ."""
    return f"row {i} " + "x" * (i * 7 % 23)


def write_rows(folder: Path, **columns: list[Any]) -> str:
    """A Parquet dataset with these columns, in row groups of 32; returns its name for a dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "data.parquet", row_group_size=32)
    return str(folder)


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`NUM_ROWS` rows of ``x`` (0, 1, …) and ``word``, for a ``process``."""
    words = [f"w{i}" for i in range(NUM_ROWS)]
    return write_rows(tmp_path_factory.mktemp("rows"), x=list(range(NUM_ROWS)), word=words)


@pytest.fixture(scope="session")
def texts_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`NUM_TEXTS` rows of ``text`` (`text_of`)."""
    return write_rows(tmp_path_factory.mktemp("texts"), text=[text_of(i) for i in range(NUM_TEXTS)])


@pytest.fixture(scope="session")
def images_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`NUM_IMAGES` rows of ``image`` (JPEG) and ``label`` (0 to 4)."""
    import datasets

    folder = tmp_path_factory.mktemp("images")
    columns = {
        "image": [{"bytes": _jpeg(i), "path": f"{i}.jpg"} for i in range(NUM_IMAGES)],
        "label": [i % 5 for i in range(NUM_IMAGES)],
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("abcde")))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "data.parquet", batch_size=32)
    return str(folder)


def small_options(**changes: Any) -> Options:
    """A small ring and one prefetcher."""
    return Options(**{"ring_bytes": "32MiB", "prefetchers": 1, "timeout_s": PATIENCE_S, **changes})


@contextlib.contextmanager
def opened(dataset_name: Any, kind: Any = ShmMultimodalDataset, **arguments: Any) -> Iterator[Any]:
    """A dataset with a small ring; closed at the end, and its processes and files must be gone then."""
    with no_leaks() as watch:
        arguments.setdefault("config", MultimodalConfig(vision_dim=SIDE))
        arguments.setdefault("options", small_options())
        dataset = kind(dataset_name=dataset_name, **arguments)
        try:
            watch(dataset)
            yield dataset
        finally:
            if not dataset._reader.is_closed:
                watch(dataset)
                dataset.close()


@contextlib.contextmanager
def no_leaks() -> Iterator[Callable[[ShmMultimodalDataset], None]]:
    """Services of the datasets that it is called with end, and nothing new stays in /dev/shm."""
    before = set(Path("/dev/shm").iterdir())
    pidfds: dict[int, int] = {}

    def watch(dataset: ShmMultimodalDataset) -> None:
        for pid in dataset.stats().service_pids:
            if pid not in pidfds:
                with contextlib.suppress(ProcessLookupError):
                    pidfds[pid] = os.pidfd_open(pid)

    yield watch
    gc.collect()
    try:
        for pid, pidfd in pidfds.items():
            assert select.select([pidfd], [], [], PATIENCE_S)[0], f"service {pid} outlives its set"
    finally:
        for pidfd in pidfds.values():
            os.close(pidfd)
    # Other programs of the machine use it too, for moments, other tests at work among them: what was there at once and
    # stays is ours.
    ours = set(Path("/dev/shm").iterdir()) - before
    assert wait_until(lambda: ours.isdisjoint(Path("/dev/shm").iterdir())), ours & set(Path("/dev/shm").iterdir())


def wait_until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
    """Whether ``condition`` comes true."""
    until = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > until:
            return False
        select.select([], [], [], 0.01)
    return True


@pytest.fixture
def make_dataset() -> Iterator[Callable[..., ShmMultimodalDataset]]:
    """Makes datasets (`opened`) that are closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(opened(*args, **kwargs))


def run_script(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own; its output and exit status (-11: SIGSEGV)."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:  # a file: spawned workers import it
        file.write(textwrap.dedent(text))
        file.flush()
        return subprocess.run(
            [sys.executable, file.name, *arguments],
            capture_output=True,
            text=True,
            timeout=55,
            env={**os.environ, **environment},
            check=False,
        )
