"""Samples → batch: the hook by which a stock DataLoader gathers a batch in one pass over the ring.

`Sample` is registered in torch's ``default_collate_fn_map``, so ``default_collate`` brings a list of samples here.
Fields that still are the records' are gathered by the core, straight into a slot of the batch ring (in a worker) or
into fresh tensors (``gather.py``, ``place.py``). Fields that the user changed, added or took as copies are collated
from their values (``values.py``) and, in a worker, copied into the slot beside the others. ``origins.py`` tells which
of a batch's samples may lack what.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch.utils.data import _utils

from shmloader.collate.gather import Gathering, Lot, lots_of
from shmloader.collate.lengths import PADDED, Lengths
from shmloader.collate.origins import Origins
from shmloader.collate.place import build
from shmloader.collate.values import CollateMap, Values, collate_map
from shmloader.keys import Face
from shmloader.views import Sample
from shmloader.worker_errors import carried

__all__ = ["PADDED", "Lengths", "collate", "collate_as"]


def collate(samples: Sequence[dict[str, Any]], *, collate_fn_map: Any = None) -> dict[str, Any]:
    """The batch of ``samples``: for each field a tensor [B, …] (padded where lengths differ), lists for strings.

    In a DataLoader worker the result is made to cross its queue as a token; elsewhere it is a plain dict.

    Raises:
        ShmloaderError: the samples have different fields, or the values of one cannot be laid side by side.
    """
    with carried():
        return _collate(samples, None, PADDED, collate_fn_map)


def collate_as(face: Face | None, lengths: Lengths, batch: Sequence[Any]) -> Any:
    """As torch's ``default_collate``, but dicts are samples of the dataset with this ``face``, wherever they are.

    Raises:
        As `collate`; OptionError: ``lengths`` name a field that no sample has.
    """
    if face is not None:
        with carried():
            lengths.check_multiples(face)

    def function(samples: Sequence[dict[str, Any]], *, collate_fn_map: Any = None) -> dict[str, Any]:
        # What lies in a sample is none, so torch's own functions are for that.
        return _collate(samples, face, lengths, None)

    with carried():
        return _utils.collate.collate(batch, collate_fn_map={Sample: function, dict: function, **_without_ours()})


def _collate(
    samples: Sequence[Any], face: Face | None, lengths: Lengths, functions: CollateMap | None
) -> dict[str, Any]:
    lots = lots_of(samples, lengths)
    touched = [sample for sample in samples if not sample.is_untouched()] if lots else []
    if lots and not touched:
        faces = tuple(lot.face for lot in lots)
        names = faces[0].names if len(faces) == 1 else _names(faces)
        origins = None
    else:
        origins = Origins(samples, face, lengths)
        faces, names = origins.known, origins.names
    if lengths.modes:
        lengths.check(names)
    gathering = Gathering.of(lots, touched, names, lengths)
    gathered = gathering.names
    batch: dict[str, Any] = {}
    values = None
    for name in names:
        if name in gathered:
            continue
        if lots and all(name in lot.face.by_source for lot in lots) and all(sample.is_view(name) for sample in touched):
            batch[name] = _strings(samples, lots, name)
            continue
        if values is None:
            values = Values(origins or Origins(samples, face, lengths), lengths, functions)
        batch |= values.collate(name)
    return build(gathering, batch, len(samples), _order(names, faces))


def _strings(samples: Sequence[Any], lots: Sequence[Lot], name: str) -> list[str]:
    if len(lots) == 1 and len(lots[0].face.sources) == 1:
        return list(lots[0].face.by_source[name]) * len(samples)
    found = [""] * len(samples)
    for lot in lots:
        of = lot.face.by_source[name]
        for row, source in lot.sources():
            found[row] = of[source]
    return found


@lru_cache(maxsize=64)
def _names(faces: tuple[Face, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for face in faces for name in face.names))


@lru_cache(maxsize=256)
def _order(names: tuple[str, ...], faces: tuple[Face, ...]) -> tuple[str, ...]:
    """Each field's name, and those of its masks after it."""
    order: list[str | None] = []
    for name in names:
        of_field = [face for face in faces if name in face.index]
        masks = [face.mask(name) for face in of_field]
        presences = [face.presence(name) for face in of_field] or [f"{name}_mask"]
        order += [name, *masks, *presences]
    return tuple(dict.fromkeys(name for name in order if name is not None))


def _without_ours() -> CollateMap:
    return {kind: function for kind, function in collate_map().items() if kind is not Sample}


def install() -> None:
    """Have torch's ``default_collate`` call `collate` for samples."""
    collate_map()[Sample] = collate


install()
