"""Filters for plain text e-mail."""

from django import template

register = template.Library()


@register.filter
def quote(text: str) -> str:
    """Prefix each line with ``> ``, as mail clients do for quotes."""
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())
