"""The ASGI application for WebSockets."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from json import JSONDecodeError
from types import SimpleNamespace
from typing import Any

from channels.auth import AuthMiddlewareStack
from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.routing import URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.contrib.auth import get_user
from django.db import DatabaseError
from django.urls import re_path
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

#: Close codes: the client may connect again later, has sent invalid data, or has other permissions.
#: https://www.iana.org/assignments/websocket/websocket.xhtml
TRY_AGAIN_LATER, INVALID_DATA, POLICY_VIOLATION = 1013, 1007, 1008

#: How often the user of an idle connection is checked, in seconds.
INTERVAL = 60

type Application = Callable[[Any, Any, Any], Awaitable[None]]


class UnknownPath(AsyncWebsocketConsumer):
    """Rejects a connection."""

    async def connect(self) -> None:
        """Close it with a 403."""
        await self.close()


class ErrorMiddleware:
    """Closes a WebSocket whose client sends invalid frames, or if a server is unavailable."""

    def __init__(self, application: Application) -> None:
        self.application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application; log these errors as one line."""
        try:
            await self.application(scope, receive, send)
            return
        except (RedisError, DatabaseError) as error:
            server = "Redis" if isinstance(error, RedisError) else "the database"
            code, problem = TRY_AGAIN_LATER, f"{server} is unavailable: {type(error).__name__}"
        except (ValueError, RecursionError) as error:
            if not is_invalid_frame(error):
                raise
            code, problem = INVALID_DATA, f"invalid frame: {type(error).__name__}"
        logger.warning("WebSocket closed, %s", problem)
        with suppress(OSError, RuntimeError):  # The client may be gone.
            await send({"type": "websocket.close", "code": code})


def is_invalid_frame(error: Exception) -> bool:
    """Return whether a consumer could not decode a frame: binary data, invalid or nested JSON."""
    decoding = isinstance(error, JSONDecodeError | UnicodeError | RecursionError)
    return decoding or str(error).startswith("No text section")


class AccessMiddleware:
    """Closes a WebSocket when its user logs out, is deactivated, or has other permissions.

    This is checked before each message, and every ``INTERVAL``. The client may connect again, and
    the consumer decides again. Connections without a user are not checked.
    """

    def __init__(self, application: Application) -> None:
        self.application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application."""
        access = await get_access(scope)
        if access is None:
            await self.application(scope, receive, send)
            return
        closed = False

        async def close(code: int) -> None:
            nonlocal closed
            closed = True
            await send({"type": "websocket.close", "code": code})

        async def is_open() -> bool:
            if not closed and await get_access(scope) != access and not closed:
                await close(POLICY_VIOLATION)
            return not closed

        async def checked_send(message: Any) -> None:
            nonlocal closed
            if message["type"] != "websocket.send" or await is_open():
                closed = closed or message["type"] == "websocket.close"
                await send(message)

        async def checked_receive() -> Any:
            nonlocal closed
            message = await receive()
            if message["type"] == "websocket.receive" and not await is_open():
                return {"type": "websocket.disconnect", "code": POLICY_VIOLATION}
            closed = closed or message["type"] == "websocket.disconnect"
            return message

        async def watch() -> None:
            try:
                while await is_open():
                    await asyncio.sleep(INTERVAL)
            except DatabaseError:
                await close(TRY_AGAIN_LATER)

        watcher = asyncio.create_task(watch())
        try:
            await self.application(scope, checked_receive, checked_send)
        finally:
            watcher.cancel()


@database_sync_to_async
def get_access(scope: Any) -> Any:
    """Return the user of a session and their permissions now, or None if nobody is logged in."""
    session = scope["session"]
    if session.session_key is None:
        return None
    # The object in the scope keeps what it has read.
    stored: Any = SimpleNamespace(session=session.__class__(session.session_key))
    user: Any = get_user(stored)
    if not user.is_authenticated:
        return None
    return user.pk, user.is_staff, user.is_superuser, user.get_all_permissions()


def get_websocket_application(urlpatterns: list[Any]) -> Any:
    """Return an application that serves these paths to pages of ``ALLOWED_HOSTS``.

    ``scope["user"]`` is the user of the session. Connections to other paths are rejected.
    """
    unknown: Any = UnknownPath.as_asgi()
    routes: list[Any] = [*urlpatterns, re_path("", unknown)]
    consumers = AccessMiddleware(URLRouter(routes))
    return ErrorMiddleware(AllowedHostsOriginValidator(AuthMiddlewareStack(consumers)))
