"""The Celery app. Schedules are rows in the database: see ``schedules.py``."""

import logging
import os

from celery import Celery, signals
from kombu.transport import TRANSPORT_ALIASES

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "{{ cookiecutter.project_slug }}.settings")

# The embedded broker, safe for processes that start and write at once.
TRANSPORT_ALIASES["filesystem"] = "{{ cookiecutter.project_slug }}.broker:Transport"

app = Celery(
    "{{ cookiecutter.project_slug }}",
    task_cls="{{ cookiecutter.project_slug }}.queueing:Task",
)
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@signals.setup_logging.connect
def leave_logging_alone(**kwargs):
    """Celery sets up no handlers where this signal is listened to; Django has done it."""


@signals.worker_shutting_down.connect
def log_shutdown(how, **kwargs):
    """Tell that a worker ends: warm, once its tasks are done, or cold."""
    logging.getLogger(__name__).info("%s shutdown", how)
