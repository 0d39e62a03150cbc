"""Entry of every service: ``python boot.py ROLE FDS``. Imports nothing of the package before `sys.path` is set.

FDS is the JSON object {name: descriptor} of what the process inherited.
"""

from __future__ import annotations

import json
import os
import signal
import sys


def main() -> None:
    """Become the service that ``argv`` names."""
    role, fds = sys.argv[1], json.loads(sys.argv[2])
    if role == "supervisor":
        # Our parent is a client of the set, perhaps a DataLoader worker: it must neither have to wait for this
        # process nor take it along. Nothing has been imported yet, so this fork is of one thread.
        if os.fork():
            os._exit(0)
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    size = int.from_bytes(os.pread(fds["payload"], 8, 0), "little")
    head = json.loads(os.pread(fds["payload"], size, 8))
    sys.path[:] = head["sys_path"]

    import logging

    logging.basicConfig(
        level=head["log"],
        format=f"%(asctime)s shmloader {role} %(process)d %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    import importlib

    importlib.import_module(f"shmloader.prefetch.{role}").main(fds, head)


if __name__ == "__main__":
    main()
