"""E-mail of the service: who gets which digest and notification, and what it says."""

import smtplib
from datetime import datetime, timedelta
from urllib.parse import urlsplit

import pytest
import time_machine
from django.core import mail
from django.core.management import call_command
from django.utils import timezone
from django_celery_beat.models import CrontabSchedule, PeriodicTask
from kombu.exceptions import OperationalError

from {{ cookiecutter.project_slug }} import admin, tasks
from {{ cookiecutter.project_slug }}.models import Submission
from {{ cookiecutter.project_slug }}.ops import deliveries, unsubscribe
from {{ cookiecutter.project_slug }}.ops import tasks as ops_tasks
from {{ cookiecutter.project_slug }}.ops.celery import Task
from {{ cookiecutter.project_slug }}.ops.digests import registry
from {{ cookiecutter.project_slug }}.ops.models import DigestDelivery, DigestRun

pytestmark = pytest.mark.django_db

#: A Monday at eight, in the service's time zone.
MONDAY = datetime(2026, 11, 23, 8, tzinfo=timezone.get_default_timezone())

SCHEDULES = ["moderator-digest-hourly", "user-digest-daily", "user-digest-weekly"]


def send(name, now=MONDAY):
    """Deliver a digest completely, at that time."""
    with time_machine.travel(now, tick=False):
        ops_tasks.start_digest(name, now)
        for run in DigestRun.objects.filter(finished_at=None):
            for chunk in list(deliveries.remaining_chunks(run)):
                deliveries.send_chunk(run, chunk)


@pytest.fixture(autouse=True)
def _queue(queue):
    """Queue nothing: ``send`` runs the chunks itself."""


def recipients():
    return sorted(address for message in mail.outbox for address in message.to)


class TestModeratorDigest:
    def test_lists_pending_and_flagged_submissions_for_each_moderator(
        self, moderator, superuser, make_user, make_submission
    ):
        make_user("staff", is_staff=True)
        pending = make_submission(body="Waiting", created_at=MONDAY - timedelta(hours=3))
        make_submission(body="Odd", flagged_at=MONDAY - timedelta(hours=2))
        make_submission(body="Fine", approved_at=MONDAY)
        send("moderator")
        assert recipients() == [superuser.email, moderator.email]
        text = mail.outbox[0].body
        assert "1 pending, 1 flagged" in text
        assert pending.get_admin_url() in text
        assert "Waiting" in text
        assert "Odd" in text
        assert "Fine" not in text

    def test_lists_the_newest_twenty(self, moderator, make_submission, make_user):
        author = make_user("author")
        for number in range(25):
            created_at = MONDAY - timedelta(minutes=number + 1)
            make_submission(body=f"[{number}]", author=author, created_at=created_at)
        send("moderator")
        text = mail.outbox[0].body
        assert "25 pending" in text
        assert "[19]" in text
        assert "[20]" not in text

    def test_is_sent_only_if_something_is_new(self, moderator, make_submission):
        make_submission(created_at=MONDAY - timedelta(minutes=1))
        send("moderator")
        send("moderator", MONDAY + timedelta(hours=1))
        assert len(mail.outbox) == 1
        make_submission(created_at=MONDAY + timedelta(minutes=61))
        send("moderator", MONDAY + timedelta(hours=2))
        assert len(mail.outbox) == 2
        assert "2 pending" in mail.outbox[1].body

    def test_submissions_from_a_downtime_are_new(self, moderator, make_submission):
        send("moderator")
        make_submission(created_at=MONDAY + timedelta(hours=2))
        send("moderator", MONDAY + timedelta(hours=9))
        assert len(mail.outbox) == 1

    def test_is_not_sent_if_everything_is_decided(self, moderator, make_submission):
        make_submission(approved_at=MONDAY, created_at=MONDAY - timedelta(minutes=1))
        send("moderator")
        assert mail.outbox == []
        assert DigestRun.objects.get().finished_at


class TestUserDigest:
    @pytest.fixture
    def answered(self, make_submission):
        """Return a function that creates a submission answered on Sunday."""

        def make(**fields):
            fields = {"response": "We do.", "answered_at": MONDAY - timedelta(hours=10)} | fields
            return make_submission(**fields)

        return make

    def test_is_sent_to_active_authors_with_this_frequency_and_an_answer(self, make_user, answered):
        daily = make_user("daily", digest_frequency="daily")
        answered(author=daily)
        answered(author=make_user("weekly", digest_frequency="weekly"))
        answered(author=make_user("off", digest_frequency="off"))
        answered(author=make_user("gone", digest_frequency="daily", is_active=False))
        answered(author=make_user("mute", digest_frequency="daily", email=""))
        make_user("none", digest_frequency="daily")
        send("daily")
        assert recipients() == [daily.email]

    @pytest.mark.parametrize(
        ("answered_at", "sent"),
        [
            (MONDAY.replace(hour=0) - timedelta(days=1, microseconds=1), 0),
            (MONDAY.replace(hour=0) - timedelta(days=1), 1),
            (MONDAY.replace(hour=0) - timedelta(microseconds=1), 1),
            (MONDAY.replace(hour=0), 0),
        ],
    )
    def test_contains_the_answers_of_exactly_its_period(
        self, make_user, answered, answered_at, sent
    ):
        answered(author=make_user("daily", digest_frequency="daily"), answered_at=answered_at)
        send("daily")
        assert len(mail.outbox) == sent

    def test_contains_all_answers_to_its_recipient_in_order(self, make_user, answered):
        author = make_user("weekly", digest_frequency="weekly", first_name="Jo")
        answered(author=author, body="One?", response="First.")
        answered(author=author, body="Two?", response="Second.")
        answered(author=make_user("other"), response="Not yours.")
        send("weekly")
        message = next(message for message in mail.outbox if message.to == [author.email])
        html = message.alternatives[0][0]
        for part in (message.body, html):
            assert "Jo" in part
            assert part.index("First.") < part.index("Second.")
            assert "Not yours." not in part

    def test_html_is_escaped_and_text_is_not(self, make_user, answered):
        answered(author=make_user("daily", digest_frequency="daily"), response="<b> & 'you'")
        send("daily")
        (message,) = mail.outbox
        assert "<b> & 'you'" in message.body
        assert "&lt;b&gt; &amp; &#x27;you&#x27;" in message.alternatives[0][0]

    def test_has_links_and_headers_to_unsubscribe(self, settings, make_user, answered):
        settings.SITE_URL = "https://service.example"
        answered(author=make_user("daily", digest_frequency="daily"))
        send("daily")
        (message,) = mail.outbox
        link = message.extra_headers["List-Unsubscribe"].strip("<>")
        assert link.startswith("https://service.example/unsubscribe/")
        assert message.extra_headers["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
        assert link in message.body
        assert link in message.alternatives[0][0]


def test_delivery_is_recorded(make_user, make_submission):
    author = make_user("daily", digest_frequency="daily")
    make_submission(author=author, answered_at=MONDAY - timedelta(hours=10))
    send("daily")
    delivery = DigestDelivery.objects.get()
    assert (delivery.recipient, delivery.digest, delivery.status) == (author, "daily", "sent")
    assert delivery.period_start == MONDAY.replace(hour=0) - timedelta(days=1)
    assert Submission.objects.count() == 1


class TestScheduledTasks:
    def test_user_digest_is_for_the_period_before_the_task_was_queued(self):
        """A worker that was down for hours sends the digest that was due."""
        with time_machine.travel(MONDAY + timedelta(hours=20)):
            tasks.send_user_digest.apply(["daily"], headers={"queued_at": MONDAY.isoformat()})
        run = DigestRun.objects.get()
        assert (run.digest, run.period_end) == ("daily", MONDAY.replace(hour=0))

    def test_moderator_digest_is_for_the_last_hour(self):
        tasks.send_moderator_digest.apply(headers={"queued_at": MONDAY.isoformat()})
        run = DigestRun.objects.get()
        assert (run.digest, run.period_end) == ("moderator", MONDAY)

    def test_have_schedules_in_a_new_database(self):
        rows = PeriodicTask.objects.filter(name__in=SCHEDULES).order_by("name")
        slug = "{{ cookiecutter.project_slug }}"
        assert [
            (row.name, row.task, row.args, str(row.crontab).split(" (")[0]) for row in rows
        ] == [
            ("moderator-digest-hourly", f"{slug}.tasks.send_moderator_digest", "[]", "0 * * * *"),
            ("user-digest-daily", f"{slug}.tasks.send_user_digest", '["daily"]', "0 8 * * *"),
            ("user-digest-weekly", f"{slug}.tasks.send_user_digest", '["weekly"]', "0 8 * * 1"),
        ]
        assert {row.task for row in rows} == {
            tasks.send_moderator_digest.name,
            tasks.send_user_digest.name,
        }

    def test_have_schedules_in_the_time_zone_of_the_service(self):
        zones = CrontabSchedule.objects.filter(periodictask__name__in=SCHEDULES)
        assert {str(row.timezone) for row in zones} == {"{{ cookiecutter.timezone }}"}


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_migrations_delete_and_restore_the_schedules_and_no_others():
    """A schedule that an administrator created stays, though it shares a crontab."""

    def names():
        return sorted(
            PeriodicTask.objects.filter(name__in=[*SCHEDULES, "mine"]).values_list(
                "name", flat=True
            )
        )

    daily = PeriodicTask.objects.get(name="user-digest-daily")
    PeriodicTask.objects.create(name="mine", task=daily.task, crontab=daily.crontab)
    try:
        for _ in range(2):
            call_command("migrate", "{{ cookiecutter.project_slug }}", "0001", verbosity=0)
            assert names() == ["mine"]
        for _ in range(2):
            call_command("migrate", verbosity=0)
            assert names() == sorted([*SCHEDULES, "mine"])
    finally:
        call_command("migrate", verbosity=0)
        PeriodicTask.objects.filter(name="mine").delete()


class TestAnswerNotification:
    @pytest.fixture
    def submission(self, make_submission):
        return make_submission()

    @pytest.fixture
    def answer(self, moderator, django_capture_on_commit_callbacks):
        """Return a function that answers a submission as the admin does, and commits."""

        def commit(submission, response="We do."):
            with django_capture_on_commit_callbacks(execute=True):
                admin.answer(submission, response, moderator)

        return commit

    def test_is_sent_to_the_author_once(self, submission, answer, queue):
        answer(submission)
        assert queue == [("ops.send_notification", ("answer", submission.pk))]
        for _ in range(2):
            ops_tasks.send_notification.apply(["answer", submission.pk])
        (message,) = mail.outbox
        assert message.to == [submission.author.email]
        assert "We do." in message.body
        assert "List-Unsubscribe" in message.extra_headers

    def test_is_not_repeated_when_the_answer_is_corrected(self, submission, answer, queue):
        for response in ("We do.", "We always do."):
            answer(submission, response)
        assert len(queue) == 1

    def test_is_not_sent_if_the_author_does_not_want_it(self, submission, answer, queue):
        submission.author.notify_on_response = False
        submission.author.save()
        answer(submission)
        ops_tasks.send_notification.apply(["answer", submission.pk])
        with time_machine.travel(timezone.now() + timedelta(minutes=5)):
            ops_tasks.resume_deliveries()
        assert (queue, mail.outbox) == ([], [])

    def test_is_queued_again_after_the_broker_was_unavailable(
        self, submission, answer, queue, monkeypatch
    ):
        def refuse(*args, **kwargs):
            raise OperationalError("connection refused")

        with monkeypatch.context() as patch:
            patch.setattr(Task, "apply_async", refuse)
            answer(submission)
        with time_machine.travel(timezone.now() + timedelta(minutes=5)):
            ops_tasks.resume_deliveries()
        assert queue == [("ops.send_notification", ("answer", submission.pk))]

    def test_is_not_retried_after_a_permanent_rejection(self, submission, answer, monkeypatch):
        def reject(message):
            raise smtplib.SMTPRecipientsRefused({message.to[0]: (550, b"no such user")})

        answer(submission)
        monkeypatch.setattr(mail.EmailMessage, "send", reject)
        ops_tasks.send_notification.apply(["answer", submission.pk])
        submission.refresh_from_db()
        assert submission.notified_at


@pytest.mark.parametrize(
    ("name", "label", "field", "value"),
    [
        ("daily", "daily digests", "digest_frequency", "off"),
        ("weekly", "weekly digests", "digest_frequency", "off"),
        ("answer", "answer notifications", "notify_on_response", False),
    ],
)
def test_link_unsubscribes_from_this_email_only(client, make_user, name, label, field, value):
    user = make_user("anna", digest_frequency="daily")
    path = urlsplit(unsubscribe.link(user, registry[name])).path
    before = {"digest_frequency": "daily", "notify_on_response": True}

    assert f"Unsubscribe anna@example.com from {label}?" in client.get(path).text
    user.refresh_from_db()
    assert {name: getattr(user, name) for name in before} == before

    response = client.post(path, {"List-Unsubscribe": "One-Click"})
    assert f"anna@example.com is unsubscribed from {label}." in response.text
    user.refresh_from_db()
    assert {name: getattr(user, name) for name in before} == before | {field: value}
