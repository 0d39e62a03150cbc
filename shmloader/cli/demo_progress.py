"""A bar while an epoch runs; plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

#: Drawn no more often: it runs in the training process, whose time is being measured.
_BAR_EVERY_S, _LINE_EVERY_S = 0.1, 5.0


class EpochProgress:
    """Context manager for one epoch. No thread of its own: workers are forked while it is shown."""

    def __init__(self, console: Console, title: str, num_samples: int) -> None:
        self._console = console
        self._title = title
        self._num_samples = num_samples
        self._done = 0
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                console=console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task(title, total=num_samples, rate="")

    def __enter__(self) -> EpochProgress:
        self._started = self._shown = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()
        elif error is None:
            self._print()

    def advance_to(self, num_samples: int) -> None:
        """Tell how many samples of the epoch have come."""
        self._done = num_samples
        self._seconds = time.perf_counter() - self._started
        since = time.perf_counter() - self._shown
        if self._bar is not None and since > _BAR_EVERY_S:
            self._draw()
        elif self._bar is None and since > _LINE_EVERY_S:
            self._print()

    @property
    def _rate(self) -> str:
        return f"{self._done / self._seconds:,.0f} samples/s" if self._done else ""

    def _draw(self) -> None:
        assert self._bar is not None
        self._shown = time.perf_counter()
        self._bar.update(self._task, completed=self._done, rate=self._rate, refresh=True)

    def _print(self) -> None:
        self._shown = time.perf_counter()
        self._console.print(f"{self._title}: {self._done:,}/{self._num_samples:,}  {self._rate}")
