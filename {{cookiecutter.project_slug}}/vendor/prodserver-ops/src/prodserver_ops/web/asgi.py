"""A wrapper of the ASGI application that configures logs and limits requests.

Django runs each request to a synchronous view in its own thread. Without a limit, a burst of
requests would open as many database connections. Django also stores each body before anything can
reject the request, and does not limit a body without Content-Length at all.
"""

import asyncio
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

from django.conf import settings
from django.db import connections
from django.urls import get_resolver

from ..core import logs
from ..core.urls import get_path
from ..scheduling.heartbeats import start_web_heartbeat
from . import uploads

# WhiteNoise sends files with synchronous iterators; the files are small.
warnings.filterwarnings("ignore", "StreamingHttpResponse must consume synchronous iterators")


class LimitedApplication:
    """Runs up to ``WEB_THREADS`` requests at a time; health checks do not count.

    A request counts as soon as its body has arrived, so that slow clients do not block others.
    """

    def __init__(self, application: Callable[..., Awaitable[None]]) -> None:
        logs.configure("web")  # The server's processes may not inherit it.
        # Requests do not share threads, so connections cannot be reused.
        for database in connections.settings.values():
            database["CONN_MAX_AGE"] = 0
        self.application = application
        get_resolver().url_patterns  # noqa: B018  (Views say how large an upload may be.)
        start_web_heartbeat()
        self.free = asyncio.Semaphore(settings.WEB_THREADS)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        if scope["method"] == "CONNECT":  # uvicorn fails to send a body after status 200.
            await reject(send, 405)
            return
        # Django reads the headers after the body.
        scope = scope | {"headers": list(scope["headers"])}
        limit = uploads.get_largest()
        counts = not get_path(scope["path"]).startswith("/health/")
        size, has_slot, is_complete = 0, False, False

        async def limited_receive() -> Any:
            nonlocal size, has_slot, is_complete
            message = await receive()
            if is_complete or message["type"] != "http.request":
                return message
            size += len(message.get("body", b""))
            if size > limit:
                return {"type": "http.disconnect"}  # Django deletes what it has stored.
            if message.get("more_body"):
                return message
            is_complete = True
            if not any(name == b"content-length" for name, _ in scope["headers"]):
                scope["headers"].append((b"content-length", str(size).encode()))
            if counts:
                await self.free.acquire()
                has_slot = True
            return message

        try:
            await self.application(scope, limited_receive, send)
        finally:
            if has_slot:
                self.free.release()
        if size > limit:
            await reject(send, 413)


async def reject(send: Any, status: int) -> None:
    """Send a response without a text, and close the connection."""
    headers = [(b"connection", b"close"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body"})
