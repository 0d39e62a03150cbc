"""Where a batch lies: in a slot of the batch ring, or in private memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from shmloader.collate.gather import Gathering
from shmloader.packed import is_jagged, is_plain
from shmloader.sample import ALIGNMENT
from shmloader.tokens import InlineBatch, batch_ring
from shmloader.views import WorkerBatch, tensor_over


def build(gathering: Gathering, values: dict[str, Any], num_samples: int, order: Sequence[str]) -> dict[str, Any]:
    """The batch of what is to be gathered and of ``values``: in a slot, in a worker that has a free one.

    order: the fields' names; the same wherever the batch lies.
    """
    in_worker = get_worker_info() is not None
    specs = {output.name: (output.dtype, (num_samples, *output.shape)) for output in gathering.outputs}
    num_gathered = len(specs)
    jagged = {name: v for name, v in values.items() if is_jagged(v)} if in_worker else {}
    for name, value in jagged.items():
        del values[name]
        values |= {_values(name): value.values(), _offsets(name): value.offsets()}
    if in_worker:
        specs.update((name, (v.dtype, tuple(v.shape))) for name, v in values.items() if is_plain(v))
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in specs.values()]
    offsets, total = _layout(sizes)
    ring = batch_ring() if in_worker and total else None
    lease = None if ring is None else ring.lease(total)
    if lease is None:
        made = {name: torch.empty(specs[name][1], dtype=specs[name][0]) for name in list(specs)[:num_gathered]}
        gathering.run([tensor.view(-1).view(torch.uint8).numpy() for tensor in made.values()])
        found = made | values | jagged
        batch = {name: found[name] for name in order if name in found}
        return InlineBatch(batch) if in_worker else batch
    outs = [lease.part(offset, size) for offset, size in zip(offsets, sizes, strict=True)]
    gathering.run(outs[:num_gathered])
    parts: dict[Any, Any] = {}
    for (name, (dtype, shape)), offset, out in zip(specs.items(), offsets, outs, strict=True):
        parts[name] = (offset, dtype, shape)
        if name in values:
            tensor_over(out, dtype, shape).copy_(values.pop(name))
    for name in jagged:
        parts[name] = (parts.pop(_values(name)), parts.pop(_offsets(name)))
    return WorkerBatch(lease, parts, values, [name for name in order if name in parts or name in values])


def _values(name: str) -> Any:
    """What stands for the values of a jagged tensor; no field is named so."""
    return name, "values"


def _offsets(name: str) -> Any:
    return name, "offsets"


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end
