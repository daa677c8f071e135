"""The Celery app. Its settings start with ``CELERY_``; schedules are rows in the database."""

import os

from prodserver_ops.worker.app import CeleryApp

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "{{ cookiecutter.project_slug }}.settings")

app = CeleryApp("{{ cookiecutter.project_slug }}")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
