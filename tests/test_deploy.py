"""Deployment files: app.json, image, compose files and documents match the Procfile."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.conftest import read_procfile
from tests.generate import SOURCES
from tests.test_output import ANSWERS, files, texts


@pytest.fixture
def containers(bake):
    """A service with a Dockerfile and compose files."""
    return bake(deploy="dockerfile", compose=True)


def test_procfile_defines_the_processes_for_dokku(default_project):
    assert (default_project / "Procfile").read_text() == (
        "web: python manage.py prodserver web\n"
        "worker: python manage.py prodserver worker\n"
        "beat: python manage.py prodserver beat\n"
        "release: ./manage.py migrate --noinput\n"
    )


def test_app_json_starts_every_process_of_the_procfile(default_project):
    app = json.loads((default_project / "app.json").read_text())
    processes = read_procfile(default_project / "Procfile").keys() - {"release"}
    assert app["formation"] == {process: {"quantity": 1} for process in processes}
    assert app["healthchecks"].keys() == {"web", "worker", "beat"}


def test_process_that_does_not_start_does_not_hold_up_a_deploy(bake):
    """Dokku doubles the delay between the attempts of a command check."""
    app = json.loads((bake(queues="high") / "app.json").read_text())
    waits = {
        name: sum(check["wait"] * 2**attempt for attempt in range(check["attempts"] - 1))
        for name, (check,) in app["healthchecks"].items()
        if "command" in check
    }
    assert waits == {"worker": 75, "worker_high": 75, "beat": 75}


def test_app_json_runs_checks_before_a_deploy(default_project):
    app = json.loads((default_project / "app.json").read_text())
    (check,) = app["healthchecks"]["web"]
    assert (check["type"], check["path"]) == ("startup", "/health/ready")
    # Dokku's request has neither the domain nor HTTPS, so only the log may precede the check.
    settings = (default_project / "prayer_room_api" / "settings.py").read_text()
    middleware = re.search(r"MIDDLEWARE = \[(.*?)\]", settings, re.S)[1]
    assert re.findall(r'"prodserver_ops\.(.*)"', middleware)[:2] == [
        "core.logs.RequestLogMiddleware",
        "web.health.HealthMiddleware",
    ]
    assert middleware.index("HealthMiddleware") < middleware.index("django.")
    assert app["scripts"]["dokku"]["predeploy"] == (
        "python manage.py check --deploy --fail-level WARNING --database default"
    )


def test_image_runs_the_web_process_of_the_procfile(containers):
    dockerfile = (containers / "Dockerfile").read_text()
    command = json.loads(re.search(r"^CMD (.*)", dockerfile, re.M)[1])
    assert command == shlex.split(read_procfile(containers / "Procfile")["web"])
    assert not re.search(r"^(EXPOSE|ENTRYPOINT|# *syntax)", dockerfile, re.M)
    assert re.findall(r"^USER (.*)", dockerfile, re.M) == ["1001"]


def test_images_use_the_same_python_and_uv(containers):
    python = (containers / ".python-version").read_text().strip()
    images = [
        re.findall(r"(?:FROM |--from=)(\S+[:/]\S+)", (containers / name).read_text())
        for name in ("Dockerfile", "compose.dev.yaml")
    ]
    assert set(images[0]) == set(images[1])
    assert f"python:{python}-slim" in images[0]


def test_compose_runs_the_processes_of_the_procfiles(containers):
    for procfile, name in (("Procfile", "compose.yaml"), ("Procfile.dev", "compose.dev.yaml")):
        services = yaml.safe_load((containers / name).read_text())["services"]
        commands = read_procfile(containers / procfile)
        for process in ("web", "worker", "beat"):
            # Only honcho needs exec, and gives each process a port of its own.
            command = commands[process].rpartition("exec ")[2]
            assert services[process]["command"] == command, process
            # All processes run the image that ``migrate`` builds.
            assert services[process]["image"] == services["migrate"]["image"]


def test_compose_processes_wait_for_servers_and_migrations(containers):
    services = yaml.safe_load((containers / "compose.yaml").read_text())["services"]
    assert services["proxy"]["depends_on"] == {"web": {"condition": "service_healthy"}}
    for process in ("web", "worker", "beat"):
        assert services[process]["depends_on"] == {
            "postgres": {"condition": "service_healthy"},
            "rabbitmq": {"condition": "service_healthy"},
            "migrate": {"condition": "service_completed_successfully"},
        }
    assert {name for name, service in services.items() if "healthcheck" not in service} == {
        "migrate"
    }
    # A worker can finish its task before Docker kills it.
    settings = (containers / SOURCES / "conf" / "defaults.py").read_text()
    limit = int(re.search(r"CELERY_TASK_TIME_LIMIT = (\d+)", settings)[1])
    assert int(services["worker"]["stop_grace_period"].rstrip("s")) > limit


def test_compose_files_contain_no_secrets(containers):
    for name in ("compose.yaml", "compose.dev.yaml"):
        text = (containers / name).read_text()
        for values in re.findall(r"(?:SECRET_KEY|PASSWORD|PASS): *(.+)|://\w+:(.+?)@", text):
            assert "".join(values).startswith("${"), values


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_relative_links_between_documents_resolve(bake, answers):
    project = bake(**answers)
    for path, text in texts(project, ".md").items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((project / path).parent / target).is_file(), f"{path}: {target}"


@pytest.mark.parametrize(
    ("answers", "builder"),
    [
        ({}, "herokuish"),
        ({"compose": True}, "herokuish"),
        ({"deploy": "dockerfile"}, "dockerfile"),
    ],
)
def test_deploy_guide_selects_the_builder_explicitly(bake, answers, builder):
    deploy = (bake(**answers) / "docs" / "deploy.md").read_text()
    assert f"dokku builder:set prayer-room-api selected {builder}\n" in deploy


def test_deploy_guide_commands_name_the_app(bake):
    project = bake(author_email="o'brien+x@example.com", project_slug="prayers")
    blocks = re.findall(r"^```sh\n(.*?)```$", (project / "docs/deploy.md").read_text(), re.M | re.S)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert ["dokku", "letsencrypt:set", "prayers", "email", "o'brien+x@example.com"] in commands
    for command in commands:
        assert command[0] in ("dokku", "git")
        if command[0] == "dokku" and "plugin" not in command[1] and "cron-job" not in command[1]:
            assert {"prayers", "prayers-restored", "prayers-staging"} & set(command), command


# systemd


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("process", ["web", "worker", "worker_high", "beat", "flower"])
def test_units_are_valid_and_hardened(bake, tmp_path, process):
    project = bake(deploy="systemd", queues="high", monitoring="flower")
    name = f"prayer-room-api-{process.replace('_', '-')}.service"
    unit = (project / name).read_text()
    assert f"manage.py prodserver {process}\n" in unit
    # What is on the host of the service only
    for old, new in (
        ("/opt/prayer-room-api/.venv/bin/python", sys.executable),
        ("WorkingDirectory=/opt/prayer-room-api", "WorkingDirectory=/tmp"),
        ("User=prayer-room-api", "User=root"),
        ("EnvironmentFile=/etc/prayer-room-api.env\n", ""),
    ):
        assert unit.count(old) == 1
        unit = unit.replace(old, new)
    (tmp_path / name).write_text(unit)
    command = ["systemd-analyze", "verify", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", str(project / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    (score,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    print(f"{name}: exposure {score}")
    assert float(score) < 2


def test_shell_reads_the_environment_file_of_systemd(bake, tmp_path):
    project = bake(deploy="systemd")
    document = (project / "docs" / "deploy.md").read_text()
    path = tmp_path / "service.env"
    (block,) = re.findall(r"^cat > (\S+) <<END\n(.*?^END)$", document, re.M | re.S)
    lines = block[1].replace(":5432/", ":5432/name?sslmode=require&application_name=")
    (read,) = re.findall(r"^(set -a .*) &&$", document, re.M)
    script = f"cat > {path} <<END\n{lines}\n{read.replace(block[0], str(path))}\nenv"
    output = subprocess.run(
        ["sh", "-ec", script], capture_output=True, text=True, check=True
    ).stdout
    assert f"?sslmode=require&application_name={project.name}\n" in output
    assert "CELERY_BROKER_URL=amqp://" in output


def test_service_under_systemd_says_nothing_about_dokku(bake):
    project = bake(deploy="systemd")
    for path in files(project):
        if path not in (".cruft.json", "docs/recipes.md"):
            assert not re.search("dokku|heroku", (project / path).read_text(), re.I), path
