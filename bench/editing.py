"""Measure how long an edit takes until the browser shows it, beside Django's runserver.

    uv run bench/editing.py [--runs N]

Generates the default service with its setup. In turns, ``runserver`` and the processes of
``Procfile.dev`` serve it while a template, a view, a model and a task are edited. A figure is the
time from the edit to the first response that shows it, in seconds; the medians of N runs, 5 unless
given, are printed as a table in Markdown. ``runserver`` runs no worker, so the last row has no rival.
"""

import argparse
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path

from digest import ROOT

#: How long to wait for an edit to show, in seconds.
TIMEOUT = 120

#: What is added to the files that are edited: each has a value that the page shows.
ADDED = {
    "urls.py": """

def show(request):
    from django.http import HttpResponse
    from django.template.loader import render_to_string

    from . import models, tasks

    tasks.write_mark.delay()
    template = render_to_string("mark.html")
    return HttpResponse(f"{MARK} {models.MARK} {tasks.MARK} {template}")


MARK = "urls-0"
urlpatterns.append(path("show/", show))
""",
    "models.py": """

MARK = "models-0"
""",
    "tasks.py": """

from celery import shared_task

MARK = "tasks-0"


@shared_task
def write_mark():
    from pathlib import Path

    Path("var/mark").write_text(MARK)
""",
    "templates/mark.html": "mark-0",
}

SERVERS = {
    "Procfile.dev": ["honcho", "start", "-f", "Procfile.dev"],
    "runserver": ["python", "manage.py", "runserver", "--nostatic"],
}

#: What is edited, by row.
ROWS = {
    "template": "templates/mark.html",
    "view": "urls.py",
    "model": "models.py",
    "task, in the page": "tasks.py",
}

WORKER_ROW = "task, in the worker"


def generate(folder):
    """Generate the service; return its folder."""
    sys.path.insert(0, str(ROOT))
    from tests.generate import get_template

    command = [sys.executable, "-m", "cookiecutter", str(get_template()), "--no-input"]
    environment = {**os.environ, "PWD": folder, "COOKIECUTTER_CONFIG": os.devnull}
    for name in ("VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    service = Path(folder, "prayer_room_api")
    for name, text in ADDED.items():
        path = service / service.name / name
        path.write_text((path.read_text() if path.exists() else "") + text)
    return service


@contextmanager
def serve(service, name):
    """Serve the service while the block runs; give a function that returns the page."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, "PORT": str(port)}
    environment["PATH"] = f"{service / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    for unwanted in ("VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(unwanted, None)
    command = [*SERVERS[name], *([str(port)] if name == "runserver" else [])]
    process = subprocess.Popen(
        command,
        cwd=service,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def fetch():
        try:
            url = f"http://127.0.0.1:{port}/show/"
            return urllib.request.urlopen(url, timeout=10).read().decode()
        except OSError:
            return ""

    try:
        wait_for(lambda: "mark-" in fetch())
        yield fetch
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=TIMEOUT)


def wait_for(condition):
    """Wait until a condition is true; return how long that took, in seconds."""
    start = time.perf_counter()
    while not condition():
        if time.perf_counter() - start > TIMEOUT:
            sys.exit("an edit did not show in time")
        time.sleep(0.02)
    return time.perf_counter() - start


def edit(path, number):
    """Change the value in a file; return the new one."""
    text = path.read_text()
    old = re.search(r"\w+-\d+", text.rpartition("MARK = ")[2])[0]
    new = f"{old.partition('-')[0]}-{number}"
    path.write_text(text.replace(old, new))
    return new


def measure(service, name, number):
    """Return the seconds of each edit with one of the servers."""
    results = {}
    with serve(service, name) as fetch:
        time.sleep(2)  # The others of its processes are starting.
        for row, file in ROWS.items():
            mark = edit(service / service.name / file, number)
            results[row] = wait_for(lambda mark=mark: mark in fetch())
            time.sleep(2)
        if name != "runserver":
            mark = edit(service / service.name / "tasks.py", f"{number}0")
            shown = service / "var" / "mark"
            results[WORKER_ROW] = wait_for(
                lambda: fetch() and shown.exists() and shown.read_text() == mark
            )
    return results


def main():
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="of each, default 5")
    options = parser.parse_args()
    results = {name: [] for name in SERVERS}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        service = generate(folder)
        for turn in range(options.runs):
            for position, name in enumerate(sorted(SERVERS, reverse=bool(turn % 2))):
                results[name].append(measure(service, name, 100 + 2 * turn + position))
                print(f"{name}: {results[name][-1]}", file=sys.stderr, flush=True)
    print("| edit | Procfile.dev, seconds | runserver, seconds | ratio |\n|---|---|---|---|")
    for row in [*ROWS, WORKER_ROW]:
        ours, theirs = (
            statistics.median(each.get(row, float("nan")) for each in results[name])
            for name in ("Procfile.dev", "runserver")
        )
        rival = "" if theirs != theirs else f"{theirs:.2f} | {ours / theirs:.2f}"
        print(f"| {row} | {ours:.2f} | {rival or ' | '} |")


if __name__ == "__main__":
    main()
