"""The view that returns the OpenAPI schema of the API."""

from pathlib import Path

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.views.decorators.http import require_safe


@require_safe
def view(request: HttpRequest) -> HttpResponse:
    """Return ``openapi.yaml``; in development, the schema of the code as it is now."""
    if settings.DEBUG:
        from .openapi import generate_schema

        text = generate_schema()
    else:
        text = Path(settings.BASE_DIR, "openapi.yaml").read_text(encoding="utf-8")
    return HttpResponse(text, content_type="application/vnd.oai.openapi; charset=utf-8")
