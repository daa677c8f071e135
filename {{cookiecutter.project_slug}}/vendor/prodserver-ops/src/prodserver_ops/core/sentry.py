"""Report errors, and failed or missed schedules, to Sentry if ``SENTRY_DSN`` is set."""

from typing import Any

import sentry_sdk
from django.conf import settings
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.integrations.django import DjangoIntegration

from .redaction import redact
from .text import map_strings


def configure() -> None:
    """Initialize Sentry without personal data: no request bodies, users or local variables.

    Does nothing if the project's settings have already initialized it.
    """
    if sentry_sdk.is_initialized():
        return
    sentry_sdk.init(
        dsn=settings.SENTRY_DSN,
        environment=settings.SENTRY_ENVIRONMENT,
        integrations=[DjangoIntegration(), CeleryIntegration(monitor_beat_tasks=True)],
        send_default_pii=False,
        include_local_variables=False,
        max_request_body_size="never",
        before_send=redact_event,
        before_breadcrumb=redact_event,
    )


def redact_event(event: Any, hint: Any) -> Any:
    """Return an event or breadcrumb without its query string, with all strings redacted."""
    event.get("request", {}).pop("query_string", None)
    return map_strings(redact, event)
