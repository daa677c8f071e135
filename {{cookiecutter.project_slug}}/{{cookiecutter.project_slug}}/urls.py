"""URLs of the service. Middleware responds to the health checks under ``/health/``."""

from django.conf import settings
from django.contrib import admin
from django.urls import include, path
from django.views.generic import TemplateView
from prodserver_ops.api import root, schema
from prodserver_ops.api.views import TokenView
from prodserver_ops.development import welcome
from prodserver_ops.mail import preview, unsubscribe
from prodserver_ops.web import errors

from .api import router

home = TemplateView.as_view(
    template_name="home.html",
    extra_context={
        "site_name": settings.SITE_NAME,
        "description": settings.SPECTACULAR_SETTINGS["DESCRIPTION"],
        "debug": settings.DEBUG,
    },
)

docs = TemplateView.as_view(
    template_name="docs.html", extra_context={"site_name": settings.SITE_NAME}
)

urlpatterns = [
    path("", home, name="home"),
    path("welcome/", include(welcome)),
    path("emails/", include(preview)),
    path("unsubscribe/<token>/", unsubscribe.view, name="unsubscribe"),
    path("api/", include(router.urls)),
    path("api/token/", TokenView.as_view(), name="token"),
    path("api/schema/", schema.view, name="schema"),
    path("api/docs/", docs, name="docs"),
    path("api/", include(root)),
    path(settings.ADMIN_PATH, admin.site.urls),
]

handler400, handler403 = errors.handler400, errors.handler403
handler404, handler500 = errors.handler404, errors.handler500
