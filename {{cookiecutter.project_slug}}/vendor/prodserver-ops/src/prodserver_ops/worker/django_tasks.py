"""The backend of Django's tasks: ``django.tasks`` queues them, and Celery's workers run them.

Each function with Django's decorator ``@task`` is also a Celery task, whose name is its dotted
path. So schedules can name it, and its runs are recorded, retried and killed like those of the
others. Django 5.2 has no tasks, and does not import this module.

https://docs.djangoproject.com/en/stable/topics/tasks/
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from inspect import Parameter, signature
from typing import Any

from celery import current_app, shared_task, states
from celery.app.task import Context
from celery.utils import uuid
from django.conf import settings
from django.db import transaction
from django.tasks import Task as DjangoTask
from django.tasks import TaskContext, TaskResult, TaskResultStatus
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import TaskError
from django.tasks.exceptions import TaskResultDoesNotExist
from django.tasks.signals import (
    log_task_finished,
    log_task_started,
    task_enqueued,
    task_finished,
    task_started,
)
from django.utils import timezone
from django.utils.json import normalize_json
from django.utils.module_loading import import_string

from .. import broker
from .app import Task

logger = logging.getLogger(__name__)

type AnyTask = DjangoTask[Any, Any]
type AnyResult = TaskResult[Any, Any]

#: The name of the queue that the routes of Celery choose.
DEFAULT_QUEUE = "default"

#: The states of Celery that are not ``READY``.
STATUSES = {
    states.STARTED: TaskResultStatus.RUNNING,
    states.SUCCESS: TaskResultStatus.SUCCESSFUL,
    states.FAILURE: TaskResultStatus.FAILED,
    states.REVOKED: TaskResultStatus.FAILED,
    states.REJECTED: TaskResultStatus.FAILED,
}

#: Django's tasks by name.
tasks: dict[str, AnyTask] = {}


class Backend(BaseTaskBackend):
    """The backend for ``TASKS``.

    ``QUEUES``
        The names of queues that tasks may have; by default all that workers consume. The prefix
        ``PACKAGE`` may be left out: ``high`` is the queue ``shop.high``. Celery's routes choose the
        queue of a task with the name ``default``.
    ``ENQUEUE_ON_COMMIT``
        Whether tasks are queued after the transaction is committed, as with
        ``delay_on_commit()``; by default they are queued at once.

    Results need ``CELERY_RESULT_BACKEND``.
    """

    supports_defer = True
    supports_async_task = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        self.on_commit: bool = params.get("ENQUEUE_ON_COMMIT", False)
        if "QUEUES" not in params:
            names = [queue.name for queue in settings.CELERY_TASK_QUEUES]
            prefix = f"{settings.CELERY_TASK_DEFAULT_QUEUE}."
            self.queues = {DEFAULT_QUEUE, *names, *(name.removeprefix(prefix) for name in names)}

    @property
    def supports_get_result(self) -> bool:  # type: ignore[override]
        """Whether results are stored."""
        return bool(settings.CELERY_RESULT_BACKEND)

    def validate_task(self, task: AnyTask) -> None:
        """Check a task, and let Celery know it; Django calls this when it is defined."""
        super().validate_task(task)
        if task.module_path not in tasks:
            tasks[task.module_path] = task
            register(task)

    def enqueue(self, task: AnyTask, args: Any, kwargs: Any) -> AnyResult:
        """Queue a task; return its result, whose ``enqueued_at`` is None until it is queued.

        Raises TypeError for arguments that the task does not take, or that JSON cannot contain.
        Raises kombu's OperationalError if the broker is unavailable; with ``ENQUEUE_ON_COMMIT``
        in a transaction, an error is logged instead.
        """
        self.validate_task(task)
        result = make_result(task, self.alias, uuid(), args=args, kwargs=kwargs)
        get_signature(task).bind(*result.args, **result.kwargs)
        if self.supports_get_result:
            store_pending(result)
        in_transaction = transaction.get_connection().in_atomic_block
        joins = in_transaction and broker.joins_transaction(settings.CELERY_BROKER_URL)
        if self.on_commit and in_transaction and not joins:
            transaction.on_commit(partial(self.try_to_publish, result), robust=True)
        else:
            self.publish(result)
        return result

    def try_to_publish(self, result: AnyResult) -> None:
        """Publish the message of a task; log an error if that fails."""
        try:
            self.publish(result)
        except Exception as error:
            logger.error("%s is not queued: %s", result.task.module_path, error)

    def publish(self, result: AnyResult) -> None:
        """Publish the message of a task."""
        task = result.task
        options = get_options(task)
        if task.queue_name == DEFAULT_QUEUE != tasks[task.module_path].queue_name:
            options["queue"] = settings.CELERY_TASK_DEFAULT_QUEUE
        celery_task: Any = current_app.tasks[task.module_path]
        try:
            celery_task.apply_async(
                result.args,
                result.kwargs,
                task_id=result.id,
                eta=task.run_after,
                headers={"django_backend": self.alias},
                **options,
            )
        except Exception:
            if self.supports_get_result:
                current_app.backend.forget(result.id)
            raise
        object.__setattr__(result, "enqueued_at", timezone.now())
        task_enqueued.send(type(self), task_result=result)

    def get_result(self, result_id: str) -> AnyResult:
        """Return a result; raise TaskResultDoesNotExist if there is none.

        Raises NotImplementedError without ``CELERY_RESULT_BACKEND``.
        """
        if not self.supports_get_result:
            return super().get_result(result_id)
        meta = current_app.backend.get_task_meta(result_id, cache=False)
        name = meta.get("task_name") or meta.get("name")
        if not name or not isinstance(task := find(name), DjangoTask):
            raise TaskResultDoesNotExist(result_id)
        return from_meta(task, self.alias, result_id, meta)


def find(name: str) -> Any:
    """Return the task with a name, or None."""
    if name not in tasks:
        with suppress(ImportError):
            return import_string(name)
    return tasks.get(name)


def get_options(task: AnyTask) -> dict[str, Any]:
    """Return the options of Celery for the queue and the priority of a task."""
    options: dict[str, Any] = {}
    if task.queue_name != DEFAULT_QUEUE:
        name = f"{settings.CELERY_TASK_DEFAULT_QUEUE}.{task.queue_name}"
        is_short = name in (queue.name for queue in settings.CELERY_TASK_QUEUES)
        options["queue"] = name if is_short else task.queue_name
    if task.priority:
        options["priority"] = broker.get_priority(settings.CELERY_BROKER_URL, task.priority)
    return options


def get_reprs(args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments as results contain them; by default some contain what Python prints."""
    return {"argsrepr": json.dumps(list(args or ())), "kwargsrepr": json.dumps(kwargs or {})}


# Results


def make_result(task: AnyTask, alias: str, result_id: str, **fields: Any) -> AnyResult:
    """Return a result; the fields that are not given have their first values."""
    values: dict[str, Any] = {
        "status": TaskResultStatus.READY,
        "enqueued_at": None,
        "started_at": None,
        "finished_at": None,
        "last_attempted_at": None,
        "errors": [],
        "worker_ids": [],
    }
    return TaskResult(task=task, id=result_id, backend=alias, **values | fields)


def store_pending(result: AnyResult) -> None:
    """Store that a task waits, so that its result exists."""
    request = Context(
        task=result.task.module_path,
        args=result.args,
        kwargs=result.kwargs,
        meta={"enqueued_at": timezone.now().isoformat()},
        **get_reprs(result.args, result.kwargs),
    )
    current_app.backend.store_result(result.id, None, states.PENDING, request=request)


def from_meta(task: AnyTask, alias: str, result_id: str, meta: dict[str, Any]) -> AnyResult:
    """Return the result that Celery has stored."""
    status = STATUSES.get(meta["status"], TaskResultStatus.READY)
    started_at = parse(meta.get("started_at"))
    result = make_result(
        task,
        alias,
        result_id,
        status=status,
        args=load(meta.get("args"), list),
        kwargs=load(meta.get("kwargs"), dict),
        enqueued_at=parse(meta.get("enqueued_at")),
        started_at=started_at,
        last_attempted_at=started_at,
        worker_ids=meta.get("worker_ids") or [],
    )
    if result.is_finished:
        object.__setattr__(result, "finished_at", parse(meta.get("date_done")))
    if status == TaskResultStatus.SUCCESSFUL:
        object.__setattr__(result, "_return_value", meta["result"])
    elif status == TaskResultStatus.FAILED:
        result.errors.append(make_error(meta["result"], meta.get("traceback") or ""))
    return result


def make_error(error: Any, traceback: str) -> TaskError:
    """Return an exception as Django stores it."""
    kind = type(error) if isinstance(error, BaseException) else Exception
    return TaskError(
        exception_class_path=f"{kind.__module__}.{kind.__qualname__}", traceback=traceback
    )


def load(value: Any, kind: type) -> Any:
    """Return arguments as a list or an object; empty if they cannot be read."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    return value if isinstance(value, kind) else kind()


def parse(value: datetime | str | None) -> datetime | None:
    """Return a time that a result backend has stored."""
    time = datetime.fromisoformat(value) if isinstance(value, str) else value
    return timezone.make_aware(time, UTC) if time and timezone.is_naive(time) else time


# Workers


def log_others(receiver: Callable[..., None], sender: Any, **kwargs: Any) -> None:
    """Log tasks of other backends; Celery logs the tasks of its workers."""
    if not issubclass(sender, Backend):
        receiver(sender=sender, **kwargs)


for _signal, _receiver in ((task_started, log_task_started), (task_finished, log_task_finished)):
    _signal.disconnect(_receiver)
    _signal.connect(partial(log_others, _receiver), weak=False)


class RunnableTask(Task):
    """The base class of the Celery tasks that run Django's: they send its signals."""

    def apply_async(  # type: ignore[override]
        self, args: Any = None, kwargs: Any = None, **options: Any
    ) -> Any:
        """Queue the task, by default with its own queue and priority.

        Results contain the arguments as JSON, also after a retry.
        """
        defaults = get_reprs(args, kwargs)
        if not options.keys() & {"queue", "exchange", "routing_key"}:
            defaults |= get_options(tasks[self.name])
        return super().apply_async(args, kwargs, **defaults | options)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """Tell Django that the task has succeeded."""
        self.finish(TaskResultStatus.SUCCESSFUL, args, kwargs, [])

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Tell Django that the task has failed, and is not tried again."""
        error = make_error(exc, str(einfo.traceback))
        self.finish(TaskResultStatus.FAILED, args, kwargs, [error])

    def finish(
        self, status: TaskResultStatus, args: Any, kwargs: Any, errors: Sequence[TaskError]
    ) -> None:
        """Send ``task_finished``."""
        result = make_running(self, args, kwargs, status=status, finished_at=timezone.now())
        result.errors.extend(errors)
        task_finished.send(type(result.task.get_backend()), task_result=result)


def make_running(celery_task: Any, args: Any, kwargs: Any, **fields: Any) -> AnyResult:
    """Return the result of the task that runs."""
    request = celery_task.request
    task = tasks[celery_task.name]
    meta = request.get("meta") or {}
    started_at = parse(meta.get("started_at")) or timezone.now()
    return make_result(
        task,
        (request.headers or {}).get("django_backend") or task.backend,
        request.id or uuid(),
        args=list(args),
        kwargs=dict(kwargs),
        enqueued_at=celery_task.queued_at,
        started_at=started_at,
        last_attempted_at=started_at,
        worker_ids=meta.get("worker_ids") or [],
        **fields,
    )


def register(task: AnyTask) -> None:
    """Register the Celery task that runs a task of Django."""

    def run(*args: Any, **kwargs: Any) -> Any:
        request = celery_task.request
        request.meta = {
            "enqueued_at": celery_task.queued_at.isoformat(),
            "started_at": timezone.now().isoformat(),
            "worker_ids": [request.hostname or ""] * (request.retries + 1),
        }
        if request.id and not request.is_eager and not celery_task.ignore_result:
            celery_task.update_state(state=states.STARTED)
        running = make_running(celery_task, args, kwargs, status=TaskResultStatus.RUNNING)
        task_started.send(type(task.get_backend()), task_result=running)
        if task.takes_context:
            args = (TaskContext(task_result=running), *args)
        return normalize_json(task.call(*args, **kwargs))

    run.__name__, run.__doc__, run.__module__ = task.name, task.func.__doc__, task.func.__module__
    run.__signature__ = get_signature(task)  # type: ignore[attr-defined]
    celery_task: Any = shared_task(name=task.module_path, base=RunnableTask)(run)


def get_signature(task: AnyTask) -> Any:
    """Return the signature of a task without the context, which callers do not pass."""
    function: Callable[..., Any] = task.func
    given = signature(function)
    parameters: list[Parameter] = list(given.parameters.values())
    return given.replace(parameters=parameters[1:]) if task.takes_context else given
