"""Granian as a process of django-prodserver.

django-prodserver's own backend knows neither the logs nor the time limit for a stop.
"""

import inspect
from typing import Any

from django.conf import settings
from django_prodserver.backends.base import BaseServerBackend
from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels

from .servers import check_integers

#: Arguments that are the same in every service, by name.
FIXED_ARGUMENTS: dict[str, Any] = {
    "interface": Interfaces.ASGINL,
    # Logs go to the handlers of LOGGING; core/logs.py logs the requests.
    "log_dictconfig": {"incremental": True, "handlers": {}, "loggers": {}},
    "log_access": False,
    "respawn_failed_workers": True,
}


class Server(BaseServerBackend):
    """The backend; ``ARGS`` are arguments of ``granian.Granian()``."""

    def __init__(self, **process: Any) -> None:
        super().__init__(**process)
        self.arguments = FIXED_ARGUMENTS | process.get("ARGS", {})

    def start_server(self, *args: str) -> None:
        """Serve until SIGTERM or SIGINT."""
        module, _, name = settings.ASGI_APPLICATION.rpartition(".")
        arguments = self.arguments | {"log_level": LogLevels(self.arguments["log_level"])}
        Granian(f"{module}:{name}", **arguments).serve()

    def get_address(self) -> tuple[str, int] | None:
        """Return host and port; None if it listens on neither."""
        if self.arguments.keys() & {"uds"} or "port" not in self.arguments:
            return None
        return self.arguments.get("address", "127.0.0.1"), self.arguments["port"]

    def check_arguments(self) -> None:
        """Raise an exception for arguments that Granian would reject."""
        inspect.signature(Granian).bind("", **self.arguments)
        LogLevels(self.arguments.get("log_level", "info"))
        check_integers(self.arguments)
