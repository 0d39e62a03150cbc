"""Settings: what each may be, who wins, and that each does what it says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support_sets import Gate, gated, number, prefetchers_of, run_script, wait_until, write_numbers, write_pictures

from shmloader import MultimodalConfig, Options, ShmMultimodalDataset
from shmloader.errors import OptionError, WaitTimeoutError
from shmloader.options import (
    DEFAULT_SOURCE_TIMEOUT_S,
    DEFAULT_SPILL,
    DEFAULT_TIMEOUT_S,
    DEFAULT_WINDOW,
    MAX_DEFAULT_PREFETCHERS,
    ByteSize,
    parse_size,
    size_text,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (4096, 4096),
        ("1073741824", 1 << 30),
        ("512MiB", 512 << 20),
        (" 2 GB ", 2 * 10**9),
        ("1.5kib", 1536),
        ("7b", 7),
        ("3TiB", 3 << 40),
    ],
)
def test_a_size_is_bytes_or_a_number_with_a_unit(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == ByteSize(num_bytes=num_bytes)


@pytest.mark.parametrize(("text", "share"), [("25%", 0.25), ("100 %", 1.0), ("0.5%", 0.005)])
def test_a_size_may_be_a_share_of_memory(text: str, share: float) -> None:
    assert parse_size(text).resolve(1 << 20) == int(share * (1 << 20))


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (3 << 19, "1.5 MiB"),
        (20 << 30, "20.0 GiB"),
        (64 << 40, "64.0 TiB"),
        (5000 << 40, "5,000.0 TiB"),
    ],
)
def test_a_size_is_told_in_a_unit_that_fits(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


@pytest.mark.parametrize(
    "text", ["", "much", "0", "-1", -5, "0%", "101%", "5 apples", "1e9", "MiB", "0.1", "1,5GB", "nan", True, 1.5]
)
def test_a_bad_size_is_an_error_with_name_value_and_what_is_allowed(text: Any) -> None:
    with pytest.raises(OptionError) as caught:
        parse_size(text, "SOME_NAME")
    assert all(part in str(caught.value) for part in ("SOME_NAME", repr(text), '"512MiB"', '"25%"'))
    assert (caught.value.name, caught.value.value) == ("SOME_NAME", str(text))


def test_an_empty_environment_gives_the_defaults() -> None:
    defaults = Options(
        ring_bytes=None,
        in_flight=None,
        ahead=None,
        window_bytes=DEFAULT_WINDOW,
        spill_bytes=None,
        spill_dir=None,
        batch_bytes=None,
        verify=False,
        prefetchers=None,
        timeout_s=DEFAULT_TIMEOUT_S,
        source_timeout_s=DEFAULT_SOURCE_TIMEOUT_S,
        log="WARNING",
    )
    assert Options.from_env({}) == Options() == defaults


def test_the_default_of_what_is_spilled_is_a_share_of_the_disk() -> None:
    assert Options().spill_size() == parse_size(DEFAULT_SPILL) == ByteSize(share=0.1)


def test_the_default_window_is_an_amount_of_bytes() -> None:
    assert parse_size(DEFAULT_WINDOW).num_bytes is not None


def test_empty_variables_count_as_unset() -> None:
    assert Options.from_env({f"SHMLOADER_{option.name.upper()}": "" for option in fields(Options)}) == Options()


def test_every_variable_is_read() -> None:
    env = {
        "SHMLOADER_RING_BYTES": "512MiB",
        "SHMLOADER_IN_FLIGHT": "640",
        "SHMLOADER_AHEAD": "50",
        "SHMLOADER_WINDOW_BYTES": "64MiB",
        "SHMLOADER_SPILL_BYTES": "5%",
        "SHMLOADER_SPILL_DIR": "/scratch",
        "SHMLOADER_BATCH_BYTES": "2GiB",
        "SHMLOADER_VERIFY": "1",
        "SHMLOADER_PREFETCHERS": "3",
        "SHMLOADER_TIMEOUT_S": "1.5",
        "SHMLOADER_SOURCE_TIMEOUT_S": "2.5",
        "SHMLOADER_LOG": "debug",
    }
    assert vars(Options.from_env(env)) == {
        "ring_bytes": "512MiB",
        "in_flight": 640,
        "ahead": 50,
        "window_bytes": "64MiB",
        "spill_bytes": "5%",
        "spill_dir": "/scratch",
        "batch_bytes": "2GiB",
        "verify": True,
        "prefetchers": 3,
        "timeout_s": 1.5,
        "source_timeout_s": 2.5,
        "log": "DEBUG",
    }


@pytest.mark.parametrize("name", [option.name for option in fields(Options)])
def test_every_option_has_a_variable_of_its_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    values = {"log": "INFO", "spill_dir": "/scratch", "timeout_s": "7.5", "prefetchers": "7", "verify": "True"}
    values["source_timeout_s"] = "7.5"
    monkeypatch.setenv(f"SHMLOADER_{name.upper()}", value := values.get(name, "4096"))
    assert str(getattr(Options(), name)) == str(getattr(Options.from_env(), name)) == value


@pytest.mark.parametrize(
    ("text", "truth"), [("1", True), ("true", True), (" YES ", True), ("On", True), ("0", False), ("off", False)]
)
def test_what_is_on_or_off_can_be_said_in_many_ways(text: str, truth: bool) -> None:
    assert Options.from_env({"SHMLOADER_VERIFY": text}).verify is truth


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("SHMLOADER_RING_BYTES", "lots", "512MiB"),
        ("SHMLOADER_RING_BYTES", "0", "512MiB"),
        ("SHMLOADER_RING_BYTES", "200%", "25%"),
        ("SHMLOADER_IN_FLIGHT", "0", "from 1 up"),
        ("SHMLOADER_IN_FLIGHT", "8.5", "from 1 up"),
        ("SHMLOADER_AHEAD", "-1", "from 1 up"),
        ("SHMLOADER_AHEAD", "1GB", "from 1 up"),
        ("SHMLOADER_WINDOW_BYTES", "wide", "512MiB"),
        ("SHMLOADER_WINDOW_BYTES", "0", "512MiB"),
        ("SHMLOADER_SPILL_BYTES", "-1", "25%"),
        ("SHMLOADER_SPILL_BYTES", "101%", "25%"),
        ("SHMLOADER_BATCH_BYTES", "0", "512MiB"),
        ("SHMLOADER_BATCH_BYTES", "some", "25%"),
        ("SHMLOADER_VERIFY", "2", "true"),
        ("SHMLOADER_VERIFY", "perhaps", "off"),
        ("SHMLOADER_PREFETCHERS", "0", "from 1 to 64"),
        ("SHMLOADER_PREFETCHERS", "65", "from 1 to 64"),
        ("SHMLOADER_PREFETCHERS", "2.5", "from 1 to 64"),
        ("SHMLOADER_PREFETCHERS", "all", "from 1 to 64"),
        ("SHMLOADER_TIMEOUT_S", "0", "from 0.001"),
        ("SHMLOADER_TIMEOUT_S", "-3", "from 0.001"),
        ("SHMLOADER_TIMEOUT_S", "inf", "from 0.001"),
        ("SHMLOADER_TIMEOUT_S", "nan", "from 0.001"),
        ("SHMLOADER_TIMEOUT_S", "1m", "from 0.001"),
        ("SHMLOADER_LOG", "loud", "DEBUG, INFO, WARNING, ERROR"),
    ],
)
def test_a_bad_variable_is_an_error_with_name_value_and_what_is_allowed(name: str, value: str, allowed: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options.from_env({name: value})
    assert all(part in str(caught.value) for part in (name, repr(value), allowed))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ring_bytes", "lots"),
        ("ring_bytes", 0),
        ("ring_bytes", True),
        ("in_flight", 0),
        ("in_flight", 1.5),
        ("in_flight", "8"),
        ("in_flight", True),
        ("ahead", -1),
        ("ahead", (1 << 30) + 1),
        ("ahead", "8"),
        ("window_bytes", 0),
        ("window_bytes", None),
        ("window_bytes", "wide"),
        ("spill_bytes", "much"),
        ("spill_bytes", "-1"),
        ("spill_dir", ""),
        ("spill_dir", 7),
        ("batch_bytes", 0),
        ("batch_bytes", "many"),
        ("verify", 1),
        ("verify", "yes"),
        ("verify", None),
        ("prefetchers", 0),
        ("prefetchers", 65),
        ("prefetchers", 2.5),
        ("prefetchers", "2"),
        ("prefetchers", True),
        ("timeout_s", 0),
        ("timeout_s", float("inf")),
        ("timeout_s", float("nan")),
        ("timeout_s", "1"),
        ("timeout_s", None),
        ("log", "debug"),
        ("log", None),
    ],
)
def test_a_bad_argument_is_an_error_with_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        Options(**{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("share", ["10%", "100%"])
def test_a_window_that_is_a_share_of_memory_is_an_error_that_says_why(
    share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=r"^window_bytes='\d+%'.*not a share of memory: the order would differ"):
        Options(window_bytes=share)
    monkeypatch.setenv("SHMLOADER_WINDOW_BYTES", share)
    for make in (Options, Options.from_env):
        with pytest.raises(OptionError, match=r"^SHMLOADER_WINDOW_BYTES='\d+%'.*not a share of memory"):
            make()


@pytest.mark.parametrize("size", [0, "0", "1GiB", "50%"])
def test_what_is_spilled_may_be_nothing_or_a_share(size: Any) -> None:
    assert Options(spill_bytes=size).spill_bytes == size


def test_by_default_there_is_a_prefetcher_for_each_core_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (3, 3), (64, MAX_DEFAULT_PREFETCHERS)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert Options().num_prefetchers() == expected


def test_ring_bytes_of_the_environment_size_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMLOADER_RING_BYTES", "3MiB")
    monkeypatch.setenv("SHMLOADER_PREFETCHERS", "1")
    with ShmMultimodalDataset(dataset_name=write_numbers(tmp_path / "d", 8), process=number) as dataset:
        assert dataset.stats().ring_bytes == 3 << 20
        assert int(dataset[7]["number"]) == 7
        assert dataset.stats().ring_backed_bytes <= 3 << 20


def test_an_explicit_argument_beats_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMLOADER_RING_BYTES", "3MiB")
    monkeypatch.setenv("SHMLOADER_PREFETCHERS", "2")
    options = Options(ring_bytes="5MiB", prefetchers=1)
    name = write_numbers(tmp_path / "d", 64)
    with ShmMultimodalDataset(dataset_name=name, process=gated(Gate(tmp_path / "gate"), 8), options=options) as dataset:
        wait_until(lambda: prefetchers_of(dataset))
        assert dataset.stats().ring_bytes == 5 << 20
        assert dataset.stats().prefetchers == 1


def test_a_bad_variable_is_an_error_of_the_constructor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMLOADER_PREFETCHERS", "none")
    with pytest.raises(OptionError, match="SHMLOADER_PREFETCHERS='none'"):
        ShmMultimodalDataset(dataset_name=write_numbers(tmp_path / "d", 8))


def test_as_many_prefetchers_start_as_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMLOADER_RING_BYTES", "1MiB")
    monkeypatch.setenv("SHMLOADER_PREFETCHERS", "3")
    name = write_numbers(tmp_path / "d", 128)
    with ShmMultimodalDataset(dataset_name=name, process=gated(Gate(tmp_path / "gate"), 0)) as dataset:
        wait_until(lambda: dataset.stats().prefetchers == 3)
        wait_until(lambda: len(prefetchers_of(dataset)) == 3)


def test_a_reader_waits_as_long_as_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMLOADER_RING_BYTES", "1MiB")
    monkeypatch.setenv("SHMLOADER_PREFETCHERS", "1")
    monkeypatch.setenv("SHMLOADER_TIMEOUT_S", "1.25")
    name, gate = write_numbers(tmp_path / "d", 16), Gate(tmp_path / "gate")
    with ShmMultimodalDataset(dataset_name=name, process=gated(gate, 8)) as dataset:
        with pytest.raises(WaitTimeoutError, match=r"row 9 of .*shard .*SHMLOADER_TIMEOUT_S") as caught:
            dataset[9]
        assert caught.value.waited_s >= 1.25
        gate.open()
        assert int(dataset[9]["number"]) == 9


SCRIPT = """
import sys
from shmloader import ShmMultimodalDataset
with ShmMultimodalDataset(dataset_name=sys.argv[1], process=lambda row: {"number": row["number"]}) as dataset:
    dataset[0]
"""


@pytest.mark.parametrize(("level", "is_shown"), [("DEBUG", True), ("ERROR", False)])
def test_services_log_to_stderr_from_the_level_of_the_environment(tmp_path: Path, level: str, is_shown: bool) -> None:
    name = write_numbers(tmp_path / "d", 16)
    env = {"SHMLOADER_LOG": level, "SHMLOADER_RING_BYTES": "1MiB", "SHMLOADER_PREFETCHERS": "1"}
    status, out, err = run_script(tmp_path, SCRIPT, name, env=env)
    assert (status, out) == (0, "")
    assert ("DEBUG shmloader." in err) == is_shown


def test_an_option_that_is_not_given_is_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMLOADER_RING_BYTES", "8MiB")
    monkeypatch.setenv("SHMLOADER_TIMEOUT_S", "7")
    options = Options(prefetchers=3)
    assert (options.ring_bytes, options.timeout_s, options.prefetchers) == ("8MiB", 7.0, 3)
    assert Options(ring_bytes=None).ring_bytes is None


def test_in_flight_and_ahead_of_the_environment_size_transit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMLOADER_IN_FLIGHT", "24")
    monkeypatch.setenv("SHMLOADER_AHEAD", "8")
    name = write_pictures(tmp_path / "d", 256)
    options, config = Options(ring_bytes="128KiB", prefetchers=1), MultimodalConfig(vision_dim=16)
    with ShmMultimodalDataset(config, dataset_name=name, options=options) as dataset:
        record_bytes = dataset._reader.plan.schema.most_record_bytes()
        assert 0 <= dataset.stats().transit_bytes - 2 * 32 * record_bytes < 4096


def test_an_explicit_window_beats_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMLOADER_WINDOW_BYTES", "2MiB")
    name = write_numbers(tmp_path / "d", 8)
    for changes, window_bytes in (({}, 2 << 20), ({"window_bytes": "3KiB"}, 3 << 10)):
        options = Options(ring_bytes="1MiB", prefetchers=1, **changes)
        with ShmMultimodalDataset(dataset_name=name, process=number, options=options) as dataset:
            assert dataset._reader.plan.window_bytes == window_bytes
