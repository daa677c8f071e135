"""Unsubscribe through a signed link, without a login (RFC 8058)."""

from functools import cache
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.signing import BadSignature, Signer
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, render
from django.template.loader import select_template
from django.urls import reverse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_http_methods

from ..core.urls import make_absolute
from .digests import Message, email_of, registry

signer = Signer(salt="unsubscribe")


def link(recipient: Any, message: Message) -> str:
    """Return the absolute URL that unsubscribes the recipient from this message."""
    token = signer.sign(f"{recipient.pk}:{message.name}")
    return make_absolute(_path()).replace("TOKEN", token)


@cache
def _path() -> str:
    return reverse("unsubscribe", args=["TOKEN"])


@csrf_exempt  # Mail providers post without a CSRF token; the signature authenticates.
@require_http_methods(["GET", "HEAD", "POST"])
def view(request: HttpRequest, token: str) -> HttpResponse:
    """Ask for confirmation, because mail scanners follow links; unsubscribe on POST."""
    try:
        pk, name = signer.unsign(token).split(":")
    except BadSignature as error:
        raise Http404("This link is not valid.") from error
    message = registry.get(name)
    if message is None or message.unsubscribe_label is None:
        raise Http404("This link is for e-mail that is no longer sent.")
    recipient = get_object_or_404(get_user_model(), pk=pk)
    done = request.method == "POST"
    if done:
        message.unsubscribe(recipient)
    context = {
        "base": get_base(),
        "site_name": settings.SITE_NAME,
        "email": email_of(recipient),
        "label": message.unsubscribe_label,
        "done": done,
    }
    return render(request, ["unsubscribe.html", "ops/unsubscribe.html"], context)


def get_base() -> Any:
    """Return the template that pages extend: the project's, or a plain one."""
    return select_template(["base.html", "ops/base.html"])
