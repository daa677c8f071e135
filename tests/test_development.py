"""Development: the processes of Procfile.dev reload, keep running tasks, and share one port."""

import os
import pty
import re
import select
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from tests.servers import PATIENCE, free_port, reachable, wait_for
from tests.test_boot import CREATE_DATA

pytestmark = pytest.mark.slow

#: How long the slow task runs, in seconds: longer than watchfiles waits by default.
TASK_SECONDS = 8

#: A task that writes a line to a file when it starts and when it completes.
TASK = f"""

@shared_task
def work(number):
    import time
    from pathlib import Path

    with Path("var/work").open("a") as file:
        file.write("started\\n")
    time.sleep({TASK_SECONDS})
    with Path("var/work").open("a") as file:
        file.write("finished\\n")
"""


@pytest.fixture
def service(bake, make_service):
    """An installed and migrated service whose developer has added a second app."""
    service = make_service(bake(project_slug="develop"))
    service.install()
    package = service.folder / "develop"
    settings = (package / "settings.py").read_text()
    name = '        "develop",\n'
    assert settings.count(name) == 1
    service.run("python manage.py startapp rooms")
    (package / "settings.py").write_text(settings.replace(name, f'{name}        "rooms",\n'))
    tasks = (package / "tasks.py").read_text()
    shared_task = "" if "import shared_task" in tasks else "\nfrom celery import shared_task\n"
    (package / "tasks.py").write_text(tasks + shared_task + TASK)
    service.run("python manage.py migrate")
    return service


def start(service):
    """Start the processes of Procfile.dev, as the README says, on a port of their own."""
    port = free_port()
    del service.environment["PORT"]
    command = f"honcho start --no-colour -f Procfile.dev -p {port}"
    return service.spawn("honcho", *shlex.split(command)), port


def test_a_reload_keeps_tasks_and_links_follow_the_port(service):
    honcho, port = start(service)
    honcho.wait_for_text(" ready.", seconds=60)
    honcho.wait_for_text("beat: Starting...")
    wait_for(lambda: reachable(port), 30, honcho.text)

    # The link in an e-mail, which the worker sends, leads to the web process.
    service.shell(CREATE_DATA)
    service.shell("from develop.tasks import send_moderator_digest as t; t.delay()")
    honcho.wait_for_text("Please remember us.")
    assert f"http://localhost:{port}/admin/" in honcho.text()
    assert set(re.findall(r"http://localhost:(\d+)", honcho.text())) == {str(port)}

    # A change in the second app restarts each process; the running task completes.
    work = service.folder / "var" / "work"
    service.shell("from develop.tasks import work; work.delay(1)")
    wait_for(work.exists, 20, honcho.text)
    ready = honcho.text().count(" ready.")
    time.sleep(1)
    with (service.folder / "rooms" / "models.py").open("a") as file:
        file.write("# changed\n")
    wait_for(lambda: "finished" in work.read_text(), 40, honcho.text)
    wait_for(lambda: honcho.text().count(" ready.") > ready, 30, honcho.text)
    wait_for(lambda: honcho.text().count("beat: Starting...") > 1, 30, honcho.text)
    wait_for(lambda: reachable(port), 30, honcho.text)
    assert "Traceback" not in honcho.text()

    os.killpg(honcho.popen.pid, signal.SIGINT)
    honcho.popen.wait(timeout=20 * PATIENCE)
    assert not reachable(port)


def fetch(port, path="/"):
    """Return the status and the text of a page; 0 while nothing listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def test_start_says_what_to_do_and_mistakes_heal(service):
    """Code that cannot be imported, unapplied migrations, the addresses, and a template."""
    service.run("python manage.py migrate develop zero")
    models = service.folder / "develop" / "models.py"
    text = models.read_text()
    failures = service.folder / "var" / "failures"
    names = ["beat.txt", "web.txt", "worker.txt"]
    found = lambda: sorted(path.name for path in failures.glob("*"))  # noqa: E731

    # Code that is broken before the start ends no process, and neither do settings.
    settings = service.folder / "develop" / "settings.py"
    settings_text = settings.read_text()
    models.write_text(text + "def wrong(\n")
    settings.write_text(settings_text + "def wrong(\n")
    honcho, port = start(service)
    for count, path, mended in ((3, settings, settings_text), (6, models, text)):
        wait_for(lambda: found() == names, 60, honcho.text)
        wait_for(lambda name=path.name: name in fetch(port)[1], 20, honcho.text)
        wait_for(lambda n=count: honcho.text().count("starts when you save") == n, 20, honcho.text)
        time.sleep(1)  # The watchers have no sign that they have started.
        path.write_text(mended)
    for name in ("worker", "beat"):
        honcho.wait_for_text(f"manage.py migrate; {name} starts after that", seconds=60)
    assert "unapplied migration(s). Run: " in honcho.text()
    service.run("python manage.py migrate")
    honcho.wait_for_text("Sign in:", seconds=60)
    block = honcho.text().partition("runs: web, worker, beat")[2]
    for path in ("/", "/api/docs/", "/admin/", "/admin/ops/taskrun/operations/", "/emails/"):
        assert f" http://localhost:{port}{path}\n" in block
    assert "manage.py createsuperuser" in block
    assert "celery@" in honcho.text()
    assert honcho.text().index("Loading web") < honcho.text().index("Starting process named web")
    assert "[queues]" not in honcho.text()

    # A template needs no restart.
    home = service.folder / "develop" / "templates" / "home.html"
    before = honcho.text().count("restarting")
    home.write_text(home.read_text().replace("{{ description }}", "A new text."))
    wait_for(lambda: "A new text." in fetch(port)[1], 20, honcho.text)
    assert honcho.text().count("restarting") == before

    # Only the processes that import a module restart.
    urls = service.folder / "develop" / "urls.py"
    urls.write_text(urls.read_text() + "# changed\n")
    honcho.wait_for_text("develop/urls.py changed: restarting web")
    wait_for(lambda: fetch(port)[0] == 200, 60, honcho.text)
    assert honcho.text().count("restarting") == before + 1

    # Each process tells what is wrong with the code, and starts when that is mended.
    models.write_text(text + "def wrong(\n")
    wait_for(lambda: found() == names, 60, honcho.text)
    wait_for(lambda: fetch(port)[0] == 500, 20, honcho.text)
    for shown in (fetch(port)[1], (failures / "worker.txt").read_text()):
        assert "models.py" in shown
        assert "SyntaxError" in shown
    models.write_text(text)
    wait_for(lambda: fetch(port)[0] == 200, 60, honcho.text)
    wait_for(lambda: found() == [], 60, honcho.text)


def test_a_port_that_is_in_use_ends_all_processes_with_one_line(service):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        del service.environment["PORT"]
        command = f"honcho start --no-colour -f Procfile.dev -p {port}"
        honcho = service.spawn("honcho", *shlex.split(command))
        try:
            status = honcho.popen.wait(timeout=40 * PATIENCE)
        except Exception:
            pytest.fail(f"still running:\n{honcho.text()}")
    assert status != 0
    lines = [line for line in honcho.text().splitlines() if "in use" in line]
    assert len(lines) == 1, honcho.text()
    assert str(port) in lines[0]
    assert "Traceback" not in honcho.text()
    stopped = set(re.findall(r"(\w+)\.1 +stopped|\b(\w+)\.1 stopped", honcho.text()))
    assert {name for names in stopped for name in names if name} == {"web", "worker", "beat"}


def test_closing_the_terminal_ends_all_processes(service):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(service.folder)
        # nohup before the tests makes processes ignore that the terminal is closed.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        port = free_port()
        command = ["honcho", "start", "--no-colour", "-f", "Procfile.dev", "-p", str(port)]
        os.execvpe("honcho", command, service.environment)
    output = b""
    deadline = time.monotonic() + 60
    while b"beat: Starting..." not in output or b" ready." not in output:
        assert time.monotonic() < deadline, output.decode()
        if select.select([terminal], [], [], 1)[0]:
            output += os.read(terminal, 4096)

    def processes():
        found = subprocess.run(["pgrep", "--full", service.folder], capture_output=True, text=True)
        return found.stdout.split()

    assert len(processes()) >= 3
    os.close(terminal)
    os.waitpid(pid, 0)
    wait_for(lambda: not processes(), 20, lambda: f"still running: {processes()}")
