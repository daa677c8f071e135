"""Settings of Flower, which shows workers and tasks.

https://flower.readthedocs.io/
"""

from typing import Any

from .defaults import ProductionProcessDefaults
from .environment import RedactedError, env, expects, integer, or_empty, port

#: Minimum length of the password.
PASSWORD_LENGTH = 16


@expects(f"NAME:PASSWORD without commas, with a password of {PASSWORD_LENGTH} characters or more")
def account(text: str) -> str:
    """Return the name and password of an account, separated by a colon.

    Flower would split them at a comma into several accounts.
    """
    name, _, password = text.partition(":")
    if not name or len(password) < PASSWORD_LENGTH or "," in text:
        raise RedactedError("an invalid account")
    return text


class Defaults:
    """The settings of Flower."""

    FLOWER_PORT = env(5555, cast=or_empty(port, 5555))
    FLOWER_MAX_TASKS = env(10_000, cast=integer(1))

    # Name and password of the only account; in development no login is required
    @env(cast=or_empty(account))
    def FLOWER_BASIC_AUTH(self) -> str:
        if isinstance(self, ProductionProcessDefaults):
            required: str = env(env.Required, key="FLOWER_BASIC_AUTH", cast=account)()
            return required
        return ""

    # Workers send events about each task.
    CELERY_WORKER_SEND_TASK_EVENTS = True
    CELERY_TASK_SEND_SENT_EVENT = True


def get_process(settings: Any) -> dict[str, Any]:
    """Return the entry of Flower in ``PRODUCTION_PROCESSES``."""
    return {
        "BACKEND": "prodserver_ops.web.flower.Flower",
        "APP": f"{settings.PACKAGE}.celery_app",
        "ARGS": {
            "address": settings.BIND_HOST,
            "port": settings.FLOWER_PORT,
            "max_tasks": settings.FLOWER_MAX_TASKS,
        },
    }
