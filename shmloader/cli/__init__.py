"""The command line: ``shmloader <command>``.

A command is a module of this folder with ``HELP``, ``add_arguments(parser)`` and ``run(args) -> exit code``;
to add one, list it in ``_COMMANDS``. What takes long to import is imported by ``run``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from shmloader import __version__
from shmloader.cli import check, datasets, demo

_COMMANDS = {"check": check, "datasets": datasets, "demo": demo}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    argv: the arguments after the program's name; None: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="shmloader",
        description="A shared-memory data loader for PyTorch: every sample is decoded once per node.",
    )
    parser.add_argument("--version", action="version", version=f"shmloader {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, module in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.__doc__))
    args = parser.parse_args(argv)
    code: int = _COMMANDS[args.command].run(args)
    return code
