"""Base classes of a service's settings, one for each mode.

``ProcessDefaults`` contains the settings that the processes need, and works in any Django project.
``Defaults`` adds the settings that all generated services share: security, database, e-mail, static
files. ``TestDefaults``, ``ProductionDefaults`` and ``StagingDefaults`` adapt them to one mode. A
class in ``settings.py`` can override each value, for its own mode and for those that inherit from
it, because classes of the service come before those of the library:
``class ProdSettings(Settings, conf.ProductionDefaults)``.

https://django-classy-settings.readthedocs.io/
"""

import os
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import django
from cbs import BaseSettings
from django.conf import global_settings
from kombu import Exchange, Queue

from .. import broker
from ..core.database import CONNECT_OPTIONS, get_sqlite
from .environment import (
    boolean,
    broker_url,
    database_url,
    development_database_url,
    email_address,
    email_api,
    env,
    host,
    hosts,
    integer,
    one_of,
    or_empty,
    path,
    port,
    queue_names,
    secret_key,
    secret_keys,
    sentry_dsn,
    site_url,
    webhook_url,
)

#: The schema class of the API's views. drf-spectacular is optional in production.
SCHEMA_CLASS = (
    "drf_spectacular.openapi.AutoSchema"
    if find_spec("drf_spectacular")
    else "rest_framework.schemas.openapi.AutoSchema"
)


#: Default options of a database that several processes use, by engine.
DATABASE_OPTIONS = {
    "django.db.backends.postgresql": CONNECT_OPTIONS,
    "django.db.backends.sqlite3": get_sqlite("")["OPTIONS"],
}


def computed(method: Callable[[Any], Any]) -> Any:
    """Mark a setting that a method computes; type checkers let a class replace it by a value."""
    return method


def limit_database(database: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of ``DATABASES`` with the default options of its engine added."""
    options = DATABASE_OPTIONS.get(database.get("ENGINE", ""))
    if options is None:
        return database
    return {**database, "OPTIONS": options | database.get("OPTIONS", {})}


#: Exceptions with which Django rejects invalid requests, which anyone can send.
REJECTIONS = (
    "DisallowedHost",
    "DisallowedModelAdminLookup",
    "DisallowedModelAdminToField",
    "DisallowedRedirect",
    "RequestDataTooBig",
    "SuspiciousFileOperation",
    "SuspiciousMultipartForm",
    "TooManyFieldsSent",
    "TooManyFilesSent",
)


class ProcessDefaults(BaseSettings):  # type: ignore[misc]
    """Settings that web, worker and beat need, with values for development.

    ``PACKAGE`` is the Python package of the service. It contains the Celery app, ``celery_app``,
    and its name is the prefix of the queues. ``BASE_DIR`` is the folder of ``manage.py``. E-mails
    have ``SITE_NAME`` in the subject, and link to ``DOMAIN``.
    """

    is_production = False

    PACKAGE: str
    BASE_DIR: Path
    SITE_NAME: str
    DOMAIN: str
    DEBUG = global_settings.DEBUG
    TIME_ZONE: str = global_settings.TIME_ZONE
    ALLOWED_HOSTS = global_settings.ALLOWED_HOSTS

    @property
    def VAR_DIR(self) -> Path:
        """Where the embedded database and broker keep their files; git ignores it."""
        return Path(self.BASE_DIR, "var")

    # Broker: folders that the processes share, unless CELERY_BROKER_URL is set
    CELERY_BROKER_URL = env("filesystem://localhost", cast=broker_url(*broker.EMBEDDED_SCHEMES))
    # The variable to read instead in production, such as RABBITMQ_URL on Dokku
    BROKER_VARIABLE = "CELERY_BROKER_URL"

    @computed
    def CELERY_BROKER_TRANSPORT_OPTIONS(self) -> dict[str, Any]:
        return broker.get_options(self.CELERY_BROKER_URL, self)

    # Queues: e-mail has its own queue, so that other tasks do not wait behind it
    @computed
    def CELERY_TASK_DEFAULT_QUEUE(self) -> str:
        return self.PACKAGE

    @property
    def mail_queue(self) -> str:
        """The name of the e-mail queue."""
        return f"{self.PACKAGE}.mail"

    # More queues of the service. A worker consumes all queues, unless its process names them
    QUEUES: list[str] = []

    # Existing queues that workers also consume, such as those of an earlier service
    EXTRA_QUEUES = env("", cast=or_empty(queue_names, []))

    @computed
    def CELERY_TASK_QUEUES(self) -> list[Queue]:
        extra = [Queue(name, routing_key=name, no_declare=True) for name in self.EXTRA_QUEUES]
        names = dict.fromkeys([self.PACKAGE, self.mail_queue, *self.QUEUES])
        return [*map(self.make_queue, names), *extra]

    def make_queue(self, name: str) -> Queue:
        """Return a queue on the service's exchange."""
        exchange = Exchange(self.PACKAGE, type=self.CELERY_TASK_DEFAULT_EXCHANGE_TYPE)
        arguments = {"x-queue-type": self.CELERY_TASK_DEFAULT_QUEUE_TYPE}
        return Queue(name, exchange, routing_key=name, queue_arguments=arguments)

    # Routes of the service. Those of the library follow them; see worker/app.py
    @computed
    def CELERY_TASK_ROUTES(self) -> dict[str, Any]:
        return {}

    @property
    def CELERY_TASK_DEFAULT_QUEUE_TYPE(self) -> str:
        return broker.find(self.CELERY_BROKER_URL).queue_type

    @property
    def CELERY_TASK_DEFAULT_EXCHANGE_TYPE(self) -> str:
        return broker.find(self.CELERY_BROKER_URL).exchange_type

    @computed
    def CELERY_TASK_CREATE_MISSING_QUEUE_TYPE(self) -> str:
        return self.CELERY_TASK_DEFAULT_QUEUE_TYPE

    # Reliability: a message is acknowledged only after its task has finished
    CELERY_TASK_ACKS_LATE = True
    CELERY_TASK_REJECT_ON_WORKER_LOST = True
    CELERY_WORKER_PREFETCH_MULTIPLIER = 1
    CELERY_WORKER_CONSUMER = "prodserver_ops.worker.consumer:Consumer"
    CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = True
    CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
    CELERY_BROKER_CONNECTION_MAX_RETRIES = None

    # Time limits of tasks, in seconds: the first raises an exception, the second kills the process
    CELERY_TASK_SOFT_TIME_LIMIT = 240
    CELERY_TASK_TIME_LIMIT = 300

    # How long RabbitMQ lets a task take, in seconds: its consumer_timeout
    RABBITMQ_CONSUMER_TIMEOUT = 1800

    # Serialization: only JSON, which cannot execute code. Results expire after a week
    CELERY_ACCEPT_CONTENT: list[str] = ["json"]
    CELERY_RESULT_BACKEND: str | None = None
    CELERY_RESULT_EXTENDED = True

    @computed
    def CELERY_TASK_IGNORE_RESULT(self) -> bool:
        return self.CELERY_RESULT_BACKEND is None

    @computed
    def CELERY_RESULT_EXPIRES(self) -> timedelta | None:
        return timedelta(days=7) if self.CELERY_RESULT_BACKEND else None

    # Celery's defaults. Celery reads them for each message, which is faster if they are set.
    CELERY_TASK_ALWAYS_EAGER = False
    CELERY_TASK_SEND_SENT_EVENT = False
    CELERY_TASK_REPR_MAXLEVELS = 3
    CELERY_BROKER_POOL_ACQUIRE_TIMEOUT: float | None = None

    # Django's own tasks, which packages use: Celery's workers run them. Django 5.2 has none
    if django.VERSION >= (6, 0):
        TASKS: dict[str, Any] = {
            "default": {
                "BACKEND": "prodserver_ops.worker.django_tasks.Backend",
                "ENQUEUE_ON_COMMIT": True,
            },
        }

    # Beat: schedules from the database. A missed run is queued up to an hour late
    CELERY_BEAT_SCHEDULER = "prodserver_ops.scheduling.scheduler:Scheduler"
    CELERY_BEAT_CRON_STARTING_DEADLINE = 3600

    @computed
    def CELERY_TIMEZONE(self) -> str:
        return self.TIME_ZONE

    # Remote control, such as `celery inspect active`: each service has its own exchange, so that
    # services can share a broker
    @computed
    def CELERY_CONTROL_EXCHANGE(self) -> str:
        return self.PACKAGE

    # An exclusive queue would stop two processes with the same node name from overlapping.
    CELERY_CONTROL_QUEUE_EXCLUSIVE = False
    CELERY_CONTROL_QUEUE_DURABLE = True

    # Processes
    PORT = env(8000, cast=or_empty(port, 8000))  # It may be empty, except for web.
    BIND_HOST = env("127.0.0.1", cast=host)
    WEB_CONCURRENCY = env(1, cast=integer(1))
    WEB_THREADS = env(4, cast=integer(1))
    WORKER_CONCURRENCY = env(2, cast=integer(1))
    WORKER_POOL = "threads"  # Ctrl-C also reaches child processes and would end their tasks.

    @env(cast=site_url)
    def SITE_URL(self) -> str:
        return f"http://localhost:{self.PORT}"

    # Number of proxies in front of the service that append to X-Forwarded-For
    PROXY_COUNT = env(0, cast=integer(0, 10))

    # Time limit of a statement in PostgreSQL, in seconds; see core/database.py
    DATABASE_STATEMENT_TIMEOUT = env(30, cast=integer(1, 3600))

    # Folder of the lock files that processes use with SQLite
    @computed
    def LOCK_DIR(self) -> Path:
        return self.VAR_DIR / "locks"

    # How many e-mails of a digest a task sends at the same time, each over its own connection
    EMAIL_CONNECTIONS = env(1, cast=integer(1, 100))

    # Maximum size of uploaded files in a request, in bytes; see web/uploads.py
    UPLOAD_MAX_SIZE = 5 * 2**20

    # Backups, such as /var/backups/*.dump: ``manage.py drill`` tries the newest
    BACKUP_PATH = env("")

    # How many days rows are kept, if not as long as in console/retention.py; None forever
    KEEP_DAYS: dict[str, int | None] = {}

    # Whether failed logins are limited; see web/logins.py
    THROTTLE_LOGINS = False

    # How many days an API token is valid
    TOKEN_DAYS = env(90, cast=integer(1, 3650))

    # Logs: one line for each event, all through one handler; see core/logs.py
    LOG_LEVEL = env("INFO", cast=one_of("DEBUG", "INFO", "WARNING", "ERROR"))
    LOG_FORMAT = env("text", cast=one_of("text", "json"))
    LOG_REDACTED_PATHS: tuple[str, ...] = ()

    @computed
    def LOGGING(self) -> dict[str, Any]:
        return {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "text": {"()": "prodserver_ops.core.logs.TextFormatter"},
                "json": {"()": "prodserver_ops.core.logs.JsonFormatter"},
            },
            "filters": {"rejected": {"()": "prodserver_ops.core.logs.RejectedRequestFilter"}},
            "handlers": {
                "console": {
                    "()": "prodserver_ops.core.logs.make_handler",
                    "formatter": self.LOG_FORMAT,
                },
            },
            "root": {"handlers": ["console"], "level": self.LOG_LEVEL},
            "loggers": {
                # Remove Django's own handlers.
                "django": {"level": self.LOG_LEVEL},
                "django.server": {"propagate": True},
                # The request log already has a line for each 4xx response.
                "django.request": {"level": "ERROR"},
            }
            | {f"django.security.{name}": {"filters": ["rejected"]} for name in REJECTIONS},
        }

    # Sentry: errors and missed schedules, if SENTRY_DSN is set
    SENTRY_DSN = env("", cast=or_empty(sentry_dsn))
    SENTRY_ENVIRONMENT = "development"

    # Alerts: administrators are told of problems, unless DEBUG is on; see console/alerts.py
    ALERTS = env(True, cast=boolean)
    ALERT_WEBHOOK = env("", cast=or_empty(webhook_url))


class Defaults(ProcessDefaults):
    """All settings that services share, with values for development."""

    # Security
    DEBUG = env(True, cast=boolean)
    SECRET_KEY = env("django-insecure-for-development-only")
    SECRET_KEY_FALLBACKS = env("", cast=or_empty(secret_keys, []))
    ALLOWED_HOSTS = env("localhost,127.0.0.1,[::1]", cast=hosts)
    ADMIN_PATH = env("admin/", cast=path)
    THROTTLE_LOGINS = True
    AUTHENTICATION_BACKENDS: list[str] = ["prodserver_ops.web.logins.ThrottledBackend"]
    SECURE_REFERRER_POLICY = "same-origin"
    CSRF_FAILURE_VIEW = "prodserver_ops.web.errors.csrf_failure"
    # Pages load resources only from this service and run no inline scripts or styles.
    SECURE_CSP: dict[str, list[str]] = {
        "default-src": ["'self'"],
        "img-src": ["'self'", "data:"],
        "object-src": ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'self'"],
        "frame-ancestors": ["'none'"],
    }

    # Requests: maximum size without files, in bytes; UPLOAD_MAX_SIZE limits files
    DATA_UPLOAD_MAX_MEMORY_SIZE = 2**20
    FILE_UPLOAD_HANDLERS: list[str] = [
        "prodserver_ops.web.uploads.LimitedUploadHandler",
        "django.core.files.uploadhandler.MemoryFileUploadHandler",
        "django.core.files.uploadhandler.TemporaryFileUploadHandler",
    ]

    # Messages framework: messages are stored in the session, without an additional cookie
    MESSAGE_STORAGE = "django.contrib.messages.storage.session.SessionStorage"

    # Caches: in the memory of each process. Shared counters have a table; see core/limits.py
    CACHES: dict[str, Any] = {
        "default": {
            "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
            "OPTIONS": {"MAX_ENTRIES": 10_000},
        },
    }

    # Static files, served by WhiteNoise; directly from the apps while DEBUG is on
    STATIC_URL = "static/"

    @computed
    def STATIC_ROOT(self) -> Path:
        return Path(self.BASE_DIR, "staticfiles")

    STORAGES: dict[str, Any] = {
        "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }

    # Database: SQLite, configured for several processes that write at the same time
    @env(key="DATABASE_URL", cast=development_database_url)
    def database(self) -> dict[str, Any]:
        return get_sqlite(self.VAR_DIR / "db.sqlite3")

    @computed
    def DATABASES(self) -> dict[str, Any]:
        return {"default": limit_database(self.database)}

    # E-mail: printed to the console and kept in var/mail, unless EMAIL_HOST is set
    # With EMAIL_HOST_USER, the default is STARTTLS on port 587
    EMAIL_HOST = env("", cast=or_empty(host))
    EMAIL_HOST_USER = env("")
    EMAIL_HOST_PASSWORD = env("")
    EMAIL_USE_SSL = env(False, cast=boolean)
    EMAIL_TIMEOUT = 30

    @env(cast=boolean)
    def EMAIL_USE_TLS(self) -> bool:
        return bool(self.EMAIL_HOST_USER) and not self.EMAIL_USE_SSL

    @env(cast=port)
    def EMAIL_PORT(self) -> int:
        if self.EMAIL_USE_SSL:
            return 465
        return 587 if self.EMAIL_USE_TLS else 25

    @env(cast=email_address)
    def DEFAULT_FROM_EMAIL(self) -> str:
        return f"noreply@{self.DOMAIN}"

    # Django's e-mail backend if there is no server
    EMAIL_WITHOUT_SERVER = "console"

    # Alternative to SMTP: the HTTP API of a provider that django-anymail supports
    # https://anymail.dev/en/stable/esps/
    EMAIL_API = env("", cast=or_empty(email_api, None))

    @computed
    def ANYMAIL(self) -> dict[str, str]:
        return self.EMAIL_API[1] if self.EMAIL_API else {}

    @computed
    def EMAIL_BACKEND(self) -> str:
        if self.EMAIL_API:
            return f"anymail.backends.{self.EMAIL_API[0]}.EmailBackend"
        backend = "smtp" if self.EMAIL_HOST else self.EMAIL_WITHOUT_SERVER
        if backend == "console":
            return "prodserver_ops.mail.console.EmailBackend"
        return f"django.core.mail.backends.{backend}.EmailBackend"

    @computed
    def SERVER_EMAIL(self) -> str:
        address: str = self.DEFAULT_FROM_EMAIL
        return address


class TestDefaults(Defaults):
    """Tests: no message leaves the process unless the environment names a broker."""

    is_test = True

    DEBUG = False
    CELERY_BROKER_URL = env("memory://", cast=broker_url("memory"))
    WHITENOISE_AUTOREFRESH = True

    # Concurrent test runs do not share locks
    @computed
    def LOCK_DIR(self) -> Path:
        return Path(self.VAR_DIR, "locks", f"tests-{os.getpid()}")

    PASSWORD_HASHERS: list[str] = ["django.contrib.auth.hashers.MD5PasswordHasher"]


class ProductionProcessDefaults(ProcessDefaults):
    """Settings that web, worker and beat need in production."""

    is_production = True

    # Number of proxies in front of the service that append to X-Forwarded-For
    PROXY_COUNT = env(1, cast=integer(0, 10))

    @env(cast=site_url)
    def SITE_URL(self) -> str:
        return f"https://{self.DOMAIN}"

    # How many e-mails of a digest a task sends at the same time
    EMAIL_CONNECTIONS = env(8, cast=integer(1, 100))

    @env(cast=broker_url())
    def CELERY_BROKER_URL(self) -> str:
        name = self.BROKER_VARIABLE
        url: str = env(env.Required, key=name, cast=broker_url(variable=name))()
        return url

    # Processes
    BIND_HOST = env("0.0.0.0", cast=host)
    WEB_CONCURRENCY = env(2, cast=integer(1))
    WORKER_POOL = "prefork"

    # Logs and errors
    LOG_FORMAT = env("json", cast=one_of("text", "json"))
    SENTRY_ENVIRONMENT = "production"


class ProductionDefaults(ProductionProcessDefaults, Defaults):
    """Production: required secrets, HTTPS only, PostgreSQL and a broker."""

    # Security
    DEBUG = False
    SECRET_KEY = env(env.Required, cast=secret_key)

    @env(cast=hosts)
    def ALLOWED_HOSTS(self) -> list[str]:
        return [self.DOMAIN]

    # HTTPS: behind a proxy that sets X-Forwarded-Proto
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_SSL_REDIRECT = env(True, cast=boolean)
    SECURE_HSTS_SECONDS = env(3600, cast=integer(0))
    SECURE_HSTS_INCLUDE_SUBDOMAINS = env(True, cast=boolean)
    SILENCED_SYSTEM_CHECKS: list[str] = ["security.W021"]  # HSTS preloading is hard to undo.
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True

    # Static files: hashed names, compressed, cached by browsers forever
    STORAGES: dict[str, Any] = {
        "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
        "staticfiles": {"BACKEND": "prodserver_ops.web.static.ManifestStorage"},
    }
    WHITENOISE_KEEP_ONLY_HASHED_FILES = True

    # Database: persistent connections, checked before they are reused
    database = env(env.Required, key="DATABASE_URL", cast=database_url)

    @computed
    def DATABASES(self) -> dict[str, Any]:
        return {
            "default": {
                "CONN_MAX_AGE": 60,
                "CONN_HEALTH_CHECKS": True,
                **limit_database(self.database),
            },
        }

    # E-mail
    EMAIL_HOST = env("localhost", cast=host)


class StagingDefaults(ProductionDefaults):
    """Staging: like production, but on its own domain and without e-mail to real people."""

    is_staging = True

    SECURE_HSTS_SECONDS = env(60, cast=integer(0))
    SENTRY_ENVIRONMENT = "staging"

    # E-mail: discarded unless EMAIL_HOST is set; the console backend would print it to the logs
    EMAIL_HOST = env("", cast=or_empty(host))
    EMAIL_WITHOUT_SERVER = "dummy"
