"""Containers: a Docker Engine builds and runs the image and the compose files."""

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

from tests.conftest import clean_environment, generate_project, production_variables, read_procfile
from tests.servers import free_port, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("containers")]

#: Options that restrict a container.
HARDENED = shlex.split(
    "--init --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges"
)

#: Headers of a request that a proxy forwards.
FORWARDED = {"X-Forwarded-Proto": "https", "Accept-Encoding": "gzip"}


def run(command, **options):
    """Run a command (a list) or shell code (a string). Return stdout, or fail the test."""
    options = {"env": clean_environment(), "text": True} | options
    done = subprocess.run(
        ["bash", "-c", command] if isinstance(command, str) else command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        **options,
    )
    if done.returncode:
        pytest.fail(f"{command} exited with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def docker(*arguments):
    """Run a docker command. Return its stripped output, or fail the test."""
    return run(["docker", *arguments]).strip()


def docker_succeeds(*arguments, timeout=60):
    """Return whether a docker command succeeds within the timeout."""
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def first_available_image(*names):
    """Return the first image that exists or can be pulled, or skip the test."""
    for name in names:
        if docker_succeeds("image", "inspect", name):
            return name
        if docker_succeeds("pull", "--quiet", name, timeout=300):
            return name
    pytest.skip(f"image not available: {' or '.join(names)}")


@pytest.fixture(scope="session")
def engine():
    """Skip the test unless Docker Engine, Compose and the base images are available."""
    if not shutil.which("docker") or not docker_succeeds("info"):
        pytest.skip(
            "Docker Engine is not running; install it (https://docs.docker.com/engine/install/)"
            " or set DOCKER_HOST"
        )
    if not docker_succeeds("compose", "version"):
        pytest.skip("Docker Compose is not installed; see https://docs.docker.com/compose/install/")
    first_available_image("python:3.13-slim")
    first_available_image("ghcr.io/astral-sh/uv:0.13")


@pytest.fixture(scope="session")
def postgres_image(engine):
    return first_available_image("postgres:16")


@pytest.fixture(scope="session")
def rabbitmq_image(engine):
    return first_available_image("rabbitmq:4", "rabbitmq:3")


@pytest.fixture(scope="session")
def nginx_image(engine):
    return first_available_image("nginx:1.29-alpine", "nginx:alpine")


@pytest.fixture(scope="session")
def project(engine, cookies_session, uv):
    """A service with a unique name, Dockerfile, compose files and lock file."""
    slug = f"boxed_{uuid.uuid4().hex[:8]}"
    project = generate_project(
        cookies_session, project_slug=slug, deploy="dockerfile", compose=True
    )
    run([uv, "lock", "--quiet"], cwd=project)
    return project


@pytest.fixture(scope="session")
def image(project):
    """The image of the service, built in a folder with files that it must not contain."""
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
    """Return the status, headers and body of a response, including an error response."""
    request = Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urlopen(request, timeout=10) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def get_status(port, path):
    """Return the status of a response, or None while the server does not respond."""
    try:
        return get(port, path)[0]
    except OSError:
        return None


def test_image_contains_only_runtime_files_and_no_secrets(project, image):
    (inspected,) = json.loads(docker("image", "inspect", image))
    config = inspected["Config"]
    assert config["User"] == "1001"
    assert not config.get("ExposedPorts")
    assert not config.get("Entrypoint")
    assert config["Cmd"] == ["python", "manage.py", "prodserver", "web"]
    metadata = json.dumps(config["Env"]) + docker("history", "--no-trunc", image)
    assert not re.search(r"SECRET|DATABASE_URL|RABBITMQ_URL|BROKER", metadata)

    listed = docker("run", "--rm", image, "ls", "-A", "/app").split()
    assert sorted(listed) == sorted(
        [
            ".python-version",
            "__pycache__",
            "Procfile",
            "app.json",
            "manage.py",
            "openapi.yaml",
            "pyproject.toml",
            "staticfiles",
            "uv.lock",
            "vendor",
            project.name,
        ]
    )
    for tool in ("uv", "pytest", "ruff"):
        assert not docker_succeeds("run", "--rm", image, "which", tool), tool


def test_image_size_is_as_documented(project, image):
    name = project.name.replace("_", "-")
    docker("tag", image, name)
    try:
        document = (project / "docs" / "image.md").read_text()
        (command,) = re.findall(r"^base=.*\ndocker image inspect .*", document, re.M)
        (documented,) = re.findall(r"It adds (\d+) MiB", document)
        output = run(command, cwd=project)
        assert re.fullmatch(r"\d+ MiB\n", output)
        assert int(output.split()[0]) <= int(documented) + 5
    finally:
        docker("image", "rm", name)


def test_image_workflow_builds_and_checks_the_image(project):
    workflow = yaml.safe_load((project / ".github" / "workflows" / "image.yml").read_text())
    build, check = (step["run"] for step in workflow["jobs"]["image"]["steps"] if "run" in step)
    try:
        run(build, cwd=project)
        run(check, cwd=project)
    finally:
        docker_succeeds("image", "rm", "--force", project.name.replace("_", "-"))


def test_every_process_runs_in_a_hardened_container(project, image, postgres_image, rabbitmq_image):
    """As on Dokku, predeploy, release and each process run in separate containers."""
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
    environment = production_variables(
        f"postgres://postgres:secret@{postgres}:5432/postgres",
        f"amqp://guest:guest@{rabbitmq}:5672//",
    )
    del environment["DJANGO_MODE"]  # The image sets it.
    options = [*HARDENED, *(f"--env={name}={value}" for name, value in environment.items())]
    commands = read_procfile(project / "Procfile")
    procfile = {name: shlex.split(command) for name, command in commands.items()}
    app = json.loads((project / "app.json").read_text())

    docker("network", "create", network)
    try:
        start(postgres, "--env=POSTGRES_PASSWORD=secret", postgres_image)
        start(rabbitmq, rabbitmq_image)
        ready_command = ("exec", postgres, "pg_isready", "--host=127.0.0.1")
        wait_for(lambda: docker_succeeds(*ready_command), 90, lambda: logs(postgres))
        listening_command = (
            "exec",
            rabbitmq,
            "rabbitmq-diagnostics",
            "-q",
            "check_port_connectivity",
        )
        wait_for(lambda: docker_succeeds(*listening_command), 90, lambda: logs(rabbitmq))

        run_once = ["run", "--rm", "--network", network, *options, image]
        docker(*run_once, "sh", "-c", app["scripts"]["dokku"]["predeploy"])
        assert "OK" in docker(*run_once, *procfile["release"])

        web = start(
            f"{project.name}-web",
            *options,
            "--env=PORT=5000",
            "--publish=127.0.0.1::5000",
            image,
            *procfile["web"],
        )
        # Dokku sets an empty PORT in all processes but web.
        worker, beat = (
            start(f"{project.name}-{name}", *options, "--env=PORT=", image, *procfile[name])
            for name in ("worker", "beat")
        )
        wait_for_log(web, "Listening at: http://0.0.0.0:5000")
        wait_for_log(worker, " ready.")
        wait_for_log(beat, "beat: Starting...")
        port = docker("port", web, "5000/tcp").rsplit(":", 1)[1]

        # Health checks work without the domain and HTTPS. All other requests need both.
        assert get(port, "/health/live")[0] == 200
        status, _, body = get(port, "/health/ready")
        assert (status, json.loads(body)["status"]) == (200, "ok"), logs(web)
        assert get(port, "/admin/login/", Host="else.example.com")[0] in (301, 400)
        visitor = FORWARDED | {"Host": f"{project.name.replace('_', '-')}.example.com"}
        status, _, body = get(port, "/admin/login/", **visitor)
        assert status == 200
        stylesheet = re.search(r'href="(/static/admin/css/base\.\w{12}\.css)"', body.decode())[1]
        status, headers, _ = get(port, stylesheet, **visitor)
        assert (status, headers["Content-Encoding"]) == (200, "gzip")
        assert "immutable" in headers["Cache-Control"]

        for container in (web, worker, beat):
            assert docker("exec", container, "id", "-u") == "1001"
            assert not docker_succeeds("exec", container, "touch", "/app/written")
            docker("stop", "--time", "10", container)
            status = docker("inspect", "--format", "{{.State.ExitCode}}", container)
            assert status == "0", logs(container)
    finally:
        for container in started:
            docker("rm", "--force", "--volumes", container)
        docker("network", "rm", network)


@pytest.fixture
def compose(project, rabbitmq_image, postgres_image, nginx_image, tmp_path):
    """A function that runs shell code in the project, whose containers are removed afterwards."""
    override = tmp_path / "override.yaml"
    services = {"rabbitmq": {"image": rabbitmq_image}, "proxy": {"image": nginx_image}}
    if not docker_succeeds("run", "--rm", "--entrypoint=which", nginx_image, "wget"):
        connect = "bash -c '</dev/tcp/127.0.0.1/8080'"
        services["proxy"]["healthcheck"] = {"test": connect}
    override.write_text(json.dumps({"services": services}))
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
    docker_succeeds("image", "rm", "--force", name, f"{name}:dev")


def states(compose):
    """Return the service, state, health and exit status of each container."""
    output = compose("docker compose ps --all --format json")
    containers = [json.loads(line) for line in output.splitlines()]
    return sorted(
        tuple(container[key] for key in ("Service", "State", "Health", "ExitCode"))
        for container in containers
    )


def test_documented_compose_commands_work(project, compose):
    document = (project / "docs" / "compose.md").read_text()
    secrets, up, *_ = re.findall(r"^```sh\n(.*)\n```$", document, re.M)
    commands = re.findall(r"^\| `(docker compose .*?)` \|", document, re.M)

    compose(secrets)
    compose(up)
    assert states(compose) == [
        ("beat", "running", "healthy", 0),
        ("migrate", "exited", "", 0),
        ("postgres", "running", "healthy", 0),
        ("proxy", "running", "healthy", 0),
        ("rabbitmq", "running", "healthy", 0),
        ("web", "running", "healthy", 0),
        ("worker", "running", "healthy", 0),
    ]
    status, _, body = get(compose.port, "/health/ready")
    assert (status, json.loads(body)["status"]) == (200, "ok")

    # Update: the same command runs the migrations again.
    compose(up)
    backup, restore, scale = (
        next(command for command in commands if word in command)
        for word in ("pg_dump", "pg_restore", "--scale")
    )
    database = f"docker compose exec -T postgres psql -U postgres -d {project.name} -Atc"
    count = f"{database} 'SELECT count(*) FROM django_celery_beat_periodictask'"
    schedules = compose(count)
    compose(backup)
    compose(f"{database} 'TRUNCATE django_celery_beat_periodictask CASCADE'")
    # With client tools newer than the server, pg_restore restores but exits with an error.
    versions = compose("docker compose exec -T postgres sh -c 'pg_dump --version; postgres -V'")
    tools, server = re.findall(r"\(PostgreSQL\) (\d+)", versions)
    compose(restore if tools == server else f"{restore} || true")
    assert compose(count) == schedules != "0\n"
    compose(scale)

    compose("docker compose stop beat web worker")
    stopped = [state for state in states(compose) if state[0] in ("beat", "web", "worker")]
    assert stopped == [(name, "exited", "", 0) for name in ("beat", "web", *["worker"] * 3)], (
        compose("docker compose logs beat web worker")
    )


def test_compose_reloads_code_in_development(project, compose):
    document = (project / "docs" / "compose.md").read_text()
    secrets, *_, develop = re.findall(r"^```sh\n(.*)\n```$", document, re.M)
    assert develop.startswith("docker compose --file compose.yaml --file compose.dev.yaml up")

    compose(secrets)
    compose("docker compose up --build --wait", overlay=True)
    status, _, _ = get(compose.port, "/admin/login/")
    assert status == 200
    mode = compose("docker compose exec -T web sh -c 'echo [$DJANGO_MODE]'", overlay=True)
    assert mode == "[]\n"

    assert get(compose.port, "/reloaded/")[0] == 404
    urls = project / project.name / "urls.py"
    code = urls.read_text()
    urls.write_text(f'{code}\nurlpatterns.append(path("reloaded/", home))\n')
    try:
        wait_for(
            lambda: get_status(compose.port, "/reloaded/") == 200,
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
        urls.write_text(code)
