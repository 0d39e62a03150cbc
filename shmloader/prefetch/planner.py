"""The planner: a short-lived service that finds out which rows there are; the only one to import ``datasets``."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

from shmloader.errors import to_wire
from shmloader.prefetch.payload import read_work
from shmloader.prefetch.plan import SetPlan, describe_fields, write_plan
from shmloader.prefetch.plan_file import write_failure

log = logging.getLogger("shmloader.planner")


def make_plan(fds: dict[str, int], window_bytes: int) -> SetPlan:
    """The plan of the payload's requests; loads all of the user's objects, so that what is wrong shows now."""
    from shmloader.prefetch.recipes import recipes_of, schema_of
    from shmloader.sources import make_plan as plan_sources

    began = time.monotonic()
    work = read_work(fds["payload"])
    loaded = time.monotonic()
    log.debug("what the payload needs was loaded in %.2f s", loaded - began)
    source = plan_sources(*work.requests)
    num_rows = "an unknown number of" if source.num_rows is None else source.num_rows
    log.debug(
        "plan of %r, split %r: %s rows in %d chunks of %d shards, mode %r, made in %.2f s",
        source.name, source.split, num_rows, len(source.chunks), len(source.shards), source.mode,
        time.monotonic() - loaded,
    )  # fmt: skip
    schema = None
    if work.process_of() is None:
        schema = schema_of(recipes_of(source, work), source)
        log.debug("fields of a sample: %s", describe_fields(schema))
    return SetPlan(source, schema, window_bytes)


def main(fds: dict[str, int], head: dict[str, Any]) -> None:
    """Write the plan, or why there is none, into the plan memfd."""
    try:
        write_plan(fds["plan"], make_plan(fds, head["window_bytes"]))
    except (Exception, SystemExit) as error:
        log.debug("there is no plan: %s", type(error).__name__)  # what it says goes to who asked for it
        write_failure(fds["plan"], to_wire(error))
    # Nobody waits for requests that were given up and hang in the network still.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)
