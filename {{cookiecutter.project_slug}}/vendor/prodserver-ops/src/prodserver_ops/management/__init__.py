"""Management commands, and the function that runs one of them for ``manage.py``."""

from django.core import management

from ..core import mistakes


def execute_from_command_line(argv: list[str]) -> None:
    """Run a command as Django does, but keep a process that reloads while its settings fail."""
    mistakes.install()
    management.execute_from_command_line(argv)
