"""Random numbers for `transform`: seeded for one sample, and nobody else's sequence disturbed."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, epoch: int, row: int) -> Iterator[None]:
    """Seed the global generators of random, numpy and torch for one transform; put them back after."""
    words = np.random.SeedSequence((seed, epoch, row)).generate_state(2)
    with _generators:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            random.seed(int(words[0]))
            np.random.seed(int(words[0]))
            torch.default_generator.manual_seed(int(words[1]))  # torch.manual_seed would seed all devices
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


_generators = threading.RLock()  # RLock: a transform may read another dataset that has one
# Another thread of the parent may have held it when this process was forked.
os.register_at_fork(after_in_child=lambda: globals().update(_generators=threading.RLock()))
