"""Patience by a clock that does not run."""

from __future__ import annotations

from shmloader.sources.patience import Patience


class Clock:
    """Time that passes only in sleep, and where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


def patience_of(timeout_s: float = 30.0) -> tuple[Patience, Clock]:
    """With its clock."""
    clock = Clock()
    return Patience(timeout_s, clock=lambda: clock.now, sleep=clock.sleep), clock
