"""Granian as a process of django-prodserver."""

from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels

from .servers import PythonServer


class Server(PythonServer):
    """The backend; ``ARGS`` are arguments of ``granian.Granian()``."""

    fixed_arguments = {
        "interface": Interfaces.ASGINL,
        # Logs go to the handlers of LOGGING; core/logs.py logs the requests.
        "log_dictconfig": {"incremental": True, "handlers": {}, "loggers": {}},
        "log_access": False,
        "respawn_failed_workers": True,
    }
    address_argument, other_addresses = "address", frozenset({"uds"})

    def start_server(self, *args: str) -> None:
        """Serve until SIGTERM or SIGINT."""
        arguments = self.arguments | {"log_level": LogLevels(self.arguments["log_level"])}
        Granian(self.application, **arguments).serve()

    def check_arguments(self) -> None:
        """Raise an exception for arguments that Granian would reject."""
        self.check_signature(Granian)
        LogLevels(self.arguments.get("log_level", "info"))
