"""Beat: only one of several processes dispatches, and a standby takes over.

It does so at once if the active beat stops or is killed, and after the time of a lease if nothing
is heard of it: 15 seconds here, and a minute with ``--real-times``.
"""

import signal
import time

import psycopg
import pytest

from tests.conftest import production_variables
from tests.servers import wait_for

pytestmark = pytest.mark.slow

#: How long a standby may take to replace a beat that is gone without a word, in seconds.
TAKEOVER = 90

RUN_ONE_SCHEDULE_EVERY_SECOND = """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
PeriodicTask.objects.exclude(name="deliveries-resume").update(enabled=False)
interval, _ = IntervalSchedule.objects.get_or_create(every=1, period="seconds")
task = PeriodicTask.objects.get(name="deliveries-resume")
task.interval = interval
# One that is queued again although no worker runs, and does nothing
task.task, task.args = "ops.send_notification", '["answer", 0]'
task.save()
"""


@pytest.fixture(params=["embedded", "production"])
def service(request, bake_impatient, make_service):
    variables = {}
    if request.param == "production":
        variables = production_variables(
            request.getfixturevalue("postgres_url"), request.getfixturevalue("rabbitmq_url")
        )
    service = make_service(bake_impatient(project_slug="beats"), **variables)
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    service.shell(RUN_ONE_SCHEDULE_EVERY_SECOND)
    return service


def count_dispatches(*beats):
    """Return how many tasks the beat processes have dispatched."""
    return sum(beat.text().count("Sending due task") for beat in beats)


def start_two(service):
    """Start a beat that dispatches and one that stands by, and return both."""
    first = service.start("beat")
    wait_for(lambda: count_dispatches(first) > 1, 30, first.text)
    second = service.start("beat")
    second.wait_for_text("Standing by: another beat is running")
    return first, second


def test_standby_takes_over_when_the_active_beat_is_killed_or_stopped(service):
    first, second = start_two(service)
    before = count_dispatches(first)
    wait_for(lambda: count_dispatches(first) > before + 2, 15, first.text)
    assert count_dispatches(second) == 0

    first.kill_all()
    killed = time.monotonic()
    wait_for(lambda: count_dispatches(second), TAKEOVER, second.text)
    print(f"took over after {time.monotonic() - killed:.1f} s")

    third = service.start("beat")
    third.wait_for_text("Standing by: another beat is running")
    assert second.stop() == 0
    wait_for(lambda: count_dispatches(third), 10, third.text)
    fourth = service.start("beat")
    fourth.wait_for_text("Standing by: another beat is running")
    assert fourth.stop() == 0
    assert count_dispatches(fourth) == 0


# SQLite has no connection to lose.
@pytest.mark.parametrize("service", ["production"], indirect=True)
def test_only_one_beat_dispatches_after_a_lost_connection(service):
    first, second = start_two(service)
    url = service.environment["DATABASE_URL"]
    with psycopg.connect(url, autocommit=True) as server:
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    before = count_dispatches(first)
    wait_for(lambda: count_dispatches(first) > before + 2, 15, first.text)
    assert count_dispatches(second) == 0


@pytest.mark.parametrize("service", ["production"], indirect=True)
def test_beat_that_was_paused_dispatches_nothing_and_stands_by(service):
    first, second = start_two(service)
    first.popen.send_signal(signal.SIGSTOP)
    paused = time.monotonic()
    before = count_dispatches(first)
    wait_for(lambda: count_dispatches(second), TAKEOVER, second.text)
    print(f"took over after {time.monotonic() - paused:.1f} s")
    first.popen.send_signal(signal.SIGCONT)
    first.wait_for_text("beat: Restarting: ")
    wait_for(lambda: first.text().count("Standing by: another beat is running"), 30, first.text)
    assert count_dispatches(first) == before
    gained = count_dispatches(second)
    wait_for(lambda: count_dispatches(second) > gained + 2, 15, second.text)
    assert count_dispatches(first) == before
