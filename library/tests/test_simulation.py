"""``schedules --simulate``: what runs, overlaps and moves, against runs that are known."""

import json
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from celery import shared_task
from django.core.management import CommandError, call_command
from django_celery_beat.models import (
    ClockedSchedule,
    CrontabSchedule,
    IntervalSchedule,
    PeriodicTask,
)

from prodserver_ops.models import ScheduleTiming, TaskRun
from prodserver_ops.scheduling import simulation
from prodserver_ops.scheduling.timing import get_due, get_next
from prodserver_ops.worker.app import CoalescingTask

pytestmark = pytest.mark.django_db

DAY = timedelta(days=1)


@shared_task(name="simulation-test.sample")
def sample():
    pass


@shared_task(name="simulation-test.exclusive", without_overlapping=True)
def exclusive():
    pass


@shared_task(name="simulation-test.waiting", without_overlapping="wait")
def waiting():
    pass


@shared_task(name="simulation-test.coalescing", base=CoalescingTask)
def coalescing():
    pass


@pytest.fixture(autouse=True)
def _no_other_schedules():
    PeriodicTask.objects.all().delete()


def make(name, timing, start, task=sample, zone="UTC", **fields):
    """Create a schedule that is due from a start on, by a crontab or a number of seconds."""
    changed = start - timedelta.resolution
    if isinstance(timing, str):
        minute, hour, day, month, weekday = timing.split()
        fields["crontab"], _ = CrontabSchedule.objects.get_or_create(
            minute=minute,
            hour=hour,
            day_of_month=day,
            month_of_year=month,
            day_of_week=weekday,
            timezone=ZoneInfo(zone),
        )
    elif timing:
        fields["interval"], _ = IntervalSchedule.objects.get_or_create(
            every=timing, period="seconds"
        )
    row = PeriodicTask.objects.create(name=name, task=task.name, **fields)
    PeriodicTask.objects.filter(pk=row.pk).update(date_changed=changed)
    row.date_changed = changed
    return row


def play(start, days, *rows):
    """Play rows, each with its duration."""
    played = simulation.Simulation(start, days)
    for row, duration in rows:
        played.add(row, duration)
    report = played.play(lambda text: None)
    return report, {schedule.name: schedule for schedule in report.schedules}


class TestClockChanges:
    """In Europe/London clocks go forward on 28 March 2027 and back on 31 October."""

    def play(self, start):
        zone = "Europe/London"
        return play(
            start,
            2,
            (make("half past one", "30 1 * * *", start, zone=zone), 1),
            (make("half-hourly", "*/30 * * * *", start, zone=zone), 1),
            (make("at eight", "0 8 * * *", start, zone=zone), 1),
            (make("half past one UTC", "30 1 * * *", start), 1),
            (make("interval", 3600, start), 1),
        )

    def test_forward(self):
        report, schedules = self.play(datetime(2027, 3, 27, tzinfo=UTC))
        (change,) = report.clock_changes
        assert change.at.isoformat() == "2027-03-28T02:00:00+01:00"
        assert (change.zone, change.seconds) == ("Europe/London", 3600)
        assert (change.twice, change.once, change.moved) == ([], [], ["half past one"])
        assert schedules["half past one"].runs == 2
        assert schedules["half-hourly"].runs == 96

    def test_back(self):
        report, schedules = self.play(datetime(2027, 10, 30, tzinfo=UTC))
        (change,) = report.clock_changes
        assert change.at.isoformat() == "2027-10-31T01:00:00+00:00"
        assert (change.twice, change.once, change.moved) == (
            ["half-hourly"],
            ["half past one"],
            [],
        )
        assert schedules["half past one"].runs == 2
        assert schedules["half-hourly"].runs == 96
        assert schedules["interval"].runs == 48

    def test_only_within_the_span(self):
        report, _ = self.play(datetime(2027, 3, 29, tzinfo=UTC))
        assert report.clock_changes == []


class TestOverlaps:
    start = datetime(2026, 12, 1, tzinfo=UTC)

    def test_run_overlaps_with_the_previous_one(self):
        _, schedules = play(
            self.start,
            1,
            (make("slow", "* * * * *", self.start), 60.5),
            (make("in time", "* * * * *", self.start), 60),
            (make("twice", "0,1 12 * * *", self.start), 90),
        )
        slow = schedules["slow"]
        assert (slow.runs, slow.overlaps, slow.left_out, slow.shortest_gap) == (1440, 1439, 0, 60)
        in_time = schedules["in time"]
        assert (in_time.overlaps, in_time.shortest_gap) == (0, None)
        assert (schedules["twice"].runs, schedules["twice"].overlaps) == (2, 1)

    def test_last_run_of_a_day_overlaps_with_the_first_one_of_the_next(self):
        row = make("midnight", "0,59 0,23 * * *", self.start)
        _, schedules = play(self.start, 3, (row, 90))
        assert (schedules["midnight"].runs, schedules["midnight"].overlaps) == (12, 2)

    def test_runs_of_a_task_without_overlapping_are_left_out(self):
        row = make("slow", "* * * * *", self.start, exclusive)
        report, schedules = play(self.start, 2, (row, 150))
        slow = schedules["slow"]
        assert (slow.runs, slow.left_out, slow.overlaps) == (960, 1920, 0)
        assert report.busiest.slots == 1
        assert report.work_per_day == 480 * 150

    def test_runs_that_wait_start_when_the_earlier_one_has_ended(self):
        row = make("slow", "* * * * *", self.start, waiting)
        report, schedules = play(self.start, 2, (row, 150))
        slow = schedules["slow"]
        # One after the other, also over midnight
        assert (slow.runs, slow.left_out, slow.overlaps) == (1152, 1728, 0)
        assert report.busiest.slots == 1

    @pytest.mark.parametrize(
        ("duration", "runs"),
        [(60, 6), (61, 6), (90, 5), (120, 4), (150, 4), (180, 3), (4000, 3)],
    )
    def test_only_the_last_run_waits(self, duration, runs):
        """On the second day, what waits at midnight is beyond the end."""
        row = make("thrice", "57,58,59 23 * * *", self.start, waiting)
        report, schedules = play(self.start, 2, (row, duration))
        assert schedules["thrice"].runs == runs
        assert report.busiest.slots == 1

    def test_runs_of_a_task_that_coalesces_overlap_where_workers_are_free(self):
        row = make("slow", "* * * * *", self.start, coalescing)
        report, schedules = play(self.start, 1, (row, 150))
        assert (schedules["slow"].overlaps, schedules["slow"].coalesces) == (1439, True)
        assert report.busiest.slots == 3


class TestBusiestMinute:
    start = datetime(2026, 12, 1, 12, tzinfo=UTC)

    def test_counts_what_starts_and_what_is_at_work(self):
        report, _ = play(
            self.start,
            7,
            # At 2:00 on Wednesday and Saturday, when the first two are still running
            (make("long", "30 1 * * *", self.start), 3600),
            (make("weekly", "50 1 * * 3,6", self.start), 660),
            (make("nightly", "0 2 * * *", self.start), 10),
            (make("hourly", "0 * * * *", self.start), 30),
        )
        busiest = report.busiest
        assert busiest.minute == datetime(2026, 12, 2, 2, tzinfo=UTC)
        assert (busiest.starts, busiest.slots) == (2, 4)
        assert report.work_per_day == 3600 + 660 * 2 / 7 + 10 + 30 * 24

    def test_run_that_started_the_day_before_is_at_work(self):
        report, _ = play(
            self.start,
            2,
            (make("long", "0 11 * * *", self.start), 7200),
            (make("noon", "30 12 * * *", self.start), 60),
        )
        assert report.busiest.minute == self.start + timedelta(days=1, minutes=30)
        assert report.busiest.slots == 2

    def test_runs_one_after_the_other_need_one_slot(self):
        report, _ = play(self.start, 1, (make("often", 10, self.start), 10))
        assert report.busiest.slots == 1

    def test_nothing_to_run(self):
        assert play(self.start, 1)[0].busiest is None


def test_rows_with_other_bounds():
    start = datetime(2026, 12, 1, tzinfo=UTC)
    clocked = [
        ClockedSchedule.objects.create(clocked_time=start + hours * timedelta(hours=1))
        for hours in (5, 500)
    ]
    _, schedules = play(
        start,
        4,
        (make("one-off", 3600, start, one_off=True), 1),
        (make("starts", 3600, start, start_time=start + 3 * DAY), 1),
        (make("expires", "0 * * * *", start, expires=start + DAY), 1),
        (make("expired", "0 * * * *", start, expires=start), 1),
        (make("soon", None, start, clocked=clocked[0], one_off=True), 1),
        (make("later", None, start, clocked=clocked[1], one_off=True), 1),
        (make("faulty", 3600, start, args="[1]"), 1),
    )
    assert {name: schedule.runs for name, schedule in schedules.items()} == {
        "one-off": 1,
        "starts": 24,
        "expires": 24,
        "expired": 0,
        "soon": 1,
        "later": 0,
        "faulty": 0,
    }
    assert schedules["faulty"].problem.startswith("its args does not fit the task: ")


@pytest.mark.parametrize("seed", range(3))
def test_runs_are_those_of_the_scheduler(seed):
    """Play random rows run by run, with the functions of the scheduler."""
    rng = random.Random(seed)
    start = datetime(2027, 10, 29, 7, 23, tzinfo=UTC)
    end = start + 4 * DAY
    rows, expected = [], {}
    for number in range(20):
        crontab = " ".join(
            [
                rng.choice(["*", "*/7", "30", "0,59"]),
                rng.choice(["*", "*/2", "1", "0,23"]),
                rng.choice(["*", "*", "1,31"]),
                "*",
                rng.choice(["*", "*", "0", "1-5"]),
            ]
        )
        zone = rng.choice(["UTC", "Europe/London", "Australia/Lord_Howe", "America/Santiago"])
        last = start - timedelta(seconds=rng.randrange(60))
        timing = rng.choice([crontab, 61, 3600, 7 * 3600, 50 * 3600])
        start_time = rng.choice([None, None, start + 2 * DAY])
        row = make(
            f"{number}", timing, start - 9 * DAY, zone=zone, last_run_at=last, start_time=start_time
        )
        duration = rng.choice([1, 60, 400, 7300])
        rows.append((row, duration))
    report, schedules = play(start, 4, *rows)
    at_work = Counter()
    for row, duration in rows:
        due, time = [], start - timedelta.resolution
        while (time := get_next(row, time, end)) and time < end:
            assert get_due(row, time) == time
            row.last_run_at = time
            due.append(time)
        short = sum(b - a < timedelta(seconds=duration) for a, b in pairwise(due))
        expected[row.name] = (len(due), short)
        for time in due:
            at_work[time.replace(microsecond=0)] += 1
            at_work[time.replace(microsecond=0) + timedelta(seconds=duration)] -= 1
    assert {name: (each.runs, each.overlaps) for name, each in schedules.items()} == expected
    level, most = 0, 0
    for time in sorted(at_work):
        level += at_work[time]
        most = max(most, level if time < end else 0)
    assert report.busiest.slots == most


class TestCommand:
    @pytest.fixture
    def row(self):
        row = make("sample", "* * * * *", datetime(2026, 1, 1, tzinfo=UTC))
        now = datetime.now(UTC)
        for duration, status in (
            (50, "succeeded"),
            (90, "succeeded"),
            (70, "succeeded"),
            (1, "failed"),
        ):
            TaskRun.objects.create(
                name=sample.name, schedule=row, started_at=now, duration=duration, status=status
            )
        return row

    def test_duration_is_the_median_of_the_record(self, row, capsys):
        make("unknown", 86_400, datetime.now(UTC))
        make("disabled", 60, datetime.now(UTC), enabled=False)
        before = list(PeriodicTask.objects.order_by("pk").values())
        call_command("schedules", "--simulate", "1", "--json")
        report = json.loads(capsys.readouterr().out)
        assert [
            (each["name"], each["runs"], each["duration"], each["duration_known"], each["overlaps"])
            for each in report["schedules"]
        ] == [("sample", 1440, 70, True, 1439), ("unknown", 1, 1, False, 0)]
        assert report["unknown_durations"] == 1
        assert list(PeriodicTask.objects.order_by("pk").values()) == before
        assert not ScheduleTiming.objects.exists()

    @pytest.mark.usefixtures("row")
    def test_text(self, capsys):
        make("none", 60, datetime.now(UTC), headers="[]")
        call_command("schedules", "--simulate", "1")
        lines = capsys.readouterr().out.splitlines()
        assert lines[2:5] == [
            "SCHEDULE  RUNS  LEFT OUT  OVERLAPS  SECONDS",
            "none      0     0         0         unknown",
            "sample    1440  0         1439      70",
        ]
        assert "  none: its headers must be JSON such as {}" in lines
        assert (
            "  sample: 1439 of 1440 runs overlap: it takes 70 s, and starts up to every 60 s"
            in lines
        )
        assert lines[-2].endswith("1 runs start, at most 2 worker slots are needed")
        assert lines[-1] == "Work: 28.0 hours a day, 1.2 worker slots on average"

    @pytest.mark.parametrize("days", ["0", "3661", "x", "-1"])
    def test_other_numbers_of_days_are_refused(self, days):
        with pytest.raises(CommandError, match=r"must be a number from 1 to 3660|expected one"):
            call_command("schedules", "--simulate", days)

    def test_progress_of_a_long_simulation(self, row, monkeypatch, capsys):
        monkeypatch.setattr("prodserver_ops.management.commands.schedules.PROGRESS", 0)
        call_command("schedules", "--simulate", "2")
        assert capsys.readouterr().err.splitlines() == [
            "1 schedules read",
            "1 of 2 days",
            "2 of 2 days",
        ]
