"""The e-mail messages of the service: digests for a period, notifications about an object.

A service defines its messages as classes in ``digests.py`` of any app and registers them.
``deliveries.py`` sends each message to each recipient once.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db.models import QuerySet
from django.utils import timezone

from ..models import DigestRun


class Message:
    """A kind of e-mail.

    name
        Unique name: lower-case letters, digits, ``_`` and ``-``; at most 50 characters.
    subject
        The subject line, after the name of the service; see also ``get_subject()``.
    template
        ``"news"`` renders ``email/news.txt`` and ``email/news.html``.
    unsubscribe_label
        Describes the e-mails to unsubscribe from, such as ``"weekly digests"``. None for e-mail
        without an unsubscribe link.
    """

    name: str
    subject: str
    template: str
    unsubscribe_label: str | None = None

    def get_subject(self, context: dict[str, Any]) -> str:
        """Return the subject for a context of the templates."""
        return self.subject

    def get_sample(self) -> dict[str, Any]:
        """Return a context of the templates with sample data, for the preview."""
        return {}

    def unsubscribe(self, recipient: Any) -> None:
        """Store that the recipient has unsubscribed from this e-mail."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} has an unsubscribe_label, but no unsubscribe()")


class Digest(Message):
    """An e-mail that each recipient gets once for each period.

    recipient_fields
        The fields of a recipient that the templates use. Each other field takes a query per
        recipient. Empty to load all fields.
    max_age
        The maximum delay of a digest, and the maximum period that it covers if earlier digests
        were not sent.
    """

    recipient_fields: Sequence[str] = ()
    max_age: timedelta = timedelta(days=3)

    def period(self, now: datetime) -> tuple[datetime, datetime]:
        """Return start and end of the last whole period before ``now``, both aware."""
        raise NotImplementedError

    def recipients(self, run: DigestRun) -> QuerySet[Any]:
        """Return the users who get the digest of this run, as an unsliced queryset."""
        raise NotImplementedError

    def contents(self, recipients: Sequence[Any], run: DigestRun) -> dict[Any, dict[str, Any]]:
        """Return the context of the templates for each recipient, by primary key."""
        raise NotImplementedError


class HourlyDigest(Digest):
    """A digest of the last whole hour."""

    def period(self, now: datetime) -> tuple[datetime, datetime]:
        """Return start and end of the last whole hour in the service's time zone.

        It has 30 or 90 minutes if the clock changed by half an hour.
        """
        end = _whole_hour(now)
        return _whole_hour(end - timedelta(microseconds=1)), end


class DailyDigest(Digest):
    """A digest of the last whole day."""

    def period(self, now: datetime) -> tuple[datetime, datetime]:
        """Return the two midnights around yesterday in the service's time zone."""
        today = timezone.localdate(now)
        return _midnight(today - timedelta(days=1)), _midnight(today)


class WeeklyDigest(Digest):
    """A digest of the last whole week, from Monday to Sunday."""

    max_age = timedelta(days=8)

    def period(self, now: datetime) -> tuple[datetime, datetime]:
        """Return the two midnights around last week in the service's time zone."""
        today = timezone.localdate(now)
        monday = today - timedelta(days=today.weekday())
        return _midnight(monday - timedelta(days=7)), _midnight(monday)


def _whole_hour(moment: datetime) -> datetime:
    hour = moment.astimezone(UTC).replace(second=0, microsecond=0)
    # A second step is needed if the clock changed by a fraction of an hour.
    while minutes := timezone.localtime(hour).minute:
        hour -= timedelta(minutes=minutes)
    return hour


def _midnight(day: Any) -> datetime:
    # Not a difference in hours: a day has 23 or 25 of them when the clock changes.
    return datetime.combine(day, time.min, tzinfo=timezone.get_default_timezone())


class Notification(Message):
    """An e-mail about one object, sent once to one recipient.

    ``tasks.notify_on_commit()`` requests it. Rows that are created without calling it, such as
    imported rows, send no notification.
    """

    def waiting(self) -> QuerySet[Any]:
        """Return the objects whose notification is still wanted and has not been sent."""
        raise NotImplementedError

    def recipient(self, obj: Any) -> Any:
        """Return the user who gets the notification about the object."""
        raise NotImplementedError

    def context(self, obj: Any) -> dict[str, Any]:
        """Return the context of the templates."""
        raise NotImplementedError

    def mark_sent(self, obj: Any) -> None:
        """Store that the notification was sent, so that ``waiting`` excludes the object."""
        raise NotImplementedError


#: All registered messages by name.
registry: dict[str, Message] = {}


def register[M: Message](message_class: type[M]) -> type[M]:
    """Class decorator: register the message under its name.

    Raises ImproperlyConfigured for a name that is invalid or already registered.
    """
    message = message_class()
    # The name is part of a Message-ID, a signed token and a lock's file name.
    if not re.fullmatch(r"[a-z0-9_-]{1,50}", message.name):
        raise ImproperlyConfigured(
            f"{message_class.__name__}: invalid name {message.name!r}; use at most 50 "
            "lower-case letters, digits, _ and -"
        )
    if message.name in registry:
        other = type(registry[message.name]).__name__
        raise ImproperlyConfigured(
            f"{message_class.__name__} and {other} have the same name: {message.name!r}"
        )
    registry[message.name] = message
    return message_class


def _select[M: Message](kind: type[M]) -> dict[str, M]:
    return {name: each for name, each in registry.items() if isinstance(each, kind)}


def _get[M: Message](kind: type[M], name: str) -> M:
    messages, word = _select(kind), kind.__name__.lower()
    if name not in messages:
        raise ValueError(f"no {word} {name!r}; the {word}s are: {', '.join(messages)}")
    return messages[name]


def get_digests() -> dict[str, Digest]:
    """Return all registered digests by name."""
    return _select(Digest)


def get_digest(name: str) -> Digest:
    """Return the digest with a name; raise ValueError if there is none."""
    return _get(Digest, name)


def get_notifications() -> dict[str, Notification]:
    """Return all registered notifications by name."""
    return _select(Notification)


def get_notification(name: str) -> Notification:
    """Return the notification with a name; raise ValueError if there is none."""
    return _get(Notification, name)


def email_of(user: Any) -> str:
    """Return the e-mail address of a user, whatever the user model calls the field."""
    return str(getattr(user, user.get_email_field_name()))
