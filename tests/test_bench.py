"""`python -m bench warm`: that it measures, checks and records. How fast anything is, is not for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.checksum import Checksum, reference
from bench.loaders import GATHER, OURS, TENSORS, VARIANTS
from bench.results import TARGETS, Result, reached, targets_as_json
from bench.session import Session, VariantFailedError
from bench.workload import FIELDS, Workload, make_workload

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workloads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workload]:
    folder = tmp_path_factory.mktemp("bench")
    return {name: make_workload(name, folder / name, 70) for name in FIELDS}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run as small as one can be."""
    out = tmp_path_factory.mktemp("results")
    sizes = ["--workers", "0,1", "--samples", "70", "--epochs", "2", "--seconds", "0.01", "--timeout", "120"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "warm", *sizes, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.json")
    return SimpleNamespace(content=json.loads(file.read_text()), folder=out, text=done.stdout)


@pytest.mark.timeout(660)
def test_every_variant_is_measured_and_right(report: SimpleNamespace) -> None:
    """Both workloads, both numbers of workers: rates of every round, and checksums that match."""
    results = report.content["results"]
    found = {(r["workload"], r["workers"], r["variant"]) for r in results}
    assert found == {(name, count, variant) for name in FIELDS for count in (0, 1) for variant in VARIANTS}
    for result in results:
        assert result["checksum_matches"]
        rates = result["samples_per_s"]
        assert len(rates["runs"]) == len(result["epochs_per_run"]) == 2
        assert 0 < rates["min"] <= rates["median"] <= rates["max"]
        assert result["peak_memory_bytes"] > 0
        assert result["cpu_s_per_1000_samples"] >= 0
        assert (result["ratio_to_tensor_dataset"] == 1) == (result["variant"] == TENSORS)
        assert (result["share_of_gather"] == 1) == (result["variant"] == GATHER)


@pytest.mark.timeout(660)
def test_ours_decodes_each_sample_once(report: SimpleNamespace) -> None:
    """The facts of a run say so, and that batches crossed in slots where there are workers."""
    ours = [result for result in report.content["results"] if result["variant"] == OURS]
    assert [result["facts"]["decodes_per_sample"] for result in ours] == [1] * 4
    assert all(result["facts"]["batches_in_slots"] > 0 for result in ours if result["workers"])


@pytest.mark.timeout(660)
def test_run_records_where_it_ran(report: SimpleNamespace) -> None:
    """Host, versions, commit and targets in the JSON, a picture beside it, a table on stdout."""
    host = report.content["host"]
    assert host["num_cpus"] >= 1
    assert host["kernel"]
    assert host["versions"]["torch"] == torch.__version__
    assert {"commit", "is_dirty"} <= host.keys()
    assert report.content["is_complete"]
    assert [target["have"] for target in report.content["targets"]] == [None] * len(TARGETS)
    assert [file.read_bytes()[:4] for file in report.folder.glob("*.png")] == [b"\x89PNG"]
    assert "samples/s" in report.text


def test_checksum_ignores_the_order_of_samples(workloads: dict[str, Workload]) -> None:
    """The reference's, whatever order and batches the same samples come in."""
    for workload in workloads.values():
        found = Checksum()
        for rows in torch.randperm(workload.num_samples).split(13):
            found.add({name: torch.from_numpy(workload.array(name))[rows] for name in workload.fields}, workload)
        assert found.agrees(reference(workload), is_exact=True)


def test_checksum_sees_what_is_wrong(workloads: dict[str, Workload]) -> None:
    """One bit, a label that went to another sample, a sample that came twice."""
    workload = workloads["images"]
    expected = reference(workload)
    whole = {name: torch.from_numpy(workload.array(name)) for name in workload.fields}
    flipped = {**whole, "image": whole["image"].clone()}
    flipped["image"][3, 2, 1, 0] ^= 1
    moved = {**whole, "labels": whole["labels"].roll(1)}
    rows = torch.arange(workload.num_samples)
    rows[0] = 1
    twice = {name: tensor[rows] for name, tensor in whole.items()}
    for wrong in (flipped, moved, twice):
        found = Checksum()
        found.add(wrong, workload)
        assert not found.agrees(expected, is_exact=True)


def result(variant: str, *rates: float) -> Result:
    runs = [{"num_samples": rate, "seconds": 1, "cpu_s": 0, "num_epochs": 1} for rate in rates]
    return Result("images", variant, 2, runs)


def test_targets_compare_runs_of_the_same_round() -> None:
    """The median of the rounds' ratios, so that noise that meets both does not count."""

    results = [result(OURS, 600, 60, 66), result(TENSORS, 100, 10, 10), result(GATHER, 1000, 100, 100)]
    assert [reached(target, results) for target in TARGETS] == [[6, 6, 6.6], [0.6, 0.6, 0.66], []]
    targets = targets_as_json(results)
    assert [target["have"] for target in targets] == [6, 0.6, None]
    assert [target["is_met"] for target in targets] == [True, True, False]
    assert [target["is_clear"] for target in targets] == [True, True, False]


def test_target_on_which_rounds_disagree_is_not_clear() -> None:
    """A median that is met while single rounds miss is said to be undecided."""

    target = targets_as_json([result(OURS, 47, 103, 149), result(GATHER, 100, 100, 100)])[1]
    assert target["is_met"]
    assert not target["is_clear"]


def test_dead_variant_is_an_error_with_its_output(workloads: dict[str, Workload]) -> None:
    """No answer is not waited for, and what the process wrote is told."""
    workload = workloads["text"]
    session = Session("no such loader", workload, 0, reference(workload), 60)
    with session, pytest.raises(VariantFailedError, match="KeyError"):
        session.open()
