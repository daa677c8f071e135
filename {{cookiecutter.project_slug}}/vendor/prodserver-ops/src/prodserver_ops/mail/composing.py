"""Compose e-mail."""

from email.headerregistry import HeaderRegistry, UnstructuredHeader
from email.policy import EmailPolicy, default
from email.utils import parseaddr
from functools import cache
from typing import Any

import django
from django.conf import settings
from django.core.mail import EmailMultiAlternatives
from django.template.loader import get_template

from .digests import Message, email_of
from .unsubscribe import link

#: Headers that must stay on one line, in ASCII. Python's policies convert long words to encoded
#: words (RFC 2047), which mail clients cannot read in these headers.
PLAIN_HEADERS = ("List-Unsubscribe", "Message-ID")


class PlainHeader(UnstructuredHeader):
    """A header that is never folded or encoded."""

    def fold(self, *, policy: EmailPolicy) -> str:
        """Return the line of the header."""
        return f"{self.name}: {self}{policy.linesep}"  # type: ignore[attr-defined]


class Headers(HeaderRegistry):
    """Caches header classes. Python's registry creates a class for each header of each message."""

    def __init__(self) -> None:
        super().__init__()
        self.classes: dict[str, Any] = {}
        for name in PLAIN_HEADERS:
            self.map_to_type(name, PlainHeader)  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> Any:
        """Return the class for a header name."""
        if name not in self.classes:
            self.classes[name] = super().__getitem__(name)
        return self.classes[name]


HEADERS = Headers()


class Email(EmailMultiAlternatives):
    """An e-mail that does not encode the links in its headers."""

    def message(self, **kwargs: Any) -> Any:
        """Return the message for a mail server."""
        # Django 5.2 uses an older class, without a policy, which does not encode them.
        if django.VERSION >= (6, 0):
            kwargs["policy"] = kwargs.get("policy", default).clone(header_factory=HEADERS)
        return super().message(**kwargs)


def compose(message: Message, recipient: Any, context: dict[str, Any], message_id: str) -> Email:
    """Return the e-mail in text and HTML.

    ``message_id`` is the local part of its Message-ID; each attempt must use the same. If
    the message has an ``unsubscribe_label``, mail clients can unsubscribe with one click
    (RFC 8058).
    """
    domain = _domain(settings.DEFAULT_FROM_EMAIL)
    headers = {
        "Message-ID": f"<{message_id}@{domain}>",
        # Vacation responders do not respond to it (RFC 3834).
        "Auto-Submitted": "auto-generated",
    }
    subject = f"{settings.SITE_NAME}: {message.get_subject(context)}"
    context = {
        "site_name": settings.SITE_NAME,
        "subject": subject,
        "recipient": recipient,
        **context,
    }
    if message.unsubscribe_label is not None:
        context["unsubscribe_url"] = link(recipient, message)
        headers["List-Unsubscribe"] = f"<{context['unsubscribe_url']}>"
        headers["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    email = Email(
        subject,
        _template(f"email/{message.template}.txt").render(context),
        to=[email_of(recipient)],
        headers=headers,
    )
    email.attach_alternative(
        _template(f"email/{message.template}.html").render(context), "text/html"
    )
    return email


@cache
def _template(name: str) -> Any:
    return get_template(name)


@cache
def _domain(address: str) -> str:
    return parseaddr(address)[1].rpartition("@")[2]
