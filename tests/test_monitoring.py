"""Flower: with each broker it shows workers and tasks, only to its account."""

import base64
import json
import signal
import subprocess
import urllib.error
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.conftest import production_variables
from tests.servers import PATIENCE, free_port, wait_for

pytestmark = pytest.mark.slow

ACCOUNT = "admin:a-password-for-this-test"


@pytest.fixture(
    params=[
        "rabbitmq",
        pytest.param("redis", marks=pytest.mark.long),
        pytest.param("postgresql", marks=pytest.mark.long),
    ]
)
def service(request, bake, make_service, postgres_url, rabbitmq_url, redis_url):
    """A service with Flower in production mode, on a broker."""
    project = bake(
        broker=request.param, monitoring="flower", project_slug=f"flower_{request.param}"
    )
    service = make_service(
        project,
        FLOWER_BASIC_AUTH=ACCOUNT,
        FLOWER_PORT=free_port(),
        REDIS_URL=redis_url,
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.deploy()
    return service


def get(service, path, account=ACCOUNT):
    """Return the status and JSON of a response of Flower."""
    headers = {"Authorization": f"Basic {base64.b64encode((account or '').encode()).decode()}"}
    port = service.environment["FLOWER_PORT"]
    request = Request(f"http://127.0.0.1:{port}{path}", headers=headers if account else {})
    try:
        with urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, None
    except OSError:
        return None, None


def find_task(service, name):
    """Return the state of a task that Flower shows, or None."""
    _, tasks = get(service, "/api/tasks")
    return next((task["state"] for task in (tasks or {}).values() if task["name"] == name), None)


def test_flower_shows_workers_and_tasks_to_its_account_only(service):
    flower = service.start("flower")
    wait_for(lambda: get(service, "/api/tasks")[0] == 200, 30, flower.text)
    for account in (None, "admin:wrong", "other:a-password-for-this-test"):
        for path in ("/", "/workers", "/api/tasks", "/api/workers", "/metrics"):
            assert get(service, path, account)[0] == 401
    # Other users of the host can read the arguments of a process.
    assert "a-password" not in Path(f"/proc/{flower.popen.pid}/cmdline").read_text()
    other = service.start("flower")
    assert other.popen.wait(timeout=30 * PATIENCE) == 1
    assert "is already in use. " in other.text().splitlines()[-1]
    assert "Traceback" not in other.text()
    worker = service.start("worker")
    worker.wait_for_text(" ready.")
    service.shell("from prodserver_ops.tasks import delete_records\ndelete_records.delay()")
    wait_for(
        lambda: find_task(service, "ops.delete_records") == "SUCCESS",
        30,
        lambda: f"{get(service, '/api/tasks')}\n{flower.text()}",
    )
    assert flower.stop(signal.SIGTERM) == 0
    assert "a-password" not in flower.text()
    for line in flower.text().splitlines():
        assert json.loads(line)["level"] in ("INFO", "WARNING"), line


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "FLOWER_BASIC_AUTH: got nothing, expected NAME:PASSWORD"),
        ("admin:short", "FLOWER_BASIC_AUTH: got an invalid account, expected NAME:PASSWORD"),
    ],
)
def test_production_requires_an_account(bake, make_service, value, problem):
    service = make_service(
        bake(monitoring="flower"),
        **production_variables("postgres://localhost/none", "amqp://localhost"),
    )
    service.install("--no-dev")
    if value:
        service.environment["FLOWER_BASIC_AUTH"] = value
    done = subprocess.run(
        ["python", "manage.py", "prodserver", "flower"],
        cwd=service.folder,
        env=service.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (done.stdout + done.stderr).startswith(problem), done.stdout + done.stderr
    assert "short" not in done.stdout + done.stderr
