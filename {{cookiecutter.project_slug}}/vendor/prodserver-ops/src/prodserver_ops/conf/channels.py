"""Settings of the channel layer, which carries messages between processes.

https://channels.readthedocs.io/
"""

from typing import Any
from urllib.parse import urlsplit

from .defaults import ProductionProcessDefaults, computed
from .environment import RedactedError, env, expects, or_empty

#: The Redis database of the layer, whatever the URL says; brokers use other databases.
DATABASE = 0

#: Timeout for connecting to Redis, in seconds.
TIMEOUT = 1

#: Timeout for a reply from Redis, in seconds. Blocking reads of the layer take up to 5 seconds.
READ_TIMEOUT = 10


@expects("redis://:PASSWORD@HOST:PORT")
def redis_url(text: str) -> str:
    """Return the URL of a Redis server, with the number of the layer's database."""
    parts = urlsplit(text)
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
        raise RedactedError("a URL with another scheme, or without a host")
    return parts._replace(path=f"/{DATABASE}").geturl()


class Defaults:
    """Settings of the layer: Redis, or memory in development, which has a single web process."""

    PACKAGE: str

    @env(key="REDIS_URL", cast=or_empty(redis_url))
    def channel_url(self) -> str:
        if isinstance(self, ProductionProcessDefaults):
            required: str = env(env.Required, key="REDIS_URL", cast=redis_url)()
            return required
        return ""

    @computed
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
