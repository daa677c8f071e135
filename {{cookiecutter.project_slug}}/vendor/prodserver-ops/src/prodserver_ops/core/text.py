"""Text that every database, broker and log can store."""

from collections.abc import Callable
from typing import Any


def make_storable(text: str) -> str:
    """Return the text with NUL characters and lone surrogates escaped, as in ``\\x00``.

    PostgreSQL cannot store NUL characters, and UTF-8 cannot encode lone surrogates.
    """
    if "\0" in text:
        text = text.replace("\0", r"\x00")
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def shorten(text: str, limit: int) -> str:
    """Return the text with at most about ``limit`` characters: its start and its end."""
    if len(text) <= limit:
        return text
    half = limit // 2
    end = len(text) - half
    return f"{text[:half]} [{end - half} characters omitted] {text[end:]}"


def fit(size: int, make: Callable[[int], str]) -> str:
    """Return ``make(length)`` with the largest length whose result has at most ``size`` bytes.

    ``length`` is the maximum length of its parts; it starts with ``size`` and is halved. The
    result is longer only if its parts are too many.
    """
    length = size
    while len((text := make(length)).encode()) > size and length:
        length //= 2
    return text


def map_strings(function: Callable[[str], str], value: Any) -> Any:
    """Return a copy of nested lists and dictionaries, with the function applied to all strings."""
    match value:
        case str():
            return function(value)
        case dict():
            return {
                function(key) if isinstance(key, str) else key: map_strings(function, item)
                for key, item in value.items()
            }
        case list() | tuple():
            return [map_strings(function, item) for item in value]
        case _:
            return value
