"""A wrapper of the ASGI application that configures logs and limits concurrent requests.

Django runs each request to a synchronous view in its own thread. Without a limit, a burst of
requests would open as many database connections.
"""

import asyncio
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

from django.conf import settings
from django.db import connections

from ..core import logs
from ..core.urls import get_path
from ..scheduling.heartbeats import start_web_heartbeat

# WhiteNoise sends files with synchronous iterators; the files are small.
warnings.filterwarnings("ignore", "StreamingHttpResponse must consume synchronous iterators")


class LimitedApplication:
    """Runs up to ``WEB_THREADS`` requests at a time; health checks do not count."""

    def __init__(self, application: Callable[..., Awaitable[None]]) -> None:
        logs.configure("web")  # The server's processes may not inherit it.
        # Requests do not share threads, so connections cannot be reused.
        for database in connections.settings.values():
            database["CONN_MAX_AGE"] = 0
        self.application = application
        start_web_heartbeat()
        self.free = asyncio.Semaphore(settings.WEB_THREADS)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle a connection."""
        if scope["type"] != "http" or get_path(scope["path"]).startswith("/health/"):
            await self.application(scope, receive, send)
            return
        async with self.free:
            await self.application(scope, receive, send)
