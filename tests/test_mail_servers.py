"""Mail servers that misbehave: nobody gets an e-mail again and again, and others get theirs."""

import asyncio
import collections
import re
import socket
import threading
import time

import pytest

from tests.conftest import production_variables
from tests.servers import PATIENCE, wait_for

pytestmark = pytest.mark.slow

#: Readers that the data creates
READERS = 20

#: Readers of a digest that is due now, and a task that says when it ran.
CREATE_DATA = """
from datetime import timedelta
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask
PeriodicTask.objects.exclude(name="deliveries-resume").update(enabled=False)
task = PeriodicTask.objects.get(name="deliveries-resume")
task.interval = IntervalSchedule.objects.create(every={interval}, period="seconds")
task.save()
users = User.objects.bulk_create(
    User(username="user" + str(n), email="user" + str(n) + "@example.com", digest_frequency="daily")
    for n in range(20)
)
yesterday = timezone.localtime().replace(hour=0, minute=0) - timedelta(hours=2)
Submission.objects.bulk_create(
    Submission(author=user, body="?", response="!", answered_at=yesterday, notified_at=yesterday)
    for user in users
)
from {slug}.tasks import send_user_digest
send_user_digest.delay("daily")
"""

QUEUE_TRIVIAL_TASK = "import time; from idle.tasks import note; note.delay(time.time())"

TASK = """

from celery import shared_task


@shared_task
def note(queued):
    import time
    from pathlib import Path

    Path("waits").open("a").write(f"{time.time() - queued}\\n")
"""


@pytest.fixture
def email_timeout(real_times):
    """How long a service waits for a mail server, in seconds."""
    return 30 if real_times else 6


@pytest.fixture
def make_mailing(bake_impatient, make_service, postgres_url, rabbitmq_url, real_times):
    """A function that returns a service with ``READERS``, for a mail server on a port."""

    def make(slug, port, **variables):
        # Tests that run at the same time use queues of their own.
        project = bake_impatient(project_slug=slug)
        with (project / slug / "tasks.py").open("a") as tasks:
            tasks.write(TASK)
        service = make_service(
            project,
            EMAIL_HOST="127.0.0.1",
            EMAIL_PORT=port,
            **variables,
            **production_variables(postgres_url, rabbitmq_url),
        )
        service.deploy()
        service.shell(CREATE_DATA.format(slug=slug, interval=60 if real_times else 5))
        return service

    return make


def count(smtp):
    """Return the number of messages by recipient."""
    return collections.Counter(message["to"] for message in smtp.messages)


def wait_for_resumes(worker, number):
    """Wait until the schedule that resumes deliveries has run so often."""
    resumed = re.compile(r"ops\.resume_deliveries\[\S+\] succeeded")

    def count_resumes():
        return len(resumed.findall(worker.text()))

    before = count_resumes()
    wait_for(lambda: count_resumes() >= before + number, 75 * number, worker.text)


@pytest.mark.long
def test_lost_connection_after_an_email_repeats_nothing_and_stops_nobody(smtp, make_mailing):
    tried = collections.Counter()
    accept = smtp.handle_DATA

    async def drop(server, session, envelope):
        """Accept each e-mail; close the connection before the reply to one reader."""
        (address,) = envelope.rcpt_tos
        tried[address] += 1
        status = await accept(server, session, envelope)
        if address == "user3@example.com":
            server.transport.close()
        return status

    smtp.handle_DATA = drop
    service = make_mailing("dropping", smtp.port)
    worker, _ = service.start("worker"), service.start("beat")
    wait_for(lambda: len(count(smtp)) == READERS, 60, worker.text)
    wait_for_resumes(worker, 2)
    assert count(smtp) == collections.Counter(tried.keys())
    assert worker.text().count("user3") == 0


def test_slow_and_refusing_replies_stop_nobody_else(smtp, make_mailing, email_timeout):
    accept = smtp.handle_DATA
    tried = collections.Counter()

    async def handle(server, session, envelope):
        (address,) = envelope.rcpt_tos
        tried[address] += 1
        if address == "user1@example.com":
            return "450 4.2.0 greylisted"
        if address == "user2@example.com":
            await accept(server, session, envelope)
            await asyncio.sleep(email_timeout + 3)
            return "250 OK"
        if address == "user3@example.com":
            return "550 5.1.1 no such user"
        return await accept(server, session, envelope)

    smtp.handle_DATA = handle
    service = make_mailing("slow", smtp.port)
    worker, _ = service.start("worker"), service.start("beat")
    wait_for(lambda: len(count(smtp)) == READERS - 2, 120, worker.text)
    wait_for(lambda: tried["user1@example.com"] > 1, 150, worker.text)
    assert tried["user1@example.com"] == 2
    assert tried["user3@example.com"] == 1
    assert set(count(smtp).values()) == {1}


def test_server_that_rejects_everybody_loses_nothing_once_it_is_mended(smtp, make_mailing):
    accept, rejected = smtp.handle_DATA, []

    async def deny(server, session, envelope):
        rejected.append(envelope.rcpt_tos[0])
        return f"554 5.7.1 <{envelope.rcpt_tos[0]}>: Relay access denied"

    smtp.handle_DATA = deny
    service = make_mailing("denying", smtp.port)
    worker, _ = service.start("worker"), service.start("beat")
    worker.wait_for_text("the mail server is unusable: 554 5.7.1", seconds=120)
    time.sleep(2)
    assert len(rejected) == 5
    doctor = service.spawn("doctor", "python", "manage.py", "doctor")
    assert doctor.popen.wait(timeout=60 * PATIENCE) == 1
    (line,) = [line for line in doctor.text().splitlines() if line.startswith("deliveries")]
    assert "no e-mail is accepted: 554 5.7.1" in line
    smtp.handle_DATA = accept
    # Those that were rejected follow two hours later.
    wait_for(lambda: len(count(smtp)) == READERS - 5, 120, worker.text)
    assert '"level": "ERROR"' in worker.text()
    statuses = service.shell(
        "from prodserver_ops.models import *;"
        "print(sorted(set(DigestDelivery.objects.values_list('status', flat=True))),"
        "Attempt.objects.count())"
    )
    assert statuses.split("\n")[-2] == "['sending', 'sent'] 5"


@pytest.fixture(
    params=[
        "accepts and is silent",
        pytest.param("refuses connections", marks=pytest.mark.long),
    ]
)
def dead_server(request):
    """The port of a mail server that is of no use."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        if request.param == "refuses connections":
            server.close()
            yield 1
            return
        held = []

        def hold():
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    for client in held:
                        client.close()
                    return

        threading.Thread(target=hold, daemon=True).start()
        yield server.getsockname()[1]


def test_dead_server_does_not_hold_up_other_tasks(dead_server, make_mailing, email_timeout):
    service = make_mailing("idle", dead_server)
    worker, _ = service.start("worker"), service.start("beat")
    worker.wait_for_text("ops.send_digest_chunk", seconds=60)
    path = service.folder / "waits"
    for number in range(1, 4):
        service.shell(QUEUE_TRIVIAL_TASK)
        wait_for(lambda: path.exists(), 60, worker.text)
        wait_for(lambda n=number: len(path.read_text().split()) == n, 60, worker.text)
        time.sleep(email_timeout / 3)
    slowest = max(map(float, path.read_text().split()))
    print(f"a trivial task waited {slowest:.1f} s at most")
    assert slowest < email_timeout + 5 * PATIENCE
