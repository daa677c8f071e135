"""Errors, and schedules that fail or are missed, go to Sentry where ``SENTRY_DSN`` names it."""

import sentry_sdk
from django.conf import settings
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.integrations.django import DjangoIntegration

from .logs import mask


def start():
    """Report from now on, without what identifies a person: no data, users or variables."""
    sentry_sdk.init(
        dsn=settings.SENTRY_DSN,
        environment=settings.SENTRY_ENVIRONMENT,
        integrations=[DjangoIntegration(), CeleryIntegration(monitor_beat_tasks=True)],
        send_default_pii=False,
        include_local_variables=False,
        max_request_body_size="never",
        before_send=scrub,
        before_breadcrumb=scrub,
    )


def scrub(event, hint):
    """Mask in every text of an event what the log masks too."""
    event.get("request", {}).pop("query_string", None)
    return _masked(event)


def _masked(value):
    match value:
        case str():
            return mask(value)
        case dict():
            return {key: _masked(each) for key, each in value.items()}
        case list():
            return [_masked(each) for each in value]
        case _:
            return value
