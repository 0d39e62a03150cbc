"""``python -m bench <question>``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench import warm


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of shmloader.")
    commands = parser.add_subparsers(dest="command", metavar="question", required=True)
    warm.add_arguments(commands.add_parser("warm", help=warm.HELP, description=warm.HELP))
    args = parser.parse_args(argv)
    status: int = warm.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
