"""Old rows are deleted in batches, and what is deleted sends no e-mail again."""

from datetime import timedelta

import pytest
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.sessions.models import Session
from django.core import mail
from django.db import connection
from django.utils import timezone
from test_deliveries import NAME, SampleDigest

from prodserver_ops.console import checks, doctor, retention
from prodserver_ops.mail import deliveries, tasks
from prodserver_ops.mail.digests import registry
from prodserver_ops.models import DigestDelivery, DigestRun
from prodserver_ops.tasks import delete_records

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("sample_templates")]

NOW = timezone.now()


@pytest.fixture
def digest(monkeypatch, make_user):
    digest = SampleDigest()
    monkeypatch.setitem(registry, NAME, digest)
    digest.keys = {make_user(f"reader{number}").pk for number in range(3)}
    return digest


@pytest.fixture
def make_run(digest):
    """A function that creates a run of so many days ago, with deliveries."""

    def make(days, *, finished=True):
        end = NOW - timedelta(days=days)
        run = DigestRun.objects.create(
            digest=NAME,
            period_start=end - timedelta(days=1),
            period_end=end,
            queued_at=end,
            finished_at=end if finished else None,
        )
        users = digest.recipients(run)
        deliveries.record(run, *((user, deliveries.SENT, "") for user in users))
        return run

    return make


def get_ages(rows):
    return sorted({(NOW - row.period_end).days for row in rows.all()})


class TestDeliveries:
    def test_old_ones_are_deleted_with_their_runs(self, make_run, settings, monkeypatch):
        monkeypatch.setattr(retention, "BATCH", 2)
        settings.KEEP_DAYS = {"deliveries": 30}
        for days in (50, 40, 20):
            make_run(days)
        delete_records()
        assert get_ages(DigestRun.objects) == get_ages(DigestDelivery.objects) == [20]

    def test_a_digest_goes_on_where_its_last_run_ended(self, make_run):
        for days in (400, 300):
            make_run(days)
        delete_records()
        assert get_ages(DigestRun.objects) == [300]
        assert not DigestDelivery.objects.exists()

    def test_they_are_kept_while_the_digest_can_be_sent(self, make_run, settings):
        settings.KEEP_DAYS = {"deliveries": 1}
        make_run(2)  # SampleDigest.max_age is three days.
        delete_records()
        assert get_ages(DigestDelivery.objects) == [2]

    def test_a_message_of_a_deleted_delivery_sends_nothing(self, make_run, digest, queue):
        run = make_run(100, finished=False)
        delete_records()
        assert not DigestDelivery.objects.exists()
        tasks.send_digest_chunk.run(run.pk, min(digest.keys) // deliveries.CHUNK)
        tasks.resume_deliveries()
        assert mail.outbox == []
        assert queue == []


def test_sessions_and_the_log_of_the_admin(make_user, settings):
    for days in (-1, 1):
        Session.objects.create(session_key=str(days), expire_date=NOW + timedelta(days=days))
    user = make_user("admin")
    for days in (1000, 1):
        (entry,) = [LogEntry.objects.log_actions(user.pk, [user], CHANGE, "", single_object=True)]
        LogEntry.objects.filter(pk=entry.pk).update(action_time=NOW - timedelta(days=days))
    delete_records()
    assert Session.objects.get().session_key == "1"
    assert LogEntry.objects.count() == 2
    settings.KEEP_DAYS = {"admin_log": 365}
    delete_records()
    assert LogEntry.objects.count() == 1


def test_ends_in_time(make_run, settings, monkeypatch):
    monkeypatch.setattr(retention, "BATCH", 1)
    monkeypatch.setattr(retention, "SECONDS", -1)
    make_run(100)
    delete_records()
    assert DigestDelivery.objects.count() == 2
    delete_records()
    assert DigestDelivery.objects.count() == 1


@pytest.mark.parametrize(
    ("days", "problem"),
    [
        ({"delivery": 3}, "'delivery' is unknown"),
        ({"runs": 0}, "'runs' is 0, but must be None or at least 1"),
        ({"runs": True}, "'runs' is True, but must be None or at least 1"),
        ({"runs": "7"}, "'runs' is '7', but must be None or at least 1"),
    ],
)
def test_invalid_days_are_an_error(settings, days, problem):
    settings.KEEP_DAYS = days
    (error,) = checks.check_retention()
    assert error.msg == f"KEEP_DAYS: {problem}."
    assert "admin_log" in error.hint


def test_valid_days_are_none(settings):
    settings.KEEP_DAYS = {"runs": None, "deliveries": 400}
    assert checks.check_retention() == []


def test_doctor_shows_sizes_and_days():
    message = doctor.check_tables().message
    assert message.endswith(
        "kept for days: deliveries 90, runs 7, delayed 1, heartbeats 1, admin_log forever"
    )
    assert ("ops_" in message) == (connection.vendor == "postgresql")


def test_growth_is_the_size_by_the_age_of_the_oldest_row():
    DigestRun.objects.create(
        digest=NAME,
        period_start=timezone.now() - timedelta(days=11),
        period_end=timezone.now() - timedelta(days=10),
    )
    assert retention.get_growth({"ops_digestrun": 1000, "ops_taskrun": 5}) == {"ops_digestrun": 100}
