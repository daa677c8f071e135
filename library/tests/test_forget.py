"""Forget one person: nothing names the person afterwards, and nothing is sent twice."""

import json
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from celery import current_app
from django.apps import apps
from django.conf import settings
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group
from django.contrib.contenttypes.models import ContentType
from django.core import mail
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import RequestFactory
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask

from prodserver_ops.api.tokens import create_token
from prodserver_ops.console import forgetting
from prodserver_ops.core.limits import get_key
from prodserver_ops.mail import attempts, deliveries, tasks
from prodserver_ops.mail.digests import DailyDigest, Notification, registry
from prodserver_ops.models import Alert, Attempt, DigestDelivery, DigestRun, Lease, TaskRun, Token
from prodserver_ops.web import logins
from prodserver_ops.worker import delayed, failed
from prodserver_ops.worker.app import make_failed_queue

MARK = "zqmark"
ADDRESS = f"{MARK}@example.com"
NOW = timezone.now()

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("sample_templates", "failed_queue")]


class SampleDigest(DailyDigest):
    """A digest for all users."""

    name = "ops-test-forget"
    subject = "sample"
    template = "sample"

    def recipients(self, run):
        return get_user_model()._default_manager.filter(is_active=True)

    def contents(self, recipients, run):
        return {user.pk: {"content": "x"} for user in recipients}


class SampleNotification(Notification):
    """A notification about a group, to the user that has its name."""

    name = "ops-test-forget-notification"
    subject = "sample"
    template = "sample"

    def waiting(self):
        return Group.objects.exclude(name__startswith="sent ")

    def recipient(self, group):
        users = get_user_model()._default_manager
        return users.get(**{get_user_model().USERNAME_FIELD: group.name})

    def context(self, group):
        return {"content": "x"}

    def mark_sent(self, group):
        Group.objects.filter(pk=group.pk).update(name=f"sent {group.pk}")


@pytest.fixture
def failed_queue():
    """The queue of failed tasks, empty before and after the test."""
    queue = make_failed_queue(current_app)
    with current_app.connection_for_write() as link:
        bound = queue(link.default_channel)
        bound.declare()
        bound.purge()
        yield bound
        bound.purge()


@pytest.fixture
def people(make_user, monkeypatch):
    """The person to forget, and another one."""
    for message in (SampleDigest(), SampleNotification()):
        monkeypatch.setitem(registry, message.name, message)
    return make_user(MARK, first_name="Zqmark", last_name="Zqlast"), make_user("berta")


def fail(task_args, headers=None):
    """Add a failed task."""
    queue = make_failed_queue(current_app)
    with current_app.producer_pool.acquire() as producer:
        producer.publish(
            [task_args, {}, {}],
            exchange=queue.exchange,
            routing_key=queue.routing_key,
            declare=[queue],
            serializer="json",
            headers={"task": "dummy.report", "id": "1"} | (headers or {}),
        )


def add_run(**fields):
    values = {"task_id": "1", "name": "dummy.report", "started_at": NOW, "host": "a"}
    return TaskRun.objects.create(**values | fields)


def add_delayed(key, arguments):
    """Store a task for later, as a worker does."""
    message = Mock(
        body=json.dumps([arguments, {}, {}]),
        content_type="application/json",
        content_encoding="utf-8",
        headers={"id": key, "task": "dummy.report", "eta": NOW.isoformat()},
        properties={},
    )
    delayed.make_row(message, message.headers, NOW, "dummy").save()


def add_history(user, about, **fields):
    values = {
        "content_type": ContentType.objects.get_for_model(about),
        "object_id": str(about.pk),
        "object_repr": str(about),
        "action_flag": CHANGE,
    }
    return LogEntry.objects.create(user=user, **values | fields)


def add_delivery(user, days, **fields):
    values = {
        "digest": SampleDigest.name,
        "period_end": NOW - timedelta(days=days),
        "status": DigestDelivery.Status.FAILED,
        "reason": f"550 <{ADDRESS}> unknown",
    }
    return DigestDelivery.objects.create(recipient=user, **values | fields)


def log_in(name, address):
    request = RequestFactory().get("/", REMOTE_ADDR=address)
    credentials = {"username": name, "password": "x"}
    logins.record_success(request, credentials)
    logins.record_failure(request, credentials)


def open_session(client, **data):
    session = client.session
    session.update(data)
    session.save()


def plant(anna, berta, client):
    """Store something about the person in each place; return the number of places."""
    group = Group.objects.create(name=MARK)
    run = DigestRun.objects.create(
        digest=SampleDigest.name,
        period_start=NOW - timedelta(days=1),
        period_end=NOW,
        queued_at=NOW,
    )
    id_ = f"{deliveries.get_prefix(run)}{anna.pk}"
    create_token(anna)
    escaped = json.dumps("Zqmark Zqlast")
    places = [
        lambda: create_token(anna),
        lambda: log_in(MARK, "192.0.2.1"),
        lambda: log_in(MARK.upper(), "2001:db8::1"),
        lambda: log_in(ADDRESS, "192.0.2.2"),
        lambda: client.force_login(anna),
        lambda: open_session(type(client)(), signup={"email": ADDRESS}),
        # Deliveries: over, recent, being sent, and of another person with this address in it
        lambda: add_delivery(anna, 40),
        lambda: add_delivery(anna, 2),
        lambda: add_delivery(anna, 0, status="sending"),
        lambda: add_delivery(berta, 3),
        lambda: Attempt.objects.create(message_id=id_, next_at=NOW, reason=f"451 {ADDRESS}"),
        lambda: deliveries.request_notification(SampleNotification.name, group.pk),
        lambda: Attempt.objects.create(message_id="other.1", next_at=NOW, reason=f"<{ADDRESS}>"),
        # Runs of tasks
        lambda: add_run(arguments=json.dumps([[MARK], {}])),
        lambda: add_run(arguments=json.dumps([[], {"to": ADDRESS}])),
        lambda: add_run(arguments=json.dumps([[f"Dear\\n{MARK}"], {}])),
        lambda: add_run(arguments=f"[[{escaped}], {{}}]"),
        lambda: add_run(arguments=json.dumps([[{"user": {"name": MARK.upper()}}], {}])),
        lambda: add_run(error=f"ValueError: no room for {MARK}", status="failed"),
        lambda: add_run(error=f"KeyError: '{MARK}'", status="retried"),
        lambda: add_run(name=f"dummy.report-for {MARK}"),
        # Tasks that are not due yet
        lambda: add_delayed("1", [MARK]),
        lambda: add_delayed("2", [{"to": ADDRESS, "text": f"Dear\n{MARK}"}]),
        # Failed tasks
        lambda: fail([MARK]),
        lambda: fail([{"email": ADDRESS}]),
        lambda: fail([1], {"argsrepr": f"('{MARK}',)"}),
        # The admin's history: of the person, about the user, and about other objects
        lambda: add_history(anna, berta),
        lambda: add_history(berta, anna, change_message=f"renamed to {MARK}"),
        lambda: add_history(berta, group, object_repr="x", change_message=f"added {MARK}"),
        lambda: add_history(berta, group, object_repr=f"API token 1 of {MARK}"),
        # Alerts, and the lease of 1.x
        lambda: Alert.objects.create(key="task:1", message=f"dummy.report failed: {MARK}"),
        lambda: Alert.objects.create(key=f"task:report {MARK}", message="failed"),
        lambda: Lease.objects.create(name="beat", holder=f"{MARK} on a"),
        lambda: User.objects.filter(pk=anna.pk).update(last_name=MARK),
    ]
    for place in places:
        place()
    return len(places)


User = get_user_model()


def read_everything(queue):
    """Return all rows of all tables, all failed tasks and all files of the service, as text."""
    parts = []
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            cursor.execute(f'SELECT * FROM "{table}"')
            parts += [f"{table}: {row}" for row in cursor.fetchall()]
    messages = []
    while (message := queue.get(no_ack=False)) is not None:
        messages.append(message)
        parts.append(f"failed: {message.payload} {message.headers}")
    for message in messages:
        message.requeue()
    folder = Path(settings.VAR_DIR)
    files = [path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()]
    # A lock is an empty file, which a dry run may create.
    parts += filter(None, files)
    return "\n".join(parts)


def count_failed(queue):
    return queue.queue_declare(passive=True).message_count


def test_nothing_is_found_in_any_place(people, client, failed_queue, capsys):
    anna, berta = people
    create_token(berta)
    log_in("berta", "192.0.2.3")
    kept_run = add_run(arguments='[["berta"], {}]')
    fail(["berta"])
    places = plant(anna, berta, client)
    assert places >= 30
    assert read_everything(failed_queue).lower().count(MARK) >= places - 8
    names = [MARK, ADDRESS]
    hashes = [get_key("known", name) for name in names]
    hashes += [get_key(logins.NAME.name, name) for name in names]
    hashed = read_everything(failed_queue)
    assert all(each in hashed for each in hashes)

    call_command("forget", MARK, delete=True)
    text = read_everything(failed_queue)
    found = [line for line in text.splitlines() if MARK in line.lower() or "zqlast" in line.lower()]
    assert found == []
    assert not any(each in text for each in hashes)
    for model in apps.get_app_config("ops").get_models():
        for relation in model._meta.fields:
            if relation.related_model is User:
                assert not model.objects.filter(**{f"{relation.name}_id": anna.pk}).exists()
    # Nothing of the other person is gone.
    assert Token.objects.filter(user=berta).count() == 1
    assert logins.unlock("berta") == 1
    assert TaskRun.objects.get(pk=kept_run.pk).arguments
    assert count_failed(failed_queue) == 1
    output = capsys.readouterr().out
    for line in (
        "API tokens deleted: 2",
        "sessions deleted: 2",
        "unsent digests given up: 1",
        "unsent notifications given up: 1",
        "deliveries of digests deleted: 1",
        "task runs blanked: 7",
        "delayed tasks deleted: 2",
        "failed tasks deleted: 3",
        "dummy.User deleted: 1",
    ):
        assert f"  {line}\n" in output


def test_dry_run_changes_nothing_and_tells_the_same(people, client, failed_queue, capsys):
    plant(*people, client)
    before = read_everything(failed_queue)
    call_command("forget", ADDRESS, dry_run=True)
    assert sorted(read_everything(failed_queue).splitlines()) == sorted(before.splitlines())
    expected = capsys.readouterr().out.replace("Nothing was changed. This would be done:", "Done:")
    call_command("forget", ADDRESS)
    assert capsys.readouterr().out == expected


def test_user_who_was_deleted_before_is_found_by_the_name(people, client, failed_queue):
    anna, berta = people
    add_run(arguments=json.dumps([[MARK], {}]))
    fail([MARK])
    anna.delete()
    add_history(berta, berta, object_repr=MARK)
    with pytest.raises(CommandError, match=f"No user has the name, address or key {MARK}"):
        call_command("forget", MARK)
    call_command("forget", MARK, deleted=True)
    assert MARK not in read_everything(failed_queue)


def test_nothing_is_sent_twice_and_others_get_their_e_mail(people, queue):
    anna, _ = people
    tasks.start_digest(SampleDigest.name, NOW)
    run = DigestRun.objects.get()
    # One e-mail was sent, and the server did not reply to the other one.
    deliveries.record(run, (anna, DigestDelivery.Status.SENT, ""))
    call_command("forget", MARK)
    deliveries.send_chunk(run, anna.pk // deliveries.CHUNK)
    assert [message.to for message in mail.outbox] == [["berta@example.com"]]
    tasks.resume_deliveries()
    deliveries.send_chunk(run, anna.pk // deliveries.CHUNK)
    assert len(mail.outbox) == 1


def test_e_mail_that_may_have_been_accepted_is_given_up(people, queue):
    anna, _ = people
    tasks.start_digest(SampleDigest.name, NOW)
    run = DigestRun.objects.get()
    deliveries.record(run, (anna, DigestDelivery.Status.SENDING, ""))
    attempts.begin(f"{deliveries.get_prefix(run)}{anna.pk}")
    Attempt.objects.update(next_at=NOW - timedelta(minutes=1))
    call_command("forget", MARK)
    deliveries.send_chunk(run, anna.pk // deliveries.CHUNK)
    assert [message.to for message in mail.outbox] == [["berta@example.com"]]
    group = Group.objects.create(name=MARK)
    deliveries.request_notification(SampleNotification.name, group.pk)
    call_command("forget", MARK)
    deliveries.send_notification(registry[SampleNotification.name], group.pk)
    assert len(mail.outbox) == 1


def test_e_mail_that_is_being_sent_is_waited_for(people, monkeypatch):
    anna, _ = people
    run = DigestRun.objects.create(
        digest=SampleDigest.name, period_start=NOW - timedelta(days=1), period_end=NOW
    )
    deliveries.record(run, (anna, DigestDelivery.Status.SENDING, ""))
    monkeypatch.setattr(forgetting, "BUSY_SECONDS", -1)

    class Held:
        def __enter__(self):
            return False

        def __exit__(self, *args):
            """Nothing is held."""

    monkeypatch.setattr(forgetting, "try_lock", lambda name: Held())
    with pytest.raises(CommandError, match="e-mail is being sent to this user"):
        call_command("forget", MARK)
    assert DigestDelivery.objects.get().status == DigestDelivery.Status.SENDING


def test_broker_that_fails_leaves_the_database_as_it_was(people, client, monkeypatch):
    plant(*people, client)
    count = Token.objects.count()

    def take(*args):
        raise ConnectionRefusedError("no broker")

    monkeypatch.setattr(failed, "take", take)
    with pytest.raises(CommandError, match="Nothing was changed in the database: no broker"):
        call_command("forget", MARK, delete=True)
    assert Token.objects.count() == count


def test_what_belongs_to_the_service_is_told(people, capsys):
    anna, _ = people
    anna.groups.add(Group.objects.create(name="moderators"))
    interval = IntervalSchedule.objects.create(every=1, period="days")
    PeriodicTask.objects.create(
        name="report", task="dummy.report", interval=interval, args=json.dumps([ADDRESS])
    )
    call_command("forget", MARK)
    output = capsys.readouterr().out
    assert f"Kept, because it belongs to the service: dummy.User {anna.pk}\n" in output
    assert "  schedule report: names the person; change it in the admin\n" in output
    assert "Not searched: texts in the models of the service" in output


def test_person_is_one(people, make_user):
    make_user("carla", **{get_user_model().get_email_field_name(): ADDRESS})
    with pytest.raises(CommandError, match=f"2 users have the address {ADDRESS}; name one: "):
        call_command("forget", ADDRESS)
    with pytest.raises(CommandError, match=f"The user {MARK} exists"):
        call_command("forget", MARK, deleted=True)
