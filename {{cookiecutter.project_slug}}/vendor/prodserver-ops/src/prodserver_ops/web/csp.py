"""The content security policy, from the setting that Django 6.0 and later use."""

from csp.middleware import CSPMiddleware, PolicyParts
from django.conf import settings
from django.http import HttpRequest
from django.http.response import HttpResponseBase


class ContentSecurityPolicyMiddleware(CSPMiddleware):
    """Sends the policies in ``SECURE_CSP`` and ``SECURE_CSP_REPORT_ONLY``."""

    def get_policy_parts(
        self, request: HttpRequest, response: HttpResponseBase, report_only: bool = False
    ) -> PolicyParts:
        """Return the policy of a response; a view may have set its own."""
        parts = super().get_policy_parts(request, response, report_only)
        if parts.config is None:
            name = "SECURE_CSP_REPORT_ONLY" if report_only else "SECURE_CSP"
            parts.config = getattr(settings, name, None) or None
        return parts
