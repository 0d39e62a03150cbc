"""What a loopback Hub does wrong: which requests, and how. By plan, or at random by a seed; never by the clock."""

from __future__ import annotations

import random
import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What becomes of some requests.

    status: they are answered with this, and ``headers``; None: with what they should be, but after ``after`` bytes of
    the body (None: before the head of the answer) ``end`` happens: "reset" (of the connection), "cut" (it is closed,
    though more bytes were announced) or "stall" (nothing comes any more, until the Hub is released or the client goes).
    method, path: which requests: of this method ("": any), whose path this pattern is found in. first: so many of these
    are spared. times: then so many have it; None: all.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    end: str = ""
    after: int | None = None
    method: str = ""
    path: str = ""
    first: int = 0
    times: int | None = 1
    num_seen: int = 0
    num_done: int = 0

    def meets(self, method: str, path: str) -> bool:
        """Whether it befalls this request; counts it."""
        if self.method not in ("", method) or not re.search(self.path, path):
            return False
        self.num_seen += 1
        is_met = self.num_seen > self.first and (self.times is None or self.num_done < self.times)
        self.num_done += is_met
        return is_met


class Faults:
    """All that a Hub does wrong. The first that meets a request befalls it. Thread-safe."""

    def __init__(self) -> None:
        self._planned: list[Fault] = []
        self._random: tuple[random.Random, float, list[Fault]] | None = None
        self._lock = threading.Lock()
        self.released = threading.Event()

    def add(self, *faults: Fault) -> None:
        """Let these happen too."""
        with self._lock:
            self._planned += faults

    def at_random(self, seed: int, share: float, *kinds: Fault) -> None:
        """Let one of ``kinds`` befall a request with this probability, as ``seed`` draws them."""
        self._random = (random.Random(seed), share, list(kinds))

    def clear(self) -> None:
        """Nothing goes wrong any more; what stalls ends."""
        with self._lock:
            self._planned, self._random = [], None
        self.released.set()

    def of(self, method: str, path: str) -> Fault | None:
        """What befalls this request; None: nothing."""
        with self._lock:
            found = next((fault for fault in self._planned if fault.meets(method, path)), None)
            if found is None and self._random is not None:
                draws, share, kinds = self._random
                kind = draws.choice(kinds)
                if draws.random() < share and kind.meets(method, path):
                    found = kind
            if found is not None and found.end == "stall":
                self.released.clear()
            return found
