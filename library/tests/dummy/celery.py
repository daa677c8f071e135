import os

from prodserver_ops.worker.app import CeleryApp

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "dummy.settings")

app = CeleryApp("dummy")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
