"""Throttles of the API. A client is an IPv4 address or IPv6 network; see ``core/clients.py``."""

import time
from typing import Any

from rest_framework import throttling
from rest_framework.request import Request

from ..core.clients import get_network
from ..core.limits import Limit, counts


class AnonymousThrottle(throttling.AnonRateThrottle):
    """Limits requests without a login; each web process counts separately."""

    cache = counts

    def get_ident(self, request: Request) -> str:
        """Return the client's network."""
        return get_network(request)


class UserThrottle(throttling.UserRateThrottle):
    """Limits the requests of a user; each web process counts separately."""

    cache = counts

    def get_ident(self, request: Request) -> str:
        """Return the client's network, for requests without a login."""
        return get_network(request)


class SharedThrottle(UserThrottle):
    """Limits requests with a counter that all web processes share; set ``scope`` and ``rate``.

    Takes two queries for each request. Requests of other clients cannot evict its counts.
    """

    def allow_request(self, request: Request, view: Any) -> bool:
        """Return whether the request is within the rate."""
        number, seconds = self.parse_rate(self.rate)
        if number is None or seconds is None:
            return True
        self.limit = Limit(str(self.scope), number, seconds)
        self.client = str(self.get_cache_key(request, view))
        return self.limit.take(self.client)

    def wait(self) -> float | None:
        """Return the time until a slot is free, in seconds."""
        taken = self.limit.get_taken(self.client).values()
        return max(0, min(taken) + self.limit.seconds - time.time()) if taken else None
