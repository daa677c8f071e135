"""What keeps browsers, error pages and guessers in bounds, beside the settings for it."""

import re

from django.conf import settings
from django.views.debug import SafeExceptionReporterFilter


class PermissionsPolicyMiddleware:
    """Tells browsers which of their powers no page may use, as ``PERMISSIONS_POLICY`` says."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        response = self.get_response(request)
        response.headers.setdefault("Permissions-Policy", settings.PERMISSIONS_POLICY)
        return response


class ErrorPageFilter(SafeExceptionReporterFilter):
    """Hides in detailed error pages also the URLs that hold passwords."""

    hidden_settings = re.compile(
        f"{SafeExceptionReporterFilter.hidden_settings.pattern}|_URL$|_DSN$", re.IGNORECASE
    )

    def cleanse_setting(self, key, value):
        value = super().cleanse_setting(key, value)
        return re.sub(r"(?<=://)\S*@", "***@", value) if isinstance(value, str) else value

    def get_traceback_frame_variables(self, request, tb_frame):
        variables = super().get_traceback_frame_variables(request, tb_frame)
        return [(name, self.cleanse_setting(name, value)) for name, value in variables]
