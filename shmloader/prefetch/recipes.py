"""How samples are made of the rows of each source of a set."""

from __future__ import annotations

from collections.abc import Sequence

from shmloader import processors
from shmloader.errors import OptionError
from shmloader.prefetch.payload import Work
from shmloader.processors.base import Processor
from shmloader.sample import Schema
from shmloader.sources.base import SourcePlan
from shmloader.union import union

#: The processors of one source, which make its samples together.
Recipe = Sequence[Processor]


def has_process(plan: SourcePlan, work: Work) -> bool:
    """Whether a ``process`` makes the samples: the user's, or one that is registered with a short name.

    Raises:
        OptionError: one of several sources has one of its own.
    """
    own = [source.name for i, source in enumerate(plan.sources) if work.process_of(i) is not None]
    if work.process is None and own and len(plan.sources) > 1:
        raise OptionError(
            f"{own[0]!r} was registered with a process= of its own, which makes the samples of one dataset alone; here "
            "it is one of several. Open it alone, register it with columns= instead, or give one process= for all.",
            name="dataset_name",
            value=plan.name,
            allowed="one dataset, where it has a process= of its own",
        )
    return bool(own)


def recipes_of(plan: SourcePlan, work: Work) -> list[Recipe]:
    """Of each source its processors; a user's ``process`` is one for all, whose fields they share.

    Raises:
        As `processors.build`, `has_process`.
    """
    if has_process(plan, work):
        return [processors.build(plan.columns, work.config, work.tokenizer, work.process_of())] * len(plan.sources)
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
