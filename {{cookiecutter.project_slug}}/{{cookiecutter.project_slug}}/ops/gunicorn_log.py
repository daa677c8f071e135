"""gunicorn's events go to the service's log."""

from gunicorn.config import Config
from gunicorn.glogging import Logger


class GunicornLogger(Logger):  # type: ignore[misc]
    """Uses the handlers and formats of ``LOGGING``; ``logs.py`` logs the requests."""

    def setup(self, cfg: Config) -> None:
        """Remove gunicorn's own handlers."""
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
