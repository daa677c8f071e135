"""uvicorn as a process of django-prodserver."""

import signal
import sys

import uvicorn

from .servers import PythonServer


class Server(PythonServer):
    """The backend; ``ARGS`` are arguments of ``uvicorn.run()``."""

    fixed_arguments = {
        "interface": "asgi3",
        "lifespan": "off",
        # Logs go to the handlers of LOGGING; core/logs.py logs the requests.
        "log_config": None,
        "access_log": False,
        # Django reads the headers of the proxies itself: see PROXY_COUNT.
        "proxy_headers": False,
        "server_header": False,
    }
    address_argument, other_addresses = "host", frozenset({"uds", "fd"})

    def start_server(self, *args: str) -> None:
        """Serve until SIGTERM or SIGINT."""
        # uvicorn sends the signal again after it has stopped.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit())
        uvicorn.run(self.application, **self.arguments)

    def check_arguments(self) -> None:
        """Raise an exception for arguments that uvicorn would reject."""
        self.check_signature(uvicorn.run)
        uvicorn.Config("", **self.arguments)
