"""Due times of crontabs, including days when the clock changes."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from django_celery_beat.models import CrontabSchedule

from prodserver_ops.scheduling import crontabs
from prodserver_ops.scheduling.crontabs import Crontab

DAY = timedelta(days=1)
FIELDS = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")


@pytest.fixture(autouse=True)
def _empty_caches():
    """Compute each time anew: mutmut changes the module after the tests have run once."""
    crontabs.parse.cache_clear()
    crontabs.get_times.cache_clear()


def make(text, zone="UTC"):
    """Return a crontab from its five fields."""
    row = CrontabSchedule(**dict(zip(FIELDS, text.split(), strict=True)), timezone=ZoneInfo(zone))
    return Crontab.from_row(row)


def get_times(crontab, start, end):
    """Return all due times after a start and not after an end, by two ways that must agree."""
    forward, time = [], start
    while (time := crontab.get_next(time)) and time <= end:
        forward.append(time)
    backward, time = [], end
    while time := crontab.get_latest(start, time):
        backward.append(time)
        time -= timedelta(microseconds=1)
    assert forward == backward[::-1]
    return forward


def utc(*parts):
    return datetime(*parts, tzinfo=UTC)


class TestFields:
    @pytest.mark.parametrize(
        ("text", "first", "second"),
        [
            ("0 8 * * *", (2026, 1, 2, 8), (2026, 1, 3, 8)),
            ("30 8 1 * *", (2026, 2, 1, 8, 30), (2026, 3, 1, 8, 30)),
            ("0 0 29 2 *", (2028, 2, 29), (2032, 2, 29)),
            ("0 0 * * 0", (2026, 1, 4), (2026, 1, 11)),
            ("0 0 * * sun", (2026, 1, 4), (2026, 1, 11)),
            # A day must match both, unlike in crontab(5).
            ("0 0 13 * 5", (2026, 2, 13), (2026, 3, 13)),
            ("*/20 9 1 7 *", (2026, 7, 1, 9), (2026, 7, 1, 9, 20)),
            ("59 23 31 12 *", (2026, 12, 31, 23, 59), (2027, 12, 31, 23, 59)),
        ],
    )
    def test_next_two(self, text, first, second):
        crontab = make(text)
        start = utc(2026, 1, 1, 12)
        assert crontab.get_next(start) == utc(*first)
        assert crontab.get_next(utc(*first)) == utc(*second)

    def test_next_one_is_after_and_latest_one_not_after(self):
        crontab = make("0 8 * * *")
        eight, tick = utc(2026, 1, 2, 8), timedelta(microseconds=1)
        assert crontab.get_next(eight - tick) == eight
        assert crontab.get_next(eight) == eight + DAY
        assert crontab.get_latest(eight - DAY, eight) == eight
        assert crontab.get_latest(eight - DAY, eight - tick) is None
        assert crontab.get_latest(eight - DAY - tick, eight - tick) == eight - DAY
        assert crontab.get_latest(eight, eight) is None

    def test_none_until(self):
        crontab = make("0 8 * * *")
        assert crontab.get_next(utc(2026, 1, 2, 9), until=utc(2026, 1, 3, 7)) is None
        assert crontab.get_next(utc(2026, 1, 2, 9), until=utc(2026, 1, 3, 8)) == utc(2026, 1, 3, 8)
        assert make("0 8 1 1 *").get_next(utc(2026, 1, 2), until=utc(2026, 1, 9)) is None

    @pytest.mark.parametrize(
        ("field", "value"),
        [("minute", "61"), ("hour", "x"), ("day_of_week", "8"), ("month_of_year", "*/0")],
    )
    def test_invalid_one_is_a_value_error(self, field, value):
        row = CrontabSchedule(minute="0", hour="8", timezone="UTC")
        setattr(row, field, value)
        with pytest.raises(ValueError):
            Crontab.from_row(row)

    @pytest.mark.parametrize("text", ["0 0 31 2 *", "0 0 30 2 *", "0 0 31 4,6,9,11 *"])
    def test_one_that_is_never_due_is_a_value_error(self, text):
        with pytest.raises(ValueError, match="never occurs"):
            make(text)

    def test_leap_day_on_one_weekday_is_due_after_many_years(self):
        assert make("0 0 29 2 1").get_next(utc(2080, 1, 1)) == utc(2112, 2, 29)


class TestClockChanges:
    """Europe/London: an hour is skipped at 01:00 UTC on 29 March and repeated on 25 October."""

    SPRING = utc(2026, 3, 28, 12), utc(2026, 3, 30, 12)
    AUTUMN = utc(2026, 10, 24, 12), utc(2026, 10, 26, 12)

    @pytest.mark.parametrize(
        ("text", "times"),
        [
            # At the moment of the change
            ("30 1 * * *", [utc(2026, 3, 29, 1), utc(2026, 3, 30, 0, 30)]),
            # 01:00 and 02:00 are the same moment.
            ("0 1,2 * * *", [utc(2026, 3, 29, 1), utc(2026, 3, 30, 0), utc(2026, 3, 30, 1)]),
            ("0 8 * * *", [utc(2026, 3, 29, 7), utc(2026, 3, 30, 7)]),
            # #9653 of Celery: an hour late
            ("4 16 29 3 *", [utc(2026, 3, 29, 15, 4)]),
        ],
    )
    def test_fixed_times_in_spring(self, text, times):
        assert get_times(make(text, "Europe/London"), *self.SPRING) == times

    @pytest.mark.parametrize(
        ("text", "times"),
        [
            # Once, at the first of both
            ("30 1 * * *", [utc(2026, 10, 25, 0, 30), utc(2026, 10, 26, 1, 30)]),
            ("0 8 * * *", [utc(2026, 10, 25, 8), utc(2026, 10, 26, 8)]),
            ("0 2 * * *", [utc(2026, 10, 25, 2), utc(2026, 10, 26, 2)]),
        ],
    )
    def test_fixed_times_in_autumn(self, text, times):
        assert get_times(make(text, "Europe/London"), *self.AUTUMN) == times

    @pytest.mark.parametrize("zone", ["Europe/London", "America/Sao_Paulo", "Asia/Tokyo"])
    @pytest.mark.parametrize("span", [SPRING, AUTUMN], ids=["spring", "autumn"])
    @pytest.mark.parametrize(("text", "minutes"), [("0 * * * *", 60), ("*/15 * * * *", 15)])
    def test_each_hour_runs_in_each_hour_that_passes(self, zone, span, text, minutes):
        """Celery leaves out the repeated one (#10107)."""
        times = get_times(make(text, zone), *span)
        step = timedelta(minutes=minutes)
        assert times == [span[0] + step * n for n in range(1, 2 * DAY // step + 1)]

    def test_change_of_half_an_hour(self):
        zone = "Australia/Lord_Howe"  # 02:00 to 02:30 on 4 October 2026, at 15:30 UTC
        span = utc(2026, 10, 3, 12), utc(2026, 10, 3, 18)
        assert get_times(make("15 2 * * *", zone), *span) == [utc(2026, 10, 3, 15, 30)]
        assert get_times(make("45 2 * * *", zone), *span) == [utc(2026, 10, 3, 15, 45)]

    def test_midnight_that_is_skipped(self):
        zone = "Africa/Cairo"  # 00:00 to 01:00 on 24 April 2026
        span = utc(2026, 4, 22, 23), utc(2026, 4, 24, 23)
        times = [utc(2026, 4, 23, 22), utc(2026, 4, 24, 21)]
        assert get_times(make("0 0 * * *", zone), *span) == times

    def test_day_that_is_skipped(self):
        zone = "Pacific/Apia"  # There was no 30 December 2011.
        span = utc(2011, 12, 28, 20), utc(2011, 12, 31, 20)
        times = [utc(2011, 12, 29, 18), utc(2011, 12, 30, 10), utc(2011, 12, 30, 18)]
        assert get_times(make("0 8 * * *", zone), *span) == [*times, utc(2011, 12, 31, 18)]
