"""Bodies and headers that Django cannot read: the response has status 4xx, never 500."""

import re
from functools import wraps
from typing import Any

from django.http import HttpRequest
from django.utils.http import parse_header_parameters
from django.views.decorators import csrf

#: Encodings of bodies, by the names in Content-Type. Python has others that cannot decode all bytes,
#: take quadratic time, or remain in memory for each unknown name.
ENCODINGS = {
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "us-ascii": "utf-8",
    "iso-8859-1": "iso-8859-1",
    "windows-1252": "cp1252",
}

#: Maximum length of a header that Django parses.
MAX_HEADER_LENGTH = 10_000

#: Matches the start of a parameter in RFC 2231 encoding, which no client sends in these headers.
ENCODED_PARAMETER = re.compile(r"\*\s*=")


def install() -> None:
    """Let requests ignore what Django cannot read, and error pages not read the body.

    The body may be the error, and reading it would fail again. The pages get a token for their
    forms, but accept the request whatever its token is.
    """
    for owner, name, function in (
        (HttpRequest, "_set_content_type_params", set_content_type),
        (csrf._EnsureCsrfToken, "_check_token", accept),
    ):
        if getattr(owner, name) is not function:
            setattr(owner, name, wraps(getattr(owner, name))(function))


def set_content_type(request: HttpRequest, meta: dict[str, Any]) -> None:
    """Set the attributes of a new request that depend on Content-Type.

    Headers that Django would fail to parse are removed. Another encoding than those in ``ENCODINGS``
    is ignored, as Django ignores an unknown one; UploadMiddleware rejects forms with it.
    """
    for name in ("CONTENT_TYPE", "HTTP_ACCEPT"):
        header = meta.get(name, "")
        if len(header) > MAX_HEADER_LENGTH or ENCODED_PARAMETER.search(header):
            del meta[name]
    content_type, parameters = parse_header_parameters(meta.get("CONTENT_TYPE", ""))
    request.content_type, request.content_params = content_type, parameters
    if encoding := ENCODINGS.get(parameters.get("charset", "").lower()):
        request.encoding = encoding


def accept(middleware: Any, request: HttpRequest) -> None:
    """Accept a request for an error page."""
