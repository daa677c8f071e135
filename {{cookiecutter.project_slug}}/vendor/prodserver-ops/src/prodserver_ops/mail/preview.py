"""Pages that show each e-mail with sample data, in development only."""

from django.conf import settings
from django.contrib.auth import get_user_model
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path

from .composing import Email, compose
from .digests import registry
from .unsubscribe import get_base

#: An e-mail has inline styles and loads no resources; the page cannot run scripts.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"


def compose_sample(name: str) -> Email:
    """Return an e-mail with sample data; raise Http404 if it is unknown or DEBUG is off."""
    if not settings.DEBUG or name not in registry:
        raise Http404
    model = get_user_model()
    fields = {model.USERNAME_FIELD: "alex", model.get_email_field_name(): "alex@example.com"}
    return compose(registry[name], model(pk=0, **fields), registry[name].get_sample(), "preview")


def index(request: HttpRequest) -> HttpResponse:
    """List all e-mails."""
    if not settings.DEBUG:
        raise Http404
    context = {"base": get_base(), "names": registry, "site_name": settings.SITE_NAME}
    return render(request, "ops/emails.html", context)


def show(request: HttpRequest, name: str, kind: str) -> HttpResponse:
    """Show an e-mail in HTML or in text."""
    email = compose_sample(name)
    if kind == "txt":
        text = f"Subject: {email.subject}\n\n{email.body}"
        return HttpResponse(text, content_type="text/plain; charset=utf-8")
    html = str(email.alternatives[0][0])
    return HttpResponse(html, headers={"Content-Security-Policy": POLICY})


urlpatterns = [
    path("", index, name="emails"),
    path("<slug:name>.<slug:kind>", show, name="email"),
]
