"""The planner: a short-lived service that finds out which rows there are; the only one to import ``datasets``."""

from __future__ import annotations

from typing import Any

from shmloader.errors import to_wire
from shmloader.prefetch.payload import read_work
from shmloader.prefetch.plan import SetPlan, write_plan
from shmloader.prefetch.plan_file import write_failure


def make_plan(fds: dict[str, int], window_bytes: int) -> SetPlan:
    """The plan of the payload's request; loads all of the user's objects, so that what is wrong shows now."""
    from shmloader import processors
    from shmloader.sources import make_plan as plan_source

    work = read_work(fds["payload"])
    source = plan_source(work.request)
    schema = None
    if work.process is None:
        built = processors.build(source.columns, work.config, work.tokenizer, None)
        schema = processors.schema_of(built, source.name)
    return SetPlan(source, schema, window_bytes)


def main(fds: dict[str, int], head: dict[str, Any]) -> None:
    """Write the plan, or why there is none, into the plan memfd."""
    try:
        write_plan(fds["plan"], make_plan(fds, head["window_bytes"]))
    except (Exception, SystemExit) as error:
        write_failure(fds["plan"], to_wire(error))
