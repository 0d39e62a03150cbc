"""The parent's end of a variant's process (child.py): start it, ask it, end it; never wait for ever."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.checksum import Checksum
from bench.workload import Workload

_ROOT = Path(__file__).resolve().parent.parent
_ERROR_CHARS = 4_000


class VariantFailedError(Exception):
    """A variant's process died, or did not answer in time; with the end of what it wrote."""


class Session:
    """A variant in a fresh process. Not thread-safe; use it as a context manager."""

    def __init__(
        self, variant: str, workload: Workload, num_workers: int, reference: Checksum, timeout_s: float
    ) -> None:
        self.name = f"{variant} ({workload.name}, {num_workers} workers)"
        self._timeout_s = timeout_s
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        environ = os.environ | {
            "HF_HOME": str(workload.folder / "hf"),  # what `datasets` prepares goes with the data
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=_ROOT,
            env=environ,
            start_new_session=True,
        )
        self._unread = b""
        self._order = {
            "variant": variant,
            "workload": workload.name,
            "folder": str(workload.folder),
            "num_samples": workload.num_samples,
            "num_workers": num_workers,
            "reference": asdict(reference),
        }

    def open(self) -> dict[str, Any]:
        """Have the process open its loader."""
        return self.ask({"open": self._order})

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to one order.

        Raises:
            VariantFailedError: there is none.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("is gone") from None
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def close(self) -> None:
        """End the process and its workers, if they are still there."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(self._timeout_s):
                    os.killpg(self._process.pid, signal.SIGKILL)
                    raise self._failed(f"did not answer within {self._timeout_s:g} s and was killed")
                part = os.read(fd, 1 << 16)
                if not part:
                    raise self._failed("ended without an answer")
                self._unread += part
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _failed(self, what: str) -> VariantFailedError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)  # it may still be writing why
        self._log.seek(0)
        return VariantFailedError(f"The process of {self.name} {what}. It wrote:\n{self._log.read()[-_ERROR_CHARS:]}")
