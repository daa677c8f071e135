"""Unsubscribing by a signed link, without a login (RFC 8058)."""

from functools import cache

from django.conf import settings
from django.core.signing import BadSignature, Signer
from django.http import Http404
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_http_methods

from .models import User

#: What one can unsubscribe from: how it is called, and what then changes.
KINDS = {
    "digest": ("the digests of your answers", {"digest_frequency": User.DigestFrequency.OFF}),
    "notification": ("the e-mail for every answer", {"notify_on_response": False}),
}

signer = Signer(salt="unsubscribe")


def link(user, kind):
    """Return the address where one click ends this kind of e-mail to the user."""
    return settings.SITE_URL + _path().replace("TOKEN", signer.sign(f"{user.pk}:{kind}"))


@cache
def _path():
    return reverse("unsubscribe", args=["TOKEN"])


@csrf_exempt  # The mail provider's request is no form of ours: the signature proves it.
@require_http_methods(["GET", "HEAD", "POST"])
def view(request, token):
    """Ask for the click, since mail scanners follow links; unsubscribe at a POST."""
    try:
        pk, kind = signer.unsign(token).split(":")
    except BadSignature as error:
        raise Http404("This link is not valid.") from error
    user = get_object_or_404(User, pk=pk)
    title, change = KINDS[kind]
    done = request.method == "POST"
    if done:
        User.objects.filter(pk=user.pk).update(**change)
    context = {"site_name": settings.SITE_NAME, "title": title, "email": user.email, "done": done}
    return render(request, "unsubscribe.html", context)
