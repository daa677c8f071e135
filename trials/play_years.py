"""The part of ``ten_years.py`` that runs in the environment of a generated service."""

import bisect
import collections
import heapq
import itertools
import json
import random
import zoneinfo
from datetime import UTC, datetime, timedelta

from celery import current_app
from croniter import croniter
from django.db import connection
from django.test import override_settings
from django_celery_beat.models import CrontabSchedule, PeriodicTask
from django_celery_beat.tzcrontab import TzAwareCrontab
from prodserver_ops.mail import digests
from prodserver_ops.models import ScheduleRun
from prodserver_ops.scheduling import scheduler

START, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2036, 1, 1, tzinfo=UTC)
DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)

#: How late a run may be, as in the settings.
GRACE = HOUR

#: Crontabs that meet the hours in which clocks change, and others.
CRONTABS = ["30 1 * * *", "15 2 * * *", "0 0 * * *", "30 3 * * 0", "0 8 * * 1", "45 2 1 * *"]
HOURLY = "*/30 * * * *"
LEAP_DAY = "0 2 29 2 *"

#: Pauses, restarts and edits in each series of ten years.
EVENTS = 40

#: Days around each change of the clock in which the hourly crontab is played.
MARGIN = 2 * DAY


class Zone:
    """A time zone as a list of the moments at which its offset changes."""

    def __init__(self, name):
        self.name = name
        info = zoneinfo.ZoneInfo(name)
        start, end = START - 400 * DAY, END + 400 * DAY
        self.starts, self.offsets = [start], [start.astimezone(info).utcoffset()]
        moment = start
        while moment < end:
            following = moment + 12 * HOUR
            if following.astimezone(info).utcoffset() != self.offsets[-1]:
                low, high = moment, following
                while high - low > timedelta(seconds=1):
                    middle = low + (high - low) / 2
                    same = middle.astimezone(info).utcoffset() == self.offsets[-1]
                    low, high = (middle, high) if same else (low, middle)
                change = (high + timedelta(microseconds=500_000)).replace(microsecond=0)
                self.starts.append(change)
                self.offsets.append(change.astimezone(info).utcoffset())
            moment = following
        self.changes = [change for change in self.starts[1:] if START < change < END]

    def get_moments(self, wall):
        """Return when a wall clock shows a naive time: never, once or twice."""
        moments = []
        ends = [*self.starts[1:], datetime.max.replace(tzinfo=UTC)]
        position = bisect.bisect_right(self.starts, wall.replace(tzinfo=UTC))
        for index in range(max(0, position - 2), min(len(self.starts), position + 2)):
            moment = wall.replace(tzinfo=UTC) - self.offsets[index]
            if self.starts[index] <= moment < ends[index]:
                moments.append(moment)
        return moments

    def get_due(self, crontab, start, end):
        """Return when a crontab is due after a start and not after an end, as documented."""
        follows_real_time = crontab.split()[1] == "*"
        due = set()
        walls = croniter(crontab, (start - 2 * DAY).replace(tzinfo=None), day_or=False)
        for wall in iter(lambda: walls.get_next(datetime), None):
            if wall > (end + 2 * DAY).replace(tzinfo=None):
                break
            moments = self.get_moments(wall)
            if follows_real_time:
                due.update(moments)
            elif moments:
                due.add(moments[0])
            else:
                # The wall clock was put forward past this time.
                due.add(
                    next(
                        change
                        for change, before, after in zip(
                            self.starts[1:], self.offsets, self.offsets[1:], strict=False
                        )
                        if change + before <= wall.replace(tzinfo=UTC) < change + after
                    )
                )
        return sorted(moment for moment in due if start < moment <= end)


class Clock:
    """The clock of the database."""

    now = START


clock = Clock()


class VirtualScheduler(scheduler.Scheduler):
    """The scheduler, with a clock of its own, which publishes nothing."""

    def get_rows(self):
        rows = super().get_rows()
        for row in rows:
            row.now = clock.now
        return rows

    def find_busy(self, rows):
        return set()

    def publish_runs(self, runs):
        return True

    def publish_stored(self, now):
        return True


class MemoryScheduler(VirtualScheduler):
    """The scheduler, with schedules and runs in memory instead of the database."""

    def __init__(self, rows):
        self.rows, self.runs = rows, []
        super().__init__(app=current_app, max_interval=30 * 24 * 3600)

    def get_rows(self):
        for row in self.rows:
            row.now = clock.now
        return self.rows

    def store_runs(self, runs, now):
        for due, row in runs:
            row.last_run_at = due
            self.runs.append(due)


class Play:
    """Ten years in each zone."""

    def __init__(self, count, seed):
        self.rng = random.Random(seed)
        scheduler.time.monotonic = lambda: 0
        # Their tasks are never queued.
        scheduler.check_message = lambda row: None
        self.zones = self.choose_zones(count)
        self.report = collections.Counter(
            {"runs": 0, "twice": 0, "missing": 0, "unexpected": 0, "periods wrong": 0}
        )

    def choose_zones(self, count):
        """Return the zones with changes, one for each list of changes."""
        zones = {}
        for name in sorted(zoneinfo.available_timezones()):
            if "/" in name and not name.startswith(("Etc/", "SystemV/", "posix/", "right/")):
                zone = Zone(name)
                if zone.changes:
                    zones.setdefault((tuple(zone.starts), tuple(zone.offsets)), zone)
        chosen = list(zones.values())
        self.rng.shuffle(chosen)
        return chosen[: count or None]

    def run(self):
        """Play, and print the report; the last line is JSON."""
        upstream = collections.Counter()
        for zone in self.zones:
            for crontab in [*self.rng.sample(CRONTABS, 3), LEAP_DAY]:
                self.play_series(zone, crontab)
            for change in zone.changes:
                self.play_span(zone, HOURLY, change - MARGIN, change + MARGIN)
            self.check_periods(zone)
            for crontab in ("30 1 * * *", "15 2 * * *", "0 * * * *", "4 16 * * *"):
                for change in zone.changes[:4]:
                    upstream += self.play_upstream(zone, crontab, change - MARGIN, change + MARGIN)
        self.play_database(self.zones[0])
        print(f"{len(self.zones)} zones, {sum(len(zone.changes) for zone in self.zones)} changes")
        print(f"the scheduler of django-celery-beat around changes: {dict(upstream)}")
        print(json.dumps(self.report))

    # The scheduler

    def play_series(self, zone, crontab):
        """Play a crontab for ten years, with pauses, restarts and edits."""
        moments = sorted(self.rng.uniform(0, 1) for _ in range(EVENTS))
        events = [START + (END - START) * moment for moment in moments]
        row, runs = self.make_row(zone, crontab, START), []
        expected = set()
        begin = START
        for event in [*events, END]:
            runs += self.drive([row], begin, event)
            expected |= self.expect(zone, crontab, row, begin, event)
            if event == END:
                break
            kind = self.rng.choice(["restart", "pause", "edit"])
            begin = event
            if kind == "pause":
                begin = min(event + self.rng.uniform(0, 50) * HOUR, END)
            elif kind == "edit":
                crontab = self.rng.choice(CRONTABS)
                row = self.make_row(zone, crontab, event, last_run_at=row.last_run_at)
            following = next((each for each in events if each > event), END)
            begin = min(begin, following)
        self.compare(runs, expected)

    def play_span(self, zone, crontab, start, end):
        """Play a crontab from a start to an end."""
        row = self.make_row(zone, crontab, start)
        runs = self.drive([row], start, end)
        self.compare(runs, set(zone.get_due(crontab, start, end)))

    def make_row(self, zone, crontab, changed, **fields):
        minute, hour, day, month, weekday = crontab.split()
        schedule = CrontabSchedule(
            minute=minute,
            hour=hour,
            day_of_month=day,
            month_of_year=month,
            day_of_week=weekday,
            timezone=zoneinfo.ZoneInfo(zone.name),
        )
        return PeriodicTask(
            name="sample", task="x", crontab=schedule, date_changed=changed, **fields
        )

    def drive(self, rows, start, end):
        """Run a new scheduler from a start until an end; return its runs."""
        driven = MemoryScheduler(rows)
        # Rows in memory have the timing that they were made with.
        note_changes, scheduler.note_changes = scheduler.note_changes, lambda rows, now: None
        clock.now = start
        while clock.now <= end:
            wait = driven.run_pass()
            clock.now += timedelta(seconds=max(wait, 0.001))
        scheduler.note_changes = note_changes
        return driven.runs

    def expect(self, zone, crontab, row, begin, end):
        """Return what is due while beat runs, and the last one that it makes up for."""
        changed = row.date_changed
        missed = zone.get_due(crontab, max(changed, begin - GRACE), begin)
        return set(zone.get_due(crontab, begin, end)) | set(missed[-1:])

    def compare(self, runs, expected):
        counts = collections.Counter(runs)
        self.report["runs"] += len(runs)
        self.report["twice"] += sum(count - 1 for count in counts.values())
        self.report["missing"] += len(expected - counts.keys())
        self.report["unexpected"] += len(counts.keys() - expected)

    # The database

    def edit(self, row):
        """Change a field of a schedule that has no part in its timing, in one of three ways."""
        text = str(self.rng.random())
        match self.rng.randrange(3):
            case 0:
                row = PeriodicTask.objects.get(pk=row.pk)
                row.description = text
                row.save()
            case 1:
                PeriodicTask.objects.update_or_create(name=row.name, defaults={"description": text})
            case 2:
                PeriodicTask.objects.filter(pk=row.pk).update(description=text)

    def play_database(self, zone):
        """Play a year with rows in a database, the real queries, and edits of other fields."""
        connection.creation.create_test_db(verbosity=0)
        PeriodicTask.objects.all().delete()
        rows = []
        for number, crontab in enumerate(CRONTABS[:3]):
            row = self.make_row(zone, crontab, START)
            row.crontab.save()
            row.name, row.crontab = f"sample{number}", row.crontab
            row.task = "ops.delete_records"
            row.save()
            rows.append(row)
        PeriodicTask.objects.update(date_changed=START)
        driven = VirtualScheduler(app=current_app, max_interval=30 * 24 * 3600)
        # A run that is not published would be replaced by the next.
        ScheduleRun._meta.get_field("published_at").default = START
        clock.now, end = START, START + 365 * DAY
        while clock.now <= end:
            clock.now += timedelta(seconds=max(driven.run_pass(), 0.001))
            self.edit(self.rng.choice(rows))
        for row, crontab in zip(rows, CRONTABS, strict=False):
            runs = ScheduleRun.objects.filter(schedule=row, due_at__lte=end)
            expected = set(zone.get_due(crontab, START, end))
            self.compare([run.due_at for run in runs], expected)

    # Digests

    def check_periods(self, zone):
        """Check that the periods of digests follow each other for ten years."""
        with override_settings(TIME_ZONE=zone.name):
            for digest, spans in (
                (digests.DailyDigest(), [(START, END)]),
                (digests.WeeklyDigest(), [(START, END)]),
                (
                    digests.HourlyDigest(),
                    [(change - MARGIN, change + MARGIN) for change in zone.changes],
                ),
            ):
                step = 30 * MINUTE if isinstance(digest, digests.HourlyDigest) else 6 * HOUR
                for start, end in spans:
                    moments = itertools.takewhile(
                        lambda moment, end=end: moment < end,
                        (start + step * n for n in itertools.count()),
                    )
                    periods = [digest.period(moment + 7 * MINUTE) for moment in moments]
                    unique = sorted(set(periods))
                    for (_, before_end), (after_start, _) in itertools.pairwise(unique):
                        self.report["periods wrong"] += before_end != after_start
                    for start_of_period, end_of_period in unique:
                        self.report["periods wrong"] += not start_of_period < end_of_period

    # django-celery-beat

    def play_upstream(self, zone, crontab, start, end):
        """Return what the crontab of django-celery-beat does in a span, against the reckoning."""
        now = start
        minute, hour, day, month, weekday = crontab.split()
        schedule = TzAwareCrontab(
            minute, hour, weekday, day, month, tz=zoneinfo.ZoneInfo(zone.name), app=current_app
        )
        schedule.nowfunc = lambda: now.astimezone(schedule.tz)
        schedule.nowfun = schedule.nowfunc
        last, runs, heap = start, [], [start]
        while heap and (now := heapq.heappop(heap)) <= end:
            is_due, wait = schedule.is_due(last)
            if is_due:
                runs.append(now.replace(second=0, microsecond=0))
                last = now
            heapq.heappush(heap, now + timedelta(seconds=max(1, min(wait, 600))))
        expected = set(zone.get_due(crontab, start, end))
        return collections.Counter(
            {
                "runs": len(runs),
                "missing at their time": len(expected - set(runs)),
                "at another time": len(set(runs) - expected),
            }
        )
