"""``python manage.py server PROCESS``: django-prodserver's command for web servers."""

from django_prodserver.backends.base import BaseServerBackend

from . import prodserver


class Command(prodserver.Command):
    """Run a web server as ``prodserver`` does; refuse other processes."""

    help = "Run a web server in the foreground, until SIGTERM, as prodserver does."
    process_label = "server"
    backend_base_class = BaseServerBackend
