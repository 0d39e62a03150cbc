"""The supervisor: plans once, keeps the prefetchers running, reaps the dead, and ends with the last owner.

It holds no state that its successor could not find again: what is to be done lies in the control memory, what to do
it with in the payload and the plan. Its death takes its prefetchers along (they asked the kernel for it), and a
client that waits starts another (launch.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import subprocess
from typing import Any

import shmloader._native as native
from shmloader.deaths import Death, Deaths, OomKills, how_it_ended
from shmloader.errors import ServiceError, to_wire
from shmloader.files import CREATOR_BYTE, SUPERVISOR_BYTE, RingFiles, format_set
from shmloader.options import size_text
from shmloader.prefetch.futility import Futility
from shmloader.prefetch.plan_file import Layout, read_parts
from shmloader.prefetch.spawn import spawn
from shmloader.ring import Ring
from shmloader.sizes import divide, divide_open, open_records
from shmloader.writer import Writer

log = logging.getLogger("shmloader.supervisor")

#: How often it looks for owners that died. Services are to be gone within 2 s of the last.
TICK_S = 0.25


class Prefetcher:
    """One prefetch process: waits for `go`, then works until there is nothing left to do."""

    def __init__(self, fds: dict[str, int]) -> None:
        reader, self._go = os.pipe()
        try:
            self.process = spawn("prefetcher", {**fds, "go": reader})
        except OSError:
            os.close(self._go)
            raise
        finally:
            os.close(reader)
        self.pidfd = os.pidfd_open(self.process.pid)

    def go(self, supervisor: tuple[int, int]) -> None:
        """The ring can be attached; ``supervisor`` is (slot, generation) of this process's client."""
        with contextlib.suppress(BrokenPipeError):  # it died: the main loop sees that
            os.write(self._go, json.dumps({"supervisor": supervisor}).encode())
        self._close_go()

    def _close_go(self) -> None:
        if self._go >= 0:
            os.close(self._go)
            self._go = -1

    def close(self) -> None:
        """Reap the process, which has ended or is killed, and kill what it started in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._close_go()
        os.close(self.pidfd)


class Supervisor:
    """The main loop and what it keeps."""

    def __init__(self, fds: dict[str, int], head: dict[str, Any]) -> None:
        self.fds = {name: fd for name, fd in fds.items() if name not in ("status", "up")}
        self.status_fd: int | None = fds.get("status")
        self.head = head
        self.files = RingFiles.inherited(head["uuid"], fds)
        self.deaths, self.oom_kills = Deaths(self.files.deaths_fd), OomKills()
        self.num_prefetchers: int = head["num_prefetchers"]
        self.prefetchers: list[Prefetcher] = []
        self.futility = Futility()

    def run(self) -> None:
        """Plan if nobody has, then supervise until no owner is left."""
        try:
            if self.status_fd is not None:
                # They load what they need while the planner is at work.
                self.prefetchers = [Prefetcher(self.fds) for _ in range(self.num_prefetchers)]
                if not self._plan():
                    return
            self._supervise(Ring(self.files, native.SERVICE))
        except Exception as error:
            if self.status_fd is None:
                raise
            log.debug("cannot start", exc_info=True)
            self._answer({"error": to_wire(error)})
        finally:
            for prefetcher in self.prefetchers:
                prefetcher.close()

    # -- start -----------------------------------------------------------------------------------------

    def _plan(self) -> bool:
        """Run the planner and lay out the control memory; False when nobody waits for that any more.

        Raises:
            ShmloaderError: there is no plan.
        """
        planner = spawn("planner", self.fds)
        try:
            self._wait_for(planner)
            if planner.returncode is None:
                log.debug("the training process is gone")
                return False
            parts = read_parts(self.fds["plan"])
            if parts is None:
                raise ServiceError(
                    "The process that looks up the dataset died: it "
                    f"{how_it_ended(planner.returncode, is_oom_kill=self.oom_kills.rose())} (exit status "
                    f"{planner.returncode}). What it logged, or wrote to stderr, may say why.",
                    role="planner",
                    pid=planner.pid,
                    status=planner.returncode,
                )
            self._format(parts[0])
        finally:
            planner.kill()
            planner.wait()
        return True

    def _wait_for(self, planner: subprocess.Popen[bytes]) -> None:
        """Until it ends, or the process that waits for our answer does."""
        assert self.status_fd is not None
        pidfd = os.pidfd_open(planner.pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self.status_fd, 0)  # POLLERR: the reading end is closed
        ready = dict(poll.poll())
        os.close(pidfd)
        if self.status_fd not in ready:
            planner.wait()

    def _format(self, layout: Layout) -> None:
        if layout.rows_per_chunk:
            sizes = divide_open(
                self.head["ring_bytes"],
                most_record_bytes=layout.most_record_bytes,
                in_flight=self.head["in_flight"],
                ahead=self.head["ahead"],
                cache_size=self.head["cache_size"],
            )
            num_records = open_records(sizes.transit_bytes)
            format_set(
                self.files, sizes, num_records, [], [], layout.record_bytes, rows_per_chunk=layout.rows_per_chunk
            )
            return
        sizes = divide(
            self.head["ring_bytes"],
            num_rows=layout.num_rows,
            most_record_bytes=layout.most_record_bytes,
            chunk_bytes=layout.chunk_bytes,
            in_flight=self.head["in_flight"],
            ahead=self.head["ahead"],
            window_bytes=layout.window_bytes,
            cache_size=self.head["cache_size"],
        )
        # Where all samples stay, nothing is fetched twice.
        spill_bytes = self.head["spill_bytes"] if sizes.transit_bytes else 0
        if spill_bytes:
            log.info("encoded chunks are kept on disk: up to %s, in %s", size_text(spill_bytes), self.head["spill_dir"])
        elif sizes.transit_bytes:
            log.info("encoded chunks are not kept on disk: %s", self.head["why_no_spill"])
        told = (layout.num_rows, layout.chunks, layout.units, layout.record_bytes, spill_bytes)
        format_set(self.files, sizes, *told)

    def _answer(self, answer: dict[str, Any]) -> None:
        assert self.status_fd is not None
        with contextlib.suppress(BrokenPipeError):  # the training process is gone, or was interrupted
            os.write(self.status_fd, json.dumps(answer).encode() + b"\n")
        os.close(self.status_fd)
        self.status_fd = None

    # -- main loop -------------------------------------------------------------------------------------

    def _supervise(self, ring: Ring) -> None:
        segment = ring.segment
        for prefetcher in self.prefetchers:
            prefetcher.go((ring.slot, ring.gen))
        log.debug("the set is open: client %d, %d prefetchers", ring.slot, len(self.prefetchers))
        if self.status_fd is not None:
            self._answer({})
        segment.reap(True)
        # Until the process that made the set is its first owner, the creator's byte says that it lives.
        while segment.count(native.OWNER) or native.byte_holder(self.files.lock_fd, CREATOR_BYTE):
            self._start_missing(ring)
            self._wait_for_deaths(ring)
            segment.reap(False)
        log.debug("the last owner is gone")

    def _wait_for_deaths(self, ring: Ring) -> None:
        poll = select.poll()
        for prefetcher in self.prefetchers:
            poll.register(prefetcher.pidfd, select.POLLIN)
        ended = {fd for fd, _ in poll.poll(TICK_S * 1000)}
        if ended:
            self._bury(ring, [p for p in self.prefetchers if p.pidfd in ended])

    def _bury(self, ring: Ring, dead: list[Prefetcher]) -> None:
        told, is_oom_kill = [], self.oom_kills.rose()
        for prefetcher in dead:
            self.prefetchers.remove(prefetcher)
            prefetcher.close()
            process = prefetcher.process
            # Before its row can be set aside: who reads that wants to know why.
            told.append(self.deaths.bury(process.pid, process.returncode, is_oom_kill and process.returncode < 0))
        num_aside = ring.segment.stats()["num_aside"]
        ring.segment.reap(True)
        if not self._has_work(ring):  # they found nothing left to do
            return
        for death in told:
            log.warning("prefetcher: %s, with work to do%s", death, _over(death))
        if (num := ring.segment.stats()["num_aside"] - num_aside) > 0:
            log.error("%d rows that ended each process that decoded them are set aside: who reads one is told", num)
        if (error := self.futility.count(ring.segment.stats(), told)) is not None:
            Writer(ring).put_fatal(error)

    def _start_missing(self, ring: Ring) -> None:
        while len(self.prefetchers) < self.num_prefetchers and self._has_work(ring):
            try:
                prefetcher = Prefetcher(self.fds)
            except OSError as error:  # no memory or no more processes: those that run go on, and the next tick tries
                log.warning("cannot start a prefetcher: %s", error)
                return
            self.prefetchers.append(prefetcher)
            prefetcher.go((ring.slot, ring.gen))
            log.debug("prefetcher %d takes the place of one that ended", prefetcher.process.pid)

    @staticmethod
    def _has_work(ring: Ring) -> bool:
        stats = ring.segment.stats()
        has_chunks = stats["chunks_todo"] + stats["chunks_claimed"] > 0
        return has_chunks and ring.segment.text_get(native.TEXT_FATAL) is None


def _over(death: Death) -> str:
    at = [f"decoded row {death.row}"] if death.row is not None else []
    at += [f"fetched chunk {death.chunk}"] if death.chunk is not None else []
    return f", while it {' and '.join(at)}" if at else ""


def main(fds: dict[str, int], head: dict[str, Any]) -> None:
    """Be the supervisor of a set, unless there is one."""
    try:
        fcntl.lockf(fds["lock"], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, SUPERVISOR_BYTE)
    except (BlockingIOError, PermissionError):
        log.debug("there is a supervisor already")
        return
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if "up" in fds:
        with contextlib.suppress(BrokenPipeError):
            os.write(fds["up"], b"1")
        os.close(fds["up"])
    Supervisor(fds, head).run()
