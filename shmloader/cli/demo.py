"""Stream a dataset through a stock DataLoader, check it against a direct decode, and show what it cost."""

from __future__ import annotations

import argparse
import sys

HELP = "stream a dataset through a DataLoader, check it, and show what it cost"

#: Exit codes: what the loader gave differs from a direct decode; it could not run; Ctrl-C (128 + SIGINT).
DIFFERS, FAILED, INTERRUPTED = 1, 2, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``shmloader demo``."""
    parser.add_argument(
        "--dataset", metavar="ID|FOLDER", help="a Hub id or a local folder (default: embedded pictures, then texts)"
    )
    parser.add_argument("--split", default="train", help="the split to read (default: %(default)s)")
    parser.add_argument("--workers", type=_at_least(0), default=4, help="DataLoader workers (default: %(default)s)")
    parser.add_argument("--epochs", type=_at_least(1), default=3, help="passes over the data (default: %(default)s)")
    parser.add_argument("--batch-size", type=_at_least(1), default=64, help="samples a batch (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns 0 if all that was checked is right."""
    from rich.console import Console

    from shmloader.errors import ShmloaderError

    console = Console(highlight=False)
    try:
        return _run(args, console)
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED
    except (ShmloaderError, OSError) as error:
        print(f"shmloader demo: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED


def _run(args: argparse.Namespace, console: object) -> int:
    from rich.console import Console

    from shmloader.cli.demo_data import demo_folders
    from shmloader.cli.demo_epochs import DemoRun, measure
    from shmloader.cli.demo_report import print_report, words

    assert isinstance(console, Console)
    datasets = [args.dataset]
    if args.dataset is None:
        folders = demo_folders(notice=lambda text: console.print(text, soft_wrap=True))
        datasets = [str(folders.images), str(folders.text)]
    outcomes = []
    for dataset in datasets:
        outcome = measure(DemoRun(dataset, args.split, args.workers, args.epochs, args.batch_size), console)
        print_report(outcome, console)
        outcomes.append(outcome)
    console.print(words(outcomes), soft_wrap=True)
    return DIFFERS if any(outcome.differences for outcome in outcomes) else 0


class _at_least:
    """An argument type: a whole number, at least ``least``."""

    def __init__(self, least: int) -> None:
        self._least = least

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = self._least - 1
        if value < self._least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {self._least} on")
        return value
