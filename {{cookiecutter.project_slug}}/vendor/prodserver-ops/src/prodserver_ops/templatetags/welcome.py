"""The tag of the home page in development."""

from typing import Any

from django import template
from django.conf import settings
from django.template.loader import render_to_string
from django.utils.safestring import SafeString

register = template.Library()


@register.simple_tag(takes_context=True)
def welcome(context: dict[str, Any]) -> SafeString | str:
    """Return the part of the page for developers; an empty string unless ``DEBUG`` is on."""
    if not settings.DEBUG:
        return ""
    from ..development.welcome import get_context

    request = context["request"]
    return render_to_string("ops/welcome.html", get_context(request), request)
