"""What more workers cost in memory: no copy of the samples, only what any DataLoader worker takes and their batches."""

from __future__ import annotations

import json

import pytest
from conftest import run_script, write_rows

pytestmark = pytest.mark.timeout(120)

NUM_IMAGES = 1536
MAX_MB_PER_WORKER = 40

# Each measurement is taken while the workers live, after three epochs, with a batch in the training loop's hands.
_MEASURE = """
import gc, json, sys, warnings
import numpy as np, torch
from torch.utils.data import DataLoader, Dataset
from shmloader import Options, ShmMultimodalDataset
from shmloader.cli.memory import job_memory

class Empty(Dataset):
    def __len__(self): return int(sys.argv[2])
    def __getitem__(self, i): return i

def process(row):
    return {"image": np.full((3, 224, 224), row["x"] % 256, np.uint8), "labels": row["x"]}

def measure(dataset, num_workers, service_pids=()):
    # A full collection touches every object that a worker inherited, so copies it; when it comes is chance.
    loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=num_workers, persistent_workers=True,
                        worker_init_fn=lambda worker: gc.collect())
    for _ in range(3):
        for batch in loader:
            pass
    job = job_memory(service_pids)
    assert len(job.workers) == num_workers
    loader._iterator._shutdown_workers()
    return {
        "total": job.total.total_bytes / 1e6,
        "training": job.training.total_bytes / 1e6,
        "workers": sum(w.total_bytes for w in job.workers) / 1e6,
        "services": sum(s.total_bytes for s in job.services) / 1e6,
        "page_tables": job.total.page_table_bytes / 1e6,
    }

if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, on purpose
    torch.set_num_threads(1)
    found = {"empty 1": measure(Empty(), 1), "empty 8": measure(Empty(), 8)}
    options = Options(ring_bytes="300MiB", prefetchers=2)
    with ShmMultimodalDataset(dataset_name=sys.argv[1], process=process, options=options) as dataset:
        for num_workers in (1, 8):
            found[f"shmloader {num_workers}"] = measure(dataset, num_workers, dataset.stats().service_pids)
        stats = dataset.stats()
        found["stats"] = [stats.ring_used_bytes / 1e6, stats.batch_backed_bytes / 1e6, stats.commits,
                          stats.batches_in_slots, stats.batches_copied, stats.batches_inline]
    print(json.dumps(found))
"""


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_worker_costs_little_more_than_an_empty_one(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    """From 1 to 8 workers, PSS and page tables of all processes together grow by less than 40 MB a worker beyond what
    a DataLoader over an empty dataset grows by."""
    path = write_rows(tmp_path, x=list(range(NUM_IMAGES)))  # type: ignore[arg-type]
    done = run_script(_MEASURE, path, str(NUM_IMAGES))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ring_mb, batch_mb, commits, *_ = stats = found.pop("stats")
    growth = {kind: (found[f"{kind} 8"]["total"] - found[f"{kind} 1"]["total"]) / 7 for kind in ("empty", "shmloader")}
    beyond = growth["shmloader"] - growth["empty"]
    with capsys.disabled():
        print()
        for name, parts in found.items():
            print(f"  {name:12}", *(f"{part} {mb:.0f} MB" for part, mb in parts.items()), sep="  ")
        print(f"  a worker more: empty {growth['empty']:.1f} MB, shmloader {growth['shmloader']:.1f} MB;", end=" ")
        print(f"beyond {beyond:.1f} MB (samples {ring_mb:.0f} MB, batch ring {batch_mb:.0f} MB, {stats[3:]})")
    assert ring_mb >= 200
    assert commits == NUM_IMAGES
    assert beyond < MAX_MB_PER_WORKER
