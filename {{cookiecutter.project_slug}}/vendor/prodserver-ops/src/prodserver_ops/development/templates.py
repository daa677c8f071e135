"""Templates in development: each request and each task reads them again."""

from typing import Any

from celery import signals
from django.core.signals import request_started
from django.template.autoreload import reset_loaders


def watch() -> None:
    """Forget the templates before each request and task. Only ``runserver`` does this by itself."""
    request_started.connect(forget)
    signals.task_prerun.connect(forget)


def forget(**kwargs: Any) -> None:
    """Forget the templates that are loaded."""
    reset_loaders()
