"""One variant in a process of its own: ``python -m bench.child``, driven by lines of JSON on stdin.

::

    {"open": {variant, workload, folder, num_samples, num_workers, reference}}  →  {"open_s"}
    {"check": true}         one epoch, every byte of it read     →  {"is_right", "peak_memory_bytes"}
    {"measure": seconds}    whole epochs for at least that long  →  {"num_samples", "seconds", "cpu_s", "is_right", …}
    {"close": true}         →  {"facts"}, and the process ends

The measured loop reads one element of every sample and does nothing else, the same in all variants.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from bench.checksum import Checksum
from bench.loaders import DECODE, Loader, open_loader
from bench.workload import BATCH_SIZE, Workload
from shmloader.cli.memory import job_memory

#: How often the memory of all processes is looked at during an epoch that is not timed.
_MEMORY_SAMPLES = 4
#: Mean difference of the touched pixels where Pillow made them, of 255.
_MAX_TOUCHED_DIFFERENCE = 4.0


class Child:
    """The variant, once it is open, and what its output should be."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.workload = Workload(order["workload"], Path(order["folder"]), order["num_samples"])
        self.reference = Checksum.from_json(order["reference"])
        self.is_exact = (order["variant"], self.workload.name) != (DECODE, "images")
        torch.manual_seed(0)
        self.loader: Loader = open_loader(order["variant"], self.workload, order["num_workers"])
        self.epoch_s = math.inf

    def check(self) -> dict[str, Any]:
        """An epoch whose every byte is read; the first one also warms up."""
        found, peak_bytes = Checksum(), 0
        num_batches = math.ceil(self.workload.num_samples / BATCH_SIZE)
        looked_at = {num_batches * (i + 1) // _MEMORY_SAMPLES - 1 for i in range(_MEMORY_SAMPLES)}
        for position, batch in enumerate(self.loader.epoch()):
            found.add(self.loader.fields(batch), self.workload)
            if position in looked_at:
                peak_bytes = max(peak_bytes, job_memory(self.loader.service_pids()).total.total_bytes)
        is_right = found.agrees(self.reference, self.is_exact)
        return {"is_right": is_right, "peak_memory_bytes": peak_bytes, "seen": None if is_right else vars(found)}

    def measure(self, at_least_s: float) -> dict[str, Any]:
        """Whole epochs, as many as last so long by the measurement before this one."""
        num_epochs = max(1, math.ceil(at_least_s / self.epoch_s)) if math.isfinite(self.epoch_s) else 1
        touched_sum = num_samples = 0
        first, touched = self.loader.first, self.workload.touched
        cpu_before = self._cpu_s()
        started = time.perf_counter()
        for _ in range(num_epochs):
            for batch in self.loader.epoch():
                tensor = first(batch)
                num_samples += len(tensor)
                touched_sum += int(tensor[touched].sum())
        seconds = time.perf_counter() - started
        self.epoch_s = seconds / num_epochs
        return {
            "num_epochs": num_epochs,
            "num_samples": num_samples,
            "seconds": seconds,
            "cpu_s": self._cpu_s() - cpu_before,
            "is_right": self._touched_is_right(num_samples, touched_sum, num_epochs),
        }

    def _touched_is_right(self, num_samples: int, touched: int, num_epochs: int) -> bool:
        if num_samples != num_epochs * self.workload.num_samples:
            return False
        apart = abs(touched - num_epochs * self.reference.touched)
        return apart == 0 if self.is_exact else apart <= _MAX_TOUCHED_DIFFERENCE * num_samples

    def _cpu_s(self) -> float:
        """CPU time of this process, of its workers and of the loader's services, ended ones included."""
        total = time.process_time() + sum(os.times()[2:4])
        children = [process.pid for process in psutil.Process().children(recursive=True)]
        for pid in {*children, *self.loader.service_pids()}:
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total


def serve(orders: TextIO, answers: TextIO) -> None:
    """Do what the lines say, until one says close or there are no more."""
    child: Child | None = None
    for line in orders:
        order = json.loads(line)
        answer: dict[str, Any]
        if "open" in order:
            started = time.perf_counter()
            child = Child(order["open"])
            answer = {"open_s": time.perf_counter() - started}
        elif child is None:
            raise ValueError(f"nothing is open, but got {line!r}")
        elif "check" in order:
            answer = child.check()
        elif "measure" in order:
            answer = child.measure(order["measure"])
        else:
            answer = {"facts": child.loader.facts()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "close" in order:
            break
    if child is not None:
        child.loader.close()


def main() -> None:
    """Answers go to what was stdout; whatever libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
