"""Once: every recipient gets the digest, whatever is killed, doubled or stopped on the way."""

import collections
import random
import signal
import time

import pytest

from tests.servers import wait_for

pytestmark = pytest.mark.slow

RECIPIENTS = 2_000
KILLS = 10

#: People with an answer of yesterday, and a schedule that is due all the time.
FILL = f"""
from datetime import timedelta
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask
users = User.objects.bulk_create(
    User(username=f"user{{n}}", email=f"user{{n}}@example.com", digest_frequency="daily")
    for n in range({RECIPIENTS})
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


@pytest.fixture
def service(request, bake, make_service, smtp, postgres_url):
    """A service in production mode with that many recipients; its SMTP server takes its time."""
    smtp.delay = 0.002
    service = make_service(
        bake(project_slug="once"),
        DJANGO_MODE="prod",
        SECRET_KEY="a-key-for-this-test-alone-of-more-than-fifty-characters",
        DATABASE_URL=postgres_url,
        RABBITMQ_URL=request.getfixturevalue("broker_url"),
        EMAIL_HOST="127.0.0.1",
        EMAIL_PORT=smtp.port,
        WORKER_CONCURRENCY=1,
    )
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    service.shell(FILL)
    return service


@pytest.fixture
def broker_url(rabbitmq_url):
    return rabbitmq_url


def recipients(smtp):
    return collections.Counter(message["to"] for message in smtp.messages)


def all_are_there(smtp):
    return len(recipients(smtp)) == RECIPIENTS


def tally(smtp):
    """Return how many recipients were missed, and how many messages came twice."""
    counts = recipients(smtp)
    for message_id, count in collections.Counter(m["message-id"] for m in smtp.messages).items():
        assert count == 1 or message_id.startswith("<daily."), message_id
    assert len({message["message-id"] for message in smtp.messages}) == len(counts)
    return RECIPIENTS - len(counts), sum(counts.values()) - len(counts)


def settle(smtp):
    """Wait for the last recipient, and a little longer for what should not come."""
    wait_for(lambda: all_are_there(smtp), 120, lambda: f"{tally(smtp)} missing and repeated")
    time.sleep(3)


def test_with_a_worker_that_is_killed_and_two_beats(service, smtp):
    service.start("beat")
    service.start("beat")
    rng = random.Random(20261122)
    kills = 0
    while kills < KILLS:
        worker = service.start("worker")
        before = len(smtp.messages)
        wait_for(lambda start=before: len(smtp.messages) > start, 60, worker.text)
        time.sleep(rng.uniform(0, 0.4))
        assert not all_are_there(smtp), f"all was sent before kill {kills + 1}"
        worker.kill_all()
        kills += 1
    service.start("worker")
    settle(smtp)
    missing, repeated = tally(smtp)
    print(f"{RECIPIENTS} recipients, {kills} kills: {missing} missing, {repeated} repeated")
    assert missing == 0
    assert repeated <= kills


class TestBroker:
    @pytest.fixture
    def broker_url(self, own_rabbitmq):
        return own_rabbitmq.url

    def test_that_stops_in_the_middle(self, service, smtp, own_rabbitmq):
        service.start("beat")
        worker = service.start("worker")
        wait_for(lambda: len(smtp.messages) > 200, 60, worker.text)
        own_rabbitmq.stop()
        time.sleep(3)
        own_rabbitmq.start()
        settle(smtp)
        missing, repeated = tally(smtp)
        print(f"{RECIPIENTS} recipients, broker stopped: {missing} missing, {repeated} repeated")
        assert (missing, repeated) == (0, 0)
        assert worker.stop(signal.SIGTERM, seconds=30) == 0
