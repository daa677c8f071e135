"""Deliveries: every message once, whatever is refused, repeated or lost on the way."""

import smtplib
from datetime import timedelta

import pytest
import time_machine
from celery.exceptions import Retry, SoftTimeLimitExceeded
from django.core import mail
from django.core.mail.backends.locmem import EmailBackend
from django.db import IntegrityError, connection
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from kombu.exceptions import OperationalError

from {{ cookiecutter.project_slug }} import deliveries, locks, tasks
from {{ cookiecutter.project_slug }}.models import DigestDelivery, DigestRun, Submission
from {{ cookiecutter.project_slug }}.queueing import Task

pytestmark = pytest.mark.django_db

NOW = timezone.now()


@pytest.fixture
def readers(make_user, make_submission):
    """Three people for whom the daily digest has an answer."""
    answered_at = timezone.localtime(NOW).replace(hour=0, minute=0) - timedelta(hours=2)
    users = [make_user(f"reader{number}", digest_frequency="daily") for number in range(3)]
    for user in users:
        make_submission(author=user, response="We do.", answered_at=answered_at)
    return users


@pytest.fixture
def run(readers, queue):
    """The daily digest, queued and not yet sent."""
    deliveries.start("daily", NOW)
    return DigestRun.objects.get()


def chunks(queue):
    return [args for name, args, _ in queue if name == "send_digest_chunk"]


def send(run, queue, **options):
    for run_pk, chunk in chunks(queue):
        assert run_pk == run.pk
        deliveries.send_chunk(run, chunk, **options)


def record(run, recipient):
    with connection.cursor() as cursor:
        deliveries.record(cursor, run, recipient, "sent")


def recipients():
    return sorted(address for message in mail.outbox for address in message.to)


def statuses():
    rows = DigestDelivery.objects.order_by("recipient__username")
    return list(rows.values_list("recipient__username", "status", "reason"))


class Server(EmailBackend):
    """An SMTP server that refuses some addresses."""

    refusals = {}
    opened = 0

    def open(self):
        type(self).opened += 1

    def send_messages(self, messages):
        for message in messages:
            error = self.refusals.get(message.to[0])
            if error:
                raise error
        return super().send_messages(messages)


@pytest.fixture
def server(settings, monkeypatch):
    settings.EMAIL_BACKEND = f"{__name__}.Server"
    monkeypatch.setattr("django.core.mail._EmailBackend", Server, raising=False)
    monkeypatch.setattr(deliveries.mail, "get_connection", lambda *args, **kwargs: Server())
    monkeypatch.setattr(Server, "refusals", {})
    monkeypatch.setattr(Server, "opened", 0)
    return Server


class TestOnce:
    def test_a_delivery_is_unique_by_a_constraint_of_the_database(self, run, readers):
        record(run, readers[0])
        with pytest.raises(IntegrityError):
            record(run, readers[0])

    def test_a_task_that_runs_twice_sends_once(self, run, queue, readers):
        for _ in range(2):
            tasks.send_user_digest.apply(["daily"], headers={"queued_at": NOW.isoformat()})
            send(run, queue)
        assert recipients() == [user.email for user in readers]
        assert DigestRun.objects.count() == 1

    def test_a_second_start_queues_nothing(self, run, queue):
        before = len(queue)
        deliveries.start("daily", NOW + timedelta(minutes=1))
        assert len(queue) == before

    def test_a_start_that_died_before_it_queued_is_made_up_for(self, run, queue):
        DigestRun.objects.update(queued_at=None)
        queue.clear()
        deliveries.start("daily", NOW)
        assert chunks(queue)

    def test_a_chunk_that_died_goes_on_where_it_was(self, run, queue, readers, monkeypatch):
        class Killed(BaseException):
            pass

        original = deliveries.record

        def die_at_second(cursor, run, recipient, *args):
            if recipient == readers[1]:
                raise Killed
            original(cursor, run, recipient, *args)

        monkeypatch.setattr(deliveries, "record", die_at_second)
        with pytest.raises(Killed):
            send(run, queue)
        monkeypatch.undo()
        send(run, queue)
        one, two, three = (user.email for user in readers)
        assert recipients() == [one, two, two, three]
        ids = {m.extra_headers["Message-ID"] for m in mail.outbox if m.to == [two]}
        assert len(ids) == 1

    def test_two_workers_never_send_the_same_chunk(self, run, queue, monkeypatch):
        ((_, chunk),) = chunks(queue)
        monkeypatch.setattr(locks, "hold", lambda name: held_elsewhere())
        with pytest.raises(deliveries.Busy):
            deliveries.send_chunk(run, chunk)
        queue.clear()
        tasks.send_digest_chunk.apply([run.pk, chunk])
        assert queue == [("send_digest_chunk", (run.pk, chunk), {"countdown": 10, "retries": 0})]
        assert mail.outbox == []


class held_elsewhere:
    """A lock that another process holds."""

    def __enter__(self):
        return False

    def __exit__(self, *error):
        pass


class TestRefusals:
    def test_a_final_one_is_recorded_and_stops_nobody_else(self, run, queue, readers, server):
        error = smtplib.SMTPRecipientsRefused({readers[0].email: (550, b"no such user")})
        server.refusals = {readers[0].email: error}
        send(run, queue)
        assert statuses() == [
            ("reader0", "failed", "550 no such user"),
            ("reader1", "sent", ""),
            ("reader2", "sent", ""),
        ]
        send(run, queue)
        assert len(mail.outbox) == 2

    def test_one_for_now_is_tried_again(self, run, queue, readers, server):
        error = smtplib.SMTPRecipientsRefused({readers[0].email: (450, b"greylisted")})
        server.refusals = {readers[0].email: error}
        with pytest.raises(deliveries.Refused):
            send(run, queue)
        assert [name for name, _, _ in statuses()] == ["reader1", "reader2"]
        server.refusals = {}
        send(run, queue)
        assert [name for name, _, _ in statuses()] == ["reader0", "reader1", "reader2"]

    def test_one_for_now_is_a_failure_at_the_last_try(self, run, queue, readers, server):
        error = smtplib.SMTPDataError(451, b"try later")
        server.refusals = {readers[0].email: error}
        send(run, queue, last_try=True)
        assert statuses()[0] == ("reader0", "failed", "451 try later")

    def test_a_message_that_cannot_be_made_stops_nobody_else(self, run, queue, readers, server):
        server.refusals = {readers[0].email: ValueError("bad header")}
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
            KeyError("a slip in the code"),
        ],
    )
    def test_an_error_that_says_nothing_of_the_message_is_no_refusal(
        self, run, queue, readers, server, error
    ):
        server.refusals = {readers[1].email: error}
        with pytest.raises(type(error)):
            send(run, queue)
        assert statuses() == [("reader0", "sent", "")]

    @pytest.mark.parametrize(("tries", "wait"), [(0, 60), (1, 120), (7, 7200)])
    def test_tries_back_off(self, run, queue, readers, monkeypatch, tries, wait):
        def refuse(*args):
            raise deliveries.Refused

        monkeypatch.setattr(deliveries, "send_chunk", refuse)
        waits = []

        def retry(task, exc=None, countdown=None, **options):
            waits.append(countdown)
            return Retry()

        monkeypatch.setattr(Task, "retry", retry)
        tasks.send_digest_chunk.apply([run.pk, 0], retries=tries)
        assert waits == [wait]


class TestScale:
    def test_recipients_are_split_by_key(self, run, readers, queue, monkeypatch):
        monkeypatch.setattr(deliveries, "CHUNK", 1)
        queue.clear()
        deliveries.queue(run)
        assert sorted(chunks(queue)) == [(run.pk, user.pk) for user in readers]

    def test_a_chunk_reads_with_the_same_queries_and_writes_once_for_each(
        self, run, queue, make_user, make_submission, readers, django_assert_num_queries, server
    ):
        overhead = {"postgresql": 7, "sqlite": 3}[connection.vendor]
        with django_assert_num_queries(overhead + 3):
            deliveries.send_chunk(run, readers[0].pk // deliveries.CHUNK)
        answered_at = Submission.objects.first().answered_at
        users = [make_user(f"more{n}", digest_frequency="daily") for n in range(20)]
        for user in users:
            make_submission(author=user, answered_at=answered_at)
        (chunk,) = {user.pk // deliveries.CHUNK for user in users}
        with django_assert_num_queries(overhead + 20):
            deliveries.send_chunk(run, chunk)
        assert server.opened == 2

    def test_a_chunk_that_takes_long_makes_way(self, run, queue, monkeypatch):
        ((_, chunk),) = chunks(queue)
        monkeypatch.setattr(deliveries, "CHUNK_SECONDS", -1)
        queue.clear()
        deliveries.send_chunk(run, chunk)
        assert chunks(queue) == [(run.pk, chunk)]


class TestResume:
    def test_a_run_that_lies_still_is_queued_again(self, run, queue, readers):
        record(run, readers[0])
        queue.clear()
        deliveries.resume()
        assert chunks(queue) == []
        with time_machine.travel(NOW + deliveries.PATIENCE + timedelta(minutes=1)):
            deliveries.resume()
        assert chunks(queue) == [(run.pk, readers[1].pk // deliveries.CHUNK)]

    def test_a_run_with_nobody_left_is_finished(self, run, queue, readers):
        send(run, queue)
        queue.clear()
        with time_machine.travel(NOW + deliveries.PATIENCE + timedelta(minutes=1)):
            deliveries.resume()
        run.refresh_from_db()
        assert run.finished_at
        assert chunks(queue) == []

    def test_an_old_run_is_given_up(self, run, queue):
        queue.clear()
        with time_machine.travel(NOW + deliveries.HOPE + timedelta(days=1)):
            deliveries.resume()
        assert queue == []

    @pytest.mark.parametrize(("enabled", "count"), [(True, 1), (False, 0)])
    def test_a_schedule_that_beat_could_not_queue_is_made_up_for(
        self, queue, readers, enabled, count
    ):
        """The broker was away when it was due: beat noted the time, and no run began."""
        PeriodicTask.objects.filter(name="user-digest-daily").update(
            last_run_at=NOW, enabled=enabled
        )
        for _ in range(2):
            deliveries.resume()
        assert DigestRun.objects.count() == count
        assert len(chunks(queue)) == count

    @pytest.mark.parametrize("args", ['["monthly"]', "[]", "[1, 2]", '[["daily"]]'])
    def test_a_slip_in_one_schedule_stops_no_other(self, queue, readers, caplog, args):
        schedules = PeriodicTask.objects.filter(task=tasks.send_user_digest.name)
        schedules.update(last_run_at=NOW)
        schedules.filter(name="user-digest-weekly").update(args=args)
        deliveries.resume()
        assert [run.digest for run in DigestRun.objects.all()] == ["daily"]
        assert "Schedule user-digest-weekly cannot run" in caplog.text

    def test_the_task_is_scheduled(self):
        schedule = PeriodicTask.objects.get(name="deliveries-resume")
        assert schedule.task == tasks.resume_deliveries.name
        assert (schedule.interval.every, schedule.interval.period) == (1, "minutes")


class TestNotification:
    @pytest.fixture
    def submission(self, make_submission):
        return make_submission()

    def answer(self, submission, moderator, capture):
        with capture(execute=True):
            submission.answer("We do.", moderator)

    def test_goes_to_the_author_at_once(
        self, submission, moderator, queue, django_capture_on_commit_callbacks
    ):
        self.answer(submission, moderator, django_capture_on_commit_callbacks)
        assert [(name, args) for name, args, _ in queue] == [("notify_author", (submission.pk,))]
        for _ in range(2):
            tasks.notify_author.apply([submission.pk])
        (message,) = mail.outbox
        assert message.to == [submission.author.email]
        assert "We do." in message.body
        assert "List-Unsubscribe" in message.extra_headers

    def test_is_not_sent_to_whom_does_not_want_it(
        self, submission, moderator, queue, django_capture_on_commit_callbacks
    ):
        submission.author.notify_on_response = False
        submission.author.save()
        self.answer(submission, moderator, django_capture_on_commit_callbacks)
        tasks.notify_author.apply([submission.pk])
        deliveries.resume()
        assert (queue, mail.outbox) == ([], [])

    def test_waits_where_the_broker_is_away(
        self, submission, moderator, monkeypatch, queue, django_capture_on_commit_callbacks
    ):
        def refuse(*args, **kwargs):
            raise OperationalError("connection refused")

        with monkeypatch.context() as patch:
            patch.setattr(Task, "apply_async", refuse)
            self.answer(submission, moderator, django_capture_on_commit_callbacks)
        with time_machine.travel(NOW + timedelta(minutes=5)):
            deliveries.resume()
        assert [(name, args) for name, args, _ in queue] == [("notify_author", (submission.pk,))]

    def test_a_final_refusal_is_not_tried_again(self, submission, moderator, queue, monkeypatch):
        submission.answer("We do.", moderator)

        def refuse(message):
            raise smtplib.SMTPRecipientsRefused({message.to[0]: (550, b"no such user")})

        monkeypatch.setattr(mail.EmailMessage, "send", refuse)
        tasks.notify_author.apply([submission.pk])
        submission.refresh_from_db()
        assert submission.notified_at
