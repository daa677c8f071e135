"""Beat: every way to start it runs the schedules of the database, beside other beats."""

import pytest

from tests.servers import PATIENCE
from tests.test_beat import (
    RUN_ONE_SCHEDULE_EVERY_SECOND,
    count_dispatches,
    count_runs,
    wait_for_dispatches,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def service(bake, make_service):
    service = make_service(bake(project_slug="beats"))
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    service.shell(RUN_ONE_SCHEDULE_EVERY_SECOND)
    return service


def test_every_way_shares_the_runs(service):
    beats = [
        service.start("beat"),
        service.spawn("beat", *"celery -A beats beat".split()),
        service.spawn("beat", *"celery -A beats worker --beat --pool threads".split()),
    ]
    wait_for_dispatches(8, *beats)
    assert [beat.stop(seconds=30) for beat in beats] == [0, 0, 0]
    runs, repeated = count_runs(service)
    assert (count_dispatches(*beats), repeated) == (runs, 0)


def test_another_scheduler_is_refused(service):
    scheduler = "django_celery_beat.schedulers:DatabaseScheduler"
    beat = service.spawn("beat", *f"celery -A beats beat --scheduler {scheduler}".split())
    assert beat.popen.wait(timeout=30 * PATIENCE) == 1
    assert "DatabaseScheduler would run schedules that another beat runs too" in beat.text()
    assert "Traceback" not in beat.text()
