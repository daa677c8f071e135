"""Settings of the project, with the classes that generated services use."""

import os
from pathlib import Path
from typing import Any

from prodserver_ops import conf
from prodserver_ops.conf import processes


class Settings(conf.Defaults):
    PACKAGE = "dummy"
    BASE_DIR = Path(__file__).resolve().parent
    SITE_NAME = "Dummy"
    DOMAIN = "dummy.example.com"
    TIME_ZONE = os.environ.get("TEST_TIME_ZONE", "UTC")
    INSTALLED_APPS = [
        "dummy",
        "prodserver_ops",
        "django.contrib.admin",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "django.contrib.messages",
        "django.contrib.staticfiles",
        "django_celery_beat",
        "django_celery_results",
        "django_prodserver",
        "rest_framework",
    ]
    MIDDLEWARE = [
        "prodserver_ops.core.logs.RequestLogMiddleware",
        "prodserver_ops.web.health.HealthMiddleware",
        "django.middleware.security.SecurityMiddleware",
        "django.middleware.csp.ContentSecurityPolicyMiddleware",
        "whitenoise.middleware.WhiteNoiseMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "prodserver_ops.web.uploads.UploadMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ]
    ROOT_URLCONF = "dummy.urls"
    WSGI_APPLICATION = "dummy.wsgi.application"
    ASGI_APPLICATION = "dummy.asgi.application"
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
    AUTH_USER_MODEL = "dummy.User"
    LANGUAGE_CODE = os.environ.get("TEST_LANGUAGE_CODE", "en")
    USE_TZ = True
    LOG_REDACTED_PATHS = ("/unsubscribe/",)

    def REST_FRAMEWORK(self) -> dict[str, Any]:
        return {
            "DEFAULT_AUTHENTICATION_CLASSES": ["prodserver_ops.api.tokens.TokenAuthentication"],
            "DEFAULT_PARSER_CLASSES": ["prodserver_ops.api.parsers.BoundedJSONParser"],
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

    SPECTACULAR_SETTINGS = {"TITLE": "Dummy", "VERSION": "1.0.0", "SCHEMA_PATH_PREFIX": "/api"}

    def PRODUCTION_PROCESSES(self) -> dict[str, Any]:
        return processes.get_default(self)


class TestSettings(Settings, conf.TestDefaults):
    pass


class ProdSettings(Settings, conf.ProductionDefaults):
    BROKER_VARIABLE = "RABBITMQ_URL"


class StagingSettings(ProdSettings, conf.StagingDefaults):
    pass


__getattr__, __dir__ = conf.use(Settings)
