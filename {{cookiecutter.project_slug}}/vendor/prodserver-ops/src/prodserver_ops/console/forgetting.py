"""Forget a person: delete or blank what this package stores about a user.

Its tables are searched for rows of the user, and all texts in them for the user name, the address
and the full name. What is not sent yet is given up, and nothing is sent twice afterwards: recent
deliveries of digests are kept without their reasons, because they say what was sent.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from importlib import import_module
from typing import Any

from celery import current_app
from django.apps import apps
from django.conf import settings
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import CharField, Model, Q, QuerySet, TextField
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from kombu.message import Message

from ..core.locks import try_lock
from ..mail import deliveries
from ..mail.digests import email_of, get_digests, get_notifications
from ..mail.tasks import ATTEMPT_AGE
from ..models import Attempt, DigestDelivery, DigestRun, Token
from ..web import logins
from ..worker import failed

#: How long to wait for a process that sends e-mail to the person, in seconds.
BUSY_SECONDS = deliveries.CHUNK_SECONDS + 10

#: Apps whose rows are deleted or blanked here; those of other apps belong to the project.
OWN = {"admin", "ops", "sessions"}


class Busy(Exception):
    """Another process is sending e-mail to the person."""


class Person:
    """A user, or the words by which a deleted user was known."""

    def __init__(self, user: Any, words: list[str]) -> None:
        self.user = user
        self.locks = ExitStack()
        self.words = sorted({word.strip() for word in words if word.strip()}, key=str.lower)
        # Arguments of tasks are JSON, which may escape letters; delayed tasks are JSON within JSON.
        escaped = {json.dumps(word)[1:-1] for word in self.words}
        self.forms = sorted({*self.words, *escaped, *(json.dumps(each)[1:-1] for each in escaped)})
        forms = "|".join(map(re.escape, self.forms))
        self.pattern = re.compile(rf"(?<![\w@.+-])(?:{forms})(?![\w@+-])", re.IGNORECASE)

    @classmethod
    def of(cls, user: Any) -> "Person":
        """Return the person of a user."""
        words = [user.get_username(), email_of(user)]
        name = str(getattr(user, "get_full_name", str)())
        # A first name alone is a word of many other texts.
        return cls(user, [*words, name] if " " in name.strip() else words)

    def is_in(self, text: Any) -> bool:
        """Return whether a text names the person."""
        return bool(self.pattern.search(re.sub(r"\\[bfnrt]", " ", str(text))))


def forget(person: Person, *, delete: bool = False, is_trial: bool = False) -> Counter[str]:
    """Delete or blank what is stored about a person; return what was done, and how often.

    ``delete`` also deletes the user, with the rows of the project that depend on it. With
    ``is_trial`` nothing changes. Raises Busy, or an error of the database or the broker; then
    nothing in the database has changed.
    """
    done: Counter[str] = Counter()
    # After waiting for a lock, the transaction must see what was committed.
    with person.locks, transaction.atomic():
        for step in STEPS:
            done.update(step(person))
        if delete:
            done.update({f"{name} deleted": n for name, n in person.user.delete()[1].items()})
        transaction.set_rollback(is_trial)
        # The broker comes last: what happened there cannot be undone.
        done["failed tasks deleted"] = take_failed(person, is_trial)
    return +done


# Steps


def end_logins(person: Person) -> dict[str, int]:
    """Delete tokens, sessions, and the counts of logins."""
    counts = sum(logins.forget(word) for word in person.words)
    tokens = Token.objects.filter(user=person.user).delete()[0] if person.user else 0
    return {
        "counts of logins deleted": counts,
        "API tokens deleted": tokens,
        "sessions deleted": sum(map(end_session, find_sessions(person))),
    }


def find_sessions(person: Person) -> Iterator[str]:
    """Yield the keys of the sessions in the database that are the person's, or name it."""
    if not apps.is_installed("django.contrib.sessions"):
        return
    from django.contrib.sessions.models import Session

    key = str(person.user.pk) if person.user else None
    for session in Session.objects.all().iterator():
        data = session.get_decoded()
        if (key and data.get("_auth_user_id") == key) or person.is_in(data):
            yield session.session_key


def end_session(key: str) -> int:
    """Delete a session, also from a cache."""
    import_module(settings.SESSION_ENGINE).SessionStore(key).delete()
    return 1


def end_digests(person: Person) -> dict[str, int]:
    """Delete deliveries of old digests, and give up digests that are not sent."""
    if person.user is None:
        return {}
    pk, rows = person.user.pk, DigestDelivery.objects.filter(recipient=person.user)
    given_up = 0
    for run in DigestRun.objects.filter(finished_at=None):
        attempts = Attempt.objects.filter(message_id=f"{deliveries.get_prefix(run)}{pk}")
        unsent = rows.filter(
            digest=run.digest, period_end=run.period_end, status=DigestDelivery.Status.SENDING
        )
        if attempts.exists() or unsent.exists():
            hold(person, f"digest {run.pk} {pk // deliveries.CHUNK}")
            attempts.delete()
            # A missing row would mean that nothing was sent yet.
            unsent.update(status=DigestDelivery.Status.FAILED)
            given_up += 1
    ages = [ATTEMPT_AGE, *(digest.max_age for digest in get_digests().values())]
    oldest = timezone.now() - max(ages) - timedelta(days=1)
    return {
        "unsent digests given up": given_up,
        "deliveries of digests deleted": rows.filter(period_end__lt=oldest).delete()[0],
        "reasons of deliveries blanked": rows.exclude(reason="").update(reason=""),
    }


def end_notifications(person: Person) -> dict[str, int]:
    """Give up the notifications that the person has not received."""
    given_up = 0
    for name, notification in get_notifications().items() if person.user else ():
        for attempt in Attempt.objects.filter(message_id__startswith=f"{name}."):
            pk = attempt.message_id.partition(".")[2]
            obj = notification.waiting().filter(pk=pk).first()
            if obj is not None and notification.recipient(obj) == person.user:
                hold(person, f"notification {name} {pk}")
                notification.mark_sent(obj)
                attempt.delete()
                given_up += 1
    return {"unsent notifications given up": given_up}


def hold(person: Person, lock: str) -> None:
    """Hold a lock of the tasks that send e-mail; raise Busy if it is not free in time."""
    end = time.monotonic() + BUSY_SECONDS
    while not person.locks.enter_context(try_lock(lock)):
        if time.monotonic() > end:
            raise Busy("e-mail is being sent to this user; try again")
        time.sleep(0.5)


def blank_texts(person: Person) -> dict[str, int]:
    """Blank texts that name the person; delete rows that need theirs, such as delayed tasks."""
    done: Counter[str] = Counter()
    models = [*apps.get_app_config("ops").get_models()]
    if apps.is_installed("django_celery_results"):
        models += apps.get_app_config("django_celery_results").get_models()
    for model in models:
        fields = get_text_fields(model)
        for row in find_rows(person, model, fields):
            named = [field for field in fields if person.is_in(getattr(row, field.attname))]
            if not named:
                continue
            if all(field.blank and not field.unique for field in named):
                model._base_manager.filter(pk=row.pk).update(
                    **{field.attname: "" for field in named}
                )
                done[f"{model._meta.verbose_name_plural} blanked"] += 1
            else:
                model._base_manager.filter(pk=row.pk).delete()
                done[f"{model._meta.verbose_name_plural} deleted"] += 1
    return done


def get_text_fields(model: type[Model]) -> list[Any]:
    """Return the fields of a model that contain text."""
    return [field for field in model._meta.fields if isinstance(field, CharField | TextField)]


def find_rows(person: Person, model: type[Model], fields: list[Any]) -> QuerySet[Any]:
    """Return the rows with a name in a field, perhaps as part of another word."""
    condition = Q(pk__in=[])
    for field in fields:
        for form in person.forms:
            condition |= Q((f"{field.attname}__icontains", form))
    return model._base_manager.filter(condition)


def end_history(person: Person) -> dict[str, int]:
    """Delete what the person did in the admin, and blank what others did with the user."""
    if not apps.is_installed("django.contrib.admin"):
        return {}
    from django.contrib.admin.models import LogEntry

    deleted, about = 0, Q(pk__in=[])
    if person.user is not None:
        deleted, _ = LogEntry.objects.filter(user=person.user).delete()
        kind = ContentType.objects.get_for_model(person.user, for_concrete_model=False)
        about = Q(content_type=kind, object_id=str(person.user.pk))
    named = [
        row.pk
        for row in find_rows(person, LogEntry, get_text_fields(LogEntry))
        if person.is_in(row.object_repr) or person.is_in(row.change_message)
    ]
    rows = LogEntry.objects.filter(about | Q(pk__in=named))
    blanked = rows.update(object_repr="", change_message="")
    return {"history of the admin deleted": deleted, "history of the admin blanked": blanked}


STEPS = (end_logins, end_digests, end_notifications, end_history, blank_texts)


def take_failed(person: Person, is_trial: bool) -> int:
    """Delete failed tasks whose messages name the person; return their number."""
    count = 0

    def is_wanted(message: Message) -> bool:
        nonlocal count
        try:
            payload = message.payload
        except Exception:
            payload = message.body
        is_found = person.is_in(payload) or person.is_in(message.headers)
        count += is_found
        return is_found and not is_trial

    failed.take(current_app, is_wanted)
    return count


# What belongs to the project


def find_others(person: Person) -> dict[str, str]:
    """Return what the project stores about the user: the number of rows and what to do, by name."""
    found = {}
    user = person.user
    for relation in user._meta.related_objects if user else ():
        model, field = relation.related_model, relation.field
        if model._meta.app_label in OWN:
            continue
        count = model._base_manager.filter(**{field.name: user}).count()
        if count:
            rule = getattr(relation.on_delete, "__name__", "links are deleted")
            found[f"{model._meta.label}.{field.name}"] = f"{count}, {rule} if the user is deleted"
    named = find_rows(person, PeriodicTask, get_text_fields(PeriodicTask))
    for row in named:
        if any(person.is_in(getattr(row, field.attname)) for field in get_text_fields(type(row))):
            found[f"schedule {row.name}"] = "names the person; change it in the admin"
    return found


def find_people(model: Any, text: str) -> list[Any]:
    """Return the users with this name, or else this address, or else this primary key."""
    users = model._base_manager
    for name, operator in (
        (model.USERNAME_FIELD, "exact"),
        (model.get_email_field_name(), "iexact"),
        ("pk", "exact"),
    ):
        try:
            if found := list(users.filter(**{f"{name}__{operator}": text})):
                return found
        except (ValueError, TypeError, ValidationError, LookupError):
            continue  # The text is no primary key, or the model has no address.
    return []
