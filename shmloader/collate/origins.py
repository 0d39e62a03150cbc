"""Which dataset each sample of a batch is of, and so which fields the batch has, and which a sample may lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shmloader.collate.lengths import Lengths
from shmloader.errors import ShmloaderError
from shmloader.keys import Face
from shmloader.views import Sample


class Origins:
    """Of each sample of a batch that somebody has touched: its dataset's face, None where that is not known.

    A `Sample` knows its dataset; a plain dict is of the one that its ``source`` names, else of ``bound``. Several
    datasets may have the same name (each that is in memory is a "Dataset"): then its fields tell.

    datasets: of each sample its face, or the dataset's name where only that is known, or None. faces: the faces alone.
    in_batch: the faces there are. known: these, and ``bound``. names: the fields of the batch.

    Raises:
        ShmloaderError: the samples have different fields, and no schema says that they may.
    """

    def __init__(self, samples: Sequence[Mapping[str, Any]], bound: Face | None, lengths: Lengths) -> None:
        odd = next((row for row, sample in enumerate(samples) if not isinstance(sample, Mapping)), None)
        if odd is not None:
            raise ShmloaderError(
                f"Sample {odd} of the batch is a {type(samples[odd]).__name__}, others are dicts: a wrapper must make "
                "the same of every sample.",
                row=odd,
            )
        self.samples = samples
        found = [_face(sample, lengths) for sample in samples]
        # Who is meant where nothing tells: the dataset whose `collate` this is.
        fallback = None if bound is None else lengths.of(bound)
        candidates = dict.fromkeys(face for face in (*found, fallback) if face is not None)
        self.datasets: list[Face | str | None] = [
            face or _named(sample, candidates, fallback) for face, sample in zip(found, samples, strict=True)
        ]
        for face in candidates:
            for row in _of_a_namesake(face, [row for row, of in enumerate(self.datasets) if of is face], samples):
                if found[row] is None:
                    self.datasets[row] = str(samples[row].get(face.source_name or "", face.sources[0]))
        self.faces = [of if isinstance(of, Face) else None for of in self.datasets]
        self.in_batch = tuple(dict.fromkeys(face for face in self.faces if face is not None))
        self.known = tuple(dict.fromkeys((*self.in_batch, *candidates)))
        self.names = self._names()

    def _names(self) -> tuple[str, ...]:
        keys = [_keys(sample, face) for sample, face in zip(self.samples, self.faces, strict=True)]
        union = dict.fromkeys(name for names in keys for name in names)
        expected = [
            name
            for face in dict.fromkeys(self.faces)
            if face is not None and face.optional
            for name in face.optional.difference(union)
            if any(of is face and _follows(sample, face) for of, sample in zip(self.faces, self.samples, strict=True))
        ]
        if not expected and all(len(names) == len(union) for names in keys):
            return tuple(union)
        if wrong := self._wrongly_lacking(keys, union):
            _raise_different(wrong, keys)
        everywhere = dict.fromkeys((*union, *expected))
        ordered = [name for face in self.known for name in face.names if name in everywhere]
        return tuple(dict.fromkeys((*ordered, *everywhere)))

    def _wrongly_lacking(self, keys: Sequence[Sequence[str]], union: Mapping[str, None]) -> set[str]:
        """The fields that some sample lacks which has to have them."""
        had: dict[Face | str | None, set[str]] = {}
        for of, names in zip(self.datasets, keys, strict=True):
            had.setdefault(of, set()).update(names)
        wrong: set[str] = set()
        for of, face, names in zip(self.datasets, self.faces, keys, strict=True):
            optional = frozenset[str]() if face is None else face.optional
            for name in union.keys() - set(names) - optional:
                is_of_others = name not in had[of] and (of is not None if face is None else name not in face.index)
                if not is_of_others:
                    wrong.add(name)
        return wrong


def _face(sample: Any, lengths: Lengths) -> Face | None:
    attachment = sample._attachment if isinstance(sample, Sample) else None
    return None if attachment is None else lengths.of(attachment.face)


def _named(sample: Mapping[str, Any], known: Mapping[Face, Any], fallback: Face | None) -> Face | str | None:
    """The dataset that a plain dict is of; a str: only its name is known."""
    faces = [face for face in known if face.source_name is not None and sample.get(face.source_name) in face.sources]
    if faces:
        return min(faces, key=lambda face: _num_unlike(sample, face))
    source = sample.get("source" if fallback is None else fallback.source_name or "source")
    return source if isinstance(source, str) else fallback


def _num_unlike(sample: Mapping[str, Any], face: Face) -> int:
    """How many fields of the dataset the sample lacks, and has more than it."""
    return len(face.index.keys() - face.optional - sample.keys()) + len(sample.keys() - set(face.names))


def _of_a_namesake(face: Face, rows: Sequence[int], samples: Sequence[Mapping[str, Any]]) -> list[int]:
    """Of ``rows``, which seem to be of the dataset: those of another one of its name, that nobody has told us of.

    They lack a field that the dataset's own samples have, and have one that those lack. What only lacks one is a
    mistake of a wrapper.
    """
    keys = {row: set(_keys(samples[row], face)) for row in rows}
    needed = (face.index.keys() - face.optional) & set[str]().union(*keys.values())
    own = set(face.names).union(*(names for names in keys.values() if needed <= names))
    return [row for row, names in keys.items() if not needed <= names and not names <= own]


def _keys(sample: Mapping[str, Any], face: Face | None) -> Sequence[str]:
    if face is not None and isinstance(sample, Sample) and sample.is_untouched() and not face.optional:
        return face.names
    return tuple(sample)


def _follows(sample: Mapping[str, Any], face: Face) -> bool:
    """Whether the sample still is one of its dataset, so that what is optional there is in its batch in any case."""
    if isinstance(sample, Sample) and sample._refs is not None:
        return True
    if face.source_name is not None:
        return sample.get(face.source_name) in face.sources
    return all(name in sample for name in face.index if name not in face.optional)


def _raise_different(wrong: set[str], keys: Sequence[Sequence[str]]) -> None:
    """Name the first sample that is not like sample 0."""
    first = wrong.intersection(keys[0])
    row = next(i for i, names in enumerate(keys) if wrong.intersection(names) != first)
    odd = ", ".join(sorted(map(str, first.symmetric_difference(wrong.intersection(keys[row])))))
    raise ShmloaderError(
        f"Samples of one batch have different fields: sample {row} of the batch differs from sample 0 in {odd}, which "
        "no schema calls optional. A `transform` or a wrapper must give every sample of a dataset the same fields. "
        "Samples of several datasets (ConcatDataset) may have different ones, as long as each has its `source`, and "
        "no two of them the same: all datasets in memory are named 'Dataset'. A wrapper that makes dicts of these can "
        "set 'source', or change the sample itself.",
        field=odd,
        row=row,
    )
