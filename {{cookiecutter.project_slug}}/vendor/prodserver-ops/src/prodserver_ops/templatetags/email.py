"""Filters for e-mail in text."""

from django import template

register = template.Library()


@register.filter
def quote(text: str) -> str:
    """Return a text with ``> `` before each line, as mail clients quote."""
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())
