"""Pages that show the e-mails that were sent, and each with sample data, in development only."""

from django.conf import settings
from django.contrib.auth import get_user_model
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path

from . import console
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
    context = {
        "base": get_base(),
        "names": registry,
        "sent": console.get_latest(console.KEPT),
        "site_name": settings.SITE_NAME,
    }
    return render(request, "ops/emails.html", context)


def show(request: HttpRequest, name: str, kind: str) -> HttpResponse:
    """Show an e-mail in HTML or in text."""
    email = compose_sample(name)
    html = str(email.alternatives[0][0]) if kind == "html" else ""
    return make_response(f"Subject: {email.subject}\n\n{email.body}", html)


def show_sent(request: HttpRequest, name: str, kind: str) -> HttpResponse:
    """Show an e-mail that was sent, in HTML, if it has any, or in text."""
    if not settings.DEBUG:
        raise Http404
    try:
        email = console.read(name)
    except OSError as error:
        raise Http404 from error
    text = f"Subject: {email.subject}\nTo: {email.to}\n\n{email.get_text('plain')}"
    return make_response(text, email.get_text("html") if kind == "html" else "")


def make_response(text: str, html: str) -> HttpResponse:
    """Return the response with an e-mail in HTML; in text if ``html`` is empty."""
    if not html:
        return HttpResponse(text, content_type="text/plain; charset=utf-8")
    return HttpResponse(html, headers={"Content-Security-Policy": POLICY})


urlpatterns = [
    path("", index, name="emails"),
    path("sent/<slug:name>.<slug:kind>", show_sent, name="sent_email"),
    path("<slug:name>.<slug:kind>", show, name="email"),
]
