"""Which file an exception of ``datasets`` is about: its builders seldom say so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import FrameType

#: Where builders read files, and what they call the one that is being read.
_BUILDERS = "datasets.packaged_modules."
_WRAPPERS = ("DatasetGenerationError", "DatasetGenerationCastError")
_TELLS_ROW = re.compile(r"\b(row|line) \d")
_FILE_NAMES = ("file", "tar_path", "downloaded_metadata_file")


def chain(error: BaseException) -> Iterator[BaseException]:
    """``error``, and what it comes of."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def failure(error: BaseException) -> tuple[str | None, str]:
    """The file that was being read when ``error`` came (None: not known), and what went wrong with it.

    Of several errors that came of one another in that file, the one that tells the row or line.
    """
    found = [(place, one) for one in chain(error) if (place := _place_of(one)) is not None]
    if not found:  # what `datasets` wraps an error in says nothing of it
        return None, _text(next((e for e in chain(error) if type(e).__name__ not in _WRAPPERS), error))
    place, one = next((pair for pair in found if _TELLS_ROW.search(str(pair[1]))), found[0])
    file, block = place
    is_counted_anew = block and _TELLS_ROW.search(str(one))
    return file, f"{_text(one)} (counted from the file's block {block} on)" if is_counted_anew else _text(one)


def missing_package(error: BaseException) -> str | None:
    """The package without which a compressed file cannot be read; None: ``error`` is of something else."""
    for one in chain(error):
        if isinstance(one, ImportError):
            found = re.search(r"install '?([\w-]+)", str(one))
            return found[1] if found else one.name
        unknown = re.search(r"Compression type (\w+) not supported", str(one))
        if unknown:
            return {"zstd": "zstandard"}.get(unknown[1], unknown[1])
    return None


def why_failed(error: BaseException) -> str:
    """What went wrong, and in which file, for a message."""
    file, text = failure(error)
    package = missing_package(error)
    text = text if package is None else f"{text} (the package {package!r} is needed: pip install {package})"
    return text if file is None or file in text else f"{file}: {text}"


def _text(error: BaseException) -> str:
    return " ".join([f"{type(error).__name__}: {str(error).strip()}", *getattr(error, "__notes__", ())])


def _place_of(error: BaseException) -> tuple[str, int] | None:
    """The file that a builder was reading, and which block of it (the first: 0)."""
    trace = error.__traceback__
    while trace is not None:
        found = _place_in(trace.tb_frame)
        if found is not None:
            return found
        trace = trace.tb_next
    return None


def _place_in(frame: FrameType) -> tuple[str, int] | None:
    if not str(frame.f_globals.get("__name__", "")).startswith(_BUILDERS):
        return None
    for name in _FILE_NAMES:
        value = frame.f_locals.get(name)
        if isinstance(value, str):
            block = frame.f_locals.get("batch_idx")
            return str(value), block if isinstance(block, int) else 0
    return None
