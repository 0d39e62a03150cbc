"""``python -m bench <question>``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench import hub, larger, memory, order, warm

_QUESTIONS = {"warm": warm, "larger": larger, "order": order, "memory": memory, "hub": hub}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of shmloader.")
    commands = parser.add_subparsers(dest="command", metavar="question", required=True)
    for name, question in _QUESTIONS.items():
        question.add_arguments(commands.add_parser(name, help=question.HELP, description=question.HELP))
    args = parser.parse_args(argv)
    status: int = _QUESTIONS[args.command].run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
