"""What is asked for by ``dataset_name`` and ``task_type``: one request for each dataset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shmloader.errors import OptionError
from shmloader.sources.base import SourceRequest


def select(dataset_name: Any, task_type: str | None, request: SourceRequest) -> tuple[SourceRequest, ...]:
    """The requests that ``dataset_name`` stands for, in order. request: all that they have alike."""
    if dataset_name is None or (isinstance(dataset_name, str) and not dataset_name.strip()):
        raise OptionError(
            "dataset_name= is needed: a Hub id, a local folder or file, or a loaded `datasets` object",
            name="dataset_name",
            value=repr(dataset_name),
            allowed="a dataset",
        )
    names = dataset_name if isinstance(dataset_name, list | tuple) else [dataset_name]
    return tuple(replace(request, dataset=name) for name in names)
