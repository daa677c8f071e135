"""Beat stands by: two never both dispatch, and the second takes over within seconds."""

import time

import psycopg
import pytest

from tests.servers import wait_for

pytestmark = pytest.mark.slow

SCHEDULE = """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
PeriodicTask.objects.exclude(name="deliveries-resume").update(enabled=False)
interval, _ = IntervalSchedule.objects.get_or_create(every=1, period="seconds")
task = PeriodicTask.objects.get(name="deliveries-resume")
task.interval = interval
task.save()
"""


@pytest.fixture(params=["embedded", "production"])
def service(request, bake, make_service):
    variables = {}
    if request.param == "production":
        variables = {
            "DJANGO_MODE": "prod",
            "SECRET_KEY": "a-key-for-this-test-alone-of-more-than-fifty-characters",
            "DATABASE_URL": request.getfixturevalue("postgres_url"),
            "RABBITMQ_URL": request.getfixturevalue("rabbitmq_url"),
        }
    service = make_service(bake(project_slug="beats"), **variables)
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    service.shell(SCHEDULE)
    return service


def dispatched(*beats):
    """Return how often the beats have dispatched."""
    return sum(beat.text().count("Sending due task") for beat in beats)


def test_the_second_takes_over_when_the_first_is_killed(service):
    first = service.start("beat")
    wait_for(lambda: dispatched(first) > 1, 30, first.text)
    second = service.start("beat")
    second.wait_for_text("Standing by: another beat runs")
    before = dispatched(first)
    time.sleep(4)
    assert dispatched(first) > before + 1
    assert dispatched(second) == 0

    first.kill_all()
    killed = time.monotonic()
    wait_for(lambda: dispatched(second), 10, second.text)
    print(f"took over after {time.monotonic() - killed:.1f} s")

    third = service.start("beat")
    third.wait_for_text("Standing by: another beat runs")
    assert second.stop() == 0
    wait_for(lambda: dispatched(third), 10, third.text)
    fourth = service.start("beat")
    fourth.wait_for_text("Standing by: another beat runs")
    assert fourth.stop() == 0
    assert dispatched(fourth) == 0


# A lock on a file cannot be lost.
@pytest.mark.parametrize("service", ["production"], indirect=True)
def test_one_whose_connection_drops_dispatches_nothing_more(service):
    first = service.start("beat")
    wait_for(lambda: dispatched(first) > 1, 30, first.text)
    second = service.start("beat")
    second.wait_for_text("Standing by: another beat runs")
    url = service.environment["DATABASE_URL"]
    with psycopg.connect(url, autocommit=True) as server:
        (pid,) = server.execute(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchone()
        server.execute("SELECT pg_terminate_backend(%s)", [pid])
    first.wait_for_text("starting afresh")
    # Whichever comes first has the lock now; the other stands by.
    before = dispatched(first), dispatched(second)
    wait_for(lambda: dispatched(first, second) > sum(before) + 2, 15, first.text)
    gained = dispatched(first) - before[0], dispatched(second) - before[1]
    assert min(gained) == 0, (first.text(), second.text())
