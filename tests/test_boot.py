"""Boot: the processes of the generated Procfile start, run a scheduled task and stop."""

import json
import re

import pytest

from tests.conftest import production_variables
from tests.servers import wait_for

pytestmark = pytest.mark.slow

#: An event above INFO, other than Celery's about tests that root runs.
LOUD = re.compile(r"^(?!.*superuser privileges).*\b(WARNING|ERROR|CRITICAL)\b.*", re.MULTILINE)

#: Creates a moderator and a submission that is due for the moderator digest.
CREATE_DATA = """
from datetime import timedelta
from django.utils import timezone
admin = User.objects.create_superuser("admin", "admin@example.com", "secret")
Submission.objects.create(author=admin, body="Please remember us.")
an_hour_ago = timezone.now() - timedelta(hours=1)
Submission.objects.update(created_at=an_hour_ago)
"""

#: Changes a seeded schedule, as an administrator can, to run every second.
RUN_DIGEST_EVERY_SECOND = """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
schedule = PeriodicTask.objects.get(name="moderator-digest-hourly")
schedule.crontab = None
schedule.interval = IntervalSchedule.objects.create(every=1, period="seconds")
schedule.save()
"""


def check_processes(service, smtp, **headers):
    """Start all processes and check that a schedule in the database sends an email."""
    service.run(service.procfile()["release"])
    service.shell(CREATE_DATA)

    web, worker, beat = (service.start(name) for name in ("web", "worker", "beat"))
    web.wait_for_text("Listening at")
    worker.wait_for_text(" ready.", seconds=60)
    beat.wait_for_text("beat: Starting...")

    status, text = service.get("/health/live")
    assert (status, json.loads(text)) == (200, {"status": "ok"})
    status, text = service.get("/health/ready")
    assert (status, json.loads(text)["checks"]) == (200, {"database": "ok", "broker": "ok"})
    status, text = service.get("/admin/", **headers)
    assert status == 200
    assert "Prayer Room API" in text
    stylesheet = re.search(r'href="(/static/admin/css/base[^"]*\.css)"', text)[1]
    assert service.get(stylesheet, **headers)[0] == 200

    service.shell(RUN_DIGEST_EVERY_SECOND)
    beat.wait_for_text("Sending due task moderator-digest-hourly")
    wait_for(lambda: smtp.messages, 30, worker.text)
    message = smtp.messages[0]
    assert message["to"] == "admin@example.com"
    text, html = (part.get_payload(decode=True).decode() for part in message.get_payload())
    assert "Please remember us." in text
    assert "Please remember us." in html

    statuses = {process: process.stop() for process in (beat, web, worker)}
    assert list(statuses.values()) == [0, 0, 0], [process.text() for process in statuses]
    assert [LOUD.findall(process.text()) for process in statuses] == [[], [], []]


# test_readme.py and test_setup.py run the default service too.
@pytest.mark.long
def test_processes_run_schedules_with_the_embedded_defaults(bake, make_service, smtp):
    service = make_service(bake(), EMAIL_HOST="127.0.0.1", EMAIL_PORT=smtp.port)
    service.install("--no-dev")
    check_processes(service, smtp)


# test_messages.py runs a service on Django 5.2 too.
@pytest.mark.parametrize("django_version", ["6.0", pytest.param("5.2", marks=pytest.mark.long)])
def test_processes_run_schedules_in_production(
    bake, make_service, smtp, postgres_url, rabbitmq_url, django_version
):
    project = bake(django_version=django_version, project_slug=f"boot{django_version[0]}")
    service = make_service(
        project,
        EMAIL_HOST="127.0.0.1",
        EMAIL_PORT=smtp.port,
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.install("--no-dev")
    service.run("python manage.py collectstatic --noinput")
    headers = {"Host": f"{project.name}.example.com", "X-Forwarded-Proto": "https"}
    check_processes(service, smtp, **headers)


@pytest.mark.parametrize("django_version", ["6.0", pytest.param("5.2", marks=pytest.mark.long)])
def test_system_checks_report_no_issues(bake, make_service, django_version):
    service = make_service(bake(django_version=django_version))
    service.install("--no-dev")
    service.run("python manage.py makemigrations --check --dry-run")
    service.run("python manage.py check --fail-level WARNING")
    variables = production_variables("postgres://nobody@127.0.0.1/nothing", "amqp://")
    for mode in ("prod", "staging"):
        output = service.run(
            "python manage.py check --deploy --fail-level WARNING",
            **variables | {"DJANGO_MODE": mode},
        )
        assert output.startswith("System check identified no issues")


SHOW_RESULT = """
from datetime import timedelta
from django.utils import timezone
from django_celery_results.models import TaskResult
from prodserver_ops.tasks import delete_records
print(TaskResult.objects.filter(task_name="ops.delete_records", status="SUCCESS").count())
TaskResult.objects.update(date_done=timezone.now() - timedelta(days=8))
delete_records()
print(TaskResult.objects.count())
"""


def test_results_are_stored_shown_and_deleted_if_wanted(bake, make_service, postgres_url):
    project = bake(project_slug="results", task_results="database")
    service = make_service(project, DATABASE_URL=postgres_url)
    service.install("--no-dev")
    service.run("python manage.py migrate --verbosity=0")
    service.run("python manage.py smoke")
    stored, left = map(int, service.shell(SHOW_RESULT).split()[-2:])
    assert stored >= 1
    assert left == 0
    service.run("python manage.py check --fail-level WARNING")
