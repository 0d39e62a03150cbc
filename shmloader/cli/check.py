"""Try what shmloader promises, on this machine and with a real dataset; the exit code is 1 if a promise is not kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "try streaming, download, selection, errors and fallbacks, and report each"

#: Exit codes: one of the checks failed; Ctrl-C (128 + SIGINT).
FAILED, INTERRUPTED = 1, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``shmloader check``."""
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        default="humaneval",
        help="a dataset's short name, a Hub id or a local folder, which is streamed and downloaded (default: "
        "%(default)s, some hundred kB)",
    )
    parser.add_argument("--split", default="train", help="the split to read (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="DataLoader workers (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the checks; returns 0 if all of them passed."""
    from rich.console import Console

    console = Console(highlight=False)
    try:
        return 0 if _run_all(args, console) else FAILED
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED


def _run_all(args: argparse.Namespace, console: Console) -> bool:
    import time

    from shmloader.cli.checks import Checks

    checks = Checks(args.name, args.split, max(0, args.workers))
    steps: list[tuple[str, Callable[[], str]]] = [
        ("streaming", checks.streaming),
        ("download", checks.download),
        ("automatic selection", checks.selection),
        ("errors", checks.errors),
        ("bad rows", checks.bad_rows),
        ("fallbacks", checks.fallbacks),
    ]
    failed = []
    for name, step in steps:
        began = time.monotonic()
        with console.status(f"{name} …"):
            try:
                what, sign = step(), "[green]passed[/green]"
            except Exception as error:
                what, sign = f"{type(error).__name__}: {error}", "[bold red]FAILED[/bold red]"
                failed.append(name)
        console.print(f"{sign}  {name} ({time.monotonic() - began:.1f} s)", soft_wrap=True)
        console.print(f"        {what}", markup=False, soft_wrap=True)
    if failed:
        console.print(f"{len(failed)} of {len(steps)} checks failed: {', '.join(failed)}", style="bold red")
    else:
        console.print(f"all {len(steps)} checks passed")
    return not failed
