"""The tasks that a worker has received."""

from typing import Any

from celery.worker import request


class TaskMemoryError(Exception):
    """A task raised MemoryError."""


class Request(request.Request):
    """A request whose task may raise MemoryError.

    Celery would end the worker, and each next one that receives the same message.
    """

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> None:
        """Handle the failure of the task, in the main process."""
        # Billiard may have put it into another one.
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, MemoryError):
            exc_info.exception = TaskMemoryError(str(error))
        super().on_failure(exc_info, *args, **kwargs)
