"""``python manage.py worker PROCESS``: django-prodserver's command for workers and beat."""

from django_prodserver.backends.base import BaseWorkerBackend

from . import prodserver


class Command(prodserver.Command):
    """Run a worker or beat as ``prodserver`` does; refuse other processes."""

    help = "Run a worker or beat in the foreground, until SIGTERM, as prodserver does."
    process_label = "worker"
    backend_base_class = BaseWorkerBackend
