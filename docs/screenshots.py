"""Make the pictures of README.md from a real generated service.

    uv run docs/screenshots.py

Generates the default service as the README does, starts its processes, adds sample submissions,
and photographs the terminal, the admin and an e-mail with headless Chromium. Writes
docs/images/*.png.
"""

import html
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
PORT = "8765"
URL = f"http://127.0.0.1:{PORT}"

CREATE_DATA = """
from prayer_room_api.admin import answer
from prayer_room_api.tasks import send_moderator_digest
User.objects.create_superuser("admin", "admin@example.com", "secret", first_name="Alex")
sam = User.objects.create_user("sam", "sam@example.com")
for text in (
    "My exam is on Thursday. Please think of me in the morning.",
    "Our neighbour Rosa comes home from hospital tomorrow.\\n\\nShe will need help with the shopping. Who could go on Saturday?",
    "The evening meeting moved to the large hall. Is there room for two more people?",
):
    Submission.objects.create(author=sam, body=text)
answer(Submission.objects.get(pk=3), "Yes, there is.", User.objects.get(username="admin"))
send_moderator_digest.delay()
"""

#: A task that fails, for the page Operations.
FAIL = """
from prodserver_ops.mail.tasks import send_notification
send_notification.delay("welcome", 1)
"""

TERMINAL = """
<body style="margin: 0"><pre style="margin: 0; padding: 20px 24px; width: 900px;
background: #15171b; color: #e8e8e6; font: 15px/1.5 'DejaVu Sans Mono', monospace;
white-space: pre-wrap; overflow-wrap: anywhere">{}</pre></body>
"""


def run(*command, folder, check=True):
    """Run a command and return what it printed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment() | {"PWD": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if check and done.returncode:
        sys.exit(f"{' '.join(command)} exited with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def environment():
    """Return the environment of the commands, with uv and without this one's."""
    kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    folder = Path(os.environ.get("UV", "uv")).parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PORT": PORT, "COOKIECUTTER_CONFIG": os.devnull, "PATH": path}


def wait_for_service():
    """Wait until web and worker are running."""
    for _ in range(60):
        try:
            with urlopen(f"{URL}/health/ready?deep", timeout=5):
                return
        except URLError:
            time.sleep(1)
    sys.exit("the service is not ready after a minute")


def shorten(text):
    """Return the output of the setup without the paths and the packages that uv lists."""
    listed = re.compile(r"^( \+ |Using |Creating |\s*(Building|Built) ).*\n", re.M)
    return listed.sub("", text)


def photograph(texts, fail):
    """Write the pictures; ``texts`` are those of the terminal, by the name of the picture.

    ``fail`` runs a task that fails, after the picture of the home page.
    """
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 948, "height": 200})
        for name, text in texts.items():
            page.set_content(TERMINAL.format(html.escape(text.strip())))
            page.locator("pre").screenshot(path=IMAGES / f"{name}.png")
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{URL}/admin/")
        page.fill("#id_username", "admin")
        page.fill("#id_password", "secret")
        page.click("[type=submit]")
        for name, path in {
            "home": "/",
            "operations": "/admin/ops/taskrun/operations/",
            "moderation": "/admin/prayer_room_api/submission/2/change/",
        }.items():
            page.goto(URL + path)
            page.screenshot(path=IMAGES / f"{name}.png", full_page=name != "home")
            if name == "home":
                fail()
        page = browser.new_page(viewport={"width": 640, "height": 200})
        page.goto(f"{URL}/emails/moderator.html")
        page.screenshot(path=IMAGES / "digest.png", full_page=True)
        browser.close()


def main():
    """Generate the service, run it, and photograph it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [f"{sys.prefix}/bin/cookiecutter", str(ROOT), "--no-input"]
        generation = run(*command, folder=folder)
        project = Path(folder, "prayer_room_api")
        uv = os.environ.get("UV", "uv")
        run(uv, "run", "manage.py", "migrate", "-v0", folder=project)
        honcho = subprocess.Popen(
            [uv, "run", "honcho", "start", "-f", "Procfile.dev"],
            cwd=project,
            env=environment(),
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for_service()
            run(uv, "run", "manage.py", "shell", "-v0", "-c", CREATE_DATA, folder=project)
            time.sleep(70)  # A schedule runs each minute.
            doctor = run(uv, "run", "manage.py", "doctor", folder=project, check=False)

            def fail():
                run(uv, "run", "manage.py", "shell", "-v0", "-c", FAIL, folder=project)
                time.sleep(5)  # Until the worker has recorded it.

            photograph(
                {
                    "generation": f"$ uvx cookiecutter . --no-input\n{shorten(generation)}",
                    "doctor": f"$ uv run manage.py doctor\n{doctor.replace(folder, '/home/alex')}",
                },
                fail,
            )
        finally:
            os.killpg(honcho.pid, signal.SIGINT)
            honcho.wait(timeout=30)


if __name__ == "__main__":
    main()
