"""What the ASGI application of the service runs in: logs, and a limit of requests.

Django runs each request of a synchronous view in a thread of its own. Without a limit, a
burst of requests would need as many connections to the database.
"""

import asyncio
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

from django.conf import settings
from django.db import connections

from ..core import logs
from ..scheduling.heartbeats import start_web_heartbeat

# WhiteNoise sends files with synchronous iterators; the files are small.
warnings.filterwarnings("ignore", "StreamingHttpResponse must consume synchronous iterators")


class LimitedApplication:
    """Runs ``WEB_THREADS`` requests at a time, and more for health checks only."""

    def __init__(self, application: Callable[..., Awaitable[None]]) -> None:
        logs.configure("web")  # A process of the server may not inherit this.
        # Requests do not share threads, so no connection can be kept for the next one.
        for database in connections.settings.values():
            database["CONN_MAX_AGE"] = 0
        self.application = application
        start_web_heartbeat()
        self.free = asyncio.Semaphore(settings.WEB_THREADS)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle a connection."""
        if scope["type"] != "http" or scope["path"].startswith("/health/"):
            await self.application(scope, receive, send)
            return
        async with self.free:
            await self.application(scope, receive, send)
