"""Beat: several processes share the runs, and each run is queued once, whatever happens to one."""

import signal
import time

import psycopg
import pytest

from tests.conftest import production_variables
from tests.servers import wait_for

pytestmark = pytest.mark.slow

#: How long nothing may be queued after one of two beats is gone, in seconds. The runs that it had
#: claimed wait for four seconds.
GAP = 10

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

COUNT_RUNS = """
from prodserver_ops.models import ScheduleRun
runs = ScheduleRun.objects.filter(schedule__name="deliveries-resume")
print(runs.count(), runs.filter(attempts__gt=1).count())
"""


@pytest.fixture(params=["embedded", "production"])
def service(request, bake, make_service):
    variables = {}
    if request.param == "production":
        variables = production_variables(
            request.getfixturevalue("postgres_url"), request.getfixturevalue("rabbitmq_url")
        )
    service = make_service(bake(project_slug="beats"), **variables)
    service.deploy()
    service.shell(RUN_ONE_SCHEDULE_EVERY_SECOND)
    return service


def count_dispatches(*beats):
    """Return how many tasks the beat processes have dispatched."""
    return sum(beat.text().count("Sending due task") for beat in beats)


def count_runs(service):
    """Return how many runs are stored, and how many of them were claimed more than once."""
    return tuple(map(int, service.shell(COUNT_RUNS).split()))


def wait_for_dispatches(number, *beats, seconds=30):
    """Wait until the beats have dispatched some more tasks. Return how long that took."""
    before, start = count_dispatches(*beats), time.monotonic()
    wait_for(
        lambda: count_dispatches(*beats) >= before + number,
        seconds,
        lambda: "\n".join(beat.text() for beat in beats),
    )
    return time.monotonic() - start


def start_two(service):
    """Start two beats, and return them once they are running."""
    first = service.start("beat")
    wait_for_dispatches(1, first)
    second = service.start("beat")
    second.wait_for_text("beat: Starting...")
    return first, second


def test_two_share_the_runs_and_queue_none_twice(service):
    first, second = start_two(service)
    wait_for_dispatches(6, first, second)
    assert (first.stop(), second.stop()) == (0, 0)
    runs, repeated = count_runs(service)
    assert (count_dispatches(first, second), repeated) == (runs, 0)


def test_the_other_goes_on_when_one_is_killed(service):
    first, second = start_two(service)
    wait_for_dispatches(2, first, second)
    first.kill_all()
    print(f"gap: {wait_for_dispatches(1, second, seconds=GAP):.1f} s")
    wait_for_dispatches(3, second)
    assert second.stop() == 0
    runs, repeated = count_runs(service)
    # What the first one had claimed is published by the second.
    assert repeated <= 1
    assert count_dispatches(first, second) <= runs + repeated


# SQLite has no connection to lose.
@pytest.mark.parametrize("service", ["production"], indirect=True)
def test_both_go_on_after_a_lost_connection(service):
    first, second = start_two(service)
    url = service.environment["DATABASE_URL"]
    with psycopg.connect(url, autocommit=True) as server:
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    wait_for_dispatches(3, first, second)
    assert first.stop() == 0
    wait_for_dispatches(2, second)


@pytest.mark.parametrize("service", ["production"], indirect=True)
def test_one_that_was_paused_repeats_nothing(service):
    first, second = start_two(service)
    first.popen.send_signal(signal.SIGSTOP)
    print(f"gap: {wait_for_dispatches(1, second, seconds=GAP):.1f} s")
    wait_for_dispatches(12, second)
    first.popen.send_signal(signal.SIGCONT)
    wait_for_dispatches(3, first, second)
    assert (first.stop(), second.stop()) == (0, 0)
    runs, repeated = count_runs(service)
    # What it had claimed when it was paused may be published twice; a worker runs one message.
    assert repeated <= 1
    assert count_dispatches(first, second) <= runs + repeated
