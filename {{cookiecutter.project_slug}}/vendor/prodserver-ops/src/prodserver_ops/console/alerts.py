"""Alerts tell administrators once about a problem, and once when it is over.

Beat and the main process of each worker run a thread for this, so that each notices when the other
is gone. Together they make one check a minute: a process claims it, and the claim of a killed process
expires. A problem is a row. It is reported after two checks have found it, and is over after two
checks in a row have not. An alert is sent twice only if the process is killed, or loses its
connection, before it has stored that the alert was sent.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core import mail
from django.core.exceptions import FieldError
from django.db import connections
from django.db.models import F, Q, QuerySet
from django.db.models.functions import Now
from django.urls import reverse
from django.utils import timezone

from ..core import concurrently
from ..core.limits import Limit
from ..core.redaction import redact
from ..core.urls import make_absolute
from ..mail import transport
from ..mail.digests import email_of
from ..models import Alert
from .problems import FINDERS, show

logger = logging.getLogger(__name__)

#: Time between two checks, in seconds; how long a check is claimed; and the age of a check, in seconds,
#: from which a process that was paused sends nothing, because another one may have sent it.
INTERVAL, CLAIM, MAX_AGE = 60, timedelta(seconds=50), 30

#: Maximum number of e-mails, and of requests to the webhook, in an hour. Messages without a new
#: problem use only part of it.
LIMIT, LIMIT_OVER = Limit("alerts", 6, 3600), 4

#: A server that did not accept an alert gets it again after five minutes.
PAUSE = Limit("alerts-failed", 1, 300)

#: How long a mail server or a webhook may take, in seconds.
TIMEOUT = 10

#: How many problems a message lists.
LISTED = 20

#: E-mail backends that deliver nothing.
SILENT_BACKENDS = {"console", "dummy", "filebased", "locmem"}

NOBODY = "nobody: ADMINS is empty, and no superuser has an e-mail address"

#: Sends new problems, and those that are over.
type Sender = Callable[[list[Alert], list[Alert]], None]

_running: dict[str, threading.Thread] = {}
_logged = ""


# Problems


def find_problems(alerts: dict[str, Alert]) -> dict[str, str]:
    """Return the messages of all problems by key; those that cannot be checked stay as they are."""
    problems: dict[str, str] = {}
    for kind, find in FINDERS.items():
        prefix = f"{kind}:"
        known = {key.removeprefix(prefix): alerts[key] for key in alerts if key.startswith(prefix)}
        try:
            found = find(known)
        except Exception as error:
            log_once(f"could not look for problems of the kind {kind}: {describe(error)}")
            found = {name: alert.message for name, alert in known.items()}
        problems |= {f"{prefix}{name}": shorten(text) for name, text in found.items()}
    return problems


def note_problems() -> None:
    """Store new problems, and whether this check found those that are known."""
    alerts = {alert.key: alert for alert in Alert.objects.exclude(key="")}
    problems = find_problems(alerts)
    new = [Alert(key=key, message=text) for key, text in problems.items() if key not in alerts]
    Alert.objects.bulk_create(new, ignore_conflicts=True, batch_size=500)
    found = [alert for key, alert in alerts.items() if key in problems]
    again = [alert.pk for alert in found if alert.misses or not alert.is_confirmed]
    Alert.objects.filter(pk__in=again).update(is_confirmed=True, misses=0)
    missed = [alert.pk for key, alert in alerts.items() if key not in problems]
    Alert.objects.filter(pk__in=missed).update(misses=F("misses") + 1)
    changed = [alert for alert in found if alert.message != problems[alert.key]]
    for alert in changed:
        alert.message = problems[alert.key]
    Alert.objects.bulk_update(changed, ["message"], batch_size=100)


# Telling


def why_off() -> str:
    """Return why no alerts are sent, or an empty string."""
    if settings.DEBUG or not settings.ALERTS:
        return "DEBUG is on" if settings.DEBUG else "ALERTS is off"
    return (
        ""
        if has_email() or settings.ALERT_WEBHOOK
        else "neither e-mail nor ALERT_WEBHOOK is configured"
    )


def has_email() -> bool:
    """Return whether an e-mail backend is configured that delivers e-mail."""
    names = ("EMAIL_BACKEND", "EMAIL_HOST", "EMAIL_PORT", "EMAIL_API")
    is_silent = settings.EMAIL_BACKEND.split(".")[-2] in SILENT_BACKENDS
    return not is_silent and any(map(settings.is_overridden, names))


def get_recipients() -> list[str]:
    """Return the addresses of ``ADMINS``, or of the active superusers if it is empty."""
    # Django 5.2 has pairs of name and address.
    if admins := [each if isinstance(each, str) else each[1] for each in settings.ADMINS]:
        return admins
    try:
        users: QuerySet[Any] = get_user_model()._default_manager.filter(is_superuser=True)
        return [email_of(user) for user in users if user.is_active and email_of(user)]
    except FieldError:
        return []  # The project's users have no superusers.


def get_channels() -> dict[str, tuple[str, Sender]]:
    """Return the recipients of alerts and the function that sends them, by field of the row."""
    channels: dict[str, tuple[str, Sender]] = {}
    if has_email() and (recipients := get_recipients()):
        channels["emailed_at"] = f"e-mail to {', '.join(recipients)}", partial(email, recipients)
    if settings.ALERT_WEBHOOK:
        # The path may be a secret.
        channels["posted_at"] = f"webhook on {urlsplit(settings.ALERT_WEBHOOK).hostname}", post
    return channels


def tell() -> None:
    """Send new problems and those that are over, once through each channel."""
    channels, parts = get_channels(), {}
    if not channels:
        return log_once(f"they go to {NOBODY}")
    told = Q(*((f"{field}__isnull", False) for field in channels), _connector=Q.OR)
    Alert.objects.filter(misses__gte=2).exclude(told).delete()
    alerts = list(Alert.objects.filter(Q(misses__gte=2) | Q(is_confirmed=True, misses=0)))
    alerts.sort(key=lambda alert: (alert.since, alert.pk))
    for field in channels:
        new = [row for row in alerts if not row.misses and getattr(row, field) is None]
        over = [row for row in alerts if row.misses and getattr(row, field) is not None]
        if not (new or over) or PAUSE.count(field):
            continue
        if LIMIT.count(field) < (LIMIT.slots if new else LIMIT_OVER):
            parts[field] = new, over
        else:
            waiting = f"{len(new)} new problems and {len(over)} that are over"
            log_once(f"{waiting} are not sent yet: the limit of messages per hour is reached")
    for field, error in send(parts).items():
        if error is None:
            for rows, value in zip(parts[field], (Now(), None), strict=True):
                Alert.objects.filter(pk__in=[row.pk for row in rows]).update(**{field: value})
    Alert.objects.filter(misses__gte=2).exclude(told).delete()


def send(parts: dict[str, tuple[list[Alert], list[Alert]]]) -> dict[str, Exception | None]:
    """Send new problems and those that are over; return the error of each channel."""
    channels, errors = get_channels(), {}
    functions = {field: partial(channels[field][1], *parts[field]) for field in parts}
    results = concurrently.run(functions, TIMEOUT, _running)
    for field in parts:
        errors[field] = error = results.get(field, TimeoutError(f"no reply within {TIMEOUT} s"))
        if error:
            log_once(f"not sent, {field.partition('_')[0]}: {describe(error)}")
            PAUSE.take(field)
        # It may have been accepted nevertheless.
        if not error or transport.classify_error(error)[0] is transport.Verdict.UNKNOWN:
            LIMIT.take(field)
    return errors


def send_test() -> dict[str, Exception | None]:
    """Send a test alert; return the error of each target."""
    alert = Alert(key="test", message="This is a test of the alerts", since=timezone.now())
    channels = get_channels()
    errors = send({field: ([alert], []) for field in channels})
    return {channels[field][0]: error for field, error in errors.items()}


def email(recipients: list[str], new: list[Alert], over: list[Alert]) -> None:
    """Send an e-mail to all recipients."""
    is_smtp = settings.EMAIL_BACKEND.endswith(".smtp.EmailBackend")
    options: dict[str, Any] = {"timeout": TIMEOUT} if is_smtp else {}
    message = mail.EmailMessage(
        *compose(new, over),
        from_email=settings.SERVER_EMAIL,
        to=recipients,
        headers={"Auto-Submitted": "auto-generated"},
        connection=mail.get_connection(**options),
    )
    message.send()


class NoRedirects(HTTPRedirectHandler):
    """Treats a redirect as an error: the request that follows it would have no body."""

    def redirect_request(self, *args: Any) -> None:
        """Do not follow the redirect."""


def post(new: list[Alert], over: list[Alert]) -> None:
    """Send JSON to the webhook; chats show ``text``."""
    parts = {"problems": new[:LISTED], "recovered": over[:LISTED]}
    content = {
        "service": settings.SITE_NAME,
        "text": "\n\n".join(compose(new, over)),
        "url": get_url(),
        **{
            name: [
                {"key": row.key, "message": row.message, "since": row.since.isoformat()}
                for row in rows
            ]
            for name, rows in parts.items()
        },
    }
    headers = {"Content-Type": "application/json", "User-Agent": "prodserver-ops"}
    request = Request(settings.ALERT_WEBHOOK, json.dumps(content).encode(), headers)
    try:
        build_opener(NoRedirects).open(request, timeout=TIMEOUT).close()
    except HTTPError as error:
        error.close()
        raise


def compose(new: list[Alert], over: list[Alert]) -> tuple[str, str]:
    """Return subject and text of a message."""
    first, *rest = new or over
    subject = f"{settings.SITE_NAME}: {'' if new else 'recovered: '}{first.message[:120]}"
    lines = []
    for title, rows in (("Problems:", new), ("Recovered, or turned off:", over)):
        if rows:
            lines += [
                title,
                *(f"- {row.message} (since {show(row.since)})" for row in rows[:LISTED]),
            ]
            lines += [f"- and {len(rows) - LISTED} more"] if rows[LISTED:] else []
            lines.append("")
    return subject + (f", and {len(rest)} more" if rest else ""), "\n".join([*lines, get_url()])


def get_url() -> str:
    """Return the address of the page *Operations*, or of the service if it has no admin."""
    try:
        return make_absolute(reverse("admin:ops_operations"))
    except Exception:
        return str(settings.SITE_URL)


# Texts


def shorten(text: str) -> str:
    """Return a text as one line without secrets that fits into a row."""
    return redact(" ".join(text.replace("\0", "").split()))[:500]


def describe(error: BaseException) -> str:
    """Return an error as one line without secrets."""
    return shorten(f"{type(error).__name__}: {error}")


def log_once(text: str) -> None:
    """Log an error, unless it is the one that was logged last."""
    global _logged
    if text != _logged:
        _logged = text
        logger.warning("Alerts: %s", text)


# Processes


def get_open() -> QuerySet[Alert]:
    """Return the problems that are confirmed and not over."""
    return Alert.objects.filter(is_confirmed=True, misses__lt=2).order_by("since", "pk")


def claim() -> bool:
    """Claim the next check for this process; return whether it may make it."""
    # The row without a key says when the last check was.
    Alert.objects.bulk_create([Alert(key="")], ignore_conflicts=True)
    return bool(Alert.objects.filter(key="", since__lt=Now() - CLAIM).update(since=Now()))


def check() -> None:
    """Look for problems and send alerts, unless another process has just done so."""
    start = time.monotonic()
    if claim():
        note_problems()
        if time.monotonic() - start < MAX_AGE:
            tell()


def check_forever() -> None:
    """Check once a minute; the connections are closed after each."""
    while True:
        time.sleep(INTERVAL)
        try:
            check()
        except Exception as error:
            log_once(describe(error))
        finally:
            connections.close_all()


def start(**kwargs: Any) -> None:
    """Start the thread of this process, once; a receiver of Celery's signals."""
    if "alerts" not in _running and not why_off():
        _running["alerts"] = threading.Thread(target=check_forever, daemon=True)
        _running["alerts"].start()
