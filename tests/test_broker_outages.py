"""A broker that is stopped, frozen or out of memory: requests go on, processes stop, no mail lost."""

import concurrent.futures
import time

import pytest

from tests.conftest import production_variables
from tests.servers import PATIENCE, wait_for
from tests.test_failures import HealthMonitor, Moderator

pytestmark = pytest.mark.slow

#: Submissions that one action answers, and that requests answer at the same time.
BULK, PARALLEL = 50, 8

CREATE_DATA = f"""
from django_celery_beat.models import IntervalSchedule, PeriodicTask
# A digest would be due if the test runs over a full hour.
PeriodicTask.objects.exclude(name="deliveries-resume").update(enabled=False)
task = PeriodicTask.objects.get(name="deliveries-resume")
task.interval = IntervalSchedule.objects.create(every=5, period="seconds")
task.save()
User.objects.create_superuser("admin", "admin@example.com", "secret")
author = User.objects.create_user("author", "author@example.com")
for number in range({BULK + PARALLEL}):
    Submission.objects.create(author=author, body=f"Question {{number}}")
"""

OUTAGES = {
    "stopped": (lambda node: node.stop(), lambda node: node.start()),
    "frozen": (lambda node: node.freeze(), lambda node: node.thaw()),
    "alarm": (lambda node: node.set_memory_limit(0.00001), lambda node: node.set_memory_limit(0.6)),
}


# test_failures.py stops a broker too.
@pytest.mark.parametrize(
    "outage",
    [
        pytest.param("stopped", marks=pytest.mark.long),
        "frozen",
        pytest.param("alarm", marks=pytest.mark.long),
    ],
)
def test_an_outage_of_the_broker_holds_nothing_up(
    bake_impatient, make_service, smtp, postgres_url, dedicated_rabbitmq, outage
):
    begin, end = OUTAGES[outage]
    service = make_service(
        bake_impatient(project_slug="outages"),
        EMAIL_HOST="127.0.0.1",
        EMAIL_PORT=smtp.port,
        **production_variables(postgres_url, dedicated_rabbitmq.url),
    )
    service.deploy()
    service.shell(CREATE_DATA)
    processes = {name: service.start(name) for name in ("web", "worker", "beat")}
    processes["web"].wait_for_text("Listening at")
    monitor = HealthMonitor(service)
    processes["worker"].wait_for_text(" ready.", seconds=60)
    processes["beat"].wait_for_text("Sending due task deliveries-resume", seconds=60)
    moderators = [Moderator(service) for _ in range(PARALLEL)]
    # The first message opens the connection.
    moderators[0].answer(1)
    wait_for(lambda: smtp.messages, 30, processes["worker"].text)

    begin(dedicated_rabbitmq)
    monitor.start()
    bulk = moderators[0].submit(
        "/admin/outages/submission/",
        action="answer",
        response="We do.",
        _selected_action=range(2, 2 + BULK),
    )
    print(f"{outage}: {BULK} answers in one action took {bulk:.1f} s")
    with concurrent.futures.ThreadPoolExecutor(PARALLEL) as pool:
        numbers = range(2 + BULK, 1 + BULK + PARALLEL)
        single = max(pool.map(Moderator.answer, moderators[1:], numbers))
    print(f"{outage}: {PARALLEL - 1} answers at the same time took {single:.1f} s each at most")
    monitor.stopped.set()
    monitor.join()
    print(f"{outage}: slowest /health/ready {monitor.slowest:.1f} s")
    assert set(monitor.live) == {200}
    assert max(bulk, single) < 3 * PATIENCE
    assert monitor.slowest < 6 * PATIENCE

    stopped = {}
    for name in ("worker", "beat", "web"):
        start = time.monotonic()
        status = processes[name].stop(seconds=30)
        stopped[name] = (status, time.monotonic() - start)
        print(f"{outage}: {name} stopped after {stopped[name][1]:.1f} s with status {status}")

    end(dedicated_rabbitmq)
    processes = {name: service.start(name) for name in ("worker", "beat")}
    wait_for(
        lambda: len({message["message-id"] for message in smtp.messages}) == BULK + PARALLEL,
        150,
        lambda: processes["beat"].text() + processes["worker"].text(),
    )
    repeated = len(smtp.messages) - BULK - PARALLEL
    print(f"{outage}: all {BULK + PARALLEL} notifications sent, {repeated} repeated")
    assert repeated == 0


POISON = """

from celery import shared_task


@shared_task
def poison():
    \"\"\"Kill the process that runs it.\"\"\"
    import os

    os.kill(os.getpid(), 9)
"""


@pytest.mark.long
def test_a_task_that_kills_each_worker_is_given_up(bake, make_service, postgres_url, rabbitmq_url):
    project = bake(project_slug="poisoned")
    with (project / "poisoned" / "tasks.py").open("a") as tasks:
        tasks.write(POISON)
    service = make_service(project, **production_variables(postgres_url, rabbitmq_url))
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    worker = service.start("worker")
    worker.wait_for_text(" ready.", seconds=60)
    service.shell("from poisoned.tasks import poison; poison.delay()")
    worker.wait_for_text("poisoned.tasks.poison has lost 15 workers and is given up", seconds=90)
    doctor = service.spawn("doctor", "python", "manage.py", "doctor")
    doctor.popen.wait(timeout=30 * PATIENCE)
    assert "1 tasks were given up: they killed workers" in doctor.text(), doctor.text()
    service.run("celery -A poisoned purge -f -Q poisoned.failed")
    assert worker.stop(seconds=30) == 0
