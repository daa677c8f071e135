"""Deploying: app.json, Dockerfile, compose files and docs agree with the Procfile and each other."""

import json
import re
import shlex

import pytest
import yaml

from tests.test_output import ANSWERS, texts


def lines(project, name):
    """Return the commands of a Procfile by their names."""
    return dict(line.split(": ", 1) for line in (project / name).read_text().splitlines())


@pytest.fixture
def containers(bake):
    return bake(deploy="dockerfile", compose=True)


def test_the_procfile_is_what_dokku_starts(default_project):
    assert (default_project / "Procfile").read_text() == (
        "web: python manage.py prodserver web\n"
        "worker: python manage.py prodserver worker\n"
        "beat: python manage.py prodserver beat\n"
        "release: ./manage.py migrate --noinput\n"
    )


def test_app_json_starts_every_process_of_the_procfile(default_project):
    app = json.loads((default_project / "app.json").read_text())
    processes = lines(default_project, "Procfile").keys() - {"release"}
    assert app["formation"] == {process: {"quantity": 1} for process in processes}
    assert app["healthchecks"].keys() == {"web"}


def test_app_json_checks_before_a_deploy(default_project):
    app = json.loads((default_project / "app.json").read_text())
    (check,) = app["healthchecks"]["web"]
    assert (check["type"], check["path"]) == ("startup", "/health/ready")
    # What Dokku sends has neither the domain nor HTTPS, so only the log may come before.
    settings = (default_project / "prayer_room_api" / "settings.py").read_text()
    middleware = re.search(r"MIDDLEWARE = \[(.*?)\]", settings, re.S)[1]
    assert re.findall(r'"prayer_room_api\.(.*)"', middleware)[:2] == [
        "logs.RequestLogMiddleware",
        "health.HealthMiddleware",
    ]
    assert middleware.index("HealthMiddleware") < middleware.index("django.")
    assert app["scripts"]["dokku"]["predeploy"] == (
        "python manage.py check --deploy --fail-level WARNING --database default"
    )


def test_the_image_runs_what_the_procfile_names(containers):
    dockerfile = (containers / "Dockerfile").read_text()
    command = json.loads(re.search(r"^CMD (.*)", dockerfile, re.M)[1])
    assert command == shlex.split(lines(containers, "Procfile")["web"])
    assert not re.search(r"^(EXPOSE|ENTRYPOINT|# *syntax)", dockerfile, re.M)
    assert re.findall(r"^USER (.*)", dockerfile, re.M) == ["1001"]


def test_every_image_is_of_the_same_python_and_uv(containers):
    python = (containers / ".python-version").read_text().strip()
    named = [
        re.findall(r"(?:FROM |--from=)(\S+[:/]\S+)", (containers / name).read_text())
        for name in ("Dockerfile", "compose.dev.yaml")
    ]
    assert set(named[0]) == set(named[1])
    assert f"python:{python}-slim" in named[0]


def test_compose_runs_what_the_procfiles_name(containers):
    for procfile, name in (("Procfile", "compose.yaml"), ("Procfile.dev", "compose.dev.yaml")):
        services = yaml.safe_load((containers / name).read_text())["services"]
        for process in ("web", "worker", "beat"):
            command = services[process]["command"]
            assert command == lines(containers, procfile)[process], process
            # The first keeps the environment of all, whatever it adds.
            assert services[process]["image"] == services["migrate"]["image"]


def test_compose_waits_for_health_and_the_migration(containers):
    services = yaml.safe_load((containers / "compose.yaml").read_text())["services"]
    for process in ("web", "worker", "beat"):
        assert services[process]["depends_on"] == {
            "postgres": {"condition": "service_healthy"},
            "rabbitmq": {"condition": "service_healthy"},
            "migrate": {"condition": "service_completed_successfully"},
        }
    assert {name for name, service in services.items() if "healthcheck" not in service} == {
        "migrate"
    }
    # A worker may finish its task before it is killed.
    settings = (containers / "prayer_room_api" / "settings.py").read_text()
    limit = int(re.search(r"CELERY_TASK_TIME_LIMIT = (\d+)", settings)[1])
    assert int(services["worker"]["stop_grace_period"].rstrip("s")) > limit


def test_compose_holds_no_secret(containers):
    for name in ("compose.yaml", "compose.dev.yaml"):
        text = (containers / name).read_text()
        for found in re.findall(r"(?:SECRET_KEY|PASSWORD|PASS): *(.+)|://\w+:(.+?)@", text):
            assert "".join(found).startswith("${"), found


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_links_between_the_documents_lead_somewhere(bake, answers):
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
def test_the_builder_is_named_whatever_files_there_are(bake, answers, builder):
    deploy = (bake(**answers) / "docs" / "deploy.md").read_text()
    assert f"dokku builder:set prayer-room-api selected {builder}\n" in deploy


def test_every_command_for_dokku_is_one(bake):
    project = bake(author_email="o'brien+x@example.com", project_slug="prayers")
    blocks = re.findall(r"^```sh\n(.*?)```$", (project / "docs/deploy.md").read_text(), re.M | re.S)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert ["dokku", "letsencrypt:set", "prayers", "email", "o'brien+x@example.com"] in commands
    for command in commands:
        assert command[0] in ("dokku", "git")
        if command[0] == "dokku" and "plugin" not in command[1] and "cron-job" not in command[1]:
            assert {"prayers", "prayers-restored"} & set(command), command
