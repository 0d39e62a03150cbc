"""Image rows that only name a file get its bytes. The features' own code reads them: local paths and the Hub's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shmloader.sources.base import SourceRequest
from shmloader.sources.rows import IMAGE_TYPE


class _OneToken(dict[str, Any]):
    """Repository → token, as ``datasets`` asks for it: the same for each."""

    def __init__(self, token: str | bool | None) -> None:
        super().__init__()
        self._token = token

    def get(self, key: str, default: Any = None) -> Any:
        return self._token if self._token is not None else default


def embed_images(batch: pa.RecordBatch, features: Mapping[str, Any], request: SourceRequest) -> pa.RecordBatch:
    """``batch`` with the bytes of every image in it, read from its path (local or on the Hub) where need be.

    Raises:
        OSError: a file cannot be read.
    """
    for index, field in enumerate(batch.schema):
        if type(features.get(field.name)).__name__ != "Image" or not field.type.equals(IMAGE_TYPE):
            continue
        column = batch.column(index)
        without_bytes = pc.and_(pc.is_null(pc.struct_field(column, [0])), pc.is_valid(pc.struct_field(column, [1])))
        if pc.any(without_bytes).as_py():
            tokens = _OneToken(request.load.get("token"))
            embedded = features[field.name].embed_storage(column, token_per_repo_id=tokens)
            batch = batch.set_column(index, field, embedded.cast(field.type))
    return batch
