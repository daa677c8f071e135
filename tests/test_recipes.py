"""Recipes: each one is applied as it is printed, passes the checks, and keeps its promise.

The long form also installs the packages with the recipe's own command, lints, runs the tests of the
service and ``smoke``.
"""

import contextlib
import http.client
import os
import shlex
import shutil
import sqlite3
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import kubernetes_validate
import psycopg
import pytest
import yaml

from tests.conftest import made_once, read_procfile, require_server
from tests.generate import TEMPLATE
from tests.kitchen import DOMAIN, SLUG, Kitchen, create_database, drop_database
from tests.recipes import get_path, read_changes, read_recipes
from tests.servers import PATIENCE, wait_for
from tests.test_output import ANSWERS

RECIPES = read_recipes(get_path(TEMPLATE))

#: Changes of ``trials/changes.md`` that are tested like recipes: many teams start with one.
USERS = ("Log in with the e-mail address", "Users without a user name")

#: The tests of promises by the title of the recipe.
PROMISES = {}

slow = pytest.mark.slow


def promise(title, *others):
    """Mark the test of what a recipe promises, perhaps on top of others."""

    def mark(test):
        assert PROMISES.setdefault(title, test) is test
        titles = [(*others, title)]
        return pytest.mark.slow(pytest.mark.parametrize("titles", titles, ids=[title])(test))

    return mark


@pytest.fixture(scope="session")
def kitchen(request, uv, shared_folder, database_copies):
    """The service without recipes."""
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    folder = shared_folder / "kitchen"
    with made_once(folder) as is_missing:
        if is_missing:
            Kitchen(folder, uv).prepare()
            (database_copies / Kitchen(folder, uv).database).touch()
    return Kitchen(folder, uv)


@pytest.fixture
def dish(kitchen, titles, tmp_path):
    """The service with the recipe of the test."""
    dish = kitchen.serve(tmp_path / SLUG, *titles)
    yield dish
    dish.close()


def test_each_recipe_has_a_test_of_its_promise():
    assert set(PROMISES) == set(RECIPES)


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_each_recipe_applies_to_services_with_other_choices(bake, tmp_path, answers):
    project = bake(**answers)
    for title, recipe in read_recipes(get_path(project)).items():
        folder = tmp_path / title
        shutil.copytree(project, folder, ignore=shutil.ignore_patterns("vendor"))

        def run(command, folder=folder):
            if not command.startswith("uv "):
                subprocess.run(["sh", "-c", command], cwd=folder, check=True)

        recipe.apply(folder, run)
        for path in folder.rglob("*.py"):
            compile(path.read_text(), path, "exec")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("title", [*RECIPES, *USERS])
def test_service_with_the_recipe_passes_its_tests_and_works(bake, make_service, uv, title):
    service = make_service(bake(project_slug=SLUG))
    recipe = (read_recipes(get_path(service.folder)) | read_changes(SLUG))[title]

    path = f"{Path(uv).parent}{os.pathsep}{service.environment['PATH']}"

    def run(command):
        service.run(shlex.join(["sh", "-c", command]), PATH=path)

    run("uv sync --quiet")
    recipe.apply(service.folder, run)
    run("uv sync --quiet")
    for command in (
        *("ruff check --fix", "ruff format", "ruff check", "mypy", "pytest -q"),
        *("python manage.py makemigrations --check", "python manage.py migrate"),
        "python manage.py smoke",
    ):
        service.run(command)


#: How a service logs in with a form and with the API, and whether that is limited.
GUARD = """
def is_guarded(log_in, right):
    # The right password is refused from an address after ten wrong ones, but not from another.
    wrong = [log_in(make_client("192.0.2.9"), f"wrong {number}") for number in range(11)]
    assert right not in wrong, wrong
    return log_in(make_client("192.0.2.9"), PASSWORD) != right == log_in(
        make_client("192.0.2.10"), PASSWORD
    )
"""


class Bucket(ThreadingHTTPServer):
    """A server that stores what is put, as S3 does."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), BucketHandler)
        self.files = {}


class BucketHandler(BaseHTTPRequestHandler):
    def do_PUT(self):
        # The SDK sends chunks with their signatures.
        self.server.files[self.path.partition("?")[0]] = self.read_body()
        self.reply(200)

    def do_GET(self):
        content = self.server.files.get(self.path.partition("?")[0])
        self.reply(404 if content is None else 200, content or b"")

    do_HEAD = do_GET

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def reply(self, status, content=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        """Log nothing."""


@pytest.fixture
def bucket():
    """A running server, and the files that it received by path."""
    with Bucket() as bucket:
        threading.Thread(target=bucket.serve_forever, daemon=True).start()
        yield bucket
        bucket.shutdown()


@promise("Uploaded files in S3")
def test_uploads_are_stored_in_the_bucket_and_nothing_on_the_disk(dish, bucket):
    output = dish.ask(
        """
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.templatetags.static import static
name = default_storage.save("hall.txt", ContentFile(b"the large hall"))
with default_storage.open(name) as file:
    print(file.read())
print(default_storage.url(name), static("site.css"))
""",
        MEDIA_BUCKET="uploads",
        AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{bucket.server_port}",
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
        AWS_DEFAULT_REGION="eu-central-1",
    )
    assert "b'the large hall'" in output
    assert any(b"the large hall" in content for content in bucket.files.values())
    assert "Signature=" in output
    # Static files are still those of production.
    assert "/static/site." in output and "/static/site.css" not in output
    assert not list(dish.folder.rglob("hall*"))


@promise("Cache in Redis")
def test_processes_share_the_cache_and_logins_are_limited_without_it(dish, redis_url):
    url = {"CACHE_URL": redis_url}
    dish.ask("from django.core.cache import cache; cache.set('room', 'hall')", **url)
    dish.ask(
        GUARD
        + """
from django.core.cache import cache
assert cache.get("room") == "hall"
settings.CACHES["default"]["LOCATION"] = "redis://127.0.0.1:1/0"
def log_in(client, password):
    return client.post("/api/token/", {"username": "anna", "password": password}, "application/json").status_code
assert is_guarded(log_in, 200)
""",
        **url,
    )


@promise("Read replica")
def test_only_marked_queries_read_from_the_replica_and_none_writes(dish):
    replica = f"{dish.database}_replica"
    create_database(replica, dish.database)
    shell = ["python", "manage.py", "shell", "-v0", "-c"]
    url = dish.production["DATABASE_URL"] + "_replica"
    try:
        variables = dish.production | {"DATABASE_URL": url}
        dish.run([*shell, "User.objects.create_user('remote', pk=1000)"], **variables)
        with psycopg.connect(url, autocommit=True) as connection:
            name = connection.info.dbname
            connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        dish.ask(
            f"""
from django.db import DatabaseError
from {SLUG}.routers import for_reading
assert not User.objects.filter(username="remote").exists()
user = for_reading(User.objects.all()).get(username="remote")
user.save()
assert User.objects.filter(username="remote").exists()
try:
    User.objects.using("replica").update(first_name="x")
except DatabaseError as error:
    assert "read-only" in str(error), error
else:
    raise AssertionError("The replica was written to.")
""",
            REPLICA_URL=url,
        )
        dish.ask(
            f"from {SLUG}.routers import for_reading; for_reading(User.objects.all()).get(pk=anna.pk)"
        )
    finally:
        drop_database(replica)


@promise("Sign-up with allauth")
def test_visitors_sign_up_and_confirm_their_address_and_logins_are_limited(dish):
    dish.run("python manage.py migrate --noinput", **dish.production)
    output = dish.ask(
        GUARD
        + """
import re
from django.core import mail
new = {"username": "berta", "email": "berta@example.com", "password1": PASSWORD, "password2": PASSWORD}
assert client.post("/accounts/signup/", new).status_code == 302
(message,) = mail.outbox
path = re.search(r"https://[^/]+(/accounts/confirm-email/\\S+)", message.body)[1]
log = {"login": "berta", "password": PASSWORD}
assert make_client().post("/accounts/login/", log)["Location"] == "/accounts/confirm-email/"
assert client.get(path).status_code == 200
assert client.post(path).status_code == 302
page = make_client().post("/accounts/login/", log)
assert (page.status_code, page["Location"]) == (302, "/"), page
print("PATH", path)
def log_in(client, password):
    return client.post("/accounts/login/", {"login": "anna@example.com", "password": password}).status_code
from allauth.account.models import EmailAddress
EmailAddress.objects.create(user=anna, email=anna.email, verified=True, primary=True)
assert is_guarded(log_in, 302)
"""
    )
    path = next(line.split()[1] for line in output.splitlines() if line.startswith("PATH"))
    lines = [line for line in output.splitlines() if not line.startswith("PATH")]
    assert "/accounts/confirm-email/" in output
    assert path.split("/")[-2] not in "\n".join(lines)


@promise("Tokens with Simple JWT")
def test_tokens_open_the_api_end_with_the_password_and_are_limited(dish):
    dish.ask(
        GUARD
        + """
def post(client, password):
    return client.post("/api/jwt/", {"username": "anna", "password": password}, "application/json")
tokens = post(client, PASSWORD).json()
def read(path="/api/submissions/mine/"):
    return client.get(path, headers={"authorization": f"Bearer {tokens['access']}"}).status_code
assert client.get("/api/submissions/mine/").status_code == 401
assert read() == 200
def renew():
    return client.post("/api/jwt/refresh/", {"refresh": tokens["refresh"]}, "application/json")
assert renew().status_code == 200
assert is_guarded(lambda client, password: post(client, password).status_code, 200)
anna.set_password("another-long-password-2")
anna.save()
assert read() == 401
tokens = renew().json()
assert "access" not in tokens or read() == 401
schema = client.get("/api/schema/").content.decode()
assert "/api/jwt/refresh/" in schema
"""
    )


@promise("A front end on another origin")
def test_only_the_front_end_may_read_responses_of_the_api(dish):
    dish.ask(
        """
APP = f"https://app.{settings.DOMAIN}"
def preflight(path, origin):
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    return client.options(path, headers=headers).headers
allowed = preflight("/api/submissions/", APP)
assert allowed["access-control-allow-origin"] == APP, allowed
assert "authorization" in allowed["access-control-allow-headers"]
assert "access-control-allow-credentials" not in allowed
for path, origin in (("/api/submissions/", "https://evil.example"), ("/admin/login/", APP)):
    assert "access-control-allow-origin" not in preflight(path, origin), (path, origin)
# Errors too
for path in ("/api/submissions/", "/api/submissions/mine/", "/api/none/"):
    response = client.get(path, headers={"origin": APP})
    assert response["access-control-allow-origin"] == APP, (path, response.status_code)
"""
    )


@promise("A second factor for staff")
def test_staff_log_in_with_a_code_and_are_limited(dish):
    dish.run("python manage.py migrate --noinput", **dish.production)
    dish.run("python manage.py collectstatic --noinput", **dish.production)
    dish.ask(
        GUARD
        + """
from io import StringIO
from django_otp.plugins.otp_static.models import StaticDevice
def make_code():
    output = StringIO()
    call_command("addstatictoken", "anna", stdout=output)
    return output.getvalue().strip()
def log_in(client, password, code=None):
    code = code or make_code()
    device = StaticDevice.objects.get(user=anna).persistent_id
    form = {"username": "anna", "password": password, "otp_device": device, "otp_token": code}
    return client.post("/admin/login/", form).status_code
page = client.get("/admin/login/")
assert b"otp_token" in page.content and b"<script>" not in page.content
assert client.get("/admin/").status_code == 302
assert log_in(client, PASSWORD) == 302
assert client.get("/admin/").status_code == 200
assert client.get("/admin/otp_totp/totpdevice/add/").status_code == 200
plain = make_client()
plain.force_login(anna)
assert plain.get("/admin/").status_code == 302
assert is_guarded(log_in, 302)
assert log_in(make_client(), PASSWORD, "wrong") == 200
"""
    )


@promise("Password reset")
def test_link_by_e_mail_sets_a_password_once_and_is_not_logged(dish):
    output = dish.ask(
        """
import re
from django.core import mail
from prodserver_ops.api.tokens import create_token
token, _ = create_token(anna)
def read():
    return client.get("/api/submissions/mine/", headers={"authorization": f"Token {token}"}).status_code
assert read() == 200
assert client.get("/reset/").status_code == 200
def ask_for_link():
    return client.post("/reset/", {"email": "anna@example.com"}).status_code
assert ask_for_link() == 302
path = re.search(r"https://[^/]+(/reset/link/\\S+)", mail.outbox[0].body)[1]
form = client.get(path, follow=True).redirect_chain[-1][0]
new = "another-long-password-2"
assert client.post(form, {"new_password1": new, "new_password2": new}).status_code == 302
anna.refresh_from_db()
assert anna.check_password(new)
assert read() == 401
assert b"new_password1" not in make_client().get(path, follow=True).content
assert [ask_for_link() for _ in range(5)] == [302] * 4 + [429]
print("PATH", path)
"""
    )
    path = next(line.split()[1] for line in output.splitlines() if line.startswith("PATH"))
    token = path.strip("/").rpartition(":")[2]
    assert "/reset/link/" in output
    assert output.count(token) == 1, output


@promise("A queue with its own worker")
def test_task_is_run_by_the_worker_of_its_queue_alone(dish):
    names = ("worker", "reports")
    worker, reports = (dish.start(name) for name in names)
    for process in (worker, reports):
        process.wait_for_text(" ready.", seconds=60)
    dish.run(
        [
            *("python", "manage.py", "shell", "-v0", "-c"),
            f"from {SLUG}.tasks import send_user_digest, write_report\n"
            "write_report.delay('all')\nsend_user_digest.delay('daily')",
        ]
    )
    reports.wait_for_text(f"Task {SLUG}.tasks.write_report")
    reports.wait_for_text(" succeeded")
    worker.wait_for_text(f"Task {SLUG}.tasks.send_user_digest")
    assert "write_report[" not in worker.text()
    assert "send_user_digest[" not in reports.text()
    dish.run("python manage.py heartbeat reports")
    assert [process.stop() for process in (worker, reports)] == [0, 0]
    dish.ask("")


@promise("Results and a chord")
def test_chord_returns_the_result_of_its_last_task(dish):
    dish.run("python manage.py migrate --noinput")
    worker = dish.start("worker")
    worker.wait_for_text(" ready.", seconds=60)
    output = dish.run(
        [
            *("python", "manage.py", "shell", "-v0", "-c"),
            f"from {SLUG}.tasks import count_all_words\n"
            "print('words:', count_all_words(['the large hall', 'at two']).get(timeout=30))",
        ]
    )
    assert "words: 5" in output
    assert worker.stop() == 0
    output = dish.run(
        [
            *("python", "manage.py", "shell", "-v0", "-c"),
            f"import celery\nfrom {SLUG}.tasks import count_all_words\n"
            "celery.current_app.conf.task_always_eager = True\n"
            "print('words:', count_all_words(['the large hall', 'at two']).get())",
        ]
    )
    assert "words: 5" in output
    dish.ask("")


@promise("A process of your own")
def test_process_of_the_service_runs_is_watched_and_stops(dish):
    listener = dish.start("listener")
    listener.wait_for_text("Listener ready", seconds=60)
    wait_for(lambda: dish.succeeds("python manage.py heartbeat listener"), 20, listener.text)
    assert listener.stop() == 0
    assert not dish.succeeds("python manage.py heartbeat listener")
    dish.ask("")


@promise("Server-sent events")
def test_streams_do_not_take_the_place_of_other_requests(dish):
    web = dish.start("web")
    wait_for(lambda: dish.is_ready(), 60, web.text)
    streams = []
    for _ in range(12):
        stream = http.client.HTTPConnection("127.0.0.1", dish.port, timeout=10)
        stream.request("GET", "/events/")
        response = stream.getresponse()
        assert response.status == 200
        assert response.getheader("Content-Type") == "text/event-stream"
        assert response.readline().startswith(b"data: ")
        streams.append((stream, response))
    for path in ("/", "/api/submissions/", "/health/ready"):
        start = time.monotonic()
        with urlopen(f"http://127.0.0.1:{dish.port}{path}", timeout=10) as response:
            assert response.status == 200
        assert time.monotonic() - start < 5 * PATIENCE
    # Each stream goes on.
    assert all(response.readline() == b"\n" for _, response in streams)
    for stream, _ in streams:
        stream.close()
    assert web.stop(seconds=30) == 0
    dish.ask("")


@promise("Files from a CDN")
def test_pages_may_load_files_of_the_cdn_and_nothing_else(dish):
    dish.ask(
        """
policy = dict(
    part.strip().split(" ", 1) for part in client.get("/")["content-security-policy"].split(";")
)
cdn = f"https://cdn.{settings.DOMAIN}"
for name in ("script-src", "style-src", "font-src", "img-src"):
    assert cdn in policy[name].split() and "'self'" in policy[name], policy
assert policy["frame-ancestors"] == "'none'" and policy["object-src"] == "'none'"
assert "unsafe" not in str(policy)
"""
    )


@promise("Another language and time zone")
def test_pages_and_schedules_follow(dish):
    (command,) = dish.kitchen.recipes["Another language and time zone"].shown
    output = dish.run(["sh", "-c", command.text], **dish.production)
    assert "Traceback" not in output
    dish.ask(
        """
from django_celery_beat.models import CrontabSchedule, PeriodicTask
assert "Passwort" in client.get("/admin/login/").content.decode()
assert '<html lang="de">' in client.get("/").content.decode()
assert {str(row.timezone) for row in CrontabSchedule.objects.all()} == {"Europe/Berlin"}
from prodserver_ops.console import schedule_list
(row,) = [row for row in PeriodicTask.objects.filter(name="user-digest-daily")]
assert str(row.crontab.timezone) == "Europe/Berlin"
"""
    )


@promise("Debug toolbar")
def test_toolbar_is_in_development_only(dish):
    code = """
import django
from django.conf import settings
django.setup()
from django.test import Client
client = Client(headers={"host": "localhost"})
page = client.get("/", secure=not settings.DEBUG)
print(settings.DEBUG, page.status_code, b"djDebug" in page.content)
"""
    variables = {"DJANGO_SETTINGS_MODULE": f"{SLUG}.settings"}
    assert dish.run(["python", "-c", code], **variables).split()[-3:] == ["True", "200", "True"]
    code = code.replace("localhost", DOMAIN)
    assert dish.run(["python", "-c", code], **dish.production).split()[-3:] == [
        "False",
        "200",
        "False",
    ]
    dish.run("pytest -q -x tests/test_pages.py")


@promise("Heroku")
def test_processes_run_with_the_variables_of_heroku_and_stop_in_time(dish, rabbitmq_url):
    variables = dish.production | {
        "CLOUDAMQP_URL": rabbitmq_url,
        "DYNO": "web.1",
        "GUNICORN_CMD_ARGS": "--access-logfile -",
        "WEB_CONCURRENCY": "2",
    }
    del variables["RABBITMQ_URL"]
    commands = read_procfile(dish.folder / "Procfile")
    dish.run(["sh", "-c", commands["release"]], **variables)
    processes = [dish.start(name, variables) for name in ("web", "worker", "beat")]
    try:
        wait_for(lambda: dish.is_ready("/health/ready?deep"), 60, processes[0].text)
        for process in processes:
            process.popen.terminate()
        assert [process.stop(seconds=30) for process in processes] == [0, 0, 0]
    finally:
        dish.delete_queues(rabbitmq_url)


@promise("Kubernetes")
def test_manifests_are_valid_and_run_the_processes(dish):
    folder = dish.folder / "kubernetes"
    (job,) = yaml.safe_load_all((folder / "migrate.yaml").read_text())
    processes = list(yaml.safe_load_all((folder / "processes.yaml").read_text()))
    for document in (job, *processes):
        for version in ("1.29", "1.34"):
            kubernetes_validate.validate(document, version, strict=True)
    commands = read_procfile(dish.folder / "Procfile")
    (migrate,) = job["spec"]["template"]["spec"]["containers"]
    assert shlex.join(migrate["command"]).endswith(commands.pop("release").removeprefix("./"))
    service, *deployments = processes
    containers = {}
    for deployment in deployments:
        template = deployment["spec"]["template"]
        (container,) = template["spec"]["containers"]
        containers[container["name"]] = template, container
        assert shlex.join(container["command"]) == commands[container["name"]]
    assert containers.keys() == commands.keys()
    template, web = containers["web"]
    assert service["spec"]["selector"] == template["metadata"]["labels"]
    # A pod stops within its time: the pause, and then the requests.
    assert template["spec"]["terminationGracePeriodSeconds"] >= 10 + 25
    dish.ask(
        "for path in ('/health/live', '/health/ready'):\n"
        "    response = Client(headers={'host': '10.0.0.1'}).get(path)\n"
        "    assert response.status_code in {200, 503} and b'database' in response.content or path"
    )
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert web[probe]["httpGet"]["path"] in {"/health/live", "/health/ready"}
    worker = dish.start("worker")
    worker.wait_for_text(" ready.", seconds=60)
    for probe in ("startupProbe", "livenessProbe"):
        command = containers["worker"][1][probe]["exec"]["command"]
        wait_for(lambda command=command: dish.succeeds(command), 20, worker.text)
    assert worker.stop() == 0


@promise("Under a sub-path")
def test_links_and_cookies_have_the_prefix_and_health_checks_do_not(dish):
    dish.ask(
        """
from django.templatetags.static import static
from django.urls import reverse
assert reverse("home") == "/rooms/"
assert static("site.css").startswith("/rooms/static/site.")
assert client.get(static("site.css").removeprefix("/rooms")).status_code == 200
for path in ("/", "/health/live", "/api/submissions/"):
    assert client.get(path).status_code == 200, path
assert client.get("/health/ready").json()["checks"]["database"] == "ok"
assert client.get("/admin/")["Location"].startswith("/rooms/admin/login/")
log = {"username": "anna", "password": PASSWORD}
response = client.post("/admin/login/?next=/rooms/admin/", log)
assert response["Location"] == "/rooms/admin/"
assert response.cookies["sessionid"]["path"] == "/rooms/"
from prodserver_ops.mail import unsubscribe
from prodserver_ops.mail.digests import registry
url = unsubscribe.link(anna, registry["weekly"])
assert url.startswith(f"https://{settings.DOMAIN}/rooms/unsubscribe/"), url
assert client.get("/" + url.partition("/rooms/")[2]).status_code == 200
""",
        SITE_URL=f"https://{DOMAIN}/rooms",
    )


@promise("Without the API")
def test_service_without_api_has_its_pages(dish):
    dish.ask(
        """
import sys
assert client.get("/").status_code == 200
for path in ("/api/", "/api/token/", "/api/schema/", "/api/docs/"):
    assert client.get(path).status_code == 404
client.force_login(anna)
page = client.get("/admin/")
assert page.status_code == 200 and "API token" not in page.content.decode()
assert client.get("/admin/operations/").status_code in {200, 404}
"""
    )


@promise("Without beat")
def test_nothing_waits_for_beat(dish):
    web, worker = dish.start("web"), dish.start("worker")
    worker.wait_for_text(" ready.", seconds=60)
    wait_for(lambda: dish.is_ready("/health/ready?deep"), 30, web.text)
    assert [process.stop() for process in (web, worker)] == [0, 0]
    dish.ask("")


@promise("Without e-mail")
def test_messages_are_discarded(dish):
    dish.ask("from prodserver_ops.console import alerts; assert not alerts.get_channels()")
    dish.run(
        [
            *("python", "manage.py", "shell", "-v0", "-c"),
            "from django.core.mail import send_mail; from prodserver_ops.console import alerts\n"
            "send_mail('a', 'b', None, ['anna@example.com'])\n"
            "assert not alerts.has_email()",
        ],
        **dish.production,
    )


@promise("Another name of the package")
def test_renamed_service_keeps_its_data_and_schedules(dish):
    name = "DJANGO_SETTINGS_MODULE"
    shell = ["python", "manage.py", "shell", "-v0", "-c", "User.objects.create_user('berta')"]
    dish.run(shell, **dish.production | {name: "rooms.settings"})
    dish.production[name] = "rooms.settings"
    assert not (dish.folder / SLUG).exists()
    (command,) = dish.kitchen.recipes["Another name of the package"].shown
    dish.run(["sh", "-c", command.text], **dish.production)
    dish.ask(
        """
from celery import current_app
from django_celery_beat.models import PeriodicTask
assert User.objects.filter(username="berta").exists()
assert User.__module__ == "rooms.models"
assert settings.DOMAIN == "kitchen.example.com"
call_command("makemigrations", check=True, dry_run=True)
call_command("migrate", check_unapplied=True)
current_app.loader.import_default_modules()
names = [row.task for row in PeriodicTask.objects.all()]
assert "rooms.tasks.send_user_digest" in names
assert set(names) <= set(current_app.tasks), names
from prodserver_ops.console import schedule_list
"""
    )


@promise("Forget one person", "Results and a chord")
def test_commands_forget_a_person(dish):
    dish.run("python manage.py migrate --noinput")
    dish.run(
        [
            *("python", "manage.py", "shell", "-v0", "-c"),
            "from django_celery_results.models import TaskResult\n"
            "from django.utils import timezone\n"
            "from prodserver_ops.models import TaskRun\n"
            "user = User.objects.create_user('zqmark', 'zqmark@example.com')\n"
            "Submission.objects.create(author=user, body='A room')\n"
            "TaskResult.objects.create(task_id='1', task_args='zqmark@example.com')\n"
            "TaskRun.objects.create(task_id='1', name='a', started_at=timezone.now(), "
            "arguments='[[\"zqmark\"], {}]')",
        ]
    )
    dry, delete = (step.text for step in dish.kitchen.recipes["Forget one person"].shown)
    output = dish.run(["sh", "-c", dry.replace("NAME", "zqmark")])
    assert f"{SLUG}.Submission.author: 1" in output
    with contextlib.closing(sqlite3.connect(dish.folder / "var" / "db.sqlite3")) as database:
        assert "zqmark" in "\n".join(database.iterdump())
        dish.run(["sh", "-c", delete.replace("NAME", "zqmark")])
        assert "zqmark" not in "\n".join(database.iterdump())
