"""gunicorn's own events, in the service's log."""

from gunicorn.glogging import Logger


class GunicornLogger(Logger):
    """Leaves handlers and formats to ``LOGGING``; requests are logged in ``logs.py``."""

    def setup(self, cfg):
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
