"""What is kept of prefetchers that died."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmloader.deaths as deaths_module
from shmloader.deaths import Death, Deaths, OomKills, how_it_ended, killed_by_chunk, killed_by_row


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Iterator[Deaths]:
    monkeypatch.setattr(deaths_module, "PATIENCE_S", 0.0)
    fd = os.memfd_create("deaths")
    yield Deaths(fd)
    os.close(fd)


def test_nothing_is_known_of_who_did_not_die(deaths: Deaths) -> None:
    assert deaths.of_row(0) == deaths.of_chunk(0) == []
    assert "of what is not known" in str(killed_by_row(deaths, 0, str))


def test_a_death_is_found_by_the_row_and_the_chunk_that_it_was_at(deaths: Deaths) -> None:
    deaths.begin(200)
    deaths.note_row(200, 0)
    deaths.note_chunk(200, 7)
    death = deaths.bury(os.getpid(), -9, False)
    assert death == Death(os.getpid(), -9, row=0, chunk=7)
    assert deaths.of_row(0) == deaths.of_chunk(7) == [death]
    assert deaths.of_row(1) == deaths.of_chunk(0) == []


def test_what_was_finished_is_not_blamed(deaths: Deaths) -> None:
    deaths.begin(3)
    deaths.note_row(3, 5)
    deaths.note_row(3, None)
    deaths.note_chunk(3, 5)
    deaths.note_chunk(3, None)
    assert deaths.bury(os.getpid(), 1, False) == Death(os.getpid(), 1)


def test_one_that_died_before_it_noted_anything_is_buried(deaths: Deaths) -> None:
    assert deaths.bury(12345, 1, False) == Death(12345, 1)


def test_the_last_deaths_are_kept(deaths: Deaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deaths_module, "MOST", 4)
    deaths.begin(0)
    for row in range(10):
        deaths.note_row(0, row)
        deaths.bury(os.getpid(), row, False)
    assert [bool(deaths.of_row(row)) for row in range(10)] == [False] * 6 + [True] * 4
    assert [death.status for death in deaths._where(lambda death: True)] == [6, 7, 8, 9]


def test_want_of_memory_has_a_remedy_of_its_own(deaths: Deaths) -> None:
    deaths.begin(0)
    deaths.note_row(0, 3)
    deaths.note_chunk(0, 4)
    deaths.bury(os.getpid(), -9, True)
    row, chunk = killed_by_row(deaths, 3, str), killed_by_chunk(deaths, 3, 4, str)
    assert "OOM killer, probably" in str(row)
    assert "SHMLOADER_PREFETCHERS" in str(row)
    assert "smaller row groups" in str(chunk)
    assert (row.row, chunk.chunk, len(row.deaths)) == (3, 4, 1)


@pytest.mark.parametrize(
    ("status", "told"),
    [(5, "ended with exit status 5"), (-11, "signal 11 (SIGSEGV)"), (-9, "(SIGKILL)"), (-63, "signal 63 (unknown)")],
)
def test_an_end_in_words(status: int, told: str) -> None:
    assert told in how_it_ended(status)


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/job\n", "sys/fs/cgroup/job/memory.events"),
        ("4:cpu:/\n3:hugetlb,memory:/job\n0::/\n", "sys/fs/cgroup/memory/job/memory.oom_control"),
        ("", "proc/vmstat"),
    ],
)
def test_kills_for_want_of_memory_are_noticed_once(tmp_path: Path, groups: str, file: str) -> None:
    for name in ("proc/self", str(Path(file).parent)):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    (tmp_path / file).write_text("low 0\noom_kill 2\noom_kill_disable 0\n")
    kills = OomKills(str(tmp_path))
    assert not kills.rose()
    (tmp_path / file).write_text("low 0\noom_kill 3\noom_kill_disable 0\n")
    assert kills.rose()
    assert not kills.rose()


def test_where_the_kernel_tells_nothing_nothing_is_said(tmp_path: Path) -> None:
    assert not OomKills(str(tmp_path)).rose()
