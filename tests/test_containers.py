"""Containers: the image and the compose files, built and run by a real Docker Engine."""

import json
import re
import shlex
import shutil
import subprocess
import urllib.error
import uuid
from urllib.request import Request, urlopen

import pytest
import yaml

from tests.conftest import ROOT, clean_environment, free_port, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("containers")]

#: How an image runs where nobody trusts it.
HARDENED = shlex.split(
    "--init --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges"
)

#: What a visitor's proxy says.
VISITOR = {"X-Forwarded-Proto": "https", "Accept-Encoding": "gzip"}

SECRET_KEY = "a-key-for-this-test-alone-of-more-than-fifty-characters"


def run(command, **options):
    """Run a command, a list or a line of shell; return what it printed on stdout, or fail."""
    options = {"env": clean_environment(), "text": True} | options
    done = subprocess.run(
        ["bash", "-c", command] if isinstance(command, str) else command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        **options,
    )
    if done.returncode:
        pytest.fail(f"{command} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def docker(*arguments):
    return run(["docker", *arguments]).strip()


def succeeds(*arguments, timeout=60):
    """Tell whether a command of docker's ends well, and in time."""
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def first_image(*names):
    """Return the first of the images that is here or can be pulled; skip where none is."""
    for name in names:
        if succeeds("image", "inspect", name) or succeeds("pull", "--quiet", name, timeout=300):
            return name
    pytest.skip(f"no image {' or '.join(names)}: neither here nor to be pulled")


@pytest.fixture(scope="session")
def engine():
    """A Docker Engine with the images that everything here rests on, and Compose."""
    if not shutil.which("docker") or not succeeds("info"):
        pytest.skip(
            "no Docker Engine answers; install one (https://docs.docker.com/engine/install/)"
            " or name one that runs in DOCKER_HOST"
        )
    if not succeeds("compose", "version"):
        pytest.skip("no Docker Compose; install it: https://docs.docker.com/compose/install/")
    first_image("python:3.13-slim")
    first_image("ghcr.io/astral-sh/uv:0.13")


@pytest.fixture(scope="session")
def postgres_image(engine):
    return first_image("postgres:16")


@pytest.fixture(scope="session")
def rabbitmq_image(engine):
    return first_image("rabbitmq:4", "rabbitmq:3")


@pytest.fixture(scope="session")
def project(engine, cookies_session, uv):
    """A service with Dockerfile and compose files, its packages locked, and a name of its own."""
    slug = f"boxed_{uuid.uuid4().hex[:8]}"
    answers = {"project_slug": slug, "deploy": "dockerfile", "compose": True, "setup": False}
    result = cookies_session.bake(extra_context=answers, template=str(ROOT))
    if result.exception:
        raise result.exception
    run([uv, "lock", "--quiet"], cwd=result.project_path)
    return result.project_path


@pytest.fixture(scope="session")
def image(project):
    """The image of the service, built beside files that have no place in it."""
    (project / ".env").write_text("SECRET=of-this-machine\n")
    (project / ".git").mkdir()
    (project / "var").mkdir()
    name = f"{project.name}:test"
    docker("build", "--quiet", "--tag", name, str(project))
    (project / ".env").unlink()
    (project / ".git").rmdir()
    yield name
    docker("image", "rm", "--force", name)


def get(port, path, **headers):
    """Return status, headers and body of an answer; a redirect is an answer."""
    request = Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urlopen(request, timeout=10) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_the_image_holds_what_it_needs_and_no_more(project, image):
    (inspected,) = json.loads(docker("image", "inspect", image))
    config = inspected["Config"]
    assert config["User"] == "1001"
    assert not config.get("ExposedPorts")
    assert not config.get("Entrypoint")
    assert config["Cmd"] == ["python", "manage.py", "prodserver", "web"]
    told = json.dumps(config["Env"]) + docker("history", "--no-trunc", image)
    assert not re.search(r"SECRET|DATABASE_URL|RABBITMQ_URL|BROKER", told)

    listed = docker("run", "--rm", image, "ls", "-A", "/app").split()
    assert sorted(listed) == sorted(
        [
            ".python-version",
            "Procfile",
            "app.json",
            "manage.py",
            "pyproject.toml",
            "staticfiles",
            "uv.lock",
            project.name,
        ]
    )
    for tool in ("uv", "pytest", "ruff"):
        assert not succeeds("run", "--rm", image, "which", tool), tool


def test_the_image_is_as_small_as_the_documents_say(project, image):
    name = project.name.replace("_", "-")
    docker("tag", image, name)
    try:
        document = (project / "docs" / "image.md").read_text()
        (measure,) = re.findall(r"^docker image inspect .*", document, re.M)
        (stated,) = re.findall(r"It adds (\d+) MiB", document)
        said = run(measure)
        assert re.fullmatch(r"\d+ MiB\n", said)
        assert int(said.split()[0]) <= int(stated) + 5
    finally:
        docker("image", "rm", name)


def test_the_workflow_builds_and_checks_the_image(project):
    workflow = yaml.safe_load((project / ".github" / "workflows" / "image.yml").read_text())
    build, check = (step["run"] for step in workflow["jobs"]["image"]["steps"] if "run" in step)
    try:
        run(build, cwd=project)
        run(check, cwd=project)
    finally:
        succeeds("image", "rm", "--force", project.name.replace("_", "-"))


def test_every_process_runs_hardened(project, image, postgres_image, rabbitmq_image):
    """As on Dokku: predeploy, release, and each line of the Procfile in a container of its own."""
    network = f"{project.name}-network"
    started = []

    def start(name, *arguments):
        identity = docker("run", "--detach", "--network", network, "--name", name, *arguments)
        started.append(identity)
        return identity

    def logs(container):
        done = subprocess.run(["docker", "logs", container], capture_output=True, text=True)
        return done.stdout + done.stderr

    def wait_for_log(container, text):
        wait_for(lambda: text in logs(container), 60, lambda: logs(container))

    postgres, rabbitmq = f"{project.name}-postgres", f"{project.name}-rabbitmq"
    environment = {
        "SECRET_KEY": SECRET_KEY,
        "DATABASE_URL": f"postgres://postgres:secret@{postgres}:5432/postgres",
        "RABBITMQ_URL": f"amqp://guest:guest@{rabbitmq}:5672//",
    }
    options = [*HARDENED, *(f"--env={name}={value}" for name, value in environment.items())]
    lines = (project / "Procfile").read_text().splitlines()
    procfile = {name: shlex.split(line) for name, line in (line.split(": ", 1) for line in lines)}
    app = json.loads((project / "app.json").read_text())

    docker("network", "create", network)
    try:
        start(postgres, "--env=POSTGRES_PASSWORD=secret", postgres_image)
        start(rabbitmq, rabbitmq_image)
        answers = ("exec", postgres, "pg_isready", "--host=127.0.0.1")
        wait_for(lambda: succeeds(*answers), 90, lambda: logs(postgres))
        listens = ("exec", rabbitmq, "rabbitmq-diagnostics", "-q", "check_port_connectivity")
        wait_for(lambda: succeeds(*listens), 90, lambda: logs(rabbitmq))

        once = ["run", "--rm", "--network", network, *options, image]
        docker(*once, "sh", "-c", app["scripts"]["dokku"]["predeploy"])
        assert "OK" in docker(*once, *procfile["release"])

        port = "--env=PORT=5000"
        web = start(
            f"{project.name}-web",
            *options,
            port,
            "--publish=127.0.0.1::5000",
            image,
            *procfile["web"],
        )
        # Dokku gives an empty PORT to all but web.
        worker, beat = (
            start(f"{project.name}-{name}", *options, "--env=PORT=", image, *procfile[name])
            for name in ("worker", "beat")
        )
        wait_for_log(web, "Listening at: http://0.0.0.0:5000")
        wait_for_log(worker, " ready.")
        wait_for_log(beat, "beat: Starting...")
        published = docker("port", web, "5000/tcp").rsplit(":", 1)[1]

        # A health check has neither the domain nor HTTPS; any other request needs both.
        assert get(published, "/health/live")[0] == 200
        status, _, body = get(published, "/health/ready")
        assert (status, json.loads(body)["status"]) == (200, "ok"), logs(web)
        assert get(published, "/admin/login/", Host="else.example.com")[0] in (301, 400)
        visitor = VISITOR | {"Host": f"{project.name.replace('_', '-')}.example.com"}
        status, _, body = get(published, "/admin/login/", **visitor)
        assert status == 200
        stylesheet = re.search(r'href="(/static/admin/css/base\.\w{12}\.css)"', body.decode())[1]
        status, headers, _ = get(published, stylesheet, **visitor)
        assert (status, headers["Content-Encoding"]) == (200, "gzip")
        assert "immutable" in headers["Cache-Control"]

        for container in (web, worker, beat):
            assert docker("exec", container, "id", "-u") == "1001"
            assert not succeeds("exec", container, "touch", "/app/written")
            docker("stop", "--time", "10", container)
            status = docker("inspect", "--format", "{{.State.ExitCode}}", container)
            assert status == "0", logs(container)
    finally:
        for container in started:
            docker("rm", "--force", "--volumes", container)
        docker("network", "rm", network)


@pytest.fixture
def compose(project, rabbitmq_image, postgres_image, tmp_path):
    """Run a line of shell where ``docker compose`` means the project; all of it goes in the end."""
    override = tmp_path / "override.yaml"
    override.write_text(f"services: {{rabbitmq: {{image: '{rabbitmq_image}'}}}}\n")
    environment = clean_environment(COMPOSE_FILE=f"compose.yaml:{override}", PORT=free_port())

    def compose(command, overlay=False):
        if overlay:
            files = f"compose.yaml:compose.dev.yaml:{override}"
            return run(command, cwd=project, env=environment | {"COMPOSE_FILE": files})
        return run(command, cwd=project, env=environment)

    compose.port = environment["PORT"]
    yield compose
    if (project / ".env").exists():
        for overlay in (False, True):
            compose("docker compose down --volumes --timeout 5", overlay)
        (project / ".env").unlink()
    name = project.name.replace("_", "-")
    succeeds("image", "rm", "--force", name, f"{name}:dev")


def states(compose):
    """Return service, state, health and exit status of every container."""
    said = compose("docker compose ps --all --format json")
    containers = [json.loads(line) for line in said.splitlines()]
    return sorted(
        tuple(container[key] for key in ("Service", "State", "Health", "ExitCode"))
        for container in containers
    )


def test_compose_runs_the_service_by_its_document(project, compose):
    document = (project / "docs" / "compose.md").read_text()
    secrets, up, _ = re.findall(r"^```sh\n(.*)\n```$", document, re.M)
    by_hand = re.findall(r"^\| `(docker compose .*?)` \|", document, re.M)

    compose(secrets)
    compose(up)
    assert states(compose) == [
        ("beat", "running", "healthy", 0),
        ("migrate", "exited", "", 0),
        ("postgres", "running", "healthy", 0),
        ("rabbitmq", "running", "healthy", 0),
        ("web", "running", "healthy", 0),
        ("worker", "running", "healthy", 0),
    ]
    status, _, body = get(compose.port, "/health/ready")
    assert (status, json.loads(body)["status"]) == (200, "ok")

    # Again, as for a new version: the migration runs once more and nothing is in its way.
    compose(up)
    backup, restore, scale = (
        next(command for command in by_hand if word in command)
        for word in ("pg_dump", "pg_restore", "--scale")
    )
    database = f"docker compose exec -T postgres psql -U postgres -d {project.name} -Atc"
    count = f"{database} 'SELECT count(*) FROM django_celery_beat_periodictask'"
    schedules = compose(count)
    compose(backup)
    compose(f"{database} 'DELETE FROM django_celery_beat_periodictask'")
    # A stand-in whose tools are newer than its server says so, and restores all the same.
    versions = compose("docker compose exec -T postgres sh -c 'pg_dump --version; postgres -V'")
    tools, server = re.findall(r"\(PostgreSQL\) (\d+)", versions)
    compose(restore if tools == server else f"{restore} || true")
    assert compose(count) == schedules != "0\n"
    compose(scale)

    compose("docker compose stop beat web worker")
    ours = [state for state in states(compose) if state[0] in ("beat", "web", "worker")]
    assert ours == [(name, "exited", "", 0) for name in ("beat", "web", *["worker"] * 3)], compose(
        "docker compose logs beat web worker"
    )


def test_compose_reloads_code_in_development(project, compose):
    document = (project / "docs" / "compose.md").read_text()
    secrets, _, develop = re.findall(r"^```sh\n(.*)\n```$", document, re.M)
    assert develop.startswith("docker compose --file compose.yaml --file compose.dev.yaml up")

    compose(secrets)
    compose("docker compose up --build --wait", overlay=True)
    status, _, _ = get(compose.port, "/admin/login/")
    assert status == 200
    mode = compose("docker compose exec -T web sh -c 'echo [$DJANGO_MODE]'", overlay=True)
    assert mode == "[]\n"

    health = project / project.name / "health.py"
    code = health.read_text()
    health.write_text(code.replace('{"status": "ok"}', '{"status": "reloaded"}'))
    try:
        wait_for(
            lambda: b"reloaded" in get_or_nothing(compose.port, "/health/live"),
            60,
            lambda: compose("docker compose logs web", overlay=True),
        )
        for process, text in (("worker", " ready."), ("beat", "beat: Starting...")):
            logs = f"docker compose logs {process}"
            wait_for(
                lambda logs=logs, text=text: compose(logs, overlay=True).count(text) >= 2,
                60,
                lambda logs=logs: compose(logs, overlay=True),
            )
    finally:
        health.write_text(code)


def get_or_nothing(port, path):
    """Return the body of an answer, and nothing while there is none."""
    try:
        return get(port, path)[2]
    except OSError:
        return b""
