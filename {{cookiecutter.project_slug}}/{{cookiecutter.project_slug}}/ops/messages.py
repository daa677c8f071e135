"""Compose e-mail."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from email.headerregistry import HeaderRegistry, UnstructuredHeader
from email.message import EmailMessage
from email.policy import EmailPolicy
from email.utils import parseaddr
from functools import cache
from typing import Any

from django.conf import settings
from django.core.mail import EmailMultiAlternatives
from django.template.loader import get_template

from .digests import Message, email_of
from .unsubscribe import link

#: Headers that stay on one line in ASCII: mailers cannot read them in encoded words (RFC 2047),
#: which Python's policies make of any long word.
PLAIN_HEADERS = ("List-Unsubscribe", "Message-ID")


class PlainHeader(UnstructuredHeader):
    """A header that is never folded or encoded."""

    def fold(self, *, policy: EmailPolicy) -> str:
        """Return the line of the header."""
        return f"{self.name}: {self}{policy.linesep}"  # type: ignore[attr-defined]


HEADERS = HeaderRegistry()
for _name in PLAIN_HEADERS:
    HEADERS.map_to_type(_name, PlainHeader)  # type: ignore[arg-type]


class Email(EmailMultiAlternatives):
    """An e-mail whose links in headers leave as they are."""

    def message(self, **kwargs: Any) -> Any:
        """Return the message for a mail server."""
        message: Any = super().message(**kwargs)
        # Django 5.2 uses an older class, which does not encode them.
        if isinstance(message, EmailMessage):
            plain = {name: str(message[name]) for name in PLAIN_HEADERS if name in message}
            policy: Any = message.policy
            message.policy = policy.clone(header_factory=HEADERS)
            for name, value in plain.items():
                del message[name]
                message[name] = value
        return message


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


@contextmanager
def deferred_sigterm() -> Iterator[None]:
    """Defer SIGTERM to the end of the block.

    Celery sends it to a running task when the connection to the broker is lost.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
