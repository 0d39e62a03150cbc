"""List the datasets that have a short name, for ``dataset_name=``; or all that is known of one."""

from __future__ import annotations

import argparse
import json
import sys

HELP = "list the datasets that have a short name, or describe one"

#: Exit code: there is no such name.
UNKNOWN = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``shmloader datasets``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a short name: all that is known of it")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Print them; returns 0 unless a name is given that there is not."""
    from shmloader import registry
    from shmloader.cli.catalog_words import as_json

    configs = registry.known()
    if args.name is not None:
        config = registry.find(args.name)
        if config is None:
            near = registry.near(args.name)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            names = ", ".join(config.name for config in configs)
            print(f"shmloader datasets: there is no {args.name!r}.{hint} Short names are {names}", file=sys.stderr)
            return UNKNOWN
        configs = (config,)
    if args.json:
        told = [as_json(config) for config in configs]
        print(json.dumps(told if args.name is None else told[0], indent=2, ensure_ascii=False))
    elif args.name is None:
        _list()
    else:
        _describe(args.name)
    return 0


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from shmloader import registry
    from shmloader.cli.catalog_words import fields_of, splits_of

    table = Table(show_lines=True)
    for head in ("name", "from", "splits", "task type", "sample", "licence"):
        table.add_column(head, overflow="fold")
    for config in registry.known():
        fields = "\n".join(f"{name}: {what}" for name, what in fields_of(config).items())
        repos = "\n".join(repo.id for repo in config.repos)
        table.add_row(config.name, repos, splits_of(config.repos[0]), config.task_type, fields, config.licence)
    Console(highlight=False, markup=False).print(table)


def _describe(name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from shmloader import registry
    from shmloader.cli.catalog_words import rows_of

    config = registry.find(name)
    assert config is not None
    table = Table("", config.name, show_header=True, box=None)
    for row in rows_of(config):
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)
