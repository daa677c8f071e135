"""Simulate what schedules will do, with a virtual clock. Nothing is changed.

Schedules with the same timing are one series. Days on which all series run at the same times need
the same worker slots, and are measured once, so that ten years of 10,000 schedules take minutes. A
day is 24 hours, and the first one begins at the start. Each run starts when it is due; what was
missed before is not made up for. Times and durations are rounded to whole seconds.
"""

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from itertools import accumulate, count, pairwise
from statistics import median
from typing import Any, NamedTuple, Literal
from zoneinfo import ZoneInfo

from celery import current_app
from django.utils import timezone
from django_celery_beat.models import PeriodicTask

from ..models import TaskRun
from .crontabs import Crontab, get_times
from .timing import RELATIONS, InvalidSchedule, get_next, get_since
from .validation import check

#: A day in seconds, and a second in microseconds.
DAY, SECOND = 86_400, 1_000_000

#: The duration of a schedule without a successful run in the record, in seconds.
UNKNOWN = 1.0

#: How many days of a series are remembered.
MAX_PATTERNS = 200

MICROSECOND, ONE_DAY = timedelta(microseconds=1), timedelta(days=1)

#: A function that shows the progress.
Progress = Callable[[str], None]


@dataclass
class Schedule:
    """What a schedule will do.

    ``overlaps`` is the number of runs that start while the previous one is running, and
    ``shortest_gap`` the seconds between two starts if any overlap or are left out.
    """

    name: str
    task: str
    duration: float
    duration_known: bool
    without_overlapping: bool | Literal["wait"]
    coalesces: bool
    problem: str = ""
    runs: int = 0
    left_out: int = 0
    overlaps: int = 0
    shortest_gap: int | None = None


@dataclass
class ClockChange:
    """A clock change, with the names of the crontabs that are due in the repeated or skipped hour.

    In a repeated hour some run ``twice`` and others ``once``; out of a skipped one they are
    ``moved`` to the change.
    """

    at: datetime
    zone: str
    seconds: int
    twice: list[str] = field(default_factory=list)
    once: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)


@dataclass
class Busiest:
    """The first minute with the most runs at the same moment, and how many start in it."""

    minute: datetime
    starts: int
    slots: int


@dataclass
class Report:
    """What all schedules will do; ``work_per_day`` is in seconds."""

    start: datetime
    days: int
    schedules: list[Schedule]
    unknown_durations: int = 0
    work_per_day: float = 0
    busiest: Busiest | None = None
    clock_changes: list[ClockChange] = field(default_factory=list)


@dataclass(eq=False)
class Pattern:
    """The times of a series on a day, in seconds."""

    times: tuple[int, ...] = ()
    number: int = field(default_factory=count().__next__)

    @cached_property
    def gaps(self) -> Counter[int]:
        """The seconds between two runs, and how often."""
        return Counter(later - earlier for earlier, later in pairwise(self.times))

    @cached_property
    def shortest_gap(self) -> float:
        """The shortest of them."""
        return min(self.gaps, default=math.inf)


NO_RUNS = Pattern()


class Window(NamedTuple):
    """A day in a time zone: the dates at its start and end; no offset if the clock changes."""

    start: datetime
    dates: tuple[date, date]
    offset: int | None


class Timing(NamedTuple):
    """When schedules run: a crontab, or period and first run in microseconds; in a span of seconds.

    ``exclusive`` is the duration if a run is left out while the previous one is running, or ``waits``.
    """

    rule: Crontab | tuple[int, int]
    low: float = 0
    high: float = math.inf
    exclusive: int = 0
    waits: bool = False


@dataclass
class Series:
    """The schedules with the same timing."""

    timing: Timing
    windows: list[Window]
    schedules: list[Schedule] = field(default_factory=list)
    #: How many schedules have a duration.
    loads: Counter[int] = field(default_factory=Counter)
    longest: int = 0
    runs: int = 0
    left_out: int = 0
    last: float = -math.inf
    busy_until: int = 0
    is_waiting: bool = False
    #: The gaps that are shorter than the longest duration, and how often.
    gaps: Counter[int] = field(default_factory=Counter)
    patterns: dict[Any, Any] = field(default_factory=dict)

    def add(self, schedule: Schedule) -> None:
        """Add a schedule."""
        duration = get_seconds(schedule)
        self.schedules.append(schedule)
        self.loads[duration] += 1
        self.longest = max(self.longest, duration)

    def play(self, day: int) -> Pattern:
        """Return the runs of a day, and count them; the days must follow each other."""
        pattern = self.get_pattern(day)
        if times := pattern.times:
            if (gap := day * DAY + times[0] - self.last) < self.longest:
                self.gaps[int(gap)] += 1
            if pattern.shortest_gap < self.longest:
                self.gaps.update(pattern.gaps)
            self.last = day * DAY + times[-1]
        if self.timing.exclusive:
            pattern = self.leave_out(day, pattern)
        self.runs += len(pattern.times)
        return pattern

    def get_pattern(self, day: int) -> Pattern:
        """Return the times of a day, without those outside of the timing's span."""
        rule, low, high, *_ = self.timing
        low, high = low - day * DAY, high - day * DAY
        if low >= DAY or high <= 0:
            return NO_RUNS
        pattern = (
            self.get_crontab_times(rule, day)
            if isinstance(rule, Crontab)
            else self.get_interval_times(*rule, day)
        )
        if low <= 0 and high >= DAY:
            return pattern
        return Pattern(tuple(time for time in pattern.times if low <= time < high))

    def get_crontab_times(self, crontab: Crontab, day: int) -> Pattern:
        """Return the times of a crontab on a day."""
        start, (first, last), offset = self.windows[day]
        if offset is None:
            key: Any = (day,)
        else:
            key = (crontab.matches(first), crontab.matches(last), offset)
            if not key[0] and not key[1]:
                return NO_RUNS
        if key not in self.patterns:
            # A run that the clock moves may be on another date.
            dates = (first - ONE_DAY, first, last, last + ONE_DAY)
            moments = sorted({moment for each in dates for moment in get_times(crontab, each)})
            seconds = (int((moment - start).total_seconds()) for moment in moments)
            self.remember(key, Pattern(tuple(time for time in seconds if 0 <= time < DAY)))
        found: Pattern = self.patterns[key]
        return found

    def get_interval_times(self, period: int, first: int, day: int) -> Pattern:
        """Return the times of an interval on a day."""
        offset = (first - day * DAY * SECOND) % period
        if offset >= DAY * SECOND:
            return NO_RUNS
        if offset not in self.patterns:
            times = (time // SECOND for time in range(offset, DAY * SECOND, period))
            self.remember(offset, Pattern(tuple(times)))
        found: Pattern = self.patterns[offset]
        return found

    def leave_out(self, day: int, pattern: Pattern) -> Pattern:
        """Return a day without the runs that are due while an earlier one is running.

        If they wait, the last of them starts when the earlier one has ended.
        """
        busy = max(self.busy_until - day * DAY, 0)
        key = ("kept", pattern.number, busy, self.is_waiting)
        if key not in self.patterns:
            kept: list[int] = []
            waiting = self.is_waiting
            for time in (*pattern.times, DAY):
                if waiting and busy < time:
                    kept.append(busy)
                    busy, waiting = busy + self.timing.exclusive, False
                if busy <= time < DAY:
                    kept.append(time)
                    busy, waiting = time + self.timing.exclusive, False
                elif time < DAY:
                    waiting = self.timing.waits
            same = tuple(kept) == pattern.times
            self.remember(key, (pattern if same else Pattern(tuple(kept)), busy, waiting))
        found: Pattern
        found, busy, self.is_waiting = self.patterns[key]
        self.busy_until = day * DAY + busy
        self.left_out += len(pattern.times) - len(found.times)
        return found

    def remember(self, key: Any, value: Any) -> None:
        """Keep what was found for a day, for the next such day."""
        if len(self.patterns) >= MAX_PATTERNS:
            self.patterns.clear()
        self.patterns[key] = value

    def finish(self) -> None:
        """Tell the schedules what was counted."""
        for schedule in self.schedules:
            duration = get_seconds(schedule)
            short = {gap: number for gap, number in self.gaps.items() if gap < duration}
            schedule.runs, schedule.left_out = self.runs, self.left_out
            schedule.overlaps = 0 if self.timing.exclusive else sum(short.values())
            schedule.shortest_gap = min(short, default=None)


def get_seconds(schedule: Schedule) -> int:
    """Return how long a run takes, in whole seconds; at most a day."""
    return min(max(math.ceil(schedule.duration), 1), DAY)


class Simulation:
    """A virtual clock that starts at a time, a whole minute, and runs for a number of days."""

    def __init__(self, start: datetime, days: int) -> None:
        self.start, self.days = start.astimezone(UTC), days
        self.series: dict[Timing, Series] = {}
        self.windows: dict[ZoneInfo, list[Window]] = {}
        self.report = Report(timezone.localtime(start), days, [])

    def add(self, row: PeriodicTask, duration: float | None) -> None:
        """Add a schedule, with the duration of its runs if it is known."""
        task = current_app.tasks.get(row.task)
        schedule = Schedule(
            row.name,
            row.task,
            UNKNOWN if duration is None else duration,
            duration is not None,
            getattr(task, "without_overlapping", False),
            getattr(task, "coalesces", False),
        )
        self.report.schedules.append(schedule)
        try:
            check(row)
            self.add_to_series(row, schedule)
        except Exception as error:
            # A mistake in one schedule must not stop the others.
            schedule.problem = str(error)

    def add_to_series(self, row: PeriodicTask, schedule: Schedule) -> None:
        """Add a schedule to those with the same timing, if it has a run."""
        if row.solar is not None:
            raise InvalidSchedule("a solar schedule cannot be simulated")
        end = self.start + self.days * ONE_DAY
        first = get_next(row, self.start - MICROSECOND, end)
        if first is None or first >= end or (row.expires is not None and first >= row.expires):
            return
        timing = self.get_timing(row, first)
        if schedule.without_overlapping:
            waits = schedule.without_overlapping == "wait"
            timing = timing._replace(exclusive=get_seconds(schedule), waits=waits)
        if timing not in self.series:
            is_crontab = isinstance(timing.rule, Crontab)
            windows = self.get_windows(timing.rule.zone) if is_crontab else []  # type: ignore[union-attr]
            self.series[timing] = Series(timing, windows)
        self.series[timing].add(schedule)

    def get_timing(self, row: PeriodicTask, first: datetime) -> Timing:
        """Return the timing of a schedule whose first run is known."""
        begin = (first - self.start) // timedelta(seconds=1)
        high = math.inf if row.expires is None else (row.expires - self.start).total_seconds()
        if row.one_off or row.clocked is not None:
            return Timing(((self.days + 1) * DAY * SECOND, begin * SECOND))
        # A schedule has no run before its start, nor until its last run or change.
        moments = (row.start_time, row.last_run_at, get_since(row))
        low = begin if any(moment and moment >= self.start for moment in moments) else 0
        if row.crontab is not None:
            return Timing(Crontab.from_row(row.crontab), low, high)
        period = timedelta(**{row.interval.period: row.interval.every}) // MICROSECOND
        return Timing((period, begin * SECOND), low, high)

    def get_windows(self, zone: ZoneInfo) -> list[Window]:
        """Return the days in a time zone."""
        if zone not in self.windows:
            moments = [
                (self.start + number * ONE_DAY).astimezone(zone)
                for number in range(-1, self.days + 2)
            ]
            offsets = [get_offset(moment) for moment in moments]
            self.windows[zone] = [
                Window(
                    self.start + number * ONE_DAY,
                    (moments[number + 1].date(), moments[number + 2].date()),
                    offsets[number] if len(set(offsets[number : number + 4])) == 1 else None,
                )
                for number in range(self.days)
            ]
        return self.windows[zone]

    def play(self, progress: Progress) -> Report:
        """Play all days; return what happened."""
        series = list(self.series.values())
        measured: set[tuple[int, int]] = set()
        before: list[Pattern] = [NO_RUNS] * len(series)
        key_before = 0
        for day in range(self.days):
            today = [each.play(day) for each in series]
            key = hash(tuple(pattern.number for pattern in today))
            if (key_before, key) not in measured:
                measured.add((key_before, key))
                self.measure(day, series, before, today)
            before, key_before = today, key
            progress(f"{day + 1} of {self.days} days")
        for each in series:
            each.finish()
        report = self.report
        report.clock_changes = sorted(
            self.find_clock_changes(), key=lambda change: (change.at, change.zone)
        )
        work = sum(schedule.runs * schedule.duration for schedule in report.schedules)
        report.work_per_day = work / self.days
        report.unknown_durations = sum(
            not (schedule.duration_known or schedule.problem) for schedule in report.schedules
        )
        return report

    def measure(
        self, day: int, series: list[Series], before: list[Pattern], today: list[Pattern]
    ) -> None:
        """Find the moment of a day at which most runs are running."""
        levels = [0] * (2 * DAY + 1)
        for each, earlier, pattern in zip(series, before, today, strict=True):
            late = earlier.times[bisect_left(earlier.times, DAY - each.longest) :]
            for duration, schedules in each.loads.items():
                for time in pattern.times:
                    levels[time] += schedules
                    levels[time + duration] -= schedules
                # What is still running from the day before
                for time in late:
                    if (end := time + duration - DAY) > 0:
                        levels[0] += schedules
                        levels[end] -= schedules
        at_work = list(accumulate(levels[:DAY]))
        slots = max(at_work)
        if slots > (self.report.busiest.slots if self.report.busiest else 0):
            minute = at_work.index(slots) // 60 * 60
            starts = sum(
                (bisect_left(pattern.times, minute + 60) - bisect_left(pattern.times, minute))
                * len(each.schedules)
                for each, pattern in zip(series, today, strict=True)
            )
            moment = self.start + timedelta(days=day, seconds=minute)
            self.report.busiest = Busiest(timezone.localtime(moment), starts, slots)

    def find_clock_changes(self) -> Iterator[ClockChange]:
        """Yield the changes of clocks that concern crontabs, with the names of these."""
        by_zone: dict[ZoneInfo, list[tuple[Crontab, Series]]] = defaultdict(list)
        for each in self.series.values():
            if isinstance(each.timing.rule, Crontab):
                by_zone[each.timing.rule.zone].append((each.timing.rule, each))
        for zone, crontabs in by_zone.items():
            for at, offset, seconds in self.get_changes(zone):
                change = ClockChange(at.astimezone(zone), str(zone), seconds)
                first = (at + timedelta(seconds=offset + min(seconds, 0))).replace(tzinfo=None)
                walls = [first + timedelta(minutes=n) for n in range(abs(seconds) // 60)]
                for crontab, each in crontabs:
                    second = (at - self.start).total_seconds()
                    if not each.timing.low <= second < each.timing.high:
                        continue
                    if not any(
                        wall.hour in crontab.hours
                        and wall.minute in crontab.minutes
                        and crontab.matches(wall.date())
                        for wall in walls
                    ):
                        continue
                    names = [schedule.name for schedule in each.schedules]
                    if seconds < 0:
                        (change.twice if crontab.follows_real_time else change.once).extend(names)
                    elif not crontab.follows_real_time:
                        change.moved.extend(names)
                if change.twice or change.once or change.moved:
                    yield change

    def get_changes(self, zone: ZoneInfo) -> Iterator[tuple[datetime, int, int]]:
        """Yield when the clock of a zone changes, the offset before, and by how many seconds."""
        for window in self.get_windows(zone):
            low, high = 0, DAY
            before, after = (
                get_offset((window.start + timedelta(seconds=second)).astimezone(zone))
                for second in (low, high)
            )
            if before == after:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                moment = (window.start + timedelta(seconds=middle)).astimezone(zone)
                low, high = (middle, high) if get_offset(moment) == before else (low, middle)
            yield window.start + timedelta(seconds=high), before, after - before


def get_offset(moment: datetime) -> int:
    """Return the offset of a moment from UTC in seconds."""
    return int((moment.utcoffset() or timedelta()).total_seconds())


def get_durations() -> dict[int, float]:
    """Return the median duration of each schedule's successful runs in the record, in seconds."""
    durations: dict[int, list[float]] = defaultdict(list)
    runs = TaskRun.objects.filter(
        status=TaskRun.Status.SUCCEEDED, schedule__isnull=False, duration__isnull=False
    )
    for schedule, duration in runs.values_list("schedule_id", "duration").iterator():
        durations[schedule or 0].append(duration or 0)
    return {schedule: median(values) for schedule, values in durations.items()}


def simulate(days: int, progress: Progress = lambda text: None) -> Report:
    """Play the enabled schedules from the next minute on."""
    current_app.loader.import_default_modules()  # To know which tasks exist
    start = timezone.now().replace(second=0, microsecond=0) + timedelta(minutes=1)
    simulation = Simulation(start, days)
    durations = get_durations()
    rows = PeriodicTask.objects.filter(enabled=True).select_related(*RELATIONS).order_by("name")
    for number, row in enumerate(rows.iterator(), 1):
        simulation.add(row, durations.get(row.pk))
        progress(f"{number} schedules read")
    return simulation.play(progress)
