"""Short forms of the long trials."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT, clean_environment, require_server

pytestmark = pytest.mark.slow


def run_trial(uv, name, *arguments):
    """Run a trial; return its output, or fail the test."""
    done = subprocess.run(
        [sys.executable, ROOT / "trials" / f"{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment(UV=uv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout


def test_three_beats_that_are_disturbed(request, uv):
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    require_server(request, "RabbitMQ", 5672, "docker run -d -p 5672:5672 rabbitmq:4")
    run_trial(uv, "beats", 12)


# test_first_week.py has the changes one by one.
@pytest.mark.long
def test_teams_that_change_their_services(request, uv):
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    require_server(request, "RabbitMQ", 5672, "docker run -d -p 5672:5672 rabbitmq:4")
    run_trial(uv, "teams", "--alone", 1, "--combinations", 1)


def test_attacks_on_the_web_process(request, uv):
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    require_server(request, "RabbitMQ", 5672, "docker run -d -p 5672:5672 rabbitmq:4")
    run_trial(uv, "attacks", "--short")


# The library's tests have the days on which the clock changes.
@pytest.mark.long
def test_ten_years_in_one_time_zone(uv):
    run_trial(uv, "ten_years", 1)


# test_upgrades.py has short forms.
@pytest.mark.long
def test_an_aged_service_is_updated_and_an_unedited_one_equals_a_new_one(request, uv):
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    run_trial(uv, "time_travel", "--short")


def test_messages_that_no_client_sends(request, uv):
    """The library's tests have all kinds, without processes."""
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    require_server(request, "RabbitMQ", 5672, "docker run -d -p 5672:5672 rabbitmq:4")
    run_trial(uv, "messages", "rabbitmq", "--every", 40)


@pytest.mark.long
def test_outcomes_of_tasks_while_servers_and_workers_fail(request, uv):
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    require_server(request, "RabbitMQ", 5672, "docker run -d -p 5672:5672 rabbitmq:4")
    run_trial(uv, "outcomes", "rabbitmq", 6)


@pytest.mark.long
@pytest.mark.parametrize("part", ["lost", "delayed"])
def test_tasks_of_a_lost_worker_and_delayed_tasks(request, uv, part):
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    require_server(request, "Redis", 6379, "docker run -d -p 6379:6379 redis:7")
    run_trial(uv, "delivery", part, "--short", "--broker", "redis")


@pytest.mark.long
@pytest.mark.parametrize("name", ["bad_days", "limits", "bad_deploys"])
def test_bad_days_limits_and_deploys(request, uv, name):
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    require_server(request, "RabbitMQ", 5672, "docker run -d -p 5672:5672 rabbitmq:4")
    library, path = ROOT / "library", ROOT / "trials" / f"{name}.py"
    command = [uv, "run", "-q", "--directory", library, "python", path]
    subprocess.run(command, cwd=ROOT, env=clean_environment(), check=True)
