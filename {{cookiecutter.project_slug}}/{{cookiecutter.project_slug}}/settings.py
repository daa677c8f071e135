"""Settings of the service, one class for each mode that ``DJANGO_MODE`` can name.

If it is not set, the mode is development; the other modes are ``test``, ``staging`` and ``prod``.
The base classes contain settings that most services do not change: database, e-mail, broker, logs,
security. docs/settings.md lists the environment variables.

https://django-classy-settings.readthedocs.io/
"""

from pathlib import Path

from prodserver_ops import conf
from prodserver_ops.conf import {{ cookiecutter.__conf_modules }}


class Settings({{ cookiecutter.__modules.split(", ") | select | each("{0}.Defaults, ") }}conf.Defaults):
    """Development, and the base of the other modes."""

    # The service; the name of its Python package is also the prefix of its queues
    SITE_NAME = {{ cookiecutter.project_name | one_line | python_string }}
    DOMAIN = "{{ cookiecutter.domain_name }}"
    PACKAGE = "{{ cookiecutter.project_slug }}"
    BASE_DIR = Path(__file__).resolve().parent.parent

    # Apps, each before those whose commands and templates it overrides
    INSTALLED_APPS = [
        "{{ cookiecutter.project_slug }}",
        "prodserver_ops",
        "django.contrib.admin",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "django.contrib.messages",
        "django.contrib.staticfiles",
        "{{ (["django_celery_beat"] + cookiecutter._task_results[cookiecutter.task_results].apps) | join('",\n        "') }}",
        "django_prodserver",
        "drf_spectacular_sidecar",
        "rest_framework",
    ]

    # Middleware; health checks come before any rule about hosts or HTTPS
    MIDDLEWARE = [
        "prodserver_ops.core.logs.RequestLogMiddleware",
        "prodserver_ops.web.health.HealthMiddleware",
        "django.middleware.security.SecurityMiddleware",
        "{{ cookiecutter._django_versions[cookiecutter.django_version].csp_middleware }}",
        "whitenoise.middleware.WhiteNoiseMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "prodserver_ops.web.uploads.UploadMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ]
    ROOT_URLCONF = "{{ cookiecutter.project_slug }}.urls"
    {{ cookiecutter.__interface | upper }}_APPLICATION = "{{ cookiecutter.project_slug }}.{{ cookiecutter.__interface }}.application"
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

    # Users and passwords
    AUTH_USER_MODEL = "{{ cookiecutter.project_slug }}.User"
    AUTH_PASSWORD_VALIDATORS = [
        {"NAME": f"django.contrib.auth.password_validation.{validator}"}
        for validator in (
            "UserAttributeSimilarityValidator",
            "MinimumLengthValidator",
            "CommonPasswordValidator",
            "NumericPasswordValidator",
        )
    ]

    # API: JSON only; each web process counts requests separately
    def REST_FRAMEWORK(self):
        return {
            "DEFAULT_AUTHENTICATION_CLASSES": [
                "prodserver_ops.api.tokens.TokenAuthentication",
                "rest_framework.authentication.SessionAuthentication",
            ],
            "DEFAULT_PARSER_CLASSES": [
                "prodserver_ops.api.parsers.BoundedJSONParser",
            ],
            # A view that is public overrides this.
            "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
            "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
            "EXCEPTION_HANDLER": "prodserver_ops.api.views.exception_handler",
            "DEFAULT_SCHEMA_CLASS": conf.SCHEMA_CLASS,
            "DEFAULT_THROTTLE_CLASSES": [
                "prodserver_ops.api.throttles.AnonymousThrottle",
                "prodserver_ops.api.throttles.UserThrottle",
            ],
            "DEFAULT_THROTTLE_RATES": {"anon": "60/min", "user": "120/min"},
            "NUM_PROXIES": self.PROXY_COUNT,
        }

    SPECTACULAR_SETTINGS = {
        "TITLE": SITE_NAME,
        "DESCRIPTION": {{ cookiecutter.description | python_string }},
        "VERSION": "1.0.0",
        "SCHEMA_PATH_PREFIX": "/api",
    }

    # Language, and the time zone that schedules run in
    LANGUAGE_CODE = "en"
    TIME_ZONE = "{{ cookiecutter.timezone }}"
    USE_TZ = True

    # Tasks: the result backend, if any, and the variable with the broker's URL
    CELERY_RESULT_BACKEND = {{ cookiecutter._task_results[cookiecutter.task_results].backend | python_value }}
    BROKER_VARIABLE = "{{ cookiecutter._brokers[cookiecutter.broker].variable }}"

    # Logs: prefixes of paths with a secret, which is redacted up to the next slash
    LOG_REDACTED_PATHS: tuple[str, ...] = ("/unsubscribe/",)

    # Processes: python manage.py prodserver <process>; keyword arguments become its arguments
    def PRODUCTION_PROCESSES(self):
        return {
            "web": processes.{{ cookiecutter.web_server }}(self),
            "worker": processes.worker(self{{ cookiecutter._queues[cookiecutter.queues].worker_arguments | each(", {0}=self.{1}") }}),{{ cookiecutter._queues[cookiecutter.queues].processes | each('\n            "{0}": {1}.get_process(self),') }}
            "beat": processes.beat(self),{{ cookiecutter._monitoring[cookiecutter.monitoring].processes | each('\n            "{0}": {1}.get_process(self),') }}
        }


# A value in Settings holds in every mode. The classes below override it, and the library's follow.


class TestSettings(Settings, conf.TestDefaults):
    """Tests."""


class ProdSettings(Settings, conf.ProductionDefaults):
    """Production."""


class StagingSettings(ProdSettings, conf.StagingDefaults):
    """Staging: like production, but on its own domain."""

    DOMAIN = "staging.{{ cookiecutter.domain_name }}"


__getattr__, __dir__ = conf.use(Settings)
