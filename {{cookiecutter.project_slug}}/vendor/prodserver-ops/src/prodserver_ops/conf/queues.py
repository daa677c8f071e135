"""The queue ``high``, which has its own worker process."""

from typing import Any

from kombu import Queue

from . import processes
from .defaults import computed


class Defaults:
    """The settings of the queue."""

    #: Names of the tasks that use the queue; ``*`` matches any part of a name.
    HIGH_TASKS = ["ops.send_notification"]

    @computed
    def HIGH_QUEUE(self) -> str:
        return f"{self.PACKAGE}.high"  # type: ignore[attr-defined]

    @computed
    def CELERY_TASK_QUEUES(self) -> list[Queue]:
        queues: list[Queue] = super().CELERY_TASK_QUEUES()  # type: ignore[misc]
        return [*queues, self.make_queue(self.HIGH_QUEUE)]  # type: ignore[attr-defined]

    @computed
    def CELERY_TASK_ROUTES(self) -> dict[str, Any]:
        routes: dict[str, Any] = super().CELERY_TASK_ROUTES()  # type: ignore[misc]
        return routes | {name: {"queue": self.HIGH_QUEUE} for name in self.HIGH_TASKS}


def get_process(settings: Any) -> dict[str, Any]:
    """Return the entry of the queue's worker in ``PRODUCTION_PROCESSES``."""
    return processes.worker(settings, queues=settings.HIGH_QUEUE, hostname="celery@%h.high")
