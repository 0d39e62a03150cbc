"""What becomes of values whose lengths differ in a batch: what a user asks for beyond the schema."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shmloader.errors import OptionError
from shmloader.keys import Face
from shmloader.permutation import whole_number
from shmloader.sample import Field

MODES = ("pad", "nested", "list")
#: What token labels are padded with: losses ignore it. Source: torch.nn.CrossEntropyLoss, ``ignore_index``.
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class Lengths:
    """How values of different lengths come to lie side by side.

    of_tokens: the padded length of tokens is rounded up to a multiple of it; None: as each dataset's config says.
    multiples: (field, multiple) of fields for which one was asked for by name.
    modes: (field, mode) of the fields for which one was asked for. "pad": filled up to the longest, with what the
        schema says, else 0. "nested": a jagged ``torch.nested`` tensor [B, j, …]. "list": the values as they are.
    """

    of_tokens: int | None = None
    multiples: tuple[tuple[str, int], ...] = ()
    modes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, pad_to_multiple_of: int | Mapping[str, int] | None, ragged: Mapping[str, str] | None) -> Lengths:
        """What the arguments ask for. Raises OptionError."""
        of_tokens, multiples = None, {}
        if isinstance(pad_to_multiple_of, Mapping):
            multiples = {n: whole_number(f"pad_to_multiple_of[{n!r}]", m, 1) for n, m in pad_to_multiple_of.items()}
        elif pad_to_multiple_of is not None:
            of_tokens = whole_number("pad_to_multiple_of", pad_to_multiple_of, 1)
        if not isinstance(ragged, Mapping | None):
            raise _error("ragged", ragged, f"must be a dict of field → mode, but got {type(ragged).__name__}")
        for name, mode in (ragged or {}).items():
            if mode not in MODES:
                raise _error("ragged", ragged, f"must give {name!r} one of {', '.join(MODES)}, but got {mode!r:.80}")
        return cls(of_tokens, tuple(multiples.items()), tuple((ragged or {}).items()))

    def mode(self, name: str, field: Field | None) -> str | None:
        """How values of ``name`` are laid side by side; None: their shapes must agree."""
        for asked, mode in self.modes:
            if asked == name:
                return mode
        return None if field is None or field.pad is None else "pad"

    def multiple(self, name: str) -> int:
        """Of what the padded length of a field is a multiple that no schema has."""
        return dict(self.multiples).get(name, 1)

    def is_gathered(self, name: str) -> bool:
        """Whether the core can lay ``name`` side by side: it pads, and nothing else."""
        return all(asked != name or mode == "pad" for asked, mode in self.modes)

    def of(self, face: Face) -> Face:
        """``face`` with the padded lengths that are asked for."""
        return face if self.of_tokens is None and not self.multiples else _rounded(self, face)

    def check(self, names: Iterable[Any], within: str = "") -> None:
        """Raises an OptionError if a mode was asked for what the samples of a batch do not have.

        names: what they have; of the dict that is a sample's field, with ``within`` = "field.".
        """
        have = list(names)
        for asked, _ in self.modes:
            name = asked.removeprefix(within)
            if asked.startswith(within) and name not in have and name.partition(".")[0] not in have:
                there = ", ".join(f"{within}{name}" for name in have)
                raise _error(
                    "ragged", dict(self.modes), f"names {asked!r}, which no sample of a batch has: there are {there}"
                )

    def check_no_dict(self, name: str, names: Iterable[Any]) -> None:
        """Raises an OptionError if a mode was asked for what is in the field ``name``, which is no dict.

        names: the fields of the batch, whose own names may have dots.
        """
        for asked, _ in self.modes:
            if asked.startswith(f"{name}.") and asked not in names:
                raise _error(
                    "ragged",
                    dict(self.modes),
                    f"names {asked!r}, but {name!r} is not a plain dict in all samples of a batch",
                )

    def check_multiples(self, face: Face) -> None:
        """Raises an OptionError if a multiple was asked for what is not padded in a dataset with this face."""
        if self.of_tokens is not None:
            tokens = _tokens(face)
            if not tokens:
                raise _error(
                    "pad_to_multiple_of",
                    self.of_tokens,
                    f"of all tokens was asked for, but the dataset has none, only {', '.join(face.names)}. Name the "
                    f"fields: pad_to_multiple_of={{'input_ids': {self.of_tokens}}}",
                )
            if all(self.mode(name, face.field(name)) != "pad" for name in tokens):
                raise _error(
                    "pad_to_multiple_of",
                    self.of_tokens,
                    f"of all tokens was asked for, but with ragged={dict(self.modes)!r} none are padded: the dataset's "
                    f"are {', '.join(tokens)}",
                )
        for name, _ in self.multiples:
            self._check_multiple(name, face)

    def _check_multiple(self, name: str, face: Face) -> None:
        field = face.field(name)
        asked = dict(self.modes).get(name)
        is_ragged = field is not None and field.shape[:1] == (None,) and not field.is_text
        if self.mode(name, field) == "pad" and (field is None or is_ragged):
            return
        why = f"is not padded. The dataset has {', '.join(face.names)}"
        if asked in ("nested", "list"):
            why = f"is not padded, since ragged={{{name!r}: {asked!r}}}"
        elif is_ragged:
            why = f"has no value that it is padded with: pad it with zeros by ragged={{{name!r}: 'pad'}}"
        elif field is not None and not field.is_text:
            why = f"is not padded: its shape is {list(field.shape)}, and only a first dimension that differs (None) is"
        elif name not in face.names:
            why += f"; a field that a wrapper has added is padded with ragged={{{name!r}: 'pad'}}"
        raise _error("pad_to_multiple_of", dict(self.multiples), f"names {name!r}, which {why}")


#: As the datasets' schemas say.
PADDED = Lengths()


@functools.lru_cache(maxsize=64)
def _rounded(lengths: Lengths, face: Face) -> Face:
    of_tokens = {} if lengths.of_tokens is None else dict.fromkeys(_tokens(face), lengths.of_tokens)
    return face.rounded(of_tokens | dict(lengths.multiples))


def _tokens(face: Face) -> list[str]:
    """The fields that are tokens: those that have a mask, and labels of each token."""
    return [
        name
        for name, i in face.index.items()
        if face.fields[i].shape == (None,) and (face.fields[i].mask is not None or face.fields[i].pad == _IGNORED_LABEL)
    ]


def _error(name: str, value: object, what: str) -> OptionError:
    allowed = f"a dict of field → {', '.join(MODES)}" if name == "ragged" else "a whole number, or a dict of them"
    return OptionError(f"{name}= {what}", name=name, value=repr(value), allowed=allowed)
