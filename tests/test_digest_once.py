"""Digest delivery: each recipient gets one digest despite killed workers and a broker outage."""

import collections
import random
import signal
import time

import psycopg
import pytest

from tests.conftest import production_variables
from tests.servers import wait_for

pytestmark = pytest.mark.slow

#: Recipients, and how many workers are killed.
SIZES = [(1_000, 3), pytest.param((5_000, 10), marks=pytest.mark.long)]

#: The default in production.
EMAIL_CONNECTIONS = 8

#: Creates users whose submissions were answered yesterday, and runs the digest every second.
CREATE_DATA = """
from datetime import timedelta
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask
users = User.objects.bulk_create(
    User(username=f"user{n}", email=f"user{n}@example.com", digest_frequency="daily")
    for n in range(RECIPIENTS)
)
yesterday = timezone.localtime().replace(hour=0, minute=0) - timedelta(hours=2)
Submission.objects.bulk_create(
    Submission(author=user, body="?", response="!", answered_at=yesterday, notified_at=yesterday)
    for user in users
)
schedule = PeriodicTask.objects.get(name="user-digest-daily")
schedule.crontab = None
schedule.interval = IntervalSchedule.objects.create(every=1, period="seconds")
schedule.save()
"""

#: The e-mails that are tried again after a day
COUNT_WAITING = "SELECT count(*) FROM ops_attempt WHERE next_at > now() + interval '12 hours'"

#: Makes the day pass after which e-mails are tried again.
END_WAIT = """
from django.utils import timezone
from prodserver_ops.models import Attempt
Attempt.objects.update(next_at=timezone.now())
"""


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]} recipients")
def service(request, bake, make_service, smtp, postgres_url, broker_url):
    """A service in production mode with many users and a slow SMTP server."""
    smtp.delay = 0.01
    service = make_service(
        bake(project_slug="once"),
        EMAIL_HOST="127.0.0.1",
        EMAIL_PORT=smtp.port,
        WORKER_CONCURRENCY=1,
        **production_variables(postgres_url, broker_url),
    )
    service.deploy()
    service.recipients, service.kills = request.param
    service.shell(CREATE_DATA.replace("RECIPIENTS", str(service.recipients)))
    return service


@pytest.fixture
def broker_url(rabbitmq_url):
    return rabbitmq_url


def count_messages(smtp):
    """Return the number of messages by recipient."""
    return collections.Counter(message["to"] for message in smtp.messages)


def is_complete(service, smtp):
    """Return whether every recipient has a message."""
    return len(count_messages(smtp)) == service.recipients


def count_waiting(service):
    """Return the number of e-mails that are tried again after a day."""
    with psycopg.connect(service.environment["DATABASE_URL"]) as connection:
        return connection.execute(COUNT_WAITING).fetchone()[0]


def count_missing_and_repeated(service, smtp):
    """Return the number of recipients without a message, and of repeated messages."""
    counts = count_messages(smtp)
    message_ids = collections.Counter(message["message-id"] for message in smtp.messages)
    for message_id, count in message_ids.items():
        assert count == 1 or message_id.startswith("<daily."), message_id
    assert len(message_ids) == len(counts)
    return service.recipients - len(counts), sum(counts.values()) - len(counts)


def wait_for_digests(service, smtp):
    """Wait until every recipient has a message, and a little longer for repeated ones."""
    wait_for(
        lambda: is_complete(service, smtp),
        120,
        lambda: f"missing and repeated: {count_missing_and_repeated(service, smtp)}",
    )
    time.sleep(3)


def test_killed_workers_and_two_beats_lose_no_digest(service, smtp):
    service.start("beat")
    service.start("beat")
    rng = random.Random(20261122)
    kills = 0
    while kills < service.kills:
        worker = service.start("worker")
        before = len(smtp.messages)
        wait_for(lambda start=before: len(smtp.messages) > start, 60, worker.text)
        time.sleep(rng.uniform(0, 0.4))
        assert not is_complete(service, smtp), f"all digests were sent before kill {kills + 1}"
        worker.kill_all()
        kills += 1
    service.start("worker")
    # An e-mail that was being sent at two kills may have caused them: it waits for a day.
    wait_for(
        lambda: service.recipients - len(count_messages(smtp)) <= count_waiting(service),
        120,
        lambda: f"missing and repeated: {count_missing_and_repeated(service, smtp)}",
    )
    waiting = count_waiting(service)
    assert waiting <= kills
    service.shell(END_WAIT)
    wait_for_digests(service, smtp)
    missing, repeated = count_missing_and_repeated(service, smtp)
    print(
        f"{service.recipients} recipients, {kills} kills: {missing} missing, {repeated} repeated, "
        f"{waiting} that waited for a day"
    )
    assert missing == 0
    # A worker that is killed may repeat the e-mails that it was sending.
    assert repeated <= kills * EMAIL_CONNECTIONS


class TestBrokerOutage:
    @pytest.fixture
    def broker_url(self, dedicated_rabbitmq):
        return dedicated_rabbitmq.url

    def test_loses_and_repeats_no_digest(self, service, smtp, dedicated_rabbitmq):
        smtp.delay = 0.1  # The outage is over before all are sent.
        service.start("beat")
        worker = service.start("worker")
        wait_for(lambda: len(smtp.messages) > 200, 60, worker.text)
        dedicated_rabbitmq.stop()
        time.sleep(3)
        assert not is_complete(service, smtp)
        dedicated_rabbitmq.start()
        wait_for_digests(service, smtp)
        missing, repeated = count_missing_and_repeated(service, smtp)
        print(
            f"{service.recipients} recipients, broker outage: {missing} missing, {repeated} repeated"
        )
        assert (missing, repeated) == (0, 0)
        assert worker.stop(signal.SIGTERM, seconds=30) == 0
