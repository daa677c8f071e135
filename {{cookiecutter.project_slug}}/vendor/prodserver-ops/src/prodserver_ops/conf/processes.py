"""Entries of ``PRODUCTION_PROCESSES``, from the settings of a service.

Each function takes the settings, and keyword arguments that extend or override the arguments of
the process: ``worker(self, queues="reports", concurrency=1)``.
"""

from typing import Any

#: How long a web process waits for running requests when it stops, in seconds.
STOP_TIMEOUT = 25


def gunicorn(settings: Any, **arguments: Any) -> dict[str, Any]:
    """Return a web process: gunicorn with threads, which serves the WSGI application."""
    return {
        "BACKEND": "prodserver_ops.web.gunicorn.Server",
        "ARGS": {
            "bind": f"{settings.BIND_HOST}:{settings.PORT}",
            "worker-class": "prodserver_ops.web.gunicorn_worker.HealthWorker",
            "workers": settings.WEB_CONCURRENCY,
            "threads": settings.WEB_THREADS,
            "logger-class": "prodserver_ops.web.gunicorn.Logger",
            "log-level": settings.LOG_LEVEL,
            "no-control-socket": None,
            "preload": None,
            **_to_options(arguments),
        },
    }


def granian(settings: Any, **arguments: Any) -> dict[str, Any]:
    """Return a web process: Granian, which serves the ASGI application."""
    return {
        "BACKEND": "prodserver_ops.web.granian.Server",
        "ARGS": {
            "address": settings.BIND_HOST,
            "port": settings.PORT,
            "workers": settings.WEB_CONCURRENCY,
            "log_level": settings.LOG_LEVEL.lower(),
            "workers_kill_timeout": STOP_TIMEOUT,
            **arguments,
        },
    }


def uvicorn(settings: Any, **arguments: Any) -> dict[str, Any]:
    """Return a web process: uvicorn, which serves the ASGI application."""
    return {
        "BACKEND": "prodserver_ops.web.uvicorn.Server",
        "ARGS": {
            "host": settings.BIND_HOST,
            "port": settings.PORT,
            "workers": settings.WEB_CONCURRENCY,
            "log_level": settings.LOG_LEVEL.lower(),
            "timeout_graceful_shutdown": STOP_TIMEOUT,
            # A worker that starts on a busy machine would be killed after 5 seconds, each time.
            "timeout_worker_healthcheck": 30,
            **arguments,
        },
    }


def worker(settings: Any, **arguments: Any) -> dict[str, Any]:
    """Return a Celery worker."""
    return {
        "BACKEND": "django_prodserver.backends.workers.celery.CeleryWorker",
        "APP": f"{settings.PACKAGE}.celery_app",
        "ARGS": {
            "loglevel": settings.LOG_LEVEL,
            "concurrency": settings.WORKER_CONCURRENCY,
            "pool": settings.WORKER_POOL,
            # Workers need not know of each other.
            "without-gossip": None,
            "without-mingle": None,
            **_to_options(arguments),
        },
    }


def beat(settings: Any, **arguments: Any) -> dict[str, Any]:
    """Return beat, which queues tasks when their schedules are due."""
    return {
        "BACKEND": "django_prodserver.backends.workers.celery.CeleryBeat",
        "APP": f"{settings.PACKAGE}.celery_app",
        "ARGS": {"loglevel": settings.LOG_LEVEL, **_to_options(arguments)},
    }


def command(settings: Any, name: str, **arguments: Any) -> dict[str, Any]:
    """Return a process that runs a management command, such as a consumer or a loop."""
    return {
        "BACKEND": "prodserver_ops.worker.command.Command",
        "COMMAND": name,
        "ARGS": _to_options(arguments),
    }


def get_default(settings: Any) -> dict[str, Any]:
    """Return web with gunicorn, worker and beat."""
    return {"web": gunicorn(settings), "worker": worker(settings), "beat": beat(settings)}


def _to_options(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in arguments.items()}
