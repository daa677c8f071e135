"""Due times of crontabs, including days when the clock changes.

A crontab whose hour is ``*`` follows real time: it runs in every hour that passes, and twice if the
hour is repeated. Any other crontab runs once at each of its times. A time that the clock repeats
counts at its first occurrence; a time that the clock skips counts at the moment of the change.

Celery compares wall clock times instead. When the clock changes, it runs a crontab an hour late or
skips a run (celery #6438, #10107; django-celery-beat #134, #194).
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

from celery.schedules import ParseException
from celery.schedules import crontab as parse_fields
from django_celery_beat.models import CrontabSchedule

DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)

#: How far ``get_next`` looks ahead: 29 February on one weekday can be forty years away.
HORIZON = 41 * 366 * DAY

#: The order of the fields, as in crontab(5).
FIELDS = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")


@dataclass(frozen=True)
class Crontab:
    """The five fields of a crontab as sets, and its time zone; 0 is Sunday.

    A day must match all three of days, months and weekdays.
    """

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    zone: ZoneInfo

    @classmethod
    def from_row(cls, row: CrontabSchedule) -> "Crontab":
        """Return the crontab of a row of django-celery-beat; raise ValueError if it is invalid."""
        return parse(*(getattr(row, name) for name in FIELDS), zone=str(row.timezone))

    @property
    def follows_real_time(self) -> bool:
        """Whether it runs in each hour that passes."""
        return len(self.hours) == 24

    def matches(self, day: date) -> bool:
        """Return whether it is due on a day."""
        return (
            day.day in self.days
            and day.month in self.months
            and day.isoweekday() % 7 in self.weekdays
        )

    def get_latest(self, since: datetime, now: datetime) -> datetime | None:
        """Return the last due time after ``since`` and until ``now``, or None."""
        day = now.astimezone(self.zone).date() + DAY
        first = since.astimezone(self.zone).date() - DAY
        while day >= first:
            times = get_times(self, day)
            if position := bisect_right(times, now):
                return times[position - 1] if times[position - 1] > since else None
            day -= DAY
        return None

    def get_next(self, after: datetime, until: datetime | None = None) -> datetime | None:
        """Return the first due time after ``after`` and until ``until``, or None."""
        until = until or after + HORIZON
        day = after.astimezone(self.zone).date() - DAY
        last = until.astimezone(self.zone).date() + DAY
        while day <= last:
            times = get_times(self, day)
            if (position := bisect_right(times, after)) < len(times):
                return times[position] if times[position] <= until else None
            day += DAY
        return None


@lru_cache(maxsize=1000)
def parse(*fields: str, zone: str = "UTC") -> Crontab:
    """Return the crontab of five fields; raise ValueError if it is invalid or never due."""
    if len(fields) != len(FIELDS):
        raise ValueError(f"expected five fields, got {len(fields)}")
    values: dict[str, Any] = dict(zip(FIELDS, fields, strict=True))
    try:
        parsed: Any = parse_fields(**values)
    except (ParseException, ZeroDivisionError) as error:
        raise ValueError(str(error)) from error
    return Crontab(
        frozenset(parsed.minute),
        frozenset(parsed.hour),
        frozenset(parsed.day_of_month),
        frozenset(parsed.month_of_year),
        frozenset(parsed.day_of_week),
        ZoneInfo(zone),
    )


@lru_cache(maxsize=2000)
def get_times(crontab: Crontab, day: date) -> list[datetime]:
    """Return all due times of a day in the crontab's time zone, in order, in UTC."""
    if not crontab.matches(day):
        return []
    times: set[datetime] = set()
    for hour in crontab.hours:
        for minute in crontab.minutes:
            local = datetime.combine(day, time(hour, minute), crontab.zone)
            times.update(_occurrences(local) if crontab.follows_real_time else [_first(local)])
    return sorted(times)


def _occurrences(local: datetime) -> Iterator[datetime]:
    """Yield the moments at which a wall clock shows this time: none, one or two."""
    for fold in (0, 1):
        moment = local.replace(fold=fold).astimezone(UTC)
        if moment.astimezone(local.tzinfo).replace(tzinfo=None) == local.replace(tzinfo=None):
            yield moment


def _first(local: datetime) -> datetime:
    """Return when a wall clock first shows this time, or skips it."""
    if (moment := next(_occurrences(local), None)) is not None:
        return moment
    # The change is between these moments: the skipped time with the offsets after and before it.
    before, after = (local.replace(fold=fold).astimezone(UTC) for fold in (1, 0))
    offset = after.astimezone(local.tzinfo).utcoffset()
    while after - before > MINUTE:
        middle = before + (after - before) // 2 // MINUTE * MINUTE
        if middle.astimezone(local.tzinfo).utcoffset() == offset:
            after = middle
        else:
            before = middle
    return after
