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


@dataclass(frozen=True)
class Lengths:
    """How values of different lengths come to lie side by side.

    multiple_of: padded lengths are rounded up to a multiple of it; None: as each dataset's config says.
    modes: (field, mode) of the fields for which one was asked for. "pad": filled up to the longest, with what the
        schema says, else 0. "nested": a jagged ``torch.nested`` tensor [B, j, …]. "list": the values as they are.
    """

    multiple_of: int | None = None
    modes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, pad_to_multiple_of: int | None, ragged: Mapping[str, str] | None) -> Lengths:
        """What the arguments ask for. Raises OptionError."""
        multiple = None if pad_to_multiple_of is None else whole_number("pad_to_multiple_of", pad_to_multiple_of, 1)
        if not isinstance(ragged, Mapping | None):
            raise _error(ragged, f"ragged= must be a dict of field → mode, but got {type(ragged).__name__}")
        for name, mode in (ragged or {}).items():
            if mode not in MODES:
                raise _error(ragged, f"ragged= must give {name!r} one of {', '.join(MODES)}, but got {mode!r:.80}")
        return cls(multiple, tuple((ragged or {}).items()))

    def mode(self, name: str, field: Field | None) -> str | None:
        """How values of ``name`` are laid side by side; None: their shapes must agree."""
        for asked, mode in self.modes:
            if asked == name:
                return mode
        return None if field is None or field.pad is None else "pad"

    def is_gathered(self, name: str) -> bool:
        """Whether the core can lay ``name`` side by side: it pads, and nothing else."""
        return all(asked != name or mode == "pad" for asked, mode in self.modes)

    def of(self, face: Face) -> Face:
        """``face`` with the padded lengths that are asked for."""
        return face if self.multiple_of is None else _rounded(face, self.multiple_of)

    def check(self, names: Iterable[Any], within: str = "") -> None:
        """Raises an OptionError if a mode was asked for what the samples of a batch do not have.

        names: what they have; of the dict that is a sample's field, with ``within`` = "field.".
        """
        have = list(names)
        for asked, _ in self.modes:
            name = asked.removeprefix(within)
            if asked.startswith(within) and name not in have and name.partition(".")[0] not in have:
                raise _error(
                    dict(self.modes),
                    f"ragged= names {asked!r}, which no sample of a batch has: there are "
                    f"{', '.join(f'{within}{name}' for name in have)}",
                )


#: As the datasets' schemas say.
PADDED = Lengths()


@functools.lru_cache(maxsize=64)
def _rounded(face: Face, multiple_of: int) -> Face:
    return face.rounded(multiple_of)


def _error(ragged: object, message: str) -> OptionError:
    return OptionError(message, name="ragged", value=repr(ragged), allowed=f"a dict of field → {', '.join(MODES)}")
