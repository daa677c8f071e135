from django.conf import settings
from django.contrib import admin
from django.urls import include, path

from prodserver_ops.api import root, schema
from prodserver_ops.api.views import TokenView
from prodserver_ops.development import welcome
from prodserver_ops.mail import preview, unsubscribe
from prodserver_ops.web import errors

urlpatterns = [
    path("welcome/", include(welcome)),
    path("emails/", include(preview)),
    path("unsubscribe/<token>/", unsubscribe.view, name="unsubscribe"),
    path("api/token/", TokenView.as_view(), name="token"),
    path("api/schema/", schema.view, name="schema"),
    path("api/", include(root)),
    path(settings.ADMIN_PATH, admin.site.urls),
]

handler400, handler403 = errors.handler400, errors.handler403
handler404, handler500 = errors.handler404, errors.handler500
