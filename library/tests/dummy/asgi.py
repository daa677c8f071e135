import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "dummy.settings")

django = get_asgi_application()

from prodserver_ops.web.asgi import LimitedApplication  # noqa: E402

application = LimitedApplication(django)
