"""``python -m shmloader`` is ``shmloader``."""

import sys

from shmloader.cli import main

if __name__ == "__main__":
    sys.exit(main())
