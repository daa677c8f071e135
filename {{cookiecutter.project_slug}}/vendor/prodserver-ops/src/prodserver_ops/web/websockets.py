"""The ASGI application for WebSockets."""

import logging
from contextlib import suppress
from typing import Any

from channels.auth import AuthMiddlewareStack
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.routing import URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.urls import re_path
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

#: The close code that tells a client to connect again later.
#: https://www.iana.org/assignments/websocket/websocket.xhtml
TRY_AGAIN_LATER = 1013


class UnknownPath(AsyncWebsocketConsumer):
    """Rejects a connection."""

    async def connect(self) -> None:
        """Close it with a 403."""
        await self.close()


class RedisErrorMiddleware:
    """Closes a WebSocket if Redis is unavailable; its page reconnects."""

    def __init__(self, application: Any) -> None:
        self.application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application; log a Redis error as one line."""
        try:
            await self.application(scope, receive, send)
        except RedisError as error:
            logger.warning("WebSocket closed, Redis is unavailable: %s", type(error).__name__)
            with suppress(OSError, RuntimeError):  # The client may be gone.
                await send({"type": "websocket.close", "code": TRY_AGAIN_LATER})


def get_websocket_application(urlpatterns: list[Any]) -> Any:
    """Return an application that serves these paths to pages of ``ALLOWED_HOSTS``.

    ``scope["user"]`` is the user of the session. Connections to other paths are rejected.
    """
    unknown: Any = UnknownPath.as_asgi()
    routes: list[Any] = [*urlpatterns, re_path("", unknown)]
    return RedisErrorMiddleware(AllowedHostsOriginValidator(AuthMiddlewareStack(URLRouter(routes))))
