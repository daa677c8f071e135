"""The class of the Celery app, and the base class of its tasks."""

import copy
import gc
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import celery.app.base
import django
from celery import Celery, canvas, current_app, signals
from celery.app import amqp, backends, control
from celery.contrib.django.task import DjangoTask
from celery.exceptions import Ignore, Reject
from celery.states import FAILURE, SUCCESS
from celery.utils import quorum_queues
from django.conf import settings
from django.db import transaction
from django.utils import timezone, translation
from django.utils.module_loading import import_string
from kombu import Queue
from kombu.utils.objects import cached_property

from .. import broker
from ..broker.publishing import publish, separately, try_to_publish
from ..conf.verification import verify_module
from ..core.database import TEMPORARY_ERRORS
from ..core.headers import get_time
from ..core.logs import request_id
from .messages import MAX_NUMBER

logger = logging.getLogger(__name__)

broker.register_transports()

#: How many workers a task may lose, or processes of a worker, before it is given up.
MAX_LOSSES = 15

#: How long a stopping worker without running tasks may take to exit, in seconds.
STOP_TIMEOUT = 20


def get_failed_queue() -> str:
    """Return the name of the queue of failed tasks, which no worker consumes."""
    return f"{settings.CELERY_TASK_DEFAULT_QUEUE}.failed"


def get_command(app: Celery, name: str) -> tuple[Any, Any]:
    """Return a command of Celery, such as ``worker``, with the app's own options, and its context.

    Importing Celery's full command line also imports an interactive shell.
    """
    from celery.bin.base import CLIContext

    command = copy.copy(import_string(f"celery.bin.{name}.{name}"))
    options = app.user_options
    command.params = [*command.params, *options[name], *options["preload"]]
    # Celery's banners are for those who look for an error.
    quiet = settings.LOG_LEVEL != "DEBUG"
    return command, CLIContext(app=app, no_color=False, workdir=None, quiet=quiet)


def make_failed_queue(app: Celery) -> Queue:
    """Return the queue of failed tasks. Workers would consume ``app.amqp.queues[name]``."""
    return app.amqp.queues.new_missing(get_failed_queue())


class Task(DjangoTask[Any, Any]):
    """The base class of every task of the service.

    A task is tried again, up to three times, if the database is unavailable, read-only or ends its query;
    ``@shared_task(autoretry_for=())`` turns that off. With ``@shared_task(without_overlapping=True)``
    beat leaves out the runs of a schedule that are due while an earlier one waits or is running; with
    ``without_overlapping="wait"`` the last of these runs is queued when the earlier one has ended.
    https://docs.celeryq.dev/en/stable/userguide/tasks.html#automatic-retry-for-known-exceptions
    """

    coalesces = False
    without_overlapping: bool | Literal["wait"] = False
    max_losses: int | None = MAX_LOSSES
    Request = "prodserver_ops.worker.requests:Request"
    autoretry_for: tuple[type[Exception], ...] = TEMPORARY_ERRORS
    retry_backoff = 20  # Wait 20, 40 and 80 seconds.
    retry_jitter = False  # A shorter wait may be shorter than a failover.

    @classmethod
    def bind(cls, app: Celery) -> Celery:
        """Complete the time limits, and let ``start()`` run whatever ``before_start()`` does.

        With ``time_limit=3600`` alone, the soft limit is 60 seconds earlier.
        """
        own = cls.time_limit, cls.soft_time_limit
        super().bind(app)
        usual = get_usual_limits(app)
        # CELERY_TASK_ANNOTATIONS changes them too.
        both = zip(own, (cls.time_limit, cls.soft_time_limit), usual, strict=True)
        given = [None if before is None and now == default else now for before, now, default in both]
        if not find_faulty_limit(*given):
            cls.time_limit, cls.soft_time_limit = complete_limits(app, *given)
        if not hasattr(before_start := cls.before_start, "__wrapped__"):

            @wraps(before_start)
            def start(self: Task, task_id: str, *args: Any) -> None:
                self.start(task_id)
                before_start(self, task_id, *args)

            cls.before_start = start  # type: ignore[method-assign, assignment]
        return app

    def start(self, task_id: str) -> None:
        """Ignore a second message of the same run of a schedule, or of the same delayed task.

        A task that has lost too many workers is given up.
        """
        from ..scheduling.claims import claim
        from . import delayed, record

        values = vars(self.request)  # Headers are there too, but none with such a name.
        if "_is_started" in values:
            return  # The class and its base class are both tasks.
        values["_is_started"] = True
        if not (claim(self.request.headers or {}) and delayed.claim(self.request)):
            logger.info("%s ignored: the same run has already been started", self.name)
            # Celery would store a rejected task as failed.
            raise Ignore("started already")
        if (self.request.delivery_info or {}).get("redelivered"):
            losses = record.start_again(task_id)
            if self.max_losses is not None and losses >= self.max_losses:
                self.give_up(losses)

    def give_up(self, losses: int) -> None:
        """Put the running task into the queue of failed tasks instead; raise ``GivenUp``."""
        from . import record

        queue, info = make_failed_queue(self.app), self.request.delivery_info or {}
        source = [info.get("exchange"), info.get("routing_key")]
        signature = self.signature_from_request(
            queue=queue,  # type: ignore[arg-type]
            headers={**(self.request.headers or {}), "unknown_from": source},
            retries=self.request.retries,
        )
        try:
            with separately():
                signature.apply_async()
        except Exception as error:
            raise Reject(error, requeue=True) from error
        logger.error("%s has lost %d workers and is given up", self.name, losses)
        raise record.GivenUp(
            f"{record.GIVEN_UP} {losses} workers, and is in the queue {queue.name}"
        )

    def apply_async(  # type: ignore[override]
        self, args: Any = None, kwargs: Any = None, **options: Any
    ) -> Any:
        """Queue the task with a timestamp, so that a late worker knows when it was due.

        A request waits for the broker at most a second in total; then OperationalError is raised,
        and the task may still be queued later.
        """
        headers = options.pop("headers", None) or {}
        headers.setdefault("queued_at", timezone.now().isoformat())
        set_limits(self.app, options)
        options |= {"args": args, "kwargs": kwargs, "headers": headers}
        return publish_or_join(partial(super().apply_async, **options))

    def apply_many(self, arguments: Iterable[Any], **options: Any) -> None:
        """Queue the task once for each list of positional arguments, such as ``[(1,), (2,)]``.

        This is faster than calling ``apply_async()`` repeatedly, because the broker confirms the
        messages together. The options are those of ``apply_async()``. If OperationalError is
        raised, some messages may have been queued.
        """
        rows = list(arguments)

        def publish_all() -> None:
            with broker.open_batch(settings.CELERY_BROKER_URL, self.app) as producer:
                for args in rows:
                    self.apply_async(args, producer=producer, **options)

        if rows:
            publish_or_join(publish_all)

    def delay_on_commit(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> None:
        """Queue the task once the transaction is committed.

        If the broker is the database, the message belongs to the transaction. With other brokers
        it is published after the commit: if the process is killed in between, the task is lost, and
        if the broker is unavailable, an error is logged. Store data that must not be lost in the
        database, where a schedule can find it again.
        """
        if broker.joins_transaction(settings.CELERY_BROKER_URL):
            self.delay(*args, **kwargs)
            return

        def queue() -> None:
            try_to_publish(self.name, partial(self.delay, *args, **kwargs))

        transaction.on_commit(queue, robust=True)

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Queue the task again, as Celery does; return its message if the broker is unavailable.

        Celery would drop the message.
        """
        set_limits(self.app, kwargs)
        try:
            # The exception that it raises may end a transaction.
            with separately():
                return super().retry(*args, **kwargs)
        except Reject as error:
            raise Reject(error.args[0], requeue=True) from error

    def replace(self, sig: Any) -> Any:
        """Run another task in place of this one, as Celery does."""
        with separately():
            return super().replace(sig)

    @property
    def queued_at(self) -> datetime:
        """When the running task was queued; the current time if it was called directly."""
        headers = self.request.headers or {}
        timestamp = self.request.get("queued_at") or headers.get("queued_at")
        return get_time(timestamp) or timezone.now()


def get_usual_limits(app: Celery) -> tuple[Any, Any]:
    """Return the time limit and the soft time limit of tasks that have none of their own."""
    return app.conf.task_time_limit, app.conf.task_soft_time_limit


def find_faulty_limit(hard: Any, soft: Any) -> str:
    """Return what is wrong with the time limits of a task, or an empty string."""
    for name, value in (("time_limit", hard), ("soft_time_limit", soft)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value <= MAX_NUMBER):
            return f"{name} must be a positive number of seconds, not {value!r}"
    if hard and soft and soft > hard:
        return f"soft_time_limit is {soft:g} s, which is longer than time_limit, {hard:g} s"
    return ""


def complete_limits(app: Celery, hard: Any, soft: Any) -> tuple[Any, Any]:
    """Return the time limits of a task; the one that is missing follows the other."""
    usual_hard, usual_soft = get_usual_limits(app)
    if not usual_hard or not usual_soft or usual_soft > usual_hard:
        return hard or usual_hard, soft or usual_soft
    if hard is None and soft is None:
        return usual_hard, usual_soft
    margin = usual_hard - usual_soft
    if hard is None:
        return max(usual_hard, soft + margin), soft
    # At most the same part of it.
    return hard, soft or max(hard - margin, hard * usual_soft / usual_hard)


def set_limits(app: Celery, options: dict[str, Any]) -> None:
    """Complete the time limits among the options of a message, if there are any."""
    hard, soft = options.get("time_limit"), options.get("soft_time_limit")
    if problem := find_faulty_limit(hard, soft):
        raise ValueError(problem)
    if (hard, soft) != (None, None):
        hard, soft = complete_limits(app, hard, soft)
        options |= {"time_limit": hard, "soft_time_limit": soft}


def publish_or_join(function: Callable[[], Any]) -> Any:
    """Run a function that publishes messages, in the current transaction if they belong to it."""
    joined = broker.joins_transaction(settings.CELERY_BROKER_URL)
    return function() if joined else publish(function)


class CoalescingTask(Task):
    """A task that beat does not queue while an earlier run is waiting in the queue.

    Use ``@shared_task(base=CoalescingTask)`` for tasks that process all pending work whenever they
    run, so that they do not accumulate while no worker is running.
    """

    coalesces = True


class Control(control.Control):
    """Remote control that also cancels tasks that are not due."""

    def revoke(self, task_id: Any, *args: Any, **kwargs: Any) -> Any:
        """Let no worker run tasks, by an id or a list of ids."""
        from . import delayed

        ids = [task_id] if isinstance(task_id, str) else list(task_id)
        # First note them, for a worker that stores one at this moment.
        delayed.revoke_later(ids)
        delayed.revoke(ids)
        return super().revoke(task_id, *args, **kwargs)


class Queues(amqp.Queues):
    """The queues of an app, which Celery adds to when a message names an unknown one."""

    def __missing__(self, name: str) -> Any:
        """Add a queue; log an error, once, if no process consumes it."""
        from ..scheduling.queues import get_consumed

        if name not in get_consumed():
            logger.error(
                "A message is sent to the queue %s, which no process consumes: correct its name, or add "
                "it to QUEUES in the settings. For a queue of another service, send it to "
                "kombu.Queue(%r).",
                name,
                name,
            )
        return super().__missing__(name)


class AMQP(amqp.AMQP):
    """The messages of an app."""

    queues_cls = Queues


def detect_quorum_queues(app: Celery, driver_type: str) -> tuple[bool, str]:
    """Return that messages of a ``CeleryApp`` are not delayed by RabbitMQ.

    Its workers store tasks that are not due.
    """
    if isinstance(app, CeleryApp):
        return False, ""
    found: tuple[bool, str] = quorum_queues.detect_quorum_queues(app, driver_type)
    return found


# Celery calls it for each message that has a delay.
celery.app.base.detect_quorum_queues = detect_quorum_queues  # type: ignore[attr-defined]

_apply_chord = canvas.chord.apply_async


def apply_chord(chord: Any, *args: Any, **options: Any) -> Any:
    """Queue a chord; tests that run tasks at once get the error of a service without results too."""
    app = chord.app
    if app.conf.task_always_eager:
        app.backend.ensure_chords_allowed()
    return _apply_chord(chord, *args, **options)


canvas.chord.apply_async = apply_chord  # type: ignore[assignment, method-assign]

#: Tasks with e-mail, which have their own queue unless the service has a route for them.
MAIL_TASKS = ("ops.send_digest_chunk", "ops.send_notification")


class CeleryApp(Celery):
    """A Celery app with the task class, the transports and the beat of this package."""

    task_cls: Any = Task
    amqp_cls: Any = AMQP
    control_cls: Any = Control

    def on_init(self) -> None:
        """Complete the settings once they have been read."""
        self.on_after_configure.connect(add_routes)

    @cached_property
    def Beat(self) -> Any:
        """The class that ``celery beat`` runs."""
        django.setup()  # Celery's command does this later.
        from ..scheduling.beat import Beat

        return self.subclass_with_self(Beat)

    @cached_property
    def AsyncResult(self) -> Any:
        """The class of the result of a task."""
        from .results import Result

        return self.subclass_with_self(Result)

    def _get_backend(self) -> Any:
        from .results import make_reliable

        name = self.backend_cls or self.conf.result_backend
        found: Any = backends.by_url(name, self.loader)
        backend, url = found
        return make_reliable(backend)(app=self, url=url)

    def send_task(self, name: str, *args: Any, headers: Any = None, **options: Any) -> Any:
        """Queue a task by name, with the id of the request that it belongs to."""
        if options.get("task_type") is None:
            set_limits(self, options)
        if current_id := request_id.get():
            headers = {"request_id": current_id, **(headers or {})}
        return super().send_task(name, *args, headers=headers, **options)

    def _connection(self, url: Any, **kwargs: Any) -> Any:
        # Celery prefers the environment variable CELERY_BROKER_URL to the setting.
        if isinstance(url, str):
            url = broker.get_url(url)
        return super()._connection(url, **kwargs)  # type: ignore[misc]

    def start(self, argv: list[str] | None = None) -> None:  # type: ignore[override]
        """Run a command of Celery, such as ``worker``; exit with its status if it fails.

        Celery's own method ignores the status of a worker that ends with an error.
        """
        name, *arguments = argv or ["worker"]
        # Each deploy runs the system checks; here they would load the URLs and the API.
        os.environ.setdefault("CELERY_SKIP_CHECKS", "1")
        command, context = get_command(self, name)
        status = command.main(arguments, prog_name=name, obj=context, standalone_mode=False)
        if status:
            sys.exit(status)


def add_routes(sender: Celery, **kwargs: Any) -> None:
    """Add the routes of this package after those of the service; Celery uses the first that fits."""
    routes = sender.conf.task_routes or []
    mail = {"queue": f"{settings.PACKAGE}.mail"}
    is_list = isinstance(routes, list | tuple)
    sender.conf.task_routes = [*(routes if is_list else [routes]), dict.fromkeys(MAIL_TASKS, mail)]


@signals.beat_init.connect
def prepare_beat(sender: Any, **kwargs: Any) -> None:
    """Prepare beat, however it was started."""
    from ..scheduling import beat

    verify_module()
    beat.prepare(sender)


@signals.worker_init.connect
def prepare_worker(**kwargs: Any) -> None:
    """Verify the settings of a worker, however it was started, and prepare its pool."""
    from . import pool

    verify_module()
    pool.install()


@signals.setup_logging.connect
def keep_django_logging(**kwargs: Any) -> None:
    """Prevent Celery from replacing the handlers that ``LOGGING`` configures.

    Celery leaves logging alone as soon as this signal has a receiver.
    """


@signals.task_prerun.connect
def reset_activated(task: Any, **kwargs: Any) -> None:
    """Let no task inherit a language or a time zone that an earlier one has activated."""
    if not task.request.is_eager:
        translation.deactivate()
        timezone.deactivate()


@signals.task_postrun.connect
def end_run(task: Any, state: str | None, **kwargs: Any) -> None:
    """Let the next run of a schedule start, if they must not overlap."""
    from ..scheduling.claims import finish

    # An exception is on its way if the task runs again.
    has_ended = state in (SUCCESS, FAILURE) and sys.exception() is None
    if has_ended and getattr(task, "without_overlapping", False):
        finish(task.request.headers or {})


@signals.worker_before_create_process.connect
def share_memory(**kwargs: Any) -> None:
    """Let a worker and its child processes share the memory of loaded objects.

    Each process gets a copy of the memory that the garbage collector writes to, or that is freed
    and reused.
    https://docs.python.org/3/library/gc.html#gc.freeze
    """
    gc.freeze()


@signals.worker_shutting_down.connect
def log_shutdown(how: str, **kwargs: Any) -> None:
    """Log whether the worker finishes its tasks first (warm shutdown) or not (cold)."""
    logger.info("%s shutdown", how)
    threading.Thread(target=end_when_idle, daemon=True).start()


def end_when_idle() -> None:
    """Exit if no task has run for ``STOP_TIMEOUT``.

    A broker may block the worker. A worker on PGMQ also waits for a task whose process was lost.
    """
    from celery.worker import state

    since = time.monotonic()
    while time.monotonic() - since < STOP_TIMEOUT:
        time.sleep(1)
        if any(has_process(request) for request in tuple(state.active_requests)):
            since = time.monotonic()
    logger.warning(
        "The worker exits: the broker does not respond, or the process of a task was lost (%s)",
        get_place(threading.main_thread()),
    )
    logging.shutdown()
    os._exit(1)


def get_place(thread: threading.Thread) -> str:
    """Return the functions that a thread is in, the innermost first."""
    stack = traceback.extract_stack(sys._current_frames()[thread.ident or 0])
    names = [f"{frame.name} in {Path(frame.filename).name}:{frame.lineno}" for frame in stack]
    return ", ".join(names[:-9:-1])


def has_process(request: Any) -> bool:
    """Return whether the process of a task has not started yet, or is alive."""
    try:
        if request.worker_pid is not None:
            os.kill(request.worker_pid, 0)
    except ProcessLookupError:
        return False
    return True
