"""Deliveries: each message is sent once, after rejections, repetitions and crashes."""

import contextlib
import signal
import smtplib
import threading
from collections import Counter
from concurrent.futures import as_completed
from datetime import UTC, datetime, timedelta
from unittest.mock import patch

import psycopg
import pytest
import time_machine
from celery.exceptions import SoftTimeLimitExceeded
from django.contrib.auth import get_user_model
from django.core import mail
from django.core.mail.backends.locmem import EmailBackend
from django.db import IntegrityError, connection
from django.db import OperationalError as DatabaseAway
from django.utils import timezone
from django_celery_beat.models import CrontabSchedule, IntervalSchedule, PeriodicTask
from kombu.exceptions import OperationalError

from prodserver_ops.console import doctor
from prodserver_ops.core import database
from prodserver_ops.mail import attempts, deliveries, tasks, transport
from prodserver_ops.mail.digests import DailyDigest, Notification, registry
from prodserver_ops.models import Attempt, DigestDelivery, DigestRun
from prodserver_ops.worker.app import Task

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("sample_templates")]

NOW = timezone.now()
EIGHT = datetime(2026, 11, 24, 8, tzinfo=UTC)
NAME = "ops-test-digest"
CHUNK_TASK = tasks.send_digest_chunk.name


class SampleDigest(DailyDigest):
    """A digest for the users in ``keys``."""

    name = NAME
    subject = "sample"
    template = "sample"
    unsubscribe_label = "sample digests"

    def __init__(self):
        self.keys = set()

    def recipients(self, run):
        assert run.digest == self.name
        return get_user_model()._default_manager.filter(pk__in=self.keys)

    def contents(self, recipients, run):
        assert run.digest == self.name
        return {user.pk: {"content": f"for {user.pk}"} for user in recipients}


class SampleNotification(Notification):
    """A notification about a user's first login, to that user."""

    name = "ops-test-notification"
    subject = "sample"
    template = "sample"
    unsubscribe_label = "sample notifications"

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
    tried = Counter()
    opened = 0

    def open(self):
        type(self).opened += 1

    def send_messages(self, messages):
        for message in messages:
            self.tried[message.to[0]] += 1
            if error := self.errors.get(message.to[0]):
                raise error
        return super().send_messages(messages)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(mail, "get_connection", lambda *args, **kwargs: Server())
    monkeypatch.setattr(Server, "errors", {})
    monkeypatch.setattr(Server, "tried", Counter())
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
        fields = {"digest": run.digest, "period_end": run.period_end, "recipient": readers[0]}
        deliveries.record(run, (readers[0], "sent", ""))
        with pytest.raises(IntegrityError):
            DigestDelivery.objects.create(**fields, status="sent")

    def test_task_that_runs_twice_sends_once(self, run, queue, readers):
        for _ in range(2):
            send_sample.apply([NAME], headers={"queued_at": NOW.isoformat()})
            send(run, queue)
        assert recipients() == [address(user) for user in readers]
        assert DigestRun.objects.count() == 1

    def test_chunk_sends_to_its_own_recipients_alone(self, run, readers, monkeypatch):
        monkeypatch.setattr(deliveries, "CHUNK", 2)
        for number in {user.pk // 2 for user in readers}:
            mail.outbox.clear()
            assert deliveries.send_chunk(run, number) is True
            own = [user for user in readers if user.pk // 2 == number]
            assert recipients() == sorted(address(user) for user in own)
            for user, message in zip(own, mail.outbox, strict=True):
                expected = f"<{NAME}.{run.period_end.astimezone(UTC):%Y%m%dT%H%M}.{user.pk}@"
                assert message.extra_headers["Message-ID"].startswith(expected)

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

        def die_at_second(run, *rows):
            if (readers[1], "sent", "") in rows:
                raise Killed
            original(run, *rows)

        monkeypatch.setattr(deliveries, "record", die_at_second)
        with pytest.raises(Killed):
            send(run, queue)
        monkeypatch.setattr(deliveries, "record", original)
        send(run, queue)
        one, two, three = (address(user) for user in readers)
        assert recipients() == [one, two, two, three]
        ids = {m.extra_headers["Message-ID"] for m in mail.outbox if m.to == [two]}
        assert len(ids) == 1
        assert [status for _, status, _ in statuses()] == ["sent"] * 3
        assert not Attempt.objects.exists()

    def test_email_that_kills_each_process_is_given_up(self, run, queue, readers, server):
        class Killed(BaseException):
            pass

        to = address(readers[0])
        server.errors = {to: Killed()}
        now = timezone.now()
        with time_machine.travel(now, tick=False) as clock:
            for hour in range(4 * 24):
                clock.move_to(now + timedelta(hours=hour))
                with contextlib.suppress(Killed):
                    send(run, queue)
        assert server.tried[to] == 3
        assert statuses()[0] == ("reader0", "failed", deliveries.EXHAUSTED)
        assert [status for _, status, _ in statuses()] == ["failed", "sent", "sent"]
        assert not Attempt.objects.exists()

    @pytest.mark.usefixtures("locked_elsewhere")
    def test_chunk_that_another_worker_is_sending_is_requeued(self, run, queue):
        ((_, chunk),) = chunks(queue)
        with pytest.raises(deliveries.Busy):
            deliveries.send_chunk(run, chunk)
        queue.clear()
        tasks.send_digest_chunk.apply([run.pk, chunk])
        assert queue == [(CHUNK_TASK, (run.pk, chunk), {"countdown": 10, "expires": None})]
        assert mail.outbox == []


class TestRejections:
    def test_rejection_is_recorded_when_it_is_repeated_and_others_get_theirs(
        self, run, queue, readers, server
    ):
        to = address(readers[0])
        server.errors = {to: smtplib.SMTPRecipientsRefused({to: (550, b"no such user")})}
        send(run, queue)
        send(run, queue)
        assert [status for _, status, _ in statuses()] == ["sending", "sent", "sent"]
        with time_machine.travel(timezone.now() + attempts.LAST_WAIT):
            send(run, queue)
            send(run, queue)
        assert server.tried[to] == 2
        assert statuses() == [
            ("reader0", "failed", "550 no such user"),
            ("reader1", "sent", ""),
            ("reader2", "sent", ""),
        ]
        assert len(mail.outbox) == 2

    def test_temporary_refusal_is_tried_again_on_a_ladder(self, run, queue, readers, server):
        to = address(readers[0])
        server.errors = {to: smtplib.SMTPRecipientsRefused({to: (450, b"greylisted")})}
        now = timezone.now()
        tried = 0
        with time_machine.travel(now, tick=False) as clock:
            for minute in [*range(20), *range(20, 600, 10)]:
                clock.move_to(now + timedelta(minutes=minute))
                before = server.tried[to]
                send(run, queue)
                tried += server.tried[to] - before
        assert (tried, server.tried[to]) == (9, 9)
        assert statuses() == [
            ("reader0", "failed", "450 greylisted"),
            ("reader1", "sent", ""),
            ("reader2", "sent", ""),
        ]
        assert not Attempt.objects.exists()

    def test_refusal_that_ends_is_sent(self, run, queue, readers, server):
        server.errors = {address(readers[0]): smtplib.SMTPDataError(451, b"try later")}
        send(run, queue)
        send(run, queue)
        assert server.tried[address(readers[0])] == 1
        server.errors = {}
        with time_machine.travel(timezone.now() + timedelta(minutes=2)):
            send(run, queue)
        assert [status for _, status, _ in statuses()] == ["sent"] * 3
        assert not Attempt.objects.exists()

    @pytest.mark.parametrize(
        "error",
        [smtplib.SMTPServerDisconnected("gone"), TimeoutError("timed out"), KeyError("a bug")],
        ids=lambda error: type(error).__name__,
    )
    def test_email_without_a_reply_is_repeated_twice_a_day_apart_and_others_get_theirs(
        self, run, queue, readers, server, error
    ):
        to = address(readers[0])
        server.errors = {to: error}
        now = timezone.now()
        with time_machine.travel(now, tick=False) as clock:
            for hour in range(4 * 24):
                clock.move_to(now + timedelta(hours=hour))
                send(run, queue)
                assert server.tried[to] == min(hour // 24 + 1, 3)
        (failed, *others) = statuses()
        assert failed[:2] == ("reader0", "failed")
        assert type(error).__name__ in failed[2]
        assert [status for _, status, _ in others] == ["sent"] * 2

    def test_server_that_replies_to_nobody_stops_the_chunk(
        self, run, queue, digest, readers, make_user, server
    ):
        users = [*readers, make_user("reader3"), make_user("reader4")]
        digest.keys = {user.pk for user in users}
        server.errors = {address(user): TimeoutError() for user in users}
        with pytest.raises(transport.ServerFailed, match="TimeoutError"):
            deliveries.send_chunk(run, readers[0].pk // deliveries.CHUNK)
        assert sum(server.tried.values()) == transport.MAX_IN_ROW[transport.Verdict.UNKNOWN]
        # The tasks of others do not wait for it.
        server.errors = {}
        with pytest.raises(transport.Paused):
            deliveries.send_chunk(run, readers[0].pk // deliveries.CHUNK)
        assert sum(server.tried.values()) == transport.MAX_IN_ROW[transport.Verdict.UNKNOWN]
        with time_machine.travel(timezone.now() + timedelta(seconds=transport.PAUSE_SECONDS + 1)):
            deliveries.send_chunk(run, readers[0].pk // deliveries.CHUNK)
        assert len(mail.outbox) == 2

    def test_repeat_is_recorded_before_it_is_made(self, run, queue, readers, server):
        class Killed(BaseException):
            pass

        to = address(readers[0])
        server.errors = {to: TimeoutError()}
        send(run, queue)
        server.errors = {to: Killed()}
        with time_machine.travel(timezone.now() + timedelta(days=2)):
            with pytest.raises(Killed):
                send(run, queue)
            send(run, queue)
        assert server.tried[to] == 2
        assert Attempt.objects.get().unknown == 2

    def test_invalid_message_is_recorded_and_others_get_theirs(self, run, queue, readers, server):
        server.errors = {address(readers[0]): ValueError("bad header")}
        send(run, queue)
        assert statuses()[0] == ("reader0", "failed", "ValueError: bad header")
        assert len(statuses()) == 3

    @pytest.mark.parametrize(
        "error",
        [
            smtplib.SMTPSenderRefused(550, b"no", "noreply@example.com"),
            smtplib.SMTPAuthenticationError(535, b"no"),
            ConnectionRefusedError(),
            SoftTimeLimitExceeded(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_error_that_is_not_about_one_message_stops_the_chunk(
        self, run, queue, readers, server, error
    ):
        server.errors = {address(readers[1]): error}
        with pytest.raises(transport.ServerFailed):
            send(run, queue)
        assert statuses() == [("reader0", "sent", ""), ("reader1", "sending", "")]

    @pytest.mark.parametrize(
        "error",
        [smtplib.SMTPSenderRefused(550, b"no", "x"), smtplib.SMTPAuthenticationError(535, b"no")],
        ids=lambda error: type(error).__name__,
    )
    def test_fault_of_the_server_delays_nobody_for_a_day(self, run, queue, readers, server, error):
        server.errors = {address(user): error for user in readers}
        with pytest.raises(transport.ServerFailed):
            send(run, queue)
        assert sum(server.tried.values()) == 1
        server.errors = {}
        with time_machine.travel(timezone.now() + timedelta(seconds=transport.PAUSE_SECONDS + 1)):
            send(run, queue)
        assert [status for _, status, _ in statuses()] == ["sent"] * 3
        assert not Attempt.objects.exists()

    def test_error_in_code_does_not_pause_other_email(self, run, queue, readers, monkeypatch):
        def fail(*args):
            raise KeyError("a bug")

        monkeypatch.setattr(SampleDigest, "contents", fail)
        with pytest.raises(KeyError):
            send(run, queue)
        assert not transport.is_paused()

    def test_resume_follows_the_ladder(self, run, queue, readers, server):
        to = address(readers[0])
        server.errors = {to: smtplib.SMTPDataError(450, b"later")}
        send(run, queue)
        queue.clear()
        tasks.resume_deliveries()
        assert chunks(queue) == []
        with time_machine.travel(timezone.now() + timedelta(seconds=61)):
            tasks.resume_deliveries()
            send(run, queue)
        assert server.tried[to] == 2

    def test_a_chunk_without_a_due_recipient_does_not_connect(self, run, queue, readers, server):
        server.errors = {address(user): smtplib.SMTPDataError(450, b"later") for user in readers}
        send(run, queue)
        opened = server.opened
        send(run, queue)
        assert server.opened == opened

    def test_old_attempts_are_deleted(self, run):
        Attempt.objects.create(message_id="x", next_at=NOW - tasks.ATTEMPT_AGE * 2)
        Attempt.objects.create(message_id="y", next_at=NOW)
        tasks.resume_deliveries()
        assert [attempt.message_id for attempt in Attempt.objects.all()] == ["y"]


class TestServerThatRejectsAll:
    @pytest.fixture
    def users(self, readers, make_user, digest):
        users = [*readers, *(make_user(f"more{number}") for number in range(17))]
        digest.keys = {user.pk for user in users}
        return users

    @pytest.fixture
    def chunk(self, users):
        (chunk,) = {user.pk // deliveries.CHUNK for user in users}
        return chunk

    @pytest.fixture
    def relay_denied(self, users, server):
        """The server rejects everybody, in words that name each recipient."""
        for user in users:
            reply = f"5.7.1 <{address(user)}>: Relay access denied, id 7F3{user.pk}".encode()
            error = smtplib.SMTPRecipientsRefused({address(user): (554, reply)})
            server.errors[address(user)] = error

    @pytest.mark.usefixtures("relay_denied")
    def test_stops_and_goes_on_once_it_accepts(self, run, chunk, users, server):
        now = timezone.now()
        with time_machine.travel(now, tick=False) as clock:
            with pytest.raises(transport.ServerFailed, match="Relay access denied"):
                deliveries.send_chunk(run, chunk)
            assert sum(server.tried.values()) == 5
            for minute in range(10, 600, 10):
                clock.move_to(now + timedelta(minutes=minute, seconds=minute))
                with contextlib.suppress(transport.ServerFailed, transport.Paused):
                    deliveries.send_chunk(run, chunk)
            assert sum(server.tried.values()) <= 64
            assert {status for _, status, _ in statuses()} == {"sending"}
            server.errors.clear()
            for minute in range(600, 900, 10):
                clock.move_to(now + timedelta(minutes=minute, seconds=minute))
                deliveries.send_chunk(run, chunk)
        assert [status for _, status, _ in statuses()] == ["sent"] * len(users)
        assert not Attempt.objects.exists()
        assert transport.get_failures() is None

    @pytest.mark.usefixtures("relay_denied")
    def test_one_process_tries_after_each_pause(self, run, chunk, monkeypatch):
        with pytest.raises(transport.ServerFailed):
            deliveries.send_chunk(run, chunk)
        with time_machine.travel(timezone.now() + timedelta(seconds=transport.PAUSE_SECONDS + 1)):
            with (
                transport.try_lock("mail-server"),
                monkeypatch.context() as patch,
                pytest.raises(transport.Paused),
            ):
                # In this process the lock could be taken again.
                patch.setattr(transport, "try_lock", lambda name: contextlib.nullcontext(False))
                deliveries.send_chunk(run, chunk)
            with pytest.raises(transport.ServerFailed):
                deliveries.send_chunk(run, chunk)

    def test_rejections_with_different_reasons_do_not_stop_it(self, run, chunk, users, server):
        for number, user in enumerate(users):
            reply = b"5.1.1 no such user" if number % 2 else b"5.2.2 mailbox full"
            server.errors[address(user)] = smtplib.SMTPDataError(550, reply)
        deliveries.send_chunk(run, chunk)
        assert sum(server.tried.values()) == len(users)

    @pytest.mark.usefixtures("relay_denied")
    def test_doctor_reports_it(self, run, chunk):
        with pytest.raises(transport.ServerFailed):
            deliveries.send_chunk(run, chunk)
        result = doctor.check_deliveries()
        assert result.status == doctor.ERROR
        assert result.message.startswith("no e-mail is accepted: 554 5.7.1")

    @pytest.mark.usefixtures("relay_denied")
    def test_task_is_queued_again_and_fails_loudly(self, run, chunk, queue, caplog):
        queue.clear()
        result = tasks.send_digest_chunk.apply([run.pk, chunk])
        assert isinstance(result.result, transport.ServerFailed)
        countdown = {"countdown": transport.PAUSE_SECONDS, "expires": None}
        assert queue == [(CHUNK_TASK, (run.pk, chunk), countdown)]


class TestErrors:
    """The verdict on one e-mail for each error of any backend."""

    class ApiError(Exception):
        def __init__(self, status_code):
            self.status_code = status_code

    @pytest.mark.parametrize(
        ("error", "verdict"),
        [
            (ApiError(406), "REJECTED"),
            (ApiError(429), "REFUSED"),
            (ApiError(401), "UNUSABLE"),
            (ApiError(503), "UNKNOWN"),
            (ApiError(None), "UNKNOWN"),
            (smtplib.SMTPDataError(552, b"too big"), "REJECTED"),
            (smtplib.SMTPDataError(421, b"closing"), "UNUSABLE"),
            (smtplib.SMTPSenderRefused(452, b"busy", "x"), "REFUSED"),
            (smtplib.SMTPSenderRefused(550, b"no", "x"), "UNUSABLE"),
            (smtplib.SMTPServerDisconnected("gone"), "UNKNOWN"),
            (smtplib.SMTPNotSupportedError("SMTPUTF8"), "INVALID"),
            (UnicodeEncodeError("ascii", "é", 0, 1, "no"), "INVALID"),
        ],
        ids=str,
    )
    def test_verdict(self, error, verdict):
        assert transport.classify_error(error)[0].name == verdict

    def test_one_bad_recipient_of_an_api_does_not_stop_others(self, run, queue, readers, server):
        server.errors = {address(readers[0]): self.ApiError(406)}
        send(run, queue)
        assert [status for _, status, _ in statuses()] == ["sending", "sent", "sent"]


class TestChunks:
    def test_recipients_are_divided_by_primary_key(self, run, readers, queue, monkeypatch):
        monkeypatch.setattr(deliveries, "CHUNK", 1)
        queue.clear()
        tasks.queue_chunks(run)
        assert sorted(chunks(queue)) == [(run.pk, user.pk) for user in readers]

    def test_chunk_takes_one_connection_and_one_query_per_recipient_plus_a_constant(
        self, run, digest, make_user, readers, django_assert_num_queries, server
    ):
        overhead = {"postgresql": 14, "sqlite": 10}[connection.vendor]
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
        (user, *_), _ = deliveries._get_recipients(run, readers[0].pk // deliveries.CHUNK)
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
        deliveries.record(run, (readers[0], "sent", ""))
        queue.clear()
        tasks.resume_deliveries()
        assert chunks(queue) == []
        with time_machine.travel(timezone.now() + tasks.STALE_AFTER):
            tasks.resume_deliveries()
        assert chunks(queue) == [(run.pk, readers[1].pk // deliveries.CHUNK)]

    def test_run_without_remaining_recipients_is_finished(self, run, queue, readers):
        send(run, queue)
        queue.clear()
        with time_machine.travel(timezone.now() + tasks.STALE_AFTER):
            tasks.resume_deliveries()
        run.refresh_from_db()
        assert run.finished_at
        assert chunks(queue) == []

    def test_run_older_than_the_resume_window_is_abandoned(self, run, queue):
        queue.clear()
        with time_machine.travel(run.period_end + SampleDigest.max_age + timedelta(hours=1)):
            tasks.resume_deliveries()
        assert queue == []

    def test_run_of_a_digest_that_was_removed_is_ignored(self, run, queue, monkeypatch):
        monkeypatch.delitem(registry, NAME)
        queue.clear()
        with time_machine.travel(timezone.now() + tasks.STALE_AFTER):
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

    def test_invalid_crontab_does_not_stop_others(self, queue, readers, caplog):
        invalid = CrontabSchedule.objects.create(minute="61", hour="8", timezone="UTC")
        PeriodicTask.objects.create(
            name="ops-test-invalid", task=send_sample.name, args=f'["{NAME}"]', crontab=invalid
        )
        self.make_schedule("ops-test-valid", args=f'["{NAME}"]')
        tasks.resume_deliveries()
        assert [run.digest for run in DigestRun.objects.all()] == [NAME]
        assert "Schedule ops-test-invalid cannot run" in caplog.text

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


class TestPeriods:
    """A run covers what earlier ones did not send, in one e-mail."""

    @pytest.fixture
    def start(self, digest):
        """Return a function that starts the digest that is due some days from now."""

        def start(days):
            return deliveries.get_run(digest, NOW + timedelta(days=days))

        return start

    def test_is_the_usual_one(self, start):
        run = start(0)
        assert (run.period_start, run.period_end) == SampleDigest().period(NOW)
        assert start(0) == run

    def test_starts_where_the_previous_one_ended(self, start):
        first = start(0)
        tasks.queue_chunks(first)
        assert first.finished_at
        run = start(3)
        assert (run.period_start, run.period_end) == (first.period_end, start(3).period_end)
        assert run.period_end - run.period_start > timedelta(days=2)
        assert run.previous() == first

    def test_covers_no_more_than_the_maximum_age(self, start):
        tasks.queue_chunks(start(0))
        run = start(5)
        assert (run.period_start, run.period_end) == SampleDigest().period(NOW + timedelta(days=5))

    @pytest.mark.usefixtures("readers")
    def test_earlier_ones_that_nobody_received_are_folded(self, start):
        first = start(0)
        start(1)
        run = start(2)
        assert DigestRun.objects.get() == run
        assert run.period_start == first.period_start

    def test_started_run_is_completed_separately(self, start, readers, queue):
        first = start(0)
        deliveries.record(first, (readers[0], "sending", ""))
        run = start(1)
        assert DigestRun.objects.count() == 2
        assert run.period_start == first.period_end

    def test_run_that_the_server_refused_is_folded(self, start, readers, server):
        first = start(0)
        error = smtplib.SMTPDataError(450, b"later")
        server.errors = {address(user): error for user in readers}
        deliveries.send_chunk(first, readers[0].pk // deliveries.CHUNK)
        assert Attempt.objects.count() == 3
        run = start(1)
        assert DigestRun.objects.get() == run
        assert not Attempt.objects.exists()
        assert not DigestDelivery.objects.exists()
        # A task that was queued for it does nothing.
        server.errors = {}
        tasks.send_digest_chunk.apply([first.pk, readers[0].pk // deliveries.CHUNK])
        assert deliveries.send_chunk(first, readers[0].pk // deliveries.CHUNK)
        assert mail.outbox == []

    def test_nothing_is_sent_for_an_earlier_one(self, start):
        start(1)
        assert start(0) is None


class TestDueDigests:
    @pytest.fixture(autouse=True)
    def schedule(self, digest):
        PeriodicTask.objects.all().delete()
        crontab = CrontabSchedule.objects.create(minute="0", hour="8", timezone="UTC")
        schedule = PeriodicTask.objects.create(
            name="ops-test", task=send_sample.name, args=f'["{NAME}"]', crontab=crontab
        )
        PeriodicTask.objects.update(date_changed=EIGHT - timedelta(days=9))
        return schedule

    @pytest.mark.parametrize("hours", [0, 1, 23])
    def test_is_the_last_time_whether_beat_noticed_or_not(self, hours):
        due = tasks.get_due_digests(EIGHT + timedelta(hours=hours))
        assert due == {NAME: EIGHT}

    def test_is_not_older_than_the_maximum_age(self, monkeypatch):
        monkeypatch.setattr(SampleDigest, "max_age", timedelta(hours=5))
        assert tasks.get_due_digests(EIGHT + timedelta(hours=4)) == {NAME: EIGHT}
        assert tasks.get_due_digests(EIGHT + timedelta(hours=6)) == {}

    def test_disabled_schedule_is_not_due(self):
        PeriodicTask.objects.update(enabled=False)
        assert tasks.get_due_digests(EIGHT) == {}

    def test_digest_that_was_missed_is_sent_late(self, queue, readers, digest):
        with time_machine.travel(EIGHT + timedelta(minutes=61)):
            tasks.resume_deliveries()
            tasks.resume_deliveries()
        assert len(chunks(queue)) == 1
        assert DigestRun.objects.get().period_end == digest.period(EIGHT)[1]

    def test_messages_of_three_days_are_one_digest(self, queue, readers, digest):
        with time_machine.travel(EIGHT + timedelta(hours=2)):
            for days in (2, 1, 0):
                due = EIGHT - timedelta(days=days)
                send_sample.apply([NAME], headers={"queued_at": due.isoformat()})
        assert DigestRun.objects.get().period_end == digest.period(EIGHT)[1]
        assert len(chunks(queue)) == 1


class TestFolding:
    @pytest.mark.parametrize("other_digest", [True, False])
    def test_other_digests_and_other_periods_count_for_themselves(
        self, digest, readers, other_digest
    ):
        first = deliveries.get_run(digest, EIGHT)
        fields = {
            "digest": "another" if other_digest else NAME,
            "period_end": first.period_end - timedelta(days=0 if other_digest else 1),
        }
        DigestDelivery.objects.create(**fields, recipient=readers[0], status="sent")
        DigestRun.objects.get_or_create(**fields, period_start=first.period_start)
        second = deliveries.get_run(digest, EIGHT + timedelta(days=1))
        assert second.period_start == first.period_start
        assert not DigestRun.objects.filter(pk=first.pk).exists()
        assert DigestRun.objects.filter(**fields).exists()
        assert DigestDelivery.objects.filter(**fields).count() == 1

    def test_run_that_a_server_may_have_accepted_is_kept(self, digest, readers):
        first = deliveries.get_run(digest, EIGHT)
        deliveries.record(first, (readers[0], "sending", ""))
        second = deliveries.get_run(digest, EIGHT + timedelta(days=1))
        assert (second.period_start, DigestRun.objects.count()) == (first.period_end, 2)


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

    @pytest.fixture
    def requested(self, notification, user):
        deliveries.request_notification(notification.name, user.pk)

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

    def test_is_sent_once_it_is_due_and_nothing_is_left(self, notification, user, requested):
        at = timezone.now() + timedelta(minutes=5)
        Attempt.objects.update(next_at=at)
        for moment, count in ((at - timedelta(seconds=1), 0), (at, 1)):
            with time_machine.travel(moment, tick=False):
                tasks.send_notification.apply([notification.name, user.pk])
            assert len(mail.outbox) == count
        assert notification.keys == set()
        assert not Attempt.objects.exists()

    def test_is_not_sent_if_it_is_not_wanted(self, notification, user, queue):
        notification.keys.clear()
        tasks.send_notification.apply([notification.name, user.pk])
        tasks.resume_deliveries()
        assert (queue, mail.outbox) == ([], [])

    def test_rows_that_were_imported_notify_nobody(self, notification, user, queue):
        with time_machine.travel(NOW + timedelta(minutes=5)):
            tasks.resume_deliveries()
        tasks.send_notification.apply([notification.name, user.pk])
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
            (tasks.send_notification.name, (notification.name, str(user.pk)))
        ]
        tasks.send_notification.apply([notification.name, str(user.pk)])
        assert len(mail.outbox) == 1

    @pytest.mark.usefixtures("requested")
    def test_is_repeated_once_after_its_process_was_killed(self, notification, user, server):
        class Killed(BaseException):
            pass

        server.errors = {address(user): Killed()}
        now = timezone.now()
        with time_machine.travel(now, tick=False) as clock:
            for minute in range(0, 20 * 60, 5):
                clock.move_to(now + timedelta(minutes=minute))
                with contextlib.suppress(Killed):
                    deliveries.send_notification(notification, user.pk)
        assert server.tried[address(user)] == 2

    @pytest.mark.usefixtures("locked_elsewhere")
    def test_that_another_worker_is_sending_is_requeued(self, notification, user, queue):
        tasks.send_notification.apply([notification.name, user.pk])
        assert queue == [
            (
                tasks.send_notification.name,
                (notification.name, user.pk),
                {"countdown": 10, "expires": None},
            )
        ]
        assert mail.outbox == []

    @pytest.mark.usefixtures("requested")
    def test_is_given_up_after_two_rejections(self, notification, user, queue, server):
        server.errors = {address(user): smtplib.SMTPDataError(550, b"no")}
        tasks.send_notification.apply([notification.name, user.pk])
        assert notification.keys
        with time_machine.travel(timezone.now() + attempts.LAST_WAIT):
            tasks.send_notification.apply([notification.name, user.pk])
        assert notification.keys == set()
        assert server.tried[address(user)] == 2
        assert (queue, Attempt.objects.count()) == ([], 0)

    @pytest.mark.parametrize(
        ("error", "days", "count"),
        [(smtplib.SMTPDataError(450, b"later"), 1, 9), (TimeoutError(), 4, 3)],
        ids=["refused", "no reply"],
    )
    @pytest.mark.usefixtures("requested")
    def test_is_tried_a_few_times_whatever_resume_does(
        self, notification, user, queue, server, error, days, count
    ):
        server.errors = {address(user): error}
        with time_machine.travel(NOW + timedelta(minutes=2), tick=False) as clock:
            for minute in range(0, days * 24 * 60, 15 * days):
                clock.move_to(NOW + timedelta(minutes=2 + minute))
                tasks.resume_deliveries()
                for name, args, _ in queue:
                    assert name == tasks.send_notification.name
                    deliveries.send_notification(notification, args[1])
                queue.clear()
        assert server.tried[address(user)] == count

    @pytest.mark.usefixtures("requested")
    def test_waits_for_a_server_that_is_down(self, notification, user, queue, monkeypatch, caplog):
        def refuse(self):
            raise ConnectionRefusedError

        with monkeypatch.context() as patch:
            patch.setattr(EmailBackend, "open", refuse)
            with pytest.raises(ConnectionRefusedError):
                deliveries.send_notification(notification, user.pk)
        with pytest.raises(transport.Paused):
            deliveries.send_notification(notification, user.pk)
        assert mail.outbox == []
        with time_machine.travel(timezone.now() + timedelta(seconds=transport.PAUSE_SECONDS + 1)):
            deliveries.send_notification(notification, user.pk)
        assert len(mail.outbox) == 1

    @pytest.mark.usefixtures("requested")
    def test_fault_of_the_server_is_tried_again_after_the_pause(self, notification, user, server):
        server.errors = {address(user): smtplib.SMTPSenderRefused(550, b"no", "x")}
        with pytest.raises(transport.ServerFailed):
            deliveries.send_notification(notification, user.pk)
        server.errors = {}
        with time_machine.travel(timezone.now() + timedelta(seconds=transport.PAUSE_SECONDS + 1)):
            deliveries.send_notification(notification, user.pk)
        assert len(mail.outbox) == 1


class TestSeveralConnections:
    """Several e-mails of a digest are sent at the same time."""

    @pytest.fixture(autouse=True)
    def connections(self, settings):
        settings.EMAIL_CONNECTIONS = 4

    @pytest.fixture
    def readers(self, make_user, digest):
        users = [make_user(f"reader{number}") for number in range(9)]
        digest.keys = {user.pk for user in users}
        return users

    def test_one_email_is_accepted_before_others_are_sent_at_the_same_time(
        self, run, queue, readers, server, monkeypatch
    ):
        together = threading.Barrier(4, timeout=10)
        accept = Server.send_messages

        def wait(connection, messages):
            if mail.outbox:
                together.wait()
            return accept(connection, messages)

        monkeypatch.setattr(Server, "send_messages", wait)
        send(run, queue)
        assert recipients() == sorted(address(user) for user in readers)
        assert {status for _, status, _ in statuses()} == {"sent"}
        assert Server.opened == 4

    def test_error_concerns_its_own_message(self, run, queue, readers, server):
        server.errors = {address(readers[3]): smtplib.SMTPDataError(450, b"later")}
        send(run, queue)
        assert set(server.tried.values()) == {1}
        assert [name for name, status, _ in statuses() if status != "sent"] == ["reader3"]
        assert Attempt.objects.get().refusals == 1

    def test_server_that_allows_fewer_connections_gets_fewer(
        self, run, queue, readers, server, monkeypatch
    ):
        allowed = threading.Semaphore(2)

        def refuse(connection):
            if not allowed.acquire(blocking=False):
                raise smtplib.SMTPConnectError(421, b"too many connections")
            Server.opened += 1

        monkeypatch.setattr(Server, "open", refuse)
        send(run, queue)
        assert set(server.tried.values()) == {1}
        assert recipients() == sorted(address(user) for user in readers)
        assert Server.opened == 2

    def test_what_a_killed_process_was_sending_is_sent_alone(
        self, run, queue, readers, server, monkeypatch
    ):
        deliveries.record(run, *((user, "sending", "") for user in readers[2:5]))
        groups = []
        start = transport.Server.start

        def note_and_start(server, emails):
            if emails:
                groups.append(len(server.sending) + len(emails))
            start(server, emails)

        monkeypatch.setattr(transport.Server, "start", note_and_start)
        send(run, queue)
        # The first one, the second, three that are repeated, and four others
        assert groups == [1, 1, 1, 1, 1, 4]
        assert {status for _, status, _ in statuses()} == {"sent"}
        assert not Attempt.objects.exists()

    def test_slow_reply_delays_no_other_email(self, run, queue, readers, server, monkeypatch):
        others_are_sent = threading.Event()
        accept = Server.send_messages

        def reply_last(connection, messages):
            if messages[0].to == [address(readers[1])]:
                assert others_are_sent.wait(10)
            accept(connection, messages)
            if len(mail.outbox) == len(readers) - 1:
                others_are_sent.set()

        monkeypatch.setattr(Server, "send_messages", reply_last)
        send(run, queue)
        assert {status for _, status, _ in statuses()} == {"sent"}
        assert recipients() == sorted(address(user) for user in readers)

    def test_sigterm_stops_after_those_that_are_being_sent(
        self, run, queue, readers, server, monkeypatch
    ):
        accept = Server.send_messages

        def stop_and_accept(connection, messages):
            if len(mail.outbox) == 1:
                # The threads of pytest-xdist do not block it, unlike those of a worker.
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            return accept(connection, messages)

        def stop(*_):
            raise SystemExit

        monkeypatch.setattr(Server, "send_messages", stop_and_accept)
        before = signal.signal(signal.SIGTERM, stop)
        try:
            with pytest.raises(SystemExit):
                send(run, queue)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert 2 <= len(mail.outbox) < len(readers)
        assert [status for _, status, _ in statuses()] == ["sent"] * len(mail.outbox)

    def test_error_in_a_template_loses_no_result(self, run, queue, readers, server, monkeypatch):
        compose = deliveries.compose

        def fail_at_the_end(digest, user, *arguments):
            if user == readers[-1]:
                raise LookupError
            return compose(digest, user, *arguments)

        monkeypatch.setattr(deliveries, "BATCH", 1)
        monkeypatch.setattr(deliveries, "compose", fail_at_the_end)
        with pytest.raises(LookupError):
            send(run, queue)
        assert mail.outbox
        assert [status for _, status, _ in statuses()] == ["sent"] * len(mail.outbox)

    def test_failing_server_gets_one_message_at_a_time(self, run, queue, readers, server):
        error = smtplib.SMTPDataError(554, b"denied")
        server.errors = {address(user): error for user in readers}
        with pytest.raises(transport.ServerFailed):
            send(run, queue)
        assert len(server.tried) == 5

    def test_time_limit_leaves_each_message_with_an_attempt(
        self, run, queue, readers, server, monkeypatch
    ):
        over = threading.Event()
        accept = Server.send_messages

        def hang(connection, messages):
            if mail.outbox:
                over.wait(10)
            return accept(connection, messages)

        def interrupt(sending):
            if mail.outbox:
                raise SoftTimeLimitExceeded
            return as_completed(sending)

        monkeypatch.setattr(Server, "send_messages", hang)
        monkeypatch.setattr(transport, "as_completed", interrupt)
        with pytest.raises(transport.ServerFailed):
            send(run, queue)
        over.set()
        assert [status for _, status, _ in statuses()] == ["sent", *["sending"] * 4]
        assert Attempt.objects.filter(unknown=1).count() == 4


@pytest.mark.skipif("connection.vendor != 'postgresql'")
@pytest.mark.django_db(transaction=True, serialized_rollback=True)
class TestUnavailableDatabase:
    """The process knows what it has sent, and stores it later."""

    @pytest.fixture
    def other(self, settings, monkeypatch):
        """Another session of the database."""
        monkeypatch.setattr(database, "PERSIST_INTERVAL", 0.05)
        settings.EMAIL_CONNECTIONS = 2
        with psycopg.connect(**connection.get_connection_params(), autocommit=True) as other:
            yield other

    @pytest.fixture
    def after_first(self, server, monkeypatch):
        """A function that sets what happens once the first e-mail is accepted."""
        send_messages = Server.send_messages

        def set_event(function):
            once = iter([function])

            def send(server, messages):
                count = send_messages(server, messages)
                next(once, lambda: None)()
                return count

            monkeypatch.setattr(Server, "send_messages", send)

        return set_event

    def finish(self, run, chunk, number):
        for _ in range(10):
            if deliveries.send_chunk(run, chunk):
                break
        assert len(recipients()) == len(set(recipients())) == number

    def test_lost_session_repeats_nothing(self, run, readers, other, after_first, caplog):
        pid = connection.connection.info.backend_pid
        after_first(lambda: other.execute("SELECT pg_terminate_backend(%s)", [pid]))
        chunk = readers[0].pk // deliveries.CHUNK
        # Another process may have the lock now.
        assert not deliveries.send_chunk(run, chunk)
        assert 1 <= len(recipients()) < 3
        self.finish(run, chunk, 3)
        assert "The database is unavailable, trying again" in caplog.text

    def test_locked_table_repeats_nothing(self, run, readers, other, after_first, caplog):
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '200ms'")
        locked = threading.Event()

        def lock():
            with other.transaction():
                other.execute("LOCK TABLE ops_digestdelivery")
                locked.set()
                waiting.wait(20)

        waiting = threading.Event()
        warn = database.logger.warning
        thread = threading.Thread(target=lock)

        def start():
            thread.start()
            assert locked.wait(20)

        after_first(start)

        def release(*args):
            warn(*args)
            waiting.set()

        with patch.object(database.logger, "warning", release):
            self.finish(run, readers[0].pk // deliveries.CHUNK, 3)
        thread.join(20)
        assert "The database is unavailable, trying again" in caplog.text

    def test_lost_session_repeats_no_notification(self, make_user, monkeypatch, other, after_first):
        notification = SampleNotification()
        monkeypatch.setitem(registry, notification.name, notification)
        notification.keys = {pk := make_user("author").pk}
        deliveries.request_notification(notification.name, pk)
        pid = connection.connection.info.backend_pid
        after_first(lambda: other.execute("SELECT pg_terminate_backend(%s)", [pid]))
        deliveries.send_notification(notification, pk)
        assert len(mail.outbox) == 1
        assert notification.keys == set()
        assert not Attempt.objects.exists()

    def test_gives_up_after_some_time(self, monkeypatch):
        monkeypatch.setattr(database, "PERSIST_SECONDS", 0)

        def fail():
            raise DatabaseAway("away")

        with pytest.raises(DatabaseAway):
            database.persist(fail)
