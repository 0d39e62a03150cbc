"""What was measured of a variant, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.loaders import GATHER, OURS, TENSORS


@dataclass
class Result:
    """One variant at one number of workers. runs: what child.py answered to each "measure"."""

    workload: str
    variant: str
    num_workers: int
    runs: list[dict[str, Any]] = field(default_factory=list)
    is_right: bool = True
    peak_memory_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    open_s: float = 0.0

    @property
    def rates(self) -> list[float]:
        """Samples per second of each run."""
        return [run["num_samples"] / run["seconds"] for run in self.runs]

    @property
    def median(self) -> float:
        """Of the rates."""
        return statistics.median(self.rates)

    @property
    def cpu_s_per_1000(self) -> float:
        """CPU seconds of all processes, per 1,000 samples."""
        cpu_s, num_samples = (sum(run[key] for run in self.runs) for key in ("cpu_s", "num_samples"))
        return float(1000 * cpu_s / num_samples)

    def ratios_to(self, other: Result) -> list[float]:
        """One for each round: in it the two ran one after the other, under much the same noise."""
        return [a / b for a, b in zip(self.rates, other.rates, strict=True)]

    def ratio_to(self, other: Result) -> float:
        """Median over the rounds."""
        return statistics.median(self.ratios_to(other))


@dataclass(frozen=True)
class Target:
    """What is promised of a workload at 2 workers: at least ``need`` times the rate of ``variant``."""

    workload: str
    variant: str
    need: float
    num_workers: int = 2

    @property
    def text(self) -> str:
        """In words."""
        what = f"{self.need:.0%} of the {self.variant}" if self.need < 1 else f"{self.need:g} × {self.variant}"
        return f"{self.workload}, {self.num_workers} workers: at least {what}"


TARGETS = (Target("images", TENSORS, 5), Target("images", GATHER, 0.6), Target("text", TENSORS, 5))


def find(results: Iterable[Result], workload: str, variant: str, num_workers: int) -> Result | None:
    """The result that is asked for, if it was measured."""
    for result in results:
        if (result.workload, result.variant, result.num_workers) == (workload, variant, num_workers):
            return result
    return None


def reached(target: Target, results: Sequence[Result]) -> list[float]:
    """How many times the other's rate ours is, in each round; nothing if it was not measured."""
    ours = find(results, target.workload, OURS, target.num_workers)
    other = find(results, target.workload, target.variant, target.num_workers)
    return ours.ratios_to(other) if ours is not None and other is not None else []


def as_json(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    """One entry of the JSON."""
    tensors = find(results, result.workload, TENSORS, result.num_workers)
    gather = find(results, result.workload, GATHER, result.num_workers)
    return {
        "workload": result.workload,
        "variant": result.variant,
        "workers": result.num_workers,
        "samples_per_s": {
            "median": result.median,
            "min": min(result.rates),
            "max": max(result.rates),
            "runs": result.rates,
        },
        "epochs_per_run": [run["num_epochs"] for run in result.runs],
        "cpu_s_per_1000_samples": result.cpu_s_per_1000,
        "peak_memory_bytes": result.peak_memory_bytes,
        "ratio_to_tensor_dataset": result.ratio_to(tensors) if tensors is not None else None,
        "share_of_gather": result.ratio_to(gather) if gather is not None else None,
        "checksum_matches": result.is_right,
        "open_s": result.open_s,
        "facts": result.facts,
    }


def targets_as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each target, with what was reached.

    is_clear: all rounds say the same. Where they do not, the machine was too noisy for the median to decide.
    """
    found = []
    for target in TARGETS:
        rounds = reached(target, results)
        have = statistics.median(rounds) if rounds else None
        found.append(
            {
                "target": target.text,
                "need": target.need,
                "have": have,
                "rounds": rounds,
                "is_met": have is not None and have >= target.need,
                "is_clear": bool(rounds) and len({ratio >= target.need for ratio in rounds}) == 1,
            }
        )
    return found
