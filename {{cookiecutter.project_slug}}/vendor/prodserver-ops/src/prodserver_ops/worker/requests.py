"""The tasks that a worker has received."""

from typing import Any

from celery.worker import request

from .record import TaskExit


class TaskMemoryError(Exception):
    """A task raised MemoryError."""


class Request(request.Request):
    """A request whose task fails if it runs out of memory, or exits.

    Celery would end the worker in the first case, and run the task again for ever in the second.
    """

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> None:
        """Handle the failure of the task, in the main process."""
        # Billiard may have put it into another one.
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, MemoryError):
            exc_info.exception = TaskMemoryError(str(error))
        elif isinstance(error, SystemExit | KeyboardInterrupt):
            request: Any = self
            if not (request._already_cancelled or request._already_revoked):
                exc_info.exception = TaskExit(repr(error))
        super().on_failure(exc_info, *args, **kwargs)
