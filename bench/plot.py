"""The picture of a run: bars for each number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.loaders import VARIANTS
from bench.results import Result, find

_COLOURS = ("#d1495b", "#30638e", "#00798c", "#8d96a3", "#edae49")


def save_plot(results: Sequence[Result], file: Path) -> None:
    """Samples/s on a logarithmic scale (they differ by two orders of magnitude), whiskers from least to most."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    workloads = list(dict.fromkeys(result.workload for result in results))
    figure, axes = plt.subplots(1, len(workloads), figsize=(6.5 * len(workloads), 4.5), squeeze=False)
    for axis, workload in zip(axes[0], workloads, strict=True):
        counts = sorted({r.num_workers for r in results if r.workload == workload})
        for number, variant in enumerate(VARIANTS):
            found = [find(results, workload, variant, count) for count in counts]
            shown = [(at, result) for at, result in enumerate(found) if result is not None]
            if not shown:
                continue
            heights = [result.median for _, result in shown]
            below = [result.median - min(result.rates) for _, result in shown]
            above = [max(result.rates) - result.median for _, result in shown]
            width = 0.8 / len(VARIANTS)
            places = [at + (number - (len(VARIANTS) - 1) / 2) * width for at, _ in shown]
            axis.bar(places, heights, width, yerr=(below, above), color=_COLOURS[number], label=variant, capsize=2)
        axis.set_yscale("log")
        axis.set_xticks(range(len(counts)), [str(count) for count in counts])
        axis.set_xlabel("DataLoader workers")
        axis.set_ylabel("samples/s, warm")
        axis.set_title(workload)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].legend(fontsize="small", loc="upper left", ncols=2)
    low, high = axes[0][0].get_ylim()
    axes[0][0].set_ylim(low, high * 6)  # room for the legend
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
