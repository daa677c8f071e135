"""Limits of the lists of the admin, so that no search or filter keeps others waiting.

They apply to the lists of all models. ``LargeTableAdmin`` also limits which rows are searched.
"""

from collections.abc import Callable
from functools import wraps
from threading import BoundedSemaphore
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.contrib.admin import ModelAdmin
from django.contrib.admin.views.main import SEARCH_VAR
from django.db import OperationalError
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect

from ..core import database

#: Maximum number of words and characters of a search, and of characters of a query string.
MAX_WORDS, MAX_SEARCH, MAX_QUERY = 10, 200, 2000

#: How long a list may take that is searched, filtered or sorted, in seconds, with PostgreSQL.
SECONDS = 10

#: How many of these lists a process loads at the same time: half of its threads.
slots = BoundedSemaphore(max(1, settings.WEB_THREADS // 2))


def install() -> None:
    """Limit the lists of all models."""
    ModelAdmin.changelist_view = limit(ModelAdmin.changelist_view)  # type: ignore[method-assign]


def limit(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """Return a view of a list that is limited."""

    @wraps(view)
    def limited(
        model_admin: Any, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        if not request.GET:
            return view(model_admin, request, extra_context)
        if problem := find_problem(request):
            return refuse(model_admin, request, problem)
        if not slots.acquire(blocking=False):
            return HttpResponse(
                "Too many people search at the moment. Try again in a few seconds.",
                status=429,
                content_type="text/plain; charset=utf-8",
                headers={"Retry-After": str(SECONDS)},
            )
        try:
            if request.method == "POST":
                return view(model_admin, request, extra_context)  # An action may take longer.
            with database.shorter_timeout(SECONDS):
                response = view(model_admin, request, extra_context)
                # The list is read when it is rendered.
                return response.render() if hasattr(response, "render") else response
        except OperationalError as error:
            if not database.is_timeout(error):
                raise
            problem = f"This list took longer than {SECONDS} seconds. Search or filter for less."
            return refuse(model_admin, request, problem)
        finally:
            slots.release()

    return limited


def find_problem(request: HttpRequest) -> str | None:
    """Return what is too long in a request for a list, or None."""
    search = request.GET.get(SEARCH_VAR, "")
    if len(search) > MAX_SEARCH or len(search.split()) > MAX_WORDS:
        return f"Search for at most {MAX_WORDS} words and {MAX_SEARCH} characters."
    if len(request.META["QUERY_STRING"]) > MAX_QUERY:
        return "This address has too many filters."
    return None


def refuse(model_admin: Any, request: HttpRequest, problem: str) -> HttpResponse:
    """Return a redirect to the list without search and filters, which shows the problem."""
    model_admin.message_user(request, problem, messages.ERROR)
    return HttpResponseRedirect(request.path)
