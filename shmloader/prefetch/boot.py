"""Entry of every service: ``python boot.py ROLE FDS PARENT``. Imports nothing of the package before `sys.path` is set.

FDS is the JSON object {name: descriptor} of what the process inherited, PARENT the pid of whoever started it.
"""

from __future__ import annotations

import contextlib
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
    with contextlib.suppress(OSError):  # relative names are those of the process that made the set
        os.chdir(head["cwd"])

    import faulthandler
    import importlib
    import logging

    from shmloader.prefetch import service_log

    faulthandler.enable()  # a decoder that crashes leaves its stack on stderr
    service_log.set_up(role, head["log"], fds.get("log"))
    if role != "supervisor":
        import shmloader._native as native

        if not native.die_with_parent(int(sys.argv[3])):
            return
    log = logging.getLogger(f"shmloader.{role}")
    log.debug("started by process %s", sys.argv[3])
    importlib.import_module(f"shmloader.prefetch.{role}").main(fds, head)
    log.debug("ended")


if __name__ == "__main__":
    main()
