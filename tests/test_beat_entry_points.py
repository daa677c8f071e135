"""Beat: every way to start it waits for the same lease and runs the database's schedules."""

import pytest

from tests.servers import wait_for
from tests.test_beat import RUN_ONE_SCHEDULE_EVERY_SECOND, TAKEOVER, count_dispatches

pytestmark = pytest.mark.slow

#: Ways to start beat that do not go through prodserver.
COMMANDS = {
    "celery beat": "celery -A beats beat",
    "celery beat with a scheduler": (
        "celery -A beats beat --scheduler django_celery_beat.schedulers:DatabaseScheduler"
    ),
    "celery worker with beat": "celery -A beats worker --beat --pool threads",
}


def test_every_way_to_start_beat_stands_by_and_takes_over(bake, make_service):
    service = make_service(bake(project_slug="beats"))
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    service.shell(RUN_ONE_SCHEDULE_EVERY_SECOND)

    active = service.start("beat")
    wait_for(lambda: count_dispatches(active) > 1, 30, active.text)
    standby = [service.spawn("beat", *command.split()) for command in COMMANDS.values()]
    for process in standby:
        process.wait_for_text("Standing by: another beat is running")

    # Each takes over in turn, whichever is first, and dispatches alone.
    while standby:
        check_dispatches_alone(active, standby)
        active.stop(seconds=30)
        active = wait_for_successor(standby)
        standby.remove(active)
    assert active.stop() == 0


def check_dispatches_alone(active, standby):
    """Check that the active beat dispatches two more tasks, and the others none."""
    before = count_dispatches(active)
    wait_for(lambda: count_dispatches(active) > before + 1, 10, active.text)
    assert [count_dispatches(process) for process in standby] == [0] * len(standby)


def wait_for_successor(standby):
    """Wait until one of the beats dispatches, and return it."""
    return wait_for(
        lambda: next((process for process in standby if count_dispatches(process)), None),
        TAKEOVER,
        lambda: "\n".join(process.text() for process in standby),
    )


def test_every_way_to_start_beat_exits_cleanly_while_it_stands_by(bake, make_service):
    service = make_service(bake(project_slug="beats"))
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    active = service.start("beat")
    active.wait_for_text("beat: Starting...")
    standby = [service.spawn("beat", *command.split()) for command in COMMANDS.values()]
    for process in standby:
        process.wait_for_text("Standing by: another beat is running")
    assert [process.stop() for process in standby] == [0] * len(standby)
