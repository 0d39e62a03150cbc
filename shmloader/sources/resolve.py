"""What the user's dataset name stands for: a builder of ``datasets``, and its splits.

The one place that turns the exceptions of ``datasets`` and the Hub's client into ours, and that keeps
tokens out of messages. Supervisor, and prefetchers that stream; imports ``datasets`` when called.
"""

from __future__ import annotations

import difflib
import errno
import glob
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shmloader.errors import (
    DatasetNotFoundError,
    EmptyDatasetError,
    ReadError,
    ShmloaderError,
    SourceError,
    SplitNotFoundError,
)
from shmloader.sources.answers import is_refused, is_unreachable, refused, unreachable
from shmloader.sources.base import SourceRequest
from shmloader.sources.blame import chain, failure, missing_package
from shmloader.sources.hub import NoRanges
from shmloader.sources.local_files import walked_once
from shmloader.sources.patience import be_patient

_COMPRESSION = {".gz", ".bz2", ".xz", ".zst", ".lz4"}
#: Of servers that are not the Hub, reading is tried again this often by a stream of ``datasets`` (its default, 20
#: times, hides a dead one for nine minutes; guessed). What is asked of the Hub is tried again below it (patience.py).
_STREAM_RETRIES = 4


def quiet_datasets() -> Any:
    """The ``datasets`` module, set up for a service: no progress bars, no sleeping at a stream's end."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    datasets.config.STREAMING_READ_MAX_RETRIES = min(_STREAM_RETRIES, datasets.config.STREAMING_READ_MAX_RETRIES)
    datasets.config.STREAMING_OPEN_MAX_RETRIES = min(_STREAM_RETRIES, datasets.config.STREAMING_OPEN_MAX_RETRIES)
    return datasets


def source_name(request: SourceRequest) -> str:
    """The dataset's name as messages and samples show it."""
    dataset = request.dataset
    if isinstance(dataset, (str, os.PathLike)):
        return os.fspath(dataset)
    if isinstance(dataset, Mapping):
        dataset = dataset.get(request.split, next(iter(dataset.values()), None))
    info = getattr(dataset, "info", None)
    return getattr(info, "dataset_name", None) or type(dataset).__name__


def resolve_builder(request: SourceRequest, revision: str | None = None, root: str | None = None) -> Any:
    """The ``datasets`` builder of a dataset given by name; a local file gets the builder of its format.

    revision: the commit to pin, where the plan has one. root: the local folder that stands for a Hub dataset, likewise.

    Raises:
        DatasetNotFoundError: there is no such dataset, folder or file.
        AccessError: the Hub does not give it to this user.
        EmptyDatasetError: it has no data files.
        SourceError: the Hub cannot be reached, the configuration does not exist, a setting is bad.
    """
    datasets = quiet_datasets()
    be_patient(request.source_timeout_s)
    name, load = source_name(request), dict(request.load)
    if revision is not None:
        load["revision"] = revision
    if root is not None:
        name = root
        load.pop("revision", None)
    path = Path(name).expanduser()
    with translated(request, "find"):
        if path.is_file():
            builder, options = _builder_of_file(path)
            # What is given is a path, and what `datasets` takes is a pattern.
            name, load = builder, options | load | {"data_files": [glob.escape(str(path.resolve()))]}
        elif path.is_dir():
            name = str(path)
        with walked_once():
            found = datasets.load_dataset_builder(name, **load)
    if path.is_file():
        _check_file(request, found, path.resolve())
    elif path.is_dir() and glob.has_magic(str(path.resolve())) and "data_files" not in load:
        _check_folder(request, found, path.resolve())
    return found


def check_name(request: SourceRequest) -> None:
    """Raise if the dataset's name cannot even be looked for: too long, below a folder that is not ours, …"""
    if not isinstance(request.dataset, (str, os.PathLike)):
        return
    name = source_name(request)
    try:
        Path(name).expanduser().exists()
    except OSError as error:
        # A name may hold a whole file by mistake.
        shown = name if len(name) <= 100 else f"{name[:60]}…{name[-20:]}"
        kind = DatasetNotFoundError if error.errno == errno.ENAMETOOLONG else SourceError
        raise kind(f"Cannot find {shown!r}: {error.strerror}. Check dataset_name=.", dataset=name) from error


def split_names(builder: Any) -> tuple[str, ...]:
    """The splits that a builder knows of, before any data is read."""
    files = getattr(builder.config, "data_files", None)
    if files:
        return tuple(str(name) for name in files)
    return tuple(str(name) for name in builder.info.splits or ())


def commit_of(builder: Any | None) -> str | None:
    """The commit that a Hub builder's files are of."""
    base = str(getattr(builder, "base_path", "") or "")
    return base.split("@", 1)[1].split("/")[0] if base.startswith("hf://datasets/") and "@" in base else None


def check_split(request: SourceRequest, available: Sequence[str]) -> None:
    """Raise `SplitNotFoundError` if the requested split is not among ``available``."""
    if available and request.split not in available:
        name = source_name(request)
        raise SplitNotFoundError(
            f"{name} has no split {request.split!r}; it has {', '.join(map(repr, available))}. "
            "Choose one of these with split=.",
            dataset=name,
            split=request.split,
            available=list(available),
        )


def empty_dataset(request: SourceRequest) -> EmptyDatasetError:
    """The error for a split without rows."""
    name = source_name(request)
    return EmptyDatasetError(
        f"{name}, split {request.split!r}, has no rows: there is nothing to train on. "
        "Check the split, its files, and any filter before it.",
        dataset=name,
        split=request.split,
    )


@contextmanager
def translated(request: SourceRequest, verb: str) -> Iterator[None]:
    """Turn what ``datasets`` and the Hub's client raise inside into errors of this package, without tokens."""
    try:
        yield
    except ShmloaderError:
        raise
    except Exception as error:
        translated_error = _translate(request, verb, error)
        if has_secret(request, _chain_text(error)):
            raise translated_error from None
        raise translated_error from error


def without_secrets(request: SourceRequest, text: str) -> str:
    """``text`` with the user's tokens blotted out."""
    for secret in _secrets(request):
        text = text.replace(secret, "***")
    return text


def has_secret(request: SourceRequest, text: str) -> bool:
    """Whether one of the user's tokens is in ``text``."""
    return any(secret in text for secret in _secrets(request))


def is_offline() -> bool:
    """Whether offline mode is on: no request may be made."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE or quiet_datasets().config.HF_HUB_OFFLINE)  # or HF_DATASETS_OFFLINE


def is_answered(error: SourceError) -> bool:
    """Whether what `translated` raised is what the Hub said, or comes of what is on this machine."""
    return "endpoint" not in error.data


def cannot_stream(error: SourceError) -> bool:
    """Whether what `translated` raised says that it has to be downloaded to be read."""
    return "cannot_stream" in error.data


def is_script(error: SourceError) -> bool:
    """Whether what `translated` raised says that the dataset is a loading script on the Hub."""
    return "script" in error.data


def _translate(request: SourceRequest, verb: str, error: Exception) -> SourceError:
    name = source_name(request)
    file, why = failure(error)
    detail = without_secrets(request, why)
    kinds = {type(e).__name__ for e in chain(error)}
    if is_unreachable(error):
        return unreachable(name, verb, detail, error)
    if any(isinstance(e, NoRanges) or type(e) is NotImplementedError for e in chain(error)):
        return SourceError(
            f"Cannot {verb} {name!r} as a stream: {detail}. Give use_streaming=False.",
            dataset=name,
            cannot_stream=detail,
        )
    if is_refused(error):
        return refused(request, name, detail, error)
    empty = _why_empty(request, error, kinds, detail)
    if empty is not None:
        return EmptyDatasetError(f"{name}{empty}", dataset=name, split=request.split)
    script = re.fullmatch(r"Dataset scripts are no longer supported, but found (.+)", str(error))
    if script:
        return SourceError(
            f"{name} is a loading script ({script[1]}), which datasets does not run any more. Give its data files, or "
            "write what it yields once as Parquet with an older datasets.",
            dataset=name,
            script=script[1],
        )
    if isinstance(error, FileNotFoundError) or kinds & {"DatasetNotFoundError", "HFValidationError"}:
        return _not_found(request, name, detail)
    package = missing_package(error)
    if package is not None:
        return SourceError(
            f"Cannot {verb} {name!r}: the package {package!r} is needed for it: pip install {package}. ({detail})",
            dataset=name,
            package=package,
        )
    if file is not None:
        file = without_secrets(request, file)
        return ReadError(
            f"{name}: cannot read {file}: {detail}. Mend the file, leave it out with data_files= in load=, or say "
            "there how datasets is to read its format.",
            dataset=name,
            shard=file,
            first_row=None,
            num_rows=None,
        )
    is_config = isinstance(error, ValueError) and "config" in str(error).lower()
    remedy = '. Name the configuration with load={"name": …}.' if is_config else ""
    return SourceError(f"Cannot {verb} {name!r}: {detail}{remedy}", dataset=name)


def _why_empty(request: SourceRequest, error: Exception, kinds: set[str], detail: str) -> str | None:
    """What is told of a dataset without data; None: ``error`` is of something else."""
    if "EmptyDatasetError" in kinds:
        return f" has no data files that can be read ({detail}). Check the folder, or data_files= in load=."
    if isinstance(error, StopIteration):  # of a builder that looked at the first rows
        return f", split {request.split!r}, has no rows: its files are empty. Check them, or data_files= in load=."
    if "DataFilesNotFoundError" in kinds or (isinstance(error, FileNotFoundError) and request.load.get("data_files")):
        return f": no such data files, or none of a known format ({detail}). Check data_files= in load=."
    return None


def _not_found(request: SourceRequest, name: str, detail: str) -> DatasetNotFoundError:
    path = Path(name).expanduser()
    if "::" in name:
        return DatasetNotFoundError(
            f"There is no dataset {name!r}: chained paths ('zip://…::…') are not supported, nor are paths with '::' in "
            f"them. Give the archive itself, or what is in it unpacked. ({detail})",
            dataset=name,
        )
    places = [f"no local folder or file {str(path.absolute())!r}"]
    if not path.is_absolute() and name.count("/") <= 1 and not name.startswith("."):
        from huggingface_hub import constants

        login = '; a private or gated one needs a token: `hf auth login`, HF_TOKEN, or load={"token": …}'
        token = " with the given token" if request.load.get("token") else login
        revision = f" at revision {request.load['revision']!r}" if request.load.get("revision") else ""
        places.append(f"no dataset of that name{revision} on the Hub at {constants.ENDPOINT}{token}")
    near: list[str] = []
    if path.absolute().parent.is_dir():
        near = difflib.get_close_matches(path.name, [p.name for p in path.absolute().parent.iterdir()], n=1)
    hint = f" Did you mean {str(path.parent / near[0])!r}?" if near else ""
    return DatasetNotFoundError(
        f"There is no dataset {name!r}: {', and '.join(places)}.{hint} ({detail})",
        dataset=name,
    )


def _check_file(request: SourceRequest, builder: Any, path: Path) -> None:
    """Raise unless ``builder`` reads ``path`` alone."""
    found = _local_files(builder)
    if found != [str(path)]:
        raise SourceError(
            f"{source_name(request)}: datasets takes {str(path)!r} for {found or 'no file'}. Rename the file: its path "
            "must not look like a pattern or an URL.",
            dataset=source_name(request),
        )


def _check_folder(request: SourceRequest, builder: Any, root: Path) -> None:
    """Raise if ``builder`` reads files that are not below ``root``, whose path it took for a pattern."""
    strays = [file for file in _local_files(builder) if not Path(file).is_relative_to(root)]
    if strays:
        raise SourceError(
            f"{source_name(request)}: datasets takes this folder's path for a pattern, and would read files of other "
            f"folders: {strays[0]!r}. Rename the folder: no *, ? or [ in its path.",
            dataset=source_name(request),
        )


def _local_files(builder: Any) -> list[str]:
    """The files that ``builder`` reads, of all splits; of one in an archive, the archive."""
    files = [str(file) for some in (builder.config.data_files or {}).values() for file in some]
    return list(dict.fromkeys(file.rsplit("::", 1)[-1] for file in files if "://" not in file.rsplit("::", 1)[-1]))


def _builder_of_file(path: Path) -> tuple[str, dict[str, Any]]:
    from datasets.data_files import DataFilesList
    from datasets.load import infer_module_for_data_files_list
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    if path.suffix.lower() == ".zip":
        try:
            module, options = infer_module_for_data_files_list(DataFilesList([str(path.resolve())], [()]))
        except zipfile.BadZipFile as error:
            raise ReadError(
                f"{str(path)!r} is no ZIP archive, or a damaged one: {error}. Copy it anew.",
                dataset=str(path),
                shard=str(path),
                first_row=None,
                num_rows=None,
            ) from error
        if module is not None:
            return str(module), dict(options)
    suffixes = [s for s in path.suffixes if s.lower() not in _COMPRESSION]
    for suffix in reversed(suffixes):
        found = _EXTENSION_TO_MODULE.get(suffix) or _EXTENSION_TO_MODULE.get(suffix.lower())
        if found:
            return found[0], dict(found[1])
    raise DatasetNotFoundError(
        f"{str(path)!r} is a file of no known format ({path.suffix or 'no suffix'}). "
        "Use .parquet, .json, .jsonl, .csv, .txt or .arrow, a .zip of such files, or a folder of them.",
        dataset=str(path),
    )


def _secrets(request: SourceRequest) -> list[str]:
    values = [request.load.get("token"), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]
    values += [v for v in (request.load.get("storage_options") or {}).values()]
    return [value for value in values if isinstance(value, str) and len(value) >= 6]


def _chain_text(error: BaseException) -> str:
    return "\n".join(str(e) for e in chain(error))
