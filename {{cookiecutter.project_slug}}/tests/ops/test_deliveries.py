"""Deliveries: each message is sent once, after rejections, repetitions and crashes."""

import smtplib
from datetime import timedelta

import pytest
import time_machine
from celery.exceptions import Retry, SoftTimeLimitExceeded
from django.contrib.auth import get_user_model
from django.core import mail
from django.core.mail.backends.locmem import EmailBackend
from django.db import IntegrityError, connection
from django.urls import reverse
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from kombu.exceptions import OperationalError

from {{ cookiecutter.project_slug }}.ops import deliveries, tasks
from {{ cookiecutter.project_slug }}.ops.celery import Task
from {{ cookiecutter.project_slug }}.ops.digests import DailyDigest, Notification, registry
from {{ cookiecutter.project_slug }}.ops.models import DigestDelivery, DigestRun

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("sample_templates")]

NOW = timezone.now()
NAME = "ops-test-digest"
CHUNK_TASK = tasks.send_digest_chunk.name


class SampleDigest(DailyDigest):
    """A digest to the users in ``keys``."""

    name = NAME
    subject = "sample"
    template = "sample"
    unsubscribe_label = "sample digests"

    def __init__(self):
        self.keys = set()

    def recipients(self, run):
        return get_user_model()._default_manager.filter(pk__in=self.keys)

    def contents(self, recipients, run):
        return {user.pk: {"content": f"for {user.pk}"} for user in recipients}


class SampleNotification(Notification):
    """A notification about a user's first login, to that user."""

    name = "ops-test-notification"
    subject = "sample"
    template = "sample"
    unsubscribe_label = "sample notifications"
    due_field = "last_login"

    def __init__(self):
        self.keys = set()

    def waiting(self):
        return get_user_model()._default_manager.filter(pk__in=self.keys)

    def recipient(self, user):
        return user

    def context(self, user):
        return {"content": f"for {user.pk}"}

    def mark_sent(self, user):
        self.keys.remove(user.pk)


@tasks.digest_task
def send_sample(name):
    return name


@pytest.fixture
def digest(monkeypatch):
    digest = SampleDigest()
    monkeypatch.setitem(registry, digest.name, digest)
    return digest


@pytest.fixture
def readers(make_user, digest):
    """Three recipients of the digest."""
    users = [make_user(f"reader{number}") for number in range(3)]
    digest.keys = {user.pk for user in users}
    return users


@pytest.fixture
def run(readers, queue):
    """A run of the digest, queued and not sent yet."""
    tasks.start_digest(NAME, NOW)
    return DigestRun.objects.get()


def chunks(queue):
    return [args for name, args, _ in queue if name == CHUNK_TASK]


def send(run, queue, **options):
    for run_pk, chunk in chunks(queue):
        assert run_pk == run.pk
        deliveries.send_chunk(run, chunk, **options)


def recipients():
    return sorted(address for message in mail.outbox for address in message.to)


def address(user):
    return getattr(user, user.get_email_field_name())


def statuses():
    """Return recipient, status and reason of each delivery; recipients by their position."""
    rows = DigestDelivery.objects.order_by("recipient").select_related("recipient")
    return [(address(row.recipient).partition("@")[0], row.status, row.reason) for row in rows]


class Server(EmailBackend):
    """A mail server that rejects some addresses."""

    errors = {}
    opened = 0

    def open(self):
        type(self).opened += 1

    def send_messages(self, messages):
        for message in messages:
            if error := self.errors.get(message.to[0]):
                raise error
        return super().send_messages(messages)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(mail, "get_connection", lambda *args, **kwargs: Server())
    monkeypatch.setattr(Server, "errors", {})
    monkeypatch.setattr(Server, "opened", 0)
    return Server


@pytest.fixture
def locked_elsewhere(monkeypatch):
    """Another process holds every lock."""

    class HeldLock:
        def __enter__(self):
            return False

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(deliveries, "try_lock", lambda name: HeldLock())


class TestDeliverOnce:
    def test_database_allows_one_delivery_per_recipient_and_period(self, run, readers):
        deliveries.record(run, readers[0], "sent")
        with pytest.raises(IntegrityError):
            deliveries.record(run, readers[0], "sent")

    def test_task_that_runs_twice_sends_once(self, run, queue, readers):
        for _ in range(2):
            send_sample.apply([NAME], headers={"queued_at": NOW.isoformat()})
            send(run, queue)
        assert recipients() == [address(user) for user in readers]
        assert DigestRun.objects.count() == 1

    def test_second_start_for_a_period_queues_nothing(self, run, queue):
        before = len(queue)
        tasks.start_digest(NAME, NOW)
        assert len(queue) == before

    def test_start_that_was_killed_before_it_queued_can_be_repeated(self, run, queue):
        DigestRun.objects.update(queued_at=None)
        queue.clear()
        tasks.start_digest(NAME, NOW)
        assert chunks(queue)

    def test_killed_chunk_continues_and_repeats_only_the_message_id_in_flight(
        self, run, queue, readers, monkeypatch
    ):
        class Killed(BaseException):
            pass

        original = deliveries.record

        def die_at_second(run, recipient, *args):
            if recipient == readers[1]:
                raise Killed
            original(run, recipient, *args)

        monkeypatch.setattr(deliveries, "record", die_at_second)
        with pytest.raises(Killed):
            send(run, queue)
        monkeypatch.setattr(deliveries, "record", original)
        send(run, queue)
        one, two, three = (address(user) for user in readers)
        assert recipients() == [one, two, two, three]
        ids = {m.extra_headers["Message-ID"] for m in mail.outbox if m.to == [two]}
        assert len(ids) == 1

    @pytest.mark.usefixtures("locked_elsewhere")
    def test_chunk_that_another_worker_is_sending_is_requeued(self, run, queue):
        ((_, chunk),) = chunks(queue)
        with pytest.raises(deliveries.Busy):
            deliveries.send_chunk(run, chunk)
        queue.clear()
        tasks.send_digest_chunk.apply([run.pk, chunk])
        assert queue == [(CHUNK_TASK, (run.pk, chunk), {"countdown": 10, "retries": 0})]
        assert mail.outbox == []


class TestRejections:
    def test_permanent_rejection_is_recorded_and_others_get_theirs(
        self, run, queue, readers, server
    ):
        to = address(readers[0])
        server.errors = {to: smtplib.SMTPRecipientsRefused({to: (550, b"no such user")})}
        send(run, queue)
        assert statuses() == [
            ("reader0", "failed", "550 no such user"),
            ("reader1", "sent", ""),
            ("reader2", "sent", ""),
        ]
        send(run, queue)
        assert len(mail.outbox) == 2

    def test_temporary_rejection_is_retried(self, run, queue, readers, server):
        to = address(readers[0])
        server.errors = {to: smtplib.SMTPRecipientsRefused({to: (450, b"greylisted")})}
        with pytest.raises(deliveries.TemporaryFailure):
            send(run, queue)
        assert [name for name, _, _ in statuses()] == ["reader1", "reader2"]
        server.errors = {}
        send(run, queue)
        assert [name for name, _, _ in statuses()] == ["reader0", "reader1", "reader2"]

    def test_temporary_rejection_at_the_last_try_is_recorded_as_failed(
        self, run, queue, readers, server
    ):
        server.errors = {address(readers[0]): smtplib.SMTPDataError(451, b"try later")}
        send(run, queue, last_try=True)
        assert statuses()[0] == ("reader0", "failed", "451 try later")

    def test_invalid_message_is_recorded_and_others_get_theirs(self, run, queue, readers, server):
        server.errors = {address(readers[0]): ValueError("bad header")}
        send(run, queue)
        assert statuses()[0] == ("reader0", "failed", "bad header")
        assert len(statuses()) == 3

    @pytest.mark.parametrize(
        "error",
        [
            smtplib.SMTPServerDisconnected("gone"),
            smtplib.SMTPSenderRefused(550, b"no", "noreply@example.com"),
            smtplib.SMTPAuthenticationError(535, b"no"),
            ConnectionRefusedError(),
            SoftTimeLimitExceeded(),
            KeyError("a bug"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_error_that_is_not_about_one_message_stops_the_chunk(
        self, run, queue, readers, server, error
    ):
        server.errors = {address(readers[1]): error}
        with pytest.raises(type(error)):
            send(run, queue)
        assert statuses() == [("reader0", "sent", "")]

    @pytest.mark.parametrize(("retries", "wait"), [(0, 60), (1, 120), (7, 7200)])
    def test_retries_back_off(self, run, queue, readers, monkeypatch, retries, wait):
        def reject(*args):
            raise deliveries.TemporaryFailure

        monkeypatch.setattr(deliveries, "send_chunk", reject)
        waits = []

        def retry(task, exc=None, countdown=None, **options):
            waits.append(countdown)
            return Retry()

        monkeypatch.setattr(Task, "retry", retry)
        tasks.send_digest_chunk.apply([run.pk, 0], retries=retries)
        assert waits == [wait]


class TestChunks:
    def test_recipients_are_divided_by_primary_key(self, run, readers, queue, monkeypatch):
        monkeypatch.setattr(deliveries, "CHUNK", 1)
        queue.clear()
        tasks.queue_chunks(run)
        assert sorted(chunks(queue)) == [(run.pk, user.pk) for user in readers]

    def test_chunk_takes_one_connection_and_one_query_per_recipient_plus_a_constant(
        self, run, digest, make_user, readers, django_assert_num_queries, server
    ):
        overhead = {"postgresql": 6, "sqlite": 2}[connection.vendor]
        with django_assert_num_queries(overhead + 3):
            deliveries.send_chunk(run, readers[0].pk // deliveries.CHUNK)
        users = [make_user(f"more{number}") for number in range(20)]
        digest.keys |= {user.pk for user in users}
        (chunk,) = {user.pk // deliveries.CHUNK for user in users}
        with django_assert_num_queries(overhead + 20):
            deliveries.send_chunk(run, chunk)
        assert server.opened == 2

    def test_only_the_recipient_fields_are_loaded(self, run, digest, readers, monkeypatch):
        email_field = get_user_model().get_email_field_name()
        monkeypatch.setattr(SampleDigest, "recipient_fields", (email_field,))
        (user, *_) = deliveries._recipients(run, readers[0].pk // deliveries.CHUNK)
        assert "password" in user.get_deferred_fields()
        assert email_field not in user.get_deferred_fields()

    def test_chunk_that_runs_out_of_time_is_requeued(self, run, queue, monkeypatch):
        ((_, chunk),) = chunks(queue)
        monkeypatch.setattr(deliveries, "CHUNK_SECONDS", -1)
        queue.clear()
        tasks.send_digest_chunk.apply([run.pk, chunk])
        assert chunks(queue) == [(run.pk, chunk)]


class TestResume:
    def test_unfinished_run_is_queued_again_when_it_is_stale(self, run, queue, readers):
        deliveries.record(run, readers[0], "sent")
        queue.clear()
        tasks.resume_deliveries()
        assert chunks(queue) == []
        with time_machine.travel(NOW + tasks.STALE_AFTER + timedelta(minutes=1)):
            tasks.resume_deliveries()
        assert chunks(queue) == [(run.pk, readers[1].pk // deliveries.CHUNK)]

    def test_run_without_remaining_recipients_is_finished(self, run, queue, readers):
        send(run, queue)
        queue.clear()
        with time_machine.travel(NOW + tasks.STALE_AFTER + timedelta(minutes=1)):
            tasks.resume_deliveries()
        run.refresh_from_db()
        assert run.finished_at
        assert chunks(queue) == []

    def test_run_older_than_the_resume_window_is_abandoned(self, run, queue):
        queue.clear()
        with time_machine.travel(NOW + tasks.RESUME_WINDOW + timedelta(days=1)):
            tasks.resume_deliveries()
        assert queue == []

    def test_run_of_a_digest_that_was_removed_is_ignored(self, run, queue, monkeypatch):
        monkeypatch.delitem(registry, NAME)
        queue.clear()
        with time_machine.travel(NOW + tasks.STALE_AFTER + timedelta(minutes=1)):
            tasks.resume_deliveries()
        assert queue == []

    @staticmethod
    def make_schedule(name, **fields):
        interval, _ = IntervalSchedule.objects.get_or_create(every=1, period="days")
        return PeriodicTask.objects.create(
            name=name, task=send_sample.name, interval=interval, last_run_at=NOW, **fields
        )

    @pytest.mark.parametrize(("enabled", "count"), [(True, 1), (False, 0)])
    def test_schedule_that_beat_could_not_queue_is_started_once(
        self, queue, readers, enabled, count
    ):
        """Beat stores the time of a run even if the broker is unavailable."""
        self.make_schedule("ops-test", args=f'["{NAME}"]', enabled=enabled)
        for _ in range(2):
            tasks.resume_deliveries()
        assert DigestRun.objects.count() == count
        assert len(chunks(queue)) == count

    @pytest.mark.parametrize("args", ['["no-such-digest"]', "[]", "[1, 2]", '[["daily"]]'])
    def test_invalid_schedule_is_logged_and_others_are_started(self, queue, readers, caplog, args):
        self.make_schedule("ops-test-invalid", args=args)
        self.make_schedule("ops-test-valid", args=f'["{NAME}"]')
        tasks.resume_deliveries()
        assert [run.digest for run in DigestRun.objects.all()] == [NAME]
        assert "Schedule ops-test-invalid cannot run" in caplog.text

    def test_schedule_resumes_deliveries_each_minute(self):
        schedule = PeriodicTask.objects.get(name="deliveries-resume")
        assert schedule.task == tasks.resume_deliveries.name == "ops.resume_deliveries"
        assert (schedule.interval.every, schedule.interval.period) == (1, "minutes")


class TestNotification:
    @pytest.fixture
    def notification(self, monkeypatch):
        notification = SampleNotification()
        monkeypatch.setitem(registry, notification.name, notification)
        return notification

    @pytest.fixture
    def user(self, make_user, notification):
        user = make_user("reader", last_login=NOW)
        notification.keys.add(user.pk)
        return user

    def test_is_queued_at_commit_and_sent_once(
        self, notification, user, queue, django_capture_on_commit_callbacks
    ):
        with django_capture_on_commit_callbacks(execute=True):
            tasks.notify_on_commit(notification.name, user.pk)
            assert queue == []
        task = tasks.send_notification
        assert [(name, args) for name, args, _ in queue] == [
            (task.name, (notification.name, user.pk))
        ]
        for _ in range(2):
            task.apply([notification.name, user.pk])
        (message,) = mail.outbox
        assert message.to == [address(user)]
        assert f"for {user.pk}" in message.body
        assert "List-Unsubscribe" in message.extra_headers
        assert message.extra_headers["Message-ID"].startswith(f"<{notification.name}.{user.pk}@")

    def test_is_not_sent_if_it_is_not_wanted(self, notification, user, queue):
        notification.keys.clear()
        tasks.send_notification.apply([notification.name, user.pk])
        tasks.resume_deliveries()
        assert (queue, mail.outbox) == ([], [])

    def test_is_queued_again_after_the_broker_was_unavailable(
        self, notification, user, queue, monkeypatch, django_capture_on_commit_callbacks
    ):
        def refuse(*args, **kwargs):
            raise OperationalError("connection refused")

        with monkeypatch.context() as patch:
            patch.setattr(Task, "apply_async", refuse)
            with django_capture_on_commit_callbacks(execute=True):
                tasks.notify_on_commit(notification.name, user.pk)
        with time_machine.travel(NOW + timedelta(minutes=5)):
            tasks.resume_deliveries()
        assert [(name, args) for name, args, _ in queue] == [
            (tasks.send_notification.name, (notification.name, user.pk))
        ]

    @pytest.mark.usefixtures("locked_elsewhere")
    def test_that_another_worker_is_sending_is_requeued(self, notification, user, queue):
        tasks.send_notification.apply([notification.name, user.pk])
        assert queue == [
            (
                tasks.send_notification.name,
                (notification.name, user.pk),
                {"countdown": 10, "retries": 0},
            )
        ]
        assert mail.outbox == []

    @pytest.fixture
    def reject(self, monkeypatch):
        """Return a function that makes the mail server reject all e-mail with this code."""

        def reject(code):
            def send(message):
                raise smtplib.SMTPRecipientsRefused({message.to[0]: (code, b"rejected")})

            monkeypatch.setattr(mail.EmailMessage, "send", send)

        return reject

    def test_is_not_retried_after_a_permanent_rejection(self, notification, user, queue, reject):
        reject(550)
        tasks.send_notification.apply([notification.name, user.pk])
        assert notification.keys == set()
        assert queue == []

    def test_waits_for_a_retry_after_a_temporary_rejection(self, notification, user, reject):
        reject(450)
        with pytest.raises(deliveries.TemporaryFailure):
            deliveries.send_notification(notification, user.pk)
        assert notification.keys == {user.pk}
        deliveries.send_notification(notification, user.pk, last_try=True)
        assert notification.keys == set()


def test_administrator_finds_the_deliveries(client, run, queue, readers, make_user):
    send(run, queue)
    client.force_login(make_user("admin", is_staff=True, is_superuser=True))
    response = client.get(reverse("admin:ops_digestdelivery_changelist"), {"q": "reader1"})
    assert response.status_code == 200
    assert [row.recipient for row in response.context["cl"].result_list] == [readers[1]]
