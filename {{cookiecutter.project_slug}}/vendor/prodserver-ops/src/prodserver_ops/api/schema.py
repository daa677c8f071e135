"""The OpenAPI schema of the API: the file, and the view that returns it."""

from pathlib import Path

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.views.decorators.http import require_safe


def get_path() -> Path:
    """Return the path of the file that ``python manage.py openapi`` writes."""
    return Path(settings.BASE_DIR, "openapi.yaml")


@require_safe
def view(request: HttpRequest) -> HttpResponse:
    """Return ``openapi.yaml``; in development, generate the schema from the code."""
    if settings.DEBUG:
        from .openapi import generate_schema

        text = generate_schema()
    else:
        text = get_path().read_text(encoding="utf-8")
    return HttpResponse(text, content_type="application/vnd.oai.openapi; charset=utf-8")
