"""What ``manage.py schedules`` prints: all schedules of the database, and a simulation of them."""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from celery import current_app
from django.conf import settings
from django.db.models import OuterRef, Subquery
from django.utils import timezone
from django_celery_beat.models import PeriodicTask

from ..models import TaskRun
from ..scheduling import timing
from ..scheduling.simulation import DAY, ClockChange, Report, Schedule
from . import doctor
from .operations import describe_timing

#: How many names a line lists, and the width to which a column may be cut.
MAX_NAMES, MIN_WIDTH = 10, 12

GAP = "  "


def list_schedules() -> list[dict[str, Any]]:
    """Return all schedules, with their last and next runs, by name.

    The result is that of the last run, if the record has it.
    """
    current_app.loader.import_default_modules()  # To know which tasks exist
    latest = TaskRun.objects.filter(schedule=OuterRef("pk")).order_by("-pk")
    rows = PeriodicTask.objects.select_related(*timing.RELATIONS).annotate(
        started_at=Subquery(latest.values("started_at")[:1]),
        result=Subquery(latest.values("status")[:1]),
    )
    return [describe(row) for row in rows.order_by("name").iterator()]


def describe(row: Any) -> dict[str, Any]:
    """Return what the list says of a schedule."""
    state = doctor.describe_schedule(row) if row.enabled else {}
    times = [moment for moment in (row.started_at, row.last_run_at) if moment is not None]
    last_run = max(times, default=None)
    return {
        "name": row.name,
        "enabled": row.enabled,
        "timing": describe_timing(row),
        "task": row.task,
        "last_run": last_run and timezone.localtime(last_run).replace(microsecond=0),
        "result": row.result if last_run is not None and last_run == row.started_at else None,
        "next_run": state.get("next_run"),
        "problem": state.get("problem"),
    }


def format_list(schedules: Sequence[dict[str, Any]], width: int | None) -> Iterator[str]:
    """Yield the lines of the list."""
    rows = [("SCHEDULE", "WHEN", "TASK", "LAST RUN", "RESULT", "NEXT RUN")]
    for each in schedules:
        following = format_time(each["next_run"]) if each["enabled"] else "off"
        if each["problem"]:
            following = f"cannot run: {each['problem']}"
        last = format_time(each["last_run"])
        result = each["result"] or "-"
        rows.append((each["name"], each["timing"], each["task"], last, result, following))
    yield from format_table(rows, width, cut=3)
    disabled = sum(not each["enabled"] for each in schedules)
    faulty = sum(bool(each["problem"]) for each in schedules)
    yield (
        f"{len(schedules)} schedules, {disabled} off, {faulty} cannot run; "
        f"times in {settings.TIME_ZONE}"
    )


def format_time(moment: datetime | None) -> str:
    """Return a time for the list."""
    return f"{moment:%Y-%m-%d %H:%M:%S}" if moment else "-"


def format_table(rows: Sequence[Sequence[Any]], width: int | None, cut: int) -> Iterator[str]:
    """Yield the lines of a table; cut the first columns, and then the line, if it is too wide."""
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    *widths, last = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if width:
        # The last column may be long for a few rows; these lines are cut.
        needed = min(last, len("YYYY-MM-DD HH:MM:SS"))
        while sum(widths) + len(GAP) * len(widths) + needed > width:
            widest = max(range(cut), key=widths.__getitem__)
            if widths[widest] <= MIN_WIDTH:
                break
            widths[widest] -= 1
    for row in cells:
        columns = [shorten(cell, size).ljust(size) for cell, size in zip(row, widths, strict=False)]
        line = GAP.join([*columns, row[-1]]).rstrip()
        yield shorten(line, width) if width else line


def shorten(text: str, size: int) -> str:
    """Return a text of at most that many characters."""
    return text if len(text) <= size else f"{text[: size - 1]}…"


# Simulation


def format_report(report: Report, width: int | None) -> Iterator[str]:
    """Yield the lines of a simulation."""
    plural = "s" if report.days > 1 else ""
    yield f"{report.days} day{plural} from {report.start:%a %d %b %Y %H:%M}, {settings.TIME_ZONE}"
    yield ""
    rows: list[tuple[Any, ...]] = [("SCHEDULE", "RUNS", "LEFT OUT", "OVERLAPS", "SECONDS")]
    for each in report.schedules:
        seconds = format_seconds(each.duration) if each.duration_known else "unknown"
        rows.append((each.name, each.runs, each.left_out, each.overlaps, seconds))
    yield from format_table(rows, width, cut=1)
    yield from format_section(
        "Cannot run", [f"{each.name}: {each.problem}" for each in report.schedules if each.problem]
    )
    yield from format_section(
        "Overlaps",
        [describe_overlaps(each) for each in report.schedules if each.shortest_gap is not None],
    )
    yield from format_section(
        "Clock changes",
        [line for change in report.clock_changes for line in describe_change(change)],
    )
    yield ""
    if busiest := report.busiest:
        yield (
            f"Busiest minute: {busiest.minute:%a %d %b %Y %H:%M}, {busiest.starts} runs start, "
            f"at most {busiest.slots} worker slots are needed"
        )
    work = report.work_per_day
    yield f"Work: {work / 3600:.1f} hours a day, {work / DAY:.1f} worker slots on average"
    if report.unknown_durations:
        yield (
            f"Unknown durations: {report.unknown_durations} of {len(report.schedules)} schedules, "
            "counted as 1 second"
        )


def format_seconds(seconds: float) -> str:
    """Return a duration with three digits or more."""
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def format_section(title: str, lines: list[str]) -> Iterator[str]:
    """Yield a title and lines, if there are any."""
    if lines:
        yield from ("", f"{title}:", *(f"  {line}" for line in lines))


def describe_overlaps(schedule: Schedule) -> str:
    """Return which runs of a schedule overlap or are left out."""
    why = f"it takes {format_seconds(schedule.duration)} s, and starts up to every {schedule.shortest_gap} s"
    if schedule.without_overlapping:
        due = schedule.runs + schedule.left_out
        waits = schedule.without_overlapping == "wait"
        what = "left out, and others wait" if waits else "left out"
        return f"{schedule.name}: {schedule.left_out} of {due} runs are {what}: {why}"
    text = f"{schedule.name}: {schedule.overlaps} of {schedule.runs} runs overlap: {why}"
    # A running one is no reason to leave out the next.
    return f"{text}; at most one more waits" if schedule.coalesces else text


def describe_change(change: ClockChange) -> Iterator[str]:
    """Yield what runs when a clock changes."""
    direction = "forward" if change.seconds > 0 else "back"
    yield (
        f"{change.at:%a %d %b %Y %H:%M} {change.zone}: the clock goes {direction} by "
        f"{timedelta(seconds=abs(change.seconds))}"
    )
    for text, names in (
        ("run twice", change.twice),
        ("run once", change.once),
        ("are moved to the change", change.moved),
    ):
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            yield f"  {text}: {', '.join(names[:MAX_NAMES])}{more}"
