"""What the demo prints at the end: two tables, what differs, and what it means in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from shmloader.cli.demo_epochs import Epoch, Outcome
from shmloader.cli.memory import summed

#: Differences beyond these are only counted.
_MAX_SHOWN = 10


def print_report(outcome: Outcome, console: Console) -> None:
    """The tables of one dataset, and what differs."""
    console.print()
    console.print(_speed_table(outcome))
    console.print(_cost_table(outcome))
    shown = outcome.differences[:_MAX_SHOWN]
    for what in shown:
        console.print(f"DIFFERS: {what}", style="bold red", markup=False, soft_wrap=True)
    if len(outcome.differences) > len(shown):
        console.print(f"… and {len(outcome.differences) - len(shown):,} more differences", style="bold red")
    console.print()


def words(outcomes: Sequence[Outcome]) -> str:
    """What the figures of ``outcomes`` mean, and what to try next."""
    if any(outcome.differences for outcome in outcomes):
        return "What the loader gave is not what a direct decode gives: see DIFFERS above. Please report it as a bug."
    sentences = ["Every sample was decoded once, kept once, and read in place by all workers."]
    again = [outcome for outcome in outcomes if outcome.stats.commits > outcome.stats.num_rows]
    if again:
        names = " and ".join(map(_name, again))
        sentences = [f"{names} does not fit the ring, so samples were decoded again: set SHMLOADER_RING_BYTES higher."]
    if outcomes[0].run.num_epochs > 1:
        first, *others = outcomes
        gains = [f"{warm_ratio(first):.1f} times the samples/s of a plain DataLoader for {_name(first)}"]
        gains += [f"{warm_ratio(outcome):.1f} times for {_name(outcome)}" for outcome in others]
        sentences.append(f"From the second epoch on that gave {' and '.join(gains)}.")
        if any(warm_ratio(outcome) < 1 for outcome in outcomes):
            sentences.append("Where that is below 1, decoding costs too little for a cache to pay.")
    else:
        sentences.append("The gain comes with the second epoch: try --epochs 3.")
    if outcomes[0].run.dataset != _name(outcomes[0]) and len(outcomes) > 1:
        sentences.append("Next: your own data, with --dataset FOLDER or a Hub id, or more readers, with --workers 8.")
    else:
        sentences.append("Next: give ShmMultimodalDataset(dataset_name=…) to the DataLoader of your own training.")
    return " ".join(sentences)


def warm_ratio(outcome: Outcome) -> float:
    """Samples/s beside those of the plain DataLoader: medians of the epochs after the first, or of the only one."""

    def warm(epochs: Sequence[Epoch]) -> float:
        return median(epoch.samples_per_s for epoch in epochs[1:] or epochs)

    return warm(outcome.epochs) / warm(outcome.plain_epochs)


def format_bytes(num_bytes: float) -> str:
    """Two or three digits and a decimal unit: "90.4 MB"."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        units.pop(0)
    digits = 0 if num_bytes >= 99.95 or units[0] == "B" else 1
    return f"{num_bytes:.{digits}f} {units[0]}"


def _speed_table(outcome: Outcome) -> Table:
    run = outcome.run
    table = Table(
        title=f"{_name(outcome)}, {run.split}: {_counted(run.num_workers, 'worker')}, batches of {run.batch_size}"
    )
    table.add_column("epoch")
    for heading in ("samples/s", "first batch", "plain DataLoader", "first batch", "ratio"):
        table.add_column(heading, justify="right")
    for number, (ours, plain) in enumerate(zip(outcome.epochs, outcome.plain_epochs, strict=True), 1):
        table.add_row(
            str(number),
            f"{ours.samples_per_s:,.0f}",
            f"{ours.first_batch_s:.2f} s",
            f"{plain.samples_per_s:,.0f}",
            f"{plain.first_batch_s:.2f} s",
            f"{ours.samples_per_s / plain.samples_per_s:.1f} x",
        )
    return table


def _cost_table(outcome: Outcome) -> Table:
    stats, memory, run = outcome.stats, outcome.memory, outcome.run
    num_caches = max(1, run.num_workers)
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        "time to open", f"{outcome.opened_s:.2f} s (import and load of datasets: {outcome.plain_opened_s:.2f} s)"
    )
    table.add_row(
        "decodes per sample", f"{stats.commits / stats.num_rows:g} ({stats.commits:,} for {stats.num_rows:,} samples)"
    )
    table.add_row("bytes in the ring", f"{format_bytes(stats.ring_used_bytes)} of {format_bytes(stats.ring_bytes)}")
    table.add_row(
        "one cache per worker", f"{num_caches} x {format_bytes(stats.ring_used_bytes)} = "
        f"{format_bytes(num_caches * stats.ring_used_bytes)}"
    )  # fmt: skip
    table.add_row(
        "memory of all processes",
        f"{format_bytes(memory.total.total_bytes)}, ring included (PSS {format_bytes(memory.total.pss_bytes)}, "
        f"page tables {format_bytes(memory.total.page_table_bytes)})",
    )
    for title, processes in (
        ("  training", (memory.training,)),
        (f"  {_counted(len(memory.workers), 'worker')}", memory.workers),
        (f"  {_counted(len(memory.services), 'service')}", memory.services),
    ):
        if processes:
            table.add_row(title, format_bytes(summed(processes).total_bytes))
    table.add_row("  of these, batch slots", format_bytes(stats.batch_backed_bytes))
    table.add_row(
        "batches of workers",
        f"{stats.batches_in_slots:,} read in shared slots, {stats.batches_copied:,} copied out of them, "
        f"{stats.batches_inline:,} through the pipe",
    )
    verdict = f"{len(outcome.differences):,} differences" if outcome.differences else "equal"
    table.add_row(
        "checked by direct decode", f"{outcome.num_checked:,} samples ({', '.join(outcome.fields)}): {verdict}"
    )
    return table


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _name(outcome: Outcome) -> str:
    """How the dataset is called: its id, or its folder's name."""
    path = Path(outcome.run.dataset)
    return path.resolve().name if path.exists() else outcome.run.dataset
