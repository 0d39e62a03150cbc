"""The part of docs/datasets.md that the catalog says; run as a program it writes it."""

from __future__ import annotations

from pathlib import Path

from shmloader.catalog import BUILT_IN
from shmloader.cli.catalog_words import rows_of

DOCUMENT = Path(__file__).parent.parent / "docs" / "datasets.md"
BEGIN, END = "<!-- datasets: made by `make catalog` -->", "<!-- end of the datasets -->"


def described() -> str:
    """The built-in datasets as Markdown."""
    parts = []
    for config in BUILT_IN:
        rows = "".join(f"| {head} | {what} |\n" for head, what in rows_of(config))
        parts.append(f"### {config.name}\n\n| | |\n| --- | --- |\n{rows}")
    return "\n".join(parts)


def in_document() -> str:
    """The same as it stands in docs/datasets.md."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip() + "\n"


def write_document() -> None:
    """Put it into docs/datasets.md."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{described()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    write_document()
