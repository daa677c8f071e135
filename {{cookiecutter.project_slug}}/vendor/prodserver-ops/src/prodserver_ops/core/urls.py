"""Absolute URLs, also of a service below a path of its host."""

from urllib.parse import urlsplit

from django.conf import settings


def get_prefix() -> str:
    """Return the path that the service is below, such as ``/app``, or an empty string."""
    path: str = urlsplit(settings.SITE_URL).path or settings.FORCE_SCRIPT_NAME or ""
    return path.rstrip("/")


def make_absolute(path: str) -> str:
    """Return the URL of a path that ``reverse()`` has returned, with or without the prefix.

    It has the prefix in a request, and in the main thread of another process.
    """
    prefix = get_prefix()
    if prefix and path.startswith(f"{prefix}/"):
        path = path.removeprefix(prefix)
    return f"{settings.SITE_URL.removesuffix(prefix)}{prefix}{path}"


def get_path(path: str) -> str:
    """Return a path without the prefix, which some proxies remove and others do not."""
    prefix = get_prefix()
    return path.removeprefix(prefix) if prefix and path.startswith(f"{prefix}/") else path
