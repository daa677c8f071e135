"""Results of tasks: an outcome is stored as it is, or the task runs again.

Celery stores a task that has succeeded as failed if its result cannot be stored at first, and forgets
a failure that cannot be stored.
"""

import logging
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from celery import current_task, maybe_signature
from celery.app.task import Context
from celery.backends.base import Backend, DisabledBackend
from celery.exceptions import BackendError, Reject, SoftTimeLimitExceeded
from celery.result import AsyncResult, allow_join_result
from celery.states import PROPAGATE_STATES, READY_STATES
from django.db import close_old_connections, router, transaction
from django.utils.module_loading import import_string
from kombu.exceptions import EncodeError, OperationalError

from ..core.database import TEMPORARY_ERRORS
from ..core.text import make_storable
from .record import get_recorder

logger = logging.getLogger(__name__)

#: How long a worker tries to store an outcome before the task runs again, and how long it waits after
#: the first attempt, in seconds. The wait is doubled each time.
STORE_SECONDS = 20
FIRST_WAIT = 0.1

#: Errors after which an outcome may be stored later. A soft time limit is an exception too.
STORE_LATER = (
    *TEMPORARY_ERRORS,
    BackendError,
    OperationalError,
    OSError,
    SoftTimeLimitExceeded,
)


NO_RESULTS = (
    "This service does not store the results of tasks, which get(), chords, and groups in a chain "
    "need. Run: python manage.py change task_results=database. In a project that is not generated, "
    'write CELERY_RESULT_BACKEND = "django-db" in the settings, add "django_celery_results" to '
    "INSTALLED_APPS, and install prodserver-ops[results]."
)


class NoResults(DisabledBackend):
    """The backend of a service without results: it says how to store them."""

    def ensure_chords_allowed(self) -> None:
        """Raise NotImplementedError before any task of a chord is queued."""
        raise NotImplementedError(NO_RESULTS)

    def _get_task_meta_for(self, task_id: str) -> None:
        raise NotImplementedError(NO_RESULTS)


class Result(AsyncResult):  # type: ignore[type-arg]
    """The result of a task that was queued."""

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result; raise NotImplementedError if the service stores none.

        Celery would return None.
        """
        if isinstance(self.backend, NoResults):
            raise NotImplementedError(NO_RESULTS)
        return super().get(*args, **kwargs)


class ReliableResults(Backend):
    """A mixin of result backends."""

    def mark_as_done(
        self, task_id: str, result: Any, request: Context | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Store a result, and queue the callback of a chord."""
        store = partial(super().mark_as_done, task_id, result, request, *args, **kwargs)
        self.store(store, task_id, request)

    def mark_as_failure(
        self,
        task_id: str,
        exc: Exception,
        traceback: Any = None,
        request: Context | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Store a failure, and queue the callbacks of errors."""
        get_recorder().note_failure(task_id, exc)
        store = partial(super().mark_as_failure, task_id, exc, traceback, request, *args, **kwargs)
        self.store(store, task_id, request)

    def mark_as_retry(self, task_id: str, *args: Any, **kwargs: Any) -> None:
        """Store that a task will be tried again; its message is already queued."""
        try:
            super().mark_as_retry(task_id, *args, **kwargs)
        except Exception as error:
            logger.warning("The state of a task is not stored: %s", type(error).__name__)

    def store(self, store: Callable[[], Any], task_id: str, request: Context | None) -> None:
        """Store an outcome; raise Reject if that fails and the task has to run again."""
        if request is None or not current_task or current_task.request.id != task_id:
            # Nothing can run again, for example because Celery stores the end of a lost worker.
            store()
            return
        deadline, wait = time.monotonic() + STORE_SECONDS, FIRST_WAIT
        while True:
            try:
                store()
                return
            except (EncodeError, MemoryError):
                raise
            except Exception as error:
                name = type(error).__name__
                if not (isinstance(error, STORE_LATER) or self.exception_safe_to_retry(error)):
                    logger.exception("The outcome of %s cannot be stored", current_task.name)
                    return
                if time.monotonic() + wait > deadline:
                    logger.error("%s runs again: its outcome is not stored", current_task.name)
                    raise Reject(f"the outcome is not stored: {name}", requeue=True) from error
                logger.warning("The outcome of %s is not stored yet: %s", current_task.name, name)
            close_old_connections()
            time.sleep(wait)
            wait *= 2


@cache
def make_reliable(backend: type[Backend]) -> type[Backend]:
    """Return the class of a result backend with ``ReliableResults``."""
    if issubclass(backend, DisabledBackend):
        return NoResults
    if issubclass(backend, ReliableResults):
        return backend
    bases: tuple[type, ...] = (ReliableResults, backend)
    if backend.__module__.startswith("django_celery_results."):
        bases = (DatabaseResults, *bases)
    return type(backend.__name__, bases, {})


class DatabaseResults(Backend):
    """A mixin of the backend of django-celery-results."""

    app: Any

    def _get_extended_properties(self, request: Any, traceback: Any) -> dict[str, Any]:
        from django_celery_results.models import TaskResult

        fields: Any = TaskResult._meta
        values = super()._get_extended_properties(request, traceback)  # type: ignore[misc]
        for name, value in values.items():
            if isinstance(value, str):
                values[name] = make_storable(value)[: fields.get_field(name).max_length]
        return values  # type: ignore[no-any-return]

    def on_chord_part_return(self, request: Any, state: Any, result: Any, **kwargs: Any) -> None:
        """Queue the callback of a chord when the results of all its tasks are stored.

        django-celery-results counts the tasks that end, also one that runs again because its worker
        was lost. It also loses the callback if the worker is lost, or the broker is unavailable.
        """
        from django_celery_results.backends.database import trigger_callback
        from django_celery_results.models import TaskResult

        ChordCounter: Any = import_string("django_celery_results.models.ChordCounter")
        if not request.id or not request.group:
            return
        with transaction.atomic(using=router.db_for_write(ChordCounter)):
            counters = ChordCounter.objects.select_for_update().filter(group_id=request.group)
            counter = counters.first()
            if counter is None:
                return  # The callback has been queued.
            group = counter.group_result(app=self.app)
            ids = {task.id for task in group.results}
            ended = TaskResult.objects.filter(task_id__in=ids, status__in=READY_STATES)
            states = list(ended.values_list("status", flat=True))
            if len(states) < len(ids):
                return
            callback: Any = maybe_signature(request.chord, app=self.app)
            if PROPAGATE_STATES.isdisjoint(states):
                with allow_join_result():
                    callback.delay(group.join(timeout=self.app.conf.result_chord_join_timeout))
            else:
                trigger_callback(app=self.app, callback=callback, group_result=group)
            counter.delete()
