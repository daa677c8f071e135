"""A management command as a process of the service, such as a consumer or a loop."""

from typing import Any

from django.core.management import call_command, get_commands
from django_prodserver.backends.base import BaseWorkerBackend


class Command(BaseWorkerBackend):
    """The backend; ``ARGS`` are options of the management command ``COMMAND``.

    SIGTERM ends the command with SystemExit, wherever it is.
    """

    def __init__(self, **process: Any) -> None:
        super().__init__(**process)
        self.name: str = process.get("COMMAND", "")

    def start_server(self, *args: str) -> None:
        """Run the command until it ends."""
        call_command(self.name, *args)

    def check_arguments(self) -> None:
        """Raise ValueError if there is no such command."""
        if self.name not in get_commands():
            raise ValueError(f"COMMAND {self.name!r} is not a management command")
