"""How large the regions of a ring are made, from what is known before the first sample."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from shmloader.errors import RecordTooLargeError, RingError, RingTooSmallError
from shmloader.sizes import (
    DEFAULT_AHEAD,
    DEFAULT_IN_FLIGHT,
    LEAST_OPEN_RECORDS,
    LEAST_RECORDS,
    MOST_DEFAULT_SHARE,
    MOST_OPEN_RECORDS,
    PAGE,
    WINDOWS,
    Sizes,
    divide,
    divide_open,
    most_ahead,
    most_on_their_way,
    open_records,
)

MIB = 1 << 20
RECORD = 10_000


def regions(ring_bytes: int, **changes: Any) -> Sizes:
    """`divide` for 100,000 rows of `RECORD` bytes, in chunks of 1 MiB, with windows of 4 MiB."""
    known: dict[str, Any] = {
        "num_rows": 100_000,
        "most_record_bytes": RECORD,
        "chunk_bytes": [MIB] * 100,
        "in_flight": None,
        "ahead": None,
        "window_bytes": 4 * MIB,
    }
    return divide(ring_bytes, **(known | changes))


# ---- resident and transit ------------------------------------------------------------------------------


def test_where_all_fits_nothing_gives_way() -> None:
    sizes = regions(100_000 * RECORD)
    assert (sizes.resident_bytes, sizes.transit_bytes) == (100_000 * RECORD // PAGE * PAGE + PAGE, 0)


def test_where_one_sample_too_many_there_is_transit() -> None:
    assert regions(100 * PAGE, num_rows=100, most_record_bytes=PAGE).transit_bytes == 0
    assert regions(100 * PAGE, num_rows=101, most_record_bytes=PAGE).transit_bytes > 0


@pytest.mark.parametrize(("in_flight", "ahead"), [(1, 1), (64, 16), (2000, 100), (100, 2000)])
def test_transit_has_room_for_twice_what_is_in_flight_and_ahead(in_flight: int, ahead: int) -> None:
    sizes = regions(100 * MIB, in_flight=in_flight, ahead=ahead)
    assert 0 <= sizes.transit_bytes - 2 * (in_flight + ahead) * RECORD < PAGE
    assert sizes.resident_bytes == 100 * MIB - sizes.transit_bytes


def test_all_of_a_ring_may_be_transit() -> None:
    sizes = regions(2 * 100 * PAGE, most_record_bytes=PAGE, in_flight=60, ahead=40)
    assert (sizes.resident_bytes, sizes.transit_bytes) == (0, 2 * 100 * PAGE)


def test_by_default_a_large_ring_has_transit_for_the_defaults() -> None:
    sizes = regions(800 * MIB)
    assert 0 <= sizes.transit_bytes - 2 * (DEFAULT_IN_FLIGHT + DEFAULT_AHEAD) * RECORD < PAGE


def test_by_default_transit_is_a_quarter_of_a_small_ring_at_most() -> None:
    assert regions(20 * MIB).transit_bytes == 5 * MIB


def test_by_default_transit_of_a_tiny_ring_has_room_for_a_few_samples_twice() -> None:
    sizes = regions(MIB)
    assert 0 <= sizes.transit_bytes - 2 * LEAST_RECORDS * RECORD < PAGE
    assert sizes.resident_bytes > 0


def test_ahead_alone_leaves_the_defaults_shrinking() -> None:
    assert regions(20 * MIB, ahead=100_000).transit_bytes == 5 * MIB
    assert regions(800 * MIB, ahead=8).transit_bytes == pytest.approx(2 * (DEFAULT_IN_FLIGHT + 8) * RECORD, abs=PAGE)


def test_of_samples_of_unknown_size_a_quarter_is_transit() -> None:
    sizes = regions(20 * MIB, most_record_bytes=None)
    assert (sizes.resident_bytes, sizes.transit_bytes) == (15 * MIB, 5 * MIB)


def test_a_ring_of_one_page_is_all_transit_where_the_size_is_unknown() -> None:
    sizes = regions(PAGE, most_record_bytes=None)
    assert (sizes.resident_bytes, sizes.transit_bytes) == (0, PAGE)


# ---- what cannot be ------------------------------------------------------------------------------------


def test_more_in_flight_than_fits_is_an_error_with_all_figures() -> None:
    with pytest.raises(RingTooSmallError) as caught:
        regions(MIB, in_flight=64, ahead=16)
    needed = -(-2 * 80 * RECORD // PAGE) * PAGE
    text = str(caught.value)
    assert all(part in text for part in (f"{needed:,}", f"{MIB:,}", "80 samples", f"{RECORD:,} bytes", " 64", " 16"))
    assert all(f"SHMLOADER_{name}" in text for name in ("RING_BYTES=2MiB", "IN_FLIGHT", "AHEAD"))
    error = caught.value
    assert (error.needed_bytes, error.have_bytes, error.samples, error.record_bytes) == (needed, MIB, 80, RECORD)


def test_the_size_that_the_error_names_is_enough() -> None:
    with pytest.raises(RingTooSmallError) as caught:
        regions(MIB, in_flight=64, ahead=16)
    assert regions(caught.value.needed_bytes, in_flight=64, ahead=16).ring_bytes == caught.value.needed_bytes
    with pytest.raises(RingTooSmallError):
        regions(caught.value.needed_bytes - PAGE, in_flight=64, ahead=16)


def test_what_is_explicitly_in_flight_is_no_error_where_all_fits() -> None:
    assert regions(MIB, num_rows=100, in_flight=512, ahead=256).transit_bytes == 0


def test_a_ring_too_small_for_a_few_samples_twice_is_an_error() -> None:
    with pytest.raises(RingTooSmallError):
        regions(20 * RECORD)


def test_a_sample_larger_than_the_ring_is_an_error_with_both_sizes() -> None:
    with pytest.raises(RecordTooLargeError, match=r"2,000,000 bytes.*1,048,576.*SHMLOADER_RING_BYTES") as caught:
        regions(MIB, most_record_bytes=2_000_000)
    assert (caught.value.needed_bytes, caught.value.have_bytes) == (2_000_000, MIB)


def test_a_sample_as_large_as_the_ring_is_not_too_large_but_twice_does_not_fit() -> None:
    with pytest.raises(RingTooSmallError):
        regions(MIB, most_record_bytes=MIB, in_flight=1, ahead=1)


# ---- encoded chunks ------------------------------------------------------------------------------------


def test_two_windows_and_the_largest_chunk_are_kept_encoded() -> None:
    sizes = regions(MIB, chunk_bytes=[MIB] * 99 + [3 * MIB])
    assert sizes.raw_budget_bytes == WINDOWS * 4 * MIB + 3 * MIB


def test_a_chunk_larger_than_a_window_counts_as_one() -> None:
    sizes = regions(MIB, chunk_bytes=[MIB] * 99 + [30 * MIB])
    assert sizes.raw_budget_bytes == (WINDOWS + 1) * 30 * MIB


def test_no_more_is_kept_encoded_than_there_is() -> None:
    assert regions(MIB, chunk_bytes=[MIB] * 3).raw_budget_bytes == 3 * MIB
    assert regions(MIB, chunk_bytes=[]).raw_budget_bytes == 0


def test_addresses_are_reserved_for_much_more_than_what_is_kept_encoded() -> None:
    sizes = regions(MIB)
    assert sizes.raw_bytes >= 4 * sizes.raw_budget_bytes


# ---- whatever the arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_regions_add_up_to_the_ring_whatever_the_arguments(seed: int) -> None:
    rng = random.Random(seed)
    outcomes = set()
    for _ in range(500):
        known = {
            "num_rows": int(10 ** rng.uniform(0, 7)),
            "most_record_bytes": rng.choice([None, int(10 ** rng.uniform(2, 7))]),
            "chunk_bytes": [int(10 ** rng.uniform(0, 8)) for _ in range(rng.randrange(20))],
            "in_flight": rng.choice([None, int(10 ** rng.uniform(0, 4))]),
            "ahead": rng.choice([None, int(10 ** rng.uniform(0, 4))]),
            "window_bytes": int(10 ** rng.uniform(0, 9)),
        }
        ring_bytes = int(10 ** rng.uniform(3, 11))
        told = f"seed {seed}: {ring_bytes} {known}"
        try:
            sizes = divide(ring_bytes, **known)
        except RingError as error:
            assert error.needed_bytes > error.have_bytes >= ring_bytes, told  # noqa: PT017
            outcomes.add(type(error))
            continue
        outcomes.add(sizes.transit_bytes > 0)
        parts = (sizes.resident_bytes, sizes.transit_bytes, sizes.raw_bytes)
        assert all(part % PAGE == 0 and part >= 0 for part in parts), told
        assert 0 <= sizes.ring_bytes - ring_bytes < PAGE, told
        assert sizes.file_bytes == sum(parts), told
        assert sizes.raw_bytes >= sizes.raw_budget_bytes <= sum(known["chunk_bytes"]), told
        record_bytes, in_flight = known["most_record_bytes"], known["in_flight"]
        if record_bytes is not None and sizes.transit_bytes:
            least = 2 if in_flight is None else 2 * (in_flight + (known["ahead"] or DEFAULT_AHEAD))
            assert sizes.transit_bytes >= least * record_bytes, told
    assert outcomes == {True, False, RingTooSmallError, RecordTooLargeError}


# ---- open sets -----------------------------------------------------------------------------------------


def open_regions(ring_bytes: int, record_bytes: int | None = RECORD, in_flight: int | None = None) -> Sizes:
    return divide_open(ring_bytes, most_record_bytes=record_bytes, in_flight=in_flight, ahead=None)


def test_of_a_stream_nothing_stays_and_transit_is_no_larger_than_it_needs_to_be() -> None:
    sizes = open_regions(10_000 * MIB)
    assert sizes.resident_bytes == 0
    assert 0 <= sizes.transit_bytes - 2 * (DEFAULT_IN_FLIGHT + DEFAULT_AHEAD) * RECORD < PAGE


def test_of_a_stream_all_of_a_small_ring_is_transit() -> None:
    assert open_regions(4 * MIB).ring_bytes == 4 * MIB


def test_of_a_stream_whose_samples_sizes_are_not_known_transit_is_a_share_of_the_ring() -> None:
    assert open_regions(64 * MIB, None).transit_bytes == 64 * MIB * MOST_DEFAULT_SHARE


def test_a_stream_in_a_ring_that_cannot_hold_what_is_in_flight_is_an_error() -> None:
    with pytest.raises(RingTooSmallError):
        open_regions(4 * MIB, in_flight=1000)
    with pytest.raises(RecordTooLargeError):
        open_regions(PAGE)


def test_an_open_set_has_descriptors_for_small_samples_but_not_for_all_that_would_fit() -> None:
    assert open_records(PAGE) == LEAST_OPEN_RECORDS
    assert open_records(1 << 40) == MOST_OPEN_RECORDS
    assert open_records(LEAST_OPEN_RECORDS * 2048) == 2 * LEAST_OPEN_RECORDS


# ---- cache_size ----------------------------------------------------------------------------------------


def test_a_cache_size_sets_transit_aside_though_all_would_fit() -> None:
    all_fit = regions(1000 * RECORD, num_rows=100)
    assert (all_fit.transit_bytes, all_fit.most_resident) == (0, 0)
    limited = regions(1000 * RECORD, num_rows=100, cache_size=10)
    assert limited.transit_bytes > 0
    assert limited.most_resident == 10
    assert 0 <= limited.resident_bytes - 10 * RECORD < PAGE


@pytest.mark.parametrize("cache_size", [100, 101])
def test_a_cache_size_for_all_rows_is_none(cache_size: int) -> None:
    assert regions(1000 * RECORD, num_rows=100, cache_size=cache_size) == regions(1000 * RECORD, num_rows=100)


def test_of_samples_whose_size_is_not_known_only_the_number_is_limited() -> None:
    sizes = regions(64 * MIB, num_rows=100, most_record_bytes=None, cache_size=10)
    most_transit = 2 * (DEFAULT_IN_FLIGHT + DEFAULT_AHEAD)
    without = regions(64 * MIB, num_rows=100, most_record_bytes=None)
    assert sizes == replace(without, most_resident=10, most_transit=most_transit)


@pytest.mark.parametrize(("in_flight", "ahead", "most"), [(64, 16, 160), (1, 1, 2 * LEAST_RECORDS), (None, 8, 1040)])
def test_with_a_cache_size_only_what_is_on_its_way_is_there_besides(
    in_flight: int | None, ahead: int | None, most: int
) -> None:
    sizes = regions(1000 * MIB, num_rows=10**6, most_record_bytes=None, in_flight=in_flight, ahead=ahead, cache_size=10)
    assert sizes.most_transit == most_on_their_way(in_flight, ahead) == most
    assert regions(1000 * MIB, num_rows=10**6, most_record_bytes=None).most_transit == 0


def test_of_a_stream_a_cache_size_limits_what_is_made_ahead() -> None:
    sizes = divide_open(10_000 * MIB, most_record_bytes=RECORD, in_flight=None, ahead=None, cache_size=100)
    assert 0 <= sizes.transit_bytes - 2 * 100 * RECORD < PAGE
    assert sizes.most_transit == 200
    assert open_regions(10_000 * MIB).most_transit == 0
    assert [most_ahead(size) for size in (None, 1, LEAST_RECORDS, 100)] == [None, LEAST_RECORDS, LEAST_RECORDS, 100]
