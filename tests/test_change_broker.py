"""A running service gets another broker, as docs/upgrades.md describes: no task is lost or runs twice."""

import itertools
import shutil

import pytest

from tests.conftest import production_variables
from tests.servers import PATIENCE, wait_for
from tests.test_rehearsal import Dokku, run_doctor

pytestmark = [pytest.mark.slow, pytest.mark.long]

TASK = """
from celery import shared_task

@shared_task
def note(name):
    import time
    from pathlib import Path

    time.sleep(1)
    with Path("FOLDER", "notes").open("a") as file:
        file.write(f"{name} {time.time()}\\n")
"""

#: Queues tasks until a file exists, then prints their number.
QUEUE_TASKS = """
import time
from pathlib import Path
from movers.tasks import note
number = 0
while not Path("{folder}", "stop-{name}").exists():
    note.delay(f"{name}{{number}}")
    number += 1
    if number == 1:
        note.apply_async(args=["late-{name}"], countdown=15)
    time.sleep(0.3)
print(number)
"""

BROKERS = ["rabbitmq", "redis", "postgresql"]


@pytest.mark.parametrize(("old_broker", "new_broker"), [*itertools.permutations(BROKERS, 2)])
def test_running_service_gets_another_broker(
    bake, make_service, postgres_url, rabbitmq_url, redis_url, tmp_path, old_broker, new_broker
):
    services = []
    for name, broker in (("old", old_broker), ("new", new_broker)):
        project = tmp_path / name / "movers"
        shutil.copytree(bake(project_slug="movers", broker=broker), project)
        with (project / "movers" / "tasks.py").open("a") as file:
            file.write(TASK.replace("FOLDER", str(tmp_path)))
        services.append(
            make_service(
                project,
                REDIS_URL=redis_url,
                WORKER_CONCURRENCY=8,
                **production_variables(postgres_url, rabbitmq_url),
            )
        )
    old, new = services
    old.deploy()
    new.install("--no-dev")
    new.run("python manage.py collectstatic --noinput")
    dokku = Dokku(old)
    dokku.deploy()

    def start_producer(service, name):
        code = QUEUE_TASKS.format(folder=tmp_path, name=name)
        return service.spawn(f"queue-{name}", "python", "manage.py", "shell", "-v0", "-c", code)

    def stop_producer(producer, name):
        (tmp_path / f"stop-{name}").touch()
        assert producer.popen.wait(timeout=30 * PATIENCE) == 0, producer.text()
        return [f"late-{name}", *(f"{name}{n}" for n in range(int(producer.text().split()[-1])))]

    def read_notes():
        notes = tmp_path / "notes"
        return [line.split() for line in notes.read_text().splitlines()] if notes.exists() else []

    first = start_producer(old, "a")
    wait_for(read_notes, 30, first.text)
    # The steps of the document: a worker of the old version empties the old broker.
    extra = old.spawn("extra", "python", "manage.py", "prodserver", "worker", PORT="")
    dokku.deploy(new)
    second = start_producer(new, "b")
    queued = stop_producer(first, "a")
    wait_for(lambda: any(name.startswith("b") for name, _ in read_notes()), 30, second.text)
    queued += stop_producer(second, "b")
    wait_for(lambda: {name for name, _ in read_notes()} >= {*queued}, 60, extra.text)
    assert "; 0 messages wait" in run_doctor(old)
    assert extra.stop(seconds=30) == 0
    dokku.visitors.stopped.set()
    dokku.visitors.join()

    names = sorted(name for name, _ in read_notes())
    # Delayed tasks are the last ones, when nothing else is left.
    times = sorted(float(time) for name, time in read_notes() if not name.startswith("late"))
    pause = max(later - earlier for earlier, later in itertools.pairwise(times))
    print(f"{old_broker} → {new_broker}: {len(queued)} tasks, longest pause {pause:.1f} s")
    assert names == sorted(queued)
    assert pause < 10 * PATIENCE
    assert set(dokku.visitors.responses) == {200}, dokku.visitors.responses
