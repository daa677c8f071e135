"""Flower, as a process of the service; see ``conf/flower.py``."""

import errno
import os
import signal
import sys
from typing import Any

from django.conf import settings as service_settings
from django_prodserver.backends.servers.flower import CeleryFlower

from .servers import port_in_use

#: The settings of ``conf/flower.py`` exist only if the service has this process.
settings: Any = service_settings


class Flower(CeleryFlower):
    """Runs Flower until SIGTERM."""

    #: The path of its health check, and the variable with its port
    HEALTH_PATH, PORT_VARIABLE = "/healthcheck", "FLOWER_PORT"

    def start_server(self, *args: str) -> None:
        """Run Flower; only the account in ``FLOWER_BASIC_AUTH`` has access.

        Raise CommandError if another process uses the port.
        """
        if settings.FLOWER_BASIC_AUTH:
            # Not an argument, which other users of the host could read
            os.environ["FLOWER_BASIC_AUTH"] = settings.FLOWER_BASIC_AUTH
        from flower.views.monitor import Metrics  # type: ignore[import-untyped]
        from tornado.web import authenticated

        # Metrics contain the names of workers and tasks; Flower shows them to everybody.
        Metrics.get = authenticated(Metrics.get)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        # Flower is a plugin of Celery's full command line.
        from celery.bin.celery import celery

        celery.params[0].default = self.app
        try:
            celery.main(args=["flower", *args], standalone_mode=False)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise port_in_use(settings.FLOWER_PORT, "FLOWER_PORT") from error
