"""gunicorn, as a process of the service."""

from typing import Any, NoReturn

from django_prodserver.backends.servers.gunicorn import GunicornServer
from gunicorn.config import Config
from gunicorn.glogging import Logger as GunicornLogger
from gunicorn.util import load_class, parse_address


class Server(GunicornServer):
    """The backend; ``ARGS`` are options of gunicorn's command line."""

    def __init__(self, **process: Any) -> None:
        super().__init__(**process)
        self.bind: str = process.get("ARGS", {}).get("bind", "unix:")

    def get_address(self) -> tuple[str, int] | None:
        """Return host and port, or None if the server does not listen on a port."""
        address = parse_address(self.bind)
        return address if isinstance(address, tuple) else None

    def check_arguments(self) -> None:
        """Raise ValueError or RuntimeError for arguments that gunicorn would reject."""
        config = Config()
        parser = config.parser()
        parser.error = _raise_error  # type: ignore[method-assign]
        for name, value in vars(parser.parse_args(list(self.prep_server_args()))).items():
            if name != "args" and value is not None:
                try:
                    config.set(name, value)
                except Exception as error:
                    raise ValueError(f"--{name.replace('_', '-')}: {error}") from error
        load_class(config.worker_class_str)
        load_class(config.settings["logger_class"].get())


def _raise_error(message: str) -> NoReturn:
    raise ValueError(message)


class Logger(GunicornLogger):
    """Sends gunicorn's events to the handlers of ``LOGGING``; ``core/logs.py`` logs requests."""

    def setup(self, cfg: Config) -> None:
        """Remove gunicorn's own handlers."""
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True

    def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
        """Log no request again, although Heroku's buildpack turns the log of gunicorn on."""
