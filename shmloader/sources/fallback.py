"""What is taken where a dataset cannot be had as it was asked for: streamed, else downloaded, else made up.

===========================  ==============  ==============  ======================================================
what is the matter           "error"         "download"      "synthetic" (the default)
===========================  ==============  ==============  ======================================================
it cannot be streamed        an error        downloaded      downloaded
nothing can be reached       an error        an error        made-up rows of its schema, where that is known, and a
                                                             warning
it is not there, needs       an error        an error        an error: these are answers
access, is damaged, has no
such split or column
===========================  ==============  ==============  ======================================================

What the caches of ``huggingface_hub`` and ``datasets`` have comes before all of this (origin.py). Planner only.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from shmloader.errors import SourceError
from shmloader.sources.answers import state_of
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.sources.entries import plan_entry
from shmloader.sources.resolve import cannot_stream, is_answered, is_offline, source_name
from shmloader.sources.synthetic import can_make, plan_synthetic

log = logging.getLogger("shmloader.sources")


def plan_with_fallback(request: SourceRequest) -> SourcePlan:
    """The plan of one dataset, or of what ``request.fallback`` allows in its place; `SourcePlan.why` tells why.

    Raises:
        As `shmloader.sources.make_plan`.
    """
    try:
        return _plan_real(request)
    except SourceError as error:
        if is_answered(error) or request.fallback != "synthetic":
            raise
        if not can_make(request):
            raise _no_schema(request, error) from error.__cause__
        log.debug("%s", error)
        return _synthetic(request, error)


def _plan_real(request: SourceRequest) -> SourcePlan:
    try:
        return plan_entry(request)
    except SourceError as error:
        if not cannot_stream(error) or request.is_downloaded:
            raise
        return _downloaded(request, error)


def _downloaded(request: SourceRequest, error: SourceError) -> SourcePlan:
    name, why = source_name(request), f"it cannot be streamed: {error.data['cannot_stream']}"
    if request.fallback == "error":
        raise SourceError(
            f"{name}: {why}. fallback='error' forbids to download it instead: give use_streaming=False, or "
            "fallback='download'.",
            **error.data,
        ) from error
    plan = plan_entry(replace(request, is_downloaded=True))
    notice = f"{name}: downloaded, since {why}"
    return replace(plan, why=why, notices=(notice, *plan.notices), resolved={**plan.resolved, "is_downloaded": True})


def _synthetic(request: SourceRequest, error: SourceError) -> SourcePlan:
    name, plan = source_name(request), plan_synthetic(request)
    state = "may not be asked (offline mode)" if is_offline() else state_of(error.data.get("status"))
    why = f"the Hub at {error.data['endpoint']} {state}, and the caches do not have it"
    warning = (
        f"{name}: SYNTHETIC DATA, not the dataset: {plan.num_rows} made-up rows with its columns, since {why}. Each "
        f"sample says so in its source ({plan.name!r}). To have an error in its stead, give fallback='error' or "
        f"fallback='download'. What was tried: {error}"
    )
    return replace(plan, why=why, warnings=(warning, *plan.warnings))


def _no_schema(request: SourceRequest, error: SourceError) -> SourceError:
    """The same error, and why there are no made-up rows."""
    return type(error)(
        f"{error} (No synthetic data can stand in for it, since nobody has told its columns: those of the catalog are "
        "known, which `shmloader datasets` lists, and what register_dataset is told of others; a process= takes all "
        "columns, and some are known at most. fallback='error' asks for none.)",
        **error.data,
    )
