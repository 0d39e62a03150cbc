"""Which kind of source a request is, and its plan. Supervisor only; imports ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shmloader.errors import SourceError
from shmloader.sources.arrow_plan import is_arrow, plan_arrow
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.sources.listing_plan import is_folder, plan_listing
from shmloader.sources.loaded import is_saved, plan_loaded, prepared
from shmloader.sources.parquet_plan import can_plan, is_on_hub, plan_parquet
from shmloader.sources.resolve import check_split, quiet_datasets, resolve_builder, source_name, split_names
from shmloader.sources.stream import plan_stream


def plan_source(request: SourceRequest) -> SourcePlan:
    """The plan of any source; see `shmloader.sources.make_plan`."""
    datasets = quiet_datasets()
    dataset: Any = request.dataset
    if isinstance(dataset, (datasets.Dataset, datasets.DatasetDict)):
        return plan_loaded(request)
    if isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        return plan_stream(request, None)
    if not isinstance(dataset, (str, Path)):
        raise SourceError(
            f"{type(dataset).__name__} is not a dataset: give a Hub id, a local folder or file, or a loaded Dataset, "
            "DatasetDict, IterableDataset or IterableDatasetDict of datasets.",
            dataset=source_name(request),
        )
    if is_saved(dataset):
        return plan_loaded(request)
    builder = resolve_builder(request)
    check_split(request, split_names(builder))
    if can_plan(builder) and not is_on_hub(builder):
        return plan_parquet(request, builder)
    ready = prepared(request, builder)
    if ready is not None:
        return plan_loaded(request, ready)
    return plan_parquet(request, builder) if can_plan(builder) else plan_other(request, builder)


def plan_other(request: SourceRequest, builder: Any) -> SourcePlan:
    """The plan of files that are not Parquet, as they lie."""
    plan = None
    if is_folder(builder):
        plan = plan_listing(request, builder)
    elif is_arrow(builder):
        plan = plan_arrow(request, builder)
    return plan or plan_stream(request, builder)
