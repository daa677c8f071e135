"""Compose e-mail, and classify the errors of the mail server."""

import signal
import smtplib
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parseaddr
from functools import cache
from typing import Any

from django.conf import settings
from django.core.mail import EmailMultiAlternatives
from django.template.loader import get_template

from .digests import Message, email_of
from .unsubscribe import link


def compose(
    message: Message, recipient: Any, context: dict[str, Any], message_id: str
) -> EmailMultiAlternatives:
    """Return the e-mail in text and HTML.

    ``message_id`` is the local part of its Message-ID; each attempt must use the same. If
    the message has an ``unsubscribe_label``, mail clients can unsubscribe with one click
    (RFC 8058).
    """
    domain = _domain(settings.DEFAULT_FROM_EMAIL)
    headers = {"Message-ID": f"<{message_id}@{domain}>"}
    context = {"site_name": settings.SITE_NAME, "recipient": recipient, **context}
    if message.unsubscribe_label is not None:
        context["unsubscribe_url"] = link(recipient, message)
        headers["List-Unsubscribe"] = f"<{context['unsubscribe_url']}>"
        headers["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    email = EmailMultiAlternatives(
        f"{settings.SITE_NAME}: {message.subject}",
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


def classify_smtp_error(error: Exception) -> tuple[bool, str]:
    """Return whether the server rejected one e-mail permanently, and the reason.

    Replies 5xx are permanent, replies 4xx are temporary (RFC 5321, section 4.2.1). An
    error that is not about this one e-mail, such as a lost connection, a failed login or
    a time limit, is raised again.
    """
    text: str | bytes
    match error:
        case smtplib.SMTPRecipientsRefused():
            code, text = next(iter(error.recipients.values()))
        case smtplib.SMTPDataError():
            code, text = error.smtp_code, error.smtp_error
        case smtplib.SMTPNotSupportedError() | ValueError():
            return True, str(error)
        case _:
            raise error
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return code >= 500, f"{code} {text}"


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
