"""Tags for the index of the admin and the page *Operations*."""

from datetime import datetime
from typing import Any

from django import template
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.timesince import timesince

from ..core.redaction import redact
from ..models import ResumableRun, TaskRun

register = template.Library()


@register.simple_tag(takes_context=True)
def operations_summary(context: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary for the index, or None if the user may not view operations."""
    # Imported here, because Django loads these tags even if the admin is not installed.
    from ..console.operations import VIEW_PERMISSION, get_summary

    return get_summary() if context["user"].has_perm(VIEW_PERMISSION) else None


@register.filter
def seconds(value: Any) -> str:
    """Format a duration in seconds, such as ``20 ms``, ``3.1 s`` or ``2 min 5 s``."""
    if not isinstance(value, float):
        return ""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value // 60)} min {int(value % 60)} s"


@register.filter
def ago(moment: datetime) -> str:
    """Return how long ago a time was: ``3 seconds ago``, ``2 hours, 5 minutes ago``."""
    age = int((timezone.now() - moment).total_seconds())
    return f"{timesince(moment) if age >= 60 else f'{max(age, 0)} seconds'} ago"


@register.filter
def arguments(run: TaskRun | ResumableRun) -> str:
    """Return the arguments of a run, shortened and redacted."""
    return redact(run.arguments.removesuffix(", {}]").removeprefix("["))[:100]


@register.filter
def mark(run: TaskRun) -> SafeString:
    """Return a symbol for the result of a run, with its details as a tooltip."""
    sign = {"succeeded": "✓", "failed": "✗", "running": "…"}.get(run.status, "↻")
    details = f"{run.get_status_display()}, {run.started_at:%Y-%m-%d %H:%M:%S} UTC"
    if run.duration is not None:
        details += f", {seconds(run.duration)}"
    return format_html(
        '<span class="run {}" title="{}" role="img" aria-label="{}">{}</span>',
        run.status,
        details,
        details,
        sign,
    )
