"""How the place of a value in a row is named, beyond the name of a column and the path into one ("answers.text")."""

from __future__ import annotations

import re

_CHOICE = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")


def choice_of(path: str) -> tuple[str, str] | None:
    """The list, and the number of the item, of a path "options[correct]"; both are paths. None: it is no such path."""
    found = _CHOICE.fullmatch(path)
    return None if found is None else (found[1], found[2])
