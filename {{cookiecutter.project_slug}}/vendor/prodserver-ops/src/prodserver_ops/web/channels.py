"""Send messages from any process to the consumers of a group, through Channels."""

import asyncio
import logging
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer

logger = logging.getLogger(__name__)

#: How long a request waits for Redis, in seconds.
TIMEOUT = 1


def send_to_group(group: str, message: dict[str, Any]) -> None:
    """Send a message to the consumers of a group; log an error if Redis is unavailable."""

    async def send() -> None:
        async with asyncio.timeout(TIMEOUT):
            layer: Any = get_channel_layer()
            await layer.group_send(group, message)

    try:
        async_to_sync(send)()
    except Exception as error:
        logger.error("Could not send a message to %s: %s", group, type(error).__name__)
