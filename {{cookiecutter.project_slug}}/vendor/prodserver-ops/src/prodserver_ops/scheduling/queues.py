"""Queues: those that a process consumes, and those that others use."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from celery import current_app
from django.conf import settings
from django.db import DatabaseError, InterfaceError
from django_celery_beat.models import PeriodicTask

from . import heartbeats


def get_consumed() -> list[str]:
    """Return the names of the queues that a worker in ``PRODUCTION_PROCESSES`` consumes."""
    everything = [queue.name for queue in settings.CELERY_TASK_QUEUES]
    workers = [settings.PRODUCTION_PROCESSES[name] for name in heartbeats.get_workers()]
    if not workers:
        return everything  # The project starts its workers in another way.
    names = dict.fromkeys(
        name
        for worker in workers
        for name in _split(worker, "queues", "Q") or everything
        if name not in _split(worker, "exclude-queues", "X")
    )
    return list(names)


def _split(process: dict[str, Any], *options: str) -> list[str]:
    arguments = process.get("ARGS") or {}
    text = next((arguments[option] for option in options if arguments.get(option)), "")
    return [name.strip() for name in str(text).split(",") if name.strip()]


def get_queue(task: Any) -> str:
    """Return the name of the queue of a task; "" if it is known only when the task is queued."""
    options = dict(task._get_exec_options())
    if not options.get("queue"):
        route = task.app.amqp.router.lookup_route(task.name, (), {}, options, task)
        options |= {"queue": route} if isinstance(route, str) else dict(route or {})
    if any(options.get(name) for name in ("exchange", "routing_key")) and not options.get("queue"):
        return ""
    queue = options.get("queue") or settings.CELERY_TASK_DEFAULT_QUEUE
    return str(getattr(queue, "name", queue))


def get_used() -> Iterator[tuple[str, str]]:
    """Return the name of each queue that tasks and routes use, and what uses it."""
    # Celery would run the system checks too, which call this.
    current_app.autodiscover_tasks(force=True)
    for name, task in sorted(current_app.tasks.items()):
        # Celery's own tasks run in a worker, or where the service says.
        if not name.startswith("celery.") and (queue := get_queue(task)):
            yield queue, f"the task {name}"
    for name, route in _get_routes(settings.CELERY_TASK_ROUTES or {}):
        name_of_queue = route.get("queue") if isinstance(route, dict) else route
        if isinstance(name_of_queue, str):
            yield name_of_queue, f"the route {name!r} in CELERY_TASK_ROUTES"


def _get_routes(routes: Any) -> Iterator[tuple[Any, Any]]:
    """Return the pairs of the routers that are data; others are functions."""
    for router in routes if isinstance(routes, list | tuple) else [routes]:
        if isinstance(router, dict):
            yield from router.items()
        elif isinstance(router, list | tuple):
            yield from router


def find_unconsumed() -> dict[str, list[str]]:
    """Return what uses each queue that no process consumes."""
    consumed, found = set(get_consumed()), dict[str, list[str]]()
    for queue, user in get_used():
        if queue not in consumed:
            found.setdefault(queue, []).append(user)
    return found


def get_known() -> list[str]:
    """Return the names of all queues that processes consume, or that tasks or schedules use."""
    names = [*get_consumed(), *(queue for queue, _ in get_used())]
    rows = PeriodicTask.objects.exclude(queue=None).exclude(queue="").order_by("queue")
    with suppress(DatabaseError, InterfaceError):  # The check of the database reports these.
        names += rows.values_list("queue", flat=True).distinct()
    return list(dict.fromkeys(names))


def describe_unconsumed(counts: dict[str, int]) -> dict[str, str]:
    """Return a message for each queue with messages that no process consumes."""
    consumed = get_consumed()
    return {
        name: f"the queue {name} has {count} messages, but no process consumes it: add it to "
        f"QUEUES or EXTRA_QUEUES in the settings, or change the task or schedule"
        for name, count in counts.items()
        if count and name not in consumed
    }
