"""How many samples a second does a warm epoch give, beside what users have today?

Images (uint8 [3, 224, 224] and a label) and texts (ids, mask and labels of 512), batches of 64, shuffled. Every variant
is a fresh process. At each number of workers all of them are opened and warmed up by an epoch whose every byte is
checked; then they take turns, one running at a time, so that noise of the machine meets all alike; then comes another
checked epoch. The gather in one process shows what the copying alone takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from bench.checksum import Checksum, reference
from bench.host import describe_host
from bench.loaders import VARIANTS
from bench.plot import save_plot
from bench.report import print_table, print_targets
from bench.results import Result, as_json, targets_as_json
from bench.session import Session, VariantFailedError
from bench.workload import BATCH_SIZE, DEFAULT_SAMPLES, FIELDS, Workload, make_workload

HELP = "samples/s of warm epochs, beside TensorDataset, np.memmap, decoding each epoch and a plain gather"

#: A measurement lasts at least this long: whole epochs, repeated.
_MEASURE_S = 1.0
_RESULTS = Path(__file__).resolve().parent / "results"
_TIMEOUT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench warm``."""
    parser.add_argument("--workloads", default="images,text", help="which, with commas (default: %(default)s)")
    parser.add_argument("--workers", default="0,1,2,4", help="numbers of workers, with commas (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=7, help="measurements of each variant (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=_MEASURE_S, help="least length of a measurement (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, help="of each workload (default: images 2000, text 20000)")
    parser.add_argument("--timeout", type=float, default=_TIMEOUT_S, help="of a process, in s (default: %(default)g)")
    parser.add_argument(
        "--out", type=Path, default=_RESULTS, help="folder of the JSON and PNG (default: bench/results)"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save; 1 if a checksum differs, or with --check if a target is missed."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    workloads, counts = args.workloads.split(","), [int(n) for n in args.workers.split(",")]
    if unknown := set(workloads) - set(FIELDS):
        raise SystemExit(f"--workloads: {', '.join(sorted(unknown))} is not one of {', '.join(FIELDS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the data would stay in the temporary folder
    log = Log(args, Path(args.out) / f"warm-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        with tempfile.TemporaryDirectory(prefix="shmloader-bench-") as folder:
            for name in workloads:
                console.print(f"making the data: {name}", style="dim")
                workload = make_workload(name, Path(folder) / name, args.samples or DEFAULT_SAMPLES[name])
                expected = reference(workload)
                for count in counts:
                    log.results += _measure(workload, count, expected, args, console)
                    log.save(is_complete=False)
    except VariantFailedError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    files = log.save(is_complete=True)
    print_table(log.results, console)
    targets = targets_as_json(log.results)
    print_targets(targets, console)
    for file in files:
        console.print(f"written: {file}", style="dim", highlight=False, soft_wrap=True)
    is_met = all(target["is_met"] for target in targets)
    return 0 if all(r.is_right for r in log.results) and (is_met or not args.check) else 1


class Log:
    """What was measured so far, and its files: an interrupted run keeps what it has."""

    def __init__(self, args: argparse.Namespace, stem: Path) -> None:
        self.results: list[Result] = []
        self._stem = stem
        self._head = {
            "question": "warm",
            "command": ["python", "-m", "bench", *sys.argv[1:]],
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": describe_host(),
            "settings": {"batch_size": BATCH_SIZE, "epochs": args.epochs, "seconds": args.seconds},
        }

    def save(self, is_complete: bool) -> list[Path]:
        """Write the JSON and the picture, over those before."""
        report = self._head | {
            "is_complete": is_complete,
            "results": [as_json(result, self.results) for result in self.results],
            "targets": targets_as_json(self.results),
        }
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        files = [self._stem.with_suffix(".json"), self._stem.with_suffix(".png")]
        files[0].write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        save_plot(self.results, files[1])
        return files


def _measure(
    workload: Workload, num_workers: int, expected: Checksum, args: argparse.Namespace, console: Console
) -> list[Result]:
    """All variants at one number of workers, in turns."""
    results = [Result(workload.name, variant, num_workers) for variant in VARIANTS]
    with contextlib.ExitStack() as stack:
        # All start at once: importing takes them longest.
        sessions = [
            stack.enter_context(Session(result.variant, workload, num_workers, expected, args.timeout))
            for result in results
        ]
        for session, result in zip(sessions, results, strict=True):
            console.print(f"{workload.name}, {num_workers} workers: warming up {result.variant}", style="dim")
            result.open_s = session.open()["open_s"]
            _check(session, result)
            session.ask({"measure": args.seconds})  # says how long an epoch takes
        for number in range(args.epochs):
            console.print(f"{workload.name}, {num_workers} workers: round {number + 1} of {args.epochs}", style="dim")
            turns = list(zip(sessions, results, strict=True))
            for session, result in reversed(turns) if number % 2 else turns:  # so that nobody always follows the same
                answer = session.ask({"measure": args.seconds})
                result.is_right &= answer["is_right"]
                result.runs.append(answer)
        for session, result in zip(sessions, results, strict=True):
            _check(session, result)
            result.facts = session.ask({"close": True})["facts"]
            # That of ours: each sample must have been decoded once.
            result.is_right &= result.facts.get("decodes_per_sample", 1) == 1
    return results


def _check(session: Session, result: Result) -> None:
    answer = session.ask({"check": True})
    result.is_right &= answer["is_right"]
    result.peak_memory_bytes = max(result.peak_memory_bytes, answer["peak_memory_bytes"])
