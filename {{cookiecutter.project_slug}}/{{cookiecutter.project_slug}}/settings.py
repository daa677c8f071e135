"""Settings of the service, one class for each mode that ``DJANGO_MODE`` can name.

Unset is development; ``test``, ``staging`` and ``prod`` are the others. The
README lists every environment variable that is read here.

https://django-classy-settings.readthedocs.io/
"""

from pathlib import Path

from cbs import BaseSettings
from dotenv import load_dotenv

from .environment import (
    broker_url,
    database_url,
    email_address,
    env,
    host,
    hosts,
    one_of,
    or_empty,
    path,
    port,
    secret_key,
    sentry_dsn,
    site_url,
    switch,
    use,
    whole_number,
)

BASE_DIR = Path(__file__).resolve().parent.parent

# What the embedded database and broker keep; git ignores it.
VAR_DIR = BASE_DIR / "var"

# Values for this machine; what the environment already holds wins.
load_dotenv(BASE_DIR / ".env")


class Settings(BaseSettings):
    """Development, and the base of every other mode."""

    # Who we are
    SITE_NAME = {{ cookiecutter.project_name | one_line | python_string }}
    SITE_URL = env("http://localhost:8000", cast=site_url)
    DEBUG = env(True, cast=switch)
    SECRET_KEY = env("django-insecure-for-development-only")
    ALLOWED_HOSTS = env("localhost,127.0.0.1,[::1]", cast=hosts)

    # What runs in every process: ours first, so that its commands come first
    INSTALLED_APPS = [
        "{{ cookiecutter.project_slug }}",
        "django.contrib.admin",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "django.contrib.messages",
        "django.contrib.staticfiles",
        "django_celery_beat",
        "django_prodserver",
        "drf_spectacular",
        "drf_spectacular_sidecar",
        "rest_framework",
        "rest_framework.authtoken",
    ]

    # What every request passes: health checks come before any host or HTTPS rule
    MIDDLEWARE = [
        "{{ cookiecutter.project_slug }}.logs.RequestLogMiddleware",
        "{{ cookiecutter.project_slug }}.health.HealthMiddleware",
        "django.middleware.security.SecurityMiddleware",
        "{{ cookiecutter._django_versions[cookiecutter.django_version].csp_middleware }}",
        "{{ cookiecutter.project_slug }}.security.PermissionsPolicyMiddleware",
        "whitenoise.middleware.WhiteNoiseMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ]
    ROOT_URLCONF = "{{ cookiecutter.project_slug }}.urls"
    WSGI_APPLICATION = "{{ cookiecutter.project_slug }}.wsgi.application"
    TEMPLATES = [
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
            "OPTIONS": {
                "context_processors": [
                    "django.template.context_processors.request",
                    "django.contrib.auth.context_processors.auth",
                    "django.contrib.messages.context_processors.messages",
                ],
            },
        },
    ]
    ADMIN_PATH = env("admin/", cast=path)

    # What pages may do in a browser: load nothing from elsewhere, run no script within a page
    SECURE_CSP = {
        "default-src": ["'self'"],
        "img-src": ["'self'", "data:"],
        "object-src": ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'self'"],
        "frame-ancestors": ["'none'"],
    }{{ cookiecutter._django_versions[cookiecutter.django_version].csp_alias }}
    PERMISSIONS_POLICY = "camera=(), geolocation=(), microphone=(), payment=(), usb=()"
    SECURE_REFERRER_POLICY = "same-origin"
    DEFAULT_EXCEPTION_REPORTER_FILTER = "{{ cookiecutter.project_slug }}.security.ErrorPageFilter"

    # People, and logins: refused for a while after too many that failed
    AUTH_USER_MODEL = "{{ cookiecutter.project_slug }}.User"
    AUTHENTICATION_BACKENDS = ["{{ cookiecutter.project_slug }}.logins.ThrottledBackend"]
    AUTH_PASSWORD_VALIDATORS = [
        {"NAME": f"django.contrib.auth.password_validation.{validator}"}
        for validator in (
            "UserAttributeSimilarityValidator",
            "MinimumLengthValidator",
            "CommonPasswordValidator",
            "NumericPasswordValidator",
        )
    ]

    # API: JSON only; rates are counted in each web process
    REST_FRAMEWORK = {
        "DEFAULT_AUTHENTICATION_CLASSES": [
            "rest_framework.authentication.TokenAuthentication",
            "rest_framework.authentication.SessionAuthentication",
        ],
        "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
        "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
        "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
        "DEFAULT_THROTTLE_CLASSES": [
            "rest_framework.throttling.AnonRateThrottle",
            "rest_framework.throttling.UserRateThrottle",
            "rest_framework.throttling.ScopedRateThrottle",
        ],
        "DEFAULT_THROTTLE_RATES": {
            "anon": "60/min",
            "user": "120/min",
            "post": "30/hour",
            "login": "10/min",
        },
        "NUM_PROXIES": 0,
    }
    SPECTACULAR_SETTINGS = {
        "TITLE": SITE_NAME,
        "DESCRIPTION": {{ cookiecutter.description | python_string }},
        "VERSION": "1.0.0",
        "SERVE_INCLUDE_SCHEMA": False,
        "SWAGGER_UI_DIST": "SIDECAR",
        "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    }

    # Caches: one in each process, and one that all share, to count logins that fail
    CACHES = {
        "default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
        "logins": {
            "BACKEND": "django.core.cache.backends.db.DatabaseCache",
            "LOCATION": "failed_logins",
            "OPTIONS": {"MAX_ENTRIES": 10_000},
        },
    }

    # Time and language: schedules run in this time zone
    LANGUAGE_CODE = "en"
    TIME_ZONE = "{{ cookiecutter.timezone }}"
    USE_TZ = True

    # Static files, served by WhiteNoise straight from the apps while DEBUG is on
    STATIC_URL = "static/"
    STATIC_ROOT = BASE_DIR / "staticfiles"
    STORAGES = {
        "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }

    # Database: SQLite, tuned for three processes that write at once
    @env(key="DATABASE_URL", cast=database_url)
    def database(self):
        VAR_DIR.mkdir(exist_ok=True)
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": VAR_DIR / "db.sqlite3",
            "OPTIONS": {
                "timeout": 20,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            },
        }

    def DATABASES(self):
        return {"default": self.database}

    # E-mail: printed by the worker, or sent where a server is named
    EMAIL_HOST = env("", cast=or_empty(host))
    EMAIL_PORT = env(25, cast=port)
    EMAIL_HOST_USER = env("")
    EMAIL_HOST_PASSWORD = env("")
    EMAIL_USE_TLS = env(False, cast=switch)
    EMAIL_TIMEOUT = 30

    @env(cast=email_address)
    def DEFAULT_FROM_EMAIL(self):
        return "noreply@{{ cookiecutter.domain_name }}"

    def EMAIL_BACKEND(self):
        backend = "smtp" if self.EMAIL_HOST else "console"
        return f"django.core.mail.backends.{backend}.EmailBackend"

    def SERVER_EMAIL(self):
        return self.DEFAULT_FROM_EMAIL

    # Broker: folders that the three processes share, or what CELERY_BROKER_URL names
    CELERY_BROKER_URL = env(
        "filesystem://localhost", cast=broker_url("amqp", "amqps", "filesystem", "memory")
    )

    def CELERY_BROKER_TRANSPORT_OPTIONS(self):
        if not self.CELERY_BROKER_URL.startswith("filesystem:"):
            return {"confirm_publish": True}
        queue, control = VAR_DIR / "queue", VAR_DIR / "control"
        queue.mkdir(parents=True, exist_ok=True)
        control.mkdir(exist_ok=True)
        return {
            "data_folder_in": str(queue),
            "data_folder_out": str(queue),
            "control_folder": str(control),
        }

    # Queues: quorum queues on RabbitMQ; only a topic exchange delays messages for them
    # https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html
    CELERY_TASK_DEFAULT_QUEUE = "{{ cookiecutter.project_slug }}"
    CELERY_TASK_DEFAULT_QUEUE_TYPE = "quorum"
    CELERY_TASK_DEFAULT_EXCHANGE_TYPE = "topic"
    CELERY_TASK_CREATE_MISSING_QUEUE_TYPE = "quorum"

    # No lost task: a message is acknowledged once its task is done, and no sooner
    CELERY_TASK_ACKS_LATE = True
    CELERY_TASK_REJECT_ON_WORKER_LOST = True
    CELERY_WORKER_PREFETCH_MULTIPLIER = 1
    CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = True
    CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
    CELERY_BROKER_CONNECTION_MAX_RETRIES = None

    # No endless task, in seconds: an exception at the first limit, SIGKILL at the second
    CELERY_TASK_SOFT_TIME_LIMIT = 240
    CELERY_TASK_TIME_LIMIT = 300

    # No message that runs code, no result that nobody reads
    CELERY_ACCEPT_CONTENT = ["json"]
    CELERY_TASK_IGNORE_RESULT = True
    CELERY_RESULT_EXPIRES = None

    # Schedules: rows in the database, each updated as soon as it ran; one that is missed
    # by up to an hour is made up for
    CELERY_BEAT_SYNC_EVERY = 1
    CELERY_BEAT_CRON_STARTING_DEADLINE = 3600

    def CELERY_TIMEZONE(self):
        return self.TIME_ZONE

    # Remote control: beat answers `celery inspect ping` as workers do, apart from other services
    CELERY_BEAT_ENABLE_REMOTE_CONTROL = True
    CELERY_CONTROL_EXCHANGE = "{{ cookiecutter.project_slug }}"
    # Old and new of one name may overlap on one machine, which an exclusive queue forbids.
    CELERY_CONTROL_QUEUE_EXCLUSIVE = False
    CELERY_CONTROL_QUEUE_DURABLE = True

    # Processes: python manage.py prodserver web|worker|beat
    PORT = env(8000, cast=or_empty(port, 8000))  # Dokku gives an empty one to all but web.
    WEB_CONCURRENCY = env(1, cast=whole_number(1))
    WEB_THREADS = env(4, cast=whole_number(1))
    WORKER_CONCURRENCY = env(2, cast=whole_number(1))
    WORKER_POOL = "threads"  # A Ctrl-C reaches child processes too, and would end their tasks.
    BIND_HOST = env("127.0.0.1", cast=host)

    def PRODUCTION_PROCESSES(self):
        return {
            "web": {
                "BACKEND": "django_prodserver.backends.servers.gunicorn.GunicornServer",
                "ARGS": {
                    "bind": f"{self.BIND_HOST}:{self.PORT}",
                    "workers": self.WEB_CONCURRENCY,
                    "threads": self.WEB_THREADS,
                    "logger-class": "{{ cookiecutter.project_slug }}.gunicorn_log.GunicornLogger",
                    "log-level": self.LOG_LEVEL,
                    "no-control-socket": None,
                },
            },
            "worker": {
                "BACKEND": "django_prodserver.backends.workers.celery.CeleryWorker",
                "APP": "{{ cookiecutter.project_slug }}.celery_app",
                "ARGS": {
                    "loglevel": self.LOG_LEVEL,
                    "concurrency": self.WORKER_CONCURRENCY,
                    "pool": self.WORKER_POOL,
                },
            },
            "beat": {
                "BACKEND": "{{ cookiecutter.project_slug }}.backends.StandbyBeat",
                "APP": "{{ cookiecutter.project_slug }}.celery_app",
                "ARGS": {
                    "loglevel": self.LOG_LEVEL,
                    "scheduler": "django_celery_beat.schedulers:DatabaseScheduler",
                },
            },
        }

    # Logs: one line for every event, all through one handler; see logs.py
    LOG_LEVEL = env("INFO", cast=one_of("DEBUG", "INFO", "WARNING", "ERROR"))
    LOG_FORMAT = env("text", cast=one_of("text", "json"))

    def LOGGING(self):
        return {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "text": {"()": "{{ cookiecutter.project_slug }}.logs.TextFormatter"},
                "json": {"()": "{{ cookiecutter.project_slug }}.logs.JsonFormatter"},
            },
            "handlers": {
                "console": {
                    "()": "{{ cookiecutter.project_slug }}.logs.make_handler",
                    "formatter": self.LOG_FORMAT,
                },
            },
            "root": {"handlers": ["console"], "level": self.LOG_LEVEL},
            "loggers": {
                # Without handlers of Django's own.
                "django": {"level": self.LOG_LEVEL},
                "django.server": {"propagate": True},
                # A request that is refused has its line already.
                "django.request": {"level": "ERROR"},
            },
        }

    # Errors and missed schedules go to Sentry, where it is set
    SENTRY_DSN = env("", cast=or_empty(sentry_dsn))
    SENTRY_ENVIRONMENT = "development"


class TestSettings(Settings):
    """Tests: nothing leaves the process unless the environment says so."""

    DEBUG = False
    CELERY_BROKER_URL = env("memory://", cast=broker_url("amqp", "amqps", "memory"))
    WHITENOISE_AUTOREFRESH = True
    PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


class ProdSettings(Settings):
    """Production: required secrets, HTTPS only, PostgreSQL and RabbitMQ."""

    # Who we are
    DEBUG = False
    SECRET_KEY = env(env.Required, cast=secret_key)
    DOMAIN = "{{ cookiecutter.domain_name }}"

    @env(cast=site_url)
    def SITE_URL(self):
        return f"https://{self.DOMAIN}"

    @env(cast=hosts)
    def ALLOWED_HOSTS(self):
        return [self.DOMAIN]

    # HTTPS: behind a proxy that sets X-Forwarded-Proto. HSTS starts with an hour
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_SSL_REDIRECT = env(True, cast=switch)
    SECURE_HSTS_SECONDS = env(3600, cast=whole_number(0))
    SECURE_HSTS_INCLUDE_SUBDOMAINS = env(True, cast=switch)
    SILENCED_SYSTEM_CHECKS = ["security.W021"]  # Preloading is hard to take back.
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True

    # Static files with a hash in their name, compressed, cached for ever
    STORAGES = {
        "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
        "staticfiles": {"BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage"},
    }
    WHITENOISE_KEEP_ONLY_HASHED_FILES = True

    # API: one proxy stands before the service and tells who asks
    REST_FRAMEWORK = Settings.REST_FRAMEWORK | {"NUM_PROXIES": 1}

    # Database: connections are kept, and checked before they are used again
    database = env(env.Required, key="DATABASE_URL", cast=database_url)

    def DATABASES(self):
        return {
            "default": {"CONN_MAX_AGE": 60, "CONN_HEALTH_CHECKS": True, **self.database},
        }

    # E-mail
    EMAIL_HOST = env("localhost", cast=host)

    # Broker: what Dokku's RabbitMQ plugin sets, unless CELERY_BROKER_URL says otherwise
    @env(cast=broker_url("amqp", "amqps"))
    def CELERY_BROKER_URL(self):
        return env(env.Required, key="RABBITMQ_URL", cast=broker_url("amqp", "amqps"))()

    # Processes
    BIND_HOST = env("0.0.0.0", cast=host)
    WEB_CONCURRENCY = env(2, cast=whole_number(1))
    WORKER_POOL = "prefork"

    # Logs and errors
    LOG_FORMAT = env("json", cast=one_of("text", "json"))
    SENTRY_ENVIRONMENT = "production"


class StagingSettings(ProdSettings):
    """Staging: as production, under its own domain, and no mail to real people."""

    DOMAIN = "staging.{{ cookiecutter.domain_name }}"
    SECURE_HSTS_SECONDS = env(60, cast=whole_number(0))
    SENTRY_ENVIRONMENT = "staging"

    # E-mail: dropped unless a server is named, for a log is no place to print it
    EMAIL_HOST = env("", cast=or_empty(host))

    def EMAIL_BACKEND(self):
        backend = "smtp" if self.EMAIL_HOST else "dummy"
        return f"django.core.mail.backends.{backend}.EmailBackend"


__getattr__, __dir__ = use(Settings)
