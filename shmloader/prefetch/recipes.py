"""How samples are made of the rows of each source of a set."""

from __future__ import annotations

from collections.abc import Sequence

from shmloader import processors
from shmloader.prefetch.payload import Work
from shmloader.processors.base import Processor
from shmloader.sample import Schema
from shmloader.sources.base import SourcePlan
from shmloader.union import union

#: The processors of one source, which make its samples together.
Recipe = Sequence[Processor]


def recipes_of(plan: SourcePlan, work: Work) -> list[Recipe]:
    """Of each source its processors; a user's ``process`` is one for all, whose fields they share.

    Raises:
        As `processors.build`.
    """
    process = work.process_of()
    if process is not None:
        return [processors.build(plan.columns, work.config, work.tokenizer, process)] * len(plan.sources)
    return [
        processors.build(source.columns, work.config, work.tokenizer, None, work.train_on_prompt)
        for source in plan.sources
    ]


def schema_of(recipes: Sequence[Recipe], plan: SourcePlan) -> Schema:
    """The schema of all samples that ``recipes`` make; of a user's ``process`` after its first row only.

    Raises:
        ColumnError: the samples of two sources cannot lie in one batch.
    """
    pairs = zip(recipes, plan.sources, strict=True)
    return union([processors.schema_of(recipe, source.name) for recipe, source in pairs])
