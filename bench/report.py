"""The table that a run prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.loaders import OURS
from bench.results import Result, as_json


def print_table(results: Sequence[Result], console: Console) -> None:
    """A table for each workload."""
    for workload in dict.fromkeys(result.workload for result in results):
        console.print(_table(workload, [r for r in results if r.workload == workload], results))


def _table(workload: str, rows: Sequence[Result], results: Sequence[Result]) -> Table:
    table = Table(
        title=workload,
        title_justify="left",
        title_style="bold",
        caption="The gather is one process without workers. Both ratios are medians over the rounds.",
        caption_justify="left",
    )
    table.add_column("workers", justify="right")
    table.add_column("loader")
    for name in ("samples/s", "min–max", "CPU s per 1,000", "peak MiB", "× TensorDataset", "of the gather", "data"):
        table.add_column(name, justify="right")
    last = None
    for row in rows:
        if last is not None and row.num_workers != last:
            table.add_section()
        entry = as_json(row, results)
        table.add_row(
            "" if row.num_workers == last else str(row.num_workers),
            row.variant,
            f"{row.median:,.0f}",
            f"{min(row.rates):,.0f}–{max(row.rates):,.0f}",
            f"{row.cpu_s_per_1000:.3f}",
            f"{row.peak_memory_bytes / 2**20:,.0f}",
            f"{entry['ratio_to_tensor_dataset']:.2f}" if entry["ratio_to_tensor_dataset"] else "",
            f"{entry['share_of_gather']:.0%}" if entry["share_of_gather"] else "",
            "right" if row.is_right else "[red]WRONG[/red]",
            style="bold" if row.variant == OURS else None,
        )
        last = row.num_workers
    return table


def print_targets(targets: Sequence[dict[str, Any]], console: Console) -> None:
    """A line for each."""
    for target in targets:
        if target["have"] is None:
            console.print(f"not measured  {target['target']}")
            continue
        verdict = "[green]met[/green]         " if target["is_met"] else "[red]missed[/red]      "
        form = "{:.1%}" if target["need"] < 1 else "{:.2f} ×"
        have, low, high = (form.format(f(target["rounds"])) for f in (statistics.median, min, max))
        text = f"{verdict}  {target['target']}: {have} (rounds: {low} to {high})"
        if not target["is_clear"]:
            num_met = sum(ratio >= target["need"] for ratio in target["rounds"])
            text += f"; [yellow]NOT CLEAR[/yellow], {num_met} of {len(target['rounds'])} rounds met it"
        console.print(text, highlight=False)
