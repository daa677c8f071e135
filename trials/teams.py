"""Change services as teams do, and measure what they promise: ``uv run trials/teams.py``.

The changes are the recipes of a service, those of ``changes.md``, and those of
``tests/test_first_week.py``: each of them alone, and random combinations. After each, all processes
of the Procfile run in production mode, with PostgreSQL, RabbitMQ and an SMTP server of this trial.

A promise may be broken if a check refuses the service, or ``doctor`` reports it. Prints a table in
Markdown, and exits with status 1 if a promise is broken in silence. Needs PostgreSQL and RabbitMQ on
their usual ports on 127.0.0.1; RABBITMQ_URL selects a virtual host.
"""

import argparse
import contextlib
import http.cookiejar
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psycopg
from aiosmtpd.controller import Controller

from tests import test_first_week as first_week
from tests.conftest import RABBITMQ_URL, Mailbox, read_procfile
from tests.kitchen import DOMAIN, SLUG, CommandFailed, Kitchen
from tests.recipes import DoesNotApply, read_changes, set_in_class
from tests.servers import PATIENCE, free_port

#: The recipe that renames the package.
RENAMED = "Another name of the package"

#: How many changes a combination has.
SIZES = (2, 3, 4, 5, 6)

#: How long a service may take for all that is expected of it, in seconds.
TIMEOUT = 60 * PATIENCE

#: Check and deploy the service, with users and a schedule that is due each second.
PREPARE = """
import django
django.setup()
from django.core.management import call_command
call_command("check", deploy=True, fail_level="WARNING")
call_command("collectstatic", interactive=False, verbosity=0)
call_command("migrate", interactive=False, verbosity=0)
from django.contrib.auth import get_user_model
from django_celery_beat.models import IntervalSchedule, PeriodicTask
User = get_user_model()
for number in range(1, 5):
    user = User(email=f"user{number}@example.com")
    if getattr(User, "username", None) is not None:
        user.username = f"user{number}"
    user.is_staff = user.is_superuser = True
    user.set_password("a-long-password-1")
    user.save()
every, _ = IntervalSchedule.objects.get_or_create(every=1, period="seconds")
PeriodicTask.objects.create(name="trial", task="ops.delete_records", interval=every)
"""

#: Answer a submission; its author is notified.
ANSWER = """
import django
django.setup()
from importlib import import_module
from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import transaction
from prodserver_ops.mail.tasks import notify_on_commit
models = import_module(f"{settings.PACKAGE}.models")
user = get_user_model().objects.get(email="user1@example.com")
with transaction.atomic():
    row = models.Submission.objects.create(author=user, body="Is there room?")
    row.answer("Yes.", user)
    notify_on_commit("answer", row.pk)
"""

COUNT_RUNS = "SELECT count(*) FROM ops_taskrun WHERE name = %s AND status = 'succeeded'"

#: Hashes that take less time.
HASHERS = 'PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]'


@dataclass
class Change:
    """A change of a team; ``apply`` takes the service."""

    title: str
    apply: object


@dataclass
class Result:
    """What became of a service: the promises that are broken, and what the service says of it."""

    titles: list[str]
    left_out: list[str] = field(default_factory=list)
    refused: str = ""
    broken: dict[str, str] = field(default_factory=dict)
    told: str = ""

    @property
    def is_silent(self):
        """Whether a promise is broken and nothing says so."""
        return bool(self.broken) and not self.refused and not self.told

    def describe(self):
        """Return the result in a few words."""
        if self.refused:
            return f"refused: {self.refused}"
        if not self.broken:
            return "all kept"
        how = f"told: {self.told}" if self.told else "IN SILENCE"
        return f"{'; '.join(f'{name}: {text}' for name, text in self.broken.items())} ({how})"


def get_changes(kitchen):
    """Return all changes."""
    changes = [
        Change(title, partial(apply_recipe, recipe))
        for title, recipe in kitchen.recipes.items()
        if recipe.steps
    ]
    for title, recipe in read_changes(SLUG).items():
        changes.append(Change(title, partial(apply_recipe, recipe)))
    for function in (
        first_week.add_what_the_readme_shows,
        first_week.change_settings,
        first_week.add_an_app,
        first_week.add_a_field,
    ):
        changes.append(Change(function.__doc__.partition(":")[0].rstrip("."), function))
    return changes


def apply_recipe(recipe, dish):
    """Apply a recipe; packages are installed."""
    recipe.apply(dish.folder, dish.run_unless_installed)


def apply(change, dish):
    """Apply a change, or leave the service as it was; return whether it applies."""
    backup = dish.folder.with_name("backup")
    shutil.copytree(dish.folder, backup, symlinks=True)
    try:
        change.apply(dish)
    except (DoesNotApply, CommandFailed, AssertionError, OSError) as error:
        shutil.rmtree(dish.folder)
        backup.rename(dish.folder)
        print(f"  left out: {change.title}: {shorten(error)}", file=sys.stderr)
        return False
    shutil.rmtree(backup)
    return True


def shorten(text):
    """Return the last line of a text."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return (lines or [""])[-1][:300]


class Team:
    """A service of a team, in production mode."""

    def __init__(self, kitchen, folder, changes):
        self.dish = kitchen.serve(folder / SLUG)
        self.result = Result([])
        self.mailbox = Mailbox()
        set_in_class(self.dish.folder / SLUG / "settings.py", "Settings", HASHERS)
        # The recipe that renames the package comes last.
        for change in sorted(changes, key=lambda change: change.title == RENAMED):
            applied = apply(change, self.dish)
            (self.result.titles if applied else self.result.left_out).append(change.title)
        self.package = SLUG if (self.dish.folder / SLUG).exists() else "rooms"
        self.prefix = "/rooms" if "Under a sub-path" in self.result.titles else ""

    def measure(self):
        """Return the result."""
        controller = Controller(self.mailbox, hostname="127.0.0.1", port=free_port())
        controller.start()
        self.dish.production |= {
            "RABBITMQ_URL": RABBITMQ_URL,
            "CLOUDAMQP_URL": RABBITMQ_URL,
            "EMAIL_HOST": "127.0.0.1",
            "EMAIL_PORT": str(controller.port),
            "SITE_URL": f"https://{DOMAIN}{self.prefix}",
            "DJANGO_SETTINGS_MODULE": f"{self.package}.settings",
            "WEB_CONCURRENCY": "1",
        }
        try:
            self.run_all()
        finally:
            controller.stop()
            for process in self.dish.processes:
                process.kill_all()
            with contextlib.suppress(Exception):
                self.dish.delete_queues(RABBITMQ_URL, self.package)
            self.dish.close()
        return self.result

    def python(self, *arguments):
        """Run Python in production mode."""
        return self.dish.run(["python", *arguments], **self.dish.production)

    def run_all(self):
        """Check, deploy and start the service, and see what holds."""
        self.dish.delete_queues(RABBITMQ_URL, self.package)
        try:
            self.python("-c", PREPARE)
        except CommandFailed as error:
            self.result.refused = find_reason(str(error))
            if not self.result.refused:
                self.result.broken["start"] = shorten(str(error))
            return
        if self.package != SLUG:
            (step,) = self.dish.kitchen.recipes[RENAMED].shown
            self.dish.run(["sh", "-c", step.text], **self.dish.production)
        names = [name for name in read_procfile(self.dish.folder / "Procfile") if name != "release"]
        processes = {name: self.dish.start(name, self.dish.production) for name in names}
        for promise, check in (
            ("health", self.check_health),
            ("logins", self.check_logins),
            ("schedules", partial(self.check_schedules, "beat" in names)),
            ("mail", self.check_mail),
        ):
            try:
                problem = check()
            except Exception as error:
                problem = f"{type(error).__name__}: {shorten(error)}"
            if problem:
                self.result.broken[promise] = problem
        if self.result.broken:
            self.result.told = self.ask_doctor()
        for name, process in processes.items():
            if process.popen.poll() is None:
                process.popen.terminate()
            try:
                status = process.popen.wait(40 * PATIENCE)
            except Exception as error:
                status = shorten(error)
            if status:
                self.result.broken["stop"] = f"{name}: {status}, {shorten(process.text())}"

    def ask_doctor(self):
        """Return what ``doctor`` says, if it finds a problem."""
        try:
            self.python("manage.py", "doctor")
        except CommandFailed as error:
            lines = [line for line in str(error).splitlines() if "error" in line.lower()]
            return shorten("\n".join(lines) or error)
        return ""

    # Promises

    def check_health(self):
        """Return why ``/health/ready?deep`` does not respond with 200 in time."""
        problem, end = "", time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            try:
                self.request("/health/ready?deep")
                return ""
            except urllib.error.HTTPError as error:
                problem = error.read().decode()
            except OSError as error:
                problem = str(error)
            time.sleep(0.3)
        return problem

    def check_logins(self):
        """Return which login does not end after ten wrong passwords, or ends for others too."""
        found = []
        for number, (path, is_json) in enumerate(LOGINS.items(), 1):
            try:
                self.request(path)
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    continue
            wrong = [
                self.log_in(path, is_json, number, f"wrong {n}", f"192.0.2.{number}")
                for n in range(11)
            ]
            locked = self.log_in(path, is_json, number, PASSWORD, f"192.0.2.{number}")
            other = self.log_in(path, is_json, number, PASSWORD, f"198.51.100.{number}")
            needs_code = (
                path.startswith("/admin") and "A second factor for staff" in self.result.titles
            )
            # Only confirmed addresses
            needs_code = needs_code or path.startswith("/accounts")
            if any(wrong) or locked or not (other or needs_code):
                found.append(f"{path}: wrong {any(wrong)}, locked {not locked}, other {other}")
        return "; ".join(found)

    def log_in(self, path, is_json, number, password, address):
        """Return whether a login succeeds."""
        by_address = {"Log in with the e-mail address", "Users without a user name"}
        is_address = by_address & set(self.result.titles)
        name = f"user{number}{'@example.com' if is_address else ''}"
        jar = http.cookiejar.CookieJar()
        opener = urllib.request.build_opener(NoRedirects, urllib.request.HTTPCookieProcessor(jar))
        try:
            if is_json:
                field = "email" if "@" in name and path == "/api/jwt/" else "username"
                data = json.dumps({field: name, "password": password}).encode()
                return self.request(path, data, address, opener, "application/json")[0] == 200
            _, page = self.request(path, None, address, opener)
            token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)[1]
            # Cookies are only sent with HTTPS, which ends at the proxy.
            cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in jar)
            form = {
                "csrfmiddlewaretoken": token,
                "username": name,
                "login": name,
                "password": password,
            }
            data = urllib.parse.urlencode(form).encode()
            status, page = self.request(path, data, address, opener, cookies=cookies)
            return status == 302 and "login" not in page
        except urllib.error.HTTPError as error:
            if error.code == 302:
                return "confirm-email" not in (error.headers["Location"] or "")
            return False

    def check_schedules(self, has_beat):
        """Return why the schedule does not run, or a task of it fails."""
        if not has_beat:
            return ""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            if self.count_runs("ops.delete_records") >= 2:
                return ""
            time.sleep(0.3)
        return "the schedule does not run"

    def check_mail(self):
        """Return how often the author is notified, if that is not once."""
        self.python("-c", ANSWER)
        if "Without e-mail" in self.result.titles:
            return "" if self.wait_for_run() else "the task does not run"
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end and not self.count_mail():
            time.sleep(0.2)
        time.sleep(2)
        return "" if self.count_mail() == 1 else f"sent {self.count_mail()} times"

    def wait_for_run(self):
        """Return whether the task of the notification runs in time."""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            if self.count_runs("ops.send_notification"):
                return True
            time.sleep(0.3)
        return False

    def count_runs(self, name):
        """Return how many runs of a task succeeded."""
        with psycopg.connect(self.dish.production["DATABASE_URL"]) as connection:
            return connection.execute(COUNT_RUNS, [name]).fetchone()[0]

    def count_mail(self):
        """Return how many e-mails the author has."""
        counts = Counter(message["To"] for message in self.mailbox.messages)
        return counts["user1@example.com"]

    def request(self, path, data=None, address="203.0.113.1", opener=None, kind=None, cookies=""):
        """Return status and text of a response to a request that came through a proxy."""
        headers = {
            "Host": DOMAIN,
            "X-Forwarded-Proto": "https",
            "X-Forwarded-For": address,
            "Referer": f"https://{DOMAIN}{path}",
            "Cookie": cookies,
        }
        if kind:
            headers["Content-Type"] = kind
        url = f"http://127.0.0.1:{self.dish.port}{path}"
        request = urllib.request.Request(url, data, headers)
        opener = opener or urllib.request.build_opener()
        with opener.open(request, timeout=30) as response:
            return response.status, response.read().decode()


class NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        """Raise the response as an error."""


PASSWORD = "a-long-password-1"

#: Where passwords are checked, and whether as JSON.
LOGINS = {"/api/token/": True, "/api/jwt/": True, "/admin/login/": False, "/accounts/login/": False}


def find_reason(text):
    """Return the first message of a check, or that of a command, or an empty text."""
    for line in text.splitlines():
        if re.search(r"\(\w+\.[EWC]\d+\)", line) and not line.startswith("System check"):
            return line.strip()[:300]
    (*_, error) = re.findall(r"^[\w.]*\bCommandError: (.+)", text, re.M) or [""]
    return error[:300]


def make_teams(changes, number, seed):
    """Return lists of changes: each alone, and random combinations."""
    chosen = random.Random(seed)
    alone = [[change] for change in changes]
    return alone, [chosen.sample(changes, chosen.choice(SIZES)) for _ in range(number)]


def main():
    """Run the trial."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--combinations", type=int, default=40, metavar="N")
    parser.add_argument("--seed", type=int, default=25)
    parser.add_argument("--alone", type=int, metavar="N", help="only N of the single changes")
    parser.add_argument("--only", nargs="+", metavar="TITLE", help="one service with these changes")
    options = parser.parse_args()
    start = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory(prefix="teams-", ignore_cleanup_errors=True) as folder:
        kitchen = Kitchen(Path(folder, "kitchen"), os.environ.get("UV", "uv"))
        try:
            kitchen.prepare()
            changes = get_changes(kitchen)
            alone, combined = make_teams(changes, options.combinations, options.seed)
            if options.alone is not None:
                alone = random.Random(options.seed).sample(alone, options.alone)
            teams = [*alone, *combined]
            if options.only:
                by_title = {change.title: change for change in changes}
                teams = [[by_title[title] for title in options.only]]
            for number, team in enumerate(teams, 1):
                place = Path(folder, str(number))
                place.mkdir()
                result = Team(kitchen, place, team).measure()
                shutil.rmtree(place, ignore_errors=True)
                results.append(result)
                print(
                    f"{number}: {', '.join(result.titles)}: {result.describe()}",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            kitchen.close()
    print("| changes | left out | result |\n|---|---|---|")
    for result in results:
        print(
            f"| {', '.join(result.titles)} | {', '.join(result.left_out)} | {result.describe()} |"
        )
    silent = sum(result.is_silent for result in results)
    refused = sum(bool(result.refused) for result in results)
    kept = sum(not result.refused and not result.broken for result in results)
    minutes = (time.monotonic() - start) / 60
    print(
        f"\n{len(results)} services: {kept} keep all promises, {refused} are refused, "
        f"{len(results) - kept - refused - silent} tell what is broken, {silent} break one in silence; "
        f"{minutes:.1f} min"
    )
    sys.exit(bool(silent))


if __name__ == "__main__":
    main()
