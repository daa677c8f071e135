"""What the backends of the web servers share."""

from typing import Any


def check_integers(arguments: dict[str, Any]) -> None:
    """Raise ValueError if the port or the number of workers is not an integer."""
    for name in ("port", "workers"):
        if not isinstance(arguments.get(name, 1), int):
            raise ValueError(f"{name}: {arguments[name]!r} is not an integer")
