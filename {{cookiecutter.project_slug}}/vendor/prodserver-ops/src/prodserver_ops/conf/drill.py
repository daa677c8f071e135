"""The settings of ``manage.py drill``: those of the service, on a copy of its database, and silent.

E-mail is dropped, the broker is a folder, caches are in memory, and nobody is alerted. The database
of production is ``production``, for comparison.
"""

import json
import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .. import broker

# The settings module of the service, the folder of files, and the name of the copy.
_drill: dict[str, str] = json.loads(os.environ["PRODSERVER_DRILL"])
_module = import_module(_drill["settings"])
_values: dict[str, Any] = {name: getattr(_module, name) for name in dir(_module) if name.isupper()}
_default = _values["DATABASES"]["default"]

_values |= {
    "DATABASES": {
        **_values["DATABASES"],
        "default": _default | {"NAME": _drill["database"]},
        "production": _default | {"CONN_MAX_AGE": 0},
    },
    "VAR_DIR": Path(_drill["folder"]),
    "LOCK_DIR": Path(_drill["folder"], "locks"),
    "CELERY_BROKER_URL": "filesystem://localhost",
    "CELERY_BROKER_TRANSPORT_OPTIONS": broker.get_options(
        "filesystem://localhost", SimpleNamespace(VAR_DIR=Path(_drill["folder"]))
    ),
    "EMAIL_BACKEND": "django.core.mail.backends.dummy.EmailBackend",
    "ALERTS": False,
    "ALERT_WEBHOOK": "",
    "SENTRY_DSN": "",
    "CACHES": {
        alias: {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "LOCATION": alias}
        for alias in ["default", *_values.get("CACHES", ())]
    },
    "CHANNEL_LAYERS": {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}},
    # The broker is refused in production.
    "SILENCED_SYSTEM_CHECKS": [*_values.get("SILENCED_SYSTEM_CHECKS", ()), "settings.E002"],
    # Other processes do what this package does not know.
    "PRODUCTION_PROCESSES": {
        name: process
        for name, process in _values["PRODUCTION_PROCESSES"].items()
        if not process["BACKEND"].endswith((".Command", "Flower"))
    },
}
if _values.get("CELERY_RESULT_BACKEND") != "django-db":
    _values |= {"CELERY_RESULT_BACKEND": None, "CELERY_TASK_IGNORE_RESULT": True}
globals().update(_values)
