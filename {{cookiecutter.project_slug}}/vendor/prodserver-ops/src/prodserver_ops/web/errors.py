"""Error pages with the name of the service and a link back, and JSON for the API.

They need neither the database nor collected static files. A template such as ``404.html`` of the
service is used in place of the page, with the same context.
"""

from functools import partial
from typing import Any

from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.template.loader import render_to_string
from django.views.csrf import CSRF_FAILURE_TEMPLATE_NAME
from django.views.defaults import bad_request

from ..core.urls import get_path, get_prefix
from ..mail.unsubscribe import get_base

#: The path of the API.
API = "/api/"

#: The title and the text of the page for each status.
TEXTS = {
    400: ("Bad request", "The server cannot read this request."),
    403: ("Not allowed", "You do not have permission to open this page."),
    404: ("Page not found", "There is no page with this address."),
    500: ("Server error", "Something went wrong, and the error was logged. Try again later."),
}

#: The text for a form whose token is missing or has expired.
CSRF_TEXT = "This form is no longer valid. Go back, reload the page, and send it again."


def show(
    request: HttpRequest, exception: Exception | None = None, *, status: int, text: str = ""
) -> HttpResponse:
    """Respond with an error page; in JSON to a request for the API.

    ``text``, or the text that an exception such as ``Http404`` was raised with, replaces the usual
    one. A host that is not allowed learns nothing of the service.
    """
    if isinstance(exception, DisallowedHost):
        return bad_request(request, exception)
    title, usual = TEXTS[status]
    argument = exception.args[0] if status == 404 and exception and exception.args else ""
    text = text or (argument if isinstance(argument, str) else "") or usual
    if get_path(request.path_info).startswith(API):
        return JsonResponse({"detail": text}, status=status)
    names = [CSRF_FAILURE_TEMPLATE_NAME] if text == CSRF_TEXT else []
    context = {
        "site_name": settings.SITE_NAME,
        "title": title,
        "text": text,
        "home": f"{get_prefix()}/",
    }
    templates = [*names, f"{status}.html", "ops/error.html"]
    return HttpResponse(render(templates, context), status=status)


def render(templates: list[str], context: dict[str, Any]) -> str:
    """Return the page; a plain one if the service's base template fails."""
    try:
        return render_to_string(templates, context | {"base": get_base()})
    except Exception:
        return render_to_string("ops/error.html", context | {"base": "ops/base.html"})


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    """Respond to a form whose token is missing or has expired."""
    return show(request, status=403, text=CSRF_TEXT)


handler400 = partial(show, status=400)
handler403 = partial(show, status=403)
handler404 = partial(show, status=404)
handler500 = partial(show, status=500)
