"""Limits of the lists of the admin, so that no search or filter keeps others waiting.

They apply to the lists of all models, and to fields with completion. ``LargeTableAdmin`` also limits which
rows are searched.
"""

import logging
from collections.abc import Callable
from functools import wraps
from threading import BoundedSemaphore
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.contrib.admin import AdminSite, ModelAdmin
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.views.main import SEARCH_VAR
from django.core.exceptions import ValidationError
from django.db import DataError, OperationalError
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, HttpResponseRedirect

from ..core import database

logger = logging.getLogger(__name__)

#: Maximum number of words and characters of a search, and of characters of a query string.
MAX_WORDS, MAX_SEARCH, MAX_QUERY = 10, 200, 2000

#: How long a list may take that is searched, filtered or sorted, in seconds, with PostgreSQL.
SECONDS = 10

#: How many of these lists a process loads at the same time: half of its threads.
slots = BoundedSemaphore(max(1, settings.WEB_THREADS // 2))


def install() -> None:
    """Limit the lists of all models, and the view of fields with completion."""
    ModelAdmin.changelist_view = limit(ModelAdmin.changelist_view)  # type: ignore[method-assign]
    AdminSite.autocomplete_view = limit(AdminSite.autocomplete_view)  # type: ignore[method-assign]


def limit(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """Return a view of a list that is limited."""

    @wraps(view)
    def limited(owner: Any, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        problem = find_problem(request) or find_unselectable(owner, request)
        if not request.GET and not problem:
            return view(owner, request, *args, **kwargs)
        if problem:
            return refuse(owner, request, problem)
        if not slots.acquire(blocking=False):
            return HttpResponse(
                "Too many people search at the moment. Try again in a few seconds.",
                status=429,
                content_type="text/plain; charset=utf-8",
                headers={"Retry-After": str(SECONDS)},
            )
        try:
            if request.method == "POST":
                return view(owner, request, *args, **kwargs)  # An action may take longer.
            with database.shorter_timeout(SECONDS):
                response = view(owner, request, *args, **kwargs)
                # The list is read when it is rendered.
                return response.render() if hasattr(response, "render") else response
        except (ValueError, OverflowError, DataError) as error:
            if request.method == "POST":
                raise
            # Django compares some values with a column that cannot have them, such as the year -1.
            logger.warning("A list cannot be filtered: %s", type(error).__name__)
            return refuse(owner, request, "This address has a filter that is not valid.")
        except OperationalError as error:
            if not database.is_timeout(error):
                raise
            problem = f"This list took longer than {SECONDS} seconds. Search or filter for less."
            return refuse(owner, request, problem)
        finally:
            slots.release()

    return limited


def find_problem(request: HttpRequest) -> str | None:
    """Return what is too long in a request for a list, or None."""
    search = " ".join(request.GET.get(name, "") for name in (SEARCH_VAR, "term")).strip()
    if len(search) > MAX_SEARCH or len(search.split()) > MAX_WORDS:
        return f"Search for at most {MAX_WORDS} words and {MAX_SEARCH} characters."
    if len(request.META["QUERY_STRING"]) > MAX_QUERY:
        return "This address has too many filters."
    return None


def find_unselectable(owner: Any, request: HttpRequest) -> str | None:
    """Return that the selection of an action is not valid, which Django does not check, or None."""
    for value in request.POST.getlist(ACTION_CHECKBOX_NAME):
        try:
            owner.model._meta.pk.clean(value, None)
            valid = "\0" not in value
        except ValidationError:
            valid = False
        if not valid:
            return "The selection is not valid."
    return None


def refuse(owner: Any, request: HttpRequest, problem: str) -> HttpResponse:
    """Return a redirect to the list without search and filters, which shows the problem."""
    if isinstance(owner, AdminSite):
        return HttpResponseBadRequest(problem, content_type="text/plain; charset=utf-8")
    owner.message_user(request, problem, messages.ERROR)
    return HttpResponseRedirect(request.path)
