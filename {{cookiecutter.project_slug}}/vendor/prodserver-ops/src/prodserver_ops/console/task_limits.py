"""Compare the longest time limit of a task with limits that end it earlier: those of RabbitMQ and of deploys."""

import math
import re
from pathlib import Path

from celery import current_app
from django.conf import settings
from django.core import checks

from .. import broker

#: The files with the time that a worker may take to stop, and the pattern of it.
STOP_TIMES = {
    "compose.yaml": r"^  [\w-]*worker[\w-]*:\n(?:(?:    .*| *)\n)*?    stop_grace_period: *(.+)$",
    "*-worker*.service": r"^TimeoutStopSec=(.+)$",
}

#: The units of a duration in seconds, such as 310, 5m10s or 5min 10s.
UNITS = {"h": 3600, "hr": 3600, "m": 60, "min": 60, "s": 1, "sec": 1, "": 1}


def get_longest() -> tuple[float, str]:
    """Return the longest time limit of a task in seconds, and the task.

    A drill does not count: it changes nothing, and can start again.
    """
    current_app.loader.import_default_modules()
    default = settings.CELERY_TASK_TIME_LIMIT
    tasks = {name: task for name, task in current_app.tasks.items() if name != "ops.drill"}
    limits = {name: task.time_limit or default for name, task in tasks.items()}
    return max((limit, name) for name, limit in limits.items())


def parse_duration(text: str) -> float:
    """Return a duration of Compose or systemd in seconds; infinity if it has none, or is unknown."""
    text = text.partition("#")[0].strip().strip("'\"")
    parts = re.findall(r"(\d+(?:\.\d+)?) *([a-z]*) *", text)
    if "".join(map("".join, parts)) != text.replace(" ", "") or not parts:
        return math.inf
    return sum(float(number) * UNITS.get(unit, math.inf) for number, unit in parts)


def find_messages() -> list[checks.CheckMessage]:
    """Return a message for each limit that ends a task before its time limit."""
    longest, name = get_longest()
    messages: list[checks.CheckMessage] = []
    allowed = settings.RABBITMQ_CONSUMER_TIMEOUT
    if broker.find(settings.CELERY_BROKER_URL).module == "rabbitmq" and longest >= allowed:
        messages.append(
            checks.Warning(
                f"The task {name} may take {longest:g} s, but RabbitMQ ends it after {allowed:g} s "
                "and delivers it again.",
                hint="Make it resumable, or raise consumer_timeout in rabbitmq.conf (milliseconds) "
                "and set RABBITMQ_CONSUMER_TIMEOUT to the same seconds.",
                id="tasks.W001",
            )
        )
    for pattern, line in STOP_TIMES.items():
        for path in sorted(Path(settings.BASE_DIR).glob(pattern)):
            seconds = map(parse_duration, re.findall(line, path.read_text(), re.M))
            if (shortest := min(seconds, default=math.inf)) <= longest:
                messages.append(
                    checks.Warning(
                        f"The task {name} may take {longest:g} s, but {path.name} lets a worker "
                        f"that stops take only {shortest:g} s.",
                        hint=f"Raise it to {longest + 10:g} s.",
                        id="tasks.W002",
                    )
                )
    return messages
