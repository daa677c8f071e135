"""The address of the client that sent a request, behind ``PROXY_COUNT`` proxies."""

from contextvars import ContextVar
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network

from django.conf import settings
from django.http import HttpRequest

#: The request that the current thread handles. ``RequestLogMiddleware`` sets it.
current_request: ContextVar[HttpRequest | None] = ContextVar("current_request", default=None)

#: Prefix length of the IPv6 network that a provider assigns to one customer.
IPV6_PREFIX = 64


def get_address(request: HttpRequest) -> str:
    """Return the client's IP address, or "" if there is none, as on a Unix socket.

    Each proxy appends the address of its client to X-Forwarded-For. Only the last ``PROXY_COUNT``
    addresses are trustworthy, because a client can send any others.
    """
    if settings.PROXY_COUNT and (forwarded := request.META.get("HTTP_X_FORWARDED_FOR")):
        address = forwarded.split(",")[-settings.PROXY_COUNT :][0].strip()
        # Some proxies append the port.
        for candidate in (address, address.rpartition(":")[0].strip("[]")):
            if parsed := _parse(candidate):
                return parsed
    return _parse(request.META.get("REMOTE_ADDR", ""))


@lru_cache(1000)
def _parse(address: str) -> str:
    try:
        parsed = ip_address(address)
    except ValueError:
        return ""
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return str(mapped or parsed)


def get_network(request: HttpRequest) -> str:
    """Return the network that counts as one client: an IPv4 address, or the /64 of an IPv6 one."""
    return to_network(get_address(request))


def to_network(address: str) -> str:
    """Return the network of an IP address; return other strings unchanged."""
    parsed = _parse(address)
    if ":" not in parsed:
        return parsed or address
    return str(ip_network((parsed.partition("%")[0], IPV6_PREFIX), strict=False))
