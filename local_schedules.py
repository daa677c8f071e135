"""The table of schedules of a new service, and the code that is generated from it.

The table maps the name of a schedule to an object with these keys:

``task``
    The name of a function in ``tasks.py``.
``crontab``
    When to run the task: five fields as in crontab(5).
``interval``
    How often to run the task: an object such as ``{"minutes": 5}``, with ``days``, ``hours``,
    ``minutes`` or ``seconds``. Either this or ``crontab`` is required.
``args``
    The arguments of the task, a list of JSON values. The default is no arguments.
"""

import json
import keyword
import re

#: The line length of the generated code.
LINE_LENGTH = 100

#: Names of the schedules that every service has.
RESERVED_NAMES = frozenset({"deliveries-resume", "records-delete", "tasks-resume"})

#: Names that the generated ``tasks.py`` imports.
RESERVED_TASKS = frozenset({"F", "OperationalError", "Submission", "timezone"}) | {
    "digest_task",
    "shared_task",
}

#: Control characters, also those that change the direction of text and so hide what code does.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

#: How many levels the arguments of a task may have.
MAX_LEVELS = 10

UNITS = ("days", "hours", "minutes", "seconds")

#: The fields of a crontab: lowest and highest number, and names.
CRONTAB_FIELDS = (
    (0, 59, ()),
    (0, 23, ()),
    (1, 31, ()),
    (1, 12, "jan feb mar apr may jun jul aug sep oct nov dec".split()),
    (0, 6, "sun mon tue wed thu fri sat".split()),
)

DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")


def find_problem(schedules):
    """Return a description of the first problem in a table of schedules, or None."""
    if not isinstance(schedules, dict):
        return "must be an object that maps names to schedules"
    for name, schedule in schedules.items():
        if not name.strip() or len(name) > 200 or not name.isprintable():
            return (
                f"has a name that is blank, longer than 200 characters or not printable: {name!r}"
            )
        if problem := find_schedule_problem(name, schedule):
            return f"has an invalid schedule {name!r}: {problem}"
    return None


def find_schedule_problem(name, schedule):
    """Return a description of the first problem of a schedule, or None."""
    if name in RESERVED_NAMES:
        return "this name is reserved, because every service has a schedule with this name"
    if not isinstance(schedule, dict):
        return "it must be an object"
    if unknown := sorted(schedule.keys() - {"task", "crontab", "interval", "args"}):
        return f"unknown key {unknown[0]!r}; the keys are task, crontab, interval and args"
    task = schedule.get("task")
    if not isinstance(task, str) or not re.fullmatch(r"[a-z_][a-z0-9_]{0,99}", task):
        return f"task must be the name of a function in tasks.py, not {task!r}"
    if keyword.iskeyword(task) or task in RESERVED_TASKS or task.startswith("__"):
        return f"task cannot be {task}: this name is reserved"
    if ("crontab" in schedule) == ("interval" in schedule):
        return "it must have either a crontab or an interval"
    if "crontab" in schedule and not is_crontab(schedule["crontab"]):
        return f"invalid crontab: {schedule['crontab']!r}"
    if "interval" in schedule and not is_interval(schedule["interval"]):
        return 'interval must be an object such as {"minutes": 5}'
    if not isinstance(schedule.get("args", []), list):
        return "args must be a list"
    return find_argument_problem(schedule.get("args", []))


def find_argument_problem(value, level=1):
    """Return what is wrong with an argument or what it contains, or None."""
    if level > MAX_LEVELS:
        return f"args must have at most {MAX_LEVELS} levels"
    if isinstance(value, str) and CONTROL.search(value):
        return f"args must not contain control characters: {value!r}"
    items = [*value, *value.values()] if isinstance(value, dict) else value
    items = items if isinstance(items, list) else []
    return next(
        (found for item in items if (found := find_argument_problem(item, level + 1))), None
    )


def is_crontab(text):
    """Return whether the text has the five fields of a crontab, each in its range."""
    fields = text.split(" ") if isinstance(text, str) else []
    return len(fields) == len(CRONTAB_FIELDS) and all(
        is_crontab_part(part, *limits)
        for field, limits in zip(fields, CRONTAB_FIELDS, strict=True)
        for part in field.split(",")
    )


def is_crontab_part(part, lowest, highest, names):
    """Return whether a part is ``*``, a number, a name or a range, with or without a step."""
    match = re.fullmatch(r"(?:\*|(\w+)(?:-(\w+))?)(?:/([1-9]\d?))?", part)
    return bool(match) and all(
        end.lower() in names or (end.isdecimal() and lowest <= int(end) <= highest)
        for end in match.groups()[:2]
        if end is not None
    )


def is_interval(value):
    """Return whether the value has whole, positive numbers of time units."""
    return (
        isinstance(value, dict)
        and bool(value)
        and value.keys() <= set(UNITS)
        and all(type(number) is int and 0 < number <= 10**6 for number in value.values())
    )


# Text and code for the files of a service


def get_seeds(answers):
    """Return the schedules that the first migrations of a service create, by name."""
    seeds = answers["schedules"] or answers["_examples"][answers["example"]]["schedules"]
    return {**seeds, **answers["_lifecycles"][answers["lifecycle"]]["schedules"]}


def get_missing_tasks(answers):
    """Return the arguments of each scheduled task that the example does not have, by name."""
    known = [
        *answers["_examples"][answers["example"]]["tasks"],
        *answers["_lifecycles"][answers["lifecycle"]]["tasks"],
    ]
    return {
        schedule["task"]: schedule.get("args", [])
        for schedule in get_seeds(answers).values()
        if schedule["task"] not in known
    }


def get_last_migration(answers):
    """Return the name of the last migration of a new service."""
    last = answers["_examples"][answers["example"]]["last_migration"]
    return max([last, "0002_seed_schedules"]) if get_seeds(answers) else last


def import_timedelta(answers):
    """Return the import that intervals require."""
    intervals = [seed for seed in get_seeds(answers).values() if "interval" in seed]
    return "from datetime import timedelta\n\n" if intervals else ""


def create_schedules(answers):
    """Return the operations of the first migration."""
    lines = []
    for name, schedule in get_seeds(answers).items():
        lines += [
            "        CreateSchedule(",
            f"            {python(name)},",
            f'            task="{answers["project_slug"]}.tasks.{schedule["task"]}",',
        ]
        if "crontab" in schedule:
            lines += [
                f'            crontab="{schedule["crontab"]}",',
                f'            timezone="{answers["timezone"]}",',
            ]
        else:
            lines += [f"            interval={get_timedelta(schedule)},"]
        if schedule.get("args"):
            lines += [f"            args={python(schedule['args'], 12, len('args=') + 1)},"]
        lines += ["        ),"]
    return "\n".join(lines)


def expect_schedules(answers):
    """Return the items of a dictionary with the task, timing and arguments of each schedule."""
    lines = []
    for name, schedule in get_seeds(answers).items():
        timing = f'"{schedule["crontab"]}"' if "crontab" in schedule else get_timedelta(schedule)
        lines += [
            f"    {python(name)}: (",
            f'        "{schedule["task"]}",',
            f"        {timing},",
            f"        {python(schedule.get('args', []), 8, 1)},",
            "    ),",
        ]
    return "\n".join(lines)


def get_timedelta(schedule):
    """Return the expression of an interval."""
    arguments = (f"{unit}={number}" for unit, number in schedule["interval"].items())
    return f"timedelta({', '.join(arguments)})"


def import_shared_task(answers):
    """Return the import that the tasks without code require."""
    return "\nfrom celery import shared_task\n" if get_missing_tasks(answers) else ""


def create_tasks(answers):
    """Return a task that raises NotImplementedError for each task without code."""
    return "".join(
        f"\n\n@shared_task\ndef {task}(*args):\n"
        f'    """Not written yet."""\n'
        f'    raise NotImplementedError("Write this task")\n'
        for task in get_missing_tasks(answers)
    )


def create_task_tests(answers):
    """Return a test for each task without code."""
    return "".join(
        f"\n\n@pytest.mark.xfail(\n    raises=NotImplementedError,\n"
        f'    reason="{task} is not written yet",\n    strict=True,\n)\n'
        f"def test_{task}():\n    tasks.{task}({', '.join(['*' + python(args, 4, 14)] if args else [])})\n"
        for task, args in get_missing_tasks(answers).items()
    )


def describe_schedules(answers):
    """Return the rows of a Markdown table of the schedules."""
    return "".join(
        f"\n| `{name}` | {describe_timing(schedule)} |"
        f" `{schedule['task']}{describe_arguments(schedule)}` |"
        for name, schedule in get_seeds(answers).items()
    )


def describe_arguments(schedule):
    """Return the arguments of a call in parentheses, or an empty string."""
    return f"({python(schedule['args'])[1:-1]})" if schedule.get("args") else ""


def describe_timing(schedule):
    """Return a description of when a schedule runs, or its crontab."""
    if "interval" in schedule:
        parts = [
            f"{number} {unit}" if number > 1 else unit[:-1]
            for unit, number in schedule["interval"].items()
        ]
        return f"every {' and '.join(parts)}"
    crontab = schedule["crontab"]
    if crontab == "0 * * * *":
        return "every hour"
    if match := re.fullmatch(r"(\d+) (\d+) \* \* ([*0-6])", crontab):
        minute, hour, day = match.groups()
        when = "day" if day == "*" else DAYS[int(day)]
        return f"every {when} at {int(hour):02}:{int(minute):02}"
    return f"`{crontab}`"


def python(value, indent=0, used=0):
    """Return a JSON value as Python code, as ``ruff format`` writes it.

    ``indent`` is the indentation of the line, and ``used`` the length of its other code.
    """
    if isinstance(value, list | dict):
        opening, closing = "[]" if isinstance(value, list) else "{}"
        keys = (
            [f"{python(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
        )
        values = list(value.values()) if isinstance(value, dict) else value
        items = [key + python(item) for key, item in zip(keys, values, strict=True)]
        line = f"{opening}{', '.join(items)}{closing}"
        if indent + used + len(line) <= LINE_LENGTH:
            return line
        inner = indent + 4
        items = [
            f"\n{' ' * inner}{key}{python(item, inner, len(key) + 1)},"
            for key, item in zip(keys, values, strict=True)
        ]
        return f"{opening}{''.join(items)}\n{' ' * indent}{closing}"
    if isinstance(value, str):
        literal = json.dumps(value, ensure_ascii=False)
        if value.count('"') > value.count("'"):
            return "'" + literal[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"
        return literal
    return repr(value)


#: The functions that templates use as filters of all answers.
FILTERS = (
    create_schedules,
    create_task_tests,
    create_tasks,
    describe_schedules,
    expect_schedules,
    get_last_migration,
    get_missing_tasks,
    get_seeds,
    import_shared_task,
    import_timedelta,
)
