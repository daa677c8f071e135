"""The base class of the backends of Granian and uvicorn.

django-prodserver's own backends use a command line, which cannot configure the logs or, for
Granian, the time limit for stopping.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

from django.apps import apps
from django.conf import settings
from django.contrib.staticfiles.storage import staticfiles_storage
from django.core.management import CommandError
from django_prodserver.backends.base import BaseServerBackend

logger = logging.getLogger(__name__)


def port_in_use(port: int, variable: str = "PORT") -> CommandError:
    """Return the error for a port that another process uses."""
    return CommandError(
        f"Port {port} is already in use. "
        f"Stop the process that uses it, or set {variable} to another port."
    )


def warn_about_static_files() -> None:
    """Log one line if the pages have no styles, because no static files were collected."""
    if not apps.is_installed("django.contrib.staticfiles"):
        return
    if getattr(staticfiles_storage, "hashed_files", None) == {}:
        logger.warning("Pages have no styles. Run: python manage.py collectstatic")


class PythonServer(BaseServerBackend):
    """A web server that is a Python function; ``ARGS`` are its arguments."""

    #: Arguments that are the same in every service, by name.
    fixed_arguments: dict[str, Any]

    #: The argument with the address, and those that replace address and port.
    address_argument: str
    other_addresses: frozenset[str]

    def __init__(self, **process: Any) -> None:
        super().__init__(**process)
        self.arguments = self.fixed_arguments | process.get("ARGS", {})

    @property
    def application(self) -> str:
        """The ASGI application in the form that these servers expect, ``module:name``."""
        return ":".join(settings.ASGI_APPLICATION.rsplit(".", 1))

    def get_address(self) -> tuple[str, int] | None:
        """Return host and port, or None if the server does not listen on a port."""
        if self.arguments.keys() & self.other_addresses or "port" not in self.arguments:
            return None
        return self.arguments.get(self.address_argument, "127.0.0.1"), self.arguments["port"]

    def check_signature(self, function: Callable[..., Any]) -> None:
        """Raise an exception for arguments that the function does not take."""
        inspect.signature(function).bind("", **self.arguments)
        for name in ("port", "workers"):
            if not isinstance(self.arguments.get(name, 1), int):
                raise ValueError(f"{name}: {self.arguments[name]!r} is not an integer")
