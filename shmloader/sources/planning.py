"""Which kind of source a request is, and its plan. Supervisor only; imports ``datasets``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from shmloader.errors import SourceError
from shmloader.sources.arrow_plan import is_arrow, plan_arrow
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.sources.conversion import converted_data
from shmloader.sources.download import can_download, download
from shmloader.sources.hub_cache import repo_of
from shmloader.sources.listing_plan import is_folder, plan_listing
from shmloader.sources.loaded import is_saved, plan_loaded, prepared
from shmloader.sources.origin import find_origin
from shmloader.sources.parquet_plan import can_plan, is_on_hub, plan_parquet
from shmloader.sources.patience import be_patient
from shmloader.sources.prepare import prepare
from shmloader.sources.resolve import check_name, check_split, quiet_datasets, source_name, split_names
from shmloader.sources.splits import ALL, is_expression, plan_all, plan_expression
from shmloader.sources.stream import plan_stream
from shmloader.sources.table_plan import plan_table


def plan_source(request: SourceRequest) -> SourcePlan:
    """The plan of any source; see `shmloader.sources.make_plan`."""
    check_name(request)
    if is_expression(request):
        return plan_expression(request, _plan_split)
    return plan_all(request, _plan_split) if request.split == ALL else _plan_split(request)


def _plan_split(request: SourceRequest) -> SourcePlan:
    """The plan of one split, by its name."""
    datasets = quiet_datasets()
    be_patient(request.source_timeout_s)
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
    origin = find_origin(request)
    plan = _plan_files(request, origin.builder)
    return replace(
        plan,
        revision=plan.revision or origin.revision,
        root=origin.root,
        resolved={"load": origin.load} if origin.load else {},
        notices=origin.notices + plan.notices,
        warnings=origin.warnings + plan.warnings,
    )


def _plan_files(request: SourceRequest, builder: Any) -> SourcePlan:
    """The plan of a builder's split, wherever its files are."""
    check_split(request, split_names(builder))
    is_remote = is_on_hub(builder)
    if can_plan(builder) and not is_remote:
        return plan_parquet(request, builder)
    table = plan_table(request, builder)
    if table is not None:
        return table
    ready = prepared(request, builder)
    if ready is not None:
        return plan_loaded(request, ready)
    if request.is_downloaded:
        return _plan_downloaded(request, builder)
    plan = _plan_any_order(request, builder)
    if plan is not None:
        return plan
    if is_remote and not request.is_iterable and not told_rows(builder, request.split):
        return _plan_uncounted(request, builder)
    return plan_stream(request, builder)


def _plan_any_order(request: SourceRequest, builder: Any) -> SourcePlan | None:
    """The plan of files that have random access as they lie; None: they have not."""
    if can_plan(builder):
        return plan_parquet(request, builder)
    if is_folder(builder):
        return plan_listing(request, builder)
    return plan_arrow(request, builder) if is_arrow(builder) else None


def _plan_downloaded(request: SourceRequest, builder: Any) -> SourcePlan:
    """The plan of files that are on this machine once it is made."""
    paths = [str(path) for path in (builder.config.data_files or {}).get(request.split, ())]
    if (can_plan(builder) or is_folder(builder)) and can_download(paths):
        download(request, paths)  # the cache has them then, and is where they are looked for first
    plan = _plan_any_order(request, builder) if can_download(paths) else None
    return _prepared(request, builder) if plan is None else plan


def told_rows(builder: Any, split: str) -> int | None:
    """The number of rows that the dataset's card tells."""
    return getattr((builder.info.splits or {}).get(split), "num_examples", None) or None


def _plan_uncounted(request: SourceRequest, builder: Any) -> SourcePlan:
    """Of files on a Hub that can only be read front to back, and of which nobody knows how many rows they hold.

    To count them is to download them, and to read them to download them again.
    """
    repo = repo_of(source_name(request))
    found = "it is not a dataset of the Hub alone" if repo is None else converted_data(request, repo, builder)
    if isinstance(found, str):
        name, why = source_name(request), f"no card tells how many rows it has, and {found}"
        advice = "ShmMultimodalIterableDataset reads it as a stream, without knowing"
        if request.fallback == "error":
            raise SourceError(
                f"{name}: it cannot be streamed with a known length, since {why}. fallback='error' forbids to download "
                f"it instead: give use_streaming=False, or fallback='download'; {advice}.",
                dataset=name,
            )
        plan = _prepared(request, builder, f"{name}: downloaded and prepared, since {why}; {advice}")
        return replace(plan, why=why)
    plan = plan_parquet(request, found[0])
    return replace(plan, notices=(found[1], *plan.notices))


def _prepared(request: SourceRequest, builder: Any, *notices: str) -> SourcePlan:
    split, notice = prepare(request, builder)
    plan = plan_loaded(request, split)
    return replace(plan, notices=(*notices, notice, *plan.notices))
