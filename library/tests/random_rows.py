"""Schedules with a random value in every field, good ones among them.

    uv run python tests/random_rows.py ROWS SEED

prints them as lines of JSON for ``trials/rows.py``: the fields of a schedule, with those of its
crontab, interval, solar event and clock time.
"""

import contextlib
import json
import sys
import zoneinfo
from datetime import UTC, datetime

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

#: How many rows hypothesis makes at a time.
TOGETHER = 4


class Enough(Exception):
    """There are enough rows."""


#: The largest integer that PostgreSQL stores.
LARGEST = 2**31 - 1

PERIODS = ["days", "hours", "minutes", "seconds", "microseconds"]
EVENTS = ["dawn_civil", "sunrise", "solar_noon", "sunset", "dusk_astronomical"]
ZONES = sorted(name for name in zoneinfo.available_timezones() if "/" in name)

#: PostgreSQL stores neither NUL nor surrogates.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.text(characters, max_size=60)
moments = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29)).map(
    lambda moment: moment.replace(tzinfo=UTC).isoformat()
)
numbers = st.one_of(st.integers(0, 300), st.integers(0, LARGEST), st.just(LARGEST))
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | texts,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(characters, max_size=9), inner)
    ),
    max_leaves=8,
)
documents = st.one_of(
    st.sampled_from(["", "[]", "{}", "null", '"x"', "[1]", '{"a": 1}', "[" * 5000, "1" * 5000]),
    st.sampled_from(['{"a": NaN}', '{"id": 7}']),
    st.sampled_from(["datetime", "uuid", "decimal", "bytes", "x", 1]).map(
        lambda kind: json.dumps({"__type__": kind, "__value__": "x"})
    ),
    values.map(json.dumps),
    texts,
)


def make_crontab_field(low, high, length):
    """Return values of a field of a crontab: most of them can be used."""
    number = st.integers(low, high)
    return st.one_of(
        st.just("*"),
        number.map(str),
        number.map(lambda step: f"*/{step}"),
        st.tuples(number, number).map(lambda pair: f"{min(pair)}-{max(pair)}"),
        st.lists(number, min_size=1, max_size=5).map(lambda each: ",".join(map(str, each))),
        st.text(st.sampled_from("0123456789*/-,L# "), max_size=length),
        st.text(characters, max_size=length),
    )


crontabs = st.fixed_dictionaries(
    {
        "minute": make_crontab_field(0, 60, 240),
        "hour": make_crontab_field(0, 24, 96),
        "day_of_month": make_crontab_field(0, 32, 124),
        "month_of_year": make_crontab_field(0, 13, 64),
        "day_of_week": make_crontab_field(0, 8, 64),
        "timezone": st.sampled_from(ZONES),
    }
)
intervals = st.fixed_dictionaries(
    {
        "every": st.one_of(st.integers(-2, 300), st.sampled_from([LARGEST, -LARGEST])),
        "period": st.sampled_from([*PERIODS, "", "years"]),
    }
)
solar_events = st.fixed_dictionaries(
    {
        "event": st.sampled_from([*EVENTS, "", "noon"]),
        "latitude": st.integers(-999, 999),
        "longitude": st.integers(-999, 999),
    }
)
clocked = st.fixed_dictionaries({"clocked_time": moments})


def make_odd_rows(task):
    """Return schedules whose fields have any value that the database stores."""
    queues = st.one_of(st.none(), st.sampled_from(["", "nowhere", "x" * 200]), texts)
    rows = st.fixed_dictionaries(
        {
            "name": texts.map(lambda text: f"any {text}"[:180]),
            "task": st.one_of(st.just(task), st.sampled_from(["", "no.such.task"]), texts),
            "args": documents,
            "kwargs": documents,
            "headers": documents,
            "queue": queues,
            "exchange": queues,
            "routing_key": queues,
            "priority": st.none() | numbers,
            "expires": st.none() | moments,
            "expire_seconds": st.none() | numbers,
            "one_off": st.booleans(),
            "start_time": st.none() | moments,
            "last_run_at": st.none() | moments,
            "total_run_count": numbers,
            "date_changed": moments,
            "description": texts,
        }
    )
    kinds = {
        "crontab": crontabs,
        "interval": intervals,
        "solar": solar_events,
        "clocked": clocked,
    }
    # One kind, none, or all of them
    timings = [st.fixed_dictionaries({kind: strategy}) for kind, strategy in kinds.items()]
    timings += [timings[0], timings[1], st.just({}), st.fixed_dictionaries(kinds)]
    return st.tuples(rows, st.one_of(timings)).map(lambda parts: parts[0] | parts[1])


def make_rows(count, number, task, args="[]"):
    """Return schedules, the same for the same number; a third of them are good."""
    rows = []

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(make_odd_rows(task), min_size=TOGETHER, max_size=TOGETHER))
    def collect(batch):
        rows.extend(batch)
        if len(rows) >= count:
            raise Enough

    with contextlib.suppress(Enough):
        collect()
    for position in range(0, count, 3):
        rows[position] = {"name": "good", "task": task, "args": args, "crontab": {"minute": "*"}}
    return [row | {"name": f"{row['name']} {number}"} for number, row in enumerate(rows[:count])]


if __name__ == "__main__":
    count, number, task, args = sys.argv[1:]
    for row in make_rows(int(count), int(number), task, args):
        print(json.dumps(row))
