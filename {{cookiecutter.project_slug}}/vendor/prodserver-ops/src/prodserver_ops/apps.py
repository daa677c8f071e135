"""The app ``ops``, which runs the processes of a service."""

import atexit
import gc
from contextlib import suppress
from pathlib import Path
from typing import Any

from celery import signals
from django.apps import AppConfig
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import request_finished, request_started
from django.db.backends.signals import connection_created
from django.db.models.signals import post_migrate, pre_migrate
from django.utils.module_loading import autodiscover_modules

from . import broker
from .broker import publishing
from .core import database, limits
from .web import bodies


class OpsConfig(AppConfig):
    """Registers system checks and digests, and prepares what the processes need."""

    name = "prodserver_ops"
    label = "ops"
    verbose_name = "Operations"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Called once by each process after all models are loaded."""
        if not hasattr(settings, "PRODUCTION_PROCESSES"):
            raise ImproperlyConfigured(
                "prodserver_ops is not configured: call add_settings() of prodserver_ops.conf at "
                "the end of the settings module, or use the classes of prodserver_ops.conf."
            )
        # These modules register checks and receivers of Celery's signals. They need loaded apps.
        from .console import checks  # noqa: F401
        from .scheduling import heartbeats, restores
        from .web import logins

        bodies.install()
        logins.install()
        autodiscover_modules("digests")
        request_started.connect(publishing.start_request)
        request_finished.connect(publishing.finish_request)
        atexit.register(publishing.publisher.flush, publishing.EXIT_TIMEOUT)
        # Disable garbage collection at exit, which delays short commands.
        atexit.register(gc.freeze)
        connection_created.connect(database.limit_connection)
        pre_migrate.connect(database.lift_limit, sender=self)
        post_migrate.connect(limits.create_table, sender=self)
        post_migrate.connect(restores.create_row, sender=self)
        post_migrate.connect(install_broker, sender=self)
        signals.beat_init.connect(start_alerts)
        signals.worker_ready.connect(start_alerts)
        create_database_folder()
        if settings.DEBUG:
            from .development import imports, templates

            imports.record()
            templates.watch()
        if settings.SENTRY_DSN:
            from .core import sentry

            sentry.configure()


def install_broker(**kwargs: Any) -> None:
    """Prepare the broker after migrations."""
    broker.install(settings.CELERY_BROKER_URL)


def start_alerts(**kwargs: Any) -> None:
    """Look for problems in beat, and in the main process of a worker."""
    from .console import alerts

    alerts.start()


def create_database_folder() -> None:
    """Create the folder of the embedded database, which other users cannot read.

    SQLite creates only the file. A ``VAR_DIR`` that others could read is closed to them.
    """
    database = settings.DATABASES["default"]
    if database["ENGINE"] == "django.db.backends.sqlite3":
        folder = Path(database["NAME"]).parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder == getattr(settings, "VAR_DIR", None) and folder.stat().st_mode & 0o077:
            with suppress(OSError):  # It belongs to another user.
                folder.chmod(0o700)
