"""A size limit for uploaded files. Django has none, and writes them to temporary files."""

from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.core.files.uploadhandler import FileUploadHandler
from django.http import HttpRequest, HttpResponse, JsonResponse

from .bodies import ENCODINGS

#: How many bytes of a request that is too large are read. A client that cannot send the rest may
#: see a lost connection instead of the response.
DRAINED = 64 * 2**20

CHUNK = 2**16

#: The limits of views, in bytes.
_limits: set[int] = set()

#: Types of bodies that Django decodes.
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


def limit_upload[View: Callable[..., Any]](size: int) -> Callable[[View], View]:
    """Return a decorator of a view that takes uploads of up to ``size`` bytes.

    ``method_decorator(limit_upload(size), name="dispatch")`` decorates a class.
    """
    _limits.add(size)

    def decorate(view: View) -> View:
        view.upload_max_size = size  # type: ignore[attr-defined]
        return view

    return decorate


def get_largest() -> int:
    """Return how many bytes of a body are read at most, whichever view it is for."""
    usual = {settings.UPLOAD_MAX_SIZE, settings.DATA_UPLOAD_MAX_MEMORY_SIZE or 0}
    largest: int = max(usual | _limits)
    return largest + DRAINED


class UploadMiddleware:
    """Responds with status 413 to a request with more than ``UPLOAD_MAX_SIZE`` bytes of files.

    A form in an encoding that is not in ``ENCODINGS`` gets status 415. It comes before
    ``CsrfViewMiddleware``, which reads the files.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Pass the request on, unless it is a form in another encoding."""
        charset = request.content_params.get("charset") if request.content_params else None
        if charset and request.content_type in FORMS and charset.lower() not in ENCODINGS:
            problem = "Send forms with charset=utf-8."
            return HttpResponse(problem, status=415, content_type="text/plain; charset=utf-8")
        return self.get_response(request)

    def process_view(
        self, request: HttpRequest, view: Any, args: Any, kwargs: Any
    ) -> HttpResponse | None:
        """Note the limit of the view; respond if the request is larger."""
        limit = getattr(view, "upload_max_size", settings.UPLOAD_MAX_SIZE)
        request.upload_max_size = limit  # type: ignore[attr-defined]
        size = int(request.META.get("CONTENT_LENGTH") or 0)
        if size <= limit or request.content_type != "multipart/form-data":
            return None
        for _ in range(0, min(size, DRAINED), CHUNK):
            if not request.read(CHUNK):
                break
        problem = f"The upload has {format_size(size)}; at most {format_size(limit)} are accepted."
        if request.get_preferred_type(["text/plain", "application/json"]) == "application/json":
            return JsonResponse({"detail": problem}, status=413)
        return HttpResponse(problem, status=413, content_type="text/plain; charset=utf-8")


def format_size(size: int) -> str:
    """Return a number of bytes in MB, or kB if it is small."""
    return f"{size / 2**20:.1f} MB" if size >= 2**19 else f"{size / 2**10:.1f} kB"


class LimitedUploadHandler(FileUploadHandler):
    """Rejects requests with more bytes of files in total than the view takes."""

    def handle_raw_input(
        self,
        input_data: Any,
        META: Any,
        content_length: int,
        boundary: str,
        encoding: str | None = None,
    ) -> None:
        """Raise RequestDataTooBig before any byte is read."""
        limit = getattr(self.request, "upload_max_size", settings.UPLOAD_MAX_SIZE)
        if content_length > limit:
            raise RequestDataTooBig(f"The uploaded files have more than {format_size(limit)}.")

    def receive_data_chunk(self, raw_data: bytes, start: int) -> bytes:
        """Pass the data to the next handler."""
        return raw_data

    def file_complete(self, file_size: int) -> None:
        """Pass the file to the next handler."""
