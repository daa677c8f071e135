"""The addresses of a running service in development, and how to sign in."""

import socket
from contextlib import suppress
from os import kill
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.urls import NoReverseMatch, reverse

from ..core.commands import get_line
from ..core.urls import make_absolute
from ..models import Heartbeat
from ..scheduling import heartbeats

#: The pages that a service may have: the name of the URL by label.
PAGES = {
    "Home": "home",
    "API": "docs",
    "Admin": "admin:index",
    "Operations": "admin:ops_operations",
    "E-mails": "emails",
}


def get_pages() -> dict[str, str]:
    """Return the absolute URLs of the pages that the service has, by label."""
    pages = {}
    for label, name in PAGES.items():
        with suppress(NoReverseMatch):
            pages[label] = make_absolute(reverse(name))
    return pages or {"Home": settings.SITE_URL}


def get_administrator() -> str | None:
    """Return the name of the first administrator who can sign in, or None."""
    users = get_user_model()._default_manager.filter(is_superuser=True, is_active=True)
    first: Any = users.order_by("pk").first()
    return None if first is None else first.get_username()


def count_unapplied() -> int:
    """Return the number of migrations that are not applied."""
    executor = MigrationExecutor(connection)
    return len(executor.migration_plan(executor.loader.graph.leaf_nodes()))


def runs_here(row: Heartbeat) -> bool:
    """Return whether the process of a heartbeat runs, as far as this host knows.

    A process that was killed keeps its heartbeat.
    """
    if row.host != socket.gethostname():
        return row.is_alive
    try:
        kill(row.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return row.is_alive


def get_missing() -> list[str]:
    """Return the names of the processes that are not running; web is not among them."""
    running = {row.process for row in heartbeats.get_heartbeats() if runs_here(row)}
    return [name for name in heartbeats.get_processes() if name not in running]


def describe(missing: list[str]) -> str:
    """Return the addresses of the service, how to sign in, and what does not run."""
    running = [name for name in settings.PRODUCTION_PROCESSES if name not in missing]
    lines = [f"{settings.SITE_NAME} runs: {', '.join(running)}"]
    lines += [f"  {label + ':':<12} {url}" for label, url in get_pages().items()]
    if name := get_administrator():
        lines.append(f"  {'Sign in:':<12} as {name}")
    else:
        lines.append(f"  {'Sign in:':<12} create a user: {get_line('createsuperuser')}")
    lines += [f"  Not running: {name}: {get_line(f'prodserver {name} --reload')}" for name in missing]
    return "\n".join(lines)
