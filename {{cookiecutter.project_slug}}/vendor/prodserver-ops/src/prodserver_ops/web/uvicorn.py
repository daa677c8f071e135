"""uvicorn as a process of django-prodserver.

django-prodserver's own backend takes a command line, which cannot leave logs alone.
"""

import inspect
import signal
import sys
from typing import Any

import uvicorn
from django.conf import settings
from django_prodserver.backends.base import BaseServerBackend

from .servers import check_integers

#: Arguments that are the same in every service, by name.
FIXED_ARGUMENTS: dict[str, Any] = {
    "interface": "asgi3",
    "lifespan": "off",
    # Logs go to the handlers of LOGGING; core/logs.py logs the requests.
    "log_config": None,
    "access_log": False,
    # Django reads the headers of the proxies itself: see PROXY_COUNT.
    "proxy_headers": False,
    "server_header": False,
}


class Server(BaseServerBackend):
    """The backend; ``ARGS`` are arguments of ``uvicorn.run()``."""

    def __init__(self, **process: Any) -> None:
        super().__init__(**process)
        self.arguments = FIXED_ARGUMENTS | process.get("ARGS", {})

    def start_server(self, *args: str) -> None:
        """Serve until SIGTERM or SIGINT."""
        # uvicorn sends the signal again after it has stopped.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit())
        module, _, name = settings.ASGI_APPLICATION.rpartition(".")
        uvicorn.run(f"{module}:{name}", **self.arguments)

    def get_address(self) -> tuple[str, int] | None:
        """Return host and port; None if it listens on neither."""
        if self.arguments.keys() & {"uds", "fd"} or "port" not in self.arguments:
            return None
        return self.arguments.get("host", "127.0.0.1"), self.arguments["port"]

    def check_arguments(self) -> None:
        """Raise an exception for arguments that uvicorn would reject."""
        inspect.signature(uvicorn.run).bind("", **self.arguments)
        check_integers(self.arguments)
        uvicorn.Config("", **self.arguments)
