"""Channels: the settings of the layer that carries messages between web processes.

https://channels.readthedocs.io/
"""

from typing import Any
from urllib.parse import urlsplit

from .defaults import ProductionProcessDefaults
from .environment import RedactedError, env, expects, or_empty

#: The number of the layer's database in Redis, whatever the URL says: brokers use others.
DATABASE = 0

#: How long connecting to Redis takes at most, in seconds.
TIMEOUT = 1

#: How long a consumer waits for Redis to respond, in seconds; it does after at most 5 seconds.
READ_TIMEOUT = 10


@expects("redis://:PASSWORD@HOST:PORT")
def redis_url(text: str) -> str:
    """Return the URL of a Redis server, with the number of the layer's database."""
    parts = urlsplit(text)
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
        raise RedactedError("a URL with another scheme, or without a host")
    return parts._replace(path=f"/{DATABASE}").geturl()


class Defaults:
    """The settings of the layer: Redis, or in development the memory of the only web process."""

    PACKAGE: str

    @env(key="REDIS_URL", cast=or_empty(redis_url))
    def channel_url(self) -> str:
        if isinstance(self, ProductionProcessDefaults):
            required: str = env(env.Required, key="REDIS_URL", cast=redis_url)()
            return required
        return ""

    def CHANNEL_LAYERS(self) -> dict[str, Any]:
        if not self.channel_url:
            return {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
        host = {
            "address": self.channel_url,
            "socket_connect_timeout": TIMEOUT,
            "socket_timeout": READ_TIMEOUT,
        }
        return {
            "default": {
                "BACKEND": "channels_redis.core.RedisChannelLayer",
                "CONFIG": {"hosts": [host], "prefix": self.PACKAGE},
            }
        }
