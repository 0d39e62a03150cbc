"""When a set is given up: not for some rows that kill, but where prefetchers do nothing but die."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from conftest import opened, small_options
from support_sets import write_numbers

from shmloader.deaths import Death
from shmloader.errors import ServiceError
from shmloader.prefetch.futility import MAX_ASIDE, MAX_IDLE_DEATHS, Futility

cloudpickle.register_pickle_by_value(sys.modules[__name__])

BLAMELESS, OVER_A_ROW, OVER_A_CHUNK = Death(7, -9), Death(8, -11, row=3), Death(9, 1, chunk=2)


def stats(commits: int = 0, aside: int = 0, broken: int = 0) -> dict[str, int]:
    return {"num_commits": commits, "num_aside": aside, "chunks_broken": broken}


def test_prefetchers_that_die_of_nothing_in_particular_are_given_up_after_some_deaths() -> None:
    futility = Futility()
    assert [futility.count(stats(), [BLAMELESS]) for _ in range(MAX_IDLE_DEATHS)] == [None] * MAX_IDLE_DEATHS
    error = futility.count(stats(), [BLAMELESS])
    assert isinstance(error, ServiceError)
    assert "end at once, 8 times in a row: the last one, process 7 was killed by signal 9" in str(error)
    assert (error.role, error.data["pid"], error.data["status"]) == ("prefetcher", 7, -9)


@pytest.mark.parametrize("moved", [stats(commits=1), stats(aside=1), stats(broken=1)])
def test_whatever_is_made_or_set_aside_begins_the_count_anew(moved: dict[str, int]) -> None:
    futility = Futility()
    for _ in range(MAX_IDLE_DEATHS):
        futility.count(stats(), [BLAMELESS])
    told = [futility.count(moved, [BLAMELESS]) for _ in range(MAX_IDLE_DEATHS + 1)]
    assert [error is None for error in told] == [True] * MAX_IDLE_DEATHS + [False]


def test_chunks_that_cannot_be_read_ended_nobody() -> None:
    futility = Futility()
    assert futility.count(stats(), [BLAMELESS]) is None
    assert futility.count(stats(broken=MAX_ASIDE + 8), [BLAMELESS]) is None
    assert futility.count(stats(broken=MAX_ASIDE + 9), [OVER_A_CHUNK]) is None


def test_those_that_die_together_count_once() -> None:
    futility = Futility()
    assert [futility.count(stats(), [BLAMELESS] * 20) for _ in range(MAX_IDLE_DEATHS)] == [None] * MAX_IDLE_DEATHS


@pytest.mark.parametrize("death", [OVER_A_ROW, OVER_A_CHUNK])
def test_deaths_over_a_row_or_a_chunk_alone_are_bounded_by_its_own_rule(death: Death) -> None:
    futility = Futility()
    assert [futility.count(stats(), [death]) for _ in range(10 * MAX_IDLE_DEATHS)] == [None] * 10 * MAX_IDLE_DEATHS


@pytest.mark.parametrize(("kind", "death"), [("aside", OVER_A_ROW), ("broken", OVER_A_CHUNK)])
def test_a_set_of_which_nothing_but_rows_that_kill_is_left_is_given_up(kind: str, death: Death) -> None:
    futility = Futility()
    futility.count(stats(commits=5), [death])
    for num in range(MAX_ASIDE):
        assert futility.count(stats(commits=5, **{kind: num}), [death]) is None
    error = futility.count(stats(commits=5, **{kind: MAX_ASIDE}), [death])
    assert "32 rows or chunks in a row ended all prefetch processes that tried them" in str(error)


def test_rows_that_kill_among_others_are_never_too_many() -> None:
    futility = Futility()
    for num in range(10 * MAX_ASIDE):
        assert futility.count(stats(commits=num, aside=num), [OVER_A_ROW]) is None


DEADLY = range(35, 40)


def deadly(row: dict[str, Any]) -> dict[str, Any]:
    if row["number"] in DEADLY:
        os.kill(os.getpid(), 9)
    return {"number": row["number"]}


def test_five_rows_side_by_side_that_kill_are_set_aside_and_all_others_delivered(tmp_path: Path) -> None:
    """Which takes eleven deaths, ten of them without anything made in between."""
    path = write_numbers(tmp_path, 40)
    with opened(path, process=deadly, options=small_options(prefetchers=1)) as dataset:
        for row in range(40):
            if row in DEADLY:
                with pytest.raises(
                    ServiceError, match=rf"^row {row} of .* each of the 3 prefetch processes that tried"
                ):
                    dataset[row]
            else:
                assert int(dataset[row]["number"]) == row
        assert (dataset.stats().samples_ready, dataset.stats().samples_bad) == (35, 5)
